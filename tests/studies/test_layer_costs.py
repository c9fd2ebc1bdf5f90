"""The table on paper: its numbers are `Process.cost`'s, and it comes by one command."""

import pytest

from kfacerr.algorithms import Algorithm
from kfacerr.process import Settings
from studies.layer_costs import Setting, main, markdown, table
from tests.studies.helpers import refused


def test_alone_it_is_the_processes_own_cost():
    setting = Setting(tokens=512, rank=64)
    frame = table(setting).set_index(["algorithm", "d"])
    cost = Algorithm("N-KFAC").process(Settings(rank=64), "A").cost(8192, 512)
    row = frame.loc["N-KFAC", 8192]
    assert row.GiB == pytest.approx(4 * cost.numbers / 2**30)
    assert row.Tflop == pytest.approx(cost.update / 1e12)
    cost = Algorithm("R-KFAC").process(Settings(rank=64, T_inv=250), "A").cost(8192, 512)
    assert frame.loc["R-KFAC", 8192].Tflop == pytest.approx((cost.update + cost.heavy / 10) / 1e12)


def test_a_sketch_is_linear_in_d_and_sends_no_columns():
    few, many = (table(Setting(tokens=n)).set_index(["algorithm", "d"]) for n in (1024, 8192))
    sent = [frame.loc["N-KFAC"]["GB sent"] for frame in (few, many)]
    assert sent[0].equals(sent[1])
    column = many.loc["B-KFAC"]["GB sent"] / few.loc["B-KFAC"]["GB sent"]
    assert column.to_numpy() == pytest.approx(8.0)
    growth = few.loc["N-KFAC", 131072] / few.loc["N-KFAC", 65536]
    assert growth[["GiB", "Tflop", "GB sent"]].to_numpy() == pytest.approx(2.0, rel=0.02)


def test_the_command_prints_and_writes_it(tmp_path, capsys):
    assert main(["--tokens", "64", "--out", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "o" / "layers.md").read_text() == markdown(table(Setting(tokens=64))) + "\n"
    assert (tmp_path / "o" / "layers.csv").read_text().count("\n") == 21
    assert "--devices must be at least 1" in refused(capsys, main, "--devices", 0)
