"""What the pages in docs/ show runs, and their links lead somewhere."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLES = DOCS.parent / "examples"
NEEDS = {
    "checkpoints": ["flax", "safetensors"],
    "context_parallelism": ["flax"],
    "kimi_linear": ["flax", "safetensors"],
    "serving": ["flax"],
    "training_at_scale": ["flax"],
}


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda p: p.stem)
def test_snippets(page, tmp_path, monkeypatch):
    for module in NEEDS.get(page.stem, []):
        pytest.importorskip(module, reason=f"docs/{page.name} needs {module}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    names = {}
    for snippet in snippets(page):
        exec(compile(snippet, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (DOCS / target).exists(), target
