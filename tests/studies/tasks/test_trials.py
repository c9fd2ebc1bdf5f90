"""One trial."""

import math
from dataclasses import replace

import pytest
import torch

from kfacerr.exceptions import InputError
from studies.tasks.contestants import CONTESTANTS
from studies.tasks.problems import Source
from studies.tasks.study import result
from studies.tasks.trials import Run, Trial, train
from tests.studies.tasks.tiny import TASK, blobs


def begun(name: str = "SGD", lr: float = 0.1, seed: int = 0) -> Run:
    return Run(TASK, blobs(Source()), CONTESTANTS[name], lr, seed, "cpu")


def test_all_optimizers_start_alike_on_the_same_batches_and_part() -> None:
    first, second = zip(
        *(list(begun(name).epoch())[:2] for name in ("SGD", "AdamW", "K-FAC", "Muon")), strict=True
    )
    assert len(set(first)) == 1 and len(set(second)) == 4


def test_every_rate_falls_to_zero_along_half_a_cosine() -> None:
    run = begun("Muon", 0.2)
    rates: list[float] = []
    for optimizer in run.optimizers:
        optimizer.register_step_pre_hook(lambda own, *_: rates.append(own.param_groups[0]["lr"]))
    train(run)
    cosine = [0.1 * (1 + math.cos(math.pi * k / run.steps)) for k in range(run.steps)]
    assert rates[::2] == pytest.approx(cosine) and rates[1::2] == rates[::2]


def test_an_epoch_takes_every_input_once() -> None:
    seen: list[torch.Tensor] = []
    run = begun()
    run.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    list(run.epoch())
    x = torch.cat(seen)
    assert x.shape == run.train[0].shape
    assert torch.equal(x[x[:, 0].argsort()], run.train[0][run.train[0][:, 0].argsort()])


def test_losses_after_an_epoch_are_of_the_whole_sets() -> None:
    run = begun()
    (*_, last), diverged = train(run)
    assert diverged == "" and last.epoch == TASK.epochs
    for pair, told in ((run.train, last.train_loss), (run.test, last.test_loss)):
        with torch.no_grad():
            assert told == pytest.approx(TASK.loss(run.model(pair[0]), pair[1]).item())
    right = (run.model(run.test[0]).argmax(1) == run.test[1]).double().mean().item()
    assert last.test_accuracy == pytest.approx(right)


def test_a_run_that_diverges_ends_with_an_infinite_loss_and_says_where() -> None:
    state = result(Trial("tiny", "SGD", 1e30, 0, "tune"), TASK, Source(), "cpu", errors=True)
    assert "the loss is" in state["diverged"]
    assert state["epochs"][-1][2] == math.inf and len(state["epochs"]) == 1


def test_a_train_set_that_fills_no_batch_is_refused() -> None:
    with pytest.raises(InputError, match="task tiny: 24 inputs do not fill a batch of 100"):
        Run(replace(TASK, batch_size=100), blobs(Source()), CONTESTANTS["SGD"], 0.1, 0, "cpu")
