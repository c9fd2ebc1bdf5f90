"""Algorithms as values: the names of §4.2, parsed once.

A name is a base followed by settings of its own: "R-KFAC T_inv=50 rank=476 continuation=trace". Tables, policies,
drivers and command lines all use these names, and nobody else takes them apart.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from .checks import choice, instance, names
from .exceptions import InputError
from .frequent_directions import FrequentDirections
from .process import Process, Settings
from .processes import Brand, BrandCorrected, BrandRsvd, Evd, Rsvd
from .streaming import StreamingNystrom
from .warm import WarmNystrom

__all__ = ["FALLBACK", "SEVEN", "Algorithm", "not_used"]

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


class _Base(NamedTuple):
    """What a base stands for.

    Attributes:
        process: follows one factor.
        own: the settings that may stand in the name, in the order they are written in.
        implied: settings that the base itself fixes.
        no_room: of settings, d and n: why a factor (d, d) is too small for it, "" if it is not.
    """

    process: type[Process]
    own: tuple[str, ...]
    implied: Mapping[str, Any] = {}
    no_room: Callable[[Settings, int, int], str] = lambda settings, d, n: ""


def _beside(settings: Settings, d: int, n: int) -> str:
    """Brand's saves something only where r + n < d (§3.5)."""
    r = settings.rank
    return f"r + n >= d ({r} + {n} >= {d})" if r + n >= d else ""


def _sketched(settings: Settings, d: int, n: int) -> str:
    """The 4 d s n flops of a sketch's update are fewer than the 2 d^2 n of (8) only where 2 s < d."""
    s = StreamingNystrom(settings).columns
    return f"2 s >= d (2 x {s} >= {d})" if 2 * s >= d else ""


_BASES = {
    "K-FAC": _Base(Evd, ("T_inv",)),
    "R-KFAC": _Base(Rsvd, ("T_inv", "sketch", "rank")),
    "SRE-KFAC": _Base(Rsvd, ("T_inv", "rank"), {"sketch": "sre"}),
    "B-KFAC": _Base(Brand, ("T_brand", "rank"), no_room=_beside),
    "B-R-KFAC": _Base(BrandRsvd, ("T_brand", "T_rsvd", "sketch", "rank"), no_room=_beside),
    "B-KFAC-C": _Base(BrandCorrected, ("T_brand", "T_corct", "phi_corct", "rank"), no_room=_beside),
    "FD": _Base(FrequentDirections, ("T_brand", "rank"), no_room=_beside),
    "N-KFAC": _Base(StreamingNystrom, ("s", "T_base", "rank"), no_room=_sketched),
    "W-KFAC": _Base(WarmNystrom, ("T_inv", "rank")),
}
_OF_ALL = ("continuation",)
_TYPES: dict[str, Callable[[str], Any]] = {
    field.name: int if field.default is None else type(field.default) for field in fields(Settings)
}


