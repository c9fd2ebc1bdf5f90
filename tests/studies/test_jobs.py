"""Jobs stop when they are asked to, in whatever process; what they leave is whole, and refused if it is not."""

import argparse
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch

from kfacerr.exceptions import InputError
from studies import jobs
from studies.jobs import Stop, alone, in_parallel, load_checkpoint, open_output, run_job, save_checkpoint, slug

# Checkpoints.


def test_checkpoints_come_back_as_they_were_saved(tmp_path: Path) -> None:
    state = {"k": 3, "name": "x", "tensors": [torch.eye(2)], "none": None}
    save_checkpoint(tmp_path / "run.pt", state)
    loaded = load_checkpoint(tmp_path / "run.pt")
    assert torch.equal(loaded.pop("tensors")[0], torch.eye(2))
    assert loaded == {"k": 3, "name": "x", "none": None}


def test_a_missing_truncated_or_foreign_checkpoint_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(InputError, match=r"run\.pt: no such checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, {"weights": torch.ones(1000)})
    whole = path.read_bytes()
    for content in (whole[:-500], b"", b"text\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"run\.pt: not a readable checkpoint"):
            load_checkpoint(path)
    torch.save({"k": 1}, path)
    with pytest.raises(InputError, match=r"run\.pt: not a checkpoint of this version"):
        load_checkpoint(path)


@pytest.mark.parametrize("state", [None, 3, [], {}, {"finished": True}, {"finished": False, "position": "x"}])
def test_a_checkpoint_of_another_shape_is_refused_and_named(tmp_path: Path, state: Any) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, state)

    def make() -> Counting:
        run = Counting(5)
        run.load_state_dict = lambda saved: setattr(run, "position", saved["position"] + 0)  # type: ignore[method-assign]
        return run

    stop = Stop(tmp_path / "stopped", None, None)
    try:
        said = run_job("x", path, make, stop, ("position",)).error
    except InputError as error:
        said = str(error)
    assert "run.pt: not a checkpoint of such a job" in said and said.endswith("remove it to begin this job anew")


def test_a_checkpoint_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"format": "kfacerr-checkpoint", "version": 1, "state": Malicious()}, tmp_path / "run.pt")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "run.pt")
    assert not (tmp_path / "executed").exists()


def test_no_flipped_bit_of_a_tensor_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    weights = torch.rand(5000)
    save_checkpoint(path, {"weights": weights})
    whole = path.read_bytes()
    begin = whole.index(weights.numpy().tobytes())
    for at in range(begin, begin + 20000, 1999):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"run\.pt: damaged, .* does not fit its checksum: remove it"):
            load_checkpoint(path)


# The output folder.


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    def inner(arguments: argparse.Namespace) -> int:
        with pytest.raises(InputError, match="out: in use by another process"):
            alone(lambda arguments: 0)(arguments)
        return 7

    arguments = argparse.Namespace(out=tmp_path / "out")
    assert alone(inner)(arguments) == 7
    assert alone(lambda arguments: 3)(arguments) == 3, "and the next may"
    assert not arguments.out.exists()


def test_a_study_killed_before_its_configuration_was_written_begins_anew(tmp_path: Path, monkeypatch: Any) -> None:
    def killed(path: Path, text: str) -> None:
        if path.name == "config.json":
            raise KeyboardInterrupt
        path.write_text(text)

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            open_output(tmp_path, {"name": "digits"}, resume=False)
    open_output(tmp_path, {"name": "digits"}, resume=False)
    assert {"config.json", "environment.json"} <= {path.name for path in tmp_path.iterdir()}


def test_a_folder_is_one_study_s(tmp_path: Path) -> None:
    open_output(tmp_path, {"name": "digits", "seeds": [0]}, resume=False)
    with pytest.raises(InputError, match="holds a study already: continue it with --resume"):
        open_output(tmp_path, {"name": "digits", "seeds": [0]}, resume=False)
    open_output(tmp_path, {"name": "digits", "seeds": [0]}, resume=True)
    with pytest.raises(InputError, match=r"config\.json: seeds is \[0\] there and \[1\] here"):
        open_output(tmp_path, {"name": "digits", "seeds": [1]}, resume=True)


def test_names_become_parts_of_files_names() -> None:
    assert slug("seed", 3, "R-KFAC T_inv=50") == "seed-3-r-kfac-t_inv50"


# Stopping.


def test_a_signal_that_reached_another_process_stops_this_one_too(tmp_path: Path) -> None:
    ours, theirs = (Stop(tmp_path / "state" / "stopped", None, None) for _ in range(2))
    ours.POLL_SECONDS = 0
    with ours.listening():
        assert not ours()
        with theirs.listening():
            signal.raise_signal(signal.SIGINT)
        assert theirs() and ours()
    assert not Stop(tmp_path / "state" / "stopped", None, None)()  # a new run forgets it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_lets_the_iteration_finish_and_a_second_one_does_not_wait(
    tmp_path: Path, number: int
) -> None:
    stop = Stop(tmp_path / "stopped", None, None)
    with stop.listening():
        signal.raise_signal(number)
        assert stop() and stop.reason == "by a signal"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


class Counting:
    """A run that counts to `end`."""

    def __init__(self, end: int) -> None:
        self.name, self.end, self.position, self.closed = "counting", end, 0, False

    @property
    def finished(self) -> bool:
        return self.position >= self.end

    def advance(self) -> None:
        self.position += 1

    def seconds_left(self, mean: float) -> float:
        return 3600.0

    def results(self) -> dict[str, Any]:
        return {"position": self.position, "finished": self.finished}

    state_dict = results

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def close(self) -> None:
        self.closed = True


def test_a_job_goes_on_where_its_checkpoint_left_it(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    runs: list[Counting] = []

    def make() -> Counting:
        runs.append(Counting(5))
        return runs[-1]

    first = run_job("x", path, make, Stop(tmp_path / "stopped", None, 3))
    assert (first.state, first.stopped) == ({"position": 3, "finished": False}, "at the step limit")
    assert run_job("x", path, make, Stop(tmp_path / "stopped", 0.0, None)).state == load_checkpoint(path)
    last = run_job("x", path, make, Stop(tmp_path / "stopped", None, None))
    assert (last.state, last.stopped) == ({"position": 5, "finished": True}, "")
    assert run_job("x", path, make, Stop(tmp_path / "stopped", None, None)) == last
    assert len(runs) == 2 and all(run.closed for run in runs)


def test_a_log_says_where_a_run_is_and_what_it_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "PROGRESS_SECONDS", -1)
    run_job("x", tmp_path / "run.pt", lambda: Counting(2), Stop(tmp_path / "stopped", None, None))
    first, _ = capsys.readouterr().err.splitlines()
    assert first == "counting: iteration 1 of 2, 00:00 so far, 1:00:00 left"


def _numbers() -> Iterator[Any]:
    return (joblib.delayed(pow)(i, 2) for i in range(3))


@pytest.mark.parametrize("count", [None, 1, 2])
def test_results_come_in_order(count: int | None) -> None:
    assert list(in_parallel(_numbers(), count)) == [0, 1, 4]


def test_the_callers_own_backend_takes_the_jobs() -> None:
    with joblib.parallel_config("threading", n_jobs=2):
        assert list(in_parallel(_numbers(), None)) == [0, 1, 4]
    with joblib.parallel_config("sequential"):  # which gives no generator
        assert list(in_parallel(_numbers(), None)) == [0, 1, 4]
