"""The tasks: short, from data that are on every machine, with room for what is compared."""

import math
from pathlib import Path

import pytest
import torch

from kfacerr.exceptions import InputError
from kfacerr.report import default_rank
from kfacerr.torch import KFAC
from studies.tasks.contestants import CONTESTANTS
from studies.tasks.problems import SEARCH, TASKS, Source, Task
from studies.tasks.trials import Run

HERE = [task for task in (*TASKS.values(), *SEARCH.values()) if task.name != "cifar10"]


@pytest.mark.parametrize("task", HERE, ids=lambda task: task.name)
def test_a_task_is_short_and_starts_at_the_loss_of_a_guess(task: Task) -> None:
    run = Run(task, task.data(Source()), CONTESTANTS["SGD"], 0.1, 0, "cpu")
    assert 200 <= run.steps <= 700
    train_loss, test_loss, accuracy = run.evaluate()
    assert math.isfinite(train_loss + test_loss)
    assert 0.5 < train_loss / test_loss < 2
    assert math.isnan(accuracy) is not task.classes
    shown = {"mlp": math.log(10), "convnet": math.log(10), "teacher": math.log(10), "transformer": math.log(96)}
    if task.name in shown:
        assert train_loss == pytest.approx(shown[task.name], rel=0.15)


@pytest.mark.parametrize("task", HERE, ids=lambda task: task.name)
def test_the_rank_is_an_eighth_of_the_measured_layer_and_both_its_factors_have_the_same_algorithm(
    task: Task,
) -> None:
    layer = dict(task.model().named_modules())[task.layer]
    assert isinstance(layer, torch.nn.Linear)
    assert task.rank == default_rank(layer.in_features + 1, layer.out_features)
    run = Run(task, task.data(Source()), CONTESTANTS["B-KFAC"], 0.1, 0, "cpu")
    next(run.epoch())
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, KFAC)
    chosen = [name for factor in optimizer.layers[task.layer].factors.values() for name in factor.processes]
    assert chosen == ["R-KFAC" if task.name in ("transformer", "diabetes") else "B-KFAC"] * 2


def test_the_tasks_of_the_search_are_none_of_the_report() -> None:
    quoted = [
        {task.data(Source()).name for task in group if task in HERE} for group in (TASKS.values(), SEARCH.values())
    ]
    assert not quoted[0] & quoted[1] and not set(TASKS) & set(SEARCH)


def test_the_characters_are_followed_by_the_next_ones() -> None:
    data = TASKS["transformer"].data(Source())
    for x, y in (data.train, data.test):
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert 0 <= int(x.min()) and int(x.max()) < 96


def test_cifar10_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds neither"):
        TASKS["cifar10"].data(Source(tmp_path))
