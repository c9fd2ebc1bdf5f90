"""Who trains, and at which rates."""

import pytest
import torch

from kfacerr.exceptions import InputError
from kfacerr.torch import KFAC
from studies.tasks.contestants import CANDIDATES, CONTESTANTS, FAMILY, LADDER, find_contestant, grid, missing
from tests.studies.tasks.tiny import TASK

NAMES = list(CONTESTANTS)


def test_the_grids_are_alike() -> None:
    """Five rates of one ladder, around the optimizer's own."""
    for contestant in CONTESTANTS.values():
        rates = grid(contestant)
        first = LADDER.index(rates[0])
        assert rates == LADDER[first : first + 5]
        assert rates[0] < contestant.rate < rates[4]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_stepped_by_one_optimizer(name: str) -> None:
    contestant = CONTESTANTS[name]
    if lacks := missing(contestant):
        pytest.skip(f"needs {lacks}")
    model = TASK.model()
    optimizers = contestant.make(model, TASK, 0.01, 0)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert all(group["lr"] == 0.01 and group["weight_decay"] == 0.0 for group in groups)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        model.zero_grad()
        TASK.loss(model(torch.randn(8, 20)), torch.arange(8) % 3).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(
        bool((p != q).any()) and bool(p.isfinite().all()) for p, q in zip(model.parameters(), before, strict=True)
    )


def test_muon_has_the_hidden_matrices_alone() -> None:
    model = TASK.model()
    muon, adamw = CONTESTANTS["Muon"].make(model, TASK, 0.01, 0)
    modules = dict(model.named_modules())
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(modules[name].weight) for name in ("fc0", "fc1")]
    assert id(modules["fc2"].weight) in {id(p) for p in adamw.param_groups[0]["params"]}


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_has_the_rank_of_the_task(name: str) -> None:
    (optimizer,) = CONTESTANTS[name].make(TASK.model(), TASK, 0.01, 7)
    assert isinstance(optimizer, KFAC)
    assert optimizer.hyper.settings.rank == TASK.rank and optimizer.hyper.settings.seed == 7


def test_settings_in_a_name_are_those_of_the_optimizer() -> None:
    contestant = find_contestant("R-KFAC phi_lambda=0.01 momentum=0.9 clip=None continuation=trace rank=3")
    (optimizer,) = contestant.make(TASK.model(), TASK, 0.01, 0)
    assert isinstance(optimizer, KFAC) and contestant.kfac == "R-KFAC"
    group, hyper = optimizer.param_groups[0], optimizer.hyper
    assert (hyper.phi_lambda, hyper.settings.continuation, hyper.settings.rank) == (0.01, "trace", 3)
    assert (group["momentum"], group["clip"]) == (0.9, None)
    assert grid(contestant) == grid(CONTESTANTS["R-KFAC"])


def test_among_the_candidates_is_the_default() -> None:
    def settings(optimizer: torch.optim.Optimizer) -> list[object]:
        assert isinstance(optimizer, KFAC)
        group, schedules = optimizer.param_groups[0], optimizer.schedules
        return [schedules.at(0, 10_000), schedules.warm_up, optimizer.clip_by, group["clip"], group["momentum"]]

    made = [find_contestant(name).make(TASK.model(), TASK, 0.03, 0)[0] for name in CANDIDATES]
    assert settings(KFAC(TASK.model(), rank=220)) in map(settings, made)
    assert len(set(CANDIDATES)) == len(CANDIDATES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no optimizer"),
        ("Adam", "no optimizer is called 'Adam'"),
        ("SGD momentum=0.5", "no optimizer is called"),
        ("R-KFAC lr=1", "lr is not to be set"),
        ("R-KFAC weight_decay=1", "weight_decay is not to be set"),
        ("R-KFAC rho=2", "rho"),
        ("R-KFAC rank=many", "rank"),
        ("R-KFAC foo=1", "foo"),
        ("R-KFAC rank", "rank"),
    ],
)
def test_a_name_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_contestant(name)
