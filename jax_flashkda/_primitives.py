"""The stages of the ops as JAX primitives: forward, backward and decode step of the op and of the
short convolution.

`forward` and `backward` are what the gradient rule calls, `step` what a decode step is. From the
outside in, a call passes

    custom_jvp         refuses to be differentiated, in words (the gradient rule sits above)
    custom_vmap        folds a mapped axis into the batch axis and calls itself
    _dispatch          Explicit mesh axes: shard_map; Auto: custom_partitioning; Manual: neither
    the raw primitive  abstract evaluation, and one lowering rule per platform

The primitive has to be raw. An `ffi_call` loses the manual axes of its operands' types, which
breaks `shard_map(check_vma=True)`, and `lax.platform_dependent` does so too. Which
implementation runs is settled in the lowering rules, so one traced program serves every platform.
"""

import dataclasses
import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from . import _chunked, _extension, _recurrent, _segments, _short_conv_xla, _support
from ._problem import PREPARED, Problem, ShortConvProblem, ShortConvStepProblem, StepProblem


def _preparing(stage):
    """The stage on XLA, which prepares nothing: zeros, which XLA drops since nobody reads them."""

    def run(problem, *operands):
        sizes = problem.sizes(operands)
        sizes |= _prepared_sizes(sizes)
        prepared = [
            jnp.zeros([sizes[axis] for axis in problem.axes[name]], dtype)
            for name, dtype in _PREPARED_DTYPES.items()
        ]
        return (*stage(problem, *operands), *prepared)

    return run


def _prepared(stage):
    return lambda problem, *operands: stage(problem, *operands[: -len(PREPARED)], tail_slot=True)


# What each stage is on XLA. The backwards recompute from the raw inputs.
_XLA = {
    "forward": _chunked.forward,
    "backward": _chunked.backward,
    "state_maps": _preparing(_chunked.state_maps),
    "state_gradient": _preparing(_chunked.state_gradient),
    "prepared_forward": _prepared(_chunked.forward),
    "prepared_backward": _prepared(_chunked.backward),
    "step": _recurrent.step,
    "short_conv": _short_conv_xla.forward,
    "short_conv_backward": _short_conv_xla.backward,
    "short_conv_step": _short_conv_xla.step,
}

# The FFI targets of the CUDA kernels.
_FFI_TARGETS = {stage: f"jax_flashkda.{stage}" for stage in _XLA}

# Whose workspace a stage of the op needs.
_WORKSPACES = {
    "forward": "forward",
    "backward": "backward",
    "state_maps": "prepared_forward",
    "state_gradient": "prepared_forward",
    "prepared_forward": "prepared_forward",
    "prepared_backward": "prepared_backward",
}

# `jax.export` refuses unknown custom calls; pass this as its `disabled_checks`.
DISABLE_JAX_EXPORT_CHECKS = tuple(
    jax.export.DisabledSafetyCheck.custom_call(target) for target in _FFI_TARGETS.values()
)


def forward(problem: Problem | ShortConvProblem, *operands):
    """The results of the operands named by `problem.operand_names`."""
    return _stage(problem.stages[0], problem)(*operands)


def backward(problem: Problem | ShortConvProblem, *operands_and_cotangents):
    """The gradients of `problem.differentiable_names`."""
    return _stage(problem.stages[1], problem)(*operands_and_cotangents)


def state_maps(problem: Problem, *operands):
    """(M, B, *prepared) of the segment that ends each row, from the operands of `forward` without
    states: it takes an initial state S to the final state M S + B. Undefined for a row that ends in
    padding. `prepared` is what `prepared_forward` takes.
    """
    return _stage("state_maps", problem)(*operands)


def state_gradient(problem: Problem, *operands_and_cotangents):
    """(d_initial_state, *prepared): of `backward` no more than this, of the segments that begin
    rows, undefined for others; and what `prepared_backward` takes. With segment ids there are two
    slots at least.
    """
    return _stage("state_gradient", problem)(*operands_and_cotangents)


