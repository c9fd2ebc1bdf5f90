"""A recording gives back the stream that was written, and whatever is wrong with a file is said in one line."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.exceptions import InputError
from kfacerr.recorder import RecordingWriter
from kfacerr.recording import FORMAT, Recording
from kfacerr.stream import Step, Window

WINDOWS = [Window(4, 3, 1), Window(20, 2, 5)]
SHAPES = {"d_A": 5, "d_G": 3, "n": 4}
LAYER = SHAPES | {"bias": True, "batch_size": 4, "update_every": 2, "windows": WINDOWS}
NAME = "classifier.0"


def _steps(ks=(0, 2, 4, 5, 6), phi=None, dtype=np.float32) -> list[Step]:
    rng = np.random.default_rng(0)
    return [
        Step(k, *(rng.standard_normal((d, 4)).astype(dtype) for d in (5, 3)), k % 2 == 0, phi and phi + k)
        for k in ks
    ]


def _record(path, steps, **options):
    with RecordingWriter(path) as writer:
        writer.add_layer(NAME, **(LAYER | options))
        for step in steps:
            writer.append(NAME, step)
    return path


def _read(path, name=NAME) -> list[Step]:
    with Recording(path) as recording:
        return list(recording.layer(name).steps())


def _assert_same(got, expected) -> None:
    assert len(got) == len(expected)
    for one, two in zip(got, expected, strict=True):
        assert (one.k, one.update, one.phi) == (two.k, two.update, two.phi)
        np.testing.assert_array_equal(one.A, two.A)
        np.testing.assert_array_equal(one.G, two.G)
        assert one.A.dtype == one.G.dtype == np.float32


def _foreign(path, **changes):
    """A recording by another program: contiguous datasets, int32 k, bool update, fixed-length format string."""
    steps = _steps()
    content = {
        "k": np.array([s.k for s in steps], np.int32),
        "update": np.array([s.update for s in steps]),
        "A": np.stack([s.A for s in steps]),
        "G": np.stack([s.G for s in steps]),
        "windows": np.array(WINDOWS, np.int32),
        "remark": np.arange(3),
    }
    attributes = {"bias": 1, "batch_size": np.array([4]), "update_every": np.int16(2), "lr": 0.1}
    root = {"format": np.bytes_(FORMAT), "version": np.int32(1), "author": "someone else"}
    for part in (content, attributes, root):
        part.update(
            {key: value for key, value in changes.items() if key in part or (part is content and key == "phi")}
        )
    with h5py.File(path, "w") as file:
        for key, value in root.items():
            if value is not None:
                file.attrs[key] = value
        group = file.create_group(f"layers/{NAME}")
        for key, value in content.items():
            if value is not None:
                group[key] = value
        for key, value in attributes.items():
            if value is not None:
                group.attrs[key] = value
    return path


def _fault(path) -> str:
    """The message with which a file is refused, on opening or on reading."""
    with pytest.raises(InputError) as caught:
        _read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


# --------------------------------------------------------------------------------------- round trip


@given(
    ks=st.lists(st.integers(0, 2**40), unique=True, max_size=6),
    with_phi=st.booleans(),
    storage=st.sampled_from([np.float32, np.float16]),
)
def test_a_recording_gives_back_what_was_written(tmp_path_factory, ks, with_phi, storage):
    steps = _steps(sorted(ks), phi=0.5 if with_phi else None, dtype=storage)
    path = _record(tmp_path_factory.mktemp("r") / "r.h5", steps, dtype=storage)
    _assert_same(_read(path), [s._replace(A=s.A.astype(np.float32), G=s.G.astype(np.float32)) for s in steps])
    with Recording(path) as recording:
        layer = recording.layer(NAME)
        assert recording.layers == [NAME]
        assert (layer.d_A, layer.d_G, layer.n, layer.dtype) == (5, 3, 4, storage)
        assert (layer.bias, layer.batch_size, layer.update_every) == (True, 4, 2)
        assert layer.windows == WINDOWS
        assert len(layer) == len(steps)
        assert layer.k.tolist() == sorted(ks)
        assert layer.update.tolist() == [k % 2 == 0 for k in sorted(ks)]
        assert layer.has_phi == (with_phi and bool(ks))


def test_layers_interleave(tmp_path):
    one, two = _steps((0, 1)), _steps((0, 1, 2))
    with RecordingWriter(tmp_path / "new" / "r.h5") as writer:
        writer.add_layer("a", **LAYER)
        writer.append("a", one[0])
        writer.add_layer("b.c", **LAYER)
        writer.append("b.c", two[0])
        writer.append("a", one[1])
        writer.append("b.c", two[1])
        writer.append("b.c", two[2])
    _assert_same(_read(writer.path, "a"), one)
    _assert_same(_read(writer.path, "b.c"), two)


def test_torch_columns_are_accepted(tmp_path):
    torch = pytest.importorskip("torch")
    steps = _steps()
    live = [s._replace(A=torch.from_numpy(s.A).requires_grad_(), G=torch.from_numpy(s.G)) for s in steps]
    _assert_same(_read(_record(tmp_path / "r.h5", live)), steps)
    with pytest.raises(InputError, match="A cannot become a NumPy array"):
        _record(tmp_path / "b.h5", [s._replace(A=s.A.bfloat16()) for s in live])


def test_layout_is_the_contract(tmp_path):
    with h5py.File(_record(tmp_path / "r.h5", _steps(phi=0.5))) as file:
        assert file.attrs["format"] == "kfacerr-recording"
        assert file.attrs["version"] == 1
        group = file[f"layers/{NAME}"]
        assert {"bias", "batch_size", "update_every"} <= set(group.attrs)
        found = {name: (d.dtype, d.shape) for name, d in group.items()}
        assert found == {
            "k": (np.int64, (5,)),
            "update": (np.uint8, (5,)),
            "A": (np.float32, (5, 5, 4)),
            "G": (np.float32, (5, 3, 4)),
            "windows": (np.int64, (2, 3)),
            "phi": (np.float64, (5,)),
        }
        assert group["A"].chunks == (1, 5, 4)
        assert group["G"].chunks == (1, 3, 4)


def test_info_is_plain_and_counts_what_the_windows_lack(tmp_path):
    path = _record(tmp_path / "r.h5", _steps())
    with Recording(path) as recording:
        info = recording.info()
    assert json.loads(json.dumps(info)) == info
    layer = info["layers"][NAME]
    assert (layer["steps"], layer["updates"], layer["first_k"], layer["last_k"]) == (5, 4, 0, 6)
    assert [w["recorded"] for w in layer["windows"]] == [3, 0]


def test_foreign_recording_is_read(tmp_path):
    _assert_same(_read(_foreign(tmp_path / "f.h5")), _steps())


def test_whatever_else_is_among_the_layers_is_left_out(tmp_path):
    path = _foreign(tmp_path / "f.h5")
    with h5py.File(path, "r+") as file:
        layers = file["layers"]
        layers["notes"] = np.arange(3)
        layers.create_group("optimizer").attrs["lr"] = 0.1
        file.copy(layers[NAME], "layers/nested/fc")
    _assert_same(_read(path), _steps())
    with Recording(path) as recording:
        assert recording.layers == [NAME] and recording.info()["faults"] == []
        with pytest.raises(InputError, match=r"no layer 'nested/fc'; there are classifier\.0 \(layer names must"):
            recording.layer("nested/fc")


def test_a_bad_layer_spoils_no_other(tmp_path):
    path = _foreign(tmp_path / "f.h5")
    with h5py.File(path, "r+") as file:
        file.copy(file["layers"][NAME], "layers/bad")
        del file["layers/bad/G"]
    _assert_same(_read(path), _steps())
    with Recording(path) as recording:
        info = recording.info()
    assert list(info["layers"]) == [NAME] and info["faults"] == [f"{path}: layer 'bad' lacks G"]


@pytest.mark.parametrize(
    "changes",
    [{"phi": np.ones(5, int)}, {"version": 1.0, "batch_size": 4.0}, {"windows": np.empty(0)}],
    ids=["integer phi", "whole numbers as floats", "no windows at all"],
)
def test_what_other_programs_write_for_the_same_is_read(tmp_path, changes):
    path = _foreign(tmp_path / "f.h5", **changes)
    steps = [s._replace(phi=1.0) for s in _steps()] if "phi" in changes else _steps()
    _assert_same(_read(path), steps)
    with Recording(path) as recording:
        assert recording.layer(NAME).windows == ([] if "windows" in changes else WINDOWS)


def test_foreign_float64_columns_keep_their_digits(tmp_path):
    A = np.random.default_rng(1).standard_normal((5, 5, 4))
    step = _read(_foreign(tmp_path / "f.h5", A=A))[3]
    assert step.A.dtype == np.float64
    np.testing.assert_array_equal(step.A, A[3])


# ------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "not a kfacerr-recording (attribute format is None)"),
        ({"format": "other"}, "not a kfacerr-recording (attribute format is 'other')"),
        ({"version": None}, "lacks the attribute version"),
        ({"version": 3}, "version 3 of the format is not supported"),
        ({"version": "1"}, "attribute version must be an integer"),
        ({"version": 1.5}, "attribute version must be an integer"),
        ({"windows": None, "G": None}, "layer 'classifier.0' lacks G, windows"),
        ({"batch_size": None}, "lacks the attribute batch_size"),
        ({"update_every": 0}, "update_every must be an integer >= 1"),
        ({"A": np.ones((5, 5), np.float32)}, "A must be float32 or float16 (N, d, n)"),
        ({"A": np.ones((5, 5, 4), np.int32)}, "is int32 (5, 5, 4)"),
        ({"A": np.ones((5, 5, 3), np.float32)}, "A has 3 columns a step, G has 4"),
        ({"A": np.ones((4, 5, 4), np.float32)}, "differ in their number of steps: k 5, update 5, A 4"),
        ({"k": np.array([0.0, 1, 2, 3, 4])}, "k must be integer (N,), is float64"),
        ({"k": np.array([0, 2, 2, 3, 4])}, "k must increase strictly from 0, but is 2 after 2 (step 2)"),
        ({"k": np.array([-1, 2, 3, 4, 5])}, "but is -1 at the start"),
        ({"update": np.array([0, 1, 2, 1, 0], np.uint8)}, "iteration 4: update must be 0 or 1, is 2"),
        ({"phi": np.array([0.1, 0.1, 0, 0.1, 0.1])}, "iteration 4: phi must be positive, is 0.0"),
        ({"windows": np.ones((2, 3))}, "windows must be integer (W, 3)"),
        ({"windows": np.array([[0, 4, 0], [3, 2, 0]])}, "the windows at iterations 0 and 3 overlap"),
        ({"windows": np.array([[0, 0, 0]])}, "window (first k 0, length 0) is empty"),
    ],
)
def test_fault_in_the_layout_is_named(tmp_path, changes, message):
    assert message in _fault(_foreign(tmp_path / "f.h5", **changes))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_columns_are_named_on_reading(tmp_path, value):
    G = np.ones((5, 3, 4), np.float32)
    G[3, 1, 2] = value
    assert f"layer '{NAME}', iteration 5: G holds NaN or Inf" in _fault(_foreign(tmp_path / "f.h5", G=G))


def test_missing_file_and_foreign_file_are_named(tmp_path):
    assert "no such file" in _fault(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    assert "not an HDF5 file" in _fault(tmp_path / "text.h5")
    (tmp_path / "empty.h5").touch()
    assert "not an HDF5 file" in _fault(tmp_path / "empty.h5")
    with h5py.File(tmp_path / "bare.h5", "w") as file:
        file.attrs.update(format=FORMAT, version=1)
    assert "has no group /layers" in _fault(tmp_path / "bare.h5")


def test_truncated_file_is_refused_wherever_it_is_cut(tmp_path):
    whole = _record(tmp_path / "r.h5", _steps()).read_bytes()
    for cut in [*range(16, len(whole), max(1, len(whole) // 60)), len(whole) - 1]:
        path = tmp_path / "cut.h5"
        path.write_bytes(whole[:cut])
        assert "truncated or damaged" in _fault(path)


def test_damaged_chunk_names_layer_and_iteration_after_the_intact_steps(tmp_path):
    steps = _steps()
    path = _record(tmp_path / "r.h5", steps)
    content = bytearray(path.read_bytes())
    content[content.index(steps[3].G.tobytes())] ^= 1
    path.write_bytes(content)
    assert f"layer '{NAME}', iteration 5: G cannot be read, the file is damaged" in _fault(path)
    with Recording(path) as recording:
        stream = recording.layer(NAME).steps()
        _assert_same([next(stream) for _ in range(3)], steps[:3])


def test_no_flipped_bit_in_the_columns_goes_unnoticed(tmp_path):
    steps = _steps()
    whole = _record(tmp_path / "r.h5", steps).read_bytes()
    path = tmp_path / "flipped.h5"
    rng = np.random.default_rng(0)
    for step in steps:
        for name in "AG":
            columns = getattr(step, name)
            start = whole.index(columns.tobytes())
            for offset in rng.choice(columns.nbytes, size=4, replace=False):
                content = bytearray(whole)
                content[start + offset] ^= 1 << rng.integers(8)
                path.write_bytes(content)
                assert f"iteration {step.k}: {name} cannot be read" in _fault(path)


def test_missing_layer_lists_those_there(tmp_path):
    with (
        Recording(_record(tmp_path / "r.h5", _steps())) as recording,
        pytest.raises(InputError, match=r"no layer 'fc9'; there are classifier\.0"),
    ):
        recording.layer("fc9")


# ------------------------------------------------------------------------------------ writer's checks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": np.full((5, 4), np.nan, np.float32)}, "iteration 7: A holds NaN or Inf"),
        ({"G": np.full((3, 4), -np.inf, np.float32)}, "iteration 7: G holds NaN or Inf"),
        ({"A": np.ones((4, 5), np.float32)}, r"iteration 7: A has shape \(4, 5\), but \(5, 4\) is recorded"),
        ({"A": np.ones((5, 4), np.int64)}, "iteration 7: A has dtype int64"),
        ({"A": np.full((5, 4), 1e5, np.float32)}, r"iteration 7: A reaches 1e\+05, beyond what float16 holds"),
        ({"k": 6}, "iteration 6: iterations must increase from 0, the last was 6"),
        ({"phi": 0.0}, "iteration 7: phi must be positive and finite, got 0"),
        ({"phi": 0.1}, "iteration 7: phi must be given at every step of a layer or at none"),
    ],
)
def test_bad_step_is_refused_and_loses_nothing(tmp_path, change, message):
    path = tmp_path / "r.h5"
    steps = _steps(dtype=np.float16)
    with RecordingWriter(path) as writer:
        writer.add_layer(NAME, **LAYER, dtype=np.float16)
        for step in steps:
            writer.append(NAME, step)
        with pytest.raises(InputError, match=message) as caught:
            writer.append(NAME, _steps((7,))[0]._replace(**change))
        assert str(caught.value).startswith(f"layer {NAME!r}")
        writer.append(NAME, _steps((8,))[0])
    assert [s.k for s in _read(path)] == [0, 2, 4, 5, 6, 8]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a/b", {}, "without '/'"),
        ("", {}, "needs a name"),
        ("fc", {"n": 0}, "n must be a whole number of at least 1"),
        ("fc", {"dtype": np.float64}, "float32 or float16 is needed"),
        ("fc", {"windows": [Window(0, 5), Window(4, 1)]}, "overlap"),
    ],
)
def test_bad_layer_description_is_refused(tmp_path, name, change, message):
    with RecordingWriter(tmp_path / "r.h5") as writer, pytest.raises(InputError, match=message):
        writer.add_layer(name, **(LAYER | change))


def test_unknown_layer_is_refused_by_the_writer(tmp_path):
    with RecordingWriter(tmp_path / "r.h5") as writer, pytest.raises(InputError, match="'fc' has not been added"):
        writer.append("fc", _steps()[0])


# ------------------------------------------------------------------------------ interruption and resume


def test_existing_recordings_are_not_overwritten_unasked(tmp_path):
    path = _record(tmp_path / "r.h5", _steps())
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists already"):
        RecordingWriter(path)
    writer = RecordingWriter(path, overwrite=True)
    assert path.read_bytes() == before  # until the new one is whole
    writer.suspend()
    path.unlink()
    with pytest.raises(InputError, match=r"r\.h5\.partial: an interrupted recording"):
        RecordingWriter(path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interruption_keeps_the_partial_and_says_where(tmp_path, caplog, error):
    path = tmp_path / "r.h5"
    writer = RecordingWriter(path)

    def run():
        with writer:
            writer.add_layer(NAME, **LAYER)
            for step in _steps():
                writer.append(NAME, step)
            raise error

    with caplog.at_level(logging.WARNING), pytest.raises(error) as caught:
        run()
    assert not path.exists()
    _assert_same(_read(writer.partial), _steps())
    for text in (caplog.text, *caught.value.__notes__):
        assert f"(5 steps) is kept in {writer.partial}" in text


def test_killed_process_leaves_every_appended_step(tmp_path):
    path = tmp_path / "r.h5"
    program = f"""
