"""Context parallelism: T split over a mesh axis, each device a contiguous shard of every row.

A shard takes the state S of the segment that runs into it to M S + B, both of them [K, ..] and
float32, whatever its length. So shards exchange their maps (M, B), not tokens:

    forward     B and M of each shard; all_gather; S of each shard by S <- M S + B over the shards
                before it; then the op on the shard, from S.
    backward    C, the gradient of S with no gradient from behind; all_gather of (M, C);
                dS <- M^T dS + C over the shards after it; then the op's gradient on the shard.

Segments are those of the whole row: equal ids on both sides of an edge are one segment. What a row
needs of them are few numbers of each shard, which are exchanged first (`_Rows`). Of the segments of
a shard at most two meet others: the *head*, that the shard before left unfinished, and the *tail*,
that goes on in the next one. Each is computed by a call of the op in which all other tokens are
padding, so its cost is that of its own tokens. A shard of one segment from edge to edge, head and
tail at once, is *through*; only there M is needed, and nothing else costs a second pass.

All results of a shard are its own contributions: what all shards share (states and gate parameters)
enters and leaves through `pcast` and `psum`, so the sums of their gradients are JAX's.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from . import _primitives, _segments, _vjp
from ._problem import Problem

# ------------------------------------------------------------------------------ from mesh to shard


def attend(problem: Problem, *operands):
    """`_vjp.attend` with T split over the mesh axis `problem.context_axis`."""
    axes, shardings = problem.axes, [jax.typeof(operand).sharding for operand in operands]
    batch, heads = _primitives.split(problem, operands, shardings)
    return on_shards(
        "kimi_delta_attention",
        problem.context_axis,
        functools.partial(_attend_shard, problem),
        operands,
        [axes[name] for name in problem.operand_names],
        tuple(axes[name] for name in problem.result_names),
        {"B": batch, "H": heads, "HV": heads},
    )


def on_shards(function, axis, call, operands, axes, result_axes, split):
    """call(*operands) where the mesh axis `axis` is manual and operands are shards of T.

    `axes` names the axes of every operand by letters, `result_axes` those of the results. "T" is
    what `axis` splits; `split` says which other mesh axes the letters lie over.
    """
    mesh = _primitives.mesh_of(operands)
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    T = next(x.shape[letters.index("T")] for x, letters in zip(operands, axes, strict=True))
    _check(function, axis, mesh, types, T, split)
    if types[axis] == AxisType.Manual:
        return call(*operands)
    return _shard_map(mesh, call, operands, axes, result_axes, split | {"T": (axis,)}, {axis})


def _shard_map(mesh, call, operands, axes, result_axes, split, names=frozenset()):
    """`call` where the Explicit mesh axes and those of `names` are manual."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = {name for name, kind in types if kind == AxisType.Explicit}
    specs = [_spec(letters, split) for letters in axes]
    if explicit:
        operands = [
            jax.sharding.reshard(
                x, NamedSharding(mesh, P(*(_only(entry, explicit) for entry in s)))
            )
            for x, s in zip(operands, specs, strict=True)
        ]
    mapped = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=jax.tree.map(lambda x: _spec(x, split), result_axes, is_leaf=_is_letters),
        axis_names=explicit | names,
    )
    return mapped(*operands)


def _spec(letters, split):
    return P(*(split.get(letter) or None for letter in letters))


def _is_letters(x):
    return all(isinstance(letter, str) for letter in x)


def _only(entry, names):
    """What an entry of a PartitionSpec has of `names`."""
    return tuple(name for name in _primitives.axes_of(entry) if name in names) or None


def _check(function, axis, mesh, types, T, split):
    def refuse(why):
        raise ValueError(f"{function}:\n  context_axis: got {axis!r}, {why}")

    if mesh.empty:
        refuse(
            "but there is no mesh; call it inside jax.shard_map over that axis, or under "
            "jax.set_mesh(mesh), or leave context_axis out"
        )
    if axis not in types:
        refuse(f"but the mesh has axes {', '.join(map(repr, types))}; name one of them")
    for letter, entry in split.items():
        if axis in entry:
            what = "batch" if letter == "B" else "heads"
            refuse(f"but that axis splits the {what} already; T needs a mesh axis of its own")
    size = mesh.shape[axis]
    if types[axis] != AxisType.Manual and T % size:
        refuse(
            f"over whose {size} devices T = {T} is to be split; a multiple of {size} is accepted: "
            "add padding behind the tokens, with segment_ids that say so"
        )


