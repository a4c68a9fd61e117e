"""Greedy and sampled continuation."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


def generate(model, tokens, length, *, temperature=0.0, key=None):
    """Continue a row of tokens.

    Every token costs a forward pass over the whole window, prompt and continuation; the model is
    causal, so what stands behind a position does not matter.

    **Arguments**

    - `tokens`: int32 [T], at least one token.
    - `length`: how many tokens to append.
    - `temperature`: 0 takes the most likely token; above, tokens are drawn from
      softmax(logits / temperature), which needs `key`.

    **Returns** int32 [T + length]."""
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"tokens must be [T] with T of at least 1, got {tokens.shape}")
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"temperature must be 0, or above it with a key, got {temperature}")
    window = jnp.zeros(len(tokens) + length, jnp.int32).at[: len(tokens)].set(tokens)
    key = jax.random.key(0) if key is None else key
    return _complete(model, window, len(tokens), key, temperature)


@functools.partial(nnx.jit, static_argnames="temperature")
def _complete(model, window, start, key, temperature):
    def append(position, window):
        logits = model(window[None])[0, position - 1]
        if temperature:
            draw = jax.random.fold_in(key, position)
            token = jax.random.categorical(draw, logits / temperature)
        else:
            token = jnp.argmax(logits)
        return window.at[position].set(token.astype(jnp.int32))

    return jax.lax.fori_loop(start, len(window), append, window)
