"""Every command line refuses what it cannot take, by one line on stderr and status 2: a row an option."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.random import default_rng

import figures.__main__
from kfacerr import METRICS, SEVEN, RecordingWriter, Step, Window, cli
from studies import inverse_errors, optimizers, timing
from studies.bench import peers, speed
from studies.presets import OPTIMIZER_PRESETS, PRESETS
from tests.bad import assert_one_line
from tests.studies.test_inverse_errors import TINY
from tests.studies.test_optimizers import TINY as TINY_OPTIMIZERS

LONG, LOOP = "x" * 300, "loop"
NO_COUNT = ("-1", "x", "", "nan", "0.5", "1e3")
NO_SIZE = ("0", *NO_COUNT)
NO_RATIO = ("nan", "inf", "-1", "0", "x", "")
NO_SECONDS = ("nan", "-1", "x", "")
NO_INPUT = ("", LONG, "folder", "pipe", "none.h5", "text", "text/x", LOOP, "dangling", "empty.h5", "/")
NO_OUTPUT = (
    "",
    LONG,
    "folder",
    "pipe",
    "none/x.csv",
    "text/x",
    LOOP,
    "r.h5",
    "linked.csv",
    "again.h5",
    "/",
    ".",
    "..",
)
NO_FOLDER = ("", LONG, "text", "text/x", "pipe", LOOP, "dangling", "nul\0")
NO_ALGORITHM = (
    "",
    "x",
    "B-KFAC rank=0",
    "B-KFAC rank=x",
    "R-KFAC T_inv=0",
    "B-KFAC T_inv=3",
    "B-KFAC rank=1 rank=2",
)
NO_DEVICE = (
    *(
        "",
        "x",
        "xpu",
        "mps",
        "meta",
        "cpu:7",
        "cuda:-1",
        "cuda:x",
        "cuda:9999",
        "cuda:" + "9" * 30,
        "hpu",
        "vulkan",
    ),
    *("mkldnn", "xla", "ipu", "privateuseone", "cpu "),
)
NO_FIGURE = ("x", "x.jpg", "", "none/x.pdf", "folder", ".pdf", LONG + ".pdf", "loop.pdf")
SETTINGS = {
    **dict.fromkeys(("--oversampling", "--n-pwr-it", "--seed"), NO_COUNT),
    "REC": NO_INPUT,
    "--out": NO_OUTPUT,
    "--layer": ("", "x", "a/b", "-"),
    "--rank": NO_SIZE,
    "--rho": (*NO_RATIO, "1"),
    "--phi": NO_RATIO,
    "--damping": ("x", "", "mean", "lam=0", "product=inf", "cut=nan"),
    "--continuation": ("x", ""),
    "--algorithms": NO_ALGORITHM,
    "--no-such": ("1",),
}
REPLAY = {
    **SETTINGS,
    "--plot": (*NO_FIGURE, "o.csv"),
    **dict.fromkeys(("--backend", "--dtype"), ("x", "")),
}
VERIFY = {
    **{name: SETTINGS[name] for name in ("REC", "--layer", "--rank", "--rho", "--phi", "--seed")},
    "--stretches": NO_SIZE,
    "--length": NO_SIZE,
}
BUDGETS = ("", "x", "nan", "nanx", "0", "-1", "inf", "1e999x", "2xx")
STUDY = {
    "--preset": ("", "x"),
    "--out": NO_FOLDER,
    "--device": NO_DEVICE,
    "--seed": ("9" * 30, *NO_COUNT),
    "--time-limit": NO_SECONDS,
    "--step-limit": NO_COUNT,
    "--jobs": NO_SIZE,
}
ONE_LAYER = {"REC": "r.h5", "--layer": "fc", "--out": "o.csv"}
TRAINING = {"--preset": "tiny", "--out": "study", "--device": "cpu"}
DATA = {"--data": ("none", "text", "pipe", "folder", "", LONG, LOOP)}
# main, what stands before, the options of a good call (REC and DIR are positional), and by option what is refused
ROWS: dict[str, tuple[Any, list[str], dict[str, str], dict[str, tuple[str, ...]]]] = {
    "replay": (cli.main, ["replay"], {**ONE_LAYER, "--rank": "2"}, REPLAY),
    "report": (cli.main, ["report"], {"REC": "r.h5", "--out": "o.html"}, SETTINGS),
    "advise": (cli.main, ["advise"], ONE_LAYER, {**SETTINGS, "--budget": BUDGETS, "--plot": NO_FIGURE}),
    "verify": (cli.main, ["verify"], {"REC": "r.h5"}, VERIFY),
    "info": (cli.main, ["info"], {"REC": "r.h5"}, {"REC": NO_INPUT, "--no-such": ("1",)}),
    "inverse_errors": (
        *(inverse_errors.main, [], TRAINING),
        {**STUDY, "--driver": ("", "x", "FD", "SENG x"), "--trajectory": ("x", "")},
    ),
    "inverse_errors data": (inverse_errors.main, [], {**TRAINING, "--preset": "cifar10-small"}, DATA),
    "inverse_errors fashion": (inverse_errors.main, [], {**TRAINING, "--preset": "fashion-small"}, DATA),
    "optimizers": (
        *(optimizers.main, ["--no-timing"], TRAINING),
        {**STUDY, "--optimizers": ("", "x", "FD", "r-kfac"), "--continuation": ("x", "")},
    ),
    "timing": (timing.main, [], TRAINING, {"--rounds": NO_SIZE, "--device": NO_DEVICE, "--out": NO_FOLDER}),
    "timing data": (timing.main, [], {**TRAINING, "--preset": "cifar10-small"}, DATA),
    "speed": (
        *(speed.main, ["--quick"], {"--out": "speed"}),
        {"--device": NO_DEVICE, "--rounds": NO_SIZE, "--rank": NO_SIZE, "--out": NO_FOLDER},
    ),
    "peers": (
        peers.main,
        [],
        {"--out": "peers"},
        {"--rounds": NO_SIZE, "--without": ("x", ""), "--out": NO_FOLDER},
    ),
    "figures": (figures.__main__.main, [], {"DIR": "folder"}, {"DIR": (*NO_FOLDER, "folder", "none")}),
}


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    path, rng = tmp_path_factory.mktemp("commands") / "r.h5", default_rng(0)
    with RecordingWriter(path) as writer:
        sizes = {"d_A": 8, "d_G": 5, "n": 2, "batch_size": 2, "update_every": 1}
        writer.add_layer("fc", **sizes, bias=False, windows=[Window(3, 4)])
        for k in range(7):
            A, G = (rng.standard_normal((d, 2)).astype(np.float32) for d in (8, 5))
            writer.append("fc", Step(k, A, G))
    return path


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch, recording) -> Iterator[None]:
    """A folder with one of each kind, and the recording under three names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KFACERR_DATA", raising=False)
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setitem(OPTIMIZER_PRESETS, "tiny", TINY_OPTIMIZERS)
    Path("r.h5").write_bytes(recording.read_bytes())
    Path("linked.csv").symlink_to("r.h5")
    os.link("r.h5", "again.h5")
    Path("folder").mkdir()
    Path("text").write_text("x")
    Path("empty.h5").touch()
    os.mkfifo("pipe")
    Path("dangling").symlink_to("none/x")
    for name in ("loop", "loop.pdf"):
        Path(name).symlink_to(name)
    before = recording.read_bytes()
    yield
    assert Path("r.h5").read_bytes() == before, "nothing was written over"
    assert not {path.name for path in Path().iterdir()} & {"o.csv", "o.html", "study", "speed", "peers", "none"}


