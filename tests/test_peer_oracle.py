"""The peer of the native tests (native/peer_oracle.h) against `reference.chunked`, and how they
judge against it.

No GPU: their oracles are compiled for the host.
"""

import pathlib
import re
import shutil
import struct
import subprocess

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case

FOLDER = pathlib.Path(__file__).parent
GATES = ("log_decay", "softplus", "bounded")
RESULTS = ("o", "final_state", *(oracle.GRADIENTS[x] for x in ("q", "k", "v", "g", "beta")))
RESULTS += ("dA_log", "d_dt_bias", "d_initial_state")
SUMS = ("dA_log", "d_dt_bias")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("peer_host") / "peer_host"
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([*command, FOLDER / "peer_host.cc", "-o", program], check=True, timeout=300)
    return program


def ask(program, *arguments, data):
    """The arrays of doubles that the program answers."""
    done = subprocess.run([program, *arguments], input=data, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer, arrays = done.stdout, []
    while answer:
        (count,) = struct.unpack_from("<q", answer)
        arrays.append(np.frombuffer(answer, np.float64, count, 8))
        answer = answer[8 + 8 * count :]
    return arrays


def array(x, dtype):
    x = np.asarray(x, dtype)
    return struct.pack("<q", x.size) + x.tobytes()


def evaluate(program, case):
    """Results by name: of the recurrence, the peer and the chunked form without rounding."""
    arrays = case.arrays()
    d = case.cotangents()
    d_o, d_final = d if case.final_state else (d, ())
    per_row = {
        x: np.broadcast_to(arrays[x], (case.B, *arrays[x].shape))
        for x in ("A_log", "dt_bias")
        if x in arrays
    }
    arrays |= per_row
    has_ids, padding = case.ids is not None, case.padding_segment_id
    options = [case.beta_is_logits, case.allow_neg_eigval, case.qk_l2norm, has_ids]
    options += [has_ids and padding is not None, padding or 0]
    sizes = [case.B, case.T, case.H, case.HV, case.N, GATES.index(case.gate), *options]
    scale = case.K**-0.5 if case.scale is None else case.scale
    data = struct.pack(f"<{len(sizes)}q2d", *map(int, sizes), case.gate_lower_bound, scale)
    for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"):
        data += array(arrays.get(name, ()), np.float32)
    data += array(d_o, np.float32) + array(d_final, np.float32)
    data += array(() if case.ids is None else case.ids, np.int32)
    answers = ask(program, "results", data=data)
    kinds = [dict(zip(RESULTS, answers[at : at + 10], strict=True)) for at in (0, 10, 20)]
    for results in kinds:
        for name in per_row:  # the op's have no batch axis
            name = oracle.GRADIENTS[name]
            results[name] = results[name].reshape(case.B, -1).sum(axis=0)
    return kinds


KIMI = dict(
    K=128, V=128, dtype="bfloat16", A_log=True, dt_bias=True, beta_is_logits=True, qk_l2norm=True,
    initial_state=True, final_state=True,
)  # fmt: skip
SEGMENTS = ((1,) * 70 + (0,) * 5 + (2,) * 64 + (3,) + (4,) * 30 + (-1,) * 2 + (5,) * 17,)
CASES = [
    Case(T=130, B=2, H=1, HV=2, gate="bounded", g_dtype="float32", scale=0.5, **KIMI),
    Case(
        T=189, B=1, H=1, HV=1, gate="softplus", keys="identical", allow_neg_eigval=True,
        segment_ids=SEGMENTS, max_segments=3, **KIMI,
    ),
    Case(T=200, B=1, H=1, HV=1, K=128, V=128, dtype="bfloat16", keys="near", decay="reset"),
]  # fmt: skip


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.gate}-{case.keys}")
def test_the_peer_is_the_references(host, case):
    """Its error is what `reference.chunked` has too: where sums of another order flip a rounding,
    the two differ a little, elsewhere by fp32's own error.
    """
    truth, peer, exact = evaluate(host, case)
    true, near = oracle.evaluate(case, "truth"), oracle.evaluate(case, "peer")
    for name in RESULTS:
        if name not in true:
            assert not truth[name].size and not peer[name].size
            continue
        expected, reference = true[name].ravel(), near[name].ravel()
        size, error = rms(expected), rms(reference - expected)
        assert rms(truth[name] - expected) < 1e-13 * size, name
        assert rms(exact[name] - expected) < 1e-12 * size, name
        # Sums of all tokens are one number a head or channel: a flip shows in them.
        assert rms(peer[name] - reference) < 0.15 * error, name
        np.testing.assert_allclose(rms(peer[name] - expected), error, rtol=0.1, err_msg=name)
        if name not in SUMS:
            assert np.median(np.abs(peer[name] - reference)) < 0.01 * error, name
            np.testing.assert_allclose(rms(peer[name] - expected), error, rtol=0.01, err_msg=name)


