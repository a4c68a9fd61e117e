"""Checkpoints of KDA layers and of models that hold them, under the names of PyTorch's models.

    from jax_flashkda import KimiDeltaAttention, checkpoints

    layer = KimiDeltaAttention(2304, 32, 128, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    checkpoints.load_layer(layer, "Kimi-Linear-48B-A3B-Base", "model.layers.0.self_attn")
    checkpoints.save_layer(layer, "my_layer", naming="fla")

A *layout* says how one parameter lies in files: as which pieces of which tensors, and how to get
from there to the parameter and back. *Rules* give each parameter of a module, by its path
("q_proj.kernel"), the layouts in which it is recognised; the first of them is the one written.
`layer_rules` has those of `KimiDeltaAttention`; for a whole model its author adds the rest out of
`linear`, `reshaped`, `convolution`, `part_of` and `stacked`; docs/checkpoints.md shows how.

Everything is checked against the files' headers before a parameter changes; then tensors are read
one at a time, converted to the parameter's type and put where the parameter is, or, in a module
made by `nnx.eval_shape`, where its sharding says it should be."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

try:
    from flax import nnx
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    message = "checkpoints need flax: pip install 'jax_flashkda[checkpoints]'"
    raise ImportError(message) from error

from ._layer import KimiDeltaAttention
from ._tensor_files import CheckpointError, TensorFiles, shortened, write_tensor_files

__all__ = [
    "CheckpointError",
    "Layout",
    "Piece",
    "convolution",
    "layer_rules",
    "linear",
    "load",
    "load_layer",
    "part_of",
    "reshaped",
    "save",
    "save_layer",
    "stacked",
]


class Piece(NamedTuple):
    """A tensor of a checkpoint, or the part of it that belongs to one parameter."""

    tensor: str  # its name
    shapes: tuple[tuple[int, ...], ...]  # the shapes it may have; the first one is written
    index: tuple[slice, ...] = ()  # the part, in the first shape; () is all of it


class Layout(NamedTuple):
    """How a parameter lies in a checkpoint."""

    pieces: tuple[Piece, ...]
    from_pieces: Callable[[list[np.ndarray]], np.ndarray]  # the parameter from its pieces
    to_pieces: Callable[[np.ndarray], list[np.ndarray]]  # and back


Rules = dict[str, tuple[Layout, ...]]


# Layouts.


def reshaped(tensor: str, shape, *stored) -> Layout:
    """The same numbers in the same order: `shape` in the module, any of `stored` in the file.

    Without `stored` the file has `shape` too."""
    shapes = tuple(map(tuple, stored)) or (tuple(shape),)
    return Layout(
        (Piece(tensor, shapes),),
        lambda pieces: pieces[0].reshape(shape),
        lambda array: [array.reshape(shapes[0])],
    )


def linear(tensor: str, shape, inputs: int = 1, *, leading: int = 0) -> Layout:
    """PyTorch's Linear weight [out, in]; `shape` begins with `inputs` input axes.

    `leading` axes stand before these in the module and in the file."""
    before, inside, outside = shape[:leading], shape[leading:][:inputs], shape[leading:][inputs:]
    in_size, out_size = _size(inside), _size(outside)
    return Layout(
        (Piece(tensor, ((*before, out_size, in_size),)),),
        lambda pieces: np.swapaxes(pieces[0], -1, -2).reshape(shape),
        lambda array: [np.swapaxes(array.reshape(*before, in_size, out_size), -1, -2)],
    )


def convolution(tensor: str, shape) -> Layout:
    """PyTorch's depthwise Conv1d weight, [channels, 1, W] or without the 1; `shape` is [W, ...]."""
    width, channels = shape[0], _size(shape[1:])
    return Layout(
        (Piece(tensor, ((channels, 1, width), (channels, width))),),
        lambda pieces: pieces[0].reshape(channels, width).T.reshape(shape),
        lambda array: [array.reshape(width, channels).T[:, None]],
    )


def part_of(tensor: str, start: int, size: int, layout: Layout, *, axis: int = 0) -> Layout:
    """A layout of one piece whose tensor is `start : start + its length` along `axis` of a larger
    one, `tensor`, which has `size` entries there."""
    (piece,) = layout.pieces
    length = piece.shapes[0][axis]
    index = (slice(None),) * axis + (slice(start, start + length),)
    shapes = tuple(
        (*shape[:axis], size, *shape[axis + 1 :]) for shape in piece.shapes if len(shape) > axis
    )
    return layout._replace(pieces=(Piece(tensor, shapes, index),))


