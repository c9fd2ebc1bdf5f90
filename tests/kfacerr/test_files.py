"""Files are written whole or not at all."""

from pathlib import Path

import pytest

from kfacerr.exceptions import InputError
from kfacerr.files import write_atomically, write_text


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
