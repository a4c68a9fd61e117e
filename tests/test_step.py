"""The decode step: the recurrence token by token, pools and their slots, transforms, refusals."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import extension
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashkda import (
    kimi_delta_attention,
    kimi_delta_attention_step,
    reference,
    step_supported,
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One call: sizes, dtypes, options."""

    N: int = 3
    T: int = 1
    H: int = 2
    HV: int = 4
    K: int = 128
    V: int = 128
    dtype: str = "bfloat16"
    g_dtype: str = "bfloat16"
    state_dtype: str = "float32"
    gate: str = "softplus"
    dt_bias: bool = True
    beta_is_logits: bool = True
    allow_neg_eigval: bool = False
    qk_l2norm: bool = True
    slots: int | None = None
    seed: int = 0

    @property
    def options(self):
        names = ("gate", "beta_is_logits", "allow_neg_eigval", "qk_l2norm")
        return {name: getattr(self, name) for name in names}

    def arrays(self):
        rng = np.random.default_rng(self.seed)
        N, T, H, HV, K, V = self.N, self.T, self.H, self.HV, self.K, self.V
        normal = lambda *shape, dtype=self.dtype: jnp.asarray(rng.standard_normal(shape), dtype)
        norm = 1 if self.qk_l2norm else K**-0.5
        arrays = dict(
            q=normal(N, T, H, K),
            k=normal(N, T, H, K) * jnp.asarray(norm, self.dtype),
            v=normal(N, T, HV, V),
            g=normal(N, T, HV, K, dtype=self.g_dtype),
            beta=normal(N, T, HV, dtype=self.g_dtype),
            state=normal(self.slots or N, HV, K, V, dtype=self.state_dtype),
        )
        if self.gate == "log_decay":
            arrays["g"] = -jnp.abs(arrays["g"])
        else:
            arrays["A_log"] = normal(HV, dtype="float32") * 0.3
        if not self.beta_is_logits:
            arrays["beta"] = jax.nn.sigmoid(arrays["beta"])
        if self.dt_bias and self.gate != "log_decay":
            arrays["dt_bias"] = normal(HV, K, dtype="float32") - 2
        if self.slots is not None:
            slots = rng.permutation(self.slots)[:N]
            arrays["state_indices"] = jnp.asarray(slots, jnp.int32)
        return arrays


CASES = {
    "softplus": Step(),
    "bounded": Step(gate="bounded", T=2),
    "bounded, no parameters": Step(gate="bounded", dt_bias=False),
    "log decay": Step(gate="log_decay", beta_is_logits=False, qk_l2norm=False, T=3),
    "eight tokens": Step(T=8, N=2),
    "negative eigenvalues": Step(allow_neg_eigval=True, T=4),
    "grouped values": Step(H=2, HV=6),
    "one value head a head": Step(H=3, HV=3),
    "head dim 64": Step(K=64, V=64, T=2),
    "bfloat16 state": Step(state_dtype="bfloat16", T=2),
    "bfloat16 state, one token": Step(state_dtype="bfloat16", HV=2),
    "head dim 64, bfloat16 state": Step(K=64, V=64, state_dtype="bfloat16"),
    "float16": Step(dtype="float16", T=2),
    "float32": Step(dtype="float32", g_dtype="float32", T=5),
    "float32 gate": Step(g_dtype="float32"),
    "pool": Step(slots=7, T=2),
    "bfloat16 pool": Step(slots=7, state_dtype="bfloat16", T=3),
    "bfloat16 pool, one token": Step(slots=7, state_dtype="bfloat16"),
}


def run(case, arrays, implementation, **more):
    step = functools.partial(kimi_delta_attention_step, **case.options, **more)
    return jax.jit(functools.partial(step, implementation=implementation))(**arrays)