def stacked(layouts: Iterable[Layout]) -> Layout:
    """A parameter whose leading axis counts what lies in tensors of its own, e.g. experts."""
    layouts = tuple(layouts)
    counts = [len(layout.pieces) for layout in layouts]
    starts = np.cumsum([0, *counts]).tolist()

    def from_pieces(pieces):
        return np.stack(
            [
                layout.from_pieces(pieces[start : start + count])
                for layout, start, count in zip(layouts, starts, counts, strict=False)
            ]
        )

    def to_pieces(array):
        return [
            piece
            for layout, entry in zip(layouts, array, strict=True)
            for piece in layout.to_pieces(entry)
        ]

    return Layout(sum((layout.pieces for layout in layouts), ()), from_pieces, to_pieces)


# The layer.

NAMINGS = ("kimi_linear", "transformers", "fla")


def layer_rules(layer: KimiDeltaAttention, prefix: str = "", naming: str = "kimi_linear") -> Rules:
    """Rules of a `KimiDeltaAttention`.

    **Arguments**

    - `layer`: the layer, with values or abstract.
    - `prefix`: what stands before the names, e.g. "model.layers.0.self_attn".
    - `naming`: the layout that `save` writes; all of them are recognised by `load`:

      | | decay gate | output gate | convolutions | A_log |
      |---|---|---|---|---|
      | "kimi_linear", the released models | f_a_proj, f_b_proj | g_a_proj, g_b_proj | q_, k_, v_conv1d | [1, 1, HV, 1] |
      | "transformers", its module's state_dict | forget_gate.f_a_proj, .. | g_a_proj, g_b_proj | conv1d, fused | [1, 1, HV, 1] |
      | "fla", FLA's layer | f_proj.0, f_proj.1 | g_proj.0, g_proj.1 | q_, k_, v_conv1d | [HV] |

      A full-rank output gate is g_proj everywhere. A_log is recognised in both shapes.

    **Returns** a dict from parameter paths to layouts.

    **Raises** `ValueError` for another naming."""  # noqa: E501
    if naming not in NAMINGS:
        raise ValueError(f"naming must be one of {', '.join(NAMINGS)}, got {naming!r}")
    prefix = _with_dot(prefix)
    shapes = {path: variable.shape for path, variable in _variables(layer).items()}
    convolved = [_size(shapes[f"{name}_conv1d.kernel"][1:]) for name in "qkv"]
    starts = dict(zip("qkv", np.cumsum([0, *convolved]).tolist(), strict=False))

    def layouts(path):
        """{naming: layout}; the namings that are absent write the first."""
        shape = shapes[path]
        module = path.removesuffix(".kernel")
        if path == "A_log":
            both = (1, 1, *shape, 1), shape
            return {
                "kimi_linear": reshaped(f"{prefix}A_log", shape, *both),
                "transformers": reshaped(f"{prefix}forget_gate.A_log", shape, *both),
                "fla": reshaped(f"{prefix}A_log", shape, *both[::-1]),
            }
        if path == "dt_bias":
            stored = (_size(shape),), shape
            return {
                "kimi_linear": reshaped(f"{prefix}dt_bias", shape, *stored),
                "transformers": reshaped(f"{prefix}forget_gate.dt_bias", shape, *stored),
            }
        if path == "o_norm.scale":
            return {"kimi_linear": reshaped(f"{prefix}o_norm.weight", shape)}
        if path.endswith("_conv1d.kernel"):
            apart = convolution(f"{prefix}{module}.weight", shape)
            fused = f"{prefix}conv1d.weight"
            return {
                "kimi_linear": apart,
                "transformers": part_of(fused, starts[module[0]], sum(convolved), apart),
            }
        if path.endswith(".bias"):
            stored = ((_size(shape),),)
            module = path.removesuffix(".bias")
            names = {"kimi_linear": module}
            if module == "g_b_proj":
                names["fla"] = "g_proj.1"
            return {
                naming: reshaped(f"{prefix}{name}.bias", shape, *stored)
                for naming, name in names.items()
            }
        names = {"kimi_linear": module}
        if module in ("f_a_proj", "f_b_proj"):
            names["transformers"] = f"forget_gate.{module}"
        if re.fullmatch("[fg]_[ab]_proj", module):
            names["fla"] = f"{module[0]}_proj.{'ab'.index(module[2])}"
        inputs = 2 if module == "o_proj" else 1
        return {
            naming: linear(f"{prefix}{name}.weight", shape, inputs)
            for naming, name in names.items()
        }

    rules = {}
    for path in shapes:
        known = layouts(path)
        written = known.get(naming, known["kimi_linear"])
        rules[path] = (written, *(layout for layout in known.values() if layout is not written))
    return rules


