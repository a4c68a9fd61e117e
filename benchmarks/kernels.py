"""What the GPU did during a call: its kernels' times, from a profile.

XLA runs no command buffer under a profile (CUPTI and graphs do not go together), so each kernel is
launched by itself: the times are of the kernels alone, gaps between them are not in them.
"""

import tempfile
from pathlib import Path

import jax


def kernel_ms(run, calls) -> dict:
    """A call's share of `run()`. "sum": of the times of all kernels, copies and fills. "busy": of
    the time in which at least one of them ran; less than the sum where kernels overlap.
    """
    spans = [(start, end) for _, start, end in profiled(run)]
    total = sum(end - start for start, end in spans)
    return {"sum": total * 1e-6 / calls, "busy": covered(spans) * 1e-6 / calls}


def split_ms(run, calls, parts) -> dict:
    """A call's share of `run()`: of the times of the kernels whose name holds a part's word, part
    by part; of all others, as "rest"; and "busy".
    """
    found = dict.fromkeys([*parts, "rest"], 0.0)
    events = profiled(run)
    for name, start, end in events:
        part = next((part for part, word in parts.items() if word in name), "rest")
        found[part] += (end - start) * 1e-6 / calls
    spans = [(start, end) for _, start, end in events]
    return found | {"busy": covered(spans) * 1e-6 / calls}


def profiled(run) -> list[tuple[str, float, float]]:
    """(name, start, end) in ns of what a GPU did during `run()`, after one that nobody watches."""
    jax.block_until_ready(run())
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        events = gpu_events(jax.profiler.ProfileData.from_file(str(path)))
    if not events:
        raise RuntimeError("the profile has no kernel in it")
    return events


def gpu_events(profile) -> list[tuple[str, float, float]]:
    """(name, start, end) in ns of everything that ran on a stream of a GPU."""
    return [
        (event.name, event.start_ns, event.start_ns + event.duration_ns)
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def covered(spans) -> float:
    """The length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
