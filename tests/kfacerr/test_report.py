"""A report says what was measured, in text, as a table, as a figure and as one HTML file."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from kfacerr.algorithms import SEVEN
from kfacerr.exceptions import InputError
from kfacerr.metrics import METRICS
from kfacerr.process import Settings
from kfacerr.recorder import RecordingWriter
from kfacerr.recording import Recording
from kfacerr.report import Measurement, Report, default_rank, report_recording
from kfacerr.stream import Step, Window
from kfacerr.study import CERTIFIED, ErrorStudy
from tests import reference
from tests.strategies import stream

WINDOWS = [Window(10, 10, 0), Window(30, 10, 2)]
SETTINGS = Settings(rank=4, rho=0.9)


def steps(d_A=20, d_G=9, n=3, last=40, every=5):
    A = stream(np.random.default_rng(1), d=d_A, n=n, steps=last, decay="slow decay")
    G = stream(np.random.default_rng(2), d=d_G, n=n, steps=last, decay="fast decay")
    return [Step(k, A[k], G[k], k % every == 0) for k in range(last)]


def measured(name="fc", settings=SETTINGS, **shapes) -> Measurement:
    measurement = Measurement(name, settings, WINDOWS, every=5)
    for step in steps(**shapes):
        measurement.push(step)
    return measurement


@pytest.fixture(scope="module")
def report() -> Report:
    return Report([measured("fc"), measured("<head>", d_A=15)])


def test_the_table_is_tidy_and_that_of_the_study(report):
    assert list(report.table.columns[:4]) == ["algorithm", "k", "metric", "value"]
    assert set(report.table.layer) == {"fc", "<head>"}
    study = ErrorStudy(SEVEN, SETTINGS, WINDOWS)
    rows = [row for step in steps() for row in study.push(step)]
    part = report.table[(report.table.layer == "fc") & report.table.metric.isin(METRICS)]
    assert list(part.value) == [row.value for row in rows]


def test_certified_bounds_stand_beside_and_above(report):
    wide = report.table[report.table.layer == "fc"].pivot_table(
        index=["algorithm", "k"], columns="metric", values="value"
    )
    for side, metric in CERTIFIED.items():
        there = wide[wide[metric].notna()]
        assert len(there) > 10 and (there[f"inverse_{side}"] <= there[metric] + 1e-12).all()


def test_the_facts_are_those_of_the_factors(report):
    columns = [s.A for s in steps() if s.update]
    M = reference.ea_factor(columns, 0.9)
    w = np.linalg.eigvalsh(M)[::-1]
    facts = report.layers[0].factors["A"]
    assert (facts.d, report.layers[0].n) == (20, 3)
    assert facts.trace == pytest.approx(np.trace(M)) and facts.stable_rank == pytest.approx(np.trace(M) / w[0])
    assert facts.beyond == pytest.approx(w[4:].sum() / w.sum()) and facts.above == (w > 0.1 * w[0]).sum()


def test_extreme_columns_give_the_same_facts_in_their_own_units():
    measurement = Measurement("fc", SETTINGS, WINDOWS, every=5)
    for step in steps():
        measurement.push(step._replace(A=np.ldexp(step.A, 200)))
    facts, plain = measurement.facts().factors["A"], measured().facts().factors["A"]
    assert replace(facts, trace=0) == replace(plain, trace=0)
    assert facts.trace == pytest.approx(plain.trace * 2.0**400)


def test_the_summary_names_layers_algorithms_and_what_is_saved_nowhere(report):
    text = report.summary()
    assert str(report) == text and "fc" in text and "<head>" in text
    assert all(name in text for name in (*SEVEN, *METRICS))
    assert "certified A" in text and "measuring" in text
    small = Report([measured(d_G=6)])
    assert "B-KFAC: r + n >= d (4 + 3 >= 6) for G, where it saves nothing" in small.summary()
    assert "r + n >= d" not in text


def test_errors_are_those_of_the_first_layer_unless_one_is_named(report):
    assert report.errors().equals(report.errors("fc")) and list(report.errors().index) == list(SEVEN)
    with pytest.raises(InputError, match=r"no layer 'x'; there are "):
        report.errors("x")


def test_a_report_is_of_a_recording_that_is_open():
    with pytest.raises(InputError, match=r"the recording must be of type Recording, got 'run\.h5'"):
        report_recording("run.h5")


def test_a_window_that_was_not_reached_is_told():
    measurement = Measurement("fc", SETTINGS, [Window(0, 5), Window(100, 5)])
    for step in steps(last=8):
        measurement.push(step)
    report = Report([measurement])
    assert "from 100 was not reached" in report.summary()
    assert report.layers[0].windows == (Window(0, 5),), "where errors were measured"
    assert "iterations 0-4\n" in report.summary()


def test_many_windows_that_were_not_reached_are_one_note():
    measurement = Measurement("fc", SETTINGS, [Window(10**j, 5) for j in range(9)])
    for step in steps(last=20):
        measurement.push(step)
    (note,) = Report([measurement]).layers[0].notes
    assert note == "the window of 5 iterations from 100 was not reached, nor were 6 others"


def test_one_html_file_without_network(report, tmp_path):
    path = tmp_path / "report.html"
    report.to_html(path)
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not re.search(r"(src|href|srcset)=\"(?!data:)", page), "everything is inline"
    assert "&lt;head&gt;" in page and "<head>" in page.split("<body>")[0] and page.count("<h2><head>") == 0
    assert page.count("data:image/svg+xml;base64") == 4, "two layers, light and dark"
    fragment = report._repr_html_()
    assert "<html" not in fragment and "kfacerr" in fragment


def test_csv_and_plot(report, tmp_path):
    report.to_csv(tmp_path / "r.csv")
    again = pd.read_csv(tmp_path / "r.csv")
    assert len(again) == len(report.table) and np.allclose(again.value, report.table.value, rtol=1e-11)
    figure = report.plot("<head>")
    assert len(figure.axes) == 8 and "r = 4, n = 3, phi = 0.1" in figure.get_suptitle()
    with pytest.raises(InputError, match="no layer 'x'; there are fc, <head>"):
        report.plot("x")


def test_no_columns_nothing_to_report():
    with pytest.raises(InputError, match="layer 'fc': no columns came in"):
        Report([Measurement("fc", SETTINGS, WINDOWS)])


def test_a_recording_is_reported(tmp_path):
    path = tmp_path / "r.h5"
    shape = {"n": 3, "bias": True, "batch_size": 3, "update_every": 5}
    with RecordingWriter(path) as writer:
        writer.add_layer("fc", d_A=20, d_G=9, windows=WINDOWS, **shape)
        writer.add_layer("idle", d_A=20, d_G=9, **shape)
        for step in steps():
            writer.append("fc", step)
    with Recording(path) as recording:
        report = report_recording(recording, rank=4)
        assert [layer.name for layer in report.layers] == ["fc"] and report.layers[0].every == 5
        assert len(report.table[report.table.metric.isin(METRICS)]) == 7 * 4 * 20
        with pytest.raises(InputError, match="layer 'idle': no windows"):
            report_recording(recording, ["idle"])


def test_the_rank_by_default():
    assert [default_rank(*d) for d in ((16385, 2048), (129, 96), (20, 10))] == [220, 12, 4]