def prepared_forward(problem: Problem, *operands):
    """`forward`, of operands behind which comes what `state_maps` prepared of the same tokens, with
    as many slots. The kernels read no other q, k, g and beta. The last slot is that of the segment
    which ends its row, whatever its ordinal.
    """
    return _stage("prepared_forward", problem)(*operands)


def prepared_backward(problem: Problem, *operands_and_cotangents):
    """`backward`, likewise, behind `state_gradient`."""
    return _stage("prepared_backward", problem)(*operands_and_cotangents)


def step(problem: StepProblem | ShortConvStepProblem, *operands):
    """The results of the operands named by `problem.operand_names`, the state among them."""
    return _stage(problem.stages[0], problem)(*operands)


def _is_step(problem):
    return isinstance(problem, StepProblem | ShortConvStepProblem)


@functools.cache
def _stage(stage, problem):
    @custom_vmap
    def call(*operands):
        return _dispatch(stage, problem, *operands)

    @call.def_vmap
    def fold_into_batch(axis_size, in_batched, *operands):
        fold = _fold_step if _is_step(problem) else _fold_all
        folded_problem, folded = fold(problem, operands, axis_size, in_batched)
        rows = operands[0].shape[1 if in_batched[0] else 0]
        results = _stage(stage, folded_problem)(*folded)
        axes = [problem.axes[name] for name in problem.signature(stage)[1]]
        unfolded = tuple(
            x.reshape(axis_size, -1, *x.shape[1:])
            if axes_of_x[0] == "S"
            else _unfold(x, rows, axis_size)
            for x, axes_of_x in zip(results, axes, strict=True)
        )
        return unfolded, (True,) * len(results)

    @jax.custom_jvp
    def reverse_mode_once(*operands):
        return call(*operands)

    @reverse_mode_once.defjvp
    def refuse(primals, tangents):
        kind = "step" if _is_step(problem) else "gradient"
        raise NotImplementedError(f"{problem.function} {_NOT_DIFFERENTIABLE[kind]}")

    return reverse_mode_once


_NOT_DIFFERENTIABLE = {
    "gradient": "supports reverse-mode differentiation, once: its gradient cannot be "
    "differentiated again, neither forward (jax.jvp, jax.jacfwd, jax.hessian) nor in reverse "
    "(jax.grad of jax.grad).",
    "step": "has no derivative; the op that it continues, with initial_state, computes the same "
    "and has one.",
}


# ------------------------------------------------------------------------------------------ vmap


def _fold_all(problem, operands, axis_size, in_batched):
    mapped = zip(operands, in_batched, strict=True)
    return problem, [_fold(operand, axis_size, batched) for operand, batched in mapped]


def _fold_step(problem, operands, axis_size, in_batched):
    """The step of all sequences of the mapped calls. Parameters that are not mapped stay one row;
    pools are put one behind the other, and indices count on.
    """
    mapped = dict(zip(problem.operand_names, in_batched, strict=True))
    named = problem.named(operands)
    shared = not (problem.parameters_per_sequence or any(map(mapped.get, problem.parameter_names)))
    rows = named[problem.data].shape[1 if mapped[problem.data] else 0]
    slots = named["state"].shape[1 if mapped["state"] else 0]
    folded = {}
    for name, x in named.items():
        if name in problem.parameter_names:
            if not shared and not problem.parameters_per_sequence:
                x = jnp.repeat(x, rows, axis=1 if mapped[name] else 0)
            folded[name] = x if shared else _fold(x, axis_size, mapped[name])
        elif name == "state" and problem.has_state_indices:
            x = x if mapped[name] else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            folded[name] = x.reshape(axis_size * slots, *x.shape[2:])
        elif name == "state_indices":
            x = _fold(x, axis_size, mapped[name]).reshape(rows, axis_size)
            first = slots * jnp.arange(axis_size, dtype=x.dtype)
            folded[name] = jnp.where((x >= 0) & (x < slots), x + first, -1).reshape(-1)
        else:
            folded[name] = _fold(x, axis_size, mapped[name])
    problem = dataclasses.replace(problem, parameters_per_sequence=not shared)
    return problem, [folded[name] for name in problem.operand_names]


