"""Inputs of the op, programs that call it, and the clock.

Times are of compiled calls with inputs on the device, by the wall: the median over repeats of at
least 20 ms of asynchronous calls in a row with one wait at the end, several input sets in rotation
so that none is found in the L2 cache.

Below 0.2 ms, 32 different calls make one program. XLA runs them as a command buffer, which it has
to record anew, some 25 us a call on the host, whenever a buffer has another address than in the run
before. So each run is given the results of the one before to write its own into: all addresses stay
what they are, as they do in a loop that carries its buffers.
"""

import functools
import math
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import shapes

import jax_flashkda

L2_BYTES = 60e6
UNROLLED = 32  # calls in one program, for times below SMALL_MS
SMALL_MS = 0.2
REPEAT_MS = 20
LONGEST_DRAWN = 65536  # longer rows repeat their first tokens: times do not depend on values
IMPLEMENTATION = "cuda"


# inputs


@functools.partial(jax.jit, static_argnums=0)
def _draw(dims, seed, bounded, fast):
    B, T, H, HV, lengths = dims
    drawn = min(T, LONGEST_DRAWN)
    keys = jax.random.split(jax.random.key(seed), 7)

    def normal(key, *rest):
        x = jax.random.normal(key, (B, drawn, *rest), jnp.bfloat16)
        return jnp.tile(x, (1, T // drawn, *[1] * len(rest)))

    A_log = jax.random.uniform(keys[5], HV, jnp.float32)
    uniform = jax.random.uniform(keys[6], (HV, shapes.D), jnp.float32)
    dt = jnp.exp(math.log(1e-3) + uniform * math.log(100.0))
    # -5 sigmoid(x) is near -softplus(x) for small decays.
    slow_bias = jnp.log(jnp.expm1(dt)) - jnp.where(bounded, math.log(5.0), 0.0)
    arrays = dict(
        q=normal(keys[0], H, shapes.D),
        k=normal(keys[1], H, shapes.D),
        v=normal(keys[2], HV, shapes.D),
        g=normal(keys[3], HV, shapes.D) * jnp.where(fast, 1.0, 0.3).astype(jnp.bfloat16),
        beta=normal(keys[4], HV),
        A_log=jnp.where(fast, A_log, 0.0),
        dt_bias=jnp.where(fast, uniform, slow_bias),
    )
    if lengths is not None:
        ids = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
        arrays["segment_ids"] = jnp.broadcast_to(jnp.asarray(ids), (B, T))
    return arrays


def make_inputs(dims, gate, seed):
    """The op's arguments: q, k, v, g, beta, A_log, dt_bias, [segment_ids].

    dims: (B, T, H, HV, lengths of the segments or None). fast: the state is forgotten within some
    16 tokens. slow: the layer's initialisation with A_log = 0, mean log decay about -0.02.
    """
    *sizes, lengths = dims
    dims = (*sizes, None if lengths is None else tuple(lengths))
    bounded, fast = gate.startswith("bounded"), gate.endswith("fast")
    return _draw(dims, np.uint32(seed % 2**32), np.bool_(bounded), np.bool_(fast))


class Inputs:
    """Sets of inputs in rotation, made when they are wanted: as many as leave nothing of one in
    the cache when it comes round again.
    """

    def __init__(self, make, bytes_of_one):
        self.make, self._sets = make, []
        huge = bytes_of_one > 50 * L2_BYTES  # drives itself out of the cache
        self.rotation = 1 if huge else shapes.rounds(bytes_of_one, L2_BYTES)

    def first(self, count):
        while len(self._sets) < count:
            self._sets.append(jax.block_until_ready(self.make(len(self._sets))))
        return self._sets[:count]

    def drop(self):
        self._sets.clear()


# programs


class Program:
    """A function of one argument, compiled, and 32 of its calls in one program."""

    def __init__(self, function, make, must_hold=None):
        """make: from a seed to the argument. must_hold: the custom call that has to be in it."""
        self._function = function
        self._argument = jax.eval_shape(lambda: make(0))
        self._lowered = jax.jit(function).lower(self._argument)
        # The kernels, and nothing else, are timed.
        assert must_hold is None or must_hold in self._lowered.as_text()

    def compile(self):
        _ = self.call
        return self

    @functools.cached_property
    def call(self):
        return self._lowered.compile()

    @property
    def temporary_bytes(self):
        return self.call.memory_analysis().temp_size_in_bytes

    @functools.cached_property
    def unrolled(self):
        """From the results of the last run, which are written over, and 32 arguments to results."""

        def several(spent, arguments):
            return [self._function(one) for one in arguments]

        several = jax.jit(several, donate_argnums=0, keep_unused=True)
        results = jax.eval_shape(self._function, self._argument)
        return several.lower([results] * UNROLLED, [self._argument] * UNROLLED).compile()

    def nothing_spent(self):
        results = jax.eval_shape(self._function, self._argument)
        zeros = lambda x: jnp.zeros(x.shape, x.dtype)
        return [jax.tree.map(zeros, results) for _ in range(UNROLLED)]


def compile_all(programs):
    """Side by side. XLA drops the command buffers of old programs when it compiles a new one: the
    more are compiled before anything is timed the better.
    """
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(Program.compile, programs))


def _options(gate):
    return dict(
        gate=gate.split()[0],
        beta_is_logits=True,
        qk_l2norm=True,
        implementation=IMPLEMENTATION,
    )


def target(stage):
    return f"jax_flashkda.{stage}" if IMPLEMENTATION == "cuda" else None


def forward_program(dims, gate) -> Program:
    def forward(arrays):
        return jax_flashkda.kimi_delta_attention(**arrays, **_options(gate))

    return Program(forward, lambda seed: make_inputs(dims, gate, seed), target("forward"))


def forward_inputs(dims, gate) -> Inputs:
    B, T, H, HV, _ = dims
    return Inputs(
        lambda seed: make_inputs(dims, gate, seed), B * T * (2 * H + 3 * HV) * shapes.D * 2
    )


def _with_cotangent(dims, gate):
    def make(seed):
        inputs = make_inputs(dims, gate, seed)
        return inputs, make_inputs(dims, gate, ~seed)["v"]

    return make


def training_program(dims, gate) -> Program:
    """Forward and backward. The cotangent of o is an argument, gradients of all seven operands are
    results.
    """

    def train(inputs):
        arrays, d_o = inputs
        ids = {"segment_ids": arrays["segment_ids"]} if "segment_ids" in arrays else {}
        floats = {name: x for name, x in arrays.items() if name != "segment_ids"}
        attend = lambda floats: jax_flashkda.kimi_delta_attention(**floats, **ids, **_options(gate))
        o, vjp = jax.vjp(attend, floats)
        return o, vjp(d_o)

    return Program(train, _with_cotangent(dims, gate), target("backward"))


def training_inputs(dims, gate) -> Inputs:
    B, T, H, HV, _ = dims
    return Inputs(_with_cotangent(dims, gate), B * T * (4 * H + 7 * HV) * shapes.D * 2)


# the clock


def median_ms(program, inputs, repeats=7) -> float:
    """Of one call."""
    one = _single_ms(program.call, inputs.first(inputs.rotation), repeats)
    return one if one >= SMALL_MS else _unrolled_ms(program, inputs, repeats)


def median_of(run, repeats):
    """`run(n)`: n of something in a row. Milliseconds of one."""

    def timed(n):
        start = time.perf_counter()
        jax.block_until_ready(run(n))
        return (time.perf_counter() - start) * 1e3 / n

    timed(1)
    n = 1
    for _ in range(2):  # the first guess counts the wait too
        n = max(1, math.ceil(REPEAT_MS / timed(n)))
    return statistics.median(timed(n) for _ in range(repeats))


def _single_ms(call, sets, repeats):
    def run(n):
        for i in range(n):
            result = call(sets[i % len(sets)])
        return result

    return median_of(run, repeats)


def _unrolled_ms(program, inputs, repeats):
    return median_of(unrolled_run(program, inputs), repeats) / UNROLLED


def unrolled_run(program, inputs):
    """A function of n that runs the program of 32 calls n times in a row."""
    sets, spent = inputs.first(UNROLLED), program.nothing_spent()

    def run(n=1):
        nonlocal spent
        for _ in range(n):
            spent = program.unrolled(spent, sets)
        return spent

    return run
