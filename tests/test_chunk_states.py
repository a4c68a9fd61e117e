"""The states that `return_chunk_states` gives: those of prefixes, to go on from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, runs

from jax_flashkda import kimi_delta_attention, supported

IDS = ((0,) * 3 + (1,) * 150 + (2,) * 64 + (0,) * 20 + (3,) * 63 + (1,) * 5, (4,) * 305)
RAW = dict(gate="softplus", A_log=True, dt_bias=True, beta_is_logits=True, qk_l2norm=True)
PLAIN = Case(T=200, K=16, V=8, initial_state=True, **RAW)
PACKED = Case(T=305, K=16, V=8, initial_state=True, segment_ids=IDS, max_segments=3, **RAW)


@functools.cache  # one program a case
def attend(case, **more):
    options = {name: x for name, x in case.options.items() if x is not None}
    options |= dict(return_final_state=True) | more
    return jax.jit(functools.partial(kimi_delta_attention, **options))


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_they_are_the_states_of_prefixes():
    arrays = PLAIN.arrays()
    o, final, states = attend(PLAIN, return_chunk_states=True)(**arrays)
    for x, y in zip((o, final), attend(PLAIN)(**arrays), strict=True):
        close(x, y)
    assert states.shape == (2, 3, 4, 16, 8) and states.dtype == jnp.float32
    tokens = ("q", "k", "v", "g", "beta")
    for i in range(3):
        cut = 64 * (i + 1)
        head = {n: x[:, :cut] if n in tokens else x for n, x in arrays.items()}
        close(states[:, i], attend(PLAIN)(**head)[1])
        tail = {n: x[:, cut:] if n in tokens else x for n, x in arrays.items()}
        o_tail, final_tail = attend(PLAIN)(**(tail | {"initial_state": states[:, i]}))
        close(o_tail, o[:, cut:])
        close(final_tail, final)


def test_packed_segments_have_theirs_where_the_formula_says():
    arrays = PACKED.arrays()
    _, _, states = attend(PACKED, return_chunk_states=True)(**arrays)
    assert states.shape == (2, 4, 4, 16, 8)
    filled = np.zeros((2, 4), bool)
    alone = Case(T=64, B=1, K=16, V=8, initial_state=True, **RAW)
    for b, row in enumerate(IDS):
        for n, (start, length) in enumerate(runs(row)):
            for m in range(1, length // 64 + 1):
                entry = (start + 64 * m) // 64 - 1
                filled[b, entry] = True
                head = {
                    name: x[b : b + 1, start : start + 64 * m]
                    for name, x in arrays.items()
                    if name in ("q", "k", "v", "g", "beta")
                }
                head |= {name: arrays[name] for name in ("A_log", "dt_bias")}
                head["initial_state"] = arrays["initial_state"][b, n][None]
                close(states[b, entry], attend(alone)(**head)[1][0])
    assert filled.sum() == 7
    assert not np.asarray(states)[~filled].any()


def test_without_the_final_state():
    arrays = PLAIN.arrays()
    o, states = attend(PLAIN, return_final_state=False, return_chunk_states=True)(**arrays)
    close(states, attend(PLAIN, return_chunk_states=True)(**arrays)[2])


@pytest.mark.parametrize("T", [0, 63])
def test_short_rows_have_none(T):
    case = Case(T=T, K=16, V=8, initial_state=True, **RAW)
    o, final, states = attend(case, return_chunk_states=True)(**case.arrays())
    assert o.shape[1] == T and states.shape == (2, 0, 4, 16, 8)


FEW = dict(B=1, H=1, HV=2, K=8, V=4, initial_state=True, **RAW)
FEW_IDS = ((0,) * 3 + (1,) * 70 + (2,) * 64 + (0,) * 3,)


@pytest.mark.parametrize(
    "case",
    [Case(T=140, **FEW), Case(T=140, segment_ids=FEW_IDS, max_segments=2, **FEW)],
    ids=["plain", "packed"],
)
def test_their_gradient_is_that_of_a_final_state(case):
    """The sum over prefixes, each differentiated as a call of its own."""
    arrays = case.arrays()
    ids = {n: x for n, x in arrays.items() if n == "segment_ids"}
    floats = {n: x for n, x in arrays.items() if n != "segment_ids"}
    call = attend(case, return_chunk_states=True)
    weights = jax.random.normal(jax.random.key(0), call(**arrays)[2].shape)

    def loss(floats):
        return jnp.sum(call(**floats, **ids)[2] * weights)

    def loss_of_prefixes(floats):
        total = 0.0
        alone = attend(Case(**RAW))
        rows = case.segment_ids or ((1,) * case.T,) * case.B
        for b, row in enumerate(rows):
            for n, (start, length) in enumerate(runs(row)):
                first = floats["initial_state"][b]
                first = first[n] if case.segment_ids else first
                for m in range(1, length // 64 + 1):
                    head = {x: floats[x] for x in ("A_log", "dt_bias")} | {
                        x: floats[x][b : b + 1, start : start + 64 * m]
                        for x in ("q", "k", "v", "g", "beta")
                    }
                    state = alone(**head, initial_state=first[None])[1][0]
                    total += jnp.sum(state * weights[b, (start + 64 * m) // 64 - 1])
        return total

    got, wanted = jax.jit(jax.grad(loss))(floats), jax.jit(jax.grad(loss_of_prefixes))(floats)
    for name in floats:
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-3, atol=2e-4 * scale)


def test_vmap():
    arrays = PACKED.arrays()
    more = {n: jnp.stack([x, x[::-1]]) if n == "q" else x for n, x in arrays.items()}
    call = attend(PACKED, return_chunk_states=True)
    axes = {n: 0 if n == "q" else None for n in arrays}
    got = jax.jit(jax.vmap(lambda x: call(**x), in_axes=(axes,)))(more)
    for i in range(2):
        wanted = call(**(arrays | {"q": more["q"][i]}))
        for x, y in zip(got, wanted, strict=True):
            close(x[i], y)


def test_the_kernels_do_not_return_them():
    case = Case(T=128, K=128, V=128, dtype="bfloat16", **RAW)
    arrays, options = case.arrays(), {n: x for n, x in case.options.items() if x is not None}
    said = supported(**arrays, **options, return_chunk_states=True, compute_capability="9.0")
    assert "return_chunk_states" in said or "extension" in said
    call = functools.partial(kimi_delta_attention, **options, return_chunk_states=True)
    traced = jax.jit(functools.partial(call, implementation="cuda")).trace(**arrays)
    with pytest.raises(NotImplementedError, match='implementation="cuda" cannot run this call'):
        traced.lower(lowering_platforms=("cuda",))


def test_refusal():
    with pytest.raises(TypeError, match="return_chunk_states: got 1; True or False"):
        kimi_delta_attention(**PLAIN.arrays(), gate="softplus", return_chunk_states=1)
