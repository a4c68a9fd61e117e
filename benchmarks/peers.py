"""Times other implementations of the op, those that are installed: benchmarks/run.py calls this.

    python benchmarks/peers.py PEER [SHAPE ...]    a line of JSON for each time, once it is there

Each peer runs in a process of its own under a time limit: one that is missing, fails, compiles for
minutes or ends the process costs a line in the record and nothing else. Inputs are those of the op
(`make_inputs` of timing.py), handed over on the GPU. Peers in Torch are timed by CUDA events over
calls in a row, so where a peer's host side is slower than its kernels the host is what is timed.

FLA compiles and tunes its kernels at the first call of a shape, which takes a minute and more: give
it time (--peer-seconds of run.py) or a warm Triton cache.

Written against fla-core 0.6.0, nvidia-cudnn-frontend 1.32.0, tokamax 0.0.17 and FlashKDA's
flash_kda.fwd. Another version may take other arguments; the line in the record then says so. What
they need beyond JAX and PyTorch, on a machine that reaches no package index: fla-core needs einops;
nvidia-cudnn-frontend cuda-bindings (its Hopper kernels are compiled by NVRTC, without
nvidia-cutlass-dsl); tokamax einshape, immutabledict, jaxtyping, pydantic (with pydantic-core,
annotated-types, typing-inspection) and qwix.
"""

import importlib.util
import math
import statistics
import sys
import time
import types
from typing import NamedTuple

from lines import in_words, lines_of, say
from shapes import SHAPES, D

_MAIN = tuple(SHAPES)[:7]
_ONE = _MAIN[:1]


class Peer(NamedTuple):
    work: str  # what of the work it does. "raw": the norms, the gate and the sigmoid are its own
    gates: tuple[str, ...]
    seconds: int  # that it may take, all shapes together; in its place once others are done
    shapes: tuple[str, ...]  # one where a shape takes long to compile or to run


PEERS = {
    "cudnn": Peer("raw", ("bounded fast", "bounded slow"), 30, _MAIN),
    "flash_kda": Peer("raw; bf16 state", ("bounded fast",), 15, _MAIN),
    "tokamax": Peer("raw, but beta after its sigmoid", ("bounded fast",), 25, _ONE),
    "fla": Peer("raw", ("softplus fast",), 60, _ONE),
}
LOWER_BOUND = -5.0


def _torch_inputs(shape, gate):
    """Two sets as Torch tensors [B, T, heads, D], and the borders of the segments or None."""
    import numpy as np
    import torch
    from timing import make_inputs

    sets = []
    for seed in range(2):
        arrays = make_inputs(SHAPES[shape], gate, seed)
        arrays.pop("segment_ids", None)
        # Copies: these outlive the JAX arrays.
        sets.append({name: torch.from_dlpack(x).clone() for name, x in arrays.items()})
    lengths = SHAPES[shape][4]
    return sets, None if lengths is None else torch.tensor([0, *np.cumsum(lengths)], device="cuda")


def _events_ms(call) -> float:
    """Median of a call, from events around ten of them."""
    import torch

    times = []
    with torch.no_grad():
        for _ in range(9):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for i in range(10):
                call(i)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 10)
    return statistics.median(times[3:])


def time_fla(shape, gate) -> float:
    from fla.ops.kda import chunk_kda

    sets, borders = _torch_inputs(shape, gate)
    for tensors in sets:
        tensors["dt_bias"] = tensors["dt_bias"].reshape(-1)
    options = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True)
    options |= dict(use_beta_sigmoid_in_kernel=True, cu_seqlens=borders)
    if gate.startswith("bounded"):
        options |= dict(safe_gate=True, lower_bound=LOWER_BOUND)
    return _events_ms(lambda i: chunk_kda(**sets[i % 2], **options))


def time_flash_kda(shape, gate) -> float:
    import flash_kda
    import torch

    _refuse_grouped_heads(shape)
    sets, borders = _torch_inputs(shape, gate)
    out = torch.empty_like(sets[0]["v"])
    scale = out.shape[-1] ** -0.5
    return _events_ms(
        lambda i: flash_kda.fwd(
            **sets[i % 2], scale=scale, out=out, lower_bound=LOWER_BOUND, cu_seqlens=borders
        )
    )


