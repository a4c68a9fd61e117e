"""The short convolution on XLA: W shifted multiply-adds.

Not a grouped convolution: XLA fuses these into one pass over x on every backend, while its
depthwise convolutions are slow on CPUs and cannot mask taps. Taps are dropped by selection, never
by multiplying with zero, so a NaN on the other side of a boundary changes no bit on this side, in
the output or in the gradient of x."""

import jax
import jax.numpy as jnp

from ._problem import ShortConvProblem, ShortConvStepProblem
from ._segments import is_padding, places


def forward(problem: ShortConvProblem, *operands):
    """(y,) of the operands of `problem` (see `_problem.py`)."""
    named = problem.named(operands)
    taps = [named.get(n) for n in ("x", "kernel", "bias", "segment_ids", "initial_state")]
    return (convolve(*taps, silu=problem.silu, padding_segment_id=problem.padding_segment_id),)


def backward(problem: ShortConvProblem, *operands_and_cotangents):
    """The gradients of `problem.differentiable_names`; everything is recomputed."""
    *operands, d_y = operands_and_cotangents
    named = problem.named(operands)
    names = problem.differentiable_names

    def run(*arrays):
        changed = named | dict(zip(names, arrays, strict=True))
        return forward(problem, *(changed[name] for name in problem.operand_names))[0]

    return jax.vjp(run, *(named[name] for name in names))[1](d_y)


def step(problem: ShortConvStepProblem, *operands):
    """(y, state) of the operands of `problem`."""
    named = problem.named(operands)
    kernel, bias = named["kernel"], named.get("bias")
    if not problem.parameters_per_sequence:
        kernel, bias = kernel[0], None if bias is None else bias[0]
    indices = named.get("state_indices")
    return convolve_step(named["x"], kernel, named["state"], bias, indices, silu=problem.silu)


def convolve(x, kernel, bias, segment_ids, initial_state, *, silu, padding_segment_id):
    """y of x [B, T, ...], segment_ids [B, T], initial_state [B, N, W - 1, ...], and kernel [W, ...]
    and bias [...] of all rows, or [B, W, ...] and [B, ...] of each. All but x and the kernel may be
    None.
    """
    # Convolutions share nothing: XLA on GPUs (0.11.2) fuses the sums that are one's kernel gradient
    # with another's elementwise work on the same masks, and leaves some of the sums unwritten.
    x, segment_ids = jax.lax.optimization_barrier((x, segment_ids))
    dtype = x.dtype
    compute_dtype = jnp.promote_types(dtype, jnp.float32)
    channels = x.ndim - 2

    def per_token(mask):  # [B, T] against [B, T, ...channels]
        return mask.reshape(mask.shape + (1,) * channels)

    taps_valid = None
    if segment_ids is not None:
        valid = ~is_padding(segment_ids, padding_segment_id)
        taps_valid = _tap_masks(segment_ids, kernel.shape[-1 - channels])
        # What padding holds must not reach silu': there 0 * NaN would enter the kernel's gradient.
        x = jnp.where(per_token(valid), x, 0)

    x = x.astype(compute_dtype)
    kernel = kernel.astype(compute_dtype)
    if kernel.ndim == x.ndim:  # rows of [B, 1, ...channels], against those of x
        kernel = jnp.moveaxis(kernel, 1, 0)[:, :, None]
        bias = None if bias is None else bias[:, None]
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
    if silu:
        y = jax.nn.silu(y)
    if segment_ids is not None:
        y = jnp.where(per_token(valid), y, 0)
    return y.astype(dtype)


def convolve_step(x, kernel, state, bias, state_indices, *, silu):
    """(y, state) of x [N, T, ...] after state [N, W - 1, ...], or a pool of states by index; kernel
    and bias as in `convolve`.
    """
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
    y = convolve(x, kernel, bias, None, before[:, None], silu=silu, padding_segment_id=None)
    if state_indices is None:
        return y, after
    y = jnp.where(exists.reshape(-1, *[1] * (x.ndim - 1)), y, 0)
    return y, place.set(after, mode="drop")


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
