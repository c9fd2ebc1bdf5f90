"""Every public call of kfacerr refuses what it cannot take, by an InputError of one line: a row a call.

Values (steps, windows, certificates, ...) are not looked at where they are made but where they are used.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kfacerr
from kfacerr import (
    Algorithm,
    EAFactor,
    ErrorStudy,
    KFactor,
    LowRank,
    Recording,
    RecordingWriter,
    Settings,
    Step,
    Window,
    angle_error,
    correct,
    damped_inverse,
    exact_inverse,
    inspect,
    inverse_error,
    norm_error,
    nystrom,
    precondition,
    precondition_linear,
    rsvd,
    srevd,
    symmetric_brand,
    table,
    verify_layer,
)
from kfacerr.advice import Budget, advise_recording
from kfacerr.processes import Brand
from kfacerr.report import report_recording
from kfacerr.study import Row
from tests import bad
from tests.bad import (
    NAN,
    NO_COUNT,
    NO_DECAY,
    NO_LIST,
    NO_NAME,
    NO_NUMBER,
    NO_SHARE,
    NO_SIZE,
    NO_SWITCH,
    NO_WINDOWS,
    NOT_POSITIVE,
    given,
    no_matrix,
)

VALUES = {"Certificate", "Columns", "Cost", "DampedInverse", "Estimate", "InputError", "Row", "Step", "Window"}

rng = np.random.default_rng(0)
A, G = rng.standard_normal((6, 2)), rng.standard_normal((4, 2))
M, J = A @ A.T + np.eye(6), G @ A.T
U = np.linalg.qr(rng.standard_normal((6, 3)))[0]
X = LowRank(U, np.array([3.0, 2.0, 1.0]))
OF_A, OF_G = damped_inverse(X, phi=0.1), exact_inverse(G @ G.T, phi=0.1)[0]
SETTINGS = Settings(rank=3)
NO_INVERSE = (None, 3, M)
NO_SQUARE = (*no_matrix(M), M[:, :3], np.zeros((0, 0)))
NO_GENERATOR = (None, 3, "x")
NO_PATH = ("", "x" * 300, "\0", 3, None)
FORTY_DIGITS = int("9" * 40)


def study(**changes: Any) -> ErrorStudy:
    return ErrorStudy(**{"algorithms": ["B-KFAC"], "settings": SETTINGS, "windows": [(0, 3)], **changes})


def pushed(**changes: Any) -> None:
    made = study()
    made.push(Step(0, A, G))
    made.push(Step(1, A, G)._replace(**changes))


def k_factor(**changes: Any) -> KFactor:
    made = KFactor(**{"side": "A", "processes": {"it": Brand(SETTINGS)}, "rho": 0.9, "dense": True, **changes})
    made.push(0, A)
    return made


def ea(**changes: Any) -> None:
    made = EAFactor(**{"rho": 0.9} | {name: value for name, value in changes.items() if name != "X"})
    made.update(A)
    made.update(changes.get("X", A))


SKETCH = {"M": M, "r": 2, "oversampling": 1, "n_pwr_it": 1, "rng": np.random.default_rng(0)}
NO_SKETCH = {"M": NO_SQUARE, "r": NO_SIZE, "oversampling": NO_COUNT, "n_pwr_it": NO_COUNT, "rng": NO_GENERATOR}
COUNTS = {
    **dict.fromkeys(("oversampling", "n_pwr_it", "s", "seed"), NO_COUNT),
    "T_base": tuple(value for value in NO_COUNT if value is not None),  # None: its default
}
SIZES = dict.fromkeys(("rank", "T_inv", "T_brand", "T_rsvd", "T_corct"), NO_SIZE)
NO_SETTINGS = {
    **(COUNTS | SIZES),
    "rho": NO_DECAY,
    "phi_corct": NO_SHARE,
    "sketch": NO_NAME,
    "continuation": NO_NAME,
    "accumulate": NO_SWITCH,
}
NO_ALGORITHM = (
    *("", "x", "b-kfac", "B-KFAC rank", "B-KFAC rank=", "B-KFAC rank=0", "B-KFAC rank=nan", "B-KFAC T_inv=3"),
    *("B-KFAC rank=0.5", "B-KFAC rank=1 rank=2", "B-KFAC continuation=x", "B-KFAC-C phi_corct=nan", None, 3, []),
)
BRAND = Algorithm.parse("B-KFAC")

ROWS: dict[str, bad.Row] = {
    "Settings": (Settings, {}, NO_SETTINGS),
    "Algorithm.parse": (Algorithm.parse, {"name": "B-KFAC"}, {"name": NO_ALGORITHM}),
    "Algorithm": (
        Algorithm,
        {"base": "B-KFAC"},
        {"base": NO_NAME, "own": ("x", 3, None, (("x", 1),), (("rank", NAN),))},
    ),
    "Algorithm.with_settings": (
        BRAND.with_settings,
        {},
        {"rank": (0, 0.5, "x"), "T_inv": (3,), "continuation": ("x",)},
    ),
    "Algorithm.process": (
        BRAND.process,
        {"settings": SETTINGS, "side": "A"},
        {"settings": NO_NUMBER, "side": NO_NAME},
    ),
    "inspect": (
        inspect,
        {"source": M},
        {
            "source": (None, 3, "", "no such file", {}, M[:, :3]),
            "rank": (0, 0.5, "x"),
            "phi": NOT_POSITIVE,
            "damping": given(*bad.NO_DAMPING, "pi=1", "cut=1"),
        },
    ),
    "LowRank": (
        LowRank,
        {"basis": U, "D": X.D},
        {"basis": (*bad.NO_ARRAY, U[0], U[None], U[:, :2]), "D": (3, U, X.D[:2]), "mix": (3, X.D, U)},
    ),
    "LowRank.truncate": (X.truncate, {"r": 2}, {"r": NO_COUNT}),
    "symmetric_brand": (
        symmetric_brand,
        {"X": X, "A": A},
        {"X": ("x", 3, M), "A": (*no_matrix(A), G, torch.ones(6, 2)), "decay": (NAN, -1, "x", None)},
    ),
    "rsvd": (rsvd, SKETCH, NO_SKETCH),
    "srevd": (srevd, SKETCH, NO_SKETCH),
    "nystrom": (nystrom, SKETCH, NO_SKETCH),
    "correct": (
        correct,
        {"X": X, "M": M, "idx": np.array([0, 1])},
        {
            "X": NO_INVERSE,
            "M": (*NO_SQUARE, M[:3, :3]),
            "idx": (None, "x", 3, [0, 0], [7], [-1], [0.5], [NAN], [[0]]),
        },
    ),
    "damped_inverse": (
        damped_inverse,
        {"X": X, "phi": 0.1},
        {"X": NO_INVERSE, "phi": NOT_POSITIVE, "lam": (1.0,), "continuation": (*NO_NAME, "trace", "escaped")},
    ),
    "damped_inverse lam": (damped_inverse, {"X": X, "lam": 0.1}, {"lam": NOT_POSITIVE}),
    "damped_inverse trace": (
        damped_inverse,
        {"X": X, "lam": 0.1, "continuation": "trace", "trace": 9.0},
        {"trace": bad.NEGATIVE},
    ),
    "damped_inverse level": (
        damped_inverse,
        {"X": X, "lam": 0.1, "continuation": "escaped", "level": 1.0},
        {"level": bad.NEGATIVE},
    ),
    "exact_inverse": (exact_inverse, {"M": M, "phi": 0.1}, {"M": NO_SQUARE, "phi": NOT_POSITIVE, "lam": (1.0,)}),
    "exact_inverse lam": (exact_inverse, {"M": M, "lam": 0.1}, {"lam": NOT_POSITIVE}),
    "precondition": (
        precondition,
        {"J": J, "inverse_G": OF_G, "inverse_A": OF_A},
        {
            "J": (*no_matrix(J)[:-2], J.T, torch.ones(4, 6)),
            "inverse_G": (*NO_INVERSE, OF_A),
            "inverse_A": (*NO_INVERSE, OF_G),
        },
    ),
    "precondition_linear": (
        precondition_linear,
        {"G": G, "A": A, "inverse_G": OF_G, "inverse_A": OF_A},
        {
            "G": (*no_matrix(G)[:-2], A, G[:, :1], torch.ones(4, 2)),
            "A": (G, A[:, :1]),
            "inverse_G": (*NO_INVERSE, OF_A),
            "inverse_A": (*NO_INVERSE, OF_G),
        },
    ),
    "inverse_error": (
        inverse_error,
        {"inverse": OF_A, "reference": OF_A},
        {"inverse": (*NO_INVERSE, OF_G), "reference": (*NO_INVERSE, OF_G)},
    ),
    "norm_error": (
        norm_error,
        {"S": A, "reference": A},
        {"S": (*bad.NO_ARRAY, G, torch.ones(6, 2)), "reference": (*bad.NO_ARRAY, G)},
    ),
    "angle_error": (
        angle_error,
        {"S": A, "reference": A},
        {"S": (*bad.NO_ARRAY, G, torch.ones(6, 2)), "reference": (*bad.NO_ARRAY, G)},
    ),
    "EAFactor": (ea, {}, {"rho": NO_DECAY, "X": (*no_matrix(A)[:-2], G, torch.ones(6, 2))}),
    "KFactor": (k_factor, {}, {"processes": (None, 3, "x", {"B": 3}, {"B": "B-KFAC"}), "rho": NO_DECAY}),
    "KFactor.push": (
        lambda **given: k_factor().push(**{"k": 1, "X": A} | given),
        {},
        {"k": NO_COUNT, "X": (*no_matrix(A), G, torch.ones(6, 2)), "active": (3, "B", ["x"])},
    ),
    "KFactor.inverse": (
        lambda **given: k_factor().inverse(**{"name": "it", "phi": 0.1} | given),
        {},
        {"name": NO_NAME, "phi": NOT_POSITIVE, "continuation": NO_NAME},
    ),
    "KFactor.reference": (lambda phi: k_factor().reference(phi), {"phi": 0.1}, {"phi": NOT_POSITIVE}),
    "Process": (Brand, {}, {"settings": (3, "x", {}), "rng": (3, "x"), "fixed": ("rank", 3, [3]), **NO_SETTINGS}),
    "Process.configure": (Brand(SETTINGS).configure, {}, NO_SETTINGS),
    "ErrorStudy": (
        study,
        {},
        {
            "algorithms": (None, [], {"B": 3}, {"B": (3, 3)}, {"B": (Brand(),)}, *NO_LIST),
            "settings": NO_NUMBER,
            "windows": (None, *NO_WINDOWS),
            "phi": NOT_POSITIVE,
            "damping": bad.NO_DAMPING,
            "certify": NO_SWITCH,
        },
    ),
    "ErrorStudy.push": (
        pushed,
        {},
        {
            "k": (0, *NO_COUNT),
            "A": (*no_matrix(A), G, A[:, :1], torch.ones(6, 2)),
            "G": (A, G[:, :1]),
            "update": NO_SWITCH,
            "phi": given(*NOT_POSITIVE),
        },
    ),
    "ErrorStudy.push kinds": (
        lambda step: study().push(step),
        {"step": Step(0, A, G)},
        {"step": (None, 3, "abc", (0, A, G), A)},
    ),
    "ErrorStudy.spectrum": (
        lambda side: study().spectrum(side) if side else None,
        {"side": ""},
        {"side": ("A", "x", 3)},
    ),
    "table": (
        table,
        {"rows": [Row("B", 0, "m", 1.0, 0)], "windows": [Window(0, 3)]},
        {"rows": (None, 3, "ab", [3], [(1, 2)]), "windows": NO_WINDOWS[:6]},
    ),
    "Budget": (Budget, {"amount": 1.0}, {"amount": NOT_POSITIVE}),
    "Budget.parse": (
        Budget.parse,
        {"text": "2x"},
        {"text": ("", "x", "nan", "nanx", "-1", "0", "inf", "1e999", "2y", "2xms", "1xx", None, 3, [])},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_call_refuses_what_it_cannot_take(name):
    with np.errstate(all="ignore"):
        bad.assert_refuses(*ROWS[name])


# -------------------------------------------------------------------------------------------------- recordings

LAYER = {
    "layer": "fc",
    "d_A": 6,
    "d_G": 4,
    "n": 2,
    "bias": True,
    "batch_size": 2,
    "update_every": 1,
    "windows": [(0, 3)],
}
NO_LAYER = {
    "layer": ("", "a/b", ".", "..", "\0", "x\0y", "\ud800", None, 3),
    **dict.fromkeys(("d_A", "d_G", "batch_size", "update_every"), (FORTY_DIGITS, *NO_SIZE)),
    "n": given(FORTY_DIGITS, *NO_SIZE),
    "bias": NO_SWITCH,
    "windows": (None, [(0, FORTY_DIGITS)], *NO_WINDOWS),
    "dtype": ("x", None, int, np.float64, object, 3, []),
}
STEP = Step(0, A.astype(np.float32), G.astype(np.float32))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bad") / "r.h5"
    with RecordingWriter(path) as writer:
        writer.add_layer(**LAYER)
        for k in range(3):
            writer.append("fc", STEP._replace(k=k))
    return path


@pytest.fixture
def rows_of_files(path, tmp_path) -> dict[str, bad.Row]:
    """The calls that need a file; each writer has one of its own."""
    there, count = (tmp_path / name for name in ("folder", "file")), iter(range(10**6))
    folder, file = there
    folder.mkdir()
    file.write_text("x")
    no_path = (*NO_PATH, folder, file / "x.h5", str(folder))

    def writer() -> RecordingWriter:
        return RecordingWriter(tmp_path / f"{next(count)}.h5")

    def with_writer(name: str, **arguments: Any) -> None:
        made = writer()
        try:
            if name != "add_layer":
                made.add_layer(**LAYER)
            if name == "append_changed":
                made.append(arguments.pop("layer", "fc"), STEP._replace(**arguments))
            else:
                getattr(made, name)(**arguments)
        finally:
            made.suspend()

    def by(function: Any, **fixed: Any) -> Any:
        def call(**changes: Any) -> Any:
            with Recording(path) as recording:
                return function(recording, **{**fixed, **changes})

        return call

    def verify(recording: Recording, **options: Any) -> Any:
        return verify_layer(options.pop("of", recording.layer("fc")), **options)

    def advise(recording: Recording, **options: Any) -> Any:
        return advise_recording(recording.layer("fc"), **options)

    def closed(what: str) -> None:
        made = writer()
        made.add_layer(**LAYER)
        if what:
            made.close()
        getattr(made, what or "append")("fc", STEP)

    common = {"rho": NO_DECAY, "phi": given(*NOT_POSITIVE), "rank": given(*NO_SIZE)}
    return {
        "Recording": (Recording, {"path": path}, {"path": (*no_path, file, tmp_path / "none")}),
        "Recording.layer": (by(Recording.layer), {"name": "fc"}, {"name": (*NO_NAME, "a/b", "\0")}),
        "RecordingWriter": (
            lambda path: RecordingWriter(path or tmp_path / "new.h5"),
            {"path": False},
            {"path": given(*no_path[2:], "x" * 300)},
        ),
        "add_layer": (lambda **a: with_writer("add_layer", **LAYER | a), {}, NO_LAYER),
        "append": (
            lambda **a: with_writer("append_changed", **a),
            {},
            {
                "layer": NO_NAME,
                "k": (FORTY_DIGITS, *NO_COUNT),
                "A": (*bad.NO_ARRAY, A[:3], A[:, :1], bad.with_entry(A, NAN), A.astype(int)),
                "update": NO_SWITCH,
                "phi": given(*NOT_POSITIVE),
            },
        ),
        "append a step": (
            lambda step: with_writer("append", layer="fc", step=step),
            {"step": STEP},
            {"step": (None, 3, "abc", tuple(STEP), A)},
        ),
        "truncate": (
            lambda **a: with_writer("truncate", **{"layer": "fc", "k": 0} | a),
            {},
            {"layer": NO_NAME, "k": NO_COUNT},
        ),
        "a closed writer": (closed, {"what": ""}, {"what": ("append",)}),
        "verify_layer": (
            by(verify, length=2, stretches=1),
            {},
            {
                **common,
                "of": (None, "fc", 3),
                "phi": NOT_POSITIVE,
                "stretches": NO_SIZE,
                "length": given(*NO_SIZE),
                "seed": NO_COUNT,
            },
        ),
        "report_recording": (
            by(report_recording, algorithms=["B-KFAC"]),
            {},
            {
                **common,
                "layers": given(*NO_LIST, []),
                "damping": bad.NO_DAMPING,
                "algorithms": (None, [], *NO_LIST),
                "dtype": ("x", None, "int32", "float16"),
            },
        ),
        "advise_recording": (
            by(advise, rank=2, algorithms=["B-KFAC"]),
            {},
            {
                **common,
                "rank": NO_SIZE,
                "budget": ("x", 3),
                "damping": bad.NO_DAMPING,
                "algorithms": ([], *NO_LIST),
                "dtype": ("x", None, "int32"),
            },
        ),
    }


NAMES_OF_FILES = (
    "Recording",
    "Recording.layer",
    "RecordingWriter",
    "add_layer",
    "append",
    "append a step",
    "truncate",
    "a closed writer",
    "verify_layer",
    "report_recording",
    "advise_recording",
)


@pytest.mark.parametrize("name", NAMES_OF_FILES)
def test_a_call_on_a_recording_refuses_what_it_cannot_take(name, rows_of_files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert set(rows_of_files) == set(NAMES_OF_FILES)
    with np.errstate(all="ignore"):
        bad.assert_refuses(*rows_of_files[name])


def test_a_writer_replaces_no_device_and_no_pipe(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(kfacerr.InputError, match="is a pipe or a device, which would be replaced"):
        RecordingWriter(tmp_path / "pipe.h5", overwrite=True)


def test_every_public_call_has_its_row():
    named = {name.split()[0].split(".")[0] for name in (*ROWS, *NAMES_OF_FILES)}
    assert {name for name in kfacerr.__all__ if callable(getattr(kfacerr, name))} <= named | VALUES
