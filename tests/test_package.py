"""What was installed: the compiled module, its dependencies, its handlers; and the pure package."""

import ctypes
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import jax
import jax.numpy as jnp
import pytest
from built import extension

import jax_flashkda
from jax_flashkda import _extension, _primitives

ROOT = pathlib.Path(__file__).parent.parent
BACKEND = ROOT / "packaging" / "flashkda_backend.py"


def run_python(code, *args, **environment):
    """Runs code in a new interpreter that sees no GPU, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, args)],  # -P: not the tree pytest runs in
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# The compiled module


def test_the_installed_package_is_tested():
    """Not the source tree, which has no extension and would hide a broken installation."""
    if not os.environ.get("JAX_FLASHKDA_REQUIRE_EXTENSION"):
        pytest.skip("either is fine unless JAX_FLASHKDA_REQUIRE_EXTENSION is set")
    assert not pathlib.Path(jax_flashkda.__file__).is_relative_to(ROOT)
    assert extension() is not None


def test_version_is_that_of_the_source():
    extension()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version("jax_flashkda") == project["version"]


def test_loads_without_a_driver():
    extension()
    code = (
        "from jax_flashkda import _extension\n"
        "assert _extension.load() is not None and _extension.missing_reason() is None\n"
        "_extension.register()\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert '_flashkda' in maps\n"
        "assert 'libcuda.so' not in maps and 'libcudart' not in maps, maps\n"
    )
    run_python(code)


def test_needs_only_the_systems_own_libraries():
    """No cudart, no driver, no Python library, and no path of the machine it was built on."""
    readelf = shutil.which("readelf")
    path = extension().__file__
    if readelf is None:
        pytest.skip("readelf (binutils) is not installed")
    dynamic = subprocess.run(
        [readelf, "-d", path], capture_output=True, text=True, check=True
    ).stdout
    glibc = {f"lib{name}.so" for name in ("c", "m", "dl", "rt", "pthread")} | {"ld-linux-x86-64.so"}
    needed = {re.sub(r"\.\d+$", "", name) for name in re.findall(r"NEEDED.*\[(.*)\]", dynamic)}
    assert "libc.so" in needed
    assert needed <= glibc | {"libstdc++.so", "libgcc_s.so"}
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_exports_only_its_init_function():
    """Statically linked cudart and our kernels must not collide with those of other libraries."""
    nm = shutil.which("nm")
    path = extension().__file__
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    lines = subprocess.run(
        [nm, "-D", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    strong = {line.split()[-1] for line in lines if line.split()[-2] in "TDB"}
    assert strong == {"PyInit__flashkda"}


def test_one_module_for_all_pythons_from_3_12_on():
    name = pathlib.Path(extension().__file__).name
    if sys.version_info >= (3, 12):
        assert name == "_flashkda.abi3.so"
    else:
        assert name.startswith("_flashkda.cpython-311-")


def test_variants():
    extension()
    rows = _extension.variants()
    assert {"arch", "K", "V", "qkv_dtype", "g_dtypes", "beta_dtypes"} == set(rows[0])
    released = dict(arch=90, K=128, V=128, qkv_dtype="bfloat16")
    assert any(released.items() <= row.items() for row in rows)
    for row in rows:
        for name in [row["qkv_dtype"], *row["g_dtypes"], *row["beta_dtypes"]]:
            assert jnp.dtype(name).name == name


# The handlers, as XLA sees them


class ApiVersion(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extensions", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    ]


class Metadata(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("api_version", ApiVersion),
        ("traits", ctypes.c_uint32),
        ("state_type_id", ctypes.c_int64),
    ]


class MetadataExtension(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(Metadata)),
    ]


class CallFrame(ctypes.Structure):
    """XLA_FFI_CallFrame, with zeros for everything that a call for metadata does not read."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extensions", ctypes.POINTER(MetadataExtension)),
        ("rest", ctypes.c_byte * 160),
    ]


def handler_metadata(capsule):
    """What XLA learns of a handler when it is registered."""
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(CallFrame))(
        get_pointer(capsule, None)
    )
    metadata = Metadata(struct_size=ctypes.sizeof(Metadata))
    metadata.api_version.struct_size = ctypes.sizeof(ApiVersion)
    request = MetadataExtension(ctypes.sizeof(MetadataExtension), 1, None, ctypes.pointer(metadata))
    frame = CallFrame(struct_size=168, extensions=ctypes.pointer(request))
    assert handler(ctypes.byref(frame)) is None
    return metadata


def test_handlers_run_on_the_oldest_jax():
    """API 0.3 is that of jax 0.9.1. Each JAX takes its own API and older ones, none takes newer."""
    for stages in extension().registrations().values():
        for capsule in stages.values():
            version = handler_metadata(capsule).api_version
            assert (version.major, version.minor) == (0, 3)


def test_handlers_may_be_captured_in_command_buffers():
    command_buffer_compatible = 1
    for stages in extension().registrations().values():
        assert set(stages) == {"initialize", "execute"}
        assert handler_metadata(stages["execute"]).traits == command_buffer_compatible


def test_registration_is_idempotent():
    targets = {f"jax_flashkda.{stage}" for stage in _primitives._FFI_TARGETS}
    assert set(extension().registrations()) == targets
    _extension.register()
    _extension.register()


