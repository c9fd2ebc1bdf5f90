"""Who trains: every optimizer at its own defaults but for the learning rate, and one ladder of rates for all.

What differs from a default, for all alike: there is no weight decay, for training losses are compared. Besides,

* Muon takes the weights of the hidden fully connected layers, AdamW the rest, as its authors do; Muon's steps are
  scaled to the size of AdamW's ("match_rms_adamw", Liu et al. 2025, arXiv:2502.16982): one rate is for both.
* SGD has momentum 0.9.
* Shampoo's preconditioners are computed once in 10 steps, as SOAP's are: its package's 1000 is longer than a run.
  Its steps have the size of SGD's (grafting, its package's default), and so its rates are SGD's.
* The K-FAC family and SENG get the task's rank and the run's seed.

A name of the K-FAC family may have settings of `KFAC`: "R-KFAC phi_lambda=0.01 momentum=0.9".
"""

import ast
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from kfacerr.exceptions import InputError
from kfacerr.torch import KFAC, SENG
from studies.tasks.problems import Task

__all__ = ["CANDIDATES", "CONTESTANTS", "FAMILY", "LADDER", "Contestant", "find_contestant", "grid", "missing"]

Optimizers = list[torch.optim.Optimizer]
Make = Callable[[nn.Module, Task, float, int], Optimizers]

LADDER = tuple(float(f"{digit}e{power}") for power in range(-7, 4) for digit in (1, 3))
"""Learning rates that are tried: 1, 3, 10, 30, ..."""

PACKAGE = "pytorch_optimizer"
"""Where SOAP and Shampoo come from (extra `peers`)."""


@dataclass(frozen=True)
class Contestant:
    """An optimizer.

    Attributes:
        name: as results call it.
        rate: its default learning rate, or its authors'; the grid is around it.
        make: from the model, the task, the learning rate and the seed, what steps together.
        package: that must be installed; "" if none.
        kfac: name of its preset, if it is of the K-FAC family.
    """

    name: str
    rate: float
    make: Make
    package: str = ""
    kfac: str = ""


def grid(contestant: Contestant, rates: int = 5) -> tuple[float, ...]:
    """The rates of the ladder around the contestant's own; of an even number one more above it than below."""
    own = int(np.argmin(np.abs(np.log(LADDER) - np.log(contestant.rate))))
    first = own - (rates - 1) // 2
    return LADDER[first : first + rates]


def missing(contestant: Contestant) -> str:
    """The package that the contestant lacks, or "" if it can start."""
    lacks = contestant.package and importlib.util.find_spec(contestant.package) is None
    return contestant.package if lacks else ""


def find_contestant(name: str) -> Contestant:
    """The contestant of a name.

    Raises:
        InputError: there is none, or a setting is none of KFAC's.
    """
    base, *options = name.split() or [""]
    if base not in CONTESTANTS or (options and base not in FAMILY):
        raise InputError(
            f"no optimizer is called {name!r}: {', '.join(CONTESTANTS)}, those of the K-FAC family with settings "
            "if wanted"
        )
    settings = dict(_setting(name, option) for option in options)
    if not settings:
        return CONTESTANTS[base]
    try:
        KFAC(nn.Linear(1, 1), base, **settings)
    except TypeError as error:
        raise InputError(f"optimizer {name!r}: {error}") from None
    return _family(base, name, settings)


def _setting(name: str, option: str) -> tuple[str, Any]:
    key, _, text = option.partition("=")
    if key in ("lr", "seed", "weight_decay"):
        raise InputError(f"optimizer {name!r}: {key} is not to be set, every optimizer is given it")
    try:
        return key, ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return key, text  # "trace"; a text in place of a number is for KFAC to refuse


# ---------------------------------------------------------------------------------------------- first order


def _sgd(model: nn.Module, task: Task, lr: float, seed: int) -> Optimizers:
    return [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)]


def _adamw(model: nn.Module, task: Task, lr: float, seed: int) -> Optimizers:
    return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)]


def _muon(model: nn.Module, task: Task, lr: float, seed: int) -> Optimizers:
    *hidden, _ = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    taken = {id(weight) for weight in hidden}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.0),
    ]


# -------------------------------------------------------------------------------------------- second order


def _soap(model: nn.Module, task: Task, lr: float, seed: int) -> Optimizers:
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr=lr, weight_decay=0.0)]


def _shampoo(model: nn.Module, task: Task, lr: float, seed: int) -> Optimizers:
    from pytorch_optimizer import ScalableShampoo

    return [ScalableShampoo(model.parameters(), lr=lr, preconditioning_compute_steps=10)]


def _seng(model: nn.Module, task: Task, lr: float, seed: int) -> Optimizers:
    return [SENG(model, lr=lr, weight_decay=0.0, seed=seed)]


def _kfac(name: str, settings: dict[str, Any], model: nn.Module, task: Task, lr: float, seed: int) -> Optimizers:
    return [KFAC(model, name, lr=lr, weight_decay=0.0, seed=seed, **{"rank": task.rank, **settings})]


def _default_rate(optimizer: Callable[..., torch.optim.Optimizer]) -> float:
    return float(inspect.signature(optimizer).parameters["lr"].default)


def _family(base: str, name: str, settings: dict[str, Any]) -> Contestant:
    return Contestant(name, _default_rate(KFAC), partial(_kfac, base, settings), kfac=base)


FAMILY = ("K-FAC", "R-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C", "N-KFAC", "W-KFAC")
"""The K-FAC family."""

_ALL = (
    Contestant("SGD", 0.03, _sgd),
    Contestant("AdamW", _default_rate(torch.optim.AdamW), _adamw),
    Contestant("Muon", _default_rate(torch.optim.Muon), _muon),
    Contestant("SOAP", 0.003, _soap, PACKAGE),
    Contestant("Shampoo", 0.03, _shampoo, PACKAGE),
    Contestant("SENG", _default_rate(SENG), _seng),
    *(_family(name, name, {}) for name in FAMILY),
)
CONTESTANTS = {contestant.name: contestant for contestant in _ALL}

_PAPER = "T_updt=25 T_inv=250 phi_lambda=0.1 continuation=min"
_SHORT = "T_updt=10 T_inv=50 warm_up=True"
_SMALL = f"{_SHORT} phi_lambda=0.01"
CANDIDATES = (
    f"R-KFAC rank=220 {_PAPER} momentum=0",
    f"R-KFAC rank=220 {_PAPER}",
    f"R-KFAC rank=220 {_PAPER} warm_up=True",
    *(f"R-KFAC rank=220 {_SHORT} phi_lambda={phi}" for phi in (0.1, 0.03, 0.01, 0.003, 0.001)),
    f"R-KFAC rank=220 {_SMALL} clip=None",
    *(f"R-KFAC rank=220 {_SMALL} clip_by=kl clip={clip}" for clip in (0.01, 0.001, 0.0001)),
    *(
        f"R-KFAC rank=220 T_updt={T_updt} T_inv={T_inv} warm_up=True"
        for T_updt, T_inv in ((10, 100), (25, 100), (5, 20))
    ),
    *(
        f"{name} continuation={tail}"
        for name in ("R-KFAC", "B-KFAC", "N-KFAC")
        for tail in ("min", "trace", "none")
    ),
)
"""What KFAC's defaults were chosen of, one setting after the other, see docs/recipes.md; the last at low rank."""
