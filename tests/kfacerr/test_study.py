"""The error study gives what the paper's formulas give, and does not depend on how it is driven."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest

from kfacerr import inverse as inverse_module
from kfacerr.algorithms import SEVEN, Algorithm
from kfacerr.array import device_array
from kfacerr.exceptions import InputError
from kfacerr.lowrank import LowRank
from kfacerr.process import Estimate, Process, Settings
from kfacerr.stream import Step, Window
from kfacerr.study import ErrorStudy, by_window, table
from tests import reference
from tests.strategies import stream

RANK, RHO, PHI = 5, 0.9, 0.1
EXACT = Settings(rank=RANK, rho=RHO, oversampling=1000)
RANDOM = Settings(rank=RANK, rho=RHO, oversampling=1, n_pwr_it=0, seed=3)
WINDOWS = [Window(20, 27, 1), Window(60, 14, 2)]
DETERMINISTIC = {
    "K-FAC T_inv=10": ("K-FAC", 10),
    "R-KFAC T_inv=10": ("R-KFAC", 10),
    "R-KFAC T_inv=7": ("R-KFAC", 7),
    "R-KFAC T_inv=300": ("R-KFAC", 300),
    "B-KFAC": ("B-KFAC", 1),
    "B-R-KFAC T_rsvd=10": ("B-R-KFAC", 10),
    "B-R-KFAC T_rsvd=15": ("B-R-KFAC", 15),
}


def make_steps(xp=None, *, d_A=17, d_G=12, n=3, every=4, first=0, last=74, kinds=("plain",), phi=None):
    """Steps first..last-1; the factors take every `every`-th."""
    count = last - first
    A = stream(np.random.default_rng(1), d=d_A, n=n, steps=count, kinds=kinds, decay="slow decay")
    G = stream(np.random.default_rng(2), d=d_G, n=n, steps=count, kinds=kinds, decay="fast decay")
    lift = xp.array if xp else np.asarray
    return [
        Step(first + i, lift(A[i]), lift(0.1 * G[i]), i % every == 0, phi and phi(first + i)) for i in range(count)
    ]


def rows_of(study, steps):
    return [row for step in steps for row in study.push(step)]


def assert_rows_are(rows, expected):
    got = {(row.algorithm, row.k, row.metric): row.value for row in rows}
    assert len(got) == len(rows) and got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-8, abs=1e-12), key


@pytest.mark.parametrize("continuation", ["min", "trace", "none"])
@pytest.mark.parametrize("damping", ["own", "common"])
def test_deterministic_algorithms_give_the_dense_evaluation(fast_xp, continuation, damping):
    study = ErrorStudy(
        list(DETERMINISTIC), replace(EXACT, continuation=continuation), WINDOWS, phi=PHI, damping=damping
    )
    expected = reference.replay_reference(
        make_steps(),
        WINDOWS,
        DETERMINISTIC,
        rank=RANK,
        rho=RHO,
        phi=PHI,
        continuation=continuation,
        damping=damping,
    )
    assert_rows_are(rows_of(study, make_steps(fast_xp)), expected)


def test_the_dense_evaluation_is_met_on_the_strict_backend_too(xp):
    steps, windows = make_steps(xp, last=30), [Window(20, 6)]
    study = ErrorStudy(list(DETERMINISTIC), EXACT, windows, phi=PHI)
    expected = reference.replay_reference(make_steps(last=30), windows, DETERMINISTIC, rank=RANK, rho=RHO, phi=PHI)
    assert_rows_are(rows_of(study, steps), expected)


@pytest.mark.parametrize("start", [21, 22, 23])
def test_a_window_may_start_at_a_step_without_update(start):
    windows = [Window(start, 17)]
    study = ErrorStudy(list(DETERMINISTIC), EXACT, windows, phi=PHI)
    expected = reference.replay_reference(make_steps(last=45), windows, DETERMINISTIC, rank=RANK, rho=RHO, phi=PHI)
    assert_rows_are(rows_of(study, make_steps(last=45)), expected)


def test_a_window_whose_start_is_missing_starts_with_the_first_step_there_is():
    """If that is an update: periods are counted from it, also in a second such window."""
    names = list(DETERMINISTIC)
    steps = [s for s in make_steps() if s.k not in (*range(20, 24), *range(60, 64))]
    cut = rows_of(ErrorStudy(names, EXACT, [Window(20, 27, 1), Window(60, 14, 2)], phi=PHI), steps)
    told = rows_of(ErrorStudy(names, EXACT, [Window(24, 23, 1), Window(64, 10, 2)], phi=PHI), steps)
    assert cut == told


def test_a_window_that_begins_between_two_updates_is_refused():
    study = ErrorStudy(["B-KFAC"], EXACT, WINDOWS, phi=PHI)
    steps = [s for s in make_steps() if s.k != 60]
    rows = rows_of(study, [s for s in steps if s.k < 60])
    assert rows
    with pytest.raises(InputError, match=r"^iteration 61: the window from 60 begins only here, .* not update"):
        study.push(next(s for s in steps if s.k == 61))


def test_windows_of_one_epoch_are_told_apart():
    windows = [Window(20, 10, 1), Window(60, 14, 1)]
    rows = rows_of(ErrorStudy(["B-KFAC"], EXACT, windows, phi=PHI), make_steps())
    frame = table(rows, windows)
    assert [(label, part.k.min(), part.k.max()) for label, part in by_window(frame)] == [
        ("epoch 1, from 20", 20, 29),
        ("epoch 1, from 60", 60, 73),
    ]
    assert [label for label, _ in by_window(table(rows))] == ["epoch 1"]  # as earlier versions wrote it


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("exponents", [(40, -60), (-100, 90), (3, 0)])
def test_the_scale_of_the_columns_changes_no_row(fast_xp, dtype, exponents):
    """In float32 the squares of columns times 2^90 are beyond its range."""

    def rows(a, g):
        steps = [
            s._replace(A=fast_xp.array(np.ldexp(s.A, a), dtype), G=fast_xp.array(np.ldexp(s.G, g), dtype))
            for s in make_steps()
        ]
        return rows_of(ErrorStudy(SEVEN, RANDOM, WINDOWS, phi=PHI), steps)

    for one, other in zip(rows(*exponents), rows(0, 0), strict=True):
        assert one[:3] == other[:3] and one.value == pytest.approx(other.value, rel=1e-12)


def test_a_metric_that_is_not_finite_is_refused_by_name():
    study = ErrorStudy(["B-KFAC"], EXACT, [Window(0, 5)], phi=PHI)
    steps = [s._replace(A=s.A.astype(np.float32), G=s.G.astype(np.float32)) for s in make_steps(last=5)]
    study.push(steps[0])
    with (
        pytest.raises(InputError, match=r"^iteration 1: .*(B-KFAC: \w+ is (inf|nan)|NaN or Inf)"),
        np.errstate(all="ignore"),
    ):
        study.push(steps[1]._replace(A=np.float32(1e30) * steps[1].A, update=True))


def test_a_window_may_start_with_the_stream():
    windows = [Window(0, 13)]
    study = ErrorStudy(list(DETERMINISTIC), EXACT, windows, phi=PHI)
    expected = reference.replay_reference(make_steps(last=13), windows, DETERMINISTIC, rank=RANK, rho=RHO, phi=PHI)
    assert_rows_are(rows_of(study, make_steps(last=13)), expected)


@pytest.mark.parametrize("n", [1, 4, 9])
def test_odd_shapes_and_special_columns_give_the_dense_evaluation(n):
    """n > d_G, r + n >= d, columns that are zero, repeated or tiny.

    Not huge ones: the smallest modes of the dense eigh, with an error of eps ||M||, are then no reference.
    """
    kinds = ("plain", "zero", "repeated", "tiny")
    shapes = {"d_A": 14, "d_G": 8, "n": n, "kinds": kinds, "last": 50}
    windows = [Window(20, 25)]
    study = ErrorStudy(list(DETERMINISTIC), replace(EXACT, continuation="trace"), windows, phi=PHI)
    expected = reference.replay_reference(
        make_steps(**shapes), windows, DETERMINISTIC, rank=RANK, rho=RHO, phi=PHI, continuation="trace"
    )
    assert_rows_are(rows_of(study, make_steps(**shapes)), expected)


@pytest.mark.parametrize("damping", ["own", "common"])
def test_a_certified_bound_is_never_below_the_error_and_needs_none_of_the_reference(damping):
    """Also with each method's own damping, and with every continuation."""
    names = [f"{n} continuation={c}" for n in (*SEVEN, "FD") for c in ("none", "min", "trace")]
    rows = rows_of(ErrorStudy(names, RANDOM, WINDOWS, phi=PHI, damping=damping, certify=True), make_steps())
    values = {(row.algorithm, row.k, row.metric): row.value for row in rows}
    bounds = {key: value for key, value in values.items() if key[2].startswith("certified")}
    assert len(bounds) > 200
    for (name, k, metric), bound in bounds.items():
        error = values[name, k, metric.replace("certified", "inverse")]
        assert error <= bound * (1 + 1e-9) + 1e-12, (name, k, metric)
    assert any(
        bound < 3 * values[name, k, metric.replace("certified", "inverse")]
        for (name, k, metric), bound in bounds.items()
    )


