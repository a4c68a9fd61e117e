"""Every example runs as its heading says, and the training example survives being killed."""

import importlib
import os
import re
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL_EXAMPLES = sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))

pytest.importorskip("flax", reason="the examples need flax")


# Most of an example's time goes into compiling: whatever is asked here holds without optimisation
# too. But training a layer takes longer so.
QUICK = "--xla_backend_optimization_level=0"
COMPUTES_FOR_LONG = ("03_train_a_layer",)


def command(script, *arguments):
    return [sys.executable, "-W", "error", str(script), *map(str, arguments)]


@pytest.mark.parametrize("script", SMALL_EXAMPLES, ids=lambda path: path.stem)
def test_small_example(script):
    assert len(script.read_text().splitlines()) <= 80
    flags = os.environ["XLA_FLAGS"] + (f" {QUICK}" if script.stem not in COMPUTES_FOR_LONG else "")
    ran = subprocess.run(
        command(script),
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Starts the training example on a little text; runs share what they compile."""
    for name in ("optax", "orbax.checkpoint", "matplotlib", "tqdm"):
        pytest.importorskip(name, reason=f"the training example needs {name}")
    text = tmp_path_factory.mktemp("text")
    for index in range(80):
        body = "".join(
            f"def f{index}_{n}(x):\n    return x + {n}\n\n" for n in range(index % 9 + 1)
        )
        (text / f"module_{index}.py").write_text(body)
    environment = os.environ | {
        "XLA_FLAGS": QUICK,  # and one device, as a user has
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    sizes = dict(steps=12, batch=2, seq_len=64, layers=2, width=32, heads=1, sample_length=8)

    def start(out, **changes):
        options = sizes | {"checkpoint_every": 1, "data": text, "out": out} | changes
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return subprocess.Popen(
            command(EXAMPLES / "train_lm.py", *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    return start


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def saved_steps(out):
    """Steps whose checkpoint is complete: what is being written still has another name."""
    return sorted(int(path.name) for path in out.glob("checkpoints/*") if path.name.isdecimal())


def final_state(out):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(out / "checkpoints") as manager:
        step = manager.latest_step()
        arguments = dict(state=ocp.args.StandardRestore(), run=ocp.args.JsonRestore())
        restored = manager.restore(step, args=ocp.args.Composite(**arguments))
    return step, restored["state"], restored["run"]["losses"]


@pytest.mark.filterwarnings("default::UserWarning:orbax")  # restoring without a template
def test_killed_training_ends_as_if_it_had_not_been(train, tmp_path):
    import jax

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    output = finish(train(whole))
    assert re.search(r"held-out loss \d+\.\d+ nats per byte\ndef ", output), output
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")

    process = train(cut)
    deadline = time.monotonic() + 600
    while len(saved_steps(cut)) < 2 or saved_steps(cut)[-1] < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    survived = saved_steps(cut)[-1]
    assert survived < 12
    output = finish(train(cut))
    resumed = int(re.search(r"continuing after step (\d+) of 12", output)[1])
    assert resumed >= survived

    step, expected, expected_losses = final_state(whole)
    cut_step, state, losses = final_state(cut)
    assert step == cut_step == 12 and len(losses) == 12
    assert losses == expected_losses
    jax.tree.map(np.testing.assert_array_equal, state, expected)

    refused = train(cut, heads=2, seed=3)
    output, _ = refused.communicate(timeout=600)
    assert refused.returncode == 1
    assert "belongs to another run: heads was 1 and is 2, seed was 0 and is 3." in output


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "argument --steps: must be at least 1, got 0"),
        (dict(data="/nowhere"), "/nowhere holds 0 training and 0 held-out .py files"),
    ],
)
def test_train_lm_refuses(train, tmp_path, changes, message):
    process = train(tmp_path / "out", **changes)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert message in textwrap.fill(output, 10_000)


def greedy_by_full_forwards(model, prompts, length):
    """The likeliest bytes after each prompt, every one by a forward pass over all that precedes
    it: a row a prompt, and zeros behind.
    """
    from flax import nnx

    forward = nnx.jit(lambda model, tokens: model(tokens))
    starts = np.array([1 + len(prompt) for prompt in prompts])
    rows, window = np.arange(len(prompts)), np.zeros((len(prompts), max(starts) + length), np.int32)
    for row, prompt in enumerate(prompts):
        window[row, 1 : starts[row]] = list(prompt)
    for position in range(length):
        logits = np.array(forward(model, window))[rows, starts + position - 1]
        window[rows, starts + position] = np.argmax(logits[:, 1:], axis=-1) + 1
    return [window[row, start : start + length] for row, start in enumerate(starts)]


def test_generated_text_is_that_of_full_forwards(train, tmp_path, monkeypatch):
    finish(train(tmp_path, steps=6))
    prompts = ["def f", "x", "    return x + 1\n\ndef f1_2(x):\n" * 3]
    script = command(EXAMPLES / "generate.py", *prompts, "--length=24", "--temperature=0")
    ran = subprocess.run(
        [*script, f"--out={tmp_path}"],
        capture_output=True,
        timeout=600,
        env=os.environ | {"XLA_FLAGS": QUICK},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    stdout = ran.stdout.decode()
    assert re.search(r"prefill: \d+ tokens of 3 prompts, \d+ tokens/s; decode: \d+ tok", stdout)

    monkeypatch.syspath_prepend(EXAMPLES)
    import generate

    model = generate.load_model(tmp_path)
    prompt_bytes = [prompt.encode() for prompt in prompts]
    texts, _, _ = generate.generate(model, prompt_bytes, 24)
    np.testing.assert_array_equal(texts, greedy_by_full_forwards(model, prompt_bytes, 24))
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        lines = (prompt.encode() + bytes(text.tolist())).removesuffix(b"\n").split(b"\n")
        shown = [line[3:] for line in stdout.split("\n") if line.startswith(f"{i}| ")]
        assert shown == [line.decode(errors="replace") for line in lines]


def test_generate_needs_a_checkpoint(tmp_path):
    for name in ("optax", "orbax.checkpoint", "matplotlib", "tqdm"):
        pytest.importorskip(name, reason=f"the example needs {name}")
    script = command(EXAMPLES / "generate.py", f"--out={tmp_path}")
    ran = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 1 and "run examples/train_lm.py first" in ran.stderr


@pytest.mark.gpu
def test_training_on_the_kernels_follows_training_on_xla(monkeypatch):
    """Twenty steps of the language model, on packed text with padding."""
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(EXAMPLES.parent / folder)
    train_lm, training_curve = map(importlib.import_module, ("train_lm", "training_curve"))
    sizes = dict(batch=4, seq_len=512, layers=2, width=256, heads=2)
    config = train_lm.Config(steps=20, **sizes, learning_rate=3e-3, seed=0, text=0)
    documents, _ = train_lm.read_corpus(Path(sysconfig.get_path("stdlib")))
    rows = train_lm.pack_documents(documents[:400], seq_len=config.seq_len)
    assert not rows.loss_mask.all()
    kernels, xla = (
        training_curve.curve(train_lm, config, rows, implementation, reverse=False)[0]
        for implementation in ("cuda", "xla")
    )
    assert np.isfinite(xla).all() and xla[-1] < 0.8 * xla[0]
    np.testing.assert_allclose(kernels, xla, rtol=0.03)
