"""Continue token ids with the weights of a folder: python -m kimi_linear FOLDER 1 2 3

It runs in examples/, or with that on PYTHONPATH. The folder is one as released or as transformers'
save_pretrained writes it: config.json and safetensors. Ids go in and come out: a tokenizer is not
part of this example."""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from .checkpoint import load
from .generate import generate


def main():
    parser = argparse.ArgumentParser(prog="kimi_linear", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=int, nargs="+", help="the ids to continue")
    parser.add_argument("--length", type=int, default=16, help="how many tokens to append")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    # The kernels compute in bfloat16, the type of the released weights.
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    model = load(arguments.folder, dtype=dtype, param_dtype=dtype)
    count = sum(array.size for array in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{count / 1e6:.2f} M parameters in {jnp.dtype(dtype).name}")
    key = jax.random.key(arguments.seed)
    options = dict(temperature=arguments.temperature, key=key)
    continued = generate(model, [arguments.tokens], arguments.length, **options)
    print(*continued[0].tolist())


if __name__ == "__main__":
    main()
