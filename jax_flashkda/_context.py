"""Context parallelism: T split over a mesh axis, each device a contiguous shard of every row.

A shard takes the state S of the segment that runs into it to M S + B, both of them [K, ..] and
float32, whatever its length. So shards exchange their maps (M, B), not tokens:

    forward     M and B of each shard; all_gather; S of each shard by S <- M S + B over the shards
                before it; then the op on the shard, from S.
    backward    C, the gradient of S with none from behind; all_gather of (M, C);
                dS <- M^T dS + C over the shards after it; then the op's gradient on the shard.

Segments are those of the whole row: equal ids on both sides of an edge are one segment. What a row
needs of them are few numbers of each shard, which are exchanged first (`_Rows`). A shard lies
*inside* of a segment that goes on on both sides; else it ends the segment that begins it. Maps are
those of the segment that ends a shard, C is that of the segment that begins it, and what finds them
walks no other. It prepares all tokens, for the op that follows. Shards are cut into pieces, rows of
their own that know of each other what shards do: few long rows of few heads would leave most of a
device idle.

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
from ._segments import CHUNK

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
    """Where the segments of pieces lie in their rows: of all pieces of all shards [R, P, B], or of
    those of this shard [B, P]."""

    continues: jax.Array  # [R, P, B]: the first segment goes on with the last one of that before
    inside: jax.Array  # [R, P, B]: the piece lies inside one segment, which goes on on both sides
    shard: jax.Array  # []
    count: jax.Array  # [B, P]: segments of the piece
    through: jax.Array  # [B, P]: the piece is the middle or the end of one segment, and no more
    first: jax.Array  # [B, P]: state slot of its first segment
    unused: jax.Array  # [B]: first slot without a segment; N but for the last shard: no other fills

    def own(self, x):
        """[B, P] of this shard, of [R, P, B]."""
        return lax.dynamic_index_in_dim(x, self.shard, keepdims=False).T

    @property
    def head(self):
        """[B, P]: the first segment of a piece began in one before."""
        return self.own(self.continues)

    @property
    def continued(self):
        """[B, P]: the last segment of a piece ends in one behind."""
        return self.own(_next(self.continues))


def _next(continues):
    """continues of the piece behind each; nothing follows the last."""
    flat = continues.reshape(-1, continues.shape[-1])
    return jnp.concatenate([flat[1:], jnp.zeros_like(flat[:1])]).reshape(continues.shape)


def _rows(problem, named, pieces) -> _Rows:
    axis, segment_ids = problem.context_axis, named.get("segment_ids")
    shards, shard = lax.axis_size(axis), lax.axis_index(axis)
    B, T = named["v"].shape[:2]
    in_order = lambda x: jnp.moveaxis(x.reshape(shards, B, pieces), 1, 2).reshape(-1, B)
    not_first = jnp.arange(shards * pieces)[:, None] > 0
    if segment_ids is None or T == 0:
        continues = jnp.broadcast_to(not_first & (T > 0), (shards * pieces, B))
        whole, counts = jnp.ones_like(continues), jnp.full(continues.shape, min(T, 1), jnp.int32)
    else:
        ids = segment_ids.reshape(B * pieces, T // pieces)
        valid, begins, _ = _segments.edges(ids, problem.padding_segment_id)
        count = jnp.sum(begins, axis=1, dtype=jnp.int32)
        whole = (jnp.all(valid, axis=1) & (count == 1)).astype(jnp.int32)
        own = jnp.stack([ids[:, 0], ids[:, -1], count, whole])
        gathered = jnp.moveaxis(lax.all_gather(own, axis), 1, 0)
        first, last, counts, whole = (in_order(x) for x in gathered)
        whole = whole > 0
        padding = _segments.is_padding(first, problem.padding_segment_id)
        continues = not_first & ~padding & (first == jnp.roll(last, 1, axis=0))
    started = counts - continues
    end = jnp.cumsum(started, axis=0, dtype=jnp.int32)  # the slot behind the last segment
    of_shards = lambda x: x.reshape(shards, pieces, B)
    pick = lambda x: lax.dynamic_index_in_dim(of_shards(x), shard, keepdims=False).T
    return _Rows(
        continues=of_shards(continues),
        inside=of_shards(whole & continues) & _next(of_shards(continues)),
        shard=shard,
        count=pick(counts),
        through=pick(whole & continues),
        first=pick(end - counts),
        unused=jnp.where(shard == shards - 1, end[-1], problem.max_segments),
    )


def _slots(states, first, size):
    """states[b, first[b, p] + i] for i < size, [B, P, size, ..]; zero where there is none."""
    index = first[..., None] + jnp.arange(size, dtype=first.dtype)
    exists = (index >= 0) & (index < states.shape[1])
    clipped = jnp.clip(index, 0, states.shape[1] - 1).reshape(len(index), -1)
    found = jnp.take_along_axis(states, _across(clipped, states.ndim), axis=1)
    return _where(exists, found.reshape(*index.shape, *states.shape[2:]), 0)


def _across(x, rank):
    """x with axes of size 1 behind its own."""
    return x.reshape(*x.shape, *[1] * (rank - x.ndim))


def _where(condition, x, y):
    """x or y, of the condition's axes and more, or 0; of what is not selected nothing remains."""
    return jnp.where(_across(condition, max(jnp.ndim(x), jnp.ndim(y))), x, y)


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

