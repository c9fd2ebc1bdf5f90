"""The comparison with peers: conventions match where it says so, and it leaves what it says. Nothing is timed."""

import importlib.util
import sys

import pandas as pd
import pytest
import torch

from kfacerr.exceptions import InputError
from studies.bench import contestants, peers
from studies.bench.yardsticks import RHO
from tests.studies.helpers import refused

SMALL = contestants.Problem(sizes=(12, 8, 3), n=8, rank=2, sketch=6)

pytestmark = [  # asdl's
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
]


@pytest.fixture
def _both():
    """Skips where the extra `peers` is not installed; if it is, it must import, as the study does it."""
    for library in contestants.PACKAGES:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed (the extra `peers`)")
        contestants.peer(library)


@pytest.fixture
def layers():
    return peers.first_layers(SMALL)


@pytest.fixture
def setting(layers):
    return contestants.Setting(SMALL, peers.fixed_damping(layers))


@pytest.mark.usefixtures("_both")
def test_first_steps_agree_where_conventions_match(setting):
    table = peers.check(contestants.CONTESTANTS, setting).set_index(["step", "against"]).difference
    assert table["K-FAC", "K-FAC written out"] < 1e-12
    assert table["asdl K-FAC with our damping", "K-FAC"] < 1e-12
    assert table["asdl K-FAC", "K-FAC with its damping, written out"] < 1e-12
    first_order = table["singd dense", "K-FAC with its damping and start, written out"]
    assert first_order < 3 * (1 - RHO) ** 2
    assert table["K-FAC", "K-FAC"] < 1e-4  # float32
    assert table["asdl K-FAC", "K-FAC"] > 1e-3  # its own damping is not ours


@pytest.mark.usefixtures("_both")
def test_singd_settles_at_k_fac_with_its_damping(setting, layers):
    every = dict.fromkeys(contestants.SHORT, 1)
    lr = 1e-12  # the weights stay where they are, and a step can still be read off them
    network = SMALL.network(torch.float64)
    step = contestants._singd("dense")(network, contestants.Setting(SMALL, setting.damping, lr, every))
    batch = SMALL.batch(0, torch.float64)
    for _ in range(600):
        step(*batch)
    before = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    step(*batch)
    after = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    root = setting.damping**0.5
    expected = peers.written_out(layers, [(root, root)] * len(layers))
    torch.testing.assert_close((before - after) / lr, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_shares_are_of_the_paper_s_periods():
    shares = {
        name: {kind: round(500 * share) for kind, share in c.shares().items()}
        for name, c in contestants.CONTESTANTS.items()
    }
    assert shares["SGD"] == {"plain": 500}
    assert shares["K-FAC"] == {"inverse": 2, "plain": 480, "factors": 18}
    assert shares["singd dense"] == {"inverse": 20, "plain": 480}
    assert shares["B-KFAC-C"] == {"correction": 1, "plain": 480, "factors": 16, "Brand": 2, "inverse": 1}


def test_the_mean_is_weighted_with_the_shares():
    rows = [("SGD", 1, k, "plain", 1e-3) for k in range(16)]
    seconds = {"plain": 2e-3, "factors": 4e-3, "inverse": 104e-3}
    rows += [("K-FAC", 1, k, kind, s) for k, (kind, s) in enumerate(seconds.items())]
    times = pd.DataFrame(rows, columns=["optimizer", "round", "k", "kind", "seconds"])
    table = peers.summary(times, contestants.CONTESTANTS).set_index(["optimizer", "kind"])
    mean = (480 * 2 + 18 * 4 + 2 * 104) / 500
    assert table.ms["K-FAC", "mean"] == pytest.approx(mean) == table.ratio["K-FAC", "mean"]


def test_every_kind_of_step_is_timed_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "Problem", lambda: SMALL)
    without = []
    for library in contestants.PACKAGES:
        try:
            contestants.peer(library)
        except InputError:
            without.append(library)
    out = tmp_path / "out"
    arguments = ["--rounds", "1", "--out", str(out)] + (["--without", *without] if without else [])
    assert peers.main(arguments) == 0
    rows = pd.read_csv(out / "peers.csv")
    assert (rows.groupby("optimizer").size() == contestants.CYCLE).all()
    for name, kinds in rows.groupby("optimizer").kind.unique().map(set).items():
        assert kinds == set(contestants.CONTESTANTS[name].shares())
    names = {path.name for path in out.iterdir()}
    assert names == {"peers.csv", "summary.csv", "steps.csv", "peers.md", "config.json", "environment.json"}


def test_a_missing_peer_is_one_line_that_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "asdl", None)
    error = refused(capsys, peers.main, "--out", tmp_path / "out")
    assert "kfacerr[peers]" in error and "--without asdl" in error
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "singd", None)
    ours = peers.chosen(["asdl", "singd"])
    assert {contestant.library for contestant in ours.values()} == {""}
