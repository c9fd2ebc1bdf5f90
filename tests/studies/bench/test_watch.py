"""The overhead of `watch`: the benchmark runs, and says what it compared."""

import re

from studies.bench.watch import main


def test_it_prints_a_ratio_for_each_model(capsys):
    assert main(["--steps", "2", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(re.search(r"batch \d+: .* ms a step, \d+\.\d\d times as long when watched", line) for line in lines)


def test_no_steps_are_refused(capsys):
    assert main(["--steps", "0"]) == 2
    assert "steps" in capsys.readouterr().err
