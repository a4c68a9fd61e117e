"""Short causal depthwise convolution that respects segment boundaries.

    y[b, t, c] = silu(bias[c] + sum_w kernel[w, c] * x[b, t - (W - 1) + w, c])

where a tap counts only if every token from it up to t belongs to t's segment. A segment is what it
is for `kimi_delta_attention`: a maximal run of equal ids; ids below zero or equal to
`padding_segment_id` are padding.

CUDA kernels for W = 4 on NVIDIA GPUs, the same program on XLA elsewhere (`_short_conv_xla.py`).
"""

import functools
import math

import jax
import jax.numpy as jnp

from . import _context, _primitives, _short_conv_xla, _vjp
from ._problem import ShortConvProblem, ShortConvStepProblem
from ._segments import extents
from ._validation import IMPLEMENTATIONS, strong

__all__ = ["short_conv", "short_conv_state", "short_conv_step"]


def short_conv(
    x,
    kernel,
    bias=None,
    *,
    activation="silu",
    segment_ids=None,
    padding_segment_id=0,
    initial_state=None,
    implementation=None,
    context_axis=None,
):
    """Causal depthwise convolution along T, inside segments, followed by SiLU.

    **Arguments**

    - `x`: [B, T, ...channels], floating.
    - `kernel`: [W, ...channels]. `kernel[W - 1]` multiplies the current token, `kernel[0]` the
      oldest one, as in `torch.nn.Conv1d` (`kernel = conv.weight[:, 0, :].T` there).
    - `bias`: [...channels] or None.
    - `activation`: "silu" or None (static).
    - `segment_ids`: integer [B, T] or None (each row is one segment).
    - `padding_segment_id`: the id of padding besides all negative ids, or None (static).
    - `initial_state`: the W - 1 inputs before each segment, oldest first, floating: [B, W - 1,
      ...channels], or [B, N, W - 1, ...channels] with `segment_ids`, for the first N segments of a
      row. Zero by default.
    - `implementation`: "cuda" (the kernels, or an error that says why not), "xla", or None: the
      kernels on an NVIDIA GPU that they support, XLA elsewhere. Chosen when the program is lowered
      for a platform. The kernels take W = 4, bfloat16 or float32 x, and channels that are a
      multiple of 8 altogether.
    - `context_axis`: the mesh axis that T is split over, as in `kimi_delta_attention`; without
      `initial_state`. Each device gets the W - 1 tokens before its own from its neighbour.

    **Returns** an array like `x`, zero at padding.

    **Raises** ValueError while tracing. NotImplementedError where `implementation="cuda"` cannot
    run the call. Forward mode and second derivatives raise, but for `implementation="xla"`.

    **Numerics** Products and sums are at least fp32, rounded once to `x.dtype`. The backward pass
    needs only the arguments; everything else is recomputed.

    **Determinism** Bitwise, gradients too. Devices: batch and the first channel axis are split with
    no collective; T is gathered.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    bias = None if bias is None else jnp.asarray(bias)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    _check(x, kernel, bias, activation, segment_ids, initial_state, implementation, context_axis)
    if context_axis is not None:
        return _on_shards(
            x,
            kernel,
            bias,
            segment_ids,
            context_axis,
            activation=activation,
            padding_segment_id=padding_segment_id,
            implementation=implementation,
        )
    if initial_state is not None and segment_ids is None:
        initial_state = initial_state[:, None]
    arrays = (x, kernel, bias, segment_ids, initial_state)
    options = dict(silu=activation == "silu", padding_segment_id=padding_segment_id)
    if implementation != "xla":
        return _by_platform(*arrays, **options, implementation=implementation)
    # Without the barriers of prevent_cse, which cost CPUs several times the convolution. Scanned
    # layers, where saved memory matters most, recompute all the same: there nothing can be shared.
    convolve = functools.partial(_short_conv_xla.convolve, **options)
    return jax.checkpoint(convolve, prevent_cse=False)(*arrays)


def _on_shards(x, kernel, bias, segment_ids, axis, **options):
    """`short_conv` of the shards of rows that `axis` splits."""
    channels = tuple(f"C{i}" for i in range(x.ndim - 2))
    letters = dict(x=("B", "T", *channels), kernel=("W", *channels), bias=channels, ids=("B", "T"))
    operands = dict(x=x, kernel=kernel, bias=bias, ids=segment_ids)
    operands = {name: operand for name, operand in operands.items() if operand is not None}

    def convolve(*shards):
        # A token has W - 1 more before it, zeros or padding where its row begins.
        named = dict(zip(operands, shards, strict=True))
        size = kernel.shape[0] - 1
        named["x"] = _context.extended(named["x"], size, axis)
        if segment_ids is not None:
            named["ids"] = _context.extended(named["ids"], size, axis, before_all=-1)
        y = short_conv(
            named["x"],
            named["kernel"],
            named.get("bias"),
            segment_ids=named.get("ids"),
            **options,
        )
        return y[:, size:] if y.shape[1] > 0 else y

    return _context.on_shards(
        "short_conv",
        axis,
        convolve,
        tuple(operands.values()),
        [letters[name] for name in operands],
        letters["x"],
        _context.split_alike(x, letters["x"]),
    )


def short_conv_state(x, width, *, segment_ids=None, padding_segment_id=0, max_segments=None):
    """The last W - 1 inputs of every segment: what `short_conv` and `short_conv_step` go on from.

    **Arguments**

    - `x`: [B, T, ...channels], the convolution's input.
    - `width`: W (static).
    - `segment_ids`, `padding_segment_id`: as in `short_conv`.
    - `max_segments`: N, how many segments of a row to look at (static); needed with `segment_ids`.

    **Returns** [B, W - 1, ...channels], or [B, N, W - 1, ...channels] with `segment_ids`: oldest
    first, zero before the start of a segment and where a row has fewer than N.
    """
    B, T = x.shape[:2]
    if segment_ids is None:
        return jnp.pad(x, ((0, 0), (width - 1, 0)) + ((0, 0),) * (x.ndim - 2))[:, T:]
    start, length = extents(segment_ids, padding_segment_id, max_segments)
    token = (start + length)[..., None] - (width - 1) + jnp.arange(width - 1)
    if T == 0:
        return jnp.zeros((*token.shape[:3], *x.shape[2:]), x.dtype)
    taken = x[jnp.arange(B)[:, None, None], jnp.clip(token, 0, T - 1)]
    inside = (length[..., None] > 0) & (token >= start[..., None])
    return jnp.where(inside.reshape(*inside.shape, *[1] * (x.ndim - 2)), taken, 0)


def short_conv_step(
    x,
    kernel,
    state,
    bias=None,
    *,
    activation="silu",
    state_indices=None,
    implementation=None,
):
    """`short_conv` of the next tokens of N sequences, and the inputs to go on from.

    **Arguments**

    - `x`: [N, T, ...channels], floating: the next T tokens of each sequence.
    - `kernel`, `bias`, `activation`: as in `short_conv`.
    - `state`: [N, W - 1, ...channels], floating: the inputs before x, oldest first. Or, with
      `state_indices`, a pool of them [slots, W - 1, ...channels].
    - `state_indices`: int32 [N], the slot of each sequence. One whose index is negative or past
      the pool reads and writes nothing, and its output is zero.
    - `implementation`: as in `short_conv`. The kernel takes W = 4, 1 to 8 tokens, and bfloat16,
      float16 or float32 each for x, kernel and state; donate `state` to `jax.jit` and it is updated
      in place.

    **Returns** (y, state): y like `x`; state like `state`, rounded to its type. Slots that no index
    names keep their bits; if two sequences name one slot, it and both outputs are undefined.

    **Raises** as `short_conv`. It has no derivative, but for `implementation="xla"`.
    """
    x, kernel, state = jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(state)
    bias = None if bias is None else jnp.asarray(bias)
    _check_step(x, kernel, state, bias, activation, state_indices, implementation)
    silu = activation == "silu"
    if implementation == "xla":
        return _short_conv_xla.convolve_step(x, kernel, state, bias, state_indices, silu=silu)
    operands = dict(x=_in_heads(x, 2), kernel=_in_heads(kernel, 1)[None])
    if bias is not None:
        operands["bias"] = _in_heads(bias, 0)[None]
        if bias.dtype != kernel.dtype:
            for name in ("kernel", "bias"):
                operands[name] = operands[name].astype(_compute_dtype(x))
    operands["state"] = _in_heads(state, 2)
    if state_indices is not None:
        operands["state_indices"] = _as_slots(jnp.asarray(state_indices), state.shape[0])
    problem = ShortConvStepProblem(
        silu=silu,
        implementation=implementation,
        has_bias=bias is not None,
        has_state_indices=state_indices is not None,
    )
    operands = [strong(operands[name]) for name in problem.operand_names]
    y, after = _primitives.step(problem, *_primitives.vary_alike(operands))
    return y.reshape(x.shape), after.reshape(state.shape)


def _by_platform(
    x, kernel, bias, segment_ids, initial_state, *, silu, padding_segment_id, implementation
):
    """`short_conv` as the primitive whose lowering rules choose."""
    x, dtype = strong(x), _compute_dtype(x)
    operands = dict(x=_in_heads(x, 2))
    # A row of the parameters for every row of x: the sum over rows of their gradients is not the
    # primitive's, so that vmap is a larger batch and a batch that is split needs no collective.
    for name, parameter, before in (("kernel", kernel, 1), ("bias", bias, 0)):
        if parameter is not None:
            parameter = _in_heads(strong(parameter).astype(dtype), before)
            operands[name] = _primitives.over_rows(parameter, operands["x"])
    if initial_state is not None:
        operands["initial_state"] = _in_heads(strong(initial_state).astype(dtype), 3)
    if segment_ids is not None:
        operands["segment_ids"] = segment_ids
    problem = ShortConvProblem(
        silu=silu,
        padding_segment_id=padding_segment_id,
        implementation=implementation,
        has_bias=bias is not None,
        has_initial_state=initial_state is not None,
        has_segment_ids=segment_ids is not None,
        max_segments=1 if initial_state is None else initial_state.shape[1],
    )
    (y,) = _vjp.attend(problem, *(operands[name] for name in problem.operand_names))
    return y.reshape(x.shape)


def _compute_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _in_heads(array, axes_before):
    """The channels behind `axes_before` axes as two: the first, and all others."""
    *before, heads = array.shape[: axes_before + 1]
    return array.reshape(*before, heads, math.prod(array.shape[axes_before + 1 :]))


def _as_slots(indices, slots):
    """int32 [N], -1 for what is none of the slots."""
    if indices.dtype == jnp.int32:
        return indices
    return jnp.where((indices >= 0) & (indices < slots), indices, -1).astype(jnp.int32)


def _check(x, kernel, bias, activation, segment_ids, initial_state, implementation, context_axis):
    problems = _problems(x, kernel, bias, activation, implementation)
    if initial_state is not None and context_axis is not None:
        problems.append(
            f"context_axis={context_axis!r} is not for rows with an initial_state; leave one out"
        )
    if segment_ids is not None:
        if segment_ids.shape != x.shape[:2]:
            problems.append(f"segment_ids must be [B, T] = {x.shape[:2]}, got {segment_ids.shape}")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            problems.append(f"segment_ids must be integers, got {segment_ids.dtype}")
    if initial_state is not None:
        rows = (x.shape[0], *(initial_state.shape[1:2] if segment_ids is not None else ()))
        wanted = (*rows, kernel.shape[0] - 1, *x.shape[2:])
        if initial_state.shape != wanted or 0 in wanted[1 : len(rows) + 1]:
            letters = "[B, N, W - 1, ...channels]" if segment_ids is not None else "[B, W - 1, ..]"
            problems.append(
                f"initial_state must be {letters} = {wanted} with W and N at least 2 and 1,"
                f" got {initial_state.shape}"
            )
    if problems:
        raise ValueError("short_conv: " + "; ".join(problems))


def _check_step(x, kernel, state, bias, activation, state_indices, implementation):
    problems = _problems(x, kernel, bias, activation, implementation)
    history = (max(kernel.shape[0] - 1, 0), *x.shape[2:])
    rows = x.shape[:1] if state_indices is None else state.shape[:1]
    if state.shape != (*rows, *history) or 0 in (*rows, *history)[1:2]:
        letters = "[N" if state_indices is None else "[slots"
        problems.append(
            f"state must be {letters}, W - 1, ...channels] = {(*rows, *history)} with W at least 2,"
            f" got {state.shape}"
        )
    if not jnp.issubdtype(state.dtype, jnp.floating):
        problems.append(f"state must be a floating-point array, got {state.dtype}")
    if state_indices is not None and (
        state_indices.shape != x.shape[:1] or not jnp.issubdtype(state_indices.dtype, jnp.integer)
    ):
        problems.append(
            f"state_indices must be integers [N] = {x.shape[:1]}, got {state_indices.dtype} "
            f"{state_indices.shape}"
        )
    if problems:
        raise ValueError("short_conv_step: " + "; ".join(problems))


def _problems(x, kernel, bias, activation, implementation):
    problems = []
    if x.ndim < 3:
        problems.append(
            f"x must be [B, T, ...channels] with at least one channel axis, got {x.shape}"
        )
    if kernel.ndim < 2 or kernel.shape[0] < 1 or kernel.shape[1:] != x.shape[2:]:
        problems.append(
            f"kernel must be [W, ...channels] with W >= 1 and the channels of x {x.shape[2:]},"
            f" got {kernel.shape}"
        )
    if bias is not None and bias.shape != x.shape[2:]:
        problems.append(f"bias must have the channels of x {x.shape[2:]}, got {bias.shape}")
    for name, value in (("x", x), ("kernel", kernel), ("bias", bias)):
        if value is not None and not jnp.issubdtype(value.dtype, jnp.floating):
            problems.append(f"{name} must be a floating-point array, got {value.dtype}")
    if activation not in ("silu", None):
        problems.append(f"activation must be 'silu' or None, got {activation!r}")
    if implementation not in IMPLEMENTATIONS:
        problems.append(f"implementation must be 'cuda', 'xla' or None, got {implementation!r}")
    return problems