def time_cudnn(shape, gate) -> float:
    import torch
    from cudnn.linear_attention import kimi_delta_attention

    sets, borders = _torch_inputs(shape, gate)
    B, T = sets[0]["q"].shape[:2]
    if borders is None:
        borders = torch.arange(B + 1, device="cuda") * T
    for tensors in sets:
        tensors["a_log"] = tensors.pop("A_log")
        for name in ("q", "k", "v", "g", "beta"):  # tokens of all rows one behind the other
            tensors[name] = tensors[name].flatten(0, 1)
    options = dict(cu_seqlens=borders.int(), use_qk_l2norm_in_kernel=True)
    options |= dict(use_beta_sigmoid_in_kernel=True, safe_gate=True, gate_lower_bound=LOWER_BOUND)
    return _events_ms(lambda i: kimi_delta_attention(**sets[i % 2], **options))


def time_tokamax(shape, gate) -> float:
    """Its chunked form in JAX; inputs in its own layout, heads first."""
    _without_xprof()
    import jax
    import jax.numpy as jnp
    import timing
    from tokamax.ops import kimi_delta_attention

    _refuse_grouped_heads(shape)
    B, T, H, _, lengths = SHAPES[shape]
    options = dict(scale=D**-0.5, use_qk_l2norm=True, use_gate_in_kernel=True)
    options |= dict(lower_bound=LOWER_BOUND, implementation="xla_chunked")
    if lengths is not None:
        options["max_num_segments"] = len(lengths)

    def call(arrays):
        return kimi_delta_attention(**arrays, **options)[0]

    @jax.jit
    def heads_first(x):
        return jnp.moveaxis(x, 2, 0)

    def make(seed):
        arrays = timing.make_inputs(SHAPES[shape], gate, seed)
        made = {
            "query": heads_first(arrays["q"]),
            "key": heads_first(arrays["k"]),
            "value": heads_first(arrays["v"]),
            "gate": heads_first(arrays["g"]),
            "beta": jax.nn.sigmoid(heads_first(arrays["beta"])),
            "a_log": arrays["A_log"],
            "delta_time_bias": arrays["dt_bias"].reshape(-1),
        }
        if lengths is not None:
            made["segment_ids"] = arrays["segment_ids"]
        return made

    inputs = timing.Inputs(make, 5 * B * T * H * D * 2)
    return timing.median_ms(timing.Program(call, make), inputs, repeats=3)


def _without_xprof():
    """tokamax imports a profile viewer for a timer of its own, which is not used here."""
    if "xprof" not in sys.modules and importlib.util.find_spec("xprof") is None:
        path = "xprof"
        for part in ("", ".cli", ".tools", ".get_kernel_stats_tool"):
            path += part
            sys.modules[path] = types.ModuleType(path)
            if part:
                setattr(sys.modules[path.rpartition(".")[0]], part[1:], sys.modules[path])


def _refuse_grouped_heads(shape):
    _, _, H, HV, _ = SHAPES[shape]
    if H != HV:
        raise NotImplementedError("takes equal heads alone")


def column(peer, gate) -> str:
    return f"{peer} {gate}"


def time_peer(peer, names, seconds) -> dict:
    """{shape: {column: milliseconds, or why there are none}}, by a process of its own."""
    found, ended = lines_of("peers.py", [peer, *names], seconds, "peer")
    results = {name: {column(peer, gate): ended for gate in PEERS[peer].gates} for name in names}
    for line in found:
        results[line["shape"]][column(peer, line["gate"])] = line["result"]
    return results


def time_all(names, seconds) -> dict:
    """All peers within `seconds`: each has what it may take, the last what is left."""
    results, end = {name: {} for name in names}, time.monotonic() + seconds
    for name, peer in PEERS.items():
        left = max(0, int(end - time.monotonic()))
        wanted = [shape for shape in names if shape in peer.shapes]
        limit = left if peer is list(PEERS.values())[-1] else min(left, peer.seconds)
        for shape, times in time_peer(name, wanted, limit).items():
            results[shape] |= times
    return results


def main():
    peer, *shapes = sys.argv[1:]
    time_one = {
        "fla": time_fla,
        "flash_kda": time_flash_kda,
        "cudnn": time_cudnn,
        "tokamax": time_tokamax,
    }[peer]
    for shape in shapes or SHAPES:
        for gate in PEERS[peer].gates:
            try:
                ms = time_one(shape, gate)
                result = round(ms, 4) if math.isfinite(ms) else f"took {ms} ms"
            except Exception as failure:  # a line of the record, whatever it is
                result = in_words(failure)
            say("peer", {"shape": shape, "gate": gate, "result": result})


if __name__ == "__main__":
    main()
