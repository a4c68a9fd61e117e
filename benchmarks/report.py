"""Tables and plots of a record, and the pages that show them.

A page marks what is generated: everything between `<!-- benchmark: NAME -->` and
`<!-- end of benchmark: NAME -->` is replaced by `write_pages`. Tables need the standard library
alone, plots matplotlib.
"""

import hashlib
import json
import re
from pathlib import Path

import known
import peers
import shapes

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
PLOTS = ROOT / "docs" / "plots"


# tables


def number(ms) -> str:
    return f"{ms:.3f}" if ms < 0.2 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}"


def markdown(titles, rows) -> str:
    if not rows:
        return f"{titles[0].capitalize()}: not in this record."
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def is_time(x) -> bool:
    return isinstance(x, (int, float))


def own(row, *gates) -> str:
    """Milliseconds of the op with these gates, fast / slow."""
    times = [row[gate] for gate in gates if is_time(row.get(gate))]
    return " / ".join(map(number, times))


def peer(row, earlier, name) -> str:
    """A peer's milliseconds, in italics where they are not the record's own."""
    found = known.peer_ms(row, earlier, name)
    if found is None:
        return ""
    ms, of_record = found
    return number(ms) if of_record else f"*{number(ms)}*"


def _peer_cells(row, earlier):
    cells = [peer(row, earlier, name) for name in ("FlashKDA", "FLA")]
    cudnn = [peer(row, earlier, name) for name in ("cuDNN", "cuDNN slow")]
    cells.append(" / ".join(cell for cell in cudnn if cell))
    return [*cells, *(peer(row, earlier, name) for name in ("tokamax", "softmax attention"))]


_PEER_TITLES = ["FlashKDA", "FLA", "cuDNN", "tokamax", "softmax attention"]


def forward(record) -> str:
    titles = ["forward", "bounded gate", "softplus gate", *_PEER_TITLES, "floor"]
    rows = []
    for shape, row in record.get("forward_ms", {}).items():
        earlier = known.FORWARD_MS.get(shape, {})
        rows.append(
            [
                shapes.label(shape),
                f"**{own(row, 'bounded fast', 'bounded slow')}**",
                own(row, "softplus fast", "softplus slow"),
                *_peer_cells(row, earlier),
                number(shapes.floor_ms(shape)),
            ]
        )
    return markdown(titles, rows)


def training(record) -> str:
    titles = ["forward and backward", "bounded gate", "softplus gate, slow", *_PEER_TITLES]
    titles += ["floor", "temporaries, MiB"]
    rows = []
    for shape, row in record.get("training_ms", {}).items():
        earlier = known.TRAINING_MS.get(shape, {})
        rows.append(
            [
                shapes.label(shape),
                f"**{own(row, 'bounded fast', 'bounded slow')}**",
                own(row, "softplus slow"),
                *_peer_cells(row, earlier),
                number(shapes.floor_ms(shape, training=True)),
                str(row["temporaries, MiB"]),
            ]
        )
    return markdown(titles, rows)


def steps(record) -> str:
    titles = ["decode step", "fp32 states", "TB/s", "bf16 states", "TB/s", "FLA, fp32"]
    rows = []
    for step, row in record.get("step_ms", {}).items():
        cells = [shapes.step_label(step)]
        for state_dtype in shapes.STATE_BYTES:
            ms = row[state_dtype]
            moved = shapes.state_bytes(step, state_dtype) / ms * 1e-9
            cells += [f"**{ms:.4f}**", f"{moved:.2f}"]
        fla = known.STEP_MS.get(step)
        rows.append([*cells, f"*{fla:.4f}*" if fla else ""])
    return markdown(titles, rows)


def run(record) -> str:
    """Where the record is from, and what was tested on the same sources in the same run."""
    versions = record.get("versions", {})
    names = {"jax": "JAX", "torch": "PyTorch", "driver": "driver"}
    named = [f"{title} {versions[name]}" for name, title in names.items() if name in versions]
    words = (
        f"Recorded {record.get('date')} on one {versions.get('gpu', 'GPU')} ({', '.join(named)})"
    )
    words += f", sources {record['digest'][:12]}."
    for key, what in (("tests", "GPU tests"), ("tests_of_two_gpus", "tests of two GPUs")):
        counts = record.get(key)
        if counts is None and key == "tests":
            words += " No tests ran with it."
        if counts is None:
            continue
        if "tests" not in counts:
            words += f" The {what} ended with status {counts['status']}."
            continue
        failed = counts["failures"] + counts["errors"]
        passed = counts["tests"] - failed - counts["skipped"]
        words += f" {what[0].upper() + what[1:]}: {passed} passed, {failed} failed, "
        words += f"{counts['skipped']} skipped."
        if counts["failed"]:
            words += f" Failed: {', '.join(f'`{name}`' for name in counts['failed'])}."
    return words + (f" {record['note']}" if "note" in record else "")


