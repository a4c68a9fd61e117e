"""Train a byte-level language model made of Kimi Delta Attention blocks, on real text.

    python examples/train_lm.py

The text is the source of the running Python's standard library. Files of many lengths are packed
into rows, and segment ids keep them apart. The run takes under five minutes on two CPU cores;
where there is a GPU it uses it, in bfloat16. The same command after an interruption, `kill -9`
included, goes on from the last checkpoint exactly as if nothing had happened. At the end it prints
the loss on held-out files and a sample of text, and leaves in --out:

    checkpoints/    model, optimizer and loss curve, written every --checkpoint-every steps
    loss.png        the loss curve
"""

import argparse
import dataclasses
import functools
import hashlib
import sysconfig
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

from jax_flashkda import KimiDeltaAttention, PackedDocuments, pack_documents

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

VOCABULARY = 256  # bytes; zero, which no text contains, begins every document
HEAD_DIM = 128
NOT_DOCUMENTS = {"site-packages", "test", "tests", "idle_test"}  # not every machine has these


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the outcome of a run; a checkpoint goes on only under the same values."""

    steps: int
    batch: int
    seq_len: int
    layers: int
    width: int
    heads: int
    learning_rate: float
    seed: int
    text: int  # checksum of the training text, which differs between versions of Python


# The model: pre-norm residual blocks of KDA and SwiGLU, scanned so that any depth compiles once.


class SwiGLU(nnx.Module):
    def __init__(self, width, hidden, *, dtype, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.gate, self.up = linear(width, hidden), linear(width, hidden)
        self.down = linear(hidden, width)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, width, heads, *, dtype, rngs):
        self.attention_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.attention = KimiDeltaAttention(width, heads, HEAD_DIM, dtype=dtype, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(width, 2 * width, dtype=dtype, rngs=rngs)

    def __call__(self, x, segment_ids):
        x = x + self.attention(self.attention_norm(x), segment_ids=segment_ids)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nnx.Module):
    def __init__(self, config: Config, *, dtype, rngs):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack_of_blocks(rngs):
            return Block(config.width, config.heads, dtype=dtype, rngs=rngs)

        self.embed = nnx.Embed(VOCABULARY, config.width, dtype=dtype, rngs=rngs)
        self.blocks = stack_of_blocks(rngs)
        self.norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(config.width, VOCABULARY, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens, segment_ids=None):
        """Logits of the next byte, float32 [B, T, 256]."""
        block, params_of_blocks = nnx.split(self.blocks)

        def through_block(x, params):
            return nnx.merge(block, params)(x, segment_ids), None

        x, _ = jax.lax.scan(through_block, self.embed(tokens), params_of_blocks)
        return self.head(self.norm(x)).astype(jnp.float32)


# The data: one file in 32 is held out, told by its name so that the choice never changes.


def read_corpus(folder: Path):
    """The documents below `folder`, as (training, held out) lists of byte arrays."""
    training, held_out = [], []
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        text = path.read_bytes()
        if not NOT_DOCUMENTS.isdisjoint(name.parts) or not text or b"\0" in text:
            continue
        document = np.frombuffer(b"\0" + text, np.uint8)
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        (held_out if digest[0] % 32 == 0 else training).append(document)
    if not training or not held_out:
        raise SystemExit(
            f"{folder} holds {len(training)} training and {len(held_out)} held-out .py files:"
            " point --data to a folder with a few hundred of them, so that there are both"
        )
    return training, held_out


def batch_of_step(rows, step, config):
    """Every epoch visits the rows in a new order that follows from seed and epoch alone."""
    positions = step * config.batch + np.arange(config.batch)
    count = len(rows.tokens)
    orders = {
        epoch: np.random.default_rng([config.seed, epoch]).permutation(count)
        for epoch in set((positions // count).tolist())
    }
    chosen = [orders[position // count][position % count] for position in positions]
    return PackedDocuments(*(array[chosen] for array in rows))


# Training.


def loss_of_batch(model, batch):
    """Mean nats per byte over the positions that have a target."""
    logits = model(batch.tokens, batch.segment_ids)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(losses, where=batch.loss_mask) / jnp.maximum(1, jnp.sum(batch.loss_mask))


def make_optimizer(config):
    warmup = max(1, config.steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, config.steps, end_value=0.05 * config.learning_rate
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))


def make_train_step(graphdef, optimizer):
    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        def loss_of_params(params):
            return loss_of_batch(nnx.merge(graphdef, params), batch)

        loss, grads = jax.value_and_grad(loss_of_params)(state["params"])
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, loss

    return train_step


def train(config, rows, graphdef, state, optimizer, checkpoints, losses):
    """Runs the remaining steps; `losses` grows by one number a step."""
    train_step = make_train_step(graphdef, optimizer)
    start = int(state["step"])
    tokens_per_step = config.batch * config.seq_len
    progress = tqdm(
        total=config.steps * tokens_per_step,
        initial=start * tokens_per_step,
        unit="token",
        unit_scale=True,
        dynamic_ncols=True,
    )
    with progress:
        for step in range(start, config.steps):
            state, loss = train_step(state, batch_of_step(rows, step, config))
            losses.append(float(loss))
            progress.set_postfix(step=step + 1, loss=f"{losses[-1]:.3f}", refresh=False)
            progress.update(tokens_per_step)
            checkpoints.save(step + 1, config, state, losses, last=step + 1 == config.steps)
    return state


def evaluate(rows, model, batch, max_batches=32):
    """Mean nats per byte over held-out rows, spread evenly over all of them."""
    count = min(max_batches * batch, len(rows.tokens) // batch * batch)
    if count == 0:
        raise SystemExit(
            f"the held-out files fill {len(rows.tokens)} rows, fewer than --batch {batch}: lower it"
        )
    spread = np.linspace(0, len(rows.tokens) - 1, count).astype(int).reshape(-1, batch)
    loss_of = nnx.jit(loss_of_batch)
    losses, weights = [], []
    for chosen in spread:
        part = PackedDocuments(*(array[chosen] for array in rows))
        losses.append(float(loss_of(model, part)))
        weights.append(part.loss_mask.sum())
    return np.average(losses, weights=weights)


# What survives the process, and what it shows at the end.


class Checkpoints:
    """Model, optimizer and loss curve on disk; a checkpoint appears whole or not at all."""

    def __init__(self, folder: Path, every: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.every = every
        self.manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
            ),
        )

    def save(self, step, config, state, losses, last):
        if last or step % self.every == 0:
            run = {"config": dataclasses.asdict(config), "losses": losses}
            arguments = dict(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
            self.manager.save(step, args=ocp.args.Composite(**arguments))

    def restore(self, config, state):
        """The newest (state, losses), or the given state and no losses."""
        step = self.manager.latest_step()
        if step is None:
            return state, []
        arguments = dict(state=ocp.args.StandardRestore(state), run=ocp.args.JsonRestore())
        run = self.manager.restore(step, args=ocp.args.Composite(run=arguments["run"]))["run"]
        changed = [
            f"{name.replace('_', '-')} was {run['config'].get(name)} and is {value}"
            for name, value in dataclasses.asdict(config).items()
            if run["config"].get(name) != value
        ]
        if changed:
            raise SystemExit(
                f"{self.manager.directory} belongs to another run: {', '.join(changed)}."
                " Repeat its arguments to go on with it, or choose another --out"
            )
        restored = self.manager.restore(step, args=ocp.args.Composite(**arguments))
        return restored["state"], run["losses"]


def draw_losses(losses, held_out, path):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = np.arange(1, len(losses) + 1)
    window = max(1, len(losses) // 20)
    trend = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axes.plot(steps, losses, linewidth=0.6, alpha=0.5, label="training")
    axes.plot(steps[window - 1 :], trend, label=f"training, mean of {window} steps")
    axes.axhline(held_out, color="black", linestyle="--", label=f"held out, {held_out:.3f}")
    axes.set(xlabel="step", ylabel="nats per byte", ylim=(0, min(6, 1.1 * max(losses))))
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def sample(model, prompt, length, seed, temperature=0.7):
    """Text that follows `prompt`; every byte costs a forward pass over the whole window."""
    start = 1 + len(prompt)
    window = np.zeros((1, start + length), np.int32)
    window[0, 1:start] = np.frombuffer(prompt, np.uint8)

    @nnx.jit
    def complete(model, window, key):
        def append(position, window):
            # The convolution and the recurrence are causal: what stands behind does not matter.
            logits = model(window)[0, position - 1].at[0].set(-jnp.inf)
            draw = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)
            return window.at[0, position].set(draw)

        return jax.lax.fori_loop(start, window.shape[1], append, window)

    text = complete(model, window, jax.random.key(seed))
    return bytes(np.asarray(text[0, 1:], np.uint8)).decode(errors="replace")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive_int, default=240)
    parser.add_argument("--batch", type=positive_int, default=4, help="rows a step")
    parser.add_argument("--seq-len", type=positive_int, default=512, help="tokens a row")
    parser.add_argument("--layers", type=positive_int, default=2)
    parser.add_argument("--width", type=positive_int, default=256)
    parser.add_argument("--heads", type=positive_int, default=2, help=f"of {HEAD_DIM} channels")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=positive_int, default=50, help="in steps")
    parser.add_argument("--sample-length", type=positive_int, default=300, help="in bytes")
    parser.add_argument("--out", type=Path, default=Path("runs/train_lm"))
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="folder of .py files to learn from (default: this Python's standard library)",
    )
    return parser.parse_args()


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main():
    arguments = parse_arguments()
    training, held_out = read_corpus(arguments.data)
    rows = pack_documents(training, arguments.seq_len)
    held_out_rows = pack_documents(held_out, arguments.seq_len)
    fields = {field.name for field in dataclasses.fields(Config)}
    chosen = {name: value for name, value in vars(arguments).items() if name in fields}
    config = Config(**chosen, text=zlib.crc32(rows.tokens.tobytes()))

    on_gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    model = LanguageModel(config, dtype=dtype, rngs=nnx.Rngs(config.seed))
    graphdef, params = nnx.split(model)
    optimizer = make_optimizer(config)
    params = nnx.to_pure_dict(params)
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), int)}

    checkpoints = Checkpoints(arguments.out / "checkpoints", arguments.checkpoint_every)
    state, losses = checkpoints.restore(config, state)

    parameter_count = sum(array.size for array in jax.tree.leaves(params))
    print(
        f"{parameter_count / 1e6:.2f} M parameters in {jnp.dtype(dtype).name} on"
        f" {jax.devices()[0].device_kind}; {len(training)} files in {len(rows.tokens)} rows of"
        f" {config.seq_len}, {np.mean(rows.segment_ids == 0):.2%} padding; {len(held_out)} held out"
    )
    if losses:
        print(f"continuing after step {len(losses)} of {config.steps}")

    state = train(config, rows, graphdef, state, optimizer, checkpoints, losses)
    model = nnx.merge(graphdef, state["params"])
    held_out_loss = evaluate(held_out_rows, model, config.batch)
    print(f"held-out loss {held_out_loss:.4f} nats per byte")
    draw_losses(losses, held_out_loss, arguments.out / "loss.png")
    print(sample(model, b"def ", arguments.sample_length, config.seed))


if __name__ == "__main__":
    main()
