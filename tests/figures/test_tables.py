"""Tables 1 and 2 from results with known answers, and what is read for them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from figures.tables import (
    PAPER_TABLE_1,
    PAPER_TABLE_2,
    breakdown_table,
    epoch_times,
    epochs_to,
    not_used_in,
    note,
    paper_name,
    read_errors,
    table_1,
    table_1_markdown,
    table_1_times,
    table_2,
    table_2_markdown,
    targets_by_rule,
    window_settings,
)
from kfacerr.algorithms import SEVEN
from kfacerr.exceptions import InputError
from kfacerr.metrics import METRICS
from tests.figures.error_tables import curves, epochs_of, frame, times_of

TARGETS = (0.5, 0.7, 0.9)

# ------------------------------------------------------------------------------------------------- Table 1


def test_table_1_averages_the_last_window_over_iterations_and_gives_mean_and_sd_over_seeds():
    def value(curve, seed, epoch):
        return curve * (1 + seed) * (1 if epoch == 30 else 100)

    content = curves()
    table = table_1(frame(content, seeds=3, value=value)).set_index("algorithm")
    assert set(table.epoch) == {30}
    assert list(table.index) == list(SEVEN)
    for algorithm in SEVEN:
        for i, metric in enumerate(METRICS, 1):
            average = content[algorithm, metric].mean()
            assert table.loc[algorithm, f"({i}) mean"] == pytest.approx(2 * average)
            assert table.loc[algorithm, f"({i}) SD"] == pytest.approx(average)  # of 1, 2 and 3 times it


def test_table_1_has_the_papers_numbers_beside():
    table = table_1(frame(curves())).set_index("algorithm")
    row = table.loc["B-R-KFAC"]
    assert [row[f"({i}) paper"] for i in range(1, 5)] == [3.40e-3, 1.81e-2, 0.40e-1, 0.74e-2]
    assert row["paper t_epoch (s)"] == 59.5
    assert np.isnan(table.loc["R-KFAC T_inv=300", "(1) paper"])  # the paper's table leaves it out
    assert set(PAPER_TABLE_1) == set(SEVEN) - {"R-KFAC T_inv=300"}


def test_table_1_of_one_seed_has_no_sd():
    assert table_1(frame(curves(), seeds=1))["(1) SD"].isna().all()


def test_table_1_names_what_is_not_used_where_there_is_no_room(tmp_path):
    errors = frame(curves())
    window = {"epoch": 30, "rank": 230, "columns": 256, "phi": [0.05]}
    (tmp_path / "config.json").write_text(json.dumps({"windows": [window]}))
    spectra = pd.DataFrame({"epoch": 30, "factor": ["A"] * 1025 + ["G"] * 486})
    spectra["index"] = spectra.groupby("factor").cumcount()
    notes = not_used_in(tmp_path, errors, spectra)
    assert [note.split(":")[0] for note in notes] == ["B-KFAC", "B-R-KFAC", "B-KFAC-C"]
    text = table_1_markdown(table_1(errors), "epoch 30", "", 2, notes)
    said = "- B-KFAC: r + n >= d (230 + 256 >= 486) for G, where it saves nothing: not used there, R-KFAC is\n"
    assert said in text and max(map(len, text.splitlines())) <= 100
    spectra.loc[len(spectra)] = {"epoch": 30, "factor": "G", "index": 486}
    assert not_used_in(tmp_path, errors, spectra) == not_used_in(tmp_path, errors, None) == []


def test_table_1_fits_100_columns_and_names_the_epoch_and_both_numbers():
    def value(curve, seed, epoch):
        return curve * (1 + seed)

    times = times_of({name: [100.0, 104.0] for name in SEVEN}, table=1)
    table = table_1(frame(curves(), seeds=3, value=value), times)
    text = table_1_markdown(table, "epoch 30", "CIFAR-10 (JPEG-75)", 3)
    assert max(map(len, text.splitlines())) <= 100
    assert "epoch 30, mean ± SD over 3 seeds" in text and "nan" not in text
    lines = text.splitlines()
    ours = next(i for i, line in enumerate(lines) if line.startswith("| B-R-KFAC"))
    mean = 2 * 100 * curves()["B-R-KFAC", "inverse_A"].mean()
    assert [cell.strip() for cell in lines[ours].split("|")[2:3]] == [f"{mean:.3g} ± {mean / 2:.2g}"]
    assert lines[ours].split("|")[6].strip() == "102 ± 2.8"
    paper = [cell.strip() for cell in lines[ours + 1].split("|")[1:7]]
    assert paper == ["- paper", "0.34", "1.81", "4", "0.74", "59.5"]


# ------------------------------------------------------------------------------------------------- Table 2


@pytest.mark.parametrize(
    ("driver", "T_updt", "paper"),
    [
        ("R-KFAC T_inv=20", 20, "R-KFAC T_inv=25"),
        ("R-KFAC T_inv=25", 25, "R-KFAC T_inv=25"),
        ("R-KFAC T_inv=10", 20, "R-KFAC T_inv=10"),
        ("B-KFAC", 20, "B-KFAC"),
        ("SGD", 20, "SGD"),
    ],
)
def test_a_period_that_is_the_updates_has_the_papers_name(driver, T_updt, paper):
    assert paper_name(driver, T_updt) == paper


def test_the_short_period_stands_beside_the_papers():
    curves = {"R-KFAC": [[0.95]], "R-KFAC T_inv=6": [[0.95]]}
    times = times_of({"R-KFAC": [2.0], "R-KFAC T_inv=6": [3.0]})
    row = table_2(epochs_of(curves), times, TARGETS, 6).set_index("optimizer").loc["R-KFAC T_inv=6"]
    assert row["t_epoch /R-KFAC"] == 1.5
    assert row["t_epoch paper/R-KFAC"] == pytest.approx(53.3 / 47.7)
    assert row["paper hits, of 10"] == PAPER_TABLE_2["R-KFAC T_inv=25"][4]
    assert "R-KFAC T_inv=6" in table_2_markdown(table_2(epochs_of(curves), times, TARGETS, 6), TARGETS, "x")


CURVES = {
    "R-KFAC": [[0.4, 0.6, 0.8, 0.95], [0.4, 0.45, 0.6, 0.8]],
    "B-KFAC": [[0.6, 0.8, 0.95, 0.9], [0.4, 0.6, 0.8, 0.85]],
}


def test_a_target_is_reached_at_the_first_epoch_above_it():
    epochs = epochs_of({"SGD": [[0.5, 0.6, 0.4, 0.7]]})
    assert [epochs_to(epochs, target) for target in (0.4, 0.5, 0.6)] == [1, 2, 4]
    assert np.isnan(epochs_to(epochs, 0.7))


def test_table_2_has_means_deviations_hits_and_ratios():
    table = table_2(epochs_of(CURVES), times_of({"R-KFAC": [2.0, 4.0], "B-KFAC": [1.5, 1.5]}), TARGETS, 25)
    r, b = (table[table.optimizer == name].iloc[0] for name in ("R-KFAC", "B-KFAC"))
    assert (r["t_epoch"], r["t_epoch SD"]) == (3.0, pytest.approx(2**0.5))
    assert (r["t_acc>0.5"], r["t_acc>0.5 SD"]) == (2.5 * 3, pytest.approx(3 * 0.5**0.5))  # epochs 2 and 3
    assert (r["N_acc>0.7"], b["N_acc>0.7"]) == (3.5, 2.5)
    assert (r["hits 0.9"], r["t_acc>0.9"]) == (1, 12.0)  # over the run that reaches it
    assert (r["hits 0.5"], b["hits 0.5"]) == (2, 2)
    assert b["t_acc>0.5 /R-KFAC"] == pytest.approx((1.5 * 1.5) / 7.5)
    assert b["t_epoch paper/R-KFAC"] == pytest.approx(46.3 / 47.7)
    assert b["N_acc>0.7 paper/R-KFAC"] == pytest.approx(28.6 / 28.9)
    assert b["best accuracy"] == pytest.approx((0.95 + 0.85) / 2)
    assert set(table.clock) == {"alone"}


def test_without_times_taken_alone_the_jobs_own_clocks_stand_in():
    times = epoch_times(epochs_of(CURVES), times_of({"B-KFAC": [1.5]}))
    assert times.loc["R-KFAC", ["mean", "clock"]].tolist() == [10.0, "in jobs"]
    assert times.loc["B-KFAC", ["mean", "clock"]].tolist() == [1.5, "alone"]


def test_a_target_that_no_run_reaches_has_no_time():
    table = table_2(epochs_of({"SGD": [[0.1]]}), times_of({"SGD": [1.0]}), TARGETS, 25)
    assert table["t_acc>0.5"].isna().all() and table["hits 0.5"].tolist() == [0]


def test_table_1s_times_stand_beside_the_papers():
    times = table_1_times(times_of({"K-FAC T_inv=50": [6.0, 8.0], "R-KFAC T_inv=50": [2.0, 2.0], "SGD": [1.0]}))
    exact = times.set_index("algorithm").loc["K-FAC T_inv=50"]
    assert exact["/R-KFAC T_inv=50"] == 3.5
    assert exact["paper /R-KFAC T_inv=50"] == pytest.approx(169 / 58.5)
    assert len(times) == 2


def test_the_breakdown_is_a_mean_over_rounds():
    rows = [(1, "B-KFAC", 0, "other", 4.0), (2, "SGD", 0, "other", 1.0), (2, "SGD", 1, "other", 3.0)]
    rows.append((2, "SGD", 0, "application", 5.0))
    table = breakdown_table(pd.DataFrame(rows, columns=["table", "driver", "round", "part", "seconds"]))
    first, second = table.to_dict("records")
    assert first == {"driver": "SGD", "application": 5.0, "other": 2.0, "total": 7.0}
    assert (second["driver"], second["total"]) == ("B-KFAC (Table 1's periods)", 4.0)


def test_targets_by_rule_follow_their_rule():
    pilot = epochs_of({"SGD": [[0.2, 0.61]], "R-KFAC": [[0.3, 0.704]], "B-KFAC": [[0.9, 0.5]]})
    assert targets_by_rule(pilot) == (0.6, 0.65, 0.7)


# ----------------------------------------------------------------------------------------------- config.json


def test_a_bound_may_be_infinite_and_an_error_may_not(tmp_path: Path):
    path = tmp_path / "monitor.csv"
    rows = [("FD", 0, metric, 0.1, 1, 0) for metric in METRICS]
    columns = ["algorithm", "k", "metric", "value", "epoch", "seed"]
    bound = ("FD", 0, "certified_A", np.inf, 1, 0)
    pd.DataFrame([*rows, bound], columns=columns).to_csv(path, index=False)
    assert len(read_errors(path)) == 5
    pd.DataFrame([*rows, (*bound[:2], METRICS[0], *bound[3:])], columns=columns).to_csv(path, index=False)
    with pytest.raises(InputError, match=r"monitor\.csv: column 'value' is inf in line 6"):
        read_errors(path)


def test_figures_quote_what_config_says(tmp_path: Path):
    window = {"epoch": 8, "start": 360, "rank": 28, "columns": 32, "phi": [0.1, 0.05]}
    config = {"data": "digits", "setting": "FC layer 1024-128", "windows": [window]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert note(tmp_path, 2) == "digits, FC layer 1024-128, mean of 2 seeds, band: their range"
    assert window_settings(tmp_path) == {8: window}
    (tmp_path / "config.json").write_text("[")
    assert note(tmp_path, 1) == "" and window_settings(tmp_path) == {}