def split_alike(x, letters):
    """Over which mesh axes x is split, by letter, T left out."""
    entries = zip(letters, jax.typeof(x).sharding.spec, strict=False)
    return {letter: _primitives.axes_of(entry) for letter, entry in entries if letter != "T"}


def extended(x, size, axis, before_all=0):
    """A shard x [B, T, ..] with the `size` tokens before it, `before_all` before the first. Empty
    shards remain so."""
    T, shards, shard = x.shape[1], lax.axis_size(axis), lax.axis_index(axis)
    blocks, distance = [x], 1
    while size > 0 and T > 0:  # a shard shorter than that needs more than its neighbour
        take = min(size, T)
        block = x[:, T - take :]
        if distance < shards:
            pairs = [(i, i + distance) for i in range(shards - distance)]
            block = lax.ppermute(block, axis, pairs)
        blocks.insert(0, jnp.where(shard < distance, jnp.asarray(before_all, x.dtype), block))
        size, distance = size - take, distance + 1
    return jnp.concatenate(blocks, axis=1)


# ------------------------------------------------------------------------- what shards know of rows


class _Rows(NamedTuple):
    """Where the segments of a shard lie in their rows. Of each shard [R, B], or its own [B]."""

    continues: jax.Array  # [R, B]: the first segment goes on with the last one of the shard before
    inside: jax.Array  # [R, B]: the shard lies inside one segment, which goes on on both sides
    shard: jax.Array  # []
    count: jax.Array  # [B]: segments of the shard
    through: jax.Array  # [B]: the shard is the middle or the end of one segment, and no more
    first: jax.Array  # [B]: state slot of its first segment
    unused: jax.Array  # [B]: first slot without a segment; N but for the last shard: no other fills

    def own(self, x):
        """[B] of this shard, of [R, B]."""
        return lax.dynamic_index_in_dim(x, self.shard, keepdims=False)

    @property
    def head(self):
        """[B]: the first segment of this shard began in one before."""
        return self.own(self.continues)

    @property
    def continued(self):
        """[B]: the last segment of this shard ends in one behind."""
        return self.own(_next(self.continues))


def _next(continues):
    """continues of the shard behind each; nothing follows the last."""
    return jnp.concatenate([continues[1:], jnp.zeros_like(continues[:1])])


def _rows(problem, named) -> _Rows:
    axis, segment_ids = problem.context_axis, named.get("segment_ids")
    shards, shard = lax.axis_size(axis), lax.axis_index(axis)
    B, T = named["v"].shape[:2]
    if segment_ids is None or T == 0:
        continues = jnp.broadcast_to((jnp.arange(shards) > 0)[:, None] & (T > 0), (shards, B))
        whole, counts = jnp.ones_like(continues), jnp.full((shards, B), min(T, 1), jnp.int32)
    else:
        valid, begins, _ = _segments.edges(segment_ids, problem.padding_segment_id)
        count = jnp.sum(begins, axis=1, dtype=jnp.int32)
        whole = (jnp.all(valid, axis=1) & (count == 1)).astype(jnp.int32)
        own = jnp.stack([segment_ids[:, 0], segment_ids[:, -1], count, whole])
        first, last, counts, whole = jnp.moveaxis(lax.all_gather(own, axis), 1, 0)
        whole = whole > 0
        padding = _segments.is_padding(first, problem.padding_segment_id)
        before = jnp.roll(last, 1, axis=0)
        continues = (jnp.arange(shards) > 0)[:, None] & ~padding & (first == before)
    started = counts - continues
    end = jnp.cumsum(started, axis=0)  # the slot behind the shard's last segment
    pick = lambda x: lax.dynamic_index_in_dim(x, shard, keepdims=False)
    return _Rows(
        continues=continues,
        inside=whole & continues & _next(continues),
        shard=shard,
        count=pick(counts),
        through=pick(whole & continues),
        first=pick(end - counts),
        unused=jnp.where(shard == shards - 1, end[-1], problem.max_segments),
    )


