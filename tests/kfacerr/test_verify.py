"""`kfacerr verify`: true claims pass on a recording, broken ones are caught, and bad input is one line."""

import h5py
import numpy as np
import pytest

import kfacerr.verify as verify
from kfacerr import processes, propositions
from kfacerr.certificate import Certificate
from kfacerr.cli import main
from kfacerr.exceptions import InputError
from kfacerr.lowrank import LowRank
from kfacerr.processes import Brand
from kfacerr.propositions import Inequality
from kfacerr.recorder import RecordingWriter
from kfacerr.recording import Recording
from kfacerr.stream import Step
from kfacerr.verdict import STATEMENTS
from kfacerr.verify import verify_layer
from tests.strategies import stream

SHAPES = {"fc": (30, 12, 3), "wide": (400, 6, 8)}
"""Layer: d_A, d_G (r + n >= d for "wide", and n > d), n."""


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "run.h5"
    rng = np.random.default_rng(0)
    with RecordingWriter(path) as writer:
        for layer, (d_A, d_G, n) in SHAPES.items():
            writer.add_layer(layer, d_A=d_A, d_G=d_G, n=n, bias=False, batch_size=n, update_every=10, windows=[])
            A, G = (stream(rng, d=d, n=n, steps=24, decay="slow decay", dtype=np.float32) for d in (d_A, d_G))
            for i in range(24):
                writer.append(layer, Step(5 * i, A[i], G[i], i % 2 == 0))
    return path


@pytest.fixture
def layer(recording):
    with Recording(recording) as opened:
        yield opened.layer("fc")


EVERY = (
    "(11) part 1",
    "(11) part 2",
    "(12)",
    "(12) p.s.d.",
    "(13)",
    "(13) p.s.d.",
    "(14) with (15)",
    "(14) with (16)",
    "(17)",
    "(18)",
    "(19)",
    "§3.3 overwriting",
    "§3.3 M_B, not B",
    "§4.1 B-update or nothing",
    "(10) by the Brand process",
    "footnote 11",
    "footnote 11 drop",
    "footnote 11 blocks",
    "certificate: nuclear norm = t - sum D",
    "certificate: M - M~ p.s.d.",
    "certificate: Frobenius",
    "certificate: spectral",
    "certificate: inverse, spectral",
    "certificate: inverse, Frobenius",
    "FD: M - M~ <= mu I",
    "whole stream: W^T (M - M~) W p.s.d.",
    "whole stream: trace by Hutchinson",
    "whole stream: spectral, from below",
    "whole stream: Frobenius, from below",
    "whole stream: nuclear, from below",
)


@pytest.mark.parametrize("name", list(SHAPES))
def test_every_claim_holds_and_is_there(recording, name):
    with Recording(recording) as opened:
        report = verify_layer(opened.layer(name))
    assert report.holds, [f for f in report.findings if not f.holds]
    assert {finding.claim for finding in report.findings} == set(EVERY)
    assert sorted(EVERY) == sorted(claim for statement in STATEMENTS for claim in statement.claims), (
        "each is in words"
    )
    assert all(finding.instances >= 2 and finding.where for finding in report.findings)
    assert all("iterations 0-" in line and "all 12 updates" in line for line in report.coverage)


def test_the_middle_of_training_is_covered_and_named(layer):
    report = verify_layer(layer, stretches=3, length=2, rank=2)
    for line in report.coverage:
        assert "iterations 0-10 (2 updates), iterations 50-60 (2 updates), iterations 100-110 (2 updates)" in line
    places = [finding.where for finding in report.findings]
    assert any("stretch from" in place for place in places) and any("iteration " in place for place in places)
    total = sum(f.instances for f in report.findings if f.claim == "whole stream: W^T (M - M~) W p.s.d.")
    assert total == 2 * 12, "every update of both factors"


def test_the_same_seed_gives_the_same_report(layer):
    assert verify_layer(layer, seed=3) == verify_layer(layer, seed=3)


