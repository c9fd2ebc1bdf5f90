"""What a step costs: SGD, asdl, singd and ours on one network, in one run, with conventions that match.

    pip install 'kfacerr[peers]'
    python -m studies.bench.peers [--rounds 5] [--without asdl singd] --out DIR

`studies.bench.contestants` says on what, and how their conventions are matched.

**Checks.** First steps. In float64, where only conventions make a difference: asdl with our damping put into the
place of its own against ours, which must agree to rounding, and all three against their conventions written out.
In float32, as they are timed: each against our K-FAC in float64.

**Times.** The paper's periods 25, 125, 250, 500 are 2, 4, 8, 16 here, so that 16 steps have every kind of step.
Contestants take turns of two steps, the second a plain one. A round is 16 steps of each; the first is not timed.
What a step would cost on average at the paper's periods is the mean of the kinds, weighted with how many of 500
steps are of each.

Writes peers.csv (optimizer, round, k, kind, seconds), summary.csv (optimizer, kind, medians and quartiles in ms,
ratio to SGD), steps.csv (the checks), peers.md (both tables), config.json and environment.json.
"""

import argparse
import importlib.metadata
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kfacerr.command import Parser, check_at_least, path, run
from kfacerr.files import write_text
from kfacerr.inverse import exact_inverse, precondition
from studies.bench import rounds
from studies.bench.contestants import (
    CONTESTANTS,
    CYCLE,
    KINDS,
    MEAN,
    OURS,
    PACKAGES,
    PLAIN,
    SGD,
    T_INV,
    T_UPDT,
    Contestant,
    Problem,
    Setting,
    Step,
    asdl_maker,
    asdl_stepping,
    peer,
)
from studies.bench.yardsticks import PHI, RHO
from studies.environment import environment, hardware
from studies.jobs import alone, open_output

__all__ = ["check", "chosen", "first_layers", "fixed_damping", "main", "measure", "summary"]


# ------------------------------------------------------------------------------------------------ the checks


class Layer(NamedTuple):
    """A layer at the first batch: A (d_A, d_A), G (d_G, d_G) and the gradient (d_G, d_A), float64."""

    A: Tensor
    G: Tensor
    gradient: Tensor

    @property
    def lam(self) -> tuple[Tensor, Tensor]:
        """Ours, of A and of G: phi lambda_max."""
        return PHI * torch.linalg.eigvalsh(self.A)[-1], PHI * torch.linalg.eigvalsh(self.G)[-1]

    @property
    def pi(self) -> Tensor:
        """asdl's, sqrt((tr A/d_A)/(tr G/d_G))."""
        return (self.A.trace() / len(self.A) / (self.G.trace() / len(self.G))).sqrt()


def first_layers(problem: Problem) -> list[Layer]:
    """By hand, without any library's hooks: the layers at the first batch."""
    x, y = problem.batch(0, torch.float64)
    inputs, outputs = [], []
    for module in (network := problem.network(torch.float64)):
        if isinstance(module, nn.Linear):
            inputs.append(x.detach())
        x = module(x)
        if isinstance(module, nn.Linear):
            outputs.append(x)
    loss = cross_entropy(x, y)
    gradients = torch.autograd.grad(loss, outputs, retain_graph=True)
    weights = torch.autograd.grad(loss, list(network.parameters()))
    n = len(y)
    return [
        Layer(a.T @ a / n, n * g.T @ g, w)  # g has the 1/n of the mean loss
        for a, g, w in zip(inputs, gradients, weights, strict=True)
    ]


def fixed_damping(layers: Sequence[Layer]) -> float:
    """D: the geometric mean over the layers of lam_A lam_G."""
    products = torch.stack([lam_A * lam_G for lam_A, lam_G in (layer.lam for layer in layers)])
    return float(products.log().mean().exp())


def written_out(layers: Sequence[Layer], dampings: Sequence[tuple[Any, Any]], start: float = 0.0) -> Tensor:
    """A K-FAC step by the formula `(G + lam_G I)^-1 g (A + lam_A I)^-1`, all weights in one vector.

    Args:
        layers: their factors.
        dampings: lam_A and lam_G of each.
        start: of the factors, how much is still I: they are start I + (1 - start)(A + lam I).
    """
    steps = []
    for layer, lams in zip(layers, dampings, strict=True):
        A, G = (
            exact_inverse((1 - start) * M, lam=torch.as_tensor((1 - start) * lam + start, dtype=M.dtype))[0]
            for M, lam in zip((layer.A, layer.G), lams, strict=True)
        )
        steps.append(precondition(layer.gradient, G, A).reshape(-1))
    return torch.cat(steps)


