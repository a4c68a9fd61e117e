"""Kimi Delta Attention for JAX: CUDA kernels on NVIDIA Hopper GPUs, the same program on XLA elsewhere."""

from . import reference as reference
from ._kda import kimi_delta_attention as kimi_delta_attention
from ._kda import supported as supported
