"""`kfacerr inspect`: from Python and from the command line, as text, CSV, HTML and figure."""

import re

import numpy as np
import pandas as pd
import pytest

import kfacerr
from kfacerr.cli import main
from kfacerr.exceptions import InputError
from tests.strategies import psd

RNG = np.random.default_rng(0)
LAYERS = {
    "transformer.h.0.mlp.c_fc": {"A": psd(RNG, "slow decay", 16), "G": psd(RNG, "fast decay", 12)},
    "transformer.h.10.mlp.c_proj_<b>": {"A": psd(RNG, "fast decay", 9), "G": -np.eye(3)},
}
FIRST = next(iter(LAYERS))


@pytest.fixture(scope="module")
def audit():
    return kfacerr.inspect(LAYERS, rank=4, gradients={FIRST: RNG.standard_normal((12, 16))})


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "factors.npz"
    np.savez(path, **{f"{layer}.{side}": M for layer, sides in LAYERS.items() for side, M in sides.items()})
    return path


def test_the_table_has_a_row_a_factor(audit):
    table = audit.table
    assert list(table.columns[:5]) == ["layer", "side", "d", "trace", "stable_rank"]
    assert list(table.side) == ["A", "G", "A", "G"] and list(table.d) == [16, 12, 9, 3]
    M = LAYERS[FIRST]["A"]
    assert table.stable_rank[0] == pytest.approx(np.trace(M) / np.linalg.eigvalsh(M)[-1])
    assert {"error_min", "bound_trace", "eigh_bfloat16", "step_angle_given_trace"} <= set(table.columns)
    assert table.step_norm_given_none[:2].notna().all() and table.step_norm_given_none[2:].isna().all()


def test_steps_are_measured_on_both_gradients(audit):
    assert set(audit.steps.gradient) == {"model", "given"} and set(audit.steps.layer) == {FIRST}


def test_the_text_fits_a_hundred_columns_and_tells_layers_apart(audit):
    wide = {f"a.very.long.name.of.a.layer.of.a.large.model.block.{i}.mlp": LAYERS[FIRST] for i in range(2)}
    for one in (audit, kfacerr.inspect(wide)):
        lines = str(one).splitlines()
        assert max(map(len, lines)) <= 100
        assert all(layer[-6:] in str(one) for layer in wide) or one is audit
    assert lines[0] == "4 K-factors of 2 layers, phi = 0.1"
    assert any("c_proj_<b> G: it has no positive" in line for line in audit.findings())


def test_the_page_is_whole_and_escaped(audit, tmp_path):
    audit.to_html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not re.search(r'(src|href)="(?!data:)', page) and "<b>" not in page
    assert page.count("data:image/svg+xml") == 4 and "Spectra of the factors of layer transformer" in page
    assert "stable rank" in page and audit._repr_html_().startswith("<style>")


def test_a_bound_is_rounded_upwards(audit):
    for cell in audit.inverses()[["none", "min", "trace"]].to_numpy().ravel():
        if cell and "inf" not in cell:
            error, bound = cell.removesuffix(")").split(" (")
            assert float(error) <= float(bound), cell


def test_a_figure_of_one_layer_or_of_all(audit):
    assert len(audit.plot().axes) == 2 and len(audit.plot(FIRST, dark=True).axes) == 2
    with pytest.raises(InputError, match="no layer 'fc'; there are transformer"):
        audit.plot("fc")


def test_factors_of_shampoo_are_measured_at_its_power():
    L, R = LAYERS[FIRST]["G"], LAYERS[FIRST]["A"]
    audit = kfacerr.inspect({"w": {"L": L, "R": R}, "b": {"pre_cond_0": L}}, rank=4)
    assert audit.table.power.tolist() == [0.25, 0.25, 0.5] and "\nw        L       0.25" in str(audit)
    w = np.linalg.eigvalsh(R)
    exact = (w + 0.1 * w[-1]) ** -0.25
    cheap = np.where(np.arange(16) < 12, 0.1 * w[-1], w + 0.1 * w[-1]) ** -0.25
    error = np.linalg.norm(cheap - exact) / np.linalg.norm(exact)
    assert audit.table.error_none[1] == pytest.approx(error)
    assert (audit.table.error_none <= audit.table.bound_none).all() and set(audit.steps.layer) == {"w"}


