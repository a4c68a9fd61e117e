"""T split over a mesh axis: op, short convolution and layer compute what one device computes."""

import collections
import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from call import for_implementation, run
from cases import Case, layout, runs
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import CAP_FP32, CAPS_16_BIT, GRADIENTS, check
from test_transforms import count

from jax_flashkda import _context, _primitives, kimi_delta_attention, short_conv
from jax_flashkda._problem import PREPARED, Problem

SHARDS, SHARD = 4, 70  # more than a chunk, and no multiple of one
T = SHARDS * SHARD
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
STAGES = ("forward", "backward", "state_maps", "state_gradient")
STAGES += ("prepared_forward", "prepared_backward")


def row(*lengths):
    """Ids of one row, of runs (id, length); the last one fills it."""
    ids = np.repeat(*np.array(lengths, np.int32).T)
    return tuple(np.pad(ids, (0, T - len(ids)), mode="edge").tolist())


ROWS = {
    "edges": (
        # Borders exactly at edges, an id used again behind an edge, a shard inside a segment.
        row((1, SHARD), (2, SHARD), (1, 1)),
        # A segment over three edges, more segments than slots before it, the last one one token.
        row((5, 3), (6, 1), (7, 1), (6, 20), (8, T - 26), (9, 1)),
        # Padding before an edge, on both sides of one between two runs of an id, in a whole shard.
        row((3, SHARD - 2), (0, 2), (3, SHARD - 1), (-1, 2), (4, 9), (-7, 1)),
        row((2**31 - 1, 1)),
    ),
    "one-token": (
        # Alone on one side of an edge, on both, and last in the row.
        row((1, 69), (2, 1), (3, 1), (4, 69), (5, 69), (6, 2), (7, 68), (8, 1)),
        row((0, T - 1), (1, 1)),
        row((1, 1), (0, 1)),
        row((0, SHARD), (1, 1), (0, 2 * SHARD - 2), (2, 1), (-3, 1)),
    ),
    "padding": tuple(row((i, 1)) for i in (0, -1, 0, -(2**31))),
}  # fmt: skip
ROWS |= {f"random-{i}": tuple(layout(np.random.default_rng(4 * i + j), T) for j in range(4))
         for i in range(4)}  # fmt: skip
PACKED = Case(
    T=T, B=4, H=1, HV=2, K=16, V=8, gate="softplus", A_log=True, dt_bias=True,
    beta_is_logits=True, qk_l2norm=True, initial_state=True, final_state=True,
    segment_ids=ROWS["edges"], max_segments=3,
)  # fmt: skip
WHOLE = Case(
    T=T, B=2, H=2, HV=4, K=16, V=8, gate="bounded", dt_bias=True,
    initial_state=True, final_state=True,
)  # fmt: skip


def mesh_of(*types, shape=(2, SHARDS)):
    if jax.device_count() < np.prod(shape):
        pytest.skip(f"needs {np.prod(shape)} devices")
    return jax.make_mesh(shape, ("x", "t")[-len(shape) :], axis_types=types)


def specs(case, names, batch=None, heads=None, tokens="t"):
    """Where arguments, results and gradients lie, by name."""
    primal = {d: name for name, d in GRADIENTS.items()}
    slots = () if case.segment_ids is None else (None,)
    found = {}
    for name in names:
        kind = primal.get(name, name)
        if kind in ("A_log", "dt_bias"):
            found[name] = P(heads)
        elif kind in ("initial_state", "final_state"):
            found[name] = P(batch, *slots, heads)
        else:
            found[name] = P(batch, tokens, *(() if kind == "segment_ids" else (heads,)))
    return found


def result_names(case):
    floats = [name for name in case.arrays() if name != "segment_ids"]
    states = ("final_state",) if case.final_state else ()
    return ("o", *states, *(GRADIENTS[name] for name in floats))


def all_specs(case, **where):
    """Specs of the arrays, of the cotangents and of `result_names`."""
    states = ("final_state",) if case.final_state else ()
    cotangents = tuple(specs(case, ("o", *states), **where).values())
    return (
        specs(case, case.arrays(), **where),
        cotangents if case.final_state else cotangents[0],
        specs(case, result_names(case), **where),
    )


