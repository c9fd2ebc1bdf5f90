"""The errors of an optimizer's own inverse, along its own run: the four metrics of §4.2 in one hidden layer.

At eight updates in the run's second half the inverse that the optimizer has just stepped with is compared, in
float64, with the exact damped inverse of its own EA factor, at phi times that factor's lambda_max.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from kfacerr.inverse import DenseInverse, exact_inverse, precondition
from kfacerr.metrics import METRICS, angle_error, inverse_error, norm_error
from kfacerr.torch import KFAC
from studies.tasks.trials import Epoch, Run, train

__all__ = ["chosen_steps", "measured", "own_errors"]

POINTS = 8


def chosen_steps(updates: Collection[int]) -> list[int]:
    """POINTS of the updates, evenly spaced from the first to the last; all of them if there are no more."""
    ordered = sorted(updates)
    places = np.linspace(0, len(ordered) - 1, min(POINTS, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]


def measured(run: Run) -> tuple[tuple[list[Epoch], str], dict[str, float]]:
    """Trains to the end and measures along it.

    Args:
        run: of the K-FAC family, at its beginning.

    Returns:
        What `studies.tasks.trials.train` returns, and the mean of each metric; without metrics where the run
        diverged, or fitted all targets to the last bit, before there were any.
    """
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, KFAC)
    optimizer.layers[run.task.layer].dense = True
    updates = [k for k in range(run.steps // 2, run.steps) if k % optimizer.schedules.at(0, k).T_updt == 0]
    pending = set(chosen_steps(updates))
    errors: list[dict[str, float]] = []

    def measure(stepped: Any, *_: Any) -> None:
        k = stepped.k - 1
        if k in pending:
            pending.remove(k)
            if found := own_errors(stepped, run.task.layer, k):
                errors.append(found)

    handle = optimizer.register_step_post_hook(measure)
    try:
        trained = train(run)
    finally:
        handle.remove()
    return trained, {name: float(np.mean([found[name] for found in errors])) for name in METRICS if errors}


@torch.no_grad()
def own_errors(optimizer: KFAC, name: str, k: int) -> dict[str, float]:
    """The four metrics of a layer's inverse just after step k.

    Args:
        optimizer: whose `.grad` is still there.
        name: of the layer, whose factors are `dense`.
        k: the step, an update.

    Returns:
        By the metric's name; nothing where there is no inverse, and the step was the plain gradient, or where the
        gradient is zero, every softmax having rounded to its target: two steps of length 0 are no agreement.
    """
    layer, hyper = optimizer.layers[name], optimizer.schedules.at(0, k)
    own = layer.inverses(k, hyper.phi_lambda, hyper.settings.continuation)
    J = layer.gradient().double()
    if own is None or not J.any():
        return {}
    # These and M are both in the factors' units, which no metric depends on.
    G, A = (DenseInverse(inverse.dense().double()) for inverse in own)
    M_G, M_A = (layer.factors[side].average.M.double() for side in "GA")
    exact_G, exact_A = (exact_inverse(M, phi=hyper.phi_lambda)[0] for M in (M_G, M_A))
    S, S_ref = precondition(J, G, A), precondition(J, exact_G, exact_A)
    values = (inverse_error(A, exact_A), inverse_error(G, exact_G), norm_error(S, S_ref), angle_error(S, S_ref))
    return dict(zip(METRICS, values, strict=True))