def truth(case, arrays):
    """o and the state after each token, [N, T, ..], of the recurrence in float64."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        arrays = {name: np.asarray(x) for name, x in arrays.items()}
        state = np.asarray(arrays.pop("state"), np.float64)
        if "state_indices" in arrays:
            state = state[arrays.pop("state_indices")]
        exact = {name: jnp.asarray(x.astype(np.float64)) for name, x in arrays.items()}
        tokens = ("q", "k", "v", "g", "beta")
        outputs, states = [], []
        for t in range(case.T):
            token = {n: x[:, t : t + 1] if n in tokens else x for n, x in exact.items()}
            o, state = reference.recurrent(
                **token, **case.options, initial_state=jnp.asarray(state), dtype=jnp.float64
            )
            outputs.append(np.asarray(o))
            states.append(np.asarray(state))
        return np.concatenate(outputs, axis=1), np.stack(states, axis=1)


def assert_close(got, wanted):
    """Two roundings to the result's type, and fp32's own error."""
    eps = max(float(jnp.finfo(got.dtype).eps), 1e-6)
    got = np.asarray(got, np.float64)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= 2 * eps * np.abs(wanted).max()
    assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)) <= eps


def assert_same(implementation, a, b):
    """Bitwise; two programs of XLA agree to the last bits alone."""
    if implementation == "cuda":
        return assert_same_bits(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert_close(x, np.asarray(y, np.float64))


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("name", CASES)
def test_step_is_the_recurrence(name, implementation):
    case = CASES[name]
    arrays = case.arrays()
    o, state, token_states = run(case, arrays, implementation, return_token_states=True)
    wanted_o, wanted = truth(case, arrays)
    assert o.dtype == case.dtype and state.dtype == token_states.dtype == case.state_dtype
    assert_close(o, wanted_o)
    assert_close(token_states, wanted)
    if case.slots is None:
        assert_same(implementation, state, token_states[:, -1])
    else:
        named = np.asarray(arrays["state_indices"])
        assert_same(implementation, state[named], token_states[:, -1])
        others = np.setdiff1d(np.arange(case.slots), named)
        assert_same_bits(state[others], arrays["state"][others])
    assert_same(implementation, run(case, arrays, implementation), (o, state))


def test_the_state_is_not_transposed():
    """Of asymmetric sizes, which the CUDA kernel does not take."""
    case = Step(K=16, V=24, T=3, dtype="float32", g_dtype="float32")
    arrays = case.arrays()
    o, state = run(case, arrays, None)
    wanted_o, wanted = truth(case, arrays)
    assert_close(o, wanted_o)
    assert_close(state, wanted[:, -1])


def test_float64():
    case = Step(K=16, V=8, T=2, dtype="float64", g_dtype="float64", state_dtype="float64")
    with jax.enable_x64(True):
        arrays = case.arrays()
        o, state = run(case, arrays, "xla")
    wanted_o, wanted = truth(case, arrays)
    np.testing.assert_allclose(o, wanted_o, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state, wanted[:, -1], rtol=1e-12, atol=1e-12)


def test_resets(implementation):
    """A gate of -inf forgets the state, however large, and nothing becomes NaN."""
    case = Step(gate="log_decay", beta_is_logits=False)
    arrays = case.arrays()
    arrays["g"] = arrays["g"].at[0].set(-jnp.inf).at[1].set(-1000)
    o, state = run(case, arrays | {"state": arrays["state"] * 1e30}, implementation)
    none = run(case, arrays | {"state": jnp.zeros_like(arrays["state"])}, implementation)
    assert_same_bits((o[:2], state[:2]), (none[0][:2], none[1][:2]))


def test_it_continues_the_op(implementation):
    """A prefill and steps of one and of two tokens: the outputs of the whole sequence."""
    case = Step(N=2, T=8, dtype="bfloat16")
    arrays = case.arrays()
    state = arrays.pop("state")
    tokens = {n: arrays.pop(n) for n in ("q", "k", "v", "g", "beta")}
    many = {n: jnp.concatenate([x[:, ::-1], x], axis=1) for n, x in tokens.items()}
    options = case.options | arrays | dict(implementation=implementation)
    attend = jax.jit(functools.partial(kimi_delta_attention, return_final_state=True, **options))
    step = jax.jit(functools.partial(kimi_delta_attention_step, **options))
    whole, last = attend(**many, initial_state=state)
    cut = lambda a, b: {n: x[:, a:b] for n, x in many.items()}
    o, state = attend(**cut(0, 9), initial_state=state)
    parts = [o]
    for a, b in ((9, 10), (10, 12), (12, 16)):
        o, state = step(**cut(a, b), state=state)
        parts.append(o)
    relative = lambda x, y: float(jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(y.ravel()))
    f32 = lambda x: x.astype(jnp.float32)
    assert relative(f32(jnp.concatenate(parts, axis=1)), f32(whole)) < 0.007
    assert relative(state, last) < 0.007


# Pools


# The kernel of one token on bfloat16 states is another one.
KERNELS = pytest.mark.parametrize("state_dtype, T", [("float32", 2), ("bfloat16", 1)])


@KERNELS
def test_missing_slots_read_and_write_nothing(state_dtype, T, implementation):
    case = Step(N=6, slots=4, T=T, state_dtype=state_dtype)
    arrays = case.arrays()
    indices = [2, -1, 4, -(2**31), 2**31 - 1, 0]
    poison = np.zeros((6, 1, 1, 1), bool)
    poison[1:5] = True
    arrays["state_indices"] = jnp.asarray(indices, jnp.int32)
    clean = run(case, arrays, implementation, return_token_states=True)
    for name in ("q", "k", "v", "g", "beta"):
        mask = poison.reshape(6, *[1] * (arrays[name].ndim - 1))
        arrays[name] = jnp.where(mask, jnp.nan, arrays[name])
    arrays["state"] = arrays["state"].at[jnp.array([1, 3])].set(jnp.nan)
    o, pool, token_states = run(case, arrays, implementation, return_token_states=True)
    assert (
        not np.asarray(o[1:5], np.float32).any()
        and not np.asarray(token_states[1:5], np.float32).any()
    )
    assert_same_bits(o, clean[0])
    assert_same_bits(token_states, clean[2])
    assert_same_bits(pool[jnp.array([0, 2])], clean[1][jnp.array([0, 2])])
    assert np.isnan(np.asarray(pool[jnp.array([1, 3])], np.float32)).all()


@KERNELS
def test_a_slot_named_twice_harms_no_other(state_dtype, T, implementation):
    case = Step(N=5, slots=4, T=T, state_dtype=state_dtype)
    arrays = case.arrays() | {"state_indices": jnp.asarray([1, 3, 1, 1, 0], jnp.int32)}
    o, pool = run(case, arrays, implementation)
    alone = arrays | {"state_indices": jnp.asarray([-1, 3, -1, -1, 0], jnp.int32)}
    wanted_o, wanted_pool = run(case, alone, implementation)
    for kept, bits in ((o, wanted_o), (pool, wanted_pool)):
        rows = jnp.array([1, 4]) if kept is o else jnp.array([0, 2, 3])
        assert_same_bits(kept[rows], bits[rows])


@KERNELS
def test_a_sequence_does_not_depend_on_the_batch(state_dtype, T, implementation):
    case = Step(N=70, H=1, HV=2, T=T, slots=80, state_dtype=state_dtype)
    arrays = case.arrays()
    o, pool = run(case, arrays, implementation)
    same = functools.partial(assert_same, implementation)
    per_sequence = ("q", "k", "v", "g", "beta", "state_indices")
    for i in (0, 33, 69):
        one = {n: x[i : i + 1] if n in per_sequence else x for n, x in arrays.items()}
        o_one, pool_one = run(dataclasses.replace(case, N=1), one, implementation)
        slot = arrays["state_indices"][i]
        same(o_one[0], o[i])
        same(pool_one[slot], pool[slot])


@KERNELS
@pytest.mark.parametrize("slots", [None, 5])
def test_a_donated_state_is_updated_in_place(slots, state_dtype, T, implementation):
    case = Step(slots=slots, T=T, state_dtype=state_dtype)
    arrays = case.arrays()
    state = arrays.pop("state")
    wanted = run(case, arrays | {"state": state}, implementation)
    step = functools.partial(
        kimi_delta_attention_step, **case.options, implementation=implementation
    )
    donating = jax.jit(lambda state, rest: step(**rest, state=state), donate_argnums=0)
    compiled = donating.lower(state, arrays).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == state.nbytes
    assert_same_bits(compiled(state, arrays), wanted)
    assert state.is_deleted()


def test_a_state_that_is_kept_is_copied(implementation):
    case = Step(slots=5)
    arrays = case.arrays()
    before = np.asarray(arrays["state"]).tobytes()
    run(case, arrays, implementation)
    assert np.asarray(arrays["state"]).tobytes() == before


# Transforms

SMALL = Step(N=4, H=4, HV=8, K=16, V=16, dtype="float32", g_dtype="float32", T=2)


def sized(case, implementation):
    if implementation == "xla":
        return case
    return dataclasses.replace(case, K=128, V=128, dtype="bfloat16", g_dtype="bfloat16")


@pytest.mark.parametrize("pool", [None, 6])
@pytest.mark.parametrize(
    "mapped",
    [
        ("state",),
        ("q", "state_indices"),
        ("A_log",),
        ("dt_bias", "v"),
        ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state", "state_indices"),
    ],
    ids=lambda names: " ".join(names) if len(names) < 9 else "all",
)
def test_vmap(mapped, pool, implementation):
    case = dataclasses.replace(sized(SMALL, implementation), slots=pool)
    rows = [dataclasses.replace(case, seed=seed).arrays() for seed in range(3)]
    mapped = [name for name in mapped if name in rows[0]]
    if pool:
        rows[1]["state_indices"] = jnp.asarray([5, -1, 6, 0], jnp.int32)
    if not mapped:
        pytest.skip("there are no indices without a pool")
    arrays = {n: jnp.stack([r[n] for r in rows]) if n in mapped else rows[0][n] for n in rows[0]}
    step = functools.partial(
        kimi_delta_attention_step,
        **case.options,
        return_token_states=True,
        implementation=implementation,
    )
    axes = {n: 0 if n in mapped else None for n in arrays}
    got = jax.jit(jax.vmap(lambda x: step(**x), in_axes=(axes,)))(arrays)
    for i in range(3):
        one = {n: x[i] if n in mapped else x for n, x in arrays.items()}
        wanted = jax.jit(step)(**one)
        for x, y in zip(got, wanted, strict=True):
            x, y = np.asarray(x[i], np.float64), np.asarray(y, np.float64)
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_nested_vmap():
    cases = [
        [dataclasses.replace(SMALL, slots=6, seed=3 * i + j) for j in range(3)] for i in range(2)
    ]
    rows = [[case.arrays() for case in row] for row in cases]
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x), *[jax.tree.map(lambda *x: jnp.stack(x), *row) for row in rows]
    )
    step = lambda x: kimi_delta_attention_step(**x, **SMALL.options)
    got = jax.jit(jax.vmap(jax.vmap(step)))(stacked)
    for i in range(2):
        for j in range(3):
            wanted = jax.jit(step)(rows[i][j])
            for x, y in zip(got, wanted, strict=True):
                np.testing.assert_allclose(x[i, j], y, rtol=1e-5, atol=1e-5)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
COLLECTIVES = r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
@pytest.mark.parametrize("pool", [None, 6])
def test_sharded(kind, pool):
    """Sequences and heads split with no collective; a pool is split over heads alone."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    case = dataclasses.replace(SMALL, slots=pool)
    arrays = case.arrays()
    step = lambda x: kimi_delta_attention_step(**x, **case.options, return_token_states=True)
    wanted = jax.jit(step)(arrays)
    mesh = jax.make_mesh(
        (2, 4), ("x", "y"), axis_types=((EXPLICIT if kind == "explicit" else AUTO),) * 2
    )
    n = None if pool else "x"
    token, state = P(n, None, "y"), P(n, "y")
    specs = dict.fromkeys(("q", "k", "v", "g", "beta"), token) | {"state": state}
    specs |= {"A_log": P("y"), "dt_bias": P("y"), "state_indices": P()}
    specs = {name: specs[name] for name in arrays}
    results = (token, state, token)
    placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}
    if kind == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=results)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(placed).compile()
        got = compiled(placed)
    assert not re.findall(COLLECTIVES, compiled.as_text())
    for x, y, spec in zip(got, wanted, results, strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_a_pool_with_its_sequences_split_is_right():
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    case = dataclasses.replace(SMALL, slots=6)
    arrays = case.arrays()
    step = lambda x: kimi_delta_attention_step(**x, **case.options)
    wanted = jax.jit(step)(arrays)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AUTO,))
    split = ("q", "k", "v", "g", "beta", "state_indices")
    placed = {
        n: jax.device_put(x, NamedSharding(mesh, P("x") if n in split else P()))
        for n, x in arrays.items()
    }
    with jax.set_mesh(mesh):
        for x, y in zip(jax.jit(step)(placed), wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_it_runs_in_a_scan(implementation):
    """As a loop that generates does it; every turn continues from the state of the last."""
    case = sized(dataclasses.replace(SMALL, T=1), implementation)
    turns = [dataclasses.replace(case, seed=seed).arrays() for seed in range(4)]
    fixed = {n: turns[0][n] for n in ("A_log", "dt_bias")}
    tokens = [{n: x[n] for n in ("q", "k", "v", "g", "beta")} for x in turns]
    step = functools.partial(
        kimi_delta_attention_step, **fixed, **case.options, implementation=implementation
    )

    def turn(state, token):
        o, state = step(**token, state=state)
        return state, o

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tokens)
    state, outputs = jax.jit(lambda s, x: jax.lax.scan(turn, s, x))(turns[0]["state"], stacked)
    expected = turns[0]["state"]
    for i, token in enumerate(tokens):
        o, expected = step(**token, state=expected)
        np.testing.assert_allclose(
            np.asarray(outputs[i], np.float32), np.asarray(o, np.float32), rtol=1e-5, atol=1e-5
        )
    np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_derivatives_are_refused(transform):
    arrays = dataclasses.replace(SMALL, N=1).arrays()
    loss = lambda q: kimi_delta_attention_step(**(arrays | {"q": q}), **SMALL.options)[0].sum()
    with pytest.raises(NotImplementedError, match="kimi_delta_attention_step has no derivative"):
        if transform == "grad":
            jax.grad(loss)(arrays["q"])
        else:
            jax.jvp(loss, (arrays["q"],), (arrays["q"],))


