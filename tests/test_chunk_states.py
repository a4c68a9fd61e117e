"""The states that `return_chunk_states` gives: those of prefixes, to go on from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from call import for_implementation
from cases import Case, runs
from oracle import CAPS_16_BIT, COMPILE_QUICKLY

from jax_flashkda import kimi_delta_attention

IDS = ((0,) * 3 + (1,) * 150 + (2,) * 64 + (0,) * 20 + (3,) * 63 + (1,) * 5, (4,) * 305)
RAW = dict(gate="softplus", A_log=True, dt_bias=True, beta_is_logits=True, qk_l2norm=True)
PLAIN = Case(T=200, K=16, V=8, initial_state=True, **RAW)
PACKED = Case(T=305, K=16, V=8, initial_state=True, segment_ids=IDS, max_segments=3, **RAW)


LONG = Case(T=4133, B=1, H=1, HV=2, K=128, V=128, dtype="bfloat16", initial_state=True, **RAW)
TOKENS = ("q", "k", "v", "g", "beta")


jit = functools.partial(  # states agree to the last bits, not bitwise, however they are compiled
    jax.jit, compiler_options=COMPILE_QUICKLY if jax.default_backend() == "cpu" else None
)


def op(case, implementation=None, **more):
    """The op with the options of a case: a function of its arrays."""
    options = {name: x for name, x in case.options.items() if x is not None}
    options |= dict(return_final_state=True, implementation=implementation) | more
    return functools.partial(kimi_delta_attention, **options)


@functools.cache  # one program a case
def attend(case, implementation=None, **more):
    return jit(op(case, implementation, **more))


def close(got, wanted, implementation="xla"):
    """To the last bits; the kernels owe all of them."""
    rtol, atol = (0, 0) if implementation == "cuda" else (1e-4, 1e-5)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=rtol, atol=atol
    )


def cut(arrays, tokens):
    return {name: x[:, tokens] if name in TOKENS else x for name, x in arrays.items()}


def test_they_are_the_states_of_prefixes(implementation):
    case = for_implementation(PLAIN, implementation)
    arrays, close_ = case.arrays(), functools.partial(close, implementation=implementation)
    run = attend(case, implementation)
    o, final, states = attend(case, implementation, return_chunk_states=True)(**arrays)
    for x, y in zip((o, final), run(**arrays), strict=True):
        close_(x, y)
    assert states.shape == (2, 3, case.HV, case.K, case.V) and states.dtype == jnp.float32
    for i in range(3):
        at = 64 * (i + 1)
        close_(states[:, i], run(**cut(arrays, slice(0, at)))[1])
        tail = cut(arrays, slice(at, None)) | {"initial_state": states[:, i]}
        o_tail, final_tail = run(**tail)
        close_(o_tail, o[:, at:])
        close_(final_tail, final)


def test_packed_segments_have_theirs_where_the_formula_says(implementation):
    case = for_implementation(PACKED, implementation)
    arrays = case.arrays()
    _, _, states = attend(case, implementation, return_chunk_states=True)(**arrays)
    assert states.shape == (2, 4, case.HV, case.K, case.V)
    filled = np.zeros((2, 4), bool)
    alone = attend(dataclasses.replace(case, segment_ids=None, max_segments=None), implementation)
    for b, row in enumerate(IDS):
        for n, (start, length) in enumerate(runs(row)):
            for m in range(1, length // 64 + 1):
                entry = (start + 64 * m) // 64 - 1
                filled[b, entry] = True
                head = cut(arrays, slice(start, start + 64 * m))
                head = {x: y[b : b + 1] if x in TOKENS else y for x, y in head.items()}
                head["initial_state"] = arrays["initial_state"][b, n][None]
                del head["segment_ids"]
                close(states[b, entry], alone(**head)[1][0], implementation)
    assert filled.sum() == 7
    assert not np.asarray(states)[~filled].any()


def test_without_the_final_state(implementation):
    case = for_implementation(PLAIN, implementation)
    arrays, run = case.arrays(), functools.partial(attend, case, implementation)
    o, states = run(return_final_state=False, return_chunk_states=True)(**arrays)
    close(states, run(return_chunk_states=True)(**arrays)[2], implementation)


@pytest.mark.parametrize("T", [0, 63])
def test_short_rows_have_none(T, implementation):
    case = for_implementation(Case(T=T, K=16, V=8, initial_state=True, **RAW), implementation)
    arrays, run = case.arrays(), functools.partial(attend, case, implementation)
    o, final, states = run(return_chunk_states=True)(**arrays)
    assert o.shape[1] == T and states.shape == (2, 0, case.HV, case.K, case.V)
    for x, y in zip((o, final), run()(**arrays), strict=True):
        close(x, y, implementation)


@pytest.mark.gpu
def test_a_row_that_would_be_cut_into_pieces_is_not():
    """A request that goes on from one of its states has the bits of the uninterrupted one, if it
    asks for chunk states too.
    """
    arrays, run = LONG.arrays(), attend(LONG, "cuda", return_chunk_states=True)
    o, final, states = run(**arrays)
    assert np.any(np.asarray(o) != np.asarray(attend(LONG, "cuda")(**arrays)[0]))  # in pieces
    for entry in (0, 31, 63):
        at = 64 * (entry + 1)
        tail = cut(arrays, slice(at, None)) | {"initial_state": states[:, entry]}
        o_tail, final_tail, states_tail = run(**tail)
        close(o_tail, o[:, at:], "cuda")
        close(final_tail, final, "cuda")
        close(states_tail, states[:, entry + 1 :], "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [PLAIN, PACKED, LONG], ids=["plain", "packed", "long"])
def test_the_kernels_states_are_those_of_xla(case):
    case = for_implementation(case, "cuda")
    got, wanted = (
        np.asarray(attend(case, x, return_chunk_states=True)(**case.arrays())[2], np.float64)
        for x in ("cuda", "xla")
    )
    size = np.sqrt(np.sum(wanted**2, axis=(-2, -1)))
    error = np.sqrt(np.sum((got - wanted) ** 2, axis=(-2, -1)))
    assert np.all(error <= CAPS_16_BIT["final_state"] * size)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:kimi_delta_attention uses XLA on an NVIDIA GPU:RuntimeWarning")
def test_the_gradient_behind_the_kernels_is_that_of_xla():
    case = for_implementation(PACKED, "cuda")
    arrays = case.arrays()

    def loss(floats, implementation):
        states = op(case, implementation, return_chunk_states=True)(**(arrays | floats))[2]
        return jnp.sum(states * jnp.cos(jnp.arange(states.size)).reshape(states.shape))

    floats = {name: x for name, x in arrays.items() if name != "segment_ids"}
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    got, wanted = (gradient(floats, implementation) for implementation in (None, "xla"))
    for name in floats:
        x, y = (np.asarray(d[name], np.float32) for d in (got, wanted))
        np.testing.assert_allclose(x, y, rtol=2**-7, atol=1e-3 * np.abs(y).max())


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
    call = op(case, "xla", return_chunk_states=True)
    weights = jax.random.normal(jax.random.key(0), jax.eval_shape(call, **arrays)[2].shape)

    def loss(floats):
        return jnp.sum(call(**floats, **ids)[2] * weights)

    def loss_of_prefixes(floats):
        total = 0.0
        alone = op(Case(**RAW), "xla")
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

    got, wanted = jit(jax.grad(loss))(floats), jit(jax.grad(loss_of_prefixes))(floats)
    for name in floats:
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-3, atol=2e-4 * scale)


def test_vmap(implementation):
    case = for_implementation(PACKED, implementation)
    arrays = case.arrays()
    more = {n: jnp.stack([x, x[::-1]]) if n == "q" else x for n, x in arrays.items()}
    call = op(case, implementation, return_chunk_states=True)
    axes = {n: 0 if n == "q" else None for n in arrays}
    got = jit(jax.vmap(lambda x: call(**x), in_axes=(axes,)))(more)
    for i in range(2):
        wanted = attend(case, implementation, return_chunk_states=True)(
            **(arrays | {"q": more["q"][i]})
        )
        for x, y in zip(got, wanted, strict=True):
            close(x[i], y, implementation)


def test_refusal():
    with pytest.raises(TypeError, match="return_chunk_states: got 1; True or False"):
        kimi_delta_attention(**PLAIN.arrays(), gate="softplus", return_chunk_states=1)