@pytest.mark.parametrize("damping", ["own", "common"])
def test_a_damping_ratio_that_changes_at_every_step_is_used_at_every_step(damping):
    def phi(k):
        return 0.05 + 0.01 * (k % 3)

    windows = [Window(20, 10)]
    study = ErrorStudy(list(DETERMINISTIC), EXACT, windows, phi=99.0, damping=damping)
    expected = reference.replay_reference(
        make_steps(last=30, phi=phi), windows, DETERMINISTIC, rank=RANK, rho=RHO, phi=99.0, damping=damping
    )
    assert_rows_are(rows_of(study, make_steps(last=30, phi=phi)), expected)


def test_kfac_measured_where_it_is_exact_has_no_error():
    study = ErrorStudy(["K-FAC T_inv=4"], EXACT, WINDOWS, phi=PHI)
    rows = rows_of(study, make_steps())
    assert rows and max(row.value for row in rows) <= 1e-12


def test_each_update_has_one_inverse_a_factor_and_exact_kfac_none_of_its_own(fast_xp, monkeypatch):
    """Stale K-FAC is an earlier reference: neither an EVD nor a second Cholesky inverse, for any continuation."""
    made = []
    inverted = inverse_module.cholesky_inverse
    monkeypatch.setattr(inverse_module, "cholesky_inverse", lambda *a, **b: made.append(1) or inverted(*a, **b))
    monkeypatch.setattr(inverse_module, "evd", None)
    names = ["K-FAC T_inv=12", "K-FAC T_inv=12 continuation=trace"]
    rows = rows_of(ErrorStudy(names, EXACT, [Window(20, 27)], phi=PHI), make_steps(fast_xp))
    assert len(rows) == 27 * 4 * 2
    assert len(made) == 2 * 7  # at 20, 24, ..., 44, of A and of G
    assert all(row.value == 0 for row in rows if (row.k - 20) % 12 < 4)
    assert all(row.value > 0 for row in rows if (row.k - 20) % 12 >= 4)


