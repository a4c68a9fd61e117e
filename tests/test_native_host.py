"""The native code that runs before any kernel: checks, sizes, and how handlers read XLA's buffers.

No GPU: the checks and the workspace arithmetic are compiled by themselves under the undefined
behaviour sanitizer, and the handlers run through XLA on the CPU in a form that stops before the
launch.
"""

import functools
import itertools
import pathlib
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import extension
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).parent.parent

# A valid call, in the order in which native_host.cc reads it.
ADDRESSES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "segment_ids", "o")
ADDRESSES += ("final_state", "chunk_states", "workspace", "d_o", "d_final_state")
ADDRESSES += ("dq", "dk", "dv", "dg", "d_beta", "dA_log", "d_dt_bias", "d_initial_state")
STAGES = ("forward", "backward")
F32, BF16, F16 = 0, 1, 2
LOG_DECAY, SOFTPLUS, BOUNDED = 0, 1, 2
VALID = (
    dict(B=2, T=65, H=2, HV=4, K=128, V=128, N=1, has_segment_ids=0)
    | dict(qkv_dtype=BF16, g_dtype=F32, beta_dtype=BF16)
    | dict(gate=LOG_DECAY, gate_lower_bound=-5.0, beta_is_logits=0, allow_neg_eigval=0, scale=0.1)
    | {f"{name}_at": 4096 * (i + 1) for i, name in enumerate(ADDRESSES)}
    | dict(A_log_at=0, dt_bias_at=0, segment_ids_at=0, dA_log_at=0, d_dt_bias_at=0)
)
NOTHING = {  # no operand has elements
    f"{name}_at": 0
    for name in ("q", "k", "v", "g", "beta", "o", "workspace")
    + ("d_o", "dq", "dk", "dv", "dg", "d_beta")
}


# A valid step, likewise.
STEP_ADDRESSES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state_indices", "state", "o")
STEP_ADDRESSES += ("token_states",)
VALID_STEP = (
    dict(N=3, T=2, H=2, HV=4, K=128, V=128, slots=7)
    | dict(qkv_dtype=BF16, g_dtype=F16, beta_dtype=F32, state_dtype=F32)
    | dict(gate=LOG_DECAY, gate_lower_bound=-5.0, beta_is_logits=0, allow_neg_eigval=0, scale=0.1)
    | {f"{name}_at": 4096 * (i + 1) for i, name in enumerate(STEP_ADDRESSES)}
    | dict(A_log_at=0, dt_bias_at=0)
)

# A valid short convolution, and its step.
CONV_ADDRESSES = ("x", "kernel", "bias", "initial_state", "segment_ids", "y", "d_y", "dx")
CONV_ADDRESSES += ("d_kernel", "d_bias", "d_initial_state", "workspace")
VALID_CONV = dict(B=2, T=65, C=256, N=3, dtype=BF16) | {
    f"{name}_at": 4096 * (i + 1) for i, name in enumerate(CONV_ADDRESSES)
}
CONV_STEP_ADDRESSES = ("x", "kernel", "bias", "state_indices", "state", "y")
VALID_CONV_STEP = (
    dict(N=3, T=2, C=256, slots=7)
    | dict(dtype=BF16, kernel_dtype=F32, state_dtype=F16)
    | {f"{name}_at": 4096 * (i + 1) for i, name in enumerate(CONV_STEP_ADDRESSES)}
)
VALID_CALLS = dict(
    step=VALID_STEP,
    short_conv=VALID_CONV,
    short_conv_backward=VALID_CONV,
    short_conv_step=VALID_CONV_STEP,
)