def with_gradients(case, implementation="xla", wrap=lambda attend: attend, **more):
    """A function of the case's arrays and cotangents, with the results of `call.run`. `wrap` gets
    the op alone, a function of the arrays."""
    options = {n: x for n, x in case.options.items() if x is not None or n == "padding_segment_id"}
    options |= dict(context_axis="t", implementation=implementation) | more

    @wrap
    def attend(arrays):
        arrays = dict(arrays)
        tokens = [arrays.pop(name) for name in ("q", "k", "v", "g", "beta")]
        return kimi_delta_attention(*tokens, **arrays, **options)

    def compute(arrays, cotangents):
        ids = {name: x for name, x in arrays.items() if name == "segment_ids"}
        floats = {name: x for name, x in arrays.items() if name != "segment_ids"}
        results, pull_back = jax.vjp(lambda floats: attend(floats | ids), floats)
        (d,) = pull_back(cotangents)
        results = results if case.final_state else (results,)
        got = dict(zip(("o", "final_state"), results, strict=False))
        return got | {GRADIENTS[name]: x for name, x in d.items()}

    return compute


def shard_mapped(case, mesh, implementation="xla", **where):
    """Forward and backward inside of one shard_map."""
    arrays, cotangents, results = all_specs(case, **where)
    return jax.shard_map(
        with_gradients(case, implementation),
        mesh=mesh,
        in_specs=(arrays, cotangents),
        out_specs=results,
    )


def assert_same(case, got):
    """What one device computes, to the relative error that fp32 promises."""
    wanted = run(case, "xla", quickly=True)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_close(got[name], wanted[name], name)


def assert_close(x, y, name):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert x.shape == y.shape, name
    assert np.isfinite(x).all(), name
    error, size = np.sqrt(np.mean((x - y) ** 2)), np.sqrt(np.mean(y**2))
    assert error <= CAP_FP32 * size, f"{name}: relative error {error / size:.2e}"


def put(mesh, values, where):
    """`values` placed as their specs say."""
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), values, where)


def placed(case, mesh, **where):
    arrays, cotangents, _ = all_specs(case, **where)
    return put(mesh, case.arrays(), arrays), put(mesh, case.cotangents(), cotangents)


