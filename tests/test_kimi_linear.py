"""The Kimi Linear example against transformers, through the files that save_pretrained writes."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

nnx = pytest.importorskip("flax.nnx", reason="the example needs flax")
pytest.importorskip("safetensors", reason="the example needs safetensors")

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import kimi_linear  # noqa: E402

from jax_flashkda import checkpoints  # noqa: E402

# Sizes that are all different, so that none can stand in for another.
CONFIG = kimi_linear.Config(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    layer_types=("linear_attention", "full_attention", "linear_attention"),
    mlp_layer_types=("dense", "sparse", "sparse"),
    linear_num_heads=2,
    linear_head_dim=16,
    linear_conv_kernel_dim=3,
    num_attention_heads=3,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=8,
    moe_intermediate_size=12,
    num_experts=8,
    experts_per_token=3,
    shared_experts=2,
    expert_groups=4,
    expert_groups_per_token=2,
    routed_scaling_factor=1.7,
)
# One layer of each kind, where three would compute nothing new.
SMALL = dataclasses.replace(
    CONFIG, layer_types=CONFIG.layer_types[:2], mlp_layer_types=CONFIG.mlp_layer_types[:2]
)
VARIANTS = {
    "grouped experts": {},
    "low-rank queries": dict(q_lora_rank=9, expert_groups=1, expert_groups_per_token=1),
    "weights as they are": dict(renormalize_experts=False, shared_experts=1),
}
# As config.json of the released model has it.
RELEASED = {
    "model_type": "kimi_linear",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "linear_attn_config": {
        "kda_layers": [1, 3],
        "full_attn_layers": [2],
        "num_heads": 2,
        "head_dim": 16,
        "short_conv_kernel_size": 3,
    },
    "kv_lora_rank": 10,
    "q_lora_rank": None,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "mla_use_nope": True,
    "moe_intermediate_size": 12,
    "num_experts": 8,
    "num_experts_per_token": 3,
    "num_shared_experts": 2,
    "moe_router_activation_func": "sigmoid",
    "moe_renormalize": True,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "use_grouped_topk": True,
    "num_expert_group": 4,
    "topk_group": 2,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}


# What is tested here is what is computed, not how fast: compiling takes a third of the time so.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)


def make_model(config=CONFIG, seed=0):
    """Random, in its norms and router biases too."""
    make = lambda: nnx.split(kimi_linear.KimiLinear(config, rngs=nnx.Rngs(seed)))
    model = nnx.merge(*jit(make)())
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("scale", "correction_bias"):
            key = jax.random.fold_in(jax.random.key(seed), len(str(path)))
            noise = jax.random.uniform(key, variable.shape, variable.dtype, -0.3, 0.3)
            variable.set_value(variable.get_value() + noise)
            nnx.update(model, nnx.from_flat_state([(path, variable)]))
    return model


TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 70))
logits_of = jit(lambda model, tokens, ids=None: model(tokens, segment_ids=ids))


def parameters(model):
    return {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}


def assert_same_parameters(model, expected):
    jax.tree.map(np.testing.assert_array_equal, parameters(model), parameters(expected))


# Against transformers.


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_transformers(tmp_path, variant):
    torch = pytest.importorskip("torch", reason="torch is installed on Python 3.11 only")
    transformers = pytest.importorskip("transformers", reason="installed on Python 3.11 only")
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    torch.manual_seed(0)
    theirs = transformers.KimiLinearForCausalLM(
        transformers.KimiLinearConfig(**config.to_dict())
    ).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if name.endswith(("norm.weight", "e_score_correction_bias")):
                tensor += torch.empty_like(tensor).uniform_(-0.3, 0.3)
            elif "A_log" not in name and "dt_bias" not in name:
                tensor.normal_(std=0.2)  # the default of 0.02 would leave all logits near zero
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3

    model = kimi_linear.load(tmp_path / "theirs")
    assert model.config == config
    logits = np.asarray(logits_of(model, TOKENS))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    # Step by step, each with its own caches.
    if variant == "grouped experts":
        step = jit(lambda model, token, cache: model.step(token, cache))
        logits, cache = jit(lambda model, tokens: model.prefill(tokens, 70))(model, TOKENS[:, :66])
        with torch.no_grad():
            theirs_so_far = theirs(torch.tensor(TOKENS[:, :66]), use_cache=True)
        for position in range(66, 70):
            close = functools.partial(np.testing.assert_allclose, rtol=0)
            wanted = theirs_so_far.logits[:, -1].numpy()
            close(logits, wanted, atol=2e-5 * np.abs(expected).max())
            token = TOKENS[:, position : position + 1]
            logits, cache = step(model, token, cache)
            logits = logits[:, 0]
            with torch.no_grad():
                theirs_so_far = theirs(torch.tensor(token), cache=theirs_so_far.cache)

    # And back: what we save, transformers loads to the last bit.
    kimi_linear.save(model, tmp_path / "ours")
    loaded = transformers.KimiLinearForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded[name], tensor), name

    # Not through save_pretrained, which renames, but as the modules themselves have it.
    if variant == "grouped experts":
        from safetensors.torch import save_file

        save_file(theirs.state_dict(), tmp_path / "state.safetensors")
        other = make_model(config)
        checkpoints.load(other, tmp_path / "state.safetensors", kimi_linear.checkpoint.rules(other))
        assert_same_parameters(other, model)


# Files and configs.


@pytest.mark.parametrize("tied", [False, True])
def test_files_round_trip(tmp_path, tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied, eos_token_id=3)
    model = make_model(config)
    kimi_linear.save(model, tmp_path, max_shard_bytes=20_000)
    loaded = kimi_linear.load(tmp_path)
    assert loaded.config == config
    assert_same_parameters(loaded, model)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = set(index["weight_map"])
    assert ("lm_head.weight" in names) != tied
    assert {
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.block_sparse_moe.experts.7.w2.weight",
        "model.layers.1.block_sparse_moe.gate.e_score_correction_bias",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.2.self_attn.A_log",
    } < names


def test_loading_onto_a_mesh(tmp_path):
    model = make_model(SMALL)
    kimi_linear.save(model, tmp_path)
    mesh = jax.make_mesh((4, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharded = kimi_linear.load(tmp_path, mesh=mesh, axis_names=("data", "model"))
    assert_same_parameters(sharded, model)
    experts = sharded.layers[1].mlp.down_proj.kernel[...]
    assert experts.sharding.spec == PartitionSpec(None, "model", "data")
    assert experts.addressable_shards[0].data.shape == (8, 12, 6)
    with jax.set_mesh(mesh):
        logits = logits_of(sharded, jnp.tile(TOKENS, (2, 1)))
    np.testing.assert_allclose(logits[:2], logits_of(model, TOKENS), rtol=0, atol=1e-5)


def test_tied_head_is_the_embedding():
    tied = make_model(dataclasses.replace(SMALL, tie_word_embeddings=True))
    untied = make_model(SMALL)
    untied.head.kernel[...] = untied.embed.embedding[...].T
    nnx.update(tied, nnx.filter_state(nnx.state(untied), lambda path, _: "head" not in path))
    np.testing.assert_allclose(
        logits_of(tied, TOKENS), logits_of(untied, TOKENS), rtol=1e-5, atol=1e-5
    )


def test_the_released_form_of_a_config():
    assert kimi_linear.Config.from_dict(RELEASED) == CONFIG
    assert kimi_linear.Config.from_dict(CONFIG.to_dict()) == CONFIG


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="llama"), "model_type must be 'kimi_linear', got 'llama'"),
        (dict(hidden_act="situ"), "hidden_act must be 'silu', got 'situ'"),
        (dict(num_key_value_heads=1), "num_key_value_heads must be num_attention_heads = 3, got 1"),
        (dict(num_hidden_layers=4), r"layer_types must be .* got \['missing'\]"),
        (dict(mlp_layer_types=["dense"]), "3 layer_types, 1 mlp_layer_types and num_hidden_layers"),
        (dict(num_expert_group=3), "8 experts do not divide into 3 groups"),
        (dict(linear_attn_config={"use_full_rank_gate": True}), "low-rank output gate"),
        (dict(linear_attn_config=None), "layer_types is missing; .*linear_num_heads is missing"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        kimi_linear.Config.from_dict(RELEASED | changes)


def test_a_folder_that_does_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="a model comes with its config.json"):
        kimi_linear.load(tmp_path)
    kimi_linear.save(make_model(SMALL), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_experts": 12}))
    with pytest.raises(checkpoints.CheckpointError, match=r"experts\.8\.w1\.weight"):
        kimi_linear.load(tmp_path)


# What it computes.


def test_packed_rows_equal_documents_alone():
    model = make_model(SMALL)
    lengths = [30, 1, 25]
    ids = np.tile(np.repeat([1, 2, 1, 0], [*lengths, 70 - sum(lengths)]), (2, 1))
    packed = logits_of(model, TOKENS, ids)
    start = 0
    for length in lengths:
        # The model is causal, so what stands behind a document does not matter.
        alone = logits_of(model, np.roll(TOKENS, -start, axis=1))
        np.testing.assert_allclose(
            packed[:, start : start + length], alone[:, :length], rtol=0, atol=1e-5
        )
        start += length
    assert jnp.isfinite(packed).all()


def test_every_parameter_is_trained():
    model = make_model(SMALL)
    grads = jit(nnx.grad(lambda model: jnp.mean(model(TOKENS) ** 2)))(model)
    for path, gradient in nnx.to_flat_state(grads):
        assert jnp.isfinite(gradient[...]).all() and jnp.any(gradient[...] != 0), path


def test_generation_by_definition(tmp_path):
    """Greedy through the command, which loads the weights from files; sampled in this process."""
    model, prompt = make_model(SMALL), TOKENS[0, :5].tolist()
    window = np.zeros_like(TOKENS)
    window[:, :5] = prompt
    for position in range(5, 11):
        window[:, position] = jnp.argmax(logits_of(model, window)[0, position - 1])
    kimi_linear.save(model, tmp_path)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-m", "kimi_linear", tmp_path, *map(str, prompt)]
        + ["--length", "6"],
        cwd=EXAMPLES,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == " ".join(map(str, window[0, 5:11]))

    # Prompts of other lengths beside it change nothing; a low temperature is greedy.
    prompts = np.stack([window[0, :9], TOKENS[0, :9]])
    options = dict(lengths=[5, 9], temperature=1e-4)
    drawn = kimi_linear.generate(model, prompts, 6, **options, key=jax.random.key(1))
    np.testing.assert_array_equal(drawn[0], window[0, 5:11])

    # A high one draws all tokens alike, by the key and each row for itself.
    options = dict(lengths=[5, 9], temperature=1e6)
    drawn, again, other = (
        kimi_linear.generate(model, prompts, 6, **options, key=jax.random.key(seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(drawn, again)
    assert (drawn != other).mean() > 0.5 and (drawn[0] != drawn[1]).mean() > 0.5
    assert len(np.unique(drawn)) > 6


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(temperature=1.0), "temperature must be 0, or above it with a key, got 1"),
        (dict(tokens=[1, 2]), r"tokens must be \[B, T\] with a token each at least, got \(2,\)"),
        (dict(lengths=[0]), r"lengths must be \[1\], from 1 to T, got \[0\]"),
        (dict(length=0), "length must be at least 1, got 0"),
    ],
)
def test_generation_refuses(changes, message):
    arguments = dict(tokens=[[1, 2]], length=3) | changes
    with pytest.raises(ValueError, match=message):
        kimi_linear.generate(None, **arguments)


def test_prefill_and_steps_equal_whole_rows():
    """Rows at different lengths, one and several tokens a step."""
    model = make_model(dataclasses.replace(SMALL, **VARIANTS["low-rank queries"]))
    graphdef, state = nnx.split(model)
    prefill = jit(lambda s, *a: nnx.merge(graphdef, s).prefill(a[0], 70, lengths=a[1]))
    step = jit(lambda s, *a: nnx.merge(graphdef, s).step(*a), donate_argnums=2)
    expected = np.asarray(logits_of(model, TOKENS))
    lengths = np.array([40, 3], np.int32)
    rows = np.arange(2)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)

    logits, cache = prefill(state, TOKENS[:, :40], lengths)
    close(logits, expected[rows, lengths - 1])
    for count in (1, 1, 3, 1, 3):
        at = lengths[:, None] + np.arange(count)
        logits, cache = step(state, TOKENS[rows[:, None], at], cache)
        close(logits, expected[rows[:, None], at])
        lengths = lengths + count
    np.testing.assert_array_equal(cache.lengths, lengths)
    assert step._cache_size() == 2  # one program for one token, one for three, whatever the lengths
    with pytest.raises(ValueError, match="capacity 39 is less than the 40 tokens of the prompts"):
        model.prefill(TOKENS[:, :40], 39)


@pytest.mark.gpu
def test_the_layers_of_the_released_model_on_the_kernels():
    """Four layers of its shapes in bfloat16: the KDA layers are the kernels, and the logits as near
    to those in float32 as XLA's. Of its MLPs the dense one: which experts a token meets may turn on
    the last bit, and logits then differ by 7 % between bfloat16 and float32 (dense: 1.4 %).
    """
    config = kimi_linear.Config(vocab_size=512, mlp_layer_types=("dense",) * 4)
    assert (config.hidden_size, config.linear_num_heads, config.linear_head_dim) == (2304, 32, 128)

    def make(dtype, implementation):
        types = dict(dtype=dtype, param_dtype=jnp.bfloat16)
        options = types | dict(rngs=nnx.Rngs(0), implementation=implementation)
        return kimi_linear.KimiLinear(config, **options)

    state = jax.jit(lambda: nnx.state(make(jnp.bfloat16, "cuda")))()

    def model(*options):
        return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: make(*options))), state)

    def distance(got, expected):
        return np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))

    tokens = np.random.default_rng(1).integers(0, 512, (2, 200))
    ids = np.repeat([[1, 2, 0]], [120, 70, 10], axis=1) * np.ones((2, 1), np.int32)
    run = jax.jit(lambda model, tokens, ids: model(tokens, segment_ids=ids))
    kernels = model(jnp.bfloat16, "cuda")
    text = run.lower(kernels, tokens, ids).compile().as_text()
    assert text.count('custom_call_target="jax_flashkda.forward"') == 3
    others = (model(jnp.bfloat16, "xla"), model(jnp.float32, "xla"))
    got, xla, exact = (np.asarray(run(m, tokens, ids))[ids > 0] for m in (kernels, *others))
    assert distance(got, exact) < 1.5 * distance(xla, exact) < 0.05

    last, cache = jax.jit(lambda m, x: m.prefill(x, 104))(kernels, tokens[:, :100])
    step = jax.jit(lambda m, x, cache: m.step(x, cache))
    whole = np.asarray(run(kernels, tokens[:, :104], np.ones((2, 104), np.int32)))
    for t in range(100, 104):
        assert distance(np.asarray(last).reshape(2, -1), whole[:, t - 1]) < 0.03, t
        last, cache = step(kernels, tokens[:, t : t + 1], cache)
