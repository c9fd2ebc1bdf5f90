"""Advice: costs that are those of the sizes, errors that are those of a replay, and a frontier that is one."""

import re
from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kfacerr.advice import Advice, Budget, Layer, _on_frontier, advise_recording, candidates, layer_costs
from kfacerr.algorithms import Algorithm
from kfacerr.exceptions import InputError
from kfacerr.factor import KFactor
from kfacerr.metrics import METRICS
from kfacerr.process import Settings
from kfacerr.recorder import RecordingWriter
from kfacerr.recording import Recording
from kfacerr.report import report_recording
from kfacerr.stream import Step, Window
from kfacerr.study import ErrorStudy, table
from kfacerr.torch import KFAC
from tests.strategies import stream

WINDOWS = [Window(20, 20, 1)]
SHAPE = {"d_A": 24, "d_G": 18, "n": 3, "bias": True, "batch_size": 3, "update_every": 5}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("advice") / "r.h5"
    A = stream(np.random.default_rng(1), d=24, n=3, steps=40, decay="slow decay", dtype=np.float32)
    G = stream(np.random.default_rng(2), d=18, n=3, steps=40, decay="fast decay", dtype=np.float32)
    with RecordingWriter(path) as writer:
        writer.add_layer("fc", windows=WINDOWS, **SHAPE)
        for k in range(40):
            writer.append("fc", Step(k, A[k], G[k], k % 5 == 0))
    return path


@pytest.fixture(scope="module")
def advice(recorded):
    with Recording(recorded) as recording:
        return advise_recording(recording.layer("fc"), rank=4, budget=Budget.parse("1e9x"))


def test_it_says_what_it_is_when_shown(advice):
    assert repr(advice).startswith(f"<kfacerr Advice for 'fc': {advice.choice}; ")


def test_the_table_has_the_columns_of_the_contract(advice):
    assert list(advice.table.columns[:7]) == ["algorithm", "cost", *METRICS, "on_frontier"]
    assert len(advice.table) > 20 and not advice.table.isna().any().any()
    assert (advice.table.cost > 0).all() and advice.table.cost.is_monotonic_increasing


def test_candidates_are_of_every_base_but_the_dominated_ones(advice):
    bases = {name.split()[0] for name in advice.table.algorithm}
    assert bases == {"K-FAC", "R-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C", "N-KFAC", "W-KFAC"}
    names = {str(a) for a in candidates(Layer(64, 18, 8, 5), 4)}
    assert {"N-KFAC s=4", "N-KFAC s=8", "N-KFAC s=12", "W-KFAC T_inv=10 rank=12"} <= names
    assert {"N-KFAC s=8", "N-KFAC s=12"} & {str(a) for a in candidates(Layer(20, 18, 8, 5), 4)} == {"N-KFAC s=8"}


def test_a_decomposition_that_waits_for_an_inverse_is_timed_too(monkeypatch):
    """K-FAC inverts, and N-KFAC decomposes, when the inverse is asked for and not at the update."""
    asked = []
    inverse = KFactor.inverse
    monkeypatch.setattr(KFactor, "inverse", lambda *a, **k: asked.append(a[0].side) or inverse(*a, **k))
    names = [Algorithm.parse(name) for name in ("K-FAC T_inv=10", "N-KFAC s=4")]
    layer_costs(Layer(24, 18, 3, 5), names, Settings(rank=4))
    assert asked.count("A") == asked.count("G") == len(names) * 6


def test_the_errors_are_those_of_a_replay(advice, recorded):
    names = ["B-KFAC rank=4", "K-FAC T_inv=10"]
    study = ErrorStudy(names, Settings(rank=4), WINDOWS)
    with Recording(recorded) as recording:
        steps = [s._replace(A=s.A.astype(float), G=s.G.astype(float)) for s in recording.layer("fc").steps()]
    means = (
        table([row for step in steps for row in study.push(step)]).groupby(["algorithm", "metric"]).value.mean()
    )
    for name in names:
        row = advice.table[advice.table.algorithm == name].iloc[0]
        assert [row[m] for m in METRICS] == pytest.approx([means[name, m] for m in METRICS], rel=1e-9, abs=1e-12)


def test_the_choice_is_the_least_error_within_the_budget(advice):
    frame, sgd = advice.table.drop(columns="on_frontier"), advice.sgd
    assert advice.table.step_norm.min() == advice.table[advice.table.algorithm == advice.choice].step_norm.iloc[0]
    cheapest = Advice("fc", frame, sgd, Budget(1e-9), advice.settings)
    assert not cheapest.within and cheapest.choice == frame.algorithm.iloc[0]
    middle = float(frame.cost.median())
    chosen = Advice("fc", frame, sgd, Budget(middle, relative=False), advice.settings)
    row = frame[frame.algorithm == chosen.choice].iloc[0]
    assert row.cost <= middle and row.step_norm == frame[frame.cost <= middle].step_norm.min()


def test_the_last_lines_name_the_choice_and_the_policy(advice):
    *_, choice, policy = advice.summary().splitlines()
    assert choice.startswith(f"choice: {advice.choice} (") and "within the budget" in choice
    given = eval(policy, {"KFAC": lambda model, **given: given, "model": None})
    assert given == {**advice.settings, "policy": {"fc": advice.choice}} and given["policy"] == advice.policy
    assert advice.settings == {"T_updt": 5, "rank": 4, "phi_lambda": 0.1, "rho": 0.95, "continuation": "min"}


