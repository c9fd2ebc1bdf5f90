"""Figures from tables with known answers, and `python -m figures`."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from figures.__main__ import main
from figures.optimizers import accuracy_figure
from figures.render import errors_figure, render, spectrum_figure, variants_figure
from figures.tables import epoch_times, table_1
from kfacerr.algorithms import SEVEN
from kfacerr.exceptions import InputError
from kfacerr.metrics import METRICS
from kfacerr.plot import METRIC_LABELS, error_curves, error_figure, save, style
from tests.figures.error_tables import curves, epochs_of, frame, times_of, with_variants

RENDERED = [f"{stem}.{suffix}" for stem in ("figure1", "figure2") for suffix in ("pdf", "png")]


def _spectra() -> pd.DataFrame:
    parts = [
        pd.DataFrame({"seed": s, "epoch": e, "factor": f, "index": range(9), "eigenvalue": 10.0 ** -np.arange(9)})
        for s in (0, 1)
        for e in (15, 30)
        for f in "AG"
    ]
    return pd.concat(parts)


def _drawn(figure: Figure, path) -> None:
    save(figure, path)  # laying it out and writing it raises nothing and warns of nothing
    assert path.stat().st_size > 1000


# ------------------------------------------------------------------------------------------------- Figures


def test_error_curves_average_blocks_and_then_seeds():
    ks = np.arange(105, 130)
    one = pd.DataFrame({"algorithm": "B-KFAC", "k": ks, "metric": "step_norm", "value": ks, "epoch": 3, "seed": 0})
    two = one.assign(value=3 * one.value, seed=1)
    got = error_curves(pd.concat([one, two]), "step_norm", 10)
    assert list(got.iteration) == [0, 10, 20]
    blocks = np.array([np.arange(105, 115).mean(), np.arange(115, 125).mean(), np.arange(125, 130).mean()])
    np.testing.assert_allclose(got["mean"], 2 * blocks)
    np.testing.assert_allclose(got.low, blocks)
    np.testing.assert_allclose(got.high, 3 * blocks)


def test_rows_are_windows_and_columns_are_metrics_on_log_scales():
    figure = error_figure(frame(curves()), METRICS[:2])
    axes = figure.axes
    assert [ax.get_title() for ax in axes] == [METRIC_LABELS[m] for m in METRICS[:2]] + ["", ""]
    assert [ax.get_ylabel() for ax in axes] == ["epoch 15\nerror", "", "epoch 30\nerror", ""]
    assert all(ax.get_yscale() == "log" for ax in axes)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(SEVEN)


def test_windows_of_one_epoch_have_a_row_each_and_the_last_is_table_1s():
    first, second = frame(curves(), epochs=(15,)), frame(curves(), epochs=(15,))
    second = second.assign(k=second.k + 5000, value=2 * second.value)
    table = pd.concat([f.assign(window=f.k.min()) for f in (first, second)], ignore_index=True)
    labels = [ax.get_ylabel() for ax in error_figure(table, METRICS[:1]).axes]
    assert labels == ["epoch 15, from 15000\nerror", "epoch 15, from 20000\nerror"]
    expected = 2 * curves()["B-KFAC", "inverse_A"].mean()
    assert table_1(table).set_index("algorithm").loc["B-KFAC", "(1) mean"] == pytest.approx(expected)


def test_the_axis_is_the_errors_and_leaves_out_what_is_mere_rounding():
    content = curves()
    for metric in METRICS:
        content["K-FAC T_inv=50", metric][::5] = 1e-15
    for ax in error_figure(frame(content), METRICS).axes:
        low, high = ax.get_ylim()
        assert 0.02 < low < 0.05
        assert 0.6 < high < 2


def test_algorithms_look_the_same_in_every_figure_and_no_two_look_alike():
    names = [*SEVEN, *(f"R-KFAC T_inv=50 rank={r}" for r in range(15))]
    looks = style(names)
    assert len(set(looks.values())) == len(names)
    assert {name: look for name, look in style(reversed(names)).items() if name in SEVEN} == style(SEVEN)
    assert len(style([str(i) for i in range(100)])) == 100
    assert style(["R-KFAC T_inv=50 rank=9"])["R-KFAC T_inv=50 rank=9"][0] == style(SEVEN)["R-KFAC T_inv=50"][0]


@pytest.mark.parametrize(
    "table",
    [
        frame(curves(), seeds=1, epochs=(15,)),
        frame(curves(), seeds=1, epochs=(15,)).drop(columns=["seed"]),
        frame(curves(), value=lambda curve, seed, epoch: 0 * curve),
        frame(curves(), value=lambda curve, seed, epoch: 0 * curve + 1e-16),
        frame(curves(), value=lambda curve, seed, epoch: curve * 1e8 ** (epoch / 30)),
        frame({("B-KFAC", "step_norm"): np.array([np.inf, 0.1, 0.2])}),
        frame(curves()).query("k == 15000 or epoch == 30 and algorithm == 'B-KFAC'"),
    ],
    ids=["one seed, one window", "as replay writes it", "zero", "rounding", "huge", "infinite", "incomplete"],
)
def test_figures_render_without_a_warning(tmp_path, table):
    _drawn(error_figure(table, METRICS[2:], title="a title"), tmp_path / "figure.png")


def test_spectra_of_both_factors_render(tmp_path):
    _drawn(spectrum_figure(_spectra(), {}), tmp_path / "spectra.pdf")


WINDOWS = {
    15: {"epoch": 15, "rank": 2, "columns": 3, "phi": [0.1, 0.1]},
    30: {"epoch": 30, "rank": 3, "columns": 3, "phi": [0.05, 0.01]},
}


def test_figures_say_r_and_phi_of_each_window_and_what_the_axis_is(tmp_path):
    figure = errors_figure(frame(curves()), METRICS[:2], WINDOWS, "title, n = 3")
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert labels[::2] == [
        "epoch 15, r = 2, φ = 0.1\nrelative error",
        "epoch 30, r = 3, φ = 0.05 to 0.01\nrelative error",
    ]
    _drawn(figure, tmp_path / "figure.png")


def test_spectra_show_the_damping_and_the_cuts():
    figure = spectrum_figure(_spectra(), WINDOWS)
    for ax in figure.axes:
        across = [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]]
        down = [line.get_xdata()[0] for line in ax.lines if list(line.get_ydata()) == [0, 1]]
        assert across == [0.1, 0.05] and down == [2, 5, 3, 6]


def test_variants_have_a_row_an_algorithm_and_a_marker_a_continuation(tmp_path):
    figure = variants_figure(with_variants(frame(curves())), WINDOWS, "")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert set(SEVEN) < set(names) and not any("continuation" in name for name in names)
    sizes = [len(points.get_offsets()) for points in figure.axes[0].collections]
    assert sizes == [len(names), len(SEVEN)]  # min, trace
    assert figure.get_suptitle() == "means over the window at epoch 30, r = 3, φ = 0.05 to 0.01"
    _drawn(figure, tmp_path / "variants.png")


CURVES = {
    "R-KFAC": [[0.4, 0.6, 0.8, 0.95], [0.4, 0.45, 0.6, 0.8]],
    "B-KFAC": [[0.6, 0.8, 0.95, 0.9], [0.4, 0.6, 0.8, 0.85]],
}
TARGETS = (0.5, 0.7, 0.9)


def test_the_accuracy_figure_has_a_curve_for_each_optimizer_in_both_panels():
    epochs = epochs_of(CURVES)
    figure = accuracy_figure(epochs, epoch_times(epochs, times_of({})), TARGETS, 25)
    for ax, scale in zip(figure.axes, (1, 10), strict=True):
        curve = ax.lines[1]  # b-kfac follows r-kfac, then the targets
        assert list(np.asarray(curve.get_xdata())) == [scale * n for n in (1, 2, 3, 4)]
        assert np.asarray(curve.get_ydata())[0] == pytest.approx(50)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"figure\.doc: a figure's name must end in \.pdf, \.png, \.svg"):
        save(Figure(), tmp_path / "figure.doc")


# ---------------------------------------------------------------------------------------- python -m figures


def test_rendering_a_study_again_gives_the_same_bytes(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        frame(curves(), seeds=1, epochs=(15,)).to_csv(tmp_path / name / "errors.csv", index=False)
        assert main([str(tmp_path / name)]) == 0
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(
        [*RENDERED, "errors.csv", "table1.csv", "table1.md"]
    )
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert capsys.readouterr().err == ""


def test_a_compressed_table_is_read_too(tmp_path):
    errors = frame(curves(), seeds=1, epochs=(15,))
    errors.to_csv(tmp_path / "errors.csv.gz", index=False)
    render(tmp_path)
    expected = table_1(errors).to_csv(index=False, float_format="%.4g")
    assert (tmp_path / "table1.csv").read_text() == expected
    markdown = (tmp_path / "table1.md").read_text()
    assert "| 0.34 " in markdown and "nan" not in markdown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "errors.csv: no such file"),
        ("", "errors.csv: not readable as a table"),
        ("a,b\n1,2\n", "errors.csv: no column 'algorithm'"),
        ("algorithm,k,metric,value,epoch,seed\n", "errors.csv: has no rows"),
        ("algorithm,k,metric,value,epoch,seed\nB-KFAC,1,step_norm,big,1,0\n", "column 'value' is not all numbers"),
    ],
)
def test_a_bad_table_is_named_in_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "errors.csv").write_text(content)
    assert main([str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"figures: {tmp_path}") and message in line and line.count("\n") == 1
