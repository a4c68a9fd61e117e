"""Greedy and sampled continuation."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


def generate(model, tokens, length, *, lengths=None, temperature=0.0, key=None):
    """Continue prompts: all are read at once, then advance together token by token.

    **Arguments**

    - `tokens`: int32 [B, T].
    - `length`: how many tokens to append to each, at least 1.
    - `lengths`: int32 [B], the prompts' lengths, at least 1; by default all are T. Other lengths
      and temperatures compile nothing anew.
    - `temperature`: 0 takes the most likely token; above, tokens are drawn from
      softmax(logits / temperature), which needs `key`.

    **Returns** int32 [B, length], the appended tokens."""
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens must be [B, T] with a token each at least, got {tokens.shape}")
    lengths = jnp.full(len(tokens), tokens.shape[1]) if lengths is None else jnp.asarray(lengths)
    if lengths.shape != tokens.shape[:1] or lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"lengths must be [{len(tokens)}], from 1 to T, got {lengths}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"temperature must be 0, or above it with a key, got {temperature}")
    key = jax.random.key(0) if key is None else key
    lengths, greedy = lengths.astype(jnp.int32), temperature == 0
    return _generate(model, tokens, lengths, key, temperature, length=length, greedy=greedy)


@functools.partial(nnx.jit, static_argnames=("length", "greedy"))
def _generate(model, tokens, lengths, key, temperature, *, length, greedy):
    def choose(logits, number):
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        draw = jax.random.fold_in(key, number)
        return jax.random.categorical(draw, logits / temperature).astype(jnp.int32)

    def advance(carry, number):
        token, cache = carry
        logits, cache = model.step(token[:, None], cache)
        token = choose(logits[:, 0], number)
        return (token, cache), token

    logits, cache = model.prefill(tokens, tokens.shape[1] + length, lengths=lengths)
    first = choose(logits, 0)
    _, others = jax.lax.scan(advance, (first, cache), jnp.arange(1, length))
    return jnp.concatenate([first[None], others]).T