class HostProgram:
    """native_host.cc, compiled once; `ask` sends it a call and returns its answer."""

    def __init__(self, folder):
        listed = (ROOT / "cuda" / "sources.cmake").read_text()
        names = re.search(r"JAX_FLASHKDA_HOST_SOURCES[^\n]*\n(.*?)\)", listed, re.DOTALL)[1].split()
        program = folder / "native_host"
        command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
        command += ["-fsanitize=undefined", "-fno-sanitize-recover=all", f"-I{ROOT / 'cuda'}"]
        command += [ROOT / "tests" / "native_host.cc", *(ROOT / "cuda" / name for name in names)]
        subprocess.run([*command, "-o", program], check=True, timeout=300)
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, stage="forward", **changes):
        valid = VALID_CALLS.get(stage, VALID)
        call = valid | changes
        assert call.keys() == valid.keys()
        print(stage, *call.values(), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the program ended: undefined behaviour, see its output"
        bytes_, _, message = answer.rstrip("\n").partition(" ")
        return int(bytes_), message

    def close(self):
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = HostProgram(tmp_path_factory.mktemp("native_host"))
    yield program
    program.close()


# Checks

# What can be wrong with a call, and what the message must then say. Faults of a group exclude each
# other.
FAULTS = {
    "B": [(dict(B=-1), "B is -1, must not be negative")],
    "heads": [
        (dict(HV=3), "HV is 3, must be a positive multiple of H = 2"),
        (dict(HV=0), "HV is 0"),
    ],
    "slots": [(dict(N=2), "N is 2, must be 1 without segment_ids"), (dict(N=-1), "N is -1")],
    "g": [(dict(g_dtype=F16), "g is f16, the kernels take"), (dict(g_at=0), "g is missing")],
    "beta": [
        (dict(beta_dtype=F16), "beta is f16, the kernels take"),
        (dict(beta_at=2), "beta is not"),
    ],
    "gate": [
        (dict(gate=3), "gate is 3, must be 0 (log_decay), 1 (softplus) or 2 (bounded)"),
        (dict(gate=-1), "gate is -1"),
        (dict(A_log_at=4096), "A_log was given, but gate log_decay reads none"),
        (dict(dt_bias_at=4096), "dt_bias was given, but gate log_decay reads none"),
        (dict(gate=SOFTPLUS), "A_log is missing: gate softplus needs it"),
        (
            dict(gate=BOUNDED, gate_lower_bound=-5.5),
            "gate_lower_bound is -5.5, must lie in [-5, 0)",
        ),
        (dict(gate=BOUNDED, gate_lower_bound=0.0), "gate_lower_bound is 0, must lie in [-5, 0)"),
        (dict(gate=BOUNDED, gate_lower_bound="nan"), "gate_lower_bound is nan"),
    ],
    "eigval": [(dict(allow_neg_eigval=1), "allow_neg_eigval needs beta_is_logits")],
    "scale": [(dict(scale="nan"), "scale is nan"), (dict(scale="-inf"), "scale is -inf")],
    "segment_ids": [(dict(segment_ids_at=4096), "segment_ids was given")],
} | {
    name: [
        (dict([(f"{name}_at", 0)]), f"{name} is missing"),
        (dict([(f"{name}_at", 4096 + 8)]), f"{name} is not aligned to 16 bytes"),
    ]
    for name in ("q", "k", "v", "workspace")
}
INITIAL_STATE_FAULT = (dict(initial_state_at=8), "initial_state is not aligned to 16 bytes")


def missing_or_unaligned(names):
    return [
        fault
        for name in names
        for fault in (
            (dict([(f"{name}_at", 0)]), f"{name} is missing"),
            (dict([(f"{name}_at", 4096 + 8)]), f"{name} is not aligned to 16 bytes"),
        )
    ]


STAGE_FAULTS = dict(
    forward=[
        *missing_or_unaligned(["o"]),
        (dict(final_state_at=8), "final_state is not aligned to 16 bytes"),
        (dict(chunk_states_at=8), "chunk_states is not aligned to 16 bytes"),
    ],
    backward=[
        *missing_or_unaligned(["d_o", "dq", "dk", "dv", "dg", "d_initial_state"]),
        (dict(d_beta_at=0), "d_beta is missing"),
        (dict(d_beta_at=2), "d_beta is not aligned to 4 bytes"),
        (dict(d_final_state_at=8), "d_final_state is not aligned to 16 bytes"),
        (dict(initial_state_at=0), "d_initial_state was asked for, but the call has no such"),
        (dict(dA_log_at=4096), "dA_log was asked for, but the call has no such operand"),
        (dict(d_dt_bias_at=4096), "d_dt_bias was asked for, but the call has no such operand"),
        (dict(gate=SOFTPLUS, A_log_at=4096), "dA_log is missing"),
    ],
)


@pytest.mark.parametrize("stage", STAGES)
def test_a_valid_call_passes(host, stage):
    assert host.ask(stage)[1] == ""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "changes",
    [
        dict(T=0) | NOTHING,
        dict(B=0) | NOTHING,
        dict(B=0, initial_state_at=0) | NOTHING,
        dict(initial_state_at=0, final_state_at=0, d_initial_state_at=0, d_final_state_at=0),
        dict(chunk_states_at=0),
        dict(has_segment_ids=1, N=0, segment_ids_at=4),
        dict(has_segment_ids=1, N=7, segment_ids_at=4096),
        dict(gate=SOFTPLUS, A_log_at=4, dt_bias_at=16, dA_log_at=4, d_dt_bias_at=16),
        dict(gate=BOUNDED, gate_lower_bound=-1.5),
        dict(beta_is_logits=1, allow_neg_eigval=1),
        dict(scale=0.0),
        dict(scale=-2.0),
        dict(HV=2),
    ],
)
def test_other_valid_calls_pass(host, changes, stage):
    assert host.ask(stage, **changes)[1] == ""


@pytest.mark.parametrize(
    "stage, changes, text",
    [
        (stage, *fault)
        for stage in STAGES
        for fault in (
            *itertools.chain(*FAULTS.values()),
            INITIAL_STATE_FAULT,
            *STAGE_FAULTS[stage],
        )
    ],
    ids=lambda x: str(x),
)
def test_each_fault_is_refused_by_name(host, stage, changes, text):
    message = host.ask(stage, **changes)[1]
    assert message.startswith(f"jax_flashkda.{stage}: ")
    assert text in message


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("changes", [dict(K=64), dict(V=64), dict(qkv_dtype=F32), dict(K=0)])
def test_a_call_without_a_kernel_learns_which_there_are(host, changes, stage):
    message = host.ask(stage, **changes)[1]
    assert "has no kernel (compiled: K = 128, V = 128 with q, k, v in bf16" in message


@given(data=st.data(), stage=st.sampled_from(STAGES))
@settings(max_examples=300, deadline=None)
def test_all_faults_of_a_call_are_told_at_once(host, data, stage):
    groups = data.draw(st.sets(st.sampled_from(sorted(FAULTS)), min_size=1))
    chosen = [data.draw(st.sampled_from(FAULTS[group])) for group in sorted(groups)]
    changes = {}
    for change, _ in chosen:
        changes |= change
    if "B" in groups:  # without rows no operand has to be there
        chosen = [(change, text) for change, text in chosen if "missing" not in text]
    message = host.ask(stage, **changes)[1]
    for _, text in chosen:
        assert text in message, (changes, message)


@given(
    sizes=st.fixed_dictionaries({name: st.integers(-(2**63), 2**63 - 1) for name in "BTHNKV"}),
    heads=st.integers(-(2**63), 2**63 - 1),
    has_segment_ids=st.booleans(),
    stage=st.sampled_from(STAGES),
)
@settings(max_examples=300, deadline=None)
def test_no_size_is_too_large_to_be_refused(host, sizes, heads, has_segment_ids, stage):
    """The sanitizer ends the program where the checks themselves overflow."""
    message = host.ask(stage, **sizes, HV=heads, has_segment_ids=int(has_segment_ids))[1]
    assert message


# The decode step

