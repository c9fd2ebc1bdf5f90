"""The errors of an optimizer's own inverse."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kfacerr.metrics import METRICS
from kfacerr.recording import Recording
from kfacerr.stream import Window
from kfacerr.study import ErrorStudy
from kfacerr.torch import KFAC, watch
from kfacerr.torch.policy import FactorInfo, named_process
from studies.tasks.contestants import FAMILY, find_contestant
from studies.tasks.errors import chosen_steps, measured
from studies.tasks.problems import Data, Source, Task
from studies.tasks.trials import Run, train
from tests.studies.tasks.tiny import TASK, blobs

LONG = replace(TASK, epochs=20)  # 60 steps


def begun(name: str, task: Task = LONG, *, double: bool = False) -> Run:
    data = blobs(Source())
    if double:
        data = Data(data.name, *((x.double(), y) for x, y in (data.train, data.test)))
    return Run(task, data, find_contestant(name), 0.03, 1, "cpu")


def doubled(task: Task) -> torch.nn.Module:
    return task.model().double()


def test_a_fresh_exact_inverse_has_no_error() -> None:
    _, errors = measured(begun("K-FAC T_updt=1 T_inv=1"))
    assert tuple(errors) == METRICS
    assert max(errors.values()) < 1e-5, "the optimizer's inverse is float32, the exact one float64"
    _, errors = measured(begun("K-FAC T_updt=1 T_inv=1", replace(LONG, model=partial(doubled, LONG)), double=True))
    assert max(errors.values()) < 1e-12


def test_a_stale_or_a_cheap_inverse_has_one() -> None:
    _, errors = measured(begun("K-FAC T_updt=1 T_inv=20"))
    assert min(errors.values()) > 1e-4
    _, errors = measured(begun("R-KFAC T_updt=1 T_inv=1 rank=2"))
    assert min(errors.values()) > 1e-4


@pytest.mark.parametrize("name", ["R-KFAC T_updt=2 T_inv=6", "K-FAC T_updt=3 T_inv=9 phi_lambda=0.1"])
def test_it_is_what_the_error_study_finds_along_the_run(name: str, tmp_path: Path) -> None:
    """Of the same processes, fed with the columns that `watch` recorded."""
    run = begun(name, replace(LONG, model=partial(doubled, LONG)), double=True)
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, KFAC)
    hyper = optimizer.hyper
    settings, every = hyper.settings, hyper.T_updt
    window = Window(0, run.steps)
    with watch(run.model, "fc0", every=every, windows=window, record=tmp_path / "run.h5"):
        _, errors = measured(run)
    pair = [
        named_process(name.split()[0], FactorInfo("fc0", side, d, TASK.batch_size), settings)[1]
        for side, d in (("A", 21), ("G", 24))
    ]
    phi = hyper.phi_lambda
    study = ErrorStudy({"own": (pair[0], pair[1])}, settings, [window], phi=phi)
    rows = []
    with Recording(tmp_path / "run.h5") as recording:
        for step in recording.layer("fc0").steps():
            rows += study.push(step._replace(phi=phi))
    steps = chosen_steps([k for k in range(run.steps // 2, run.steps) if k % every == 0])
    for metric in METRICS:
        wanted = np.mean([row.value for row in rows if row.metric == metric and row.k in steps])
        assert errors[metric] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", FAMILY)
def test_a_measured_run_is_that_which_is_not(name: str) -> None:
    (epochs, _), errors = measured(begun(name))
    again, _ = train(begun(name))
    assert [epoch[2:] for epoch in epochs] == [epoch[2:] for epoch in again]
    assert tuple(errors) == METRICS


def test_what_diverged_before_it_was_measured_has_no_metrics() -> None:
    (_, diverged), errors = measured(
        Run(LONG, blobs(Source()), find_contestant("K-FAC clip=None"), 1e30, 1, "cpu")
    )
    assert diverged and errors == {}


def test_a_gradient_that_is_zero_is_not_measured() -> None:
    run = begun("R-KFAC")
    run.model.register_forward_hook(lambda module, inputs, outputs: outputs * float(run.k < 20))
    _, errors = measured(run)
    assert errors == {}


def test_eight_updates_are_chosen_evenly() -> None:
    assert chosen_steps(range(300, 660, 10)) == [300, 350, 400, 450, 500, 550, 600, 650]
    assert chosen_steps([7, 3]) == [3, 7] and chosen_steps([]) == []
