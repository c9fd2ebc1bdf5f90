"""Audits of K-factors that exist already: `kfacerr.inspect` on files, state dicts and arrays.

`kfacerr.stored` says which layouts are known, `kfacerr.examine` what is measured.
"""

import functools
import math
import os
import textwrap
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checks import whole
from .damping import Damping, Scale
from .examine import PRECISIONS, SIDES, FactorAudit, examine, layer_steps
from .exceptions import InputError
from .files import write_csv, write_text
from .inverse import CONTINUATIONS, check_phi
from .metrics import ROUNDING
from .page import page, themed
from .report import default_rank
from .stored import StoredFactor, find_factors, stored, stored_leaves

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Inspection", "inspect"]

MEANING = {
    "stable": "stable rank, trace / lambda_max",
    "99%": "leading eigenvalues that hold 99% of the trace",
    "> lam": "eigenvalues above the damping lam",
    "min": "the smallest eigenvalue over lambda_max, negative where M is not p.s.d.",
    "cond.": "condition of M + lam I",
    "asym.": "asymmetry ||M - M^T|| / ||M|| as stored",
    "beyond": "the share of the trace beyond the r leading eigenvalues",
    "p": "of the (M + lam I)^-p that errors are of: 1 for K-FAC, 1/(2 k) for Shampoo with k factors a tensor",
    "none, min, trace": "(1) relative error of the damped inverse truncated to r, its spectrum continued by "
    "nothing, the smallest mode kept, or the trace left over; in brackets what the certificate knows of it",
    "float32, bfloat16": "(1) of the inverse from an EVD in float32, and of one of the factor in bfloat16",
    "(3), (4)": "norm and angle error of the layer's step, on a gradient drawn from K-FAC's model, on yours",
}


def inspect(
    source: Any,
    *,
    rank: int | None = None,
    phi: float = 0.1,
    damping: str | Damping | None = None,
    gradients: Any = None,
) -> "Inspection":
    """Audits the K-factors in a file, a folder, a state dict, or one as an array.

    >>> inspect({"fc": {"A": np.diag([3.0, 1.0]), "G": np.eye(2)}}).table[["layer", "side", "stable_rank"]]
      layer side  stable_rank
    0    fc    A     1.333333
    1    fc    G     2.000000

    Args:
        source: a path, an array (d, d), or nested mappings and lists of arrays in a layout of `kfacerr.stored`.
        rank: r of truncations; by default an eighth of the layer's smaller dimension, at least 4 and at most 220.
        phi: damping ratio.
        damping: a lam of each factor in its place, "mean=0.1" or "lam=1e-3", see `kfacerr.damping`.
        gradients: by layer (d_G, d_A), a mapping or a file, to measure steps on; a layer may be left out.

    Returns:
        The audit.

    Raises:
        InputError: nothing there is a K-factor, a file that cannot be read, or values out of range.
    """
    chosen = Damping("phi", check_phi(phi)) if damping is None else _of_one(damping)
    if rank is not None:
        whole(rank, "rank", 1)
    tree, name = _tree(source)
    layers = _by_layer(find_factors(tree, name or "factor"), tree, name)
    given = {} if gradients is None else dict(stored_leaves(_tree(gradients)[0]))
    unknown = sorted(set(given) - set(layers))
    if unknown:
        raise InputError(f"no layer {unknown[0]!r} that a gradient is given of; there are {', '.join(layers)}")
    return Inspection(layers, given, rank=rank, damping=chosen, title=f" in {name}" if name else "")


def _of_one(damping: str | Damping) -> Damping:
    """A damping of one factor."""
    chosen = Damping.of(damping).of_each_factor()
    chosen.level(Scale(1, 1.0, 1.0))
    return chosen


def _tree(source: Any) -> tuple[Any, str]:
    """A tree of arrays, and the name of the file that it was in."""
    if not isinstance(source, str | os.PathLike):
        return stored(source), ""
    from .stored_files import read_tree  # with h5py

    return read_tree(Path(source)), Path(source).name


def _by_layer(factors: list[StoredFactor], tree: Any, name: str) -> dict[str, list[StoredFactor]]:
    layers: dict[str, list[StoredFactor]] = {}
    for factor in factors:
        layers.setdefault(factor.layer, []).append(factor)
    if not layers:
        arrays = [f"{leaf} {array.dtype} {array.shape}" for leaf, array in stored_leaves(tree)]
        there = ", ".join(arrays[:4]) + (f" and {len(arrays) - 4} more" if len(arrays) > 4 else "")
        raise InputError(
            f"{name or 'the source'}: no K-factors, square matrices (d, d); there are {there or 'no arrays'}"
        )
    return layers


