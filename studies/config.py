"""What is run: the paper's schedules and driver numbers (§4.2, §6, appendix D).

A run that is smaller than the paper's keeps its proportions by four rules, which at its own size change nothing.

* Schedules of the epoch (learning rate, phi_lambda, r, r_o) are read at the paper's epoch that stands for the
  run's: `50 * epoch // schedule_epochs`.
* Ranks are multiplied by `rank_scale`; oversampling and power iterations are not.
* Learning rates are for batches of 256, and scale with the square root of the batch: the noise that the gradients
  of an epoch put into the weights then stays as it is (Krizhevsky 2014, arXiv:1404.5997, sec. 5).
* The periods of §6 are kept in proportion to the epoch (`update_period`), so that the share of each kind of step,
  on which t_epoch depends, is the paper's. Those of §4.2 are as they stand.

`epoch` is n_ce(k), "the number of the current epoch at iteration k", counted from 0 (design §4):
`k // steps_per_epoch`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kfacerr.algorithms import SEVEN, Algorithm
from kfacerr.exceptions import InputError
from kfacerr.torch import PAPER, PAPER_SENG

__all__ = [
    "LAYER",
    "N_PWR_IT",
    "RHO",
    "TABLE_1",
    "Schedules",
    "TrainingConfig",
    "cosine_learning_rate",
    "family",
    "rates",
    "seng_learning_rate",
    "table_2",
    "update_period",
]

LAYER = "fc0"
"""The first fully connected layer ("FC layer 0" of the figures): it is measured, and has the Brand processes."""

RHO, N_PWR_IT = PAPER["rho"], PAPER["n_pwr_it"]

# ------------------------------------------------------------------------------------------- schedules (§6)

PAPER_EPOCHS = 50
_RATES = {0: 0.3, 2: 0.2, 3: 0.1, 13: 0.03, 18: 0.01, 27: 0.003, 40: 0.001}
_PHIS = {0: 0.1, 25: 0.05, 35: 0.01}
_RANKS = {0: 220, 15: 230}
_OVERSAMPLINGS = {0: 10, 22: 11, 30: 12}


def _since(values: Mapping[int, Any], epoch: int) -> Any:
    """Of values by the epoch that each begins with, the one that holds."""
    return values[max(first for first in values if first <= epoch)]


@dataclass(frozen=True)
class Schedules:
    """The schedules of §6, which are for 50 epochs, over the epochs of a run.

    Attributes:
        epochs: that stand for the paper's 50.
        rank_scale: of the paper's ranks.
    """

    epochs: int = PAPER_EPOCHS
    rank_scale: float = 1.0

    def paper_epoch(self, epoch: int) -> int:
        """The paper's epoch that stands for `epoch`."""
        return epoch * PAPER_EPOCHS // self.epochs

    def learning_rate(self, epoch: int) -> float:
        """alpha_k, for every algorithm except SENG: 0.3 at first, 0.001 from epoch 40."""
        return float(_since(_RATES, self.paper_epoch(epoch)))

    def phi(self, epoch: int) -> float:
        """phi_{lambda,k}, the damping as a share of lambda_max."""
        return float(_since(_PHIS, self.paper_epoch(epoch)))

    def rank(self, epoch: int) -> int:
        """r(k), the target rank of R-KFAC and the truncation rank of the B- variants."""
        return max(1, round(_since(_RANKS, self.paper_epoch(epoch)) * self.rank_scale))

    def oversampling(self, epoch: int) -> int:
        """r_o(k), the oversampling of the RSVD."""
        return int(_since(_OVERSAMPLINGS, self.paper_epoch(epoch)))


def cosine_learning_rate(epoch: int, epochs: int, peak: float) -> float:
    """Half a cosine from `peak` at epoch 0 towards 0 at `epochs`. Not the paper's: SGD's and AdamW's here."""
    return peak * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


def seng_learning_rate(epoch: int, peak: float) -> float:
    """Appendix D, of the paper's epoch: `peak (1 - epoch/75)^6`, the peak 0.05."""
    return float(peak * max(0.0, 1 - epoch / 75) ** 6)


# ------------------------------------------------------------------------------------------ driver numbers

PAPER_BATCH = 256
PAPER_STEPS = 195  # iterations an epoch of the paper: 50,000 images in batches of 256
_PERIODS_6 = {"T_brand": 125, **{name: PAPER[name] for name in ("T_updt", "T_inv", "T_rsvd", "T_corct")}}
_T_BRAND_6 = {"B-R-KFAC": 25}  # where it is not the 125 above
_PERIODS_4_2 = {"T_inv": 50, "T_rsvd": 50, "T_corct": 50}  # Brand updates come with all new data
SENG_DAMPING, SENG_UPDATE, SENG_SAMPLES = PAPER_SENG["damping"], PAPER_SENG["update_every"], 128


class _Rates(NamedTuple):
    """Peak learning rate, momentum, weight decay; `per_batch` if the rate is for batches of 256, not for any."""

    learning_rate: float
    momentum: float
    weight_decay: float
    per_batch: bool = True


