"""Which process follows which K-factor, and its hyper-parameters as schedules of the epoch (§3.5, §6).

A choice is a name of `kfacerr.algorithms` ("K-FAC": EVD, "R-KFAC": RSVD, "SRE-KFAC": SREVD, "B-KFAC": Brand,
"B-R-KFAC": Brand with overwriting, "B-KFAC-C": Brand with correction), possibly with settings of its own that no
schedule then touches ("R-KFAC T_inv=10 rank=50"), or a function that makes a process of your own, or "SGD".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from ..algorithms import Settings, make_process
from ..exceptions import InputError
from ..inverse import check_phi
from ..process import Process, check_rho
from ..processes import Brand

__all__ = ["PRESETS", "SGD", "Choice", "FactorInfo", "HyperParameters", "LayerPolicy", "Preset", "Schedules"]

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
    """One algorithm of §6: B- variants on the first FC layer only, R-KFAC on all others (§3.5)."""

    first_fc: str
    others: str
    T_brand: int = 25


PRESETS = {
    "K-FAC": Preset("K-FAC", "K-FAC"),
    "R-KFAC": Preset("R-KFAC", "R-KFAC"),
    "SRE-KFAC": Preset("SRE-KFAC", "SRE-KFAC"),
    "B-KFAC": Preset("B-KFAC", "R-KFAC", T_brand=125),
    "B-R-KFAC": Preset("B-R-KFAC", "R-KFAC", T_brand=25),
    "B-KFAC-C": Preset("B-KFAC-C", "R-KFAC", T_brand=125),
}


@dataclass(frozen=True)
class HyperParameters:
    """The hyper-parameters of the processes in one epoch, by the names of §6."""

    T_updt: int
    T_inv: int
    T_brand: int
    T_rsvd: int
    T_corct: int
    phi_corct: float
    rank: int
    oversampling: int
    n_pwr_it: int
    phi_lambda: float
    rho: float

    def __post_init__(self) -> None:
        for name, least in (
            *((name, 1) for name in ("T_updt", "T_inv", "T_brand", "T_rsvd", "T_corct", "rank")),
            *((name, 0) for name in ("oversampling", "n_pwr_it")),
        ):
            value = getattr(self, name)
            if not is_number(value) or value % 1 or not least <= value < float("inf"):
                raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name in ("phi_corct", "phi_lambda", "rho"):
            if not is_number(getattr(self, name)):
                raise InputError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not 0 < self.phi_corct <= 1:
            raise InputError(f"phi_corct must lie in (0, 1], got {self.phi_corct}")
        check_phi(self.phi_lambda)
        check_rho(self.rho)


def is_number(value: Any) -> bool:
    """Whether a value can be a setting: also NumPy's numbers and a 0-d tensor (a learning rate may be one)."""
    return not isinstance(value, str | bytes) and all(hasattr(value, name) for name in ("__float__", "__lt__"))


class Schedules:
    """`HyperParameters` as given: each a number, or a function of the epoch."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = {field.name: given[field.name] for field in fields(HyperParameters)}
        self._held: tuple[int, HyperParameters] | None = None
        if not self.vary:
            self.at(0)  # a bad value is refused now

    @property
    def vary(self) -> bool:
        """Whether any is a function of the epoch."""
        return any(callable(value) for value in self._given.values())

    def at(self, epoch: int) -> HyperParameters:
        """The values in `epoch`.

        Raises:
            InputError: a value is out of range.
        """
        if self._held is None or self._held[0] != epoch:
            values = {name: value(epoch) if callable(value) else value for name, value in self._given.items()}
            self._held = epoch, HyperParameters(**values)
        return self._held[1]


def choice_of_side(policy: LayerPolicy, side: str) -> Choice:
    """The choice for one factor of a layer."""
    return policy[side] if isinstance(policy, Mapping) else policy


def check_policy(layer: str, policy: LayerPolicy) -> None:
    """Refuses what is no policy for a layer.

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
                make_process(choice, Settings(rank=1), side)
            except InputError as error:
                raise InputError(f"layer {layer!r}: {error} (nor 'SGD', for the whole layer)") from None
        elif not callable(choice):
            raise InputError(f"layer {layer!r}: a process is named or made by a function, got {choice!r}")


def falls_back(choice: Choice, info: FactorInfo, hyper: HyperParameters) -> bool:
    """Whether a Brand process would have r + n >= d, where it saves nothing (§3.5)."""
    if not isinstance(choice, str) or not choice.startswith(("B-", "FD")):
        return False
    rank = int(_own_settings(choice).get("rank", hyper.rank))
    return rank + info.n >= info.d


def make(choice: Choice, info: FactorInfo, hyper: HyperParameters, *, accumulate: bool, seed: int) -> Process:
    """The process of `choice`. Draws differ between layers, factors and algorithms, and repeat with the seed."""
    if not isinstance(choice, str):
        process = choice(info)
        if not isinstance(process, Process):
            raise InputError(f"layer {info.layer!r}, factor {info.side}: {process!r} is not a kfacerr Process")
        return process
    own = int(np.random.SeedSequence([seed, *info.layer.encode()]).generate_state(1)[0])
    settings = Settings(hyper.rank, hyper.rho, hyper.oversampling, hyper.n_pwr_it, seed=own)
    process = make_process(choice, settings, info.side)
    if isinstance(process, Brand):
        process.accumulate = accumulate
    tune(process, choice, hyper)
    return process


def tune(process: Process, choice: Choice, hyper: HyperParameters) -> None:
    """Gives a process this epoch's values, but for the settings in its name. Your own processes are left alone.

    Nor has an adaptive process the schedules' periods: its certificate says when.
    """
    if not isinstance(choice, str):
        return
    fixed = _own_settings(choice)
    for name, clock in process.clocks().items():
        if name not in fixed and "adaptive" not in fixed:
            clock.reschedule(int(getattr(hyper, name)))
    for holder in (process, getattr(process, "sketch", None)):
        for name in ("rank", "rho", "phi_corct", "oversampling", "n_pwr_it"):
            if name not in fixed and hasattr(holder, name):
                setattr(holder, name, getattr(hyper, name))


def _own_settings(choice: str) -> dict[str, str]:
    """ "R-KFAC T_inv=10" -> {"T_inv": "10"}."""
    return {name: value for name, _, value in (option.partition("=") for option in choice.split()[1:])}
