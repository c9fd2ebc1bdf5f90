"""The command line: `kfacerr replay`, `kfacerr info`."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from .algorithms import SEVEN, Settings
from .errors import InputError
from .inverse import CONTINUATIONS
from .metrics import METRICS
from .plot import METRIC_LABELS, error_figure
from .recording import LayerRecording, Recording
from .replay import DAMPINGS, ErrorStudy, Row, table
from .stream import Array, Step

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 2 after bad input, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except InputError as error:
        print(f"kfacerr: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kfacerr: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kfacerr", description="How wrong is a cheap K-FAC inverse?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    replay = commands.add_parser(
        "replay",
        help="measure the algorithms' errors on a recording",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    replay.set_defaults(command=_replay)
    replay.add_argument("recording", type=Path, metavar="REC", help="a K-factor recording (HDF5)")
    replay.add_argument("--layer", required=True, metavar="NAME", help="the layer to replay")
    replay.add_argument("--rank", required=True, type=int, metavar="R", help="target and truncation rank r")
    replay.add_argument("--rho", type=float, default=0.95, help="decay of the exponential average")
    replay.add_argument("--phi", type=float, help="damping ratio (default: the recording's, else 0.1)")
    replay.add_argument("--oversampling", type=int, default=10, help="r_o of the RSVD")
    replay.add_argument("--n-pwr-it", type=int, default=4, help="power iterations of the RSVD")
    replay.add_argument("--continuation", choices=tuple(CONTINUATIONS), default="min", help="of the spectrum")
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

    info = commands.add_parser("info", help="describe a recording")
    info.set_defaults(command=_info)
    info.add_argument("recording", type=Path, metavar="REC", help="a K-factor recording (HDF5)")
    return parser


# ---------------------------------------------------------------------------------------------------- info


def _info(arguments: argparse.Namespace) -> None:
    with Recording(arguments.recording) as recording:
        described = recording.info()
    layers = described.pop("layers")
    print("  ".join(f"{key} {value}" for key, value in described.items()))
    frame = pd.DataFrame(layers).T if isinstance(layers, dict) else pd.DataFrame(layers)
    print(frame.to_markdown())


# -------------------------------------------------------------------------------------------------- replay


def _replay(arguments: argparse.Namespace) -> None:
    convert = _BACKENDS[arguments.backend](arguments.dtype)
    for path in filter(None, (arguments.out, arguments.plot)):
        if not path.parent.is_dir():
            raise InputError(f"{path}: the folder {path.parent} does not exist")
    settings = Settings(
        rank=_at_least("rank", arguments.rank, 1),
        rho=arguments.rho,
        oversampling=_at_least("oversampling", arguments.oversampling, 0),
        n_pwr_it=_at_least("n-pwr-it", arguments.n_pwr_it, 0),
        seed=_at_least("seed", arguments.seed, 0),
    )
    with Recording(arguments.recording) as recording:
        layer = recording.layer(arguments.layer)
        if not layer.windows:
            raise InputError(f"{arguments.recording}, layer {layer.name!r}: no windows to measure in")
        study = ErrorStudy(
            tuple(dict.fromkeys(arguments.algorithms)),
            settings,
            layer.windows,
            phi=0.1 if arguments.phi is None else arguments.phi,
            continuations=(arguments.continuation,),
            damping=arguments.damping,
        )
        rows = _measure(study, layer, convert, arguments)
        frame = table(rows)
        _write(arguments.out, lambda path: frame.to_csv(path, index=False, float_format="%.12g"))
        if arguments.plot is not None:
            figure = error_figure(frame, METRICS, block=layer.update_every, title=f"layer {layer.name}")
            _write(arguments.plot, lambda path: figure.savefig(path, dpi=200))
    print(averages(frame).to_markdown(floatfmt=".3g"))


def _measure(
    study: ErrorStudy, layer: LayerRecording, convert: Callable[[np.ndarray], Array], arguments: argparse.Namespace
) -> list[Row]:
    """All rows of the layer; what is computed when something goes wrong is kept beside `--out`."""
    rows: list[Row] = []
    where = f"{arguments.recording}, layer {layer.name!r}"
    try:
        for step in tqdm(_steps(layer, convert, arguments.phi), total=len(layer), unit="step", disable=None):
            try:
                rows += study.push(step)
            except InputError as error:
                raise InputError(f"{where}, {error}") from None
    except (InputError, KeyboardInterrupt):
        if rows:
            kept = arguments.out.with_name(arguments.out.name + ".partial")
            table(rows).to_csv(kept, index=False, float_format="%.12g")
            print(f"kfacerr: the {len(rows)} rows computed so far are in {kept}", file=sys.stderr)
        raise
    if not rows:
        raise InputError(f"{where}: no recorded iteration lies in a window")
    return rows


def _steps(layer: LayerRecording, convert: Callable[[np.ndarray], Array], phi: float | None) -> Iterator[Step]:
    for step in layer.steps():
        yield step._replace(A=convert(step.A), G=convert(step.G), phi=step.phi if phi is None else None)


def averages(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean of every metric over each window, algorithms in their order (the error columns of Table 1)."""
    order = list(dict.fromkeys(frame.algorithm))
    mean = frame.groupby(["epoch", "algorithm", "metric"]).value.mean().unstack()
    mean = mean.reindex(order, level="algorithm")[list(METRICS)]
    return mean.rename(columns=METRIC_LABELS).reset_index()


def _at_least(what: str, value: int, least: int) -> int:
    if value < least:
        raise InputError(f"--{what} must be at least {least}, got {value}")
    return value


def _write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Writes under a temporary name beside `path` and renames: `path` is never half written."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        writer(temporary)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


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