def communicated(compiled):
    """Counter of (kind, shape), one entry for each tensor of each collective."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = collections.Counter()
    for types, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text()):
        for shape in re.findall(r"\w+\[([\d,]*)\]", types):
            found[kind, tuple(int(size) for size in shape.split(",") if size)] += 1
    return found


# ------------------------------------------------------------------------------------------ the op


@functools.cache
def packed_program(pieces):
    """Rows over x, T over t, compiled once."""
    mapped = shard_mapped(PACKED, mesh_of(AUTO, AUTO), batch="x")
    with mock.patch.object(_context, "_pieces", lambda named: pieces):
        return jit(mapped).lower(PACKED.arrays(), PACKED.cotangents()).compile()


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("rows", ROWS)
def test_segments_across_edges(rows, pieces):
    """Of shards, and of the pieces that a shard is cut into."""
    case = dataclasses.replace(PACKED, segment_ids=ROWS[rows], seed=len(rows))
    got = packed_program(pieces)(case.arrays(), case.cotangents())
    if rows == "padding":
        arrays, (_, d_final) = case.arrays(), case.cotangents()
        np.testing.assert_array_equal(got.pop("final_state"), arrays["initial_state"])
        np.testing.assert_array_equal(got.pop("d_initial_state"), d_final)
        assert not any(np.any(x) for x in got.values())
    else:
        assert_same(case, got)


def test_what_is_communicated():
    """Maps of states, a few numbers of each row, and sums of what is shared."""
    B, (H, K, V) = 2, (PACKED.HV, PACKED.K, PACKED.V)  # rows of one device
    maps, states = (SHARDS, B, H, K, K + V), (B, PACKED.N, H, K, V)
    found = communicated(packed_program(1))
    numbers = found.pop(("all-gather", (SHARDS, 4, B)))
    assert 1 <= numbers <= 2  # XLA may see that forward and backward ask for the same
    assert found == {
        ("all-gather", maps): 2,
        ("all-reduce", states): 2,  # final_state, d_initial_state
        ("all-reduce", (B, H)): 1,
        ("all-reduce", (B, H, K)): 1,
    }


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("n", range(3))
def test_nothing_leaves_a_segment(n, pieces):
    """The n-th segment of every row is NaN, and so are its state, its cotangents and padding."""
    arrays, (d_o, d_final) = PACKED.arrays(), PACKED.cotangents()
    bad_tokens, bad_slots = np.zeros((4, T), bool), np.zeros((4, 3), bool)
    padding = np.isin(PACKED.ids, (0, -1, -7))
    for b, ids in enumerate(PACKED.segment_ids):
        for start, length in runs(ids)[n : n + 1]:
            bad_tokens[b, start : start + length] = bad_slots[b, n] = True

    def poison(x, mask):
        return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), jnp.nan, x)

    poisoned = {
        name: poison(arrays[name], bad_tokens | padding) for name in ("q", "k", "v", "g", "beta")
    }
    poisoned["initial_state"] = poison(arrays["initial_state"], bad_slots)
    cotangents = poison(d_o, bad_tokens | padding), poison(d_final, bad_slots)
    clean = packed_program(pieces)(arrays, (d_o, d_final))
    got = packed_program(pieces)(arrays | poisoned, cotangents)
    for name in clean.keys() - {"dA_log", "d_dt_bias"}:
        bad = bad_slots if name in ("final_state", "d_initial_state") else bad_tokens
        x, y = (np.asarray(values[name])[~bad] for values in (got, clean))
        np.testing.assert_array_equal(x, y, err_msg=name)
        assert np.isnan(np.asarray(got[name])[bad]).any() or not bad.any(), name


def test_gradient_of_shard_map_without_vma():
    """And shards so long that the op cuts them into pieces."""
    case = dataclasses.replace(WHOLE, T=2048, B=1, K=8, V=4)
    arrays, results, _ = all_specs(case)
    shard = {name: x[:, :1024] for name, x in case.arrays().items() if name in ("k", "v")}
    assert _context._pieces(shard) == 2
    wrap = functools.partial(
        jax.shard_map,
        mesh=mesh_of(AUTO, shape=(2,)),
        in_specs=(arrays,),
        out_specs=results,
        check_vma=False,
    )
    assert_same(case, jit(with_gradients(case, wrap=wrap))(case.arrays(), case.cotangents()))


def forward_of(case, **options):
    """A function of the case's arrays: o and final_state."""
    given = {name: x for name, x in case.options.items() if x is not None} | options
    return lambda arrays: kimi_delta_attention(**arrays, **given)