import os
import numpy as np
from kfacerr.recorder import RecordingWriter
from kfacerr.stream import Step
writer = RecordingWriter({str(path)!r})
for layer in "ab":
    writer.add_layer(layer, d_A=5, d_G=3, n=4, bias=True, batch_size=4, update_every=1)
for k in range(9):
    for layer in "ab":
        writer.append(layer, Step(k, np.full((5, 4), k, np.float32), np.ones((3, 4), np.float32)))
os._exit(9)  # no destructors, no atexit: as good as kill -9
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    partial = tmp_path / "r.h5.partial"
    for layer in "ab":
        steps = _read(partial, layer)
        assert [s.k for s in steps] == list(range(9))
        assert all((s.A == s.k).all() for s in steps)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("phi", [None, 0.5])
def test_resumed_recording_equals_an_uninterrupted_one(tmp_path, finished, phi):
    steps = _steps(range(10), phi=phi)
    path = tmp_path / "r.h5"
    writer = RecordingWriter(path)
    writer.add_layer(NAME, **LAYER)
    for step in steps[:7]:
        writer.append(NAME, step)
    if finished:
        writer.close()
    else:
        writer.suspend()
    with RecordingWriter(path, resume=True) as writer:
        assert writer.layers == [NAME]
        assert writer.truncate(NAME, 4) == writer.steps(NAME) == 4
        writer.add_layer(NAME, **LAYER)
        for step in steps[4:]:
            writer.append(NAME, step)
    _assert_same(_read(path), steps)
    assert not writer.partial.exists()


