"""`python -m figures DIR`: renders the figures and tables of a study again from its CSVs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kfacerr.command import Parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Renders a folder; returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m figures", description="Render a study's figures and tables.")
    parser.add_argument("run", type=Path, metavar="DIR", help="what a study wrote to --out")
    return run("figures", parser, _render, argv)


def _render(arguments: argparse.Namespace) -> None:
    from figures import monitor, optimizers, render  # matplotlib, which --help needs not

    folder: Path = arguments.run
    if (folder / "epochs.csv").exists():
        optimizers.render(folder)
    elif (folder / "monitor.csv").exists() or (folder / "monitor.csv.gz").exists():
        monitor.render_monitor(folder)
    else:
        render.render(folder)


if __name__ == "__main__":
    sys.exit(main())
