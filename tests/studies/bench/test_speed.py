"""The speed study runs in miniature and writes its files; its sums are what they say."""

import json

import pandas as pd
import pytest

from studies.bench import speed, tasks
from tests.studies.helpers import refused

SIZES = (64, 96, 128)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed")
    assert speed.main(["--quick", "--out", str(out)]) == 0
    return out


def test_the_study_writes_its_files(out):
    for name in (
        "times.csv",
        "ratios.csv",
        "exponents.csv",
        "memory.csv",
        "speed.pdf",
        "speed.png",
    ):
        assert (out / name).stat().st_size > 0
    assert "torch_threads" in json.loads((out / "environment.json").read_text())
    assert "## Growth with d" in (out / "speed.md").read_text()


def test_every_way_is_measured_at_every_size_in_every_round(out):
    times = pd.read_csv(out / "times.csv")
    counted = times.groupby(["task", "d"]).way.agg(["nunique", "size"])
    parts = {"layer step": 3}
    assert counted["nunique"].to_dict() == {
        **{("update", d): 14 for d in SIZES},
        **{("application", d): 3 for d in SIZES},
        **{("layer step", d): 3 for d in SIZES},
        ("study step", 64): 3,
    }
    for (task, d), row in counted.iterrows():
        assert row["size"] == 2 * parts.get(task, 1) * row["nunique"], (task, d)
    assert (times.seconds > 0).all() and times.note.isna().all()
    table = pd.read_csv(out / "ratios.csv")
    assert (table[table.way == table.base].ratio == 1).all()
    assert (table.low <= table.ratio).all() and (table.ratio <= table.high).all()
    assert set(table[table.task == "layer step"].part.fillna("")) == {"", "forward", "backward", "step()"}
    assert (table[table.way == tasks.NP_BRAND].base == tasks.NP_FLOOR).all()


def test_goals_are_judged_where_their_sizes_were_measured():
    seconds = {tasks.BRAND: 2.0, tasks.FLOOR: 1.0, tasks.QR: 5.0}
    rows = [("update", 2048, way, round, "", s) for way, s in seconds.items() for round in range(3)]
    found = speed.goals(pd.DataFrame(rows, columns=speed.TIMES)).set_index("goal")
    assert list(found.d) == [2048, 2048]
    brand, qr = found.iloc[0], found.iloc[1]
    assert (brand.bound, brand.ratio, brand.met) == (2.5, 2.0, "yes")
    assert (qr.bound, qr.ratio, qr.met) == (2.0, 2.5, "yes")


def test_tasks_can_be_chosen(tmp_path):
    out = tmp_path / "out"
    assert speed.main(["--quick", "--tasks", "application", "--out", str(out)]) == 0
    assert set(pd.read_csv(out / "times.csv").task) == {"application"}


def test_sizes_that_do_not_fit_are_refused(tmp_path, capsys):
    line = refused(capsys, speed.main, "--quick", "--d", 16, "--out", tmp_path / "x")
    assert "d > r + n = 20, got 16" in line
