"""`watch` sees what a training does, whatever the loop, changes nothing of it, and keeps what it has measured."""

import logging
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from kfacerr.algorithms import Algorithm
from kfacerr.exceptions import InputError
from kfacerr.metrics import METRICS
from kfacerr.process import Settings
from kfacerr.recording import Recording
from kfacerr.report import report_recording
from kfacerr.stream import Step, Window
from kfacerr.study import ErrorStudy
from kfacerr.torch import KFAC, ColumnHooks
from kfacerr.torch.watch import watch

NAMES = ("K-FAC T_inv=50", "B-KFAC", "R-KFAC T_inv=10")
QUICK = {"algorithms": NAMES, "rank": 3, "every": 2, "windows": [(4, 4)]}


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(inplace=True), nn.Linear(24, 18), nn.Tanh(), nn.Linear(18, 12))


def batches(count=12, size=8):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(12, (size,), generator=generator))
        for _ in range(count)
    ]


def train(model, data=None, optimizer=None, parts=1):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches() if data is None else data:
        optimizer.zero_grad()
        for x_j, y_j in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (nn.functional.cross_entropy(model(x_j), y_j) / parts).backward()
        optimizer.step()


def hooked(model, layer="2", **options):
    """The rows by the hand-written loop, which `watch` stands in for."""
    study = ErrorStudy(NAMES, Settings(rank=3), [Window(4, 4)], **options)
    optimizer, rows = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    with ColumnHooks(model, [layer]) as hooks:
        for k, (x, y) in enumerate(batches()):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            A, G = hooks.pop()[layer]
            rows += study.push(Step(k, A.double(), G.double(), k % 2 == 0))
            optimizer.step()
    return {(row.algorithm, row.k, row.metric): row.value for row in rows}


def values(report, layer="2"):
    part = report.table[(report.table.layer == layer) & report.table.metric.isin(METRICS)]
    return {(row.algorithm, row.k, row.metric): row.value for row in part.itertuples()}


def assert_close(got, expected, rel=1e-9):
    assert got.keys() == expected.keys() and got
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=rel, abs=1e-12), key


def test_it_measures_what_the_hand_written_loop_measures_and_changes_nothing():
    model, plain = make(), make()
    with watch(model, "2", **QUICK) as w:
        train(model)
    train(plain)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert w.k == 12
    assert_close(values(w.report()), hooked(make()))


def test_large_layers_stay_in_torch_and_give_the_same(monkeypatch):
    monkeypatch.setattr(sys.modules[watch.__module__], "IN_NUMPY_UP_TO", 1)
    model = make()
    with watch(model, "2", **QUICK) as w:
        train(model)
    assert_close(values(w.report()), hooked(make()))


@pytest.mark.parametrize("damping", ["common", "mean=0.5", "cut=0.1", "product=1e-4"])
def test_it_takes_every_damping(damping, tmp_path):
    model = make()
    with watch(model, "2", damping=damping, record=tmp_path / "r.h5", **QUICK) as w:
        train(model)
    report = w.report()
    found = values(report)
    assert_close(found, hooked(make(), damping=damping))
    assert {metric for _, _, metric in found} == set(METRICS[2:] if "product" in damping else METRICS)
    assert (
        "phi = 0.1 in common" if damping == "common" else f"damping {damping.replace('1e-4', '0.0001')}"
    ) in str(report)
    assert report.plot().axes and "<table" in report._repr_html_()
    assert w.advise().table.step_norm.notna().all()


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_are_one_iteration(parts):
    model = make()
    with watch(model, "2", **QUICK) as w:
        train(model, parts=parts)
    assert w.k == 12
    assert_close(values(w.report()), hooked(make()), rel=1e-3)  # float32 sums in another order, then training


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p: torch.optim.LBFGS(p, max_iter=1)])
def test_any_optimizer_will_do(optimizer):
    model = make()
    made = optimizer(model.parameters())
    with watch(model, "2", **QUICK) as w:
        for x, y in batches():

            def closure(x=x, y=y):
                made.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            if isinstance(made, torch.optim.LBFGS):
                closure()
                made.step(closure)
            else:
                closure()
                made.step()
    assert len(values(w.report())) == 3 * 4 * 4


