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


def test_all_peers_share_one_limit(peers, monkeypatch):
    asked = {}

    def lines_of(program, arguments, seconds, name):
        peer, *names = arguments
        asked[peer] = seconds, names
        return [{"shape": names[0], "gate": peers.PEERS[peer].gates[0], "result": 1.5}], "ended"

    monkeypatch.setattr(peers, "lines_of", lines_of)
    times = peers.time_all(["fix8k_h96", "fix8k_h64", "t512_h32"], 90)
    assert list(asked) == list(peers.PEERS)
    assert all(seconds <= 90 for seconds, _ in asked.values())
    assert asked["fla"][1] == ["fix8k_h96"]  # takes minutes to compile
    assert asked["cudnn"][1] == ["fix8k_h96", "fix8k_h64"]
    assert times["fix8k_h96"]["cudnn bounded fast"] == 1.5
    assert times["fix8k_h64"]["cudnn bounded slow"] == "ended" and times["t512_h32"] == {}
    peers.time_all(["fix8k_h96"], 0)
    assert all(seconds == 0 for seconds, _ in asked.values())


def test_tokamax_needs_no_profile_viewer(peers, monkeypatch):
    if importlib.util.find_spec("xprof"):
        pytest.skip("xprof is installed")
    for name in ("xprof", "xprof.cli", "xprof.cli.tools", "xprof.cli.tools.get_kernel_stats_tool"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    for _ in range(2):
        peers._without_xprof()
    tool = importlib.import_module("xprof.cli.tools").get_kernel_stats_tool
    assert tool is sys.modules["xprof.cli.tools.get_kernel_stats_tool"]