def load_layer(layer: KimiDeltaAttention, path, prefix: str = "") -> None:
    """Load a `KimiDeltaAttention` from a checkpoint of it, or of a model that it is part of.

    **Arguments**

    - `layer`: changed in place. Its options must be those of the checkpoint; parameters keep their
      types and shardings.
    - `path`: folder, `.safetensors` file or index, see `load`.
    - `prefix`: what stands before the layer's names, e.g. "model.layers.0.self_attn".

    The names may be those of the released models, of transformers' modules or of FLA's layer.

    **Raises** `CheckpointError` as `load` does; where an option of the layer explains it, the
    message says which."""
    files = TensorFiles(path)
    try:
        load(layer, files, layer_rules(layer, prefix), prefix=prefix)
    except CheckpointError as error:
        hints = _hints(layer, files.tensors, _with_dot(prefix))
        raise CheckpointError("\n  ".join([str(error), *hints])) from None


def save_layer(
    layer: KimiDeltaAttention,
    folder,
    prefix: str = "",
    *,
    naming: str = "kimi_linear",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Save a `KimiDeltaAttention`; arguments as for `layer_rules` and `save`."""
    save(layer, folder, layer_rules(layer, prefix, naming), max_shard_bytes=max_shard_bytes)


def _hints(layer, tensors, prefix):
    """Options of the layer that a checkpoint's names contradict."""
    names = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    full_rank = "g_proj.weight" in names
    low_rank = not names.isdisjoint({"g_a_proj.weight", "g_proj.0.weight"})
    bias = not names.isdisjoint({"g_proj.1.bias", "g_proj.bias", "g_b_proj.bias"})
    hints = []
    if full_rank and layer.output_gate == "low_rank":
        hints.append("the checkpoint's output gate has full rank: output_gate='full_rank'")
    if low_rank and layer.output_gate == "full_rank":
        hints.append("the checkpoint's output gate has low rank: output_gate='low_rank'")
    ours = any(path in ("g_proj.bias", "g_b_proj.bias") for path in _variables(layer))
    if bias != ours and (full_rank or low_rank):
        hints.append(f"the layer must be made with output_gate_bias={bias}")
    if not names and tensors:
        hints.append(
            f"nothing begins with {prefix!r}; the checkpoint holds {shortened(tensors, 5)}"
        )
    return hints


# Loading and saving.


def load(module: nnx.Module, path, rules: Rules, *, prefix: str = "", ignore=()) -> None:
    """Load the parameters of a module from a checkpoint.

    **Arguments**

    - `module`: changed in place. Each parameter keeps its type and sharding; those of a module made
      by `nnx.eval_shape` (or `nnx.get_abstract_model`, for shardings) come into being here, so
      that a model which fits once need not fit twice.
    - `path`: a folder with `model.safetensors` or with shards and their index, one `.safetensors`
      file, or an index.
    - `rules`: for each `nnx.Param` of the module, and any other variable that is to be loaded, the
      layouts in which it is recognised.
    - `prefix`: tensors outside it are not looked at.
    - `ignore`: regular expressions; a tensor is not unexpected if one matches its name's beginning.

    **Raises** `CheckpointError`, before anything changes, listing every tensor that is missing,
    unexpected, misshapen, or of a type that is no float of 16 bits or more. `ValueError`, before
    anything changes, listing the parameters that their mesh does not divide, or if a parameter has
    no rule, or a rule no variable."""
    files = path if isinstance(path, TensorFiles) else TensorFiles(path)
    variables = _variables_of_rules(module, rules)
    chosen = {name: _recognised(rules[name], files.tensors) for name in variables}
    _check_fit(chosen, files, _with_dot(prefix), ignore)
    _check_places(variables)
    for name, variable in variables.items():
        pieces = [_read(files, piece) for piece in chosen[name].pieces]
        value = chosen[name].from_pieces(pieces)
        variable.set_value(_placed(value, variable.get_value()))


def save(module: nnx.Module, folder, rules: Rules, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Save the parameters of a module as safetensors, in the first layout of each.

    **Arguments**

    - `module`: all of it must be on devices of this process.
    - `folder`: made if need be. One file `model.safetensors`, or shards with an index. Types are
      those of the parameters.
    - `rules`: as for `load`.
    - `max_shard_bytes`: the size of a shard, in bytes of tensors.

    **Raises** `FileExistsError` if the folder holds a checkpoint; `ValueError` if a parameter has
    no rule, or a rule no variable, or the layouts leave a part of a tensor open."""
    variables = _variables_of_rules(module, rules)
    writer = _Writer({name: (v, rules[name][0]) for name, v in variables.items()})
    write_tensor_files(folder, writer.tensors, max_shard_bytes=max_shard_bytes)


class _Writer:
    """Assembles tensors from parameters; a parameter is on the host while its pieces are due."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.pieces = {}  # parameter -> {piece number: array}
        self.sources = {}  # tensor -> [(parameter, piece number, piece)]
        for name, (_, layout) in parameters.items():
            for number, piece in enumerate(layout.pieces):
                self.sources.setdefault(piece.tensor, []).append((name, number, piece))
        self.tensors = {tensor: self._specification(tensor) for tensor in self.sources}

    def _specification(self, tensor):
        sources = self.sources[tensor]
        shape = sources[0][2].shapes[0]
        filled = sum(_size(_shape_of_part(shape, piece.index)) for _, _, piece in sources)
        if filled != _size(shape) or any(piece.shapes[0] != shape for _, _, piece in sources):
            owners = ", ".join(name for name, _, _ in sources)
            raise ValueError(f"{tensor} {list(shape)} is not filled exactly once by {owners}")
        dtypes = [self.parameters[name][0].dtype for name, _, _ in sources]
        return shape, np.result_type(*dtypes), lambda: self._assemble(tensor)

    def _assemble(self, tensor):
        shape, dtype, _ = self.tensors[tensor]
        result = np.empty(shape, dtype)
        for name, number, piece in self.sources[tensor]:
            if name not in self.pieces:
                variable, layout = self.parameters[name]
                arrays = layout.to_pieces(np.asarray(variable.get_value()))
                self.pieces[name] = dict(enumerate(arrays))
            result[piece.index] = self.pieces[name].pop(number)
            if not self.pieces[name]:
                del self.pieces[name]
        return result


def _variables(module):
    """The variables of a module by path, "layers.0.attention.q_proj.kernel"."""
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable)
    }


