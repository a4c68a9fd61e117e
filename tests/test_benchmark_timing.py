"""The benchmark's clock and programs, on the CPU: XLA in place of the kernels, small sizes."""

import importlib
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import COMPILE_QUICKLY

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
DIMS = (2, 64, 1, 2, None)
PACKED = (1, 70, 1, 1, (64, 6))


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    timing = importlib.import_module("timing")
    monkeypatch.setattr(timing, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(timing, "COMPILER_OPTIONS", COMPILE_QUICKLY)
    monkeypatch.setattr(timing, "REPEAT_MS", 0.01)
    monkeypatch.setattr(timing, "UNROLLED", 2)
    monkeypatch.setattr(timing, "POOL", 2**18)
    return timing


@pytest.mark.parametrize("work, dims", [("forward", PACKED), ("training", DIMS)])
def test_programs_run(timing, work, dims, monkeypatch):
    if work == "training":  # compiles for long: one call in a program will do
        monkeypatch.setattr(timing, "SMALL_MS", 0)
    program = getattr(timing, f"{work}_program")(dims, "bounded slow")
    inputs = getattr(timing, f"{work}_inputs")(dims, "bounded slow")
    assert timing.median_ms(program, inputs, repeats=1) > 0
    assert program.temporary_bytes > 0


def test_softmax_attention_runs_and_failures_are_lines(timing, monkeypatch):
    softmax = importlib.import_module("softmax")
    monkeypatch.setitem(softmax.SHAPES, "tiny", (1, 16, 2, 2, None))
    rows = [{"op": "softmax", "work": "training", "shape": name} for name in ("tiny", "missing")]
    (_, good), (row, bad) = softmax._compiled(rows)
    assert softmax._timed(*good)["ms"] > 0
    assert row is rows[1] and softmax._timed(*bad) == {"error": "KeyError: 'missing'"}


def test_the_plan_has_everything(timing):
    softmax = importlib.import_module("softmax")
    rows = softmax.plan_shapes(["fix8k_h96", "uni8k_h96"]) + softmax.plan_over_t()
    has = lambda **wanted: any(wanted.items() <= row.items() for row in rows)
    for work, heads in (("forward", 32), ("training", 16)):
        assert has(op="kda", work=work, H=heads, T=2**20) and has(work=work, H=heads, T=65536)
        assert has(op="softmax", work=work, H=96, T=2048) and has(op="kda", work=work, H=96, T=2048)
        assert has(op="kda", work=work, H=16, T=1024, packed=True)
    assert has(shape="fix8k_h96", work="forward") and has(shape="fix8k_h96", work="training")
    assert not has(shape="uni8k_h96")
    assert len(rows) == len({str(row) for row in rows})


def test_gates_are_as_fast_as_they_say(timing):
    def log_decay(gate):
        x = timing.make_inputs(DIMS, gate, 0)
        raw = jnp.exp(x["A_log"])[:, None] * (x["g"] + x["dt_bias"])
        return float(-5 * jnp.mean(jax.nn.sigmoid(raw)))

    assert log_decay("bounded fast") < -2 and -0.05 < log_decay("bounded slow") < -0.01


def test_inputs_differ(timing):
    """Equal calls in one program would be one call."""
    sets = [timing.make_inputs(DIMS, "bounded fast", seed) for seed in range(8)]
    for name in ("q", "k", "v", "g"):
        assert len({float(x[name][0, 0, 0, 0]) for x in sets}) > 6
    assert (sets[0]["q"] != sets[0]["k"]).any()


def test_long_rows_repeat_their_start(timing, monkeypatch):
    monkeypatch.setattr(timing, "LONGEST_DRAWN", 32)
    q = timing.make_inputs((1, 96, 1, 1, None), "softplus slow", 3)["q"]
    assert (q[:, :32] == q[:, 64:]).all() and q.shape[1] == 96


def test_unrolled_calls_keep_their_addresses(timing):
    """Results go where those of the last run were, so that a command buffer needs no update."""
    make = lambda seed: jax.random.normal(jax.random.key(seed), (256,))
    program = timing.Program(lambda x: {"twice": 2 * x, "sum": jnp.sum(x)}, make)
    sets = [make(seed) for seed in range(timing.UNROLLED)]
    addresses = lambda tree: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]
    spent = program.nothing_spent()
    first = addresses(spent)
    for _ in range(3):
        spent = program.unrolled(spent, sets)
        assert addresses(spent) == first
    for x, result in zip(sets, spent, strict=True):
        np.testing.assert_array_equal(result["twice"], 2 * x)


@pytest.mark.parametrize("convolution", [None, "xla"])
def test_decode_steps_run_in_place(timing, monkeypatch, convolution):
    steps = pytest.importorskip("steps", reason="the layer needs flax")
    monkeypatch.setitem(steps.STEPS, "tiny", (1, 1, 1))
    monkeypatch.setattr(steps, "UNROLLED", 3)
    kind = (steps.Steps,) if convolution is None else (steps.LayerSteps, convolution)
    tiny = kind[0]("tiny", "float32", *kind[1:]).compile()
    addresses = lambda: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tiny.carried)]
    first = addresses()
    assert tiny.ms() > 0
    assert addresses() == first


def profile(*lines):
    """What a profile looks like: planes of lines of events."""
    space = types.SimpleNamespace
    events = lambda spans: [space(name=name, start_ns=a, duration_ns=b - a) for name, a, b in spans]
    planes = {}
    for plane, line, spans in lines:
        planes.setdefault(plane, []).append(space(name=line, events=events(spans)))
    return space(planes=[space(name=name, lines=lines) for name, lines in planes.items()])


def test_kernel_times(timing, monkeypatch):
    kernels = importlib.import_module("kernels")
    events = kernels.gpu_events(
        profile(
            ("/host:CPU", "Stream of thoughts", [("thought", 0, 999)]),
            ("/device:GPU:0", "Stream #14(Compute)", [("a", 10, 30), ("b", 20, 25), ("a", 40, 50)]),
            ("/device:GPU:0", "Stream #15(MemcpyD2D)", [("copy", 28, 45)]),
            ("/device:GPU:0", "XLA Ops", [("a", 0, 500)]),
        )
    )
    assert len(events) == 4 and kernels.covered([]) == 0
    monkeypatch.setattr(kernels, "profiled", lambda run: events)
    whole = kernels.kernel_ms(None, 2)
    assert whole == pytest.approx({"sum": 52e-6 / 2, "busy": 40e-6 / 2})
    split = kernels.split_ms(None, 2, {"first": "a", "absent": "z"})
    wanted = {"first": 30e-6 / 2, "absent": 0, "rest": 22e-6 / 2, "busy": 40e-6 / 2}
    assert split == pytest.approx(wanted)


def test_a_profile_without_a_gpu_says_so(timing):
    kernels = importlib.import_module("kernels")
    with pytest.raises(RuntimeError, match="no kernel"):
        kernels.kernel_ms(lambda: jnp.ones(3) + 1, 1)


def test_context_parallel_rows(timing):
    """Of one device and of two, which get the same results."""
    module = importlib.import_module("context_parallel")
    rows = list(module.timed(192, 1, 100, "softplus slow", check=True, counts=(1, 2)))
    assert [row["gpus"] for row in rows] == [1, 2]
    assert all(row["training_ms"] > 0 and row["forward_ms"] > 0 for row in rows)
    assert rows[0]["difference"] == 0 and 0 < rows[1]["difference"] < 0.02
