"""Short causal depthwise convolution that respects segment boundaries.

    y[b, t, c] = silu(bias[c] + sum_w kernel[w, c] * x[b, t - (W - 1) + w, c])

where a tap counts only if every token from it up to t belongs to t's segment. A segment is what it
is for `kimi_delta_attention`: a maximal run of equal ids; ids below zero or equal to
`padding_segment_id` are padding.

It is written as W shifted multiply-adds rather than as a grouped convolution: XLA fuses these into
one pass over x on every backend, while its depthwise convolutions are slow on CPUs and cannot mask
taps. Taps are dropped by selection, never by multiplying with zero, so a NaN on the other side of
a boundary changes no bit on this side, in the output or in the gradient of x."""

from functools import partial

import jax
import jax.numpy as jnp

from . import _context
from ._segments import extents, is_padding, places

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
    - `context_axis`: the mesh axis that T is split over, as in `kimi_delta_attention`; without
      `initial_state`. Each device gets the W - 1 tokens before its own from its neighbour.

    **Returns** an array like `x`, zero at padding.

    **Numerics** Products and sums are at least fp32, rounded once to `x.dtype`. The backward pass
    needs only the arguments; everything else can be recomputed."""
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    bias = None if bias is None else jnp.asarray(bias)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    _check(x, kernel, bias, activation, segment_ids, initial_state, context_axis)
    if context_axis is not None:
        return _on_shards(
            x, kernel, bias, segment_ids, context_axis, activation, padding_segment_id
        )
    if initial_state is not None and segment_ids is None:
        initial_state = initial_state[:, None]
    # Without the barriers of prevent_cse, which cost CPUs several times the convolution. Scanned
    # layers, where saved memory matters most, recompute all the same: there nothing can be shared.
    conv = jax.checkpoint(
        partial(_convolve, activation=activation, padding_segment_id=padding_segment_id),
        prevent_cse=False,
    )
    return conv(x, kernel, bias, segment_ids, initial_state)


def _on_shards(x, kernel, bias, segment_ids, axis, activation, padding_segment_id):
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
            activation=activation,
            segment_ids=named.get("ids"),
            padding_segment_id=padding_segment_id,
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


def short_conv_step(x, kernel, state, bias=None, *, activation="silu", state_indices=None):
    """`short_conv` of the next tokens of N sequences, and the inputs to go on from.

    **Arguments**

    - `x`: [N, T, ...channels], floating: the next T tokens of each sequence.
    - `kernel`, `bias`, `activation`: as in `short_conv`.
    - `state`: [N, W - 1, ...channels], floating: the inputs before x, oldest first. Or, with
      `state_indices`, a pool of them [slots, W - 1, ...channels].
    - `state_indices`: int32 [N], the slot of each sequence. One whose index is negative or past
      the pool reads and writes nothing, and its output is zero.

    **Returns** (y, state): y like `x`; state like `state`, rounded to its type."""
    x, kernel, state = jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(state)
    bias = None if bias is None else jnp.asarray(bias)
    _check_step(x, kernel, state, bias, activation, state_indices)
    before = state
    if state_indices is not None:
        slots = state.shape[0]
        exists = (state_indices >= 0) & (state_indices < slots)
        # jnp counts negative indices from the end; past the end they read zero and write nothing.
        place = state.at[jnp.where(exists, state_indices, slots)]
        before = place.get(mode="fill", fill_value=0)
        x = jnp.where(exists.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    window = jnp.concatenate([before.astype(jnp.promote_types(before.dtype, x.dtype)), x], axis=1)
    after = window[:, x.shape[1] :].astype(state.dtype)
    y = _convolve(
        x, kernel, bias, None, before[:, None], activation=activation, padding_segment_id=None
    )
    if state_indices is None:
        return y, after
    y = jnp.where(exists.reshape(-1, *[1] * (x.ndim - 1)), y, 0)
    return y, place.set(after, mode="drop")


def _convolve(x, kernel, bias, segment_ids, initial_state, *, activation, padding_segment_id):
    dtype = x.dtype
    compute_dtype = jnp.promote_types(dtype, jnp.float32)
    channels = x.ndim - 2

    def per_token(mask):  # [B, T] against [B, T, ...channels]
        return mask.reshape(mask.shape + (1,) * channels)

    taps_valid = None
    if segment_ids is not None:
        valid = ~is_padding(segment_ids, padding_segment_id)
        taps_valid = _tap_masks(segment_ids, kernel.shape[0])
        # What padding holds must not reach silu': there 0 * NaN would enter the kernel's gradient.
        x = jnp.where(per_token(valid), x, 0)

    x = x.astype(compute_dtype)
    kernel = kernel.astype(compute_dtype)
    y = x * kernel[-1]
    for age in range(1, kernel.shape[0]):
        tap = _shift(x, age)
        if taps_valid is not None:
            tap = jnp.where(per_token(taps_valid[age]), tap, 0)
        if initial_state is not None:
            before, is_before = _taps_before(x, initial_state, age, segment_ids, padding_segment_id)
            tap = jnp.where(per_token(is_before), before.astype(compute_dtype), tap)
        y += tap * kernel[-1 - age]
    if bias is not None:
        y += bias.astype(compute_dtype)
    if activation == "silu":
        y = jax.nn.silu(y)
    if segment_ids is not None:
        y = jnp.where(per_token(valid), y, 0)
    return y.astype(dtype)


def _shift(x, age):
    """x delayed by `age` tokens along T, zeros first."""
    T = x.shape[1]
    age = min(age, T)
    return jnp.pad(x[:, : T - age], ((0, 0), (age, 0)) + ((0, 0),) * (x.ndim - 2))


def _taps_before(x, initial_state, age, segment_ids, padding_segment_id):
    """Taps of this age that lie before their segment, and which tokens have one."""
    B, T = x.shape[:2]
    if segment_ids is None:
        segment, offset = jnp.zeros((B, T), jnp.int32), jnp.arange(T)[None]
    else:
        segment, offset = places(segment_ids, padding_segment_id)
    N, history = initial_state.shape[1:3]
    is_before = (offset < age) & (segment >= 0) & (segment < N)
    row = jnp.arange(B)[:, None]
    entry = jnp.clip(history + offset - age, 0, history - 1)
    return initial_state[row, jnp.clip(segment, 0, N - 1), entry], is_before


def _tap_masks(segment_ids, width):
    """masks[age][b, t]: tokens t - age .. t of row b all carry one id."""
    has_predecessor = jnp.arange(segment_ids.shape[1]) > 0
    unbroken = has_predecessor & (segment_ids == _shift(segment_ids, 1))
    masks = [None, unbroken]
    while len(masks) < width:
        masks.append(masks[-1] & _shift(masks[-1], 1))
    return masks


def _check(x, kernel, bias, activation, segment_ids, initial_state, context_axis):
    problems = _problems(x, kernel, bias, activation)
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


def _check_step(x, kernel, state, bias, activation, state_indices):
    problems = _problems(x, kernel, bias, activation)
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


def _problems(x, kernel, bias, activation):
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
    return problems
