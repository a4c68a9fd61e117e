"""What the public ops check alike: their options, and how mismatches are told.

All mismatches of a call are collected and raised together, while tracing.
"""

import math
import numbers

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
    gate,
    gate_lower_bound,
    A_log,
    dt_bias,
    beta_is_logits,
    allow_neg_eigval,
    qk_l2norm,
    scale,
    implementation,
) -> float:
    """Checks the options of gate, norms and beta; returns the scale."""
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
    return _check_scale(errors, scale, k)


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
