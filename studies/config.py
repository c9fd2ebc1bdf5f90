"""What is run: the paper's schedules and driver numbers (§4.2, §6, appendix D), and the presets.

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
from kfacerr.stream import Window
from studies.networks import fc0_sizes

__all__ = [
    "CLIP",
    "LAYER",
    "N_PWR_IT",
    "OPTIMIZER_PRESETS",
    "PHI_CORCT",
    "PRESETS",
    "RHO",
    "TABLE_1",
    "OptimizerPreset",
    "Preset",
    "Schedules",
    "TrainingConfig",
    "cosine_learning_rate",
    "family",
    "seng_learning_rate",
    "table_2",
    "update_period",
]

LAYER = "fc0"
"""The first fully connected layer ("FC layer 0" of the figures): it is measured, and has the Brand processes."""

RHO, N_PWR_IT, PHI_CORCT, CLIP = 0.95, 4, 0.5, 0.07

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
_PERIODS_6 = {"T_updt": 25, "T_inv": 250, "T_brand": 125, "T_rsvd": 250, "T_corct": 500}
_T_BRAND_6 = {"B-R-KFAC": 25}  # where it is not the 125 above
_PERIODS_4_2 = {"T_inv": 50, "T_rsvd": 50, "T_corct": 50}  # Brand updates come with all new data
SENG_DAMPING, SENG_UPDATE, SENG_SAMPLES = 2.0, 200, 128


class _Rates(NamedTuple):
    """Peak learning rate, momentum, weight decay; `per_batch` if the rate is for batches of 256, not for any."""

    learning_rate: float
    momentum: float
    weight_decay: float
    per_batch: bool = True


_OTHERS = {
    "SENG": _Rates(0.05, 0.9, 1e-2),
    "SGD": _Rates(0.1, 0.9, 5e-4),
    "AdamW": _Rates(1e-3, 0.9, 1e-2, per_batch=False),  # PyTorch's defaults, which users leave as they are
}
_FAMILY = ("K-FAC", "R-KFAC", "SRE-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C", "N-KFAC", "W-KFAC")
_FAMILY_RATES = _Rates(0.3, 0.0, 7e-4)

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


# ------------------------------------------------------------------------------------------------- presets


@dataclass(frozen=True, kw_only=True)
class _Preset:
    """What the presets of both studies say alike.

    Attributes:
        dataset: "digits" or "cifar10".
        n_train: train images used, the first ones; None for all.
        width: of the network; 1 is the paper's.
        rank_scale: of the paper's rank schedule, 1 for r = 220, 230.
        amp: the network runs under autocast to bfloat16; factors and the analysis do not.
    """

    name: str
    dataset: str
    n_train: int | None
    width: float
    batch_size: int
    seeds: tuple[int, ...]
    rank_scale: float = 1.0
    augment: bool = True
    amp: bool = False

    def _config(self, driver: str, seed: int, device: str, **own: Any) -> TrainingConfig:
        rates = _OTHERS.get(driver, _FAMILY_RATES)
        batch = math.sqrt(self.batch_size / PAPER_BATCH) if rates.per_batch else 1.0
        alike = {name: getattr(self, name) for name in ("batch_size", "width", "augment", "rank_scale", "amp")}
        alike |= {"learning_rate": rates.learning_rate * batch, "momentum": rates.momentum}
        alike |= {"weight_decay": rates.weight_decay, **own}
        return TrainingConfig(seed=seed, driver=driver, device=device, **alike)


@dataclass(frozen=True, kw_only=True)
class Preset(_Preset):
    """One error study (§4.2).

    Attributes:
        window_epochs: epochs at which the measurement windows start.
        schedule_epochs: the paper's schedules run over 50 epochs; here they run over this many, so that
            `window_epochs` meet the phi and r that the paper's epochs 15 and 30 met.
        T_updt: iterations between updates of the EA factors.
        window_length: iterations of a window.
        dtype: the error analysis computes in.
        driver: of the shared trajectory, see `studies.drivers`.
        conv_width: of the convolutions before the last; None for `width`.
        equal_rank: algorithms also measured at the rank r + n that the B- variants apply.
        beyond: algorithms that the paper did not have.
        continuations: of the spectrum, each measured of each algorithm.
    """

    window_epochs: tuple[int, ...]
    schedule_epochs: int = PAPER_EPOCHS
    T_updt: int = 10
    window_length: int = 300
    n_pwr_it: int = N_PWR_IT
    rho: float = RHO
    dtype: str = "float64"
    driver: str = "R-KFAC T_inv=50"
    conv_width: float | None = None
    equal_rank: tuple[str, ...] = tuple(name for name in SEVEN if Algorithm.parse(name).base == "R-KFAC")
    beyond: tuple[str, ...] = ("FD",)
    continuations: tuple[str, ...] = ("min", "trace", "none")

    @property
    def schedules(self) -> Schedules:
        """Of the training and of the analysis."""
        return Schedules(self.schedule_epochs, self.rank_scale)

    @property
    def setting(self) -> str:
        """The measured layer and its ranks in one line."""
        inputs, outputs = fc0_sizes(self.width)
        ranks = dict.fromkeys(self.schedules.rank(epoch) for epoch in self.window_epochs)
        return f"FC layer {inputs}-{outputs}, n = {self.batch_size}, r = {'/'.join(map(str, ranks))}"

    @property
    def algorithms(self) -> list[Algorithm]:
        """All that is measured: the seven of §4.2, some of them at equal rank, and what the paper did not have."""
        rank = self.schedules.rank(self.window_epochs[0]) + self.batch_size
        equal = [Algorithm.parse(name).with_settings(rank=rank) for name in self.equal_rank]
        chosen = [*map(Algorithm.parse, SEVEN), *equal, *map(Algorithm.parse, self.beyond)]
        return continued(chosen, self.continuations)

    def windows(self, steps_per_epoch: int) -> list[Window]:
        """Each starts at the first update of its epoch."""
        starts = [-(-epoch * steps_per_epoch // self.T_updt) * self.T_updt for epoch in self.window_epochs]
        return [Window(k, self.window_length, e) for k, e in zip(starts, self.window_epochs, strict=True)]

    def epochs(self, steps_per_epoch: int) -> int:
        """Epochs until the last window has ended."""
        last = self.windows(steps_per_epoch)[-1]
        return -(-(last.start + last.length) // steps_per_epoch)

    def training_config(self, driver: str, seed: int, steps_per_epoch: int, device: str) -> TrainingConfig:
        """A driver's settings at the preset's size. Periods are those of §4.2, whatever the size."""
        names = ("schedule_epochs", "T_updt", "conv_width")
        own = {name: getattr(self, name) for name in names}
        epochs = max(self.epochs(steps_per_epoch), self.schedule_epochs)
        return self._config(driver, seed, device, epochs=epochs, **own)


def continued(algorithms: list[Algorithm], continuations: tuple[str, ...]) -> list[Algorithm]:
    """Each algorithm by each continuation of the spectrum; a name does not say "min", the paper's."""
    said = [None if continuation == "min" else continuation for continuation in continuations]
    return [algorithm.with_settings(continuation=one) for algorithm in algorithms for one in said]