STEP_FAULTS = [
    (dict(N=-1), "N is -1, must not be negative"),
    (dict(T=0), "T is 0, must lie in [1, 8]"),
    (dict(T=9), "T is 9, must lie in [1, 8]"),
    (dict(H=0), "H is 0, must be positive"),
    (dict(HV=3), "HV is 3, must be a positive multiple of H = 2"),
    (dict(slots=-1), "slots is -1"),
    (dict(state_indices_at=0), "slots is 7, must be N = 3 without state_indices"),
    (dict(N=2**27, HV=2), "must be below 2^28: split the batch"),
    (dict(K=64), "K = 64, V = 128 has no kernel (compiled: K = 128, V = 128 or K = 64, V = 64)"),
    (dict(state_dtype=F16), "state is f16, the kernels take f32, bf16"),
    (dict(qkv_dtype=9), "q, k, v are unknown type, the kernels take bf16, f16, f32"),
    (dict(gate=SOFTPLUS), "A_log is missing"),
    (dict(dt_bias_at=4096), "dt_bias was given, but gate log_decay reads none"),
    (dict(gate=BOUNDED, gate_lower_bound=1), "gate_lower_bound is 1, must lie in [-5, 0)"),
    (dict(allow_neg_eigval=1), "allow_neg_eigval needs beta_is_logits"),
    (dict(scale="nan"), "scale is nan"),
    (dict(state_at=8), "state is not aligned to 16 bytes"),
    (dict(token_states_at=8), "token_states is not aligned to 16 bytes"),
    *missing_or_unaligned(["q", "k", "v", "g", "state", "o"]),
]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(K=64, V=64, state_dtype=BF16),
        dict(state_indices_at=0, slots=3),
        dict(token_states_at=0),
        dict(slots=0, state_at=0),
        dict(N=0) | {f"{name}_at": 0 for name in ("q", "k", "v", "g", "beta", "state", "o")},
        dict(N=0, gate=SOFTPLUS),
        dict(N=2**26 - 1),
    ],
)
def test_valid_steps_pass(host, changes):
    assert host.ask("step", **changes)[1] == ""


@pytest.mark.parametrize("changes, text", STEP_FAULTS, ids=str)
def test_each_fault_of_a_step_is_refused_by_name(host, changes, text):
    message = host.ask("step", **changes)[1]
    assert message.startswith("jax_flashkda.step: ")
    assert text in message


def test_all_faults_of_a_step_are_told_at_once(host):
    message = host.ask("step", T=9, HV=3, scale="nan", q_at=8)[1]
    assert all(text in message for text in ("T is 9", "HV is 3", "scale is nan", "q is not"))


@given(
    sizes=st.fixed_dictionaries(
        {name: st.integers(-(2**63), 2**63 - 1) for name in ("N", "T", "H", "HV", "K", "slots")}
    ),
)
@settings(max_examples=300, deadline=None)
def test_no_size_of_a_step_is_too_large_to_be_refused(host, sizes):
    assert host.ask("step", **sizes)[1]


# Workspace

SIZES = st.fixed_dictionaries(
    dict(
        B=st.integers(0, 64),
        T=st.integers(0, 2**18),
        H=st.integers(1, 8),
        HV=st.integers(1, 8),
        N=st.integers(0, 4096),
        has_segment_ids=st.booleans(),
    )
)


def ask_sizes(host, sizes, stage):
    segments = sizes["has_segment_ids"]
    return host.ask(
        stage,
        **sizes
        | dict(HV=sizes["H"] * sizes["HV"], has_segment_ids=int(segments))
        | dict(N=sizes["N"] if segments else 1),
    )


def workspace_bytes(host, sizes, stage="forward"):
    """Without the maps of pieces: of those there are fewer where there are more heads or rows."""
    count = ask_sizes(host, sizes, "pieces")[0]
    maps = sizes["B"] * sizes["H"] * sizes["HV"] * (count - 1) * 2 * 128 * 128 * 4
    return ask_sizes(host, sizes, stage)[0] - maps


@given(
    sizes=SIZES,
    axis=st.sampled_from(["B", "T", "H", "HV", "N"]),
    more=st.integers(1, 100),
    stage=st.sampled_from(STAGES),
)
@settings(max_examples=300, deadline=None)
def test_workspace_grows_with_every_size(host, sizes, axis, more, stage):
    bytes_ = workspace_bytes(host, sizes, stage)
    assert bytes_ % 1024 == 0
    grown = workspace_bytes(host, sizes | {axis: sizes[axis] + more}, stage)
    assert grown >= bytes_
    packed = workspace_bytes(host, sizes | dict(N=sizes["N"] + 1, has_segment_ids=True), stage)
    assert packed >= workspace_bytes(host, sizes | dict(has_segment_ids=False), stage)


@given(sizes=SIZES)
@settings(max_examples=200, deadline=None)
def test_workspace_is_counted_in_64_bits(host, sizes):
    """Of twice the rows it is twice as much, up to rounding: also past 2^31 and 2^32 bytes."""
    rounding = 64 * 1024
    one, two = (workspace_bytes(host, sizes | dict(B=n * sizes["B"])) for n in (1, 2))
    assert abs(two - 2 * one) <= rounding


def test_workspace_holds_what_the_formula_needs(host):
    """At least each chunk's inverse, [C, C] in bf16; not ten times q, k, v, g and o in bf16."""
    sizes = dict(B=3, T=131_200, H=64, HV=1, N=1, has_segment_ids=False)
    tokens = 3 * 131_200 * 64
    assert tokens * 64 * 2 <= workspace_bytes(host, sizes) <= 10 * tokens * 5 * 128 * 2


def test_the_backward_fits_beside_a_large_batch(host):
    """8,192 tokens of 96 heads: nine times the bytes of one operand in bf16, and a little."""
    sizes = dict(B=1, T=8192, H=96, HV=1, N=1, has_segment_ids=False)
    operand = 8192 * 96 * 128 * 2
    assert 9 * operand <= workspace_bytes(host, sizes, "backward") <= 9.2 * operand


@given(sizes=SIZES)
@settings(max_examples=200, deadline=None)
def test_the_backward_contains_the_forward(host, sizes):
    assert workspace_bytes(host, sizes, "backward") >= workspace_bytes(host, sizes)


