"""Kimi Delta Attention for JAX: CUDA kernels on NVIDIA Hopper GPUs, the same program on XLA
elsewhere.
"""

from . import reference as reference
from ._kda import kimi_delta_attention as kimi_delta_attention
from ._kda import supported as supported
from ._packing import PackedDocuments as PackedDocuments
from ._packing import cu_seqlens_to_segment_ids as cu_seqlens_to_segment_ids
from ._packing import lengths_to_segment_ids as lengths_to_segment_ids
from ._packing import pack_documents as pack_documents
from ._packing import segment_ids_to_cu_seqlens as segment_ids_to_cu_seqlens
from ._packing import segment_ids_to_lengths as segment_ids_to_lengths
from ._packing_stream import PackedStream as PackedStream
from ._primitives import DISABLE_JAX_EXPORT_CHECKS as DISABLE_JAX_EXPORT_CHECKS
from ._short_conv import short_conv as short_conv
from ._short_conv import short_conv_state as short_conv_state
from ._short_conv import short_conv_step as short_conv_step
from ._step import kimi_delta_attention_step as kimi_delta_attention_step
from ._step import step_supported as step_supported


def __getattr__(name):
    # The layer alone needs flax, which is an optional dependency: it is imported when asked for.
    if name in ("KimiDeltaAttention", "KimiDeltaCache"):
        try:
            from . import _layer
        except ModuleNotFoundError as error:
            if error.name != "flax":
                raise
            message = f"{name} needs flax: pip install 'jax_flashkda[flax]'"
            raise ImportError(message) from error
        return getattr(_layer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