def test_truncating_everything_lets_a_layer_start_anew(tmp_path):
    path = _record(tmp_path / "r.h5", _steps(phi=0.5))
    with RecordingWriter(path, resume=True) as writer:
        assert writer.truncate(NAME, 0) == 0
        for step in _steps():
            writer.append(NAME, step)
    _assert_same(_read(path), _steps())


def test_resume_drops_a_step_that_was_being_written(tmp_path):
    path = _record(tmp_path / "r.h5", _steps())
    with h5py.File(path, "r+") as file:
        file[f"layers/{NAME}/A"].resize(6, axis=0)
    assert "differ in their number of steps" in _fault(path)
    path.rename(tmp_path / "r.h5.partial")
    with RecordingWriter(path, resume=True) as writer:
        writer.append(NAME, _steps((9,))[0])
    assert [s.k for s in _read(path)] == [0, 2, 4, 5, 6, 9]


def test_resume_refuses_other_settings_and_foreign_files(tmp_path):
    path = _record(tmp_path / "r.h5", _steps())
    with RecordingWriter(path, resume=True) as writer:
        for change, message in (
            ({"batch_size": 8}, "recorded with batch_size = 4, not 8"),
            ({"dtype": np.float16}, "recorded with dtype = float32, not float16"),
            ({"windows": WINDOWS[:1]}, "recorded with other windows"),
        ):
            with pytest.raises(InputError, match=message):
                writer.add_layer(NAME, **(LAYER | change))
    with pytest.raises(InputError, match="nothing to resume"):
        RecordingWriter(tmp_path / "none.h5", resume=True)
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(InputError, match="not an HDF5 file"):
        RecordingWriter(tmp_path / "text.h5", resume=True)
    with pytest.raises(InputError, match="datasets of fixed length"):
        RecordingWriter(_foreign(tmp_path / "f.h5"), resume=True)