@given(sizes=SIZES)
@settings(max_examples=500, deadline=None)
def test_pieces_cover_a_row(host, sizes):
    """Whole chunks each, the last one not empty, and no more of them than a device can run at once:
    132 multiprocessors.
    """
    count, tokens = ask_sizes(host, sizes, "pieces")
    tokens, T = int(tokens), sizes["T"]
    if count == 1:
        assert tokens == T
        return
    assert not sizes["has_segment_ids"]
    assert tokens % 64 == 0 and (count - 1) * tokens < T <= count * tokens
    assert count * sizes["B"] * sizes["H"] * sizes["HV"] <= 132


def test_pieces_are_for_long_rows_of_few_heads(host):
    def count(**sizes):
        return ask_sizes(host, dict(B=1, HV=1, N=1, has_segment_ids=False) | sizes, "pieces")[0]

    assert count(T=65_536, H=8) == 16 and count(T=32_768, H=8) == 16
    assert count(T=32_768, H=16) == 1  # the state stage beside chunk_prepare is faster
    assert count(T=8192, H=96) == 1 and count(T=2048, H=12) == 1
    assert count(T=65_536, H=8, has_segment_ids=True) == 1


def overlap(host, sizes):
    """Multiprocessors of the state stage, tracks side by side, CTAs of a track."""
    processors, rest = ask_sizes(host, sizes, "overlap")
    tracks, half_heads = map(int, rest.split())
    return processors, tracks, 1 + half_heads


@given(sizes=SIZES)
@settings(max_examples=500, deadline=None)
def test_overlapped_stages_share_the_device(host, sizes):
    processors, tracks, ctas = overlap(host, sizes)
    if processors == 0:
        return
    assert ask_sizes(host, sizes, "pieces")[0] == 1
    heads = sizes["H"] * sizes["HV"] * (1 if sizes["has_segment_ids"] else sizes["B"])
    assert 1 <= tracks <= heads and processors == tracks * ctas <= 66


def test_stages_overlap_where_that_was_faster(host):
    """As measured on an H200."""

    def of(**sizes):
        return overlap(host, dict(B=1, HV=1, N=1, has_segment_ids=False) | sizes)

    serial = (0, 0, 1)
    assert of(T=8192, H=96) == (48, 48, 1)
    assert of(T=4096, H=32, B=4) == (44, 44, 1)
    assert of(T=8192, H=32) == (32, 32, 1)
    assert of(T=8192, H=96, N=6, has_segment_ids=True) == (48, 48, 1)
    assert of(T=32_768, H=16) == (32, 16, 2)
    assert of(T=2048, H=12) == (24, 12, 2)
    assert of(T=512, H=32) == serial
    assert of(T=65_536, H=8) == serial  # in pieces
    assert of(T=8192, H=32, N=256, has_segment_ids=True) == serial
    assert of(T=65_536, H=32, N=4096, has_segment_ids=True) == serial


@pytest.mark.parametrize("stage", STAGES)
def test_the_module_counts_the_same(host, stage):
    module = extension()
    for B, T, HV, N, has_segment_ids in [(1, 1, 2, 1, 0), (2, 65, 4, 1, 0), (3, 8192, 96, 33, 1)]:
        sizes = dict(B=B, T=T, H=2, HV=HV, K=128, V=128, N=N, has_segment_ids=has_segment_ids)
        count = getattr(module, f"{stage}_workspace_bytes")
        assert (
            count(**sizes | dict(has_segment_ids=bool(has_segment_ids)))
            == (host.ask(stage, **sizes)[0])
        )


# Handlers: through XLA, on the CPU

B, T, H, HV, K, V, N = 2, 130, 2, 4, 128, 128, 3
OPERANDS = {
    "q": ((B, T, H, K), "bfloat16"),
    "k": ((B, T, H, K), "bfloat16"),
    "v": ((B, T, HV, V), "bfloat16"),
    "g": ((B, T, HV, K), "float32"),
    "beta": ((B, T, HV), "bfloat16"),
    "A_log": ((B, HV), "float32"),
    "dt_bias": ((B, HV, K), "float32"),
    "initial_state": ((B, N, HV, K, V), "float32"),
    "segment_ids": ((B, T), "int32"),
}
RESULTS = {"o": ((B, T, HV, V), "bfloat16"), "final_state": ((B, N, HV, K, V), "float32")}
CHUNK_STATES = {"chunk_states": ((B, 2, HV, K, V), "float32")}
GRADIENTS = dict(q="dq", k="dk", v="dv", g="dg", beta="d_beta", A_log="dA_log")
GRADIENTS |= dict(dt_bias="d_dt_bias", initial_state="d_initial_state")
# Each stage's operands and results by name.
CALLS = dict(
    forward=(OPERANDS, RESULTS | CHUNK_STATES),
    backward=(
        OPERANDS | {f"d_{name}": spec for name, spec in RESULTS.items()},
        {gradient: OPERANDS[name] for name, gradient in GRADIENTS.items()},
    ),
)
# One state slot, and of states what the stage alone has.
STATE_MAPS = {name: spec for name, spec in OPERANDS.items() if name != "initial_state"}
MAPS = {"factor": ((B, HV, K, K), "float32"), "offset": ((B, HV, K, V), "float32")}


def prepared(slots):
    """Of three chunks a row, and a decay for each of its slots besides."""
    return {
        "prepared": ((B, HV, T, 1024), "uint8"),
        "betas": ((B, HV, T, 4), "float32"),
        "decays": ((B, HV, 3 + slots, K), "float32"),
    }


