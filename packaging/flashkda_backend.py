"""The build backend: scikit-build-core, told what to do about CUDA.

Where there is a CUDA compiler the wheel holds the compiled extension and is tagged for this
platform; a compile error fails the build. Where there is none the wheel is pure Python, tagged
py3-none-any, and says in `jax_flashkda/_build_info.py` what was missing. The setting `cuda`
decides:

    pip install . --config-settings=cuda=VALUE

    auto           compile where a CUDA compiler is found, else pure Python (the default)
    require        fail where no CUDA compiler is found
    off            pure Python
    package-index  compile with nvcc from the package index: needs no CUDA toolkit on the machine
    /path/to.a     link a libjax_flashkda_cuda.a built earlier from the same sources
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from scikit_build_core import build as _skbuild
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# The headers of the oldest JAX supported, never those of whatever JAX is installed: a handler runs
# where the runtime's FFI API is at least the one it was built for.
MODULE_REQUIRES = ["nanobind>=2.9", "jaxlib==0.9.2"]
CUDA_REQUIRES = ["nvidia-cutlass==4.2.*"]
# All five by name: the dependencies among them are unpinned and would mix releases.
NVCC_REQUIRES = [
    f"nvidia-{part}==13.0.*"
    for part in ("cuda-nvcc", "cuda-crt", "cuda-runtime", "cuda-cccl", "nvvm")
]
OLDEST_NVCC = (12, 4)


def get_requires_for_build_wheel(config_settings=None):
    return _requires(_skbuild.get_requires_for_build_wheel, config_settings)


def get_requires_for_build_editable(config_settings=None):
    return _requires(_skbuild.get_requires_for_build_editable, config_settings)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    settings, _ = _resolve(config_settings)
    return _skbuild.prepare_metadata_for_build_wheel(metadata_directory, settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    settings, _ = _resolve(config_settings)
    return _skbuild.prepare_metadata_for_build_editable(metadata_directory, settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    settings = _resolve_and_record(config_settings)
    return _skbuild.build_wheel(wheel_directory, settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    settings = _resolve_and_record(config_settings)
    return _skbuild.build_editable(wheel_directory, settings, metadata_directory)


def _requires(skbuild_requires, config_settings):
    settings, cuda = _split(config_settings)
    if cuda == "package-index":
        return [
            *skbuild_requires(settings), *MODULE_REQUIRES, *CUDA_REQUIRES, *NVCC_REQUIRES
        ]  # fmt: skip
    if cuda.endswith(".a"):
        return [*skbuild_requires(settings), *MODULE_REQUIRES]
    nvcc, _ = _find_nvcc(cuda)
    if nvcc is None:
        return skbuild_requires(settings | PURE)
    return [*skbuild_requires(settings), *MODULE_REQUIRES, *CUDA_REQUIRES]


# No CMake, no C++ compiler, and a wheel that any Python 3 on any platform can take.
PURE = {"wheel.cmake": "false", "wheel.py-api": "py3", "wheel.platlib": "false"}


def _resolve(config_settings):
    """Settings for scikit-build-core, and why they make a pure wheel (None if they do not)."""
    settings, cuda = _split(config_settings)
    reason = None
    if cuda.endswith(".a"):
        settings["cmake.define.JAX_FLASHKDA_CUDA_LIBRARY"] = str(Path(cuda).resolve(strict=True))
    else:
        nvcc, reason = _find_nvcc(cuda)
        if nvcc is None:
            if cuda not in ("auto", "off"):
                raise SystemExit(f"jax_flashkda: cuda={cuda} was asked for, but {reason}")
            settings |= PURE
        else:
            settings["cmake.define.CMAKE_CUDA_COMPILER"] = nvcc
            if cuda == "package-index":
                settings |= _toolkit_of_packages(Path(nvcc).parent.parent)
    return settings, reason


def _resolve_and_record(config_settings):
    """Settings for scikit-build-core, once what becomes _build_info.py is written."""
    settings, reason = _resolve(config_settings)
    template = Path("build/_build_info.py")
    template.parent.mkdir(exist_ok=True)
    escaped = repr(reason).replace("$", "$$")  # scikit-build-core substitutes $names
    whole = template.with_suffix(f".{os.getpid()}")  # builds of one tree may run side by side
    whole.write_text(
        "# Why this installation has no compiled extension, or None where it has one.\n"
        f"NO_EXTENSION_REASON = {escaped}\n"
    )
    whole.replace(template)
    print(f"jax_flashkda: {'building the CUDA extension' if reason is None else reason}")
    return settings


def _toolkit_of_packages(root):
    """What CMake has to be told because the packages lay out the toolkit in their own way."""
    return {
        "cmake.define.CUDAToolkit_ROOT": str(root),
        # nvcc links from lib64.
        "cmake.define.CMAKE_CUDA_FLAGS": f"-L{root / 'lib'}",
        # CMake insists on finding the shared cudart, though we link the static one, and looks for
        # a libcudart.so without version.
        "cmake.define.CUDA_CUDART": str(next((root / "lib").glob("libcudart.so*"))),
    }


def _split(config_settings):
    settings = dict(config_settings or {})
    cuda = settings.pop("cuda", "auto")
    if cuda not in ("auto", "require", "off", "package-index") and not cuda.endswith(".a"):
        raise SystemExit(
            f"jax_flashkda: cuda={cuda} is not one of auto, require, off, package-index, "
            "or the path of a libjax_flashkda_cuda.a"
        )
    return settings, cuda


def _find_nvcc(cuda):
    """(path of nvcc, None), or (None, the reason why there is none to use)."""
    if cuda == "off":
        return None, "the package was built without CUDA, as its cuda=off setting asked"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None, (
            "the CUDA kernels build on Linux x86-64 alone, and the package was built on "
            f"{sys.platform} {platform.machine()}"
        )
    if cuda == "package-index":
        spec = importlib.util.find_spec("nvidia.cu13")
        places = [Path(p) / "bin/nvcc" for p in spec.submodule_search_locations] if spec else []
    else:
        roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        found = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
        places = [Path(p) for p in found if p] + [Path(r) / "bin/nvcc" for r in roots if r]
    for place in places:
        if place.is_file():
            return _check_version(str(place))
    return None, (
        "no CUDA compiler was found when the package was built (looked at CUDACXX, at nvcc on "
        "PATH, and in CUDA_HOME, CUDA_PATH and /usr/local/cuda)"
    )


def _check_version(nvcc):
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", report)
    version = tuple(map(int, release.groups())) if release else None
    if version is None or version < OLDEST_NVCC:
        have = "of unknown version" if version is None else "{}.{}".format(*version)
        need = "{}.{}".format(*OLDEST_NVCC)
        return None, f"{nvcc} is {have} and the kernels need CUDA {need} or later"
    return nvcc, None
