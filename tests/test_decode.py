"""The layer and its convolution decode: a prefill and steps are the full forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx", reason="the layer needs flax")

from jax_flashkda import (  # noqa: E402
    KimiDeltaAttention,
    KimiDeltaCache,
    lengths_to_segment_ids,
    short_conv,
    short_conv_state,
    short_conv_step,
)

HIDDEN = 24
LENGTHS = (5, 70, 2, 33)  # of the prompts; the convolution has four taps
MORE = 6  # tokens that follow each


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


# The convolution


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 9])
def test_short_conv_goes_on_from_its_state(cut):
    x, kernel, bias = normal(2, 12, 3), normal(4, 3, seed=1), normal(3, seed=2)
    whole = short_conv(x, kernel, bias)
    state = short_conv_state(x[:, :cut], 4)
    assert state.shape == (2, 3, 3)
    close(short_conv(x[:, cut:], kernel, bias, initial_state=state), whole[:, cut:])
    for t in range(cut, 12, 3):
        y, state = short_conv_step(x[:, t : t + 3], kernel, state, bias)
        close(y, whole[:, t : t + 3])
    np.testing.assert_array_equal(state, x[:, 9:])


def test_packed_short_conv_goes_on_from_its_state():
    """Segments of one to five tokens, one of them without a state of its own."""
    lengths, N = [3, 1, 5, 2], 3
    documents = [normal(length + 4, 3, seed=i) for i, length in enumerate(lengths)]
    kernel = normal(4, 3, seed=9)
    before = jnp.stack([short_conv_state(d[None, :4], 4)[0] for d in documents[:N]])[None]
    ids = jnp.asarray([0] + sum([[i + 1] * n for i, n in enumerate(lengths)], []) + [-1])[None]
    row = jnp.concatenate([d[4:] for d in documents])
    x = jnp.pad(row, ((1, 1), (0, 0)), constant_values=jnp.nan)[None]
    y = short_conv(x, kernel, segment_ids=ids, initial_state=before)[0, 1:-1]
    start = 0
    for i, (document, length) in enumerate(zip(documents, lengths, strict=True)):
        wanted = short_conv(document[None], kernel)[0, 4:]
        if i >= N:
            wanted = short_conv(document[None, 4:], kernel)[0]
        close(y[start : start + length], wanted)
        start += length
    after = short_conv_state(x, 4, segment_ids=ids, max_segments=5)
    assert after.shape == (1, 5, 3, 3)
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(after[0, i], short_conv_state(document[None, 4:], 4)[0])
    assert not np.asarray(after[0, 4]).any()


def test_short_conv_step_in_a_pool():
    pool, kernel, x = normal(5, 3, 2), normal(4, 2, seed=1), normal(4, 2, 2, seed=2)
    indices = jnp.asarray([3, -1, 5, 0], jnp.int32)
    y, after = short_conv_step(x.at[1:3].set(jnp.nan), kernel, pool, state_indices=indices)
    assert not np.asarray(y[1:3]).any()
    for row, slot in ((0, 3), (3, 0)):
        alone, state = short_conv_step(x[row][None], kernel, pool[slot][None])
        close(y[row], alone[0])
        np.testing.assert_array_equal(after[slot], state[0])
    for slot in (1, 2, 4):
        np.testing.assert_array_equal(after[slot], pool[slot])


def test_short_conv_step_names_every_bad_argument():
    with pytest.raises(ValueError) as error:
        short_conv_step(
            jnp.ones((2, 1, 3)),
            jnp.ones((4, 3)),
            jnp.ones((2, 4, 3)),
            activation="relu",
            state_indices=jnp.ones(3),
        )
    for text in ("state must be [slots, W - 1, ...channels] = (2, 3, 3)", "'relu'", "integers [N]"):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="initial_state must be"):
        short_conv(jnp.ones((2, 5, 3)), jnp.ones((4, 3)), initial_state=jnp.ones((2, 4, 3)))


# The layer

LAYERS = {
    "softplus": dict(),
    "bounded, grouped values": dict(gate="bounded", num_value_heads=4, value_head_dim=8),
    "full-rank output gate": dict(output_gate="full_rank", allow_neg_eigval=True),
}


@functools.cache
def case(name):
    """A layer, the tokens of sequences, and what the full forward makes of each."""
    layer = KimiDeltaAttention(HIDDEN, 2, 16, rngs=nnx.Rngs(0), **LAYERS[name])
    sequences = [normal(n + MORE, HIDDEN, seed=i) for i, n in enumerate(LENGTHS)]
    ids = lengths_to_segment_ids(jnp.asarray(LENGTHS) + MORE, 140)
    row = jnp.pad(jnp.concatenate(sequences), ((0, 140 - int(ids.astype(bool).sum())), (0, 0)))
    y = nnx.jit(lambda layer, x, ids: layer(x, segment_ids=ids))(layer, row[None], ids[None])[0]
    ends = np.cumsum(np.asarray(LENGTHS) + MORE)
    outputs = [y[end - n - MORE : end] for end, n in zip(ends, LENGTHS, strict=True)]
    return layer, sequences, outputs


def packed(sequences, lengths, T):
    row = jnp.concatenate([s[:n] for s, n in zip(sequences, lengths, strict=True)])
    ids = lengths_to_segment_ids(jnp.asarray(lengths), T)
    return jnp.pad(row, ((0, T - len(row)), (0, 0)))[None], ids[None]


prefill = nnx.jit(KimiDeltaAttention.prefill, static_argnames="max_segments")
step = nnx.jit(KimiDeltaAttention.step)


@pytest.mark.parametrize("name", LAYERS)
def test_prefill_and_steps_are_the_full_forward(name):
    layer, sequences, outputs = case(name)
    x, ids = packed(sequences, LENGTHS, 128)
    y, cache = prefill(layer, x, segment_ids=ids, max_segments=4)
    assert isinstance(cache, KimiDeltaCache)
    empty = layer.init_cache(4)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), empty) == jax.tree.map(
        lambda a: (a.shape, a.dtype), cache
    )
    start = 0
    for length, output in zip(LENGTHS, outputs, strict=True):
        close(y[0, start : start + length], output[:length])
        start += length
    for first, tokens in ((0, 1), (1, 1), (2, 3), (5, 1)):
        at = [slice(n + first, n + first + tokens) for n in LENGTHS]
        x = jnp.stack([s[i] for s, i in zip(sequences, at, strict=True)])
        y, cache = step(layer, x, cache)
        close(y, jnp.stack([o[i] for o, i in zip(outputs, at, strict=True)]))


def test_rows_of_different_lengths():
    """Prompts as rows with padding behind them, and a prefill that is a row a sequence."""
    layer, sequences, outputs = case("softplus")
    ids = (jnp.arange(70)[None] < jnp.asarray(LENGTHS)[:, None]).astype(jnp.int32)
    rows = jnp.stack([jnp.pad(s, ((0, 70), (0, 0)))[:70] for s in sequences])
    _, cache = prefill(layer, rows, segment_ids=ids, max_segments=1)
    y, _ = step(layer, jnp.stack([s[n][None] for s, n in zip(sequences, LENGTHS)]), cache)  # noqa: B905
    close(y[:, 0], jnp.stack([o[n] for o, n in zip(outputs, LENGTHS, strict=True)]))
    y, cache = prefill(layer, sequences[1][None, :70])
    close(y[0], outputs[1][:70])
    close(step(layer, sequences[1][None, 70:71], cache)[0][0], outputs[1][70:71])


def test_a_prefill_continues():
    """New and continued requests in one row; what is short keeps inputs of before."""
    layer, sequences, outputs = case("softplus")
    cuts = (3, 64, 0, 32)
    x, ids = packed(sequences, cuts, 128)
    _, cache = prefill(layer, x, segment_ids=ids, max_segments=4)
    # The third has no token yet, so those of the others are its neighbours' slots: put in order.
    order = jnp.asarray([0, 1, 3, 2])
    cache = jax.tree.map(lambda a: a[order], cache)
    rest = [n + 1 - c for n, c in zip(LENGTHS, cuts, strict=True)]
    x, ids = packed([s[c:] for s, c in zip(sequences, cuts, strict=True)], rest, 128)
    y, cache = prefill(layer, x, cache, segment_ids=ids, max_segments=4)
    start = 0
    for i, length in enumerate(rest):
        close(y[0, start : start + length], outputs[i][cuts[i] : cuts[i] + length])
        start += length
    x = jnp.stack([s[n + 1][None] for s, n in zip(sequences, LENGTHS, strict=True)])
    y, _ = step(layer, x, cache)
    close(y[:, 0], jnp.stack([o[n + 1] for o, n in zip(outputs, LENGTHS, strict=True)]))
    whole = sequences[1][None, :70]
    _, cache = prefill(layer, whole[:, :64])
    y, cache = prefill(layer, whole[:, 64:], cache)
    close(y[0], outputs[1][64:70])
    close(step(layer, sequences[1][None, 70:71], cache)[0][0], outputs[1][70:71])


def test_a_pool_of_sequences():
    layer, sequences, outputs = case("softplus")
    x, ids = packed(sequences, LENGTHS, 128)
    _, cache = prefill(layer, x, segment_ids=ids, max_segments=4)
    slots = jnp.asarray([6, 0, 3, 1])
    pool = jax.tree.map(lambda pool, a: pool.at[slots].set(a), layer.init_cache(7), cache)
    indices = jnp.asarray([1, -1, 6], jnp.int32)  # the fourth, nobody, the first
    x = jnp.stack([sequences[3][33], jnp.full(HIDDEN, jnp.nan), sequences[0][5]])[:, None]
    y, after = step(layer, x, pool, state_indices=indices)
    close(y[0, 0], outputs[3][33])
    close(y[2, 0], outputs[0][5])
    for before, now in zip(pool, after, strict=True):
        for slot in (0, 2, 3, 4, 5):
            np.testing.assert_array_equal(now[slot], before[slot])


def test_lengths_do_not_recompile():
    layer, sequences, _ = case("softplus")
    graphdef, params = nnx.split(layer)

    @jax.jit
    def run(params, x, ids, token):
        layer = nnx.merge(graphdef, params)
        _, cache = layer.prefill(x, segment_ids=ids, max_segments=4)
        return layer.step(token, cache)

    token = normal(4, 1, HIDDEN)
    for lengths in (LENGTHS, (1, 2, 3, 4), (60, 20, 10, 5)):
        run(params, *packed(sequences, lengths, 128), token)
    assert run._cache_size() == 1


def test_a_donated_cache_is_updated_in_place():
    layer, _, _ = case("softplus")
    graphdef, params = nnx.split(layer)
    run = jax.jit(
        lambda params, x, cache: nnx.merge(graphdef, params).step(x, cache), donate_argnums=2
    )
    cache = layer.init_cache(4)
    compiled = run.lower(params, normal(4, 1, HIDDEN), cache).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(a.nbytes for a in cache)


def test_a_bfloat16_cache():
    layer = KimiDeltaAttention(HIDDEN, 2, 16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    cache = layer.init_cache(2, state_dtype=jnp.bfloat16)
    assert {a.dtype for a in cache} == {jnp.dtype("bfloat16")}
    y, after = layer.prefill(normal(2, 9, HIDDEN).astype(jnp.bfloat16), cache)
    assert y.dtype == jnp.bfloat16 and {a.dtype for a in after} == {jnp.dtype("bfloat16")}
    y, after = layer.step(normal(2, 1, HIDDEN).astype(jnp.bfloat16), after)
    assert y.dtype == jnp.bfloat16 and {a.dtype for a in after} == {jnp.dtype("bfloat16")}


def test_refusals():
    layer, _, _ = case("softplus")
    with pytest.raises(ValueError, match="max_segments is needed with segment_ids"):
        layer.prefill(normal(1, 4, HIDDEN), segment_ids=jnp.ones((1, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"\[N, T, hidden_size=24\]"):
        layer.step(normal(1, HIDDEN), layer.init_cache(1))
    with pytest.raises(ValueError, match="1 to 8 are accepted"):
        layer.step(normal(1, 9, HIDDEN), layer.init_cache(1))
