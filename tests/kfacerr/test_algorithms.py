"""Algorithms are values: `parse` and `str` are inverse, and a process is what its name says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfacerr.algorithms import _BASES, FALLBACK, SEVEN, Algorithm
from kfacerr.exceptions import InputError
from kfacerr.process import Settings
from kfacerr.processes import Brand, BrandRsvd, Rsvd
from tests.strategies import stream

VALUES = {
    "continuation": st.sampled_from(["none", "min", "trace", "escaped"]),
    "phi_corct": st.floats(0.01, 1),
    "sketch": st.sampled_from(["rs", "sre", "nystrom"]),
}


@st.composite
def names(draw: st.DrawFn) -> str:
    """A base with any of its own settings, in any order."""
    base = draw(st.sampled_from(list(_BASES)))
    allowed = (*_BASES[base].own, "continuation")
    chosen = draw(st.permutations(allowed)) if allowed else []
    chosen = chosen[: draw(st.integers(0, len(chosen)))]
    return " ".join([base, *(f"{key}={draw(VALUES.get(key, st.integers(1, 500)))}" for key in chosen)])


@given(names())
def test_parse_and_str_are_inverse(name):
    algorithm = Algorithm.parse(name)
    assert Algorithm.parse(str(algorithm)) == algorithm
    assert str(algorithm) == name.replace("phi_corct=1.0", "phi_corct=1")


@given(names())
def test_the_order_of_settings_does_not_matter(name):
    base, *options = name.split()
    one, other = Algorithm.parse(name), Algorithm.parse(" ".join([base, *reversed(options)]))
    assert one == other and hash(one) == hash(other)
    assert one.process_name == other.process_name, "they draw alike"


def test_the_seven_are_their_own_names():
    assert tuple(str(Algorithm.parse(name)) for name in SEVEN) == SEVEN


def test_own_settings_stay_and_others_follow():
    algorithm = Algorithm.parse("R-KFAC T_inv=10 rank=7 continuation=trace")
    process = algorithm.process(Settings(rank=3, T_inv=50), "A")
    process.configure(rank=5, T_inv=20, oversampling=2, rho=0.9)
    s = process.settings
    assert (s.rank, s.T_inv, s.oversampling, s.rho) == (7, 10, 2, 0.9) and process.clocks["T_inv"].period == 10
    free = Algorithm.parse("R-KFAC").process(Settings(rank=3), "A")
    free.configure(rank=5, T_inv=20)
    assert (free.settings.rank, free.clocks["T_inv"].period) == (5, 20)


def test_names_choose_processes_sketches_and_periods():
    def process(name):
        return Algorithm.parse(name).process(Settings(rank=3), "A")

    assert isinstance(process("R-KFAC sketch=nystrom"), Rsvd) and isinstance(process("B-KFAC"), Brand)
    assert process("R-KFAC sketch=nystrom").settings.sketch == "nystrom"
    assert process("SRE-KFAC").settings.sketch == "sre"
    assert process("B-R-KFAC").clocks["T_rsvd"].period == 50
    assert process("B-R-KFAC T_rsvd=70").clocks["T_rsvd"].period == 70


def test_a_continuation_changes_the_inverse_and_not_the_process():
    plain, traced = Algorithm.parse("R-KFAC rank=3"), Algorithm.parse("R-KFAC rank=3 continuation=trace")
    assert plain.process_name == traced.process_name == "R-KFAC rank=3" and plain != traced
    draws = [a.process(Settings(), "A").rng.standard_normal(3) for a in (plain, traced)]
    assert np.array_equal(*draws)


def test_draws_differ_between_algorithms_sides_and_seeds():
    def draw(name, side, seed):
        return Algorithm.parse(name).process(Settings(seed=seed), side).rng.standard_normal()

    drawn = {draw(n, s, k) for n in ("R-KFAC", "R-KFAC T_inv=10", "B-R-KFAC") for s in "AG" for k in (0, 1)}
    assert len(drawn) == 12


def test_a_process_without_room_gives_way_to_an_rsvd():
    settings = Settings(rank=8)
    for name in ("B-KFAC", "B-R-KFAC", "B-KFAC-C", "FD"):
        algorithm = Algorithm.parse(name)
        assert algorithm.for_factor(settings, 13, 4) is algorithm
        assert algorithm.for_factor(settings, 12, 4) == FALLBACK
    own = Algorithm.parse("B-KFAC rank=2 continuation=trace")
    assert own.for_factor(settings, 12, 4) is own
    assert str(own.for_factor(settings, 6, 4)) == "R-KFAC continuation=trace"
    assert Algorithm.parse("K-FAC").for_factor(settings, 5, 4) == Algorithm("K-FAC")


def test_a_sketch_whose_products_cost_more_than_the_dense_factor_gives_way():
    """4 d s n flops against 2 d^2 n."""
    settings = Settings(rank=8)
    for name, s in (("N-KFAC", 16), ("N-KFAC rank=5", 10), ("N-KFAC s=20", 20)):
        algorithm = Algorithm.parse(name)
        assert algorithm.for_factor(settings, 2 * s + 1, 4) is algorithm
        assert algorithm.for_factor(settings, 2 * s, 4) == FALLBACK
        assert algorithm.no_room(settings, 2 * s, 4) == f"2 s >= d (2 x {s} >= {2 * s})"
        dense = FALLBACK.process(settings, "A")
        sketch = algorithm.process(settings, "A")
        n = 10**6  # so many that all else is small
        assert sketch.cost(2 * s + 1, n).update < dense.cost(2 * s + 1, n).update
        assert sketch.cost(2 * s - 1, n).update > dense.cost(2 * s - 1, n).update


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is not one of K-FAC"),
        ("X-KFAC", "'X-KFAC' is not one of"),
        ("R-KFAC T_brand=3", "'T_brand' is not one of T_inv, sketch, rank, continuation"),
        ("B-R-KFAC sketch=qr", "rs, sre, nystrom"),
        ("R-KFAC rank=0", "rank must be a whole number of at least 1"),
        ("R-KFAC rank=two", "rank has no value 'two'"),
        ("R-KFAC rank", "rank has no value ''"),
        ("R-KFAC rank=2 rank=3", "given twice"),
        ("B-KFAC-C phi_corct=nan", "phi_corct"),
        ("K-FAC continuation=max", "continuation 'max'"),
        (3, "a name is needed|name is needed"),
    ],
)
def test_bad_names_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        Algorithm.parse(name)


def test_with_settings_adds_and_takes_away():
    algorithm = Algorithm.parse("R-KFAC T_inv=50")
    assert str(algorithm.with_settings(rank=476)) == "R-KFAC T_inv=50 rank=476"
    assert str(algorithm.with_settings(T_inv=None)) == "R-KFAC"
    assert algorithm.get("T_inv") == 50 and algorithm.get("rank") is None


@pytest.mark.parametrize("name", ["K-FAC", "R-KFAC", "SRE-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C", "FD"])
def test_costs_are_those_of_the_sizes(name):
    """Linear in d where no dense factor is needed, and the numbers held are of the size of what is held."""
    process = Algorithm.parse(name).process(Settings(rank=8), "A")
    small, large = process.cost(1000, 4), process.cost(2000, 4)
    power = 2 if process.needs_factor else 1
    for one, two in ((small.update, large.update), (small.numbers, large.numbers)):
        assert 2**power * 0.8 < two / one <= 2**power
    for k, X in enumerate(stream(np.random.default_rng(0), d=1000, n=4, steps=1)):
        process.update(k, X, factor_of(X))
    assert process.estimate.lowrank.U.size <= small.numbers
    assert process.estimate.lowrank.m <= small.rank


def factor_of(X):
    """An EA factor that has absorbed X."""
    from kfacerr.ea import EAFactor

    factor = EAFactor(0.95)
    factor.update(X)
    return factor


def test_brand_rsvd_has_both_clocks():
    assert set(BrandRsvd(rank=2).clocks) == {"T_brand", "T_rsvd"}


@pytest.mark.parametrize(
    ("name", "fresh"),
    [
        ("K-FAC T_inv=50", "K-FAC T_inv=10"),
        ("R-KFAC rank=7", "R-KFAC T_inv=10 rank=7"),
        ("R-KFAC T_inv=10 continuation=trace", "R-KFAC T_inv=10 continuation=trace"),
        ("B-KFAC T_brand=20", "B-KFAC T_brand=10"),
        ("B-R-KFAC T_rsvd=50", "B-R-KFAC T_rsvd=50"),
        ("N-KFAC s=8", "N-KFAC s=8"),
    ],
)
def test_fresh_is_the_same_with_an_estimate_at_every_update(name, fresh):
    assert str(Algorithm.parse(name).fresh(Settings(), 10)) == fresh
