"""On paper: what it takes to follow the K-factors of a large language model's layers.

    python -m studies.layer_costs [--tokens 4096] [--devices 8] [--rank 220] [--out DIR]

One factor of d rows, an update of n tokens a device: memory, flops and time by `Process.cost`, on one device and
with several data-parallel ones, as `kfacerr.torch.distributed` shares the work: each has tokens of its own; R-KFAC
and K-FAC sum (d, d) matrices and share the decompositions out, B-KFAC gathers all columns, and N-KFAC sums (d, s)
matrices. Sent is what a ring moves through each device: 2 (W - 1)/W of what is summed, (W - 1) n of what is
gathered. Times are flops over a rate, and no measurement.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from kfacerr.algorithms import Algorithm
from kfacerr.command import Parser, check_at_least, run
from kfacerr.files import write_text
from kfacerr.process import Process, Settings
from kfacerr.streaming import StreamingNystrom

__all__ = ["Setting", "main", "markdown", "table"]

SIZES = tuple(2**k for k in range(13, 18))
NAMES = ("K-FAC", "R-KFAC", "B-KFAC", "N-KFAC")


class Setting(NamedTuple):
    """What the table is made for.

    Attributes:
        tokens: columns of an update on each device, n.
        devices: W.
        rank: r; N-KFAC carries 2 r columns.
        T_updt: iterations between updates.
        T_inv: iterations between decompositions.
        rate: flops a second, in float32.
    """

    tokens: int = 4096
    devices: int = 8
    rank: int = 220
    T_updt: int = 25
    T_inv: int = 250
    rate: float = 3e13


def table(setting: Setting) -> pd.DataFrame:
    """A row for each d and algorithm: GiB, Tflop and ms an update; then Tflop and GB sent of each of W devices."""
    settings = Settings(rank=setting.rank, T_inv=setting.T_inv)
    rows = []
    for d in SIZES:
        for name in NAMES:
            process = Algorithm(name).process(settings, "A")
            alone, shared, sent = _spent(process, d, setting)
            numbers = process.cost(d, setting.tokens).numbers
            rows.append(
                {
                    "d": d,
                    "algorithm": name,
                    "GiB": 4 * numbers / 2**30,
                    "Tflop": alone / 1e12,
                    "ms": 1e3 * alone / setting.rate,
                    "Tflop each": shared / 1e12,
                    "GB sent": 4 * sent / 1e9,
                }
            )
    return pd.DataFrame(rows)


def _spent(process: Process, d: int, setting: Setting) -> tuple[float, float, float]:
    """Flops of an update alone, and of each of W devices; numbers that each sends.

    The heaviest updates count with their share, and on W devices each has its part of them.
    """
    n, W, every = setting.tokens, setting.devices, setting.T_updt
    ring = 2 * (W - 1) / W
    cost = process.cost(d, n)
    heavy = cost.heavy * every / max(cost.period, every)
    alone = cost.update + heavy
    if isinstance(process, StreamingNystrom):
        s = min(process.columns, d)
        return alone, alone, ring * (d * s + s * s)
    if process.needs_columns:
        whole = process.cost(d, W * n)
        return alone, whole.update / W, (W - 1) * float(n) * d
    return alone, cost.update + heavy / W, ring * d * d


def markdown(frame: pd.DataFrame) -> str:
    """As Markdown, three digits."""
    shown = frame.astype({"d": object}).map(lambda value: f"{value:.3g}" if isinstance(value, float) else value)
    return shown.to_markdown(index=False, disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m studies.layer_costs", description=__doc__.split("\n")[0])
    default = Setting()
    parser.add_argument(
        "--tokens", type=int, default=default.tokens, metavar="N", help="of an update on each device"
    )
    parser.add_argument("--devices", type=int, default=default.devices, metavar="W", help="data-parallel ones")
    parser.add_argument("--rank", type=int, default=default.rank, metavar="R")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write layers.csv and layers.md there")
    return run("layer_costs", parser, _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    given = {"tokens": arguments.tokens, "devices": arguments.devices, "rank": arguments.rank}
    check_at_least(**{name: (value, 1) for name, value in given.items()})
    frame = table(Setting(**given))
    print(markdown(frame))
    if arguments.out is not None:
        write_text(arguments.out / "layers.csv", frame.to_csv(index=False, float_format="%.5g"))
        write_text(arguments.out / "layers.md", markdown(frame) + "\n")


if __name__ == "__main__":
    sys.exit(main())
