"""One traced program for every platform: lowering for cuda and for cpu, export for both in one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import extension
from jax import export

from jax_flashkda import _extension, _primitives, _support, kimi_delta_attention, supported
from jax_flashkda._problem import Problem

TARGET, BACKWARD = "jax_flashkda.forward", "jax_flashkda.backward"
WORKSPACE = 4321
ROW = dict(arch=90, K=128, V=128, qkv_dtype="bfloat16", g_dtypes=["bfloat16", "float32"],
           beta_dtypes=["bfloat16", "float32"])  # fmt: skip

# What these tests compile they run once.
jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0}
    if jax.default_backend() == "cpu"
    else None,
)


@pytest.fixture
def declared_kernels(monkeypatch):
    """Lowering asks the extension for a table and a size; these stand in for it where none is."""
    asked = []

    def workspace_bytes(stage, **sizes):
        asked.append((stage, sizes))
        return WORKSPACE

    monkeypatch.setattr(_extension, "missing_reason", lambda: None)
    monkeypatch.setattr(_extension, "variants", lambda: [ROW])
    monkeypatch.setattr(_extension, "register", lambda: None)
    monkeypatch.setattr(_extension, "workspace_bytes", workspace_bytes)
    monkeypatch.setattr(_support, "_local_compute_capabilities", lambda: [])
    _primitives._warn_once.cache_clear()
    return asked


def inputs(B=2, T=70, H=1, HV=2, K=128, N=3, dtype=jnp.bfloat16):
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(0.5 * random.standard_normal(shape), dtype)

    return dict(
        q=normal(B, T, H, K),
        k=normal(B, T, H, K),
        v=normal(B, T, HV, K),
        g=normal(B, T, HV, K),
        beta=normal(B, T, HV),
        A_log=jnp.zeros((HV,)),
        initial_state=normal(B, N, HV, K, K).astype(jnp.float32),
        segment_ids=jnp.asarray(np.sort(random.integers(0, 3, (B, T))), jnp.int32),
    )


def attend(arrays, **options):
    options = dict(gate="softplus", qk_l2norm=True, return_final_state=True) | options
    return kimi_delta_attention(**arrays, **options)


def gradient(arrays, **options):
    def loss(q, A_log):
        o, state = attend(arrays | dict(q=q, A_log=A_log), **options)
        return o.astype(jnp.float32).sum() + state.sum()

    return jax.grad(loss, argnums=(0, 1))(arrays["q"], arrays["A_log"])


def lowered(f, platform, *arguments):
    # A function of its own: JAX keeps what it lowered, and tests declare different kernels.
    traced = jax.jit(lambda *x: f(*x)).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def forward_calls(text):
    return calls_of(TARGET, text)


def calls_of(target, text):
    return re.findall(rf"stablehlo\.custom_call @{re.escape(target)}\b.*", text)


# ---------------------------------------------------------------------------------------- lowering


def test_one_trace_lowers_for_every_platform(declared_kernels):
    traced = jax.jit(lambda x: attend(x)).trace(inputs())
    assert len(forward_calls(traced.lower(lowering_platforms=("cuda",)).as_text())) == 1
    for platform in ("cpu", "tpu", "rocm"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "jax_flashkda" not in text and "stablehlo.while" in text


@pytest.mark.parametrize("run", [attend, lambda arrays: gradient(arrays)])
def test_smaller_heads_are_padded(run, declared_kernels):
    text = lowered(run, "cuda", inputs(K=64))
    results = re.search(r"func public @main.* -> (.*) {", text).group(1)
    assert "x64xbf16" in results and "128" not in results
    assert "jax_flashkda" in text and all(sizes["K"] == 128 for _, sizes in declared_kernels)


@pytest.mark.parametrize(
    "stage",
    ["forward", "backward", "state_maps", "state_gradient"]
    + ["prepared_forward", "prepared_backward"],
)
def test_padding_of_heads_changes_no_result(stage):
    arrays = inputs(K=12, dtype=jnp.float32) | dict(
        A_log=jnp.zeros((2, 2)), dt_bias=jnp.ones((2, 2, 12))
    )
    states = stage != "state_maps"
    if not states:
        del arrays["initial_state"]
    problem = Problem(
        gate="bounded", qk_l2norm=True, scale=0.3, max_segments=3, return_final_state=states,
        has_A_log=True, has_dt_bias=True, has_initial_state=states, has_segment_ids=True,
    )  # fmt: skip
    arrays |= dict(o=arrays["v"] + 1, final_state=arrays.get("initial_state"))
    arrays |= dict(prepared=jnp.zeros((2, 2, 70, 1024), jnp.uint8))
    arrays |= dict(betas=jnp.zeros((2, 2, 70, 4)))
    arrays |= dict(decays=jnp.zeros((2, 2, 2 + 3, 128)))
    operands = [arrays[name] for name in problem.signature(stage)[0]]
    quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    plain = functools.partial(_primitives._PRIMITIVES[stage].bind, problem=problem)
    padded = functools.partial(_primitives._with_padded_heads, stage, problem, 16, 20)
    expected, got = (quick(run)(*operands) for run in (plain, padded))
    for name, x, y in zip(problem.signature(stage)[1], got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=name)


def test_the_call_carries_every_option(declared_kernels):
    options = dict(
        gate="bounded",
        gate_lower_bound=-2.5,
        beta_is_logits=True,
        allow_neg_eigval=True,
        scale=0.125,
        padding_segment_id=-7,
    )
    (call,) = forward_calls(lowered(functools.partial(attend, **options), "cuda", inputs()))
    attributes = dict(re.findall(r"(\w+) = ([^,{}]+)", call[call.index("mhlo.backend_config") :]))
    wanted = dict(
        gate="2 : i32",
        gate_lower_bound="-2.500000e+00 : f32",
        beta_is_logits="true",
        allow_neg_eigval="true",
        qk_l2norm="true",
        scale="1.250000e-01 : f32",
        has_padding_segment_id="true",
        padding_segment_id="-7 : i32",
        max_segments="3 : i64",
        has_A_log="true",
        has_dt_bias="false",
        has_initial_state="true",
        has_segment_ids="true",
        return_final_state="true",
        return_chunk_states="false",
    )
    assert {name: attributes.get(name) for name in wanted} == wanted
    operands, results = call[call.rindex(" : (") :].split(" -> ")
    assert re.findall(r"tensor<([^>]+)>", operands) == [
        "2x70x1x128xbf16", "2x70x1x128xbf16", "2x70x2x128xbf16", "2x70x2x128xbf16", "2x70x2xbf16",
        "2x2xf32", "2x3x2x128x128xf32", "2x70xi32",
    ]  # fmt: skip
    # The workspace is there, last, and nobody above the primitive sees it.
    assert re.findall(r"tensor<([^>]+)>", results) == [
        "2x70x2x128xbf16", "2x3x2x128x128xf32", f"{WORKSPACE}xui8"
    ]  # fmt: skip
    sizes = dict(B=2, T=70, H=1, HV=2, K=128, V=128, N=3, has_segment_ids=True)
    assert declared_kernels == [("forward", sizes)]


def test_absent_operands_are_left_out(declared_kernels):
    arrays = {name: x for name, x in inputs().items() if name in ("q", "k", "v", "g", "beta")}
    run = functools.partial(attend, gate="log_decay", return_final_state=False)
    (call,) = forward_calls(lowered(run, "cuda", arrays))
    for name in ("A_log", "dt_bias", "initial_state", "segment_ids"):
        assert f"has_{name} = false" in call
    assert "return_final_state = false" in call and "max_segments = 1 : i64" in call
    operands, results = call[call.rindex(" : (") :].split(" -> ")
    assert operands.count("tensor<") == 5 and results.count("tensor<") == 2


def test_the_gradient_runs_both_kernels(declared_kernels):
    def both(arrays):
        return attend(arrays), gradient(arrays)

    text = lowered(both, "cuda", inputs())
    assert 1 <= len(forward_calls(text)) <= 2 and "stablehlo.while" not in text
    (call,) = calls_of(BACKWARD, text)
    operands, results = call[call.rindex(" : (") :].split(" -> ")
    primals = [
        "2x70x1x128xbf16", "2x70x1x128xbf16", "2x70x2x128xbf16", "2x70x2x128xbf16", "2x70x2xbf16",
        "2x2xf32", "2x3x2x128x128xf32",
    ]  # fmt: skip
    cotangents = ["2x70x2x128xbf16", "2x3x2x128x128xf32"]
    assert re.findall(r"tensor<([^>]+)>", operands) == [*primals, "2x70xi32", *cotangents]
    assert re.findall(r"tensor<([^>]+)>", results) == [*primals, f"{WORKSPACE}xui8"]
    sizes = dict(B=2, T=70, H=1, HV=2, K=128, V=128, N=3, has_segment_ids=True)
    assert ("backward", sizes) in declared_kernels


def test_chunk_states_are_a_result_of_the_kernels(declared_kernels):
    """Also where a row is too short for any; the workspace follows from the same sizes."""
    run = functools.partial(attend, return_chunk_states=True, implementation="cuda")
    for T in (150, 63):
        (call,) = forward_calls(lowered(run, "cuda", inputs(T=T)))
        assert "return_chunk_states = true" in call
        results = re.findall(r"tensor<([^>]+)>", call[call.rindex(" -> ") :])
        assert results[1:] == [
            "2x3x2x128x128xf32", f"2x{T // 64}x2x128x128xf32", f"{WORKSPACE}xui8"
        ]  # fmt: skip
        sizes = dict(B=2, T=T, H=1, HV=2, K=128, V=128, N=3, has_segment_ids=True)
        assert declared_kernels[-1] == ("forward", sizes)


def test_the_gradient_of_chunk_states_runs_on_xla(declared_kernels):
    def gradient_of(arrays, **options):
        attended = lambda v: attend(arrays | dict(v=v), return_chunk_states=True, **options)
        return jax.vjp(attended, arrays["v"])[1](attended(arrays["v"]))

    arrays = inputs(T=150)
    assert supported(**arrays, gate="softplus", return_chunk_states=True) is None
    named = functools.partial(gradient_of, implementation="cuda")
    with pytest.raises(NotImplementedError, match="take no cotangent of chunk states"):
        lowered(named, "cuda", arrays)
    with pytest.warns(RuntimeWarning, match="take no cotangent of chunk states"):
        text = lowered(gradient_of, "cuda", arrays)
    assert forward_calls(text) and not calls_of(BACKWARD, text) and "stablehlo.while" in text


def test_vmap_and_shard_map_lower_to_one_call(declared_kernels):
    arrays = inputs()
    (call,) = forward_calls(
        lowered(jax.vmap(attend), "cuda", jax.tree.map(lambda x: jnp.stack([x] * 3), arrays))
    )
    assert "tensor<6x70x1x128xbf16>" in call  # three mapped calls are one of three times the rows
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {name: jax.P() if name == "A_log" else jax.P("x") for name in arrays}
    run = jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=jax.P("x"))
    (call,) = forward_calls(lowered(run, "cuda", arrays))
    assert "tensor<1x70x1x128xbf16>" in call


@pytest.mark.parametrize("packed", [True, False])
def test_a_shard_runs_kernels_alone(declared_kernels, packed):
    """Context parallel, forward and backward: no chunk is walked by XLA."""
    arrays = inputs(T=4096)
    if not packed:
        del arrays["segment_ids"]
        arrays["initial_state"] = arrays["initial_state"][:, 0]
    mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
    split = ("q", "k", "v", "g", "beta", "segment_ids")
    specs = {name: jax.P(None, "t") if name in split else jax.P() for name in arrays}

    def both(arrays):
        call = lambda q: attend(arrays | {"q": q}, context_axis="t")
        results, pull_back = jax.vjp(call, arrays["q"])
        return *results, *pull_back(results)

    out_specs = (specs["q"], jax.P(), specs["q"])
    run = jax.shard_map(both, mesh=mesh, in_specs=(specs,), out_specs=out_specs)
    text = lowered(run, "cuda", arrays)
    assert "stablehlo.while" not in text
    counts = {
        stage: len(calls_of(target, text)) for stage, target in _primitives._FFI_TARGETS.items()
    }
    calls = {stage: count for stage, count in counts.items() if count}
    assert calls == dict(state_maps=1, prepared_forward=1, state_gradient=1, prepared_backward=1)
    # Rows are cut into pieces, of 512 tokens at least.
    rows = "8x512"
    found = re.findall(r"custom_call @jax_flashkda\.\w+\(.*: \(tensor<(\d+x\d+)x", text)
    assert len(found) == sum(calls.values()) and set(found) == {rows}
    # What one call prepares is what the next one takes; packed rows have a slot more than states.
    types = (
        f"8x2x512x1024xui8>, tensor<8x2x512x4xf32>, tensor<8x2x{8 + (4 if packed else 1)}x128xf32"
    )
    for giver, taker in ("state_maps", "prepared_forward"), ("state_gradient", "prepared_backward"):
        (given,), (taken,) = (
            calls_of(_primitives._FFI_TARGETS[stage], text) for stage in (giver, taker)
        )
        assert re.search(rf"-> .*{types}", given) and re.search(rf"{types}>\) ->", taken)


def test_with_the_extension_itself(monkeypatch):
    extension()
    monkeypatch.setattr(_support, "_local_compute_capabilities", lambda: [])
    (call,) = forward_calls(lowered(attend, "cuda", inputs()))
    sizes = dict(B=2, T=70, H=1, HV=2, K=128, V=128, N=3, has_segment_ids=True)
    assert f"{_extension.workspace_bytes('forward', **sizes)}xui8" in call


def test_empty_calls_launch_nothing(declared_kernels):
    for sizes in (dict(T=0), dict(B=0)):
        assert "jax_flashkda" not in lowered(attend, "cuda", inputs(**sizes))


# -------------------------------------------------------------------------------------- the choice


def test_xla_by_name_is_xla_on_an_nvidia_gpu(declared_kernels):
    assert "jax_flashkda" not in lowered(
        functools.partial(attend, implementation="xla"), "cuda", inputs()
    )


def test_none_falls_back_with_one_warning_that_says_why(declared_kernels):
    arrays = inputs(K=32)
    with pytest.warns(RuntimeWarning) as warnings:
        for _ in range(2):
            text = lowered(attend, "cuda", arrays)
            assert "jax_flashkda" not in text
    (warning,) = warnings
    assert "uses XLA on an NVIDIA GPU" in str(warning.message)
    assert "K = 32, V = 32 (compiled: K = 128, V = 128; smaller" in str(warning.message)


@pytest.mark.parametrize("run", [attend, gradient])
def test_cuda_by_name_never_falls_back(run, declared_kernels):
    run = functools.partial(run, implementation="cuda")
    with pytest.raises(NotImplementedError) as error:
        lowered(run, "cuda", inputs(K=32, dtype=jnp.float16))
    for reason in (
        "K = 32, V = 32",
        "q, k, v are float16",
        "g is float16",
        "beta is float16",
        "xla",
    ):
        assert reason in str(error.value)
    for platform in ("cpu", "tpu", "rocm"):
        with pytest.raises(NotImplementedError, match="platform other than cuda"):
            lowered(run, platform, inputs())


def test_cuda_by_name_without_the_extension_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(_extension, "missing_reason", lambda: "there was no nvcc")
    with pytest.raises(NotImplementedError, match="there was no nvcc"):
        lowered(functools.partial(attend, implementation="cuda"), "cuda", inputs())


def test_every_local_gpu_counts(declared_kernels, monkeypatch):
    monkeypatch.setattr(_support, "_local_compute_capabilities", lambda: ["10.0", "9.0"])
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0, not 10\.0"):
        lowered(functools.partial(attend, implementation="cuda"), "cuda", inputs())


def reasons(capability=None, K=128, V=128, dtypes=("bfloat16",) * 3, B=1, T=4, N=1):
    shape = jax.ShapeDtypeStruct
    qkv, g, beta = map(jnp.dtype, dtypes)
    operands = [
        shape((B, T, 1, K), qkv), shape((B, T, 1, K), qkv), shape((B, T, 2, V), qkv),
        shape((B, T, 2, K), g), shape((B, T, 2), beta),
    ]  # fmt: skip
    return _support.unsupported_reasons(Problem(max_segments=N), operands, capability)


def test_reasons(declared_kernels):
    assert reasons() == reasons("9.0") == ()
    assert reasons(dtypes=("bfloat16", "float32", "bfloat16")) == ()
    assert reasons("8.0") == ("the kernels are for compute capability 9.0, not 8.0",)
    assert reasons(K=64, V=64) == reasons(V=64) == reasons(K=100) == ()
    (dims,) = reasons(V=63)
    assert dims == (
        "there is no kernel for head dims K = 128, V = 63 (compiled: K = 128, V = 128; smaller "
        "ones are padded, at most to twice their size)"
    )
    assert len(reasons(K=129)) == 1
    assert reasons(dtypes=("float32", "float16", "float64")) == (
        "q, k, v are float32, the kernels take bfloat16",
        "g is float16, the kernels take bfloat16 or float32",
        "beta is float64, the kernels take bfloat16 or float32",
    )
    assert reasons(B=2**16, T=2**15) == (
        "B * T is 2147483648, must be below 2^31: split the batch",
    )
    (slots,) = reasons(N=2**30)
    assert slots.startswith("B * HV * N is 2147483648") and "max_segments" in slots
    assert len(reasons("8.0", V=63, B=2**31)) == 4  # an unknown architecture has no rows to compare


def test_reasons_come_from_the_nearest_rows(declared_kernels, monkeypatch):
    """A second architecture and a second head dim need no word of Python."""
    half = ROW | dict(K=64, V=64, qkv_dtype="float16", g_dtypes=["float16"])
    monkeypatch.setattr(_extension, "variants", lambda: [ROW, half, ROW | dict(arch=100)])
    assert reasons("10.0") == ()
    assert reasons(K=64, V=64, dtypes=("float16", "float16", "float32")) == ()
    assert reasons(K=64, V=64, dtypes=("float16", "float32", "float32")) == (
        "g is float32, the kernels take float16",
    )
    assert len(reasons("10.0", K=64, V=64)) == 1


# ------------------------------------------------------------------------------------------ export


def round_trip(f, arrays, platforms):
    exported = export.export(
        jax.jit(f), platforms=platforms, disabled_checks=_primitives.DISABLE_JAX_EXPORT_CHECKS
    )(arrays)
    return export.deserialize(exported.serialize())


def assert_equal(got, wanted):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=1e-5, atol=1e-5
        )


def test_export_for_cpu():
    arrays = inputs(K=16, dtype=jnp.float32)
    artefact = round_trip(attend, arrays, ("cpu",))
    assert_equal(jit(artefact.call)(arrays), jit(attend)(arrays))


def test_export_for_cpu_and_cuda_runs_on_cpu(declared_kernels):
    def train(arrays):
        return attend(arrays), gradient(arrays)

    arrays = inputs()
    artefact = round_trip(train, arrays, ("cpu", "cuda"))
    assert artefact.platforms == ("cpu", "cuda")
    assert forward_calls(artefact.mlir_module())
    if jax.default_backend() == "cpu":
        assert_equal(jit(artefact.call)(arrays), jit(train)(arrays))


def test_export_needs_the_constant(declared_kernels):
    """What the constant is for; without it jax.export refuses the custom call."""
    with pytest.raises(ValueError, match=re.escape(TARGET)):
        export.export(jax.jit(attend), platforms=("cuda",))(inputs())


def test_export_of_cuda_by_name_is_for_cuda_alone(declared_kernels):
    run = functools.partial(attend, implementation="cuda")
    assert round_trip(run, inputs(), ("cuda",)).platforms == ("cuda",)
    with pytest.raises(NotImplementedError, match="platform other than cuda"):
        round_trip(run, inputs(), ("cpu", "cuda"))
