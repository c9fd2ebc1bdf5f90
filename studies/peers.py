"""What a step costs: SGD, asdl, singd and ours on one network, in one run, with conventions that match.

    pip install 'kfacerr[peers]'
    python -m studies.peers [--rounds 5] [--without asdl singd] --out DIR

The network is an MLP 3072-1024-10 with ReLU, batch 256, float32. All get the same batches and the same weights,
which stay as they are (the learning rate is 0): at step k all see the same gradients. No clip, no momentum, no
weight decay. Inputs are Gaussian with variances falling as 1/i and |x|^2 about 1, new ones at every step, so that
EA factors have full rank, as in training: eigensolvers are quicker where they have not.

**Conventions**, ours against theirs. The factors A, G are batch means, the Fisher is empirical, rho = 0.95.

* Biases: asdl takes a bias for a block of its own, ours and singd append a 1 to the layer's input. There are none
  here (d_A = 3072), where all three precondition the same matrices.
* EA: ours is `M_0 = A_0 A_0^T`, then `rho M + (1 - rho) A A^T`. asdl's is `ema_decay = 1 - rho`, and starts from
  zero: its `ema_decay` is 1 in the first step here, which gives ours. singd's K and C start from I, and K K^T
  follows the inverse of `rho M + (1 - rho)(A A^T + lam I)` to first order in `lr_cov = 1 - rho`, `kfac_like=True`,
  `alpha1 = 0`. What it starts from and its first order cannot be matched.
* Damping: ours is `lam = phi lambda_max` for each factor, phi = 0.1. asdl has one number for the network, and puts
  sqrt(damping) pi on A and sqrt(damping)/pi on G, pi^2 = (tr A/d_A)/(tr G/d_G); singd has one lam for all factors.
  With D the geometric mean over the layers of lam_A lam_G, ours of the first batch, asdl gets D and singd sqrt(D).
  How it is spread over the factors differs; the table of first steps says what that does.
* Periods: factors every 25 steps, inverses every 250; Brand and corrections as in §6. singd has one period, in
  which it updates K and C: 25, to take in what the others take in.
* SENG: the same lam = D and 128 sampled rows, new curvature every 250 steps. The steps are not the same: asdl puts
  the product of two sums over the samples in the place of `sum_i v_i G_i A_i^T`, divides it by n once more than
  the formula does, and so subtracts next to nothing from g/lam, also where nothing is sampled. Compare what it
  costs, not what it is worth.
* Ours looks for NaN and Inf at every step; the others do not.

asdl's EKFAC is left out, as its `precondition` leaves the gradient as it is; so is its `swift` K-FAC, which has no
EA factor.

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
import importlib
import importlib.metadata
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kfacerr.cli import Parser
from kfacerr.exceptions import InputError
from kfacerr.files import write_text
from kfacerr.inverse import exact_inverse, precondition
from kfacerr.torch import KFAC
from kfacerr.torch.policy import PRESETS
from kfacerr.torch.seng import SENG
from studies.files import environment
from studies.running import check_at_least, command, open_output, write_csv

__all__ = ["CONTESTANTS", "Contestant", "Problem", "Setting", "check", "main", "measure", "summary"]

PACKAGES = MappingProxyType({"asdl": "asdfghjkl", "singd": "singd"})
"""The peers as they are imported, and as they are installed."""

RHO, PHI = 0.95, 0.1
T_UPDT, T_INV = 25, 250
SHORT = MappingProxyType({T_UPDT: 2, 125: 4, T_INV: 8, 500: 16})
"""The paper's periods, in steps, and what stands for them while time is taken: each still divides the next."""
CYCLE = max(SHORT.values())

PLAIN, FACTORS, BRAND, INVERSE, CORRECTION = "plain", "factors", "Brand", "inverse", "correction"
MEAN = "mean"
KINDS = (PLAIN, FACTORS, BRAND, INVERSE, CORRECTION, MEAN)
SGD, OURS = "SGD", "K-FAC"

