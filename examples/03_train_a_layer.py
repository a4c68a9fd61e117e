"""Train one KimiDeltaAttention layer to recall: which value was stored under this key?

    python examples/03_train_a_layer.py

Each sequence lists eight (key, value) pairs and then asks for one of the keys again. The delta rule
stores and overwrites associations, so a single layer between an embedding and a head learns this.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_flashkda import KimiDeltaAttention

PAIRS, SYMBOLS, BATCH, STEPS = 8, 16, 64, 200


class Recall(nnx.Module):
    def __init__(self, width, *, rngs):
        self.embed = nnx.Embed(2 * SYMBOLS, width, rngs=rngs)
        self.attention = KimiDeltaAttention(width, num_heads=2, head_dim=32, rngs=rngs)
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, SYMBOLS, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x)
        return self.head(self.norm(x[:, -1]))  # the answer stands after the question


def make_batch(key):
    """Tokens k1 v1 k2 v2 .. k, keys distinct, and the value to name."""
    key, which, shuffle = jax.random.split(key, 3)
    values = jax.random.randint(key, (BATCH, PAIRS), 0, SYMBOLS)
    order = jax.random.split(shuffle, BATCH)
    keys = jax.vmap(lambda key: jax.random.permutation(key, SYMBOLS)[:PAIRS])(order)
    pairs = jnp.stack([keys, values + SYMBOLS], axis=-1).reshape(BATCH, -1)
    asked = jax.random.randint(which, (BATCH, 1), 0, PAIRS)
    tokens = jnp.concatenate([pairs, jnp.take_along_axis(keys, asked, 1)], axis=1)
    return tokens, jnp.take_along_axis(values, asked, 1)[:, 0]


@nnx.jit
def train_step(model, optimizer, key):
    tokens, answers = make_batch(key)

    def loss_of(model):
        logits = model(tokens)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()
        return loss, jnp.mean(logits.argmax(-1) == answers)

    (loss, accuracy), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, gradients)
    return loss, accuracy


model = Recall(64, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
for step in range(1, STEPS + 1):
    loss, accuracy = train_step(model, optimizer, jax.random.key(step))
    if step % 50 == 0:
        print(f"step {step:3d}  loss {loss:.3f}  accuracy {accuracy:.0%}")
assert accuracy > 0.9, "chance is 1 in 16"