def test_lowers_for_cuda_on_this_jax():
    extension()
    x = jax.ShapeDtypeStruct((1, 64, 2, 128), jnp.bfloat16)
    beta = jax.ShapeDtypeStruct((1, 64, 2), jnp.bfloat16)

    def op(*arrays):
        return jax_flashkda.kimi_delta_attention(*arrays, implementation="cuda")

    traced = jax.jit(op).trace(x, x, x, x, beta)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    call = next(line for line in text.splitlines() if "jax_flashkda.forward" in line)
    workspace = _extension.workspace_bytes("forward", 1, 64, 2, 2, 128, 128, 1, False)
    assert "custom_call" in call
    assert f"tensor<{workspace}xui8>" in call


def test_unknown_stage():
    with pytest.raises(ValueError, match="there is no stage 'sideways'"):
        _extension.workspace_bytes("sideways", 1, 64, 2, 2, 128, 128, 1, False)


# The package without the module


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    """The wheel that pip makes where no CUDA compiler is found, without pip."""
    pytest.importorskip("scikit_build_core", reason="the wheel is built with scikit-build-core")
    folder = tmp_path_factory.mktemp("pure")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "runs"))
    code = (
        "import os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "sys.path.insert(0, 'packaging')\n"
        "import flashkda_backend\n"
        "settings = {'cuda': 'off'}\n"
        "needed = ' '.join(flashkda_backend.get_requires_for_build_wheel(settings))\n"
        "assert not any(name in needed for name in ('jaxlib', 'nanobind', 'nvidia', 'cmake'))\n"
        "metadata = flashkda_backend.prepare_metadata_for_build_wheel(sys.argv[2], settings)\n"
        "flashkda_backend.build_wheel(sys.argv[2], settings, os.path.join(sys.argv[2], metadata))\n"
    )
    run_python(code, source, folder, PATH="")  # no compiler of any kind is needed
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_pure_wheel_has_a_name_of_its_own(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure_wheel) as wheel:
        names = wheel.namelist()
        metadata = next(name for name in names if name.endswith("dist-info/WHEEL"))
        assert "Root-Is-Purelib: true" in wheel.read(metadata).decode()
    assert "jax_flashkda/_build_info.py" in names and "jax_flashkda/py.typed" in names
    assert not any(name.endswith(".so") for name in names)


def test_pure_package_says_why_it_has_no_kernels(pure_wheel, tmp_path):
    with zipfile.ZipFile(pure_wheel) as wheel:
        wheel.extractall(tmp_path)
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import jax, jax.numpy as jnp, jax_flashkda\n"
        "from jax_flashkda import _extension\n"
        "assert jax_flashkda.__file__.startswith(sys.argv[1])\n"
        "assert _extension.load() is None\n"
        "x = jnp.ones((1, 16, 2, 128), jnp.bfloat16)\n"
        "beta = jnp.ones((1, 16, 2), jnp.bfloat16)\n"
        "op = jax_flashkda.kimi_delta_attention\n"
        "assert op(x, x, x, -x, beta).shape == x.shape\n"
        "print(jax_flashkda.supported(x, x, x, -x, beta))\n"
        "cuda = jax.jit(lambda *a: op(*a, implementation='cuda')).trace(x, x, x, -x, beta)\n"
        "try:\n"
        "    cuda.lower(lowering_platforms=('cuda',))\n"
        "except NotImplementedError as error:\n"
        "    print(error)\n"
    )
    reason = "the package was built without CUDA, as its cuda=off setting asked"
    supported, refusal = run_python(code, tmp_path).splitlines()
    assert reason in supported
    assert reason in refusal


@pytest.mark.parametrize(
    "cuda, report, reason",
    [
        ("require", "release 11.8, V11.8.89", "is 11.8 and the kernels need CUDA 12.4 or later"),
        ("require", "no such option", "is of unknown version and the kernels need CUDA 12.4"),
        ("nonsense", "", "cuda=nonsense is not one of auto, require, off, package-index"),
    ],
)
def test_a_build_that_cannot_have_kernels_says_so(tmp_path, cuda, report, reason):
    pytest.importorskip("scikit_build_core", reason="the backend wraps scikit-build-core")
    if sys.platform != "linux":
        pytest.skip("kernels are built on Linux alone")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{report}'\n")
    nvcc.chmod(0o755)
    code = (
        "import os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import flashkda_backend\n"
        "try:\n"
        "    flashkda_backend.build_wheel('.', {'cuda': sys.argv[3]})\n"
        "except SystemExit as refusal:\n"
        "    print(refusal)\n"
    )
    assert reason in run_python(code, tmp_path, BACKEND.parent, cuda, CUDACXX=str(nvcc))


def test_source_tree_says_that_it_must_be_installed(tmp_path):
    shutil.copytree(
        pathlib.Path(jax_flashkda.__file__).parent,
        tmp_path / "jax_flashkda",
        ignore=shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__"),
    )
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from jax_flashkda import _extension\n"
        "print(_extension.missing_reason())\n"
    )
    assert "imported from its source tree" in run_python(code, tmp_path)
