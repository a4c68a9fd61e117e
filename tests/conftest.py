"""Eight simulated CPU devices for the sharding tests, and which implementations this machine can
run.
"""

import os

# Before JAX starts: it reads the flag once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax  # noqa: E402
import pytest  # noqa: E402


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