CALLS["state_maps"] = (STATE_MAPS, MAPS | prepared(1))
CALLS["state_gradient"] = (
    CALLS["backward"][0], {"d_initial_state": OPERANDS["initial_state"]} | prepared(N)
)  # fmt: skip
CALLS["prepared_forward"] = (OPERANDS | prepared(N), RESULTS)
CALLS["prepared_backward"] = (CALLS["backward"][0] | prepared(N), CALLS["backward"][1])
ATTRIBUTES = dict(
    gate=np.int32(SOFTPLUS),
    gate_lower_bound=np.float32(-5),
    beta_is_logits=np.bool_(True),
    allow_neg_eigval=np.bool_(True),
    qk_l2norm=np.bool_(True),
    scale=np.float32(0.1),
    has_padding_segment_id=np.bool_(True),
    padding_segment_id=np.int32(0),
    max_segments=np.int64(N),
    has_A_log=np.bool_(True),
    has_dt_bias=np.bool_(True),
    has_initial_state=np.bool_(True),
    has_segment_ids=np.bool_(True),
    return_final_state=np.bool_(True),
)
STAGE_ATTRIBUTES = dict.fromkeys(CALLS, ATTRIBUTES) | {
    "forward": ATTRIBUTES | dict(return_chunk_states=np.bool_(True)),
    "state_maps": ATTRIBUTES
    | dict(
        max_segments=np.int64(1),
        has_initial_state=np.bool_(False),
        return_final_state=np.bool_(False),
    ),
}
# Whose workspace a stage needs, and its slots.
WORKSPACES = {"state_maps": ("prepared_forward", 1), "state_gradient": ("prepared_forward", N)}


@functools.cache
def checking_targets():
    registrations = extension().checking_registrations()
    for name, stages in registrations.items():
        jax.ffi.register_ffi_target(f"{name}.check", stages, platform="cpu")
    return {name.removeprefix("jax_flashkda."): f"{name}.check" for name in registrations}


def needed_bytes(stage):
    stage, slots = WORKSPACES.get(stage, (stage, N))
    return getattr(extension(), f"{stage}_workspace_bytes")(B, T, H, HV, K, V, slots, True)


def call_handler(operands=None, results=None, workspace=None, stage="forward", **attributes):
    """Compiles and runs the call on the CPU; the handler's error is raised as JAX does."""
    target = checking_targets()[stage]
    operands = CALLS[stage][0] if operands is None else operands
    results = CALLS[stage][1] if results is None else results
    if workspace is None:
        workspace = ((needed_bytes(stage),), "uint8")
    out = [jax.ShapeDtypeStruct(*spec) for spec in [*results.values(), workspace]]
    attributes = STAGE_ATTRIBUTES[stage] | attributes
    attributes = {name: x for name, x in attributes.items() if x is not None}

    def program():
        arrays = [jnp.zeros(*spec) for spec in operands.values()]
        return jax.ffi.ffi_call(target, out)(*arrays, **attributes)

    return jax.block_until_ready(jax.jit(program)())


def refusal(*args, stage="forward", **kwargs):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        call_handler(*args, stage=stage, **kwargs)
    message = str(caught.value)
    assert message.startswith(f"INVALID_ARGUMENT: jax_flashkda.{stage}: ")
    return message


def without(specs, *names):
    return {name: spec for name, spec in specs.items() if name not in names}


@pytest.mark.parametrize("stage", CALLS)
def test_handler_takes_a_valid_call(stage):
    call_handler(stage=stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("absent", ["initial_state", "dt_bias", "segment_ids", "final_state"])
def test_handler_takes_calls_without_optional_operands(absent, stage):
    attribute = "return_final_state" if absent == "final_state" else f"has_{absent}"
    absent_names = (absent, f"d_{absent}")
    operands, results = (without(specs, *absent_names) for specs in CALLS[stage])
    attributes = {attribute: np.bool_(False)}
    if absent == "segment_ids":
        attributes["max_segments"] = np.int64(1)
        for specs in (operands, results):
            for name in specs:
                if name.endswith("_state"):
                    specs[name] = ((B, 1, HV, K, V), "float32")
    call_handler(operands, results, stage=stage, **attributes)


def test_handler_takes_calls_without_chunk_states():
    call_handler(results=RESULTS, return_chunk_states=np.bool_(False))
    assert "chunk_states is uint8" in refusal(results=RESULTS)
    assert "workspace is float32" in refusal(return_chunk_states=np.bool_(False))


@pytest.mark.parametrize(
    "stage, name", [(stage, name) for stage in CALLS for specs in CALLS[stage] for name in specs]
)
@pytest.mark.parametrize("fault", ["rank", "dimension", "dtype"])
def test_handler_holds_every_operand_against_the_others(stage, name, fault):
    operands, results = CALLS[stage]
    shape, dtype = (operands | results)[name]
    faulty = {
        "rank": ((1, *shape), dtype),
        "dimension": ((*shape[:1], shape[1] + 1, *shape[2:]), dtype),
        "dtype": (shape, "uint32"),
    }[fault]
    operands, results = (
        {k: faulty if k == name else v for k, v in specs.items()} for specs in (operands, results)
    )
    message = refusal(operands, results, stage=stage)
    blamed = re.match(r"\S+ \S+ (\w+) (has|is) ", message)[1]
    # The others are held against the dimensions of q, so of a wrong one k is the first to differ.
    assert blamed == ("k" if (name, fault) == ("q", "dimension") else name)


@pytest.mark.parametrize("name", ["dq", "dk", "dv", "dg", "d_beta"])
def test_handler_holds_a_gradient_against_its_operand(name):
    shape, dtype = CALLS["backward"][1][name]
    other = (shape, "float16" if dtype == "bfloat16" else "bfloat16")
    message = refusal(results=CALLS["backward"][1] | {name: other}, stage="backward")
    assert f"{name} has another dtype than what it is the gradient of" in message


@pytest.mark.parametrize(
    "stage, name", [(stage, name) for stage in CALLS for name in sorted(STAGE_ATTRIBUTES[stage])]
)
def test_handler_refuses_missing_and_mistyped_attributes(name, stage):
    assert f"attribute {name}: " in refusal(stage=stage, **{name: None})
    assert f"attribute {name}: " in refusal(stage=stage, **{name: np.float64(1)})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["A_log", "dt_bias", "initial_state", "segment_ids"])
def test_handler_refuses_operands_that_contradict_the_attributes(name, stage):
    refusal(without(CALLS[stage][0], name), stage=stage)
    refusal(stage=stage, **{f"has_{name}": np.bool_(False)})


