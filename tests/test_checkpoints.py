"""Layers through real files: every naming, shards, abstract modules, and what is refused."""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

nnx = pytest.importorskip("flax.nnx", reason="checkpoints need flax")
safetensors = pytest.importorskip("safetensors.numpy", reason="checkpoints need safetensors")

from jax_flashkda import KimiDeltaAttention, checkpoints  # noqa: E402

HIDDEN, H, HV, K, V, W = 24, 2, 4, 8, 6, 3
OPTIONS = dict(num_value_heads=HV, value_head_dim=V, conv_width=W, gate_rank=5)
PREFIX = "model.layers.3.self_attn"


def make_layer(seed=0, **options):
    layer = KimiDeltaAttention(HIDDEN, H, K, **OPTIONS | options, rngs=nnx.Rngs(seed))
    scale = layer.o_norm.scale
    scale[...] = jax.random.uniform(jax.random.key(seed), (V,), scale.dtype) + 0.5
    return layer


def parameters(layer):
    return {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(layer))}


def assert_same(layer, expected):
    ours, theirs = parameters(layer), parameters(expected)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(array, theirs[name], name)


def stored(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.load_file(file)
    return tensors


def rewrite(folder, change):
    """Write the one-file checkpoint of `folder` again after `change` of its tensors."""
    tensors = stored(folder)
    change(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors")


# The names and shapes of the released files, of transformers' state_dict and of FLA's layer
# (fla/layers/kda.py), written down from them.
COMMON = {
    "q_proj.weight": (H * K, HIDDEN),
    "k_proj.weight": (H * K, HIDDEN),
    "v_proj.weight": (HV * V, HIDDEN),
    "b_proj.weight": (HV, HIDDEN),
    "o_norm.weight": (V,),
    "o_proj.weight": (HIDDEN, HV * V),
}
SEPARATE = {
    "q_conv1d.weight": (H * K, 1, W),
    "k_conv1d.weight": (H * K, 1, W),
    "v_conv1d.weight": (HV * V, 1, W),
}
LOW_RANK = {"g_a_proj.weight": (5, HIDDEN), "g_b_proj.weight": (HV * V, 5)}
KIMI_LINEAR = (
    COMMON
    | SEPARATE
    | {
        "f_a_proj.weight": (5, HIDDEN),
        "f_b_proj.weight": (HV * K, 5),
        "A_log": (1, 1, HV, 1),
        "dt_bias": (HV * K,),
    }
)
STORED = {
    "kimi_linear": KIMI_LINEAR | LOW_RANK,
    "transformers": COMMON
    | LOW_RANK
    | {
        "conv1d.weight": (2 * H * K + HV * V, 1, W),
        "forget_gate.f_a_proj.weight": (5, HIDDEN),
        "forget_gate.f_b_proj.weight": (HV * K, 5),
        "forget_gate.A_log": (1, 1, HV, 1),
        "forget_gate.dt_bias": (HV * K,),
    },
    "fla": COMMON
    | SEPARATE
    | {
        "f_proj.0.weight": (5, HIDDEN),
        "f_proj.1.weight": (HV * K, 5),
        "g_proj.0.weight": (5, HIDDEN),
        "g_proj.1.weight": (HV * V, 5),
        "g_proj.1.bias": (HV * V,),
        "A_log": (HV,),
        "dt_bias": (HV * K,),
    },
}


@pytest.mark.parametrize("naming", STORED)
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_every_naming_round_trips(tmp_path, naming, prefix):
    bias = naming == "fla"
    layer = make_layer(output_gate_bias=bias)
    checkpoints.save_layer(layer, tmp_path, prefix, naming=naming)
    shapes = {name: array.shape for name, array in stored(tmp_path).items()}
    before = f"{prefix}." if prefix else ""
    assert shapes == {before + name: shape for name, shape in STORED[naming].items()}

    other = make_layer(seed=1, output_gate_bias=bias)
    checkpoints.load_layer(other, tmp_path, prefix)
    assert_same(other, layer)


def test_full_rank_output_gate(tmp_path):
    layer = make_layer(output_gate="full_rank")
    checkpoints.save_layer(layer, tmp_path)
    shapes = {name: array.shape for name, array in stored(tmp_path).items()}
    assert shapes == KIMI_LINEAR | {"g_proj.weight": (HV * V, HIDDEN)}
    other = make_layer(seed=1, output_gate="full_rank")
    checkpoints.load_layer(other, tmp_path / "model.safetensors")
    assert_same(other, layer)


def test_what_lies_where(tmp_path):
    """The meaning of the layouts, by the projections themselves: y = x W^T over flat heads."""
    layer = make_layer()
    checkpoints.save_layer(layer, tmp_path, naming="transformers")
    tensors = stored(tmp_path)
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, HIDDEN)))
    for name in ("q_proj", "v_proj"):
        ours = getattr(layer, name)(x).reshape(2, -1)
        np.testing.assert_allclose(ours, x @ tensors[f"{name}.weight"].T, rtol=1e-5, atol=1e-6)
    o = np.asarray(jax.random.normal(jax.random.key(2), (2, HV, V)))
    theirs = o.reshape(2, -1) @ tensors["o_proj.weight"].T
    np.testing.assert_allclose(layer.o_proj(o), theirs, rtol=1e-5, atol=1e-6)
    fused = tensors["conv1d.weight"][:, 0]
    np.testing.assert_array_equal(fused[0], layer.q_conv1d.kernel[:, 0, 0])
    np.testing.assert_array_equal(fused[H * K + K + 1], layer.k_conv1d.kernel[:, 1, 1])
    np.testing.assert_array_equal(fused[2 * H * K + V], layer.v_conv1d.kernel[:, 1, 0])


