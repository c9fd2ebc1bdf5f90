"""Synthetic tables with known answers: errors on which all of the claims C1-C7 hold, and epochs and times."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from kfacerr.metrics import METRICS

BLOCKS, BLOCK, PERIOD = 30, 10, 5  # a window of 300 iterations, T_updt = 10, heavier updates every 50
RANK = 60


def saw(level: float, rise: float = 0.1) -> np.ndarray:
    """(30,) a curve that rises over each period and falls back to `level`."""
    return level * (1 + rise * (np.arange(BLOCKS) % PERIOD))


def wander(level: float, seed: int = 0) -> np.ndarray:
    """(30,) a flat curve with a ripple of 1% that has no period."""
    return level * (1 + 0.01 * np.random.default_rng(seed).standard_normal(BLOCKS))


def curves() -> dict[tuple[str, str], np.ndarray]:
    """(algorithm, metric) -> (30,) as the paper describes them."""
    growing = wander(0.1, seed=1) * np.exp(np.linspace(0, 1.8, BLOCKS))
    shapes = {
        "K-FAC T_inv=50": saw(0.1, 0.2),
        "R-KFAC T_inv=50": saw(0.15, 0.2),
        "R-KFAC T_inv=10": wander(0.12, seed=2),
        "R-KFAC T_inv=300": growing,
        "B-KFAC": wander(0.2, seed=3),
        "B-R-KFAC": saw(0.05),
        "B-KFAC-C": saw(0.1),
    }
    return {(name, metric): shape.copy() for name, shape in shapes.items() for metric in METRICS}


def frame(
    content: dict[tuple[str, str], np.ndarray],
    *,
    seeds: int = 2,
    epochs: tuple[int, ...] = (15, 30),
    value: Callable[[np.ndarray, int, int], np.ndarray] = lambda curve, seed, epoch: curve,
) -> pd.DataFrame:
    """A study's errors.csv: the curves, constant over each block, for every seed and window."""
    parts = [
        pd.DataFrame(
            {
                "algorithm": algorithm,
                "k": 1000 * epoch + np.arange(len(curve) * BLOCK),
                "metric": metric,
                "value": np.repeat(value(curve, seed, epoch), BLOCK),
                "epoch": epoch,
                "seed": seed,
            }
        )
        for epoch in epochs
        for seed in range(seeds)
        for (algorithm, metric), curve in content.items()
    ]
    return pd.concat(parts, ignore_index=True)


def with_variants(errors: pd.DataFrame) -> pd.DataFrame:
    """The same errors also with the `trace` continuation, and R-KFAC's also at the rank of the B- variants."""
    randomised = errors[errors.algorithm.str.startswith("R-KFAC")]
    equal_rank = randomised.assign(algorithm=randomised.algorithm + f" rank={RANK}")
    trace = errors.assign(algorithm=errors.algorithm + " continuation=trace")
    return pd.concat([errors, trace, equal_rank], ignore_index=True)


def epochs_of(curves: Mapping[str, Sequence[Sequence[float]]], seconds: float = 10.0) -> pd.DataFrame:
    """One list of accuracies a seed."""
    return pd.DataFrame(
        [
            {"optimizer": name, "seed": seed, "epoch": i + 1, "seconds": seconds, "test_accuracy": accuracy}
            for name, seeds in curves.items()
            for seed, curve in enumerate(seeds)
            for i, accuracy in enumerate(curve)
        ]
    )


def times_of(times: Mapping[str, Sequence[float]], table: int = 2) -> pd.DataFrame:
    """One t_epoch a round."""
    rows = [(table, name, i, t) for name, rounds in times.items() for i, t in enumerate(rounds)]
    return pd.DataFrame(rows, columns=["table", "driver", "round", "t_epoch"])