def test_several_continuations_share_one_process_and_change_no_value():
    kinds = ["min", "trace", "none"]
    names = [f"{name} continuation={kind}" for name in SEVEN for kind in kinds]
    study = ErrorStudy(names, RANDOM, WINDOWS, phi=PHI)
    assert all(len(factor.processes) == 7 for factor in study.factors.values())
    together = rows_of(study, make_steps())
    for kind in kinds:
        alone = rows_of(ErrorStudy(SEVEN, replace(RANDOM, continuation=kind), WINDOWS, phi=PHI), make_steps())
        suffix = f" continuation={kind}"
        assert alone == [
            row._replace(algorithm=row.algorithm.removesuffix(suffix))
            for row in together
            if row.algorithm.endswith(suffix)
        ]


def test_there_is_a_row_for_every_algorithm_metric_and_iteration_in_the_windows():
    frame = table(rows_of(ErrorStudy(SEVEN, RANDOM, WINDOWS, phi=PHI), make_steps()))
    assert list(frame.columns[:4]) == ["algorithm", "k", "metric", "value"]
    assert len(frame) == 7 * 4 * (27 + 14)
    assert not frame.duplicated(["algorithm", "k", "metric"]).any()
    assert set(frame.k) == {*range(20, 47), *range(60, 74)}
    assert (frame.epoch == np.where(frame.k < 50, 1, 2)).all()


