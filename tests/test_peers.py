"""Timers of other implementations never cost the benchmark its record. No GPU, no peer needed."""

import importlib.util
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("peers")
    sys.path.remove(str(BENCHMARKS))


def test_an_absent_peer_says_so(peers):
    if importlib.util.find_spec("flash_kda"):
        pytest.skip("flash_kda is installed")
    times = peers.time_peer("flash_kda", ["t512_h32"], 60)
    column = peers.column("flash_kda", "bounded fast")
    assert times == {"t512_h32": {column: "ModuleNotFoundError: No module named 'flash_kda'"}}


def test_a_peer_cannot_outlive_its_limit(peers):
    for result in peers.time_peer("fla", ["t512_h32"], 0)["t512_h32"].values():
        assert result == "not reached within 0 s"


def test_a_process_that_dies_tells_its_last_words(peers):
    (result,) = peers.time_peer("flash_kda", ["no_such_shape"], 60)["no_such_shape"].values()
    assert "no_such_shape" in result or "flash_kda" in result