def first_step(contestant: Contestant, setting: Setting, dtype: torch.dtype = torch.float64) -> Tensor:
    """What it subtracts from the weights in its first step, in one vector, float64."""
    network = setting.problem.network(dtype)
    before = nn.utils.parameters_to_vector(network.parameters()).detach().double()
    contestant.make(network, setting)(*setting.problem.batch(0, dtype))
    after = nn.utils.parameters_to_vector(network.parameters()).detach().double()
    return (before - after) / setting.lr


def _asdl_with_our_damping(layers: Sequence[Layer]) -> Contestant:
    """asdl's K-FAC, told for each factor what makes its own rule come out at our lam."""

    def make(network: nn.Sequential, setting: Setting) -> Step:
        maker = asdl_maker(network, setting)

        def place(x: Tensor, y: Tensor) -> None:
            network.zero_grad()
            cross_entropy(network(x), y).backward()
            for (name, _), layer in zip(maker.named_modules_for_curvature, layers, strict=True):
                lam_A, lam_G = layer.lam
                for side, root in (("A", lam_A / layer.pi), ("B", lam_G * layer.pi)):
                    maker.update_preconditioner(damping=float(root**2), module_name=name, kron=[side])
            maker.precondition()

        return asdl_stepping(network, maker, setting.lr, place)

    return Contestant(make, {}, "asdl")


def check(contestants: Mapping[str, Contestant], setting: Setting) -> pd.DataFrame:
    """First steps against what they should be, or be like.

    Columns step, against, dtype (of the step; `against` is float64), difference (the norm of the difference over
    that of `against`), cosine.
    """
    layers = first_layers(setting.problem)
    setting = replace(setting, lr=1.0)
    ours = first_step(contestants[OURS], setting)
    root = setting.damping**0.5
    pairs: list[tuple[str, str, Tensor, Tensor]]
    pairs = [(OURS, "K-FAC written out", ours, written_out(layers, [layer.lam for layer in layers]))]
    if "asdl K-FAC" in contestants:
        placed = first_step(_asdl_with_our_damping(layers), setting)
        pairs.append(("asdl K-FAC with our damping", OURS, placed, ours))
        theirs = written_out(layers, [(root * layer.pi, root / layer.pi) for layer in layers])
        step = first_step(contestants["asdl K-FAC"], setting)
        pairs.append(("asdl K-FAC", "K-FAC with its damping, written out", step, theirs))
    if "singd dense" in contestants:
        theirs = written_out(layers, [(root, root)] * len(layers), start=RHO)
        step = first_step(contestants["singd dense"], setting)
        pairs.append(("singd dense", "K-FAC with its damping and start, written out", step, theirs))
    if "asdl SENG" in contestants:
        full = replace(setting, problem=replace(setting.problem, sketch=None))
        step = first_step(contestants["asdl SENG"], full)
        reference = first_step(contestants["SENG"], full)
        pairs.append(("asdl SENG, nothing sampled", "SENG, nothing sampled", step, reference))
    rows = [(step, against, "float64", *_compare(S, reference)) for step, against, S, reference in pairs]
    for name, contestant in contestants.items():
        rows.append((name, OURS, "float32", *_compare(first_step(contestant, setting, torch.float32), ours)))
    return pd.DataFrame(rows, columns=["step", "against", "dtype", "difference", "cosine"])


def _compare(S: Tensor, reference: Tensor) -> tuple[float, float]:
    norm = torch.linalg.vector_norm
    return float(norm(S - reference) / norm(reference)), float(S @ reference / norm(S) / norm(reference))


# ------------------------------------------------------------------------------------------------ the times