def test_iterations_given_as_numpy_integers_are_measured_alike():
    steps = [step._replace(k=np.int64(step.k)) for step in make_steps(last=30)]
    rows = rows_of(ErrorStudy(["B-KFAC"], RANDOM, WINDOWS, phi=PHI), steps)
    assert rows and rows == rows_of(ErrorStudy(["B-KFAC"], RANDOM, WINDOWS, phi=PHI), make_steps(last=30))


def test_adding_an_algorithm_changes_no_other():
    """Randomised ones too: each has random numbers of its own."""
    names = ["R-KFAC T_inv=10", "B-R-KFAC", "B-KFAC-C"]
    few = rows_of(ErrorStudy(names, RANDOM, WINDOWS, phi=PHI), make_steps())
    many = rows_of(ErrorStudy([*SEVEN, "R-KFAC T_inv=10 rank=7"], RANDOM, WINDOWS, phi=PHI), make_steps())
    assert few == [row for row in many if row.algorithm in names]


def test_one_seed_gives_one_table_and_another_seed_another():
    one = rows_of(ErrorStudy(SEVEN, RANDOM, WINDOWS, phi=PHI), make_steps())
    assert one == rows_of(ErrorStudy(SEVEN, RANDOM, WINDOWS, phi=PHI), make_steps())
    other = Settings(rank=RANK, rho=RHO, oversampling=1, n_pwr_it=0, seed=4)
    assert one != rows_of(ErrorStudy(SEVEN, other, WINDOWS, phi=PHI), make_steps())


class RunsThroughout(ErrorStudy):
    """The same study, in which no process is left out before a window."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for process in (p for factor in self.factors.values() for p in factor.processes.values()):
            process.memoryless = False  # on the instance: run at every update; windows here start with one


def test_leaving_out_what_a_process_forgets_changes_no_row():
    windows = [Window(20, 20), Window(60, 14)]  # both start with an update
    short = rows_of(ErrorStudy(list(DETERMINISTIC), EXACT, windows, phi=PHI), make_steps())
    whole = rows_of(RunsThroughout(list(DETERMINISTIC), EXACT, windows, phi=PHI), make_steps())
    for one, other in zip(short, whole, strict=True):
        assert one[:3] == other[:3]
        assert one.value == pytest.approx(other.value, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("damping", ["own", "common"])
@pytest.mark.parametrize("stop", [7, 20, 22, 24, 33, 50])
def test_a_resumed_study_gives_the_same_rows(fast_xp, damping, stop):
    """Stopped before, at the start of, within and between windows; at updates and between them."""
    steps = make_steps(fast_xp)

    def make():
        names = [*SEVEN, *(f"{name} continuation=trace" for name in SEVEN)]
        return ErrorStudy(names, RANDOM, WINDOWS, phi=PHI, damping=damping)

    whole = rows_of(make(), steps)
    first = make()
    rows = rows_of(first, steps[:stop])
    saved = pickle.dumps(first.state_dict())
    resumed = make()
    resumed.load_state_dict(pickle.loads(saved))
    assert rows + rows_of(resumed, steps[stop:]) == whole


def test_a_loaded_state_is_not_changed_as_the_study_goes_on():
    steps = make_steps()

    def make():
        return ErrorStudy(SEVEN, RANDOM, WINDOWS, phi=PHI)

    whole = rows_of(make(), steps)
    first = make()
    rows = rows_of(first, steps[:30])
    saved = copy.deepcopy(first.state_dict())
    for _ in range(2):
        resumed = make()
        resumed.load_state_dict(saved)
        assert rows + rows_of(resumed, steps[30:]) == whole


class Diagonal(Process):
    """A user's own process: the leading diagonal entries of the EA factor, at every update."""

    needs_factor = True

    def update(self, k, X, factor):
        M = np.asarray(factor.M)
        order = np.argsort(-np.diag(M))[:4]
        U = np.eye(len(M))[:, order]
        self.estimate = Estimate(LowRank(device_array(U, X), device_array(np.diag(M)[order], X)), factor.trace)


