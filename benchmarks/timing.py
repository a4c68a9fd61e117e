"""Inputs of the op, and the clock.

Times are of jitted calls with inputs on the device, by the wall: the median over repeats of at
least 20 ms of asynchronous calls in a row with one wait at the end, several input sets in rotation
so that none is found in the L2 cache.
"""

import math
import statistics
import time

import shapes

L2_BYTES = 60e6
UNROLLED = 32  # calls in one program, for times below 0.2 ms


def make_inputs(shape, gate, seed):
    """The op's arguments: q, k, v, g, beta, A_log, dt_bias, [segment_ids].

    fast: the state is forgotten within some 16 tokens. slow: the layer's initialisation with
    A_log = 0, mean log decay about -0.02.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    B, T, H, HV, lengths = shapes.SHAPES[shape]
    D = shapes.D
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
    count = UNROLLED if small else shapes.rounds(bytes_of_one, L2_BYTES)
    return [make(seed) for seed in range(count)]


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