@pytest.mark.parametrize("parts", [1, 2])
def test_a_backward_within_the_step_is_of_that_step(parts):
    """As in Lightning, which runs the last micro-batch's in the optimizer's closure."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with watch(model, "2", **QUICK) as w:
        for x, y in batches():
            optimizer.zero_grad()
            pieces = list(zip(x.chunk(parts), y.chunk(parts), strict=True))

            def backward(piece):
                loss = nn.functional.cross_entropy(model(piece[0]), piece[1]) / parts
                loss.backward()
                return loss

            for piece in pieces[:-1]:
                backward(piece)
            optimizer.step(lambda last=pieces[-1], backward=backward: backward(last))
    assert w.k == 12
    assert_close(values(w.report()), hooked(make()), rel=1e-3)


def test_kfac_is_an_optimizer_too():
    model = make()
    with watch(model, "2", **QUICK) as w:
        train(model, optimizer=KFAC(model, "R-KFAC", lr=0.05, rank=3, T_updt=2, T_inv=4))
    assert len(values(w.report())) == 3 * 4 * 4


def test_evaluation_and_unused_backwards_disturb_nothing():
    model, optimizer = make(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    other = nn.Linear(6, 2)
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    with watch(model, "2", **QUICK) as w:
        for x, y in batches():
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()
            model(x)  # a forward whose backward never comes
            other(x).sum().backward()
            others.step()  # holds no watched weight
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert w.k == 12
    assert_close(values(w.report()), hooked(make()))


def test_layers_by_name_by_pattern_and_by_size():
    model = make()
    assert watch(model, rank=3).layers == ["2"], "the largest"
    assert watch(model, ["0", "4"], rank=3).layers == ["0", "4"]
    assert watch(model, "*", rank=3).layers == ["0", "2", "4"]
    with watch(model, "[02]", **QUICK) as w:
        train(model)
    report = w.report()
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert "0" in report.summary() and report._repr_html_()


def test_the_windows_by_default_grow_rarer_and_are_measured_at_updates():
    model = make()
    with watch(model, "2", algorithms=["B-KFAC"], rank=3, every=2) as w:
        train(model, batches(60))
    report = w.report()
    assert sorted(set(report.table.k)) == list(range(20, 30, 2))
    assert [tuple(window)[:2] for window in report.layers[0].windows] == [(20, 10)]
    assert "not reached" not in report.summary()


def test_between_the_windows_by_default_nothing_is_followed_but_what_leads_to_the_next(tmp_path):
    """After 45 updates with rho = 0.95 a tenth is left of what came before."""
    model, path = make(), tmp_path / "run.h5"
    with watch(model, "2", algorithms=["B-KFAC"], rank=3, every=1, record=path) as w:
        train(model, batches(110))
    with Recording(path) as recording:
        assert recording.layer("2").k.tolist() == [*range(15), *range(55, 105)]
        again = report_recording(recording, rank=3, algorithms=["B-KFAC"])
    assert_close(values(w.report()), values(again), rel=1e-5)


def test_a_training_that_ends_before_the_first_window_is_told_what_to_do(tmp_path):
    model = make()
    with watch(model, "2", algorithms=["B-KFAC"], rank=3, every=2) as w:
        train(model)
    report = w.report()
    assert "nothing was measured: the first window starts at iteration 20; give watch(windows=" in str(report)
    report.to_html(tmp_path / "r.html")
    assert "nothing was measured" in (tmp_path / "r.html").read_text() and "nothing was" in report._repr_html_()
    with pytest.raises(InputError, match="layer '2': nothing was measured, there is nothing to plot"):
        report.plot()


def test_the_recording_has_the_windows_that_were_reached(tmp_path):
    model, path = make(), tmp_path / "run.h5"
    with watch(model, "2", algorithms=["B-KFAC"], rank=3, every=2, record=path) as w:
        train(model, batches(60))
    with Recording(path) as recording:
        assert recording.layer("2").windows == [Window(20, 10)]
        assert (
            report_recording(recording, rank=3, algorithms=["B-KFAC"]).layers[0].windows
            == w.report().layers[0].windows
        )


def test_windows_may_be_windows():
    tables = []
    for windows in (Window(4, 4), [Window(4, 4)], [(4, 4)]):
        model = make()
        with watch(model, "2", **{**QUICK, "windows": windows}) as w:
            train(model)
        tables.append(values(w.report()))
    assert tables[0] == tables[1] == tables[2] and tables[0]


def test_what_it_is_when_shown():
    model = make()
    with watch(model, ["0", "2"], **QUICK) as w:
        assert repr(w) == "<kfacerr Watch of '0', '2': 0 steps; nothing measured yet>"
        train(model)
    assert repr(w) == "<kfacerr Watch of '0', '2': 12 steps; see .report()>"


def test_it_records_what_it_saw_and_advises_from_it(tmp_path):
    model, path = make(), tmp_path / "run.h5"
    data = [(x[: 8 - (k == 5)], y[: 8 - (k == 5)]) for k, (x, y) in enumerate(batches())]  # a short batch
    with watch(model, "2", **QUICK, record=path) as w:
        train(model, data)
    with Recording(path) as recording:
        layer = recording.layer("2")
        assert layer.k.tolist() == [0, 2, 4, 5, 6, 7, 8, 10] and layer.widths[3] == 7
        study = ErrorStudy(NAMES, Settings(rank=3), layer.windows)
        rows = [
            row
            for step in layer.steps()
            for row in study.push(step._replace(A=step.A.astype(float), G=step.G.astype(float)))
        ]
    assert_close(values(w.report()), {(r.algorithm, r.k, r.metric): r.value for r in rows}, rel=1e-5)
    advice = w.advise(budget="1e9x")
    assert advice.policy.keys() == {"2"} and "choice: " in advice.summary()


def test_advice_is_for_what_was_watched(tmp_path):
    """The watch's own settings, and not the defaults, are those of the replay."""
    model, path = make(), tmp_path / "run.h5"
    with watch(model, "2", **QUICK, continuation="trace", record=path) as w:
        train(model)
    mean = w.report().table.groupby(["algorithm", "metric"]).value.mean()
    found = advise(w, path, NAMES).set_index("algorithm")
    assert len(found)  # without those whose T_inv is longer than every window
    for name in found.index:
        assert found.step_norm[name] == pytest.approx(mean[name, "step_norm"], rel=1e-5)


