"""Files are written whole or not at all."""

import os
from pathlib import Path

import pytest

from kfacerr.exceptions import InputError
from kfacerr.files import check_folder, check_outputs, clear, write_atomically, write_text


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    path = tmp_path / "new" / "errors.csv"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fails)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_the_temporary_file_keeps_the_suffix_and_stands_beside_the_file(tmp_path: Path) -> None:
    seen: list[Path] = []
    write_atomically(tmp_path / "figure.pdf", lambda path: (seen.append(path), path.touch()))
    assert (seen[0].suffix, seen[0].parent) == (".pdf", tmp_path)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/config\.json: cannot be written"):
        write_text(tmp_path / "file" / "config.json", "{}")


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path):
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"


def test_what_is_no_regular_file_is_refused_before_the_work(tmp_path):
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="is a pipe or a device"):
        check_outputs({"--out": pipe}, {})
    with pytest.raises(InputError, match="is a pipe or a device"):
        check_outputs({"--out": Path(os.devnull)}, {})


def test_a_name_that_is_too_long_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be written") as caught:
        check_outputs({"--out": tmp_path / ("x" * 300 + ".csv")}, {})
    assert "\n" not in str(caught.value)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    kept = {".hidden.tmp", ".x.12a.tmp.csv", "x.12.tmp.csv", ".errors.csv.lock", "errors.csv", "state"}
    (tmp_path / "state").mkdir()
    for name in (*(kept - {"state"}), ".errors.812.tmp.csv", ".config.9.tmp", "state/.seed-0.77.tmp.pt"):
        (tmp_path / name).touch()
    clear(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == kept


def test_an_output_that_is_another_name_of_an_input_is_refused(tmp_path):
    recording, hard, soft = (tmp_path / name for name in ("r.h5", "hard.h5", "soft.h5"))
    recording.touch()
    os.link(recording, hard)
    soft.symlink_to(recording)
    for out in (recording, hard, soft):
        with pytest.raises(InputError, match="is the recording itself"):
            check_outputs({"--out": out}, {"the recording itself": recording})


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("none")
    for name in ("file", "file/x", "dangling", "dangling/x"):
        with pytest.raises(InputError, match="is not a folder"):
            check_folder(tmp_path / name)
    (tmp_path / "dangling").unlink()
    check_folder(tmp_path / "new" / "newer")
    assert not (tmp_path / "new").exists()
    (tmp_path / "link.csv").symlink_to(tmp_path / "file")
    with pytest.raises(InputError, match=r"link\.csv: is a link to file beside it"):
        check_folder(tmp_path)
    (tmp_path / "link.csv").unlink()
    check_folder(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # as root, no folder is closed
    with pytest.raises(InputError, match="is not writable"):
        check_folder(tmp_path / "new")


def test_nothing_but_a_file_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe or a device"):
        write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
