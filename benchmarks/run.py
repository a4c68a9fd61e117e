"""Times the op on one GPU, runs the GPU tests, and records both with a digest of the sources.

    python benchmarks/run.py                    everything; writes results/h200.json, prints a table
    python benchmarks/run.py --tests            GPU tests and sanitizers alone
    python benchmarks/run.py --times            all times alone
    python benchmarks/run.py --context-parallel T over the GPUs of a machine with several, alone
    python benchmarks/run.py --only fix8k_h96   some shapes; prints, records nothing
    python benchmarks/run.py --only-steps       the decode step, alone and in a layer; likewise
    python benchmarks/run.py --table            the tables of the record
    python benchmarks/run.py --write-docs       the tables and plots of README.md and docs/
    python benchmarks/run.py --check            exit status 1 unless the record is of these sources

What has not run is kept from a record of the same sources. Of the last three only the plots need
more than the standard library. Peers (benchmarks/peers.py)
are timed where they are installed, each in a process of its own. Times are of raw inputs (gate,
l2norm and sigmoid inside the op), bfloat16; how, timing.py says.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peers
import report
import sanitizers
from lines import ENDED_WELL, lines_of, of_another_process
from shapes import (
    GATES,
    LAYER_STEPS,
    SHAPES,
    SMALL_GATE,
    STATE_BYTES,
    STEPS,
    TRAINING_GATES,
    TRAINING_SHAPES,
    floor_ms,
)

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "h200.json"


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
    record = json.loads(RECORD.read_text())
    if record.get("digest") != digest():
        return f"{RECORD.relative_to(ROOT)} was made from other sources ({record.get('digest')})"
    if older := record.get("of_other_sources"):
        return f"{RECORD.relative_to(ROOT)}: {', '.join(older)} are of other sources"
    return None


# What a run measures or tests; "of_other_sources" has the digest of what it has not done anew.
PARTS = ("tests", "sanitizers", "forward_ms", "training_ms", "step_ms", "layer_step_ms")
PARTS += ("kernels_ms", "over_t", "training_curve", "context_parallel")


def record_to_go_on_from() -> dict:
    """The record; what is in it of other sources is told apart."""
    if not RECORD.exists():
        return {}
    record = json.loads(RECORD.read_text())
    record.pop("note", None)  # written by hand, of what that run left undone
    if record["digest"] != digest():
        older = record.get("of_other_sources", {})
        record["of_other_sources"] = {
            part: older.get(part, record["digest"]) for part in PARTS if part in record
        }
    return record


def put(record, **parts):
    """Parts that were measured now."""
    record.update(parts)
    for part in parts:
        record.get("of_other_sources", {}).pop(part, None)


# timing


def time_forward(names, keep, kernel_runs):
    """Milliseconds of the op by shape and gate, and the floor; `keep` gets what there is so far,
    `kernel_runs` what a profile is to look at once all is timed.
    """
    import timing

    gates = [gate for gate in GATES if gate.endswith("slow")]  # fast ones make the same programs
    programs = {
        (name, gate.split()[0]): timing.forward_program(SHAPES[name], gate)
        for name in names
        for gate in gates
    }
    timing.compile_all(programs.values())
    results = {}
    for name in names:
        row = {}
        for gate in GATES:
            inputs = timing.forward_inputs(SHAPES[name], gate)
            program = programs[name, gate.split()[0]]
            row[gate] = round(timing.median_ms(program, inputs), 4)
            if row[gate] < timing.SMALL_MS and gate == SMALL_GATE:
                kernel_runs[name] = timing.unrolled_run(program, inputs)
        results[name] = row | {"floor": round(floor_ms(name), 4)}
        keep(forward_ms=results)
        print(name, results[name], flush=True)
    return results


def time_training(names, keep):
    """Milliseconds of forward and backward by shape and gate, and the most MiB of temporaries that
    XLA plans for them.
    """
    import timing

    programs = {
        (name, gate.split()[0]): timing.training_program(SHAPES[name], gate)
        for name in names
        for gate in TRAINING_GATES
        if gate.endswith("slow")
    }
    timing.compile_all(programs.values())
    results = {}
    for name in names:
        row, most = {}, 0
        for gate in TRAINING_GATES:
            program = programs[name, gate.split()[0]]
            inputs = timing.training_inputs(SHAPES[name], gate)
            row[gate] = round(timing.median_ms(program, inputs), 4)
            most = max(most, program.temporary_bytes)
        row["floor"] = round(floor_ms(name, training=True), 4)
        results[name] = row | {"temporaries, MiB": round(most / 2**20)}
        keep(training_ms=results)
        print("training", name, results[name], flush=True)
    return results


def time_steps(kernel_runs) -> dict:
    """Milliseconds of a decode step by shape and type of the state."""
    import timing
    from steps import Steps

    kinds = [(name, state_dtype) for name in STEPS for state_dtype in STATE_BYTES]
    all_steps = timing.compile_all([Steps(*kind) for kind in kinds])
    results = {name: {} for name in STEPS}
    for (name, state_dtype), steps in zip(kinds, all_steps, strict=True):
        results[name][state_dtype] = round(steps.ms(), 5)
        kernel_runs[f"{name} {state_dtype}"] = steps.run
        print("step", name, state_dtype, results[name][state_dtype], flush=True)
    return results


# The kernels of a layer's step, by a word of their names; the rest is XLA's.
LAYER_KERNELS = {"state step": "decode_", "short convolution": "short_conv_step"}


def time_layer_steps(layer_runs) -> dict:
    """Milliseconds of a layer's step without its projections, by shape, type of the state and
    implementation of the short convolution; `layer_runs` gets what a profile is to take apart.
    """
    import timing
    from steps import LayerSteps

    kinds = [
        (name, state_dtype, convolution)
        for name in LAYER_STEPS
        for state_dtype in STATE_BYTES
        for convolution in ("xla", "cuda")
    ]
    all_steps = timing.compile_all([LayerSteps(*kind) for kind in kinds])
    results = {}
    for kind, steps in zip(kinds, all_steps, strict=True):
        name, state_dtype, convolution = kind
        row = {"wall": round(steps.ms(), 5)}
        results.setdefault(name, {}).setdefault(state_dtype, {})[convolution] = row
        layer_runs.append((row, steps.run))
        print("layer step", *kind, row, flush=True)
    return results


def split_layer_steps(layer_runs):
    """Into the rows of the record: what the kernels of each part take, by a profile."""
    import kernels
    import timing

    for row, run in layer_runs:
        split = kernels.split_ms(run, timing.UNROLLED, LAYER_KERNELS)
        row |= {part: round(ms, 5) for part, ms in split.items()}
        print("layer step", row, flush=True)


def time_kernels(record, kernel_runs):
    """The kernels of small calls, which were timed 32 in a program, by what a profile says."""
    import kernels
    import timing

    results = {}
    for name, run in kernel_runs.items():
        try:
            found = kernels.kernel_ms(run, timing.UNROLLED)
        except Exception:
            traceback.print_exc()
            continue
        results[name] = {what: round(ms, 5) for what, ms in found.items()}
        print("kernels", name, results[name], flush=True)
    put(record, kernels_ms=results)
    if len(results) < len(kernel_runs):
        raise RuntimeError(f"profiles of {len(kernel_runs) - len(results)} calls failed")


def time_softmax(record, names, seconds):
    """Softmax attention of these shapes (or all) into the rows of the record. Without names also
    softmax attention and the op over T.
    """
    found, ended = lines_of("softmax.py", names, seconds, "softmax")
    print(*found, sep="\n", flush=True)
    for line in found:
        row = record.get(f"{line['work']}_ms", {}).get(line.get("shape"))
        if row is not None:
            row["softmax attention"] = line.get("ms", line.get("error"))
    if not names:
        put(record, over_t=[line for line in found if "shape" not in line])
    if ended != ENDED_WELL:
        raise RuntimeError(f"softmax.py: {ended}")


def time_context_parallel(keep, seconds):
    """One document over 1, 2, .. GPUs of this machine, and documents that end within a shard."""
    found = []
    for documents in ([], ["--documents", "8192"]):
        rows, ended = lines_of(
            "context_parallel.py", ["--check", *documents], seconds, "context_parallel"
        )
        found += rows
        print(*rows, sep="\n", flush=True)
        keep(context_parallel=found)
        if ended != ENDED_WELL:
            raise RuntimeError(f"context_parallel.py: {ended}")


def train_side_by_side(keep, seconds):
    """Loss curves and tokens a second of the example model on the kernels and on XLA."""
    found, ended = lines_of("training_curve.py", [], seconds, "training_curve")
    if not found:
        raise RuntimeError(f"training_curve.py: {ended}")
    print({name: x for name, x in found[0].items() if name != "losses"}, flush=True)
    keep(training_curve=found[0])


def time_peers(record, seconds):
    """Adds the peers' milliseconds to the rows of the record, or why there are none."""
    for name, times in peers.time_all(list(record["forward_ms"]), seconds).items():
        record["forward_ms"][name] |= times
        print(name, times, flush=True)


