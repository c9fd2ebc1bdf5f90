"""What can drive a training run, by name: an algorithm of the K-FAC family, SENG, SGD or AdamW.

An algorithm drives through the `KFAC` optimizer with the settings of §6 (`studies.config`): the Brand variants on
the first fully connected layer, R-KFAC elsewhere; N-KFAC and W-KFAC everywhere. Settings in its name, as in
"R-KFAC T_inv=10", stand; those of N-KFAC on the first fully connected layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from kfacerr.algorithms import Algorithm
from kfacerr.process import Settings
from kfacerr.streaming import UPDATES
from kfacerr.torch import KFAC, PAPER, SENG
from studies import config as numbers
from studies.config import TrainingConfig, cosine_learning_rate, family, seng_learning_rate

__all__ = ["DRIVERS", "Driver", "Updates", "find_driver"]


class Updates(NamedTuple):
    """When a driver does more than in a plain step.

    Attributes:
        factors: iterations between updates of the K-factors; 0 if it has none.
        decompositions: the periods of whatever it decomposes.
    """

    factors: int = 0
    decompositions: tuple[int, ...] = ()

    @property
    def cycle(self) -> int:
        """Iterations after which its updates repeat; times are taken over whole cycles."""
        return math.lcm(*filter(None, (self.factors, *self.decompositions)))


@dataclass(frozen=True)
class Driver:
    """What drives the training.

    Attributes:
        make_optimizer: from the model, the run's settings and its iterations per epoch.
        learning_rate: of an epoch.
        updates: from the run's settings and its iterations per epoch.
    """

    make_optimizer: Callable[[nn.Module, TrainingConfig, int], torch.optim.Optimizer]
    learning_rate: Callable[[TrainingConfig, int], float]
    updates: Callable[[TrainingConfig, int], Updates] = lambda config, steps_per_epoch: Updates()


def find_driver(name: str) -> Driver:
    """The driver called `name`.

    Raises:
        InputError: there is none.
    """
    algorithm = family(name)
    return DRIVERS[name] if algorithm is None else _KFAC


# --------------------------------------------------------------------------------------- the K-FAC family (§6)

_NAMED = ("rank", "phi_corct", "continuation")
"""Settings that a driver's name may have beside periods."""


def _algorithm(config: TrainingConfig) -> Algorithm:
    algorithm = family(config.driver)
    assert algorithm is not None, config.driver
    return algorithm


def _kfac(model: nn.Module, config: TrainingConfig, steps_per_epoch: int) -> torch.optim.Optimizer:
    algorithm, schedules = _algorithm(config), config.schedules
    own = {name: value for name in _NAMED if (value := algorithm.get(name)) is not None}
    policy = {}
    if config.equal_rank and algorithm.base == "R-KFAC":
        policy[numbers.LAYER] = f"R-KFAC rank={schedules.rank(0) + config.batch_size}"
    if algorithm.base == "N-KFAC" and algorithm.own:  # a rank in its name is no schedule's, but truncates
        policy[numbers.LAYER] = str(algorithm)
        own.pop("rank", None)
    settings: dict[str, Any] = {
        **PAPER,
        "lr": config.learning_rate,
        "policy": policy,
        "rank": schedules.rank,
        "oversampling": schedules.oversampling,
        "phi_lambda": schedules.phi,
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
        "continuation": config.continuation,
        "skip_nonfinite": False,  # a look at every step, for which the host would wait; `Training` looks
        "seed": config.seed,
        **config.periods(steps_per_epoch),
        **own,
    }
    return KFAC(model, algorithm.base, steps_per_epoch=steps_per_epoch, **settings)


def _kfac_rate(config: TrainingConfig, epoch: int) -> float:
    """alpha_k of §6; `learning_rate` is its peak, the paper's 0.3."""
    return config.learning_rate * config.schedules.learning_rate(epoch) / config.schedules.learning_rate(0)


def _kfac_updates(config: TrainingConfig, steps_per_epoch: int) -> Updates:
    periods = config.periods(steps_per_epoch)
    algorithm = _algorithm(config)
    schedules = algorithm.process(Settings(), "A").schedules
    periods["T_base"] = algorithm.get("T_base", UPDATES * periods["T_updt"])
    names = dict.fromkeys(("T_inv", *schedules))  # R-KFAC is on the other layers
    return Updates(periods["T_updt"], tuple(periods[name] for name in names))


# ------------------------------------------------------------------------------------------------- the others


def _sgd(model: nn.Module, config: TrainingConfig, steps_per_epoch: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )


def _adamw(model: nn.Module, config: TrainingConfig, steps_per_epoch: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)


def _cosine(config: TrainingConfig, epoch: int) -> float:
    return cosine_learning_rate(epoch, config.epochs, config.learning_rate)


def _seng(model: nn.Module, config: TrainingConfig, steps_per_epoch: int) -> torch.optim.Optimizer:
    return SENG(
        model,
        lr=config.learning_rate,
        damping=numbers.SENG_DAMPING,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        update_every=config.seng_period(steps_per_epoch),
        fim_col_sample_size=numbers.SENG_SAMPLES,
        skip_nonfinite=False,
        seed=config.seed,
    )


def _seng_rate(config: TrainingConfig, epoch: int) -> float:
    return seng_learning_rate(config.schedules.paper_epoch(epoch), config.learning_rate)


def _seng_updates(config: TrainingConfig, steps_per_epoch: int) -> Updates:
    return Updates(decompositions=(config.seng_period(steps_per_epoch),))


_KFAC = Driver(_kfac, _kfac_rate, _kfac_updates)
DRIVERS: dict[str, Driver] = {
    "SENG": Driver(_seng, _seng_rate, _seng_updates),
    "SGD": Driver(_sgd, _cosine),
    "AdamW": Driver(_adamw, _cosine),
}
"""Those that are no algorithms of the K-FAC family."""
