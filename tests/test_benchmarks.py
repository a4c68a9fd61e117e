"""The pages show what the record says. No GPU: the record is made on a machine with one."""

import importlib
import json
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
RECORD = json.loads((ROOT / "benchmarks" / "results" / "h200.json").read_text())
REMEDY = "run benchmarks/run.py --write-docs"


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("report")
    sys.path.remove(str(ROOT / "benchmarks"))


def test_pages_show_the_record(report):
    for path in report.PAGES:
        text = path.read_text()
        assert "<!-- benchmark: forward -->" in text, path
        assert text == report.page(text, RECORD), f"{path} is not of the record: {REMEDY}"


def test_plots_are_of_the_record(report):
    drawn = {path.name for path in report.PLOTS.iterdir()}
    assert drawn == set(report.plots(RECORD))
    for name in drawn:
        text = (report.PLOTS / name).read_text()
        assert report.plotted(RECORD) in text, f"{name} is not of the record: {REMEDY}"


def test_another_record_makes_another_page(report):
    changed = json.loads(json.dumps(RECORD))
    changed["forward_ms"]["fix8k_h96"]["bounded fast"] = 123.4
    text = report.PAGES[0].read_text()
    assert "123.4" in report.page(text, changed) and "123.4" not in report.page(text, RECORD)
    assert report.plotted(changed) != report.plotted(RECORD)


def test_what_the_record_timed_wins_over_what_is_known(report):
    row = dict.fromkeys(report.shapes.GATES, 1.0) | {"fla softplus fast": 2.5}
    row |= {"tokamax bounded fast": "ModuleNotFoundError: tokamax"}
    record = {"digest": "0" * 64, "forward_ms": {"fix8k_h96": row}}
    table = report.forward(record)
    assert "2.50" in table and "2.78" not in table  # FLA
    assert "*1.54*" in table  # FlashKDA, in italics
    assert "ModuleNotFoundError: tokamax" in report.sources(record)


LAYER_STEP = {
    "xla": {
        "wall": 0.12,
        "state step": 0.07,
        "short convolution": 0.0,
        "rest": 0.03,
        "busy": 0.1,
    },
    "cuda": {
        "wall": 0.09,
        "state step": 0.07,
        "short convolution": 0.009,
        "rest": 0.002,
        "busy": 0.081,
    },
}


def test_the_plots_of_a_whole_record_can_be_drawn(report):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    gates = dict.fromkeys(report.shapes.GATES, 1.0)
    training = gates | {"temporaries, MiB": 7}
    record = over_t(report, kda=15.0, attention=0.005) | {
        "forward_ms": dict.fromkeys(report.shapes.SHAPES, gates),
        "training_ms": dict.fromkeys(report.shapes.TRAINING_SHAPES, training),
        "step_ms": {"n1_h32": {"float32": 0.0044, "bfloat16": 0.0044}},
        "layer_step_ms": {"n64_h32": {"float32": LAYER_STEP}},
        "kernels_ms": dict.fromkeys(["t2k_h12", "n1_h32 bfloat16"], {"sum": 0.12, "busy": 0.1}),
    }
    for draw in report.plots(record).values():
        for axes in draw().axes:
            assert axes.collections or axes.lines
    matplotlib.pyplot.close("all")
    tables = report.table(record)
    for shape in report.shapes.SHAPES:
        assert report.shapes.label(shape) in tables
    label = "| N 64, 32 heads, float32 states |"
    before = " XLA | 0.1200 | 0.1000 | 0.0700 | 0.0280 | 0.0020 | **1.43** |"
    after = " kernels | 0.0900 | 0.0810 | 0.0700 | 0.0090 | 0.0020 | **1.16** |"
    assert label + before in tables and label + after in tables
    assert "| step, N 1, 32 heads, bfloat16 states | 0.0044 | 0.1000 | 0.1200 |" in tables


def test_shapes_have_names_of_their_own(report):
    labels = [report.shapes.label(shape) for shape in report.shapes.SHAPES]
    assert len(set(labels)) == len(labels)
    assert all(not re.search(r"[|*]", label) for label in labels)


def over_t(report, kda, attention):
    """A record in which KDA takes so many ns a token, and softmax attention so many ns a T."""
    rows = report.softmax.plan_over_t()
    for row in rows:
        tokens = row["T"] * report.softmax.dims_of(row["H"], row["T"])[0]
        row["ms"] = (kda if row["op"] == "kda" else attention * row["T"]) * tokens * 1e-6
    return {"digest": "0" * 64, "over_t": rows}


def test_who_wins_is_said_plainly(report):
    words = report.who_wins(over_t(report, kda=15.0, attention=0.005)).splitlines()
    assert "softmax attention is faster up to T 2,048" in words[0]
    assert "KDA is faster from T 4,096 on" in words[0]
    assert "T 1,048,576: 15.7 ms, 15.0 ns a token; T 65,536: 15.0 ns." in words[-1]
    words = report.who_wins(over_t(report, kda=15.0, attention=1.0))
    assert "softmax attention is faster" not in words
    table = report.over_t(over_t(report, kda=15.0, attention=0.005), "training")
    assert "| T 65,536 | 1 | 0.98 |  |" in table