# JAX 0.9.1 does not end lowering collectives of one shard_map inside of another.
_NESTED = (0, 12, 0)

# What the backward needs of the forward besides its operands, of P pieces of a shard: their maps,
# and the states that come into them.
_SAVED = {"M": ("B", "P", "HV", "K", "K"), "ahead": ("B", "P", "HV", "K", "V")}


def _on_rows(problem, stage, operands):
    """`stage` of a shard; also where mesh axes of batch or heads are still Explicit."""
    mesh, call = _primitives.mesh_of(operands), functools.partial(stage, problem)
    if AxisType.Explicit not in mesh.axis_types:
        return call(*operands)
    if jax.__version_info__ < _NESTED:
        raise NotImplementedError(
            f"context_axis={problem.context_axis!r} inside of a shard_map that leaves other mesh "
            "axes Explicit needs JAX 0.12: make them manual too (leave axis_names out), or call it "
            "outside of shard_map"
        )
    shardings = [jax.typeof(operand).sharding for operand in operands]
    batch, heads = _primitives.split(problem, operands, shardings)
    axes, saved = problem.axes, tuple(_SAVED.values())
    arguments = tuple(axes[name] for name in problem.operand_names)
    results = tuple(axes[name] for name in problem.result_names)
    if stage is _forward:
        result_axes = results, saved
    else:
        arguments = (*arguments, *saved, *results)
        result_axes = tuple(axes[name] for name in problem.differentiable_names)
    split = {"B": batch, "H": heads, "HV": heads}
    return _shard_map(mesh, call, operands, arguments, result_axes, split)


def _forward(problem, *operands):
    """(results, (M, states ahead of pieces)) of a shard."""
    named = problem.named(operands)
    pieces = _pieces(named)
    rows, initial = _rows(problem, named, pieces), _initial_state(problem, named)
    M, B, prepared = _maps(problem, named, pieces)
    # Behind a piece, from where the segment that ends it begins: from no state if that came in.
    start = _slots(initial, rows.first + rows.count - 1, 1)[:, :, 0]
    behind = _product(M, _where(rows.through, 0, start)) + B
    incoming = _scan(
        problem.context_axis, rows, _total(M), _states(rows, M, behind, jnp.zeros_like(B[:, 0]))[-1]
    )
    ahead = jnp.stack(_states(rows, M, behind, incoming)[:-1], axis=1)
    o, ends = _run(problem, named, _starts(problem, rows, initial, ahead), prepared)
    results = dict(o=o)
    if problem.return_final_state:
        results["final_state"] = _spread(rows, ends, 0, rows.count - rows.continued, initial)
    return tuple(results[name] for name in problem.result_names), (M, ahead)


def _backward(problem, *operands):
    """The gradients of a shard's operands, from these, `_SAVED` and the results' cotangents."""
    named = problem.named(operands)
    M, ahead, *cotangents = operands[len(named) :]
    d = dict(zip(problem.result_names, cotangents, strict=True))
    rows, initial = _rows(problem, named, M.shape[1]), _initial_state(problem, named)
    d_final = d.get("final_state", jnp.zeros_like(initial))
    starts = _starts(problem, rows, initial, ahead)
    slots = starts.shape[2]
    # What ends here gets its slot's gradient, what goes on that of the state behind the piece.
    d_ends = _slots(d_final, rows.first, slots)
    last = jnp.minimum(rows.count, slots) - 1
    goes_on = rows.continued[..., None] & (jnp.arange(slots) == last[..., None])
    C, prepared = _state_gradients(problem, named, d["o"], _where(goes_on, 0, d_ends))
    d_first = _states_back(rows, M, C, jnp.zeros_like(C[:, 0]))[0]
    d_state = _scan_back(problem.context_axis, rows, _total(M), d_first)
    d_behind = jnp.stack(_states_back(rows, M, C, d_state)[1:], axis=1)
    d_ends = _where(goes_on, d_behind[:, :, None], d_ends)
    gradients, d_starts = _pull_back(problem, named, d["o"], starts, d_ends, prepared)
    if problem.has_initial_state:
        gradients["initial_state"] = _spread(rows, d_starts, rows.head, rows.count, d_final)
    return tuple(gradients[name] for name in problem.differentiable_names)