def sources(record) -> str:
    """Who the peers are, and why some were not timed in this record."""
    lines = [f"* {name}: {what}." for name, what in known.NAMES.items()]
    rows = record.get("forward_ms", {})
    for name, (work, gates) in peers.PEERS.items():
        for gate in gates:
            column = peers.column(name, gate)
            reasons = sorted(
                {row[column] for row in rows.values() if isinstance(row.get(column), str)}
            )
            if reasons:
                lines.append(f"* {name} ({work}), {gate}, in this record: {'; '.join(reasons)}.")
    return "\n".join(lines)


PARTS = {
    "run": run,
    "forward": forward,
    "training": training,
    "steps": steps,
    "sources": sources,
}


def table(record) -> str:
    return "\n\n".join(part(record) for part in PARTS.values())


def page(text, record) -> str:
    """The text of a page with its marked parts made anew from the record."""

    def part(match):
        name = match[1]
        begin, end = f"<!-- benchmark: {name} -->", f"<!-- end of benchmark: {name} -->"
        return f"{begin}\n\n{PARTS[name](record)}\n\n{end}"

    marked = r"<!-- benchmark: (\w+) -->.*?<!-- end of benchmark: \1 -->"
    return re.sub(marked, part, text, flags=re.DOTALL)


# plots


def plotted(record) -> str:
    """A digest of what the plots show, which they carry."""
    shown = {key: record.get(key) for key in ("forward_ms", "training_ms")}
    earlier = [known.FORWARD_MS, known.TRAINING_MS]
    return hashlib.sha256(json.dumps([shown, earlier]).encode()).hexdigest()


# name of a series: (colour, marker).
_MARKS = {
    "FLA": ("#3b7dd8", "s"),
    "FlashKDA": ("#2a9d5c", "^"),
    "cuDNN": ("#8a6fd1", "D"),
    "cuDNN slow": ("#8a6fd1", "d"),
    "tokamax": ("#7f7f7f", "v"),
    "softmax attention": ("#d98c21", "X"),
}


def plot_shapes(record, is_training):
    """Every shape against its floor and the peers: one line a shape, milliseconds on a log axis."""
    import matplotlib.pyplot as plt

    rows = record.get("training_ms" if is_training else "forward_ms", {})
    earlier = known.TRAINING_MS if is_training else known.FORWARD_MS
    names = list(rows or earlier)[::-1]
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.42 * max(len(names), 1)))
    lines = {}

    def draw(title, x, y, colour, marker, filled=True, size=52, front=2):
        kind = dict(facecolors=colour if filled else "none", edgecolors=colour)
        if marker == "|":
            kind = dict(c=colour)
        lines[title] = axes.scatter(x, y, s=size, marker=marker, zorder=front, **kind)

    for y, shape in enumerate(names):
        axes.axhline(y, color="#eeeeee", zorder=0)
        draw(
            "floor: bytes that must move",
            shapes.floor_ms(shape, is_training),
            y,
            "black",
            "|",
            size=220,
        )
        for name, (colour, marker) in _MARKS.items():
            found = known.peer_ms(rows.get(shape, {}), earlier.get(shape, {}), name)
            if found is None:
                continue
            ms, of_record = found
            draw(name + ("" if of_record else ", earlier"), ms, y, colour, marker, of_record)
        for gate, filled in (("bounded fast", True), ("bounded slow", False)):
            if is_time(rows.get(shape, {}).get(gate)):
                title = f"jax_flashkda, {gate} gates".replace("bounded ", "")
                draw(title, rows[shape][gate], y, "#c8273c", "o", filled, size=80, front=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(names)), [shapes.label(shape) for shape in names])
    axes.set_xlabel("ms, forward and backward" if is_training else "ms, forward")
    axes.grid(axis="x", which="both", color="#eeeeee")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if lines:
        axes.legend(lines.values(), lines, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def plots(record) -> dict:
    """Functions that draw a figure, by file name."""
    return {
        "forward.svg": lambda: plot_shapes(record, is_training=False),
        "training.svg": lambda: plot_shapes(record, is_training=True),
    }


def write_pages(record):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "jax_flashkda", "svg.fonttype": "none", "font.size": 9}
    )
    PLOTS.mkdir(exist_ok=True)
    about = {"Date": None, "Creator": None, "Description": f"record {plotted(record)}"}
    for name, draw in plots(record).items():
        figure = draw()
        figure.savefig(PLOTS / name, metadata=about, bbox_inches="tight", facecolor="white")
        matplotlib.pyplot.close(figure)
    for path in PAGES:
        path.write_text(page(path.read_text(), record))