def _fold(x, axis_size, batched):
    # [X, B, ...] -> [B * X, ...], the mapped axis inside the batch: a batch that is split over
    # devices stays where it is, while the other order would move every row.
    if batched:
        x = jnp.moveaxis(x, 0, 1)
    else:
        x = jnp.broadcast_to(x[:, None], (x.shape[0], axis_size, *x.shape[1:]))
    return x.reshape(x.shape[0] * axis_size, *x.shape[2:])


def _unfold(x, rows, axis_size):
    return jnp.moveaxis(x.reshape(rows, axis_size, *x.shape[1:]), 1, 0)


# -------------------------------------------------------------------------------------- sharding
#
# Rows of the batch and heads are independent, so both are split over devices with no collective.
# T, K, V and N stay whole: a call that splits them is gathered. With grouped values (HV > H) a
# device that holds a q/k head holds its value heads too. Value heads split more ways than there
# are q/k heads cannot be placed so: the mesh axes that are too many are gathered, which costs an
# all-gather of every operand with heads over them, and the same work on each of their devices.
# Repeating q and k to HV heads first avoids that, at HV / H times their memory.


def _dispatch(stage, problem, *operands):
    mesh = mesh_of(operands)
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit in types.values():
        return _shard_mapped(stage, problem, mesh, operands)
    if types and all(kind == AxisType.Manual for kind in types.values()):
        return _bind(stage, problem, *operands)
    auto = math.prod(mesh.shape[name] for name in types if types[name] == AxisType.Auto)
    return _partitioned(stage, problem, auto if types else None)(*operands)


def mesh_of(operands):
    """The mesh that a call of these operands is traced for, empty where there is none."""
    # Without jax.set_mesh the mesh of an Explicit axis is known to the arrays alone.
    meshes = [jax.typeof(operand).sharding.mesh for operand in operands]
    return next((mesh for mesh in meshes if not mesh.empty), jax.sharding.get_abstract_mesh())


def _bind(stage, problem, *operands):
    return tuple(_PRIMITIVES[stage].bind(*vary_alike(operands), problem=problem))


def vary_alike(operands, *axes):
    """The operands, all varying over the manual mesh axes that any of them varies over, and `axes`.

    The gradient rule calls this outside the custom_vjp: transposed, it is the sum over devices of
    the gradient of an operand that they share, in the place where shard_map wants it.
    """
    varying = [_varying_axes(operand) for operand in operands]
    union = frozenset(axes).union(*varying)
    return tuple(
        jax.lax.pcast(operand, tuple(sorted(union - own)), to="varying") if union - own else operand
        for operand, own in zip(operands, varying, strict=True)
    )


def _varying_axes(x):
    aval = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):  # what newer JAX calls `vma`
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(aval.vma)


def _spec(problem, name, batch, heads):
    axes = {"B": batch, "H": heads, "HV": heads}
    return P(*(axes.get(axis) or None for axis in problem.axes[name]))


def split(problem, operands, shardings):
    """The mesh axes (batch, heads) to split operands over that arrive with these NamedShardings."""
    batch, heads = (), ()
    # Value heads first: they are what there is most of.
    arrived = zip(problem.operand_names, shardings, strict=False)
    for name, sharding in sorted(arrived, key=lambda item: item[0] in ("q", "k")):
        for axis, entry in zip(problem.axes[name], sharding.spec, strict=False):
            if axis == "B":
                batch = batch or axes_of(entry)
            elif axis in ("H", "HV"):
                heads = heads or axes_of(entry)
    heads = tuple(axis for axis in heads if axis not in batch)
    H, mesh = problem.sizes(operands)["H"], shardings[0].mesh
    while H % math.prod(mesh.shape[axis] for axis in heads):
        heads = heads[:-1]
    return batch, heads


