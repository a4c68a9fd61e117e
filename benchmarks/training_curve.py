"""The example language model trained on the kernels and on XLA: loss curves and tokens a second.

    python benchmarks/training_curve.py [--steps 500]

Three runs from the same weights over the same batches, bfloat16 on float32 master weights: on the
kernels; on XLA; on XLA with the rows of every batch in reverse, which changes no more than the
order of sums. Small differences grow in training, so the two XLA runs drift apart too: how far says
what agreement means. Prints a line of JSON; benchmarks/run.py records it.
"""

import argparse
import functools
import sys
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lines import say

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
SIZES = dict(batch=8, seq_len=1024, layers=2, width=512, heads=4)
WINDOW = 20  # steps that a curve is averaged over


def curve(example, config, rows, implementation, reverse):
    """Losses of all steps, and tokens a second once everything is compiled."""
    layer = functools.partial(example.KimiDeltaAttention, implementation=implementation)
    whole = example.KimiDeltaAttention
    example.KimiDeltaAttention = layer  # the model makes its layers by this name
    try:
        model = example.LanguageModel(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(config.seed))
    finally:
        example.KimiDeltaAttention = whole
    graphdef, params = nnx.split(model)
    optimizer = example.make_optimizer(config)
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), int)}
    train_step = example.make_train_step(graphdef, optimizer)
    losses, start = [], 0.0
    for step in range(config.steps):
        batch = example.batch_of_step(rows, step, config)
        if reverse:
            batch = jax.tree.map(lambda x: x[::-1], batch)
        state, loss = train_step(state, batch)
        losses.append(loss)
        if step == 9:
            jax.block_until_ready(loss)
            start = time.perf_counter()
    losses = np.array(jax.device_get(losses))
    tokens = (config.steps - 10) * config.batch * config.seq_len
    return losses, tokens / (time.perf_counter() - start)


def smooth(losses):
    return np.convolve(losses, np.full(WINDOW, 1 / WINDOW), mode="valid")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--kernels", default="cuda", help="xla: the script itself, without a GPU")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    options = vars(parser.parse_args())
    kernels = options.pop("kernels")
    import train_lm as example

    config = example.Config(**options, learning_rate=3e-3, seed=0, text=0)
    documents, _ = example.read_corpus(Path(sysconfig.get_path("stdlib")))
    rows = example.pack_documents(documents, seq_len=config.seq_len)
    runs = {
        "kernels": (kernels, False),
        "xla": ("xla", False),
        "xla, other order": ("xla", True),
    }
    losses, speed = {}, {}
    for name, (implementation, reverse) in runs.items():
        losses[name], speed[name] = curve(example, config, rows, implementation, reverse)
        print(f"{name}: {losses[name][-1]:.4f}, {speed[name]:,.0f} tokens/s", flush=True)
    apart = lambda name: np.abs(smooth(losses[name]) - smooth(losses["xla"]))
    say(
        "training_curve",
        {
            "config": {name: options[name] for name in ("steps", *SIZES)},
            "tokens_per_second": {name: round(x) for name, x in speed.items()},
            "last_losses": {name: round(float(smooth(x)[-1]), 4) for name, x in losses.items()},
            "mean_difference_from_xla": {
                name: round(float(np.mean(apart(name))), 5) for name in runs if name != "xla"
            },
            "largest_difference_from_xla": {
                name: round(float(np.max(apart(name))), 5) for name in runs if name != "xla"
            },
            "losses": {name: [round(float(x), 4) for x in y[::10]] for name, y in losses.items()},
        },
    )


if __name__ == "__main__":
    main()
