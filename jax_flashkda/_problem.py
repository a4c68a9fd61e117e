"""The static description of one call: everything about it that is not an array.

Below the public op every call looks the same. Optional arguments are resolved, states are 5-D,
every operand has a leading batch axis, and absent operands are left out rather than passed as
None; `Problem` says which ones are there. It is hashable, so it is the static parameter of the
primitives and of the custom_vjp.

Forward results: o in v's dtype, and final_state like initial_state if asked for.
Backward operands: the forward operands, then one cotangent per forward result.
Backward results: a gradient per float operand, in order, in that operand's shape and dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

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
}


@dataclasses.dataclass(frozen=True)
class Problem:
    gate: Literal["log_decay", "softplus", "bounded"] = "log_decay"
    gate_lower_bound: float = -5.0  # read by "bounded" alone
    beta_is_logits: bool = False
    allow_neg_eigval: bool = False
    qk_l2norm: bool = False
    scale: float = 1.0
    padding_segment_id: int | None = 0
    max_segments: int = 1  # N, the segment states a row carries; 1 without segment_ids
    return_final_state: bool = False
    residual_name: str | None = None
    implementation: Literal["cuda", "xla"] | None = None
    has_A_log: bool = False
    has_dt_bias: bool = False
    has_initial_state: bool = False
    has_segment_ids: bool = False

    @property
    def operand_names(self) -> tuple[str, ...]:
        """The forward operands that are present, in order."""
        optional = ("A_log", "dt_bias", "initial_state", "segment_ids")
        present = tuple(name for name in optional if getattr(self, f"has_{name}"))
        return ("q", "k", "v", "g", "beta", *present)

    @property
    def differentiable_names(self) -> tuple[str, ...]:
        """The operands that get a gradient: all but segment_ids."""
        return tuple(name for name in self.operand_names if name != "segment_ids")

    @property
    def result_names(self) -> tuple[str, ...]:
        """The forward results, in order."""
        return ("o", "final_state") if self.return_final_state else ("o",)

    def signature(self, stage: Literal["forward", "backward"]):
        """(operand names, result names) of a stage; a cotangent goes by the name of its primal."""
        if stage == "forward":
            return self.operand_names, self.result_names
        return self.operand_names + self.result_names, self.differentiable_names

    def named(self, operands) -> dict[str, object]:
        """The forward operands by name; cotangents after them are ignored."""
        return dict(zip(self.operand_names, operands, strict=False))

    def sizes(self, operands) -> dict[str, int]:
        """The size of every axis letter: B, T, H, HV, K, V, N."""
        sizes = {"N": self.max_segments}
        for name, operand in self.named(operands).items():
            sizes.update(zip(AXES[name], operand.shape, strict=True))
        return sizes