Step = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Problem:
    """The network and its data.

    Attributes:
        sizes: of its layers, the inputs first.
        n: samples in a batch.
        rank: r of the low-rank inverses.
        sketch: rows that SENG samples; None for all.
    """

    sizes: tuple[int, ...] = (3072, 1024, 10)
    n: int = 256
    rank: int = 220
    sketch: int | None = 128

    def network(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The same weights each time."""
        layers: list[nn.Module] = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for width, following in pairwise(self.sizes):
                layers += [nn.Linear(width, following, bias=False), nn.ReLU()]
        return nn.Sequential(*layers[:-1]).to(dtype)

    def batch(self, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The inputs (n, d) and labels (n,) of step k; the labels are another network's of one layer."""
        d, classes = self.sizes[0], self.sizes[-1]
        variances = 1 / torch.arange(1, d + 1)
        teacher = torch.randn(d, classes, generator=torch.Generator().manual_seed(0))
        x = torch.randn(self.n, d, generator=torch.Generator().manual_seed(k + 1))
        x *= (variances / variances.sum()).sqrt()
        return x.to(dtype), (x @ teacher).argmax(1)


@dataclass(frozen=True)
class Setting:
    """What all contestants are given beside the network.

    Attributes:
        problem: whose network and batches they are.
        damping: D, the product of a layer's two dampings.
        lr: learning rate.
        periods: the paper's, and those of the run.
    """

    problem: Problem
    damping: float
    lr: float = 0.0
    periods: Mapping[int, int] = field(default_factory=lambda: SHORT)


@dataclass(frozen=True)
class Contestant:
    """An optimizer.

    Attributes:
        make: from a network and the setting, what takes a step on a batch.
        updates: the paper's periods of what it does beside plain steps, and what that is; each divides the next.
        library: what it is imported from, if not from here.
    """

    make: Callable[[nn.Sequential, Setting], Step]
    updates: Mapping[int, str]
    library: str = ""

    def kind(self, k: int, periods: Mapping[int, int]) -> str:
        """What step k is: the heaviest it does."""
        due = [name for period, name in self.updates.items() if k % periods[period] == 0]
        return due[-1] if due else PLAIN

    def shares(self) -> dict[str, float]:
        """How much of the paper's steps is of each kind."""
        own = {period: period for period in SHORT}
        kinds = [self.kind(k, own) for k in range(max(SHORT))]
        return {kind: kinds.count(kind) / len(kinds) for kind in dict.fromkeys(kinds)}


# ---------------------------------------------------------------------------------------------- contestants


def _stepping(network: nn.Sequential, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(network(x), y).backward()
        optimizer.step()

    return step


def _sgd(network: nn.Sequential, setting: Setting) -> Step:
    return _stepping(network, torch.optim.SGD(network.parameters(), lr=setting.lr))


def _kfac(algorithm: str) -> Callable[[nn.Sequential, Setting], Step]:
    def make(network: nn.Sequential, setting: Setting) -> Step:
        T = setting.periods
        optimizer = KFAC(
            network,
            algorithm,
            lr=setting.lr,
            T_updt=T[T_UPDT],
            T_inv=T[T_INV],
            T_rsvd=T[T_INV],
            T_brand=T[PRESETS[algorithm].T_brand],
            T_corct=T[500],
            rank=setting.problem.rank,
            phi_lambda=PHI,
            rho=RHO,
            clip=None,
            weight_decay=0.0,
        )
        return _stepping(network, optimizer)

    return make


def _seng(network: nn.Sequential, setting: Setting) -> Step:
    optimizer = SENG(
        network,
        lr=setting.lr,
        damping=setting.damping,
        momentum=0.0,
        weight_decay=0.0,
        update_every=setting.periods[T_INV],
        fim_col_sample_size=setting.problem.sketch,
    )
    return _stepping(network, optimizer)


def _singd(structure: str) -> Callable[[nn.Sequential, Setting], Step]:
    def make(network: nn.Sequential, setting: Setting) -> Step:
        optimizer = _peer("singd.optim.optimizer").SINGD(
            network,
            lr=setting.lr,
            momentum=0.0,
            damping=setting.damping**0.5,
            alpha1=0.0,
            weight_decay=0.0,
            T=setting.periods[T_UPDT],
            lr_cov=1 - RHO,
            structures=(structure, structure),
            kfac_like=True,
        )
        return _stepping(network, optimizer)

    return make


def _asdl_stepping(network: nn.Sequential, maker: Any, lr: float, after: Step = lambda x, y: None) -> Step:
    """asdl preconditions .grad, which plain SGD then uses; `after` may still change it."""
    sgd = torch.optim.SGD(network.parameters(), lr=lr)

    def step(x: Tensor, y: Tensor) -> None:
        sgd.zero_grad()
        maker.setup_loss_call(cross_entropy, maker.setup_model_call(network, x), y)
        maker.forward_and_backward()
        after(x, y)
        sgd.step()
        maker.config.ema_decay = 1 - RHO  # from now on: the first step's 1 starts the EA from its factors

    return step


def _asdl_config(setting: Setting, **settings: Any) -> Any:
    return _peer("asdl").PreconditioningConfig(
        data_size=setting.problem.n,
        damping=setting.damping,
        preconditioner_upd_interval=setting.periods[T_INV],
        **settings,
    )


def _asdl_maker(network: nn.Sequential, setting: Setting) -> Any:
    config = _asdl_config(setting, ema_decay=1.0, curvature_upd_interval=setting.periods[T_UPDT])
    return _peer("asdl").KfacGradientMaker(network, config, fisher_type="fisher_emp")


def _asdl_kfac(network: nn.Sequential, setting: Setting) -> Step:
    return _asdl_stepping(network, _asdl_maker(network, setting), setting.lr)


def _asdl_seng(network: nn.Sequential, setting: Setting) -> Step:
    sketch = setting.problem.sketch or max(setting.problem.sizes)
    maker = _peer("asdl").SengGradientMaker(network, _asdl_config(setting), sketching_size=sketch)
    return _asdl_stepping(network, maker, setting.lr)


def _peer(name: str) -> Any:
    """A peer's module.

    Raises:
        InputError: it cannot be imported.
    """
    library = name.partition(".")[0]
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of torch.jit, at import
            module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{library} cannot be imported ({error}): pip install 'kfacerr[peers]', or leave it out with "
            f"--without {library}"
        ) from None
    if library == "asdl" and torch.version.cuda is None:
        # Its K-FAC marks ranges for NVIDIA's profiler, which raises where torch is built without CUDA.
        inner: Any = importlib.import_module("asdl.precondition.natural_gradient")
        inner.nvtx = SimpleNamespace(range=lambda name: nullcontext())
    return module


_BY_UPDATE = MappingProxyType({T_UPDT: FACTORS, T_INV: INVERSE})
_BY_BRAND = MappingProxyType({T_UPDT: FACTORS, 125: BRAND, T_INV: INVERSE})

CONTESTANTS: dict[str, Contestant] = {
    SGD: Contestant(_sgd, {}),
    "asdl K-FAC": Contestant(_asdl_kfac, _BY_UPDATE, "asdl"),
    "asdl SENG": Contestant(_asdl_seng, {T_INV: INVERSE}, "asdl"),
    "singd dense": Contestant(_singd("dense"), {T_UPDT: INVERSE}, "singd"),
    "singd hierarchical": Contestant(_singd("hierarchical15_15"), {T_UPDT: INVERSE}, "singd"),
    OURS: Contestant(_kfac("K-FAC"), _BY_UPDATE),
    "R-KFAC": Contestant(_kfac("R-KFAC"), _BY_UPDATE),
    "B-KFAC": Contestant(_kfac("B-KFAC"), _BY_BRAND),
    "B-R-KFAC": Contestant(_kfac("B-R-KFAC"), {T_UPDT: BRAND, T_INV: INVERSE}),
    "B-KFAC-C": Contestant(_kfac("B-KFAC-C"), {**_BY_BRAND, 500: CORRECTION}),
    "SENG": Contestant(_seng, {T_INV: INVERSE}),
}


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
        maker = _asdl_maker(network, setting)

        def place(x: Tensor, y: Tensor) -> None:
            network.zero_grad()
            cross_entropy(network(x), y).backward()
            for (name, _), layer in zip(maker.named_modules_for_curvature, layers, strict=True):
                lam_A, lam_G = layer.lam
                for side, root in (("A", lam_A / layer.pi), ("B", lam_G * layer.pi)):
                    maker.update_preconditioner(damping=float(root**2), module_name=name, kron=[side])
            maker.precondition()

        return _asdl_stepping(network, maker, setting.lr, place)

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


def measure(
    contestants: Mapping[str, Contestant],
    setting: Setting,
    rounds: int,
    say: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """Columns optimizer, round, k, kind, seconds."""
    steps = {name: contestant.make(setting.problem.network(), setting) for name, contestant in contestants.items()}
    rows: list[tuple[Any, ...]] = []
    for round in range(rounds + 1):  # round 0 starts everything up and fills the ranks
        for k in range(round * CYCLE, (round + 1) * CYCLE, 2):
            turn = [(i, setting.problem.batch(i)) for i in (k, k + 1)]
            for name, step in steps.items():
                for i, batch in turn:
                    start = time.perf_counter()
                    step(*batch)
                    seconds = time.perf_counter() - start
                    rows.append((name, round, i, contestants[name].kind(i, setting.periods), seconds))
        say(f"round {round} of {rounds}" + (", not timed" if not round else ""))
    times = pd.DataFrame(rows, columns=["optimizer", "round", "k", "kind", "seconds"])
    return times[times["round"] > 0].reset_index(drop=True)


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
            low, middle, high = (1e3 * pd.Series(seconds).quantile(q) for q in (0.25, 0.5, 0.75))
            rows.append((name, kind, middle, low, high))
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
            _peer(library)
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
    parser = Parser(prog="python -m studies.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="of 16 steps each (default: 5)")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=tuple(PACKAGES), metavar="NAME", help="asdl, singd: leave out"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return command("peers", parser, _run, argv)


def _run(arguments: argparse.Namespace) -> int:
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
    write_csv(out / "steps.csv", steps)
    times = measure(contestants, setting, arguments.rounds, lambda text: print(text, flush=True))
    table = summary(times, contestants)
    write_csv(out / "peers.csv", times)
    write_csv(out / "summary.csv", table)
    text = _report(problem, table, steps, arguments.rounds)
    write_text(out / "peers.md", text)
    print(text)
    return 0


def _report(problem: Problem, table: pd.DataFrame, steps: pd.DataFrame, rounds: int) -> str:
    about = environment()
    sizes = "-".join(map(str, problem.sizes))
    return (
        f"{readable(table).to_markdown(index=False)}\n\n"
        f"Milliseconds of a step: medians of {rounds} rounds, quartiles in brackets, and the ratio to SGD. "
        f"mean: of a step with factors every {T_UPDT} and inverses every {T_INV} steps. singd's one update stands "
        f"under inverse, and comes every {T_UPDT}. MLP {sizes}, n = {problem.n}, r = {problem.rank}, float32; "
        f"{about['cpu']}, {about['torch_threads']} threads.\n\n"
        f"{steps.to_markdown(index=False, floatfmt='.3g')}\n\n"
        "First steps: the norm of the difference over that of the second, which is float64, and the cosine.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
