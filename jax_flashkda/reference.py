"""Kimi Delta Attention in plain JAX, to read beside the paper (Kimi Linear, arXiv 2510.26692) and
to measure against.

`recurrent` is the definition: one token at a time, in any float dtype up to float64. `chunked` is
the chunk-parallel form with the rounding a kernel on 16-bit matrix units cannot avoid: every
operand of a product rounded to `operand_dtype`, everything else fp32. Its error against the
recurrence is the unit in which this library promises accuracy.

Both take whole sequences; packed rows are a matter of calling them once per segment. Nothing here
imports the package.
"""

import functools

import jax
import jax.numpy as jnp

# exp(-110) is 0 in fp32, so a stronger decay changes nothing; it makes g = -inf a plain reset.
MIN_LOG_DECAY = -110.0
L2NORM_EPS = 1e-6
CHUNK = 64
SUB_BLOCK = 16


def log_decay(g, *, gate="log_decay", A_log=None, dt_bias=None, gate_lower_bound=-5.0):
    """Natural log of the per-channel decay, [B, T, HV, K], clamped to at least `MIN_LOG_DECAY`.

    `gate` names what `g` is: the log decay itself, or the raw gate of Kimi-Linear-48B (softplus) or
    of Kimi-K3 (bounded).
    """
    if gate != "log_decay":
        amplitude = 1.0 if A_log is None else jnp.exp(A_log.astype(g.dtype))[..., :, None]
        raw = g if dt_bias is None else g + dt_bias.astype(g.dtype)
        if gate == "softplus":
            g = -amplitude * jax.nn.softplus(raw)
        else:
            g = gate_lower_bound * jax.nn.sigmoid(amplitude * raw)
    return jnp.where(
        g > MIN_LOG_DECAY, g, MIN_LOG_DECAY
    )  # a select, so that the gradient of a clamped token is 0


