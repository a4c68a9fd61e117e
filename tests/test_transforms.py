"""The op under JAX's transformations: they compute what the plain call on one device computes."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashkda import _vjp, kimi_delta_attention
from jax_flashkda._problem import AXES, Problem

OPTIONS = dict(
    gate="softplus", qk_l2norm=True, beta_is_logits=True, max_segments=3, return_final_state=True
)
NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "segment_ids")

# What is tested here is where things go, not how fast: compiling takes a third of the time so.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)


SMALL = dict(B=2, H=1, HV=2)  # one size for most tests: a plain call is then compiled once


def make(implementation, names=NAMES, lead=(), seed=0, B=4, T=70, H=4, HV=8, N=3):
    """Arrays by name; `lead` puts axes to be mapped in front."""
    K, dtype = (128, jnp.bfloat16) if implementation == "cuda" else (16, jnp.float32)
    sizes = dict(B=B, T=T, H=H, HV=HV, K=K, V=K, N=N)
    arrays = {}
    for i, name in enumerate(NAMES):
        axes = AXES[name][1:] if name in ("A_log", "dt_bias") else AXES[name]
        shape = (*lead, *(sizes[axis] for axis in axes))
        random = np.random.default_rng([seed, i])
        if name == "segment_ids":
            arrays[name] = jnp.asarray(np.sort(random.integers(0, 4, shape), axis=-1), jnp.int32)
        else:
            kept = jnp.float32 if name in ("A_log", "dt_bias", "initial_state") else dtype
            arrays[name] = jnp.asarray(0.5 * random.standard_normal(shape), kept)
    return {name: arrays[name] for name in names}


def attend(implementation, arrays, **options):
    """(o, final_state)"""
    return kimi_delta_attention(**arrays, **(OPTIONS | options), implementation=implementation)


def with_gradients(implementation, arrays, **options):
    """o, final_state and the gradients of |o|^2 + |final_state|^2, all by name."""
    ids = {name: arrays[name] for name in arrays if name == "segment_ids"}
    floats = {name: arrays[name] for name in arrays if name != "segment_ids"}
    (o, state), pull_back = jax.vjp(lambda x: attend(implementation, x | ids, **options), floats)
    (gradients,) = pull_back((2 * o, 2 * state))
    return dict(o=o, final_state=state) | {f"d_{name}": x for name, x in gradients.items()}


@functools.cache
def single(implementation):
    """`with_gradients`, compiled: what the transformed calls are compared with."""
    return jit(functools.partial(with_gradients, implementation))


def assert_same(got, wanted):
    """Equal up to the rounding of sums that are taken in another order."""
    got, wanted = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(wanted)
    # With 16-bit inputs on a GPU the XLA backward has tf32 products, which depend on the batch.
    eps = 2.0**-7 if any(y.dtype == jnp.bfloat16 for _, y in wanted) else 2e-5
    for (path, x), (_, y) in zip(got, wanted, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, path
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.isfinite(x).all(), path
        if y.size:
            assert np.abs(x - y).max() <= eps * np.abs(y).max(), path


def count(jaxpr, primitive):
    """How often a primitive stands in a jaxpr and the jaxprs inside it."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == primitive
        # The rule of a custom_vjp or custom_jvp stands beside the function it belongs to.
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found += count(inner, primitive) if hasattr(inner, "eqns") else 0
    return found


# ----------------------------------------------------------------------------------- jit and vmap


def test_the_plain_call_is_the_jitted_one(implementation):
    arrays = make(implementation, **SMALL)
    wanted = {name: single(implementation)(arrays)[name] for name in ("o", "final_state")}
    o, state = attend(implementation, arrays)
    assert_same(dict(o=o, final_state=state), wanted)


def looped(run, arrays, mapped, axis_size):
    rows = [
        run({name: x[i] if name in mapped else x for name, x in arrays.items()})
        for i in range(axis_size)
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *rows)


