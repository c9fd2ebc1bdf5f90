"""Errors under dampings of both factors at once are those of dense matrices."""

from dataclasses import replace

import numpy as np
import pytest

from kfacerr.damping import Damping, Scale
from kfacerr.exceptions import InputError
from kfacerr.metrics import METRICS, angle_error, norm_error
from kfacerr.process import Settings
from kfacerr.stream import Window
from kfacerr.study import ErrorStudy, table
from tests.strategies import layer_steps

NAMES = ("K-FAC T_inv=10", "R-KFAC T_inv=10", "B-KFAC")
WINDOWS = [Window(10, 20, 0)]
SETTINGS = Settings(rank=4, rho=0.9, oversampling=2)


def dense(M: dict, damping: Damping, columns, levels) -> np.ndarray:
    """The step of the factors as they stand."""
    (w_G, U_G), (w_A, U_A) = (np.linalg.eigh(M[side]) for side in "GA")
    C = damping.grid(np.maximum(w_G, 0), np.maximum(w_A, 0), levels)
    return U_G @ (C * (U_G.T @ columns[1] @ columns[0].T @ U_A)) @ U_A.T


@pytest.mark.parametrize("damping", ["product=0.01", "cut=0.05"])
@pytest.mark.parametrize("continuation", ["none", "min", "trace"])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_a_study_damps_both_factors_at_once_as_dense_formulas_do(damping, continuation, scale):
    """Columns of 1e-12 are held in a unit of their own: an absolute damping of theirs is as much smaller."""
    value = Damping.parse(damping)
    value = replace(value, value=value.value * scale**2) if value.kind == "product" else value
    study = ErrorStudy(NAMES, replace(SETTINGS, continuation=continuation), WINDOWS, damping=value, certify=True)
    rows, M = [], {"A": None, "G": None}
    for step in layer_steps(scale)[:14]:
        rows += study.push(step)
        if step.update:
            for side, X in (("A", step.A), ("G", step.G)):
                new = X @ X.T
                M[side] = new if M[side] is None else 0.9 * M[side] + 0.1 * new
    frame = table(rows)
    assert set(frame.metric) == set(METRICS if value.kind == "cut" else METRICS[2:])
    assert frame[frame.algorithm == NAMES[0]].value.max() < 1e-9  # exact, up to its next update
    levels = value.levels(*(Scale.of(np.linalg.eigvalsh(M[side])[::-1]) for side in "AG"))
    cheap, own = {}, []
    for side in "AG":
        factor = study.factors[side]
        estimate = factor.processes[NAMES[2]].estimate
        D, U = estimate.lowrank.D / factor.squared_unit, estimate.lowrank.U
        trace = float(estimate.trace) / factor.squared_unit
        present = D > 0
        tau = {"none": 0, "min": D[-1], "trace": max(0.0, trace - D.sum()) / (len(U) - present.sum())}[
            continuation
        ]
        Q, _ = np.linalg.qr(np.hstack([U[:, present], np.random.default_rng(0).standard_normal((len(U), len(U)))]))
        w = np.append(D[present], np.full(len(U) - present.sum(), tau))
        cheap[side] = (Q * w) @ Q.T
        own.append(Scale(len(U), D[0], trace))
    step = layer_steps(scale)[13]
    S = dense(cheap, value, (step.A, step.G), value.levels(*own))
    reference = dense(M, value, (step.A, step.G), levels)
    measured = frame[(frame.algorithm == NAMES[2]) & (frame.k == 13)].set_index("metric").value
    assert measured["step_norm"] == pytest.approx(norm_error(S, reference), rel=1e-6)
    assert measured["step_angle"] == pytest.approx(angle_error(S, reference), rel=1e-6)
    if value.kind == "cut":
        for side, level, other in zip("AG", value.levels(*own), levels, strict=True):
            one = np.linalg.pinv(cheap[side], level / np.linalg.norm(cheap[side], 2), hermitian=True)
            exact = np.linalg.pinv(M[side], other / np.linalg.norm(M[side], 2), hermitian=True)
            assert measured[f"inverse_{side}"] == pytest.approx(norm_error(one, exact), rel=1e-6)


def test_a_continuation_of_one_inverse_alone_is_refused_for_both():
    study = ErrorStudy(["FD"], replace(SETTINGS, continuation="escaped"), WINDOWS, damping="product=0.1")
    given = layer_steps()
    for step in given[:10]:
        study.push(step)
    with pytest.raises(InputError, match="iteration 10: continuation 'escaped'"):
        study.push(given[10])