def test_what_failed_over_t_is_told(report):
    record = over_t(report, 1.0, 1.0)
    del record["over_t"][-1]["ms"]
    record["over_t"][-1]["error"] = "RESOURCE_EXHAUSTED"
    assert "RESOURCE_EXHAUSTED" in report.who_wins(record)


def test_training_curves_are_told(report):
    curve = {
        "config": dict(steps=500, batch=8, seq_len=1024, layers=2, width=512, heads=4),
        "tokens_per_second": {"kernels": 1234567, "xla": 1000},
        "last_losses": {"kernels": 1.5, "xla": 1.25},
        "mean_difference_from_xla": {"kernels": 0.25},
        "largest_difference_from_xla": {"kernels": 0.5},
    }
    words = report.training_curve({"training_curve": curve})
    assert "| kernels | 1,234,567 | 1.5000 | 0.25000 | 0.50000 |" in words
    assert "| xla | 1,000 | 1.2500 |  |  |" in words and "500 steps" in words
    assert report.training_curve({}) == "Not in this record."


def test_parallel_efficiency_is_told(report):
    row = dict(tokens=262_144, heads=32, documents=None, gate="softplus slow")
    rows = [
        row | dict(gpus=1, forward_ms=8.0, training_ms=40.0),
        row | dict(gpus=2, forward_ms=5.0, training_ms=25.0, difference=0.002, of="[0]"),
        row | dict(gpus=2, documents=8192, forward_ms=5.0, training_ms=25.0),
    ]
    table = report.context_parallel({"context_parallel": rows}).splitlines()[2:]
    label = "| T 262,144, 32 heads, softplus slow gate, "
    assert table == [
        label + "one document | 1 | 8.00 | **100%** | 40.0 | **100%** |  |",
        label + "one document | 2 | 5.00 | **80%** | 25.0 | **80%** | 2.0e-03, [0] |",
        label + "documents of 8,192 | 2 | 5.00 |  | 25.0 |  |  |",
    ]


def test_a_sanitizer_that_found_something_is_told(report):
    said = {"memcheck": {"a": "ERROR SUMMARY: 0 errors", "b": "ERROR SUMMARY: 10 errors"}}
    said["racecheck"] = {"c": "RACECHECK SUMMARY: 0 hazards displayed", "d": "not ended within 3 s"}
    found = ["memcheck b: ERROR SUMMARY: 10 errors", "racecheck d: not ended within 3 s"]
    assert report.sanitizers.not_clean(said) == found
    words = report.run({"digest": "0" * 64, "sanitizers": said})
    assert "memcheck: clean in 1 of 2 programs." in words and all(x in words for x in found)


def test_parts_of_other_sources_are_told_apart(report, monkeypatch, tmp_path):
    run = importlib.import_module("run")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(run, "digest", lambda: "b" * 64)
    assert run.record_to_go_on_from() == {}
    old = {"digest": "a" * 64, "note": "", "step_ms": {"n": 1}, "tests": {"tests": 3}}
    run.RECORD.write_text(json.dumps(old))
    record = run.record_to_go_on_from() | {"digest": "b" * 64}
    assert record["of_other_sources"] == dict.fromkeys(("tests", "step_ms"), "a" * 64)
    run.put(record, step_ms={"n": 2})
    assert record["step_ms"] == {"n": 2} and "note" not in record
    run.RECORD.write_text(json.dumps(record))
    assert "tests are of other sources" in run.check()
    words = report.run(record | {"tests": None})
    assert f"sources {'b' * 12}. Of other sources, {'a' * 12}: `tests`." in words
    run.put(record, tests={"tests": 4})
    run.RECORD.write_text(json.dumps(record))
    assert run.check() is None


def test_a_run_whose_tests_fail_fails(report, monkeypatch):
    run = importlib.import_module("run")
    kept = {}
    options = type("Options", (), {"pytest": [], "sanitizer_seconds": 1})
    monkeypatch.setattr(run, "run_tests", lambda arguments: {"status": 1})
    assert not run.attempt("tests", lambda: run.test(kept_into(kept), options))
    monkeypatch.setattr(run, "gpu_count", lambda: 1)
    said = {"memcheck": {"a": "there is no compute-sanitizer"}}
    monkeypatch.setattr(run.sanitizers, "check_all", lambda seconds, gpus: said)
    assert not run.attempt("sanitizers", lambda: run.sanitize(kept_into(kept), options))
    assert kept == {"tests": {"status": 1}, "sanitizers": said}


def kept_into(kept):
    return lambda **more: kept.update(more)