def vmapped_inputs(implementation, mapped, axis_size=2):
    many = make(implementation, **SMALL, lead=(axis_size,), seed=1)
    return make(implementation, **SMALL) | {name: many[name] for name in mapped}


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_one_argument(name):
    arrays = vmapped_inputs("xla", [name])
    run = functools.partial(attend, "xla")
    o, state = jit(jax.vmap(run, in_axes=({n: 0 if n == name else None for n in arrays},)))(arrays)
    wanted = looped(single("xla"), arrays, [name], 2)
    assert_same((o, state), (wanted["o"], wanted["final_state"]))


@pytest.mark.parametrize(
    "implementation, mapped",
    [
        pytest.param("xla", NAMES, id="all"),
        pytest.param("xla", ("q", "segment_ids"), id="two"),
        pytest.param("xla", ("A_log",), id="A_log"),
        pytest.param("cuda", NAMES, id="cuda", marks=pytest.mark.gpu),
    ],
)
def test_vmap_of_grad(implementation, mapped):
    arrays = vmapped_inputs(implementation, mapped)
    run = functools.partial(with_gradients, implementation)
    got = jit(jax.vmap(run, in_axes=({n: 0 if n in mapped else None for n in arrays},)))(arrays)
    assert_same(got, looped(single(implementation), arrays, mapped, 2))


def test_grad_of_nested_vmap():
    """Two mapped axes, one of them last, and the summed gradients of what the calls share."""
    outer, inner = ("q", "v", "segment_ids"), ("v", "beta", "dt_bias")
    arrays = make("xla", **SMALL)
    many = make("xla", **SMALL, lead=(2, 3), seed=1)
    arrays |= {"q": many["q"][:, 0], "segment_ids": many["segment_ids"][:, 0]}
    arrays |= {"beta": many["beta"][0], "dt_bias": many["dt_bias"][0]}
    arrays |= {"v": jnp.moveaxis(many["v"], 1, -1)}  # [2, ..., 3]

    def nested(floats):
        run = functools.partial(attend, "xla")
        axes = {n: (-1 if n in outer else 0) if n in inner else None for n in NAMES}
        run = jax.vmap(run, in_axes=(axes,))
        run = jax.vmap(run, in_axes=({n: 0 if n in outer else None for n in NAMES},))
        return run(floats | {"segment_ids": arrays["segment_ids"]})

    @jit
    def gradient(floats):
        (o, state), pull_back = jax.vjp(nested, floats)
        return pull_back((2 * o, 2 * state))[0]

    def one(i, j):
        row = {n: x[i] if n in outer else x for n, x in arrays.items()}
        row |= {"v": row["v"][..., j], "beta": row["beta"][j], "dt_bias": row["dt_bias"][j]}
        return single("xla")(row)

    floats = {n: x for n, x in arrays.items() if n != "segment_ids"}
    calls = [[one(i, j) for j in range(3)] for i in range(2)]
    wanted = {}
    for n in floats:
        d = jnp.stack([jnp.stack([call[f"d_{n}"] for call in row]) for row in calls])
        d = d if n in inner else d.sum(1, keepdims=True, dtype=d.dtype)
        d = d if n in outer else d.sum(0, keepdims=True, dtype=d.dtype)
        wanted[n] = jnp.moveaxis(d, 1, -1) if n == "v" else d.reshape(floats[n].shape)
    assert_same(gradient(floats), wanted)


# ------------------------------------------------------------------------------ remat, scan, memory


def layers(implementation, residual_name, policy, weights, arrays):
    """Three layers in a scan, each a projection of the stream, the op and a residual sum."""

    def layer(stream, weight):
        projected = arrays | {"v": jnp.einsum("bthv,vw->bthw", stream, weight)}
        o, state = attend(implementation, projected, residual_name=residual_name)
        return stream + jnp.tanh(o), state.mean()

    if policy is not None:
        layer = jax.checkpoint(layer, policy=policy)
    stream, states = jax.lax.scan(layer, arrays["v"], weights)
    return jnp.mean(jnp.square(stream.astype(jnp.float32))) + states.sum()


