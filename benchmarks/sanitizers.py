"""compute-sanitizer on the native test programs: benchmarks/run.py records what it says.

The programs allocate exactly what they tell the kernels of, so that memcheck sees one byte too far.
They are built with -DJAX_FLASHKDA_NATIVE_TESTS=ON in build/.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROGRAMS = Path(__file__).resolve().parent.parent / "build" / "tests" / "native"
RUNS = {
    "memcheck": [
        "forward_test --quick",
        "backward_test --quick",
        "gradient_test --quick",
        "step_test --quick",
        "short_conv_test --quick",
        "segment_table_test --untimed",
    ],
    "initcheck": ["forward_test --quick --unpoisoned"],
    "synccheck": ["forward_test --quick", "backward_test --quick"],
    "racecheck": ["gradient_test --quick", "step_test --quick"],
}
AT_ONCE = 6
CLEAN = re.compile(r"SUMMARY: 0 (errors|hazards)(?!.*exit status)")


def found(tool, command, seconds, gpu) -> str:
    """The sanitizer's last line, which sums up, or how it ended."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    name, *arguments = command.split()
    line = [program, "--tool", tool, "--error-exitcode", "9", str(PROGRAMS / name), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
    try:
        done = subprocess.run(
            line, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except FileNotFoundError:
        return "there is no compute-sanitizer"
    except subprocess.TimeoutExpired:
        return f"not ended within {seconds} s"
    said = [text.strip("= ") for text in done.stdout.splitlines() if "SUMMARY" in text]
    words = said[-1] if said else (done.stdout + done.stderr).strip()[-200:]
    return words if done.returncode == 0 else f"{words} (exit status {done.returncode})"


def not_clean(results) -> list[str]:
    """The runs of which a tool says anything but that it has found nothing."""
    return [
        f"{tool} {command}: {words}"
        for tool, runs in results.items()
        for command, words in runs.items()
        if not CLEAN.search(words)
    ]


def check_all(seconds, gpus=1) -> dict:
    """What each tool says of each program, run side by side."""
    runs = [(tool, command) for tool, commands in RUNS.items() for command in commands]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        said = pool.map(lambda at: found(*runs[at], seconds, at % gpus), range(len(runs)))
        results = {tool: {} for tool in RUNS}
        for (tool, command), words in zip(runs, said, strict=True):
            results[tool][command] = words
            print(tool, command, words, flush=True)
    return results