def test_a_process_of_ones_own_is_measured_beside_the_others():
    pairs = {
        "mine": (Diagonal(), Diagonal()),
        "B-KFAC": tuple(Algorithm.parse("B-KFAC").process(RANDOM, side) for side in "AG"),
    }
    rows = rows_of(ErrorStudy(pairs, RANDOM, WINDOWS, phi=PHI), make_steps())
    theirs = rows_of(ErrorStudy(["B-KFAC"], RANDOM, WINDOWS, phi=PHI), make_steps())
    assert [row for row in rows if row.algorithm == "B-KFAC"] == theirs
    mine = [row.value for row in rows if row.algorithm == "mine"]
    assert len(mine) == len(theirs) and np.isfinite(mine).all() and min(mine) > 0


@pytest.mark.parametrize("side", ["A", "G"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_with_the_iteration(fast_xp, side, bad):
    study = ErrorStudy(["B-KFAC"], RANDOM, WINDOWS, phi=PHI)
    steps = make_steps(fast_xp, last=9)
    rows_of(study, steps[:8])
    X = np.array(fast_xp.numpy(getattr(steps[8], side)))
    X[1, 1] = bad
    with pytest.raises(InputError, match=rf"^iteration 8: {side}: NaN or Inf"):
        study.push(steps[8]._replace(**{side: fast_xp.array(X)}))
    study.push(steps[8])  # nothing was taken in


def test_steps_that_do_not_fit_are_refused_with_the_iteration():
    study = ErrorStudy(["B-KFAC"], RANDOM, WINDOWS, phi=PHI)
    steps = make_steps(last=9)
    rows_of(study, steps[:8])
    step = steps[8]
    for change, message in (
        ({"k": 7}, "iteration 7: it comes after iteration 7"),
        ({"k": 3}, "iteration 3: it comes after iteration 7"),
        ({"A": step.A[:-1]}, "iteration 8: A: 17 rows"),
        ({"G": step.G[:, :2]}, "iteration 8: A has 3 columns and G has 2"),
        ({"A": step.A[:, 0]}, "iteration 8: A: a matrix"),
        ({"A": step.A.astype(np.int64)}, "iteration 8: A: float32 or float64"),
        ({"A": step.A.astype(np.float32)}, "iteration 8: .*one dtype"),
        ({"G": step.G.astype(np.float32)}, "iteration 8: .*one dtype"),
        ({"A": step.A.tolist()}, "iteration 8: A: an array"),
    ):
        with pytest.raises(InputError, match=message):
            study.push(step._replace(**change))
    study.push(step)  # nothing was taken in


def test_bad_arguments_are_refused():
    for keywords in ({"phi": 0.0}, {"phi": float("nan")}, {"damping": "none"}):
        with pytest.raises(InputError):
            ErrorStudy(["B-KFAC"], RANDOM, WINDOWS, **keywords)
    with pytest.raises(InputError, match="overlap"):
        ErrorStudy(["B-KFAC"], RANDOM, [Window(0, 10), Window(9, 3)])
    for name in ("S-KFAC", "B-KFAC T_inv=3", "R-KFAC T_inv=x", "R-KFAC T_inv=0", "R-KFAC T_inv", "R-KFAC rank=-1"):
        with pytest.raises(InputError, match="algorithm"):
            ErrorStudy([name], RANDOM, WINDOWS)
    with pytest.raises(InputError, match="rho"):
        ErrorStudy(["B-KFAC"], Settings(rank=3, rho=1.0), WINDOWS)


def test_a_step_with_a_bad_damping_ratio_is_refused_with_the_iteration():
    study = ErrorStudy(["B-KFAC"], RANDOM, [Window(0, 5)], phi=PHI)
    with pytest.raises(InputError, match="iteration 0: damping ratio phi"):
        study.push(make_steps(last=1)[0]._replace(phi=-1.0))


def test_a_window_before_the_first_update_is_refused_with_the_iteration():
    study = ErrorStudy(["B-KFAC"], RANDOM, [Window(0, 5)], phi=PHI)
    with pytest.raises(InputError, match="iteration 0: the window starts before the first update"):
        study.push(make_steps(last=1)[0]._replace(update=False))


def test_a_factor_of_zero_is_refused_with_the_iteration():
    study = ErrorStudy(["B-KFAC"], RANDOM, [Window(0, 5)], phi=PHI)
    step = make_steps(last=1)[0]
    with pytest.raises(InputError, match="iteration 0: the EA factor is zero"):
        study.push(step._replace(G=0 * step.G))
