"""The short convolution by its definition, and the layer against the one in `transformers`."""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import runs
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracle import CAP_FP32, COMPILE_QUICKLY

nnx = pytest.importorskip("flax.nnx", reason="the layer needs flax")

from jax_flashkda import kimi_delta_attention  # noqa: E402
from jax_flashkda._layer import KimiDeltaAttention  # noqa: E402
from jax_flashkda._short_conv import short_conv  # noqa: E402

QUICKLY = COMPILE_QUICKLY if jax.default_backend() == "cpu" else None
HIDDEN = 48
# One id used twice, padding of both kinds inside, and segments shorter than the convolution.
IDS = np.array(
    [
        [1] * 20 + [2] * 3 + [1] * 17 + [0] * 4 + [9] + [7] * 26 + [-1] * 2 + [7] * 27,
        [0] * 3 + [5] * 64 + [6] * 2 + [5] * 30 + [0],
    ],
    np.int32,
)


def make_layer(*args, **options):
    return KimiDeltaAttention(*(args or (HIDDEN, 2, 32)), rngs=nnx.Rngs(0), **options)


def quick_jit(function):
    """nnx.jit of function(layer, ..) without optimisation: where a result is compared with another
    program's, how well it is compiled does not matter.
    """

    def compiled(layer, *arrays, **more):
        graphdef, state = nnx.split(layer)
        run = lambda state, *x, **y: function(nnx.merge(graphdef, state), *x, **y)
        return jax.jit(run, compiler_options=QUICKLY)(state, *arrays, **more)

    return compiled


def call(layer, x, segment_ids=None):
    return layer(x, segment_ids=segment_ids)


def make_input(T=IDS.shape[1], B=2, seed=1):
    return jax.random.normal(jax.random.key(seed), (B, T, HIDDEN))


def documents(ids, padding_segment_id=0):
    """[(start, stop)] of the segments of one row."""
    return [(start, start + length) for start, length in runs(ids, padding_segment_id)]


