"""Files are written whole or not at all."""

import os
from pathlib import Path

import pytest

from kfacerr.exceptions import InputError
from kfacerr.files import check_outputs, write_atomically, write_text


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