def over_rows(parameter, like):
    """`parameter` for every batch row of `like`, [B, ...], its rows split as those of `like` are.

    Explicit mesh axes have to be named here. The gradient of this is a sum over rows, which then
    adds up one row per device; rows that `shard_alike` had to split would be gathered instead.
    """
    rows, own = jax.typeof(like).sharding, jax.typeof(parameter).sharding.spec
    taken = {axis for entry in own for axis in axes_of(entry)}
    sharding = None
    if rows.spec[0] is not None and taken.isdisjoint(axes_of(rows.spec[0])):
        sharding = NamedSharding(rows.mesh, P(rows.spec[0], *own))
    return jax.lax.broadcast_in_dim(
        parameter,
        (like.shape[0], *parameter.shape),
        tuple(range(1, parameter.ndim + 1)),
        out_sharding=sharding,
    )


def axes_of(entry):
    """The mesh axes of an entry of a PartitionSpec: None, a name or a tuple of names."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def shard_alike(problem, operands):
    """The operands of an Explicit mesh with batch and heads split alike and nothing else split.

    The gradient rule calls this outside the custom_vjp, whose gradients must have exactly the
    shardings of its operands.
    """
    mesh = mesh_of(operands)
    if AxisType.Explicit not in mesh.axis_types:
        return operands
    names, _ = problem.signature(problem.stages[-1])
    batch, heads = split(problem, operands, [jax.typeof(operand).sharding for operand in operands])
    return tuple(
        jax.sharding.reshard(operand, NamedSharding(mesh, _spec(problem, name, batch, heads)))
        for name, operand in zip(names, operands, strict=False)
    )


def _shard_mapped(stage, problem, mesh, operands):
    operands = shard_alike(problem, operands)
    operand_names, result_names = problem.signature(stage)
    batch, heads = split(problem, operands, [jax.typeof(operand).sharding for operand in operands])
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    mapped = jax.shard_map(
        functools.partial(_dispatch, stage, problem),
        mesh=mesh,
        in_specs=tuple(_spec(problem, name, batch, heads) for name in operand_names),
        out_specs=tuple(_spec(problem, name, batch, heads) for name in result_names),
        axis_names={name for name, kind in types if kind == AxisType.Explicit},
    )
    return mapped(*operands)


@functools.cache
def _partitioned(stage, problem, devices):
    """The stage under Auto mesh axes: `devices` devices altogether, or all of them (None)."""
    operand_names, result_names = problem.signature(stage)
    bind = functools.partial(_bind, stage, problem)

    def partition(mesh, operands, results):
        del results  # XLA moves them from where they are computed to where they are wanted
        if mesh.empty:
            grid, batch, heads = _unnamed_split(problem, operands, devices)
        else:
            shardings = [operand.sharding for operand in operands]
            grid, (batch, heads) = mesh, split(problem, operands, shardings)
        placed = {
            name: NamedSharding(grid, _spec(problem, name, batch, heads))
            for name in operand_names + result_names
        }
        results_placed = tuple(placed[name] for name in result_names)
        return mesh, bind, results_placed, tuple(placed[name] for name in operand_names)

    def sharding_rule(mesh, operand_types, result_types):
        # Value heads are a factor of their own when they are grouped: tied to the q/k heads, an
        # axis larger than H would be cut into parts that no NamedSharding can name. `partition`
        # makes both agree.
        sizes = problem.sizes(operand_types)
        factors = {"HV": "h" if sizes["H"] == sizes.get("HV") else "w"}
        names = operand_names + result_names
        axes = problem.axes
        terms = [" ".join(factors.get(x, x.lower()) for x in axes[name]) for name in names]
        # In the order of their first appearance, as Shardy wants them.
        used = dict.fromkeys(axis for name in names for axis in axes[name])
        left, right = terms[: len(operand_names)], terms[len(operand_names) :]
        whole = tuple(axis.lower() for axis in used if axis not in ("B", "H", "HV"))
        return f"{', '.join(left)} -> {', '.join(right)}", {"need_replication_factors": whole}

    call = custom_partitioning(bind)
    call.def_partition(partition, sharding_rule=sharding_rule)
    return call


def _unnamed_split(problem, operands, devices):
    """A mesh and its axes (batch, heads) to split over when JAX can name no axes of the real one.

    That is so in a partly manual shard_map, and where a mesh is known to nothing but jax.set_mesh.
    Any placement is right that all arrays share. This one keeps the number of ways that the data
    arrive split, with the batch as the outer axis of the mesh as is usual, and then nothing moves.
    """
    data = problem.named(operands)[problem.data]
    local = data.sharding.shard_shape(data.shape)
    batch, heads = data.shape[0] // local[0], data.shape[2] // local[2]
    if "B" not in problem.axes[problem.data]:
        batch = 1
    if problem.sizes(operands)["H"] % heads:
        heads = 1
    known = sorted(data.sharding.device_set, key=lambda device: device.id)
    grid = np.array(known[:devices]).reshape(batch, heads, -1)  # only its shape matters
    return jax.sharding.Mesh(grid, ("batch", "heads", "copies")), ("batch",), ("heads",)


# ---------------------------------------------------------------------------- the raw primitives


def _abstract(stage, *operands, problem):
    # Results are updated operands, never fresh types: these keep the manual axes of shard_map.
    named = problem.named(operands)
    sizes, data = problem.sizes(operands), named[problem.data]
    if stage == "state_maps":
        sizes["J"] = sizes["K"]
    if stage in _PREPARING:
        sizes |= _prepared_sizes(sizes)
    state_dtype = np.promote_types(data.dtype, np.float32)
    dtypes = dict.fromkeys(("final_state", "chunk_states", "factor", "offset"), state_dtype)
    dtypes |= {"o": data.dtype, "y": data.dtype} | _PREPARED_DTYPES
    if _is_step(problem):
        dtypes["state"] = dtypes["token_states"] = named["state"].dtype

    def result(name):
        if stage in _GRADIENTS and name in named:
            return named[name].update(weak_type=False)
        shape = tuple(sizes[axis] for axis in problem.axes[name])
        return data.update(shape=shape, dtype=dtypes[name], weak_type=False)

    return [result(name) for name in problem.signature(stage)[1]]


_GRADIENTS = ("backward", "prepared_backward", "state_gradient", "short_conv_backward")
_PREPARING = ("state_maps", "state_gradient")
_PREPARED_DTYPES = dict(zip(PREPARED, (np.uint8, np.float32, np.float32), strict=True))


def _prepared_sizes(sizes):
    """The axes of what the kernels prepare, as problem/workspace.h lays it out."""
    return dict(X=1024, Y=4, C=128, D=-(-sizes["T"] // _segments.CHUNK) + sizes["N"])


def _lower_xla(stage, ctx, *operands, problem):
    return _lower_plain(functools.partial(_XLA[stage], problem), ctx, *operands)


def _lower_plain(function, ctx, *operands):
    # On plain types and with no mesh: what runs here is a computation of one device, and its loops,
    # whose carries start as constants, could not be typed with the manual or explicit axes around.
    plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    lower = mlir.lower_fun(function)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return lower(ctx.replace(avals_in=plain), *operands)


def _lower_default(stage, ctx, *operands, problem):
    if problem.implementation == "cuda":
        raise NotImplementedError(
            'implementation="cuda" is lowered for a platform other than cuda, where the kernels '
            'cannot run; implementation=None or "xla" runs there.'
        )
    return _lower_xla(stage, ctx, *operands, problem=problem)


def _lower_cuda(stage, ctx, *operands, problem):
    sizes = problem.sizes(ctx.avals_in)
    sizes.pop("M", None)  # a short row has no chunk states, and tokens all the same
    empty = 0 in sizes.values()  # nothing to launch: the results are zeros and the states as given
    if not _kernels_run(stage, problem, ctx.avals_in) or empty:
        return _lower_xla(stage, ctx, *operands, problem=problem)
    _extension.register()
    if isinstance(problem, Problem):
        dims = _support.kernel_dims(sizes["K"], sizes["V"])
        if dims != (sizes["K"], sizes["V"]):
            padded = functools.partial(_with_padded_heads, stage, problem, *dims)
            return _lower_plain(padded, ctx, *operands)
    if isinstance(problem, ShortConvProblem):
        ctx, operands, problem = _with_slots(ctx, operands, problem)
    # Scratch memory is a result that nobody sees: a handler that allocated could not be captured
    # in a command buffer.
    scratch = [
        jax.core.ShapedArray((count,), np.uint8)
        for count in _workspace_bytes(stage, problem, sizes)
    ]
    rule = jax.ffi.ffi_lowering(_FFI_TARGETS[stage], operand_output_aliases=_in_place(problem))
    results = rule(
        ctx.replace(avals_out=[*ctx.avals_out, *scratch]), *operands, **_attributes(stage, problem)
    )
    return results[: len(ctx.avals_out)]


def _with_padded_heads(stage, problem, K, V, *operands):
    """The stage with head dims padded to K and V. Exact: the state's row of a channel that is zero
    in k, and its column of one that is zero in v, are zeros, and so are their gradients.
    """
    operand_names, result_names = problem.signature(stage)
    named = dict(zip(operand_names, operands, strict=True))
    larger = {"K": K, "J": K, "V": V}
    own = {"K": named["k"].shape[-1], "J": named["k"].shape[-1], "V": named["v"].shape[-1]}

    def pad(name, x):
        axes = zip(problem.axes[name], x.shape, strict=True)
        return jnp.pad(x, [(0, larger.get(axis, size) - size) for axis, size in axes])

    padded = [pad(name, x) for name, x in named.items()]
    results = _PRIMITIVES[stage].bind(*padded, problem=problem)
    return tuple(
        x[tuple(slice(own.get(axis)) for axis in problem.axes[name])]
        for name, x in zip(result_names, results, strict=True)
    )


def _with_slots(ctx, operands, problem):
    """The call with slots as ids, where the kernels need that: to find initial states, and in place
    of ids that are not int32.
    """
    if not problem.has_segment_ids:
        return ctx, operands, problem
    at = problem.operand_names.index("segment_ids")
    ids = ctx.avals_in[at]
    if ids.dtype == np.int32 and not problem.has_initial_state:
        return ctx, operands, problem
    slots = jax.core.ShapedArray(ids.shape, np.int32)
    (lowered,) = _lower_plain(
        lambda ids: (_segments.slots(ids, problem.padding_segment_id),),
        ctx.replace(primitive=None, avals_in=[ids], avals_out=[slots]),
        operands[at],
    )
    avals = [*ctx.avals_in[:at], slots, *ctx.avals_in[at + 1 :]]
    operands = [*operands[:at], lowered, *operands[at + 1 :]]
    return (
        ctx.replace(avals_in=avals),
        operands,
        dataclasses.replace(problem, padding_segment_id=None),
    )


def _workspace_bytes(stage, problem, sizes):
    """The bytes of the stage's workspace, if it has one."""
    if stage in _WORKSPACES:
        segments = dict(has_segment_ids=problem.has_segment_ids)
        return (_extension.workspace_bytes(_WORKSPACES[stage], **sizes, **segments),)
    if stage == "short_conv_backward":
        channels = sizes["H"] * sizes["K"]
        return (_extension.short_conv_workspace_bytes(sizes["B"], sizes["T"], channels),)
    return ()


