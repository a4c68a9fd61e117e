"""Which tokens form a chunk: the schedule that forward and backward of the XLA path walk.

A segment is a maximal run of equal ids; ids are compared and never used as an index, so every int32
array is valid. Chunks of 64 tokens are counted from each segment's start, so that a segment is
computed the same way wherever it is packed. All of it is device code: nothing is read back to the
host, and shapes follow from [B, T] alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64


class Chunk(NamedTuple):
    """One chunk of every batch row, fields [B]; fields [1] where all rows share it."""

    start: jax.Array  # its first token
    length: jax.Array  # tokens in it, 0 for a row that has no such chunk
    segment: jax.Array  # ordinal of its segment within the row
    first: jax.Array  # whether it begins its segment
    last: jax.Array  # whether it ends its segment

    def mask(self):
        """[B or 1, CHUNK]: which of the CHUNK tokens from `start` on belong to the chunk."""
        return jnp.arange(CHUNK, dtype=jnp.int32) < self.length[:, None]


class Schedule(NamedTuple):
    """The chunks of a call in token order; rows of a packed batch advance side by side."""

    count: jax.Array | int  # chunks of the row that has most
    table: Chunk | None  # fields [T, B]; None without segment_ids, where chunk i is tokens 64 i ..
    T: int

    def __getitem__(self, i) -> Chunk:
        if self.table is not None:
            return Chunk(*(jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in self.table))
        start = jnp.asarray(i, jnp.int32)[None] * CHUNK
        length = jnp.minimum(CHUNK, self.T - start)
        return Chunk(start, length, jnp.zeros_like(start), start == 0, start + length == self.T)

    def with_tail_slot(self, N):
        """State slots in place of ordinals: the last of N is that of the segment which ends its
        row, whatever its ordinal, those before it are those of the first N - 1 others."""
        if self.table is None:
            return self
        segment, ends = self.table.segment, self.table.start + self.table.length == self.T
        tail = jnp.max(jnp.where(ends & self.table.last, segment, -1), axis=0, initial=-1)
        slot = jnp.where(segment < N - 1, segment, jnp.where(segment == tail, N - 1, N))
        return self._replace(table=self.table._replace(segment=slot))


def is_padding(segment_ids, padding_segment_id):
    """Tokens that belong to no segment: negative ids and, unless it is None, the padding id."""
    padding = segment_ids < 0
    return padding if padding_segment_id is None else padding | (segment_ids == padding_segment_id)


def edges(segment_ids, padding_segment_id):
    """[B, T] each: tokens of segments, the first tokens of segments, and the last ones."""
    differs = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((segment_ids.shape[0], 1), bool)
    valid = ~is_padding(segment_ids, padding_segment_id)
    begins = valid & jnp.concatenate([edge, differs], axis=1)
    ends = valid & jnp.concatenate([differs, edge], axis=1)
    return valid, begins, ends


def _places(begins):
    """[B, T] each: the segment of a token and its place in it; anything at padding."""
    token = jnp.arange(begins.shape[1], dtype=jnp.int32)[None]
    offset = token - jax.lax.cummax(jnp.where(begins, token, 0), axis=1)
    return jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1, offset


def places(segment_ids, padding_segment_id: int | None = 0):
    """The segment of each token, counted along its row, and the token's place in it, [B, T] each.
    Meaningless at padding."""
    return _places(edges(segment_ids, padding_segment_id)[1])


def ends_of_rows(segment_ids, padding_segment_id: int | None = 0):
    """[B, T] each: the tokens of the segment that a row begins with, and of that it ends with."""
    segment, _ = places(segment_ids, padding_segment_id)
    valid = ~is_padding(segment_ids, padding_segment_id)
    head = valid & (segment == 0) & valid[:, :1]
    return head, valid & (segment == segment[:, -1:]) & valid[:, -1:]


def slots(segment_ids, padding_segment_id: int | None = 0):
    """int32 [B, T]: the segment of each token, counted along its row, and -1 at padding."""
    segment, _ = places(segment_ids, padding_segment_id)
    return jnp.where(is_padding(segment_ids, padding_segment_id), -1, segment)


def extents(segment_ids, padding_segment_id: int | None, N: int):
    """The first tokens and the lengths of the first N segments of each row, [B, N] each; length 0
    where there are fewer."""
    _, begins, ends = edges(segment_ids, padding_segment_id)
    T = segment_ids.shape[1]
    token = jnp.arange(T, dtype=jnp.int32)[None]

    def first_n(marked):  # T where there are fewer
        found = jnp.sort(jnp.where(marked, token, T), axis=1)[:, :N]
        return jnp.pad(found, ((0, 0), (0, N - found.shape[1])), constant_values=T)

    start, end = first_n(begins), first_n(ends)
    return start, jnp.where(start < T, end - start + 1, 0)


def schedule(T: int, segment_ids=None, padding_segment_id: int | None = 0) -> Schedule:
    """The schedule of rows of T tokens, one segment a row without `segment_ids` [B, T]."""
    if segment_ids is None:
        return Schedule(-(-T // CHUNK), None, T)
    valid, begins, ends = edges(segment_ids, padding_segment_id)
    token = jnp.arange(T, dtype=jnp.int32)[None]
    segment, offset = _places(begins)
    starts_chunk = valid & (offset % CHUNK == 0)
    ends_chunk = valid & (ends | (offset % CHUNK == CHUNK - 1))
    # The n-th start and the n-th end belong together; T fills the rest, so that lengths there are
    # min(1, 0) = 0.
    start = jnp.sort(jnp.where(starts_chunk, token, T), axis=1)
    end = jnp.sort(jnp.where(ends_chunk, token, T), axis=1)
    at = lambda x, t: jnp.take_along_axis(x, jnp.minimum(t, T - 1), axis=1)
    exists = start < T
    table = Chunk(
        start=start,
        length=jnp.where(exists, end - start + 1, 0),
        segment=at(segment, start),
        first=exists & at(begins, start),
        last=exists & at(ends, end),
    )
    count = jnp.max(jnp.sum(starts_chunk, axis=1, dtype=jnp.int32), initial=0)
    return Schedule(count, Chunk(*(x.T for x in table)), T)