def test_explicit_mesh():
    """Heads on another axis; rows that are one segment each."""
    mesh = mesh_of(EXPLICIT, EXPLICIT)
    arrays, _ = placed(WHOLE, mesh, heads="x")
    with jax.set_mesh(mesh):
        compiled = jit(forward_of(WHOLE, context_axis="t")).lower(arrays).compile()
    wanted = run(WHOLE, "xla", gradients=False, quickly=True)
    where = all_specs(WHOLE, heads="x")[2]
    for name, x in zip(("o", "final_state"), compiled(arrays), strict=True):
        assert_close(x, wanted[name], name)
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, where[name]), x.ndim), name
    # The maps of the heads of one device, and the final state.
    B, (H, K, V) = WHOLE.B, (WHOLE.HV // 2, WHOLE.K, WHOLE.V)
    maps, states = (SHARDS, B, H, K, K + V), (B, 1, H, K, V)
    assert communicated(compiled) == {("all-gather", maps): 1, ("all-reduce", states): 1}


def test_explicit_mesh_that_only_the_arrays_know():
    """T is brought to the axis where it is whole."""
    mesh = mesh_of(EXPLICIT, EXPLICIT)
    (arrays, _), (_, cotangents) = (
        placed(WHOLE, mesh, heads="x", tokens=tokens) for tokens in (None, "t")
    )
    got = jax.eval_shape(jax.jit(with_gradients(WHOLE)), arrays, cotangents)
    assert got["o"].sharding.spec == P(None, "t", "x", None)
    assert got["dq"].sharding.spec == P(None, None, "x", None)


@pytest.mark.parametrize("types", [(EXPLICIT, EXPLICIT), (AUTO, EXPLICIT)], ids=str)
def test_inside_a_partly_manual_shard_map(types):
    """t is manual, batch or heads are left to an axis that is not: the program can be lowered."""
    mesh = mesh_of(*types)
    arrays, cotangents, results = all_specs(PACKED)
    mapped = jax.shard_map(
        with_gradients(PACKED),
        mesh=mesh,
        in_specs=(arrays, cotangents),
        out_specs=results,
        axis_names={"t"},
    )
    with jax.set_mesh(mesh):
        if EXPLICIT == types[0] and jax.__version_info__ < _context._NESTED:
            with pytest.raises(NotImplementedError, match="needs JAX 0.12: make them manual too"):
                jit(mapped).lower(*placed(PACKED, mesh, batch="x"))
        else:
            jit(mapped).lower(*placed(PACKED, mesh, batch="x"))


def test_auto_mesh_by_name():
    mesh = mesh_of(AUTO, AUTO)
    arrays, _ = placed(PACKED, mesh, batch="x")
    with jax.set_mesh(mesh):
        compiled = jit(forward_of(PACKED, context_axis="t")).lower(arrays).compile()
    wanted = run(PACKED, "xla", quickly=True)
    o, final_state = compiled(arrays)
    assert_close(o, wanted["o"], "o")
    assert_close(final_state, wanted["final_state"], "final_state")
    assert o.sharding.is_equivalent_to(NamedSharding(mesh, P("x", "t")), o.ndim)
    assert not [shape for _, shape in communicated(compiled) if T in shape or SHARD in shape]


def test_vmap():
    """Two calls that share their keys, of shards of three tokens."""
    case = Case(T=12, B=1, H=1, HV=1, K=4, V=3, final_state=True)
    arrays = case.arrays()
    many = jnp.stack([arrays["v"], arrays["v"][:, ::-1]])
    tokens = [arrays[name] for name in ("q", "k", "g", "beta")]

    def attend(many, q, k, g, beta, axis="t"):
        one = lambda v: kimi_delta_attention(
            q, k, v, g, beta, return_final_state=True, context_axis=axis
        )
        return jax.vmap(one)(many)

    mesh = mesh_of(AUTO, shape=(4,))
    got = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(P(None, None, "t"), *[P(None, "t")] * 4),
        out_specs=(P(None, None, "t"), P()),
    )
    wanted = jit(functools.partial(attend, axis=None))(many, *tokens)
    for x, y in zip(jit(got)(many, *tokens), wanted, strict=True):
        assert_close(x, y, "vmap")


def test_no_tokens():
    case = dataclasses.replace(PACKED, T=0, segment_ids=((),) * 4)
    arrays, (d_o, d_final) = case.arrays(), case.cotangents()
    got = jit(shard_mapped(case, mesh_of(AUTO, shape=(4,))))(arrays, (d_o, d_final))
    np.testing.assert_array_equal(got["final_state"], arrays["initial_state"])
    np.testing.assert_array_equal(got["d_initial_state"], d_final)
    assert got["o"].shape == d_o.shape and not np.any(got["dA_log"])


def calls(mapped, case):
    jaxpr = jax.make_jaxpr(mapped)(case.arrays(), case.cotangents()).jaxpr
    found = {stage: count(jaxpr, f"kda_{stage}") for stage in STAGES}
    return {stage: n for stage, n in found.items() if n}


def test_one_shard_is_the_plain_op():
    found = calls(shard_mapped(PACKED, mesh_of(AUTO, shape=(1,))), PACKED)
    assert found == dict(forward=1, backward=1)


ONCE = dict(state_maps=1, prepared_forward=1, state_gradient=1, prepared_backward=1)


@pytest.mark.parametrize("case", [PACKED, WHOLE], ids=["packed", "whole"])
def test_a_shard_is_prepared_once(case):
    """In either direction: what finds the maps hands it on."""
    assert calls(shard_mapped(case, mesh_of(AUTO, shape=(4,))), case) == ONCE


def test_named_residuals():
    """Saved by name, nothing of the forward is computed again; else the maps are."""
    arrays, cotangents, results = all_specs(PACKED)

    def calls_with(policy):
        wrap = lambda attend: jax.checkpoint(attend, policy=policy) if policy else attend
        mapped = jax.shard_map(
            with_gradients(PACKED, wrap=wrap, residual_name="kda"),
            mesh=mesh_of(AUTO, AUTO),
            in_specs=(arrays, cotangents),
            out_specs=results,
        )
        return calls(mapped, PACKED)

    policies = jax.checkpoint_policies
    assert calls_with(None) == ONCE
    assert calls_with(policies.save_only_these_names("kda")) == ONCE
    assert calls_with(policies.nothing_saveable) == ONCE | dict(state_maps=2)


