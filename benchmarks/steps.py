"""Times the decode step, alone and in a layer: 32 in one program, in place, on states in rotation
that exceed the L2.

States and outputs of a run are given to the next one to be written over, as a decode loop does that
donates them: XLA's command buffer then finds every buffer where it was.
"""

import jax
import jax.numpy as jnp
import timing
from flax import nnx
from shapes import STEPS, D, rounds
from timing import L2_BYTES, UNROLLED

import jax_flashkda


class _InPlace:
    """32 steps in one program, from (states, outputs, tokens) to states and outputs."""

    def __init__(self, states, outputs, tokens):
        self.states, self.outputs, self.tokens = states, outputs, tokens
        several = jax.jit(self._several, donate_argnums=(0, 1), keep_unused=True)
        self._lowered = several.lower(states, outputs, tokens)
        assert (timing.target("step") or "") in self._lowered.as_text()

    def compile(self):
        self._compiled = self._lowered.compile()
        return self

    def _several(self, states, spent, tokens):
        states, outputs = list(states), []
        for i in range(UNROLLED):
            at = i % len(states)
            o, states[at] = self._step(states[at], tokens[i % len(tokens)])
            outputs.append(o)
        return states, outputs

    def run(self, programs=1):
        for _ in range(programs):  # the next one is prepared while this one runs
            self.states, self.outputs = self._compiled(self.states, self.outputs, self.tokens)
        return self.states, self.outputs

    def ms(self) -> float:
        return timing.median_of(self.run, repeats=5) / UNROLLED


def _sets(bytes_of_one):
    return min(UNROLLED, rounds(bytes_of_one, L2_BYTES) + 1)


class Steps(_InPlace):
    """The decode step alone."""

    def __init__(self, name, state_dtype):
        N, H, T = STEPS[name]
        q, k, v, g = (timing.normal((N, T, H, D), seed) for seed in range(4))
        tokens = dict(q=q, k=k, v=v, g=g, beta=timing.normal((N, T, H), 4))
        tokens |= dict(A_log=jnp.zeros(H), dt_bias=jnp.full((H, D), -4.0))
        bytes_of_one = N * H * D * D * jnp.dtype(state_dtype).itemsize
        state = lambda seed: timing.normal((N, H, D, D), seed, state_dtype)
        states = [state(5 + i) for i in range(_sets(bytes_of_one))]
        super().__init__(states, [jnp.zeros_like(v) for _ in range(UNROLLED)], [tokens])

    @staticmethod
    def _step(state, tokens):
        options = dict(gate="softplus", beta_is_logits=True, qk_l2norm=True)
        return jax_flashkda.kimi_delta_attention_step(
            **tokens, state=state, **options, implementation=timing.IMPLEMENTATION
        )


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
        super().__init__(caches, outputs, sets)
        is_kernel = "jax_flashkda.short_conv_step" in self._lowered.as_text()
        assert is_kernel == (convolution == "cuda")

    def _step(self, cache, tokens):
        weights, q, k, v, g, output_gate, beta = tokens
        layer = nnx.merge(self._layer, weights)
        o, cache = layer._advance((q, k, v), g, beta, cache)
        return layer.o_norm(o, output_gate), cache