@dataclass(frozen=True, kw_only=True)
class OptimizerPreset(_Preset):
    """One performance study (§6, Table 2).

    Targets of the small presets follow one rule, `figures.tables.targets_by_rule`. Of every run the best test
    accuracy is taken. The first target is the whole percent at least one percent below the lowest of them, so that
    the slowest reaches it; the third is the whole percent below their median, which about half reach, as the
    paper's 93.5%; the second is halfway between. For `digits` the runs were a pilot's, with a seed that no preset
    uses, 100; for `cifar10-small`, where a pilot would cost a third of the study, they are the study's own 27.

    Attributes:
        n_test: test images used, the first ones; None for all.
        epochs: of each run. The paper's schedules, over 50 epochs, run over these.
        targets: test accuracies, ascending.
        timing_rounds: times that t_epoch is taken of each optimizer, after the training.
        continuation: of the spectrum.
        equal_rank: R-KFAC has rank r + n on the first FC layer, the rank at which the B- variants are applied.
    """

    n_test: int | None
    epochs: int
    targets: tuple[float, float, float]
    timing_rounds: int = 3
    continuation: str = "min"
    equal_rank: bool = False

    def training_config(self, driver: str, seed: int, device: str, *, T_updt: int = 0) -> TrainingConfig:
        """A driver's settings at the preset's size; with a T_updt, it has the periods of §4.2."""
        own = {name: getattr(self, name) for name in ("epochs", "continuation", "equal_rank")}
        return self._config(driver, seed, device, T_updt=T_updt, **own)


