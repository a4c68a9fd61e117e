"""The public op: its signature, its validation, its documentation."""

from typing import Any, Literal

import jax
import numpy as np

from . import _context, _primitives, _support, _vjp
from ._problem import Problem
from ._validation import (
    Errors,
    check_are_arrays,
    check_dtypes,
    check_options,
    check_shapes,
    check_sizes,
    is_int,
    strong,
)


def kimi_delta_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    gate: Literal["log_decay", "softplus", "bounded"] = "log_decay",
    A_log: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    gate_lower_bound: float = -5.0,
    beta_is_logits: bool = False,
    allow_neg_eigval: bool = False,
    qk_l2norm: bool = False,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    padding_segment_id: int | None = 0,
    max_segments: int | None = None,
    return_final_state: bool = False,
    return_chunk_states: bool = False,
    context_axis: str | None = None,
    residual_name: str | None = None,
    implementation: Literal["cuda", "xla"] | None = None,
):
    """Kimi Delta Attention: linear attention with a delta rule and a decay per channel.

    Per sequence and value head, with a state S [K, V] in fp32 and t = 1..T:

        S <- Diag(exp(g_t)) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   o_t = scale S^T q_t

    (Kimi Linear, arXiv 2510.26692, section 3.) Reverse-mode differentiable in every array argument,
    including the cotangent of the final state. Value head h reads query/key head h // (HV // H).

    **Arguments**

    - `q`, `k`: [B, T, H, K]; bfloat16, float16, float32 or (on XLA) float64, one dtype with `v`.
    - `v`: [B, T, HV, V], HV a multiple of H.
    - `g`: [B, T, HV, K], any float dtype. The natural-log decay (<= 0), or the raw gate; see
      `gate`.
    - `beta`: [B, T, HV], any float dtype. Write strength in [0, 1] (up to 2), or its logits.
    - `gate`: what `g` is. "log_decay": used as it is. "softplus" (Kimi-Linear-48B):
      g <- -exp(A_log) softplus(g + dt_bias). "bounded" (Kimi-K3, GLM-5.3-Flash):
      g <- gate_lower_bound sigmoid(exp(A_log) (g + dt_bias)).
    - `A_log`: [HV] float32; required by "softplus", optional for "bounded" (absent: unit
      amplitude).
    - `dt_bias`: [HV, K] float32; optional for the raw gates (absent: zero).
    - `gate_lower_bound`: nats per token, in [-5, 0); read by "bounded" alone.
    - `beta_is_logits`: beta <- sigmoid(beta), or 2 sigmoid(beta) with `allow_neg_eigval`.
    - `qk_l2norm`: q, k <- x / sqrt(sum x^2 + 1e-6).
    - `scale`: a static number; K**-0.5 by default.
    - `initial_state`: [B, HV, K, V], or [B, N, HV, K, V] with `segment_ids`; float32 (float64 with
      float64). Zero by default.
    - `segment_ids`: [B, T] int32 for packed rows. A segment is a maximal run of equal ids; states
      and gradients never cross its borders. Tokens with a negative id or `padding_segment_id` are
      padding: zero output, no gradient.
    - `padding_segment_id`: the id that marks padding; None makes 0 an ordinary id.
    - `max_segments`: N, how many segment states a row carries (default: that of `initial_state`).
      The n-th segment of a row has slot n; segments beyond N start from zero and their states are
      dropped. Without states a hint alone: how many segments to expect.
    - `return_final_state`: also return the state after the last token of each segment.
    - `return_chunk_states`: also return the state after every 64 tokens of each segment (for prefix
      caches). Its gradient runs on XLA.
    - `context_axis`: the mesh axis along which T is split (context parallelism): inside `shard_map`
      over it the arguments are one shard, elsewhere whole rows. Excludes `return_chunk_states`.
    - `residual_name`: names what the backward needs, and the output, for `jax.checkpoint` policies:
      `save_only_these_names(residual_name)` then recomputes nothing of the op.
    - `implementation`: "cuda" (the kernels, or an error that says why not), "xla", or None: the
      kernels on an NVIDIA GPU that they support, XLA elsewhere. Chosen when the program is lowered
      for a platform.

    **Returns** o [B, T, HV, V] in v's dtype, or a tuple of o and what was asked for. final_state is
    shaped like `initial_state`; slots past a row's last segment return their initial state (or
    zero). chunk_states is [B, T // 64, HV, K, V]: in a segment that begins at token s, the state
    after its first 64 m tokens is entry (s + 64 m) // 64 - 1, so without segments entry i is the
    state after 64 (i + 1) tokens; entries that are no such state are zero. A call with one of them
    as `initial_state` and the tokens after it continues the sequence.

    **Raises** ValueError or TypeError while tracing, listing every mismatch of the call.
    NotImplementedError where `implementation="cuda"` cannot run the call. Forward mode and second
    derivatives raise.

    **Numerics** State and accumulation are fp32; (I + A_kk)^-1 is exact substitution, so repeated
    and correlated keys are safe, as is a gate of -inf (a reset). Log decays below -110 count as
    -110, which is 0 in fp32, and get no gradient. A positive log decay is not refused; its accuracy
    is not promised.

    **Determinism** Bitwise, forward and backward. A segment's results are bitwise those it has
    alone.
    """
    problem, operands = _resolve(
        q,
        k,
        v,
        g,
        beta,
        gate=gate,
        A_log=A_log,
        dt_bias=dt_bias,
        gate_lower_bound=gate_lower_bound,
        beta_is_logits=beta_is_logits,
        allow_neg_eigval=allow_neg_eigval,
        qk_l2norm=qk_l2norm,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        padding_segment_id=padding_segment_id,
        max_segments=max_segments,
        return_final_state=return_final_state,
        return_chunk_states=return_chunk_states,
        context_axis=context_axis,
        residual_name=residual_name,
        implementation=implementation,
    )
    named = {name: strong(x) for name, x in operands.items()}
    # One row of gate parameters per batch row: their gradients then leave the op unsummed, and the
    # sum over rows, with whatever collective it takes, is the transpose of this broadcast.
    for name in ("A_log", "dt_bias"):
        if name in named:
            named[name] = _primitives.over_rows(named[name], named["q"])
    if initial_state is not None and segment_ids is None:
        named["initial_state"] = named["initial_state"][:, None]
    attend = _vjp.attend if context_axis is None else _context.attend
    results = attend(problem, *(named[name] for name in problem.operand_names))
    if len(results) == 1:
        return results[0]
    if return_final_state and segment_ids is None:
        results = (results[0], results[1][:, 0], *results[2:])
    return tuple(results)


