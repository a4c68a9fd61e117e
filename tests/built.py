"""The compiled extension, for tests that need one."""

import os

import pytest

from jax_flashkda import _extension


def extension():
    """The extension module; skips the test where the package legitimately has none.

    With JAX_FLASHKDA_REQUIRE_EXTENSION set, as in CI, that is a failure.
    """
    module = _extension.load()
    if module is None:
        reason = _extension.missing_reason()
        if os.environ.get("JAX_FLASHKDA_REQUIRE_EXTENSION"):
            pytest.fail(f"JAX_FLASHKDA_REQUIRE_EXTENSION is set, but {reason}")
        pytest.skip(reason)
    return module
