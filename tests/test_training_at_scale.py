"""examples/train_at_scale.py on eight simulated devices: it computes what one device computes, each
device holds its share, and the compiled program communicates what it must and nothing else.
"""

import collections
import functools
import importlib.util
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

nnx = pytest.importorskip("flax.nnx", reason="the example needs flax")
optax = pytest.importorskip("optax", reason="the example needs optax")

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "train_at_scale.py"
module = importlib.util.spec_from_file_location("train_at_scale", SCRIPT)
example = importlib.util.module_from_spec(module)
module.loader.exec_module(example)

# Sizes that occur nowhere else in the program, so that a shape tells what it belongs to.
ACCUMULATED, ROWS, T = 2, 8, 40
HIDDEN, HEADS, K = example.HIDDEN, example.HEADS, 16
SAVE = jax.checkpoint_policies.save_only_these_names("kda")
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(kind):
    if kind == "one device":
        return jax.make_mesh(
            (1, 1), ("data", "heads"), (AxisType.Auto,) * 2, devices=jax.devices()[:1]
        )
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    return jax.make_mesh((2, 4), ("data", "heads"), (MESHES[kind],) * 2)


def make_data(accumulated=ACCUMULATED):
    x = jax.random.normal(jax.random.key(1), (ACCUMULATED, ROWS, T, HIDDEN))
    ids = jnp.asarray(np.repeat([1, 2, 0], [25, 10, 5]), jnp.int32)
    x = x.reshape(accumulated, -1, T, HIDDEN)
    return x, jnp.broadcast_to(ids, x.shape[:3])


@functools.cache
def layers(kind, dtype):
    with jax.set_mesh(mesh_of(kind)):
        make = lambda: nnx.split(example.make_layers(dtype))
        return jax.jit(make, compiler_options=COMPILER_OPTIONS)()


def set_up(kind, dtype, policy=SAVE, learning_rate=0.3, accumulated=ACCUMULATED):
    """(train_step, its arguments), for use under the mesh."""
    graphdef, params = layers(kind, dtype)
    params = jax.tree.map(jnp.copy, params)  # the step takes them over
    optimizer = optax.sgd(learning_rate, momentum=0.9)
    rows = NamedSharding(mesh_of(kind), PartitionSpec(None, "data"))
    data = jax.device_put(make_data(accumulated), rows)
    train_step = example.make_train_step(graphdef, optimizer, dtype, policy)
    return train_step, (params, optimizer.init(params), *data)


@functools.cache
def compiled_step(kind, dtype, **options):
    with jax.set_mesh(mesh_of(kind)):
        train_step, arguments = set_up(kind, dtype, **options)
        return train_step.lower(*arguments).compile(compiler_options=COMPILER_OPTIONS)


def trained(kind, dtype=jnp.float32, steps=3, **options):
    """(params, opt_state, losses) after some steps."""
    step = compiled_step(kind, dtype, **options)
    losses = []
    with jax.set_mesh(mesh_of(kind)):
        _, (params, opt_state, *data) = set_up(kind, dtype, **options)
        for _ in range(steps):
            params, opt_state, loss = step(params, opt_state, *data)
            losses.append(float(loss))
    return params, opt_state, losses