# ----------------------------------------------------------------------------- refusals


def refused(match, mesh=None, axis="t", call=None, **changes):
    case = dataclasses.replace(WHOLE, **changes)
    attend = with_gradients(case, context_axis=axis)
    call = call or (lambda: jax.eval_shape(attend, case.arrays(), case.cotangents()))
    with pytest.raises((ValueError, TypeError), match=match):
        if mesh is None:
            call()
        else:
            with jax.set_mesh(mesh):
                call()


def test_refusals():
    mesh, explicit = mesh_of(AUTO, AUTO), mesh_of(EXPLICIT, EXPLICIT)
    refused(
        r"context_axis: got 't', but there is no mesh; .* jax.shard_map .* jax.set_mesh\(mesh\)"
    )
    refused("context_axis: got 'z', but the mesh has axes 'x', 't'; name one", mesh, axis="z")
    refused("4 devices T = 70 is to be split; a multiple of 4 is accepted", mesh, T=70)
    refused("context_axis: got 3; the name of a mesh axis or None is accepted", axis=3)
    arguments = placed(WHOLE, explicit, batch="x", tokens=None)
    attend = with_gradients(WHOLE, context_axis="x")
    refused("that axis splits the batch already", call=lambda: jax.eval_shape(attend, *arguments))
    arrays = WHOLE.arrays()
    chunk_states = lambda: kimi_delta_attention(
        **arrays, gate="bounded", return_chunk_states=True, context_axis="t"
    )
    refused("return_chunk_states: got True with context_axis='t'", mesh, call=chunk_states)
    x, kernel = arrays["q"], jnp.ones((4, 2, 16))
    conv = functools.partial(short_conv, x, kernel, context_axis="t")
    refused("short_conv:\n  context_axis: got 't', but there is no mesh", call=conv)
    conv = functools.partial(conv, initial_state=jnp.ones((2, 3, 2, 16)))
    refused("context_axis='t' is not for rows with an initial_state", mesh, call=conv)


# ------------------------------------------------------------------------ convolution and layer


@pytest.mark.parametrize(
    "shard, width, packed", [(SHARD, 4, True), (2, 6, True), (1, 3, False), (3, 1, True)]
)
def test_short_conv(shard, width, packed):
    """Shards shorter than the window see more than their neighbour."""
    tokens, rng = SHARDS * shard, np.random.default_rng(shard)
    x, dy = (jnp.asarray(rng.standard_normal((4, tokens, 2, 3)), jnp.float32) for _ in range(2))
    kernel = jnp.asarray(rng.standard_normal((width, 2, 3)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((2, 3)), jnp.float32)
    ids = jnp.asarray([r[SHARD - shard :][:tokens] for r in ROWS["edges"]], jnp.int32)

    def convolve(x, kernel, bias, ids, dy, axis="t"):
        segments = dict(segment_ids=ids) if packed else {}
        conv = lambda *floats: short_conv(*floats, **segments, context_axis=axis)
        y, pull_back = jax.vjp(conv, x, kernel, bias)
        return y, *pull_back(dy)

    where = (P(None, "t"), P(), P(), P(None, "t"), P(None, "t"))
    mapped = jax.shard_map(
        convolve, mesh=mesh_of(AUTO, AUTO), in_specs=where, out_specs=(P(None, "t"), *where[:3])
    )
    arguments = x, kernel, bias, ids, dy
    wanted = jit(functools.partial(convolve, axis=None))(*arguments)
    for got, y in zip(jit(mapped)(*arguments), wanted, strict=True):
        assert_close(got, y, "short_conv")


def test_layer_prefills_whole_rows():
    nnx = pytest.importorskip("flax.nnx", reason="the layer needs flax")
    from jax_flashkda import KimiDeltaAttention

    layer = KimiDeltaAttention(8, 1, 4, context_axis="t", rngs=nnx.Rngs(0))
    x = jnp.ones((1, 8, 8))
    y, _ = jax.eval_shape(layer.prefill, x)
    assert y.shape == x.shape
    mapped = jax.shard_map(
        lambda x: layer.prefill(x)[0],
        mesh=mesh_of(AUTO, AUTO),
        in_specs=P(None, "t"),
        out_specs=P(None, "t"),
    )
    with pytest.raises(ValueError, match="prefill takes whole rows; inside of shard_map over 't'"):
        jax.eval_shape(mapped, x)


def test_layer():
    """Output and the gradients of input and all parameters, on an Explicit mesh."""
    nnx = pytest.importorskip("flax.nnx", reason="the layer needs flax")
    from jax_flashkda import KimiDeltaAttention

    def split(axis):
        layer = KimiDeltaAttention(
            24, 1, 16, num_value_heads=2, value_head_dim=8, context_axis=axis, rngs=nnx.Rngs(0)
        )
        return nnx.split(layer)

    def run(graphdef, params, x, ids, dy):
        layer = lambda params, x: nnx.merge(graphdef, params)(x, segment_ids=ids)
        y, pull_back = jax.vjp(layer, params, x)
        return y, *pull_back(dy)

    x, dy = (jax.random.normal(jax.random.key(i), (4, T, 24)) for i in range(2))
    (alone, params), (graphdef, _) = split(None), split("t")
    arguments = params, x, jnp.asarray(PACKED.ids), dy
    wanted = jit(functools.partial(run, alone))(*arguments)
    mesh = mesh_of(EXPLICIT, EXPLICIT)
    tokens = P("x", "t")
    arguments = put(mesh, arguments, (jax.tree.map(lambda _: P(), params), tokens, tokens, tokens))
    with jax.set_mesh(mesh):
        compiled = jit(functools.partial(run, graphdef)).lower(*arguments).compile()
    got = compiled(*arguments)
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, tokens), 3)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        assert_close(x, y, jax.tree_util.keystr(path))
    # The halos of q, k and v, and their gradients back; ids besides.
    halos = [shape for kind, shape in communicated(compiled) if kind == "collective-permute"]
    assert {(2, 3, 1, 16), (2, 3, 2, 8), (2, 3)} == set(halos)
    tokens = [shape for _, shape in communicated(compiled) if T in shape or SHARD in shape]
    assert not tokens


