"""Everything that needs the GPU, as one command for a bounded slot on a borrowed machine.

    python -m studies.gpu --data DIR [--accept-modified-data] --out DIR [--time-limit S] [--resume] [--small]

checks the machine, and then runs, each in a process of its own: the `gpu`-marked tests; `studies.roofline`;
t_epoch of SGD and every optimizer; the error study; the monitored run; the optimizers' study. Each stage has its
share of the time that is left, and what it does not use falls to the next. --resume leaves out the stages that are
done and goes on with the others where they stopped. A stage that fails is reported in one line, the others go on,
and the exit status is 1.

After every stage the results are packed into --pack (OUT/packed) for the way home: `results.tar.gz` without any
checkpoint, in parts if it is large, and `state.tar.gz` with the checkpoints of what is finished, which are small.
The others are of gigabytes, and stay. If --data holds these two, --resume on another machine starts from them; if
it holds `unpack.py` and no images, those are unpacked first.

--small is the dry run: the digits presets in place of the paper's, on whatever machine there is.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any, NamedTuple

import torch

from kfacerr.cli import Parser
from kfacerr.exceptions import InputError
from kfacerr.files import write_atomically, write_text
from studies.files import environment
from studies.running import check_at_least, command

__all__ = ["Stage", "main", "pack", "restore", "run_stages", "share", "stages"]

MODULES = {
    "array_api_compat": "array-api-compat",
    "h5py": "h5py",
    "hypothesis": "hypothesis",
    "joblib": "joblib",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "pandas": "pandas",
    "pytest": "pytest",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tabulate": "tabulate",
    "torch": "torch",
    "tqdm": "tqdm",
}
"""What the stages import, and the packages that have it."""

PART = 15 * 2**20
"""Bytes of a packed file; a slot may bring home files of 16 MiB."""

STATUS = "gpu.json"
RESULTS, STATE = "results.tar.gz", "state.tar.gz"
DONE, STOPPED, FAILED, NO_TIME = "done", "stopped", "failed", "no time"
CONTINUE = "continue with --resume"  # a study's last line where a limit stopped it


class Stage(NamedTuple):
    """One program.

    Attributes:
        name: as in the report; its log is called so.
        weight: its share of the time left is this over the sum of those still to come.
        arguments: of the Python interpreter.
        limited: whether it takes --time-limit, and saves its state when that is over.
    """

    name: str
    weight: float
    arguments: tuple[str, ...]
    limited: bool = True


class Slack(NamedTuple):
    """Seconds kept back: for a study to start, when its limit begins, and to save; and for the last packing."""

    saving: float
    packing: float


PAPER_SLACK, SMALL_SLACK = Slack(40.0, 15.0), Slack(8.0, 1.0)


def stages(out: Path, data: Sequence[str], *, small: bool) -> list[Stage]:
    """What is to be done, in order.

    Args:
        out: where the results go, a folder for each study.
        data: the studies' options that say where the images are.
        small: the digits presets.
    """
    preset = ("--preset", "digits" if small else "paper", *data)
    workers = () if small or importlib.util.find_spec("xdist") is None else ("-n", "8")
    tests = ("tests/kfacerr/torch/test_gpu.py", "tests/kfacerr/torch/test_synchronization.py") if small else ()
    # Newer libraries than ours may warn of what they are going to change.
    pytest = ("-m", "pytest", "-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider", *workers, *tests)

    def study(name: str, folder: str, *options: str) -> tuple[str, ...]:
        return ("-m", f"studies.{name}", *preset, *options, "--resume", "--out", str(out / folder))

    return [
        Stage("tests", 4, (*pytest, f"--junitxml={out / 'tests' / 'junit.xml'}"), limited=False),
        Stage(
            "roofline",
            2,
            ("-m", "studies.roofline", *(("--quick",) if small else ()), "--out", str(out / "roofline")),
            limited=False,
        ),
        Stage("timing", 3, study("optimizers", "optimizers", "--timing-only")),
        Stage("errors", 6, study("inverse_errors", "errors")),
        Stage("monitor", 3, study("inverse_errors", "monitor", "--monitor", "--seed", "0")),
        Stage("optimizers", 4, study("optimizers", "optimizers", "--no-timing")),
    ]


# ------------------------------------------------------------------------------------------------- the machine


def check_machine(*, small: bool) -> dict[str, Any]:
    """What is there, printed and returned.

    Raises:
        InputError: a module is missing, or there is no GPU where one is needed.
    """
    if missing := [package for module, package in MODULES.items() if not _importable(module)]:
        raise InputError(f"missing here: {', '.join(missing)}; carry their wheels in .whl (docs/studies.md)")
    found = environment()
    found["versions"] |= {package: importlib.metadata.version(package) for package in MODULES.values()}
    found["cupy"] = _cupy()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["cuda"], found["free_GiB"] = torch.version.cuda, round(free / 2**30, 1)
        print(f"gpu: {found['cuda_device']}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free", flush=True)
    elif not small:
        raise InputError("torch sees no CUDA device (--small is the dry run without one)")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items()))
    print(f"gpu: Python {found['python']}, CuPy: {found['cupy']}, {versions}", flush=True)
    return found


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _cupy() -> str:
    """CuPy's version and devices, or why it is of no use; the studies need none."""
    try:
        import cupy

        return f"{cupy.__version__}, {cupy.cuda.runtime.getDeviceCount()} devices"
    except Exception as error:  # ImportError, or whatever a driver that does not fit makes of it
        return f"none ({' '.join(str(error).split())[:80]})"


