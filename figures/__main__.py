"""`python -m figures DIR`: renders the figures and tables of a study again from its CSVs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kfacerr.command import Parser, path, run
from kfacerr.exceptions import InputError
from kfacerr.files import check_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Renders a folder; returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m figures", description="Render a study's figures and tables.")
    parser.add_argument("run", type=path, metavar="DIR", help="what a study wrote to --out")
    return run("figures", parser, _render, argv)


def _render(arguments: argparse.Namespace) -> None:
    from figures import monitor, optimizers, render, tasks  # matplotlib, which --help needs not

    folder: Path = arguments.run
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    check_folder(folder)
    if (folder / "epochs.csv").exists():
        optimizers.render(folder)
    elif render.is_there(folder, "trials.csv"):
        tasks.render(folder)
    elif render.is_there(folder, "monitor.csv"):
        monitor.render_monitor(folder)
    else:
        render.render(folder)


if __name__ == "__main__":
    sys.exit(main())
