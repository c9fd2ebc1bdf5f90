"""Who takes part in `studies.bench.peers`: SGD, asdl, singd and ours, with conventions that match.

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
"""

import importlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kfacerr.exceptions import InputError
from kfacerr.torch import KFAC, PAPER, SENG
from studies.bench.yardsticks import PHI, RHO
from studies.config import PAPER_STEPS, TrainingConfig

__all__ = [
    "CONTESTANTS",
    "CYCLE",
    "KINDS",
    "MEAN",
    "OURS",
    "PACKAGES",
    "PLAIN",
    "SGD",
    "SHORT",
    "T_INV",
    "T_UPDT",
    "Contestant",
    "Problem",
    "Setting",
    "asdl_maker",
    "asdl_stepping",
    "peer",
]

PACKAGES = MappingProxyType({"asdl": "asdfghjkl", "singd": "singd"})
"""The peers as they are imported, and as they are installed."""

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
        paper = TrainingConfig(setting.problem.n, 1, driver=algorithm).periods(PAPER_STEPS)
        periods: Any = {name: setting.periods[period] for name, period in paper.items()}
        optimizer = KFAC(
            network,
            algorithm,
            **PAPER
            | periods
            | {"lr": setting.lr, "rank": setting.problem.rank, "phi_lambda": PHI, "rho": RHO}
            | {"clip": None, "weight_decay": 0.0},
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
        optimizer = peer("singd.optim.optimizer").SINGD(
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


def asdl_stepping(network: nn.Sequential, maker: Any, lr: float, after: Step = lambda x, y: None) -> Step:
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
    return peer("asdl").PreconditioningConfig(
        data_size=setting.problem.n,
        damping=setting.damping,
        preconditioner_upd_interval=setting.periods[T_INV],
        **settings,
    )


def asdl_maker(network: nn.Sequential, setting: Setting) -> Any:
    config = _asdl_config(setting, ema_decay=1.0, curvature_upd_interval=setting.periods[T_UPDT])
    return peer("asdl").KfacGradientMaker(network, config, fisher_type="fisher_emp")


def _asdl_kfac(network: nn.Sequential, setting: Setting) -> Step:
    return asdl_stepping(network, asdl_maker(network, setting), setting.lr)


def _asdl_seng(network: nn.Sequential, setting: Setting) -> Step:
    sketch = setting.problem.sketch or max(setting.problem.sizes)
    maker = peer("asdl").SengGradientMaker(network, _asdl_config(setting), sketching_size=sketch)
    return asdl_stepping(network, maker, setting.lr)


def peer(name: str) -> Any:
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