@pytest.mark.parametrize("name", ROWS)
def test_a_command_line_refuses_what_it_cannot_take(name, capsys):
    main, before, good, bad = ROWS[name]
    for option, values in bad.items():
        for value in values:
            argv = list(before)
            for key, word in {**good, option: value}.items():
                argv += [word] if not key.startswith("-") else [f"{key}={word}"]
            assert_one_line(capsys, main, argv)


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (cli.main, []),
        (cli.main, ["x"]),
        (cli.main, ["replay"]),
        (cli.main, ["info", "r.h5", "r.h5"]),
        (inverse_errors.main, ["--preset", "tiny", "--out", "study", "--monitor", "--record"]),
        (inverse_errors.main, ["--preset", "tiny", "--out", "study", "--driver", "SGD", "--trajectory", "own"]),
        (optimizers.main, ["--preset", "tiny", "--out", "study", "--timing-only", "--no-timing"]),
        (figures.__main__.main, []),
    ],
)
def test_words_that_do_not_go_together_are_refused(main, argv, capsys):
    assert_one_line(capsys, main, argv)


# ---------------------------------------------------------------------------------------- what figures read

KEYS = [(a, k, 1, 0) for a in SEVEN for k in (20, 30)]
ERRORS = pd.DataFrame(
    [(a, k, metric, 0.1, epoch, seed) for a, k, epoch, seed in KEYS for metric in METRICS],
    columns=["algorithm", "k", "metric", "value", "epoch", "seed"],
)
SPECTRUM = pd.DataFrame([(0, 1, f, i, 1.0 / (1 + i)) for f in "AG" for i in range(3)])
SPECTRUM.columns = pd.Index(["seed", "epoch", "factor", "index", "eigenvalue"])
EPOCHS = pd.DataFrame([(name, 0, 1, 1.0, 0.5) for name in ("SGD", "R-KFAC")])
EPOCHS.columns = pd.Index(["optimizer", "seed", "epoch", "seconds", "test_accuracy"])
TIMES = pd.DataFrame([(2, "SGD", 0, 1.0)], columns=["table", "driver", "round", "t_epoch"])
PARTS = pd.DataFrame([(2, "SGD", "step", 1.0)], columns=["table", "driver", "part", "seconds"])
WINDOW = {"epoch": 1, "start": 20, "rank": 3, "columns": 2, "phi": [0.1, 0.1]}
TARGETS = {"data": "digits", "targets": [0.1, 0.2, 0.3], "T_updt": 1}
STUDIES: dict[str, dict[str, Any]] = {
    "errors": {
        "config.json": {"data": "digits", "setting": "x", "windows": [WINDOW]},
        "errors.csv": ERRORS,
        "spectra.csv": SPECTRUM,
    },
    "optimizers": {"config.json": TARGETS, "epochs.csv": EPOCHS, "timing.csv": TIMES, "breakdown.csv": PARTS},
}
NO_JSON = (None, {}, [None], ["x"], [{}], [{"epoch": 1}], -1, float("nan"), [0.1, None])
NO_NUMBERS = ("x", "", "nan", "inf", "-inf")
NO_TABLE = (b"", b"\n", b"a,b\n1,2\n", b"\0\0", b"\xff\xfe\x00", b'"')


