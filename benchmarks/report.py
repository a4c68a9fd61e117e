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
import sanitizers
import shapes
import softmax

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
    titles += ["floor", "temporaries, MiB", "of peers"]
    rows = []
    for shape, row in record.get("training_ms", {}).items():
        earlier = known.TRAINING_MS.get(shape, {})
        peers_mib = known.TRAINING_MIB.get(shape, {})
        rows.append(
            [
                shapes.label(shape),
                f"**{own(row, 'bounded fast', 'bounded slow')}**",
                own(row, "softplus slow"),
                *_peer_cells(row, earlier),
                number(shapes.floor_ms(shape, training=True)),
                f"{row['temporaries, MiB']:,}",
                ", ".join(f"*{name} {mib:,}*" for name, mib in peers_mib.items()),
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


_CONVOLUTIONS = {"xla": "XLA", "cuda": "kernels"}


def layer_steps(record) -> str:
    """Where the time of a layer's step goes, before and after its convolutions became kernels."""
    titles = ["layer's step", "convolutions", "by the wall", "a kernel runs", "state step"]
    titles += ["convolutions", "norm and glue", "in all / state step"]
    rows = []
    for step, by_state in record.get("layer_step_ms", {}).items():
        for state_dtype, by_convolution in by_state.items():
            label = f"{shapes.step_label(step)}, {state_dtype} states"
            xlas = by_convolution["cuda"].get("rest")  # of which none is of convolutions
            for convolution, row in by_convolution.items():
                cells = [label, _CONVOLUTIONS[convolution], f"{row['wall']:.4f}"]
                if "busy" in row and xlas is not None:
                    convolutions = row["short convolution"] + row["rest"] - xlas
                    parts = (row["busy"], row["state step"], convolutions, xlas)
                    cells += [f"{ms:.4f}" for ms in parts]
                    cells.append(f"**{row['busy'] / row['state step']:.2f}**")
                rows.append(cells + [""] * (len(titles) - len(cells)))
    return markdown(titles, rows)


def small(record) -> str:
    """Calls of less than 0.2 ms: by the wall, and what their kernels take."""
    titles = ["small call", "by the wall", "a kernel runs", "sum of kernels"]
    walls = {}
    for shape, row in record.get("forward_ms", {}).items():
        walls[shape] = f"forward, {shapes.label(shape)}", row.get(shapes.SMALL_GATE)
    for step, row in record.get("step_ms", {}).items():
        for state_dtype in shapes.STATE_BYTES:
            label = f"step, {shapes.step_label(step)}, {state_dtype} states"
            walls[f"{step} {state_dtype}"] = label, row[state_dtype]
    rows = []
    for name, times in record.get("kernels_ms", {}).items():
        label, wall = walls[name]
        rows.append([label, *(f"{ms:.4f}" for ms in (wall, times["busy"], times["sum"]))])
    return markdown(titles, rows)


def _line(record, op, work, H, packed=False) -> dict:
    """Milliseconds by T."""
    wanted = {"op": op, "work": work, "H": H, "packed": packed}
    rows = [row for row in record.get("over_t", []) if wanted.items() <= row.items()]
    return {row["T"]: row["ms"] for row in rows if "ms" in row}


def over_t(record, work) -> str:
    titles = [f"{work}, {softmax.H} heads", "rows", "KDA", "KDA, packed", "softmax attention"]
    kda, packed, attention = (
        _line(record, op, work, softmax.H, packed)
        for op, packed in (("kda", False), ("kda", True), ("softmax", False))
    )
    rows = []
    for T in sorted(kda.keys() | attention.keys()):
        cells = [number(line[T]) if T in line else "" for line in (kda, packed, attention)]
        rows.append([f"T {T:,}", str(softmax.dims_of(softmax.H, T)[0]), *cells])
    return markdown([*titles, "softmax / KDA"], [[*row, _ratio(row)] for row in rows])


def _ratio(row):
    return f"{float(row[4]) / float(row[2]):.2f}" if row[2] and row[4] else ""


_WORKS = {"forward": "Forward", "training": "Forward and backward"}


def who_wins(record) -> str:
    """Where KDA is ahead of softmax attention and where it is not, in words."""
    lines = []
    for work, title in _WORKS.items():
        kda, attention = (_line(record, op, work, softmax.H) for op in ("kda", "softmax"))
        both = sorted(kda.keys() & attention.keys())
        if not both:
            continue
        ahead = [T for T in both if kda[T] < attention[T]]
        behind = [T for T in both if kda[T] >= attention[T]]
        pair = lambda T, a=kda, b=attention: f"{number(a[T])} against {number(b[T])} at T {T:,}"
        words = f"* **{title}, {softmax.H} heads:** "
        if behind:
            words += f"softmax attention is faster up to T {max(behind):,} ({pair(max(behind))})"
        if ahead:
            words += "; " if behind else ""
            words += f"KDA is faster from T {min(ahead):,} on ({pair(min(ahead))}"
            words += f"; {pair(max(ahead))})" if max(ahead) != min(ahead) else ")"
        lines.append(words + ".")
    for work, title in _WORKS.items():
        kda, attention = (_line(record, op, work, 96) for op in ("kda", "softmax"))
        both = sorted(kda.keys() & attention.keys())
        of = lambda T, a=kda, b=attention: (
            f"T {T:,}: KDA {number(a[T])}, softmax attention {number(b[T])}"
        )
        if both:
            lines.append(f"* {title}, one row of 96 heads: {'; '.join(map(of, both))}.")
    for work, heads in softmax.LONG.items():
        kda = _line(record, "kda", work, heads)
        if softmax.LONG_T.keys() <= kda.keys():
            ns = [kda[T] * 1e6 / (T * softmax.dims_of(heads, T)[0]) for T in softmax.LONG_T]
            lines.append(
                f"* {_WORKS[work]}, {heads} heads, T {max(softmax.LONG_T):,}: "
                f"{number(kda[max(softmax.LONG_T)])} ms, {ns[1]:.1f} ns a token; "
                f"T {min(softmax.LONG_T):,}: {ns[0]:.1f} ns."
            )
    failed = [row for row in record.get("over_t", []) if "error" in row]
    for row in failed:
        lines.append(
            f"* Not timed: {row['op']}, {row['work']}, H {row['H']}, T {row['T']:,}: {row['error']}"
        )
    return "\n".join(lines) or "Where softmax attention is faster: not in this record."


def training_curve(record) -> str:
    """The example model trained on the kernels and on XLA."""
    curve = record.get("training_curve")
    if curve is None:
        return "Not in this record."
    titles = ["run", "tokens a second", "loss at the end", "mean distance from XLA", "largest"]
    apart = [curve[f"{which}_difference_from_xla"] for which in ("mean", "largest")]
    rows = [
        [name, f"{speed:,}", f"{curve['last_losses'][name]:.4f}"]
        + [f"{x[name]:.5f}" if name in x else "" for x in apart]
        for name, speed in curve["tokens_per_second"].items()
    ]
    sizes = curve["config"]
    return (
        f"{sizes['steps']} steps of {sizes['batch']} rows of {sizes['seq_len']:,} tokens, "
        f"{sizes['layers']} layers of {sizes['heads']} heads.\n\n{markdown(titles, rows)}"
    )


def context_parallel(record) -> str:
    """T over several GPUs: parallel efficiency is the time of one GPU over n times that of n."""
    titles = ["T over GPUs", "GPUs", "forward", "efficiency", "forward and backward", "efficiency"]
    titles.append("difference from one GPU")
    rows, one = [], {}
    for row in record.get("context_parallel", []):
        n, length = row["gpus"], row["documents"]
        label = f"T {row['tokens']:,}, {row['heads']} heads, {row['gate']} gate"
        label += f", documents of {length:,}" if length else ", one document"
        cells = [label, str(n)]
        for work in ("forward_ms", "training_ms"):
            if n == 1:
                one[label, work] = row[work]
            alone = one.get((label, work))
            cells += [number(row[work]), f"**{alone / n / row[work]:.0%}**" if alone else ""]
        cells.append(f"{row['difference']:.1e}, {row['of']}" if "difference" in row else "")
        rows.append(cells)
    return markdown(titles, rows)


def run(record) -> str:
    """Where the record is from, and what was tested on the same sources in the same run."""
    versions = record.get("versions", {})
    names = {"jax": "JAX", "torch": "PyTorch", "driver": "driver"}
    named = [f"{title} {versions[name]}" for name, title in names.items() if name in versions]
    words = f"Recorded {record.get('date')} on {versions.get('gpu', 'GPU')} ({', '.join(named)})"
    words += f", sources {record['digest'][:12]}."
    older = record.get("of_other_sources", {})
    for digest in sorted(set(older.values())):
        parts = ", ".join(f"`{part}`" for part in older if older[part] == digest)
        words += f" Of other sources, {digest[:12]}: {parts}."
    words += _tested(record.get("tests"))
    for tool, runs in record.get("sanitizers", {}).items():
        told = sanitizers.not_clean({tool: runs})
        words += f" {tool}: clean in {len(runs) - len(told)} of {len(runs)} programs."
        words += "".join(f" `{run}`." for run in told)
    return words + (f" {record['note']}" if "note" in record else "")


def _tested(counts) -> str:
    if counts is None:
        return " No tests ran with it."
    if "tests" not in counts:
        return f" The GPU tests ended with status {counts['status']}."
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    words = f" GPU tests on {counts.get('gpus', 1)} of them: {passed} passed, {failed} failed, "
    words += f"{counts['skipped']} skipped."
    if counts["failed"]:
        words += f" Failed: {', '.join(f'`{name}`' for name in counts['failed'])}."
    return words


def sources(record) -> str:
    """Who the peers are, and why some were not timed in this record."""
    lines = [f"* {name}: {what}." for name, what in known.NAMES.items()]
    rows = record.get("forward_ms", {})
    for name, who in peers.PEERS.items():
        for gate in who.gates:
            column = peers.column(name, gate)
            reasons = sorted(
                {row[column] for row in rows.values() if isinstance(row.get(column), str)}
            )
            if reasons:
                lines.append(
                    f"* {name} ({who.work}), {gate}, in this record: {'; '.join(reasons)}."
                )
    return "\n".join(lines)


PARTS = {
    "run": run,
    "forward": forward,
    "training": training,
    "steps": steps,
    "layer_steps": layer_steps,
    "small": small,
    "who_wins": who_wins,
    "over_t_forward": lambda record: over_t(record, "forward"),
    "over_t_training": lambda record: over_t(record, "training"),
    "training_curve": training_curve,
    "context_parallel": context_parallel,
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
    shown = {key: record.get(key) for key in ("forward_ms", "training_ms", "over_t")}
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


def plot_over_t(record):
    """Time of a token over T, forward and training, on log axes."""
    import matplotlib.pyplot as plt

    figure, both_axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    series = {
        "jax_flashkda, rows of T": ("kda", False, "#c8273c", "o-"),
        "jax_flashkda, segments of T in one row": ("kda", True, "#c8273c", "o:"),
        "softmax attention (cuDNN)": ("softmax", False, "#d98c21", "X-"),
    }
    for axes, (work, title) in zip(both_axes, _WORKS.items(), strict=True):
        for name, (op, packed, colour, style) in series.items():
            line = _line(record, op, work, softmax.H, packed)
            tokens = [T * softmax.dims_of(softmax.H, T, packed)[0] for T in line]
            if packed:
                tokens = [softmax.TOKENS] * len(line)
            ns = [ms * 1e6 / count for ms, count in zip(line.values(), tokens, strict=True)]
            axes.plot(list(line), ns, style, color=colour, markersize=5, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlim(min(softmax.OVER_T) / 1.2, max(softmax.OVER_T) * 1.2)
        if not axes.lines[0].get_xdata().size:  # nothing in this record
            axes.set_ylim(1, 1000)
        axes.set_xlabel("T")
        axes.set_ylabel("ns a token")
        axes.set_title(f"{title}, {softmax.H} heads")
        axes.grid(color="#eeeeee", which="both")
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_formatter(lambda T, _: f"{T / 1024:g}K" if T < 2**20 else "1M")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    both_axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def plots(record) -> dict:
    """Functions that draw a figure, by file name."""
    return {
        "forward.svg": lambda: plot_shapes(record, is_training=False),
        "training.svg": lambda: plot_shapes(record, is_training=True),
        "over_t.svg": lambda: plot_over_t(record),
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