def test_other_shapes_of_the_same_tensors(tmp_path):
    layer = make_layer()
    checkpoints.save_layer(layer, tmp_path)

    def change(tensors):
        tensors["A_log"] = tensors["A_log"].reshape(HV)
        tensors["q_conv1d.weight"] = tensors["q_conv1d.weight"][:, 0]
        tensors["dt_bias"] = tensors["dt_bias"].reshape(HV, K)

    rewrite(tmp_path, change)
    other = make_layer(seed=1)
    checkpoints.load_layer(other, tmp_path)
    assert_same(other, layer)


@pytest.mark.parametrize("naming", ["kimi_linear", "transformers"])
def test_shards(tmp_path, naming):
    layer = make_layer()
    checkpoints.save_layer(layer, tmp_path, PREFIX, naming=naming, max_shard_bytes=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in stored(tmp_path).values())
    for file in files:
        tensors = safetensors.load_file(tmp_path / file)
        assert len(tensors) == 1 or sum(array.nbytes for array in tensors.values()) <= 2000

    other = make_layer(seed=1)
    checkpoints.load_layer(other, tmp_path / "model.safetensors.index.json", PREFIX)
    assert_same(other, layer)


def test_types_are_those_of_the_parameters(tmp_path):
    layer = make_layer(param_dtype=jnp.bfloat16)
    checkpoints.save_layer(layer, tmp_path)
    assert stored(tmp_path)["q_proj.weight"].dtype == jnp.bfloat16
    assert stored(tmp_path)["A_log"].dtype == np.float32
    wide = make_layer(seed=1)
    checkpoints.load_layer(wide, tmp_path)
    for name, array in parameters(wide).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, parameters(layer)[name].astype(np.float32), name)
    narrow = make_layer(seed=1, param_dtype=jnp.bfloat16)
    checkpoints.load_layer(narrow, tmp_path)
    assert_same(narrow, layer)


