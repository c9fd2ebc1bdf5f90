"""The README's examples run as they stand."""

import re
from pathlib import Path

import torch
from torch import nn

README = Path(__file__).parent.parent / "README.md"


def _given() -> dict:
    """What the README's user has."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(6, 64))
    model.add_module("relu", nn.ReLU(inplace=True))
    model.add_module("head", nn.Linear(64, 40))
    batches = [(torch.randn(16, 6), torch.randint(40, (16,))) for _ in range(210)]
    loss_fn = nn.CrossEntropyLoss()

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

    return {"model": model, "batches": batches, "loss_fn": loss_fn, "train": train}


def _examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_three_lines_around_a_training_print_the_four_errors_of_seven_algorithms(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = _given()
    exec(_examples()[0], given)
    printed = capsys.readouterr().out
    assert printed.count("KFAC") + printed.count("K-FAC") >= 7
    assert all(metric in printed for metric in ("inverse_A", "inverse_G", "step_norm", "step_angle"))
    table = given["w"].report().table
    errors = table[~table.metric.str.startswith("certified")]
    assert len(errors) == 7 * 4 * 5, "a window of five updates"
    assert errors.value.between(0, 100).all()
    assert (tmp_path / "run.h5").exists(), "what the command lines of the table read"


def test_example_of_a_training_loop_lowers_the_loss():
    given = _given()
    given["batches"] = [given["batches"][0]] * 40
    x, y = given["batches"][0]
    before = given["loss_fn"](given["model"](x), y).item()
    exec(_examples()[1], given)
    assert given["loss_fn"](given["model"](x), y).item() < before / 2


def test_it_fits_a_reader():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120
