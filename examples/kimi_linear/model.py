"""The model: pre-norm residual layers of KDA or latent attention, and of dense or sparse MLPs.

    x = x + attention(norm(x));    x = x + mlp(norm(x))

Three KDA layers to one of full attention in the released model. Neither has positions: KDA knows
the order of tokens by its decay. Rows may be packed; nothing crosses from segment to segment."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_flashkda import KimiDeltaAttention

from .config import Config

FLOAT32 = dict(preferred_element_type=jnp.float32)


class Buffer(nnx.Variable):
    """Part of a checkpoint, but not trained by gradients."""


class LatentCache(NamedTuple):
    """What latent attention keeps of B sequences: S slots for tokens, the first ones filled."""

    latent: jax.Array  # [B, S, kv_lora_rank], normalised
    shared: jax.Array  # [B, S, qk_rope_head_dim]


class Cache(NamedTuple):
    """What the model keeps of B sequences of any lengths; a pytree."""

    layers: tuple  # of each layer a KimiDeltaCache or a LatentCache
    lengths: jax.Array  # int32 [B], tokens so far


class KimiLinear(nnx.Module):
    """Token ids to logits, of whole rows or with caches token by token.

    **Arguments**

    - `config`: the sizes.
    - `dtype`, `param_dtype`: types of the computation and of the parameters.
    - `axis_names`: names (hidden, heads) of mesh axes, or None: those by which every matrix is
      sharded, its hidden features by the first and its heads, its inner features or the vocabulary
      by the second.
    - `rngs`: random streams; "params" is used.
    - `options`: further options of `KimiDeltaAttention`, e.g. `implementation`."""

    def __init__(
        self,
        config: Config,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        axis_names=None,
        rngs,
        **options,
    ):
        self.config = config
        types = dict(dtype=dtype, param_dtype=param_dtype)
        linear = functools.partial(_linear, axis_names=axis_names, rngs=rngs, **types)
        norm = functools.partial(nnx.RMSNorm, epsilon=config.rms_norm_eps, rngs=rngs, **types)

        def kda():
            return KimiDeltaAttention(
                config.hidden_size,
                config.linear_num_heads,
                config.linear_head_dim,
                conv_width=config.linear_conv_kernel_dim,
                norm_eps=config.rms_norm_eps,
                axis_names=axis_names,
                rngs=rngs,
                **types,
                **options,
            )

        attention = {
            "linear_attention": kda,
            "full_attention": lambda: LatentAttention(config, linear, norm),
        }
        mlp = {
            "dense": lambda: MLP(config.hidden_size, config.intermediate_size, linear),
            "sparse": lambda: MixtureOfExperts(config, linear, rngs),
        }
        kinds = zip(config.layer_types, config.mlp_layer_types, strict=True)
        # A token looks up one row: over the vocabulary the table would be gathered for it.
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            **types,
            embedding_metadata=_metadata(axis_names, None, "hidden"),
            rngs=rngs,
        )
        self.layers = nnx.List(
            Layer(attention[kind](), mlp[mlp_kind](), config.hidden_size, norm)
            for kind, mlp_kind in kinds
        )
        self.norm = norm(config.hidden_size)
        if not config.tie_word_embeddings:
            self.head = linear(config.hidden_size, config.vocab_size, ("hidden", "heads"))

    def __call__(self, tokens, *, segment_ids=None):
        """Logits of the next token.

        **Arguments**

        - `tokens`: int32 [B, T].
        - `segment_ids`: int32 [B, T] or None, as for `kimi_delta_attention`; 0 is padding.

        **Returns** float32 [B, T, vocabulary]; at padding the logits mean nothing."""
        x = self.embed(tokens)
        for layer in self.layers:
            x, _ = layer(x, lambda attention, x: (attention(x, segment_ids=segment_ids), None))
        return self._logits(x)

    def prefill(self, tokens, capacity, *, lengths=None):
        """Read prompts.

        **Arguments**

        - `tokens`: int32 [B, T].
        - `capacity`: S, how many tokens a sequence may come to have, prompt included (static).
        - `lengths`: int32 [B], the prompts' lengths, at least 1; what stands behind a prompt is not
          read. By default all are T.

        **Returns** the logits after each prompt, float32 [B, vocabulary], and a `Cache`."""
        rows, T = tokens.shape
        if capacity < T:
            raise ValueError(f"capacity {capacity} is less than the {T} tokens of the prompts")
        packed = {}
        if lengths is not None:
            ids = (jnp.arange(T) < lengths[:, None]).astype(jnp.int32)
            packed = dict(segment_ids=ids, max_segments=1)

        def prefill(attention, x):
            if isinstance(attention, LatentAttention):
                return attention.prefill(x, capacity)
            return attention.prefill(x, **packed)

        x, caches = self.embed(tokens), []
        for layer in self.layers:
            x, cache = layer(x, prefill)
            caches.append(cache)
        lengths = jnp.full(rows, T, jnp.int32) if lengths is None else lengths
        last = x[jnp.arange(rows), lengths - 1]
        return self._logits(last), Cache(tuple(caches), lengths)

    def step(self, tokens, cache):
        """The next tokens of B sequences, whatever their lengths so far.

        **Arguments**

        - `tokens`: int32 [B, n], n of 1 to 8.
        - `cache`: a `Cache`; a sequence must not outgrow its capacity, which is not checked. Donate
          it to `jax.jit`, and it is updated in place.

        **Returns** the logits after each token, float32 [B, n, vocabulary], and the `Cache`."""
        x, caches = self.embed(tokens), []
        for layer, before in zip(self.layers, cache.layers, strict=True):
            lengths = (cache.lengths,) if isinstance(before, LatentCache) else ()
            x, after = layer(x, lambda attention, x: attention.step(x, before, *lengths))  # noqa: B023
            caches.append(after)
        return self._logits(x), Cache(tuple(caches), cache.lengths + tokens.shape[1])

    def _logits(self, x):
        x = self.norm(x)
        logits = self.embed.attend(x) if self.config.tie_word_embeddings else self.head(x)
        return logits.astype(jnp.float32)


class Layer(nnx.Module):
    def __init__(self, attention, mlp, hidden_size, norm):
        self.attention_norm, self.attention = norm(hidden_size), attention
        self.mlp_norm, self.mlp = norm(hidden_size), mlp

    def __call__(self, x, attend):
        """x, and what `attend(attention, normalised x)` returns beside its result."""
        y, cache = attend(self.attention, self.attention_norm(x))
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class LatentAttention(nnx.Module):
    """Multi-head latent attention without positions.

        latent [kv_lora_rank], shared [qk_rope_head_dim] = W_a x
        k_h, v_h = W_b RMSNorm(latent);    key of head h = [k_h, shared]

    Only latent and shared are cached. The scores of a row are held at once, [heads, T, T] in
    float32, so long rows want a fused attention in their place."""

    def __init__(self, config, linear, norm):
        self.nope, self.v_dim = config.qk_nope_head_dim, config.v_head_dim
        self.rank = config.kv_lora_rank
        heads, shared = config.num_attention_heads, config.qk_rope_head_dim
        hidden, q_heads = config.hidden_size, (heads, self.nope + shared)
        self.scale = (self.nope + shared) ** -0.5
        self.low_rank_q = config.q_lora_rank is not None
        norm = functools.partial(norm, epsilon=1e-6)  # of the two inner ones, whatever the config
        if self.low_rank_q:
            self.q_a_proj = linear(hidden, config.q_lora_rank, ("hidden", None))
            self.q_a_norm = norm(config.q_lora_rank)
            self.q_b_proj = linear(config.q_lora_rank, q_heads, (None, "heads", None))
        else:
            self.q_proj = linear(hidden, q_heads, ("hidden", "heads", None))
        self.kv_a_proj = linear(hidden, self.rank + shared, ("hidden", None))
        self.kv_a_norm = norm(self.rank)
        self.kv_b_proj = linear(self.rank, (heads, self.nope + self.v_dim), (None, "heads", None))
        self.o_proj = linear((heads, self.v_dim), hidden, ("heads", None, "hidden"))

    def __call__(self, x, *, segment_ids=None):
        return self._attend(x, *self._latents(x), _visible(x.shape[1], segment_ids))

    def prefill(self, x, capacity):
        """The result, and a cache with room for `capacity` tokens."""
        latents = self._latents(x)
        room = ((0, 0), (0, capacity - x.shape[1]), (0, 0))
        cache = LatentCache(*(jnp.pad(latent, room) for latent in latents))
        return self._attend(x, *latents, _visible(x.shape[1], None)), cache

    def step(self, x, cache, lengths):
        """Keys and values of the past are not made again: W_b is applied to queries and results."""
        positions = lengths[:, None] + jnp.arange(x.shape[1])  # [B, n]
        rows = jnp.arange(len(x))[:, None]
        cache = LatentCache(
            *(
                kept.at[rows, positions].set(new)
                for kept, new in zip(cache, self._latents(x), strict=True)
            )
        )
        q, q_shared = self._queries(x)
        w_k, w_v = jnp.split(self.kv_b_proj.kernel[...].astype(x.dtype), [self.nope], axis=-1)
        q = jnp.einsum("bthd,rhd->bthr", q, w_k)
        scores = jnp.einsum("bthr,bsr->bhts", q, cache.latent, **FLOAT32)
        visible = jnp.arange(cache.latent.shape[1]) <= positions[:, None, :, None]
        weights = self._weights(scores, q_shared, cache.shared, visible).astype(x.dtype)
        mixed = jnp.einsum("bhts,bsr->bthr", weights, cache.latent)
        return self.o_proj(jnp.einsum("bthr,rhd->bthd", mixed, w_v)), cache

    def _queries(self, x):
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if self.low_rank_q else self.q_proj(x)
        return jnp.split(q, [self.nope], axis=-1)

    def _latents(self, x):
        latent, shared = jnp.split(self.kv_a_proj(x), [self.rank], axis=-1)
        return self.kv_a_norm(latent), shared

    def _attend(self, x, latent, shared, visible):
        q, q_shared = self._queries(x)
        k, v = jnp.split(self.kv_b_proj(latent), [self.nope], axis=-1)
        scores = jnp.einsum("bthd,bshd->bhts", q, k, **FLOAT32)
        weights = self._weights(scores, q_shared, shared, visible)
        return self.o_proj(jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v))

    def _weights(self, scores, q_shared, shared, visible):
        scores += jnp.einsum("bthd,bsd->bhts", q_shared, shared, **FLOAT32)
        return jax.nn.softmax(jnp.where(visible, self.scale * scores, -jnp.inf))


def _visible(T, segment_ids):
    """[B or 1, 1, T, T]: whether token t sees token s, of its own segment and not behind it."""
    visible = jnp.tri(T, dtype=bool)[None]
    if segment_ids is not None:
        borders = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
        run = jnp.cumsum(borders, axis=1)  # not the ids: one that comes again is a new segment
        visible &= run[:, :, None] == run[:, None, :]
    return visible[:, None]


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, hidden_size, inner_size, linear):
        self.gate_proj = linear(hidden_size, inner_size, ("hidden", "heads"))
        self.up_proj = linear(hidden_size, inner_size, ("hidden", "heads"))
        self.down_proj = linear(inner_size, hidden_size, ("heads", "hidden"))

    def __call__(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nnx.Module):
    """SwiGLU experts, of which each token visits a few, and shared ones that all tokens visit.

    The router's scores are sigmoids, in float32. A bias that no gradient trains is added where
    experts are chosen, by groups first, and not where they are weighted."""

    def __init__(self, config, linear, rngs):
        self.config = config
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        experts = functools.partial(linear, leading=config.num_experts)
        self.router = linear(hidden, config.num_experts, ("hidden", None))
        self.correction_bias = Buffer(jnp.zeros(config.num_experts, jnp.float32))
        self.gate_proj = experts(hidden, inner, ("hidden", "heads"))
        self.up_proj = experts(hidden, inner, ("hidden", "heads"))
        self.down_proj = experts(inner, hidden, ("heads", "hidden"))
        self.shared = MLP(hidden, inner * config.shared_experts, linear)

    def __call__(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = self._route(tokens)  # [tokens, visits] each
        # Visits sorted by expert, so that an expert's tokens are consecutive rows of one matrix.
        visits = chosen.reshape(-1)
        order = jnp.argsort(visits, stable=True)
        sizes = jnp.bincount(visits, length=self.config.num_experts).astype(jnp.int32)
        rows = tokens[order // chosen.shape[1]]

        def through(experts, rows):
            kernel = experts.kernel[...].astype(rows.dtype)
            return jax.lax.ragged_dot(rows, kernel, sizes)

        inner = nnx.silu(through(self.gate_proj, rows)) * through(self.up_proj, rows)
        outputs = through(self.down_proj, inner)[jnp.argsort(order)].reshape(*chosen.shape, -1)
        routed = jnp.einsum("nvd,nv->nd", outputs, weights.astype(outputs.dtype))
        return routed.reshape(x.shape) + self.shared(x)

    def _route(self, tokens):
        config = self.config
        logits = tokens.astype(jnp.float32) @ self.router.kernel[...].astype(jnp.float32)
        scores = jax.nn.sigmoid(logits)
        choice = scores + jax.lax.stop_gradient(self.correction_bias[...])
        if config.expert_groups > config.expert_groups_per_token:
            # The groups whose two best experts sum to most.
            grouped = choice.reshape(len(tokens), config.expert_groups, -1)
            merit = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
            best = jax.lax.top_k(merit, config.expert_groups_per_token)[1]
            kept = jax.nn.one_hot(best, config.expert_groups, dtype=bool).any(axis=1)
            choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
        chosen = jax.lax.top_k(choice, config.experts_per_token)[1]
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if config.renormalize_experts:
            weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
        return chosen, weights * config.routed_scaling_factor


def _linear(inputs, outputs, names, *, leading=None, axis_names, rngs, dtype, param_dtype):
    """A linear map without bias; `names` says which axes of its kernel are which.

    With `leading`, that many of them in one kernel [leading, inputs, outputs], as for experts."""
    inputs, outputs = (size if isinstance(size, tuple) else (size,) for size in (inputs, outputs))
    if leading is not None:
        init = nnx.initializers.lecun_normal(batch_axis=0)
        return Experts(
            init(rngs.params(), (leading, *inputs, *outputs), param_dtype),
            _metadata(axis_names, None, *names),
        )
    return nnx.LinearGeneral(
        inputs,
        outputs,
        axis=tuple(range(-len(inputs), 0)),
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_metadata=_metadata(axis_names, *names),
        rngs=rngs,
    )


class Experts(nnx.Module):
    """The kernels [experts, inputs, outputs] of one linear map of every expert."""

    def __init__(self, kernel, metadata):
        self.kernel = nnx.Param(kernel, **metadata)


def _metadata(axis_names, *names):
    if axis_names is None:
        return {}
    axes = dict(zip(("hidden", "heads"), axis_names, strict=True))
    return {"out_sharding": tuple(axes.get(name) for name in names)}
