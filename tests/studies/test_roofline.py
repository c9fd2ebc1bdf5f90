"""The roofline runs in miniature and writes its files; its sums are what they say."""

import json
import math

import pandas as pd
import pytest
import torch

from studies import roofline
from studies.roofline import APPLICATION, BRAND, BRAND_G, GEMM, STEP, Measured, Operation, Sizes

SIZES = Sizes(512, 64, 12, 16)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("roofline")
    assert roofline.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    return out


def test_every_operation_is_measured(out):
    frame = pd.read_csv(out / "roofline.csv")
    expected = [o.name for o in roofline.operations(SIZES, torch.from_numpy, dense=True)]
    assert sorted(frame.operation) == sorted([*expected, STEP])
    assert (frame.seconds > 0).all() and (frame.rounds > 0).all() and frame.note.isna().all()
    assert frame[frame.operation == GEMM].of_gemm.item() == 1
    assert "cpu" in json.loads((out / "environment.json").read_text())
    text = (out / "roofline.md").read_text()
    assert "B-update and Algorithm 8 are" in text and "small EVD on the host" in text


def test_the_headline_is_the_share_of_a_step():
    measured = [
        Measured("torch", GEMM, 1.0, 1, 2e12),
        Measured("torch", BRAND, 0.02, 1, 1e10),
        Measured("torch", BRAND_G, 0.005, 1, 1e10),
    ]
    assert roofline.added(roofline.table(measured), "torch") is None
    measured += [Measured("torch", APPLICATION, 0.004, 1, 1e9), Measured("torch", STEP, 0.095, 1, 0)]
    frame = roofline.table(measured)
    assert frame.set_index("operation").of_gemm[BRAND] == pytest.approx(0.25)
    sums = roofline.added(frame, "torch")
    assert sums is not None
    assert sums["updates"] == pytest.approx(1.0) and sums["application"] == pytest.approx(4.0)
    assert sums["share"] == pytest.approx(0.05) and sums["share of updates"] == pytest.approx(0.01)


def test_what_does_not_fit_is_a_note_and_stops_nothing():
    def make():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 4 GiB")

    line = roofline.measure("torch", Operation("EVD", 1.0, make), torch.device("cpu"), 3)
    assert math.isnan(line.seconds) and line.rounds == 0
    assert line.note == "CUDA out of memory. Tried to allocate 4 GiB"
    assert "Tried to allocate" in roofline.report(roofline.table([line]), SIZES, "here")


def test_a_layer_too_small_for_brand_is_refused(tmp_path, capsys):
    assert roofline.main(["--d", "30", "--rank", "12", "--columns", "16", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "roofline: d must be more than r + n + 10 = 38, got 30\n"