def written(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        if isinstance(content, pd.DataFrame):
            content.to_csv(folder / name, index=False)
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.mark.parametrize("kind", STUDIES)
def test_figures_refuse_what_no_study_writes(kind, capsys):
    """Each table without one of its columns, or with an entry that is none; config.json of another shape."""
    files, folder = STUDIES[kind], Path("folder")
    changes: list[tuple[str, Any]] = []
    for name, content in files.items():
        if name == "config.json":
            named = [key for key in content if key != "start"]
            changes += [
                (name, {**content, key: value})
                for key in named
                for value in NO_JSON
                if value is not None or key != "data"
            ]
            continue
        changes += [(name, nothing) for nothing in NO_TABLE]
        changes += [(name, content.drop(columns=column)) for column in content]
        for column in content:
            numbers = content[column].dtype.kind in "if"
            entry = content.astype(object)
            for value in NO_NUMBERS if numbers else ("",):
                entry.loc[0, column] = value
                changes.append((name, entry.copy()))
    assert len(changes) > 70
    for name, content in changes:
        written(folder, {**files, name: content})
        assert_one_line(capsys, figures.__main__.main, ["folder"])


def test_a_metric_that_is_missing_is_named(capsys):
    written(
        Path("folder"), {"errors.csv": ERRORS[(ERRORS.metric != "step_norm") | (ERRORS.algorithm != "B-KFAC")]}
    )
    assert figures.__main__.main(["folder"]) == 2
    assert "errors.csv: 'B-KFAC' has no step_norm at epoch 1" in capsys.readouterr().err


def test_an_output_that_is_an_input_is_refused(capsys):
    written(Path("folder"), STUDIES["errors"])
    Path("folder/table1.csv").symlink_to("errors.csv")
    assert_one_line(capsys, figures.__main__.main, ["folder"])
    assert_one_line(capsys, timing.main, ["--preset", "tiny", "--device", "cpu", "--out", "folder"])
    pd.testing.assert_frame_equal(pd.read_csv("folder/errors.csv"), ERRORS)


def test_names_with_dollars_are_no_mathematics(monkeypatch):
    from kfacerr.plot import error_figure

    odd = r"$\no$ $x"
    figure = error_figure(ERRORS.assign(algorithm=odd), METRICS, title=odd)
    figure.draw_without_rendering()