class _Parts(NamedTuple):
    """Which tokens [B, T] of a shard are which part of it; None throughout without segment ids,
    where each of head and tail is all of it and the middle nothing."""

    head: jax.Array | None
    middle: jax.Array | None
    tail: jax.Array | None


def _parts(problem, rows: _Rows, named) -> _Parts:
    """The tail of a shard that is its segment's end and no more is empty: the head is all of it."""
    if not problem.has_segment_ids:
        return _Parts(None, None, None)
    segment_ids = named["segment_ids"]
    column = lambda x: x[:, None]
    valid = ~_segments.is_padding(segment_ids, problem.padding_segment_id)
    segment, _ = _segments.places(segment_ids, problem.padding_segment_id)
    head = valid & column(rows.head) & (segment == 0)
    tail = valid & column(rows.continued) & (segment == column(rows.count) - 1)
    return _Parts(head, valid & ~head & ~tail, tail)


def _slots(states, first, size):
    """states[:, first[b] + i] for i < size, zero where there is no such slot: [B, size, ..]."""
    index = first[:, None] + jnp.arange(size, dtype=first.dtype)
    exists = (index >= 0) & (index < states.shape[1])
    across = lambda x: x.reshape(*x.shape, *[1] * (states.ndim - 2))
    clipped = jnp.clip(index, 0, states.shape[1] - 1)
    return jnp.where(across(exists), jnp.take_along_axis(states, across(clipped), axis=1), 0)


def _where(condition, x, y):
    """x or y, [B, ..] or 0, for each row; of what is not selected nothing remains."""
    rank = max(jnp.ndim(x), jnp.ndim(y))
    return jnp.where(condition.reshape(-1, *[1] * (rank - 1)), x, y)


# ---------------------------------------------------------------------------- forward and backward


def _attend_shard(problem: Problem, *operands):
    """The results of a shard, where `problem.context_axis` is manual."""
    axis = problem.context_axis
    operands = _primitives.vary_alike(_primitives.shard_alike(problem, operands), axis)
    if lax.axis_size(axis) == 1:
        results = _vjp.attend(dataclasses.replace(problem, context_axis=None), *operands)
    else:
        results = _attend(problem, *operands)
    named = dict(zip(problem.result_names, results, strict=True))
    if problem.return_final_state:  # shards fill different slots
        named["final_state"] = lax.psum(named["final_state"], axis)
    return tuple(named.values())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem, *operands):
    return _on_rows(problem, _forward, operands)[0]


def _forward_rule(problem, *operands):
    results, maps = _on_rows(problem, _forward, operands)
    if problem.residual_name is not None:
        name = functools.partial(checkpoint_name, name=problem.residual_name)
        operands, results, maps = jax.tree.map(name, (operands, results, maps))
    return results, (operands, maps)


def _backward_rule(problem, saved, cotangents):
    operands, maps = saved
    gradients = _on_rows(problem, _backward, (*operands, *maps, *cotangents))
    named = dict(zip(problem.differentiable_names, gradients, strict=True))
    return tuple(named.get(name) for name in problem.operand_names)


_attend.defvjp(_forward_rule, _backward_rule)

# What the backward needs of the forward besides its operands.
_MAPS = {"M": ("B", "HV", "K", "K"), "incoming": ("B", "HV", "K", "V")}


def _on_rows(problem, stage, operands):
    """`stage` of a shard; also where mesh axes of batch or heads are still Explicit."""
    mesh = _primitives.mesh_of(operands)
    call = functools.partial(stage, problem)
    if AxisType.Explicit not in mesh.axis_types:
        return call(*operands)
    batch, heads = _primitives.split(
        problem, operands, [jax.typeof(operand).sharding for operand in operands]
    )
    axes = problem.axes | _MAPS
    forward = tuple(axes[name] for name in problem.operand_names)
    results = tuple(axes[name] for name in problem.result_names)
    maps = tuple(_MAPS.values())
    return _shard_map(
        mesh,
        call,
        operands,
        forward if stage is _forward else (*forward, *maps, *results),
        (results, maps)
        if stage is _forward
        else tuple(axes[name] for name in problem.differentiable_names),
        {"B": batch, "H": heads, "HV": heads},
    )


