"""The documentation's Python blocks run as they stand: one namespace a page, in a folder of their own."""

import re
from pathlib import Path

import pandas as pd
import pytest

from figures import ekfac
from figures.sketches import KEYS, means, report
from figures.tables import epochs_to, read_table
from kfacerr.metrics import METRICS
from studies.layer_costs import Setting, markdown
from studies.layer_costs import table as layer_costs
from studies.tasks.contestants import FAMILY as NAMES

FAMILY = list(NAMES)
DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "```python\n" in page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[tuple[int, str]]:
    """Each block with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text[: m.start(1)].count("\n"), m.group(1)) for m in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__page__"}
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_the_pages_that_should_have_code_have():
    assert {"tutorial.md", "own-process.md"} <= {page.name for page in PAGES}


def test_every_module_of_the_library_is_in_the_reference():
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    modules = {
        ".".join(path.with_suffix("").relative_to(DOCS.parent).parts).removesuffix(".__init__")
        for path in (DOCS.parent / "kfacerr").rglob("*.py")
        if path.name == "__init__.py" or not path.name.startswith("_")
    }
    assert modules == set(re.findall(r"automodule:: (\S+)", pages))


def test_the_tables_of_the_findings_are_those_of_the_csvs():
    folder = DOCS.parent / "figures" / "cifar10-small"
    frame = pd.concat(pd.read_csv(folder / f"{name}.csv.gz") for name in ("errors", "variants"))
    mean = frame.groupby(["algorithm", "epoch", "metric"]).value.mean()
    text = (DOCS / "findings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S*K-?FAC.*?) \| (min|trace) \| (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) >= 30
    for algorithm, continuation, epoch, values in rows:
        name = algorithm if continuation == "min" else f"{algorithm} continuation={continuation}"
        computed = [f"{mean[name, int(epoch), metric]:.3g}" for metric in METRICS]
        assert values.split(" | ") == computed, (algorithm, continuation, epoch)


def test_the_table_of_optimizers_in_the_findings_is_that_of_the_csvs():
    folder = DOCS.parent / "figures" / "optimizers-cifar10-small"
    epochs = pd.read_csv(folder / "epochs.csv")
    timing = pd.read_csv(folder / "timing.csv")
    t_epoch = timing[timing.table == 2].groupby("driver").t_epoch.mean()
    text = (DOCS / "findings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w =-]+) \| ([\d.]+)% \| (.+?) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert {name for name, *_ in rows} == set(epochs.optimizer)
    for name, best, reached, seconds in rows:
        runs = [run for _, run in epochs[epochs.optimizer == name].groupby("seed")]
        first = pd.Series([epochs_to(run, 0.45) for run in runs]).dropna()
        expected = f"{first.mean():.2g} ({len(first)} of {len(runs)})" if len(first) else "none"
        mean = 100 * sum(run.test_accuracy.max() for run in runs) / len(runs)
        assert abs(float(best) - mean) < 0.05 + 1e-9, name  # a tie may be rounded either way
        assert (reached, seconds) == (expected, f"{t_epoch[name]:.1f}"), name


def test_the_table_of_steps_in_the_findings_is_that_of_the_csv():
    summary = pd.read_csv(DOCS.parent / "figures" / "peers" / "summary.csv").set_index(["optimizer", "kind"])
    text = (DOCS / "findings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d*) ?\| (\d*) ?\| (\d+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert {row[0] for row in rows} == set(summary.index.get_level_values("optimizer"))
    for name, *values, ratio in rows:
        for kind, value in zip(("plain", "factors", "inverse", "mean"), values, strict=True):
            known = (name, kind) in summary.index
            assert value == (f"{summary.ms[name, kind]:.0f}" if known else ""), (name, kind)
        assert float(ratio) == pytest.approx(summary.ratio[name, "mean"], abs=0.05), name


def test_the_table_of_the_papers_layer_is_that_of_the_csvs():
    folder = DOCS.parent / "figures" / "paper-layer"
    frame = pd.concat([pd.read_csv(folder / f"{name}.csv.gz") for name in ("errors", "variants")])
    mean = frame.groupby(["epoch", "algorithm", "metric"]).value.mean()
    epochs = sorted(frame.epoch.unique())
    text = (DOCS / "findings.md").read_text(encoding="utf-8")
    (section,) = re.findall(
        r"^## The paper's layer at its true size.*?\n(.*?)^## ", text, re.MULTILINE | re.DOTALL
    )
    rows = re.findall(r"^\| ([\w-]*KFAC.*?|K-FAC.*?) \| (.*) \|$", section, re.MULTILINE)
    assert len(rows) == 14 * len(epochs)
    for i, (name, cells) in enumerate(rows):
        values = [mean[epochs[i // 14], name, metric] for metric in METRICS]
        assert cells.split(" | ") == [f"{value:.3g}" for value in values], name


def test_what_half_the_damping_costs_the_papers_layer_is_what_its_csvs_say():
    folder = DOCS.parent / "figures" / "paper-layer"
    frame = pd.concat([pd.read_csv(folder / f"{name}.csv.gz") for name in ("errors", "variants")])
    mean = frame.groupby(["epoch", "algorithm", "metric"]).value.mean().unstack()[list(METRICS)]
    text = " ".join((DOCS / "findings.md").read_text(encoding="utf-8").split())
    (section,) = re.findall(r"## The paper's layer at its true size(.*?) ## ", text)
    shown = re.findall(r"\| ([\w-]*KFAC[^|]*?|K-FAC[^|]*?) \|", section.partition("**At epoch 30**")[2])[:14]
    growth = (mean.loc[30] / mean.loc[15]).loc[shown].to_numpy()
    low, dense = growth[1:, [1, 3]], growth[0, [1, 3]]
    assert shown[0] == "K-FAC T_inv=50" and len(set(shown)) == 14
    assert (
        "have 1.6 to 2.4 times the error in (2) that they had at epoch 15, and 1.2 to 3.5 times in (4)" in section
    )
    assert [f"{x:.1f}" for x in (*low.min(axis=0), *low.max(axis=0))] == ["1.6", "1.2", "2.4", "3.5"]
    assert "stale exact K-FAC 1.3 and 1.5 times" in section and [f"{x:.1f}" for x in dense] == ["1.3", "1.5"]
    assert "gains 2% on B-KFAC in (1)-(3) and 6% in (4), at epoch 15 it was 25, 6, 10 and 10%" in section
    gains = [(mean.loc[epoch, "B-KFAC"] / mean.loc[epoch, "B-R-KFAC"] - 1) * 100 for epoch in (30, 15)]
    assert [round(x) for gain in gains for x in gain] == [2, 2, 2, 6, 25, 6, 10, 10]
    plain, rival = mean.loc[30, "N-KFAC"], mean.loc[30, "B-R-KFAC"]
    assert "with `min` by 3.5 and 3.4 times in (3) and (4), and worse by 1.4 and 2.6 in (2) and (1)" in section
    assert [f"{x:.1f}" for x in (rival / plain).iloc[[2, 3]]] == ["3.5", "3.4"]
    assert [f"{x:.1f}" for x in (plain / rival).iloc[[1, 0]]] == ["1.4", "2.6"]


def test_the_times_of_an_update_are_those_of_the_csv():
    """What the text says, way by way, of `figures/speed`."""
    ratios = pd.read_csv(DOCS.parent / "figures" / "speed" / "ratios.csv")
    value = ratios.set_index(["task", "d", "way"]).ratio
    text = " ".join((DOCS / "findings.md").read_text(encoding="utf-8").split())
    N, QR = (
        [f"{value['update', d, way]:.1f}" for d in ds]
        for way, ds in (
            ("N-KFAC", (1024, 4096, 8192, 16384, 65536, 131072)),
            ("Brand, QR form", (1024, 2048, 16384, 131072)),
        )
    )
    assert "takes 1.8 times a Brand update at $d$ = 1024, 2.1 at 4096, 2.9 at 8192 and 16384, 3.6 at 65536" in text
    assert "and 5.6 (two rounds) at 131072" in text and N == ["1.8", "2.1", "2.9", "2.9", "3.6", "5.6"]
    assert "takes 0.9 (d = 1024), 1.2 (2048), 2.9 (16384; goal 3) and 5.6 (131072) of Brand's" in text
    assert QR == ["0.9", "1.2", "2.9", "5.6"]
    assert "is 1.35 times its products at $d=16384$ (goal 1.3) and 5.2 at 2048 (goal 2.5)" in text
    floor = [1 / value["update", d, "GEMM floor"] for d in (16384, 2048)]
    assert floor == pytest.approx([1.35, 5.2], rel=0.01)
    for way, said in (("N-KFAC's GEMM floor", "0.4 to 3.1"), ("IncrementalPCA", "10 to 36")):
        between = value.xs(way, level="way")
        digits = 0 if way == "IncrementalPCA" else 1
        assert said == f"{between.min():.{digits}f} to {between.max():.{digits}f}" and said in text
    assert "step is 7.6 times faster than the dense evaluation" in text
    assert f"{value['study step', 2048, 'dense, eigh']:.1f}" == "7.6"


def test_the_table_of_widths_is_that_of_the_spectra():
    """Of every study along a training that is there."""
    figures = DOCS.parent / "figures"
    text = (DOCS / "mathematics" / "width.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w-]+) \| (\d+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \| \d+) \|$", text, re.MULTILINE))
    assert set(rows) == {path.parent.name for path in figures.glob("*/spectra.csv.gz")}
    for name, row in rows.items():
        spectra = pd.read_csv(figures / name / "spectra.csv.gz")
        spectra = spectra[spectra.factor == "G"]
        values = []
        for _, one in spectra.groupby(["seed", "epoch"]):
            w = one.eigenvalue.sort_values(ascending=False).to_numpy()
            theta, r = w[0] / w.sum(), round(220 / 2048 * len(w))
            values.append((theta, len(w) * w[r] / w.sum(), w[r] / w[0], (w > 0.1 * w[0]).sum()))
        mean = pd.DataFrame(values).mean()
        assert row == f"{len(w)} | {mean[0]:.3f} | {mean[1]:.2f} | {mean[2]:.3f} | {mean[3]:.0f}", name


def test_the_tables_of_sketches_in_the_findings_are_those_of_the_csvs():
    def words(line: str) -> str:
        return " ".join(line.split())

    known: set[str] = set()
    for run in ("digits", "cifar10-small", "fashion", "own", "flat"):
        folder = DOCS.parent / "figures" / "n-kfac" / run
        computed = report(means(read_table(folder / "errors.csv", (*KEYS, "draw", "epoch", *METRICS))))
        assert computed == (folder / "sketches.md").read_text(encoding="utf-8")
        known |= set(map(words, computed.splitlines()))
    text = (DOCS / "findings.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## N-KFAC and W-KFAC\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    rows = [line for line in section.splitlines() if line.startswith("|") and "KFAC" in line.split("|", 2)[2]]
    assert len(rows) >= 20
    assert [row for row in rows if words(row) not in known] == []


def test_the_tables_down_to_the_fisher_are_those_of_the_csv():
    folder = DOCS.parent / "figures" / "ekfac-digits"
    computed = ekfac.report(ekfac.means(read_table(folder / "ekfac.csv", tuple(ekfac.KEYS))))
    assert computed == (folder / "ekfac.md").read_text(encoding="utf-8")
    known = {" ".join(line.split()) for line in computed.splitlines()}
    text = (DOCS / "findings.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Down to the Fisher\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    rows = [line for line in section.splitlines() if line.startswith("|") and "---" not in line]
    assert len(rows) >= 13 and [row for row in rows if row not in known] == []


def test_the_tables_of_tasks_in_the_findings_are_those_of_the_csvs():
    folder = DOCS.parent / "figures" / "tasks"
    table = pd.read_csv(folder / "tasks.csv").set_index(["optimizer", "task"])
    found = pd.read_csv(folder / "correlations.csv").set_index(["task", "runs", "metric"])
    text = (DOCS / "findings.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## What the errors cost: tasks\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    first, second = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
        for lines in re.findall(r"^\|---.*?\n((?:\|.*\n)+)", section, re.MULTILINE)
    ]
    assert {name for name, *_ in first} == set(table.index.get_level_values("optimizer"))
    for name, *cells in first:
        losses = [f"{table.train_loss[name, task]:.3g}" for task in ("autoencoder", "transformer", "cifar10")]
        right = [table.test_accuracy[name, task] for task in ("mlp", "convnet", "transformer", "cifar10")]
        assert cells == [*losses, *(f"{100 * share:.1f}%" for share in right)], name
    assert len(second) == 6
    for task, runs, n, *cells in second:
        rows = [found.loc[task, runs, metric] for metric in METRICS]
        assert {str(int(row.n)) for row in rows} == {n}
        assert cells == [f"{row.spearman:.2f} (p {row.p:.1g})" for row in rows], (task, runs)


def test_the_search_of_the_recipes_is_that_of_the_csv():
    table = pd.read_csv(DOCS.parent / "figures" / "search" / "tasks.csv")
    losses = table.pivot(index="optimizer", columns="task", values="train_loss")[
        ["teacher", "manifold", "diabetes"]
    ]
    known = [[f"{loss:.3g}" for loss in row] for row in losses.to_numpy()]
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^### The same on other tasks\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|(.*)$", section, re.M)]
    assert len(rows) == 2 + 16 and all(row[1:] in known for row in rows[2:])
    R = losses.loc["R-KFAC rank=220 T_updt=10 T_inv=100 warm_up=True"]
    paper = losses.loc["R-KFAC rank=220 T_updt=25 T_inv=250 phi_lambda=0.1 continuation=min momentum=0"]
    assert "8, 1.6 and 36 times less loss" in section and [f"{x:.2g}" for x in paper / R] == ["8.2", "1.6", "36"]


def test_what_the_findings_say_of_tasks_is_so():
    folder = DOCS.parent / "figures" / "tasks"
    table = pd.read_csv(folder / "tasks.csv").set_index("optimizer")
    errors = pd.read_csv(folder / "errors.csv")
    bounds = {"transformer": (0.95, 0.99), "autoencoder": (0.77, 0.80), "cifar10": (0.21, 0.44)}
    for task, (low, high) in bounds.items():
        own = table[table.task == task]
        ratio = own.train_loss[FAMILY] / own.train_loss["AdamW"]
        assert low < ratio.min() and ratio.max() < high, task
    for task in ("mlp", "convnet"):
        own = table[table.task == task]
        assert own.train_loss[FAMILY].max() < own.train_loss["AdamW"]
        assert own.test_loss[FAMILY].min() > 1.7 and own.test_loss.drop(FAMILY).max() < 0.8
        assert own.test_accuracy.max() - own.test_accuracy.min() < 0.04
    for task in ("transformer", "cifar10"):
        own = table[table.task == task]
        assert own.train_high["K-FAC"] < own.train_low["R-KFAC"]
        assert own.test_accuracy[FAMILY].min() > own.test_accuracy["AdamW"]
    best = table.reset_index()[["task", "optimizer", "lr"]].merge(errors)
    cheap = best[(best.task == "cifar10") & (best.optimizer != "K-FAC")]
    for metric in METRICS:
        one = cheap[cheap.metric == metric]
        assert 0.515 < one["mean"].corr(one.train_loss, method="spearman") < 0.615


def test_the_table_of_a_language_models_layers_is_computed():
    computed = markdown(layer_costs(Setting()))
    assert computed in (DOCS / "mathematics" / "streaming.md").read_text(encoding="utf-8")
    assert computed in (DOCS.parent / "figures" / "n-kfac" / "layers.md").read_text(encoding="utf-8")


def test_the_table_of_dampings_is_that_of_the_csv():
    frame = pd.read_csv(DOCS.parent / "figures" / "cifar10-small" / "damping.csv.gz")
    value = frame[frame["rank"] == 29].set_index(["damping", "share", "metric"]).value
    text = (DOCS / "inspect.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (phi|mean|product) \| ([\d.]+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 6
    for kind, share, cells in rows:
        keys = [(kind, float(share), metric) for metric in (*METRICS, "condition")]
        assert cells.split(" | ") == [f"{value[key]:.3g}" if key in value else "" for key in keys], (kind, share)
