"""Train over many devices: batch over one mesh axis, heads over the other.

    python examples/05_shard_over_heads.py

The op is independent per batch row and head, so it needs no communication; the output projection
sums over heads, and the gradients sum over the batch. Without several GPUs this simulates eight
CPU devices."""

import os
import re

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import AxisType, PartitionSpec  # noqa: E402

from jax_flashkda import KimiDeltaAttention  # noqa: E402

HIDDEN, HEADS, BATCH, T = 256, 8, 4, 64

devices = jax.device_count()
data = 2 if devices % 2 == 0 else 1
mesh = jax.make_mesh((data, devices // data), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)


def make_layer(**options):
    return KimiDeltaAttention(HIDDEN, HEADS, 32, rngs=nnx.Rngs(0), **options)


@nnx.jit
def step(layer, x):
    def loss(layer):
        y = layer(x)
        return jnp.mean(y**2), y

    gradients, y = nnx.grad(loss, has_aux=True)(layer)
    return y, gradients


x = jax.random.normal(jax.random.key(0), (BATCH, T, HIDDEN))
expected, expected_gradients = step(make_layer(), x)

with jax.set_mesh(mesh):
    # Every parameter that has heads is created in shards; the rest is replicated.
    layer = make_layer(axis_names=(None, "heads"))
    x = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("data")))
    y, gradients = step(layer, x)
    forward = nnx.jit(lambda layer, x: layer(x)).lower(layer, x).compile().as_text()

kernel = layer.q_proj.kernel[...]
print("devices:", dict(mesh.shape), " q_proj", kernel.shape, "in", kernel.sharding.spec)
shapes = {shard.data.shape for shard in kernel.addressable_shards}
print("each device holds", *shapes)

collectives = re.findall(r"= \S+ (all-\w+|reduce-scatter|collective-permute)", forward)
print("collectives of the forward pass:", collectives)

difference = jnp.abs(y - expected).max()
print(f"largest difference from one device: {difference:.1e}")
assert difference < 1e-4
for got, one in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
    assert jnp.allclose(got, one, rtol=1e-3, atol=1e-6)
