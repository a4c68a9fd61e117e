"""Times the op on one GPU, runs the GPU tests, and records both with a digest of the sources.

    python benchmarks/run.py                    everything; writes results/h200.json, prints a table
    python benchmarks/run.py --no-tests         times alone (the record says that no tests ran)
    python benchmarks/run.py --only fix8k_h96   some shapes; prints, records nothing
    python benchmarks/run.py --only-steps       the decode step; prints, records nothing
    python benchmarks/run.py --table            the table of the record
    python benchmarks/run.py --check            exit status 1 unless the record is of these sources

The last two need the standard library alone. Peers (benchmarks/peers.py) are timed where they are
installed, each in a process of its own. Times are of jitted calls with inputs on the device,
raw inputs (gate, l2norm and sigmoid inside the op), bfloat16: the median over repeats of at least
20 ms of asynchronous calls in a row, several input sets in rotation so that none is found in the L2
cache. Calls under 0.2 ms are unrolled 32 times in one program instead.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import peers

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "h200.json"

# name: (B, T, H, HV, lengths of the segments or None). D = 128.
SHAPES = {
    "fix8k_h96": (1, 8192, 96, 96, None),
    "mixed8k_h96": (1, 8192, 96, 96, [1300, 547, 2048, 963, 271, 3063]),
    "uni8k_h96": (1, 8192, 96, 96, [1024] * 8),
    "fix8k_h64": (1, 8192, 64, 64, None),
    "b4t4k_h32": (4, 4096, 32, 32, None),
    "b1t32k_h16": (1, 32768, 16, 16, None),
    "b1t64k_h8": (1, 65536, 8, 8, None),
    "gva8k_h16_32": (1, 8192, 16, 32, None),
    "t2k_h96": (1, 2048, 96, 96, None),
    "t2k_h12": (1, 2048, 12, 12, None),
    "t512_h32": (1, 512, 32, 32, None),
    "seg256x32_h32": (1, 8192, 32, 32, [32] * 256),
}
TRAINING_SHAPES = (*list(SHAPES)[:8], "t2k_h96")
# The decode step: (sequences, heads, tokens).
STEPS = {
    "n1_h32": (1, 32, 1),
    "n8_h32": (8, 32, 1),
    "n64_h32": (64, 32, 1),
    "n256_h32": (256, 32, 1),
    "n64_h96": (64, 96, 1),
    "n64_h32_t4": (64, 32, 4),
}
STATE_DTYPES = ("float32", "bfloat16")
D = 128
GATES = ("bounded fast", "bounded slow", "softplus fast", "softplus slow")
TRAINING_GATES = ("bounded fast", "bounded slow", "softplus slow")
TRAINING_FLOOR = 14 / 5  # bytes of forward and backward over those of the forward alone
BYTES_PER_SECOND = 4.3e12  # of a device-to-device copy, reads and writes counted
L2_BYTES = 60e6
UNROLLED = 32  # calls in one program, for times below 0.2 ms
# Measured on the same kind of GPU before, forward, raw inputs, ms: FLA Triton 0.5.2 (CUDA events).
# For the table where FLA is not installed.
FLA_KNOWN_MS = {
    "fix8k_h96": 2.78,
    "mixed8k_h96": 2.81,
    "uni8k_h96": 2.79,
    "fix8k_h64": 1.96,
    "b4t4k_h32": 1.96,
    "b1t32k_h16": 2.46,
    "b1t64k_h8": 3.51,
}


def digest() -> str:
    """Of every source that decides what a GPU runs: cuda/, the package's Python, CMakeLists.txt."""
    files = [ROOT / "CMakeLists.txt"]
    files += [path for path in (ROOT / "cuda").rglob("*") if path.is_file()]
    files += [
        path for path in (ROOT / "jax_flashkda").rglob("*.py") if path.name != "_build_info.py"
    ]
    total = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.relative_to(ROOT).as_posix()):
        total.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def check() -> str | None:
    """What is wrong with the record, or None."""
    if not RECORD.exists():
        return f"{RECORD.relative_to(ROOT)} is missing: run benchmarks/run.py on a GPU machine"
    recorded = json.loads(RECORD.read_text()).get("digest")
    if recorded != digest():
        return f"{RECORD.relative_to(ROOT)} was made from other sources (digest {recorded})"
    return None


