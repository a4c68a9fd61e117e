"""Runs the public op on a case, the way every test does."""

import functools

import cases
import jax
from oracle import COMPILE_QUICKLY, GRADIENTS

from jax_flashkda import kimi_delta_attention


def for_implementation(case, implementation):
    """The case as `implementation` can run it: the kernels take head dim 128 and 16-bit inputs.

    With so large heads there are fewer of them, or the reference would take minutes; but where
    dA_log is asked for, one number a head, at least 16: of a few, the peer's 16-bit error is luck.
    """
    if implementation != "cuda":
        return case
    dtype = "bfloat16" if case.dtype == "float32" else case.dtype
    HV = 8 * case.H if case.HV > 8 * case.H else case.HV
    case = cases.dataclasses.replace(case, K=128, V=128, HV=HV, dtype=dtype)
    if not case.A_log:
        return case
    times = -(-16 // HV)
    return cases.dataclasses.replace(case, H=times * case.H, HV=times * HV)


@functools.cache
def _program(static, gradients, options, implementation, quickly):
    """One compiled program per set of static arguments; shapes are jit's business."""
    jit = functools.partial(jax.jit, compiler_options=COMPILE_QUICKLY if quickly else None)

    def attend(arrays):
        arguments = [arrays[name] for name in ("q", "k", "v", "g", "beta")]
        rest = {name: x for name, x in arrays.items() if name not in ("q", "k", "v", "g", "beta")}
        return kimi_delta_attention(
            *arguments,
            **rest,
            **dict(options),
            implementation=implementation,
        )

    if not gradients:
        return jit(attend)

    def run(arrays, cotangents):
        floats = {name: x for name, x in arrays.items() if name != "segment_ids"}
        ids = {name: x for name, x in arrays.items() if name == "segment_ids"}
        results, pull_back = jax.vjp(lambda floats: attend(floats | ids), floats)
        return results, pull_back(cotangents)[0]

    return jit(run)


def run(case, implementation, gradients=True, arrays=None, cotangents=None, quickly=False):
    """o, final_state (if asked for) and the gradients by name.

    `quickly`: compile without optimisation, for a test that asks for accuracy and for one result of
    a program. What is bitwise must be so in the programs that users run.
    """
    arrays = case.arrays() if arrays is None else arrays
    options = {
        name: x for name, x in case.options.items() if x is not None or name == "padding_segment_id"
    }
    program = _program(
        tuple(sorted(arrays)),
        gradients,
        tuple(sorted(options.items())),
        implementation,
        quickly and implementation == "xla",
    )
    if gradients:
        cotangents = case.cotangents() if cotangents is None else cotangents
        results, d = program(arrays, cotangents)
    else:
        results, d = program(arrays), {}
    results = results if case.final_state else (results,)
    got = dict(zip(("o", "final_state"), results, strict=False))
    return got | {GRADIENTS[name]: x for name, x in d.items()}
