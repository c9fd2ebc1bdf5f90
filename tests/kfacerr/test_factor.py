"""One K-factor: what is checked, in which order things happen, what a failure leaves, and what is cached."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.algorithms import Algorithm
from kfacerr.exceptions import InputError
from kfacerr.factor import KFactor
from kfacerr.lowrank import LowRank
from kfacerr.process import Estimate, Process, Settings
from kfacerr.processes import Evd
from tests import reference
from tests.strategies import rhos, stream, streams

NAMES = (
    *("K-FAC T_inv=3", "R-KFAC T_inv=2", "B-KFAC", "B-R-KFAC T_rsvd=3", "B-KFAC-C T_corct=2", "FD"),
    *("N-KFAC", "N-KFAC rank=3", "N-KFAC T_base=4", "W-KFAC T_inv=2", "W-KFAC T_inv=1 rank=3"),
)
SETTINGS = Settings(rank=3, rho=0.9, oversampling=1, n_pwr_it=0)


def make(names=NAMES, settings=SETTINGS, **keywords) -> KFactor:
    return KFactor("A", {n: Algorithm.parse(n).process(settings, "A") for n in names}, settings.rho, **keywords)


def dense(factor, name, xp):
    return xp.numpy(factor.processes[name].estimate.lowrank.dense())


@given(columns=streams(kinds=("plain", "zero", "repeated", "huge")), rho=rhos)
def test_push_is_begin_then_8_then_update(xp, columns, rho):
    """Each process with an EA factor of its own gives the same as all of them in one push."""
    settings = Settings(rank=3, rho=rho, oversampling=1, n_pwr_it=0)
    together, alone = make(settings=settings), {n: make([n], settings) for n in NAMES}
    for k, X in enumerate(columns):
        together.push(k, xp.array(X))
        for name, factor in alone.items():
            factor.push(k, xp.array(X))
            assert np.array_equal(dense(factor, name, xp), dense(together, name, xp))
    expected = reference.ea_factor(columns, rho)
    assert np.linalg.norm(xp.numpy(together.average.M) - expected) <= 1e-12 * np.linalg.norm(expected)


def test_m_is_kept_only_where_something_reads_it():
    X = np.eye(6)[:, :2]
    lean, full, asked = make(["B-KFAC"]), make(["B-R-KFAC T_rsvd=3"]), make(["B-KFAC"], dense=True)
    for factor in (lean, full, asked):
        factor.push(0, X)
    assert lean.average.M is None and full.average.M is not None and asked.average.M is not None
    assert lean.needs_columns and not make(["K-FAC T_inv=3", "R-KFAC"]).needs_columns


@given(exponent=st.integers(-140, 120), columns=streams(kinds=("plain", "zero"), dtype=np.float32))
def test_columns_of_any_size_give_the_same_estimates(fast_xp, exponent, columns):
    plain, scaled = make(), make()
    for k, X in enumerate(columns):
        plain.push(k, fast_xp.array(X))
        far = np.ldexp(X, exponent).astype(np.float32)
        if not np.array_equal(np.ldexp(far.astype(float), -exponent), X):
            return  # digits were lost before the factor saw them
        scaled.push(k, fast_xp.array(far))
        units = scaled.unit or 1.0, plain.unit or 1.0
        ratio = units[0] / units[1] * 2.0**exponent
        for name in NAMES:
            one, other = dense(scaled, name, fast_xp), dense(plain, name, fast_xp)
            assert np.allclose(one, ratio**2 * other, rtol=1e-4, atol=1e-5 * ratio**2 * np.linalg.norm(other))


def test_ordinary_columns_are_not_touched(fast_xp):
    X = fast_xp.array(stream(np.random.default_rng(0), d=5, n=2, steps=1)[0])
    factor = make()
    assert factor.admit(X) is X and factor.unit == 1.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((6, 2), np.nan), "A: NaN or Inf"),
        (np.ones((5, 2)), "A: 6 rows"),
        (np.ones(6), "A: a matrix"),
        (np.ones((6, 2), dtype=np.float32), "one dtype"),
        (np.ones((6, 2), dtype=int), "A: float32 or float64"),
        ([[1.0]], "A: an array"),
    ],
)
def test_what_is_refused_changes_nothing(bad, message):
    factor = make()
    factor.push(0, np.eye(6)[:, :2])
    before = pickle.dumps(factor.state_dict())
    with pytest.raises(InputError, match=message):
        factor.push(1, bad)
    assert pickle.dumps(factor.state_dict()) == before


class Moody(Process):
    """Fails where it is told to: in float32 alone, or in both."""

    needs_factor = True

    def __init__(self, fails):
        super().__init__()
        self.fails = fails
        self.calls = []

    def update(self, k, X, factor):
        self.calls.append((k, str(X.dtype)))
        if (str(X.dtype).endswith("float32") and k in self.fails) or -k in self.fails:
            raise np.linalg.LinAlgError("no convergence")
        self.estimate = Estimate(LowRank(X, X[0, :] * 0 + k + 1), factor.trace)


def test_a_failed_decomposition_is_tried_in_float64():
    X = np.eye(4, dtype=np.float32)[:, :2]
    process = Moody({1})
    factor = KFactor("A", {"moody": process}, 0.9)
    for k in range(2):
        factor.push(k, X)
    assert process.calls == [(0, "float32"), (1, "float32"), (1, "float64")]
    assert process.estimate.lowrank.D.dtype == np.float32 and process.estimate.lowrank.D[0] == 2
    assert factor.average.M.dtype == np.float32


def test_where_both_fail_the_process_stays_and_all_else_goes_on():
    X = np.eye(4, dtype=np.float32)[:, :2]
    factor = KFactor("A", {"moody": Moody({-1}), "B-KFAC": Algorithm.parse("B-KFAC").process(SETTINGS, "A")}, 0.9)
    factor.push(0, X)
    held, other = (factor.processes[name].estimate for name in ("moody", "B-KFAC"))
    with pytest.raises(InputError, match="A: moody: no convergence"):
        factor.push(1, 2 * X)
    assert np.array_equal(factor.processes["moody"].estimate.lowrank.D, held.lowrank.D)
    assert factor.processes["B-KFAC"].estimate is not other
    assert factor.average.M[0, 0] == pytest.approx(0.9 + 0.1 * 4), "(8) has been done"


def test_an_inverse_is_made_once():
    factor = make(["B-KFAC"])
    assert factor.inverse("B-KFAC", phi=0.1) is None
    columns = stream(np.random.default_rng(0), d=8, n=2, steps=2)
    factor.push(0, columns[0])
    one = factor.inverse("B-KFAC", phi=0.1)
    assert factor.inverse("B-KFAC", phi=0.1) is one
    assert factor.inverse("B-KFAC", phi=0.2) is not one
    assert factor.inverse("B-KFAC", phi=0.1, continuation="trace") is not one
    factor.push(1, columns[1])
    assert factor.inverse("B-KFAC", phi=0.1) is not one


def test_the_reference_is_made_once():
    factor = make(["B-KFAC"], dense=True)
    columns = stream(np.random.default_rng(0), d=8, n=2, steps=2)
    factor.push(0, columns[0])
    inverse, lam = factor.reference(0.1)
    assert factor.reference(0.1)[0] is inverse and factor.reference(0.2)[0] is not inverse
    M = reference.ea_factor(columns[:1], 0.9)
    assert lam == pytest.approx(0.1 * np.linalg.eigvalsh(M)[-1])
    factor.push(1, columns[1])
    M = reference.ea_factor(columns, 0.9)
    inverse, lam = factor.reference(0.1)
    assert np.allclose(inverse.dense(), np.linalg.inv(M + lam * np.eye(8)), rtol=1e-10, atol=0)


def test_a_zero_factor_has_no_inverse():
    factor = make(["B-KFAC", "R-KFAC"])
    factor.push(0, np.zeros((5, 2)))
    assert factor.inverse("B-KFAC", phi=0.1) is None and factor.inverse("R-KFAC", phi=0.1) is None


def test_a_gram_matrix_stands_for_its_columns(fast_xp):
    columns = stream(np.random.default_rng(3), d=9, n=3, steps=5)
    one, other = make(["R-KFAC T_inv=2"]), make(["R-KFAC T_inv=2"])
    for k, X in enumerate(columns):
        one.push(k, fast_xp.array(X))
        other.push(k, fast_xp.array(X), gram=fast_xp.array(X @ X.T))
    assert np.allclose(fast_xp.numpy(one.average.M), fast_xp.numpy(other.average.M), rtol=1e-13, atol=1e-15)
    assert np.allclose(dense(one, "R-KFAC T_inv=2", fast_xp), dense(other, "R-KFAC T_inv=2", fast_xp), atol=1e-12)


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_resumed_factor_goes_on_bitwise(fast_xp, stop):
    steps = stream(np.random.default_rng(2), d=20, n=2, steps=10, decay="slow decay")
    columns = [fast_xp.array(np.ldexp(X, 60)) for X in steps]
    whole, resumed = make(), make()
    for k, X in enumerate(columns):
        if k == stop:
            resumed.load_state_dict(pickle.loads(pickle.dumps(whole.state_dict())))
        whole.push(k, X)
        if k >= stop:
            resumed.push(k, X)
    assert resumed.unit == whole.unit
    for name in NAMES:
        assert np.array_equal(dense(whole, name, fast_xp), dense(resumed, name, fast_xp))


@pytest.mark.parametrize("unit", [1.0, 1e-12])
def test_a_scale_is_of_the_estimate_whatever_the_unit(unit):
    factor = make(["B-KFAC", "K-FAC T_inv=3"])
    assert factor.scale("B-KFAC") is None
    factor.push(0, np.zeros((6, 2)))
    assert factor.scale("K-FAC T_inv=3") is None  # nothing to damp by
    for k, X in enumerate(stream(np.random.default_rng(0), d=6, n=2, steps=3), 3):
        factor.push(k, unit * X)
    for name, process in factor.processes.items():
        scale, low = factor.scale(name), process.estimate.lowrank
        assert scale.d == 6 and scale.top == pytest.approx(float(low.lambda_max) / factor.squared_unit)
        assert scale.trace == pytest.approx(float(process.estimate.trace) / factor.squared_unit)
        assert 1e-3 < scale.top / unit**2 < 1e3 and factor.scale(name) is scale
    factor.push(6, unit * X)
    assert factor.scale("B-KFAC") is not scale


def test_the_exact_scale_is_that_of_M_at_every_update():
    factor, rng, M = KFactor("A", {"K-FAC": Evd()}, 0.9, dense=True), np.random.default_rng(0), None
    with pytest.raises(InputError, match="A: there is no M_k yet"):
        factor.exact_scale()
    for k in range(3):
        X = 1e-12 * rng.standard_normal((7, 3))  # held in a unit of their own
        M = X @ X.T if M is None else 0.9 * M + 0.1 * X @ X.T
        factor.push(k, X)
        scale = factor.exact_scale()
        expected = (7, np.linalg.eigvalsh(M)[-1], np.trace(M))
        assert (scale.d, scale.top, scale.trace) == pytest.approx(expected, rel=1e-9, abs=0)
        assert factor.exact_scale() is scale
