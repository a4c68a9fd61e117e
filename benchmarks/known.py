"""Other implementations as measured earlier on the same kind of GPU: a record that timed them wins.

One NVIDIA H200, 2026-11-22, median by CUDA events (those in JAX by the wall), bfloat16, head dim
128, fast gates unless it says slow. The forward is of raw inputs; forward and backward of raw
inputs too, but for cuDNN, which was given normalised keys and activated gates: less work.
"""

NAMES = {
    "FLA": "FLA 0.5.2 (Triton, in PyTorch)",
    "FlashKDA": "FlashKDA 1ce47ea (in PyTorch; 16-bit state)",
    "cuDNN": "cuDNN frontend 1.32 (Hopper, in PyTorch; drops a state once it has decayed enough)",
    "cuDNN slow": "the same with slow gates",
    "tokamax": "tokamax 0.0.17, xla_chunked (in JAX)",
    "softmax attention": "causal softmax attention of the same shape "
    "(`jax.nn.dot_product_attention`, cuDNN, in JAX)",
}
DATE = "2026-11-22"

_PEERS = ("FLA", "FlashKDA", "cuDNN", "cuDNN slow", "tokamax", "softmax attention")
_rows = lambda rows: {
    shape: {name: ms for name, ms in zip(_PEERS, times, strict=True) if ms is not None}
    for shape, times in rows.items()
}

FORWARD_MS = _rows(
    {
        "fix8k_h96": (2.78, 1.54, 1.62, 3.12, 18.5, 2.90),
        "mixed8k_h96": (2.81, 1.44, 2.01, 1.97, None, None),
        "uni8k_h96": (2.79, 1.24, 1.61, 1.55, None, None),
        "fix8k_h64": (1.96, 1.31, 1.13, 2.94, 13.0, 2.05),
        "b4t4k_h32": (1.96, 0.91, 1.12, 1.77, 12.5, 1.10),
        "b1t32k_h16": (2.46, 3.75, 1.26, 9.80, 20.8, 7.6),
        "b1t64k_h8": (3.51, 6.95, 1.25, 19.1, None, 15.0),
        "t2k_h96": (None, None, None, None, None, 0.241),
    }
)
TRAINING_MS = _rows(
    {
        "fix8k_h96": (12.85, None, 5.28, 5.96, 94.2, 11.4),
        "mixed8k_h96": (13.36, None, 5.80, 5.73, None, None),
        "uni8k_h96": (None, None, 5.79, 5.76, None, None),
        "fix8k_h64": (None, None, 4.02, 4.67, 67.2, 7.8),
        "b4t4k_h32": (8.27, None, 4.20, 4.23, 62.7, 4.2),
        "b1t32k_h16": (10.07, None, 4.06, 9.34, 95.5, 28.4),
        "b1t64k_h8": (None, None, 4.38, 16.2, None, 56.1),
        "t2k_h96": (None, None, None, None, None, 0.966),
    }
)
# The most that training takes above its inputs.
TRAINING_MIB = {
    "fix8k_h96": {"FLA": 5787, "cuDNN": 3561, "tokamax": 30158},
    "mixed8k_h96": {"FLA": 5805, "cuDNN": 3610},
    "uni8k_h96": {"cuDNN": 3630},
    "fix8k_h64": {"cuDNN": 2375, "tokamax": 20106},
    "b4t4k_h32": {"FLA": 3858, "cuDNN": 2385, "tokamax": 21842},
    "b1t32k_h16": {"FLA": 3858, "cuDNN": 2374, "tokamax": 20106},
    "b1t64k_h8": {"cuDNN": 2375},
}
# Decode, FLA's fused_recurrent with fp32 states in a CUDA graph.
STEP_MS = {"n1_h32": 0.0097, "n64_h32": 0.0908, "n256_h32": 0.340}

# Where a record holds the same: the first of these columns that has a time.
COLUMNS = {
    "FLA": ("fla softplus fast", "fla bounded fast"),
    "FlashKDA": ("flash_kda bounded fast",),
    "cuDNN": ("cudnn bounded fast",),
    "cuDNN slow": ("cudnn bounded slow",),
    "tokamax": ("tokamax bounded fast",),
    "softmax attention": ("softmax attention",),
}


def peer_ms(row, known, name):
    """(milliseconds, whether they are the record's own) of a peer, or None."""
    for column in COLUMNS[name]:
        if isinstance(row.get(column), (int, float)):
            return row[column], True
    return (known[name], False) if name in known else None
