"""The references agree with each other, with the paper's equations written out, and with finite
differences.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from jax.test_util import check_grads

from jax_flashkda import reference


def arguments(case):
    arrays = case.arrays()
    return [arrays.pop(name) for name in ("q", "k", "v", "g", "beta")], arrays


def _chunked(inputs, rest, **static):
    return jax.jit(functools.partial(reference.chunked, **static))(*inputs, **rest)


def test_recurrence_is_the_papers():
    """Equation by equation in numpy, in asymmetric sizes: a transposed state cannot pass."""
    case = Case(T=9, B=1, H=1, HV=2, K=5, V=3, initial_state=True)
    (q, k, v, g, beta), rest = arguments(case)
    with jax.enable_x64(True):
        o, final = reference.recurrent(q, k, v, g, beta, **rest, dtype=jnp.float64)
    q, k, v, g, beta = (np.asarray(x, np.float64)[0] for x in (q, k, v, g, beta))
    for h in range(2):
        S = np.asarray(rest["initial_state"], np.float64)[0, h]
        for t in range(9):
            S = np.diag(np.exp(g[t, h])) @ S
            S = S + beta[t, h] * np.outer(k[t, 0], v[t, h] - S.T @ k[t, 0])
            np.testing.assert_allclose(o[0, t, h], 5**-0.5 * S.T @ q[t, 0], rtol=1e-12)
        np.testing.assert_allclose(final[0, h], S, rtol=1e-12)


@pytest.mark.parametrize("gate", ["log_decay", "softplus", "bounded"])
def test_chunked_equals_recurrent(gate):
    raw = gate != "log_decay"
    case = Case(T=130, gate=gate, A_log=raw, dt_bias=raw, initial_state=True, qk_l2norm=True)
    inputs, rest = arguments(case)
    options = dict(rest, gate=gate, qk_l2norm=True)
    with jax.enable_x64(True):
        o, state = reference.recurrent(*inputs, **options, dtype=jnp.float64)
    o_chunked, state_chunked = _chunked(inputs, rest, gate=gate, qk_l2norm=True)
    np.testing.assert_allclose(o_chunked, o, atol=2e-6 * np.abs(o).max())
    np.testing.assert_allclose(state_chunked, state, atol=2e-6 * np.abs(state).max())


def test_chunked_gradients_equal_recurrent():
    """The rounding points have gradient rules of their own: without rounding they must not show."""
    case = Case(T=70, B=1, H=1, HV=2, K=8, V=4, initial_state=True)
    inputs, rest = arguments(case)

    def loss(fn):
        def scalar(inputs, rest):
            o, state = fn(*inputs, **rest)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(state))

        return jax.jit(jax.grad(scalar, argnums=(0, 1)))

    expected = loss(reference.recurrent)(inputs, rest)
    for a, b in zip(
        jax.tree.leaves(loss(reference.chunked)(inputs, rest)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_gradients_equal_finite_differences():
    case = Case(
        T=5, B=1, H=1, HV=2, K=3, V=2, initial_state=True, A_log=True, dt_bias=True, gate="softplus"
    )
    inputs, rest = arguments(case)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (inputs, rest))

        def attend(inputs, rest):
            options = dict(gate="softplus", qk_l2norm=True, beta_is_logits=True)
            return reference.recurrent(*inputs, **rest, **options, dtype=jnp.float64)

        check_grads(attend, wide, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_rounding_points_round():
    """The peer must be as inexact as 16-bit operands are, or it would promise what no kernel can
    keep.
    """
    case = Case(T=130, dtype="bfloat16")
    inputs, _ = arguments(case)
    exact, _ = _chunked(inputs, {})
    rounded, _ = _chunked(inputs, {}, operand_dtype=jnp.bfloat16)
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert 5e-4 < error < 1e-2


def test_identical_keys_have_a_closed_form():
    """beta = 1, no decay, unit keys all alike: each token replaces what the state holds for that
    key.
    """
    T, K, V = 100, 4, 3
    rng = np.random.default_rng(0)
    k = np.zeros((1, T, 1, K), np.float32)
    k[..., 1] = 1
    v = rng.standard_normal((1, T, 1, V)).astype(np.float32)
    for fn in (reference.recurrent, reference.chunked):
        gate, beta = jnp.zeros((1, T, 1, K)), jnp.ones((1, T, 1))
        o, state = jax.jit(functools.partial(fn, scale=1.0))(k, k, v, gate, beta)
        # A chunk adds up to 64 replaced values of size 3 and takes them off again, in fp32.
        np.testing.assert_allclose(o, v, atol=1e-5)
        np.testing.assert_allclose(state[0, 0, 1], v[0, -1, 0], atol=1e-5)
