"""The op against the float64 recurrence: outputs, states and every gradient, as accurate as
promised.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from call import for_implementation, run
from cases import Case
from oracle import check

SOFTPLUS = dict(gate="softplus", A_log=True, dt_bias=True, beta_is_logits=True, qk_l2norm=True)
BOUNDED = dict(gate="bounded", A_log=True, dt_bias=True, beta_is_logits=True, qk_l2norm=True)
STATES = dict(initial_state=True, final_state=True)


def check_case(case, implementation, quickly=True):
    case = for_implementation(case, implementation)
    check(case, run(case, implementation, quickly=quickly))


@pytest.mark.parametrize(
    "T, dtype",
    [(T, "float32") for T in (0, 1, 15, 16, 17, 63, 64, 65, 1000)]
    + [(T, "bfloat16") for T in (17, 1000)],
)
def test_lengths(T, dtype, implementation):
    check_case(Case(T=T, dtype=dtype, B=1 if T == 1000 else 2, **STATES), implementation)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("gate", [SOFTPLUS, BOUNDED], ids=["softplus", "bounded"])
def test_raw_inputs(gate, dtype, implementation):
    if implementation == "cuda" and dtype == "float16":
        pytest.skip("the kernels take bfloat16")
    check_case(Case(T=130, dtype=dtype, **gate, **STATES), implementation)


@pytest.mark.parametrize("decay", ["slow", "zero", "bound", "reset", "infinite", "one_alive"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_decays(decay, dtype, implementation):
    # The programs of test_correlated_keys.
    check_case(Case(T=130, dtype=dtype, decay=decay, **STATES), implementation, quickly=False)


@pytest.mark.parametrize("keys", ["uniform", "identical", "alternating", "near", "zero"])
@pytest.mark.parametrize("beta", ["near_one", "two", "one"])
def test_correlated_keys(keys, beta, implementation):
    # Ill-conditioned on purpose, so compiled as users compile: the last bits count.
    for dtype in ("float32", "bfloat16"):
        case = Case(T=130, dtype=dtype, keys=keys, beta=beta, decay="zero", **STATES)
        check_case(case, implementation, quickly=False)


@pytest.mark.parametrize("gate", ["softplus", "bounded"])
def test_saturated_gates(gate, implementation):
    """Raw gates of size 50: decays of hundreds of nats beside none at all, for whole sequences."""
    case = Case(T=130, gate=gate, A_log=True, decay="bound", **STATES)
    check_case(case, implementation)


def test_negative_eigenvalues(implementation):
    check_case(
        Case(T=130, beta_is_logits=True, allow_neg_eigval=True, beta="two", **STATES),
        implementation,
    )


@pytest.mark.parametrize("H, HV", [(1, 1), (1, 4), (2, 4), (3, 3)])
def test_grouped_value_heads(H, HV, implementation):
    check_case(Case(H=H, HV=HV, **SOFTPLUS), implementation)


def test_mixed_dtypes(implementation):
    """g and beta keep their own dtypes, and so do their gradients."""
    case = for_implementation(Case(dtype="bfloat16", g_dtype="float32"), implementation)
    got = run(case, implementation, quickly=True)
    assert got["o"].dtype == got["dq"].dtype == jnp.bfloat16
    assert got["dg"].dtype == jnp.float32
    check(case, got)


# Every subset of the optional arrays and results, for the gate that takes them all.
@pytest.mark.parametrize(
    "A_log, dt_bias, initial_state, final_state", list(itertools.product([False, True], repeat=4))
)
def test_subsets_of_optional_inputs(A_log, dt_bias, initial_state, final_state, implementation):
    optional = dict(
        A_log=A_log, dt_bias=dt_bias, initial_state=initial_state, final_state=final_state
    )
    # dA_log is one number a head: of a few alone, the peer's error is a matter of luck.
    check_case(Case(T=65, HV=16, gate="bounded", **optional), implementation)


# A pairwise-covering choice over gate, beta, norm, dtype, states, scale.
@pytest.mark.parametrize(
    "case",
    [
        Case(gate="softplus", A_log=True, dtype="bfloat16", scale=0.5, final_state=True),
        Case(gate="softplus", A_log=True, dt_bias=True, beta_is_logits=True, initial_state=True),
        Case(
            gate="softplus",
            A_log=True,
            beta_is_logits=True,
            allow_neg_eigval=True,
            qk_l2norm=True,
            **STATES,
        ),
        Case(
            gate="bounded",
            gate_lower_bound=-1.5,
            beta_is_logits=True,
            dtype="bfloat16",
            initial_state=True,
        ),
        Case(
            gate="bounded",
            qk_l2norm=True,
            scale=2.0,
            final_state=True,
            beta_is_logits=True,
            allow_neg_eigval=True,
        ),
        Case(qk_l2norm=True, beta_is_logits=True, dtype="bfloat16", **STATES),
        Case(qk_l2norm=True, keys="zero", scale=-1.0),
        Case(beta="zero", **STATES),
    ],
    ids=range(8),
)
def test_option_pairs(case, implementation):
    check_case(case, implementation)


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        case = Case(T=65, dtype="float64")
        got = run(case, "xla", quickly=True)
        from oracle import evaluate

        truth = evaluate(case, "truth")
        for name in got:
            assert got[name].dtype == jnp.float64
            np.testing.assert_allclose(
                got[name], truth[name], rtol=0, atol=1e-12 * np.abs(truth[name]).max()
            )


def test_x64_mode_changes_nothing(implementation):
    case = for_implementation(
        Case(T=65, segment_ids=((1,) * 65,) * 2, max_segments=1, **STATES), implementation
    )
    # Types and values that the mode changes show however the two programs are compiled.
    plain = run(case, implementation, quickly=True)
    arrays, cotangents = case.arrays(), case.cotangents()
    with jax.enable_x64(True):
        wide = run(case, implementation, arrays=arrays, cotangents=cotangents, quickly=True)
    for name in plain:
        assert plain[name].dtype == wide[name].dtype
        np.testing.assert_array_equal(plain[name], wide[name])


def test_doubling_is_exact(implementation):
    """The op is linear in v and the state, and the gradients in the cotangents; powers of two are
    exact.
    """
    case = for_implementation(Case(T=130, **SOFTPLUS, **STATES), implementation)
    arrays = case.arrays()
    once = run(case, implementation)
    doubled = arrays | {name: 2 * arrays[name] for name in ("v", "initial_state")}
    twice = run(case, implementation, arrays=doubled)
    for name in ("o", "final_state"):
        np.testing.assert_array_equal(2 * once[name], twice[name])
    cotangents = jax.tree.map(lambda x: 2 * x, case.cotangents())
    twice = run(case, implementation, cotangents=cotangents)
    for name in ("dq", "dk", "dv", "dg", "d_beta", "dA_log", "d_dt_bias", "d_initial_state"):
        np.testing.assert_array_equal(2 * once[name], twice[name])


def test_causality(implementation):
    """A change at token t changes no bit before it."""
    case = for_implementation(Case(T=130), implementation)
    arrays = case.arrays()
    before = run(case, implementation, gradients=False)["o"]
    changed = {name: x.at[:, 77].add(0.5) for name, x in arrays.items()}
    after = run(case, implementation, gradients=False, arrays=changed)["o"]
    np.testing.assert_array_equal(before[:, :77], after[:, :77])
    assert np.any(before[:, 77] != after[:, 77])


def test_split_with_carried_state(implementation):
    """Two calls with the state handed over equal one call.

    Bitwise in the kernels; for XLA these are programs of different sizes, which it may round in
    different ways: they agree to the last bits.
    """
    case = for_implementation(Case(T=192, **SOFTPLUS, final_state=True), implementation)
    arrays = case.arrays()
    attend = functools.partial(run, case, implementation, gradients=False, quickly=True)
    whole = attend()
    tokens = ("q", "k", "v", "g", "beta")
    part = lambda s: arrays | {name: arrays[name][:, s] for name in tokens}
    first = attend(arrays=part(slice(0, 64)))
    second = attend(arrays=part(slice(64, None)) | dict(initial_state=first["final_state"]))
    for expected, got in [
        (whole["o"][:, :64], first["o"]),
        (whole["o"][:, 64:], second["o"]),
        (whole["final_state"], second["final_state"]),
    ]:
        tolerance = 0 if implementation == "cuda" else 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def test_repeats_bitwise(implementation):
    case = for_implementation(Case(T=130, **SOFTPLUS, **STATES), implementation)
    first = run(case, implementation)
    for _ in range(3):
        again = run(case, implementation)
        for name in first:
            np.testing.assert_array_equal(first[name], again[name])