def l2norm(x):
    """x / sqrt(sum x^2 + 1e-6) over the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2NORM_EPS)


def prepare(
    q, k, v, g, beta, *, dtype, gate="log_decay", A_log=None, dt_bias=None, gate_lower_bound=-5.0,
    beta_is_logits=False, allow_neg_eigval=False, qk_l2norm=False, scale=None, valid=None,
):  # fmt: skip
    """Applies the optional input transforms and repeats q and k for grouped value heads.

    Returns scaled q and k [B, HV, T, K], v [B, HV, T, V], log decay [B, HV, T, K] and beta [B, HV,
    T], all of `dtype`. A token with `valid` [B, T] False is inert: it decays nothing and writes
    nothing.
    """
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g, beta = (x.astype(dtype) for x in (q, k, v, g, beta))
    if qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    g = log_decay(g, gate=gate, A_log=A_log, dt_bias=dt_bias, gate_lower_bound=gate_lower_bound)
    if beta_is_logits:
        beta = jax.nn.sigmoid(beta) * (2 if allow_neg_eigval else 1)
    if valid is not None:
        g, beta = jnp.where(valid[..., None, None], g, 0), jnp.where(valid[..., None], beta, 0)
    group = v.shape[2] // k.shape[2]
    q, k = (jnp.repeat(x, group, axis=2) for x in (q * scale, k))
    return tuple(jnp.moveaxis(x, 2, 1) for x in (q, k, v, g, beta))


def recurrent(q, k, v, g, beta, *, initial_state=None, dtype=jnp.float32, **options):
    """The recurrence, token by token.

            S <- Diag(exp(g_t)) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   o_t = scale S^T q_t

    **Arguments**: q, k [B, T, H, K]; v [B, T, HV, V]; g [B, T, HV, K]; beta [B, T, HV];
    initial_state [B, HV, K, V] or None (zero); dtype of all arithmetic; options of `prepare`.

    **Returns** o [B, T, HV, V] and the final state [B, HV, K, V], both of `dtype`.
    """
    q, k, v, g, beta = prepare(q, k, v, g, beta, dtype=dtype, **options)
    state = _initial(initial_state, k, v, dtype)
    einsum = functools.partial(jnp.einsum, precision="highest")

    def token(state, x):
        q_t, k_t, v_t, g_t, beta_t = x
        state = jnp.exp(g_t)[..., None] * state
        v_new = beta_t[..., None] * (v_t - einsum("bhkv,bhk->bhv", state, k_t))
        state = state + k_t[..., :, None] * v_new[..., None, :]
        return state, einsum("bhkv,bhk->bhv", state, q_t)

    state, o = jax.lax.scan(token, state, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v, g, beta)))
    return jnp.moveaxis(o, 0, 1), state


def chunked(q, k, v, g, beta, *, initial_state=None, operand_dtype=jnp.float32, **options):
    """The chunk-parallel form, 64 tokens a chunk: the *peer* of this library's accuracy promise.

    Same arguments and results as `recurrent`, computed in fp32 with the operands of every product
    rounded to `operand_dtype` (bfloat16 for 16-bit inputs, float32 for none). Gradients (through
    autodiff) see the same rounded operands; cotangents stay fp32.
    """
    q, k, v, g, beta = prepare(q, k, v, g, beta, dtype=jnp.float32, **options)
    state = _initial(initial_state, k, v, jnp.float32)
    T = q.shape[2]
    # A short row is one chunk of no more sub-blocks than it needs.
    size = min(CHUNK, -(-T // SUB_BLOCK) * SUB_BLOCK) or CHUNK
    pad = -T % size
    q, k, v, g, beta = (
        jnp.pad(x, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 3)) for x in (q, k, v, g, beta)
    )
    rounded = functools.partial(_rounded, operand_dtype)
    decayed = functools.partial(_decayed, operand_dtype)
    einsum = functools.partial(jnp.einsum, precision="highest")

    def chunk(state, x):
        q, k, v, g, beta = x
        G = jnp.cumsum(g, axis=-2)
        A_qk, A_kk = _scores(q, k, g, decayed)
        A_kk_inv = _unit_lower_inverse(beta[..., None] * A_kk)
        s = rounded(state)
        residual = beta[..., None] * (v - einsum("bhck,bhkv->bhcv", decayed(k, G), s))
        U = rounded(einsum("bhij,bhjv->bhiv", rounded(A_kk_inv), rounded(residual)))
        o = einsum("bhck,bhkv->bhcv", decayed(q, G), s) + einsum(
            "bhij,bhjv->bhiv", rounded(A_qk), U
        )
        state = jnp.exp(G[..., -1, :])[..., None] * state
        return state + einsum("bhck,bhcv->bhkv", decayed(k, _sum_after(g)), U), o

    chunks = tuple(
        jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)
        for x in (q, k, v, g, beta)
    )
    state, o = jax.lax.scan(chunk, state, chunks)
    o = jnp.moveaxis(o, (0, 3), (1, 2)).reshape(o.shape[1], T + pad, *o.shape[2:3], o.shape[-1])
    return o[:, :T], state


def _initial(initial_state, k, v, dtype):
    shape = (*k.shape[:2], k.shape[-1], v.shape[-1])
    return jnp.zeros(shape, dtype) if initial_state is None else initial_state.astype(dtype)


def _sum_after(g):
    """Sum of g over the later rows of its block, G_C - G, summed from its near end: a difference
    would lose digits.
    """
    later = jnp.concatenate([g[..., 1:, :], jnp.zeros_like(g[..., :1, :])], axis=-2)
    return jnp.flip(jnp.cumsum(jnp.flip(later, -2), axis=-2), -2)


def _scores(q, k, g, decayed):
    """A_qk (i >= j, q already scaled) and A_kk (i > j, without beta), [B, HV, C, C], in sub-blocks
    of 16 rows; C is a multiple of 16.

    Blocks below the diagonal meet at the row block's start, so that every exponent is <= 0; the
    diagonal blocks take the exponent of each pair, which is right for any gate.
    """
    einsum = functools.partial(jnp.einsum, precision="highest")
    C = q.shape[2]
    M = C // SUB_BLOCK
    blocks = lambda x: x.reshape(*x.shape[:2], M, SUB_BLOCK, x.shape[-1])
    q_, k_, g_ = blocks(q), blocks(k), blocks(g)
    G = jnp.cumsum(
        g_, axis=-2
    )  # from the sub-block's own start: differences of long sums lose digits
    total = G[..., -1:, :]
    after = _sum_after(g_)
    earlier = jnp.tril(jnp.ones((SUB_BLOCK, SUB_BLOCK), bool))[..., None]
    pair = jnp.exp(
        jnp.where(earlier, G[..., :, None, :] - G[..., None, :, :], 0)
    )  # [.., M, 16, 16, K]
    rows_q, rows_k, cols_k = (decayed(x, jnp.zeros_like(x)) for x in (q_, k_, k_))
    diagonal_qk = jnp.einsum("bhmik,bhmjk,bhmijk->bhmij", rows_q, cols_k, pair, precision="highest")
    diagonal_kk = jnp.einsum("bhmik,bhmjk,bhmijk->bhmij", rows_k, cols_k, pair, precision="highest")
    row_qk, row_kk = [], []
    for i in range(M):
        rows = [decayed(x[:, :, i], G[:, :, i]) for x in (q_, k_)]
        qk, kk = [], []
        for j in range(i):
            between = after[:, :, j] + jnp.sum(total[:, :, j + 1 : i], axis=2)
            cols = decayed(k_[:, :, j], between)
            qk.append(einsum("bhik,bhjk->bhij", rows[0], cols))
            kk.append(einsum("bhik,bhjk->bhij", rows[1], cols))
        zero = jnp.zeros((*q.shape[:2], SUB_BLOCK, C - (i + 1) * SUB_BLOCK), q.dtype)
        row_qk.append(jnp.concatenate([*qk, diagonal_qk[:, :, i], zero], axis=-1))
        row_kk.append(jnp.concatenate([*kk, diagonal_kk[:, :, i], zero], axis=-1))
    return jnp.tril(jnp.concatenate(row_qk, axis=-2)), jnp.tril(
        jnp.concatenate(row_kk, axis=-2), -1
    )


def _unit_lower_inverse(A):
    """(I + A)^-1 for strictly lower A [.., C, C] by forward substitution in fp32."""
    identity = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape)
    return jax.lax.linalg.triangular_solve(
        A + identity, identity, left_side=True, lower=True, unit_diagonal=True
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(dtype, x):
    """x rounded to `dtype` and back; the gradient passes through unrounded."""
    return x.astype(dtype).astype(x.dtype)


_rounded.defvjp(lambda dtype, x: (_rounded(dtype, x), None), lambda dtype, _, ct: (ct,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decayed(dtype, x, exponent):
    """x exp(exponent), rounded to `dtype`.

    Its gradient with respect to the exponent uses the rounded product. The gate gradient is the
    difference of such terms over rows and over columns; were they rounded differently, the
    remainder would leak into all earlier tokens.
    """
    return _rounded(dtype, x * jnp.exp(exponent))


def _decayed_fwd(dtype, x, exponent):
    decay = jnp.exp(exponent)
    y = _rounded(dtype, x * decay)
    return y, (decay, y)


_decayed.defvjp(_decayed_fwd, lambda dtype, res, ct: (ct * res[0], ct * res[1]))
