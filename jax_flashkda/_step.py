"""The decode step: a few tokens of many sequences, their states updated in place."""

from typing import Any, Literal

import jax
import numpy as np

from . import _primitives, _support
from ._problem import StepProblem
from ._support import MOST_STEP_TOKENS
from ._validation import (
    Errors,
    check_are_arrays,
    check_dtypes,
    check_options,
    check_shapes,
    check_sizes,
    strong,
)

_NAME = "kimi_delta_attention_step"


def kimi_delta_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    state_indices: jax.Array | None = None,
    gate: Literal["log_decay", "softplus", "bounded"] = "log_decay",
    A_log: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    gate_lower_bound: float = -5.0,
    beta_is_logits: bool = False,
    allow_neg_eigval: bool = False,
    qk_l2norm: bool = False,
    scale: float | None = None,
    return_token_states: bool = False,
    implementation: Literal["cuda", "xla"] | None = None,
):
    """Decode with Kimi Delta Attention: 1 to 8 tokens of N sequences, token by token.

        S <- Diag(exp(g_t)) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   o_t = scale S^T q_t

    (Kimi Linear, arXiv 2510.26692, section 3.) It continues what `kimi_delta_attention` with
    `return_final_state=True` left. Donate `state` to `jax.jit` and it is updated in place.

    **Arguments**

    - `q`, `k`: [N, T, H, K], 1 <= T <= 8; bfloat16, float16, float32 or (on XLA) float64, one
      dtype with `v`.
    - `v`: [N, T, HV, V], HV a multiple of H.
    - `g`: [N, T, HV, K], any float dtype: the natural-log decay or the raw gate, see `gate`.
    - `beta`: [N, T, HV], any float dtype: write strength, or its logits.
    - `state`: float32 or bfloat16 (float64 with float64). [N, HV, K, V], or with `state_indices`
      a pool of states [slots, HV, K, V].
    - `state_indices`: int32 [N], the slot of each sequence. A sequence whose index is negative or
      past the pool reads and writes nothing, and its outputs are zero. Slots that no index names
      keep their bits. Two sequences must not name one slot: nothing else is touched if they do,
      but which of them writes the slot is undefined, and so are the outputs of both.
    - `gate`, `A_log` ([HV] float32), `dt_bias` ([HV, K] float32), `gate_lower_bound` (nats per
      token), `beta_is_logits`, `allow_neg_eigval`, `qk_l2norm`, `scale` (default K**-0.5): as in
      `kimi_delta_attention`.
    - `return_token_states`: also return the state after each token, for a verifier of speculated
      tokens, which goes on from the last one it accepts.
    - `implementation`: "cuda" (the kernel, or an error that says why not), "xla", or None: the
      kernel on an NVIDIA GPU that it supports, XLA elsewhere.

    **Returns** (o, state) or (o, state, token_states): o [N, T, HV, V] in v's dtype, state like
    `state` after the last token, token_states [N, T, HV, K, V] in the state's dtype.

    **Raises** ValueError or TypeError while tracing, listing every mismatch of the call.
    NotImplementedError where `implementation="cuda"` cannot run the call, and for derivatives.

    **Numerics** All arithmetic is fp32 (float64 with float64); o and states are rounded once, so
    that a bfloat16 state is rounded after each call, not after each token of it.

    **Determinism** Bitwise. On the CUDA kernel a sequence's results do not depend on the batch.
    """
    problem, operands = _resolve(
        q,
        k,
        v,
        g,
        beta,
        state,
        state_indices=state_indices,
        gate=gate,
        A_log=A_log,
        dt_bias=dt_bias,
        gate_lower_bound=gate_lower_bound,
        beta_is_logits=beta_is_logits,
        allow_neg_eigval=allow_neg_eigval,
        qk_l2norm=qk_l2norm,
        scale=scale,
        return_token_states=return_token_states,
        implementation=implementation,
    )
    named = {name: strong(x) for name, x in operands.items()}
    for name in ("A_log", "dt_bias"):
        if name in named:
            named[name] = named[name][None]
    operands = _primitives.vary_alike([named[name] for name in problem.operand_names])
    return _primitives.step(problem, *operands)


def step_supported(
    q, k, v, g, beta, state, *, compute_capability: str | None = None, **options
) -> str | None:
    """None if `implementation="cuda"` can run this step, or the reasons why it cannot.

    **Arguments**: those of `kimi_delta_attention_step` (arrays or `jax.ShapeDtypeStruct`), and
    `compute_capability`, such as "9.0"; by default that of all local CUDA devices, or with none the
    architectures the kernels were built for.

    **Raises** ValueError or TypeError for a call that no implementation accepts.
    """
    problem, operands = _resolve(q, k, v, g, beta, state, **options)
    avals = []
    for name in problem.operand_names:
        rows = (1,) if name in ("A_log", "dt_bias") else ()
        avals.append(jax.ShapeDtypeStruct(rows + operands[name].shape, operands[name].dtype))
    return "; ".join(_support.unsupported_reasons(problem, avals, compute_capability)) or None


def _resolve(
    q,
    k,
    v,
    g,
    beta,
    state,
    *,
    state_indices=None,
    A_log=None,
    dt_bias=None,
    return_token_states=False,
    **options,
) -> tuple[StepProblem, dict[str, Any]]:
    """The call's StepProblem and its present arrays by name, after checking all of it."""
    arrays = dict(q=q, k=k, v=v, g=g, beta=beta, state=state)
    optional = dict(A_log=A_log, dt_bias=dt_bias, state_indices=state_indices)
    arrays.update({name: x for name, x in optional.items() if x is not None})
    check_are_arrays(_NAME, arrays)
    errors = Errors(_NAME)
    common = check_options(errors, k, A_log=A_log, dt_bias=dt_bias, **options)
    errors.check_flag("return_token_states", return_token_states)
    _check_dtypes(errors, arrays)
    _check_shapes(errors, arrays)
    errors.raise_if_any()
    problem = StepProblem(
        **common,
        return_token_states=bool(return_token_states),
        has_state_indices=state_indices is not None,
    )
    return problem, arrays


def _check_dtypes(errors, arrays):
    double = np.dtype(arrays["v"].dtype) == np.float64
    state = ("float64",) if double else ("float32", "bfloat16")
    check_dtypes(errors, arrays, state=state, state_indices=("int32",))


def _check_shapes(errors, arrays):
    """Checks all shapes against those of k and v."""
    sizes = check_sizes(errors, arrays, "N")
    if sizes is None:
        return
    N, T, H, K, HV, V = sizes
    errors.check(
        1 <= T <= MOST_STEP_TOKENS,
        f"k: got {T} tokens; 1 to {MOST_STEP_TOKENS} are accepted, and kimi_delta_attention takes "
        "more",
    )
    shapes = dict(state_indices=("N", (N,)))
    if "state_indices" not in arrays:
        shapes["state"] = ("N, HV, K, V", (N, HV, K, V))
    else:
        shape = tuple(arrays["state"].shape)
        errors.check(
            shape[1:] == (HV, K, V) and len(shape) == 4 and shape[0] >= 1,
            f"state: got shape {shape}; (slots, {HV}, {K}, {V}) = [slots, HV, K, V] with at "
            "least one slot is accepted with state_indices",
        )
    check_shapes(errors, arrays, "N", sizes, shapes)
