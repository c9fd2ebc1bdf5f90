"""What can drive a training run, by name: the seven optimizers of Table 2, SGD and AdamW, and those of Table 1.

A run that is smaller than the paper's keeps its proportions by four rules.

* Schedules of the epoch (learning rate, phi_lambda, r, r_o) are read at the paper's epoch that stands for the
  run's: `50 * epoch // schedule_epochs`.
* Ranks are multiplied by `rank_scale`; oversampling and power iterations are not.
* Learning rates are for batches of 256, and scale with the square root of the batch (`settings_for`).
* Update periods: the paper has 195 iterations an epoch and updates its factors every 25. Here they are updated
  every `u = max(1, round(25 * steps_per_epoch / 195))`, and every other period is the same multiple of u as the
  paper's of 25 (T_inv = 10 u, T_brand = 5 u, T_corct = 20 u; SENG's 200 is 8 u), so that the share of each kind
  of step, on which t_epoch depends, is the paper's.

At the paper's own size all four change nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kfacerr.algorithms import SEVEN
from kfacerr.exceptions import InputError
from kfacerr.torch import KFAC
from kfacerr.torch.seng import SENG, seng_learning_rate
from studies.schedules import (
    cosine_learning_rate,
    paper_learning_rate,
    paper_oversampling,
    paper_phi,
    paper_rank,
)

if TYPE_CHECKING:
    from studies.training import TrainingConfig

__all__ = [
    "DRIVERS",
    "TABLE_1",
    "TABLE_2",
    "Driver",
    "KFACSettings",
    "find_driver",
    "settings_for",
    "update_period",
]

FIRST_FC = "fc0"
PAPER_BATCH = 256
PAPER_STEPS = 195  # iterations an epoch of the paper: 50,000 images in batches of 256
PAPER_T_UPDT = 25
SENG_UPDATE = 200  # iterations between SENG's updates (appendix D)

TABLE_2 = {
    "seng": "SENG",
    "k-fac": "K-FAC",
    "r-kfac": "R-KFAC",
    "r-kfac-short": "R-KFAC short T_inv",  # the paper's "R-KFAC T_inv=25": an RSVD at every factor update
    "b-kfac": "B-KFAC",
    "b-kfac-c": "B-KFAC-C",
    "b-r-kfac": "B-R-KFAC",
    "sgd": "SGD",
    "adamw": "AdamW",
}
"""The drivers of Table 2, and the names they go by in tables; SGD and AdamW are what a user would else pick."""

TABLE_1 = tuple(name for name in SEVEN if name != "R-KFAC T_inv=300")
"""The drivers of Table 1, which are called as the algorithms of §4.2."""


@dataclass(frozen=True)
class Driver:
    """What drives the training.

    Attributes:
        make_optimizer: from the model, the run's settings and its iterations per epoch.
        learning_rate: of an epoch.
        settings: what `TrainingConfig` should say for this driver to be the paper's (for SGD and AdamW: usual).
        cycle: iterations after which its updates repeat, from the iterations per epoch; times are taken over
            whole cycles.
        per_batch: the learning rate in `settings` is for the paper's batches of 256, and not for any.
    """

    make_optimizer: Callable[[nn.Module, "TrainingConfig", int], torch.optim.Optimizer]
    learning_rate: Callable[["TrainingConfig", int], float]
    settings: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    cycle: Callable[[int], int] = lambda steps_per_epoch: 10 * update_period(steps_per_epoch)
    per_batch: bool = True


def find_driver(name: str) -> Driver:
    """The driver called `name`.

    Raises:
        InputError: there is none; lists those there are.
    """
    if name not in DRIVERS:
        raise InputError(f"no driver is called {name!r}; there are: {', '.join(sorted(DRIVERS))}")
    return DRIVERS[name]


def settings_for(name: str, batch_size: int) -> dict[str, float]:
    """What `TrainingConfig` should say for the driver called `name`, at that batch.

    The noise that the gradients of an epoch put into the weights stays as it is when the learning rate goes with
    the square root of the batch (Krizhevsky 2014, arXiv:1404.5997, sec. 5). AdamW keeps its default.
    """
    driver = find_driver(name)
    settings = dict(driver.settings)
    if driver.per_batch:
        settings["learning_rate"] *= math.sqrt(batch_size / PAPER_BATCH)
    return settings


def update_period(steps_per_epoch: int) -> int:
    """The iterations here that stand for the paper's T_updt = 25 of 195 an epoch; at least 1."""
    return max(1, round(PAPER_T_UPDT * steps_per_epoch / PAPER_STEPS))


# --------------------------------------------------------------------------------------- the K-FAC family (§6)


