"""Times the op with T split over GPUs against one GPU, forward and forward with backward.

    python benchmarks/context_parallel.py                   262,144 tokens, 32 heads, 1, 2, .. GPUs
    python benchmarks/context_parallel.py --documents 8192  the same in documents of 8,192 tokens
    python benchmarks/context_parallel.py --check           and compares results with one GPU's

A line of JSON for each number of GPUs, once its times are there, and a table. Parallel efficiency
is the time of one GPU over n times that of n. On one GPU the op is the plain one, in whatever
schedule it picks for the shape. Raw inputs, bfloat16, as in run.py, which records these lines
(`--context-parallel`).
"""

import argparse
import functools

import report
import timing
from lines import say

REPEATS = 5


def programs(n, documents):
    """(forward, forward and backward) over n GPUs, and a function that places arrays for them."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jax_flashkda import kimi_delta_attention

    mesh = jax.make_mesh(
        (n,), ("context",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:n]
    )
    tokens = {"q", "k", "v", "g", "beta", "segment_ids"}
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", *(("segment_ids",) * documents))
    specs = {name: P(None, "context") if name in tokens else P() for name in names}
    call = dict(gate="softplus", beta_is_logits=True, qk_l2norm=True)
    call["implementation"] = timing.IMPLEMENTATION
    attend = functools.partial(kimi_delta_attention, context_axis="context", **call)

    def forward(arrays, d_o):
        del d_o
        return attend(**arrays)

    def training(arrays, d_o):
        ids = {name: x for name, x in arrays.items() if name == "segment_ids"}
        floats = {name: x for name, x in arrays.items() if name != "segment_ids"}
        o, pull_back = jax.vjp(lambda floats: attend(**floats, **ids), floats)
        return o, pull_back(d_o)[0]

    gradients = {name: spec for name, spec in specs.items() if name != "segment_ids"}
    out_specs = P(None, "context"), (P(None, "context"), gradients)
    mapped = [
        jax.jit(
            jax.shard_map(f, mesh=mesh, in_specs=(specs, specs["v"]), out_specs=out),
            compiler_options=timing.COMPILER_OPTIONS,
        )
        for f, out in zip((forward, training), out_specs, strict=True)
    ]

    def place(arrays, d_o):
        placed = {
            name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()
        }
        return placed, jax.device_put(d_o, NamedSharding(mesh, specs["v"]))

    return *mapped, place


def differences(got, wanted):
    """The largest relative root mean square difference, and of which result."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def relative(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.sqrt(jnp.sum((x - y) ** 2) / jnp.sum(y**2))

    named = zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(got), strict=True)
    found = [
        (float(relative(jax.device_put(x, y.device), y)), jax.tree_util.keystr(path))
        for (path, y), x in named
    ]
    return max(found)


def timed(tokens, heads, documents, gate, check, counts=(1, 2, 4, 8)):
    """A row for each number of GPUs that there are, as the record has them."""
    import jax

    lengths = None
    if documents is not None:
        lengths = [documents] * (tokens // documents)
        lengths += [tokens % documents] * bool(tokens % documents)
    dims = (1, tokens, heads, heads, lengths)
    arrays = timing.make_inputs(dims, gate, 0)
    d_o = timing.make_inputs(dims, gate, 1)["v"]
    wanted = None
    for n in [n for n in counts if n <= jax.device_count()]:
        forward, training, place = programs(n, lengths is not None)
        inputs = [place(arrays, d_o)]
        row = dict(tokens=tokens, heads=heads, documents=documents, gate=gate, gpus=n)
        for name, f in (("forward_ms", forward), ("training_ms", training)):
            milliseconds = timing.single_ms(lambda x, f=f: f(*x), inputs, REPEATS)
            row[name] = round(milliseconds, 3)
        if check:
            got = training(*inputs[0])
            if wanted is None:
                wanted = jax.device_put(got, jax.devices()[0])
            row["difference"], row["of"] = differences(got, wanted)
            del got
        del inputs
        yield row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument(
        "--documents", type=int, help="tokens of a document; one document by default"
    )
    parser.add_argument(
        "--gate", choices=("softplus fast", "softplus slow"), default="softplus slow"
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    rows = []
    for row in timed(**vars(options)):
        say("context_parallel", row)
        rows.append(row)
    print(report.context_parallel({"context_parallel": rows}))


if __name__ == "__main__":
    main()
