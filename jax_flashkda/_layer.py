"""Kimi Delta Attention as a Flax NNX layer, with the parts of the released models.

    q, k, v = short_conv(W_q x), short_conv(W_k x), short_conv(W_v x)      causal, SiLU
    g       = W_fb W_fa x                             raw gate, per head and key channel
    beta    = W_b x                                   logits, per head
    o       = kimi_delta_attention(q, k, v, g, beta, A_log, dt_bias)
    y       = W_o (RMSNorm(o) * sigmoid(W_g x))

Heads keep an axis of their own in every parameter that has them (q_proj is [hidden, H, K], o_proj
[HV, V, hidden]), so sharding over heads is a name on that axis and no reshape stands in its way.
"""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ._kda import kimi_delta_attention
from ._segments import extents, is_padding
from ._short_conv import short_conv, short_conv_state, short_conv_step
from ._step import kimi_delta_attention_step

__all__ = ["KimiDeltaAttention", "KimiDeltaCache"]

_default_kernel_init = nnx.initializers.lecun_normal()


class KimiDeltaCache(NamedTuple):
    """All that a layer keeps of N sequences, of any lengths; a pytree. In place of N rows it may be
    a pool of slots, see `KimiDeltaAttention.step`."""

    q_conv: jax.Array  # [N, conv_width - 1, H, K], the last inputs of the convolutions
    k_conv: jax.Array  # [N, conv_width - 1, H, K]
    v_conv: jax.Array  # [N, conv_width - 1, HV, V]
    state: jax.Array  # [N, HV, K, V]