def _starts(problem, rows, initial, ahead):
    """What the segments of pieces start from, [B, P, slots, ..]."""
    states = _slots(initial, rows.first, _slot_count(problem))
    return states.at[:, :, 0].set(_where(rows.head, ahead, states[:, :, 0]))


def _slot_count(problem):
    """Of a piece. Packed rows have one more than states are wanted of, for the segment that goes on
    in the next piece."""
    if not problem.has_segment_ids:
        return 1
    wanted = problem.has_initial_state or problem.return_final_state
    return 1 + (problem.max_segments if wanted else 1)


def _initial_state(problem, named):
    """[B, N, HV, K, V], zeros where there is none."""
    if problem.has_initial_state:
        return named["initial_state"]
    v, K = named["v"], named["k"].shape[-1]
    B, _, HV, V = v.shape
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    return jnp.zeros((B, problem.max_segments, HV, K, V), dtype)


def _spread(rows, states, begin, end, otherwise):
    """[B, N, ..] slots of whole rows: of the states [B, P, slots, ..] of pieces those from begin to
    end, [B, P] each; zero where they are another shard's; `otherwise` where no segment is."""
    N = otherwise.shape[1]
    slot = jnp.arange(N, dtype=jnp.int32)
    spread = _where(slot >= rows.unused[:, None], otherwise, 0)
    begin = jnp.broadcast_to(begin, end.shape)
    for p in range(states.shape[1]):
        place = slot - rows.first[:, p, None]
        mine = (place >= begin[:, p, None]) & (place < end[:, p, None])
        found = _slots(states[:, p], -rows.first[:, p, None], N)[:, 0]
        spread = _where(mine, found, spread)
    return spread


# ------------------------------------------------------------------------------------------- maps


def _scan(axis, rows, M, B):
    """The state that comes into this shard, [B, HV, K, V]; zero where nothing does."""
    maps, K = lax.all_gather(jnp.concatenate([M, B], axis=-1), axis), M.shape[-1]
    state = jnp.zeros_like(B)
    for s in range(maps.shape[0] - 1):
        M, B = maps[s, ..., :K], maps[s, ..., K:]
        after = _where(jnp.all(rows.inside[s], axis=0), _product(M, state) + B, B)
        after = _where(rows.continues[s + 1, 0], after, 0)
        state = jnp.where(s < rows.shard, after, state)
    return state


def _scan_back(axis, rows, M, C):
    """The gradient of the state that this shard hands on, [B, HV, K, V]; zero where none does."""
    maps, K = lax.all_gather(jnp.concatenate([M, C], axis=-1), axis), M.shape[-1]
    d_state = jnp.zeros_like(C)
    for s in reversed(range(1, maps.shape[0])):
        M, C = maps[s, ..., :K], maps[s, ..., K:]
        before = _product(M, d_state, transposed=True) + C
        before = _where(jnp.all(rows.inside[s], axis=0), before, C)
        before = _where(rows.continues[s, 0], before, 0)
        d_state = jnp.where(s > rows.shard, before, d_state)
    return d_state


def _states(rows, M, B, state):
    """The states ahead of all P pieces of a shard and behind the last, from that ahead of the
    first; zero where no segment goes on."""
    inside, continued, states = rows.own(rows.inside), rows.continued, [state]
    for p in range(M.shape[1]):
        after = _where(inside[:, p], _product(M[:, p], states[-1]) + B[:, p], B[:, p])
        states.append(_where(continued[:, p], after, 0))
    return states