def _forward(problem, *operands):
    """(results, (M, the state that comes in)) of a shard."""
    named = problem.named(operands)
    rows = _rows(problem, named)
    parts = _parts(problem, rows, named)
    initial = _initial_state(problem, named)
    M, B = _maps(problem, named, rows, parts, initial)
    incoming = _scan(problem.context_axis, rows, M, B)
    size = problem.max_segments if problem.has_initial_state or problem.return_final_state else 1
    states = _slots(initial, rows.first, size)
    states = states.at[:, 0].set(_where(rows.head, incoming, states[:, 0]))
    o, states = _run(problem, named, states)
    results = dict(o=o)
    if problem.return_final_state:
        ended = rows.count - rows.continued
        results["final_state"] = _spread(rows, [(states, rows.first, ended)], initial)
    return tuple(results[name] for name in problem.result_names), (M, incoming)


def _backward(problem, *operands):
    """The gradients of a shard's operands."""
    named = problem.named(operands)
    M, incoming, *cotangents = operands[len(named) :]
    d = dict(zip(problem.result_names, cotangents, strict=True))
    rows = _rows(problem, named)
    parts = _parts(problem, rows, named)
    initial = _initial_state(problem, named)
    d_final = d.get("final_state", jnp.zeros_like(initial))
    pull_back = functools.partial(_pull_back, problem, named, d["o"])

    # Head, from the gradient of its final state if it ends here. Inside a segment this is C, and
    # the gradients of the tokens are left to the tail.
    inside = rows.own(rows.inside)
    d_end = _where(inside, 0, _slots(d_final, rows.first, 1))
    d_head, C = pull_back(incoming[:, None], d_end, parts.head)
    d_state = _scan_back(problem.context_axis, rows, M, C[:, 0])

    # Tail, from what comes back of the shard behind.
    last = rows.first + rows.count - 1
    start = _where(rows.through, incoming[:, None], _slots(initial, last, 1))
    d_end = _where(rows.continued, d_state[:, None], _slots(d_final, last, 1))
    gradients, d_start = pull_back(start, d_end, parts.tail)
    began = ~rows.through
    d_slots = [(d_start, last, began.astype(jnp.int32))]
    if problem.has_segment_ids:
        # Middle: segments that begin and end here.
        began &= rows.continued
        first = rows.first + rows.head
        N = problem.max_segments
        d_middle, d_starts = pull_back(
            _slots(initial, first, N), _slots(d_final, first, N), parts.middle
        )
        gradients = _merge(parts, inside, d_head, d_middle, gradients)
        d_slots = [
            (d_start, last, began.astype(jnp.int32)),
            (d_starts, first, rows.count - rows.head - began),
        ]
    if problem.has_initial_state:
        gradients["initial_state"] = _spread(rows, d_slots, d_final)
    return tuple(gradients[name] for name in problem.differentiable_names)


def _initial_state(problem, named):
    """[B, N, HV, K, V], zeros where there is none."""
    if problem.has_initial_state:
        return named["initial_state"]
    v, K = named["v"], named["k"].shape[-1]
    B, _, HV, V = v.shape
    return jnp.zeros((B, problem.max_segments, HV, K, V), jnp.promote_types(v.dtype, jnp.float32))


def _spread(rows, parts, otherwise):
    """[B, N, ..] slots of the whole rows: `parts`, each (states, its first slot, how many there
    are); zero where they are another shard's; `otherwise` where there is no segment."""
    N = otherwise.shape[1]
    slot = jnp.arange(N, dtype=jnp.int32)
    across = lambda x: x.reshape(*x.shape, *[1] * (otherwise.ndim - 2))
    spread = jnp.where(across(slot >= rows.unused[:, None]), otherwise, 0)
    for states, first, count in parts:
        place = slot - first[:, None]
        mine = (place >= 0) & (place < count[:, None])
        spread = jnp.where(across(mine), _slots(states, -first, N), spread)
    return spread


