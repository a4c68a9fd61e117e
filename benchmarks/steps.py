"""Times the decode step: 32 in one program, in place, on states in rotation that exceed the L2.

States and outputs of a run are given to the next one to be written over, as a decode loop does that
donates them: XLA's command buffer then finds every buffer where it was.
"""

import jax
import jax.numpy as jnp
import timing
from shapes import STEPS, D, rounds
from timing import L2_BYTES, UNROLLED

import jax_flashkda


class Steps:
    def __init__(self, name, state_dtype):
        N, H, T = STEPS[name]
        keys = jax.random.split(jax.random.key(0), 5)
        q, k, v, g = (jax.random.normal(key, (N, T, H, D), jnp.bfloat16) for key in keys[:4])
        self.tokens = dict(q=q, k=k, v=v, g=g)
        self.tokens["beta"] = jax.random.normal(keys[4], (N, T, H), jnp.bfloat16)
        self.tokens |= dict(A_log=jnp.zeros(H), dt_bias=jnp.full((H, D), -4.0))
        bytes_of_one = N * H * D * D * jnp.dtype(state_dtype).itemsize
        count = min(UNROLLED, rounds(bytes_of_one, L2_BYTES) + 1)
        state = lambda seed: jax.random.normal(jax.random.key(seed), (N, H, D, D), state_dtype)
        self.states = [state(seed) for seed in range(count)]
        self.outputs = [jnp.zeros_like(v) for _ in range(UNROLLED)]
        several = jax.jit(self._several, donate_argnums=(0, 1), keep_unused=True)
        lowered = several.lower(self.states, self.outputs, self.tokens)
        assert (timing.target("step") or "") in lowered.as_text()
        self.compiled = lowered.compile()

    @staticmethod
    def _several(states, spent, tokens):
        states, outputs = list(states), []
        options = dict(gate="softplus", beta_is_logits=True, qk_l2norm=True)
        for i in range(UNROLLED):
            at = i % len(states)
            o, states[at] = jax_flashkda.kimi_delta_attention_step(
                **tokens, state=states[at], **options, implementation=timing.IMPLEMENTATION
            )
            outputs.append(o)
        return states, outputs

    def run(self, programs=1):
        for _ in range(programs):  # the next one is prepared while this one runs
            self.states, self.outputs = self.compiled(self.states, self.outputs, self.tokens)
        return self.states, self.outputs

    def ms(self) -> float:
        return timing.median_of(self.run, repeats=7) / UNROLLED
