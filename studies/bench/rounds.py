"""The one harness of all benchmarks: ways to the same end take turns, and ratios are of times of one round.

Jobs that run side by side share memory, caches and turbo clocks; here nothing else of ours runs, and a disturbance
from outside meets all ways of a round alike. A ratio is of times of one round; given are its median and quartiles
over the rounds, and beside it the ratio of the shortest times, which other work on the machine disturbs least.
"""

import ctypes
import gc
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch

from kfacerr.files import write_csv, write_text
from studies.environment import environment, synchronize

__all__ = ["Prepare", "Run", "in_turns", "peak", "quartiles", "ratios", "timed", "write"]

Run = Callable[[], Any]
Prepare = Callable[[Any], Iterable[tuple[str, Run]]]
"""A way: given a round's input, yields what is to be timed, part by part; what it does in between is not timed."""

COLUMNS = ["way", "round", "part", "seconds", "load", "note"]


def timed(run: Run, device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(
    ways: Mapping[str, Prepare],
    rounds: int,
    device: torch.device,
    *,
    fresh: Callable[[int], Any] = lambda round: None,
    warm_up: int = 1,
    budget: float = float("inf"),
) -> pd.DataFrame:
    """Rounds in which every way takes its turn on the same input.

    Args:
        ways: by name.
        rounds: how many.
        device: whose work is waited for.
        fresh: the input of a round.
        warm_up: rounds before the first, which are not timed.
        budget: seconds of a way, after which it runs in two rounds at least and in no more.

    Returns:
        Columns way, round, part, seconds, load (of the machine) and note. What does not fit into the memory has
        one row, whose note says so, and stops nothing else.
    """
    rows: list[tuple[str, int, str, float, float, str]] = []
    spent = dict.fromkeys(ways, 0.0)
    for round in range(-warm_up, rounds):
        given = fresh(round)
        for name in [name for name, seconds in spent.items() if seconds <= budget or round < 2]:
            try:
                for part, run in ways[name](given):
                    seconds = timed(run, device)
                    if round >= 0:
                        spent[name] += seconds
                        rows.append((name, round, part, seconds, os.getloadavg()[0], ""))
            except (torch.OutOfMemoryError, MemoryError) as error:
                rows.append((name, round, "", float("nan"), float("nan"), " ".join(str(error).split())[:80]))
                del spent[name]
    return pd.DataFrame(rows, columns=COLUMNS)


def quartiles(values: pd.Series) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    middle, low, high = values.quantile([0.5, 0.25, 0.75])
    return float(middle), float(low), float(high)


def ratios(times: pd.DataFrame, bases: Mapping[str, str] = MappingProxyType({})) -> pd.DataFrame:
    """Every way's time over that of its base, in the rounds that have both, by part.

    Args:
        times: of `in_turns`, with further columns such as task and d, which are kept apart.
        bases: what a way is compared with, where that is not the first way there is.

    Returns:
        The further columns, part, way, base, rounds, seconds (shortest), ratio (median), low and high (quartiles)
        and shortest (the ratio of the shortest times).
    """
    further = [name for name in times if name not in COLUMNS]
    rows = []
    for key, group in times.groupby([*further, "part"], sort=False):
        table = group.pivot(index="round", columns="way", values="seconds")
        for way in group.way.unique():
            base = bases.get(way, group.way.iloc[0])
            both = table[[way]].assign(base=table[base]).dropna()
            shortest = both[way].min() / both["base"].min()
            middle, low, high = quartiles(both[way] / both["base"])
            rows.append((*key, way, base, len(both), both[way].min(), middle, low, high, shortest))
    names = [*further, "part", "way", "base", "rounds", "seconds", "ratio", "low", "high", "shortest"]
    return pd.DataFrame(rows, columns=names)


def peak(run: Run, device: torch.device) -> float:
    """MiB that one call adds at its peak, its result included; NaN where that cannot be told (not Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _ = run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError):
        return float("nan")
    _ = run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def write(out: Path, tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """The tables as CSVs, and environment.json, which is returned."""
    for name, frame in tables.items():
        write_csv(out / f"{name}.csv", frame)
    about = environment()
    write_text(out / "environment.json", json.dumps(about, indent=2) + "\n")
    return about
