"""Eight simulated CPU devices for the sharding tests, and which implementations this machine can
run.
"""

import os
import pathlib

# Before JAX starts: it reads the flag once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

# Workers of pytest-xdist get four cores each, of which they share three with others: XLA's pools
# have a thread for every core that a process may use, and the references that the GPU tests wait
# for would fight for them.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER.startswith("gw") and hasattr(os, "sched_setaffinity"):
    cores, first = sorted(os.sched_getaffinity(0)), int(WORKER[2:])
    os.sched_setaffinity(0, {cores[(first + i) % len(cores)] for i in range(4)})
# And of several GPUs every worker has all, each worker another one first.
gpus = len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))
if WORKER.startswith("gw") and gpus > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
    order = [str((int(WORKER[2:]) + i) % gpus) for i in range(gpus)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(order)

import jax  # noqa: E402
import pytest  # noqa: E402

# XLA maps every program that it compiles for the CPU into memory, JAX keeps the programs, and Linux
# grants a process 65,530 maps: past them the compiler crashes. The whole suite needs more.
MAPS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 30_000


def pytest_runtest_teardown():
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["xla", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request):
    return request.param
