"""Packed rows: semantics of segment ids, isolation between neighbours, packed equals alone."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from call import for_implementation, run
from cases import Case, layout, runs
from hypothesis import strategies as st
from oracle import check

from jax_flashkda import _segments

GATED = dict(gate="softplus", A_log=True, dt_bias=True, beta_is_logits=True, qk_l2norm=True)
STATES = dict(initial_state=True, final_state=True)
T = 200


def packed(rows, **options):
    rows = tuple(tuple(int(i) for i in row) for row in rows)
    # Many small heads: dA_log is one number a head, and of a few the peer's error is mere luck.
    sizes = dict(T=len(rows[0]), B=len(rows), H=1, HV=32, K=8, V=4)
    return Case(**sizes, segment_ids=rows, **options)


LAYOUTS = {
    "one": [1] * T,
    "one-token segments": list(range(1, T + 1)),
    "on chunk edges": [1] * 64 + [2] * 64 + [3] * 72,
    "beside chunk edges": [1] * 63 + [2] * 66 + [3] * 71,
    "interior padding": [1] * 30 + [0] * 10 + [1] * 50 + [-1] * 5 + [2] * 105,
    "leading and trailing padding": [0] * 70 + [5] * 60 + [0] * 70,
    "all padding": [0] * T,
    "extreme ids": [2**31 - 1] * 70 + [-(2**31)] * 30 + [2**31 - 1] * 70 + [7] * 30,
    "one long, many short": [9] * 140 + [i % 5 + 1 for i in range(60)],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, implementation):
    rows = [LAYOUTS[name], LAYOUTS[name][::-1]]
    case = packed(rows, max_segments=3, **GATED, **STATES)
    case = for_implementation(case, implementation)
    # One program with the three tests of random layouts, arbitrary ids and rows that swap. Where
    # every token is a chunk, one that was compiled quickly would be slow.
    check(case, run(case, implementation))


def test_padding_id_none_makes_zero_ordinary(implementation):
    rows = [LAYOUTS["interior padding"], LAYOUTS["all padding"]]
    case = for_implementation(
        packed(rows, max_segments=4, padding_segment_id=None, **STATES), implementation
    )
    check(case, run(case, implementation, quickly=True))


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1, 2, 2**31 - 1]), runs_of=st.booleans()
)
def test_schedule_is_the_definition(seed, spread, runs_of):
    """The table of chunks, built on the device, against the runs of ids, found one by one."""
    rng = np.random.default_rng(seed)
    if runs_of:
        rows = np.array([layout(rng, T), layout(rng, T)], np.int64).astype(np.int32)
    else:
        rows = rng.integers(-spread - 1, spread, size=(2, T), endpoint=True).astype(np.int32)
    count, table = _schedule(jnp.asarray(rows))
    found = [
        [tuple(int(x[i, b]) for x in table) for i in range(count) if table.length[i, b]]
        for b in range(2)
    ]
    for row, chunks in zip(rows, found, strict=True):
        assert chunks == [
            (start + i, min(64, length - i), n, i == 0, i + 64 >= length)
            for n, (start, length) in enumerate(runs(row))
            for i in range(0, length, 64)
        ]
    assert count == max(map(len, found))


@functools.cache
def _compiled_schedule():
    def count_and_table(ids):
        schedule = _segments.schedule(T, ids)
        return schedule.count, schedule.table

    return jax.jit(count_and_table)


def _schedule(ids):
    count, table = _compiled_schedule()(ids)
    return int(count), jax.tree.map(np.asarray, table)


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_random_layouts(seed):
    rng = np.random.default_rng(seed)
    case = packed([layout(rng, T), layout(rng, T)], max_segments=3, seed=seed, **GATED, **STATES)
    check(case, run(case, "xla"))


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1, 2, 2**31 - 1]))
def test_arbitrary_ids(seed, spread):
    """Any int32 array is valid."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-spread - 1, spread, size=(2, T), endpoint=True)
    case = packed(rows, max_segments=3, seed=seed, **GATED, **STATES)
    check(case, run(case, "xla"))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(10))
