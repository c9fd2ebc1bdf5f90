"""Which process follows which K-factor, and its hyper-parameters as schedules of the epoch (§3.5, §6).

A choice is a name of `kfacerr.algorithms` ("K-FAC": EVD, "R-KFAC": RSVD, "SRE-KFAC": SREVD, "B-KFAC": Brand,
"B-R-KFAC": Brand with overwriting, "B-KFAC-C": Brand with correction, "N-KFAC": streaming and "W-KFAC": warm
Nyström), possibly with settings of its own that no schedule then touches ("R-KFAC T_inv=10 rank=50"), or a
function that makes a process of your own, or "SGD".
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypedDict

import numpy as np

from ..algorithms import Algorithm
from ..checks import switch, whole
from ..exceptions import InputError
from ..inverse import check_phi
from ..process import Process, Settings

__all__ = [
    "DEFAULTS",
    "PAPER",
    "PRESETS",
    "SGD",
    "Choice",
    "FactorInfo",
    "Given",
    "Hyper",
    "LayerPolicy",
    "Preset",
    "Scheduled",
    "Schedules",
]

SGD = "SGD"
"""The choice that leaves a layer to plain SGD."""


class FactorInfo(NamedTuple):
    """The K-factor that a process is wanted for.

    Attributes:
        layer: name of the layer.
        side: "A" or "G".
        d: dimension of the factor.
        n: columns of the first update.
    """

    layer: str
    side: str
    d: int
    n: int


Choice = str | Callable[[FactorInfo], Process]
LayerPolicy = Choice | Mapping[str, Choice]
"""One choice for both factors, or {"A": choice, "G": choice}."""


class Preset(NamedTuple):
    """One algorithm of §6: B- variants on the first FC layer only, R-KFAC on all others (§3.5).

    N-KFAC, which needs nothing dense however many columns come, is on all layers with room for it.

    Attributes:
        first_fc: algorithm of the first fully connected layer.
        others: of all others.
        updates: of the factors that there is one Brand update in; §6 has T_brand = 125 for T_updt = 25.
    """

    first_fc: str
    others: str
    updates: int = 1


PRESETS = {
    "K-FAC": Preset("K-FAC", "K-FAC"),
    "R-KFAC": Preset("R-KFAC", "R-KFAC"),
    "SRE-KFAC": Preset("SRE-KFAC", "SRE-KFAC"),
    "B-KFAC": Preset("B-KFAC", "R-KFAC", updates=5),
    "B-R-KFAC": Preset("B-R-KFAC", "R-KFAC"),
    "B-KFAC-C": Preset("B-KFAC-C", "R-KFAC", updates=5),
    "N-KFAC": Preset("N-KFAC", "N-KFAC"),
    "W-KFAC": Preset("W-KFAC", "W-KFAC"),
}


Scheduled = float | Callable[[int], float]
"""A number, or a function of the epoch."""


class Given(TypedDict, total=False):
    """The hyper-parameters that `KFAC` takes by the paper's names, where they differ from `DEFAULTS`."""

    T_updt: Scheduled
    T_inv: Scheduled
    T_brand: Scheduled | None
    T_rsvd: Scheduled
    T_corct: Scheduled
    phi_corct: Scheduled
    rank: Scheduled
    oversampling: Scheduled
    n_pwr_it: Scheduled
    phi_lambda: Scheduled
    rho: Scheduled
    continuation: str
    accumulate: bool
    warm_up: bool | None
    seed: int


DEFAULTS: Given = {
    "T_updt": 10,
    "T_inv": 100,
    "T_brand": None,
    "T_rsvd": 100,
    "T_corct": 200,
    "phi_corct": 0.5,
    "rank": 220,
    "oversampling": 10,
    "n_pwr_it": 4,
    "phi_lambda": 0.01,
    "rho": 0.95,
    "continuation": "trace",
    "accumulate": False,
    "warm_up": None,
    "seed": 0,
}
"""Found by a small search over tasks, see docs/recipes.md.

T_brand is a preset's multiple of T_updt if None. Periods warm up if warm_up is None and none of them is given.
"""

PAPER: dict[str, Any] = {
    "lr": 0.3,
    "clip": 0.07,
    "weight_decay": 7e-4,
    "momentum": 0.0,
    "T_updt": 25,
    "T_inv": 250,
    "T_rsvd": 250,
    "T_corct": 500,
    "phi_corct": 0.5,
    "rank": 220,
    "oversampling": 10,
    "n_pwr_it": 4,
    "phi_lambda": 0.1,
    "rho": 0.95,
    "continuation": "min",
}
"""The settings of §6 at its first epoch (VGG16_bn, CIFAR-10, batches of 256): `KFAC(model, name, **PAPER)`."""

