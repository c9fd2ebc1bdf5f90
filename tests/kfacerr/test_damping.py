"""Dampings as values: what each means, one interface, maps that are those of dense matrices, and replays."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kfacerr
from kfacerr.cli import main
from kfacerr.damping import KINDS, RELATIVE, Damping, Scale
from kfacerr.damping_map import VALUES, damping_map, ranks_around
from kfacerr.exceptions import InputError
from kfacerr.metrics import METRICS
from kfacerr.process import Settings
from kfacerr.recorder import RecordingWriter
from kfacerr.recording import Recording
from kfacerr.report import report_recording
from kfacerr.stream import Window
from kfacerr.study import ErrorStudy, table
from tests.strategies import SPECTRA, generators, layer_steps, orthogonal, psd, spectrum

RNG = np.random.default_rng(0)
A, G = psd(RNG, "slow decay", 9), 7 * psd(RNG, "fast decay", 6)
SCALES = Scale(9, 1.0, 2.7), Scale(6, 7.0, 14.0)


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("text", ["phi=0.1", "mean=2", "lam=0.001", "pi=1e-05", "product=0.5", "cut=0.001"])
def test_a_damping_is_its_text(text):
    assert str(Damping.parse(text)) == text and Damping.parse(str(Damping.parse(text))) == Damping.parse(text)


@pytest.mark.parametrize("text", ["own", "phi", "phi=", "phi=x", "phi=0", "lam=-1", "mean=nan", "pi=inf", "eps=1"])
def test_what_is_no_damping_is_refused(text):
    with pytest.raises(InputError, match="damping"):
        Damping.parse(text)


def test_each_kind_is_what_it_says():
    levels = {kind: Damping(kind, 0.04).levels(*SCALES) for kind in KINDS}
    assert levels["phi"] == levels["cut"] == pytest.approx((0.04, 0.28))
    assert levels["mean"] == pytest.approx((0.04 * 0.3, 0.04 * 14 / 6))
    assert levels["lam"] == levels["product"] == (0.04, 0.04)
    one, other = levels["pi"]
    assert one * other == pytest.approx(0.04) and one / other == pytest.approx(0.3 / (14 / 6))


def test_pi_is_the_mean_with_another_share():
    share = 0.2
    split = Damping("pi", share**2 * SCALES[0].mean * SCALES[1].mean)
    assert split.levels(*SCALES) == pytest.approx(Damping("mean", share).levels(*SCALES))


@given(generators, st.sampled_from(KINDS), st.sampled_from([1e-3, 0.1, 1.0]))
def test_the_grid_is_the_dense_preconditioner_in_both_eigenbases(rng, kind, value):
    d_A, d_G = 5, 4
    V, U = orthogonal(rng, d_A), orthogonal(rng, d_G)
    a, g = spectrum("slow decay", d_A), 3 * spectrum("rank deficient", d_G)
    damping, J = Damping(kind, value), rng.standard_normal((d_G, d_A))
    levels = damping.levels(Scale.of(a), Scale.of(g))
    got = U @ (damping.grid(g, a, levels) * (U.T @ J @ V)) @ V.T
    M_A, M_G = (V * a) @ V.T, (U * g) @ U.T
    if kind == "product":
        expected = np.linalg.solve(np.kron(M_G, M_A) + value * np.eye(d_A * d_G), J.ravel()).reshape(J.shape)
    elif kind == "cut":
        expected = np.linalg.pinv(M_G, value, hermitian=True) @ J @ np.linalg.pinv(M_A, value, hermitian=True)
    else:
        expected = np.linalg.inv(M_G + levels[1] * np.eye(d_G)) @ J @ np.linalg.inv(M_A + levels[0] * np.eye(d_A))
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def test_a_grid_of_products_has_no_inverse_of_one_factor():
    with pytest.raises(InputError, match="both factors"):
        Damping("product", 0.1).inverse(np.ones(3), 0.1)


# --------------------------------------------------------------------------------------------------- maps


def test_a_map_of_the_papers_damping_is_what_an_audit_measures():
    J = np.random.default_rng(1).standard_normal((6, 9))
    layers, gradients = {"fc": {"A": A, "G": G}}, {"fc": J}
    for phi in (VALUES[3], 0.1):
        audit = kfacerr.inspect(layers, rank=4, phi=phi, gradients=gradients)
        row = audit.damping_map().query(f"damping == 'phi' and share == {phi} and rank == 4")
        value = row.set_index("metric").value
        table = audit.table.set_index("side")
        for side in "AG":
            assert value[f"inverse_{side}"] == pytest.approx(table.error_min[side], rel=1e-9)
        assert value["step_norm"] == pytest.approx(table.step_norm_given_min["A"], rel=1e-9)
        assert value["step_angle"] == pytest.approx(table.step_angle_given_min["A"], rel=1e-9)
        assert value["condition"] == pytest.approx(np.prod(table.condition), rel=1e-9)


@pytest.mark.parametrize("kind", SPECTRA)
def test_a_map_has_all_dampings_ranks_and_metrics(kind):
    w, v = spectrum(kind, 12), spectrum(kind, 8)
    frame = damping_map(w, v, np.ones((12, 8)), [2, 4], continuation="trace")
    assert set(frame.damping) == set(RELATIVE) and set(frame["rank"]) == {2, 4}
    assert set(frame.metric) == {*METRICS, "condition"}
    assert set(frame[frame.damping == "product"].metric) == {"step_norm", "step_angle", "condition"}
    errors = frame[frame.metric.isin(METRICS)].value
    assert errors.notna().all() and (errors >= 0).all()


def test_the_full_rank_costs_nothing():
    frame = damping_map(np.ones(3), spectrum("slow decay", 3), np.ones((3, 3)), ranks_around(1, 1))
    assert frame[frame.metric != "condition"].value.max() == 0 or ranks_around(1, 1) == [1]
    assert ranks_around(20, 1000) == [5, 10, 20, 40, 80] and ranks_around(4, 3) == [1, 2]
    exact = damping_map(np.ones(3), spectrum("slow decay", 3), np.ones((3, 3)), [3])
    assert exact[exact.metric != "condition"].value.max() == 0


@pytest.mark.parametrize("continuation", ["none", "min", "trace"])
def test_a_map_continues_spectra_as_an_audit_does(continuation):
    audit = kfacerr.inspect({"fc": {"A": A, "G": G}}, rank=4, phi=0.1)
    row = audit.damping_map(continuation=continuation).query("damping == 'phi' and share == 0.1 and rank == 4")
    table = audit.table.set_index("side")
    for side in "AG":
        error = row[row.metric == f"inverse_{side}"].value.iloc[0]
        assert error == pytest.approx(table[f"error_{continuation}"][side], rel=1e-9)
    with pytest.raises(InputError, match="continuation 'escaped' is not one of"):
        audit.damping_map(continuation="escaped")


def test_a_map_needs_both_factors():
    with pytest.raises(InputError, match="no damping map: it needs both factors in full, which these have: none"):
        kfacerr.inspect({"fc": {"A": A}}).damping_map()
    with pytest.raises(InputError, match=r"no damping map of layer 'x': .* these have: fc"):
        kfacerr.inspect({"fc": {"A": A, "G": G}}).damping_map("x")


def test_the_command_draws_a_map(tmp_path, capsys):
    np.savez(tmp_path / "f.npz", **{"one.A": A, "two.A": A, "two.G": G})
    arguments = ["inspect", str(tmp_path / "f.npz"), "--damping-map", str(tmp_path / "m.svg")]
    assert main(arguments) == 0 and (tmp_path / "m.svg").stat().st_size > 10_000
    first = (tmp_path / "m.svg").read_bytes()
    assert main([*arguments, "--continuation", "trace"]) == 0 and (tmp_path / "m.svg").read_bytes() != first
    assert main([*arguments, "--layer", "one"]) == 2
    assert "of layer 'one'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- studies

NAMES = ("K-FAC T_inv=10", "R-KFAC T_inv=10", "B-KFAC")
WINDOWS = [Window(10, 20, 0)]
SETTINGS = Settings(rank=4, rho=0.9, oversampling=2)


def rows_of(damping: str, scale=1.0, **options) -> pd.DataFrame:
    study = ErrorStudy(NAMES, replace(SETTINGS, **options), WINDOWS, damping=damping, certify=True)
    return table(row for step in layer_steps(scale) for row in study.push(step))


def test_the_papers_damping_by_name_is_its_own():
    own = rows_of("own")
    pd.testing.assert_frame_equal(rows_of("phi=0.1"), own, rtol=1e-9)
    assert not np.allclose(rows_of("phi=0.3").value, own.value)


@pytest.mark.parametrize("damping", ["mean=0.5", "lam=0.02", "pi=1e-4"])
@pytest.mark.parametrize("continuation", ["min", "trace"])
def test_a_study_damps_as_dense_formulas_do(damping, continuation):
    """K-FAC right after its update is exact; R-KFAC with a full sketch is the truncated EVD."""
    frame = rows_of(damping, continuation=continuation)
    fresh = frame[(frame.algorithm == NAMES[0]) & (frame.k == 10)]
    assert fresh.value.max() < 1e-9
    M = {"A": None, "G": None}
    for step in layer_steps()[:11]:
        if step.update:
            for side, X in (("A", step.A), ("G", step.G)):
                new = X @ X.T
                M[side] = new if M[side] is None else 0.9 * M[side] + 0.1 * new
    spectra = {side: np.linalg.eigvalsh(m)[::-1] for side, m in M.items()}
    levels = Damping.parse(damping).levels(*(Scale.of(spectra[side]) for side in "AG"))
    measured = frame[(frame.algorithm == NAMES[1]) & (frame.k == 10)].set_index("metric").value
    for side, level in zip("AG", levels, strict=True):
        w = np.maximum(spectra[side], 0)
        tail = w[3] if continuation == "min" else w[4:].mean()
        cheap = np.append(w[:4], np.full(len(w) - 4, tail))
        error = np.linalg.norm(1 / (cheap + level) - 1 / (w + level)) / np.linalg.norm(1 / (w + level))
        assert measured[f"inverse_{side}"] == pytest.approx(error, rel=0.05)  # its sketch is not exact


@pytest.mark.parametrize("damping", ["phi=0.1", "mean=0.5", "lam=0.02", "pi=1e-4"])
def test_certified_bounds_hold_under_every_damping(damping):
    wide = rows_of(damping).pivot_table(index=["algorithm", "k"], columns="metric", values="value")
    for side in "AG":
        there = wide[wide[f"certified_{side}"].notna()]
        assert len(there) > 4 and (there[f"inverse_{side}"] <= there[f"certified_{side}"] + 1e-12).all()


@pytest.mark.parametrize(("damping", "same"), [("mean=0.5", True), ("lam=0.02", False)])
def test_the_unit_of_the_columns_is_seen_by_an_absolute_damping_alone(damping, same):
    """Columns of 1e-12 are held in a unit of their own, which a damping must not see."""
    one, other = rows_of(damping), rows_of(damping, scale=1e-12)
    part = (one.metric == "inverse_G") & (one.algorithm != NAMES[0])
    assert np.allclose(one.value, other.value, rtol=1e-6, atol=1e-9) == same
    if not same:  # all of G is nothing beside it
        assert other[part].value.max() < 1e-9 < one[part].value.min()


@pytest.mark.parametrize("damping", ["mean=0", "mine", "product", 3, None, ["phi=0.1"]])
def test_a_study_refuses_other_dampings(damping):
    with pytest.raises(InputError, match="damping"):
        ErrorStudy(NAMES, SETTINGS, WINDOWS, damping=damping)


# --------------------------------------------------------------------------------- wherever one is chosen


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "r.h5"
    with RecordingWriter(path) as writer:
        shape = {"d_A": 15, "d_G": 8, "n": 3, "windows": WINDOWS}
        writer.add_layer("fc", **shape, bias=False, batch_size=3, update_every=5)
        for step in layer_steps():
            writer.append("fc", step)
    return path


@pytest.mark.parametrize("damping", ["mean=3", "product=0.01", "cut=0.05", "common"])
def test_every_command_takes_a_damping(damping, recorded, tmp_path, capsys):
    """And all of them measure the same under it, which is not what they measure without."""
    asked = ["--rank", "4", "--algorithms", "B-KFAC", "--damping", damping]
    written = {}
    for command in ("replay", "report", "advise"):
        name = "page.html" if command == "report" else f"{command}.csv"
        layer = ["--layer", "fc"]
        out = ["--out", str(tmp_path / name)]
        extra = ["--plot", str(tmp_path / f"{command}.svg")] if command != "report" else []
        assert main([command, str(recorded), *layer, *asked, *out, *extra]) == 0, capsys.readouterr().err
        written[command] = capsys.readouterr().out
    replayed, advised = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("replay", "advise"))
    mean = replayed.groupby("metric").value.mean()
    for metric in METRICS:
        value = advised[metric].iloc[0]
        assert value == pytest.approx(mean[metric], rel=0.3) if metric in mean else np.isnan(value)
    assert (damping if damping != "common" else "phi = 0.1 in common") in written["report"]
    with Recording(recorded) as recording:
        reports = [report_recording(recording, algorithms=["B-KFAC"], rank=4, damping=d) for d in (damping, "own")]
    above = [[factor.above for factor in report.layers[0].factors.values()] for report in reports]
    assert (above[0] == above[1]) == (damping == "common")


def test_every_command_refuses_what_is_no_damping(recorded, tmp_path, capsys):
    for command in ("replay", "report", "advise"):
        with pytest.raises(SystemExit):
            main([command, str(recorded), "--layer", "fc", "--damping", "mine", "--out", str(tmp_path / "o")])
        assert "invalid choice: 'mine' (own, common, one of phi=VALUE" in capsys.readouterr().err
