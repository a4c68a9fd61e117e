"""Causal softmax attention against the op in the same JAX, over T: benchmarks/run.py calls this.

    python benchmarks/softmax.py              over T, and the shapes of shapes.py
    python benchmarks/softmax.py SHAPE ...    these shapes alone

A line of JSON for each time, once it is there.

Softmax attention is `jax.nn.dot_product_attention(implementation="cudnn")`, as far as a call takes
less than 60 ms; of the shapes named, those with equal heads and without segments. The packed
layout is timed for the op alone, since the softmax op takes no segments. In a process of its own:
the longest rows need a memory without holes.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from lines import in_words, say
from shapes import SHAPES, TRAINING_SHAPES, D

H = 16
TOKENS = 65536  # of a call, until T alone is more
OVER_T = [2**n for n in (10, 11, 12, 13, 14, 15, 16, 18, 20)]
PACKED_T = [2**n for n in (10, 12, 14)]
SMALL = [(96, 1024), (96, 2048)]  # H, T of one row
SOFTMAX_AT_MOST_T = {"forward": 65536, "training": 32768}  # beyond, a call takes over 60 ms
LONG = {"forward": 32, "training": 16}  # heads with which rows of LONG_T are compared
LONG_T = dict.fromkeys((65536, 2**20))
GATE = "bounded slow"
BATCH = 16  # rows that are compiled together, and then timed


def dims_of(heads, T, packed=False):
    if packed:
        return (1, TOKENS, heads, heads, (T,) * (TOKENS // T))
    rows = max(1, TOKENS // T) if heads == H else 1
    return (rows, T, heads, heads, None)


def plan_over_t() -> list[dict]:
    """Rows without their "ms"."""
    rows = []

    def add(op, work, T, heads, packed=False):
        rows.append({"op": op, "work": work, "H": heads, "T": T, "packed": packed})

    for work, heads in LONG.items():
        long = [(heads, T) for T in LONG_T if heads != H]
        for heads, T in [*SMALL, *long, *((H, T) for T in OVER_T)]:
            add("kda", work, T, heads)
            if T <= SOFTMAX_AT_MOST_T[work] and heads in (H, 96):
                add("softmax", work, T, heads)
        for T in PACKED_T:
            add("kda", work, T, H, packed=True)
    return sorted(rows, key=lambda row: row["T"])  # the longest last: they may not fit


def plan_shapes(names) -> list[dict]:
    rows = []
    for name in names:
        _, _, heads, value_heads, lengths = SHAPES[name]
        if heads != value_heads or lengths is not None:
            continue
        works = ("forward", "training") if name in TRAINING_SHAPES else ("forward",)
        rows += [{"op": "softmax", "work": work, "shape": name} for work in works]
    return rows


def reserve_memory():
    """One block of what is free now, less a margin: before JAX starts."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", f"--id={visible}", "--format=csv,noheader,nounits"]
    query.append("--query-gpu=memory.free,memory.total")
    free, total = map(float, subprocess.check_output(query, text=True).split(","))
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{(free - 4096) / total:.3f}"


def programs(row):
    """The program of a row and its inputs."""
    import timing

    dims = SHAPES[row["shape"]] if "shape" in row else dims_of(row["H"], row["T"], row["packed"])
    training = row["work"] == "training"
    if row["op"] == "softmax":
        return softmax_program(dims, training), softmax_inputs(dims, training)
    if training:
        return timing.training_program(dims, GATE), timing.training_inputs(dims, GATE)
    return timing.forward_program(dims, GATE), timing.forward_inputs(dims, GATE)


def softmax_program(dims, training):
    import jax
    import timing

    def attend(*qkv):
        implementation = "cudnn" if timing.IMPLEMENTATION == "cuda" else "xla"
        return jax.nn.dot_product_attention(*qkv, is_causal=True, implementation=implementation)

    def forward(arrays):
        return attend(*arrays)

    def train(arrays):
        o, vjp = jax.vjp(attend, *arrays[:3])
        return o, vjp(arrays[3])

    return timing.Program(train if training else forward, _make_softmax(dims, training))


def _make_softmax(dims, training):
    import timing

    def make(seed):
        arrays = timing.make_inputs(dims, GATE, seed)
        return [arrays[name] for name in ("q", "k", "v", "g")[: 4 if training else 3]]

    return make


def softmax_inputs(dims, training):
    import timing

    B, T, heads, _, _ = dims
    tensors = 8 if training else 4
    return timing.Inputs(_make_softmax(dims, training), tensors * B * T * heads * D * 2)


def main():
    names = sys.argv[1:]
    rows = plan_shapes(names) if names else plan_shapes(SHAPES) + plan_over_t()
    reserve_memory()
    for first in range(0, len(rows), BATCH):
        for row, made in _compiled(rows[first : first + BATCH]):
            say("softmax", row | _timed(*made))


def _compiled(rows):
    """Each row with its program and inputs, or with why there is none; compiled side by side."""

    def compiled(made):
        try:
            if made[0] is not None:
                made[0].compile()
            return made
        except Exception as failure:
            return None, in_words(failure)

    with ThreadPoolExecutor(8) as pool:
        return list(zip(rows, pool.map(compiled, map(_made, rows)), strict=True))


def _made(row):
    try:
        return programs(row)
    except Exception as failure:  # a line of the record, whatever it is
        return None, in_words(failure)


def _timed(program, inputs) -> dict:
    import timing

    if program is None:
        return {"error": inputs}
    try:
        return {"ms": round(timing.median_ms(program, inputs), 4)}
    except Exception as failure:
        return {"error": in_words(failure)}
    finally:
        inputs.drop()


if __name__ == "__main__":
    main()
