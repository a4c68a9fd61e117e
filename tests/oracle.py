"""Truth, peer, and the measure of error: the only home of tolerances.

Truth is the token recurrence in float64, the peer the chunked form with its 16-bit rounding points
(`reference.py`). Both see one segment at a time, cut out of the packed rows with indices computed
here by definition. Nothing in this file imports the op.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import runs

from jax_flashkda import reference

# What README.md promises: error <= PEER_FACTOR x the peer's, with a floor of two roundings of the
# output.
PEER_FACTOR = 2
BLOCK = 64
# For random keys and beta <= 1 also, relative RMS over the whole tensor.
CAPS_16_BIT = dict(
    o=0.007, final_state=0.007,
    dq=0.008, dk=0.008, dv=0.008, d_initial_state=0.008, dg=0.015, d_beta=0.015,
)  # fmt: skip
CAP_FP32 = 1e-5

GRADIENTS = dict(
    q="dq",
    k="dk",
    v="dv",
    g="dg",
    beta="d_beta",
    A_log="dA_log",
    dt_bias="d_dt_bias",
    initial_state="d_initial_state",
)


def check(case, got):
    """Asserts that `got` (o, final_state and gradients by name) is as accurate as promised for
    `case`.
    """
    gradients = any(name in got for name in GRADIENTS.values())
    truth, peer = evaluate(case, "truth", gradients), evaluate(case, "peer", gradients)
    failures = []
    for name, value in got.items():
        failures += compare(case, name, np.asarray(value), truth, peer)
    assert not failures, f"{case}\n" + "\n".join(failures)


def compare(case, name, value, truth, peer):
    """The ways in which one result falls short; empty if it does not."""
    true, near = truth[name], peer[name]
    value_dtype = value.dtype
    value = value.astype(np.float64)
    if value.shape != true.shape:
        return [f"{name}: shape {value.shape}, truth has {true.shape}"]
    if not np.isfinite(value).all():
        bad = ~np.isfinite(value)
        return [f"{name}: {np.sum(bad)} values are not finite, first at {_first(bad)}"]
    if not value.size:
        return []
    if not true.any():
        return [f"{name}: truth is all zero, and this is not"] if value.any() else []
    error, allowed = value - true, near - true
    if name == "dA_log":
        # One number a head: of each its error relative to the size of its summands, or the few
        # heads with the largest would decide alone. No size counts as less than a thousandth.
        size = _summand_size(truth, name)
        size = np.maximum(size, 1e-3 * np.max(size))
        error, allowed = error / size, allowed / size
    whole = np.sqrt(np.mean(allowed**2))
    error, allowed = _blocks(name, error), _blocks(name, allowed)
    rms = lambda x: np.sqrt(np.mean(x**2, axis=-1))
    floor = 2 * float(jnp.finfo(value_dtype).eps)
    if name == "d_dt_bias":
        # A sum over tokens may cancel: what counts is its error against the size of its summands.
        floor *= np.max(_summand_size(truth, name))
    elif name != "dA_log":
        floor *= np.max(np.abs(_blocks(name, true, of_means=False)), axis=-1)
    limit = PEER_FACTOR * np.maximum(rms(allowed), whole) + floor
    over = rms(error) / limit
    failures = []
    if np.max(over) > 1:
        where = _first(over == np.max(over))
        failures.append(
            f"{name}: {np.sum(over > 1)} of {over.size} blocks over the limit, worst {where} "
            f"(batch, head, block): rms error {rms(error)[where]:.2e}, limit {limit[where]:.2e}, "
            f"peer {rms(allowed)[where]:.2e}"
        )
    relative = np.sqrt(np.mean((value - true) ** 2) / np.mean(true**2))
    cap = _cap(case, name)
    if relative > cap:
        failures.append(
            f"{name}: relative rms error {relative:.2e} over the whole tensor, cap {cap:.2e}"
        )
    return failures


def _summand_size(truth, name):
    """The root of the sum of squares of what was added up, of each of its elements."""
    return np.sqrt(np.sum(truth[f"{name}_summands"] ** 2, axis=(0, 1)))


def _cap(case, name):
    well_conditioned = case.keys == "random" and case.beta == "random" and case.decay == "random"
    if not well_conditioned or case.allow_neg_eigval or name in ("dA_log", "d_dt_bias"):
        return np.inf
    return CAP_FP32 if case.dtype == "float32" else CAPS_16_BIT[name]


def _blocks(name, x, of_means=True):
    """x as [.., values], one row per (batch, head, 64 tokens), per (batch, .., head) of a state, or
    whole; for means of squares, or else as it is.
    """
    if name in ("dA_log", "d_dt_bias"):
        return x.reshape(1, -1)
    if name in ("final_state", "d_initial_state"):
        return x.reshape(*x.shape[:-2], -1)
    x = x.reshape(*x.shape[:3], -1)
    B, T, H, D = x.shape
    # The last block may be short; zeros would dilute its mean, so it borrows the tokens before it.
    starts = np.minimum(np.arange(0, T, BLOCK), max(T - BLOCK, 0))
    tokens = starts[:, None] + np.arange(min(BLOCK, T))
    blocks = x[:, tokens]  # [B, M, 64, H, D]
    own = (tokens >= np.arange(0, T, BLOCK)[:, None])[None, :, :, None, None]
    count = own.sum(axis=2, keepdims=True)
    blocks = np.where(own, blocks, 0)
    if of_means:
        blocks = blocks * np.sqrt(blocks.shape[2] / count)
    return np.moveaxis(blocks, 3, 1).reshape(B, H, len(starts), -1)


def _first(mask):
    return tuple(int(i) for i in np.argwhere(mask)[0])


def evaluate(case, kind, gradients=True):
    """o, final_state and all gradients of a case by name in float64, from the recurrence ("truth")
    or the "peer".
    """
    return _evaluate(case, kind, gradients)


@functools.lru_cache(maxsize=4)
def _evaluate(case, kind, gradients):
    return evaluate_arrays(case, case.arrays(), kind, gradients)


def evaluate_arrays(case, arrays, kind, gradients=False):
    """`evaluate` for arrays of other values than the case's own. On the CPU, whatever is tested."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return _evaluate_arrays(case, arrays, kind, gradients)


