"""Continue several prompts at once with the model that train_lm.py trained.

    python examples/train_lm.py && python examples/generate.py "def " "import os\n\n" "class A:"

The prompts, of any lengths, go through the model in one packed call, which leaves a cache: per
layer a state of fixed size and the last inputs of the convolutions, however long the prompt. Then
every step decodes one byte of all of them together. Lines appear as they are complete, with the
number of their prompt; at the end come the tokens per second of both phases.
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from train_lm import Checkpoints, Config, LanguageModel, make_optimizer, positive_int

from jax_flashkda import lengths_to_segment_ids


def load_model(out: Path):
    """The newest model below `out`, the --out of train_lm.py."""
    folder = out / "checkpoints"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: run examples/train_lm.py first, or pass its --out")
    with ocp.CheckpointManager(folder.resolve()) as manager:
        step = manager.latest_step()
        if step is None:
            raise SystemExit(f"{folder} holds no checkpoint: let examples/train_lm.py reach one")
        arguments = ocp.args.Composite(run=ocp.args.JsonRestore())
        config = Config(**manager.restore(step, args=arguments)["run"]["config"])

    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    model = LanguageModel(config, dtype=dtype, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    optimizer_state = make_optimizer(config).init(params)
    state = {"params": params, "opt_state": optimizer_state, "step": jnp.zeros((), int)}
    state, _ = Checkpoints(folder, every=1).restore(config, state)
    return nnx.merge(graphdef, state["params"])


def pack(prompts, multiple=64):
    """The prompts behind one another in one row: tokens, segment ids [1, T], lengths [N]."""
    tokens = np.concatenate([[0, *prompt] for prompt in prompts])  # zero begins every document
    lengths = np.array([1 + len(prompt) for prompt in prompts])
    T = -(-len(tokens) // multiple) * multiple
    ids = lengths_to_segment_ids(jnp.asarray(lengths), T)
    return jnp.asarray(np.pad(tokens, (0, T - len(tokens))))[None], ids[None], jnp.asarray(lengths)


def prefill(model, tokens, segment_ids, lengths):
    """Logits [N, 256] of the byte after each prompt, and the caches of all layers."""
    block, params_of_blocks = nnx.split(model.blocks)

    def through_block(x, params):
        layer = nnx.merge(block, params)
        mixed, cache = layer.attention.prefill(
            layer.attention_norm(x), segment_ids=segment_ids, max_segments=len(lengths)
        )
        x = x + mixed
        return x + layer.mlp(layer.mlp_norm(x)), cache

    x, caches = jax.lax.scan(through_block, model.embed(tokens), params_of_blocks)
    last = x[0, jnp.cumsum(lengths) - 1]
    return model.head(model.norm(last)).astype(jnp.float32), caches


def decode(model, tokens, caches):
    """Logits [N, 256] of the byte after `tokens` [N], and the caches."""
    block, params_of_blocks = nnx.split(model.blocks)

    def through_block(x, layer):
        params, cache = layer
        layer = nnx.merge(block, params)
        mixed, cache = layer.attention.step(layer.attention_norm(x), cache)
        x = x + mixed
        return x + layer.mlp(layer.mlp_norm(x)), cache

    x = model.embed(tokens)[:, None]
    x, caches = jax.lax.scan(through_block, x, (params_of_blocks, caches))
    return model.head(model.norm(x[:, 0])).astype(jnp.float32), caches


def draw(logits, key, temperature):
    """The next byte of each sequence, never zero; the likeliest one at temperature 0."""
    logits = logits.at[:, 0].set(-jnp.inf)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    return jax.random.categorical(key, logits / temperature)


def generate(model, prompts, length, temperature=0.0, seed=0, show=lambda texts: None):
    """The `length` bytes that follow each prompt [N, length], and the seconds of both phases.

    `show` gets the texts so far after every step.
    """
    graphdef, params = nnx.split(model)
    key = jax.random.key(seed)
    # The caches are donated: their states are updated where they are.
    first = jax.jit(lambda params, *packed: prefill(nnx.merge(graphdef, params), *packed))
    step = jax.jit(
        lambda params, *state: decode(nnx.merge(graphdef, params), *state), donate_argnums=2
    )
    packed = pack(prompts)
    first = first.lower(params, *packed).compile()
    start = time.perf_counter()
    logits, caches = jax.block_until_ready(first(params, *packed))
    prefill_seconds = time.perf_counter() - start
    next_byte = jax.jit(functools.partial(draw, temperature=temperature))
    tokens = next_byte(logits, key)
    step = step.lower(params, tokens, caches).compile()
    texts = np.asarray(tokens)[:, None]
    start = time.perf_counter()
    for i in range(1, length):
        show(texts)
        logits, caches = step(params, tokens, caches)
        tokens = next_byte(logits, jax.random.fold_in(key, i))
        texts = np.append(texts, np.asarray(tokens)[:, None], axis=1)
    show(texts)
    return texts, prefill_seconds, time.perf_counter() - start


class Lines:
    """Prints each sequence's lines as they become complete."""

    def __init__(self, prompts):
        self.prompts, self.shown = prompts, [0] * len(prompts)

    def __call__(self, texts, last=False):
        for i, (prompt, text) in enumerate(zip(self.prompts, texts, strict=True)):
            whole = prompt + bytes(text.tolist())
            end = len(whole) if last else whole.rfind(b"\n") + 1
            for line in whole[self.shown[i] : end].splitlines():
                print(f"{i}| {line.decode(errors='replace')}", flush=True)
            self.shown[i] = max(end, self.shown[i])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="*", default=["def ", "import os\n\n", "class Reader("])
    parser.add_argument("--length", type=positive_int, default=200, help="bytes to add to each")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest byte")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/train_lm"), help="of train_lm.py")
    arguments = parser.parse_args()
    model = load_model(arguments.out)
    prompts = [prompt.encode() for prompt in arguments.prompts]
    lines = Lines(prompts)
    texts, prefill_seconds, decode_seconds = generate(
        model, prompts, arguments.length, arguments.temperature, arguments.seed, lines
    )
    lines(texts, last=True)
    prompt_tokens = sum(1 + len(prompt) for prompt in prompts)
    decoded = len(prompts) * (arguments.length - 1)
    print(
        f"prefill: {prompt_tokens} tokens of {len(prompts)} prompts,"
        f" {prompt_tokens / prefill_seconds:.0f} tokens/s;"
        f" decode: {decoded / max(decode_seconds, 1e-9):.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
