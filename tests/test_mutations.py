"""Every tolerance can fail: known mistakes, each made in a copy of the reference that stands in for
the op, and each caught by a named test. CPU.
"""

import functools
import pathlib
import types

import call
import cases
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_kda
import test_segments

from jax_flashkda import reference

SOURCE = pathlib.Path(reference.__file__).read_text()


def mutated(*edits):
    """The reference with each (old, new) carried out, everywhere it occurs."""
    source = SOURCE
    for old, new in edits:
        assert old in source, f"the reference no longer says {old}"
        source = source.replace(old, new)
    module = types.ModuleType("mutated_reference")
    exec(compile(source, "mutated reference.py", "exec"), module.__dict__)
    return module


def stand_in(edits=(), change_case=lambda case: case, gradients=False):
    """In place of `call.run`: the chunked reference with 16-bit operands, mutated."""

    def run(case, implementation, quickly=False):
        with pytest.MonkeyPatch.context() as patch:
            if edits:
                patch.setattr(oracle, "reference", mutated(*edits))
            kind = f"mutated by {edits}" if edits else "peer"
            arrays = case.arrays()
            results = oracle.evaluate_arrays(change_case(case), arrays, kind, gradients)
        wanted = ["o", "final_state"]
        if gradients:
            wanted += [name for key, name in oracle.GRADIENTS.items() if key in arrays]
        dtypes = {"o": case.dtype, "dq": case.dtype, "dk": case.dtype, "dv": case.dtype}
        return {name: jnp.asarray(results[name], dtypes.get(name, "float32")) for name in wanted}

    return run


def shifted(case):
    """Segment borders one token late."""
    rows = tuple(row[:1] + row[:-1] for row in case.segment_ids)
    return cases.dataclasses.replace(case, segment_ids=rows)


class WithoutFinalCotangent(cases.Case):
    def cotangents(self):
        d_o, d_final_state = super().cotangents()
        return d_o, jnp.zeros_like(d_final_state)


def without_final_cotangent(case):
    return WithoutFinalCotangent(**vars(case))


LENGTHS = (test_kda, functools.partial(test_kda.test_lengths, 17, "bfloat16", "cuda"))
LAYOUTS = (
    test_segments,
    functools.partial(test_segments.test_layouts, "on chunk edges", "cuda"),
)
# name: (module of the test, the test, what it finds wrong, the mistake)
MUTATIONS = {
    "a dropped decay factor": (
        *LENGTHS,
        "final_state",
        dict(edits=[("state = jnp.exp(G[..., -1, :])[..., None] * state", "state = 1.0 * state")]),
    ),
    "a skipped last row": (
        *LENGTHS,
        "final_state",
        dict(
            edits=[
                (
                    "    if valid is not None:\n",
                    "    if valid is not None:\n"
                    "        valid = valid & jnp.pad(valid, [(0, 0), (0, 1)])[:, 1:]\n",
                )
            ]
        ),
    ),
    "a transposed state": (
        *LENGTHS,
        "final_state",
        dict(edits=[("return o[:, :T], state\n", "return o[:, :T], jnp.swapaxes(state, 2, 3)\n")]),
    ),
    "exp2 for exp": (
        *LENGTHS,
        "o",
        dict(edits=[("x * jnp.exp(exponent)", "x * jnp.exp2(exponent)")]
             + [("decay = jnp.exp(exponent)", "decay = jnp.exp2(exponent)")]),
    ),
    "a segment shifted by one": (*LAYOUTS, "o", dict(change_case=shifted)),
    "the final state's cotangent ignored": (
        *LENGTHS,
        "dv",
        dict(change_case=without_final_cotangent, gradients=True),
    ),
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """The kernels' cases (K = V, so that a transposed state has a shape that fits), but small."""

    def for_kernels(case, implementation):
        assert implementation == "cuda"
        return cases.dataclasses.replace(case, H=1, HV=2, K=16, V=16, dtype="bfloat16")

    for module in (test_kda, test_segments):
        monkeypatch.setattr(module, "for_implementation", for_kernels)
    return monkeypatch


@pytest.mark.parametrize("name", MUTATIONS)
def test_is_caught(name, small):
    module, test, wrong, mistake = MUTATIONS[name]
    small.setattr(module, "run", stand_in(**mistake))
    with pytest.raises(AssertionError, match=f"(?m)^{wrong}: "):
        test()


@pytest.mark.parametrize("module, test", [LENGTHS, LAYOUTS], ids=["lengths", "layouts"])
def test_nothing_is_caught_without_a_mistake(module, test, small):
    small.setattr(module, "run", stand_in(gradients=module is test_kda))
    test()


def test_a_mistake_stays_in_its_copy():
    """The peer is no other one afterwards: programs are kept, and mistakes have their own."""
    case = cases.Case(T=17, H=1, HV=2, K=16, V=16, dtype="bfloat16", final_state=True)
    peer = lambda: oracle.evaluate_arrays(case, case.arrays(), "peer")["final_state"]
    before = peer()
    wrong = stand_in(**MUTATIONS["a transposed state"][3])(case, "cuda")["final_state"]
    assert not np.allclose(wrong, before, rtol=0.1)
    np.testing.assert_array_equal(peer(), before)


def test_the_named_tests_call_what_is_replaced():
    assert test_kda.run is call.run and test_segments.run is call.run
