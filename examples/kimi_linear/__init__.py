"""Kimi Linear, the hybrid of KDA and latent attention, in Flax NNX.

config.py reads a Hugging Face config.json, model.py is the model, checkpoint.py its files, and
`python -m kimi_linear` (in examples/) continues a text of token ids."""

from .checkpoint import load, save
from .config import Config
from .generate import generate
from .model import KimiLinear

__all__ = ["Config", "KimiLinear", "generate", "load", "save"]
