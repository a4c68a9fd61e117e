"""Kimi Delta Attention on XLA: the chunk-parallel form (Kimi Linear, arXiv 2510.26692, section 3),
one chunk of 64 tokens a step.

The forward walks each segment's chunks and carries its state. The backward saves nothing: it walks
once forward for the state each chunk starts from, then in reverse, differentiating one recomputed
chunk at a time. Temporaries are therefore one chunk's intermediates and, in the backward, one state
per 64 tokens.

Arithmetic is fp32 (fp64 for float64 inputs). For 16-bit inputs the products may run on tf32 matrix
units, whose operands keep more digits than the inputs have; for float32 inputs they are exact fp32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from . import _segments
from ._problem import Problem
from ._segments import CHUNK

# exp(-110) is 0 in fp32: a stronger decay changes nothing, and -inf becomes a plain reset.
MIN_LOG_DECAY = -110.0
L2NORM_EPS = 1e-6
SUB_BLOCK = 8

_TOKEN_OPERANDS = ("q", "k", "v", "g", "beta")


def forward(problem: Problem, *operands, tail_slot=False):
    """Forward results of `problem` (see `_problem.py` for operands and results)."""
    call = _Call(problem, operands, tail_slot)
    chunk_states = call.no_chunk_states()
    if call.empty:
        return call.results(call.tokens[2], call.initial_state, chunk_states)

    def step(i, carry):
        o, states, chunk_states, state = carry
        chunk = call.schedule[i]
        tile = [_take(x, chunk.start) for x in call.tokens]
        state = call.enter(chunk, state)
        o_tile, state = _chunk(problem, chunk.mask(), tile, call.parameters, state)
        if chunk_states is not None:
            whole = chunk.length == CHUNK
            chunk_states = _put_state(chunk_states, chunk.start // CHUNK, whole, state)
        return _put(o, chunk, o_tile), call.leave(chunk, states, state), chunk_states, state

    o, states, chunk_states, _ = lax.fori_loop(
        0,
        call.schedule.count,
        step,
        (jnp.zeros_like(call.tokens[2]), call.initial_state, chunk_states, call.zero_state),
    )
    return call.results(o, states, chunk_states)


def backward(problem: Problem, *operands, tail_slot=False):
    """Gradients of the float operands of `problem`, from its operands and the cotangents of its
    results.
    """
    call = _Call(problem, operands, tail_slot)
    cotangents = operands[len(problem.operand_names) :]
    d_results = dict(zip(problem.result_names, cotangents, strict=True))
    d_o = _pad_tail(d_results["o"], call.padded_T)
    d_states = d_results.get("final_state", jnp.zeros_like(call.initial_state))
    d_chunk_states = d_results.get("chunk_states")
    if call.no_chunk_states() is None:
        d_chunk_states = None
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    if call.empty:
        return call.gradients(zeros(call.tokens), zeros(call.parameters), d_states)

    def advance(i, carry):
        starts, state = carry
        chunk = call.schedule[i]
        tile = [_take(x, chunk.start) for x in call.tokens]
        state = call.enter(chunk, state)
        starts = _put_state(starts, chunk.start // CHUNK, ~chunk.first & (chunk.length > 0), state)
        return starts, _chunk(problem, chunk.mask(), tile, call.parameters, state)[1]

    B, T = call.tokens[0].shape[0], call.padded_T
    starts = jnp.zeros((B, T // CHUNK, *call.zero_state.shape[1:]), call.zero_state.dtype)
    starts, _ = lax.fori_loop(0, call.schedule.count, advance, (starts, call.zero_state))

    def retreat(j, carry):
        d_tokens, d_parameters, d_states, d_state = carry
        chunk = call.schedule[call.schedule.count - 1 - j]
        tile = [_take(x, chunk.start) for x in call.tokens]
        state = call.enter(chunk, _take_state(starts, chunk.start // CHUNK))
        mine = _in_range(chunk, d_states)
        # A state that nobody reads has no cotangent: that of a segment without a slot is zero.
        d_final = jnp.where(_rows(mine, d_state), _take_state(d_states, chunk.segment), 0)
        d_state = jnp.where(_rows(chunk.last, d_state), d_final, d_state)
        if d_chunk_states is not None:
            whole = _rows(chunk.length == CHUNK, d_state)
            d_state += jnp.where(whole, _take_state(d_chunk_states, chunk.start // CHUNK), 0)
        _, pull_back = jax.vjp(
            lambda tile, parameters, state: _chunk(problem, chunk.mask(), tile, parameters, state),
            tile,
            call.parameters,
            state,
        )
        # Rows behind the chunk are a neighbour's: their q is 0 here, but 0 times its NaN is not.
        d_o_tile = _take(d_o, chunk.start)
        d_o_tile = jnp.where(_rows(chunk.mask(), d_o_tile), d_o_tile, 0)
        d_tile, d_own, d_state = pull_back((d_o_tile, d_state))
        d_tokens = [_put(d, chunk, t) for d, t in zip(d_tokens, d_tile, strict=True)]
        d_parameters = jax.tree.map(jnp.add, d_parameters, d_own)
        return (
            d_tokens,
            d_parameters,
            _put_state(d_states, chunk.segment, chunk.first & mine, d_state),
            d_state,
        )

    # A slot past the row's last segment hands its initial state through, so its cotangent goes the
    # same way back.
    d_tokens, d_parameters, d_states, _ = lax.fori_loop(
        0,
        call.schedule.count,
        retreat,
        (zeros(call.tokens), zeros(call.parameters), d_states, call.zero_state),
    )
    return call.gradients(d_tokens, d_parameters, d_states)


def state_maps(problem: Problem, *operands):
    """M and B of the segment that ends each row, which takes its state S to M S + B: what the state
    is behind it, from the identity without values, and from zero.
    """
    named = _of_ends(problem, operands, at=1)
    v, K = named["v"], named["k"].shape[-1]
    B, T, HV, V = v.shape
    columns = jnp.zeros((B, T, HV, K), v.dtype)
    identity = jnp.eye(K, K + V, dtype=_compute_dtype(v.dtype))
    named = named | {
        "v": jnp.concatenate([columns, v], axis=-1),
        "initial_state": jnp.broadcast_to(identity, (B, 1, HV, K, K + V)),
    }
    problem = dataclasses.replace(
        problem, max_segments=1, has_initial_state=True, return_final_state=True
    )
    _, behind = forward(problem, *(named[name] for name in problem.operand_names))
    return behind[:, 0, ..., :K], behind[:, 0, ..., K:]


def state_gradient(problem: Problem, *operands):
    """Of `backward` the gradient of initial_state alone, of the segments that begin rows; XLA drops
    the rest."""
    named, rest = _of_ends(problem, operands, at=0), operands[len(problem.operand_names) :]
    gradients = backward(problem, *named.values(), *rest)
    named = dict(zip(problem.differentiable_names, gradients, strict=True))
    return (named["initial_state"],)


def _of_ends(problem, operands, at):
    """The forward operands by name, all tokens padding but those of the segments that begin rows
    (at = 0) or end them (1)."""
    named = problem.named(operands)
    if problem.has_segment_ids:
        ids = named["segment_ids"]
        mine = _segments.ends_of_rows(ids, problem.padding_segment_id)[at]
        named["segment_ids"] = jnp.where(mine, ids, -1)
    return named


class _Call:
    """The operands of one call, resolved: padded tokens, gate parameters, states, and the schedule
    over them.
    """

    def __init__(self, problem: Problem, operands, tail_slot):
        self.problem = problem
        named = problem.named(operands)
        B, self.T, _, K = named["k"].shape
        HV, V = named["v"].shape[2:]
        dtype = _compute_dtype(named["v"].dtype)
        self.empty = B * self.T * HV == 0
        ids = named.get("segment_ids")
        if not self.empty:
            self.schedule = _segments.schedule(self.T, ids, problem.padding_segment_id)
            if tail_slot:
                self.schedule = self.schedule.with_tail_slot(problem.max_segments)
        # A chunk may start at any token of a packed row, and reads CHUNK rows from there.
        self.padded_T = -(-self.T // CHUNK) * CHUNK + (0 if ids is None else CHUNK)
        self.tokens = [_pad_tail(named[name], self.padded_T) for name in _TOKEN_OPERANDS]
        self.parameters = {name: named[name] for name in ("A_log", "dt_bias") if name in named}
        self.zero_state = jnp.zeros((B, HV, K, V), dtype)
        self.initial_state = named.get("initial_state")
        if self.initial_state is None:
            self.initial_state = jnp.zeros((B, problem.max_segments, HV, K, V), dtype)

    def no_chunk_states(self):
        """Zeros for the states after whole chunks; None where there are none, or nobody asks."""
        M = self.T // CHUNK
        if not self.problem.return_chunk_states or M == 0:
            return None
        B, *state = self.zero_state.shape
        return jnp.zeros((B, M, *state), self.zero_state.dtype)

    def results(self, o, states, chunk_states):
        """The results that the problem asks for, in order."""
        if chunk_states is None:
            B, *state = self.zero_state.shape
            chunk_states = jnp.zeros((B, 0, *state), self.zero_state.dtype)
        named = dict(o=o[:, : self.T], final_state=states, chunk_states=chunk_states)
        return tuple(named[name] for name in self.problem.result_names)

    def gradients(self, d_tokens, d_parameters, d_states):
        """All gradients in operand order, without the padding."""
        unpadded = (d[:, : self.T] for d in d_tokens)
        named = dict(zip(_TOKEN_OPERANDS, unpadded, strict=True))
        named.update(d_parameters, initial_state=d_states)
        return tuple(named[name] for name in self.problem.differentiable_names)

    def enter(self, chunk, state):
        """The state a chunk starts from: its segment's initial state, or the one carried along."""
        mine = _in_range(chunk, self.initial_state)
        initial = jnp.where(_rows(mine, state), _take_state(self.initial_state, chunk.segment), 0)
        return jnp.where(_rows(chunk.first, state), initial, state)

    def leave(self, chunk, states, state):
        """Final states, with `state` stored where the chunk ends a segment that has a slot."""
        return _put_state(states, chunk.segment, chunk.last & _in_range(chunk, states), state)