def find_images(data: Path, out: Path) -> Path:
    """The folder that holds the images, unpacked into `out` where `data` only has the archive."""
    if not (data / "unpack.py").exists() or any(data.glob("cifar-10-batches-*")):
        return data
    images = out / "data"
    if not images.exists():
        temporary = out / "unpacking"
        unpacking = [sys.executable, str(data / "unpack.py"), str(temporary)]
        if subprocess.run(unpacking, stdout=subprocess.DEVNULL, check=False).returncode:
            raise InputError(f"{data / 'unpack.py'} failed")
        temporary.rename(images)
    return images


# -------------------------------------------------------------------------------------------------- the stages


def share(stage: Stage, to_come: Sequence[Stage], left: float) -> float:
    """Seconds of `left` that the stage may take; `to_come` are those not done yet, itself among them."""
    return max(0.0, left) * stage.weight / sum(other.weight for other in to_come)


def run_stages(
    todo: Sequence[Stage], out: Path, packed: Path, status: dict[str, Any], deadline: float, slack: Slack
) -> bool:
    """Runs the stages that are not done; and writes `status` after each. Whether none failed.

    Args:
        todo: all stages, in order.
        out: the results' folder.
        packed: where they are packed after every stage.
        status: by stage name, what became of it; of an earlier call or empty.
        deadline: of `time.monotonic`.
        slack: see there.
    """
    to_come = [stage for stage in todo if status.get(stage.name, {}).get("status") != DONE]
    failed = False
    for i, stage in enumerate(to_come):
        left = deadline - time.monotonic() - slack.packing
        seconds = share(stage, to_come[i:], left)
        outcome = run_stage(stage, out, seconds, slack.saving)
        before = status.get(stage.name, {})
        if outcome["status"] != NO_TIME or not before:
            total = round(before.get("seconds", 0.0) + outcome["seconds"], 1)
            status[stage.name] = outcome | {"seconds": total}
        failed |= outcome["status"] == FAILED
        print(
            f"gpu: {stage.name}: {outcome['status']} after {outcome['seconds']:.0f} s; {outcome['last']}",
            flush=True,
        )
        if stage.name == "timing":
            _share_timings(out)
        write_text(out / STATUS, json.dumps(status, indent=2) + "\n")
        pack(out, packed)
    return not failed


def run_stage(stage: Stage, out: Path, seconds: float, saving: float) -> dict[str, Any]:
    """Runs one within its seconds: status, seconds, command and the last line of its log."""
    own = max(0.0, seconds - saving) if stage.limited else seconds
    arguments = [*stage.arguments, *(("--time-limit", f"{own:.0f}") if stage.limited else ())]
    log = out / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if own < 1:
        return {"status": NO_TIME, "seconds": 0.0, "command": arguments, "last": ""}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # so that what it starts can be ended with it
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process, saving)
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    stopped = code is None or (code in (0, 130) and CONTINUE in last)
    state = STOPPED if stopped else DONE if code == 0 else FAILED
    taken = time.monotonic() - started
    return {"status": state, "seconds": round(taken, 1), "command": arguments, "last": last[:300]}


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Ends what is left of the process and of those it started: asked first, so that it can save."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(grace)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _share_timings(out: Path) -> None:
    """The error study's Table 1 shows t_epoch of the same drivers at the same size."""
    source = out / "optimizers" / "timing.csv"
    if source.exists():
        (out / "errors").mkdir(exist_ok=True)
        copyfile(source, out / "errors" / "timing.csv")


