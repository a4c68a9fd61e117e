"""Files of named tensors: safetensors, one file or shards with an index, as Hugging Face lays them.

    folder/model.safetensors                            all tensors, or
    folder/model-00001-of-00003.safetensors, ...        shards, and
    folder/model.safetensors.index.json                 {"weight_map": {tensor name: shard}}

Headers are read when a checkpoint is opened, tensors when they are asked for; on the way out at
most one shard is in memory. Nothing here knows of models."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    import safetensors
    from safetensors.numpy import save_file
except ModuleNotFoundError as error:
    if error.name != "safetensors":
        raise
    message = "checkpoints need safetensors: pip install 'jax_flashkda[checkpoints]'"
    raise ImportError(message) from error

__all__ = ["CheckpointError", "Tensor", "TensorFiles", "write_tensor_files"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# What safetensors calls the types that a parameter can be read from.
_READABLE = {"BF16", "F16", "F32", "F64"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit: the message lists everything wrong."""


class Tensor(NamedTuple):
    """What a file says of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: "BF16", "F32", "F8_E4M3", ..
    file: Path

    @property
    def readable(self):
        """Whether it is of a floating-point type that numpy and JAX share."""
        return self.dtype in _READABLE


class TensorFiles:
    """The tensors of a checkpoint by name, read one at a time.

    **Arguments**

    - `path`: a folder with `model.safetensors` or `model.safetensors.index.json`, one
      `.safetensors` file, or an index.

    **Raises** `CheckpointError` if there is no such file, if shards are missing, or if a file and
    its index disagree."""

    def __init__(self, path):
        self.path = Path(path)
        self.tensors = {}  # name -> Tensor
        self._open = (None, None)  # the file read last: consecutive tensors share a shard
        index, files = _files_of(self.path)
        for file in files:
            with _open(file) as handle:
                for name in handle.keys():
                    tensor = handle.get_slice(name)
                    if index is None or index.get(name) == file.name:
                        shape = tuple(tensor.get_shape())
                        self.tensors[name] = Tensor(shape, tensor.get_dtype(), file)
        absent = [name for name in index or () if name not in self.tensors]
        if absent:
            raise CheckpointError(
                f"{self.path}: the index names tensors that its files do not hold:"
                f" {shortened(absent)}. The download or copy is incomplete, or shards of"
                " different checkpoints are mixed"
            )

    def read(self, name, index=()):
        """The tensor as a numpy array, or the part of it that a tuple of slices selects."""
        file = self.tensors[name].file
        if self._open[0] != file:
            self._open = (file, _open(file))
        tensor = self._open[1].get_slice(name)
        if not tensor.get_shape():  # a scalar has nothing to slice
            return self._open[1].get_tensor(name)
        return tensor[tuple(index) or slice(None)]


def write_tensor_files(
    folder,
    tensors: dict[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]],
    *,
    max_shard_bytes: int,
):
    """Write tensors in the order given, cut into shards where they exceed `max_shard_bytes`.

    **Arguments**

    - `folder`: made if it does not exist; it must hold no safetensors files.
    - `tensors`: name -> (shape, dtype, function that makes the array), called once, in order.
    - `max_shard_bytes`: size of a shard; a tensor larger than it gets one of its own.

    Files get their final name once they are complete, and the index is written last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    existing = sorted(file.name for file in (*folder.glob("*.safetensors"), *folder.glob(INDEX)))
    if existing:
        raise FileExistsError(
            f"{folder} already holds {shortened(existing)}: delete them or choose another folder"
        )
    sizes = {
        name: int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        for name, (shape, dtype, _) in tensors.items()
    }
    shards = _shards(sizes, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = SINGLE if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # In C order, because safetensors writes the bytes as they lie.
        arrays = {name: np.asarray(tensors[name][2](), order="C") for name in names}
        unfinished = folder / f"{file}.unfinished"
        save_file(arrays, unfinished, metadata={"format": "pt"})  # the layout is that of PyTorch
        os.replace(unfinished, folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def shortened(names, most=20):
    """A list for an error message: all of a few, the first of many and how many more."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def _files_of(path):
    """(index or None, files): which files make up the checkpoint."""
    if path.is_dir():
        if (path / INDEX).exists():
            path = path / INDEX
        elif (path / SINGLE).exists():
            path = path / SINGLE
        else:
            found = shortened(sorted(entry.name for entry in path.iterdir())) or "nothing"
            raise CheckpointError(f"{path} holds neither {INDEX} nor {SINGLE}, but {found}")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.suffix != ".json":
        return None, [path]
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        files = sorted({path.parent / file for file in weight_map.values()})
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of shards: it has no weight_map") from error
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(f"{path} names shards that are not there: {shortened(missing)}")
    return weight_map, files


def _open(file):
    try:
        return safetensors.safe_open(file, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def _shards(sizes, max_shard_bytes):
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
