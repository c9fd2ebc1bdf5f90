"""The one command for the borrowed machine: shares of the time, failures, packing, resuming, and a dry run."""

import json
import random
import sys
import tarfile
import time
from pathlib import Path

import pytest

from studies import gpu
from studies.gpu import Slack, Stage, pack, restore, run_stages, share

QUICK = Slack(1.0, 0.0)


def script(name: str, code: str, weight: float = 1, limited: bool = False) -> Stage:
    return Stage(name, weight, ("-c", code), limited)


def run(todo: list[Stage], out: Path, seconds: float = 30) -> tuple[bool, dict[str, dict[str, object]]]:
    path = out / "gpu.json"
    status = json.loads(path.read_text()) if path.exists() else {}
    fine = run_stages(todo, out, out / "packed", status, time.monotonic() + seconds, QUICK)
    return fine, json.loads(path.read_text())


def test_shares_add_up_to_the_time_that_is_left():
    todo = gpu.stages(Path("out"), (), small=True)
    left, taken = 100.0, []
    for i, stage in enumerate(todo):
        taken.append(share(stage, todo[i:], left))
        left -= taken[-1]
    assert sum(taken) == pytest.approx(100)
    assert taken[0] == pytest.approx(100 * todo[0].weight / sum(stage.weight for stage in todo))
    assert share(todo[0], todo, -5.0) == 0


def test_a_stage_that_fails_stops_no_other_and_is_tried_again(tmp_path, capsys):
    flag = tmp_path / "flag"
    todo = [
        script("broken", f"import os, sys; sys.exit(0 if os.path.exists({str(flag)!r}) else 'no luck')"),
        script("good", f"open({str(tmp_path / 'count')!r}, 'a').write('x')"),
    ]
    fine, status = run(todo, tmp_path)
    assert not fine
    assert [status[name]["status"] for name in ("broken", "good")] == ["failed", "done"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "broken" in line]
    assert len(lines) == 1 and lines[0].startswith("gpu: broken: failed after ") and lines[0].endswith("; no luck")
    flag.touch()
    fine, status = run(todo, tmp_path)
    assert fine and status["broken"]["status"] == "done"
    assert (tmp_path / "count").read_text() == "x", "what is done is not done again"


def test_a_stage_that_overruns_its_share_is_ended_with_all_it_started(tmp_path):
    child = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    todo = [script("slow", f"{child}; print(p.pid, flush=True); time.sleep(60)"), script("next", "pass")]
    started = time.monotonic()
    fine, status = run(todo, tmp_path, 16)
    assert time.monotonic() - started < 25
    assert fine and [status[name]["status"] for name in ("slow", "next")] == ["stopped", "done"]
    pid = int((tmp_path / "logs" / "slow.log").read_text())
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_a_study_that_its_limit_stopped_is_not_done(tmp_path):
    code = "import sys; assert sys.argv[1] == '--time-limit'; print('stopped; continue with --resume')"
    fine, status = run([script("study", code, limited=True)], tmp_path)
    assert fine and status["study"]["status"] == "stopped"


def test_no_time_is_no_failure(tmp_path):
    fine, status = run([script("study", "raise SystemExit(1)")], tmp_path, 0)
    assert fine and status["study"]["status"] == "no time"


def make_results(out: Path) -> None:
    for name, content in {
        "gpu.json": b"{}",
        "errors/errors.csv": b"k\n",
        "errors/state/seed-0.pt": b"finished",
        "errors/recording-seed-0.h5": b"large",
        "errors/state/.seed-1.77.tmp.pt": b"half",
        "data/cifar-10-batches-bin/x.bin": b"images",
    }.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)


def test_what_is_packed_is_restored_elsewhere_without_images_and_recordings(tmp_path):
    out, packed, other = tmp_path / "out", tmp_path / "out" / "packed", tmp_path / "other"
    make_results(out)
    for _ in range(2):
        pack(out, packed)
    assert {path.name for path in packed.iterdir()} == {"results.tar.gz", "state.tar.gz"}
    with tarfile.open(packed / "results.tar.gz") as archive:
        assert set(archive.getnames()) == {"gpu.json", "errors/errors.csv"}
    restore(packed, other)
    assert (other / "errors" / "state" / "seed-0.pt").read_bytes() == b"finished"
    assert (other / "gpu.json").exists() and not (other / "data").exists()


def test_large_results_come_in_parts_and_large_checkpoints_stay(tmp_path, monkeypatch):
    out, packed, other = tmp_path / "out", tmp_path / "packed", tmp_path / "other"
    make_results(out)
    noise = random.Random(0).randbytes(5000)
    (out / "errors" / "big.csv").write_bytes(noise)
    (out / "errors" / "state" / "unfinished.pt").write_bytes(noise)
    monkeypatch.setattr(gpu, "PART", 2000)
    pack(out, packed)
    sizes = {path.name: path.stat().st_size for path in packed.iterdir()}
    assert max(sizes.values()) <= 2000
    assert "results.tar.gz" not in sizes and {"results.tar.gz.0", "results.tar.gz.1", "state.tar.gz"} <= set(sizes)
    restore(packed, other)
    assert (other / "errors" / "big.csv").read_bytes() == noise
    assert [path.name for path in (other / "errors" / "state").iterdir()] == ["seed-0.pt"]


def test_the_archive_is_unpacked_once(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    out.mkdir()
    (data / "unpack.py").write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(); print('unpacked')")
    assert gpu.find_images(data, out) == out / "data"
    (data / "unpack.py").write_text("raise SystemExit('again')")
    assert gpu.find_images(data, out) == out / "data"
    (data / "cifar-10-batches-bin").mkdir()
    assert gpu.find_images(data, out) == data


def test_a_missing_module_is_named_with_its_package(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    assert gpu.main(["--small", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line == "gpu: missing here: tabulate; carry their wheels in .whl (docs/studies.md)\n"
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_only_the_dry_run_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_dry_run_goes_through_every_stage_and_goes_on_where_it_stopped(tmp_path):
    """A minute and a half: each stage starts, and stops in time. How far it gets is a matter of the machine."""
    out = tmp_path / "out"
    arguments = ["--small", "--data", str(tmp_path), "--out", str(out)]
    started = time.monotonic()
    assert gpu.main([*arguments, "--time-limit", "80"]) == 0
    assert time.monotonic() - started < 120
    status = json.loads((out / "gpu.json").read_text())
    assert list(status) == ["tests", "roofline", "timing", "errors", "monitor", "optimizers"]
    assert {entry["status"] for entry in status.values()} <= {"done", "stopped"}
    assert {path.name for path in (out / "packed").iterdir()} == {"results.tar.gz", "state.tar.gz"}
    assert gpu.main([*arguments, "--time-limit", "80"]) == 2, "a folder with results needs --resume"
    assert gpu.main([*arguments, "--time-limit", "0", "--resume"]) == 0
    assert json.loads((out / "gpu.json").read_text()) == status