@dataclass(frozen=True, eq=False)
class Algorithm:
    """One algorithm with the settings that its name fixes. `Algorithm.parse` and `str` are inverse.

    Attributes:
        base: K-FAC, R-KFAC, SRE-KFAC, B-KFAC, B-R-KFAC, B-KFAC-C, FD, N-KFAC or W-KFAC.
        own: its own settings as (name, value), in the order of its name, in which alone equal ones may differ.
    """

    base: str
    own: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        choice(self.base, "the base", _BASES)
        for name, _ in names(self.own, "its settings", tuple):
            choice(name, f"{self.base}: the setting", (*_BASES[self.base].own, *_OF_ALL))
        Settings(**dict(self.own))

    def __repr__(self) -> str:
        return f"Algorithm.parse({str(self)!r})"

    @classmethod
    def parse(cls, name: "str | Algorithm") -> "Algorithm":
        """The algorithm of a name; an algorithm stands for itself.

        Args:
            name: a base and its own settings, "R-KFAC T_inv=10 rank=32".

        Returns:
            The algorithm.

        Raises:
            InputError: unknown base or setting, or a value out of range.
        """
        if isinstance(name, Algorithm):
            return name
        if not isinstance(name, str):
            raise InputError(f"an algorithm's name is needed, got {name!r}")
        base, *options = name.split() or [""]
        if base not in _BASES:
            raise InputError(f"algorithm {name!r}: {base!r} is not one of {', '.join(_BASES)}")
        allowed = (*_BASES[base].own, *_OF_ALL)
        given: dict[str, Any] = {}
        for option in options:
            key, _, value = option.partition("=")
            if key not in allowed:
                raise InputError(f"algorithm {name!r}: {key!r} is not one of {', '.join(allowed)}")
            if key in given:
                raise InputError(f"algorithm {name!r}: {key} is given twice")
            try:
                given[key] = _TYPES[key](value)
            except ValueError:
                raise InputError(f"algorithm {name!r}: {key} has no value {value!r}") from None
        try:
            Settings(**given)
        except InputError as error:
            raise InputError(f"algorithm {name!r}: {error}") from None
        return cls(base, tuple(given.items()))

    def __str__(self) -> str:
        return " ".join([self.base, *(f"{key}={_text(value)}" for key, value in self.own)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Algorithm) and (self.base, dict(self.own)) == (other.base, dict(other.own))

    def __hash__(self) -> int:
        return hash((self.base, frozenset(self.own)))

    def get(self, name: str, default: Any = None) -> Any:
        """A setting of its own, or the default."""
        return dict(self.own).get(name, default)

    def with_settings(self, **settings: Any) -> "Algorithm":
        """The same with other settings of its own, in the base's order; None takes one away.

        Args:
            **settings: by the names of `Settings`.

        Returns:
            Another algorithm of the same base.

        Raises:
            InputError: it has no such setting, or a value is out of range.
        """
        own = {key: value for key, value in {**dict(self.own), **settings}.items() if value is not None}
        order = (*_BASES[self.base].own, *_OF_ALL)
        listed = sorted(own.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
        return Algorithm.parse(str(Algorithm(self.base, tuple(listed))))

    def fresh(self, settings: Settings, every: int) -> "Algorithm":
        """Itself with an estimate that takes every update: what it would be if it were never stale.

        Args:
            settings: of its process, where the name has none.
            every: iterations between updates of the factors.

        Returns:
            Itself where it is never stale anyway.
        """
        periods = [name for name in ("T_inv", "T_brand") if name in _BASES[self.base].own]
        slow = {name: every for name in periods if self.get(name, getattr(settings, name)) > every}
        return self.with_settings(**slow) if slow else self

    def spelt(self, settings: Settings) -> "Algorithm":
        """Itself with the periods of its heavy updates in its name, where no schedule touches them.

        Args:
            settings: what it has them from, where the name has none.

        Returns:
            The same process, whatever it is configured with.
        """
        periods = [name for name in ("T_inv", "T_rsvd", "T_corct") if name in _BASES[self.base].own]
        return self.with_settings(**{name: self.get(name, getattr(settings, name)) for name in periods})

    @property
    def process_name(self) -> str:
        """The name without what only its inverse depends on: algorithms alike in it share their processes."""
        return str(self.with_settings(continuation=None))

    def process(self, settings: Settings, side: str) -> Process:
        """A process for the factor of `side` ("A" or "G"); its own settings stay, whatever `configure` says."""
        instance(settings, "settings", Settings)
        choice(side, "side", ("A", "G"))
        base = _BASES[self.base]
        chosen = {**base.implied, **dict(self.own)}
        # The name itself seeds the draws, through its bytes: `hash` differs from run to run.
        rng = np.random.default_rng([settings.seed, ord(side), *self.process_name.encode()])
        return base.process(replace(settings, **chosen), rng=rng, fixed=tuple(chosen))

    def no_room(self, settings: Settings, d: int, n: int) -> str:
        """Why a factor (d, d) with n columns an update is too small for it to save anything; "" if it is not."""
        base = _BASES[self.base]
        own = {name: value for name, value in self.own if name in base.own}
        return base.no_room(replace(settings, **own), d, n)

    def for_factor(self, settings: Settings, d: int, n: int) -> "Algorithm":
        """Itself, or `FALLBACK` where it has no room."""
        return (
            FALLBACK.with_settings(continuation=self.get("continuation")) if self.no_room(settings, d, n) else self
        )


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


FALLBACK = Algorithm("R-KFAC")
"""What a factor gets in place of a process that has no room."""


def not_used(
    algorithms: Iterable[str | Algorithm], settings: Settings, dimensions: Mapping[str, int], n: int
) -> list[str]:
    """A sentence for each factor that `KFAC` does not use an algorithm on, although its errors can be measured.

    Args:
        algorithms: their names.
        settings: of the processes.
        dimensions: d by side.
        n: columns of an update.

    Returns:
        What tables say beside such an algorithm's errors; nothing where all have room.

    Raises:
        InputError: no algorithm has such a name.
    """
    return [
        f"{algorithm}: {why} for {side}, where it saves nothing: not used there, {FALLBACK} is"
        for algorithm in map(Algorithm.parse, algorithms)
        for side, d in dimensions.items()
        if (why := algorithm.no_room(settings, d, n))
    ]