def _in_place(problem):
    """Results that get the memory of an operand. XLA copies it first unless it is donated or used
    nowhere else.
    """
    if not _is_step(problem):
        return None
    return {problem.operand_names.index("state"): problem.result_names.index("state")}


def _kernels_run(stage, problem, operands):
    """Whether the CUDA kernels run this stage on the NVIDIA GPUs it is lowered for."""
    if problem.implementation == "xla":
        return False
    reasons = "; ".join(_support.unsupported_reasons(problem, operands, stage=stage))
    if reasons and problem.implementation == "cuda":
        raise NotImplementedError(
            f'implementation="cuda" cannot run this call: {reasons}. '
            'implementation=None or "xla" runs it on XLA.'
        )
    if reasons:
        _warn_once(f"{problem.function} uses XLA on an NVIDIA GPU: {reasons}.")
    return not reasons


@functools.cache
def _warn_once(message):
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _attributes(stage, problem):
    """What the handler has to know beyond the operands, in the exact types that it decodes."""
    attributes = {
        Problem: _op_attributes,
        StepProblem: _step_attributes,
        ShortConvProblem: _short_conv_attributes,
        ShortConvStepProblem: _short_conv_step_attributes,
    }[type(problem)](problem)
    if stage == "forward":
        attributes["return_chunk_states"] = np.bool_(problem.return_chunk_states)
    return attributes


