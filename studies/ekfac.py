"""Where the error of a step comes from: down to EKFAC and to the empirical Fisher itself, on a recording.

    python -m studies.ekfac RECORDING [--layer fc0] [--rank 29] --out DIR

A step S of an algorithm is joined to the natural gradient S* = (F + lam I)^-1 g by steps between which one thing
changes at a time, so that the differences add up to S - S*:

    staleness    from the algorithm to itself with an estimate that takes every update (`Algorithm.fresh`)
    truncation   from there to K-FAC, exact and fresh: (Gamma + lam_G I)^-1 J (A + lam_A I)^-1
    damping      from there to (Gamma (x) A + lam I)^-1 g, lam = lam_A lam_G
    eigenvalues  from there to EKFAC in the same eigenbasis: (U diag(S) U^T + lam I)^-1 g
    Kronecker    from there to (F + lam I)^-1 g, with the layer's own empirical Fisher (`kfacerr.ekfac`)

lam_A and lam_G are the reference's, phi lambda_max (§6), and all but the first two have one lam. The norm of each
difference d is given over |S*|, and its share <d, S - S*>/|S - S*|^2, negative where it makes up for others:
shares add up to 1. The angle is what is left before it: 1 - cos of the step that it starts from and S*. Means are
over the windows; measured are the updates and one plain iteration between two, weighed by how many there are. DIR
gets ekfac.csv, ekfac.md, ekfac.pdf and .png, and environment.json.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from figures.ekfac import KEYS, LINKS, render
from kfacerr.algorithms import SEVEN, Algorithm
from kfacerr.array import norm
from kfacerr.command import Parser, check_at_least, run
from kfacerr.damping import Damping
from kfacerr.ekfac import DampedFisher, ExampleFisher
from kfacerr.exceptions import InputError
from kfacerr.grid import Continued, damped_step, in_eigenbases
from kfacerr.inverse import check_phi, precondition
from kfacerr.metrics import angle_error
from kfacerr.process import Settings
from kfacerr.recording import LayerRecording, Recording
from kfacerr.replay import replay
from kfacerr.rsvd import evd
from kfacerr.stream import Step, Windows
from kfacerr.study import ErrorStudy, Row, table
from studies.bench import rounds
from studies.jobs import alone
from studies.sketches import weighed

__all__ = ["ErrorSplit", "main", "split"]

ALGORITHMS = (
    "K-FAC T_inv=10",
    *(name for name in SEVEN if name != "R-KFAC T_inv=10"),  # fresh R-KFAC T_inv=50
    "R-KFAC T_inv=50 continuation=trace",
    "N-KFAC continuation=trace",
    "W-KFAC T_inv=50 continuation=trace",
)


class ErrorSplit:
    """Splits the errors of algorithms on one layer's stream; `push` takes the steps in order, in NumPy.

    Args:
        algorithms: names.
        settings: of the processes.
        windows: where errors are measured.
        every: iterations between updates of the factors.
        phi: damping ratio, where a step brings none.

    Raises:
        InputError: unknown names or values out of range.
    """

    def __init__(
        self, algorithms: Sequence[str], settings: Settings, windows: Windows, *, every: int, phi: float = 0.1
    ) -> None:
        chosen = [Algorithm.parse(name) for name in dict.fromkeys(algorithms)]
        self.fresh = {str(one): str(one.fresh(settings, every)) for one in chosen}
        self.study = ErrorStudy([*self.fresh, *self.fresh.values()], settings, windows, phi=phi)
        self.fisher = ExampleFisher(settings.rho)
        self._inverted: tuple[int, float, DampedFisher] | None = None  # updates, lam
        self._bases: tuple[int, Continued, Continued, np.ndarray] | None = None  # updates, Gamma, A, S
        self._updates = 0

    def push(self, step: Step) -> list[Row]:
        """Takes the next step; its rows, with the metrics of `split`."""
        measured = self.study.push(step)
        columns = {side: self.study.factors[side].admit(X) for side, X in (("A", step.A), ("G", step.G))}
        if step.update:
            self.fisher.update(columns["A"], columns["G"])
            self._updates += 1
        if not measured:
            return []
        phi = self.study.phi if step.phi is None else step.phi
        steps = self._steps(columns["A"], columns["G"], phi)
        epoch = measured[0].epoch
        rows = []
        for name, fresh in self.fresh.items():
            chain = [self._step(one, columns["G"] @ columns["A"].T, phi) for one in (name, fresh)]
            found = split([*chain, *steps])
            rows += [Row(name, step.k, metric, value, epoch) for metric, value in found.items()]
        return rows

    def _step(self, name: str, J: np.ndarray, phi: float) -> np.ndarray:
        """Of an algorithm, with its own damping."""
        measured = next(one for one in self.study.measured if one.name == name)
        inverses = [
            self.study.factors[side].inverse(measured.process, phi=phi, continuation=measured.continuation)
            for side in "GA"
        ]
        G, A = inverses
        assert G is not None and A is not None  # ErrorStudy has looked
        return np.asarray(precondition(J, G, A))

    def _steps(self, A: np.ndarray, G: np.ndarray, phi: float) -> list[np.ndarray]:
        """Those that all algorithms share: K-FAC with both dampings, EKFAC, and the natural gradient."""
        J = G @ A.T
        (by_G, lam_G), (by_A, lam_A) = (self.study.factors[side].reference(phi) for side in "GA")
        lam = float(lam_G) * float(lam_A)
        if self._bases is None or self._bases[0] != self._updates:
            low = {side: evd(self.study.factors[side].average.M) for side in "GA"}
            S = self.fisher.diagonal(low["G"].U, low["A"].U)
            self._bases = self._updates, Continued(low["G"]), Continued(low["A"]), S
        if self._inverted is None or self._inverted[:2] != (self._updates, lam):
            self._inverted = None  # its room, before another is made
            self._inverted = self._updates, lam, DampedFisher(self.fisher, lam)
        _, Gamma, Omega, S = self._bases
        return [
            precondition(J, by_G, by_A),
            damped_step(J, Gamma, Omega, Damping("product", lam), (lam, lam)),
            in_eigenbases(J, Gamma.lowrank, Omega.lowrank, np.pad(1 / (S + lam), (0, 1))),
            self._inverted[2].solve(A, G),
        ]


def split(chain: Sequence[np.ndarray]) -> dict[str, float]:
    """The differences between the steps of a chain that ends with the natural gradient.

    Args:
        chain: a step more than `LINKS`, each (d_G, d_A).

    Returns:
        "norm LINK" over the last step's, "share LINK", "angle LINK" of the step before it, and those of "total".
    """
    links = [one - other for one, other in pairwise(chain)]
    whole, size = chain[0] - chain[-1], float(norm(chain[-1]))
    total = float(norm(whole))
    found = {"norm total": total / size, "share total": 1.0, "angle total": angle_error(chain[0], chain[-1])}
    for link, start, difference in zip(LINKS, chain[:-1], links, strict=True):
        found[f"angle {link}"] = angle_error(start, chain[-1])
        found[f"norm {link}"] = float(norm(difference)) / size
        found[f"share {link}"] = float(np.sum(difference / total * (whole / total))) if total else 0.0
    return found


def measure(layer: LayerRecording, algorithms: Sequence[str], *, rank: int, phi: float | None) -> pd.DataFrame:
    """The mean split of each algorithm in each window.

    Args:
        layer: of an open recording, fully connected.
        algorithms: names.
        rank: r.
        phi: damping ratio in place of the recording's.

    Returns:
        Columns epoch, algorithm, link, norm, share, angle.

    Raises:
        InputError: a convolution, no windows or bad columns; names file, layer and iteration.
    """
    if layer.n != layer.batch_size:
        raise InputError(
            f"{layer.path}: layer {layer.name!r} has {layer.n} columns for {layer.batch_size} examples: a fully "
            "connected layer is needed, of which each column is an example's"
        )
    every, updates = layer.update_every, set[int]()
    splitting = ErrorSplit(algorithms, Settings(rank=rank), layer.windows, every=every, phi=phi or 0.1)

    def push(step: Step) -> list[Row]:
        if step.update:
            updates.add(step.k)
        return splitting.push(step)

    plain = {k for w in layer.windows for k in range(w.start + every // 2, w.start + w.length, every)}
    steps = replay(layer, push, convert=lambda X: X.astype("float64"), phi=phi, plain=plain)
    frame = table([row for new in steps for row in new])
    frame["update"] = frame.k.isin(updates)
    means = weighed(frame, {w.epoch: w.length for w in layer.windows})
    long = means.melt(id_vars=["algorithm", "epoch"])
    long[["kind", "link"]] = long.metric.str.split(" ", expand=True)
    wide = long.pivot_table(index=["epoch", "algorithm", "link"], columns="kind", values="value", sort=False)
    return wide.reset_index()[KEYS[1:]]


def main(argv: Sequence[str] | None = None) -> int:
    """The split; returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m studies.ekfac", description=__doc__.split("\n")[0])
    parser.add_argument("recordings", nargs="+", type=Path, metavar="RECORDING")
    parser.add_argument("--layer", default="fc0", metavar="NAME", help="of the recordings, fully connected")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), metavar="NAME")
    parser.add_argument("--rank", type=int, default=29, metavar="R", help="truncation rank r")
    parser.add_argument("--phi", type=float, help="damping ratio (default: the recording's, else 0.1)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return run("ekfac", parser, alone(_run), argv)


def _run(arguments: argparse.Namespace) -> None:
    check_at_least(rank=(arguments.rank, 1))
    if arguments.phi is not None:
        check_phi(arguments.phi)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    frames = []
    for path in arguments.recordings:
        with Recording(path) as recording:
            layer = recording.layer(arguments.layer)
            found = measure(layer, arguments.algorithms, rank=arguments.rank, phi=arguments.phi)
        frames.append(found.assign(recording=path.stem)[KEYS])
        rounds.write(out, {"ekfac": pd.concat(frames, ignore_index=True)})
    render(out)
    print((out / "ekfac.md").read_text(encoding="utf-8"))
    print(f"ekfac: results are in {out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