def share_of_promise(program, case, name, got, true, near):
    """The share, and the relative errors of the result and of the peer."""
    kind = 1 if name.endswith("_state") else {"d_dt_bias": 2, "dA_log": 3}.get(name, 0)
    heads, D = (true[name].shape[2:] + (1,))[:2] if kind == 0 else (0, 0)
    data = struct.pack("<4qd", kind, case.T, heads, D, float(jnp.finfo(got.dtype).eps))
    sizes = ()
    if name in SUMS:
        sizes = np.sqrt(np.sum(true[f"{name}_summands"] ** 2, axis=(0, 1)))
    data += array(true[name], np.float64) + array(near[name], np.float64)
    data += array(got, np.float32) + array(sizes, np.float64)
    return ask(program, "promise", data=data)[0]


def test_the_judge_is_the_oracles(host):
    """Errors just inside and just outside what it allows are that for `oracle.compare` too."""
    case = Case(T=160, B=1, H=1, HV=2, gate="softplus", keys="identical", **KIMI)
    truth, peer, _ = evaluate(host, case)
    shapes = {"o": (1, 160, 2, 128), "final_state": (1, 2, 128, 128)}
    rng = np.random.default_rng(0)
    arrays = case.arrays()
    shapes |= {oracle.GRADIENTS[name]: x.shape for name, x in arrays.items()}
    true = {name: truth[name].reshape(shapes[name]) for name in RESULTS}
    near = {name: peer[name].reshape(shapes[name]) for name in RESULTS}
    for name in SUMS:
        true[f"{name}_summands"] = rng.standard_normal((1, 160, *shapes[name]))
    for name in RESULTS:
        is_bf16 = name in ("o", "dq", "dk", "dv", "dg", "d_beta")
        noise = rng.standard_normal(shapes[name]) * rms(true[name])
        if is_bf16:  # one block alone
            noise[:, :64] = noise[:, 128:] = 0
        make = lambda f, name=name, noise=noise, is_bf16=is_bf16: np.asarray(
            true[name] + f * noise, jnp.bfloat16 if is_bf16 else np.float32
        )
        share = lambda f, name=name, make=make: share_of_promise(
            host, case, name, make(f), true, near
        )[0]
        factor = 0.1 / share(0.1)
        assert 0.98 < share(factor) < 1.02, name
        for f, kept in ((0.95 * factor, True), (1.05 * factor, False)):
            assert (share(f) <= 1) == kept, name
            assert (not oracle.compare(case, name, make(f), true, near)) == kept, name
        spoiled = make(0)
        spoiled[(0,) * spoiled.ndim] = np.nan
        assert share_of_promise(host, case, name, spoiled, true, near)[0] == np.inf


def judge(program, *arguments):
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0, done.stdout


def test_a_draw_over_a_limit_is_held_to_the_promise(host):
    """Seed 90: the peer itself is over the fixed limit of dA_log."""
    passed, told = judge(host, "backward", "1", "90", "1")
    assert passed and "1 of 1 draws passed, 1 were over a limit" in told
    assert "dA_log 1.3" in told and "dA_log 0.500 of the promise (errs 7.6" in told
    passed, told = judge(host, "backward", "1", "90", "2.1")
    assert not passed and "FAILED:" in told and "dA_log 1.050 of the promise" in told


@pytest.mark.parametrize("direction, seed", [("forward", "6"), ("backward", "1")])
def test_a_draw_within_the_limits_passes_unless_held_to_the_promise(host, direction, seed):
    passed, told = judge(host, direction, "1", seed, "2.1")
    assert passed and "1 of 1 draws passed, 0 were over a limit" in told
    passed, told = judge(host, direction, "1", seed, "2.1", "--promise")
    assert not passed and re.search(r"FAILED:.* 1\.0[45]\d of the promise", told)
    assert judge(host, direction, "1", seed, "1.9", "--promise")[0]