# ------------------------------------------------------------------------- the stages of a shard


def shard_case(packed, implementation):
    """Whole rows, or packed ones with a slot for each segment and one more."""
    if not packed:
        return for_implementation(WHOLE, implementation)
    slots = 1 + max(len(runs(ids)) for ids in PACKED.segment_ids)
    return for_implementation(dataclasses.replace(PACKED, max_segments=slots), implementation)


def shard_call(case, implementation):
    """The problem of a stage, and its operands by name."""
    arrays, (d_o, d_final) = case.arrays(), case.cotangents()
    for name in {"A_log", "dt_bias"} & arrays.keys():
        arrays[name] = jnp.broadcast_to(arrays[name], (case.B, *arrays[name].shape))
    arrays |= dict(o=d_o, final_state=d_final)
    if case.segment_ids is None:
        for name in ("initial_state", "final_state"):
            arrays[name] = arrays[name][:, None]
    has = ("A_log", "dt_bias", "segment_ids", "initial_state")
    problem = Problem(
        gate=case.gate, beta_is_logits=case.beta_is_logits, qk_l2norm=case.qk_l2norm,
        scale=case.K**-0.5, implementation=implementation, return_final_state=True,
        max_segments=arrays["initial_state"].shape[1],
        **{f"has_{name}": name in arrays for name in has},
    )  # fmt: skip
    return problem, arrays


def run_stage(stage, problem, arrays):
    """Results by name."""
    operand_names, result_names = problem.signature(stage)
    call = jit(functools.partial(getattr(_primitives, stage), problem))
    return dict(zip(result_names, call(*(arrays[x] for x in operand_names)), strict=True))


def run_maps(problem, arrays):
    changes = dict(return_final_state=False, has_initial_state=False)
    return run_stage("state_maps", dataclasses.replace(problem, **changes), arrays)


def assert_equal(got, wanted, select=lambda x: x):
    assert got.keys() == wanted.keys()
    for name, x in got.items():
        np.testing.assert_array_equal(select(np.asarray(x)), select(np.asarray(wanted[name])), name)


