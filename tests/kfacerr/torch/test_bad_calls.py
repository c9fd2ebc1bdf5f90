"""Every public call of kfacerr.torch refuses what it cannot take, by an InputError of one line: a row a call."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import kfacerr.torch
from kfacerr.torch import KFAC, SENG, ColumnHooks, factored, watch
from tests import bad
from tests.bad import (
    NAN,
    NEGATIVE,
    NO_COUNT,
    NO_LIST,
    NO_NAME,
    NO_SIZE,
    NO_SWITCH,
    NO_WINDOWS,
    NOT_POSITIVE,
    given,
)

VALUES = {"PAPER", "PAPER_SENG", "FactorInfo", "FactoredLinear", "Watch"}
"""Settings, what is told, a drop-in with the arguments of torch's own, and what `watch` makes."""

x, y = torch.ones(5, 6), torch.arange(5) % 3
NO_MODULE = ("x", 3, None)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def train(model: nn.Module, optimizer: Any, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def trained(kind: Any, given: dict[str, Any]) -> Any:
    model = given.pop("model", network())
    optimizer = kind(model, **given)
    train(model, optimizer)
    return optimizer


def kfac(**changes: Any) -> KFAC:
    return trained(KFAC, {"algorithm": "B-KFAC", "rank": 2, "steps_per_epoch": 2, **changes})


def seng(**changes: Any) -> SENG:
    return trained(SENG, changes)


def of_group(**changes: Any) -> None:
    model = network()
    optimizer = KFAC(model, "R-KFAC", params=list(model[0].parameters()), rank=2)
    optimizer.add_param_group({"params": [model[2].weight], **changes})


def of_epoch(epoch: Any) -> None:
    optimizer = KFAC(network(), "R-KFAC", rank=2)
    optimizer.epoch = epoch


def of_state(make: Callable[[], Any], change: Callable[[dict[str, Any]], Any]) -> None:
    optimizer = make()
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    optimizer.load_state_dict(state)


def own(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Another value in what the optimizer adds to torch's state; None takes it out."""

    def change(state: dict[str, Any]) -> None:
        (kept,) = (group for key, group in state["param_groups"][0].items() if key in ("kfac", "seng"))
        kept.pop(name) if value is None else kept.update({name: value})

    return change


def without_own(state: dict[str, Any]) -> None:
    for key in ("kfac", "seng"):
        state["param_groups"][0].pop(key, None)


NO_STATE = (
    *(dict.clear, without_own, own("k", None), own("layers", None)),
    *(own("k", value) for value in ("x", {}, NAN, -1)),
    *(own("layers", value) for value in (3, "x", {"0": 3}, {"0": {}, "2": {}}, {"9": {}})),
)


def sampled(**changes: Any) -> None:
    model = network()
    optimizer = KFAC(model, "R-KFAC", rank=2, fisher="sampled")
    output = model(x)
    optimizer.sample_fisher(**{"output": output, **changes})


def hooked(model: Any = None, layers: Any = ("0",), loss_scale: Any = 1.0) -> None:
    model = network() if model is None else model
    with ColumnHooks(model, layers) as hooks:
        cross_entropy(model(x), y).backward()
        hooks.pop(loss_scale=loss_scale)


def watched(**changes: Any) -> Any:
    model = network()
    chosen = changes.pop("model", model)
    with watch(chosen, **{"rank": 2, "every": 1, "windows": [(1, 2)], "algorithms": ["B-KFAC"], **changes}) as w:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    return w


COUNTS = dict.fromkeys(("oversampling", "n_pwr_it", "seed"), NO_COUNT)
SIZES = dict.fromkeys(("rank", "T_updt", "T_inv", "T_rsvd", "T_corct"), NO_SIZE)
RATES = dict.fromkeys(("lr", "momentum", "weight_decay"), NEGATIVE)
SCALES = (*NOT_POSITIVE, lambda: NAN, lambda: 0, lambda: "x", lambda: None)
PERIODS = {**SIZES, **COUNTS, "T_brand": given(*NO_SIZE), "steps_per_epoch": given(*NO_SIZE)}
CHOICES = {
    "algorithm": (*NO_NAME, "B-KFAC rank=2", "SENG", "FD"),
    "continuation": (*NO_NAME, "escaped"),
    "clip_by": NO_NAME,
    "damping": given(*bad.NO_DAMPING, "own", "product=1", "cut=1"),
    "fisher": NO_NAME,
    "linear_application": (None, 3, "x", ["x"], ["1"], [3]),
    "policy": (
        *(
            "x",
            3,
            ["0"],
            {"0": 3},
            {"0": "x"},
            {"0": None},
            {"0": {"A": "B-KFAC"}},
            {"9": "B-KFAC"},
            {"1": "B-KFAC"},
        ),
        *({3: "B-KFAC"}, {"0": lambda info: 3}),
    ),
}
NUMBERS = {
    **RATES,
    "clip": (NAN, 0, -1, "x", [1.0]),
    "rho": bad.NO_DECAY,
    "phi_corct": bad.NO_SHARE,
    "phi_lambda": NOT_POSITIVE,
    "accumulate": NO_SWITCH,
    "loss_scale": SCALES,
}
SCHEDULES = {
    "rank": (lambda e: 0, lambda e: "x", lambda e: None, lambda e: NAN),
    "momentum": (lambda e: -1, lambda e: "x", lambda e: NAN),
    "clip": (lambda e: 0, lambda e: "x"),
}
OF_SENG = {
    **RATES,
    **dict.fromkeys(("fim_col_sample_size", "svd_rank"), given(*NO_SIZE)),
    "damping": NOT_POSITIVE,
    "update_every": NO_SIZE,
    "im_size_threshold": NO_COUNT,
    "layers": ("0", 3, ["x"], ["1"], [3]),
    "loss_scale": SCALES,
    "seed": (int("9" * 40), *NO_COUNT),
    "model": (*NO_MODULE, nn.Sequential()),
}
NO_WATCH = {
    "model": NO_MODULE,
    "layers": ("x", "1", ["x"], [3], 3, []),
    "algorithms": (None, [], *NO_LIST),
    "rank": given(*NO_SIZE),
    "rho": bad.NO_DECAY,
    "phi": NOT_POSITIVE,
    "damping": bad.NO_DAMPING,
    "continuation": NO_NAME,
    "every": NO_SIZE,
    "windows": ([], *NO_WINDOWS),
    "record": ("", "\0", "x" * 300, 3),
    "loss_scale": NOT_POSITIVE,
    "seed": NO_COUNT,
}
ROWS: dict[str, bad.Row] = {
    "KFAC": (kfac, {}, {"model": (*NO_MODULE, nn.Sequential()), **CHOICES}),
    "KFAC numbers": (kfac, {}, NUMBERS),
    "KFAC periods": (kfac, {}, PERIODS),
    "KFAC schedules": (kfac, {}, SCHEDULES),
    "KFAC.add_param_group": (of_group, {}, {**RATES, "clip": (NAN, 0, -1, "x")}),
    "KFAC.epoch": (of_epoch, {"epoch": 1}, {"epoch": (None, *NO_COUNT)}),
    "KFAC.load_state_dict": (of_state, {"make": kfac, "change": len}, {"change": (*NO_STATE, own("epoch", "x"))}),
    "KFAC.sample_fisher": (sampled, {}, {"output": ("x", 3, np.zeros((5, 3))), "likelihood": NO_NAME}),
    "SENG": (seng, {}, OF_SENG),
    "SENG.load_state_dict": (of_state, {"make": seng, "change": len}, {"change": NO_STATE}),
    "ColumnHooks": (
        hooked,
        {},
        {
            "model": ("x", 3, nn.ReLU(), nn.Sequential()),
            "layers": (None, "x", "", 3, [], ["x"], [3], ["1"], ["0", "0"]),
        },
    ),
    "ColumnHooks.pop": (hooked, {}, {"loss_scale": NOT_POSITIVE}),
    "watch": (watched, {}, NO_WATCH),
    "factored": (
        lambda model=None, names=None: factored(model or network(), names),
        {},
        {"model": ("x", 3), "names": ("x", 3, ["x"], [3], ["1"])},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_call_refuses_what_it_cannot_take(name, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.CRITICAL)
    bad.assert_refuses(*ROWS[name])


def test_a_watch_refuses_what_it_cannot_advise_or_show(tmp_path):
    made = watched(record=tmp_path / "r.h5")
    bad.assert_refuses(
        lambda **given: given and made.advise(**given), {}, {"layer": ("x", 3), "budget": ("", "x", "nan", 3)}
    )
    report = made.report()
    bad.assert_refuses(lambda layer: report.plot(layer), {"layer": "0"}, {"layer": ("x", 3)})


def test_every_public_call_has_its_row():
    named = {name.split()[0].split(".")[0] for name in ROWS}
    assert set(kfacerr.torch.__all__) <= named | VALUES