def measure(contestants: Mapping[str, Contestant], setting: Setting, count: int) -> pd.DataFrame:
    """Columns optimizer, round, k, kind, seconds."""

    def way(contestant: Contestant) -> rounds.Prepare:
        step = contestant.make(setting.problem.network(), setting)

        def turn(batches: Sequence[tuple[int, Tensor, Tensor]]) -> Iterator[tuple[str, rounds.Run]]:
            for k, *batch in batches:
                yield str(k), lambda batch=batch: step(*batch)  # type: ignore[misc]

        return turn

    ways = {name: way(contestant) for name, contestant in contestants.items()}
    turns = CYCLE // 2  # of a round; those of round 0 start everything up and fill the ranks
    times = rounds.in_turns(
        ways,
        turns * count,
        torch.device("cpu"),
        fresh=lambda turn: [(k, *setting.problem.batch(k)) for k in (CYCLE + 2 * turn, CYCLE + 2 * turn + 1)],
        warm_up=turns,
    )
    k = times.part.astype(int)
    kinds = [contestants[name].kind(i, setting.periods) for name, i in zip(times.way, k, strict=True)]
    table = times.assign(optimizer=times.way, k=k, kind=kinds, round=k // CYCLE)
    return table[["optimizer", "round", "k", "kind", "seconds"]]


def summary(times: pd.DataFrame, contestants: Mapping[str, Contestant]) -> pd.DataFrame:
    """Columns optimizer, kind, ms (median), low, high (quartiles, ms), ratio (to SGD's median); kind "mean" too.

    The mean's median and quartiles are over the rounds, of the mean of a round's medians.
    """
    rows = []
    for name, own in times.groupby("optimizer", sort=False):
        shares = contestants[str(name)].shares()
        by_round = own.pivot_table(index="round", columns="kind", values="seconds", aggfunc="median")
        mean = sum(share * by_round[kind] for kind, share in shares.items())
        for kind in (kind for kind in KINDS if kind in shares or kind == MEAN):
            seconds = mean if kind == MEAN else own.seconds[own.kind == kind]
            rows.append((name, kind, *(1e3 * s for s in rounds.quartiles(pd.Series(seconds)))))
    table = pd.DataFrame(rows, columns=["optimizer", "kind", "ms", "low", "high"])
    sgd = table.ms[(table.optimizer == SGD) & (table.kind == PLAIN)].item()
    return table.assign(ratio=table.ms / sgd)


# ----------------------------------------------------------------------------------------------- the study


def chosen(without: Sequence[str]) -> dict[str, Contestant]:
    """All contestants but those of some libraries.

    Raises:
        InputError: another's library cannot be imported.
    """
    for library in PACKAGES:
        if library not in without:
            peer(library)
    return {name: contestant for name, contestant in CONTESTANTS.items() if contestant.library not in without}


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each optimizer: ms, quartiles and the ratio to SGD of each kind of step."""
    text = table.assign(
        text=[f"{t.ms:.1f} ({t.low:.1f}-{t.high:.1f}), x{t.ratio:.2f}" for t in table.itertuples(index=False)]
    )
    wide = text.pivot_table(index="optimizer", columns="kind", values="text", aggfunc="first", sort=False)
    kinds = [kind for kind in KINDS if kind in wide]
    return wide[kinds].fillna("-").reset_index()


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmark; returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m studies.bench.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="of 16 steps each (default: 5)")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=tuple(PACKAGES), metavar="NAME", help="asdl, singd: leave out"
    )
    parser.add_argument("--out", type=path, required=True, metavar="DIR")
    return run("peers", parser, alone(_run), argv)


def _run(arguments: argparse.Namespace) -> None:
    check_at_least(rounds=(arguments.rounds, 1))
    contestants = chosen(arguments.without)
    problem = Problem()
    damping = fixed_damping(first_layers(problem))
    setting = Setting(problem, damping)
    out: Path = arguments.out
    versions = {p: importlib.metadata.version(p) for lib, p in PACKAGES.items() if lib not in arguments.without}
    config = {"rho": RHO, "phi": PHI, "damping": damping, "rounds": arguments.rounds, "peers": versions}
    open_output(out, {**asdict(problem), "sizes": list(problem.sizes), **config}, resume=False)
    warnings.filterwarnings("ignore", message="Using a non-full backward hook")  # asdl's
    steps = check(contestants, setting)
    times = measure(contestants, setting, arguments.rounds)
    table = summary(times, contestants)
    rounds.write(out, {"steps": steps, "peers": times, "summary": table})
    text = _report(problem, table, steps, arguments.rounds)
    write_text(out / "peers.md", text)
    print(text)


def _report(problem: Problem, table: pd.DataFrame, steps: pd.DataFrame, count: int) -> str:
    machine = hardware(environment(), torch.device("cpu"))
    sizes = "-".join(map(str, problem.sizes))
    return (
        f"{readable(table).to_markdown(index=False)}\n\n"
        f"Milliseconds of a step: medians of {count} rounds, quartiles in brackets, and the ratio to SGD. "
        f"mean: of a step with factors every {T_UPDT} and inverses every {T_INV} steps. singd's one update stands "
        f"under inverse, and comes every {T_UPDT}. MLP {sizes}, n = {problem.n}, r = {problem.rank}, float32; "
        f"{machine}.\n\n"
        f"{steps.to_markdown(index=False, floatfmt='.3g')}\n\n"
        "First steps: the norm of the difference over that of the second, which is float64, and the cosine.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
