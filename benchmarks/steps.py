"""Times the decode step, alone and in a layer: 32 in one program, in place, on states in rotation
that exceed the L2.

What a run leaves is given to the next one to be written over, as a decode loop does that donates
its state: XLA's command buffer then finds every buffer where it was.
"""

import jax
import jax.numpy as jnp
import timing
from flax import nnx
from shapes import STEPS, D, rounds
from timing import L2_BYTES, UNROLLED

import jax_flashkda


class _InPlace:
    """32 steps in one program, from (carried, tokens) to what the next run carries."""

    def __init__(self, carried, tokens):
        self.carried, self.tokens = carried, tokens
        several = jax.jit(self._several, donate_argnums=0, keep_unused=True)
        self._lowered = several.lower(carried, tokens)
        assert (timing.target("step") or "") in self._lowered.as_text()

    def compile(self):
        self._compiled = self._lowered.compile()
        return self

    def run(self, programs=1):
        for _ in range(programs):  # the next one is prepared while this one runs
            self.carried = self._compiled(self.carried, self.tokens)
        return self.carried

    def ms(self) -> float:
        # Nothing hides what the host does for the first program: so that it is one of many.
        return timing.median_of(self.run, repeats=5, repeat_ms=100) / UNROLLED


def _sets(bytes_of_one):
    return min(UNROLLED, rounds(bytes_of_one, L2_BYTES) + 1)


class Steps(_InPlace):
    """The decode step alone, on sequences that take turns in a pool of states."""

    def __init__(self, name, state_dtype):
        N, H, T = STEPS[name]
        q, k, v, g = (timing.normal((N, T, H, D), seed) for seed in range(4))
        tokens = dict(q=q, k=k, v=v, g=g, beta=timing.normal((N, T, H), 4))
        tokens |= dict(A_log=jnp.zeros(H), dt_bias=jnp.full((H, D), -4.0))
        sets = _sets(N * H * D * D * jnp.dtype(state_dtype).itemsize)
        states = [timing.normal((N, H, D, D), 5 + i, state_dtype) for i in range(sets)]
        super().__init__((jnp.concatenate(states), jnp.zeros_like(v)), tokens)

    @staticmethod
    def _several(carried, tokens):
        pool, _ = carried
        N = tokens["q"].shape[0]
        options = dict(gate="softplus", beta_is_logits=True, qk_l2norm=True)
        for i in range(UNROLLED):
            slots = jnp.arange(N, dtype=jnp.int32) + i * N % pool.shape[0]
            o, pool = jax_flashkda.kimi_delta_attention_step(
                **tokens,
                state=pool,
                state_indices=slots,
                **options,
                implementation=timing.IMPLEMENTATION,
            )
        return pool, o


class LayerSteps(_InPlace):
    """All of the layer's step but its projections: short convolutions of q, k and v, decode step,
    gated RMSNorm. Every step has tokens of its own, or XLA would do for all what is equal.
    """

    def __init__(self, name, state_dtype, convolution):
        """convolution: the implementation of the short convolutions, "cuda" or "xla"."""
        N, H, T = STEPS[name]
        layer = jax_flashkda.KimiDeltaAttention(
            D, H, D, dtype=jnp.bfloat16, implementation=timing.IMPLEMENTATION, rngs=nnx.Rngs(0)
        )
        for conv in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d):
            conv.implementation = convolution
        self._layer, weights = nnx.split(layer)
        vectors = lambda seed: [timing.normal((N, T, H, D), 5 * seed + i) for i in range(5)]
        sets = [
            (weights, *vectors(seed), timing.normal((N, T, H), UNROLLED * 5 + seed))
            for seed in range(UNROLLED)
        ]
        bytes_of_one = N * H * D * D * jnp.dtype(state_dtype).itemsize
        caches = [layer.init_cache(N, state_dtype=state_dtype) for _ in range(_sets(bytes_of_one))]
        outputs = [jnp.zeros((N, T, H, D), jnp.bfloat16) for _ in range(UNROLLED)]
        super().__init__((caches, outputs), sets)
        is_kernel = "jax_flashkda.short_conv_step" in self._lowered.as_text()
        assert is_kernel == (convolution == "cuda")

    def _several(self, carried, tokens):
        caches, outputs = list(carried[0]), []
        for i in range(UNROLLED):
            at = i % len(caches)
            o, caches[at] = self._step(caches[at], tokens[i])
            outputs.append(o)
        return caches, outputs

    def _step(self, cache, tokens):
        weights, q, k, v, g, output_gate, beta = tokens
        layer = nnx.merge(self._layer, weights)
        o, cache = layer._advance((q, k, v), g, beta, cache)
        return layer.o_norm(o, output_gate), cache