@pytest.mark.parametrize("stage", CALLS)
def test_handler_refuses_what_nobody_reads(stage):
    operands, results = CALLS[stage]
    n, m = len(operands), len(results) + 1
    known = len(STAGE_ATTRIBUTES[stage])
    message = refusal(stage=stage, chunk=np.int32(64))
    assert f"got {known + 1} attributes, expected {known}" in message
    more = operands | {"more": ((3,), "float32")}
    assert f"got {n + 1} operands, expected {n}" in refusal(more, stage=stage)
    more = results | {"w": ((2**30,), "uint8")}
    message = refusal(results=more, workspace=((1,), "uint8"), stage=stage)
    assert f"got {m + 1} results, expected {m}" in message


@pytest.mark.parametrize("stage", CALLS)
def test_handler_refuses_a_small_workspace(stage):
    needed = needed_bytes(stage)
    message = refusal(workspace=((needed - 1,), "uint8"), stage=stage)
    assert f"workspace has {needed - 1} bytes, expected {needed}" in message
    assert "lowered by another version" in message


@pytest.mark.parametrize("stage", STAGES)
def test_handler_applies_the_native_checks(stage):
    assert "scale is inf" in refusal(stage=stage, scale=np.float32(np.inf))
    assert "gate is 3" in refusal(stage=stage, gate=np.int32(3))
    assert "gate is -1" in refusal(stage=stage, gate=np.int32(-1))
    names = ("initial_state", "final_state", "d_initial_state", "d_final_state")
    stateless = [without(specs, *names) for specs in CALLS[stage]]
    absent = dict(has_initial_state=np.bool_(False), return_final_state=np.bool_(False))
    call_handler(*stateless, stage=stage, **absent)
    assert "N is -1" in refusal(*stateless, stage=stage, **absent, max_segments=np.int64(-1))


@pytest.mark.parametrize("stage", CALLS)
def test_a_valid_call_works_after_a_refused_one(stage):
    refusal(stage=stage, gate=np.int32(3))
    call_handler(stage=stage)


def test_handlers_of_a_shard_refuse_states_that_they_do_not_have():
    state = {"initial_state": ((B, 1, HV, K, V), "float32")}
    operands = {name: (STATE_MAPS | state)[name] for name in OPERANDS}
    message = refusal(operands, stage="state_maps", has_initial_state=np.bool_(True))
    assert "initial_state is not an operand of it" in message
    message = refusal(stage="state_maps", return_final_state=np.bool_(True))
    assert "final_state is not a result of it" in message
    operands = without(CALLS["state_gradient"][0], "initial_state")
    message = refusal(operands, stage="state_gradient", has_initial_state=np.bool_(False))
    assert "initial_state is missing" in message


# The step's handler

N_STEP = 3
STEP_OPERANDS = {
    "q": ((N_STEP, 2, H, K), "bfloat16"),
    "k": ((N_STEP, 2, H, K), "bfloat16"),
    "v": ((N_STEP, 2, HV, V), "bfloat16"),
    "g": ((N_STEP, 2, HV, K), "float32"),
    "beta": ((N_STEP, 2, HV), "bfloat16"),
    "A_log": ((1, HV), "float32"),
    "dt_bias": ((1, HV, K), "float32"),
    "state": ((7, HV, K, V), "bfloat16"),
    "state_indices": ((N_STEP,), "int32"),
}
STEP_RESULTS = {
    "o": ((N_STEP, 2, HV, V), "bfloat16"),
    "state": ((7, HV, K, V), "bfloat16"),
    "token_states": ((N_STEP, 2, HV, K, V), "bfloat16"),
}
STEP_ATTRIBUTES = {
    name: ATTRIBUTES[name]
    for name in ("gate", "gate_lower_bound", "beta_is_logits", "allow_neg_eigval")
    + ("qk_l2norm", "scale", "has_A_log", "has_dt_bias")
} | {
    name: np.bool_(value)
    for name, value in dict(
        has_state_indices=True, return_token_states=True, parameters_per_sequence=False
    ).items()
}


def call_step_handler(operands=None, results=None, in_place=True, **attributes):
    operands, results = STEP_OPERANDS | (operands or {}), STEP_RESULTS | (results or {})
    operands = {name: spec for name, spec in operands.items() if spec is not None}
    results = {name: spec for name, spec in results.items() if spec is not None}
    out = [jax.ShapeDtypeStruct(*spec) for spec in results.values()]
    aliases = {list(operands).index("state"): 1} if in_place else {}
    attributes = STEP_ATTRIBUTES | attributes

    def program():
        arrays = [jnp.zeros(*spec) for spec in operands.values()]
        call = jax.ffi.ffi_call(checking_targets()["step"], out, input_output_aliases=aliases)
        return call(*arrays, **attributes)

    return jax.block_until_ready(jax.jit(program)())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(results=dict(token_states=None), return_token_states=np.bool_(False)),
        dict(
            operands=dict(A_log=((N_STEP, HV), "float32"), dt_bias=((N_STEP, HV, K), "float32")),
            parameters_per_sequence=np.bool_(True),
        ),
        dict(
            operands=dict(state_indices=None, state=((N_STEP, HV, K, V), "bfloat16")),
            results=dict(state=((N_STEP, HV, K, V), "bfloat16")),
            has_state_indices=np.bool_(False),
        ),
    ],
    ids=["all", "no token states", "parameters per sequence", "no pool"],
)
def test_the_step_handler_takes(changes):
    call_step_handler(**changes)


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(in_place=False), "state is not updated in place"),
        (dict(operands=dict(A_log=((N_STEP, HV), "float32"))), "A_log has shape [3, 4], expected"),
        (dict(operands=dict(state_indices=((N_STEP,), "float32"))), "state_indices is float32"),
        (dict(operands=dict(state_indices=((4,), "int32"))), "state_indices has shape [4]"),
        (dict(operands=dict(state_indices=None)), "state_indices is missing from the operands"),
        (dict(results=dict(token_states=None)), "token_states is missing from the results"),
        (dict(results=dict(o=((N_STEP, 2, HV, V), "float32"))), "o has another dtype than v"),
        (dict(return_token_states=np.bool_(False)), "got 3 results, expected 2"),
        (dict(operands=dict(k=((N_STEP, 1, H, K), "bfloat16"))), "k has shape [3, 1, 2, 128]"),
        (dict(operands=dict(extra=((1,), "float32"))), "got 10 operands, expected 9"),
        (dict(unknown=np.int32(1)), "got 12 attributes, expected 11"),
        (dict(scale=np.float32("nan")), "jax_flashkda.step: scale is nan"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_the_step_handler_refuses(changes, text):
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(text)):
        call_step_handler(**changes)