def test_one_array_is_inspected():
    audit = kfacerr.inspect(np.diag([4.0, 2.0, 1.0]))
    assert audit.table.loc[0, ["layer", "side", "d"]].tolist() == ["factor", "", 3]
    assert audit.table.stable_rank[0] == 1.75 and repr(audit).startswith("<kfacerr Inspection of 1 factor")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"source": {"w": np.ones((2, 3))}}, r"no K-factors, .* there are w float64 \(2, 3\)"),
        ({"source": {}}, "there are no arrays"),
        ({"source": LAYERS, "phi": 0}, "phi must be positive"),
        ({"source": LAYERS, "damping": "pi=0.1"}, "of both factors at once; mean=VALUE is the same"),
        ({"source": LAYERS, "damping": "product=0.1"}, "is no lam for each factor"),
        ({"source": LAYERS, "damping": "cut=0.1"}, "is no lam for each factor"),
        ({"source": LAYERS, "damping": "own"}, "is none of phi=VALUE"),
        ({"source": LAYERS, "damping": 0.1}, "damping must be of type str"),
        ({"source": LAYERS, "rank": 0}, "rank must be a whole number of at least 1"),
        ({"source": LAYERS, "gradients": {"fc": np.eye(2)}}, "no layer 'fc' that a gradient is given of"),
        ({"source": LAYERS, "gradients": {FIRST: np.eye(2)}}, r"a gradient \(12, 16\) is needed"),
        ({"source": {"fc": {"A": np.eye(2)}}, "gradients": {"fc": np.eye(2)}}, "needs both factors"),
        ({"source": "/no/such/file"}, "no such file"),
    ],
)
def test_bad_input_is_named(arguments, fault):
    with pytest.raises(InputError, match=fault):
        kfacerr.inspect(**arguments)


def test_the_command_writes_what_is_asked_for(path, tmp_path, capsys):
    np.savez(tmp_path / "J.npz", **{FIRST: np.ones((12, 16))})
    outputs = {"--out": "a.csv", "--html": "a.html", "--plot": "a.svg", "--gradients": "J.npz"}
    options = [text for option, name in outputs.items() for text in (option, str(tmp_path / name))]
    assert main(["inspect", str(path), "--rank", "4", "--phi", "0.2", *options]) == 0
    assert capsys.readouterr().out.startswith("4 K-factors of 2 layers in factors.npz, phi = 0.2")
    frame = pd.read_csv(tmp_path / "a.csv", keep_default_na=False)
    assert list(frame.columns[:5]) == ["layer", "side", "d", "trace", "stable_rank"]
    assert (tmp_path / "a.svg").stat().st_size > 1000
    first = (tmp_path / "a.csv").read_bytes()
    assert main(["inspect", str(path), "--rank", "4", "--phi", "0.2", *options]) == 0
    assert (tmp_path / "a.csv").read_bytes() == first


def test_the_command_takes_a_damping(path, tmp_path, capsys):
    options = ["--rank", "4", "--damping", "mean=0.5", "--plot", str(tmp_path / "a.svg")]
    assert main(["inspect", str(path), *options, "--html", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out.startswith("4 K-factors of 2 layers in factors.npz, mean = 0.5")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--damping", "mean=0"], "damping mean must be positive"),
        (["--phi", "0"], "phi must be positive"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--plot", "x.jpeg"], "must end in .pdf"),
        (["--out", "no/x.csv"], "the folder no does not exist"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, fault, path, capsys):
    assert main(["inspect", str(path), *options]) == 2
    told = capsys.readouterr().err
    assert fault in told and told.count("\n") == 1


def test_the_source_is_not_written_over(path, capsys):
    assert main(["inspect", str(path), "--out", str(path)]) == 2
    assert "is what is inspected" in capsys.readouterr().err