def test_it_shows_itself_in_a_notebook_and_as_a_page_of_its_own(advice, tmp_path):
    shown = advice._repr_html_()
    assert "<html" not in shown and f"choice: {advice.choice}" in shown and "policy={" in shown
    assert all(name in shown for name in advice.table[advice.table.on_frontier].algorithm)
    assert shown.count("data:image/svg+xml") == 2, "a figure, light and dark"
    advice.to_html(tmp_path / "advice.html")
    whole = (tmp_path / "advice.html").read_text()
    assert whole.startswith("<!doctype html>") and not re.search(r"(src|href)=.https?:", whole)


def test_csv_and_figure(advice, tmp_path):
    advice.to_csv(tmp_path / "a.csv")
    assert list(pd.read_csv(tmp_path / "a.csv").columns[:7]) == ["algorithm", "cost", *METRICS, "on_frontier"]
    figure = advice.plot()
    legend = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert all(name in legend for name in advice.table[advice.table.on_frontier].algorithm)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_the_frontier_is_what_nothing_dominates(rows):
    values = np.array(rows, dtype=float)
    for row, on in zip(values, _on_frontier(values), strict=True):
        dominated = any((other <= row).all() and (other < row).any() for other in values)
        assert on != dominated


@pytest.mark.parametrize(
    ("text", "amount", "relative"),
    [("2x", 2.0, True), ("20", 20.0, False), ("1.5ms", 1.5, False), (" 3 X", 3, True)],
)
def test_budgets(text, amount, relative):
    assert Budget.parse(text) == Budget(amount, relative)


def test_an_inverse_older_than_every_window_is_no_candidate(advice):
    """With windows of 20 iterations T_inv=50 would look as good as T_inv=20."""
    periods = {Algorithm.parse(name).get("T_inv") for name in advice.table.algorithm}
    assert periods == {None, 10}


def test_what_is_no_layer_or_no_budget_is_refused_with_what_to_give():
    with pytest.raises(InputError, match=r"the layer must be of type LayerRecording, got 'run\.h5'"):
        advise_recording("run.h5", rank=3)
    with pytest.raises(InputError, match=r"a budget is a text, '20' \(ms\) or '1\.5x' .*, got 4$"):
        Budget.parse(4)


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "0x", "infx", "two"])
def test_bad_budgets_are_refused(text):
    with pytest.raises(InputError, match="give milliseconds"):
        Budget.parse(text)


def test_candidates_are_algorithms_that_fit():
    wide = candidates(Layer(2000, 500, 32, 10), 40)
    assert {a.base for a in wide} >= {"K-FAC", "R-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C"}
    assert Algorithm.parse("R-KFAC T_inv=50 rank=72") in wide, "at the rank that Brand's are applied at"
    assert all(a.get("rank", 0) < 12 for a in candidates(Layer(12, 5, 4, 10), 8))


def test_costs_rise_with_the_work():
    layer = Layer(300, 200, 16, 10)
    names = ["B-KFAC rank=16", "R-KFAC T_inv=50 rank=16", "R-KFAC T_inv=10 rank=16", "K-FAC T_inv=10"]
    costs = layer_costs(layer, [Algorithm.parse(n) for n in names], Settings(rank=16)).set_index("algorithm")
    assert costs.flops["R-KFAC T_inv=50 rank=16"] < costs.flops["R-KFAC T_inv=10 rank=16"]
    assert costs.flops["R-KFAC T_inv=10 rank=16"] < costs.flops["K-FAC T_inv=10"]
    assert costs.MiB["B-KFAC rank=16"] < costs.MiB["R-KFAC T_inv=50 rank=16"], "no dense factor"


def test_a_recording_without_windows_is_refused(tmp_path):
    with RecordingWriter(tmp_path / "r.h5") as writer:
        writer.add_layer("fc", **SHAPE)
    with Recording(tmp_path / "r.h5") as recording, pytest.raises(InputError, match="layer 'fc': no windows"):
        advise_recording(recording.layer("fc"), rank=4)


@pytest.mark.parametrize("call", [report_recording, advise_recording])
@pytest.mark.parametrize("bad", [{"rank": 0}, {"phi": 0.0}])
def test_zero_is_refused_and_not_taken_for_a_default(call, bad, recorded):
    with Recording(recorded) as recording, pytest.raises(InputError, match=r"rank must be|phi must be"):
        call(recording if call is report_recording else recording.layer("fc"), **{"rank": 4, **bad})


def test_the_policy_has_the_periods_that_were_measured(recorded):
    """KFAC's own defaults are others."""
    with Recording(recorded) as recording:
        found = advise_recording(recording.layer("fc"), rank=4, algorithms=["B-R-KFAC"])
    assert (found.choice, found.policy) == ("B-R-KFAC", {"fc": "B-R-KFAC T_rsvd=50"})


@pytest.mark.parametrize(
    ("damping", "taken"), [("mean=0.1", True), ("product=0.001", False), ("cut=0.1", False), ("common", False)]
)
def test_the_line_to_paste_is_one_that_kfac_takes(recorded, damping, taken):
    """Also where errors were measured on a damping that no optimizer step has."""
    with Recording(recorded) as recording:
        found = advise_recording(recording.layer("fc"), rank=4, algorithms=["B-KFAC"], damping=damping)
    pasted = found.summary().splitlines()[-1]
    model = nn.Sequential(OrderedDict(fc=nn.Linear(23, 18)))
    optimizer = eval(pasted, {"KFAC": KFAC, "model": model})
    assert (str(optimizer.damping) == damping) == taken and damping in pasted
    assert ("  # " in pasted) == (not taken)
