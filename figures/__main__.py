"""`python -m figures DIR`: renders the figures and tables of a study again from its CSVs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from figures import optimizers
from figures.monitor import render_monitor
from figures.render import render
from kfacerr.cli import Parser
from kfacerr.exceptions import InputError


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m figures", description="Render a study's figures and tables.")
    parser.add_argument("run", type=Path, metavar="DIR", help="what a study wrote to --out")
    try:
        run: Path = parser.parse_args(argv).run
        if (run / "epochs.csv").exists():
            optimizers.render(run)
        elif (run / "monitor.csv").exists() or (run / "monitor.csv.gz").exists():
            render_monitor(run)
        else:
            render(run)
    except InputError as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
