"""N-KFAC and W-KFAC beside B-KFAC, B-R-KFAC, R-KFAC, Frequent Directions and stale K-FAC, on recordings.

    python -m studies.sketches RECORDING ... [--flat 0.4 0.8] [--rank 29] [--draws 3] [--dtypes float64] --out DIR

B-KFAC at ranks r, r/2 and 2 r is met by the N-KFAC of the most columns that is within its applied rank, its
carried columns, its memory and its flops (`Process.cost`, both factors, an update with its estimate). Beside them:
periods of re-basing and shares of fresh columns at equal rank. Randomised algorithms run several times, with other
draws. `--flat 0.4` makes a recording of random columns, 40% of whose trace is spread evenly over all directions,
while the leading ones turn.

Errors are means over the windows. (1) and (2) change at updates only; (3) and (4) are measured there and at one
plain iteration between two, and weighed by how many there are. DIR gets errors.csv (a row a recording, dtype,
draw, window, algorithm and continuation), sketches.md, sketches.pdf and .png, and environment.json.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from figures.sketches import render
from kfacerr.algorithms import Algorithm
from kfacerr.command import Parser, check_at_least, run
from kfacerr.exceptions import InputError
from kfacerr.inverse import check_phi
from kfacerr.metrics import METRICS
from kfacerr.process import Process, Settings
from kfacerr.recorder import RecordingWriter
from kfacerr.recording import LayerRecording, Recording
from kfacerr.replay import replay
from kfacerr.stream import Step, Window
from kfacerr.streaming import StreamingNystrom
from kfacerr.study import ErrorStudy, Row, table
from studies.bench import rounds
from studies.jobs import alone

__all__ = ["Contestant", "Sizes", "compare", "contestants", "main", "weighed", "write_flat"]

CONTINUATIONS = ("min", "trace")
EQUAL = ("rank", "columns", "memory", "flops")
"""What an N-KFAC may have in common with a B-KFAC."""


class Sizes(NamedTuple):
    """Of a layer: d_A, d_G, columns n of an update, iterations between updates."""

    d_A: int
    d_G: int
    n: int
    every: int


class Spent(NamedTuple):
    """What following both factors takes.

    Attributes:
        rank: modes that the inverse of A is applied with.
        columns: carried from one update to the next.
        memory: array elements held.
        flops: of an update with its estimate, with its share of the heaviest ones.
    """

    rank: float
    columns: float
    memory: float
    flops: float


@dataclass(frozen=True)
class Contestant:
    """An algorithm in the comparison.

    Attributes:
        name: an algorithm's, or one that says how a variant differs.
        make: a process from a seed and a side.
        role: what it is here for.
        drawn: whether it draws anything.
    """

    name: str
    make: Callable[[int, str], Process]
    role: str
    drawn: bool

    def spent(self, sizes: Sizes) -> Spent:
        """On a layer of these sizes."""
        processes = {side: self.make(0, side) for side in "AG"}
        costs = {side: p.cost(getattr(sizes, f"d_{side}"), sizes.n) for side, p in processes.items()}
        updates = {
            side: cost.update + cost.heavy * sizes.every / max(cost.period, sizes.every)
            for side, cost in costs.items()
        }
        one = processes["A"]
        carried = one.settings.rank if "rank" in one.fixed else sizes.d_A
        carried = one.columns if isinstance(one, StreamingNystrom) else carried
        memory = sum(cost.numbers for cost in costs.values())
        return Spent(costs["A"].rank, min(carried, sizes.d_A), memory, sum(updates.values()))


class _Variant(StreamingNystrom):
    """N-KFAC with another share of fresh columns, or with those handed out in its estimate."""

    part: float
    handed_out: bool

    @property
    def fresh(self) -> int:
        return int(np.ceil(self.part * self.columns))

    def _modes(self, d: int) -> int:
        return min(self.columns, d) if self.handed_out else super()._modes(d)


def _named(name: str, role: str) -> Contestant:
    algorithm = Algorithm.parse(name)
    drawn = algorithm.base in ("R-KFAC", "B-R-KFAC", "W-KFAC", "N-KFAC")
    return Contestant(name, lambda seed, side: algorithm.process(Settings(seed=seed), side), role, drawn)


def _fresh(s: int, part: float, handed_out: bool) -> Contestant:
    name = f"N-KFAC s={s}, {part:.0%} fresh{', handed out' if handed_out else ''}"

    def make(seed: int, side: str) -> Process:
        process = _Variant(Settings(s=s), rng=np.random.default_rng([seed, ord(side), *name.encode()]))
        process.part, process.handed_out = part, handed_out
        return process

    return Contestant(name, make, "fresh", drawn=True)


def within(kind: str, limit: float, sizes: Sizes) -> int:
    """The most columns s of an N-KFAC that spends no more of one kind than `limit`; at least 1."""
    low, high = 1, max(sizes.d_A, sizes.d_G)
    while low < high:
        s = (low + high + 1) // 2
        fits = getattr(_named(f"N-KFAC s={s}", "").spent(sizes), kind) <= limit
        low, high = (s, high) if fits else (low, s - 1)
    return low


def contestants(sizes: Sizes, rank: int, variants: bool) -> list[Contestant]:
    """All that are compared on a layer.

    Args:
        sizes: of the layer.
        rank: r, about which B-KFAC's ranks lie.
        variants: also periods of re-basing, and shares of fresh columns.

    Returns:
        Each name once.
    """
    applied = rank + sizes.n
    found = [_named("K-FAC T_inv=50", "others"), _named(f"FD rank={rank}", "others")]
    found += [_named(f"R-KFAC T_inv=50 rank={applied}", "others"), _named(f"B-R-KFAC rank={rank}", "others")]
    found += [_named(f"W-KFAC T_inv={T} rank={applied}", "others") for T in (50, sizes.every)]
    brand = [_named(f"B-KFAC rank={r}", "B-KFAC") for r in (max(1, rank // 2), rank, 2 * rank)]
    found += brand
    for one in brand[1:]:
        spent = one.spent(sizes)
        columns = {kind: within(kind, getattr(spent, kind), sizes) for kind in EQUAL}
        found += [_named(f"N-KFAC s={s}", "N-KFAC") for s in columns.values()]
    s = within("rank", applied, sizes)
    found += [_named(f"N-KFAC s={2 * applied} rank={applied}", "truncated")]
    if variants:
        found += [_named(f"N-KFAC s={s} T_base={u * sizes.every}", "T_base") for u in (0, 1, 10, 50)]
        found += [
            _fresh(s, part, out) for part, out in ((0.0, False), (1 / 16, False), (1 / 4, False), (1 / 16, True))
        ]
    return list({one.name: one for one in found}.values())


# ------------------------------------------------------------------------------------------------------ errors


def compare(
    layer: LayerRecording, chosen: Sequence[Contestant], *, draws: int, phi: float | None, dtype: str
) -> pd.DataFrame:
    """The mean errors of each contestant in each window.

    Args:
        layer: of an open recording.
        chosen: the contestants.
        draws: of the randomised ones.
        phi: damping ratio in place of the recording's.
        dtype: to compute in.

    Returns:
        With columns algorithm, draw, continuation, epoch and the four metrics.
    """
    runs, pairs = {}, {}
    for one in chosen:
        for draw in range(draws if one.drawn else 1):
            pair = one.make(draw, "A"), one.make(draw, "G")
            for continuation in CONTINUATIONS:
                name = f"{one.name}#{draw} continuation={continuation}"
                runs[name], pairs[name] = (one.name, draw, continuation), pair
    study = ErrorStudy(pairs, Settings(), layer.windows, phi=0.1 if phi is None else phi)
    every, updates = layer.update_every, set[int]()

    def push(step: Step) -> list[Row]:
        if step.update:
            updates.add(step.k)
        return study.push(step)

    plain = {k for w in layer.windows for k in range(w.start + every // 2, w.start + w.length, every)}
    steps = replay(layer, push, convert=lambda X: X.astype(dtype), phi=phi, plain=plain, title=dtype)
    frame = table([row for new in steps for row in new])
    frame["update"] = frame.k.isin(updates)
    means = weighed(frame, {w.epoch: w.length for w in layer.windows})[["algorithm", "epoch", *METRICS]]
    parts = pd.DataFrame([runs[name] for name in means.algorithm], columns=["algorithm", "draw", "continuation"])
    return pd.concat([parts, means.drop(columns="algorithm")], axis=1)


def weighed(frame: pd.DataFrame, lengths: dict[int, int]) -> pd.DataFrame:
    """Means over the windows, of which all updates and some of the other iterations were measured.

    Args:
        frame: columns algorithm, epoch, metric, value, and update: whether the iteration is one.
        lengths: of each epoch's window.

    Returns:
        Columns algorithm, epoch, and one a metric.
    """
    keys = ["algorithm", "epoch", "metric"]
    grouped = frame.groupby([*keys, "update"], sort=False).value.agg(["mean", "size"]).reset_index()
    at_updates = grouped[grouped["update"]].set_index(["algorithm", "epoch", "metric"])["size"]
    own = at_updates.reindex(pd.MultiIndex.from_frame(grouped[keys])).to_numpy()
    total = grouped.epoch.map(lengths).to_numpy()
    grouped["weight"] = np.where(grouped["update"], own, total - own)
    grouped["part"] = grouped["mean"] * grouped.weight
    sums = grouped.groupby(keys, sort=False)[["part", "weight"]].sum()
    return (sums.part / sums.weight).unstack().reset_index()


# -------------------------------------------------------------------------------------------------- flat spectra


def write_flat(path: Path, tail: float, *, d_A: int = 512, d_G: int = 192, n: int = 32, seed: int = 0) -> None:
    """A recording of random columns with a flat tail: 100 updates, the last 30 in a window.

    24 directions, which turn by about a degree an update, have variances that fall geometrically; the others share
    `tail` of the trace evenly.

    Args:
        path: of the recording.
        tail: share of the trace.
        d_A: rows of A.
        d_G: rows of G.
        n: columns.
        seed: of the columns.
    """
    rng, every, head = np.random.default_rng(seed), 10, 24
    window = Window(700, 300, 0)
    leading = 0.8 ** np.arange(head)
    heads = {d: np.linalg.qr(rng.standard_normal((d, head)))[0] for d in (d_A, d_G)}

    def columns(d: int) -> np.ndarray:
        strong = heads[d] * np.sqrt((1 - tail) * leading / leading.sum())
        even = np.sqrt(tail / d) * rng.standard_normal((d, n))
        return ((strong @ rng.standard_normal((head, n)) + even) / np.sqrt(n)).astype(np.float32)

    with RecordingWriter(path, overwrite=True) as writer:
        writer.add_layer(
            "flat", d_A=d_A, d_G=d_G, n=n, bias=False, batch_size=n, update_every=every, windows=[window]
        )
        for k in range(window.start + window.length):
            if k % every == 0:
                for d, Q in heads.items():
                    turn = rng.standard_normal(Q.shape) / np.sqrt(d)
                    heads[d] = np.linalg.qr(Q + 0.02 * turn)[0]
            if k % every == 0 or k in window:
                writer.append("flat", Step(k, columns(d_A), columns(d_G), k % every == 0))


# -------------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """The comparison; returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m studies.sketches", description=__doc__.split("\n")[0])
    parser.add_argument("recordings", nargs="*", type=Path, metavar="RECORDING")
    parser.add_argument("--layer", default="fc0", metavar="NAME", help="of the recordings")
    parser.add_argument(
        "--labels", nargs="+", metavar="TEXT", help="what tables call the recordings (default: their files)"
    )
    parser.add_argument("--flat", nargs="+", type=float, default=[], metavar="TAIL", help="shares of an even tail")
    parser.add_argument("--rank", type=int, default=29, metavar="R", help="B-KFAC's ranks are R, R/2 and 2R")
    parser.add_argument("--draws", type=int, default=3, metavar="N", help="of the randomised algorithms")
    parser.add_argument("--phi", type=float, help="damping ratio (default: the recording's, else 0.1)")
    parser.add_argument("--dtypes", nargs="+", choices=("float64", "float32"), default=["float64"])
    parser.add_argument("--few", action="store_true", help="no periods and no shares of fresh columns")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return run("sketches", parser, alone(_run), argv)