class Inspection:
    """An audit of K-factors. Prints itself, also in a notebook.

    Args:
        layers: the factors, by layer.
        gradients: by layer.
        rank: r; None for a default by the layer's dimensions.
        damping: the lam of each factor.
        title: where they come from, at the end of a line.

    Attributes:
        factors: a `FactorAudit` each.
        steps: columns layer, gradient ("model" or "given"), continuation, step_norm, step_angle.
        table: a row a factor, with all that was found.
    """

    def __init__(
        self,
        layers: Mapping[str, list[StoredFactor]],
        gradients: Mapping[str, Any],
        *,
        rank: int | None,
        damping: Damping,
        title: str,
    ) -> None:
        import pandas as pd
        from tqdm import tqdm

        started = time.perf_counter()
        self.factors: list[FactorAudit] = []
        self._spectra: dict[str, dict[str, np.ndarray]] = {}
        self._rotated: dict[str, np.ndarray | None] = {}  # a gradient in the eigenbases of a layer's factors
        rows: list[tuple[Any, ...]] = []
        with tqdm(total=sum(map(len, layers.values())), unit="factor", disable=None) as bar:
            for layer, factors in layers.items():
                dimensions = [factor.array.shape[0] for factor in factors]
                r = default_rank(min(dimensions), max(dimensions)) if rank is None else rank
                power = _power(factors)
                examined = {}
                for factor in factors:
                    examined[factor.side] = examine(factor, rank=r, damping=damping, power=power)
                    bar.update()
                self.factors += [one.audit for one in examined.values()]
                self._spectra[layer] = {side: one.spectrum for side, one in examined.items()}
                found, self._rotated[layer] = layer_steps(examined, gradients.get(layer))
                rows += [(layer, *row) for row in found]
        columns = ["layer", "gradient", "continuation", "step_norm", "step_angle"]
        self.steps = pd.DataFrame(rows, columns=columns)
        self.damping = damping
        counted = [
            f"{len(what)} {name}{'s' * (len(what) != 1)}"
            for what, name in ((self.factors, "K-factor"), (layers, "layer"))
        ]
        self.title = f"{' of '.join(counted)}{title}, {damping.kind} = {damping.value:g}"
        self.seconds = time.perf_counter() - started

    @property
    def table(self) -> "pd.DataFrame":
        import pandas as pd

        steps = {
            (layer, f"{metric}_{gradient}_{name}"): value
            for layer, gradient, name, *values in self.steps.itertuples(index=False)
            for metric, value in zip(("step_norm", "step_angle"), values, strict=True)
        }
        names = list(dict.fromkeys(name for _, name in steps))
        rows = []
        for audit in self.factors:
            row = asdict(audit)
            errors, bounds, precision = row.pop("errors"), row.pop("bounds"), row.pop("precision")
            findings = row.pop("findings")
            row |= {f"error_{name}": errors.get(name, math.nan) for name in CONTINUATIONS}
            row |= {f"bound_{name}": bounds.get(name, math.nan) for name in CONTINUATIONS}
            row |= {f"eigh_{name}": precision.get(name, math.nan) for name in PRECISIONS}
            row |= {name: steps.get((audit.layer, name), math.nan) for name in names}
            rows.append(row | {"findings": "; ".join(findings)})
        first = ["layer", "side", "d", "trace", "stable_rank"]
        frame = pd.DataFrame(rows)
        return frame[[*first, *(name for name in frame if name not in first)]]

    # --------------------------------------------------------------------------------------------- tables

    def spectra(self) -> "pd.DataFrame":
        """A row a factor: what its eigenvalues are like; cells are text."""
        return _frame(
            {
                "layer": audit.layer,
                "side": audit.side,
                "d": audit.d,
                "trace": _number(audit.trace, 3),
                "stable": _number(audit.stable_rank, 3),
                "99%": _rank(audit),
                "> lam": _number(audit.above),
                "min": _number(audit.lambda_min / audit.lambda_max if audit.lambda_max else math.nan),
                "cond.": _number(audit.condition, 3),
                "asym.": _number(audit.asymmetry),
            }
            for audit in self.factors
        )

    def inverses(self) -> "pd.DataFrame":
        """A row a factor: errors of its cheap inverses, bounds in brackets; cells are text."""
        powers = any(audit.power != 1 for audit in self.factors)
        return _frame(
            {
                "layer": audit.layer,
                "side": audit.side,
                **({"p": f"{audit.power:g}"} if powers else {}),
                "r": audit.rank,
                "beyond": "" if math.isnan(audit.beyond) else f"{audit.beyond:.1%}",
                **{name: _bounded(audit.errors.get(name), audit.bounds.get(name)) for name in CONTINUATIONS},
                **{name: _number(audit.precision.get(name, math.nan)) for name in PRECISIONS},
            }
            for audit in self.factors
        )

    def step_table(self) -> "pd.DataFrame":
        """A row a layer and gradient: norm and angle errors by continuation; cells are text."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for layer, gradient, name, size, angle in self.steps.itertuples(index=False):
            row = rows.setdefault((layer, gradient), {"layer": layer, "gradient": gradient})
            row[f"(3) {name}"], row[f"(4) {name}"] = _error(size), _error(angle)
        return _frame(dict(sorted(row.items(), key=lambda cell: cell[0].startswith("("))) for row in rows.values())

    def findings(self) -> list[str]:
        """What a reader should know, a sentence each."""
        return [f"{_who(audit)}: {told}" for audit in self.factors for told in audit.findings]

    def summary(self) -> str:
        """The audit as text, at most 100 columns wide."""
        parts = [self.title]
        truncated = (
            "(1) error of the inverse truncated to r, by continuation (bound), and of EVDs of low precision"
        )
        for caption, frame in (
            ("", self.spectra()),
            (truncated, self.inverses()),
            ("norm error (3) and angle error (4) of the layer's step, by continuation", self.step_table()),
        ):
            if len(frame):
                parts += ["", *([caption] if caption else []), _plain(frame)]
        findings = [textwrap.fill(f"- {told}", 100, subsequent_indent="  ") for told in self.findings()]
        return "\n".join([*parts, *([""] if findings else []), *findings])

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"<kfacerr Inspection of {len(self.factors)} factors; print it, or see .plot() and .to_html(path)>"

    # ------------------------------------------------------------------------------------------ to look at

    def plot(self, layer: str | None = None, *, dark: bool = False) -> "Figure":
        """The spectra of a layer, or of all, over their largest eigenvalue; a matplotlib Figure.

        Args:
            layer: its name; all if None.
            dark: for a dark background.

        Returns:
            The figure.

        Raises:
            InputError: there is no such layer.
        """
        from .plot import spectrum_figure

        if layer is not None and layer not in self._spectra:
            raise InputError(f"no layer {layer!r}; there are {', '.join(self._spectra)}")
        chosen = self._spectra if layer is None else {layer: self._spectra[layer]}
        title = self.title if layer is None else f"layer {layer}"
        phi = self.damping.value if self.damping.kind == "phi" else None
        return spectrum_figure(chosen, phi, title=title, dark=dark)

    def damping_map(self, layer: str | None = None, *, continuation: str = "min") -> "pd.DataFrame":
        """Errors (1)-(4) of truncations, and the condition, over damping and rank, see `kfacerr.damping_map`.

        On the gradient that is given of the layer, else on one drawn from K-FAC's model.

        Args:
            layer: its name; the first with both factors if None.
            continuation: of the truncated spectra.

        Returns:
            Columns layer, damping, share, rank, metric, value.

        Raises:
            InputError: no such layer, none with both factors in full, or no such continuation.
        """
        from .damping_map import damping_map, ranks_around

        there = [name for name, J in self._rotated.items() if J is not None]
        if not there or layer not in (None, *there):
            told = "" if layer is None else f" of layer {layer!r}"
            names = ", ".join(there) or "none"
            raise InputError(f"no damping map{told}: it needs both factors in full, which these have: {names}")
        chosen = there[0] if layer is None else layer
        J, spectra = self._rotated[chosen], self._spectra[chosen]
        left, right = next(pair for pair in SIDES if all(side in spectra for side in pair))
        assert J is not None
        rank = next(audit.rank for audit in self.factors if audit.layer == chosen)
        ranks = ranks_around(rank, min(J.shape))
        frame = damping_map(spectra[left], spectra[right], J, ranks, continuation=continuation)
        frame.insert(0, "layer", chosen)
        return frame

    def plot_damping(self, layer: str | None = None, *, continuation: str = "min", dark: bool = False) -> "Figure":
        """The damping map of a layer as a matplotlib Figure; arguments as for `damping_map` and `plot`."""
        from .plot import damping_figure

        frame = self.damping_map(layer, continuation=continuation)
        title = f"layer {frame['layer'].iloc[0]}: damping and rank, continuation {continuation}"
        return damping_figure(frame, title=title, dark=dark)

    def to_csv(self, path: str | Path) -> None:
        """Writes the table."""
        write_csv(Path(path), self.table, digits=12)

    def to_html(self, path: str | Path) -> None:
        """Writes the audit as one file that needs no network, light and dark."""
        write_text(Path(path), self._page(whole=True))

    def _repr_html_(self) -> str:
        return self._page(whole=False)

    def _page(self, *, whole: bool) -> str:
        inverses, steps = self.inverses(), self.step_table()
        layers = []
        for layer in self._spectra:
            own = [audit for audit in self.factors if audit.layer == layer]
            parts = [part[part["layer"] == layer].drop(columns="layer") for part in (inverses, steps) if len(part)]
            layers.append(
                {
                    "name": layer,
                    "about": ", ".join(f"{_who(audit)} in {audit.dtype}{_counted(audit)}" for audit in own),
                    "notes": [f"{_who(audit)}: {told}" for audit in own for told in audit.findings],
                    "errors": "<br>".join(part.to_html(index=False, border=0) for part in parts if len(part)),
                    "figure": themed(functools.partial(self.plot, layer)),
                    "alt": f"Spectra of the factors of layer {layer}",
                }
            )
        return page(
            whole=whole,
            title=self.title,
            facts=self.spectra().to_html(index=False, border=0),
            layers=layers,
            meaning=MEANING,
            reading="0 is rounding.",
            cost=f"time: {self.seconds:.1f} s",
        )


def _power(factors: list[StoredFactor]) -> float:
    """p of the (M + lam I)^-p that the factors are for: 1 in K-FAC, 1/(2 k) in Shampoo with k factors a tensor."""
    return 1.0 if factors[0].side in ("A", "G", "") else 1 / (2 * len(factors))


def _frame(rows: Any) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(list(rows))


WIDTH = 100
"""Of what is printed."""


def _plain(frame: "pd.DataFrame") -> str:
    """The table as text; long names of layers keep their ends, which tell them apart."""
    from tabulate import tabulate

    def table(room: int) -> str:
        cells = [[_cut(name, room), *map(str, row)] for name, *row in frame.itertuples(index=False)]
        align = ["left" if name in ("layer", "side", "gradient") else "right" for name in frame]
        return tabulate(cells, headers=list(frame), tablefmt="simple", colalign=align, disable_numparse=True)

    longest = max(map(len, frame["layer"]))
    over = max(map(len, table(longest).splitlines())) - WIDTH
    return table(longest if over <= 0 else max(6, longest - over))


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _who(audit: FactorAudit) -> str:
    return f"{audit.layer} {audit.side}".strip()


def _counted(audit: FactorAudit) -> str:
    return "" if math.isnan(audit.count) else f", a sum of {audit.count:g}"


def _rank(audit: FactorAudit) -> str:
    """The number of leading modes, or that it is more than were computed."""
    if math.isnan(audit.rank_99) and not math.isnan(audit.stable_rank):
        return f"> {audit.rank}"
    return _number(audit.rank_99)


def _bounded(error: float | None, bound: float | None) -> str:
    """0.12 (0.3), or the bound alone in brackets."""
    shown = "" if error is None else _error(error)
    return shown if bound is None else f"{shown} ({_error(_raised(bound), 1)})".strip()


def _raised(bound: float) -> float:
    """To one digit, upwards: a bound is not shown below what it bounds."""
    if not 0 < bound < math.inf:
        return bound
    unit = 10.0 ** math.floor(math.log10(bound))
    return math.ceil(bound / unit) * unit


def _error(value: float, digits: int = 2) -> str:
    """As `_number`; 0 for mere rounding."""
    return "0" if value < ROUNDING else _number(value, digits)


def _number(value: float, digits: int = 2) -> str:
    """Some digits, all of a whole number; nothing for NaN."""
    if math.isnan(value):
        return ""
    if math.isfinite(value) and value == round(value) and abs(value) < 1e6:
        return str(round(value))
    return f"{value:.{digits}g}"