_OTHERS = {
    "SENG": _Rates(PAPER_SENG["lr"], PAPER_SENG["momentum"], PAPER_SENG["weight_decay"]),
    "SGD": _Rates(0.1, 0.9, 5e-4),
    "AdamW": _Rates(1e-3, 0.9, 1e-2, per_batch=False),  # PyTorch's defaults, which users leave as they are
}
_FAMILY = ("K-FAC", "R-KFAC", "SRE-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C", "N-KFAC", "W-KFAC")
_FAMILY_RATES = _Rates(PAPER["lr"], PAPER["momentum"], PAPER["weight_decay"])

TABLE_1 = tuple(name for name in SEVEN if name != "R-KFAC T_inv=300")
"""The drivers of Table 1, with the periods of §4.2."""


def table_2(steps_per_epoch: int) -> tuple[str, ...]:
    """The drivers of Table 2 at a run's size, in its order; SGD and AdamW are what a user would else pick.

    The paper's "R-KFAC T_inv=25" takes an RSVD at every update of the factors; its name here has the period so.
    """
    short = f"R-KFAC T_inv={update_period(steps_per_epoch)}"
    return "SENG", "K-FAC", "R-KFAC", short, "B-KFAC", "B-KFAC-C", "B-R-KFAC", "SGD", "AdamW"


def family(driver: str) -> Algorithm | None:
    """The algorithm of the K-FAC family that a driver's name is, or None for SENG, SGD and AdamW.

    Raises:
        InputError: it is no driver's name; says which there are.
    """
    if driver in _OTHERS:
        return None
    others = ", ".join(sorted(_OTHERS))
    try:
        algorithm = Algorithm.parse(driver)
    except InputError as error:
        raise InputError(f"no driver is called {driver!r}: it is none of {others}; {error}") from None
    if algorithm.base not in _FAMILY:
        raise InputError(f"no driver is called {driver!r}: it is none of {others}, {', '.join(_FAMILY)}")
    return algorithm


def rates(driver: str, batch_size: int) -> dict[str, float]:
    """Peak learning rate, momentum and weight decay of a driver, by the names of `TrainingConfig`."""
    own = _OTHERS.get(driver, _FAMILY_RATES)
    scale = math.sqrt(batch_size / PAPER_BATCH) if own.per_batch else 1.0
    return {
        "learning_rate": own.learning_rate * scale,
        "momentum": own.momentum,
        "weight_decay": own.weight_decay,
    }


def update_period(steps_per_epoch: int) -> int:
    """The iterations that stand for §6's T_updt = 25 of 195 an epoch; at least 1."""
    return max(1, round(_PERIODS_6["T_updt"] * steps_per_epoch / PAPER_STEPS))


@dataclass(frozen=True)
class TrainingConfig:
    """What, with a data set, determines a training run.

    Attributes:
        epochs: length of the run; the learning rate's schedule ends there.
        width: of the network, 1 for the paper's.
        conv_width: of the convolutions before the last, where they have one of their own.
        driver: "SGD", "AdamW", "SENG", or an algorithm of the K-FAC family, see `studies.drivers`.
        learning_rate: the peak of the driver's schedule.
        augment: random crops, and mirror images where the data set allows them.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one.
        schedule_epochs: epochs over which the paper's schedules, which are for 50, run here; 0 for `epochs`.
        rank_scale: of the paper's ranks.
        T_updt: iterations between updates of the K-factors, with the other periods of §4.2; 0 for those of §6.
        continuation: of the spectrum, for the K-FAC family.
        equal_rank: R-KFAC has rank r + n on the first FC layer, the rank at which the B- variants are applied.
        amp: the network runs under autocast to bfloat16. Weights, gradients and all that optimizers make of them,
            K-factors first of all, stay float32.
    """

    batch_size: int
    epochs: int
    width: float = 1.0
    seed: int = 0
    driver: str = "SGD"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True
    device: str = "auto"
    schedule_epochs: int = 0
    rank_scale: float = 1.0
    T_updt: int = 0
    continuation: str = "min"
    equal_rank: bool = False
    amp: bool = False
    conv_width: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "width", "learning_rate", "rank_scale", "conv_width"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be positive, not {value}")
        for name in ("seed", "momentum", "weight_decay", "schedule_epochs", "T_updt"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must not be negative, but is {value}")

    @property
    def schedules(self) -> Schedules:
        """Of this run."""
        return Schedules(self.schedule_epochs or self.epochs, self.rank_scale)

    def periods(self, steps_per_epoch: int) -> dict[str, int]:
        """T_updt, T_inv, T_brand, T_rsvd and T_corct of the driver, in iterations; those in its name stand."""
        algorithm = family(self.driver)
        assert algorithm is not None, self.driver
        if self.T_updt:
            periods = {"T_updt": self.T_updt, "T_brand": self.T_updt, **_PERIODS_4_2}
        else:
            paper = {**_PERIODS_6, "T_brand": _T_BRAND_6.get(algorithm.base, _PERIODS_6["T_brand"])}
            u = update_period(steps_per_epoch)
            periods = {name: period * u // paper["T_updt"] for name, period in paper.items()}
        return {name: algorithm.get(name, period) for name, period in periods.items()}

    def seng_period(self, steps_per_epoch: int) -> int:
        """Iterations between SENG's updates: the paper's 200, in proportion."""
        return SENG_UPDATE * update_period(steps_per_epoch) // _PERIODS_6["T_updt"]
