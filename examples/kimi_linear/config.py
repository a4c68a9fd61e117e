"""The sizes of a Kimi Linear model, from and to Hugging Face's config.json."""

import dataclasses
import json
from pathlib import Path

# The released files and transformers' own use some names each; the first is written.
ALIASES = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_token", "num_experts_per_tok"),
    "shared_experts": ("num_shared_experts", "n_shared_experts"),
    "expert_groups": ("num_expert_group", "n_group"),
    "expert_groups_per_token": ("topk_group",),
    "renormalize_experts": ("moe_renormalize", "norm_topk_prob"),
}

# What may be absent.
OPTIONAL = {"q_lora_rank", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}

# What the model is written for; a config may leave these out but not say otherwise.
FIXED = {
    "model_type": "kimi_linear",
    "hidden_act": "silu",
    "moe_router_activation_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "mla_use_nope": True,
    "mla_use_output_gate": False,
    "attention_bias": False,
    "num_nextn_predict_layers": 0,
    "routed_expert_hidden_size": None,
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes are in features, counts in things; the defaults are Kimi-Linear-48B-A3B's."""

    vocab_size: int = 163840
    hidden_size: int = 2304
    intermediate_size: int = 9216  # of a dense MLP
    layer_types: tuple[str, ...] = ("linear_attention",) * 3 + ("full_attention",)
    mlp_layer_types: tuple[str, ...] = ("dense",) + ("sparse",) * 3
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    # KDA
    linear_num_heads: int = 32
    linear_head_dim: int = 128
    linear_conv_kernel_dim: int = 4

    # Latent attention
    num_attention_heads: int = 32
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64  # the part of a key that all heads share; nothing is rotated
    v_head_dim: int = 128

    # Mixture of experts
    moe_intermediate_size: int = 1024
    num_experts: int = 256
    experts_per_token: int = 8
    shared_experts: int = 1
    expert_groups: int = 1
    expert_groups_per_token: int = 1
    renormalize_experts: bool = True
    routed_scaling_factor: float = 2.446

    @classmethod
    def from_json(cls, path):
        """The config of a folder with config.json, or of that file."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: a model comes with its config.json")
        return cls.from_dict(json.loads(path.read_text()))

    @classmethod
    def from_dict(cls, raw):
        """From the dictionary that config.json holds, as released or as transformers writes it.

        Raises `ValueError` with everything that is missing or that this model cannot do."""
        raw = raw | _linear_attention(raw.get("linear_attn_config") or {}, raw)
        if "mlp_layer_types" not in raw and {"layer_types", "first_k_dense_replace"} <= raw.keys():
            dense = raw["first_k_dense_replace"]
            raw["mlp_layer_types"] = [
                "dense" if layer < dense else "sparse" for layer in range(len(raw["layer_types"]))
            ]
        values, problems = {}, []
        for field in dataclasses.fields(cls):
            names = ALIASES.get(field.name, (field.name,))
            found = [raw[name] for name in names if name in raw]
            if found:
                value = found[0]
                values[field.name] = tuple(value) if isinstance(value, list) else value
            elif field.name not in OPTIONAL:
                problems.append(f"{' or '.join(names)} is missing")
        for name, expected in FIXED.items():
            if raw.get(name, expected) != expected:
                problems.append(f"{name} must be {expected!r}, got {raw[name]!r}")
        problems += _contradictions(values, raw)
        if problems:
            raise ValueError("not a Kimi Linear config: " + "; ".join(problems))
        return cls(**values)

    def to_dict(self):
        """What config.json holds; transformers reads it too."""
        values = {
            ALIASES.get(name, (name,))[0]: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return {
            "architectures": ["KimiLinearForCausalLM"],
            "model_type": "kimi_linear",
            **values,
            "num_hidden_layers": len(self.layer_types),
            "num_key_value_heads": self.num_attention_heads,
        }


def _linear_attention(nested, raw):
    """The released form keeps the KDA sizes, and which layers are KDA, in a dictionary of its own,
    and counts layers from 1."""
    names = {
        "num_heads": "linear_num_heads",
        "head_dim": "linear_head_dim",
        "short_conv_kernel_size": "linear_conv_kernel_dim",
    }
    flat = {names[name]: value for name, value in nested.items() if name in names}
    if {"kda_layers", "full_attn_layers"} <= nested.keys() and "layer_types" not in raw:
        kinds = dict.fromkeys(nested["kda_layers"], "linear_attention")
        kinds |= dict.fromkeys(nested["full_attn_layers"], "full_attention")
        count = raw.get("num_hidden_layers", len(kinds))
        flat["layer_types"] = [kinds.get(layer, "missing") for layer in range(1, count + 1)]
    for name, value in {"use_full_rank_gate": False, "gate_lower_bound": None}.items():
        if nested.get(name, value) != value:
            raise ValueError(
                f"not a Kimi Linear config: linear_attn_config.{name} is {nested[name]!r}:"
                " this example has the softplus gate and the low-rank output gate"
            )
    return flat


def _contradictions(values, raw):
    problems = []
    layers, mlps = values.get("layer_types", ()), values.get("mlp_layer_types", ())
    unknown = set(layers) - {"linear_attention", "full_attention"}
    if unknown:
        problems.append(
            f"layer_types must be linear_attention or full_attention, got {sorted(unknown)}"
        )
    if set(mlps) - {"dense", "sparse"}:
        problems.append(f"mlp_layer_types must be dense or sparse, got {sorted(set(mlps))}")
    counts = {len(layers), len(mlps), raw.get("num_hidden_layers", len(layers))}
    if layers and mlps and len(counts) > 1:
        problems.append(
            f"{len(layers)} layer_types, {len(mlps)} mlp_layer_types and num_hidden_layers ="
            f" {raw.get('num_hidden_layers')} do not agree"
        )
    heads = values.get("num_attention_heads")
    if raw.get("num_key_value_heads") not in (None, heads):
        problems.append(
            f"num_key_value_heads must be num_attention_heads = {heads}, got"
            f" {raw['num_key_value_heads']}"
        )
    experts, groups = values.get("num_experts", 1), values.get("expert_groups", 1)
    if experts % groups:
        problems.append(f"{experts} experts do not divide into {groups} groups")
    return problems
