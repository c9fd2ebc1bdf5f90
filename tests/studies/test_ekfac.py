"""The split of a step's error: differences that add up, each zero where it should be."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from figures.ekfac import LINKS
from kfacerr.metrics import angle_error, norm_error
from kfacerr.process import Settings
from kfacerr.recorder import RecordingWriter
from kfacerr.stream import Step, Window
from kfacerr.study import table
from studies.ekfac import ErrorSplit, main, split
from tests.strategies import stream
from tests.studies.helpers import refused

SETTINGS = Settings(rank=4, rho=0.9, oversampling=2)
NAMES = ("K-FAC T_inv=10", "K-FAC T_inv=5", "R-KFAC T_inv=10", "B-KFAC")


def steps(columns=None):
    """Every fifth step updates; K-FAC T_inv=10 is stale from one update to the next."""
    made = columns or [stream(np.random.default_rng(i), d=d, n=3, steps=30) for i, d in ((1, 9), (2, 7))]
    return [Step(k, a, g, k % 5 == 0) for k, (a, g) in enumerate(zip(*made, strict=True))]


def record(path: Path, batch_size: int) -> Path:
    with RecordingWriter(path) as writer:
        sizes = {"d_A": 9, "d_G": 7, "n": 3, "bias": False, "batch_size": batch_size, "update_every": 5}
        writer.add_layer("fc", **sizes, windows=[Window(10, 20, 0)])
        for step in steps():
            writer.append("fc", step)
    return path


def rows_of(given) -> pd.DataFrame:
    splitting = ErrorSplit(NAMES, SETTINGS, [Window(10, 20, 0)], every=5)
    return table(row for step in given for row in splitting.push(step))


def test_differences_add_up_and_shares_to_one():
    chain = list(np.random.default_rng(0).standard_normal((len(LINKS) + 1, 4, 3)))
    found = split(chain)
    assert found["norm total"] == pytest.approx(norm_error(chain[0], chain[-1]))
    assert sum(found[f"share {link}"] for link in LINKS) == pytest.approx(1)
    angles = [angle_error(one, chain[-1]) for one in chain[:-1]]
    assert [found[f"angle {link}"] for link in LINKS] == angles and found["angle total"] == angles[0]
    assert found["norm truncation"] == pytest.approx(
        norm_error(chain[1], chain[2] * 1.0) * np.linalg.norm(chain[2]) / np.linalg.norm(chain[-1])
    )


def test_no_error_has_no_share():
    found = split([np.ones((2, 2))] * (len(LINKS) + 1))
    assert found.pop("share total") == 1 and set(found.values()) == {0.0}


def test_each_difference_is_zero_where_it_should_be():
    wide = rows_of(steps()).pivot_table(index=["algorithm", "k"], columns="metric", values="value")
    stale, fresh, sketched, brand = (wide.loc[name] for name in NAMES)
    assert (fresh["norm staleness"] == 0).all() and (fresh["norm truncation"] < 1e-9).all()
    assert (stale["norm truncation"] < 1e-9).all() and (brand["norm staleness"] == 0).all()
    at = stale.index % 10
    assert (stale["norm staleness"][at < 5] < 1e-9).all() and (stale["norm staleness"][at >= 5] > 1e-6).all()
    assert (sketched["norm truncation"] > 1e-6).all() and (brand["norm truncation"] > 1e-6).all()
    for link in LINKS[2:]:  # they are of the layer, whatever the algorithm
        assert np.allclose(stale[f"norm {link}"], brand[f"norm {link}"]) and (brand[f"norm {link}"] > 1e-6).all()


def test_independent_inputs_and_gradients_leave_damping_alone():
    """All pairs of three a's and two g's in every step: A (x) Gamma is the Fisher."""
    rng = np.random.default_rng(0)
    a, g = rng.standard_normal((9, 3)), rng.standard_normal((7, 2))
    A, G = np.repeat(a, 2, axis=1) / 6**0.5, np.tile(g, 3) / 6**0.5
    frame = rows_of(steps([[A] * 30, [G] * 30]))
    fresh = frame[frame.algorithm == NAMES[1]].pivot_table(index="k", columns="metric", values="value")
    assert fresh[["norm eigenvalues", "norm Kronecker"]].to_numpy().max() < 1e-9
    assert fresh["norm damping"].min() > 1e-3 and np.allclose(fresh["share damping"], 1)


def test_the_command_writes_a_table_and_a_figure(tmp_path, capsys):
    recorded, out = record(tmp_path / "run.h5", batch_size=3), tmp_path / "out"
    arguments = ["--layer", "fc", "--rank", "4", "--algorithms", "B-KFAC", "R-KFAC T_inv=50"]
    assert main([str(recorded), *arguments, "--out", str(out)]) == 0
    frame = pd.read_csv(out / "ekfac.csv")
    assert list(frame.columns) == ["recording", "epoch", "algorithm", "link", "norm", "share", "angle"]
    shares = frame[frame.link != "total"].groupby("algorithm").share.sum()
    assert np.allclose(shares, 1) and set(frame.link) == {*LINKS, "total"}
    assert {path.name for path in out.iterdir()} == {
        *("ekfac.csv", "ekfac.md", "ekfac.pdf", "ekfac.png", "environment.json")
    }
    assert (out / "ekfac.png").stat().st_size > 10_000
    assert "| B-KFAC" in capsys.readouterr().out


def test_a_convolution_and_bad_options_are_refused(tmp_path, capsys):
    conv, fc = record(tmp_path / "conv.h5", batch_size=1), record(tmp_path / "fc.h5", batch_size=3)
    out = "--out", tmp_path / "out"
    assert "a fully connected layer is needed" in refused(capsys, main, conv, "--layer", "fc", *out)
    for bad in (["--rank", "0"], ["--phi", "-1"], ["--layer", "none"], ["--algorithms", "none"]):
        refused(capsys, main, fc, "--layer", "fc", *bad, *out)