def _evaluate_arrays(case, arrays, kind, gradients):
    arrays = {
        name: np.asarray(x, np.float64) for name, x in arrays.items() if name != "segment_ids"
    }
    cotangents = case.cotangents()
    d_o, d_final = cotangents if case.final_state else (cotangents, None)
    d_o = np.asarray(d_o, np.float64)
    state_shape = (case.B, case.N, case.HV, case.K, case.V)
    initial = arrays.pop("initial_state", np.zeros(state_shape)).reshape(state_shape)
    d_final = (
        np.zeros(state_shape)
        if d_final is None
        else np.asarray(d_final, np.float64).reshape(state_shape)
    )

    results = dict(o=np.zeros(d_o.shape), final_state=initial.copy())
    tokens = {name: x for name, x in arrays.items() if name not in ("A_log", "dt_bias")}
    results |= {GRADIENTS[name]: np.zeros(x.shape) for name, x in arrays.items()}
    results["d_initial_state"] = d_final.copy()

    ids = np.ones((case.B, case.T), np.int32) if case.ids is None else case.ids
    segments = [
        (b, n, t, length)
        for b in range(case.B)
        for n, (t, length) in enumerate(runs(ids[b], case.padding_segment_id))
    ]

    def run(group, length):
        """Segments side by side, each padded to one length with inert tokens."""
        row, slot, start, lengths = (np.array(x) for x in zip(*group, strict=True))
        index = (row[:, None], np.minimum(start[:, None] + np.arange(length), case.T - 1))
        valid = np.arange(length) < lengths[:, None]
        has_slot = (slot < case.N) & (lengths > 0)
        cut = lambda x: np.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x[index], 0)
        at_slot = lambda x: np.where(
            has_slot[:, None, None, None], x[row, np.minimum(slot, case.N - 1)], 0
        )
        inputs = {name: cut(x) for name, x in tokens.items()}
        inputs |= {name: arrays[name] for name in ("A_log", "dt_bias") if name in arrays}
        options = {name: x for name, x in case.options.items() if name in _REFERENCE_OPTIONS}
        with jax.enable_x64(True):
            operands = _operand_dtype(kind, case.dtype)
            program = _program(reference, operands, gradients, tuple(sorted(options.items())))
            out = program(inputs, at_slot(initial), valid, cut(d_o), at_slot(d_final))
            return {name: np.asarray(x, np.float64) for name, x in out.items()}

    sums = {}
    for group, length in _groups(segments, case):
        out = run(group, length)
        for s, (b, n, t, count) in enumerate(group):
            for name in results.keys() & out.keys() if count else ():
                if name in ("final_state", "d_initial_state"):
                    if n < case.N:
                        results[name][b, n] = out[name][s]
                elif name not in ("dA_log", "d_dt_bias"):
                    results[name][b, t : t + count] = out[name][s, :count]
        for name in out:
            if name.startswith(("dA_log", "d_dt_bias")):
                sums.setdefault(name, []).append(out[name])
    for name, parts in sums.items():
        if name.endswith("summands"):
            results[name] = np.concatenate([x.reshape(1, -1, *x.shape[2:]) for x in parts], axis=1)
        else:
            results[name] = sum(parts)
    for name in ("dA_log", "d_dt_bias"):
        if name in results:
            results.setdefault(f"{name}_summands", results[name][None, None])
    if case.segment_ids is None:
        for name in ("final_state", "d_initial_state"):
            results[name] = results[name][:, 0]
    return results


