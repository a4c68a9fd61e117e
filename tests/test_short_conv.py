"""The short convolution and its step as ops: both implementations against each other and against
their definition, transforms, the choice by platform, refusals. Segments and layers that use it are
tested in test_layer.py and test_decode.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import extension
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashkda import (
    DISABLE_JAX_EXPORT_CHECKS,
    _extension,
    _primitives,
    _support,
    short_conv,
    short_conv_step,
)

W, CHANNELS = 4, (4, 16)
ROW = dict(arch=90, width=4, channel_multiple=8, dtypes=["bfloat16", "float32"],
           step_dtypes=["bfloat16", "float16", "float32"])  # fmt: skip
WORKSPACE = 4321


@pytest.fixture
def declared_kernels(monkeypatch):
    """Stands in for the extension while lowering."""
    monkeypatch.setattr(_extension, "missing_reason", lambda: None)
    monkeypatch.setattr(_extension, "short_conv_variants", lambda: [ROW])
    monkeypatch.setattr(_extension, "register", lambda: None)
    monkeypatch.setattr(_extension, "short_conv_workspace_bytes", lambda *sizes: WORKSPACE)
    monkeypatch.setattr(_support, "_local_compute_capabilities", lambda: [])
    _primitives._warn_once.cache_clear()


# What these tests compile they run once or twice.
jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0}
    if jax.default_backend() == "cpu"
    else None,
)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def inputs(B=2, T=70, channels=CHANNELS, N=None, dtype=jnp.float32, bias=True, seed=0):
    """A call with packed rows; N: with initial states for so many segments of a row."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(0, 9, (B, T)), axis=1)
    ids[:, T // 3 : T // 3 + 2] = -1
    arrays = dict(
        x=normal(B, T, *channels, seed=seed, dtype=dtype),
        kernel=0.5 * normal(W, *channels, seed=seed + 1),
        segment_ids=jnp.asarray(ids, jnp.int32),
    )
    if bias:
        arrays["bias"] = normal(*channels, seed=seed + 2)
    if N is not None:
        arrays["initial_state"] = normal(B, N, W - 1, *channels, seed=seed + 3)
    return arrays


def without(arrays, *names):
    return {name: x for name, x in arrays.items() if name not in names}


def gradients(arrays, d_y, **options):
    """y and the gradient of every float array, by name."""
    floats = without(arrays, "segment_ids")
    ids = {name: arrays[name] for name in arrays.keys() - floats.keys()}
    y, pull_back = jax.vjp(lambda floats: short_conv(**floats, **ids, **options), floats)
    return dict(y=y, **pull_back(d_y)[0])


def assert_close(got, wanted, eps=2e-6):
    """A rounding of each value to its type, and fp32's own error of the largest."""
    for name, x in got.items():
        y = np.asarray(wanted[name], np.float64)
        assert x.shape == y.shape, name
        rounding = max(float(jnp.finfo(x.dtype).eps), eps)
        worst = np.abs(np.asarray(x, np.float64) - y) - rounding * np.abs(y)
        assert worst.max(initial=0) <= 4 * eps * np.abs(y).max(initial=0), name


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# ------------------------------------------------------------------------- against XLA's autodiff


CASES = {
    "packed": (inputs(), {}),
    "bfloat16": (inputs(dtype=jnp.bfloat16), {}),
    "one segment a row": (without(inputs(), "segment_ids"), {}),
    "linear, no bias": (inputs(bias=False), dict(activation=None)),
    "initial states": (inputs(N=3), {}),
    "initial states, bfloat16": (inputs(N=3, dtype=jnp.bfloat16), dict(padding_segment_id=2)),
    "no padding id": (inputs(N=20), dict(padding_segment_id=None)),
    "one channel axis": (inputs(channels=(64,), N=2), {}),
    "three channel axes": (inputs(channels=(2, 3, 8), N=2), {}),
    "a row": (
        without(inputs(), "segment_ids") | dict(initial_state=normal(2, W - 1, *CHANNELS)),
        {},
    ),
    "two tokens": (inputs(T=2, N=1), {}),
    "several tiles": (inputs(B=3, T=300, channels=(264,)), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_op_and_gradients_are_those_of_the_definition(name, implementation):
    """`implementation="xla"` is differentiated by JAX itself. In fp32: what is rounded to bfloat16
    is rounded once."""
    arrays, options = CASES[name]
    named = None if implementation == "xla" else implementation  # the rule, lowered for XLA
    d_y = normal(*arrays["x"].shape, seed=9, dtype=arrays["x"].dtype)
    run = jit(functools.partial(gradients, implementation=named, **options))
    got = run(arrays, d_y)
    f32 = jnp.float32
    exact = arrays | dict(x=arrays["x"].astype(f32))
    wanted = jit(functools.partial(gradients, implementation="xla", **options))(
        exact, d_y.astype(f32)
    )
    assert got["y"].dtype == got["x"].dtype == arrays["x"].dtype
    assert_close(got, wanted)
    assert_same_bits(got, run(arrays, d_y))


@pytest.mark.parametrize("dtype", ["uint32", "int8"])
def test_ids_of_any_integer_type(dtype):
    """Not converted so that two ids become one, or one negative."""
    ids = {
        "uint32": [2**31 + 1, 2**31 + 1, 2**32 - 1, 7, 7, 0, 0],
        "int8": [1, 1, -1, 1, 1, 0, 0],
    }
    arrays = inputs(B=1, T=7) | dict(segment_ids=jnp.asarray([ids[dtype]], dtype))
    assert_close(dict(y=short_conv(**arrays)), dict(y=short_conv(**arrays, implementation="xla")))


def test_parameters_of_other_types():
    """Gradients come in the types of what they are gradients of."""
    arrays = inputs(dtype=jnp.bfloat16, N=2)
    for name in ("kernel", "bias", "initial_state"):
        arrays[name] = arrays[name].astype(jnp.bfloat16)
    d_y = normal(*arrays["x"].shape, dtype=jnp.bfloat16)
    got, wanted = gradients(arrays, d_y), gradients(arrays, d_y, implementation="xla")
    for name, x in got.items():
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(wanted[name], np.float32), rtol=0.02, atol=0.02
        )


# ------------------------------------------------------------------------------------- the step


def step_inputs(N=3, T=2, channels=CHANNELS, dtype=jnp.float32, state=None, slots=None, seed=0):
    arrays = dict(
        x=normal(N, T, *channels, seed=seed, dtype=dtype),
        kernel=normal(W, *channels, seed=seed + 1),
        state=normal(slots or N, W - 1, *channels, seed=seed + 2, dtype=state or dtype),
        bias=normal(*channels, seed=seed + 3),
    )
    if slots is not None:
        indices = np.random.default_rng(seed).permutation(slots)[:N]
        indices[0] = (-1, slots)[seed % 2]
        arrays["state_indices"] = jnp.asarray(indices, jnp.int32)
    return arrays


STEPS = {
    "one token": step_inputs(T=1),
    "eight tokens": step_inputs(T=8),
    "bfloat16": step_inputs(dtype=jnp.bfloat16),
    "float16, float32 state": step_inputs(dtype=jnp.float16, state=jnp.float32),
    "bfloat16 kernel": step_inputs() | dict(kernel=normal(W, *CHANNELS, dtype=jnp.bfloat16)),
    "pool": step_inputs(slots=7),
    "bfloat16 pool": step_inputs(N=6, T=3, slots=6, state=jnp.bfloat16, seed=1),
    "channels": step_inputs(N=40, channels=(1000,)),
    "four sequences a thread": step_inputs(N=70, T=1, channels=(2, 4096), dtype=jnp.bfloat16),
    "the same in a pool": step_inputs(N=70, T=1, channels=(2, 4096), slots=90, seed=1),
}


@pytest.mark.parametrize("name", STEPS)
def test_step(name, implementation):
    arrays = STEPS[name]
    named = None if implementation == "xla" else implementation
    y, state = jit(functools.partial(short_conv_step, implementation=named))(**arrays)
    exact = arrays | dict(x=arrays["x"].astype(jnp.float32))
    wanted, after = short_conv_step(**exact, implementation="xla")
    assert y.dtype == arrays["x"].dtype
    assert_close(dict(y=y), dict(y=wanted))
    assert_same_bits(state, after.astype(arrays["state"].dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [None, 5])
def test_a_donated_state_is_updated_in_place(slots):
    arrays = step_inputs(slots=slots)
    state = arrays.pop("state")
    wanted = short_conv_step(**arrays, state=state, implementation="cuda")
    step = lambda state, rest: short_conv_step(**rest, state=state, implementation="cuda")
    compiled = jax.jit(step, donate_argnums=0).lower(state, arrays).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == state.nbytes
    assert_same_bits(compiled(state, arrays), wanted)
    assert state.is_deleted()


@pytest.mark.gpu
def test_command_buffer():
    """Captured and replayed with other ids: the same bits."""
    arrays, step = inputs(dtype=jnp.bfloat16, N=3), step_inputs(dtype=jnp.bfloat16, slots=7)
    d_y = normal(*arrays["x"].shape, dtype=jnp.bfloat16)

    def several(arrays, d_y, step):
        results = []
        for i in range(4):  # enough launches to be worth a graph
            turned = arrays | dict(x=jnp.roll(arrays["x"], i, axis=1))
            results.append(gradients(turned, d_y, implementation="cuda"))
            step = step | dict(x=jnp.roll(step["x"], i, axis=0))
            results.append(short_conv_step(**step, implementation="cuda"))
        return results

    lowered = jax.jit(several).lower(arrays, d_y, step)
    off = lowered.compile({"xla_gpu_enable_command_buffer": ""})
    on = lowered.compile(
        {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1}
    )
    other = arrays | dict(segment_ids=arrays["segment_ids"][:, ::-1])
    for each in (arrays, other, arrays):
        for _ in range(3):
            assert_same_bits(on(each, d_y, step), off(each, d_y, step))


# ----------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize(
    "mapped",
    [("x",), ("kernel",), ("bias", "initial_state"), ("segment_ids",), tuple(inputs(N=3))],
    ids=" ".join,
)
def test_vmap_of_gradients(mapped, implementation):
    rows = [inputs(N=3, seed=10 * seed) for seed in range(3)]
    arrays = {
        name: jnp.stack([row[name] for row in rows]) if name in mapped else x
        for name, x in rows[0].items()
    }
    d_y = normal(*rows[0]["x"].shape)
    named = None if implementation == "xla" else implementation
    run = functools.partial(gradients, implementation=named)
    axes = {name: 0 if name in mapped else None for name in arrays}
    got = jit(jax.vmap(run, in_axes=(axes, None)))(arrays, d_y)
    run = jit(run)
    for i in range(3):
        one = {name: x[i] if name in mapped else x for name, x in arrays.items()}
        assert_close({name: x[i] for name, x in got.items()}, run(one, d_y))


@pytest.mark.parametrize("slots", [None, 6])
@pytest.mark.parametrize("mapped", [("x",), ("kernel",), ("state", "bias"), ("state_indices",)])
def test_vmap_of_the_step(mapped, slots, implementation):
    rows = [step_inputs(slots=slots, seed=seed) for seed in range(3)]
    mapped = [name for name in mapped if name in rows[0]]
    if not mapped:
        pytest.skip("there are no indices without a pool")
    arrays = {
        name: jnp.stack([row[name] for row in rows]) if name in mapped else x
        for name, x in rows[0].items()
    }
    named = None if implementation == "xla" else implementation
    step = functools.partial(short_conv_step, implementation=named)
    axes = {name: 0 if name in mapped else None for name in arrays}
    got = jit(jax.vmap(lambda arrays: step(**arrays), in_axes=(axes,)))(arrays)
    for i in range(3):
        wanted = step(**{name: x[i] if name in mapped else x for name, x in arrays.items()})
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-5)


COLLECTIVES = r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def placed(arrays, mesh, specs):
    return {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_sharded(kind):
    """Rows and heads are split with no collective but for the sums of the parameters' gradients."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    arrays = inputs(N=2) | dict(d_y=normal(2, 70, *CHANNELS, seed=9))
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "heads"), axis_types=(axis_type,) * 2)
    token = P("data", None, "heads")
    specs = dict(
        x=token, d_y=token, segment_ids=P("data"), initial_state=P("data", None, None, "heads")
    )
    specs |= dict(kernel=P(None, "heads"), bias=P("heads"))

    def per_row(arrays):  # y and the gradients that are no sums over rows
        parameters = {name: arrays[name] for name in ("kernel", "bias")}
        rest = {name: arrays[name] for name in ("x", "initial_state")}
        ids = arrays["segment_ids"]
        run = lambda rest: short_conv(**rest, **parameters, segment_ids=ids)
        y, pull_back = jax.vjp(run, rest)
        return dict(y=y, **pull_back(arrays["d_y"])[0])

    wanted = jit(per_row)(arrays)
    run = per_row
    if kind == "shard_map":
        results = {name: specs.get(name, token) for name in wanted}
        run = jax.shard_map(per_row, mesh=mesh, in_specs=(specs,), out_specs=results)
    with jax.set_mesh(mesh):
        compiled = jit(run).lower(placed(arrays, mesh, specs)).compile()
        got = compiled(placed(arrays, mesh, specs))
        assert not re.findall(COLLECTIVES, compiled.as_text())
        assert_close(got, wanted)
        for name, x in got.items():
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, specs.get(name, token)), x.ndim)
        everything = lambda arrays: gradients(without(arrays, "d_y"), arrays["d_y"])
        wanted = jit(everything)(arrays)
        if kind == "shard_map":
            results = {name: specs.get(name, token) for name in wanted}
            everything = jax.shard_map(everything, mesh=mesh, in_specs=(specs,), out_specs=results)
        assert_close(jit(everything)(placed(arrays, mesh, specs)), wanted, eps=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("slots", [None, 6])
def test_sharded_step(slots, kind):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    arrays = step_inputs(N=4, slots=slots)
    mesh = jax.make_mesh((2, 4), ("data", "heads"), axis_types=(kind,) * 2)
    token = P(None if slots else "data", None, "heads")
    specs = dict(x=token, kernel=P(None, "heads"), bias=P("heads"), state=token, state_indices=P())
    with jax.set_mesh(mesh):
        at = placed(arrays, mesh, specs)
        compiled = jit(lambda arrays: short_conv_step(**arrays)).lower(at).compile()
        assert not re.findall(COLLECTIVES, compiled.as_text())
        got = compiled(at)
    for x, y in zip(got, short_conv_step(**arrays), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_tokens_that_are_split_are_gathered():
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    arrays = without(inputs(T=64), "segment_ids")
    mesh = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Auto,))
    x = jax.device_put(arrays["x"], NamedSharding(mesh, P(None, "time")))
    with jax.set_mesh(mesh):
        y = jax.jit(short_conv)(x, arrays["kernel"])
    np.testing.assert_allclose(y, short_conv(arrays["x"], arrays["kernel"]), rtol=1e-5, atol=1e-5)


def test_derivatives_that_there_are_not():
    arrays = inputs(T=9)
    loss = lambda x, **options: short_conv(**(arrays | dict(x=x)), **options).sum()
    with pytest.raises(NotImplementedError, match="short_conv supports reverse-mode"):
        jax.grad(lambda x: jax.grad(loss)(x).sum())(arrays["x"])
    on_xla = functools.partial(loss, implementation="xla")
    assert jax.jvp(on_xla, (arrays["x"],), (arrays["x"],))[1].shape == ()
    step = step_inputs()
    with pytest.raises(NotImplementedError, match="short_conv_step has no derivative"):
        jax.grad(lambda x: short_conv_step(**(step | dict(x=x)))[0].sum())(step["x"])


# ------------------------------------------------------------------------------------ the choice


def lowered(f, platform, *arguments):
    # A function of its own: JAX keeps what it lowered.
    traced = jax.jit(lambda *x: f(*x)).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def call_of(target, text):
    (call,) = re.findall(rf"stablehlo\.custom_call @jax_flashkda\.{target}\(.*", text)
    operands, results = call[call.rindex(" : (") :].split(" -> ")
    types = [re.findall(r"tensor<([^>]+)>", part) for part in (operands, results)]
    attributes = re.findall(r"(\w+) = ([^,{}]+)", call[call.index("mhlo.backend_config") :])
    return types, dict(attributes)


def test_forward_and_backward_are_the_kernels(declared_kernels):
    arrays = inputs(dtype=jnp.bfloat16, N=3)
    d_y = normal(*arrays["x"].shape, dtype=jnp.bfloat16)
    text = lowered(gradients, "cuda", arrays, d_y)
    x, kernel, bias = "2x70x4x16xbf16", "2x4x4x16xf32", "2x4x16xf32"
    state, ids = "2x3x3x4x16xf32", "2x70xi32"
    types, attributes = call_of("short_conv", text)
    assert types == [[x, kernel, bias, state, ids], [x]]
    assert attributes == attributes | dict(
        silu="true",
        has_bias="true",
        has_initial_state="true",
        has_segment_ids="true",
        has_padding_segment_id="false",  # ids are slots, -1 at padding
        padding_segment_id="0 : i32",
        max_segments="3 : i64",
    )
    types, _ = call_of("short_conv_backward", text)
    assert types == [[x, kernel, bias, state, ids, x], [x, kernel, bias, state, f"{WORKSPACE}xui8"]]
    text = lowered(
        lambda x, k: short_conv(x, k, activation=None), "cuda", *list(arrays.values())[:2]
    )
    types, attributes = call_of("short_conv", text)
    assert types == [[x, kernel], [x]]
    assert attributes["silu"] == attributes["has_segment_ids"] == "false"


def test_the_step_is_the_kernel_in_place(declared_kernels):
    arrays = step_inputs(dtype=jnp.bfloat16, slots=7)
    text = lowered(lambda arrays: short_conv_step(**arrays), "cuda", arrays)
    types, attributes = call_of("short_conv_step", text)
    x, state = "3x2x4x16xbf16", "7x3x4x16xbf16"
    assert types == [[x, "1x4x4x16xf32", "1x4x16xf32", state, "3xi32"], [x, state]]
    assert attributes["has_state_indices"] == "true"
    assert attributes["parameters_per_sequence"] == "false"
    assert "operand_tuple_indices = [], operand_index = 3" in text or "operand_index = 3" in text


def test_other_platforms_and_xla_by_name(declared_kernels):
    arrays = inputs()
    for platform in ("cpu", "tpu", "rocm"):
        assert "jax_flashkda" not in lowered(lambda a: short_conv(**a), platform, arrays)
    on_xla = lambda a: short_conv(**a, implementation="xla")
    assert "jax_flashkda" not in lowered(on_xla, "cuda", arrays)


REASONS = [
    (dict(kernel=normal(3, *CHANNELS)), "the kernel has W = 3 taps (compiled: 4)"),
    (dict(x=inputs(dtype=jnp.float16)["x"]), "x is float16, the kernels take bfloat16 or float32"),
    (
        dict(x=normal(2, 70, 4, 3), kernel=normal(4, 4, 3), bias=normal(4, 3)),
        "there are 12 channels, the kernels take multiples of 8",
    ),
]


@pytest.mark.parametrize("changes, reason", REASONS, ids=["width", "dtype", "channels"])
def test_what_the_kernels_do_not_take(changes, reason, declared_kernels):
    arrays = inputs() | changes
    with pytest.warns(
        RuntimeWarning, match=re.escape(f"short_conv uses XLA on an NVIDIA GPU: {reason}")
    ):
        assert "jax_flashkda" not in lowered(lambda a: short_conv(**a), "cuda", arrays)
    run = lambda a: short_conv(**a, implementation="cuda")
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        lowered(run, "cuda", arrays)
    with pytest.raises(NotImplementedError, match="platform other than cuda"):
        lowered(run, "cpu", inputs())


def test_what_the_step_does_not_take(declared_kernels):
    arrays = step_inputs(T=9, state=jnp.float32) | dict(kernel=normal(3, *CHANNELS))
    arrays["state"] = arrays["state"][:, :2]
    with pytest.raises(NotImplementedError) as error:
        lowered(lambda a: short_conv_step(**a, implementation="cuda"), "cuda", arrays)
    for reason in ("W = 3 taps", "there are 9 tokens, the kernel takes 1 to 8"):
        assert reason in str(error.value)


def test_counts(declared_kernels):
    shape = jax.ShapeDtypeStruct
    run = functools.partial(short_conv, implementation="cuda")
    huge = shape((2**20, 2**10, 256), jnp.bfloat16), shape((4, 256), jnp.float32)
    with pytest.raises(NotImplementedError, match=r"is 2147483648, must be below 2\^31"):
        lowered(run, "cuda", *huge)


def test_empty_calls_launch_nothing(declared_kernels):
    for sizes in (dict(T=0), dict(B=0)):
        arrays = inputs(**sizes, N=2)
        run = functools.partial(gradients, implementation="cuda")
        assert "jax_flashkda" not in lowered(run, "cuda", arrays, arrays["x"])


def test_export_for_cpu_and_cuda(declared_kernels):
    arrays = inputs(dtype=jnp.bfloat16)
    d_y = normal(*arrays["x"].shape, dtype=jnp.bfloat16)
    artefact = export.export(
        jax.jit(gradients), platforms=("cpu", "cuda"), disabled_checks=DISABLE_JAX_EXPORT_CHECKS
    )(arrays, d_y)
    artefact = export.deserialize(artefact.serialize())
    assert "jax_flashkda.short_conv_backward" in artefact.mlir_module()
    if jax.default_backend() == "cpu":
        got, wanted = jit(artefact.call)(arrays, d_y), jit(gradients)(arrays, d_y)
        assert_close(got, wanted)


def test_with_the_extension_itself(monkeypatch):
    extension()
    monkeypatch.setattr(_support, "_local_compute_capabilities", lambda: [])
    assert _extension.short_conv_variants() == [ROW]
    arrays = inputs(dtype=jnp.bfloat16)
    (_, results), _ = call_of(
        "short_conv_backward", lowered(gradients, "cuda", arrays, arrays["x"])
    )
    assert results[-1] == f"{_extension.short_conv_workspace_bytes(2, 70, 64)}xui8"


def test_the_layer_uses_them(declared_kernels, monkeypatch):
    nnx = pytest.importorskip("flax.nnx")
    from jax_flashkda import KimiDeltaAttention

    monkeypatch.setattr(_extension, "variants", lambda: [])
    monkeypatch.setattr(_extension, "step_variants", lambda: [])
    monkeypatch.setattr(
        _support,
        "unsupported_reasons",
        lambda problem, *_, **__: () if "conv" in problem.function else ("none",),
    )
    layer = KimiDeltaAttention(32, 2, 16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = normal(2, 8, 32, dtype=jnp.bfloat16)
    with pytest.warns(RuntimeWarning):
        text = lowered(lambda x: layer(x), "cuda", x)
        assert len(re.findall(r"@jax_flashkda\.short_conv\(", text)) == 3
        cache = layer.init_cache(2)
        text = lowered(lambda x, cache: layer.step(x, cache), "cuda", x[:, :1], cache)
        assert len(re.findall(r"@jax_flashkda\.short_conv_step\(", text)) == 3


def test_bad_implementation():
    with pytest.raises(ValueError, match="implementation must be 'cuda', 'xla' or None, got 'no'"):
        short_conv(*list(inputs().values())[:2], implementation="no")
    arrays = step_inputs()
    with pytest.raises(ValueError, match="implementation must be"):
        short_conv_step(**arrays, implementation="no")