def _chunk(problem: Problem, mask, tile, parameters, state):
    """One chunk: its outputs [B, C, HV, V] and the state after it [B, HV, K, V]."""
    dtype = state.dtype
    precision = lax.Precision.DEFAULT if tile[2].dtype.itemsize == 2 else lax.Precision.HIGHEST
    einsum = functools.partial(jnp.einsum, precision=precision)
    q, k, v, log_decay, beta = token_inputs(problem, mask, tile, parameters, dtype)
    A_qk, A_kk, inverses, G, remaining = _intra_chunk(q, k, log_decay, beta, einsum)

    decay = jnp.exp(G)
    residual = beta[..., None] * (v - einsum("bhck,bhkv->bhcv", k * decay, state))
    U = _solve(A_kk, inverses, residual)
    o = einsum("bhck,bhkv->bhcv", q * decay, state) + einsum("bhij,bhjv->bhiv", A_qk, U)
    state = decay[..., -1, :, None] * state + einsum("bhck,bhcv->bhkv", k * jnp.exp(remaining), U)
    return jnp.moveaxis(o, 1, 2).astype(tile[2].dtype), state


def token_inputs(problem, mask, tile, parameters, dtype):
    """Masked, normalised, gated inputs of a chunk, [B, HV, C, ..]; q scaled, q and k repeated for
    their value heads. `problem` is a `Problem` or a `StepProblem`.

    Rows outside the chunk are selected away before anything touches them, and decay nothing.
    """
    q, k, v, g, beta = (jnp.where(_rows(mask, x), x, 0).astype(dtype) for x in tile)
    if problem.qk_l2norm:
        q, k = _l2norm(q), _l2norm(k)
    log_decay = jnp.where(_rows(mask, g), _log_decay(problem, g, parameters, dtype), 0)
    if problem.beta_is_logits:
        beta = jax.nn.sigmoid(beta) * (2 if problem.allow_neg_eigval else 1)
    group = v.shape[2] // k.shape[2]
    heads_first = [jnp.moveaxis(x, 2, 1) for x in (q * problem.scale, k, v, log_decay, beta)]
    heads_first[:2] = [jnp.repeat(x, group, axis=1) for x in heads_first[:2]]
    return heads_first