# tests, record, table


def run_tests(arguments) -> dict:
    """Counts of the GPU tests, run in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(ROOT / "tests"),
            "-m",
            "gpu",
            "-v",  # a run that is stopped leaves the names of what passed
            "-p",
            "no:benchmark",  # where it is installed, it warns beside xdist, and warnings are errors
            f"--junitxml={report}",
            *arguments,
        ]
        status = subprocess.run(command, env=of_another_process(), cwd=ROOT).returncode
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
    seconds = float(suite.get("time", 0))
    return counts | {"status": status, "failed": failed, "seconds": seconds, "gpus": gpu_count()}


def test(keep, options):
    counts = run_tests(options.pytest)
    keep(tests=counts)
    if counts["status"] != 0:
        raise RuntimeError(f"the GPU tests ended with status {counts['status']}")


def sanitize(keep, options):
    results = sanitizers.check_all(options.sanitizer_seconds, gpu_count())
    keep(sanitizers=results)
    if found := sanitizers.not_clean(results):
        raise RuntimeError("; ".join(found))


def gpu_count() -> int:
    """GPUs of this machine, without a CUDA context in this process."""
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return len(listed.strip().splitlines())


def attempt(name, part) -> bool:
    """Whether it went well: the rest of a run is worth having without one of its parts."""
    start = time.monotonic()
    try:
        part()
        return True
    except Exception:
        traceback.print_exc()
        return False
    finally:
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write-docs", action="store_true")
    parser.add_argument("--tests", action="store_true", help="no times")
    parser.add_argument("--times", action="store_true", help="no tests, no sanitizers")
    parser.add_argument("--context-parallel", action="store_true", help="nothing else")
    parser.add_argument(
        "--context-parallel-seconds", type=int, default=240, help="time limit of either layout"
    )
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--peer-seconds", type=int, default=90, help="time limit of all peers together"
    )
    parser.add_argument(
        "--softmax-seconds", type=int, default=120, help="time limit of softmax attention over T"
    )
    parser.add_argument(
        "--curve-seconds", type=int, default=240, help="time limit of the training curves"
    )
    parser.add_argument("--only", nargs="*", choices=SHAPES, metavar="SHAPE")
    parser.add_argument(
        "--only-steps",
        action="store_true",
        help="the decode step, alone and in a layer; records nothing",
    )
    parser.add_argument(
        "--sanitizer-seconds", type=int, default=300, help="time limit of each sanitizer run"
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
    if options.write_docs:
        report.write_pages(json.loads(RECORD.read_text()))
        return
    if options.table:
        print(report.table(json.loads(RECORD.read_text())))
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.3"  # long rows are timed beside this process
    peer_seconds = 0 if options.no_peers else options.peer_seconds
    if options.only_steps:
        runs, layer_runs = {}, []
        steps = {"step_ms": time_steps(runs)}
        attempt("layer steps", lambda: steps.update(layer_step_ms=time_layer_steps(layer_runs)))
        attempt("kernels", lambda: time_kernels(steps, runs))
        attempt("kernels of layer steps", lambda: split_layer_steps(layer_runs))
        print(report.steps(steps), report.layer_steps(steps), report.small(steps), sep="\n\n")
        return
    record = {} if options.only else record_to_go_on_from()
    record |= {"digest": digest(), "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    if options.only:
        runs = {}
        record["forward_ms"] = time_forward(options.only, lambda **_: None, runs)
        record["training_ms"] = time_training(options.only, lambda **_: None)
        attempt("kernels", lambda: time_kernels(record, runs))
        softmax = lambda: time_softmax(record, options.only, options.softmax_seconds)
        attempt("softmax attention", softmax)
        if peer_seconds > 0:
            time_peers(record, peer_seconds)
        print(report.table(record))
        return

    writing = threading.Lock()

    def keep(**more):
        """After every step: an interrupted run leaves what it found."""
        with writing:
            put(record, **more)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record, indent=1) + "\n")

    context = lambda: time_context_parallel(keep, options.context_parallel_seconds)
    if options.context_parallel:
        whole = attempt("context parallel", context)
        print(report.context_parallel(record))
        sys.exit(0 if whole else "context parallel times failed: see above")
    whole = True
    if not options.times:  # both keep to themselves what they use of the device
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(attempt, "sanitizers", lambda: sanitize(keep, options))
            whole &= attempt("tests", lambda: test(keep, options))
            whole &= beside.result()
    if options.tests:
        print(json.dumps({name: record.get(name) for name in ("tests", "sanitizers")}))
        sys.exit(0 if whole else "tests or sanitizers failed: see above")
    runs, layer_runs = {}, []
    whole &= attempt("steps", lambda: keep(step_ms=time_steps(runs)))
    layer_steps = lambda: keep(layer_step_ms=time_layer_steps(layer_runs))
    whole &= attempt("layer steps", layer_steps)
    whole &= attempt("forward", lambda: time_forward(list(SHAPES), keep, runs))
    whole &= attempt("training", lambda: time_training(list(TRAINING_SHAPES), keep))
    # A profile may slow down what comes after it: once all else here is timed.
    whole &= attempt("kernels", lambda: time_kernels(record, runs))
    whole &= attempt("kernels of layer steps", lambda: split_layer_steps(layer_runs))
    runs.clear()
    layer_runs.clear()
    softmax = lambda: time_softmax(record, [], options.softmax_seconds)
    whole &= attempt("softmax attention", softmax)
    keep()
    curves = lambda: train_side_by_side(keep, options.curve_seconds)
    whole &= attempt("training curves", curves)
    if gpu_count() > 1:
        whole &= attempt("context parallel", context)
    if peer_seconds > 0:
        whole &= attempt("peers", lambda: time_peers(record, peer_seconds))
        keep()
    print(json.dumps({name: record.get(name) for name in ("versions", "tests")}))
    print(report.table(record))
    sys.exit(0 if whole else "a part of the benchmark failed: see above")


if __name__ == "__main__":
    main()
