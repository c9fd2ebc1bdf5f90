"""The errors of an optimizer's own inverse, along its own run: the four metrics of §4.2 in one hidden layer.

`kfacerr.torch.watch` follows the run with the algorithm, the periods, the rank, rho, phi and continuation that the
optimizer has, in a window that opens where the optimizer's periods begin anew, in the second quarter or later.
"""

from dataclasses import fields

from kfacerr.algorithms import Algorithm
from kfacerr.metrics import METRICS
from kfacerr.process import Settings
from kfacerr.stream import Window
from kfacerr.torch import KFAC, watch
from studies.tasks.trials import Epoch, Run, train

__all__ = ["measured", "own_algorithm", "window"]


def own_algorithm(optimizer: KFAC, layer: str, n: int) -> Algorithm:
    """What the optimizer does for a layer, with its periods.

    Args:
        optimizer: before or after its first step.
        layer: its name.
        n: columns of an update.

    Returns:
        The algorithm of both of the layer's factors, that of factor A's where only one has room.
    """
    settings = optimizer.hyper.settings
    chosen = Algorithm.parse(str(optimizer.layers[layer].policy))
    d_A = optimizer.layers[layer].dimensions[0]
    algorithm = chosen.for_factor(settings, d_A, n)
    periods = algorithm.process(settings, "A").schedules
    given = {field.name: getattr(settings, field.name) for field in fields(Settings)}
    return algorithm.with_settings(**{name: given[name] for name in periods if given[name] is not None})


def window(steps: int, T_inv: int) -> Window:
    """From a multiple of T_inv, the last in the first half of the run that there is, to the end."""
    start = steps // 2 // T_inv * T_inv
    return Window(start, steps - start)


def measured(run: Run) -> tuple[tuple[list[Epoch], str], dict[str, float]]:
    """Trains to the end and measures along it.

    Args:
        run: of the K-FAC family, at its beginning.

    Returns:
        What `studies.tasks.trials.train` returns, and the mean of each metric; without metrics where the run
        diverged before there were any.
    """
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, KFAC)
    hyper, task = optimizer.hyper, run.task
    settings = hyper.settings
    n = task.batch_size * columns_of_an_input(run)
    watched = watch(
        run.model,
        task.layer,
        algorithms=[own_algorithm(optimizer, task.layer, n)],
        rank=settings.rank,
        rho=settings.rho,
        phi=hyper.phi_lambda,
        continuation=settings.continuation,
        every=hyper.T_updt,
        windows=[window(run.steps, settings.T_inv)],
        seed=settings.seed,
    )
    with watched:
        trained = train(run)
    errors = watched.report().table
    means = errors.groupby("metric").value.mean()
    return trained, {name: float(means[name]) for name in METRICS if name in means}


def columns_of_an_input(run: Run) -> int:
    """Columns that an input gives: the positions of a sequence that meet the layer, 1 for anything else."""
    return run.train[1].shape[1] if run.train[1].ndim == 2 and run.task.classes else 1
