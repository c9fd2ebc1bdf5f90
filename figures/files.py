"""What every figure of a study needs: its tables, a line about its data, and saving in both formats."""

import json
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from kfacerr.exceptions import InputError
from kfacerr.plot import save

__all__ = ["note", "read_table", "save_both"]


def note(run: Path, seeds: int, *, band: bool = True) -> str:
    """One line over a figure: the data and the setting, as config.json names them, and what is drawn."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        data, setting = config["data"], config.get("setting", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        data = setting = ""
    drawn = f"mean of {seeds} seeds" + (", band: their range" if band else "") if seeds > 1 else ""
    return ", ".join(filter(None, (data, setting, drawn)))


_TEXT = ("algorithm", "metric", "factor", "optimizer", "driver", "part", "continuation")


def read_table(path: Path, columns: tuple[str, ...], *, rows: bool = True) -> pd.DataFrame:
    """A study's table, or what `gzip` made of it.

    Raises:
        InputError: it is missing, lacks one of `columns`, or is empty where `rows` are needed; names the file.
    """
    compressed = path.with_name(path.name + ".gz")
    if not path.exists():
        if not compressed.exists():
            raise InputError(f"{path}: no such file")
        path = compressed
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as a table: {error}") from None
    missing = [name for name in columns if name not in frame]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}")
    if frame.empty and rows:
        raise InputError(f"{path}: has no rows")
    text = [
        name
        for name in columns
        if name not in _TEXT and len(frame) and not pd.api.types.is_numeric_dtype(frame[name])
    ]
    if text:
        raise InputError(f"{path}: column {text[0]!r} is not all numbers")
    return frame


def save_both(figure: Figure, stem: Path) -> None:
    """As PDF and PNG."""
    for suffix in (".pdf", ".png"):
        save(figure, stem.with_suffix(suffix))
