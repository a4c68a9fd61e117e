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
POOL = 2**29  # normal numbers that all inputs are cut from: drawing compiles for seconds a shape
IMPLEMENTATION = "cuda"
COMPILER_OPTIONS = None


# inputs


@functools.cache
def _pool(size):
    with jax.ensure_compile_time_eval():  # also where only shapes are asked for
        return jax.jit(lambda: jax.random.normal(jax.random.key(0), (size,), jnp.bfloat16))()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cut(shape, dtype, pool, offset, scale):
    values = jax.lax.dynamic_slice(pool, (offset,), (math.prod(shape),)).reshape(shape)
    return (values * scale.astype(jnp.bfloat16)).astype(dtype)


def normal(shape, seed, dtype=jnp.bfloat16, scale=1.0):
    """Normal numbers, at most half a pool of them; others for another seed."""
    count, half = math.prod(shape), POOL // 2
    assert count <= half, f"{shape} is more than half a pool"
    offset = np.random.default_rng(seed).integers(half // 128) * 128
    return _cut(tuple(shape), dtype, _pool(POOL), np.int32(offset), np.float32(scale))


@functools.partial(jax.jit, static_argnums=1)
def _repeat(x, times):
    return jnp.tile(x, (1, times, *[1] * (x.ndim - 2)))


def _tokens(B, T, rest, seed, scale=1.0):
    """[B, T, *rest]."""
    drawn = min(T, LONGEST_DRAWN)
    x = normal((B, drawn, *rest), seed, scale=scale)
    return x if drawn == T else _repeat(x, T // drawn)


def make_inputs(dims, gate, seed):
    """The op's arguments: q, k, v, g, beta, A_log, dt_bias, [segment_ids].

    dims: (B, T, H, HV, lengths of the segments or None). fast: the state is forgotten within some
    16 tokens. slow: the layer's initialisation with A_log = 0, mean log decay about -0.02.
    """
    B, T, H, HV, lengths = dims
    D, fast = shapes.D, gate.endswith("fast")
    rng = np.random.default_rng(seed)
    seeds = [int(x) for x in rng.integers(2**32, size=5)]
    arrays = dict(
        q=_tokens(B, T, (H, D), seeds[0]),
        k=_tokens(B, T, (H, D), seeds[1]),
        v=_tokens(B, T, (HV, D), seeds[2]),
        g=_tokens(B, T, (HV, D), seeds[3], scale=1.0 if fast else 0.3),
        beta=_tokens(B, T, (HV,), seeds[4]),
    )
    if fast:
        A_log, dt_bias = rng.uniform(size=HV), rng.uniform(size=(HV, D))
    else:
        dt = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), size=(HV, D)))
        A_log, dt_bias = np.zeros(HV), np.log(np.expm1(dt))
        if gate.startswith("bounded"):  # -5 sigmoid(x) is near -softplus(x) for small decays
            dt_bias -= math.log(5.0)
    arrays |= dict(A_log=jnp.float32(A_log), dt_bias=jnp.float32(dt_bias))
    if lengths is not None:
        ids = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
        arrays["segment_ids"] = jnp.asarray(np.broadcast_to(ids, (B, T)))
    return arrays


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
        self._lowered = jax.jit(function, compiler_options=COMPILER_OPTIONS).lower(self._argument)
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

        options = dict(compiler_options=COMPILER_OPTIONS, donate_argnums=0, keep_unused=True)
        several = jax.jit(several, **options)
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
        return list(pool.map(lambda program: program.compile(), programs))


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
    B, T, _, HV, _ = dims

    def make(seed):
        return make_inputs(dims, gate, seed), _tokens(B, T, (HV, shapes.D), 2**40 + seed)

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


def median_ms(program, inputs, repeats=5) -> float:
    """Of one call."""
    one = single_ms(program.call, inputs.first(inputs.rotation), repeats)
    return one if one >= SMALL_MS else _unrolled_ms(program, inputs, repeats)


def median_of(run, repeats, repeat_ms=REPEAT_MS):
    """`run(n)`: n of something in a row. Milliseconds of one."""

    def timed(n):
        start = time.perf_counter()
        jax.block_until_ready(run(n))
        return (time.perf_counter() - start) * 1e3 / n

    timed(1)
    n = 1
    for _ in range(2):  # the first guess counts the wait too
        n = max(1, math.ceil(repeat_ms / timed(n)))
    return statistics.median(timed(n) for _ in range(repeats))


def single_ms(call, sets, repeats):
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
