"""Whether the CUDA kernels run a call, and if not every reason why not.

The compiled kernels declare what they take (`_extension.variants()`) and a call is compared with
that table, so that a new row in it needs no edit here.
"""

import jax
import numpy as np

from . import _extension
from ._problem import Problem, ShortConvProblem, ShortConvStepProblem, StepProblem

# Kernels number tokens, heads of rows and state slots with 32 bits; byte offsets are 64-bit.
_COUNT_LIMIT = 2**31
_COUNTS = {
    ("B", "T"): "split the batch",
    ("B", "HV"): "split the batch",
    ("B", "HV", "N"): "lower max_segments or split the batch",
}
# The step has a CTA for each part of a state, and no more than eight parts.
_STEP_COUNT_LIMIT = 2**28
MOST_STEP_TOKENS = 8  # of a call; the decode step keeps to it on XLA too


def unsupported_reasons(
    problem: Problem | StepProblem | ShortConvProblem | ShortConvStepProblem,
    operands,
    compute_capability: str | None = None,
    stage: str = "forward",
) -> tuple[str, ...]:
    """Why the kernels cannot run this stage of a call; empty if they can.

    `operands` are those of `problem.operand_names`, or anything with their shapes and dtypes.
    Without `compute_capability` ("9.0") those of all local CUDA devices count, and where there are
    none the compiled architectures are assumed: the handler refuses others by name.
    """
    missing = _extension.missing_reason()
    if missing is not None:
        return (missing,)
    variants, mismatches = _compiled(problem)
    capabilities = [compute_capability] if compute_capability else _local_compute_capabilities()
    reasons = []
    if stage == "backward" and problem.return_chunk_states:
        reasons.append(
            "the backward kernels take no cotangent of chunk states (return_chunk_states=True)"
        )
    for capability in capabilities or [None]:
        compiled = [row for row in variants if capability in (None, _capability(row))]
        if compiled:
            reasons += mismatches(problem.named(operands), compiled)
        else:
            known = _listed(_capability(row) for row in variants)
            reasons.append(f"the kernels are for compute capability {known}, not {capability}")
    return tuple(dict.fromkeys([*reasons, *_counts_too_large(problem, problem.sizes(operands))]))


def kernel_dims(K: int, V: int) -> tuple[int, int] | None:
    """The head dims of the kernels that take such a call of the op, padded with zeros: the smallest
    that hold K and V, at most doubled, or None."""
    holding = {
        (row["K"], row["V"])
        for row in _extension.variants()
        if K <= row["K"] <= 2 * K and V <= row["V"] <= 2 * V
    }
    return min(holding, default=None)


def _compiled(problem):
    """The compiled rows for such calls, and the rule that compares a call with some of them."""
    if isinstance(problem, ShortConvProblem | ShortConvStepProblem):
        return _extension.short_conv_variants(), _short_conv_mismatches
    if isinstance(problem, StepProblem):
        return _extension.step_variants(), _step_mismatches
    return _extension.variants(), _mismatches


def _counts_too_large(problem, sizes):
    if isinstance(problem, ShortConvProblem | ShortConvStepProblem):
        yield from _short_conv_counts(problem, sizes)
        return
    if isinstance(problem, StepProblem):
        count = sizes[problem.sequences] * sizes["HV"]
        if count >= _STEP_COUNT_LIMIT:
            yield f"N * HV is {count}, must be below 2^28: split the batch"
        return
    for axes, remedy in _COUNTS.items():
        count = int(np.prod([sizes[axis] for axis in axes], dtype=object))
        if count >= _COUNT_LIMIT:
            yield f"{' * '.join(axes)} is {count}, must be below 2^31: {remedy}"


def _short_conv_counts(problem, sizes):
    groups = -(-sizes["H"] * sizes["K"] // 128)
    if isinstance(problem, ShortConvStepProblem):
        what, count = "N * ceil(channels / 128)", sizes[problem.sequences] * groups
    else:
        what = "B * max(T, 5) * ceil(channels / 128)"
        count = sizes["B"] * max(sizes["T"], 5) * groups
    if count >= _COUNT_LIMIT:
        yield f"{what} is {count}, must be below 2^31: split the batch"


def _short_conv_mismatches(named, variants):
    """What of the short convolution, or of its step, no row takes."""
    W, H, K = named["kernel"].shape[1:]
    if W not in [row["width"] for row in variants]:
        widths = _listed(str(row["width"]) for row in variants)
        yield f"the kernel has W = {W} taps (compiled: {widths})"
    multiple = min(row["channel_multiple"] for row in variants)
    if H * K % multiple:
        yield f"there are {H * K} channels, the kernels take multiples of {multiple}"
    is_step = "state" in named
    taken = [x for row in variants for x in row["step_dtypes" if is_step else "dtypes"]]
    for name in ("x", "kernel", "state") if is_step else ("x",):
        dtype = np.dtype(named[name].dtype).name
        if dtype not in taken:
            yield f"{name} is {dtype}, the kernels take {_listed(taken)}"
    tokens = named["x"].shape[1]
    if is_step and tokens > MOST_STEP_TOKENS:
        yield f"there are {tokens} tokens, the kernel takes 1 to {MOST_STEP_TOKENS}"


def _step_mismatches(named, variants):
    """What of the step no row takes."""
    K, V = named["k"].shape[-1], named["v"].shape[-1]
    same_dims = [row for row in variants if (row["K"], row["V"]) == (K, V)]
    if not same_dims:
        dims = _listed(f"K = {row['K']}, V = {row['V']}" for row in variants)
        yield f"there is no kernel for head dims K = {K}, V = {V} (compiled: {dims})"
    for name in ("v", "g", "beta", "state"):
        dtype = np.dtype(named[name].dtype).name
        kind = "state_dtypes" if name == "state" else "token_dtypes"
        taken = [x for row in same_dims or variants for x in row[kind]]
        if dtype not in taken:
            what = "q, k, v are" if name == "v" else f"{name} is"
            yield f"{what} {dtype}, the kernels take {_listed(taken)}"


def _mismatches(named, variants):
    """What of the call no row takes, compared with the rows that come nearest to it."""
    dtypes = {name: np.dtype(named[name].dtype).name for name in ("v", "g", "beta")}
    K, V = named["k"].shape[-1], named["v"].shape[-1]
    holding = [row for row in variants if (row["K"], row["V"]) == kernel_dims(K, V)]
    if not holding:
        dims = _listed(f"K = {row['K']}, V = {row['V']}" for row in variants)
        yield (
            f"there is no kernel for head dims K = {K}, V = {V} (compiled: {dims}; smaller ones "
            "are padded, at most to twice their size)"
        )
    nearest = holding or variants
    takes_qkv = [row for row in nearest if row["qkv_dtype"] == dtypes["v"]]
    if not takes_qkv:
        taken = _listed(row["qkv_dtype"] for row in nearest)
        yield f"q, k, v are {dtypes['v']}, the kernels take {taken}"
    for name in ("g", "beta"):
        taken = [dtype for row in takes_qkv or nearest for dtype in row[f"{name}_dtypes"]]
        if dtypes[name] not in taken:
            yield f"{name} is {dtypes[name]}, the kernels take {_listed(taken)}"


def _local_compute_capabilities():
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:  # this process has no CUDA backend
        return []
    return sorted({device.compute_capability for device in devices})


def _capability(row):
    return f"{row['arch'] // 10}.{row['arch'] % 10}"


def _listed(items):
    return " or ".join(sorted(set(items)))
