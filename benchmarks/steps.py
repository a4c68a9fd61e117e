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
        q, k, v, g = (timing.normal((N, T, H, D), seed) for seed in range(4))
        self.tokens = dict(q=q, k=k, v=v, g=g, beta=timing.normal((N, T, H), 4))
        self.tokens |= dict(A_log=jnp.zeros(H), dt_bias=jnp.full((H, D), -4.0))
        bytes_of_one = N * H * D * D * jnp.dtype(state_dtype).itemsize
        count = min(UNROLLED, rounds(bytes_of_one, L2_BYTES) + 1)
        state = lambda seed: timing.normal((N, H, D, D), seed, state_dtype)
        self.states = [state(5 + i) for i in range(count)]
        self.outputs = [jnp.zeros_like(v) for _ in range(UNROLLED)]
        several = jax.jit(self._several, donate_argnums=(0, 1), keep_unused=True)
        self._lowered = several.lower(self.states, self.outputs, self.tokens)
        assert (timing.target("step") or "") in self._lowered.as_text()

    def compile(self):
        self._compiled = self._lowered.compile()
        return self

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
            self.states, self.outputs = self._compiled(self.states, self.outputs, self.tokens)
        return self.states, self.outputs

    def ms(self) -> float:
        return timing.median_of(self.run, repeats=5) / UNROLLED