# --------------------------------------------------------------------------------------------------- the packing


def pack(out: Path, packed: Path) -> None:
    """Writes what `out` holds into files of at most `PART` bytes; see the module's docstring."""
    packed.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and _travels(path, out, packed)]
    state = [path for path in files if "state" in path.relative_to(out).parts]
    results = [path for path in files if path not in state]
    write_atomically(packed / RESULTS, lambda temporary: _tar(results, out, temporary))
    for old in packed.glob(f"{RESULTS}.*"):
        old.unlink()
    content = (packed / RESULTS).read_bytes()
    if len(content) > PART:
        for i, start in enumerate(range(0, len(content), PART)):
            (packed / f"{RESULTS}.{i}").write_bytes(content[start : start + PART])
        (packed / RESULTS).unlink()
    write_atomically(packed / STATE, lambda temporary: _tar(_that_fit(state), out, temporary))


def _that_fit(files: Sequence[Path]) -> list[Path]:
    """The smallest files, as many as one packed file takes: the checkpoint of what is finished is small."""
    chosen, room = [], 0.95 * PART
    for path in sorted(files, key=lambda path: path.stat().st_size):
        if path.stat().st_size > 3 * PART:
            break
        room -= len(zlib.compress(path.read_bytes(), 1)) + 1024
        if room < 0:
            break
        chosen.append(path)
    return chosen


def _travels(path: Path, out: Path, packed: Path) -> bool:
    parts = path.relative_to(out).parts
    return parts[0] not in ("data", "unpacking") and packed not in path.parents and not _is_left(path)


def _is_left(path: Path) -> bool:
    """Recordings are large, and a hidden file is a half-written one."""
    return path.suffix in (".h5", ".partial") or path.name.startswith(".")


def _tar(files: Sequence[Path], out: Path, target: Path) -> None:
    with tarfile.open(target, "w:gz") as archive:
        for path in files:
            archive.add(path, path.relative_to(out))


def restore(data: Path, out: Path) -> None:
    """Puts what an earlier slot packed, if `data` holds it, where it was."""
    for name in (RESULTS, STATE):
        content = b"".join(path.read_bytes() for path in sorted(data.glob(f"{name}*")))  # whole, or its parts
        if content:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                archive.extractall(out, filter="data")


# ------------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; the exit status: 0 (also if the time ran out), 1 if a stage failed, 2 after bad input."""
    parser = Parser(prog="python -m studies.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="CIFAR-10, or its archive")
    parser.add_argument(
        "--accept-modified-data", action="store_true", help="take images that are not the official"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="where they are packed (default: OUT/packed)")
    parser.add_argument("--time-limit", type=float, default=540.0, metavar="S", help="of it all (default: 540)")
    parser.add_argument("--resume", action="store_true", help="continue what DIR holds")
    parser.add_argument("--small", action="store_true", help="the dry run")
    return command("gpu", parser, _run, argv)


def _run(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + arguments.time_limit
    check_at_least(time_limit=(arguments.time_limit, 0))
    out: Path = arguments.out
    if (out / STATUS).exists() and not arguments.resume:
        raise InputError(f"{out} holds results already: continue them with --resume or name another --out")
    about = check_machine(small=arguments.small)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.resume and not (out / STATUS).exists():
        restore(arguments.data, out)
    status = json.loads((out / STATUS).read_text(encoding="utf-8")) if (out / STATUS).exists() else {}
    if (commit := arguments.data / "commit").exists():  # of a working tree that travelled without its history
        about["git_commit"] = about["git_commit"] or commit.read_text(encoding="utf-8").strip()
    write_text(out / f"machine-{about['date'].replace(':', '')}.json", json.dumps(about, indent=2) + "\n")
    data: tuple[str, ...] = ()
    if not arguments.small:
        data = ("--data", str(find_images(arguments.data, out)))
        data += ("--accept-modified-data",) if arguments.accept_modified_data else ()
    slack = SMALL_SLACK if arguments.small else PAPER_SLACK
    todo = stages(out, data, small=arguments.small)
    fine = run_stages(todo, out, arguments.pack or out / "packed", status, deadline, slack)
    print(f"gpu: results are in {out}", flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
