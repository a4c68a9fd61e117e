"""The model's files: config.json and safetensors under the released names."""

import json
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from jax_flashkda import checkpoints
from jax_flashkda.checkpoints import linear, part_of, reshaped, stacked

from .config import Config
from .model import KimiLinear


def load(folder, *, dtype=jnp.float32, param_dtype=jnp.float32, mesh=None, **options):
    """A model with the weights of a folder as released, or as `save` or transformers wrote it.

    **Arguments**

    - `folder`: with config.json and safetensors; tensors are read one at a time.
    - `dtype`, `param_dtype`: as for `KimiLinear`.
    - `mesh`: where the parameters go, with `axis_names` among the options; None is one device.
    - `options`: further arguments of `KimiLinear`.

    **Raises** `ValueError` for a config that is not this model's, `CheckpointError` for files that
    do not fit it."""
    config = Config.from_json(folder)

    def make():
        types = dict(dtype=dtype, param_dtype=param_dtype)
        return KimiLinear(config, **types, **options, rngs=nnx.Rngs(0))

    if mesh is None:
        model = nnx.eval_shape(make)
    else:
        model = nnx.merge(*nnx.get_abstract_model(make, mesh))
    tied = (r"lm_head\.",) if config.tie_word_embeddings else ()  # some files hold it all the same
    checkpoints.load(model, folder, rules(model), ignore=tied)
    return model


def save(model, folder, *, max_shard_bytes=5 * 10**9):
    """Write config.json and the weights; transformers reads them too."""
    checkpoints.save(model, folder, rules(model), max_shard_bytes=max_shard_bytes)
    (Path(folder) / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


def rules(model):
    """How every parameter lies in the files; see `jax_flashkda.checkpoints`."""
    all_rules = {
        "embed.embedding": (reshaped("model.embed_tokens.weight", model.embed.embedding.shape),),
        "norm.scale": (reshaped("model.norm.weight", model.norm.scale.shape),),
    }
    if not model.config.tie_word_embeddings:
        all_rules["head.kernel"] = (linear("lm_head.weight", model.head.kernel.shape),)
    kinds = zip(model.config.layer_types, model.config.mlp_layer_types, strict=True)
    for number, (layer, (kind, mlp_kind)) in enumerate(zip(model.layers, kinds, strict=True)):
        name = f"model.layers.{number}"
        attention = {
            "linear_attention": checkpoints.layer_rules,
            "full_attention": _latent_attention,
        }[kind](layer.attention, f"{name}.self_attn")
        mlp = {"dense": _mlp, "sparse": _mixture_of_experts}[mlp_kind]
        # transformers calls all MLPs "mlp", and all of them "block_sparse_moe" when it saves.
        spellings = ["mlp", "block_sparse_moe"]
        if mlp_kind == "sparse":
            spellings.reverse()
        of_layer = {
            "attention_norm.scale": (_norm(f"{name}.input_layernorm", layer.attention_norm),),
            "mlp_norm.scale": (_norm(f"{name}.post_attention_layernorm", layer.mlp_norm),),
            **_below("attention", attention),
            **_below("mlp", _either(*(mlp(layer.mlp, f"{name}.{word}") for word in spellings))),
        }
        all_rules |= _below(f"layers.{number}", of_layer)
    return all_rules


def _latent_attention(attention, name):
    names = {
        "q_proj": "q_proj",
        "q_a_proj": "q_a_proj",
        "q_b_proj": "q_b_proj",
        "kv_a_proj": "kv_a_proj_with_mqa",
        "kv_b_proj": "kv_b_proj",
        "o_proj": "o_proj",
    }
    rules = {
        f"{ours}.kernel": (
            linear(
                f"{name}.{theirs}.weight",
                getattr(attention, ours).kernel.shape,
                inputs=2 if ours == "o_proj" else 1,
            ),
        )
        for ours, theirs in names.items()
        if hasattr(attention, ours)
    }
    for ours, theirs in {"q_a_norm": "q_a_layernorm", "kv_a_norm": "kv_a_layernorm"}.items():
        if hasattr(attention, ours):
            rules[f"{ours}.scale"] = (_norm(f"{name}.{theirs}", getattr(attention, ours)),)
    return rules


def _mlp(mlp, name):
    return {
        f"{part}.kernel": (linear(f"{name}.{part}.weight", getattr(mlp, part).kernel.shape),)
        for part in ("gate_proj", "up_proj", "down_proj")
    }


def _mixture_of_experts(mlp, name):
    """Experts lie each on its own, as w1, w3 and w2, or fused as in transformers' modules."""
    inner = mlp.gate_proj.kernel.shape[-1]
    rules = {
        "router.kernel": (linear(f"{name}.gate.weight", mlp.router.kernel.shape),),
        "correction_bias": (
            reshaped(f"{name}.gate.e_score_correction_bias", mlp.correction_bias.shape),
        ),
        **_below("shared", _mlp(mlp.shared, f"{name}.shared_experts")),
    }
    for part, word in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
        shape = getattr(mlp, part).kernel.shape
        apart = stacked(
            linear(f"{name}.experts.{expert}.{word}.weight", shape[1:])
            for expert in range(shape[0])
        )
        fused = linear(f"{name}.experts.{part}", shape, leading=1)
        if part != "down_proj":
            start = 0 if part == "gate_proj" else inner
            fused = part_of(f"{name}.experts.gate_up_proj", start, 2 * inner, fused, axis=1)
        rules[f"{part}.kernel"] = (apart, fused)
    return rules


def _norm(name, norm):
    return reshaped(f"{name}.weight", norm.scale.shape)


def _below(path, rules):
    return {f"{path}.{name}": layouts for name, layouts in rules.items()}


def _either(rules, alternatives):
    return {path: (*layouts, *alternatives[path]) for path, layouts in rules.items()}