def _merge(parts, inside, d_head, d_middle, d_tail):
    """Gradients of all tokens and parameters from those of the parts."""
    column = lambda mask, x: mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
    merged = {}
    for name, middle in d_middle.items():
        head, tail = d_head[name], d_tail[name]
        if name in ("A_log", "dt_bias"):
            merged[name] = middle + tail + _where(inside, 0, head)
        else:
            rest = jnp.where(column(parts.head, head), head, middle)
            merged[name] = jnp.where(column(parts.tail, tail), tail, rest)
    return merged


# ------------------------------------------------------------------------------------------- maps


def _maps(problem, named, rows, parts, initial):
    """M [B, HV, K, K], read inside of segments alone, and B [B, HV, K, V]: a shard hands M S + B of
    the state S that comes in to the next one, or B where its tail began in it."""
    start = _slots(initial, rows.first + rows.count - 1, 1)
    B = _run(problem, named, _where(rows.through, 0, start), parts.tail)[1]
    # Of no values nothing is written: from the identity on, the state is M.
    *batch_and_heads, K, _ = start.shape
    identity = jnp.broadcast_to(jnp.eye(K, dtype=start.dtype), (*batch_and_heads, K, K))
    v = named["v"]
    named = named | {"v": jnp.zeros((*v.shape[:3], K), v.dtype)}
    inside = None if parts.tail is None else parts.tail & rows.own(rows.inside)[:, None]
    M = _run(problem, named, identity, inside)[1]
    return M[:, 0], B[:, 0]


def _scan(axis, rows, M, B):
    """The state that comes into this shard, [B, HV, K, V]; zero where nothing does."""
    maps, K = lax.all_gather(jnp.concatenate([M, B], axis=-1), axis), M.shape[-1]
    state = jnp.zeros_like(B)
    for s in range(maps.shape[0] - 1):
        M, B = maps[s, ..., :K], maps[s, ..., K:]
        after = _where(rows.inside[s], _product(M, state) + B, B)
        after = _where(rows.continues[s + 1], after, 0)
        state = jnp.where(s < rows.shard, after, state)
    return state


def _scan_back(axis, rows, M, C):
    """The gradient of the state that this shard hands on, [B, HV, K, V]."""
    maps, K = lax.all_gather(jnp.concatenate([M, C], axis=-1), axis), M.shape[-1]
    d_state = jnp.zeros_like(C)
    for s in reversed(range(1, maps.shape[0])):
        M, C = maps[s, ..., :K], maps[s, ..., K:]
        before = _where(rows.inside[s], _product(jnp.swapaxes(M, -1, -2), d_state) + C, C)
        before = _where(rows.continues[s], before, 0)
        d_state = jnp.where(s > rows.shard, before, d_state)
    return d_state


def _product(a, b):
    return jnp.einsum("bhij,bhjv->bhiv", a, b, precision=lax.Precision.HIGHEST)


def _run(problem, named, states, mask=None):
    """(o, final states) of the op on the tokens of a shard that `mask` leaves, or on all."""
    problem, operands = _local(problem, named, states, mask)
    return _primitives.forward(problem, *operands)


def _pull_back(problem, named, d_o, states, d_states, mask):
    """The gradients of `_run` by name, and those of its states."""
    problem, operands = _local(problem, named, states, mask)
    gradients = _primitives.backward(problem, *operands, d_o, d_states)
    gradients = dict(zip(problem.differentiable_names, gradients, strict=True))
    d_states = gradients.pop("initial_state")
    return gradients, d_states


def _local(problem, named, states, mask):
    """The problem of one shard from given states, and its operands."""
    problem = dataclasses.replace(
        problem,
        context_axis=None,
        residual_name=None,
        max_segments=states.shape[1],
        return_final_state=True,
        has_initial_state=True,
    )
    named = named | {"initial_state": states}
    if mask is not None:  # negative ids are padding whatever else is
        named["segment_ids"] = jnp.where(mask, named["segment_ids"], -1)
    return problem, [named[name] for name in problem.operand_names]
