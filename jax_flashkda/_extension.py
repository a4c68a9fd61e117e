"""The compiled extension: whether there is one, why not, and what it holds.

No other file imports the module `_flashkda` or reads the generated `_build_info`. Importing this
file loads nothing: the first function that needs the extension does, and not even that creates a
CUDA context.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import jax

# The first JAX whose runtime takes handlers built for XLA FFI API 0.3, as ours are.
_OLDEST_JAX = (0, 9, 1)

# The stages whose workspace the extension can size.
_WORKSPACES = ("forward", "backward", "prepared_forward", "prepared_backward")


def load() -> ModuleType | None:
    """The extension module, or None where there is none (see `missing_reason`)."""
    return _load()[0]


def missing_reason() -> str | None:
    """Why there is no extension here, or None where there is one."""
    return _load()[1]


@functools.cache
def register() -> None:
    """Registers the FFI targets with JAX for the platform CUDA. Does nothing the second time."""
    for target, stages in _required().registrations().items():
        jax.ffi.register_ffi_target(target, stages, platform="CUDA")


def variants() -> list[dict]:
    """The compiled kernels, a row each: `arch` (90 is compute capability 9.0), head dims `K`, `V`,
    `qkv_dtype` (a numpy name: "bfloat16"), and the lists `g_dtypes` and `beta_dtypes`."""
    return _required().variants()


def step_variants() -> list[dict]:
    """The compiled decode steps, a row each: `arch`, head dims `K`, `V`, and the lists
    `token_dtypes` (of q, k and v, of g, of beta) and `state_dtypes`."""
    return _required().step_variants()


def short_conv_variants() -> list[dict]:
    """The compiled short convolutions, a row each: `arch`, `width`, `channel_multiple`, and the
    lists `dtypes` (of x) and `step_dtypes` (of the step's x, of its kernel, of its state)."""
    return _required().short_conv_variants()


def workspace_bytes(
    stage: str, B: int, T: int, H: int, HV: int, K: int, V: int, N: int, has_segment_ids: bool
) -> int:
    """Bytes of the workspace that the FFI target `jax_flashkda.<stage>` needs for these sizes.

    `state_maps` and `state_gradient` need that of `prepared_forward`.
    """
    if stage not in _WORKSPACES:
        raise ValueError(f"there is no stage {stage!r}; the extension has {', '.join(_WORKSPACES)}")
    count = getattr(_required(), f"{stage}_workspace_bytes")
    return count(B, T, H, HV, K, V, N, has_segment_ids)


def short_conv_workspace_bytes(B: int, T: int, channels: int) -> int:
    """Bytes of the workspace that `jax_flashkda.short_conv_backward` needs for these sizes."""
    return _required().short_conv_workspace_bytes(B, T, channels)


def _required() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise NotImplementedError(f"jax_flashkda has no CUDA extension here: {reason}")
    return module


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    if jax.__version_info__ < _OLDEST_JAX:
        oldest = ".".join(map(str, _OLDEST_JAX))
        return None, f"the CUDA extension needs jax >= {oldest}, and this is jax {jax.__version__}"
    if importlib.util.find_spec("jax_flashkda._flashkda") is None:
        return None, _reason_of_absence()
    try:
        return importlib.import_module("jax_flashkda._flashkda"), None
    except ImportError as error:  # built for another platform, or a system library is missing
        return None, f"the CUDA extension could not be loaded: {error}"


def _reason_of_absence() -> str:
    if importlib.util.find_spec("jax_flashkda._build_info") is None:
        return (
            "jax_flashkda was imported from its source tree, which holds no compiled extension; "
            "install it with `pip install .`"
        )
    reason = importlib.import_module("jax_flashkda._build_info").NO_EXTENSION_REASON
    return reason or "the compiled extension is missing from the installed package; reinstall it"
