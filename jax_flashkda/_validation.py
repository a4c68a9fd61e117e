"""What the public ops check alike: their options, and how mismatches are told.

All mismatches of a call are collected and raised together, while tracing.
"""

import math
import numbers
from typing import Any

import jax
import numpy as np

FLOATS = ("bfloat16", "float16", "float32", "float64")
GATES = ("log_decay", "softplus", "bounded")
IMPLEMENTATIONS = ("cuda", "xla", None)


class Errors:
    """Collects every mismatch of a call of `function`, so that one attempt shows them all."""

    def __init__(self, function):
        self.function, self.messages, self.only_types = function, [], True

    def check(self, ok, message) -> bool:
        if not ok:
            self.messages.append(message)
            self.only_types = False
        return bool(ok)

    def check_type(self, ok, message) -> bool:
        if not ok:
            self.messages.append(message)
        return bool(ok)

    def check_flag(self, name, value) -> bool:
        return self.check_type(
            isinstance(value, bool | np.bool_), f"{name}: got {value!r}; True or False is accepted"
        )

    def raise_if_any(self):
        if self.messages:
            kind = TypeError if self.only_types else ValueError
            raise kind(f"{self.function}:\n  " + "\n  ".join(self.messages))


def check_are_arrays(function, arrays):
    bad = [f"{name}: got {type(x).__name__}" for name, x in arrays.items() if not is_array(x)]
    if bad:
        raise TypeError(f"{function}:\n  " + "\n  ".join(f"{b}; an array is accepted" for b in bad))


def is_array(x):
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def is_int(x):
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def strong(x):
    """x as a JAX array without weak type: the ops promote nothing."""
    return jax.lax.convert_element_type(x, jax.dtypes.canonicalize_dtype(x.dtype))


def check_options(
    errors,
    k,
    *,
    gate="log_decay",
    gate_lower_bound=-5.0,
    A_log=None,
    dt_bias=None,
    beta_is_logits=False,
    allow_neg_eigval=False,
    qk_l2norm=False,
    scale=None,
    implementation=None,
) -> dict[str, Any]:
    """Checks the options that the ops share; returns them as fields of a Problem or a StepProblem,
    unless there are errors.
    """
    errors.check(
        gate in GATES, f"gate: got {gate!r}; one of {', '.join(map(repr, GATES))} is accepted"
    )
    errors.check(
        implementation in IMPLEMENTATIONS,
        f"implementation: got {implementation!r}; 'cuda', 'xla' or None is accepted",
    )
    errors.check_flag("beta_is_logits", beta_is_logits)
    errors.check_flag("allow_neg_eigval", allow_neg_eigval)
    errors.check_flag("qk_l2norm", qk_l2norm)
    errors.check(
        beta_is_logits or not allow_neg_eigval,
        "allow_neg_eigval: got True with beta_is_logits=False; it doubles the sigmoid of beta "
        "logits, so pass beta_is_logits=True, or a beta in [0, 2] without it",
    )
    if gate == "bounded" and errors.check_type(
        isinstance(gate_lower_bound, numbers.Real),
        f"gate_lower_bound: got {gate_lower_bound!r}; a number is accepted",
    ):
        errors.check(
            -5 <= gate_lower_bound < 0,
            f"gate_lower_bound: got {gate_lower_bound}; a value in [-5, 0) is accepted",
        )
    if gate in GATES:
        _check_gate_parameters(errors, gate, A_log, dt_bias)
    scale = _check_scale(errors, scale, k)
    if errors.messages:
        return {}
    return dict(
        gate=gate,
        gate_lower_bound=float(gate_lower_bound) if gate == "bounded" else -5.0,
        beta_is_logits=bool(beta_is_logits),
        allow_neg_eigval=bool(allow_neg_eigval),
        qk_l2norm=bool(qk_l2norm),
        scale=scale,
        implementation=implementation,
        has_A_log=A_log is not None,
        has_dt_bias=dt_bias is not None,
    )