_REFERENCE_OPTIONS = (
    "gate",
    "gate_lower_bound",
    "beta_is_logits",
    "allow_neg_eigval",
    "qk_l2norm",
    "scale",
)

# Elements of the states that the reference may keep for its gradient at a time, 128 MB in float64:
# with more, much of the time goes into getting pages from the system.
MOST_KEPT = 2**24
SHORT = 4  # tokens


def _groups(segments, case):
    """The segments in groups of one size, with the length they are padded to, very short ones apart
    from the others; empty segments fill up the last group of each. Sizes are few, and so are
    compilations.
    """
    short = [s for s in segments if s[3] <= SHORT]
    others = [s for s in segments if s[3] > SHORT]
    for alike in (short, others):
        if not alike:
            continue
        length = _bucket(max(s[3] for s in alike), least=SHORT if alike is short else BLOCK)
        most = max(1, MOST_KEPT // (length * case.HV * case.K * case.V))
        size = min(_group_size(len(alike), case), 1 << (most.bit_length() - 1))
        for first in range(0, len(alike), size):
            group = alike[first : first + size]
            yield group + [(0, 0, 0, 0)] * (size - len(group)), length


def _group_size(segments, case):
    """A power of two; with segment ids, whose numbers of segments are many, every other one of
    them from 8 on.
    """
    if case.segment_ids is None:
        return _bucket(segments)
    size = 8
    while size < segments:
        size *= 4
    return size


COMPILE_QUICKLY = {"xla_backend_optimization_level": 0}


def _bucket(n, least=1):
    return max(least, 1 << (n - 1).bit_length())


def _operand_dtype(kind, dtype):
    """Of the peer's products for inputs of `dtype`; None for the truth, which has none.

    fp16 inputs use bf16 for every decayed operand, so bf16 is their peer.
    """
    if kind == "truth":
        return None
    return "float32" if dtype == "float32" else "bfloat16"


@functools.cache
def _program(reference, operand_dtype, gradients, options):
    """The compiled truth (None) or peer of one kind of operands: results by name, for segments side
    by side. Inputs of all types share it: they come as float64. A test with mistakes in a copy of
    the reference (test_mutations.py) has programs of its own.
    """
    options, is_truth = dict(options), operand_dtype is None
    if is_truth:
        work_dtype = jnp.float64
        reference_fn = functools.partial(reference.recurrent, dtype=work_dtype)
    else:
        work_dtype = jnp.float32
        reference_fn = functools.partial(reference.chunked, operand_dtype=operand_dtype)

    def run(inputs, initial, valid, d_o, d_final):
        cast = functools.partial(jax.tree.map, lambda x: x.astype(work_dtype))
        S, T = valid.shape
        inputs = cast(dict(inputs, initial_state=initial))
        if is_truth:  # a copy of the gate parameters a token shows the summands of their gradients
            for name in ("A_log", "dt_bias"):
                if name in inputs:
                    inputs[name] = jnp.broadcast_to(inputs[name], (S, T, *inputs[name].shape))

        def attend(inputs):
            arguments = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
            rest = {name: inputs[name] for name in inputs.keys() - {"q", "k", "v", "g", "beta"}}
            return reference_fn(*arguments, valid=valid, **rest, **options)

        if not gradients:
            o, final_state = attend(inputs)
            return dict(o=o, final_state=final_state)
        (o, final_state), pull_back = jax.vjp(attend, inputs)
        (d,) = pull_back(cast((d_o, d_final)))
        out = dict(o=o, final_state=final_state, **{GRADIENTS[name]: x for name, x in d.items()})
        if is_truth:
            for name in ("dA_log", "d_dt_bias"):
                if name in out:
                    out[f"{name}_summands"] = out[name]
                    out[name] = jnp.sum(out[name], axis=(0, 1))
        return out

    # Tokens are few and programs many: compile quickly rather than well.
    return jax.jit(run, compiler_options=COMPILE_QUICKLY)
