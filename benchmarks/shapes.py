"""What is timed: shapes, gates, floors. Of the standard library alone."""

import math

D = 128  # of keys and of values, everywhere
# name: (B, T, H, HV, lengths of the segments or None).
SHAPES = {
    "fix8k_h96": (1, 8192, 96, 96, None),
    "mixed8k_h96": (1, 8192, 96, 96, [1300, 547, 2048, 963, 271, 3063]),
    "uni8k_h96": (1, 8192, 96, 96, [1024] * 8),
    "fix8k_h64": (1, 8192, 64, 64, None),
    "b4t4k_h32": (4, 4096, 32, 32, None),
    "b1t32k_h16": (1, 32768, 16, 16, None),
    "b1t64k_h8": (1, 65536, 8, 8, None),
    "gva8k_h16_32": (1, 8192, 16, 32, None),
    "t2k_h96": (1, 2048, 96, 96, None),
    "t2k_h12": (1, 2048, 12, 12, None),
    "t512_h32": (1, 512, 32, 32, None),
    "seg256x32_h32": (1, 8192, 32, 32, [32] * 256),
}
TRAINING_SHAPES = (*list(SHAPES)[:8], "t2k_h96")
GATES = ("bounded fast", "bounded slow", "softplus fast", "softplus slow")
SMALL_GATE = "bounded fast"  # with which the kernels of small calls are looked at
TRAINING_GATES = ("bounded fast", "bounded slow", "softplus slow")

# The decode step: (sequences, heads, tokens).
STEPS = {
    "n1_h32": (1, 32, 1),
    "n8_h32": (8, 32, 1),
    "n64_h32": (64, 32, 1),
    "n256_h32": (256, 32, 1),
    "n64_h96": (64, 96, 1),
    "n64_h32_t4": (64, 32, 4),
}
LAYER_STEPS = ("n64_h32",)  # timed within a layer too
STATE_BYTES = {"float32": 4, "bfloat16": 2}

BYTES_PER_SECOND = 4.3e12  # of a device-to-device copy, reads and writes counted
_U_FORWARD, _U_TRAINING = 5, 14  # tensors of B T HV D bfloat16 values that must move


def floor_ms(shape, training=False) -> float:
    B, T, _, HV, _ = SHAPES[shape]
    tensors = _U_TRAINING if training else _U_FORWARD
    return tensors * B * T * HV * D * 2 / BYTES_PER_SECOND * 1e3


def state_bytes(step, state_dtype) -> int:
    """That a decode step moves: each state read once and written once."""
    N, H, _ = STEPS[step]
    return 2 * N * H * D * D * STATE_BYTES[state_dtype]


def label(shape) -> str:
    """A shape in words."""
    B, T, H, HV, lengths = SHAPES[shape]
    rows = f"B {B}, " if B > 1 else ""
    heads = f"{H} heads" if H == HV else f"{H} / {HV} heads"
    words = f"{rows}T {T:,}, {heads}"
    if lengths is None:
        return words
    same = f" of {lengths[0]}" if len(set(lengths)) == 1 else ""
    return f"{words}, {len(lengths)} segments{same}"


def step_label(step) -> str:
    N, H, T = STEPS[step]
    return f"N {N}, {H} heads" + (f", {T} tokens" if T > 1 else "")


def rounds(bytes_of_one, cache_bytes) -> int:
    """How many sets of inputs leave nothing of one in the cache when it comes round again."""
    return max(2, math.ceil(2 * cache_bytes / bytes_of_one))