def test_failed_write_is_reported_and_undone(tmp_path, monkeypatch):
    steps = _steps()
    with RecordingWriter(tmp_path / "r.h5") as writer:
        writer.add_layer(NAME, **LAYER)
        writer.append(NAME, steps[0])
        with monkeypatch.context() as patch:

            def full(_):
                raise OSError(28, "No space left on device")

            patch.setattr(h5py.File, "flush", full)
            with pytest.raises(InputError, match=r"iteration 2 cannot be written: .*No space left"):
                writer.append(NAME, steps[1])
        for step in steps[1:]:
            writer.append(NAME, step)
    _assert_same(_read(writer.path), steps)


# ------------------------------------------------------------------------- nothing lost, nothing followed


@pytest.mark.parametrize("has_fallocate", [True, False])
def test_a_step_that_the_disk_has_no_room_for_is_refused_and_nothing_is_lost(tmp_path, monkeypatch, has_fallocate):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path, steps = tmp_path / "r.h5", _steps()
    if not has_fallocate:
        monkeypatch.delattr("os.posix_fallocate", raising=False)
    writer = RecordingWriter(path)
    writer.add_layer(NAME, **LAYER)
    for step in steps[:3]:
        writer.append(NAME, step)
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full) if has_fallocate else None
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**5))
        with pytest.raises(InputError, match=r"iteration 5 cannot be written: .*No space left on device"):
            writer.append(NAME, steps[3])
        writer.suspend()
    _assert_same(_read(f"{path}.partial"), steps[:3])
    with RecordingWriter(path, resume=True) as writer:
        for step in steps[3:]:
            writer.append(NAME, step)
    _assert_same(_read(path), steps)


