"""What every command line here shares, `kfacerr` and the studies: parsing, errors, exit statuses, signals.

    def main(argv: Sequence[str] | None = None) -> int:
        parser = Parser(prog="python -m studies.timing", description="How long an epoch takes.")
        parser.add_argument("--rounds", type=int, default=3, help="times each is timed")
        return run("timing", parser, _run, argv)

A failure is one line on stderr that begins with the program's name. The exit status is 0, or what the command
returns; 2 after bad input, or where a file or the output cannot be written; 128 + the signal's number after Ctrl-C
(130), SIGTERM, SIGHUP or a closed pipe (141).
"""

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from .checks import path_of
from .exceptions import InputError

__all__ = ["Parser", "check_at_least", "path", "run", "say"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help gives every default that there is.

    Args:
        *positional: of `argparse.ArgumentParser`.
        **options: of `argparse.ArgumentParser`; sub-commands made by `add_subparsers` are of this class too.
    """

    def __init__(self, *positional: Any, **options: Any) -> None:
        super().__init__(*positional, **{"formatter_class": _Help, **options})

    def error(self, message: str) -> NoReturn:
        """Exits with status 2 and one line that says where the help is."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Without argparse's silence where the help cannot be written."""
        (sys.stderr if file is None else file).write(message or "")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Gives a default unless it says nothing (None, a switch that is off) or the help's own words say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None or action.default is False or "(default" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


def run(
    program: str,
    parser: argparse.ArgumentParser,
    function: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None,
) -> int:
    """Parses the command line, runs `function` on it, and turns what stops it into one line and an exit status.

    Within `function` SIGTERM and SIGHUP raise a KeyboardInterrupt, as Ctrl-C does, so that `except BaseException`
    or `finally` can save what is computed; notes added to the exception (`add_note`) end the line. A function
    that would rather look at a flag between iterations installs handlers of its own and restores these after.

    Args:
        program: the name that begins the line.
        parser: of the command line.
        function: the command; returns its exit status, None for 0.
        argv: the arguments; None for those of the process.

    Returns:
        The exit status, see the module.

    Raises:
        SystemExit: of the parser, after its help or an error of its own.
    """
    _prepare_streams()
    try:
        with _signals_raise():
            try:
                status = function(parser.parse_args(argv))
            except SystemExit:  # of the parser, whose help may be all that is printed
                sys.stdout.flush()
                raise
            sys.stdout.flush()  # here, where a closed pipe or a full disk is caught
    except InputError as error:
        return _failed(program, str(error), error, 2)
    except _Stopped as error:
        return _failed(program, f"stopped by {error.signal.name}", error, 128 + error.signal)
    except KeyboardInterrupt as error:
        return _failed(program, "interrupted", error, 128 + signal.SIGINT)
    except BrokenPipeError:  # `kfacerr info | head`: whoever read has enough
        _give_up(sys.stdout)
        return 141  # 128 + SIGPIPE, which Windows has not
    except OSError as error:  # of no file that we name ourselves: standard output on a full disk, first of all
        _give_up(sys.stdout)
        where = error.filename or "the output"
        return _failed(program, f"{where}: cannot be read or written: {error.strerror or error}", error, 2)
    except MemoryError as error:
        return _failed(program, f"the memory does not suffice: {error or 'a smaller rank or layer may'}", error, 2)
    return status or 0


def say(line: str) -> None:
    """Prints a line on stderr; a stderr that is full or gone is no reason to lose the work."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _give_up(sys.stderr)


def _prepare_streams() -> None:
    """Standard streams that take what is written: all letters, in whatever encoding, and nothing where closed.

    A closed one (`>&-`) is opened as the null device: else the next file would get its number, and stray output.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            null = os.open(os.devnull, os.O_RDWR)  # the least number that is free: its own
            os.set_inheritable(null, True)
            setattr(sys, name, os.fdopen(null, mode, encoding="utf-8", closefd=False))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _give_up(stream: TextIO) -> None:
    """Where a stream takes nothing more, what is in its buffer goes nowhere: at the exit nobody would catch it."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def check_at_least(**options: tuple[float | None, float]) -> None:
    """Refuses an option below its least value.

    >>> check_at_least(rounds=(3, 1), time_limit=(-1, 0))
    Traceback (most recent call last):
    kfacerr.exceptions.InputError: --time-limit must be at least 0, got -1

    Args:
        **options: value and least value by the option's name, with _ for -; a value of None was not given.

    Raises:
        InputError: names the option, its least value and the value.
    """
    for option, (value, least) in options.items():
        if value is not None and not value >= least:  # NaN is not either
            raise InputError(f"--{option.replace('_', '-')} must be at least {least}, got {value}")


def path(text: str) -> Path:
    """The type of an option that names a file or folder."""
    try:
        return path_of(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _Stopped(KeyboardInterrupt):
    """A signal that asks to end, on the path of Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
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


def _failed(program: str, message: str, error: BaseException, status: int) -> int:
    line = "; ".join([message, *getattr(error, "__notes__", ())])
    say(f"{program}: {' '.join(line.splitlines())}")
    return status
