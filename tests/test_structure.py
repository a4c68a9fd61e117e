"""The floors of the house: who may import whom, and what importing the package does."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jax_flashkda"

# A module may import lower floors, never its own or a higher one, except as listed.
FLOORS = {
    "reference": 0,
    "_extension": 0,
    "_packing": 0,
    "_tensor_files": 0,
    "_segments": 0,
    "_problem": 0,
    "_packing_stream": 1,
    "_validation": 0,
    "_chunked": 1,
    "_support": 1,
    "_recurrent": 2,
    "_short_conv_xla": 2,
    "_primitives": 3,
    "_vjp": 4,
    "_context": 5,
    "_kda": 6,
    "_step": 6,
    "_short_conv": 6,
    "_layer": 7,
    "checkpoints": 8,
}


def imported_modules(path):
    """Modules of the package that a file imports, as bare names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level or module.split(".")[0] == "jax_flashkda":
                inner = module.removeprefix("jax_flashkda").strip(".")
                found |= {inner.split(".")[0]} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("jax_flashkda.")
            }
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_go_down(path):
    name = path.stem
    if name in ("__init__", "_build_info"):
        return
    assert name in FLOORS, f"{path.name} has no floor: give it one here"
    for other in imported_modules(path) & FLOORS.keys():
        assert FLOORS[other] < FLOORS[name], f"{path.name} may not import {other}"


def test_the_reference_is_independent():
    assert not imported_modules(PACKAGE / "reference.py")


def test_the_oracle_does_not_see_the_op():
    assert imported_modules(ROOT / "tests" / "oracle.py") == {"reference"}


def test_no_private_imports():
    for path in PACKAGE.glob("*.py"):
        assert not re.search(r"jax\._src|flax\._src|jaxlib\.", path.read_text()), path


def test_only_one_file_sees_the_extension():
    for path in PACKAGE.glob("*.py"):
        if path.stem != "_extension":
            assert "_flashkda" not in re.sub(r"jax_flashkda", "", path.read_text()), path


def test_no_environment_variables():
    for path in PACKAGE.glob("*.py"):
        assert "environ" not in path.read_text(), path


CUDA_FLOORS = {"core": 0, "problem": 1, "chunk": 2, "sm90": 3, "dispatch": 4, "ffi": 5}


def test_cuda_includes_go_down():
    """Headers are included by their path below cuda/; XLA and nanobind stay above the dispatch
    layer.
    """
    files = [p for p in (ROOT / "cuda").rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cc")]
    assert files
    for path in files:
        relative = path.relative_to(ROOT / "cuda")
        floor = CUDA_FLOORS.get(relative.parts[0], 6)
        for header in re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text()):
            folder = header.split("/")[0]
            if folder in CUDA_FLOORS:
                assert CUDA_FLOORS[folder] <= floor, f"{relative} may not include {header}"
            if folder in ("xla", "nanobind"):
                assert floor >= 5, f"{relative} may not include {header}"


def test_importing_touches_no_device():
    """No backend, no CUDA context, no extension: JAX starts when the first array is made."""
    code = (
        "import sys, jax_flashkda, jax\n"
        "from jax.extend.backend import get_backend\n"
        "assert 'jax_flashkda._flashkda' not in sys.modules\n"
        "assert 'flax' not in sys.modules and 'torch' not in sys.modules\n"
        "jax.config.update('jax_platforms', 'cpu')\n"  # raises or has no effect once a backend runs
        "assert get_backend().platform == 'cpu'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