def _run(arguments: argparse.Namespace) -> None:
    check_at_least(rank=(arguments.rank, 1), draws=(arguments.draws, 1))
    if arguments.phi is not None:
        check_phi(arguments.phi)
    if not (arguments.recordings or arguments.flat):
        raise InputError("nothing to compare on: give a recording, or --flat and a share of the trace")
    if arguments.labels and len(arguments.labels) != len(arguments.recordings):
        raise InputError(
            f"{len(arguments.labels)} --labels for {len(arguments.recordings)} recordings: give one each"
        )
    for tail in arguments.flat:
        if not 0 < tail < 1:
            raise InputError(f"--flat is a share of the trace, in (0, 1), got {tail}")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    frames = []
    for label, path, layer in _recordings(arguments):
        with Recording(path) as recording:
            recorded = recording.layer(layer)
            sizes = Sizes(recorded.d_A, recorded.d_G, recorded.n, recorded.update_every)
            chosen = contestants(sizes, arguments.rank, not arguments.few)
            spent = pd.DataFrame(
                [{"algorithm": one.name, "role": one.role, **one.spent(sizes)._asdict()} for one in chosen]
            )
            for dtype in arguments.dtypes:
                errors = compare(recorded, chosen, draws=arguments.draws, phi=arguments.phi, dtype=dtype)
                known: dict[str, Any] = {"recording": label, "dtype": dtype}
                frames.append(errors.merge(spent, on="algorithm").assign(**known))
                rounds.write(out, {"errors": pd.concat(frames, ignore_index=True)})
    render(out)
    print((out / "sketches.md").read_text(encoding="utf-8"))
    print(f"sketches: results are in {out}", file=sys.stderr)


def _recordings(arguments: argparse.Namespace) -> Iterator[tuple[str, Path, str]]:
    """Label, file and layer of each; those that are asked for are made."""
    labels = arguments.labels or [path.stem for path in arguments.recordings]
    for label, path in zip(labels, arguments.recordings, strict=True):
        yield label, path, arguments.layer
    for tail in arguments.flat:
        path = arguments.out / f"flat-{tail:g}.h5"
        write_flat(path, tail)
        yield f"{tail:.0%} of the trace even", path, "flat"


if __name__ == "__main__":
    sys.exit(main())