# The short convolution

CONV_STAGES = ("short_conv", "short_conv_backward", "short_conv_step")
CONV_FAULTS = [
    (CONV_STAGES[:2], dict(B=-1), "B is -1, must not be negative"),
    (CONV_STAGES[:2], dict(T=-1), "T is -1"),
    (CONV_STAGES[:2], dict(dtype=F16), "x is f16, the kernels take bf16, f32"),
    (CONV_STAGES[:2], dict(segment_ids_at=0), "N is 3, must be 1 without segment_ids"),
    (CONV_STAGES[:2], dict(segment_ids_at=2), "segment_ids is not aligned to 4 bytes"),
    (CONV_STAGES[:2], dict(B=2**20, T=2**10), "is 1048576 * 1024 * 2, must be below 2^31"),
    (CONV_STAGES, dict(C=252), "there are 252 channels, must be a positive multiple of 8"),
    (CONV_STAGES, dict(C=0), "there are 0 channels"),
    (CONV_STAGES, dict(x_at=0), "x is missing"),
    (CONV_STAGES, dict(kernel_at=8), "kernel is not aligned to 16 bytes"),
    (CONV_STAGES, dict(bias_at=8), "bias is not aligned to 16 bytes"),
    (("short_conv", "short_conv_step"), dict(y_at=8), "y is not aligned to 16 bytes"),
    (("short_conv_backward",), dict(d_y_at=0), "d_y is missing"),
    (("short_conv_backward",), dict(dx_at=8), "dx is not aligned to 16 bytes"),
    (("short_conv_backward",), dict(d_bias_at=0), "d_bias is missing"),
    (("short_conv_backward",), dict(bias_at=0), "d_bias was asked for"),
    (("short_conv_backward",), dict(workspace_at=0), "workspace is missing"),
    (("short_conv_step",), dict(T=9), "T is 9, must lie in [1, 8]"),
    (("short_conv_step",), dict(N=-1), "N is -1"),
    (("short_conv_step",), dict(state_indices_at=0), "slots is 7, must be N = 3"),
    (("short_conv_step",), dict(state_at=8), "state is not aligned to 16 bytes"),
    (("short_conv_step",), dict(kernel_dtype=7), "kernel is unknown type"),
    (("short_conv_step",), dict(N=2**31), "must be below 2^31: split the batch"),
]


def test_valid_short_convs_pass(host):
    for stage in CONV_STAGES:
        assert host.ask(stage)[1] == ""
    nothing = {f"{name}_at": 0 for name in ("x", "y", "d_y", "dx", "workspace")}
    for stage in CONV_STAGES[:2]:
        assert host.ask(stage, T=0, **nothing) == (0, "")
    for stage in CONV_STAGES[:2]:
        absent = dict(bias_at=0, d_bias_at=0, initial_state_at=0, d_initial_state_at=0)
        assert host.ask(stage, **absent)[1] == ""


@pytest.mark.parametrize("stages, changes, text", CONV_FAULTS, ids=str)
def test_each_fault_of_a_short_conv_is_refused_by_name(host, stages, changes, text):
    for stage in stages:
        message = host.ask(stage, **changes)[1]
        assert message.startswith(f"jax_flashkda.{stage}: ") and text in message


@given(
    B=st.integers(0, 2**62), T=st.integers(0, 2**62), C=st.integers(1, 2**58), N=st.integers(0, 9)
)
@settings(max_examples=300, deadline=None)
def test_no_size_of_a_short_conv_overflows(host, B, T, C, N):
    """Or the program ends: it is compiled with the undefined behaviour sanitizer."""
    for stage in CONV_STAGES[:2]:
        bytes_, message = host.ask(stage, B=B, T=T, C=8 * C, N=N)
        assert bytes_ == 0 if message else B * max(T, 5) * C < 2**35
    host.ask("short_conv_step", N=B, C=8 * C)


# The short convolution's handlers

CONV_X = ((B, T, H, K), "bfloat16")
CONV_OPERANDS = {
    "x": CONV_X,
    "kernel": ((B, 4, H, K), "float32"),
    "bias": ((B, H, K), "float32"),
    "initial_state": ((B, N, 3, H, K), "float32"),
    "segment_ids": ((B, T), "int32"),
}
CONV_STEP_OPERANDS = {
    "x": ((N_STEP, 2, H, K), "bfloat16"),
    "kernel": ((1, 4, H, K), "float32"),
    "bias": ((1, H, K), "float32"),
    "state": ((7, 3, H, K), "float16"),
    "state_indices": ((N_STEP,), "int32"),
}
CONV_CALLS = dict(
    short_conv=(CONV_OPERANDS, {"y": CONV_X}),
    short_conv_backward=(
        CONV_OPERANDS | {"d_y": CONV_X},
        {"dx": CONV_X}
        | {f"d_{name}": CONV_OPERANDS[name] for name in ("kernel", "bias", "initial_state")},
    ),
    short_conv_step=(
        CONV_STEP_OPERANDS,
        {"y": CONV_STEP_OPERANDS["x"], "state": CONV_STEP_OPERANDS["state"]},
    ),
)
CONV_ATTRIBUTES = dict(silu=np.bool_(True), has_bias=np.bool_(True))
CONV_STEP_ATTRIBUTES = CONV_ATTRIBUTES | dict(
    has_state_indices=np.bool_(True), parameters_per_sequence=np.bool_(False)
)
CONV_ATTRIBUTES |= {name: ATTRIBUTES[name] for name in ("has_initial_state", "has_segment_ids")}
CONV_ATTRIBUTES |= {name: ATTRIBUTES[name] for name in ATTRIBUTES if "padding" in name}
CONV_ATTRIBUTES["max_segments"] = np.int64(N)