def floor_ms(shape) -> float:
    B, T, _, HV, _ = SHAPES[shape]
    return 5 * B * T * HV * D * 2 / BYTES_PER_SECOND * 1e3


# timing


def make_inputs(shape, gate, seed):
    """The op's arguments: q, k, v, g, beta, A_log, dt_bias, [segment_ids].

    fast: the state is forgotten within some 16 tokens. slow: the layer's initialisation with
    A_log = 0, mean log decay about -0.02.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    B, T, H, HV, lengths = SHAPES[shape]
    keys = jax.random.split(jax.random.key(seed), 7)
    normal = lambda key, *dims: jax.random.normal(key, dims, jnp.bfloat16)
    fast = gate.endswith("fast")
    uniform = lambda key, *dims: jax.random.uniform(key, dims, jnp.float32)
    if fast:
        A_log, dt_bias = uniform(keys[5], HV), uniform(keys[6], HV, D)
    else:
        dt = jnp.exp(math.log(1e-3) + uniform(keys[6], HV, D) * math.log(100.0))
        A_log, dt_bias = jnp.zeros(HV), jnp.log(jnp.expm1(dt))
        if gate.startswith("bounded"):  # -5 sigmoid(x) near -softplus(x) for small decays
            dt_bias = dt_bias - math.log(5.0)
    arrays = dict(
        q=normal(keys[0], B, T, H, D),
        k=normal(keys[1], B, T, H, D),
        v=normal(keys[2], B, T, HV, D),
        g=normal(keys[3], B, T, HV, D) * (1.0 if fast else 0.3),
        beta=normal(keys[4], B, T, HV),
        A_log=A_log,
        dt_bias=dt_bias,
    )
    if lengths is not None:
        ids = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
        arrays["segment_ids"] = jnp.asarray(np.broadcast_to(ids, (B, T)))
    return jax.block_until_ready(arrays)


def input_sets(make, bytes_of_one):
    """As many sets as leave nothing of one in the cache when it comes round again.

    Small calls are timed unrolled, and need a set for each: XLA would merge equal calls into one.
    """
    small = bytes_of_one < L2_BYTES
    return [make(seed) for seed in range(UNROLLED if small else max(2, _rounds(bytes_of_one)))]


def _rounds(bytes_of_one):
    return math.ceil(2 * L2_BYTES / bytes_of_one)


def median_ms(call, sets, repeats=9) -> float:
    """Of one call: wall time of asynchronous calls in a row, one block at the end."""
    import jax

    def run(n):
        start = time.perf_counter()
        for i in range(n):
            result = call(sets[i % len(sets)])
        jax.block_until_ready(result)
        return (time.perf_counter() - start) * 1e3

    run(3)
    n = max(4, math.ceil(20 / max(run(4) / 4, 1e-3)))
    one = statistics.median(run(n) / n for _ in range(repeats))
    if one >= 0.2:
        return one
    assert len(sets) >= UNROLLED, "equal calls in one program are one call"
    unrolled = jax.jit(lambda sets: [call(one) for one in sets[:UNROLLED]])
    jax.block_until_ready(unrolled(sets))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(unrolled(sets))
        times.append((time.perf_counter() - start) * 1e3 / UNROLLED)
    return statistics.median(times)


def time_op(shape, gate) -> float:
    import jax

    import jax_flashkda

    options = dict(gate=gate.split()[0], beta_is_logits=True, qk_l2norm=True, implementation="cuda")

    @jax.jit
    def call(arrays):
        return jax_flashkda.kimi_delta_attention(**arrays, **options)

    B, T, H, HV, _ = SHAPES[shape]
    sets = input_sets(lambda seed: make_inputs(shape, gate, seed), B * T * (2 * H + 3 * HV) * D * 2)
    assert (
        "jax_flashkda.forward" in call.lower(sets[0]).as_text()
    )  # the kernels, and nothing else, are timed
    return median_ms(call, sets)


def time_training(shape, gate) -> tuple[float, float]:
    """Forward and backward of one call, and the MiB of temporaries that XLA plans for them.

    The cotangent of o is an argument, the gradients of all seven operands are results.
    """
    import jax

    import jax_flashkda

    options = dict(gate=gate.split()[0], beta_is_logits=True, qk_l2norm=True, implementation="cuda")

    @jax.jit
    def call(inputs):
        arrays, d_o = inputs
        ids = {"segment_ids": arrays["segment_ids"]} if "segment_ids" in arrays else {}
        floats = {name: x for name, x in arrays.items() if name != "segment_ids"}
        attend = lambda floats: jax_flashkda.kimi_delta_attention(**floats, **ids, **options)
        o, vjp = jax.vjp(attend, floats)
        return o, vjp(d_o)

    B, T, H, HV, _ = SHAPES[shape]
    make = lambda seed: (make_inputs(shape, gate, seed), make_inputs(shape, gate, ~seed)["v"])
    sets = input_sets(make, B * T * (4 * H + 7 * HV) * D * 2)
    lowered = call.lower(sets[0])
    assert "jax_flashkda.backward" in lowered.as_text()
    temporaries = lowered.compile().memory_analysis().temp_size_in_bytes / 2**20
    return median_ms(call, sets, repeats=5), temporaries


def time_step(name, state_dtype) -> float:
    """One decode step of 32 in one program, in place, on states in rotation that exceed the L2."""
    import jax
    import jax.numpy as jnp

    import jax_flashkda

    N, H, T = STEPS[name]
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, g = (jax.random.normal(key, (N, T, H, D), jnp.bfloat16) for key in keys[:4])
    tokens = dict(q=q, k=k, v=v, g=g, beta=jax.random.normal(keys[4], (N, T, H), jnp.bfloat16))
    tokens |= dict(A_log=jnp.zeros(H), dt_bias=jnp.full((H, D), -4.0))
    bytes_of_one = N * H * D * D * jnp.dtype(state_dtype).itemsize
    make = lambda seed: jax.random.normal(jax.random.key(seed), (N, H, D, D), state_dtype)
    states = [make(seed) for seed in range(min(UNROLLED, _rounds(bytes_of_one) + 1))]
    options = dict(gate="softplus", beta_is_logits=True, qk_l2norm=True, implementation="cuda")

    def several(states, tokens):
        states, outputs = list(states), []
        for i in range(UNROLLED):
            at = i % len(states)
            o, states[at] = jax_flashkda.kimi_delta_attention_step(
                **tokens, state=states[at], **options
            )
            outputs.append(o)
        return states, outputs

    compiled = jax.jit(several, donate_argnums=0).lower(states, tokens).compile()
    assert "jax_flashkda.step" in compiled.as_text()
    programs, times = 4, []
    for _ in range(12):
        jax.block_until_ready(states)
        start = time.perf_counter()
        for _ in range(programs):  # the next one is prepared while this one runs
            states, outputs = compiled(states, tokens)
        jax.block_until_ready((states, outputs))
        times.append((time.perf_counter() - start) * 1e3 / (programs * UNROLLED))
    return statistics.median(times[3:])


def time_all_steps() -> dict:
    """Milliseconds of a decode step by shape and type of the state, and TB/s of states moved."""
    results = {}
    for name, (N, H, _) in STEPS.items():
        row = {}
        for state_dtype in STATE_DTYPES:
            ms = time_step(name, state_dtype)
            moved = 2 * N * H * D * D * (4 if state_dtype == "float32" else 2)
            row[state_dtype] = round(ms, 5)
            row[f"{state_dtype}, TB/s"] = round(moved / ms * 1e-9, 3)
        results[name] = row
        print("step", name, row, flush=True)
    return results


def time_softmax_attention(shape, training=False) -> float:
    """Causal softmax attention of the same shape in the same JAX: cuDNN's flash attention."""
    import jax
    import jax.numpy as jnp

    B, T, H, HV, lengths = SHAPES[shape]
    if lengths is not None or H != HV:
        raise NotImplementedError("timed for equal heads without segments")

    @jax.jit
    def call(arrays):
        attend = lambda *qkv: jax.nn.dot_product_attention(
            *qkv, is_causal=True, implementation="cudnn"
        )
        if not training:
            return attend(*arrays[:3])
        o, vjp = jax.vjp(attend, *arrays[:3])
        return o, vjp(arrays[3])

    def make(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        return [jax.random.normal(key, (B, T, H, D), jnp.bfloat16) for key in keys]

    return median_ms(call, input_sets(make, 4 * B * T * H * D * 2), repeats=5)


def try_time(function, *arguments):
    """Milliseconds, or the reason why there are none."""
    try:
        return round(function(*arguments), 4)
    except Exception as error:  # a peer that is missing or fails must not cost the record
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def time_all_training(shapes, peers_too) -> dict:
    """Milliseconds of forward and backward by shape and gate, and the most MiB of temporaries."""
    results = {}
    for shape in shapes:
        timed = {gate: time_training(shape, gate) for gate in TRAINING_GATES}
        row = {gate: round(ms, 4) for gate, (ms, _) in timed.items()}
        if peers_too:
            row["softmax attention"] = try_time(time_softmax_attention, shape, True)
        row["floor"] = round(TRAINING_FLOOR * floor_ms(shape), 4)
        row["temporaries, MiB"] = round(max(mib for _, mib in timed.values()))
        results[shape] = row
        print("training", shape, row, flush=True)
    return results


def time_all(shapes, keep) -> dict:
    """Milliseconds of the op by shape and gate, and the floor; `keep` gets what there is so far."""
    results = {}
    for shape in shapes:
        row = {gate: round(time_op(shape, gate), 4) for gate in GATES}
        results[shape] = row | {"floor": round(floor_ms(shape), 4)}
        keep(forward_ms=results)
        print(shape, results[shape], flush=True)
    return results


def time_peers(results, seconds):
    """Adds the peers' milliseconds to the rows of `results`, or why there are none."""
    for shape, row in results.items():
        row["softmax attention"] = try_time(time_softmax_attention, shape)
    for peer in peers.PEERS:
        for shape, times in peers.time_peer(peer, list(results), seconds).items():
            results[shape] |= times
            print(shape, times, flush=True)


# tests, record, table


def run_tests(arguments, gpus=None) -> dict:
    """Counts of the GPU tests, run in a process of their own; `gpus`: the numbers it may see."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(ROOT / "tests"),
            "-m",
            "gpu",
            "-q",
            f"--junitxml={report}",
            *arguments,
        ]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        status = subprocess.run(command, env=environment, cwd=ROOT).returncode
        if not report.exists():
            return {"status": status, "command": command[1:]}
        suite = ElementTree.parse(report).getroot().find("testsuite")
        counts = {
            name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
        }
        failed = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
    return counts | {"status": status, "failed": failed, "seconds": float(suite.get("time", 0))}


def versions() -> dict:
    import importlib.metadata as metadata

    import jax

    found = {"python": platform.python_version()}
    for package in (
        "jax",
        "jaxlib",
        "jax-cuda13-plugin",
        "jax-cuda12-plugin",
        "jax-flashkda",
        "fla-core",
        "flash-kda",
        "nvidia-cudnn-frontend",
        "tokamax",
        "torch",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found["driver"] = (
        subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
    )
    return found | {"gpu": jax.devices()[0].device_kind}


def step_table(rows) -> list[str]:
    if not rows:
        return []
    columns = list(next(iter(rows.values())))
    lines = ["| decode step | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        cells = [f"{row[c]:.2f}" if "TB/s" in c else f"{row[c]:.4f}" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def training_table(rows) -> list[str]:
    if not rows:
        return []
    columns = list(next(iter(rows.values())))
    show = lambda x: f"{x:.2f}" if isinstance(x, float) else str(x) if isinstance(x, int) else ""
    lines = ["| forward and backward | " + " | ".join(columns) + " |"]
    lines += ["|---|" + "---|" * len(columns)]
    for shape, row in rows.items():
        lines.append(f"| {shape} | " + " | ".join(show(row.get(c)) for c in columns) + " |")
    return lines


def table(record) -> str:
    """In Markdown, milliseconds."""
    show = lambda x: (
        f"{x:.3f}" if isinstance(x, float) else "" if x is None or isinstance(x, str) else str(x)
    )
    rows = record["forward_ms"]
    columns = [
        peers.column(peer, gate) for peer, (_, gates) in peers.PEERS.items() for gate in gates
    ]
    columns = [*GATES, *columns, "softmax attention", "floor"]
    # Columns without a single time go into a line below the table.
    timed = [c for c in columns if any(isinstance(row.get(c), float) for row in rows.values())]
    known = "fla softplus fast" not in timed
    titles = [*timed, *(["FLA 0.5.2, known"] if known else [])]
    lines = ["| shape | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for shape, row in rows.items():
        cells = [row.get(c) for c in timed] + [FLA_KNOWN_MS.get(shape)] * known
        lines.append(f"| {shape} | " + " | ".join(map(show, cells)) + " |")
    lines.append("")
    lines += [*step_table(record.get("step_ms", {})), ""]
    lines += [*training_table(record.get("training_ms", {})), ""]
    for peer, (work, gates) in peers.PEERS.items():
        lines.append(f"* {peer}: {work}")
        for gate in gates:
            c = peers.column(peer, gate)
            reasons = sorted({row[c] for row in rows.values() if isinstance(row.get(c), str)})
            lines[-1] += "".join(f"; {gate} not timed everywhere: {reason}" for reason in reasons)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--peer-seconds", type=int, default=240, help="time limit of a peer, all shapes together"
    )
    parser.add_argument("--only", nargs="*", choices=SHAPES, metavar="SHAPE")
    parser.add_argument(
        "--only-steps", action="store_true", help="the decode step; records nothing"
    )
    parser.add_argument(
        "--beside",
        action="store_true",
        help="with two GPUs: the tests on the first while the second is timed, then those of "
        "several GPUs on both",
    )
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument(
        "--pytest",
        nargs=argparse.REMAINDER,
        default=[],
        help="further arguments of pytest; last on the line",
    )
    options = parser.parse_args()
    if options.check:
        if problem := check():
            sys.exit(problem)
        return
    if options.table:
        print(table(json.loads(RECORD.read_text())))
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers share the memory
    if options.beside:
        os.environ["CUDA_VISIBLE_DEVICES"] = "1"  # of this process, before JAX starts
    peer_seconds = 0 if options.no_peers else options.peer_seconds
    if options.only_steps:
        print("\n".join(step_table(time_all_steps())))
        return
    if options.only:
        times = {"forward_ms": time_all(options.only, lambda **_: None)}
        if peer_seconds > 0:
            time_peers(times["forward_ms"], peer_seconds)
        times["training_ms"] = time_all_training(options.only, peer_seconds > 0)
        print(table(times))
        return
    record = {"digest": digest(), "date": time.strftime("%Y-%m-%d"), "versions": versions()}

    writing = threading.Lock()

    def keep(**more):
        """After every step: an interrupted run leaves what it found."""
        with writing:
            record.update(more)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record, indent=1) + "\n")

    def test():
        keep(tests=run_tests(options.pytest, "0" if options.beside else None))

    tests = threading.Thread(target=test)
    if not options.no_tests:
        tests.start()
        if not options.beside:
            tests.join()
    time_all(SHAPES, keep)
    keep(step_ms=time_all_steps())
    keep(training_ms=time_all_training(TRAINING_SHAPES, peer_seconds > 0))
    if options.beside and not options.no_tests:
        tests.join()
        several = [*options.pytest, "-k", "test_sharded or test_another_device_first"]
        keep(tests_of_two_gpus=run_tests(several, "0,1"))
    if peer_seconds > 0:
        time_peers(record["forward_ms"], peer_seconds)
        keep()
    print(json.dumps({name: record.get(name) for name in ("versions", "tests")}))
    print(table(record))


if __name__ == "__main__":
    main()
