"""Train scanned layers with parameters, optimizer state and batch spread over many devices.

    python examples/train_at_scale.py
    python examples/train_at_scale.py --coordinator HOST:PORT --processes N --process I

The second form, with I from 0 to N - 1, is one program in N processes, of which each holds its
share of the devices.

Batch rows, and the hidden axis of every parameter, lie along "data", heads along "heads". A layer
is gathered along "data" where it runs, in bfloat16, from float32 master weights, and again in the
backward pass. Without several GPUs this simulates eight CPU devices.
"""

import argparse
import functools
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import AxisType, PartitionSpec  # noqa: E402

from jax_flashkda import KimiDeltaAttention  # noqa: E402

LAYERS, HIDDEN, HEADS = 3, 32, 4
STACKED = dict(transform_metadata={nnx.PARTITION_NAME: None})  # the layers' axis lies nowhere
ROWS = PartitionSpec("data")


def make_layers(dtype):
    options = dict(axis_names=("data", "heads"), residual_name="kda", dtype=dtype)
    make = lambda rngs: KimiDeltaAttention(HIDDEN, HEADS, 16, **options, rngs=rngs)
    return nnx.vmap(make, **STACKED)(nnx.Rngs(0).split(LAYERS))


def explicit():
    """Whether arrays carry their sharding in their type; on Auto meshes XLA infers it."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def place(x, spec):
    return jax.reshard(x, spec) if explicit() else jax.lax.with_sharding_constraint(x, spec)


def gathered(layer, dtype):
    """The layer whole along "data", in the type of the computation; A_log and such stay."""
    graphdef, params = nnx.split(layer)
    for _, param in nnx.to_flat_state(params):
        names = param.get_metadata()["out_sharding"]
        if "data" in names:
            spec = PartitionSpec(*(None if name == "data" else name for name in names))
            param.set_value(place(param[...].astype(dtype), spec))
    return nnx.merge(graphdef, params)


def make_train_step(graphdef, optimizer, dtype, policy):
    @functools.partial(nnx.scan, in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry, **STACKED)
    @functools.partial(nnx.remat, policy=policy)
    def through(layer, x, segment_ids):
        out_sharding = ROWS if explicit() else None
        return x + gathered(layer, dtype)(x, segment_ids=segment_ids, out_sharding=out_sharding)

    def loss_of(params, x, segment_ids):
        y = through(nnx.merge(graphdef, params), x.astype(dtype), segment_ids)
        return jnp.mean(jnp.square(y.astype(jnp.float32) - 1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, xs, segment_ids):
        """Over xs [A, B, T, hidden]: the gradients of A batches, one after the other, averaged."""

        def add(total, batch):
            loss, grads = jax.value_and_grad(loss_of)(params, *batch)
            grads = jax.tree.map(place, grads, nnx.get_partition_spec(params))
            return jax.tree.map(jnp.add, total, (loss, grads)), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zeros, (xs, segment_ids))
        loss, grads = jax.tree.map(lambda x: x / len(xs), total)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return train_step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", help="address of process 0, HOST:PORT")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    options = parser.parse_args()
    if options.processes > 1:  # before anything else asks for devices
        jax.distributed.initialize(options.coordinator, options.processes, options.process)

    data = 2 if jax.device_count() % 2 == 0 else 1
    shape = (data, jax.device_count() // data)
    mesh = jax.make_mesh(shape, ("data", "heads"), axis_types=(AxisType.Explicit,) * 2)
    policy = jax.checkpoint_policies.save_only_these_names("kda")
    optimizer = optax.adamw(1e-2)
    with jax.set_mesh(mesh):
        graphdef, params = nnx.split(nnx.jit(lambda: make_layers(jnp.bfloat16))())
        opt_state = optimizer.init(params)  # not under jit: there it would not lie as params do
        x = jax.random.normal(jax.random.key(0), (2, 4, 32, HIDDEN))
        x, ids = jax.device_put((x, jnp.ones(x.shape[:3], int)), PartitionSpec(None, "data"))
        train_step = make_train_step(graphdef, optimizer, jnp.bfloat16, policy)
        for step in range(10):
            params, opt_state, loss = train_step(params, opt_state, x, ids)
            print(f"step {step}: loss {loss:.4f}")
    kernel = params["q_proj"]["kernel"][...]
    print("q_proj", kernel.dtype, kernel.shape, "in", kernel.sharding.spec)


if __name__ == "__main__":
    main()
