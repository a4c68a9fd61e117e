"""The static description of one call: everything about it that is not an array.

Below the public op every call looks the same. Optional arguments are resolved, states are 5-D,
every operand has a leading batch axis, and absent operands are left out rather than passed as
None; `Problem` says which ones are there. It is hashable, so it is the static parameter of the
primitives and of the custom_vjp. Each class also tells what is common to its calls: the public
`function`, its `stages` (forward and backward, or one), and `data`, the operand that the results
are like and whose placement on devices is kept.

Forward results: o in v's dtype, final_state like initial_state and chunk_states if asked for.
Backward operands: the forward operands, then one cotangent per forward result.
Backward results: a gradient per float operand, in order, in that operand's shape and dtype.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

# The axes of every operand and result, in operand order. A cotangent has its primal's axes.
# A_log and dt_bias (f32) carry a row per batch row: their sum over rows belongs to the caller, so
# that no reduction over batch sits in the op. States are f32 (f64 with f64 inputs).
AXES = {
    "q": ("B", "T", "H", "K"),
    "k": ("B", "T", "H", "K"),
    "v": ("B", "T", "HV", "V"),
    "g": ("B", "T", "HV", "K"),
    "beta": ("B", "T", "HV"),
    "A_log": ("B", "HV"),
    "dt_bias": ("B", "HV", "K"),
    "initial_state": ("B", "N", "HV", "K", "V"),
    "segment_ids": ("B", "T"),
    "o": ("B", "T", "HV", "V"),
    "final_state": ("B", "N", "HV", "K", "V"),
    "chunk_states": ("B", "M", "HV", "K", "V"),  # M = T // 64
    "factor": ("B", "HV", "K", "J"),  # J = K: a segment takes its state S to factor S + offset
    "offset": ("B", "HV", "K", "V"),
    # What the kernels make of a row before they know the state that comes in: operands of X bytes
    # a token, beta with room for Y numbers a token, and decays of D chunks and segments in C
    # channels.
    "prepared": ("B", "HV", "T", "X"),
    "betas": ("B", "HV", "T", "Y"),
    "decays": ("B", "HV", "D", "C"),
}
PREPARED = ("prepared", "betas", "decays")


class _Description:
    """What follows from the names and axes that a call gives its operands."""

    @property
    def differentiable_names(self) -> tuple[str, ...]:
        """The operands that get a gradient: all but segment_ids."""
        return tuple(name for name in self.operand_names if name != "segment_ids")

    def named(self, operands) -> dict[str, object]:
        """The forward operands by name; cotangents after them are ignored."""
        return dict(zip(self.operand_names, operands, strict=False))

    def sizes(self, operands) -> dict[str, int]:
        """The size of every axis letter."""
        sizes = {}
        for name, operand in self.named(operands).items():
            sizes.update(zip(self.axes[name], operand.shape, strict=True))
        return sizes


class _StepDescription(_Description):
    """Of a step, a call of one stage: its sequences have states of their own or use a pool."""

    @property
    def sequences(self) -> str:
        """The axis of sequences."""
        return "R" if self.has_state_indices else "B"

    @property
    def parameters(self) -> str:
        """The axis of parameters that sequences share, or have each its own of."""
        return self.sequences if self.parameters_per_sequence else "P"

    @property
    def states(self) -> str:
        """The axis of states."""
        return "S" if self.has_state_indices else "B"

    def signature(self, stage):
        """(operand names, result names), as `Problem.signature`."""
        del stage
        return self.operand_names, self.result_names

    def named(self, operands) -> dict[str, object]:
        """The operands by name."""
        return dict(zip(self.operand_names, operands, strict=True))


@dataclasses.dataclass(frozen=True)
class Options:
    """What every call has; `_validation.check_options` fills it."""

    gate: Literal["log_decay", "softplus", "bounded"] = "log_decay"
    gate_lower_bound: float = -5.0  # read by "bounded" alone
    beta_is_logits: bool = False
    allow_neg_eigval: bool = False
    qk_l2norm: bool = False
    scale: float = 1.0
    implementation: Literal["cuda", "xla"] | None = None
    has_A_log: bool = False
    has_dt_bias: bool = False


@dataclasses.dataclass(frozen=True)
class Problem(Options, _Description):
    function: ClassVar[str] = "kimi_delta_attention"
    stages: ClassVar[tuple[str, ...]] = ("forward", "backward")
    data: ClassVar[str] = "v"

    padding_segment_id: int | None = 0
    max_segments: int = 1  # N, the segment states a row carries; 1 without segment_ids
    return_final_state: bool = False
    return_chunk_states: bool = False
    context_axis: str | None = None  # of the whole call; a shard's own problem has none
    residual_name: str | None = None
    has_initial_state: bool = False
    has_segment_ids: bool = False

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The axes of every operand and result by name."""
        return AXES

    @property
    def operand_names(self) -> tuple[str, ...]:
        """The forward operands that are present, in order."""
        optional = ("A_log", "dt_bias", "initial_state", "segment_ids")
        present = tuple(name for name in optional if getattr(self, f"has_{name}"))
        return ("q", "k", "v", "g", "beta", *present)

    @property
    def result_names(self) -> tuple[str, ...]:
        """The forward results, in order."""
        final_state = ("final_state",) if self.return_final_state else ()
        return ("o", *final_state, *(("chunk_states",) if self.return_chunk_states else ()))

    def signature(self, stage: str):
        """(operand names, result names) of a stage; a cotangent goes by the name of its primal."""
        forward, backward = self.operand_names, self.operand_names + self.result_names
        return {
            "forward": (forward, self.result_names),
            "backward": (backward, self.differentiable_names),
            "state_maps": (forward, ("factor", "offset", *PREPARED)),
            "state_gradient": (backward, ("initial_state", *PREPARED)),
            "prepared_forward": (forward + PREPARED, self.result_names),
            "prepared_backward": (backward + PREPARED, self.differentiable_names),
        }[stage]

    def sizes(self, operands) -> dict[str, int]:
        """The size of every axis letter: B, T, H, HV, K, V, N, and M where it is used."""
        sizes = {"N": self.max_segments} | super().sizes(operands)
        return sizes | ({"M": sizes["T"] // 64} if self.return_chunk_states else {})


@dataclasses.dataclass(frozen=True)
class StepProblem(Options, _StepDescription):
    """The static description of one decode step, the `Problem` of its one stage, "step".

    Axes: B sequences of their own states; with state_indices R sequences of a pool of S states.
    A pool belongs to all sequences, so R and S are never split over devices. P is the one row of
    gate parameters that all sequences share; a vmap over parameters gives each sequence its own.
    """

    function: ClassVar[str] = "kimi_delta_attention_step"
    stages: ClassVar[tuple[str, ...]] = ("step",)
    data: ClassVar[str] = "v"
    parameter_names: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")

    return_token_states: bool = False
    has_state_indices: bool = False
    parameters_per_sequence: bool = False

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The axes of every operand and result by name."""
        n = self.sequences
        return {
            "q": (n, "T", "H", "K"),
            "k": (n, "T", "H", "K"),
            "v": (n, "T", "HV", "V"),
            "g": (n, "T", "HV", "K"),
            "beta": (n, "T", "HV"),
            "A_log": (self.parameters, "HV"),
            "dt_bias": (self.parameters, "HV", "K"),
            "state": (self.states, "HV", "K", "V"),
            "state_indices": ("R",),
            "o": (n, "T", "HV", "V"),
            "token_states": (n, "T", "HV", "K", "V"),
        }

    @property
    def operand_names(self) -> tuple[str, ...]:
        """The operands that are present, in order."""
        parameters = tuple(n for n in ("A_log", "dt_bias") if getattr(self, f"has_{n}"))
        indices = ("state_indices",) if self.has_state_indices else ()
        return ("q", "k", "v", "g", "beta", *parameters, "state", *indices)

    @property
    def result_names(self) -> tuple[str, ...]:
        """The results, in order; "state" takes the place of the operand of this name."""
        return ("o", "state", "token_states") if self.return_token_states else ("o", "state")


@dataclasses.dataclass(frozen=True)
class ShortConvProblem(_Description):
    """The static description of one short convolution.

    Channels are two axes: H, which is split over devices, and K. Kernel, bias and initial states
    are f32 (f64 with f64 inputs), the parameters a row per batch row. Ids are integers of any type.
    """

    function: ClassVar[str] = "short_conv"
    stages: ClassVar[tuple[str, ...]] = ("short_conv", "short_conv_backward")
    data: ClassVar[str] = "x"
    residual_name: ClassVar[None] = None

    silu: bool = True
    padding_segment_id: int | None = 0
    max_segments: int = 1  # N, the initial states of a row; 1 without them
    implementation: Literal["cuda", "xla"] | None = None
    has_bias: bool = False
    has_initial_state: bool = False
    has_segment_ids: bool = False

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The axes of every operand and result by name; J is W - 1."""
        return {
            "x": ("B", "T", "H", "K"),
            "kernel": ("B", "W", "H", "K"),
            "bias": ("B", "H", "K"),
            "initial_state": ("B", "N", "J", "H", "K"),
            "segment_ids": ("B", "T"),
            "y": ("B", "T", "H", "K"),
        }

    @property
    def operand_names(self) -> tuple[str, ...]:
        """The forward operands that are present, in order."""
        optional = ("bias", "initial_state", "segment_ids")
        return ("x", "kernel", *(name for name in optional if getattr(self, f"has_{name}")))

    def signature(self, stage):
        """(operand names, result names), as `Problem.signature`."""
        if stage == "short_conv":
            return self.operand_names, ("y",)
        return (*self.operand_names, "y"), self.differentiable_names


@dataclasses.dataclass(frozen=True)
class ShortConvStepProblem(_StepDescription):
    """The static description of the short convolution's step, with axes like `StepProblem`'s."""

    function: ClassVar[str] = "short_conv_step"
    stages: ClassVar[tuple[str, ...]] = ("short_conv_step",)
    data: ClassVar[str] = "x"
    parameter_names: ClassVar[tuple[str, ...]] = ("kernel", "bias")

    silu: bool = True
    implementation: Literal["cuda", "xla"] | None = None
    has_bias: bool = False
    has_state_indices: bool = False
    parameters_per_sequence: bool = False

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The axes of every operand and result by name; J is W - 1."""
        n = self.sequences
        return {
            "x": (n, "T", "H", "K"),
            "kernel": (self.parameters, "W", "H", "K"),
            "bias": (self.parameters, "H", "K"),
            "state": (self.states, "J", "H", "K"),
            "state_indices": ("R",),
            "y": (n, "T", "H", "K"),
        }

    @property
    def operand_names(self) -> tuple[str, ...]:
        """The operands that are present, in order."""
        bias = ("bias",) if self.has_bias else ()
        return ("x", "kernel", *bias, "state", *(("state_indices",) * self.has_state_indices))

    @property
    def result_names(self) -> tuple[str, ...]:
        """The results, in order; "state" takes the place of the operand of this name."""
        return ("y", "state")
