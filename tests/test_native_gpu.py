"""The programs of tests/native that test what Python cannot see, where they have been built.

cmake -S . -B build -DJAX_FLASHKDA_NATIVE_TESTS=ON
cmake --build build --target native_tests
"""

import contextlib
import os
import pathlib
import subprocess

import pytest

pytestmark = pytest.mark.gpu

PROGRAMS = pathlib.Path(__file__).parent.parent / "build" / "tests" / "native"


@contextlib.contextmanager
def all_cores():
    """For what is started in it: a worker of pytest-xdist has few (conftest.py)."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


@pytest.mark.parametrize(
    "command",
    [
        "stages_test",
        "segment_table_test --untimed",
        "step_test",
        "short_conv_test --quick",
        "forward_test",
        "backward_test --quick",
        "gradient_test --quick",
        "forward_test --random 1000",
        "backward_test --random 1000",
    ],
)
def test_native_program(command):
    name, *arguments = command.split()
    if not (PROGRAMS / name).exists():
        pytest.skip(f"{PROGRAMS / name} has not been built")
    with all_cores():
        done = subprocess.run(
            [PROGRAMS / name, *arguments], capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stdout + done.stderr