def communicated(compiled):
    """Counter of (kind, mesh axis, shape), one entry for each tensor of each collective."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = collections.Counter()
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(.*replica_groups=(.*?), \w+=", line)
        if match is None:
            assert not re.search(rf" ({kinds})(-start)?\(", line), line
            continue
        # The groups of "heads" are devices 0 to 3 and 4 to 7, written in several ways.
        over_heads = re.match(r"\[2,4\]<=\[8\]|mesh\[.*\] \{'(heads|axis_1)'\}", match[3])
        axis = "heads" if over_heads else "data"
        for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
            shape = tuple(int(size) for size in shape.split(",") if size)
            found[match[2], axis, tuple(size for size in shape if size > 1)] += 1
    return found


@pytest.mark.parametrize("kind", MESHES)
def test_many_devices_compute_what_one_computes(kind):
    expected, _, expected_losses = trained("one device")
    params, opt_state, losses = trained(kind)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    momentum = nnx.to_flat_state(opt_state[0].trace)
    shares = {"data": 2, "heads": 4}
    for (path, got), (_, wanted), (_, moment) in zip(
        nnx.to_flat_state(params), nnx.to_flat_state(expected), momentum, strict=True
    ):
        name = ".".join(path)
        np.testing.assert_allclose(got[...], wanted[...], rtol=1e-3, atol=1e-5, err_msg=name)
        # Before and after three steps each device holds its share, of the momentum as well.
        ways = np.prod([shares.get(axis, 1) for axis in got.get_metadata()["out_sharding"]])
        for array in (got[...], moment[...]):
            assert {shard.data.size * ways for shard in array.addressable_shards} == {got.size}
        assert ways == 8 or name not in ("q_proj.kernel", "b_proj.kernel", "o_proj.kernel")


@pytest.mark.parametrize("kind", MESHES)
def test_the_collectives_of_a_step(kind):
    """All that the compiled program says: the loops over layers and batches are in it once."""
    found = communicated(compiled_step(kind, jnp.float32))
    parameters = nnx.to_flat_state(layers(kind, jnp.float32)[1])
    of_layer = {
        path: np.array(param.shape[1:]) // [4 if axis == "heads" else 1 for axis in axes]
        for path, param, axes in (
            (path, param, param.get_metadata()["out_sharding"][1:]) for path, param in parameters
        )
    }
    sharded = [
        of_layer[path]
        for path, param in parameters
        if "data" in param.get_metadata()["out_sharding"]
    ]
    assert len(sharded) == 7

    # Along "data": each such parameter of a layer is gathered in the forward and in the backward
    # pass, the gradients of all parameters are summed, and the loss.
    gathered = collections.Counter()
    for shape in sharded:
        gathered["all-gather", "data", tuple(shape[shape > 1].tolist())] += 2
    summed = {key: count for key, count in found.items() if key[:2] == ("all-reduce", "data")}
    elements = sum(int(np.prod(shape)) * count for (_, _, shape), count in summed.items())
    assert elements == sum(int(np.prod(shape)) for shape in of_layer.values()) + 1
    assert not any(T in shape for _, _, shape in summed)

    # Along "heads": what sums over heads. The output of the layer, the gradient of its input
    # through q, k, v and b, those of the inner sides of the two low-rank gates, that of o_norm.
    rows = ROWS // 2
    over_heads = {
        ("all-reduce", "heads", (rows, T, HIDDEN)): 1 + 4,
        ("all-reduce", "heads", (rows, T, K)): 2,
        ("all-reduce", "heads", (K,)): 1,
    }
    # Nothing else: the op, whose tensors have heads and tokens, communicates nothing.
    assert found == gathered + collections.Counter(over_heads | summed)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    params, _, losses = trained("one device", steps=1)
    whole, _, whole_losses = trained("one device", steps=1, accumulated=1)
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-6)
    for (path, got), (_, wanted) in zip(
        nnx.to_flat_state(params), nnx.to_flat_state(whole), strict=True
    ):
        np.testing.assert_allclose(got[...], wanted[...], rtol=1e-5, atol=1e-6, err_msg=str(path))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def traced(kind, dtype, policy=SAVE):
    with jax.set_mesh(mesh_of(kind)):
        train_step, arguments = set_up(kind, dtype, policy)
        return list(equations(jax.make_jaxpr(train_step)(*arguments).jaxpr))


def test_a_policy_with_the_named_residuals_runs_the_op_once():
    def forwards(policy):
        names = [equation.primitive.name for equation in traced("one device", jnp.float32, policy)]
        assert names.count("kda_backward") == 1
        return names.count("kda_forward")

    assert forwards(jax.checkpoint_policies.nothing_saveable) == 2
    assert forwards(SAVE) == 1


def test_what_is_gathered_is_in_the_type_of_the_computation():
    """In the traced program: XLA widens bfloat16 on a CPU, so the compiled one does not tell."""
    along_data = lambda variable: "data" in variable.aval.sharding.spec
    gathered = collections.Counter(
        (equation.outvars[0].aval.shape, equation.outvars[0].aval.dtype.name)
        for equation in traced("explicit", jnp.bfloat16)
        if equation.primitive.name == "reshard"
        and along_data(equation.invars[0])
        and not along_data(equation.outvars[0])
    )
    shapes = [(HIDDEN, HEADS, K), (HIDDEN, HEADS), (HIDDEN, K), (HEADS, K, HIDDEN)]
    assert gathered.keys() == {(shape, "bfloat16") for shape in shapes}


def test_bfloat16_computation_on_float32_master_weights():
    """Steps too small for bfloat16 add up in the weights."""
    params, opt_state, losses = trained("one device", jnp.bfloat16, learning_rate=1e-4)
    np.testing.assert_allclose(losses[0], trained("one device", steps=1)[2][0], rtol=0.02)
    assert all(array.dtype == jnp.float32 for array in jax.tree.leaves((params, opt_state)))
    before, after = (
        np.concatenate([np.ravel(param[...]) for _, param in nnx.to_flat_state(state)])
        for state in (layers("one device", jnp.bfloat16)[1], params)
    )
    assert (before != after).mean() > 0.95
    assert (before.astype(jnp.bfloat16) != after.astype(jnp.bfloat16)).mean() < 0.05


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*uses XLA on an NVIDIA GPU")  # float32, small heads
@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (4, 1), (2, 2)], ids=str)
def test_gpus_train_as_one(shape):
    """Losses of 100 steps, in float32: parameters, batch and optimizer state over (data, heads)."""
    if jax.device_count() < np.prod(shape):
        pytest.skip(f"needs {np.prod(shape)} GPUs")

    def losses_on(shape):
        count = shape[0] * shape[1]
        mesh = jax.make_mesh(
            shape, ("data", "heads"), (AxisType.Explicit,) * 2, devices=jax.devices()[:count]
        )
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            make = lambda: example.make_layers(jnp.float32)  # noqa: E731
            graphdef, params = nnx.split(nnx.jit(make)())
            optimizer = optax.adamw(1e-3)
            data = jax.device_put(make_data(), PartitionSpec(None, "data"))
            train_step = example.make_train_step(graphdef, optimizer, jnp.float32, SAVE)
            opt_state, losses = optimizer.init(params), []
            for _ in range(100):
                params, opt_state, loss = train_step(params, opt_state, *data)
                losses.append(loss)
        return np.array(jax.device_get(losses))

    expected = losses_on((1, 1))
    assert expected[-1] < 0.8 * expected[0]
    np.testing.assert_allclose(losses_on(shape), expected, rtol=1e-3)


@functools.cache
def losses_of_the_script(processes, gpus=()):
    """What each of so many processes prints, with eight CPU devices among them, or these GPUs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={8 // processes}"
    share = len(gpus) // processes

    def start(process):
        env = os.environ | {"XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0"}
        if gpus:
            of_process = gpus[share * process : share * (process + 1)]
            env |= {"CUDA_VISIBLE_DEVICES": ",".join(of_process)}
            env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # beside this process
        return subprocess.Popen(
            # On a GPU the example's small heads run on XLA, which says so.
            [sys.executable, "-W", "error", "-W", "ignore:kimi_delta_attention uses XLA"]
            + [SCRIPT, f"--coordinator={coordinator}"]
            + [f"--processes={processes}", f"--process={process}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )

    started = [start(process) for process in range(processes)]
    printed = [process.communicate(timeout=600)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(printed)
    return [[float(loss) for loss in re.findall(r"loss (\S+)", text)] for text in printed]


def test_the_script():
    (losses,) = losses_of_the_script(1)
    assert len(losses) == 10 and losses[-1] < 0.5 * losses[0]


def check_processes(several, alone):
    """Equal, but for bfloat16 and sums over devices in another order."""
    for losses in several:
        np.testing.assert_allclose(losses, alone, rtol=2e-3)


def test_several_processes_train_as_one():
    check_processes(losses_of_the_script(2), *losses_of_the_script(1))


@pytest.mark.gpu
def test_processes_with_a_gpu_each_train_as_one():
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    gpus = tuple(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2])
    check_processes(losses_of_the_script(2, gpus), *losses_of_the_script(1, gpus))