def test_remat_with_named_residuals_in_a_scan_over_layers(implementation):
    arrays = make(implementation, **SMALL)
    V = arrays["v"].shape[-1]
    weights = jnp.stack([jnp.eye(V) * 0.5, jnp.eye(V), jnp.eye(V)[::-1]]).astype(arrays["v"].dtype)
    policies = jax.checkpoint_policies
    save, nothing = policies.save_only_these_names("kda"), policies.nothing_saveable

    def gradient(residual_name, policy):
        return jax.grad(functools.partial(layers, implementation, residual_name, policy))

    def forwards(residual_name, policy):
        jaxpr = jax.make_jaxpr(gradient(residual_name, policy))(weights, arrays).jaxpr
        assert count(jaxpr, "kda_backward") == 1
        return count(jaxpr, "kda_forward")

    assert forwards(None, None) == 1
    assert forwards("kda", nothing) == 2
    assert forwards("kda", save) == 1
    assert forwards(None, save) == 2
    plain = jit(gradient(None, None))(weights, arrays)
    assert_same(jit(gradient("kda", save))(weights, arrays), plain)


def test_without_a_name_only_raw_inputs_are_saved():
    arrays = make("xla", **SMALL)
    floats = {name: x for name, x in arrays.items() if name != "segment_ids"}

    def run(x):
        return jax.vjp(lambda x: attend("xla", x | {"segment_ids": arrays["segment_ids"]}), x)

    _, pull_back = jax.eval_shape(run, floats)
    tokens = [x for x in jax.tree.leaves(pull_back) if x.ndim >= 3 and 70 in x.shape]
    assert sum(x.size for x in tokens) == sum(arrays[n].size for n in ("q", "k", "v", "g", "beta"))


def test_donated_state_is_reused(implementation):
    arrays = make(implementation, **SMALL)
    state = arrays.pop("initial_state")
    wanted = single(implementation)(arrays | {"initial_state": state})
    wanted = (wanted["o"], wanted["final_state"])
    run = jit(lambda x, y: attend(implementation, x | {"initial_state": y}), donate_argnums=1)
    run = run.lower(arrays, state).compile()
    assert run.memory_analysis().alias_size_in_bytes == state.size * 4
    assert_same(run(arrays, state), wanted)
    assert state.is_deleted()


# ---------------------------------------------------------------------------------------- sharding


PROBLEM = Problem(
    gate="softplus",
    qk_l2norm=True,
    beta_is_logits=True,
    scale=0.25,
    max_segments=3,
    return_final_state=True,
    has_A_log=True,
    has_dt_bias=True,
    has_initial_state=True,
    has_segment_ids=True,
)
RESULTS = PROBLEM.result_names + PROBLEM.differentiable_names


def core(*operands):
    """Results and gradients of the op below the public one, with no sum over batch rows."""
    ids = operands[-1]
    (o, state), pull_back = jax.vjp(lambda *x: _vjp.attend(PROBLEM, *x, ids), *operands[:-1])
    return (o, state, *pull_back((2 * o, 2 * state)))


@functools.cache
def core_case():
    arrays = make("xla")
    rows = {
        name: jnp.broadcast_to(arrays[name], (4, *arrays[name].shape))
        for name in ("A_log", "dt_bias")
    }
    operands = [(arrays | rows)[name] for name in PROBLEM.operand_names]
    return operands, jit(core)(*operands)


def mesh_of(*types):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=types)


def spec(name, batch, heads):
    return P(*({"B": batch, "H": heads, "HV": heads}.get(axis) for axis in AXES[name]))


def put(mesh, batch, heads, **specs):
    operands, _ = core_case()
    return [
        jax.device_put(x, NamedSharding(mesh, specs.get(name, spec(name, batch, heads))))
        for name, x in zip(PROBLEM.operand_names, operands, strict=True)
    ]