def test_abstract_and_sharded_modules(tmp_path):
    layer = make_layer()
    checkpoints.save_layer(layer, tmp_path)
    abstract = nnx.eval_shape(lambda: make_layer(seed=1))
    checkpoints.load_layer(abstract, tmp_path)
    assert_same(abstract, layer)

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    make = lambda: KimiDeltaAttention(
        HIDDEN, H, K, **OPTIONS, axis_names=("data", None), rngs=nnx.Rngs(1)
    )
    sharded = nnx.merge(*nnx.get_abstract_model(make, mesh))
    with jax.set_mesh(mesh):
        placed = make()
    for module in (sharded, placed):
        checkpoints.load_layer(module, tmp_path)
        assert_same(module, layer)
        spec = PartitionSpec("data", None, None)
        assert module.q_proj.kernel[...].sharding == NamedSharding(mesh, spec)


def test_a_mesh_that_does_not_divide_the_parameters(tmp_path):
    layer = make_layer()
    checkpoints.save_layer(layer, tmp_path)
    mesh = jax.make_mesh((1, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    make = lambda: KimiDeltaAttention(
        HIDDEN, H, K, **OPTIONS, axis_names=("data", "model"), rngs=nnx.Rngs(1)
    )
    abstract = nnx.merge(*nnx.get_abstract_model(make, mesh))
    with pytest.raises(ValueError) as error:
        checkpoints.load_layer(abstract, tmp_path)
    message = str(error.value)
    assert "the mesh (data = 1, model = 4) does not divide" in message
    assert "q_proj.kernel [24, 2, 8] as PartitionSpec('data', 'model', None)" in message.replace(
        "as P(", "as PartitionSpec("
    )
    assert "v_proj" not in message  # its 4 heads are divided
    assert isinstance(abstract.v_proj.kernel.get_value(), jax.ShapeDtypeStruct)


# Against transformers.


@functools.cache
def oracle():
    torch = pytest.importorskip("torch", reason="torch is installed on Python 3.11 only")
    pytest.importorskip("transformers", reason="transformers is installed on Python 3.11 only")
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=HIDDEN, linear_num_heads=H, linear_head_dim=K, num_hidden_layers=1
    )
    torch.manual_seed(0)
    layer = KimiLinearDeltaAttention(config, layer_idx=0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def test_state_dict_of_transformers(tmp_path):
    theirs = oracle()
    import torch

    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    layer = KimiDeltaAttention(HIDDEN, H, K, rngs=nnx.Rngs(1))
    checkpoints.load_layer(layer, tmp_path)
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 70, HIDDEN)))
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    np.testing.assert_allclose(nnx.jit(layer)(x), expected, rtol=1e-4, atol=1e-4)

    checkpoints.save_layer(layer, tmp_path / "back", naming="transformers")
    back = stored(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, tensors[name], name)


# What is refused.


@pytest.mark.parametrize("absent", ["flax", "safetensors"])
def test_what_must_be_installed_is_named(absent):
    code = (
        f"import sys; sys.modules[{absent!r}] = None\n"
        "try:\n    import jax_flashkda.checkpoints\n"
        "except ImportError as error:\n    print(error)"
    )
    root = pathlib.Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert ran.stdout == (
        f"checkpoints need {absent}: pip install 'jax_flashkda[checkpoints]'\n"
    ), ran.stderr


def failure(layer, path, prefix=""):
    before = parameters(layer)
    with pytest.raises(checkpoints.CheckpointError) as error:
        checkpoints.load_layer(layer, path, prefix)
    for name, array in parameters(layer).items():
        np.testing.assert_array_equal(array, before[name], name)  # nothing was loaded
    return str(error.value)