_DIGITS: dict[str, Any] = {
    "name": "digits",
    "dataset": "digits",
    "n_train": None,
    "width": 1 / 16,
    "rank_scale": 1 / 8,
    "batch_size": 32,
    "seeds": (0, 1),
}
_SMALL: dict[str, Any] = {
    "name": "cifar10-small",
    "dataset": "cifar10",
    "n_train": 10_000,
    "width": 1 / 8,
    "rank_scale": 1 / 8,
    "seeds": (0, 1, 2),
}
_PAPER: dict[str, Any] = {
    "name": "paper",
    "dataset": "cifar10",
    "n_train": None,
    "width": 1.0,
    "batch_size": PAPER_BATCH,
}

_PRESETS = (
    # A window is 7 epochs of 44: schedules this long keep it within one phi, one rank and one oversampling. The
    # second opens where phi falls to 0.05, at the paper's epoch 25: three minutes are too short for its 30.
    Preset(
        **_DIGITS,
        window_epochs=(22, 36),
        schedule_epochs=72,
        equal_rank=("R-KFAC T_inv=50", "R-KFAC T_inv=300"),
        continuations=("min", "trace"),
    ),
    # Epochs of 312 iterations: windows at 2500 and 4680, the paper's at 2925 and 5850.
    Preset(**_SMALL, batch_size=32, window_epochs=(8, 15), schedule_epochs=25),
    # The paper's FC layer 0 and its surroundings, behind convolutions that a CPU can train, on as many images.
    Preset(
        **{**_PAPER, "name": "paper-layer", "n_train": 20_000},
        conv_width=1 / 8,
        window_epochs=(15, 30),
        seeds=(0,),
        dtype="float32",
        equal_rank=("R-KFAC T_inv=50", "R-KFAC T_inv=300"),  # what C1-C3 and C6 compare
        beyond=("N-KFAC", "W-KFAC T_inv=50"),
        continuations=("min", "trace"),
    ),
    Preset(**_PAPER, window_epochs=(15, 30), seeds=tuple(range(5)), dtype="float32", amp=True),
)
PRESETS = {preset.name: preset for preset in _PRESETS}

_OPTIMIZER_PRESETS = (
    OptimizerPreset(**_DIGITS, n_test=None, epochs=6, targets=(0.84, 0.875, 0.91), timing_rounds=1),
    OptimizerPreset(**_SMALL, batch_size=64, n_test=4_000, epochs=6, targets=(0.27, 0.36, 0.45), timing_rounds=2),
    OptimizerPreset(
        **_PAPER,
        n_test=None,
        epochs=PAPER_EPOCHS,
        seeds=tuple(range(10)),
        targets=(0.91, 0.93, 0.935),
        amp=True,
    ),
)
OPTIMIZER_PRESETS = {preset.name: preset for preset in _OPTIMIZER_PRESETS}