@pytest.mark.parametrize("limit", [0, 500, 20_000, 250_000])
def test_a_file_that_may_not_grow_is_one_line(tmp_path, limit):
    """As under a quota, in a process of its own."""
    program = f"""
import resource, sys, numpy as np
from kfacerr import InputError, RecordingWriter, Step
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    with RecordingWriter("r.h5") as writer:
        writer.add_layer("fc", d_A=99, d_G=9, n=4, bias=True, batch_size=4, update_every=1)
        for k in range(200):
            writer.append("fc", Step(k, np.ones((99, 4), "f4"), np.ones((9, 4), "f4")))
except InputError as error:
    assert "r.h5.partial: " in str(error) and "cannot be" in str(error) and chr(10) not in str(error), error
    print(k if {limit} > 10**5 else "none")
"""
    command, root = [sys.executable, "-c", program], str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    if limit > 10**5:
        with Recording(tmp_path / "r.h5.partial") as recording:
            assert len(list(recording.layer("fc").steps())) == int(done.stdout) > 10


def test_a_second_writer_is_refused_and_the_first_loses_nothing(tmp_path):
    path, steps = tmp_path / "r.h5", _steps()
    with RecordingWriter(path) as first:
        first.add_layer(NAME, **LAYER)
        for i, step in enumerate(steps):
            first.append(NAME, step)
            if i == 2:
                for options in ({}, {"overwrite": True}, {"resume": True}):
                    with pytest.raises(InputError, match="in use by another process"):
                        RecordingWriter(path, **options)
    _assert_same(_read(path), steps)