def test_the_whole_stream_is_seen_well_enough_to_be_worth_it(layer):
    """The estimates from below are near the certified bounds, not only below them."""
    found = {finding.claim: finding for finding in verify_layer(layer).findings}
    for claim in ("spectral", "Frobenius", "nuclear"):
        assert 0 <= found[f"whole stream: {claim}, from below"].slack < 0.7
    assert found["whole stream: trace by Hutchinson"].slack < 1


# ------------------------------------------------------------------------------------------ what is broken


def _fails(recording, *options) -> list[str]:
    with Recording(recording) as opened:
        report = verify_layer(opened.layer("fc"), **dict(options))
    return [finding.claim for finding in report.findings if not finding.holds]


def test_a_process_that_overestimates_is_caught(recording, monkeypatch):
    """M_B a few percent too large: the error is not p.s.d. any more, on stretches and on the whole stream."""
    reduced = Brand._reduced

    def tampered(self, kept, D, decay):
        D, removed = reduced(self, kept, D, decay)
        return 1.05 * D, removed

    monkeypatch.setattr(Brand, "_reduced", tampered)
    failed = _fails(recording)
    assert "certificate: M - M~ p.s.d." in failed
    assert "whole stream: W^T (M - M~) W p.s.d." in failed


def test_a_process_that_carries_other_modes_is_caught(recording, monkeypatch):
    """Still below M and certified as what it is, but not (10)."""
    carried = processes.carried

    def wrong(X, r, A, weight):
        return carried(LowRank(X.U[:, ::-1], X.D[::-1]), r, A, weight)

    monkeypatch.setattr(processes, "carried", wrong)
    assert "(10) by the Brand process" in _fails(recording)


def test_a_certificate_that_promises_too_much_is_caught(recording, monkeypatch):
    after = Certificate.after_brand

    def bragging(self, *args):
        honest = after(self, *args)
        return Certificate(
            **vars(honest) | {"frobenius": 0.3 * honest.frobenius, "spectral": 0.3 * honest.spectral}
        )

    monkeypatch.setattr(Certificate, "after_brand", bragging)
    failed = _fails(recording)
    assert "certificate: Frobenius" in failed and "certificate: spectral" in failed
    assert "whole stream: Frobenius, from below" in failed


def test_a_wrong_trace_is_caught_by_hutchinson(recording, monkeypatch):
    after = Certificate.after_brand

    def wrong(self, *args):
        honest = after(self, *args)
        return Certificate(**vars(honest) | {"nuclear": 0.0 * honest.nuclear})

    monkeypatch.setattr(Certificate, "after_brand", wrong)
    failed = _fails(recording)
    assert "certificate: nuclear norm = t - sum D" in failed and "whole stream: nuclear, from below" in failed


def test_a_false_claim_fails_at_the_command_line(recording, monkeypatch, capsys):
    """(18) with half its right side: exit status 1, and the table says which and where."""
    honest = propositions.brand_term_bound

    def halved(t, j):
        return [Inequality(c.name, c.small, 0.1 * c.large, c.scale, c.where, c.unit) for c in honest(t, j)]

    monkeypatch.setattr(propositions, "brand_term_bound", halved)
    assert main(["verify", str(recording), "--layer", "fc", "--rank", "1", "-v"]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("| (18)")]
    assert "NO" in line and "stretch from" in line
    (line,) = [line for line in out.splitlines() if line.startswith("FAILS")]
    assert "Prop. 4.2" in line and "worst: (18), " in line and "stretch from" in line
    assert "1 claims fail" in out


# ------------------------------------------------------------------------------------------ command line


def test_all_layers_are_verified_by_default(recording, capsys):
    assert main(["verify", str(recording), "--stretches", "1", "--length", "2"]) == 0
    out = capsys.readouterr().out
    for name in SHAPES:
        assert f"layer {name}\n" in out
    assert "every claim holds" in out and "FAILS" not in out and "|" not in out, "no table unless asked for"
    assert out.count("holds  ") == len(SHAPES) * len(STATEMENTS)
    assert "all claims, densely and exactly, on iterations 0-10 (2 updates)" in out
    assert max(map(len, out.splitlines())) <= 115