class KimiDeltaAttention(nnx.Module):
    """Kimi Delta Attention layer: projections, short convolutions, gates, the op, gated norm.

        layer = KimiDeltaAttention(2304, 32, 128, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        y = layer(x)                               # [B, T, 2304] -> [B, T, 2304]
        y = layer(x, segment_ids=segment_ids)      # packed rows, see pack_documents

    The defaults are Kimi-Linear-48B's. Kimi-K3 has `gate="bounded"`, `output_gate="full_rank"`;
    GLM-5.3-Flash `gate="bounded"`; FLA's layer `output_gate_bias=True`.

    Decoding, see `prefill` and `step`:

        y, cache = layer.prefill(x)                # the prompts
        y, cache = layer.step(x, cache)            # [N, 1, 2304], a token of each

    In Linen, through Flax's bridge:

        layer = nnx.bridge.to_linen(KimiDeltaAttention, 2304, 32, 128, dtype=jnp.bfloat16)
        variables = layer.init(jax.random.key(0), x)
        y = layer.apply(variables, x, segment_ids=segment_ids)

    **Arguments**

    - `hidden_size`: features of input and output.
    - `num_heads`: H, heads of q and k.
    - `head_dim`: K, and V unless `value_head_dim` says otherwise. The CUDA kernels are made for
      128.
    - `num_value_heads`: HV, heads of v, gates, state and output; a multiple of H, by default H.
    - `value_head_dim`: V, by default K.
    - `conv_width`: taps of the short convolutions.
    - `gate`: "softplus", decay -exp(A_log) softplus(g + dt_bias), or "bounded", decay
      gate_lower_bound sigmoid(exp(A_log) (g + dt_bias)).
    - `gate_lower_bound`: in [-5, 0), read by the bounded gate alone.
    - `gate_rank`: rank of the decay gate's projection and of a low-rank output gate, by default V.
    - `output_gate`: "low_rank" (g_a_proj, g_b_proj) or "full_rank" (g_proj).
    - `output_gate_bias`: whether the output gate's last projection has a bias.
    - `allow_neg_eigval`: beta in (0, 2) instead of (0, 1).
    - `norm_eps`: epsilon of the gated RMSNorm.
    - `dtype`: type of the computation; None infers it from the input and the parameters. Gates,
      norm and state are computed in float32 whatever it is.
    - `param_dtype`: type of the parameters except A_log and dt_bias, which are float32 always:
      bfloat16 cannot hold the spread of dt_bias, and its smallest decays would be lost.
    - `precision`: of the projections, see `jax.lax.Precision`.
    - `kernel_init`: initialiser of all projections.
    - `axis_names`: names (hidden, heads) of those two axes in the `out_sharding` metadata of every
      parameter, e.g. ("embed", "heads"): mesh axes, or logical names resolved by Flax's axis
      rules. None leaves the metadata to `kernel_init`, which may be an `nnx.with_partitioning`
      initialiser.
    - `residual_name`: passed to `kimi_delta_attention`.
    - `implementation`: passed to it and to `short_conv`, and to their steps.
    - `context_axis`: the mesh axis that T is split over when the layer is called; see
      `kimi_delta_attention`. `prefill` and `step` take whole rows.
    - `rngs`: random streams; "params" is used.

    **Parameters** `q_proj k_proj v_proj o_proj`, `q_conv1d k_conv1d v_conv1d`, `f_a_proj f_b_proj`,
    `g_a_proj g_b_proj` or `g_proj`, `b_proj`, `o_norm`, `A_log` [HV], `dt_bias` [HV, K].

    The projections are named "query_proj", "key_proj", "value_proj" and "out_proj" for
    `jax.checkpoint` policies."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int = 128,
        *,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        conv_width: int = 4,
        gate: str = "softplus",
        gate_lower_bound: float = -5.0,
        gate_rank: int | None = None,
        output_gate: str = "low_rank",
        output_gate_bias: bool = False,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        dtype=None,
        param_dtype=jnp.float32,
        precision=None,
        kernel_init=_default_kernel_init,
        axis_names: tuple[str | None, str | None] | None = None,
        residual_name: str | None = None,
        context_axis: str | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        num_value_heads = num_heads if num_value_heads is None else num_value_heads
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        gate_rank = value_head_dim if gate_rank is None else gate_rank
        _check_sizes(
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            num_value_heads=num_value_heads,
            value_head_dim=value_head_dim,
            conv_width=conv_width,
            gate_rank=gate_rank,
        )
        _check_options(gate, gate_lower_bound, output_gate, axis_names)

        self.hidden_size = hidden_size
        self.gate = gate
        self.gate_lower_bound = gate_lower_bound
        self.output_gate = output_gate
        self.allow_neg_eigval = allow_neg_eigval
        self.residual_name = residual_name
        self.context_axis = context_axis
        self.implementation = implementation

        embed, heads = axis_names or (None, None)

        def metadata(*names):
            return {} if axis_names is None else {"out_sharding": names}

        def projection(inputs, outputs, names, use_bias=False):
            return nnx.LinearGeneral(
                inputs,
                outputs,
                axis=tuple(range(-len(inputs), 0)),
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                kernel_init=kernel_init,
                kernel_metadata=metadata(*names),
                bias_metadata=metadata(*names[len(inputs) :]) if use_bias else {},
                rngs=rngs,
            )

        def convolution(channels):
            names = metadata(None, heads, None)
            return _ShortConv(conv_width, channels, param_dtype, names, implementation, rngs)

        hidden, rank = (hidden_size,), (gate_rank,)
        qk_heads, v_heads = (num_heads, head_dim), (num_value_heads, value_head_dim)
        gate_channels = (num_value_heads, head_dim)
        to_heads = (embed, heads, None)

        self.q_proj = projection(hidden, qk_heads, to_heads)
        self.k_proj = projection(hidden, qk_heads, to_heads)
        self.v_proj = projection(hidden, v_heads, to_heads)
        self.q_conv1d = convolution(qk_heads)
        self.k_conv1d = convolution(qk_heads)
        self.v_conv1d = convolution(v_heads)

        self.f_a_proj = projection(hidden, rank, (embed, None))
        self.f_b_proj = projection(rank, gate_channels, (None, heads, None))
        self.b_proj = projection(hidden, (num_value_heads,), (embed, heads))
        # The bounded gate starts at unit amplitude, as in GLM-5.3-Flash: 16 would pin it to 0.
        initial_value = _log_uniform if gate == "softplus" else nnx.initializers.zeros
        self.A_log = nnx.Param(
            initial_value(rngs.params(), (num_value_heads,), jnp.float32), **metadata(heads)
        )
        self.dt_bias = nnx.Param(
            _inverse_softplus_dt(rngs.params(), gate_channels, jnp.float32), **metadata(heads, None)
        )

        if output_gate == "low_rank":
            self.g_a_proj = projection(hidden, rank, (embed, None))
            self.g_b_proj = projection(rank, v_heads, (None, heads, None), output_gate_bias)
        else:
            self.g_proj = projection(hidden, v_heads, to_heads, output_gate_bias)
        self.o_norm = _GatedRMSNorm(value_head_dim, norm_eps, param_dtype, metadata(None))
        self.o_proj = projection(v_heads, hidden, (heads, None, embed))

    def __call__(self, x, *, segment_ids=None, padding_segment_id=0, out_sharding=None):
        """Mix the tokens of x along T.

        **Arguments**

        - `x`: [B, T, hidden_size].
        - `segment_ids`: int32 [B, T] or None. Segments (maximal runs of equal ids) do not see each
          other; ids below zero or equal to `padding_segment_id` are padding: zero output, zero
          gradient, whatever x holds there.
        - `padding_segment_id`: static int, or None to make 0 an ordinary id.
        - `out_sharding`: sharding of the output, for Explicit meshes with sharded heads.

        **Returns** [B, T, hidden_size].
        """
        self._check_input(x, "B")
        if segment_ids is not None and segment_ids.shape != x.shape[:2]:
            raise ValueError(f"segment_ids must be [B, T] = {x.shape[:2]}, got {segment_ids.shape}")
        segments = dict(segment_ids=segment_ids, padding_segment_id=padding_segment_id)
        x = _without_padding(x, segments)
        q, k, v = self._projections(x)
        rows = dict(segments, context_axis=self.context_axis)
        o = kimi_delta_attention(
            self.q_conv1d(q, **rows),
            self.k_conv1d(k, **rows),
            self.v_conv1d(v, **rows),
            self.f_b_proj(self.f_a_proj(x)),
            self.b_proj(x),
            residual_name=self.residual_name,
            **self._options(),
            **rows,
        )
        return self._output(x, o, out_sharding)

    def init_cache(self, num_sequences, *, dtype=None, state_dtype=jnp.float32):
        """The cache of sequences without any token, or a pool of so many slots.

        **Arguments**

        - `num_sequences`: N.
        - `dtype`: of the convolutions' inputs; by default that of the layer's computation.
        - `state_dtype`: float32 or bfloat16.

        **Returns** a `KimiDeltaCache` of zeros.
        """
        dtype = dtype or self.q_proj.dtype or self.q_proj.kernel[...].dtype
        projections = (self.q_proj, self.k_proj, self.v_proj)
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        histories = [
            jnp.zeros((num_sequences, conv.width - 1, *projection.out_features), dtype)
            for projection, conv in zip(projections, convolutions, strict=True)
        ]
        (_, K), (HV, V) = self.k_proj.out_features, self.v_proj.out_features
        return KimiDeltaCache(*histories, jnp.zeros((num_sequences, HV, K, V), state_dtype))

    def prefill(self, x, cache=None, *, segment_ids=None, padding_segment_id=0, max_segments=None):
        """`__call__`, and the cache to go on from: prompts of any lengths, new or continued.

        **Arguments**

        - `x`, `segment_ids`, `padding_segment_id`: as in `__call__`. Prompts of different lengths
          are segments of one row, or rows with padding behind them.
        - `cache`: a `KimiDeltaCache` of the sequences so far, as returned; None: they are new.
        - `max_segments`: N, how many segments of a row are kept (static); needed with
          `segment_ids`. Compiled programs serve all lengths.

        **Returns** y [B, T, hidden_size] and a cache of B N sequences (B without segment_ids): the
        n-th segment of row b is sequence b N + n. Where a row has fewer segments, what `cache`
        held, or zero.
        """
        self._check_input(x, "B")
        mesh = jax.sharding.get_abstract_mesh()
        types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        if types.get(self.context_axis) == jax.sharding.AxisType.Manual:
            raise ValueError(
                f"prefill takes whole rows; inside of shard_map over {self.context_axis!r}, the "
                "layer's context_axis, x is a shard: call prefill outside of it"
            )
        if (segment_ids is None) != (max_segments is None):
            raise ValueError("max_segments is needed with segment_ids, and refused without")
        segments = dict(segment_ids=segment_ids, padding_segment_id=padding_segment_id)
        x = _without_padding(x, segments)
        rows = x.shape[:1] if segment_ids is None else (x.shape[0], max_segments)
        split = lambda array: array.reshape(*rows, *array.shape[1:])
        before = KimiDeltaCache(*map(split, cache)) if cache is not None else (None,) * 4
        convolved, histories = [], []
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        for conv, tokens, history in zip(
            convolutions, self._projections(x), before[:3], strict=True
        ):
            convolved.append(conv(tokens, initial_state=history, **segments))
            histories.append(conv.state_after(tokens, history, max_segments, segments))
        state = None if cache is None else before[3].astype(jnp.float32)
        o, state = kimi_delta_attention(
            *convolved,
            self.f_b_proj(self.f_a_proj(x)),
            self.b_proj(x),
            initial_state=state,
            return_final_state=True,
            max_segments=max_segments,
            **self._options(),
            **segments,
        )
        if cache is not None:
            state = state.astype(cache.state.dtype)
        after = (array.reshape(-1, *array.shape[len(rows) :]) for array in (*histories, state))
        return self._output(x, o), KimiDeltaCache(*after)

    def step(self, x, cache, *, state_indices=None):
        """The next tokens of N sequences, whatever their lengths so far. Donate the cache to
        `jax.jit`, and the states are updated in place.

        **Arguments**

        - `x`: [N, T, hidden_size], 1 <= T <= 8.
        - `cache`: a `KimiDeltaCache` of N sequences, or with `state_indices` a pool of slots.
        - `state_indices`: int32 [N], the slot of each sequence; a negative one reads and writes
          nothing, see `kimi_delta_attention_step`.

        **Returns** y [N, T, hidden_size], meaningless for a sequence without a slot, and the cache.
        """
        self._check_input(x, "N")
        o, cache = self._advance(
            self._projections(x),
            self.f_b_proj(self.f_a_proj(x)),
            self.b_proj(x),
            cache,
            state_indices,
        )
        return self._output(x, o), cache

    def _advance(self, qkv, g, beta, cache, state_indices=None):
        """What a step does between its projections and the norm: the output and the cache."""
        convolved, histories = [], []
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        for conv, tokens, history in zip(convolutions, qkv, cache[:3], strict=True):
            y, history = conv.step(tokens, history, state_indices)
            convolved.append(y)
            histories.append(history)
        o, state = kimi_delta_attention_step(
            *convolved, g, beta, cache.state, state_indices=state_indices, **self._options()
        )
        return o, KimiDeltaCache(*histories, state)

    def _check_input(self, x, rows):
        if x.ndim != 3 or x.shape[-1] != self.hidden_size:
            expected = f"[{rows}, T, hidden_size={self.hidden_size}]"
            raise ValueError(f"x must be {expected}, got {x.shape}")

    def _projections(self, x):
        return (
            checkpoint_name(self.q_proj(x), "query_proj"),
            checkpoint_name(self.k_proj(x), "key_proj"),
            checkpoint_name(self.v_proj(x), "value_proj"),
        )

    def _options(self):
        """What op and step are told alike."""
        return dict(
            gate=self.gate,
            A_log=self.A_log[...],
            dt_bias=self.dt_bias[...],
            gate_lower_bound=self.gate_lower_bound,
            beta_is_logits=True,
            allow_neg_eigval=self.allow_neg_eigval,
            qk_l2norm=True,
            implementation=self.implementation,
        )

    def _output(self, x, o, out_sharding=None):
        if self.output_gate == "low_rank":
            output_gate = self.g_b_proj(self.g_a_proj(x))
        else:
            output_gate = self.g_proj(x)
        o = self.o_norm(o, output_gate)
        return checkpoint_name(self.o_proj(o, out_sharding=out_sharding), "out_proj")


def _without_padding(x, segments):
    """x with zeros at padding: selected away at the door, a NaN there would reach the gradient of
    every projection."""
    if segments["segment_ids"] is None:
        return x
    return jnp.where(is_padding(**segments)[..., None], 0, x)


class _ShortConv(nnx.Module):
    """Holds the kernel [W, heads, head_dim] of one short convolution."""

    def __init__(self, width, channels, param_dtype, metadata, implementation, rngs):
        # Uniform in +-1/sqrt(W), torch's default for Conv1d, which the models were trained from.
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=())
        self.kernel = nnx.Param(init(rngs.params(), (width, *channels), param_dtype), **metadata)
        self.implementation = implementation

    @property
    def width(self):
        return self.kernel.shape[0]

    def __call__(self, x, **segments):
        return short_conv(x, self.kernel[...], implementation=self.implementation, **segments)

    def state_after(self, x, before, max_segments, segments):
        """The last inputs of each segment, or of what was before it where it is short."""
        after = short_conv_state(x, self.width, max_segments=max_segments, **segments)
        if before is None:
            return after
        history = self.width - 1
        if segments["segment_ids"] is None:
            return jnp.concatenate([before, x.astype(before.dtype)], axis=1)[:, x.shape[1] :]
        _, length = extents(**segments, N=max_segments)
        # Entry j of the new history is entry j + length of the old one, or a token's.
        entry = jnp.arange(history) + length[..., None]
        channels = (1,) * (x.ndim - 2)
        shape = (*entry.shape, *channels)
        old = jnp.take_along_axis(before, jnp.minimum(entry, history - 1).reshape(shape), axis=2)
        return jnp.where((entry < history).reshape(shape), old, after.astype(before.dtype))

    def step(self, x, state, state_indices):
        return short_conv_step(
            x,
            self.kernel[...],
            state,
            state_indices=state_indices,
            implementation=self.implementation,
        )


class _GatedRMSNorm(nnx.Module):
    """RMSNorm over the last axis, times sigmoid(gate); float32 inside whatever the types."""

    def __init__(self, features, eps, param_dtype, metadata):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype), **metadata)
        self.eps = eps

    def __call__(self, x, gate):
        # The backward pass recomputes the float32 intermediates instead of keeping them.
        return jax.checkpoint(self._norm, prevent_cse=False)(x, gate, self.scale[...])

    def _norm(self, x, gate, scale):
        dtype = x.dtype
        compute_dtype = jnp.promote_types(dtype, jnp.float32)
        x, gate, scale = (value.astype(compute_dtype) for value in (x, gate, scale))
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale * jax.nn.sigmoid(gate)).astype(dtype)


def _log_uniform(key, shape, dtype):
    """log of a uniform draw from [1, 16]."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def _inverse_softplus_dt(key, shape, dtype):
    """The bias whose softplus is a step size dt, log-uniform in [1e-3, 1e-1], at least 1e-4."""
    log_dt = jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(1e-1))
    dt = jnp.maximum(jnp.exp(log_dt), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))


