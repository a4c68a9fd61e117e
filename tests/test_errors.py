"""Every refusal, and that its message names the argument, what it got and what is accepted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import extension
from cases import Case

from jax_flashkda import kimi_delta_attention, supported

B, T, H, HV, K, V, N = 2, 65, 2, 4, 32, 16, 3


def arguments(**changes):
    """A valid call with segments, both gate parameters and states, changed by keyword; None leaves
    an argument out.
    """
    f = lambda *shape: jnp.zeros(shape, jnp.float32)
    call = dict(
        q=f(B, T, H, K),
        k=f(B, T, H, K),
        v=f(B, T, HV, V),
        g=f(B, T, HV, K),
        beta=f(B, T, HV),
        gate="softplus",
        A_log=f(HV),
        dt_bias=f(HV, K),
        initial_state=f(B, N, HV, K, V),
        segment_ids=jnp.ones((B, T), jnp.int32),
    )
    call.update(changes)
    return {name: x for name, x in call.items() if x is not None}


f = lambda *shape: jnp.zeros(shape, jnp.float32)
NO_SEGMENTS = dict(segment_ids=None, initial_state=None)
REFUSALS = {
    "rank of k": (dict(k=f(B, T, K)), ValueError, ["k: got shape (2, 65, 32)", "[B, T, H, K]"]),
    "rank of v": (dict(v=f(B, T, HV)), ValueError, ["v: got shape (2, 65, 4)", "[B, T, HV, V]"]),
    "shape of q": (
        dict(q=f(B, T, H, K + 1)),
        ValueError,
        ["q: got shape (2, 65, 2, 33)", "(2, 65, 2, 32)"],
    ),
    "tokens of v": (
        dict(v=f(B, T + 1, HV, V)),
        ValueError,
        ["v: got shape (2, 66, 4, 16)", "(2, 65, 4, 16)"],
    ),
    "shape of g": (
        dict(g=f(B, T, H, K)),
        ValueError,
        ["g: got shape", "(2, 65, 4, 32) = [B, T, HV, K]"],
    ),
    "shape of beta": (
        dict(beta=f(B, T, H)),
        ValueError,
        ["beta: got shape", "(2, 65, 4) = [B, T, HV]"],
    ),
    "shape of A_log": (dict(A_log=f(1, 1, HV, 1)), ValueError, ["A_log: got shape", "(4,) = [HV]"]),
    "shape of dt_bias": (
        dict(dt_bias=f(HV * K)),
        ValueError,
        ["dt_bias: got shape (128,)", "(4, 32) = [HV, K]"],
    ),
    "transposed state": (
        dict(initial_state=f(B, N, HV, V, K)),
        ValueError,
        ["initial_state: got shape (2, 3, 4, 16, 32)", "[B, N, HV, K, V]", "with segment_ids"],
    ),
    "4-D state with segments": (
        dict(initial_state=f(B, HV, K, V)),
        ValueError,
        ["initial_state: got shape", "B, N, HV"],
    ),
    "5-D state without segments": (
        dict(segment_ids=None),
        ValueError,
        ["initial_state: got shape", "(2, 4, 32, 16) = [B, HV, K, V]"],
    ),
    "no state slots": (
        dict(initial_state=f(B, 0, HV, K, V)),
        ValueError,
        ["initial_state: got no slots"],
    ),
    "shape of segment_ids": (
        dict(segment_ids=jnp.ones((T,), jnp.int32)),
        ValueError,
        ["segment_ids: got shape (65,)"],
    ),
    "heads": (
        dict(q=f(B, T, 3, K), k=f(B, T, 3, K)),
        ValueError,
        ["v: got 4 value heads for 3", "a multiple of 3"],
    ),
    "dtype of q": (
        dict(q=jnp.zeros((B, T, H, K), jnp.int8)),
        TypeError,
        ["q: got dtype int8", "bfloat16"],
    ),
    "mixed dtypes": (
        dict(v=jnp.zeros((B, T, HV, V), jnp.bfloat16)),
        TypeError,
        ["q, k, v: got dtypes float32"],
    ),
    "dtype of beta": (dict(beta=jnp.zeros((B, T, HV), bool)), TypeError, ["beta: got dtype bool"]),
    "dtype of A_log": (
        dict(A_log=jnp.zeros(HV, jnp.bfloat16)),
        TypeError,
        ["A_log: got dtype bfloat16", "float32"],
    ),
    "dtype of ids": (
        dict(segment_ids=f(B, T)),
        TypeError,
        ["segment_ids: got dtype float32", "int32 is accepted"],
    ),
    "dtype of the state": (
        dict(initial_state=jnp.zeros((B, N, HV, K, V), jnp.bfloat16)),
        TypeError,
        ["initial_state: got dtype bfloat16", "float32 is accepted"],
    ),
    "not an array": (dict(g=1.0), TypeError, ["g: got float", "an array"]),
    "unknown gate": (
        dict(gate="sigmoid"),
        ValueError,
        ["gate: got 'sigmoid'", "'log_decay', 'softplus', 'bounded'"],
    ),
    "softplus without A_log": (
        dict(A_log=None),
        ValueError,
        ["A_log: got None", "softplus", "[HV] float32"],
    ),
    "parameters of a log decay": (
        dict(gate="log_decay"),
        ValueError,
        [
            "A_log: got an array with gate='log_decay'",
            "dt_bias: got an array with gate='log_decay'",
        ],
    ),
    "bound too low": (
        dict(gate="bounded", gate_lower_bound=-5.1),
        ValueError,
        ["gate_lower_bound: got -5.1", "[-5, 0)"],
    ),
    "bound not negative": (
        dict(gate="bounded", gate_lower_bound=0.0),
        ValueError,
        ["gate_lower_bound: got 0.0"],
    ),
    "bound nan": (
        dict(gate="bounded", gate_lower_bound=float("nan")),
        ValueError,
        ["gate_lower_bound: got nan"],
    ),
    "bound traced": (
        dict(gate="bounded", gate_lower_bound=jnp.ones(())),
        TypeError,
        ["gate_lower_bound: got"],
    ),
    "negative eigenvalues of a value": (
        dict(allow_neg_eigval=True),
        ValueError,
        ["allow_neg_eigval: got True", "beta_is_logits=True"],
    ),
    "flag": (dict(qk_l2norm=1), TypeError, ["qk_l2norm: got 1", "True or False"]),
    "scale traced": (dict(scale=jnp.ones(())), TypeError, ["scale: got", "static Python number"]),
    "scale infinite": (dict(scale=float("inf")), ValueError, ["scale: got inf", "finite"]),
    "padding id": (
        dict(padding_segment_id="pad"),
        TypeError,
        ["padding_segment_id: got 'pad'", "an int or None"],
    ),
    "padding id range": (
        dict(padding_segment_id=2**31),
        ValueError,
        ["padding_segment_id: got 2147483648", "int32"],
    ),
    "max_segments disagrees": (
        dict(max_segments=5),
        ValueError,
        ["max_segments: got 5", "initial_state has 3 slots"],
    ),
    "max_segments zero": (
        dict(max_segments=0, initial_state=None),
        ValueError,
        ["max_segments: got 0", "at least 1"],
    ),
    "max_segments alone": (
        dict(max_segments=2, **NO_SEGMENTS),
        ValueError,
        ["max_segments:", "without segment_ids"],
    ),
    "final states without a count": (
        dict(initial_state=None, return_final_state=True),
        ValueError,
        ["return_final_state: got True with segment_ids", "pass max_segments"],
    ),
    "residual name": (
        dict(residual_name=3),
        TypeError,
        ["residual_name: got 3", "a string or None"],
    ),
    "implementation": (
        dict(implementation="triton"),
        ValueError,
        ["implementation: got 'triton'", "'cuda', 'xla'"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name):
    changes, kind, parts = REFUSALS[name]
    with pytest.raises(kind) as error:
        jax.eval_shape(lambda: kimi_delta_attention(**arguments(**changes)))
    for part in ("kimi_delta_attention", *parts):
        assert part in str(error.value)
    with pytest.raises(kind):
        supported(**arguments(**changes))


def test_the_unchanged_call_is_valid():
    o = jax.eval_shape(lambda: kimi_delta_attention(**arguments()))
    assert o.shape == (B, T, HV, V)


def test_all_mismatches_at_once():
    with pytest.raises(ValueError) as error:
        kimi_delta_attention(
            **arguments(
                gate="log_decay", scale=float("nan"), beta=f(B), g=jnp.zeros((B, T, HV, K), int)
            )
        )
    for part in ("A_log:", "dt_bias:", "scale:", "beta:", "g: got dtype"):
        assert part in str(error.value)


def test_options_are_keywords_alone():
    with pytest.raises(TypeError):
        kimi_delta_attention(
            *(arguments()[name] for name in ("q", "k", "v", "g", "beta")), "softplus"
        )


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="an NVIDIA GPU runs it")
def test_cuda_by_name_never_falls_back():
    arrays = Case(K=128, V=128, dtype="bfloat16").arrays()
    run = jax.jit(lambda arrays: kimi_delta_attention(**arrays, implementation="cuda"))
    run.trace(arrays)  # tracing needs no GPU
    with pytest.raises(NotImplementedError, match='implementation="cuda" is lowered for'):
        run(arrays)


@pytest.mark.parametrize(
    "changes, part",
    [
        (dict(K=32, V=128), "K = 32"),
        (dict(dtype="float32"), "float32"),
    ],
)
def test_supported_says_why_not(changes, part):
    extension()
    arrays = Case(**(dict(K=128, V=128, dtype="bfloat16") | changes)).arrays()
    reason = supported(**arrays, compute_capability="9.0")
    assert reason and part in reason
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    assert supported(**abstract, compute_capability="9.0") == reason


def test_other_architectures_are_refused_by_name():
    extension()
    arrays = Case(K=128, V=128, dtype="bfloat16").arrays()
    assert "8.0" in supported(**arrays, compute_capability="8.0")


def test_forward_mode_is_refused():
    arrays = Case(T=3).arrays()
    with pytest.raises((TypeError, NotImplementedError), match="custom_vjp|reverse"):
        jax.jvp(
            lambda q: kimi_delta_attention(**(arrays | dict(q=q))), (arrays["q"],), (arrays["q"],)
        )


def test_second_derivatives_are_refused():
    arrays = Case(T=3, B=1, H=1, HV=1, K=4, V=4).arrays()
    loss = lambda q: jnp.sum(kimi_delta_attention(**(arrays | dict(q=q))) ** 2)
    with pytest.raises(NotImplementedError, match="reverse-mode"):
        jax.grad(lambda q: jnp.sum(jax.grad(loss)(q) ** 2))(arrays["q"])


def test_the_next_call_works_after_an_error():
    with pytest.raises(ValueError):
        kimi_delta_attention(**arguments(gate="none"))
    assert np.isfinite(kimi_delta_attention(**arguments())).all()


@pytest.mark.parametrize("packed", [False, True])
def test_supported_takes_every_operand(packed):
    """Gate parameters and states too, which get a row for each batch row inside the op."""
    extension()
    bf16 = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    ids = dict(segment_ids=jnp.ones((B, T), jnp.int32)) if packed else {}
    reason = supported(
        bf16(B, T, H, 128),
        bf16(B, T, H, 128),
        bf16(B, T, HV, 128),
        bf16(B, T, HV, 128),
        bf16(B, T, HV),
        gate="softplus",
        A_log=f(HV),
        dt_bias=f(HV, 128),
        initial_state=f(B, N, HV, 128, 128) if packed else f(B, HV, 128, 128),
        return_final_state=True,
        compute_capability="9.0",
        **ids,
    )
    assert reason is None
