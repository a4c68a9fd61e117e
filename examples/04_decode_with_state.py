"""Decode: prefill two prompts of different lengths in one packed call, then go on token by token.

    python examples/04_decode_with_state.py

A state of fixed size stands for all tokens so far. Here every step is compared with what the op
makes of the whole sequence at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashkda import (
    kimi_delta_attention,
    kimi_delta_attention_step,
    lengths_to_segment_ids,
)

H, D = 2, 128  # heads and head size
PROMPTS, STEPS = (40, 17), 8
options = dict(gate="softplus", A_log=jnp.zeros(H), beta_is_logits=True, qk_l2norm=True)

# Two whole sequences, [1, T, ..] each: prompts and the tokens after them, as from a model.
sequences = []
for i, length in enumerate(PROMPTS):
    keys = jax.random.split(jax.random.key(i), 5)
    shape = (1, length + STEPS, H, D)
    q, k, v, g = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4])
    beta = jax.random.normal(keys[4], shape[:3], jnp.bfloat16)
    sequences.append((q, k, v, g, beta))

# The prompts behind one another in one row; segment ids keep them apart.
prompts = [[x[:, :n] for x in s] for s, n in zip(sequences, PROMPTS, strict=True)]
row = [jnp.concatenate(parts, axis=1) for parts in zip(*prompts, strict=True)]
ids = lengths_to_segment_ids(jnp.array(PROMPTS), sum(PROMPTS))[None]
o, states = kimi_delta_attention(
    *row, segment_ids=ids, max_segments=2, return_final_state=True, **options
)
state = states[0]  # [N, H, D, D]: a state a sequence

# Donated, so that the step updates it in place.
step = jax.jit(functools.partial(kimi_delta_attention_step, **options), donate_argnums=5)
outputs = []
for t in range(STEPS):
    ends = [[x[:, n + t : n + t + 1] for x in s] for s, n in zip(sequences, PROMPTS, strict=True)]
    tokens = [jnp.concatenate(parts) for parts in zip(*ends, strict=True)]  # [N, 1, ..]
    o, state = step(*tokens, state)
    outputs.append(o)
decoded = np.asarray(jnp.concatenate(outputs, axis=1), np.float32)  # [N, STEPS, H, D]

for i, (sequence, length) in enumerate(zip(sequences, PROMPTS, strict=True)):
    whole = np.asarray(kimi_delta_attention(*sequence, **options)[0, length:], np.float32)
    error = np.linalg.norm(decoded[i] - whole) / np.linalg.norm(whole)
    print(f"prompt of {length:2} tokens, {STEPS} more: relative difference {error:.1e}")
    assert error < 0.01
