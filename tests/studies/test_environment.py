"""What is said of the machine, and which device is taken."""

import json
import sys
from pathlib import Path

import pytest
import torch

from kfacerr.exceptions import InputError
from studies.environment import environment, hardware, select_device


def test_auto_selects_a_gpu_where_there_is_one() -> None:
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpu", "'gpu' is not the name of a device"), ("cuda:99", "'cuda:99' is asked for, but there are .* GPUs")],
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        select_device(name)


def test_the_environment_is_json_and_names_versions_but_no_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "inverse_errors.py"), f"--data={tmp_path}", "--seed", "3"])
    record = environment()
    assert json.loads(json.dumps(record)) == record
    assert record["command"] == ["inverse_errors.py", f"--data={tmp_path.name}", "--seed", "3"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["cpu"]
    assert str(tmp_path) not in json.dumps(record)
    assert hardware(record, torch.device("cpu")) == f"{record['cpu']}, {record['torch_threads']} threads"
