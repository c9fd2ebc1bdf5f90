"""What every command line shares: one line for every failure, the exit statuses, signals, defaults in the help."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from kfacerr.command import Parser, check_at_least, run
from kfacerr.exceptions import InputError

SIGNALS = ["SIGTERM", "SIGHUP"]


def parser() -> Parser:
    made = Parser(prog="python -m studies.example", description="An example.")
    made.add_argument("--rounds", type=int, default=3, help="times each is timed")
    made.add_argument("--seed", type=int, default=0, help="of the probes")
    made.add_argument("--size", type=int, default=7, help="of it (default: as large as fits)")
    made.add_argument("--limit", type=float, help="seconds")
    made.add_argument("--quick", action="store_true", help="a miniature")
    commands = made.add_subparsers()
    commands.add_parser("inner").add_argument("--depth", type=int, default=2, help="of it")
    return made


def status_of(function, *argv: str) -> int:
    return run("example", parser(), function, argv)


def raising(error: BaseException):
    def function(_):
        raise error

    return function


@pytest.fixture(autouse=True)
def _default_signals():
    """As a shell starts a program; under nohup SIGHUP is ignored, and stays so."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in map(signal.Signals.__getitem__, SIGNALS)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------- parser


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "x"], "python -m studies.example: argument --rounds: invalid int value: 'x' "),
        (["--no-such"], "python -m studies.example: unrecognized arguments: --no-such "),
        (["inner", "--depth", "x"], "python -m studies.example inner: argument --depth: invalid int value: 'x' "),
    ],
)
def test_an_error_of_the_parser_is_one_line_that_says_where_the_help_is(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(argv)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(message) and line.endswith(" --help)\n") and line.count("\n") == 1


def test_the_help_gives_every_default_that_says_something_once(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "times each is timed (default: 3)" in text and "of the probes (default: 0)" in text
    assert text.count("default") == 3 and "as large as fits" in text
    with pytest.raises(SystemExit):
        parser().parse_args(["inner", "--help"])
    assert "(default: 2)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- statuses


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1), (130, 130)])
def test_the_status_is_what_the_command_returns(returned, status):
    assert status_of(lambda arguments: returned if arguments.rounds == 5 else 99, "--rounds", "5") == status


def test_bad_input_is_one_line_with_its_notes_and_status_2(capsys):
    error = InputError("a.h5: layer 'fc':\nno windows")
    error.add_note("what is computed is in b.csv")
    assert status_of(raising(error)) == 2
    assert capsys.readouterr().err == "example: a.h5: layer 'fc': no windows; what is computed is in b.csv\n"


