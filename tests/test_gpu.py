"""The kernels on the GPU: benchmark shapes, every transform, command buffers, repeatability."""

import dataclasses
import functools
import glob
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from call import run
from cases import Case
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashkda import kimi_delta_attention

pytestmark = pytest.mark.gpu


RAW = dict(gate="softplus", A_log=True, dt_bias=True, beta_is_logits=True, qk_l2norm=True)
STATES = dict(initial_state=True, final_state=True)
SMALL = Case(T=200, B=2, H=2, HV=4, K=128, V=128, dtype="bfloat16", **RAW, **STATES)
TOKENS = ("q", "k", "v", "g", "beta")


def kda(case, **more):
    options = {name: x for name, x in case.options.items() if x is not None}
    options |= dict(implementation="cuda") | more
    return functools.partial(kimi_delta_attention, **options)


def positional(arrays):
    """The call's arrays as (tokens.., A_log, dt_bias, initial_state)."""
    return [arrays[name] for name in (*TOKENS, "A_log", "dt_bias", "initial_state")]


def attend(case):
    fn = kda(case)
    return lambda q, k, v, g, beta, A_log, dt_bias, initial_state: fn(
        q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state
    )


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


# B, T, H, segment lengths of the benchmark.
SHAPES = {
    "fix8k_h96": (1, 8192, 96, None),
    "mixed8k_h96": (1, 8192, 96, (1300, 547, 2048, 963, 271, 3063)),
    "uni8k_h96": (1, 8192, 96, (1024,) * 8),
    "fix8k_h64": (1, 8192, 64, None),
    "b4t4k_h32": (4, 4096, 32, None),
    "b1t32k_h16": (1, 32768, 16, None),
    "b1t64k_h8": (1, 65536, 8, None),
}


def _benchmark_arrays(B, T, H, regime):
    """Raw inputs in one of the two gate regimes, drawn on the GPU."""
    keys = jax.random.split(jax.random.key(B + T + H), 7)
    q, k, v, g = (jax.random.normal(key, (B, T, H, 128), jnp.bfloat16) for key in keys[:4])
    beta = jax.random.normal(keys[4], (B, T, H), jnp.bfloat16)
    uniform = [
        jax.random.uniform(key, shape)
        for key, shape in zip(keys[5:], [(H,), (H, 128)], strict=True)
    ]
    if regime == "fast":  # FlashKDA's: the state is forgotten within 16 tokens
        A_log, dt_bias = uniform
    else:  # the layer's initialisation: mean log decay -0.02
        dt = jnp.exp(jnp.log(1e-3) + uniform[1] * jnp.log(100.0))
        A_log, dt_bias, g = jnp.zeros(H), dt + jnp.log(-jnp.expm1(-dt)), (0.3 * g).astype(g.dtype)
    return dict(q=q, k=k, v=v, g=g, beta=beta, A_log=A_log, dt_bias=dt_bias)


@pytest.mark.parametrize("regime", ["fast", "slow"])
@pytest.mark.parametrize("shape", SHAPES)
def test_benchmark_shapes(shape, regime):
    """Two heads of each shape against the recurrence; which two moves with the shape."""
    B, T, H, lengths = SHAPES[shape]
    ids = (
        None
        if lengths is None
        else (tuple(np.repeat(np.arange(1, len(lengths) + 1), lengths).tolist()),) * B
    )
    few = Case(T=T, B=B, H=2, HV=2, K=128, V=128, dtype="bfloat16", segment_ids=ids, **RAW)
    few = dataclasses.replace(few, final_state=lengths is None)
    case = dataclasses.replace(few, H=H, HV=H)
    arrays = _benchmark_arrays(B, T, H, regime)
    if ids is not None:
        arrays["segment_ids"] = jnp.asarray(case.ids)
    rng = np.random.default_rng(len(shape))
    got = run(case, "cuda", gradients=False, arrays=arrays)
    heads = np.sort(rng.choice(H, 2, replace=False))
    pick = lambda name, x: x[heads] if name in ("A_log", "dt_bias") else x[:, :, heads]
    some = {name: x if name == "segment_ids" else pick(name, x) for name, x in arrays.items()}
    truth, peer = (oracle.evaluate_arrays(few, some, kind) for kind in ("truth", "peer"))
    failures = oracle.compare(few, "o", np.asarray(got["o"][:, :, heads]), truth, peer)
    if case.final_state:
        state = np.asarray(got["final_state"][:, heads])
        failures += oracle.compare(few, "final_state", state, truth, peer)
    assert not failures, "\n".join(failures)


def test_twenty_runs_are_bitwise_equal():
    first = run(SMALL, "cuda")
    for _ in range(19):
        assert_same(first, run(SMALL, "cuda"))


def test_gradients():
    arrays = SMALL.arrays()
    attend = lambda arrays: kda(SMALL)(**arrays)
    results, pull_back = jax.vjp(jax.jit(attend), arrays)
    gradients = jax.jit(pull_back)(SMALL.cotangents())[0]
    named = {oracle.GRADIENTS[name]: x for name, x in gradients.items()}
    oracle.check(SMALL, dict(zip(("o", "final_state"), results, strict=True)) | named)