def collectives(compiled):
    kinds = (
        "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    )
    return sorted(re.findall(rf"\b({kinds})(?:-start)?\(", compiled.as_text()))


def check_sharded(run, operands, expected_collectives=(), mesh=None):
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        compiled = jit(run).lower(*operands).compile()
        got = compiled(*operands)
    assert_same(got, core_case()[1])
    assert set(collectives(compiled)) <= set(expected_collectives)
    return got


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.mark.parametrize(
    "types, batch, heads, set_mesh",
    [
        pytest.param((AUTO, AUTO), "x", "y", False, id="auto"),
        pytest.param((AUTO, AUTO), "y", "x", True, id="auto-transposed"),
        pytest.param((EXPLICIT, EXPLICIT), "x", "y", True, id="explicit"),
        pytest.param((EXPLICIT, EXPLICIT), "y", None, False, id="explicit-batch"),
        pytest.param((EXPLICIT, AUTO), "x", "y", True, id="explicit-and-auto"),
    ],
)
def test_batch_and_heads_split_with_no_collective(types, batch, heads, set_mesh):
    mesh = mesh_of(*types)
    got = check_sharded(core, put(mesh, batch, heads), mesh=mesh if set_mesh else None)
    for name, x in zip(RESULTS, got, strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec(name, batch, heads)), x.ndim)


@pytest.mark.parametrize(
    "types, manual, check_vma",
    [
        pytest.param((AUTO, AUTO), "xy", True, id="vma"),
        pytest.param((AUTO, AUTO), "xy", False, id="no-vma"),
        pytest.param((AUTO, AUTO), "x", True, id="partly-manual"),
        pytest.param((EXPLICIT, EXPLICIT), "x", True, id="partly-manual-explicit"),
    ],
)
def test_shard_map(types, manual, check_vma):
    mesh = mesh_of(*types)
    split = [axis if axis in manual else None for axis in "xy"]
    run = jax.shard_map(
        core,
        mesh=mesh,
        in_specs=tuple(spec(name, *split) for name in PROBLEM.operand_names),
        out_specs=tuple(spec(name, *split) for name in RESULTS),
        axis_names=set(manual),
        check_vma=check_vma,
    )
    check_sharded(run, put(mesh, "x", "y"), mesh=mesh)


@pytest.mark.parametrize(
    "types, heads, specs",
    [
        pytest.param((AUTO, AUTO), None, dict(q=P("y", "x"), beta=P()), id="tokens"),
        pytest.param((AUTO, AUTO), ("x", "y"), dict(q=P(), k=P()), id="more-ways-than-H"),
        pytest.param(
            (EXPLICIT, EXPLICIT), ("x", "y"), dict(q=P(), k=P(None, "x")), id="explicit-both"
        ),
    ],
)
def test_splits_that_do_not_fit_are_gathered(types, heads, specs):
    mesh = mesh_of(*types)
    operands = put(mesh, None if heads else "y", heads, **specs)
    check_sharded(core, operands, ["all-gather", "all-to-all", "collective-permute"], mesh)


def forward(*operands):
    return _vjp.attend(PROBLEM, *operands)


def test_uncommitted_inputs_under_set_mesh():
    operands, wanted = core_case()
    with jax.set_mesh(mesh_of(AUTO, AUTO)):
        assert_same(jit(forward)(*operands), wanted[:2])


@pytest.mark.parametrize("types", [(AUTO, AUTO), (EXPLICIT, EXPLICIT)], ids=["auto", "explicit"])
def test_vmap_of_a_sharded_batch_moves_nothing(types):
    mesh = mesh_of(*types)
    operands, wanted = core_case()
    sharded = [
        jax.device_put(jnp.stack([x, x]), NamedSharding(mesh, P(None, *spec(name, "x", "y"))))
        for name, x in zip(PROBLEM.operand_names, operands, strict=True)
    ]
    with jax.set_mesh(mesh):
        compiled = jit(jax.vmap(forward)).lower(*sharded).compile()
    assert_same(compiled(*sharded), tuple(jnp.stack([x, x]) for x in wanted[:2]))
    assert not collectives(compiled)


@pytest.mark.parametrize("types", [(AUTO, AUTO), (EXPLICIT, EXPLICIT)], ids=["auto", "explicit"])
def test_shared_parameters_are_summed_over_the_batch(types):
    """The one collective of a training step: the sum of dA_log and d_dt_bias over batch rows."""
    mesh = mesh_of(*types)
    arrays = make("xla")
    wanted = single("xla")(arrays)
    sharded = {}
    for name, x in arrays.items():
        whole = spec(name, "x", "y")
        where = P(*whole[1:]) if name in ("A_log", "dt_bias") else whole
        sharded[name] = jax.device_put(x, NamedSharding(mesh, where))
    with jax.set_mesh(mesh):
        compiled = jit(functools.partial(with_gradients, "xla")).lower(sharded).compile()
    assert_same(compiled(sharded), wanted)
    found = collectives(compiled)
    assert set(found) == {"all-reduce"} and len(found) <= 2