def assert_close(got, expected, name=""):
    """Relative root mean square error within what fp32 promises."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"{name}: {got.shape} instead of {expected.shape}"
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert error <= CAP_FP32, f"{name}: relative error {error:.2e}"


def assert_same_bits(got, expected):
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


# The short convolution.


def convolve_by_definition(x, kernel, bias, ids, padding_segment_id):
    """One document at a time, in float64; zero elsewhere."""
    x, kernel, bias = (np.asarray(array, np.float64) for array in (x, kernel, bias))
    y = np.zeros_like(x)
    for row in range(len(x)):
        for start, stop in documents(ids[row], padding_segment_id):
            for t, w in itertools.product(range(start, stop), range(len(kernel))):
                source = t - (len(kernel) - 1) + w
                if source >= start:
                    y[row, t] += kernel[w] * x[row, source]
            y[row, start:stop] += bias
            y[row, start:stop] /= 1 + np.exp(-y[row, start:stop])
    return y


@pytest.mark.parametrize("width", [1, 2, 4, 6])
@pytest.mark.parametrize("padding_segment_id", [0, 7, None])
def test_short_conv_is_its_definition(width, padding_segment_id):
    x = jax.random.normal(jax.random.key(0), (*IDS.shape, 2, 3))
    kernel = jax.random.normal(jax.random.key(1), (width, 2, 3))
    bias = jax.random.normal(jax.random.key(2), (2, 3))
    y = short_conv(x, kernel, bias, segment_ids=IDS, padding_segment_id=padding_segment_id)
    assert_close(y, convolve_by_definition(x, kernel, bias, IDS, padding_segment_id))

    whole = short_conv(x, kernel, bias)
    assert_close(whole, convolve_by_definition(x, kernel, bias, np.ones_like(IDS), None))
    linear = short_conv(x, kernel, bias, activation=None)
    assert_close(jax.nn.silu(linear), whole)


def test_short_conv_of_rows_shorter_than_the_kernel():
    kernel = jnp.ones((4, 3))
    for T in (0, 1, 2):
        x, ids = jnp.ones((2, T, 3)), jnp.ones((2, T), jnp.int32)
        expected = jnp.arange(1, T + 1.0)[None, :, None] * jnp.ones((2, T, 3))
        assert_same_bits(short_conv(x, kernel, activation=None), expected)
        assert_same_bits(short_conv(x, kernel, activation=None, segment_ids=ids), expected)


def test_short_conv_rounds_once():
    x = jax.random.normal(jax.random.key(0), (*IDS.shape, 3)).astype(jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (4, 3))
    y = short_conv(x, kernel, segment_ids=IDS)
    assert y.dtype == jnp.bfloat16
    in_fp32 = short_conv(x.astype(jnp.float32), kernel, segment_ids=IDS)
    assert_same_bits(y, in_fp32.astype(jnp.bfloat16))


def test_nothing_crosses_a_boundary_of_the_short_conv():
    kernel = jax.random.normal(jax.random.key(1), (4, 3))
    x = jax.random.normal(jax.random.key(0), (*IDS.shape, 3))
    d_y = jax.random.normal(jax.random.key(2), x.shape)

    @jax.jit
    def forward_and_backward(x, kernel, d_y):
        y, pull_back = jax.vjp(lambda *a: short_conv(*a, segment_ids=IDS), x, kernel)
        return y, *pull_back(d_y)

    y, dx, d_kernel = forward_and_backward(x, kernel, d_y)
    padding = (IDS <= 0)[..., None]
    assert not np.asarray(y)[np.broadcast_to(padding, y.shape)].any()
    assert not np.asarray(dx)[np.broadcast_to(padding, y.shape)].any()

    poisoned = forward_and_backward(
        jnp.where(padding, jnp.nan, x), kernel, jnp.where(padding, jnp.inf, d_y)
    )
    for got, expected in zip(poisoned, (y, dx, d_kernel), strict=True):
        assert_same_bits(got, expected)
    for start, stop in documents(IDS[0]):
        others = np.ones(IDS.shape, bool)
        others[0, start:stop] = False
        hit = jnp.asarray(~others)[..., None]
        poisoned = forward_and_backward(
            jnp.where(hit, jnp.nan, x), kernel, jnp.where(hit, jnp.nan, d_y)
        )
        for got, expected in zip(poisoned, (y, dx), strict=False):
            assert_same_bits(got[others], expected[others])


def test_short_conv_names_every_bad_argument():
    with pytest.raises(ValueError) as error:
        short_conv(
            jnp.ones((2, 5, 3)),
            jnp.ones((4, 2)),
            jnp.ones(3, int),
            activation="relu",
            segment_ids=jnp.ones((2, 4)),
        )
    for part in (
        "kernel must be [W, ...channels] with W >= 1 and the channels of x (3,), got (4, 2)",
        "bias must be a floating-point array, got int32",
        "activation must be 'silu' or None, got 'relu'",
        "segment_ids must be [B, T] = (2, 5), got (2, 4)",
        "segment_ids must be integers, got float32",
    ):
        assert part in str(error.value)


# The layer against transformers, with autograd's gradients.

ORACLES = {
    "softplus": ("kimi_linear", "KimiLinearConfig", "KimiLinearDeltaAttention"),
    "bounded": ("glm5_next", "Glm5NextTextConfig", "Glm5NextTextLinearAttention"),
}


@functools.cache
def oracle_layer(gate):
    """The KDA layer of transformers with random weights; skips where torch does not exist."""
    torch = pytest.importorskip("torch", reason="torch is installed on Python 3.11 only")
    pytest.importorskip("transformers", reason="transformers is installed on Python 3.11 only")
    import importlib

    package, config_name, layer_name = ORACLES[gate]
    package = f"transformers.models.{package}"
    config = getattr(
        importlib.import_module(f"{package}.configuration_{package.split('.')[-1]}"), config_name
    )(hidden_size=HIDDEN, linear_num_heads=2, linear_head_dim=32, num_hidden_layers=1)
    module = importlib.import_module(f"{package}.modeling_{package.split('.')[-1]}")
    layer = getattr(module, layer_name)(config, layer_idx=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-2, 1)
            elif name.endswith("dt_bias"):
                parameter.uniform_(-3, 1)
            elif name == "o_norm.weight":
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return layer


def to_jax(arrays):
    """Our parameters by path from theirs, {name: array}; also maps their gradients to ours."""
    heads = (2, 32)
    split = lambda weight: weight.T.reshape(-1, *heads)
    ours = {f"{n}_proj.kernel": split(arrays[f"{n}_proj.weight"]) for n in "qkv"}
    conv = np.split(arrays["conv1d.weight"][:, 0, :].T, 3, axis=1)
    ours |= {f"{n}_conv1d.kernel": w.reshape(-1, *heads) for n, w in zip("qkv", conv, strict=True)}
    ours |= {
        "f_a_proj.kernel": arrays["forget_gate.f_a_proj.weight"].T,
        "f_b_proj.kernel": split(arrays["forget_gate.f_b_proj.weight"]),
        "A_log": arrays["forget_gate.A_log"].reshape(-1),
        "dt_bias": arrays["forget_gate.dt_bias"].reshape(heads),
        "b_proj.kernel": arrays["b_proj.weight"].T,
        "g_a_proj.kernel": arrays["g_a_proj.weight"].T,
        "g_b_proj.kernel": split(arrays["g_b_proj.weight"]),
        "o_norm.scale": arrays["o_norm.weight"],
        "o_proj.kernel": arrays["o_proj.weight"].T.reshape(*heads, HIDDEN),
    }
    return ours


def flat(state):
    return {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def layer_like(oracle, gate):
    layer = make_layer(gate=gate)
    weights = to_jax({name: p.detach().numpy() for name, p in oracle.named_parameters()})
    state = nnx.state(layer)
    assert flat(state).keys() == weights.keys()
    for path, variable in nnx.to_flat_state(state):
        expected = weights[".".join(path)]
        assert variable.shape == expected.shape, path
        variable[...] = jnp.array(expected)
    nnx.update(layer, state)
    return layer


@pytest.mark.parametrize("gate", ORACLES)
def test_layer_reproduces_transformers(gate):
    oracle = oracle_layer(gate)
    import torch

    layer, x = layer_like(oracle, gate), make_input()
    d_y = make_input(seed=2)
    theirs = torch.tensor(np.asarray(x), requires_grad=True)
    oracle.zero_grad()
    y = oracle(theirs)
    y.backward(torch.tensor(np.asarray(d_y)))

    @quick_jit
    @functools.partial(nnx.grad, argnums=(0, 1), has_aux=True)
    def gradients(layer, x):
        y = layer(x)
        return jnp.sum(y * d_y), y

    (d_layer, dx), ours = gradients(layer, x)
    assert_close(ours, y.detach().numpy(), "y")
    assert_close(dx, theirs.grad.numpy(), "dx")
    expected = to_jax({name: p.grad.numpy() for name, p in oracle.named_parameters()})
    for name, gradient in flat(d_layer).items():
        assert_close(gradient, expected[name], f"gradient of {name}")


@pytest.mark.parametrize("gate", ORACLES)
def test_packed_rows_equal_one_call_of_transformers_per_document(gate):
    oracle = oracle_layer(gate)
    import torch

    x = make_input()
    y = np.asarray(quick_jit(call)(layer_like(oracle, gate), x, segment_ids=IDS))
    assert not y[IDS <= 0].any()
    for row in range(len(IDS)):
        for start, stop in documents(IDS[row]):
            with torch.no_grad():
                alone = oracle(torch.tensor(np.asarray(x[row : row + 1, start:stop])))
            assert_close(y[row, start:stop], alone[0].numpy(), f"tokens {start}:{stop}")


# The layer's own promises.


def test_grouped_values_full_rank_gate_and_bias():
    """What transformers' layers lack, against the formula of the module."""
    layer = make_layer(
        HIDDEN,
        2,
        16,
        num_value_heads=4,
        value_head_dim=24,
        conv_width=3,
        gate="bounded",
        gate_lower_bound=-2.0,
        gate_rank=5,
        output_gate="full_rank",
        output_gate_bias=True,
        allow_neg_eigval=True,
        norm_eps=1e-3,
    )
    layer.g_proj.bias[...] = jax.random.normal(jax.random.key(3), (4, 24))
    layer.A_log[...] = jax.random.normal(jax.random.key(4), (4,))
    p, x = (
        {name: jnp.asarray(array) for name, array in flat(nnx.state(layer)).items()},
        make_input(),
    )
    assert p["f_a_proj.kernel"].shape == (HIDDEN, 5)

    def project(name):
        y = jnp.tensordot(x, p[f"{name}_proj.kernel"], 1)
        return short_conv(y, p[f"{name}_conv1d.kernel"], segment_ids=IDS)

    attend = functools.partial(
        kimi_delta_attention,
        gate="bounded",
        gate_lower_bound=-2.0,
        A_log=p["A_log"],
        dt_bias=p["dt_bias"],
        beta_is_logits=True,
        allow_neg_eigval=True,
        qk_l2norm=True,
        segment_ids=IDS,
    )
    o = jax.jit(attend, compiler_options=QUICKLY)(
        *map(project, "qkv"),
        jnp.tensordot(x @ p["f_a_proj.kernel"], p["f_b_proj.kernel"], 1),
        x @ p["b_proj.kernel"],
    )
    output_gate = jnp.tensordot(x, p["g_proj.kernel"], 1) + p["g_proj.bias"]
    o = o / jnp.sqrt(jnp.mean(o**2, -1, keepdims=True) + 1e-3) * jax.nn.sigmoid(output_gate)
    y = jnp.tensordot(o * p["o_norm.scale"], p["o_proj.kernel"], 2)
    assert_close(quick_jit(call)(layer, x, segment_ids=IDS), y)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("gate", ["softplus", "bounded"])