def _states_back(rows, M, C, d_state):
    """The gradients of these states, from that of the last."""
    inside, head, d_states = rows.own(rows.inside), rows.head, [d_state]
    for p in reversed(range(M.shape[1])):
        before = _product(M[:, p], d_states[-1], transposed=True) + C[:, p]
        before = _where(inside[:, p], before, C[:, p])
        d_states.append(_where(head[:, p], before, 0))
    return d_states[::-1]


def _total(M):
    """M of all pieces of a shard together."""
    return functools.reduce(
        lambda total, p: _product(M[:, p], total), range(1, M.shape[1]), M[:, 0]
    )


def _product(M, state, transposed=False):
    rule = "...ji,...jv->...iv" if transposed else "...ij,...jv->...iv"
    return jnp.einsum(rule, M, state, precision=lax.Precision.HIGHEST)


# ------------------------------------------------------------------------- the op on the own shard

# Pieces fill the 132 multiprocessors of an H200, and are long enough for what each costs besides.
_CHAINS, _LEAST_PIECE = 132, 8 * CHUNK


def _pieces(named):
    """How many rows to make of each: all equal, of whole chunks. By the shape, whatever runs it."""
    B, T, HV, _ = named["v"].shape
    fits = lambda p: T % (p * CHUNK) == 0 and T >= p * _LEAST_PIECE
    return next((p for p in range(_CHAINS // max(B * HV, 1), 1, -1) if fits(p)), 1)


def _maps(problem, named, pieces):
    """M [B, P, HV, K, K] and B [B, P, HV, K, V] of the segment that ends each piece, anything where
    none does; and what was prepared of the tokens."""
    changes = dict(return_final_state=False, has_initial_state=False)
    problem = _local(problem, _slot_count(problem), **changes)
    operands = _cut(problem.signature("state_maps")[0], named, pieces)
    M, B, *prepared = _primitives.state_maps(problem, *operands)
    return *(x.reshape(-1, pieces, *x.shape[1:]) for x in (M, B)), prepared


def _run(problem, named, states, prepared):
    """(o, final states), from states [B, P, slots, ..]."""
    problem = _local(problem, states.shape[2])
    given = named | {"initial_state": states}
    operands = _cut(problem.operand_names, given, states.shape[1])
    o, ends = _primitives.prepared_forward(problem, *operands, *prepared)
    return o.reshape(named["v"].shape), ends.reshape(states.shape)


def _state_gradients(problem, named, d_o, d_ends):
    """C [B, P, HV, K, V]: the gradients of the states ahead of pieces, anything where no segment
    begins one; from those of final states [B, P, slots, ..]. And what was prepared."""
    problem = _local(problem, d_ends.shape[2])
    given = named | {"initial_state": d_ends, "o": d_o, "final_state": d_ends}
    operands = _cut(problem.signature("state_gradient")[0], given, d_ends.shape[1])
    C, *prepared = _primitives.state_gradient(problem, *operands)
    return C.reshape(d_ends.shape)[:, :, 0], prepared


def _pull_back(problem, named, d_o, states, d_ends, prepared):
    """The gradients of `_run` by name and of its states."""
    problem, pieces = _local(problem, states.shape[2]), states.shape[1]
    given = named | {"initial_state": states, "o": d_o, "final_state": d_ends}
    operands = _cut(problem.signature("backward")[0], given, pieces)
    results = _primitives.prepared_backward(problem, *operands, *prepared)
    gradients = dict(zip(problem.differentiable_names, results, strict=True))
    d_states = gradients.pop("initial_state").reshape(states.shape)
    for name, x in gradients.items():
        if name in ("A_log", "dt_bias"):
            gradients[name] = x.reshape(-1, pieces, *x.shape[1:]).sum(axis=1)
        else:
            gradients[name] = x.reshape(named[name].shape)
    return gradients, d_states


def _local(problem, max_segments, **changes):
    """The problem of the shard alone."""
    changes = dict(return_final_state=True, has_initial_state=True) | changes
    return dataclasses.replace(
        problem, context_axis=None, residual_name=None, max_segments=max_segments, **changes
    )


def _cut(names, named, pieces):
    """Operands in the order of `names`, of pieces as rows; states come as [B, P, slots, ..]."""

    def cut(name, x):
        if name in ("A_log", "dt_bias"):
            return jnp.repeat(x, pieces, axis=0)
        if name in ("initial_state", "final_state"):
            return x.reshape(len(x) * pieces, *x.shape[2:])
        return x.reshape(len(x) * pieces, x.shape[1] // pieces, *x.shape[2:])

    return [cut(name, named[name]) for name in names]