@pytest.mark.parametrize("K, V", [(64, 64), (96, 128)])
def test_smaller_heads(K, V):
    """Padded to those of the kernels; packed, with states and grouped values."""
    ids = ((1,) * 60 + (2,) * 140, (0,) * 50 + (3,) * 150)
    case = dataclasses.replace(SMALL, K=K, V=V, H=8, HV=16, segment_ids=ids, max_segments=3)
    oracle.check(case, run(case, "cuda"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_on_a_gpu(dtype):
    """What runs there where the kernels do not: packed rows with padding, states, all gradients."""
    ids = ((1,) * 60 + (2,) * 90 + (0,) * 50, (0,) * 10 + (3,) * 190)
    sizes = dict(H=8, HV=16, K=32, V=16, dtype=dtype)
    case = dataclasses.replace(SMALL, segment_ids=ids, max_segments=3, **sizes)
    oracle.check(case, run(case, "xla"))


def test_the_gradient_is_the_kernels():
    arrays, cotangents = SMALL.arrays(), SMALL.cotangents()

    def gradients(arrays):
        return jax.vjp(lambda arrays: kda(SMALL)(**arrays), arrays)[1](cotangents)

    text = jax.jit(gradients).lower(arrays).compile().as_text()
    assert "jax_flashkda.backward" in text and "while(" not in text


@pytest.mark.parametrize("which", range(8))
def test_vmap(which):
    """vmap over one argument equals a loop over it, bitwise."""
    arguments = positional(SMALL.arrays())
    axes = [None] * 8
    axes[which] = 0
    arguments[which] = jnp.stack([arguments[which], arguments[which] * 0.5])
    mapped = jax.jit(jax.vmap(attend(SMALL), in_axes=axes))(*arguments)
    alone = jax.jit(attend(SMALL))
    for i in range(2):
        row = [x[i] if axis == 0 else x for x, axis in zip(arguments, axes, strict=True)]
        assert_same(jax.tree.map(lambda x, i=i: x[i], mapped), alone(*row))


def test_vmap_of_grad():
    arguments = positional(SMALL.arrays())
    loss = lambda q, *rest: sum(
        jnp.sum(x.astype(jnp.float32) ** 2) for x in attend(SMALL)(q, *rest)
    )
    qs = jnp.stack([arguments[0], arguments[0] * 0.5])
    mapped = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, *[None] * 7)))(qs, *arguments[1:])
    for i in range(2):
        assert_same(mapped[i], jax.jit(jax.grad(loss))(qs[i], *arguments[1:]))


def _specs(batch, heads):
    token = P(batch, None, heads)
    return (token,) * 5 + (P(heads), P(heads), P(batch, heads))


def both_ways(case):
    """Results, and gradients but for those of the gate's parameters, which sum over the batch."""

    def fn(*arguments):
        parameters = arguments[5:7]
        results, pull_back = jax.vjp(
            lambda *x: attend(case)(*x[:5], *parameters, x[5]), *arguments[:5], arguments[7]
        )
        return results, pull_back(results)

    return fn


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_sharded(kind):
    """Batch over all GPUs (one will do): no collective, and the bits of one device."""
    devices = jax.devices()
    case = dataclasses.replace(SMALL, B=2 * len(devices))
    arguments = positional(case.arrays())
    alone = jax.jit(both_ways(case))(*arguments)
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(axis_type,), devices=devices)
    specs = _specs("data", None)
    placed = [
        jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arguments, specs, strict=True)
    ]
    fn = both_ways(case)
    if kind == "shard_map":
        fn = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P("data"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(fn).lower(*placed).compile()
        text = compiled.as_text()
        assert "jax_flashkda.forward" in text and "jax_flashkda.backward" in text
        assert not any(
            op in text for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        )
        assert_same(compiled(*placed), alone)


def test_another_device_first():
    if len(jax.devices()) < 2:
        pytest.skip("one GPU")
    arguments = positional(SMALL.arrays())
    expected = jax.jit(attend(SMALL))(*arguments)
    for device in reversed(jax.devices()):
        placed = jax.device_put(arguments, device)
        results = jax.jit(attend(SMALL))(*placed)
        assert results[0].devices() == {device}
        assert_same(results, expected)


def test_command_buffer(tmp_path):
    """Captured, by the profile's word; replayed with other data and segments; the same bits."""
    ids = ((1,) * 60 + (2,) * 140, (3,) * 200)
    case = dataclasses.replace(SMALL, segment_ids=ids, max_segments=3)
    arrays = case.arrays()
    other = {name: x[::-1] if name not in ("A_log", "dt_bias") else x for name, x in arrays.items()}
    fn = kda(case)

    def several(arrays):
        results = []
        for i in range(4):  # enough launches to be worth a graph
            tokens = {name: jnp.roll(arrays[name], i, axis=0) for name in TOKENS}
            both, pull_back = jax.vjp(lambda tokens: fn(**(arrays | tokens)), tokens)
            results.append((both, pull_back(both)))
        return results

    lowered = jax.jit(several).lower(arrays)
    off = lowered.compile({"xla_gpu_enable_command_buffer": ""})
    on = lowered.compile(
        {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1}
    )
    for inputs in (arrays, other, arrays):
        expected = off(inputs)
        for _ in range(3):
            assert_same(on(inputs), expected)
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(on(arrays))
    assert _traced(tmp_path, "GraphLaunch"), "the call was not captured"
    with jax.profiler.trace(str(tmp_path / "off")):
        jax.block_until_ready(off(arrays))
    assert not _traced(tmp_path / "off", "GraphLaunch")


def _traced(folder, name):
    traces = glob.glob(f"{folder}/plugins/**/*.trace.json.gz", recursive=True)
    assert traces
    events = json.loads(gzip.open(sorted(traces)[-1]).read())["traceEvents"]
    return [event["name"] for event in events if name in event.get("name", "")]
