"""The presets of the error study (§4.2) and of the performance study (§6): what is trained, and for how long."""

from dataclasses import dataclass
from typing import Any

from kfacerr.algorithms import SEVEN
from kfacerr.stream import Window
from studies.drivers import settings_for
from studies.schedules import paper_oversampling, paper_phi, paper_rank
from studies.training import TrainingConfig

__all__ = ["OPTIMIZER_PRESETS", "PRESETS", "OptimizerPreset", "Preset"]


@dataclass(frozen=True)
class Preset:
    """One error study.

    Attributes:
        dataset: "digits" or "cifar10".
        n_train: train images used, the first ones; None for all.
        width: of the network; 1 is the paper's.
        window_epochs: epochs at which the measurement windows start.
        schedule_epochs: the paper's schedules run over 50 epochs; here they run over this many, so that
            `window_epochs` meet the phi and r that the paper's epochs 15 and 30 met.
        T_updt: iterations between updates of the EA factors.
        window_length: iterations of a window.
        rank_scale: of the paper's rank schedule, 1 for r = 220, 230.
        dtype: the error analysis computes in.
        driver: of the shared trajectory, see `studies.drivers`.
        amp: the network runs under autocast to bfloat16; factors and the analysis do not.
        conv_width: of the convolutions before the last; None for `width`.
        linear_application: the driver applies the first FC layer's inverses by Algorithm 8.
        equal_rank: algorithms also measured at the rank r + n that the B- variants apply.
        beyond: algorithms that the paper did not have.
        continuations: of the spectrum, each measured of each algorithm.
    """

    name: str
    dataset: str
    n_train: int | None
    width: float
    batch_size: int
    window_epochs: tuple[int, ...]
    seeds: tuple[int, ...]
    schedule_epochs: int = 50
    augment: bool = True
    T_updt: int = 10
    window_length: int = 300
    rank_scale: float = 1.0
    n_pwr_it: int = 4
    rho: float = 0.95
    dtype: str = "float64"
    driver: str = "R-KFAC T_inv=50"
    amp: bool = False
    conv_width: float | None = None
    linear_application: bool = False
    equal_rank: tuple[str, ...] = tuple(name for name in SEVEN if name.startswith("R-KFAC"))
    beyond: tuple[str, ...] = ("B-R-KFAC adaptive=1.2", "FD")
    continuations: tuple[str, ...] = ("min", "trace", "none")

    @property
    def algorithms(self) -> list[str]:
        """All that is measured: the seven of §4.2, some of them at equal rank, and what the paper did not have."""
        rank = self.rank(self.window_epochs[0]) + self.batch_size
        return [*SEVEN, *(f"{name} rank={rank}" for name in self.equal_rank), *self.beyond]

    def paper_epoch(self, epoch: int) -> int:
        """The epoch of the paper's 50 that stands for `epoch` in its schedules."""
        return epoch * 50 // self.schedule_epochs

    def phi(self, epoch: int) -> float:
        """phi_lambda of §6."""
        return paper_phi(self.paper_epoch(epoch))

    def rank(self, epoch: int) -> int:
        """r of §6, scaled."""
        return round(paper_rank(self.paper_epoch(epoch)) * self.rank_scale)

    def oversampling(self, epoch: int) -> int:
        """r_o of §6."""
        return paper_oversampling(self.paper_epoch(epoch))

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
        own = {name: getattr(self, name) for name in ("schedule_epochs", "conv_width", "linear_application")}
        epochs = max(self.epochs(steps_per_epoch), self.schedule_epochs)
        return _training_config(self, driver, seed, device, epochs=epochs, **own)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="digits",
            dataset="digits",
            n_train=None,
            width=1 / 16,
            batch_size=32,
            window_epochs=(8, 15),
            schedule_epochs=24,
            seeds=(0, 1),
            rank_scale=1 / 8,
        ),
        Preset(
            name="cifar10-small",
            dataset="cifar10",
            n_train=10_000,
            width=1 / 8,
            batch_size=32,
            window_epochs=(8, 15),
            schedule_epochs=25,  # of 312 iterations: windows at 2500 and 4680, the paper's at 2925 and 5850
            seeds=(0, 1, 2),
            rank_scale=1 / 8,
        ),
        Preset(  # the paper's FC layer 0 and all that surrounds it, behind convolutions that a CPU can train
            name="paper-layer",
            dataset="cifar10",
            n_train=None,
            width=1.0,
            conv_width=1 / 8,
            batch_size=256,
            window_epochs=(15, 30),
            seeds=(0,),
            dtype="float32",
            linear_application=True,
            equal_rank=("R-KFAC T_inv=50", "R-KFAC T_inv=300"),  # what C1-C3 and C6 compare
            beyond=(),
            continuations=("min", "trace"),
        ),
        Preset(
            name="paper",
            dataset="cifar10",
            n_train=None,
            width=1.0,
            batch_size=256,
            window_epochs=(15, 30),
            seeds=(0, 1, 2, 3, 4),
            dtype="float32",
            amp=True,
        ),
    )
}