def test_the_lock_of_a_dead_process_is_none(tmp_path):
    program = (
        "import os, sys; from kfacerr.recorder import RecordingWriter\n"
        "writer = RecordingWriter(sys.argv[1]); os._exit(9)"
    )
    path = tmp_path / "r.h5"
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == 9
    with RecordingWriter(path, overwrite=True) as writer:
        writer.add_layer(NAME, **LAYER)


def _elsewhere(path, kind):
    """A recording whose A stands in another file, which must be neither read nor written."""
    other = path.with_name("other.h5")
    raw = path.with_name("raw.bin")
    _record(path, _steps())
    with h5py.File(other, "w") as file:
        file["A"] = np.ones((5, 5, 4), np.float32)
    np.full((5, 5, 4), 7, np.float32).tofile(raw)
    with h5py.File(path, "r+") as file:
        group = file[f"layers/{NAME}"]
        match kind:
            case "external link":
                del group["A"]
                group["A"] = h5py.ExternalLink(other.name, "/A")
            case "soft link":
                del group["A"]
                group["A"] = h5py.SoftLink(f"/layers/{NAME}/G")
            case "external storage":
                del group["A"]
                group.create_dataset("A", (5, 5, 4), np.float32, external=[(str(raw), 0, h5py.h5f.UNLIMITED)])
            case "virtual":
                del group["A"]
                layout = h5py.VirtualLayout((5, 5, 4), np.float32)
                layout[:] = h5py.VirtualSource(str(path.with_name("missing.h5")), "A", shape=(5, 5, 4))
                group.create_virtual_dataset("A", layout)
            case "linked layer":
                file["layers"].move(NAME, "moved")
                file["layers"][NAME] = h5py.ExternalLink(other.name, "/")
            case "linked layers":
                file.move("layers", "elsewhere")
                file["layers"] = h5py.SoftLink("/elsewhere")
    return other, raw