def _check_scale(errors, scale, k):
    if scale is None:
        return k.shape[-1] ** -0.5 if k.ndim and k.shape[-1] else 1.0
    if not errors.check_type(
        isinstance(scale, numbers.Real) and not isinstance(scale, bool),
        f"scale: got {type(scale).__name__}; a static Python number or None (K**-0.5) is accepted",
    ):
        return 1.0
    errors.check(math.isfinite(scale), f"scale: got {scale}; a finite number is accepted")
    return float(scale)


def _check_gate_parameters(errors, gate, A_log, dt_bias):
    if gate == "softplus":
        errors.check(
            A_log is not None, "A_log: got None with gate='softplus', which needs it: [HV] float32"
        )
    if gate == "log_decay":
        for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
            errors.check(
                x is None,
                f"{name}: got an array with gate='log_decay', which uses g as it is; leave it out, "
                "or pass the raw gate with gate='softplus' or 'bounded'",
            )


def check_dtypes(errors, arrays, **accepted):
    """Checks the types of what every call has, and of the arrays in `accepted`: (name, ..) each."""
    names = {name: np.dtype(x.dtype).name for name, x in arrays.items()}
    for name in ("q", "k", "v", "g", "beta"):
        errors.check_type(
            names[name] in FLOATS,
            f"{name}: got dtype {names[name]}; one of {', '.join(FLOATS)} is accepted",
        )
    errors.check_type(
        names["q"] == names["k"] == names["v"],
        f"q, k, v: got dtypes {names['q']}, {names['k']}, {names['v']}; one for all is accepted",
    )
    accepted |= dict(A_log=("float32",), dt_bias=("float32",))
    for name in accepted.keys() & names.keys():
        errors.check_type(
            names[name] in accepted[name],
            f"{name}: got dtype {names[name]}; {' or '.join(accepted[name])} is accepted"
            + (f" (v is {names['v']})" if name.endswith("state") else ""),
        )


def check_sizes(errors, arrays, rows) -> tuple[int, ...] | None:
    """(rows, T, H, K, HV, V) of k and v, whose first axis has the letter `rows`; None where they do
    not tell.
    """
    known = all(
        errors.check(
            arrays[name].ndim == 4,
            f"{name}: got shape {arrays[name].shape}; [{rows}, T, {heads}] is accepted",
        )
        for name, heads in (("k", "H, K"), ("v", "HV, V"))
    )
    if not known:
        return None
    H, K = arrays["k"].shape[2:]
    HV, V = arrays["v"].shape[2:]
    errors.check(
        min(H, K, HV, V) >= 1,
        f"k, v: got H={H}, K={K}, HV={HV}, V={V}; each at least 1 is accepted",
    )
    errors.check(
        H >= 1 and HV % H == 0,
        f"v: got {HV} value heads for {H} query/key heads; a multiple of {H} is accepted",
    )
    return (*arrays["k"].shape, HV, V)


def check_shapes(errors, arrays, rows, sizes, shapes):
    """Checks what every call has against the sizes, and the arrays in `shapes`: (letters, shape) or
    (letters, shape, when) each.
    """
    B, T, H, K, HV, V = sizes
    shapes = shapes | dict(
        q=(f"{rows}, T, H, K", (B, T, H, K)),
        v=(f"{rows}, T, HV, V", (B, T, HV, V)),
        g=(f"{rows}, T, HV, K", (B, T, HV, K)),
        beta=(f"{rows}, T, HV", (B, T, HV)),
        A_log=("HV", (HV,)),
        dt_bias=("HV, K", (HV, K)),
    )
    for name in shapes.keys() & arrays.keys():
        letters, accepted, *when = shapes[name]
        errors.check(
            arrays[name].shape == accepted,
            f"{name}: got shape {tuple(arrays[name].shape)}; {accepted} = [{letters}] is accepted"
            + "".join(when),
        )
