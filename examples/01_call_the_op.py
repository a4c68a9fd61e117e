"""Call the op: gates, gradients, and a sequence continued from its state.

python examples/01_call_the_op.py
"""

import jax
import jax.numpy as jnp

from jax_flashkda import kimi_delta_attention

B, T, H, K, V = 2, 256, 4, 128, 128


def make_inputs(key):
    keys = jax.random.split(key, 5)
    return dict(
        q=jax.random.normal(keys[0], (B, T, H, K)),
        k=jax.random.normal(keys[1], (B, T, H, K)),
        v=jax.random.normal(keys[2], (B, T, H, V)),
        g=jax.random.normal(keys[3], (B, T, H, K)),  # raw gate, before softplus
        beta=jax.random.normal(keys[4], (B, T, H)),  # logits, before sigmoid
    )


# As in Kimi-Linear-48B: normalised q and k, softplus gate, beta from logits. All of it is fused.
options = dict(
    gate="softplus",
    A_log=jnp.zeros(H),
    dt_bias=jnp.full((H, K), -3.0),
    beta_is_logits=True,
    qk_l2norm=True,
)


@jax.jit
def attend(inputs, initial_state=None):
    return kimi_delta_attention(
        **inputs, **options, initial_state=initial_state, return_final_state=True
    )


inputs = make_inputs(jax.random.key(0))
o, final_state = attend(inputs)
print("output", o.shape, o.dtype, " state", final_state.shape, final_state.dtype)


# The state is all that a sequence leaves behind: the second half goes on from where the first
# ended.
first = {name: array[:, : T // 2] for name, array in inputs.items()}
second = {name: array[:, T // 2 :] for name, array in inputs.items()}
o_first, state = attend(first)
o_second, state = attend(second, state)
difference = jnp.abs(jnp.concatenate([o_first, o_second], axis=1) - o).max()
print(f"in two halves: largest difference {difference:.1e}")
assert difference < 1e-5


# Reverse-mode gradients of everything, the gate's parameters included.
@jax.jit
@jax.grad
def gradients(parameters, inputs):
    o = kimi_delta_attention(**inputs, **(options | parameters))
    return jnp.mean(o**2)


for name, gradient in gradients({"A_log": options["A_log"]}, inputs).items():
    print(f"gradient of {name}: {gradient}")
    assert jnp.isfinite(gradient).all()