def test_initial_values(gate, param_dtype):
    layer = make_layer(HIDDEN, 64, 16, gate=gate, param_dtype=param_dtype)
    for name, array in flat(nnx.state(layer)).items():
        expected = jnp.float32 if name in ("A_log", "dt_bias") else param_dtype
        assert array.dtype == expected, name
        assert jnp.isfinite(array).all(), name
    amplitude = np.exp(layer.A_log[...])
    if gate == "softplus":
        assert 1 <= amplitude.min() < 3 and 13 < amplitude.max() <= 16
    else:
        assert (amplitude == 1).all()
    log_dt = np.log(jax.nn.softplus(layer.dt_bias[...]))
    low, high = np.log(1e-3), np.log(1e-1)
    assert low - 1e-4 <= log_dt.min() and log_dt.max() <= high + 1e-4
    quantiles = np.quantile(log_dt, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(
        quantiles, low + (high - low) * np.array([0.25, 0.5, 0.75]), atol=0.4
    )


@pytest.mark.parametrize(
    "x_dtype, param_dtype, dtype, expected",
    [
        ("float32", "float32", None, "float32"),
        ("bfloat16", "bfloat16", None, "bfloat16"),
        ("bfloat16", "float32", None, "float32"),
        ("float32", "float32", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "float16", "float16"),
    ],
)
def test_types(x_dtype, param_dtype, dtype, expected):
    layer = make_layer(dtype=dtype, param_dtype=param_dtype)
    x = make_input(T=20).astype(x_dtype)
    y = jax.eval_shape(layer, x)
    assert y.dtype == expected and y.shape == x.shape
    grads = jax.eval_shape(nnx.grad(lambda layer: layer(x).astype("float32").sum()), layer)
    types = lambda state: {path: leaf.dtype for path, leaf in nnx.to_flat_state(state)}
    assert types(grads) == types(nnx.state(layer))


def test_bf16_computation_is_fp32_rounded_a_few_times():
    layer, x = make_layer(dtype=jnp.bfloat16), make_input()

    @quick_jit
    def gradients(layer, x):
        loss = lambda layer: ((y := layer(x, segment_ids=IDS)).astype("float32").sum(), y)
        return nnx.grad(loss, has_aux=True)(layer)

    grads, y = gradients(layer, x)
    for name, gradient in flat(grads).items():
        assert gradient.dtype == jnp.float32 and jnp.isfinite(gradient).all(), name
    in_fp32 = quick_jit(call)(make_layer(), x, segment_ids=IDS)
    error = jnp.sqrt(jnp.mean((y - in_fp32) ** 2) / jnp.mean(in_fp32**2))
    assert error < 2 * jnp.finfo(jnp.bfloat16).eps


def test_a_nan_stays_in_its_document():
    layer, x, d_y = make_layer(), make_input(), make_input(seed=2)

    @nnx.jit
    def forward_and_backward(layer, x, d_y):
        def loss(layer, x):
            y = layer(x, segment_ids=IDS)
            return jnp.sum(jnp.where((IDS > 0)[..., None], y * d_y, 0)), y

        (d_layer, dx), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return y, dx, d_layer

    y, dx, d_layer = forward_and_backward(layer, x, d_y)
    padding = (IDS <= 0)[..., None]
    in_padding = forward_and_backward(layer, jnp.where(padding, jnp.nan, x), d_y)
    jax.tree.map(assert_same_bits, in_padding, (y, dx, d_layer))
    assert all(jnp.isfinite(gradient).all() for gradient in flat(d_layer).values())
    assert not np.asarray(y)[IDS <= 0].any() and not np.asarray(dx)[IDS <= 0].any()

    in_document = forward_and_backward(layer, x.at[0, 20:23].set(jnp.nan), d_y)
    others = np.ones(IDS.shape, bool)
    others[0, 20:23] = False
    assert_same_bits(in_document[0][others], y[others])
    assert_same_bits(in_document[1][others], dx[others])


def test_scan_over_layers_with_remat_equals_a_loop():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def stack(rngs):
        return KimiDeltaAttention(HIDDEN, 2, 16, residual_name="kda", rngs=rngs)

    layers, x = stack(nnx.Rngs(0)), make_input(T=40)
    assert layers.A_log.shape == (2, 2) and len(np.unique(layers.A_log[...])) == 4
    policy = jax.checkpoint_policies.save_only_these_names("kda", "query_proj")

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat(policy=policy)
    def through(layer, x):
        return x + layer(x, segment_ids=jnp.asarray(IDS[:, :40]))

    loss_of = lambda layers, x: jnp.mean(through(layers, x) ** 2)
    loss, grads = quick_jit(nnx.value_and_grad(loss_of))(layers, x)

    graphdef, state = nnx.split(layers)

    def looped(state):
        y = x
        for i in range(2):
            layer = nnx.merge(graphdef, jax.tree.map(operator.itemgetter(i), state))
            y = y + layer(y, segment_ids=IDS[:, :40])
        return jnp.mean(y**2)

    looped = jax.jit(jax.value_and_grad(looped), compiler_options=QUICKLY)
    expected, expected_grads = looped(state)
    assert_close(loss, expected)
    for name, gradient in flat(grads).items():
        assert_close(gradient, flat(expected_grads)[name], name)


def test_linen_through_the_bridge():
    x = make_input()
    layer = nnx.bridge.to_linen(KimiDeltaAttention, HIDDEN, 2, 32, gate="bounded")
    variables = jax.jit(layer.init, compiler_options=QUICKLY)(jax.random.key(0), x)
    y = jax.jit(layer.apply, compiler_options=QUICKLY)(variables, x, segment_ids=IDS)

    ours = make_layer(gate="bounded")
    state = nnx.state(ours)
    params = variables["params"]
    for path, variable in nnx.to_flat_state(state):
        variable[...] = functools.reduce(lambda tree, key: tree[key], path, params)
    nnx.update(ours, state)
    assert_close(y, quick_jit(call)(ours, x, segment_ids=IDS))


def test_axis_names_reach_every_parameter():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    names = {
        "A_log": "heads",
        "dt_bias": "heads,None",
        "b_proj.kernel": "embed,heads",
        "o_proj.kernel": "heads,None,embed",
        "o_norm.scale": "None",
        "g_proj.bias": "heads,None",
        "f_a_proj.kernel": "embed,None",
        "f_b_proj.kernel": "None,heads,None",
    }
    names |= {f"{n}_proj.kernel": "embed,heads,None" for n in "qkvg"}
    names |= {f"{n}_conv1d.kernel": "None,heads,None" for n in "qkv"}
    with jax.set_mesh(mesh), nnx.logical_axis_rules([("embed", "data"), ("heads", "model")]):
        layer = make_layer(
            HIDDEN,
            4,
            16,
            axis_names=("embed", "heads"),
            output_gate="full_rank",
            output_gate_bias=True,
        )
    for path, variable in nnx.to_flat_state(nnx.state(layer)):
        got = ",".join(map(str, variable.get_metadata()["out_sharding"]))
        assert got == names.pop(".".join(path)), path
    assert not names
    assert layer.q_proj.kernel[...].sharding.spec == PartitionSpec("data", "model", None)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_over_batch_and_heads(axis_type):
    x, ids = make_input(B=4), np.concatenate([IDS, IDS])
    expected = quick_jit(call)(make_layer(HIDDEN, 4, 16), x, segment_ids=ids)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        layer = make_layer(HIDDEN, 4, 16, axis_names=(None, "model"))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        x, ids = jax.device_put(x, rows), jax.device_put(ids, rows)
        out_sharding = PartitionSpec("data") if axis_type == AxisType.Explicit else None

        @nnx.jit
        def loss(layer, x, ids):
            y = layer(x, segment_ids=ids, out_sharding=out_sharding)
            return jnp.mean(y**2), y

        grads, y = quick_jit(nnx.grad(loss, has_aux=True))(layer, x, ids)
        assert_close(y, expected)
        for name, gradient in flat(grads).items():
            assert jnp.isfinite(gradient).all(), name
        d_kernel = grads.q_proj.kernel[...]
        heads = NamedSharding(mesh, PartitionSpec(None, "model", None))
        assert d_kernel.sharding.is_equivalent_to(heads, d_kernel.ndim)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_value_heads=3), "num_value_heads must be a multiple of num_heads=2, got 3"),
        (dict(conv_width=0), "conv_width must be an int of at least 1, got 0"),
        (dict(value_head_dim=1.5), "value_head_dim must be an int of at least 1, got 1.5"),
        (dict(gate="log_decay"), "gate must be 'softplus' or 'bounded', got 'log_decay'"),
        (dict(gate="bounded", gate_lower_bound=-6), r"must lie in \[-5, 0\), got -6"),
        (dict(output_gate="full"), "output_gate must be 'low_rank' or 'full_rank', got 'full'"),
        (dict(axis_names="heads"), r"axis_names must be a pair \(hidden, heads\) or None"),
    ],
)
def test_layer_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**options)


def test_layer_refuses_bad_input():
    layer = make_layer()
    with pytest.raises(ValueError, match=r"x must be \[B, T, hidden_size=48\], got \(2, 5, 47\)"):
        layer(jnp.ones((2, 5, 47)))
    with pytest.raises(ValueError, match=r"segment_ids must be \[B, T\] = \(2, 5\), got \(1, 5\)"):
        layer(jnp.ones((2, 5, 48)), segment_ids=jnp.ones((1, 5), jnp.int32))