def test_random_layouts_on_the_gpu(seed):
    rng = np.random.default_rng(seed)
    case = packed([layout(rng, T), layout(rng, T)], max_segments=4, seed=seed, **GATED, **STATES)
    case = for_implementation(case, "cuda")
    check(case, run(case, "cuda"))


def test_no_tokens(implementation):
    case = Case(T=0, segment_ids=((), ()), max_segments=2, **STATES)
    case = for_implementation(case, implementation)
    got = run(case, implementation)
    np.testing.assert_array_equal(got["final_state"], case.arrays()["initial_state"])
    np.testing.assert_array_equal(got["d_initial_state"], case.cotangents()[1])


def test_no_rows(implementation):
    case = for_implementation(Case(B=0, **STATES), implementation)
    got = run(case, implementation)
    assert got["o"].shape == (0, case.T, case.HV, case.V) and got["d_initial_state"].shape[0] == 0


ISOLATED = [3] * 20 + [4] * 70 + [0] * 7 + [5] * 65 + [3] * 38


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("victim", range(len(runs(ISOLATED))))
def test_isolation(victim, poison, implementation):
    """What stands in one segment, or in padding, changes no bit of the others: outputs, gradients,
    states.
    """
    case = packed([ISOLATED], max_segments=4, **GATED, **STATES)
    case = for_implementation(case, implementation)
    arrays = case.arrays()
    d_o, d_final = case.cotangents()
    segments = runs(ISOLATED)
    start, length = segments[victim]
    own = np.zeros(T, bool)
    own[start : start + length] = True
    foreign = jnp.asarray(~own)

    dirty = dict(arrays)
    for name in ("q", "k", "v", "g", "beta"):
        shape = (1, T) + (1,) * (arrays[name].ndim - 2)
        dirty[name] = jnp.where(foreign.reshape(shape), poison, arrays[name]).astype(
            arrays[name].dtype
        )
    other_slots = np.arange(case.N) != victim
    dirty["initial_state"] = jnp.where(
        other_slots.reshape(1, -1, 1, 1, 1), poison, arrays["initial_state"]
    )
    dirty_d_o = jnp.where(foreign.reshape(1, T, 1, 1), poison, d_o).astype(d_o.dtype)
    dirty_d_final = jnp.where(other_slots.reshape(1, -1, 1, 1, 1), poison, d_final)

    clean = run(case, implementation)
    got = run(case, implementation, arrays=dirty, cotangents=(dirty_d_o, dirty_d_final))
    for name in ("o", "dq", "dk", "dv", "dg", "d_beta"):
        np.testing.assert_array_equal(
            np.asarray(clean[name])[0, own], np.asarray(got[name])[0, own]
        )
    for name in ("final_state", "d_initial_state"):
        np.testing.assert_array_equal(clean[name][0, victim], got[name][0, victim])