def _l2norm(x):
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2NORM_EPS)


def _log_decay(problem: Problem, g, parameters, dtype):
    """The natural-log decay that `gate` makes of g, at least MIN_LOG_DECAY."""
    if problem.gate != "log_decay":
        if "dt_bias" in parameters:
            g = g + parameters["dt_bias"][:, None].astype(dtype)
        amplitude = 1
        if "A_log" in parameters:
            amplitude = jnp.exp(parameters["A_log"].astype(dtype))[:, None, :, None]
        if problem.gate == "softplus":
            g = -amplitude * jax.nn.softplus(g)
        else:
            g = problem.gate_lower_bound * jax.nn.sigmoid(amplitude * g)
    return jnp.where(
        g > MIN_LOG_DECAY, g, MIN_LOG_DECAY
    )  # a select: a clamped token has no gradient


def _intra_chunk(q, k, log_decay, beta, einsum):
    """A_qk, A_kk (with beta), inverses of the diagonal blocks of I + A_kk, and the log decay up to
    and after each token.

    Built bottom-up, blocks of m tokens merging into blocks of 2 m. The scores between the halves of
    a block meet at its middle: rows carry the decay since there, columns the decay until there, so
    every exponent is a sum of log decays and never positive, whatever the gate, and no difference
    of long sums is taken. Inverses merge along up to SUB_BLOCK, as
        [[X, 0], [C, Y]]^-1 = [[X^-1, 0], [-Y^-1 C X^-1, Y^-1]],
    which is forward substitution by blocks and stays exact for keys of any correlation.
    """
    lead, C = k.shape[:-2], k.shape[-2]
    # The log decay within the block, up to and with each token, and after it.
    until, after = log_decay, jnp.zeros_like(log_decay)
    A_qk = jnp.sum(q * k, axis=-1).reshape(*lead, C, 1, 1)
    A_kk, inverses = jnp.zeros_like(A_qk), jnp.ones_like(A_qk)
    m = 1
    while m < C:

        def halves(x, rows=m):
            return x.reshape(*lead, C // (2 * rows), 2, rows, x.shape[-1])

        q2, (k1, k2) = halves(q)[..., 1, :, :], _unstack(halves(k))
        until1, until2 = _unstack(halves(until))
        after1, after2 = _unstack(halves(after))
        since_middle = jnp.exp(until2)
        rows = jnp.concatenate([q2 * since_middle, k2 * since_middle], axis=-2)
        scores = einsum("...ik,...jk->...ij", rows, k1 * jnp.exp(after1))
        kk = halves(beta[..., None])[..., 1, :, :] * scores[..., m:, :]
        if 2 * m <= SUB_BLOCK:
            X, Y = _unstack(halves(inverses))
            # Their gradient is not taken here: `_solve` knows a better way.
            lower = -_product(Y, _product(lax.stop_gradient(kk), X))
            inverses = _lower_blocks(halves(inverses), lower)
        A_qk = _lower_blocks(halves(A_qk), scores[..., :m, :])
        A_kk = _lower_blocks(halves(A_kk), kk)
        until = jnp.stack([until1, until1[..., -1:, :] + until2], axis=-3).reshape(k.shape)
        after = jnp.stack([after1 + until2[..., -1:, :], after2], axis=-3).reshape(k.shape)
        m *= 2
    A_qk, A_kk = (x.reshape(*lead, C, C) for x in (A_qk, A_kk))
    return A_qk, A_kk, inverses, until, after


@jax.custom_vjp
def _solve(A_kk, inverses, residual):
    """U = (I + A_kk)^-1 residual, by forward substitution over blocks of SUB_BLOCK rows.

    Differentiated as the solution it is: W = (I + A_kk)^-T dU by back substitution, and then
    d_residual = W, d_A_kk = -W U^T. Neither direction forms the whole inverse, and the gradient of
    the inverse is never formed: for keys that repeat its entries are far larger than the result.
    """
    blocks = _row_blocks(residual)
    U = []
    for i, X in enumerate(_matrices(inverses)):
        rows = A_kk[..., i * SUB_BLOCK : (i + 1) * SUB_BLOCK, :]
        for j in range(i):
            blocks[i] -= _product(rows[..., j * SUB_BLOCK : (j + 1) * SUB_BLOCK], U[j])
        U.append(_product(X, blocks[i]))
    return jnp.concatenate(U, axis=-2)


def _solve_fwd(A_kk, inverses, residual):
    U = _solve(A_kk, inverses, residual)
    return U, (A_kk, inverses, U)


def _solve_bwd(saved, dU):
    A_kk, inverses, U = saved
    transposed = jnp.flip(jnp.swapaxes(A_kk, -1, -2), (-2, -1))
    # Back substitution is forward substitution with rows and columns in reverse order.
    reversed_inverses = jnp.flip(jnp.swapaxes(inverses, -1, -2), (-3, -2, -1))
    W = jnp.flip(_solve(transposed, reversed_inverses, jnp.flip(dU, -2)), -2)
    return -jnp.tril(_product(W, jnp.swapaxes(U, -1, -2)), -1), jnp.zeros_like(inverses), W


_solve.defvjp(_solve_fwd, _solve_bwd)


def _product(a, b):
    """Matrix product in fp32 (or fp64): what belongs to the solve is never rounded."""
    return jnp.einsum("...ij,...jk->...ik", a, b, precision=lax.Precision.HIGHEST)


def _row_blocks(x):
    return list(jnp.split(x, x.shape[-2] // SUB_BLOCK, axis=-2))


def _matrices(x):
    return [x[..., i, :, :] for i in range(x.shape[-3])]


def _unstack(x):
    """The two halves [.., m, D] of each block of [.., 2, m, D]."""
    return x[..., 0, :, :], x[..., 1, :, :]


def _lower_blocks(diagonal, lower):
    """[[a, 0], [lower, b]] from the diagonal blocks [.., 2, m, m] and the block below them."""
    a, b = _unstack(diagonal)
    top = jnp.concatenate([a, jnp.zeros_like(a)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([lower, b], axis=-1)], axis=-2)


def _compute_dtype(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _rows(condition, x):
    """`condition` [B] or [B, C] with trailing axes, to select whole rows of x."""
    return condition.reshape(*condition.shape, *[1] * (x.ndim - condition.ndim))


def _pad_tail(x, T):
    return (
        jnp.pad(x, [(0, 0), (0, T - x.shape[1])] + [(0, 0)] * (x.ndim - 2)) if T > x.shape[1] else x
    )


def _take(x, start):
    """CHUNK tokens of x [B, T, ..] from `start` on: one number for each row, or one for all."""
    if start.shape == (1,):
        return lax.dynamic_slice_in_dim(x, start[0], CHUNK, axis=1)
    return jax.vmap(lambda row, t: lax.dynamic_slice_in_dim(row, t, CHUNK))(x, start)


def _put(x, chunk, tile):
    """x [B, T, ..] with the chunk's tokens replaced by those of `tile`; its other rows belong to
    others.
    """
    start = chunk.start
    tile = jnp.where(_rows(chunk.mask(), tile), tile, _take(x, start))
    if start.shape == (1,):
        return lax.dynamic_update_slice_in_dim(x, tile, start[0], axis=1)
    return jax.vmap(lambda row, t, new: lax.dynamic_update_slice_in_dim(row, new, t, 0))(
        x, start, tile
    )


def _in_range(chunk, states):
    return chunk.segment < states.shape[1]


def _take_state(states, slot):
    """states[b, slot[b]]; a slot out of range is clamped, for the caller to select away."""
    if slot.shape == (1,):
        return lax.dynamic_index_in_dim(states, slot[0], axis=1, keepdims=False)
    return jax.vmap(lambda s, n: lax.dynamic_index_in_dim(s, n, keepdims=False))(states, slot)


def _put_state(states, slot, condition, state):
    """states with states[b, slot[b]] replaced where `condition` [B] holds."""
    state = jnp.where(_rows(condition, state), state, _take_state(states, slot))
    if slot.shape == (1,):
        return lax.dynamic_update_index_in_dim(states, state, slot[0], axis=1)
    return jax.vmap(lambda s, n, new: lax.dynamic_update_index_in_dim(s, new, n, 0))(
        states, slot, state
    )