def test_no_sequences():
    case = dataclasses.replace(SMALL, N=0, slots=5)
    arrays = case.arrays()
    o, pool = run(case, arrays, None)
    assert o.shape == arrays["v"].shape
    assert_same_bits(pool, arrays["state"])


# Refusals


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


VALID = dict(
    q=zeros(2, 1, 2, 8), k=zeros(2, 1, 2, 8), v=zeros(2, 1, 4, 6), g=zeros(2, 1, 4, 8),
    beta=zeros(2, 1, 4), state=zeros(2, 4, 8, 6),
)  # fmt: skip
INDICES = dict(state_indices=zeros(2, dtype=jnp.int32))


@pytest.mark.parametrize(
    "changes, kind, texts",
    [
        (dict(state=zeros(2, 4, 6, 8)), ValueError, ["(2, 4, 6, 8)", "[N, HV, K, V]"]),
        (dict(state=zeros(3, 4, 8, 6)), ValueError, ["state: got shape (3, 4, 8, 6)"]),
        (INDICES | dict(state=zeros(9, 4, 6, 8)), ValueError, ["(slots, 4, 8, 6) = [slots, HV"]),
        (INDICES | dict(state=zeros(0, 4, 8, 6)), ValueError, ["at least one slot"]),
        (dict(state_indices=zeros(3, dtype=jnp.int32)), ValueError, ["(2,) = [N]"]),
        (dict(state_indices=zeros(2)), TypeError, ["state_indices: got dtype float32; int32"]),
        (dict(state=zeros(2, 4, 8, 6, dtype=jnp.float16)), TypeError, ["float32 or bfloat16"]),
        (dict(q=zeros(2, 9, 2, 8), k=zeros(2, 9, 2, 8)), ValueError, ["9 tokens; 1 to 8"]),
        (dict(k=zeros(2, 0, 2, 8)), ValueError, ["0 tokens"]),
        (dict(gate="softplus"), ValueError, ["A_log: got None"]),
        (dict(gate="bounded", gate_lower_bound=1), ValueError, ["gate_lower_bound: got 1"]),
        (dict(return_token_states=1), TypeError, ["return_token_states: got 1"]),
        (dict(implementation="triton"), ValueError, ["implementation: got 'triton'"]),
        (dict(state=1.0), TypeError, ["state: got float; an array"]),
        (
            dict(v=zeros(2, 1, 3, 6), beta=zeros(2, 1, 4, dtype=int), scale="x"),
            ValueError,
            ["3 value heads for 2", "beta: got dtype int32", "scale: got str", "g: got shape"],
        ),
    ],
)  # fmt: skip
def test_refusals(changes, kind, texts):
    with pytest.raises(kind) as error:
        kimi_delta_attention_step(**(VALID | changes))
    assert str(error.value).startswith("kimi_delta_attention_step:")
    for text in texts:
        assert text in str(error.value)


def test_supported():
    case = Step()
    arrays = case.arrays()
    reason = step_supported(**arrays, **case.options, compute_capability="9.0")
    extension()
    assert reason is None
    said = step_supported(**arrays, **case.options, compute_capability="10.0")
    assert "compute capability 9.0, not 10.0" in said
    said = step_supported(**VALID, compute_capability="9.0")
    assert "no kernel for head dims K = 8, V = 6" in said
    many = {n: jax.ShapeDtypeStruct((2**27, *x.shape[1:]), x.dtype) for n, x in VALID.items()}
    assert "N * HV is 536870912, must be below 2^28" in step_supported(**many)


def test_cuda_by_name_is_refused_on_another_platform():
    if jax.default_backend() != "cpu":
        pytest.skip("needs a CPU as the default device")
    run_cuda = jax.jit(functools.partial(kimi_delta_attention_step, implementation="cuda"))
    jax.eval_shape(run_cuda, **VALID)  # traces anywhere
    with pytest.raises(NotImplementedError, match="platform other than cuda"):
        run_cuda(**VALID)