@dataclass(frozen=True)
class OptimizerPreset:
    """One performance study (§6, Table 2).

    Targets of the small presets follow one rule, `figures.optimizers.targets_by_rule`. Of every run the best test
    accuracy is taken. The first target is the whole percent at least one percent below the lowest of them, so that
    the slowest reaches it; the third is the whole percent below their median, which about half reach, as the
    paper's 93.5%; the second is halfway between. For `digits` the runs were a pilot's, with a seed that no preset
    uses, 100; for `cifar10-small`, where a pilot would cost a third of the study, they are the study's own 27.

    Attributes:
        dataset: "digits" or "cifar10".
        n_train, n_test: images used, the first ones; None for all.
        width: of the network; 1 is the paper's.
        epochs: of each run. The paper's schedules, over 50 epochs, run over these.
        targets: test accuracies, ascending.
        rank_scale: of the paper's rank schedule, 1 for r = 220, 230.
        timing_rounds: times that t_epoch is taken of each optimizer, after the training.
        continuation: of the spectrum.
        equal_rank: R-KFAC has rank r + n on the first FC layer, the rank at which the B- variants are applied.
        amp: the network runs under autocast to bfloat16; factors do not.
    """

    name: str
    dataset: str
    n_train: int | None
    n_test: int | None
    width: float
    batch_size: int
    epochs: int
    seeds: tuple[int, ...]
    targets: tuple[float, float, float]
    rank_scale: float = 1.0
    augment: bool = True
    timing_rounds: int = 3
    continuation: str = "min"
    equal_rank: bool = False
    amp: bool = False

    def training_config(self, driver: str, seed: int, device: str) -> TrainingConfig:
        """A driver's settings at the preset's size."""
        own = {"epochs": self.epochs, "continuation": self.continuation, "equal_rank": self.equal_rank}
        return _training_config(self, driver, seed, device, **own)


def _training_config(
    preset: Preset | OptimizerPreset, driver: str, seed: int, device: str, **own: Any
) -> TrainingConfig:
    """What both kinds of study say alike, and what is `own` to one."""
    alike = {name: getattr(preset, name) for name in ("batch_size", "width", "augment", "rank_scale", "amp")}
    settings: dict[str, Any] = alike | own | settings_for(driver, preset.batch_size)
    return TrainingConfig(seed=seed, driver=driver, device=device, **settings)


OPTIMIZER_PRESETS = {
    preset.name: preset
    for preset in (
        OptimizerPreset(
            name="digits",
            dataset="digits",
            n_train=None,
            n_test=None,
            width=1 / 16,
            batch_size=32,
            epochs=6,
            seeds=(0, 1),
            targets=(0.84, 0.875, 0.91),
            rank_scale=1 / 8,
            timing_rounds=1,
        ),
        OptimizerPreset(
            name="cifar10-small",
            dataset="cifar10",
            n_train=10_000,
            n_test=4_000,
            width=1 / 8,
            batch_size=64,
            epochs=6,
            seeds=(0, 1, 2),
            targets=(0.27, 0.36, 0.45),
            rank_scale=1 / 8,
            timing_rounds=2,
        ),
        OptimizerPreset(
            name="paper",
            dataset="cifar10",
            n_train=None,
            n_test=None,
            width=1.0,
            batch_size=256,
            epochs=50,
            seeds=tuple(range(10)),
            targets=(0.91, 0.93, 0.935),
            amp=True,
        ),
    )
}
