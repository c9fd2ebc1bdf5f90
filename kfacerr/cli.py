"""The command line: `kfacerr replay`, `kfacerr verify`, `kfacerr info`."""

import argparse
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from tqdm import tqdm

from .algorithms import SEVEN, Settings
from .exceptions import InputError
from .files import write_atomically
from .inverse import CONTINUATIONS, ESCAPED
from .metrics import METRICS
from .plot import check_format, error_figure, save
from .recording import LayerRecording, Recording
from .stream import Array
from .study import DAMPINGS, ErrorStudy, Row, table
from .verify import Report, verify_layer

__all__ = ["Parser", "main"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all errors of this package's command lines are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that gives the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    0; 1 if a claim fails; 2 after bad input; 128 + the signal's number after Ctrl-C (130), SIGTERM, SIGHUP or a
    closed pipe.
    """
    arguments = _parser().parse_args(argv)
    try:
        # What overflows is found where it matters, in the results, and said once.
        with _stoppable(), np.errstate(all="ignore"):
            status: int | None = arguments.command(arguments)
            sys.stdout.flush()
    except InputError as error:
        return _failed(str(error), error, 2)
    except _Stopped as error:
        return _failed(f"stopped by {error.signal.name}", error, 128 + error.signal)
    except KeyboardInterrupt as error:
        return _failed("interrupted", error, 130)
    except BrokenPipeError:  # `kfacerr info | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141  # 128 + SIGPIPE
    return status or 0


class _Stopped(KeyboardInterrupt):
    """A signal that asks to end, on the path of Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise `_Stopped`, once; a signal that is ignored (nohup) stays so."""

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # nothing is to interrupt the saving
        raise _Stopped(number)

    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def _failed(message: str, error: BaseException, status: int) -> int:
    print("kfacerr: " + "; ".join([message, *getattr(error, "__notes__", ())]), file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="kfacerr", description="How wrong is a cheap K-FAC inverse?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    replay = commands.add_parser(
        "replay",
        help="measure the algorithms' errors on a recording",
        formatter_class=_Help,
    )
    replay.set_defaults(command=_replay)
    replay.add_argument("recording", type=Path, metavar="REC", help="a K-factor recording (HDF5)")
    replay.add_argument("--layer", required=True, metavar="NAME", help="the layer to replay")
    replay.add_argument("--rank", required=True, type=int, metavar="R", help="target and truncation rank r")
    replay.add_argument("--rho", type=float, default=0.95, help="decay of the exponential average")
    replay.add_argument("--phi", type=float, help="damping ratio (default: the recording's, else 0.1)")
    replay.add_argument("--oversampling", type=int, default=10, help="r_o of the RSVD")
    replay.add_argument("--n-pwr-it", type=int, default=4, help="power iterations of the RSVD")
    replay.add_argument("--continuation", choices=(*CONTINUATIONS, ESCAPED), default="min", help="of the spectrum")
    replay.add_argument("--damping", choices=DAMPINGS, default="own", help="lambda of each method, or one for all")
    replay.add_argument(
        "--algorithms",
        nargs="+",
        default=list(SEVEN),
        metavar="NAME",
        help="names as in the paper, e.g. 'R-KFAC T_inv=50 rank=476'",
    )
    replay.add_argument("--seed", type=int, default=0, help="of the randomised algorithms")
    replay.add_argument("--backend", choices=tuple(_BACKENDS), default="numpy", help="where to compute")
    replay.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="to compute in")
    replay.add_argument("--out", required=True, type=Path, metavar="CSV", help="the error table")
    replay.add_argument("--plot", type=Path, metavar="FILE", help="a figure of the four metrics (pdf, png, svg)")

    verify = commands.add_parser(
        "verify",
        help="check the paper's propositions and the certificates on a recording",
        formatter_class=_Help,
    )
    verify.set_defaults(command=_verify)
    verify.add_argument("recording", type=Path, metavar="REC", help="a K-factor recording (HDF5)")
    verify.add_argument("--layer", nargs="+", metavar="NAME", help="the layers to check (default: all)")
    verify.add_argument("--rank", type=int, metavar="R", help="truncation rank r (default: min(n, d/4, 50))")
    verify.add_argument("--rho", type=float, default=0.95, help="decay of the exponential average")
    verify.add_argument("--phi", type=float, default=0.1, help="damping ratio of the inverse certificates")
    verify.add_argument("--stretches", type=int, default=3, help="runs of updates that get the dense checks")
    verify.add_argument("--length", type=int, metavar="L", help="updates in each (default: 2 to 5, by size)")
    verify.add_argument("--seed", type=int, default=0, help="of sketches, corrections and probes")

    info = commands.add_parser("info", help="describe a recording")
    info.set_defaults(command=_info)
    info.add_argument("recording", type=Path, metavar="REC", help="a K-factor recording (HDF5)")
    return parser


# ---------------------------------------------------------------------------------------------------- info


def _info(arguments: argparse.Namespace) -> int:
    with Recording(arguments.recording) as recording:
        described = recording.info()
    print("{path}: {format} version {version}, {bytes:,} bytes".format(**described))
    layers = [_described(name, layer) for name, layer in described["layers"].items()]
    faults = described["faults"]
    if layers or not faults:
        print(pd.DataFrame(layers).to_markdown(index=False) if layers else "no layers")
    for fault in faults:
        print(f"kfacerr: {fault}", file=sys.stderr)
    return 2 if faults else 0


def _described(name: str, layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's row in the table of `kfacerr info`."""
    shown = ("d_A", "d_G", "n", "dtype", "bias", "batch_size", "update_every", "steps", "updates")
    return {
        "layer": name,
        **{key: str(layer[key]) for key in shown},
        "iterations": f"{layer['first_k']} to {layer['last_k']}" if layer["steps"] else "none",
        "phi": str(layer["has_phi"]),
        "windows": ", ".join(map(_window, layer["windows"])) or "none",
    }


def _window(window: dict[str, int | None]) -> str:
    """600+300 (epoch 15): first iteration, length, epoch, and how much of it is there if not all, from where."""
    missing = "" if window["recorded"] == window["length"] else f", {window['recorded']} recorded"
    first = window["first_recorded"]
    late = "" if first in (None, window["start"]) else f" from {first} on"
    return f"{window['start']}+{window['length']} (epoch {window['epoch']}{missing}{late})"


# -------------------------------------------------------------------------------------------------- verify


def _verify(arguments: argparse.Namespace) -> int:
    options = {name: getattr(arguments, name) for name in ("rank", "rho", "phi", "stretches", "length")}
    seed = _at_least("seed", arguments.seed, 0)
    reports = []
    with Recording(arguments.recording) as recording:
        names = list(dict.fromkeys(arguments.layer or recording.layers))
        if not names:
            raise InputError(f"{arguments.recording}: no layers to check")
        for layer in [recording.layer(name) for name in names]:
            reports.append(verify_layer(layer, seed=seed, **options))
            print(_report(reports[-1]), end="\n\n", flush=True)
    failed = sum(not finding.holds for report in reports for finding in report.findings)
    print("every claim holds" if not failed else f"{failed} claims fail")
    return int(failed > 0)


def _report(report: Report) -> str:
    rows = [
        {
            "claim": finding.claim,
            "holds": "yes" if finding.holds else f"NO ({finding.failures} fail)",
            "instances": finding.instances,
            "slack": finding.slack,
            "tightest at": finding.where,
        }
        for finding in report.findings
    ]
    table = pd.DataFrame(rows).to_markdown(index=False, floatfmt=".2g")
    return "\n".join([f"layer {report.layer}", *report.coverage, "", table])


# -------------------------------------------------------------------------------------------------- replay


def _replay(arguments: argparse.Namespace) -> None:
    convert = _BACKENDS[arguments.backend](arguments.dtype)
    _check_outputs(arguments.recording, arguments.out, arguments.plot)
    if arguments.plot is not None:
        check_format(arguments.plot)
    settings = Settings(
        rank=_at_least("rank", arguments.rank, 1),
        rho=arguments.rho,
        oversampling=_at_least("oversampling", arguments.oversampling, 0),
        n_pwr_it=_at_least("n-pwr-it", arguments.n_pwr_it, 0),
        continuation=arguments.continuation,
        seed=_at_least("seed", arguments.seed, 0),
    )
    with Recording(arguments.recording) as recording:
        layer = recording.layer(arguments.layer)
        if not layer.windows:
            raise InputError(f"{arguments.recording}: layer {layer.name!r}: no windows to measure in")
        study = ErrorStudy(
            tuple(dict.fromkeys(arguments.algorithms)),
            settings,
            layer.windows,
            phi=0.1 if arguments.phi is None else arguments.phi,
            damping=arguments.damping,
        )
        frame = table(_measure(study, layer, convert, arguments), layer.windows)
        _write_table(arguments.out, frame)
        if arguments.plot is not None:
            figure = error_figure(frame, METRICS, block=layer.update_every, title=f"layer {layer.name}")
            save(figure, arguments.plot)
    print(averages(frame).to_markdown(index=False, floatfmt=".3g"))


def _check_outputs(recording: Path, out: Path, plot: Path | None) -> None:
    """Refuses before the work what would fail, or do harm, after it."""
    files = {"the recording itself": recording, "--out": out, "--plot": plot, "kept by --out": _partial(out)}
    named = {what: path for what, path in files.items() if path is not None}
    for path in filter(None, (out, plot)):
        _check_output(path)
    for (what, path), (_, other) in itertools.combinations(named.items(), 2):
        if path.resolve() == other.resolve():
            raise InputError(f"{other}: is {what}, another name is needed")


def _check_output(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, a file's name is needed")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: the folder {path.parent} is not writable")


def _partial(out: Path) -> Path:
    """Where rows are kept if something goes wrong."""
    return out.with_name(out.name + ".partial")


def _write_table(path: Path, frame: pd.DataFrame) -> None:
    write_atomically(path, lambda temporary: frame.to_csv(temporary, index=False, float_format="%.12g"))


def _measure(
    study: ErrorStudy, layer: LayerRecording, convert: Callable[[np.ndarray], Array], arguments: argparse.Namespace
) -> list[Row]:
    """All rows of the layer; what is computed when something goes wrong is kept beside `--out`."""
    rows: list[Row] = []
    where = f"{arguments.recording}: layer {layer.name!r}"
    try:
        for step in tqdm(layer.steps(), total=len(layer), unit="step", disable=None):
            phi = step.phi if arguments.phi is None else None
            try:
                rows += study.push(step._replace(A=convert(step.A), G=convert(step.G), phi=phi))
            except InputError as error:
                raise InputError(f"{where}, {error}") from None
    except BaseException as error:
        if rows:
            kept = _partial(arguments.out)
            _write_table(kept, table(rows, layer.windows))
            error.add_note(f"the {len(rows)} rows computed so far are in {kept}")
        raise
    if not rows:
        raise InputError(f"{where}: no recorded iteration lies in a window")
    return rows


def averages(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean of every metric over each window, algorithms in their order (the error columns of Table 1).

    `window`, its first iteration, is a column if it is one of the table's.
    """
    order = list(dict.fromkeys(frame.algorithm))
    window = [name for name in ("epoch", "window") if name in frame]
    mean = frame.groupby([*window, "algorithm", "metric"]).value.mean().unstack()
    return mean.reindex(order, level="algorithm")[list(METRICS)].reset_index()


def _at_least(what: str, value: int, least: int) -> int:
    if value < least:
        raise InputError(f"--{what} must be at least {least}, got {value}")
    return value


# ------------------------------------------------------------------------------------------------ backends


def _numpy(dtype: str) -> Callable[[np.ndarray], Array]:
    return lambda X: X.astype(dtype)


def _torch(dtype: str) -> Callable[[np.ndarray], Array]:
    try:
        import torch
    except ImportError:
        raise InputError("--backend torch: PyTorch is not installed (pip install 'kfacerr[torch]')") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return lambda X: torch.from_numpy(X).to(device=device, dtype=getattr(torch, dtype))


def _cupy(dtype: str) -> Callable[[np.ndarray], Array]:
    try:
        import cupy
    except ImportError:
        raise InputError("--backend cupy: CuPy is not installed (pip install 'kfacerr[cuda]')") from None
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise InputError(f"--backend cupy: no GPU ({error})") from None
    return lambda X: cupy.asarray(X, dtype=dtype)


_BACKENDS: dict[str, Callable[[str], Callable[[np.ndarray], Array]]] = {
    "numpy": _numpy,
    "cupy": _cupy,
    "torch": _torch,
}


if __name__ == "__main__":
    sys.exit(main())
