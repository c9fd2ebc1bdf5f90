"""The seven algorithms of §4.2 by name, each as a process for one K-factor.

A name is a base, K-FAC, R-KFAC, SRE-KFAC, B-KFAC, B-R-KFAC, B-KFAC-C or FD, followed by settings that differ from
the defaults: "R-KFAC T_inv=50 rank=476", "B-R-KFAC sketch=nystrom", "B-R-KFAC adaptive=2". Where `adaptive` is
given, a period that is not given is endless.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .exceptions import InputError
from .frequent_directions import FrequentDirections
from .process import Process
from .processes import Brand, BrandCorrected, BrandRsvd, Evd, Rsvd, Sketch
from .rsvd import nystrom, rsvd, srevd

__all__ = ["SEVEN", "Settings", "make_process"]

SEVEN = (
    "K-FAC T_inv=50",
    "R-KFAC T_inv=50",
    "R-KFAC T_inv=10",
    "R-KFAC T_inv=300",
    "B-KFAC",
    "B-R-KFAC",
    "B-KFAC-C",
)
"""The algorithms of §4.2; B-R-KFAC overwrites and B-KFAC-C corrects every 50 iterations."""


@dataclass(frozen=True)
class Settings:
    """What all processes of one factor share, by the paper's names (§6).

    Attributes:
        rank: target and truncation rank r.
        rho: EA decay.
        oversampling: r_o of the RSVD.
        n_pwr_it: power iterations of the RSVD.
        seed: of the random draws; every algorithm has a stream of its own, so adding one changes no other.
    """

    rank: int
    rho: float = 0.95
    oversampling: int = 10
    n_pwr_it: int = 4
    seed: int = 0


def _kfac(s: Settings, rng: np.random.Generator, *, T_inv: int = 50) -> Process:
    return Evd(T_inv=T_inv)


_SKETCHES = {"rs": rsvd, "sre": srevd, "nystrom": nystrom}
_ENDLESS = 2**62


def _sketch(s: Settings, rng: np.random.Generator, method: str) -> Sketch:
    return Sketch(rng, s.oversampling, s.n_pwr_it, _SKETCHES[method])


def _rkfac(
    s: Settings,
    rng: np.random.Generator,
    *,
    T_inv: int = 0,
    adaptive: float = 0.0,
    sketch: str = "rs",
    rank: int = 0,
) -> Process:
    period = T_inv or (_ENDLESS if adaptive else 50)
    return Rsvd(rank or s.rank, _sketch(s, rng, sketch), T_inv=period, adaptive=adaptive)


def _srekfac(s: Settings, rng: np.random.Generator, *, T_inv: int = 50, rank: int = 0) -> Process:
    return Rsvd(rank or s.rank, _sketch(s, rng, "sre"), T_inv=T_inv)


def _bkfac(s: Settings, rng: np.random.Generator, *, T_brand: int = 1, rank: int = 0) -> Process:
    return Brand(rank or s.rank, rho=s.rho, T_brand=T_brand)


def _brkfac(
    s: Settings,
    rng: np.random.Generator,
    *,
    T_brand: int = 1,
    T_rsvd: int = 0,
    adaptive: float = 0.0,
    sketch: str = "rs",
    rank: int = 0,
) -> Process:
    period = T_rsvd or (_ENDLESS if adaptive else 50)
    by = _sketch(s, rng, sketch)
    return BrandRsvd(rank or s.rank, by, rho=s.rho, T_rsvd=period, T_brand=T_brand, adaptive=adaptive)


def _bkfacc(
    s: Settings,
    rng: np.random.Generator,
    *,
    T_brand: int = 1,
    T_corct: int = 50,
    phi_corct: float = 0.5,
    rank: int = 0,
) -> Process:
    return BrandCorrected(
        rank or s.rank, rho=s.rho, T_corct=T_corct, phi_corct=phi_corct, rng=rng, T_brand=T_brand
    )


def _fd(s: Settings, rng: np.random.Generator, *, T_brand: int = 1, rank: int = 0) -> Process:
    return FrequentDirections(rank or s.rank, rho=s.rho, T_brand=T_brand)


_BASES: dict[str, Callable[..., Process]] = {
    "K-FAC": _kfac,
    "R-KFAC": _rkfac,
    "SRE-KFAC": _srekfac,
    "B-KFAC": _bkfac,
    "B-R-KFAC": _brkfac,
    "B-KFAC-C": _bkfacc,
    "FD": _fd,
}


def make_process(name: str, settings: Settings, side: str) -> Process:
    """The process of algorithm `name` for the factor of `side` ("A" or "G").

    Raises:
        InputError: unknown algorithm or setting, or a value out of range.
    """
    base, *options = name.split() or [""]
    if base not in _BASES:
        raise InputError(f"algorithm {name!r}: {base!r} is not one of {', '.join(_BASES)}")
    make = _BASES[base]
    allowed = make.__kwdefaults__ or {}
    given: dict[str, int | float | str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in allowed:
            raise InputError(f"algorithm {name!r}: {key!r} is not one of {', '.join(allowed)}")
        try:
            given[key] = type(allowed[key])(value)
        except ValueError:
            raise InputError(f"algorithm {name!r}: {key} has no value {value!r}") from None
        if key == "sketch" and value not in _SKETCHES:
            raise InputError(f"algorithm {name!r}: sketch {value!r} is not one of {', '.join(_SKETCHES)}")
        if isinstance(given[key], int | float) and not given[key] > 0:  # type: ignore[operator]
            raise InputError(f"algorithm {name!r}: {key} must be positive")
    # The name itself seeds the draws, through its bytes: `hash` differs from run to run.
    rng = np.random.default_rng([settings.seed, ord(side), *name.encode()])
    return make(settings, rng, **given)
