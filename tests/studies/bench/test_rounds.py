"""The benchmarks' harness: who runs when, what is timed, and ratios from times with known answers."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from studies.bench import rounds
from studies.bench.rounds import in_turns, peak, ratios

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `spend` moves."""
    now = [0.0]
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    return spend


def test_ways_take_turns_on_the_same_input_and_only_their_runs_are_timed(clock):
    seen = []

    def way(name, seconds):
        def prepare(given):
            clock(100)
            seen.append((name, given))
            yield "one", lambda: clock(seconds)
            clock(100)
            yield "two", lambda: clock(2 * seconds)

        return prepare

    times = in_turns({"a": way("a", 1), "b": way("b", 3)}, 2, CPU, fresh=lambda round: round)
    assert seen == [("a", -1), ("b", -1), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]  # round -1 warms up
    assert list(times.columns) == ["way", "round", "part", "seconds", "load", "note"]
    found = [tuple(row) for row in times[["way", "round", "part", "seconds"]].itertuples(index=False)]
    assert found == [
        (way, round, part, seconds)
        for round in (0, 1)
        for way, one in (("a", 1), ("b", 3))
        for part, seconds in (("one", one), ("two", 2 * one))
    ]


def test_what_is_slow_runs_in_two_rounds(clock):
    ways = {"fast": lambda _: [("", lambda: clock(1))], "slow": lambda _: [("", lambda: clock(10))]}
    times = in_turns(ways, 5, CPU, budget=9)
    assert times.groupby("way").size().to_dict() == {"fast": 5, "slow": 2}


def test_what_does_not_fit_is_a_note_and_stops_nothing():
    def fails(given):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 4 GiB")

    times = in_turns({"large": fails, "small": lambda _: [("", lambda: None)]}, 3, CPU)
    assert times.groupby("way").size().to_dict() == {"large": 1, "small": 3}
    note = times[times.way == "large"].note.item()
    assert note == "CUDA out of memory. Tried to allocate 4 GiB"
    assert np.isnan(times[times.way == "large"].seconds.item())


def test_ratios_are_of_times_of_one_round():
    rows = [
        ("x", way, round, "", s)
        for way, all_ in (("a", (1, 2, 4)), ("b", (2, 8, 4)))
        for round, s in enumerate(all_)
    ]
    rows += [("x", "c", 0, "", 3.0)]
    times = pd.DataFrame(rows, columns=["task", "way", "round", "part", "seconds"])
    table = ratios(times).set_index("way")
    assert table.base.tolist() == ["a"] * 3 and table.task.tolist() == ["x"] * 3
    assert table.loc["b", ["rounds", "seconds", "ratio", "low", "high", "shortest"]].tolist() == [
        3,
        2,
        2,
        1.5,
        3,
        2,
    ]
    assert table.loc["c", ["rounds", "ratio", "shortest"]].tolist() == [1, 3, 3]
    assert ratios(times, {"b": "b"}).set_index("way").loc["b", "ratio"] == 1


def test_the_peak_is_what_a_call_adds():
    taken = peak(lambda: np.ones(2**23), CPU)  # 64 MiB
    assert np.isnan(taken) or 60 < taken < 100


def test_tables_are_written_with_the_environment(tmp_path):
    about = rounds.write(tmp_path, {"times": pd.DataFrame({"seconds": [0.123456789]})})
    assert (tmp_path / "times.csv").read_text() == "seconds\n0.12345679\n"
    assert json.loads((tmp_path / "environment.json").read_text()) == about