def test_shared_parameters_under_shard_map():
    mesh = mesh_of(AUTO, AUTO)
    arrays = make("xla")
    wanted = single("xla")(arrays)
    specs = {name: spec(name, "x", "y") for name in AXES}
    specs |= {name: P(*specs[name][1:]) for name in ("A_log", "dt_bias")}
    run = jax.shard_map(
        functools.partial(with_gradients, "xla"),
        mesh=mesh,
        in_specs=({name: specs[name] for name in arrays},),
        out_specs={name: specs[name.removeprefix("d_")] for name in wanted},
    )
    assert_same(jit(run)(arrays), wanted)


# ---------------------------------------------------------------------------- refusals and edges


def small():
    return make("xla", ("q", "k", "v", "g", "beta", "A_log"), B=1, T=3, H=1, HV=1)


def loss(arrays):
    return attend("xla", arrays, max_segments=None)[0].sum()


@pytest.mark.parametrize("transform", [jax.jacfwd, lambda f: lambda x: jax.jvp(f, (x,), (x,))])
def test_forward_mode_is_refused(transform):
    with pytest.raises(TypeError, match="forward-mode autodiff .* custom_vjp"):
        jax.jit(transform(loss)).lower(small())


@pytest.mark.parametrize(
    "twice",
    [
        lambda x: jax.grad(lambda y: jax.grad(loss)(y)["q"].sum())(x),
        lambda x: jax.jit(jax.grad(lambda y: jax.jit(jax.grad(loss))(y)["A_log"].sum()))(x),
        jax.hessian(loss),
    ],
    ids=["grad-grad", "jit", "hessian"],
)
def test_second_derivatives_are_refused(twice):
    with pytest.raises(NotImplementedError, match="reverse-mode differentiation, once"):
        twice(small())


def test_cuda_by_name_is_refused_on_another_platform():
    if jax.default_backend() != "cpu":
        pytest.skip("needs a CPU as the default device")
    arrays = make("xla", B=1, H=1, HV=1)
    run = jax.jit(functools.partial(attend, "cuda"))
    jax.eval_shape(run, arrays)  # traces anywhere
    with pytest.raises(NotImplementedError, match="platform other than cuda"):
        run(arrays)
    # A gradient that needs no output of the forward does not get past it either.
    with pytest.raises(NotImplementedError, match="platform other than cuda"):
        jax.jit(functools.partial(with_gradients, "cuda"))(arrays)
    with pytest.raises(NotImplementedError, match="platform other than cuda"):
        jax.jit(lambda x: with_gradients("cuda", x)["d_q"])(arrays)


@pytest.mark.parametrize("sizes", [dict(T=0), dict(B=0), dict(T=0, B=0)], ids=str)
def test_empty_calls(sizes, implementation):
    arrays = make(implementation, **(SMALL | sizes))
    got = single(implementation)(arrays)
    assert_same(got["final_state"], arrays["initial_state"])
    assert_same(got["d_initial_state"], 2 * arrays["initial_state"])
    for name in ("A_log", "dt_bias"):
        assert not np.any(got[f"d_{name}"])
    assert got["o"].shape == arrays["v"].shape and not np.any(got["o"])


def test_vmap_over_nothing():
    arrays = make("xla", **SMALL, lead=(0,))
    o, state = jax.vmap(functools.partial(attend, "xla"))(arrays)
    assert o.shape == arrays["v"].shape and state.shape == arrays["initial_state"].shape


def test_integer_operands_have_float0_cotangents():
    def run(arrays):
        results, pull_back = jax.vjp(functools.partial(attend, "xla"), arrays)
        return pull_back(results)[0]

    gradients = jax.eval_shape(run, make("xla", B=1, T=3, H=1, HV=1))
    assert gradients["segment_ids"].dtype == jax.dtypes.float0