def supported(q, k, v, g, beta, *, compute_capability: str | None = None, **options) -> str | None:
    """None if `implementation="cuda"` can run this call, or the reasons why it cannot.

    **Arguments**: those of `kimi_delta_attention` (arrays or `jax.ShapeDtypeStruct`), and
    `compute_capability`, such as "9.0"; by default that of all local CUDA devices, or with none the
    architectures the kernels were built for.

    **Raises** ValueError or TypeError for a call that no implementation accepts.
    """
    problem, operands = _resolve(q, k, v, g, beta, **options)
    shapes = {name: x.shape for name, x in operands.items()}
    for name in {"A_log", "dt_bias"} & shapes.keys():  # a row for each batch row, as in the op
        shapes[name] = (k.shape[0], *shapes[name])
    if "initial_state" in shapes and "segment_ids" not in shapes:
        B, *state = shapes["initial_state"]
        shapes["initial_state"] = (B, 1, *state)
    avals = [
        jax.ShapeDtypeStruct(shapes[name], operands[name].dtype) for name in problem.operand_names
    ]
    return "; ".join(_support.unsupported_reasons(problem, avals, compute_capability)) or None


def _resolve(
    q,
    k,
    v,
    g,
    beta,
    *,
    A_log=None,
    dt_bias=None,
    initial_state=None,
    segment_ids=None,
    padding_segment_id=0,
    max_segments=None,
    return_final_state=False,
    return_chunk_states=False,
    context_axis=None,
    residual_name=None,
    **options,
) -> tuple[Problem, dict[str, Any]]:
    """The call's Problem and its present array arguments by name, after checking all of it."""
    arrays = dict(q=q, k=k, v=v, g=g, beta=beta)
    optional = dict(
        A_log=A_log, dt_bias=dt_bias, initial_state=initial_state, segment_ids=segment_ids
    )
    arrays.update({name: x for name, x in optional.items() if x is not None})
    check_are_arrays("kimi_delta_attention", arrays)
    errors = Errors("kimi_delta_attention")
    common = check_options(errors, k, A_log=A_log, dt_bias=dt_bias, **options)
    errors.check_flag("return_final_state", return_final_state)
    errors.check_flag("return_chunk_states", return_chunk_states)
    if errors.check_type(
        context_axis is None or isinstance(context_axis, str),
        f"context_axis: got {context_axis!r}; the name of a mesh axis or None is accepted",
    ):
        errors.check(
            context_axis is None or not return_chunk_states,
            f"return_chunk_states: got True with context_axis={context_axis!r}, where a segment "
            "does not begin in the shard that it is counted in; leave one of them out",
        )
    errors.check_type(
        residual_name is None or isinstance(residual_name, str),
        f"residual_name: got {residual_name!r}; a string or None is accepted",
    )
    if errors.check_type(
        padding_segment_id is None or is_int(padding_segment_id),
        f"padding_segment_id: got {padding_segment_id!r}; an int or None is accepted",
    ):
        errors.check(
            padding_segment_id is None or -(2**31) <= padding_segment_id < 2**31,
            f"padding_segment_id: got {padding_segment_id}; an int32 value is accepted",
        )
    _check_dtypes(errors, arrays)
    N = _check_shapes(errors, arrays, max_segments, return_final_state)
    errors.raise_if_any()
    problem = Problem(
        **common,
        padding_segment_id=None if padding_segment_id is None else int(padding_segment_id),
        max_segments=N,
        return_final_state=bool(return_final_state),
        return_chunk_states=bool(return_chunk_states),
        context_axis=context_axis,
        residual_name=residual_name,
        has_initial_state=initial_state is not None,
        has_segment_ids=segment_ids is not None,
    )
    return problem, arrays


