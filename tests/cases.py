"""Every input the tests feed the op: shapes, segment layouts, gate and key regimes, and how to draw
them.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

KEYS = ("random", "uniform", "identical", "alternating", "near", "zero")
DECAYS = ("random", "slow", "zero", "bound", "reset", "infinite", "one_alive")
BETAS = ("random", "one", "near_one", "two", "zero")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes, regimes of the inputs, options of the op, segment ids of each row."""

    T: int = 65
    B: int = 2
    H: int = 2
    HV: int = 4
    K: int = 32
    V: int = 16
    dtype: str = "float32"
    g_dtype: str | None = None  # by default that of q
    keys: str = "random"
    decay: str = "random"
    beta: str = "random"
    gate: str = "log_decay"
    gate_lower_bound: float = -5.0
    A_log: bool = False
    dt_bias: bool = False
    beta_is_logits: bool = False
    allow_neg_eigval: bool = False
    qk_l2norm: bool = False
    initial_state: bool = False
    final_state: bool = False
    scale: float | None = None
    segment_ids: tuple[tuple[int, ...], ...] | None = None
    padding_segment_id: int | None = 0
    max_segments: int | None = None
    seed: int = 0

    @property
    def options(self):
        """Keyword arguments of the op that are not arrays."""
        names = (
            "gate",
            "gate_lower_bound",
            "beta_is_logits",
            "allow_neg_eigval",
            "qk_l2norm",
            "scale",
        )
        options = {name: getattr(self, name) for name in names}
        options["return_final_state"] = self.final_state
        if self.segment_ids is not None:
            options["padding_segment_id"] = self.padding_segment_id
            options["max_segments"] = self.max_segments
        return options

    @property
    def N(self):
        return self.max_segments or 1

    @property
    def ids(self):
        """[B, T] int32, or None."""
        if self.segment_ids is None:
            return None
        return np.array(self.segment_ids, np.int32).reshape(self.B, self.T)

    def arrays(self):
        """The array arguments of the op by name; the well-conditioned ones are what a layer would
        feed.
        """
        rng = np.random.default_rng(self.seed)
        B, T, H, HV, K, V = self.B, self.T, self.H, self.HV, self.K, self.V
        dtype, g_dtype = jnp.dtype(self.dtype), jnp.dtype(self.g_dtype or self.dtype)
        arrays = dict(
            q=rng.standard_normal((B, T, H, K)),
            k=_keys(self.keys, rng, B, T, H, K),
            v=rng.standard_normal((B, T, HV, V)),
            g=_decays(self.decay, rng, (B, T, HV, K)),
            beta=_betas(self.beta, rng, (B, T, HV)),
        )
        if self.gate != "log_decay":
            arrays["g"] = rng.standard_normal((B, T, HV, K)) * (50 if self.decay == "bound" else 1)
        if not self.qk_l2norm:
            norm = np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
            arrays["k"] = arrays["k"] / np.where(norm == 0, 1, norm)
        if self.beta_is_logits:
            arrays["beta"] = rng.standard_normal((B, T, HV)) + {"two": 5, "near_one": 4}.get(
                self.beta, 0
            )
        arrays = {
            name: jnp.asarray(x, g_dtype if name == "g" else dtype) for name, x in arrays.items()
        }
        if self.A_log:
            arrays["A_log"] = jnp.asarray(rng.uniform(-1, 1, HV), jnp.float32)
        if self.dt_bias:
            arrays["dt_bias"] = jnp.asarray(rng.standard_normal((HV, K)) - 2, jnp.float32)
        if self.initial_state:
            shape = (B, HV, K, V) if self.segment_ids is None else (B, self.N, HV, K, V)
            arrays["initial_state"] = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        if self.segment_ids is not None:
            arrays["segment_ids"] = jnp.asarray(self.ids)
        return arrays

    def cotangents(self):
        """Random cotangents of o and, if it is returned, of the final state."""
        rng = np.random.default_rng(self.seed + 1)
        d_o = jnp.asarray(rng.standard_normal((self.B, self.T, self.HV, self.V)), self.dtype)
        if not self.final_state:
            return d_o
        shape = (self.B, self.HV, self.K, self.V)
        if self.segment_ids is not None:
            shape = (self.B, self.N, *shape[1:])
        return d_o, jnp.asarray(rng.standard_normal(shape), jnp.float32)


def _keys(regime, rng, B, T, H, K):
    k = rng.standard_normal((B, T, H, K))
    if regime == "uniform":
        return rng.uniform(size=k.shape)
    if regime == "identical":
        return np.broadcast_to(k[:, :1], k.shape) if T else k
    if regime == "alternating":
        return k[:, np.arange(T) % 2] if T else k
    if regime == "near":
        return k[:, :1] + 1e-3 * k
    if regime == "zero":
        return np.zeros_like(k)
    return k


def _decays(regime, rng, shape):
    fast = -rng.exponential(size=shape)
    if regime == "slow":
        return 0.03 * fast
    if regime == "zero":
        return np.zeros(shape)
    if regime == "bound":
        return np.full(shape, -5.0)
    if regime in ("reset", "infinite"):
        resets = rng.uniform(size=shape[:3]) < 0.1
        return np.where(resets[..., None], -1000.0 if regime == "reset" else -np.inf, 0.1 * fast)
    if regime == "one_alive":
        return np.where(np.arange(shape[-1]) == 3, 0.0, -5.0) * np.ones(shape)
    return fast


def _betas(regime, rng, shape):
    u = rng.uniform(size=shape)
    return {
        "random": u,
        "one": np.ones(shape),
        "near_one": 1 - 0.05 * u,
        "two": 2 - 0.05 * u,
        "zero": np.zeros(shape),
    }[regime]


def runs(ids, padding_segment_id=0):
    """The segments of one row of ids, by definition: [(start, length)] of its maximal runs that are
    not padding.
    """
    found, start = [], 0
    for t in range(1, len(ids) + 1):
        if t == len(ids) or ids[t] != ids[start]:
            if ids[start] >= 0 and ids[start] != padding_segment_id:
                found.append((start, t - start))
            start = t
    return found


def layout(rng, T):
    """A random row of ids: runs of many lengths, padding of both kinds anywhere, ids re-used and
    out of order.
    """
    ids = []
    while len(ids) < T:
        length = int(rng.choice([1, 1, 2, 3, 15, 16, 17, 63, 64, 65, 130]))
        ids += [int(rng.choice([0, -1, 1, 2, 3, 7, -(2**31), 2**31 - 1]))] * length
    return tuple(ids[:T])
