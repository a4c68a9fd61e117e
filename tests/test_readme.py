"""What the README shows runs, and its two commands are the ones that are checked."""

import pathlib
import re

import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_quick_start():
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["o"].shape == names["q"].shape and names["o"].dtype == jnp.bfloat16
    assert names["state"].shape == (2, 4, 128, 128) and names["state"].dtype == jnp.float32
    assert names["y"].shape == names["x"].shape
    assert jnp.isfinite(names["y"].astype(jnp.float32)).all()


def test_serving_page():
    pytest.importorskip("flax", reason="the layer needs flax")
    names = {}
    page = (ROOT / "docs" / "serving.md").read_text()
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "serving.md", "exec"), names)
    assert names["y"].shape == (3, 1, 64) and names["token_states"].shape == (3, 4, 2, 128, 128)
    assert not names["o"][1].any() and names["o"][0].any()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