def test_all_that_does_not_fit_is_listed(tmp_path):
    checkpoints.save_layer(make_layer(), tmp_path, PREFIX)

    def change(tensors):
        del tensors[f"{PREFIX}.k_proj.weight"], tensors[f"{PREFIX}.A_log"]
        tensors[f"{PREFIX}.q_proj.bias"] = np.zeros(3, np.float32)
        tensors["model.layers.4.self_attn.A_log"] = np.zeros(3, np.float32)  # another layer's
        tensors[f"{PREFIX}.o_proj.weight"] = np.zeros((3, 4), np.float32)
        tensors[f"{PREFIX}.b_proj.weight"] = np.zeros((HV, HIDDEN), np.int8)

    rewrite(tmp_path, change)
    message = failure(make_layer(seed=1), tmp_path, PREFIX)
    for line in (
        f"2 missing: {PREFIX}.A_log, {PREFIX}.k_proj.weight",
        f"1 unexpected: {PREFIX}.q_proj.bias",
        f"1 misshapen: {PREFIX}.o_proj.weight is [3, 4], not [24, 24]",
        f"dequantised or converted first: {PREFIX}.b_proj.weight is I8",
    ):
        assert line in message
    assert "layers.4" not in message


@pytest.mark.parametrize(
    "saved, loaded, hint",
    [
        (dict(output_gate="full_rank"), {}, "has full rank: output_gate='full_rank'"),
        ({}, dict(output_gate="full_rank"), "has low rank: output_gate='low_rank'"),
        (dict(output_gate_bias=True), {}, "must be made with output_gate_bias=True"),
        ({}, dict(output_gate_bias=True), "must be made with output_gate_bias=False"),
    ],
)
@pytest.mark.parametrize("naming", ["kimi_linear", "fla"])
def test_the_option_that_differs_is_named(tmp_path, saved, loaded, hint, naming):
    checkpoints.save_layer(make_layer(**saved), tmp_path, naming=naming)
    assert hint in failure(make_layer(**loaded), tmp_path)


def test_a_wrong_prefix_shows_what_is_there(tmp_path):
    checkpoints.save_layer(make_layer(), tmp_path, PREFIX)
    message = failure(make_layer(), tmp_path, "layers.3")
    assert f"nothing begins with 'layers.3.'; the checkpoint holds {PREFIX}.A_log" in message


def test_broken_files(tmp_path):
    layer = make_layer()
    assert "does not exist" in failure(layer, tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    message = failure(layer, tmp_path)
    assert "holds neither model.safetensors.index.json nor model.safetensors, but notes" in message

    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs")
    assert "cannot be read as safetensors" in failure(layer, tmp_path)

    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    assert "is no index of shards" in failure(layer, tmp_path)
    index.write_text('{"weight_map": {"A_log": "model-00001-of-00001.safetensors"}}')
    message = failure(layer, tmp_path)
    assert "names shards that are not there: model-00001-of-00001.safetensors" in message

    tensors = {"dt_bias": np.zeros(3, np.float32)}
    safetensors.save_file(tensors, tmp_path / "model-00001-of-00001.safetensors")
    assert "tensors that its files do not hold: A_log" in failure(layer, tmp_path)


def test_saving_refuses(tmp_path):
    layer = make_layer()
    checkpoints.save_layer(layer, tmp_path)
    with pytest.raises(FileExistsError, match="already holds model.safetensors: delete"):
        checkpoints.save_layer(layer, tmp_path)
    with pytest.raises(ValueError, match="naming must be one of .*, got 'hf'"):
        checkpoints.save_layer(layer, tmp_path / "new", naming="hf")

    rules = checkpoints.layer_rules(layer)
    rules["extra"] = rules.pop("q_proj.kernel")
    with pytest.raises(ValueError, match=r"without a rule: q_proj.kernel; .* variable: extra"):
        checkpoints.save(layer, tmp_path / "new", rules)

    rules = checkpoints.layer_rules(layer, naming="transformers")
    rules["q_conv1d.kernel"] = checkpoints.layer_rules(layer)["q_conv1d.kernel"]
    with pytest.raises(ValueError, match="conv1d.weight .* is not filled exactly once by k_conv"):
        checkpoints.save(layer, tmp_path / "new", rules)
