"""Runs a program that prints lines of JSON, in a process of its own under a time limit."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ENDED_WELL = "the process ended with status 0"
FOLDER = Path(__file__).resolve().parent


def lines_of(program, arguments, seconds, name):
    """What the lines `{name: ..}` hold, and how the process ended."""
    command = [sys.executable, str(FOLDER / program), *arguments]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=of_another_process(), stdout=output, stderr=errors, start_new_session=True
        )
        try:
            ended = f"the process ended with status {process.wait(max(seconds, 0))}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its compilers too
            process.wait()
            ended = f"not reached within {seconds} s"
        output.seek(0), errors.seek(0)
        marked = [line for line in output if line.startswith(f'{{"{name}"')]
        if "status" in ended and ended != ENDED_WELL:
            words = errors.read().strip().splitlines()
            words = [line for line in words if "Error" in line] or words
            ended = " ".join([ended, *words[-1:]])[:200]
    found = []
    for line in marked:
        try:
            found.append(json.loads(line)[name])
        except ValueError:  # it was stopped within the line
            break
    return found, ended


def of_another_process() -> dict:
    """The environment, without this process's own share of the GPU's memory."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
    return environment


def say(name, what):
    print(json.dumps({name: what}), flush=True)


def in_words(failure) -> str:
    """An exception as a line of the record."""
    text = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {text[0]}"[:200]