_PERIODS = ("T_updt", "T_inv", "T_brand", "T_rsvd", "T_corct")


class Hyper(NamedTuple):
    """The hyper-parameters of one epoch.

    Attributes:
        settings: of the processes.
        T_updt: steps between updates of the factors.
        phi_lambda: damping ratio.
    """

    settings: Settings
    T_updt: int
    phi_lambda: float

    def configuration(self) -> dict[str, Any]:
        """What processes are configured with; each keeps its own seed."""
        return {f.name: getattr(self.settings, f.name) for f in fields(Settings) if f.name != "seed"}


class Schedules:
    """Hyper-parameters by the paper's names: each a number, or a function of the epoch.

    Args:
        preset: for T_brand.
        given: what differs from `DEFAULTS`.

    Raises:
        InputError: a number is out of range.
        TypeError: there is no hyper-parameter of that name.
    """

    def __init__(self, preset: Preset, given: Given) -> None:
        if unknown := set(given) - set(DEFAULTS):
            raise TypeError(f"KFAC has no argument {', '.join(sorted(unknown))}")
        self._given: dict[str, Any] = {**DEFAULTS, **given}
        self._updates = preset.updates
        warm_up = self._given.pop("warm_up")
        self.warm_up = not set(_PERIODS) & set(given) if warm_up is None else switch(warm_up, "warm_up")
        self._held: tuple[tuple[int, int], Hyper] | None = None
        if not self.vary:
            self.at(0, 0)  # a bad value is refused now

    @property
    def vary(self) -> bool:
        """Whether any is a function of the epoch."""
        return any(callable(value) for value in self._given.values())

    def at(self, epoch: int, k: int) -> Hyper:
        """The values of a step.

        Args:
            epoch: of the step, counted from 0.
            k: the step, counted from 0.

        Returns:
            Numbers.

        Raises:
            InputError: a value is out of range.
        """
        longest = self.longest(k)
        if self._held is None or self._held[0] != (epoch, longest):
            values = {name: value(epoch) if callable(value) else value for name, value in self._given.items()}
            values["T_updt"] = whole(values["T_updt"], "T_updt", 1)
            if values["T_brand"] is None:
                values["T_brand"] = self._updates * values["T_updt"]
            for name in _PERIODS:
                period = whole(values[name], name, 1)
                values[name] = min(period, longest) if longest else period
            T_updt, phi = values.pop("T_updt"), values.pop("phi_lambda")
            check_phi(phi)
            self._held = (epoch, longest), Hyper(Settings(**values), T_updt, float(phi))
        return self._held[1]

    def longest(self, k: int) -> int:
        """The longest period at step k in the warm-up: the power of 2 in (k/8, k/4], or 1; 0 for no limit."""
        return 1 << max(0, k.bit_length() - 3) if self.warm_up else 0


def choice_of_side(policy: LayerPolicy, side: str) -> Choice:
    """The choice for one factor of a layer."""
    return policy[side] if isinstance(policy, Mapping) else policy


def check_policy(layer: str, policy: LayerPolicy) -> None:
    """Refuses what is no policy for a layer.

    Args:
        layer: its name.
        policy: what may be none.

    Raises:
        InputError: names the layer.
    """
    if isinstance(policy, Mapping) and set(policy) != {"A", "G"}:
        raise InputError(f"layer {layer!r}: a policy by factor needs the keys 'A' and 'G', got {sorted(policy)}")
    if policy == SGD:
        return
    for side in ("A", "G"):
        choice = choice_of_side(policy, side)
        if isinstance(choice, str):
            try:
                Algorithm.parse(choice)
            except InputError as error:
                raise InputError(f"layer {layer!r}: {error} (nor 'SGD', for the whole layer)") from None
        elif not callable(choice):
            raise InputError(f"layer {layer!r}: a process is named or made by a function, got {choice!r}")


def named_process(choice: Choice, info: FactorInfo, settings: Settings) -> tuple[str, Process]:
    """The process of a choice; one that has no room gives way (`Algorithm.for_factor`).

    Draws differ between layers, factors and algorithms, and repeat with the seed.

    Args:
        choice: of the factor.
        info: the factor.
        settings: of the process.

    Returns:
        What it is called, and the process.

    Raises:
        InputError: a function made no process.
    """
    if isinstance(choice, str):
        algorithm = Algorithm.parse(choice).for_factor(settings, info.d, info.n)
        own = np.random.SeedSequence([settings.seed, *info.layer.encode()]).generate_state(1)[0]
        return str(algorithm), algorithm.process(replace(settings, seed=int(own)), info.side)
    process = choice(info)
    if not isinstance(process, Process):
        raise InputError(f"layer {info.layer!r}, factor {info.side}: {process!r} is not a kfacerr Process")
    return type(process).__name__, process