def _check_sizes(**sizes):
    problems = [
        f"{name} must be an int of at least 1, got {value!r}"
        for name, value in sizes.items()
        if not _is_positive_int(value)
    ]
    if not problems and sizes["num_value_heads"] % sizes["num_heads"]:
        problems.append(
            f"num_value_heads must be a multiple of num_heads={sizes['num_heads']},"
            f" got {sizes['num_value_heads']}"
        )
    if problems:
        raise ValueError("KimiDeltaAttention: " + "; ".join(problems))


def _is_positive_int(value):
    try:
        return operator.index(value) >= 1
    except TypeError:
        return False


def _check_options(gate, gate_lower_bound, output_gate, axis_names):
    problems = []
    if gate not in ("softplus", "bounded"):
        problems.append(f"gate must be 'softplus' or 'bounded', got {gate!r}")
    if gate == "bounded" and not -5.0 <= gate_lower_bound < 0.0:
        problems.append(f"gate_lower_bound must lie in [-5, 0), got {gate_lower_bound!r}")
    if output_gate not in ("low_rank", "full_rank"):
        problems.append(f"output_gate must be 'low_rank' or 'full_rank', got {output_gate!r}")
    if axis_names is not None and (isinstance(axis_names, str) or len(axis_names) != 2):
        problems.append(f"axis_names must be a pair (hidden, heads) or None, got {axis_names!r}")
    if problems:
        raise ValueError("KimiDeltaAttention: " + "; ".join(problems))