KERNELS = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
def test_maps_of_the_kernels(packed):
    """Of the rows that a segment ends, those of the XLA path."""
    problem, arrays = shard_call(shard_case(packed, "cuda"), "cuda")
    ends = np.asarray(arrays["segment_ids"])[:, -1] > 0 if packed else slice(None)
    got = run_maps(problem, arrays)
    wanted = run_maps(dataclasses.replace(problem, implementation="xla"), arrays)
    for name in ("factor", "offset"):
        x, y = (np.asarray(maps[name], np.float64)[ends] for maps in (got, wanted))
        error = np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))
        assert error <= CAPS_16_BIT["final_state"], (name, error)


@pytest.mark.parametrize("implementation", ["xla", KERNELS])
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_prepared_stages(packed, implementation):
    """Bitwise what forward and backward give that prepare for themselves."""
    problem, arrays = shard_call(shard_case(packed, implementation), implementation)
    prepared = {name: x for name, x in run_maps(problem, arrays).items() if name in PREPARED}
    got = run_stage("prepared_forward", problem, arrays | prepared)
    assert_equal(got, run_stage("forward", problem, arrays))
    initial = run_stage("state_gradient", problem, arrays)
    prepared = {name: initial.pop(name) for name in PREPARED}
    wanted = run_stage("backward", problem, arrays)
    assert_equal(run_stage("prepared_backward", problem, arrays | prepared), wanted)
    begins = np.asarray(arrays["segment_ids"])[:, 0] > 0 if packed else slice(None)
    wanted = {"initial_state": wanted["initial_state"]}
    assert_equal(initial, wanted, lambda x: x[begins, 0])


@pytest.mark.parametrize("implementation", ["xla", KERNELS])
def test_the_last_slot_is_of_the_segment_that_ends_a_row(implementation):
    """With two slots in place of one for each segment: those of the first and of that one."""
    problem, wide = shard_call(shard_case(True, implementation), implementation)
    counts = [len(runs(ids)) for ids in PACKED.segment_ids]
    ends = np.asarray(wide["segment_ids"])[:, -1] > 0
    last = np.maximum(np.array(counts), 1) - 1
    kept = np.arange(problem.max_segments) == 0
    kept = kept | (ends[:, None] & (np.arange(problem.max_segments) == last[:, None]))
    # A segment that begins behind the first one starts from nothing.
    wide["initial_state"] = wide["initial_state"].at[:, 1:].set(0)
    wide["final_state"] *= jnp.asarray(kept).reshape(*kept.shape, 1, 1, 1)
    second = jnp.asarray(np.where(ends & (last > 0), last, problem.max_segments - 1))
    narrowed = lambda x: jnp.stack([x[:, 0], x[jnp.arange(len(second)), second]], axis=1)
    narrow = wide | {name: narrowed(wide[name]) for name in ("initial_state", "final_state")}
    two = dataclasses.replace(problem, max_segments=2)
    prepared = {name: x for name, x in run_maps(two, narrow).items() if name in PREPARED}
    got = run_stage("prepared_forward", two, narrow | prepared)
    wanted = run_stage("forward", problem, wide)
    wanted["final_state"] = narrowed(wanted["final_state"])
    rows = ends & (last > 0)  # elsewhere nobody has the second slot
    assert_equal(got, wanted, lambda x: x[rows])
    prepared = run_stage("state_gradient", two, narrow)
    got = run_stage("prepared_backward", two, narrow | {x: prepared[x] for x in PREPARED})
    wanted = run_stage("backward", problem, wide)
    for gradients in (got, wanted):  # of the second slot nobody asks for a gradient of a zero
        gradients["initial_state"] = gradients["initial_state"][:, 0]
    assert_equal(got, wanted)


# ------------------------------------------------------------------------------------------- GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("case", [PACKED, WHOLE], ids=["packed", "whole"])
def test_kernels_on_several_gpus(case, pieces):
    """The kernels on every shard, as accurate as the op promises to be on one device."""
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = for_implementation(case, "cuda")
    mapped = jax.jit(shard_mapped(case, mesh_of(AUTO, AUTO, shape=(1, 2)), "cuda"))
    with mock.patch.object(_context, "_pieces", lambda named: pieces):
        compiled = mapped.lower(case.arrays(), case.cotangents()).compile()
    text = compiled.as_text()
    assert all(f"jax_flashkda.{stage}" in text for stage in ONCE)
    got = compiled(case.arrays(), case.cotangents())
    check(case, got)
    again = compiled(case.arrays(), case.cotangents())
    for name, x in got.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(again[name]), err_msg=name)
