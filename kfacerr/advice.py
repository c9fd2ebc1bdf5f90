"""Which inverse should this layer have? Candidates over algorithm, rank, period and continuation: cost and error.

**Cost** is of following both factors and applying the inverses, per training iteration, in milliseconds on this
machine: the flops of `Process.cost`, turned into time by a short measurement of the process itself on columns of
the layer's size (a smaller size where a factor is large, scaled by the flops), and of a product of matrices.
**Errors** are the means of the four metrics over the recording's windows, from one replay that all candidates
share.
**The frontier** holds the candidates of which no other is at most as dear and at most as wrong in the step's norm
and in its angle.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .algorithms import Algorithm
from .checks import choice, instance, names, positive
from .damping import Damping
from .exceptions import InputError
from .factor import KFactor
from .files import write_atomically, write_text
from .inverse import application_flops
from .metrics import METRICS
from .page import page, themed
from .process import Cost, Settings
from .replay import replay
from .report import MEANING
from .stream import Window
from .study import ErrorStudy, named_damping, table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .recording import LayerRecording

__all__ = ["Advice", "Budget", "Layer", "advise_recording", "candidates", "layer_costs"]

MEASURED_UP_TO = 1024
"""Factors of up to so many rows are timed at their size; larger ones at this size, scaled by the flops."""

ITERATIONS = 120
"""Iterations measured at most, spread over the windows: every one costs a step for each candidate."""


@dataclass(frozen=True)
class Layer:
    """What the cost depends on: d_A, d_G, columns n of an update, iterations between updates."""

    d_A: int
    d_G: int
    n: int
    every: int


@dataclass(frozen=True)
class Budget:
    """What the inverse may cost per training iteration.

    Attributes:
        amount: milliseconds, or
        relative: whether it is a multiple of what plain SGD spends on the layer.
    """

    amount: float
    relative: bool = True

    def __post_init__(self) -> None:
        positive(self.amount, "a budget")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """ "1.5x" is a multiple of SGD's cost of the layer, "20" or "20ms" are milliseconds.

        Args:
            text: as above.

        Returns:
            The budget.

        Raises:
            InputError: neither, or not positive.
        """
        if not isinstance(text, str):
            raise InputError(f"a budget is a text, '20' (ms) or '1.5x' (of SGD's cost of the layer), got {text!r}")
        given = text.strip().lower()
        relative = given.endswith("x")
        try:
            amount = float(given.removesuffix("x") if relative else given.removesuffix("ms"))
        except ValueError:
            amount = float("nan")
        if not 0 < amount < float("inf"):
            raise InputError(f"budget {text!r}: give milliseconds (20) or a multiple of SGD's layer cost (1.5x)")
        return cls(amount, relative)

    def milliseconds(self, sgd: float) -> float:
        """In milliseconds, where SGD spends `sgd` on the layer."""
        return self.amount * sgd if self.relative else self.amount


DEFAULT_BUDGET = Budget(4.0)
"""Four times what plain SGD spends on the layer."""


def candidates(layer: Layer, rank: int) -> list[Algorithm]:
    """What is worth a look on a layer: each base, R- and W-KFAC at the rank r + n that Brand's are applied at.

    Args:
        layer: its sizes.
        rank: r.

    Returns:
        Those that have room, and a rank, in the larger factor.
    """
    names = [f"K-FAC T_inv={T}" for T in (10, 50, 250)]
    low = [f"R-KFAC T_inv={T} rank={r}" for T in (10, 50, 250) for r in (rank, rank + layer.n)]
    low += [
        f"{base} rank={r}" for base in ("B-KFAC", "B-R-KFAC T_rsvd=50") for r in (rank // 2 or 1, rank, 2 * rank)
    ]
    low += [f"B-KFAC-C T_corct=50 rank={rank}"]
    low += [f"W-KFAC T_inv={T} rank={rank + layer.n}" for T in (10, 50)]
    low += [f"N-KFAC s={s}" for s in dict.fromkeys((rank, 2 * rank, rank + layer.n))]
    names += [f"{name}{kind}" for name in low for kind in ("", " continuation=trace")]
    wide = max(layer.d_A, layer.d_G)
    there = [a for a in map(Algorithm.parse, names) if a.get("rank", 0) < wide]
    return [a for a in there if not a.no_room(Settings(), wide, layer.n)]


# ------------------------------------------------------------------------------------------------------ cost


def layer_costs(layer: Layer, algorithms: Sequence[Algorithm], settings: Settings) -> "pd.DataFrame":
    """A row a candidate: `cost` (ms per iteration), flops per iteration, MiB held; `attrs["sgd"]` is SGD's cost.

    Args:
        layer: its sizes.
        algorithms: the candidates.
        settings: of the processes.

    Returns:
        With columns `algorithm`, `cost`, `flops`, `MiB`.
    """
    import pandas as pd

    rate = _product_rate()
    rows = []
    for algorithm in algorithms:
        flops = milliseconds = numbers = 0.0
        ranks = {}
        for side, d in (("A", layer.d_A), ("G", layer.d_G)):
            cost, spent = _followed(algorithm.for_factor(settings, d, layer.n), settings, side, d, layer)
            flops += _per_iteration(cost, layer.every)
            milliseconds += spent
            numbers += cost.numbers
            ranks[side] = cost.rank
        applied = min(application_flops(layer.d_A, layer.d_G, layer.n, ranks["A"], ranks["G"]))
        rows.append(
            {
                "algorithm": str(algorithm),
                "cost": milliseconds + 1e3 * applied / rate,
                "flops": flops + applied,
                "MiB": 4 * numbers / 2**20,
            }
        )
    frame = pd.DataFrame(rows)
    # Forward, the gradient of the input and that of the weight: three products.
    frame.attrs["sgd"] = 1e3 * 6.0 * layer.d_A * layer.d_G * layer.n / rate
    return frame


def _per_iteration(cost: Cost, every: int) -> float:
    return cost.update / every + cost.heavy / max(cost.period, every)


def _followed(algorithm: Algorithm, settings: Settings, side: str, d: int, layer: Layer) -> tuple[Cost, float]:
    """What it costs to follow one factor, in flops, and in milliseconds per iteration by measurement."""
    cost = algorithm.process(settings, side).cost(d, layer.n)
    size = min(d, MEASURED_UP_TO)
    small = algorithm.process(settings, side).cost(size, layer.n)
    plain, heavy = _timed(algorithm, settings, side, size, layer.n)
    plain *= cost.update / small.update
    heavy *= cost.heavy / small.heavy if small.heavy else 0.0
    return cost, 1e3 * (plain / layer.every + heavy / max(cost.period, layer.every))


def _timed(algorithm: Algorithm, settings: Settings, side: str, d: int, n: int) -> tuple[float, float]:
    """Seconds of an ordinary update, and those that the heaviest one adds; medians of three, float32."""
    rng = np.random.default_rng(0)
    scale = np.linspace(1, 0.03, d)[:, None].astype(np.float32)
    columns = [scale * rng.standard_normal((d, n)).astype(np.float32) for _ in range(8)]
    factor = KFactor(side, {"it": algorithm.process(settings, side)}, settings.rho)
    factor.push(0, columns[0])
    factor.push(1, columns[1])
    plain, heavy = [], []
    for i in range(3):
        plain.append(_seconds(factor, 2 + 2 * i, columns[2 + 2 * i]))
        factor.processes["it"].restart(3 + 2 * i)
        heavy.append(_seconds(factor, 3 + 2 * i, columns[3 + 2 * i]))
    ordinary = float(np.median(plain))
    return ordinary, max(0.0, float(np.median(heavy)) - ordinary)


def _seconds(factor: KFactor, k: int, X: np.ndarray) -> float:
    started = time.perf_counter()
    factor.push(k, X)
    factor.inverse("it", phi=0.1)  # some decompose only when it is asked for
    return time.perf_counter() - started


def _product_rate() -> float:
    """Flops a second of a float32 product of order 1024."""
    X = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        X @ X
        times.append(time.perf_counter() - started)
    return 2.0 * 1024**3 / float(np.median(times[1:]))


# ---------------------------------------------------------------------------------------------------- advice


class Advice:
    """Candidates with their costs and errors, the frontier, and a choice. Prints itself, also in a notebook.

    Args:
        layer: name of the layer.
        frame: a row a candidate: algorithm, cost (ms per iteration), the four metrics, flops, MiB.
        sgd: what plain SGD spends on the layer, ms per iteration.
        budget: what the inverse may cost.
        settings: of `KFAC`, under which the errors were measured.
        differs: what `KFAC` does otherwise than what was measured, in a few words; "" for nothing.

    Attributes:
        table: the rows by cost, with `on_frontier`.
        choice: the algorithm's name.
        settings: as given: `KFAC(model, **advice.settings, policy=advice.policy)`.
    """

    def __init__(
        self,
        layer: str,
        frame: "pd.DataFrame",
        sgd: float,
        budget: Budget,
        settings: Mapping[str, Any],
        differs: str = "",
    ) -> None:
        self.layer, self.sgd, self.budget, self.settings = layer, sgd, budget, dict(settings)
        self.differs = differs
        marked = frame.assign(on_frontier=_on_frontier(frame[["cost", "step_norm", "step_angle"]].to_numpy()))
        first = ["algorithm", "cost", *METRICS, "on_frontier"]
        rest = [name for name in marked if name not in first]
        self.table = marked[[*first, *rest]].sort_values("cost", kind="stable", ignore_index=True)
        self.within, self.choice = self._choose()

    def _choose(self) -> tuple[bool, str]:
        """The least error of the step within the budget; the cheapest of all if nothing is."""
        limit = self.budget.milliseconds(self.sgd)
        affordable = self.table[self.table.cost <= limit]
        if affordable.empty:
            return False, str(self.table.algorithm.iloc[0])
        return True, str(affordable.sort_values(["step_norm", "cost"], kind="stable").algorithm.iloc[0])

    @property
    def policy(self) -> dict[str, str]:
        """What to give to `KFAC(model, policy=...)`: the choice, and the periods that it was measured with."""
        return {self.layer: str(Algorithm.parse(self.choice).spelt(Settings()))}

    def summary(self) -> str:
        """The frontier, and the choice in the last lines."""
        return "\n".join([self._frontier().to_markdown(index=False, floatfmt=".3g"), *self._verdict()])

    def _frontier(self) -> "pd.DataFrame":
        return self.table[self.table.on_frontier].drop(columns=["on_frontier", "flops"])

    def _verdict(self) -> tuple[str, str, str]:
        """What it is measured by, the choice, and the line to paste."""
        limit = self.budget.milliseconds(self.sgd)
        row = self.table[self.table.algorithm == self.choice].iloc[0]
        verdict = "within" if self.within else "no candidate is within it: the cheapest of all, beyond"
        return (
            f"plain SGD spends {self.sgd:.3g} ms per iteration on this layer; the budget is {limit:.3g} ms",
            f"choice: {self.choice} ({row.cost:.3g} ms, {verdict} the budget; error of the step "
            f"{row.step_norm:.2g})",
            f"KFAC(model, {', '.join(f'{name}={value!r}' for name, value in self.settings.items())}, "
            f"policy={self.policy!r})" + (f"  # {self.differs}" if self.differs else ""),
        )

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"<kfacerr Advice for {self.layer!r}: {self.choice}; print it, or see .table, .plot() and .policy>"

    def to_csv(self, path: str | Path) -> None:
        """Writes the table."""
        write_atomically(Path(path), lambda p: self.table.to_csv(p, index=False, float_format="%.8g"))

    def to_html(self, path: str | Path) -> None:
        """Writes the advice as one file that needs no network, light and dark."""
        write_text(Path(path), self._page(whole=True))

    def _repr_html_(self) -> str:
        return self._page(whole=False)

    def _page(self, *, whole: bool) -> str:
        measured, chosen, policy = self._verdict()
        layer = {
            "name": chosen,
            "about": measured,
            "notes": [policy],
            "errors": "",
            "figure": themed(self.plot),
            "alt": f"Errors of the step of layer {self.layer} over the cost of each candidate, and the frontier",
        }
        return page(
            whole=whole,
            title=f"Which inverse should layer {self.layer} have?",
            facts=self._frontier().to_html(index=False, border=0, float_format="{:.3g}".format),
            layers=[layer],
            meaning={
                "cost": "ms per iteration on this machine, of following both factors and applying the inverses"
            }
            | MEANING,
            reading="Errors are means over the windows. The table is the frontier: no other candidate is at most "
            "as dear and at most as wrong in the step's norm and angle.",
            cost=f"{len(self.table)} candidates were compared.",
        )

    def plot(self, *, dark: bool = False) -> "Figure":
        """Error of the step over cost, a matplotlib Figure: the frontier joined, the budget as a line.

        Args:
            dark: for a dark background.

        Returns:
            The figure.
        """
        from .plot import frontier_figure

        limit = self.budget.milliseconds(self.sgd)
        return frontier_figure(self.table, limit, self.choice, title=f"layer {self.layer}", dark=dark)


def _on_frontier(values: np.ndarray) -> np.ndarray:
    """Which rows no other row is at most as large as in every column and smaller in one."""
    found = np.ones(len(values), dtype=bool)
    for i, row in enumerate(values):
        found[i] = not np.any(np.all(values <= row, axis=1) & np.any(values < row, axis=1))
    return found


def advise_recording(
    layer: "LayerRecording",
    *,
    rank: int,
    budget: Budget | None = None,
    algorithms: Sequence[str] | None = None,
    phi: float | None = None,
    damping: str | Damping = "own",
    dtype: str = "float64",
    **settings: Any,
) -> Advice:
    """The advice on a recorded layer, from one replay.

    Args:
        layer: of an open recording.
        rank: r.
        budget: what the inverse may cost; `DEFAULT_BUDGET` if None.
        algorithms: candidates' names; by default `candidates` whose `T_inv` is no longer than the longest window.
        phi: damping ratio in place of the recording's, or of 0.1.
        damping: as `ErrorStudy` takes it.
        dtype: to compute the errors in.
        **settings: others of `Settings`.

    Returns:
        A row a candidate, and what it chooses by.

    Raises:
        InputError: no windows, values out of range, or bad columns; names file, layer and iteration.
    """
    from tqdm import tqdm

    from .recording import LayerRecording

    instance(layer, "the layer", LayerRecording)
    choice(dtype, "dtype", ("float64", "float32"))
    instance(DEFAULT_BUDGET if budget is None else budget, "budget", Budget)
    sizes = Layer(layer.d_A, layer.d_G, layer.n, layer.update_every)
    configured = Settings(rank=rank, **settings)
    if algorithms is not None:
        chosen = [Algorithm.parse(name) for name in names(algorithms, "algorithms", str, Algorithm)]
    else:
        chosen = _measurable(candidates(sizes, rank), layer.windows, sizes.every)
    used = phi if phi is not None else 0.1 if layer.phi is None else float(layer.phi[-1])
    study = ErrorStudy(chosen, configured, layer.windows, phi=used, damping=damping)
    steps = replay(
        layer,
        study.push,
        convert=lambda X: X.astype(dtype),
        phi=phi,
        plain=_sampled(layer.windows),
        title="errors",
    )
    rows = [row for new in steps for row in new]
    errors = table(rows).groupby(["algorithm", "metric"], sort=False).value.mean().unstack()
    costs = layer_costs(sizes, tqdm(chosen, desc="costs", disable=None), configured)
    frame = costs.join(errors.reindex(columns=list(METRICS)), on="algorithm")
    measured, differs = _settings(configured, layer.update_every, used, study)
    return Advice(layer.name, frame, costs.attrs["sgd"], budget or DEFAULT_BUDGET, measured, differs)


def _measurable(found: Iterable[Algorithm], windows: Iterable[Window], every: int) -> list[Algorithm]:
    """Not those whose inverse is kept for longer than every window: it was never measured as stale as it gets."""
    longest = max((window.length for window in windows), default=0)
    return [algorithm for algorithm in found if algorithm.get("T_inv", 0) <= max(longest, every)]


def _settings(configured: Settings, every: int, phi: float, study: ErrorStudy) -> tuple[dict[str, Any], str]:
    """Of `KFAC`, under which the errors were measured, and what it does otherwise."""
    named = {name: getattr(configured, name) for name in ("rank", "rho", "continuation")}
    settings = {"T_updt": every, "phi_lambda": phi, **named}
    if study.damping == "own":
        return settings, ""
    damping = named_damping(study.damping)
    if damping is not None and damping.separable:
        return settings | {"damping": study.damping}, ""
    return settings, f"damped by phi lambda_max: KFAC has no damping {study.damping}, which was measured"


def _sampled(windows: Iterable[Window]) -> set[int]:
    """Iterations that are measured although they bring no update: evenly many, `ITERATIONS` at most in all."""
    all_of = [k for w in windows for k in range(w.start, w.start + w.length)]
    return set(all_of[:: max(1, -(-len(all_of) // ITERATIONS))])
