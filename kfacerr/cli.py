"""The command line: `kfacerr replay`, `report`, `advise`, `verify`, `inspect` and `info`.

pandas, matplotlib and h5py are imported by the commands that need them: `kfacerr --help` is to answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import __version__
from .algorithms import SEVEN, not_used
from .command import Parser, check_at_least, path, run, say
from .damping import KINDS
from .exceptions import InputError
from .files import check_outputs, write_csv
from .inverse import CONTINUATIONS, ESCAPED, check_phi
from .process import Settings
from .replay import replay
from .stream import Array
from .study import DAMPINGS, ErrorStudy, Row, averages, metrics_of, named_damping, table

if TYPE_CHECKING:
    from .recording import LayerRecording

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: that of `kfacerr.command.run`, or 1 if a claim fails."""
    parser = Parser(prog="kfacerr", description="How wrong is a cheap K-FAC inverse?")
    parser.add_argument("--version", action="version", version=f"kfacerr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_replay, _add_report, _add_advise, _add_verify, _add_inspect, _add_info):
        add(commands)
    # What overflows is found where it matters, in the results, and said once.
    with np.errstate(all="ignore"):
        return run("kfacerr", parser, lambda arguments: arguments.command(arguments), argv)


def _add_command(
    commands: Any, name: str, command: Callable[[argparse.Namespace], int | None], summary: str
) -> argparse.ArgumentParser:
    """A sub-command that takes a recording."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary)
    parser.set_defaults(command=command)
    parser.add_argument("recording", type=path, metavar="REC", help="a K-factor recording (HDF5)")
    return parser


def _markdown(rows: Sequence[Mapping[str, Any]], floatfmt: str = "g") -> str:
    from tabulate import tabulate

    return tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=floatfmt)


# ---------------------------------------------------------------------------------------------------- info


def _add_info(commands: Any) -> None:
    _add_command(commands, "info", _info, "describe a recording")


def _info(arguments: argparse.Namespace) -> int:
    from .recording import Recording

    with Recording(arguments.recording) as recording:
        described = recording.info()
    print("{path}: {format} version {version}, {bytes:,} bytes".format(**described))
    layers = [_described(name, layer) for name, layer in described["layers"].items()]
    faults = described["faults"]
    if layers or not faults:
        print(_markdown(layers) if layers else "no layers")
    for fault in faults:
        say(f"kfacerr: {fault}")
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


# ------------------------------------------------------------------------------------------------- inspect


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="audit K-factors that other libraries saved")
    parser.set_defaults(command=_inspect)
    add = parser.add_argument
    add(
        "path",
        type=path,
        metavar="PATH",
        help="a file or folder of factors (kronfluence, bergson, torch.save, ...)",
    )
    add(
        "--rank",
        type=int,
        metavar="R",
        help="truncation rank r (default: an eighth of the smaller dimension, 4 to 220)",
    )
    add("--phi", type=float, default=0.1, help="damping ratio")
    add("--damping", metavar="D", help="a lam of each factor in its place: mean=VALUE or lam=VALUE")
    add("--gradients", type=path, metavar="FILE", help="a gradient (d_G, d_A) by layer, to measure steps on")
    add("--out", type=path, metavar="CSV", help="the table of factors")
    add("--html", type=path, metavar="FILE", help="the audit as one page")
    add("--plot", type=path, metavar="FILE", help="a figure of the spectra (pdf, png, svg)")
    add("--damping-map", type=path, metavar="FILE", help="a figure of a layer's errors over damping and rank")
    add("--layer", metavar="NAME", help="of the damping map (default: the first with both factors)")
    add("--continuation", choices=tuple(CONTINUATIONS), default="min", help="of the damping map's spectra")


def _inspect(arguments: argparse.Namespace) -> None:
    from .inspection import inspect

    figures = {"--plot": arguments.plot, "--damping-map": arguments.damping_map}
    written = {"--out": arguments.out, "--html": arguments.html, **figures}
    written = {option: file for option, file in written.items() if file is not None}
    for option in figures.keys() & written.keys():
        from .plot import check_format

        check_format(written[option])
    check_outputs(written, {"what is inspected": arguments.path})
    check_at_least(rank=(arguments.rank, 1))
    options = {name: getattr(arguments, name) for name in ("rank", "phi", "damping", "gradients")}
    found = inspect(arguments.path, **options)
    if arguments.out is not None:
        found.to_csv(arguments.out)
    if arguments.html is not None:
        found.to_html(arguments.html)
    for option in [option for option in figures if option in written]:
        from .plot import save

        drawn = {"continuation": arguments.continuation}
        save(found.plot() if option == "--plot" else found.plot_damping(arguments.layer, **drawn), written[option])
    print(found)


# -------------------------------------------------------------------------------------------------- verify


def _add_verify(commands: Any) -> None:
    add = _add_command(
        commands, "verify", _verify, "check the paper's propositions and the certificates on a recording"
    ).add_argument
    add("--layer", nargs="+", metavar="NAME", help="the layers to check (default: all)")
    add("--rank", type=int, metavar="R", help="truncation rank r (default: min(n, d/4, 50))")
    add("--rho", type=float, default=0.95, help="decay of the exponential average")
    add("--phi", type=float, default=0.1, help="damping ratio of the inverse certificates")
    add("--stretches", type=int, default=3, help="runs of updates that get the dense checks")
    add("--length", type=int, metavar="L", help="updates in each (default: 2 to 5, by size)")
    add("--seed", type=int, default=0, help="of sketches, corrections and probes")
    add("-v", "--verbose", action="store_true", help="a row for each claim as well, with its tightest instance")


def _verify(arguments: argparse.Namespace) -> int:
    from .recording import Recording
    from .verify import verify_layer

    check_at_least(seed=(arguments.seed, 0))
    options = {name: getattr(arguments, name) for name in ("rank", "rho", "phi", "stretches", "length", "seed")}
    failed = 0
    with Recording(arguments.recording) as recording:
        names = list(dict.fromkeys(arguments.layer or recording.layers))
        if not names:
            raise InputError(f"{arguments.recording}: no layers to check")
        for layer in [recording.layer(name) for name in names]:  # a name that is not there is found at once
            report = verify_layer(layer, **options)
            failed += sum(not finding.holds for finding in report.findings)
            print(report, end="\n\n", flush=True)
            if arguments.verbose:
                print(report.details(), end="\n\n", flush=True)
    print("every claim holds" if not failed else f"{failed} claims fail")
    return int(failed > 0)


# ------------------------------------------------------------------------------------------ report, advise


def _add_report(commands: Any) -> None:
    add = _add_command(commands, "report", _report_page, "one HTML file of all layers, their errors and bounds")
    _add_settings(add.add_argument, rank="an eighth of the smaller dimension, 4 to 220")
    add.add_argument("--layer", nargs="+", metavar="NAME", help="the layers (default: all that have windows)")
    add.add_argument("--algorithms", nargs="+", default=list(SEVEN), metavar="NAME", help=_NAMES)
    add.add_argument("--out", required=True, type=path, metavar="HTML", help="the report")


def _report_page(arguments: argparse.Namespace) -> None:
    from .recording import Recording
    from .report import report_recording

    settings = _given(arguments)
    check_outputs({"--out": arguments.out}, {"the recording itself": arguments.recording})
    with Recording(arguments.recording) as recording:
        report = report_recording(
            recording,
            arguments.layer,
            algorithms=arguments.algorithms,
            phi=arguments.phi,
            damping=arguments.damping,
            **settings,
        )
    report.to_html(arguments.out)
    print(report)


def _add_advise(commands: Any) -> None:
    add = _add_command(commands, "advise", _advise, "which inverse should a layer have, and what does it cost")
    _add_settings(add.add_argument, rank="an eighth of the smaller dimension, 4 to 220")
    add.add_argument("--layer", required=True, metavar="NAME", help="the layer")
    budget = "ms per iteration (20), or a multiple of what SGD spends on the layer (1.5x)"
    add.add_argument("--budget", help=f"{budget}; default: 4x")
    add.add_argument("--algorithms", nargs="+", metavar="NAME", help="candidates (default: a choice by the sizes)")
    add.add_argument("--out", required=True, type=path, metavar="CSV", help="the table of candidates")
    add.add_argument("--plot", type=path, metavar="FILE", help="a figure of the frontier (pdf, png, svg)")


def _advise(arguments: argparse.Namespace) -> None:
    from .advice import Budget, advise_recording
    from .recording import Recording
    from .report import default_rank

    budget = None if arguments.budget is None else Budget.parse(arguments.budget)
    settings = _given(arguments)
    _check_outputs(arguments)
    with Recording(arguments.recording) as recording:
        layer = recording.layer(arguments.layer)
        if settings["rank"] is None:
            settings["rank"] = default_rank(layer.d_A, layer.d_G)
        options = {"algorithms": arguments.algorithms, "phi": arguments.phi, "damping": arguments.damping}
        advice = advise_recording(layer, budget=budget, **options, **settings)
    advice.to_csv(arguments.out)
    if arguments.plot is not None:
        from .plot import save

        save(advice.plot(), arguments.plot)
    print(advice)


_NAMES = "names as in the paper, e.g. 'R-KFAC T_inv=50 rank=476'"


def _add_settings(add: Callable[..., Any], rank: str = "") -> None:
    """What all commands say of the processes alike."""
    told = f" (default: {rank})" if rank else ""
    add("--rank", required=not rank, type=int, metavar="R", help=f"target and truncation rank r{told}")
    add("--rho", type=float, default=0.95, help="decay of the exponential average")
    add("--phi", type=float, help="damping ratio (default: the recording's, else 0.1)")
    add("--damping", type=_damping, default="own", metavar="D", help=f"own phi lambda_max, common, or {_KINDS}")
    add("--oversampling", type=int, default=10, help="r_o of the RSVD")
    add("--n-pwr-it", type=int, default=4, help="power iterations of the RSVD")
    add("--continuation", choices=(*CONTINUATIONS, ESCAPED), default="min", help="of the spectrum")
    add("--seed", type=int, default=0, help="of the randomised algorithms")


_KINDS = f"one of {', '.join(f'{kind}=VALUE' for kind in KINDS)}"


def _damping(text: str) -> str:
    """What `ErrorStudy` takes."""
    try:
        named_damping(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} ({', '.join(DAMPINGS)}, {_KINDS})") from error
    return text


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that `_add_settings` asked for, checked."""
    names = ("rank", "oversampling", "n_pwr_it", "seed")
    values = {name: getattr(arguments, name) for name in names}
    check_at_least(**{name: (value, int(name == "rank")) for name, value in values.items()})
    if arguments.phi is not None:
        check_phi(arguments.phi)
    return {"rho": arguments.rho, "continuation": arguments.continuation, **values}


# -------------------------------------------------------------------------------------------------- replay


def _add_replay(commands: Any) -> None:
    add = _add_command(commands, "replay", _replay, "measure the algorithms' errors on a recording").add_argument
    add("--layer", required=True, metavar="NAME", help="the layer to replay")
    _add_settings(add)
    add("--algorithms", nargs="+", default=list(SEVEN), metavar="NAME", help=_NAMES)
    add("--backend", choices=tuple(_BACKENDS), default="numpy", help="where to compute")
    add("--dtype", choices=("float64", "float32"), default="float64", help="to compute in")
    add("--out", required=True, type=path, metavar="CSV", help="the error table")
    add("--plot", type=path, metavar="FILE", help="a figure of the four metrics (pdf, png, svg)")


def _replay(arguments: argparse.Namespace) -> None:
    from .recording import Recording

    convert = _BACKENDS[arguments.backend](arguments.dtype)
    settings = Settings(**_given(arguments))
    _check_outputs(arguments)
    with Recording(arguments.recording) as recording:
        layer = recording.layer(arguments.layer)
        study = ErrorStudy(
            tuple(dict.fromkeys(arguments.algorithms)),
            settings,
            layer.windows,
            phi=0.1 if arguments.phi is None else arguments.phi,
            damping=arguments.damping,
        )
        frame = table(_measure(study, layer, convert, arguments), layer.windows)
        write_csv(arguments.out, frame, digits=12)
        if arguments.plot is not None:
            from .plot import error_figure, save

            title = f"layer {layer.name}"
            figure = error_figure(frame, metrics_of(frame), block=layer.update_every, title=title)
            save(figure, arguments.plot)
        notes = not_used(study.names, settings, {"A": layer.d_A, "G": layer.d_G}, layer.n)
    print(averages(frame).to_markdown(index=False, floatfmt=".3g"))
    if notes:
        print("", *notes, sep="\n")


def _check_outputs(arguments: argparse.Namespace) -> None:
    written = {"--out": arguments.out}
    if arguments.plot is not None:
        from .plot import check_format

        check_format(arguments.plot)
        written["--plot"] = arguments.plot
    kept = {"the recording itself": arguments.recording, "kept by --out": _partial(arguments.out)}
    check_outputs(written, kept)


def _partial(out: Path) -> Path:
    """Where rows are kept if something goes wrong."""
    return out.parent / f"{out.name}.partial"


def _measure(
    study: ErrorStudy,
    layer: "LayerRecording",
    convert: Callable[[np.ndarray], Array],
    arguments: argparse.Namespace,
) -> list[Row]:
    """All rows of the layer; what is computed when something goes wrong is kept beside `--out`."""
    rows: list[Row] = []
    try:
        for new in replay(layer, study.push, convert=convert, phi=arguments.phi):
            rows += new
    except BaseException as error:
        if rows:
            kept = _partial(arguments.out)
            write_csv(kept, table(rows, layer.windows), digits=12)
            error.add_note(f"the {len(rows)} rows computed so far are in {kept}")
        raise
    return rows


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