def _op_attributes(problem):
    return (
        _common_attributes(problem)
        | _segment_attributes(problem)
        | dict(return_final_state=np.bool_(problem.return_final_state))
    )


def _step_attributes(problem):
    return _common_attributes(problem) | dict(
        has_state_indices=np.bool_(problem.has_state_indices),
        parameters_per_sequence=np.bool_(problem.parameters_per_sequence),
        return_token_states=np.bool_(problem.return_token_states),
    )


def _short_conv_attributes(problem):
    return _segment_attributes(problem) | dict(
        silu=np.bool_(problem.silu), has_bias=np.bool_(problem.has_bias)
    )


def _short_conv_step_attributes(problem):
    return dict(
        silu=np.bool_(problem.silu),
        has_bias=np.bool_(problem.has_bias),
        has_state_indices=np.bool_(problem.has_state_indices),
        parameters_per_sequence=np.bool_(problem.parameters_per_sequence),
    )


def _segment_attributes(problem):
    padding = problem.padding_segment_id
    return dict(
        has_padding_segment_id=np.bool_(padding is not None),
        padding_segment_id=np.int32(0 if padding is None else padding),
        max_segments=np.int64(problem.max_segments),
        has_initial_state=np.bool_(problem.has_initial_state),
        has_segment_ids=np.bool_(problem.has_segment_ids),
    )


def _common_attributes(problem):
    gates = {"log_decay": 0, "softplus": 1, "bounded": 2}
    return dict(
        gate=np.int32(gates[problem.gate]),
        gate_lower_bound=np.float32(problem.gate_lower_bound),
        beta_is_logits=np.bool_(problem.beta_is_logits),
        allow_neg_eigval=np.bool_(problem.allow_neg_eigval),
        qk_l2norm=np.bool_(problem.qk_l2norm),
        scale=np.float32(problem.scale),
        has_A_log=np.bool_(problem.has_A_log),
        has_dt_bias=np.bool_(problem.has_dt_bias),
    )


def _primitive(stage):
    primitive = Primitive(f"kda_{stage}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(functools.partial(_abstract, stage))
    # Outside jit a call compiles itself; bind under jit only traces.
    primitive.def_impl(jax.jit(primitive.bind, static_argnames="problem"))
    mlir.register_lowering(primitive, functools.partial(_lower_default, stage))
    mlir.register_lowering(primitive, functools.partial(_lower_cuda, stage), platform="cuda")
    return primitive


_PRIMITIVES = {stage: _primitive(stage) for stage in _FFI_TARGETS}