@dataclass(frozen=True)
class KFACSettings:
    """One algorithm of the K-FAC family: its name, and its periods in iterations (0: it has no such update)."""

    algorithm: str
    T_updt: int
    T_inv: int
    T_brand: int = 0
    T_rsvd: int = 0
    T_corct: int = 0

    def scaled(self, steps_per_epoch: int) -> "KFACSettings":
        """The periods for a run of that many iterations an epoch."""
        u = update_period(steps_per_epoch)
        periods = {
            name: getattr(self, name) * u // PAPER_T_UPDT
            for name in ("T_updt", "T_inv", "T_brand", "T_rsvd", "T_corct")
        }
        return KFACSettings(self.algorithm, **periods)

    @property
    def cycle(self) -> int:
        """Iterations after which the updates repeat."""
        return max(self.T_inv, self.T_brand, self.T_rsvd, self.T_corct)

    def arguments(self, config: "TrainingConfig") -> dict[str, Any]:
        """What `KFAC` is given beside the model, its name and the learning rate: §6, at the run's size."""
        periods = {
            name: getattr(self, name)
            for name in ("T_updt", "T_inv", "T_brand", "T_rsvd", "T_corct")
            if getattr(self, name)
        }

        def rank(epoch: int) -> int:
            return max(1, round(paper_rank(config.paper_epoch(epoch)) * config.rank_scale))

        equal = config.equal_rank and self.algorithm == "R-KFAC"
        policy = {FIRST_FC: f"R-KFAC rank={rank(0) + config.batch_size}"} if equal else {}
        return periods | {
            "policy": policy,
            "phi_corct": 0.5,
            "rank": rank,
            "oversampling": lambda epoch: paper_oversampling(config.paper_epoch(epoch)),
            "n_pwr_it": 4,
            "phi_lambda": lambda epoch: paper_phi(config.paper_epoch(epoch)),
            "rho": 0.95,
            "clip": 0.07,
            "weight_decay": config.weight_decay,
            "momentum": config.momentum,
            "continuation": config.continuation,
            "linear_application": [FIRST_FC] if config.linear_application else False,
            "skip_nonfinite": False,  # a look at every step, for which the host would wait; `Training` looks
            "seed": config.seed,
        }


KFAC_TABLE_2 = {
    "k-fac": KFACSettings("K-FAC", 25, 250),
    "r-kfac": KFACSettings("R-KFAC", 25, 250),
    "r-kfac-short": KFACSettings("R-KFAC", 25, 25),
    "b-kfac": KFACSettings("B-KFAC", 25, 250, T_brand=125),
    "b-kfac-c": KFACSettings("B-KFAC-C", 25, 250, T_brand=125, T_corct=500),
    "b-r-kfac": KFACSettings("B-R-KFAC", 25, 250, T_brand=25, T_rsvd=250),
}
KFAC_TABLE_1 = {  # §4.2: new data every 10 iterations, the heavier updates every 50
    "K-FAC T_inv=50": KFACSettings("K-FAC", 10, 50),
    "R-KFAC T_inv=50": KFACSettings("R-KFAC", 10, 50),
    "R-KFAC T_inv=10": KFACSettings("R-KFAC", 10, 10),
    "R-KFAC T_inv=300": KFACSettings("R-KFAC", 10, 300),
    "B-KFAC": KFACSettings("B-KFAC", 10, 50, T_brand=10),
    "B-KFAC-C": KFACSettings("B-KFAC-C", 10, 50, T_brand=10, T_corct=50),
    "B-R-KFAC": KFACSettings("B-R-KFAC", 10, 50, T_brand=10, T_rsvd=50),
}
_PAPER = MappingProxyType({"learning_rate": 0.3, "momentum": 0.0, "weight_decay": 7e-4})


def _scheduled(config: "TrainingConfig", epoch: int) -> float:
    """alpha_k of §6; `learning_rate` is its peak, the paper's 0.3."""
    return config.learning_rate * paper_learning_rate(config.paper_epoch(epoch)) / paper_learning_rate(0)


def _kfac(settings: KFACSettings, *, scaled: bool) -> Driver:
    def make(model: nn.Module, config: "TrainingConfig", steps_per_epoch: int) -> torch.optim.Optimizer:
        own = settings.scaled(steps_per_epoch) if scaled else settings
        return KFAC(
            model,
            own.algorithm,
            lr=config.learning_rate,
            steps_per_epoch=steps_per_epoch,
            **own.arguments(config),
        )

    def cycle(steps_per_epoch: int) -> int:
        return (settings.scaled(steps_per_epoch) if scaled else settings).cycle

    return Driver(make, _scheduled, _PAPER, cycle)


# ------------------------------------------------------------------------------------------------- the others


def _sgd(model: nn.Module, config: "TrainingConfig", steps_per_epoch: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )


def _adamw(model: nn.Module, config: "TrainingConfig", steps_per_epoch: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)


def _cosine(config: "TrainingConfig", epoch: int) -> float:
    return cosine_learning_rate(epoch, config.epochs, config.learning_rate)


def _seng(model: nn.Module, config: "TrainingConfig", steps_per_epoch: int) -> torch.optim.Optimizer:
    return SENG(
        model,
        lr=config.learning_rate,
        damping=2.0,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        update_every=_seng_cycle(steps_per_epoch),
        fim_col_sample_size=128,
        skip_nonfinite=False,
        seed=config.seed,
    )


def _seng_rate(config: "TrainingConfig", epoch: int) -> float:
    """Appendix D: 0.05 (1 - epoch/75)^6; `learning_rate` is its peak."""
    return seng_learning_rate(config.paper_epoch(epoch), lr=config.learning_rate)


def _seng_cycle(steps_per_epoch: int) -> int:
    return SENG_UPDATE * update_period(steps_per_epoch) // PAPER_T_UPDT


DRIVERS: dict[str, Driver] = {
    "sgd": Driver(_sgd, _cosine, MappingProxyType({"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4})),
    "adamw": Driver(  # PyTorch's defaults, which users leave as they are
        _adamw, _cosine, MappingProxyType({"learning_rate": 1e-3, "weight_decay": 1e-2}), per_batch=False
    ),
    "seng": Driver(
        _seng,
        _seng_rate,
        MappingProxyType({"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
        _seng_cycle,
    ),
    **{name: _kfac(settings, scaled=True) for name, settings in KFAC_TABLE_2.items()},
    **{name: _kfac(settings, scaled=False) for name, settings in KFAC_TABLE_1.items()},
}
