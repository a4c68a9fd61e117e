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

from ._segments import is_padding

__all__ = ["short_conv"]


def short_conv(x, kernel, bias=None, *, activation="silu", segment_ids=None, padding_segment_id=0):
    """Causal depthwise convolution along T, inside segments, followed by SiLU.

    **Arguments**

    - `x`: [B, T, ...channels], floating.
    - `kernel`: [W, ...channels]. `kernel[W - 1]` multiplies the current token, `kernel[0]` the
      oldest one, as in `torch.nn.Conv1d` (`kernel = conv.weight[:, 0, :].T` there).
    - `bias`: [...channels] or None.
    - `activation`: "silu" or None (static).
    - `segment_ids`: integer [B, T] or None (each row is one segment).
    - `padding_segment_id`: the id of padding besides all negative ids, or None (static).

    **Returns** an array like `x`, zero at padding.

    **Numerics** Products and sums are at least fp32, rounded once to `x.dtype`. The backward pass
    needs only the arguments; everything else can be recomputed."""
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    bias = None if bias is None else jnp.asarray(bias)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    _check(x, kernel, bias, activation, segment_ids)
    # Without the barriers of prevent_cse, which cost CPUs several times the convolution. Scanned
    # layers, where saved memory matters most, recompute all the same: there nothing can be shared.
    conv = jax.checkpoint(
        partial(_convolve, activation=activation, padding_segment_id=padding_segment_id),
        prevent_cse=False,
    )
    return conv(x, kernel, bias, segment_ids)


def _convolve(x, kernel, bias, segment_ids, *, activation, padding_segment_id):
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


def _tap_masks(segment_ids, width):
    """masks[age][b, t]: tokens t - age .. t of row b all carry one id."""
    has_predecessor = jnp.arange(segment_ids.shape[1]) > 0
    unbroken = has_predecessor & (segment_ids == _shift(segment_ids, 1))
    masks = [None, unbroken]
    while len(masks) < width:
        masks.append(masks[-1] & _shift(masks[-1], 1))
    return masks


def _check(x, kernel, bias, activation, segment_ids):
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
    if segment_ids is not None:
        if segment_ids.shape != x.shape[:2]:
            problems.append(f"segment_ids must be [B, T] = {x.shape[:2]}, got {segment_ids.shape}")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            problems.append(f"segment_ids must be integers, got {segment_ids.dtype}")
    if problems:
        raise ValueError("short_conv: " + "; ".join(problems))