def test_padding_is_inert(implementation):
    """NaN in padding enters nothing: not even the gate parameters' gradients, which sum over all
    segments.
    """
    case = packed([ISOLATED], max_segments=4, **GATED, **STATES)
    case = for_implementation(case, implementation)
    arrays = case.arrays()
    d_o, d_final = case.cotangents()
    padding = jnp.asarray(np.array(ISOLATED) == 0)
    poison = lambda x: jnp.where(padding.reshape(1, T, *[1] * (x.ndim - 2)), jnp.nan, x).astype(
        x.dtype
    )
    dirty = arrays | {name: poison(arrays[name]) for name in ("q", "k", "v", "g", "beta")}
    clean, got = (
        run(case, implementation),
        run(case, implementation, arrays=dirty, cotangents=(poison(d_o), d_final)),
    )
    for name in clean:
        np.testing.assert_array_equal(clean[name], got[name])
    for name in ("o", "dq", "dk", "dv", "dg", "d_beta"):
        assert not np.asarray(got[name])[0, np.asarray(padding)].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_equals_alone(dtype, implementation):
    """A segment's results are bitwise those it has in a row of its own, at any place: in another
    program for float32, with one slot, in the same one for bfloat16.
    """
    case = for_implementation(
        packed([ISOLATED], max_segments=4, dtype=dtype, **GATED, **STATES), implementation
    )
    arrays, (d_o, d_final) = case.arrays(), case.cotangents()
    together = run(case, implementation)
    slots = case.N if (dtype, implementation) == ("bfloat16", "xla") else 1
    for n, (start, length) in enumerate(runs(ISOLATED)):
        own_slot = lambda x, n=n: jnp.pad(
            x[:, n : n + 1], [(0, 0), (0, slots - 1), (0, 0), (0, 0), (0, 0)]
        )
        ids = tuple(1 if t < length else 0 for t in range(T))
        alone_case = dataclasses.replace(case, segment_ids=(ids,), max_segments=slots)
        shift = functools.partial(jnp.roll, shift=-start, axis=1)
        alone = arrays | {name: shift(arrays[name]) for name in ("q", "k", "v", "g", "beta")}
        alone |= dict(
            initial_state=own_slot(arrays["initial_state"]),
            segment_ids=jnp.asarray(alone_case.ids),
        )
        cotangents = (shift(d_o), own_slot(d_final))
        got = run(alone_case, implementation, arrays=alone, cotangents=cotangents)
        for name in ("o", "dq", "dk", "dv", "dg", "d_beta"):
            expected = np.asarray(together[name])[:, start : start + length]
            np.testing.assert_array_equal(expected, np.asarray(got[name])[:, :length])
        for name in ("final_state", "d_initial_state"):
            np.testing.assert_array_equal(together[name][:, n], got[name][:, 0])


def test_packed_equals_unpacked(implementation):
    """One segment that fills the row equals the call without segment ids.

    Bitwise in the kernels. For XLA these are two programs, which it may fuse, and so round, in two
    ways: they agree to the last bits.
    """
    case = for_implementation(packed([[1] * T], max_segments=1, **GATED, **STATES), implementation)
    arrays, (d_o, d_final) = case.arrays(), case.cotangents()
    plain_case = dataclasses.replace(case, segment_ids=None, max_segments=None)
    plain_arrays = {name: x for name, x in arrays.items() if name != "segment_ids"}
    plain_arrays["initial_state"] = arrays["initial_state"][:, 0]
    together = run(case, implementation)
    plain = run(plain_case, implementation, arrays=plain_arrays, cotangents=(d_o, d_final[:, 0]))
    for name in together:
        expected = np.asarray(plain[name]).reshape(np.shape(together[name]))
        tolerance = 0 if implementation == "cuda" else 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(expected, together[name], rtol=0, atol=tolerance)


def test_segments_without_a_slot(implementation):
    """Segments beyond max_segments start from zero; their outputs and gradients are exact, their
    states dropped.
    """
    rows = [list(np.repeat(np.arange(1, 11), 20)), LAYOUTS["on chunk edges"]]
    case = for_implementation(packed(rows, max_segments=2, **GATED, **STATES), implementation)
    check(case, run(case, implementation, quickly=True))


def test_rows_swap(implementation):
    """Rows of a batch do not see each other: swapping them swaps the results, bitwise."""
    case = packed(
        [LAYOUTS["interior padding"], LAYOUTS["on chunk edges"]], max_segments=3, **GATED, **STATES
    )
    case = for_implementation(case, implementation)
    arrays, cotangents = case.arrays(), case.cotangents()
    swap = lambda tree: jax.tree.map(lambda x: x[::-1], tree)
    shared = {name: arrays[name] for name in ("A_log", "dt_bias")}
    swapped = swap({name: x for name, x in arrays.items() if name not in shared}) | shared
    here, there = (
        run(case, implementation),
        run(case, implementation, arrays=swapped, cotangents=swap(cotangents)),
    )
    for name in here.keys() - {"dA_log", "d_dt_bias"}:
        np.testing.assert_array_equal(here[name], there[name][::-1])