def call_conv_handler(stage, changes=None, in_place=True, workspace=None, **attributes):
    """`changes`: other operands and results by name, None to leave one out."""
    operands, results = ({**specs} for specs in CONV_CALLS[stage])
    for name, spec in (changes or {}).items():
        for specs in (operands, results):
            if name in specs:
                specs[name] = spec
    if stage == "short_conv_backward":
        needed = extension().short_conv_workspace_bytes(B, T, H * K)
        results["workspace"] = ((needed if workspace is None else workspace,), "uint8")
    operands, results = (
        {name: spec for name, spec in specs.items() if spec is not None}
        for specs in (operands, results)
    )
    out = [jax.ShapeDtypeStruct(*spec) for spec in results.values()]
    is_step = stage == "short_conv_step"
    aliases = {list(operands).index("state"): 1} if is_step and in_place else {}
    attributes = (CONV_STEP_ATTRIBUTES if is_step else CONV_ATTRIBUTES) | attributes

    def program():
        arrays = [jnp.zeros(*spec) for spec in operands.values()]
        call = jax.ffi.ffi_call(checking_targets()[stage], out, input_output_aliases=aliases)
        return call(*arrays, **attributes)

    return jax.block_until_ready(jax.jit(program)())


def conv_refusal(stage, *args, **kwargs):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        call_conv_handler(stage, *args, **kwargs)
    message = str(caught.value)
    assert message.startswith(f"INVALID_ARGUMENT: jax_flashkda.{stage}: ")
    return message


@pytest.mark.parametrize("stage", CONV_CALLS)
def test_the_short_conv_handlers_take_a_valid_call(stage):
    call_conv_handler(stage)
    call_conv_handler(stage, dict(bias=None, d_bias=None), has_bias=np.bool_(False))
    if stage == "short_conv_step":
        changes = dict(state_indices=None, state=((N_STEP, 3, H, K), "float16"))
        absent = dict(has_state_indices=np.bool_(False))
    else:
        changes = dict(initial_state=None, d_initial_state=None, segment_ids=None)
        absent = dict(has_initial_state=np.bool_(False), has_segment_ids=np.bool_(False))
    call_conv_handler(stage, changes, **absent)


@pytest.mark.parametrize(
    "stage, name",
    [(stage, name) for stage, call in CONV_CALLS.items() for specs in call for name in specs],
)
@pytest.mark.parametrize("fault", ["rank", "dimension", "dtype"])
def test_the_short_conv_handlers_check_every_operand(stage, name, fault):
    operands, results = CONV_CALLS[stage]
    shape, dtype = (operands | results)[name]
    faulty = {
        "rank": ((1, *shape), dtype),
        "dimension": ((*shape[:-1], shape[-1] + 8), dtype),
        "dtype": (shape, "uint32"),
    }[fault]
    blamed = re.match(r"\S+ \S+ (\w+) (has|is) ", conv_refusal(stage, {name: faulty}))[1]
    # The others are held against the dimensions of x, so of a wrong one another differs first.
    other = dict(short_conv_step="y").get(stage, "kernel")
    assert blamed == (other if (name, fault) == ("x", "dimension") else name)


@pytest.mark.parametrize("stage", CONV_CALLS)
def test_the_short_conv_handlers_refuse(stage):
    is_step = stage == "short_conv_step"
    for name in CONV_STEP_ATTRIBUTES if is_step else CONV_ATTRIBUTES:
        assert f"attribute {name}: " in conv_refusal(stage, **{name: np.float64(1)})
    expected = len(CONV_STEP_ATTRIBUTES if is_step else CONV_ATTRIBUTES)
    message = conv_refusal(stage, more=np.int32(0))
    assert f"got {expected + 1} attributes, expected {expected}" in message
    last = list(CONV_CALLS[stage][0])[-1]
    assert f"{last} is missing from the operands" in conv_refusal(stage, {last: None})
    conv_refusal(stage, has_bias=np.bool_(False))
    if is_step:
        assert "state is not updated in place" in conv_refusal(stage, in_place=False)
        names = ("x", "y")
    else:
        conv_refusal(stage, max_segments=np.int64(N + 1))
        names = ("x", "y", "dx", "d_y")
        half = {name: (CONV_X[0], "float16") for name in names}
        assert "x is f16, the kernels take bf16, f32" in conv_refusal(stage, half)
    cut = lambda spec: ((*spec[0][:-1], K - 1), spec[1])
    operands, results = CONV_CALLS[stage]
    fewer = {n: cut(s) for n, s in (operands | results).items() if s[0][-1] == K}
    assert "there are 254 channels" in conv_refusal(stage, fewer)
    if stage == "short_conv_backward":
        needed = extension().short_conv_workspace_bytes(B, T, H * K)
        message = conv_refusal(stage, workspace=needed - 1)
        assert f"workspace has {needed - 1} bytes, expected {needed}" in message
    call_conv_handler(stage)


def test_the_short_conv_step_handler_counts_tokens():
    operands, results = CONV_CALLS["short_conv_step"]
    nine = {name: ((N_STEP, 9, H, K), "bfloat16") for name in ("x", "y")}
    assert "T is 9, must lie in [1, 8]" in conv_refusal("short_conv_step", nine)


@given(
    B=st.integers(1, 9),
    T=st.integers(1, 200_000),
    C=st.integers(1, 6000),
)
@settings(max_examples=200, deadline=None)
def test_the_workspace_of_the_short_conv(B, T, C):
    """Five sums a channel for every tile of 32 to 128 tokens."""
    bytes_ = extension().short_conv_workspace_bytes(B, T, 8 * C)
    sums = 5 * 8 * C * 4
    assert B * -(-T // 128) * sums <= bytes_ <= B * -(-T // 32) * sums
    assert bytes_ % sums == 0
