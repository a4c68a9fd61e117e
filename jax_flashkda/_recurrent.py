"""The decode step on XLA: the recurrence itself, a few tokens at a time.

Products are multiplications and sums in fp32 (fp64 for float64 inputs): with one token there is no
matrix product to win, and what costs is reading and writing the state.
"""

import jax.numpy as jnp

from . import _chunked
from ._problem import StepProblem


def step(problem: StepProblem, *operands):
    """Results of `problem` (see `_problem.py` for operands and results)."""
    named = problem.named(operands)
    pool = named["state"]
    dtype = jnp.float64 if named["v"].dtype == jnp.float64 else jnp.float32
    if problem.has_state_indices:
        indices, slots = named["state_indices"], pool.shape[0]
        exists = (indices >= 0) & (indices < slots)
        # jnp counts negative indices from the end; past the end they read zero and write nothing.
        place = pool.at[jnp.where(exists, indices, slots)]
        state = place.get(mode="fill", fill_value=0)
    else:
        exists, state = jnp.ones((1,), bool), pool
    state = state.astype(dtype)

    tile = [named[name] for name in ("q", "k", "v", "g", "beta")]
    parameters = {name: named[name] for name in ("A_log", "dt_bias") if name in named}
    inputs = _chunked.token_inputs(problem, exists[:, None], tile, parameters, dtype)
    outputs, states = [], []
    for t in range(named["q"].shape[1]):
        q, k, v, log_decay, beta = (x[:, :, t] for x in inputs)
        state = jnp.exp(log_decay)[..., None] * state
        read = jnp.sum(state * k[..., None], axis=-2)
        state = state + k[..., None] * (beta[..., None] * (v - read))[..., None, :]
        outputs.append(jnp.sum(state * q[..., None], axis=-2))
        states.append(state.astype(pool.dtype))
    o = jnp.stack(outputs, axis=1).astype(named["v"].dtype)
    new = place.set(states[-1], mode="drop") if problem.has_state_indices else states[-1]
    results = (o, new, jnp.stack(states, axis=1)) if problem.return_token_states else (o, new)
    return results