def _check_dtypes(errors, arrays):
    state = "float64" if np.dtype(arrays["v"].dtype) == np.float64 else "float32"
    check_dtypes(errors, arrays, initial_state=(state,), segment_ids=("int32",))


def _check_shapes(errors, arrays, max_segments, return_final_state) -> int:
    """Checks all shapes against those of k and v; returns N, the state slots of a row."""
    packed = "segment_ids" in arrays
    given = max_segments is not None
    if given and errors.check_type(
        is_int(max_segments), f"max_segments: got {max_segments!r}; an int is accepted"
    ):
        errors.check(max_segments >= 1, f"max_segments: got {max_segments}; at least 1 is accepted")
        errors.check(
            packed,
            "max_segments: got a value without segment_ids; leave it out, a row is one segment",
        )
    errors.check(
        given or not (packed and return_final_state) or "initial_state" in arrays,
        "return_final_state: got True with segment_ids, but neither max_segments nor initial_state "
        "says how many segment states a row carries; pass max_segments",
    )
    sizes = check_sizes(errors, arrays, "B")
    if sizes is None:
        return 1
    B, T, H, K, HV, V = sizes
    state = arrays.get("initial_state")
    N = max_segments if given else 1
    if packed and state is not None and state.ndim == 5:
        errors.check(
            not given or state.shape[1] == max_segments,
            f"max_segments: got {max_segments}, but initial_state has {state.shape[1]} slots a "
            "row; leave it out or agree",
        )
        errors.check(
            state.shape[1] >= 1, "initial_state: got no slots, N = 0; N at least 1 is accepted"
        )
        N = state.shape[1]
    shapes = dict(
        initial_state=("B, N, HV, K, V", (B, N, HV, K, V), " with segment_ids")
        if packed
        else ("B, HV, K, V", (B, HV, K, V)),
        segment_ids=("B, T", (B, T)),
    )
    check_shapes(errors, arrays, "B", sizes, shapes)
    return N
