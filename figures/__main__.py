"""`python -m figures DIR`: renders the figures and tables of a study again from its CSVs."""

import argparse
import sys
from pathlib import Path

from figures.render import render
from kfacerr.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m figures", description="Render a study's figures and tables.")
    parser.add_argument("run", type=Path, metavar="DIR", help="what a study wrote to --out")
    try:
        render(parser.parse_args().run)
    except InputError as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    return 0


sys.exit(main())