@pytest.mark.parametrize(
    "kind", ["external link", "soft link", "external storage", "virtual", "linked layer", "linked layers"]
)
def test_what_stands_elsewhere_is_neither_read_nor_written(tmp_path, kind):
    path = tmp_path / "r.h5"
    files = _elsewhere(path, kind)
    before = [file.read_bytes() for file in files]
    assert "not followed" in _fault(path)
    with pytest.raises(InputError, match="not followed"):
        RecordingWriter(path, resume=True)
    path.rename(path.with_name("r.h5.partial"))
    with pytest.raises(InputError, match=r"not followed.*pass overwrite, or remove"):
        RecordingWriter(path, resume=True)
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("name", ["k", "A", "windows"])
def test_a_claim_beyond_the_file_is_refused_before_anything_is_allocated(tmp_path, name):
    path = _record(tmp_path / "r.h5", _steps())
    with h5py.File(path, "r+") as file:
        group = file[f"layers/{NAME}"]
        del group[name]
        shape, kind = {
            "k": ((2**40,), np.int64),
            "A": ((5, 2**20, 2**20), np.float32),
            "windows": ((2**40, 3), np.int64),
        }[name]
        group.create_dataset(name, shape, kind, chunks=(1, *shape[1:])[:1] + (1,) * (len(shape) - 1))
    assert "claims" in _fault(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0.5}, "k must be a whole number"),
        ({"k": float("nan")}, "k must be a whole number"),
        ({"k": None}, "k must be a whole number"),
        ({"update": 2}, "update must be a whole number in 0..1"),
        ({"update": 0.5}, "update must be a whole number"),
    ],
)
def test_the_writer_refuses_what_its_reader_would(tmp_path, change, message):
    path, steps = tmp_path / "r.h5", _steps()
    with RecordingWriter(path) as writer:
        writer.add_layer(NAME, **LAYER)
        with pytest.raises(InputError, match=message):
            writer.append(NAME, steps[0]._replace(**change))
        writer.append(NAME, steps[0])
    _assert_same(_read(path), steps[:1])


@pytest.mark.parametrize(
    "change", [{"batch_size": 1.5}, {"update_every": float("nan")}, {"n": "4"}, {"d_A": True}]
)
def test_the_writer_refuses_sizes_that_are_no_whole_numbers(tmp_path, change):
    with RecordingWriter(tmp_path / "r.h5") as writer:
        if change == {"d_A": True}:
            writer.add_layer(NAME, **(LAYER | change))
            return
        with pytest.raises(InputError, match="must be a whole number"):
            writer.add_layer(NAME, **(LAYER | change))


def test_a_folder_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        RecordingWriter(tmp_path)


@given(widths=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_steps_of_varying_n_come_back(tmp_path_factory, widths):
    rng = np.random.default_rng(0)
    steps = [
        Step(k, *(rng.standard_normal((d, n)).astype(np.float32) for d in (5, 3)), True)
        for k, n in enumerate(widths)
    ]
    path = _record(tmp_path_factory.mktemp("r") / "r.h5", steps, n=None)
    _assert_same(_read(path), steps)
    with Recording(path) as recording:
        assert recording.version == 2 and recording.layer(NAME).widths.tolist() == widths


def test_a_recording_of_varying_n_is_resumed(tmp_path):
    path, steps = tmp_path / "r.h5", _steps()
    narrow = [s._replace(A=s.A[:, :2], G=s.G[:, :2]) for s in steps]
    with RecordingWriter(path) as writer:
        writer.add_layer(NAME, **(LAYER | {"n": None}))
        writer.append(NAME, narrow[0])
        writer.append(NAME, steps[1])
    with RecordingWriter(path, resume=True) as writer:
        with pytest.raises(InputError, match="n that varies"):
            writer.add_layer(NAME, **LAYER)
        writer.add_layer(NAME, **(LAYER | {"n": None}))
        writer.truncate(NAME, steps[1].k)
        writer.append(NAME, narrow[1])
    _assert_same(_read(path), narrow[:2])
    with (
        pytest.raises(InputError, match="A has 4 columns and G has 2"),
        RecordingWriter(path, resume=True) as writer,
    ):
        writer.append(NAME, steps[2]._replace(G=narrow[2].G))
