"""Times the op with T split over GPUs against one GPU, forward and forward with backward.

    python benchmarks/context_parallel.py                   262,144 tokens, 32 heads, 1, 2, .. GPUs
    python benchmarks/context_parallel.py --documents 8192  the same in documents of 8,192 tokens
    python benchmarks/context_parallel.py --check           and compares results with one GPU's

Parallel efficiency is the time of one GPU over n times that of n. On one GPU the op is the plain
one, in whatever schedule it picks for the shape. Raw inputs, bfloat16, as in run.py.
"""

import argparse
import functools

import timing

CALL = dict(gate="softplus", beta_is_logits=True, qk_l2norm=True, implementation="cuda")


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
    attend = functools.partial(kimi_delta_attention, context_axis="context", **CALL)

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
        jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(specs, specs["v"]), out_specs=out))
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

    def relative(x, y):
        x, y = (jnp.asarray(jax.device_get(array), jnp.float32) for array in (x, y))
        return float(jnp.sqrt(jnp.mean((x - y) ** 2) / jnp.mean(y**2)))

    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(wanted)]
    return max(
        zip(map(relative, jax.tree.leaves(got), jax.tree.leaves(wanted)), names, strict=True)
    )


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

    import jax

    lengths = None
    if options.documents is not None:
        lengths = [options.documents] * (options.tokens // options.documents)
        lengths += [options.tokens % options.documents] * bool(options.tokens % options.documents)
    dims = (1, options.tokens, options.heads, options.heads, lengths)
    arrays = timing.make_inputs(dims, options.gate, 0)
    d_o = timing.make_inputs(dims, options.gate, 1)["v"]
    arrays, d_o = jax.device_get((arrays, d_o))  # each program has its own on the GPUs
    print(f"{options.tokens} tokens, {options.heads} heads, {options.gate} gate, ", end="")
    print(f"documents of {options.documents or options.tokens} tokens")
    print("| GPUs | forward, ms | efficiency | forward and backward, ms | efficiency |")
    print("|---|---|---|---|---|")
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count()]
    one, wanted = None, None
    for n in counts:
        forward, training, place = programs(n, lengths is not None)
        inputs = [place(arrays, d_o)]
        times = [
            timing.single_ms(lambda inputs, f=f: f(*inputs), inputs, 5) for f in (forward, training)
        ]
        one = one or times
        cells = [f"{t:.2f} | {t1 / (n * t):.0%}" for t, t1 in zip(times, one, strict=True)]
        print(f"| {n} | {' | '.join(cells)} |", flush=True)
        if options.check:
            got = jax.device_get(training(*inputs[0]))
            wanted = wanted or got
            difference, name = differences(got, wanted)
            print(f"largest relative difference from one GPU: {difference:.1e}, of {name}")
        del inputs


if __name__ == "__main__":
    main()
