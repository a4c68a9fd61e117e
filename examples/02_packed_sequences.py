"""Pack documents of many lengths into rows; segment ids keep them apart, exactly.

python examples/02_packed_sequences.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashkda import kimi_delta_attention, pack_documents, segment_ids_to_cu_seqlens

SEQ_LEN, H, D = 192, 2, 128

# Documents of 5 to 150 tokens. Longer ones than SEQ_LEN would be split, or refused if asked to.
random = np.random.default_rng(0)
documents = [random.integers(1, 1000, length) for length in (150, 5, 64, 120, 31, 90, 17)]
packed = pack_documents(documents, SEQ_LEN)
print(f"{len(documents)} documents in {len(packed.tokens)} rows of {SEQ_LEN}")
print(f"padding {np.mean(packed.segment_ids == 0):.1%}, targets {packed.loss_mask.sum()}")
print("offsets in each row:", segment_ids_to_cu_seqlens(packed.segment_ids).tolist())

# Any projection of the tokens will do here.
keys = jax.random.split(jax.random.key(0), 5)
tables = dict(
    q=jax.random.normal(keys[0], (1000, H, D)),
    k=jax.random.normal(keys[1], (1000, H, D)),
    v=jax.random.normal(keys[2], (1000, H, D)),
    g=-jax.random.uniform(keys[3], (1000, H, D)),
    beta=jax.random.uniform(keys[4], (1000, H)),
)


@jax.jit
def attend(tokens, segment_ids):
    inputs = {name: table[tokens] for name, table in tables.items()}
    return kimi_delta_attention(**inputs, qk_l2norm=True, segment_ids=segment_ids)


o = attend(packed.tokens, packed.segment_ids)

# Every document comes out as it would alone; padding is zero.
for row, ids in enumerate(packed.segment_ids):
    for segment in range(1, ids.max() + 1):
        mine = ids == segment
        alone = attend(packed.tokens[None, row, mine], jnp.ones((1, mine.sum()), jnp.int32))
        difference = np.abs(o[row, mine] - alone[0]).max()
        print(f"row {row} segment {segment}: {mine.sum():3d} tokens, difference {difference:.1e}")
        assert difference < 1e-5
assert not np.asarray(o)[packed.segment_ids == 0].any()
