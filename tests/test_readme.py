"""The README's example runs as it stands."""

import re
from pathlib import Path

import torch
from torch import nn

README = Path(__file__).parent.parent / "README.md"


def test_example_on_a_users_own_model_prints_the_four_errors_of_seven_algorithms(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(6, 64))
    model.add_module("relu", nn.ReLU(inplace=True))
    model.add_module("head", nn.Linear(64, 40))
    batches = [(torch.randn(16, 6), torch.randint(40, (16,))) for _ in range(90)]
    given = {
        "model": model,
        "batches": batches,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": nn.CrossEntropyLoss(),
    }
    exec(example, given)
    printed = capsys.readouterr().out
    assert printed.count("KFAC") + printed.count("K-FAC") >= 7
    assert all(metric in printed for metric in ("inverse_A", "inverse_G", "step_norm", "step_angle"))
    errors = [row.value for row in given["rows"]]
    assert len(errors) == 7 * 4 * 50
    assert all(0 <= value < 100 for value in errors)
