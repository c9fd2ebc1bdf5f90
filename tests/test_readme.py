"""The README's examples run as they stand, and its numbers are those of the results."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from kfacerr.metrics import METRICS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = " ".join(README.read_text(encoding="utf-8").split())


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


def test_what_came_out_of_the_papers_layer_is_what_its_csvs_say():
    folder = ROOT / "figures" / "paper-layer"
    frame = pd.concat([pd.read_csv(folder / f"{name}.csv.gz") for name in ("errors", "variants")])
    means = frame.groupby(["epoch", "algorithm", "metric"]).value.mean().unstack()[list(METRICS)]
    later, mean = means.loc[30], means.loc[15]
    R, B_R, K = (mean.loc[name] for name in ("R-KFAC T_inv=50", "B-R-KFAC", "K-FAC T_inv=50"))
    over = (R / B_R).tolist()
    assert "(1) by 61 times, (2) by 2.9, (4) by 7%; in (3) it is a third" in TEXT
    assert [round(over[0]), round(over[1], 1), round(over[3], 2)] == [61, 2.9, 1.07]
    assert 1 / over[2] == pytest.approx(4 / 3, abs=0.02)
    equal = (B_R / mean.loc["R-KFAC T_inv=50 rank=486"]).tolist()
    assert "R-KFAC wins (3) and (4) by 2.4 times each" in TEXT and [round(x, 1) for x in equal[2:]] == [2.4, 2.4]
    behind = (R / K).tolist()
    assert "not in (2), by 11 times, nor in (4), by 3.2" in TEXT
    assert (round(behind[1]), round(behind[3], 1)) == (11, 3.2) and max(behind[0], behind[2]) <= 3.08
    assert (B_R < K).tolist() == [True, False, False, False]
    tail = [mean.loc[f"{name} continuation=trace"] for name in ("B-R-KFAC", "N-KFAC", "R-KFAC T_inv=50")]
    ahead = tail[0] / tail[1]
    assert "With `trace` N-KFAC is better than B-R-KFAC in all four,** by 1.2 to 2.7 times" in TEXT
    assert (round(ahead.min(), 1), round(ahead.max(), 1)) == (1.2, 2.7)
    assert "takes R-KFAC's error (2) from 0.24 to 0.08" in TEXT
    assert (round(R.iloc[1], 2), round(tail[2].iloc[1], 2)) == (0.24, 0.08)
    over, behind = (later.loc["R-KFAC T_inv=50"] / later.loc[name] for name in ("B-R-KFAC", "K-FAC T_inv=50"))
    assert "C2 in (1), by 23 times, and (2), by 2.5; C1 fails by 14 and 5 times in (2) and (4)" in TEXT
    assert (round(over.iloc[0]), round(over.iloc[1], 1)) == (23, 2.5)
    assert (round(behind.iloc[1]), round(behind.iloc[3])) == (14, 5)
    ahead = later.loc["B-R-KFAC continuation=trace"] / later.loc["N-KFAC continuation=trace"]
    assert "lead with `trace` is 1.7 to 2.2 times" in TEXT and (round(ahead.min(), 1), round(ahead.max(), 1)) == (
        1.7,
        2.2,
    )


def test_the_verdicts_on_the_papers_layer_are_those_of_its_claims():
    claims = (ROOT / "figures" / "paper-layer" / "claims.md").read_text(encoding="utf-8")
    for epoch, holding in ((15, {"C3", "C4"}), (30, {"C4"})):
        line = rf"^## (C\d)\..*?^- paper's settings, epoch {epoch}: \*\*(.*?)\*\*"
        verdicts = dict(re.findall(line, claims, re.M | re.S))
        assert set(verdicts) == {f"C{i}" for i in range(1, 8)}
        assert {name for name, verdict in verdicts.items() if verdict == "holds"} == holding
    assert (
        "C3 (R-KFAC `T_inv=300` grows past" in TEXT
        and "C4 (B-R-KFAC beats B-KFAC at every iteration) hold." in TEXT
    )