def advise(w, path, names):
    """`w.advise` of these candidates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kfacerr.advice.candidates", lambda *_: [Algorithm.parse(name) for name in names])
        return w.advise().table


@pytest.mark.parametrize("bad", [{"rank": 0}, {"phi": 0.0}])
def test_zero_is_refused_and_not_taken_for_a_default(bad):
    with pytest.raises(InputError, match=r"rank must be|phi must be"):
        watch(make(), "2", **{**QUICK, **bad})


def test_advice_needs_a_recording():
    model = make()
    with watch(model, "2", **QUICK) as w:
        train(model)
    with pytest.raises(InputError, match=r"record='run\.h5'"):
        w.advise()


def test_an_exception_in_the_block_keeps_what_was_measured(tmp_path):
    model, path = make(), tmp_path / "run.h5"
    w = watch(model, "2", **QUICK, record=path)

    def block():
        with w:
            train(model, batches(7))
            raise RuntimeError("lightning")

    with pytest.raises(RuntimeError, match="lightning"):
        block()
    assert sorted(set(w.report().table.k)) == [4, 5, 6]
    with Recording(path) as recording:
        assert len(recording.layer("2")) == 5
    assert not _global_optimizer_post_hooks, "nothing stays behind"


def test_bad_columns_end_the_watch_of_a_layer_and_not_the_training(caplog):
    model = make()
    data = batches()
    data[6] = (data[6][0] * float("nan"), data[6][1])
    with caplog.at_level(logging.WARNING), watch(model, "2", **QUICK) as w:
        train(model, data)
    assert w.k == 12 and "layer '2' is not watched any more" in caplog.text
    report = w.report()
    assert sorted(set(report.table.k)) == [4, 5]
    assert "measured up to iteration 5 only: " in report.summary() and "NaN" in report.summary()


def test_without_a_step_it_says_so(caplog):
    model = make()
    with caplog.at_level(logging.WARNING), watch(model, "2", **QUICK) as w:
        pass
    assert "nothing was measured" in caplog.text
    with pytest.raises(InputError, match="nothing was measured"):
        w.report()


def test_a_scaled_loss_gives_the_same_errors():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with watch(model, "2", **QUICK, loss_scale=lambda: 2.0**12) as w:
        for x, y in batches():
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), y) * 2.0**12).backward()
            for p in model.parameters():
                p.grad /= 2.0**12
            optimizer.step()
    assert_close(values(w.report()), hooked(make()))


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_that_a_gradscaler_sees_is_no_step(fused):
    """It calls the step of a fused optimizer all the same, which takes none then."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with watch(model, "2", **QUICK, loss_scale=scaler.get_scale) as w:
        for k, (x, y) in enumerate(batches()):
            for factor in [math.inf, 1.0] if k in (3, 5) else [1.0]:
                optimizer.zero_grad()
                scaler.scale(factor * nn.functional.cross_entropy(model(x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
    assert w.k == 12
    assert_close(values(w.report()), hooked(make()), rel=1e-5)


def test_a_gradient_of_the_columns_is_that_of_the_weight(tmp_path):
    """(20) for the whole step, also in micro-batches of different sizes."""
    model, path = make(), tmp_path / "r.h5"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = batches(1)[0]
    with watch(model, "2", **QUICK, record=path):
        for sizes in ((3, 5), (8,), (1, 2, 5)):
            optimizer.zero_grad()
            for x_j, y_j in zip(x.split(sizes), y.split(sizes), strict=True):
                (nn.functional.cross_entropy(model(x_j), y_j) * len(x_j) / 8).backward()
            expected = torch.cat([model[2].weight.grad, model[2].bias.grad[:, None]], dim=1).numpy()
            optimizer.step()
    with Recording(path) as recording:
        for step in recording.layer("2").steps():
            assert np.allclose(step.G @ step.A.T, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"layers": "9"}, "no layer to watch fits '9'; the layers that can be followed: 0, 2, 4"),
        ({"rank": 0.5}, "rank must be a whole number"),
        ({"every": 0}, "every must be a whole number of at least 1"),
        ({"phi": 0}, "phi must be positive"),
        ({"algorithms": ["B-FAC"]}, "'B-FAC' is not one of"),
        ({"continuation": "max"}, "continuation 'max'"),
        ({"windows": [(0, 5), (3, 4)]}, "windows overlap"),
        ({"windows": [(0, 0)]}, "window"),
        ({"windows": [7]}, "windows: each must be of type tuple or list, got 7"),
        ({"windows": [(1.5, 3)]}, "a window's start must be a whole number of at least 0, got 1.5"),
    ],
)
def test_bad_arguments_are_refused_before_the_block(keywords, message):
    with pytest.raises(InputError, match=message):
        watch(make(), **{"layers": "2", **keywords})


def test_a_model_without_layers_is_refused():
    with pytest.raises(InputError, match="no layer to watch"):
        watch(nn.ReLU())