def test_details_are_a_row_a_claim(recording, capsys):
    assert main(["verify", str(recording), "--layer", "fc", "--stretches", "1", "--length", "2", "-v"]) == 0
    out = capsys.readouterr().out
    assert out.count("| yes") == len(EVERY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "rank must be a whole number of at least 1"),
        (["--stretches", "0"], "stretches must be a whole number of at least 1"),
        (["--length", "0"], "length must be a whole number of at least 1"),
        (["--rho", "1"], "rho"),
        (["--phi", "nan"], "phi"),
        (["--seed", "-1"], "seed"),
        (["--layer", "conv"], "no layer 'conv'"),
    ],
)
def test_bad_options_are_one_line(recording, capsys, options, message):
    assert main(["verify", str(recording), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and "Traceback" not in captured.err


def test_bad_recordings_are_one_line(recording, tmp_path, capsys):
    assert main(["verify", str(tmp_path / "none.h5")]) == 2
    bad = tmp_path / "bad.h5"
    bad.write_bytes(recording.read_bytes())
    with h5py.File(bad, "r+") as file:
        file["layers/fc/A"][4, 0, 0] = np.nan
    assert main(["verify", str(bad), "--layer", "fc"]) == 2
    assert "iteration 20" in capsys.readouterr().err
    with h5py.File(bad, "r+") as file:
        file["layers/fc/update"][:] = 0
    assert main(["verify", str(bad), "--layer", "fc"]) == 2
    assert "at least two updates" in capsys.readouterr().err


def test_columns_beyond_the_reach_of_dense_matrices_are_verified(tmp_path):
    """d = 20000: a dense factor alone would take 3 GB."""
    path = tmp_path / "large.h5"
    rng = np.random.default_rng(1)
    with RecordingWriter(path) as writer:
        writer.add_layer("fc", d_A=20000, d_G=4, n=2, bias=False, batch_size=2, update_every=1, windows=[])
        root = rng.standard_normal((20000, 30)).astype(np.float32) * 0.8 ** np.arange(30, dtype=np.float32)
        for k in range(8):
            A = root @ rng.standard_normal((30, 2)).astype(np.float32)
            writer.append("fc", Step(k, A, rng.standard_normal((4, 2)).astype(np.float32)))
    with Recording(path) as opened:
        assert verify_layer(opened.layer("fc"), rank=3, stretches=2, length=3).holds


def test_a_wide_stream_is_checked_on_some_of_its_columns_and_says_so(tmp_path):
    """n >= d beyond ROWS: dense checks of all columns would cost d^3 each."""
    path = tmp_path / "wide.h5"
    rng = np.random.default_rng(2)
    d, n = verify.ROWS + 40, verify.ROWS + 90
    with RecordingWriter(path) as writer:
        writer.add_layer("conv", d_A=d, d_G=3, n=n, bias=False, batch_size=2, update_every=1, windows=[])
        for k in range(2):
            A = (0.9 ** np.arange(d))[:, None] * rng.standard_normal((d, n))
            writer.append("conv", Step(k, A.astype(np.float32), rng.standard_normal((3, n)).astype(np.float32)))
    with Recording(path) as opened:
        report = verify_layer(opened.layer("conv"), stretches=1)
    assert report.holds
    A, G = report.coverage
    assert A.count(f"on 50 of the {n} columns of each, drawn at random") == 2 and "drawn" not in G


@pytest.mark.parametrize(("d", "n", "rank"), [(16384, 256, 50), (300, 900, 50), (2000, 2000, 30), (4000, 90, 50)])
def test_dense_checks_have_at_most_rows_rows(d, n, rank):
    for steps in (2, 3):
        whole, few = verify._widths(d, n, rank, steps)
        assert rank + (steps + 1) * few <= verify.ROWS and few <= whole <= n
        assert whole == n or rank + n >= d


def test_a_process_without_certificate_claims_nothing(layer):
    process = Brand(rank=2, rho=0.9, T_brand=2)
    for k in range(2):
        process.update(k, np.eye(4)[:, :2], None)
    assert list(verify.certificate_claims(process, np.eye(4), 0.1, "")) == []
    with pytest.raises(InputError, match="rho"):
        verify_layer(layer, rho=0.0)