def test_ctrl_c_is_one_line_and_130(capsys):
    assert status_of(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "example: interrupted\n"


def test_a_defect_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        status_of(lambda _: 1 // 0)


def test_a_reader_who_has_enough_is_no_error():
    code = (
        "import sys; from kfacerr.command import Parser, run; "
        "sys.exit(run('example', Parser(), lambda _: print('x' * 10**6), []))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


# -------------------------------------------------------------------------------------------------- streams

EXAMPLE = "import sys; from kfacerr.command import Parser, run, say; "
EXAMPLE += "parser = Parser(prog='example', description='\\u00a7 4.2'); "
FULL = b"example: the output: cannot be read or written: No space left on device\n"
PRINTS = EXAMPLE + "sys.exit(run('example', parser, lambda _: print('\\u00a7 \\u2014 \\u03c1'), sys.argv[1:]))"
FAILS = (
    EXAMPLE
    + """
from kfacerr.exceptions import InputError
def fails(_):
    raise InputError('\\u00a7 4.2')
sys.exit(run('example', parser, fails, sys.argv[1:]))
"""
)
SAYS = EXAMPLE + "sys.exit(run('example', parser, lambda _: say('half \\u00a7 done'), sys.argv[1:]))"
FILES = (
    "import os; "
    + EXAMPLE
    + ("sys.exit(run('example', parser, lambda _: open('out', 'w').write(str(os.open('.', 0) > 2)) and None, []))")
)


def shell(code: str, line: str = "", folder=None, **environment: str) -> tuple[int, bytes, bytes]:
    """Status, stdout and stderr of `python -c code` in a shell's line."""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {line}', sys.executable, code],
        capture_output=True,
        check=False,
        timeout=120,
        cwd=folder,
        env={**{key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}, **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("code", "line", "expected"),
    [
        (PRINTS, ">&-", (0, b"", b"")),
        (PRINTS, "2>&-", (0, "§ — ρ\n".encode(), b"")),
        (PRINTS, "<&- >&- 2>&-", (0, b"", b"")),
        (
            PRINTS,
            ">/dev/full",
            (2, b"", FULL),
        ),
        (
            PRINTS,
            "--help >/dev/full",
            (2, b"", FULL),
        ),
        (PRINTS, "--no-such >&- 2>&-", (2, b"", b"")),
        (FAILS, "2>/dev/full", (2, b"", b"")),
        (FAILS, ">&- 2>&-", (2, b"", b"")),
        (SAYS, "2>/dev/full", (0, b"", b"")),
    ],
)
@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_streams_that_are_closed_or_full_end_cleanly(code, line, expected, unbuffered):
    assert shell(code, line, PYTHONUTF8="1", **unbuffered) == expected


def test_where_streams_are_closed_no_file_gets_their_numbers(tmp_path):
    root = str(Path(__file__).parents[2])
    assert shell(FILES, "<&- >&- 2>&-", tmp_path, PYTHONPATH=root)[0] == 0
    assert (tmp_path / "out").read_text() == "True"


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_what_an_encoding_lacks_is_escaped(environment):
    status, out, err = shell(PRINTS, **environment)
    assert (status, err) == (0, b"") and out in (rb"\xa7 \u2014 \u03c1" + b"\n", "§ — ρ\n".encode())
    status, out, err = shell(FAILS, **environment)
    assert (status, out) == (2, b"") and err.endswith(b" 4.2\n") and err.count(b"\n") == 1
    assert shell(PRINTS, "--help", **environment)[0] == 0


def test_an_error_of_the_system_is_one_line(capsys):
    assert status_of(raising(OSError(28, "No space left on device", "a.csv"))) == 2
    assert capsys.readouterr().err == "example: a.csv: cannot be read or written: No space left on device\n"
    assert status_of(raising(MemoryError("Unable to allocate 2 TiB"))) == 2
    assert capsys.readouterr().err == "example: the memory does not suffice: Unable to allocate 2 TiB\n"


# -------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_raises_where_it_arrives_and_what_is_computed_can_be_saved(capsys, name):
    number, saved = getattr(signal, name), []

    def function(_):
        try:
            signal.raise_signal(number)
        except BaseException as error:
            signal.raise_signal(number)  # a second one does not interrupt the saving
            saved.append("rows")
            error.add_note("1 row is in x.partial")
            raise

    assert status_of(function) == 128 + number
    assert saved == ["rows"]
    assert capsys.readouterr().err == f"example: stopped by {name}; 1 row is in x.partial\n"
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so(capsys):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    assert status_of(lambda _: signal.raise_signal(signal.SIGHUP)) == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert capsys.readouterr().err == ""


def test_a_command_may_look_at_a_flag_instead_and_before_and_after_signals_raise(capsys):
    """As the studies do, whose iterations are finished and saved first."""
    reasons = []

    @contextmanager
    def listening():
        before = signal.signal(signal.SIGTERM, lambda number, _: reasons.append(number))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def function(_):
        with listening():
            signal.raise_signal(signal.SIGTERM)
            reasons.append("saved")
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("outside it the signal raises")

    assert status_of(function) == 128 + signal.SIGTERM
    assert reasons == [signal.SIGTERM, "saved"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_command_runs_in_a_thread_which_cannot_listen_to_signals():
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(status_of(lambda _: None)))
    thread.start()
    thread.join()
    assert statuses == [0]


def test_a_process_is_ended_by_its_signal_with_one_line():
    code = (
        "import os, signal, sys, time; from kfacerr.command import Parser, run; "
        "sys.exit(run('example', Parser(), lambda _: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(30)), []))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "example: stopped by SIGTERM\n")


# -------------------------------------------------------------------------------------------------- options


def test_an_option_below_its_least_value_is_named():
    check_at_least(time_limit=(None, 0), rounds=(1, 1))
    with pytest.raises(InputError, match=r"^--time-limit must be at least 0, got -1$"):
        check_at_least(rounds=(1, 1), time_limit=(-1, 0))
    with pytest.raises(InputError, match=r"^--time-limit must be at least 0, got nan$"):
        check_at_least(time_limit=(float("nan"), 0))