def _variables_of_rules(module, rules):
    variables = _variables(module)
    without_rule = [
        path for path, v in variables.items() if isinstance(v, nnx.Param) and path not in rules
    ]
    without_variable = [path for path in rules if path not in variables]
    if without_rule or without_variable:
        raise ValueError(
            f"{type(module).__name__}: parameters without a rule: {shortened(without_rule) or '-'};"
            f" rules without a variable: {shortened(without_variable) or '-'}"
        )
    return {path: variables[path] for path in rules}


def _recognised(layouts, tensors):
    """The layout whose tensors are there; else the one that most of them are there of."""
    present = lambda layout: sum(piece.tensor in tensors for piece in layout.pieces)
    return max(layouts, key=lambda layout: present(layout) / len(layout.pieces))


def _check_fit(chosen, files, prefix, ignore):
    pieces = [piece for layout in chosen.values() for piece in layout.pieces]
    expected = {piece.tensor: piece for piece in pieces}
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in ignore) or "(?!)")
    missing = [name for name in expected if name not in files.tensors]
    unexpected = [
        name
        for name in files.tensors
        if name.startswith(prefix) and name not in expected and not ignored.match(name)
    ]
    misshapen, unreadable = [], []
    for name, piece in expected.items():
        tensor = files.tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape not in piece.shapes:
            shapes = " or ".join(str(list(shape)) for shape in piece.shapes)
            misshapen.append(f"{name} is {list(tensor.shape)}, not {shapes}")
        if not tensor.readable:
            unreadable.append(f"{name} is {tensor.dtype}")
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "misshapen": misshapen,
        "of a type that must be dequantised or converted first": unreadable,
    }
    if any(problems.values()):
        lines = [
            f"{len(names)} {what}: {shortened(names)}" for what, names in problems.items() if names
        ]
        raise CheckpointError("\n  ".join([f"{files.path} does not fit the module:", *lines]))


def _check_places(variables):
    problems = []
    for name, variable in variables.items():
        sharding = variable.get_value().sharding
        try:
            if sharding is not None:
                sharding.shard_shape(variable.shape)
        except ValueError:
            mesh = sharding.mesh
            problems.append(f"{name} {list(variable.shape)} as {sharding.spec}")
    if problems:
        sizes = ", ".join(f"{axis} = {size}" for axis, size in mesh.shape.items())
        raise ValueError(
            f"the mesh ({sizes}) does not divide {shortened(problems)}: choose other sizes of the"
            " mesh, or name no axis there"
        )


def _read(files, piece):
    shape = files.tensors[piece.tensor].shape
    if shape == piece.shapes[0]:
        return files.read(piece.tensor, piece.index)
    return files.read(piece.tensor).reshape(piece.shapes[0])[piece.index]


def _placed(value, like):
    """A numpy array as a JAX array of the type and at the place of `like`."""
    value = value.astype(like.dtype)
    sharding = like.sharding
    if sharding is None or not getattr(like, "committed", True):
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _shape_of_part(shape, index):
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    return tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))


def _with_dot(prefix):
    return prefix + "." if prefix and not prefix.endswith(".") else prefix


def _size(shape):
    return int(np.prod(shape, dtype=np.int64))
