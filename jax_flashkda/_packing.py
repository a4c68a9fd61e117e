"""Packing documents into rows, and converting between the ways of saying where segments lie.

`pack_documents` runs on the host in numpy, once per data set or shard. The converters run
anywhere, inside `jit` too, given static bounds: segment ids are int32 [..., T] with 1, 2, .. for
the segments of a row and 0 for padding, lengths are int32 [..., N], cu_seqlens are int32 [..., N +
1], the running sum of the lengths from 0."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "PackedDocuments",
    "cu_seqlens_to_segment_ids",
    "lengths_to_segment_ids",
    "pack_documents",
    "segment_ids_to_cu_seqlens",
    "segment_ids_to_lengths",
]


class PackedDocuments(NamedTuple):
    """Documents packed into rows of one length; every array is [B, T] and lives on the host."""

    tokens: np.ndarray  # the documents' tokens, `padding_token` elsewhere
    targets: np.ndarray  # the next token of the same document; `padding_token` where there is none
    loss_mask: np.ndarray  # bool: the position has a target
    segment_ids: np.ndarray  # int32: 1, 2, .. along each row, 0 at padding


def pack_documents(
    documents: Sequence, seq_len: int, *, long_documents: str = "split", padding_token: int = 0
) -> PackedDocuments:
    """Pack token documents into rows of `seq_len` tokens, wasting little.

    Documents are placed longest first, each into the row it fills most tightly (best-fit
    decreasing), so padding is usually below one percent. A document never crosses a row. The
    result depends on the arguments alone, and every token of every document appears exactly once.

    **Arguments**

    - `documents`: a list of 1-D integer sequences. Empty ones are skipped.
    - `seq_len`: T, the row length.
    - `long_documents`: what to do with a document longer than `seq_len`: "split" cuts it into
      pieces that are segments of their own (the last token of a piece still has the first one of
      the next as its target), "error" refuses it.
    - `padding_token`: fills `tokens` at padding and `targets` where the document has no next
      token. Real tokens may have the same value: `segment_ids` and `loss_mask` tell them apart.

    **Returns** `PackedDocuments`; with B = 0 rows if there are no tokens. The integer type is
    int32, or int64 where a token needs it."""
    seq_len = positive_int("seq_len", seq_len)
    if long_documents not in ("split", "error"):
        raise ValueError(f"long_documents must be 'split' or 'error', got {long_documents!r}")
    padding_token = operator.index(padding_token)
    documents = checked_documents(documents)
    if long_documents == "error":
        refuse_long(documents, seq_len)

    pieces = [piece for document in documents for piece in pieces_of(document, seq_len)]
    # The stable sort keeps the input order among equals.
    pieces.sort(key=lambda piece: piece[1] - piece[2])
    rows = _best_fit([stop - start for _, start, stop in pieces], seq_len)

    dtype = np.result_type(
        np.int32, np.min_scalar_type(padding_token), *{d.dtype for d in documents}
    )
    pieces_of_rows = [[] for _ in range(max(rows, default=-1) + 1)]
    for piece, row in zip(pieces, rows, strict=True):
        pieces_of_rows[row].append(piece)
    return rows_of_pieces(pieces_of_rows, seq_len, dtype, padding_token)


def pieces_of(document, seq_len):
    """(document, start, stop) of the pieces that fit a row."""
    return [
        (document, start, min(start + seq_len, len(document)))
        for start in range(0, len(document), seq_len)
    ]


def rows_of_pieces(pieces_of_rows, seq_len, dtype, padding_token):
    """`PackedDocuments` of rows, each a list of pieces (document, start, stop)."""
    shape = (len(pieces_of_rows), seq_len)
    packed = PackedDocuments(
        tokens=np.full(shape, padding_token, dtype),
        targets=np.full(shape, padding_token, dtype),
        loss_mask=np.zeros(shape, bool),
        segment_ids=np.zeros(shape, np.int32),
    )
    for row, pieces in enumerate(pieces_of_rows):
        begin = 0
        for segment, (document, start, stop) in enumerate(pieces, start=1):
            end = begin + stop - start
            following = document[start + 1 : stop + 1]
            packed.tokens[row, begin:end] = document[start:stop]
            packed.targets[row, begin : begin + len(following)] = following
            packed.loss_mask[row, begin : begin + len(following)] = True
            packed.segment_ids[row, begin:end] = segment
            begin = end
    return packed


def _best_fit(lengths, capacity):
    """The row of every length, put where the least room is left that still holds it."""
    rows_with_room = {}  # room -> rows
    rooms = 0  # bit r is set where rows_with_room[r] is not empty
    placement, row_count = [], 0
    for length in lengths:
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the smallest room that fits
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, row_count
            row_count += 1
        placement.append(row)
        left = room - length
        if left:
            rows_with_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return placement


def checked_documents(documents, first=0):
    """The documents as arrays, without empty ones; messages count them from `first`."""
    checked, problems = [], []
    for index, document in enumerate(documents, start=first):
        array = np.asarray(document)
        if array.size == 0 and array.ndim == 1:
            continue
        if array.ndim != 1 or array.dtype.kind not in "iu":
            problems.append(f"documents[{index}] has shape {array.shape} and type {array.dtype}")
        elif array.dtype == np.uint64:
            problems.append(f"documents[{index}] has type uint64; use int64 or a smaller type")
        checked.append(array)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            "every document must be a 1-D sequence of integers (encode text first, e.g. "
            f"np.frombuffer(text.encode(), np.uint8)), but {', '.join(problems[:5])}{more}"
        )
    return checked


def refuse_long(documents, seq_len):
    longest = max((len(document) for document in documents), default=0)
    if longest > seq_len:
        count = sum(len(document) > seq_len for document in documents)
        raise ValueError(
            f"{count} of {len(documents)} documents are longer than seq_len={seq_len} (the longest"
            f" has {longest} tokens): raise seq_len, shorten them, or pass long_documents='split'"
        )


def lengths_to_segment_ids(lengths, seq_len: int):
    """Segment ids of rows that hold segments of these lengths one after the other.

    **Arguments**

    - `lengths`: integers [..., N]. A zero takes up no room, and the ordinal of the segments after
      it is still counted with it: id n + 1 belongs to `lengths[n]`.
    - `seq_len`: T, static.

    **Returns** int32 [..., T]; 0 behind the last segment. Lengths that sum to more than `seq_len`
    are refused where their values are known; inside `jit` what lies beyond the row is cut off."""
    seq_len = positive_int("seq_len", seq_len, minimum=0)
    lengths = _integers("lengths", lengths)
    known = _known(lengths)
    if known is not None:
        if (known < 0).any():
            raise ValueError(f"lengths must not be negative, got {known.min()}")
        total = known.sum(axis=-1, dtype=np.int64)
        if (total > seq_len).any():
            raise ValueError(
                f"lengths sum to {total.max()}, more than seq_len={seq_len}: raise seq_len or split"
                " them over several rows (pack_documents does)"
            )
    ends = jnp.cumsum(lengths, axis=-1, dtype=jnp.int32)
    return _ids_from_ends(ends, seq_len)


def cu_seqlens_to_segment_ids(cu_seqlens, seq_len: int):
    """Segment ids of rows whose segment n is `cu_seqlens[n] : cu_seqlens[n + 1]`.

    **Arguments**

    - `cu_seqlens`: integers [..., N + 1], starting at 0 and never decreasing. Repeated values are
      empty segments, so a list padded at its end with its last value is fine.
    - `seq_len`: T, static, at least the last value.

    **Returns** int32 [..., T]; id n + 1 for segment n, 0 behind the last one. Add a batch axis to
    a single row before handing it to the op: `ids[None]`."""
    seq_len = positive_int("seq_len", seq_len, minimum=0)
    cu_seqlens = _integers("cu_seqlens", cu_seqlens)
    if cu_seqlens.shape[-1] == 0:
        raise ValueError("cu_seqlens must hold N + 1 offsets, the first of them 0, got none")
    known = _known(cu_seqlens)
    if known is not None:
        if (known[..., 0] != 0).any():
            raise ValueError(f"cu_seqlens must start at 0, got {known[..., 0]}")
        if (np.diff(known.astype(np.int64), axis=-1) < 0).any():
            raise ValueError(
                f"cu_seqlens must not decrease, got {known}; pad unused entries with the last"
                " offset"
            )
        if (known[..., -1] > seq_len).any():
            raise ValueError(f"cu_seqlens end at {known[..., -1].max()}, beyond seq_len={seq_len}")
    return _ids_from_ends(cu_seqlens[..., 1:].astype(jnp.int32), seq_len)


def _ids_from_ends(ends, seq_len):
    positions = jnp.arange(seq_len, dtype=jnp.int32)

    def ids_of_row(ends):
        ended = jnp.searchsorted(ends, positions, side="right", method="sort").astype(jnp.int32)
        return jnp.where(ended < ends.shape[0], ended + 1, 0)

    return jnp.vectorize(ids_of_row, signature="(n)->(t)")(ends)


def segment_ids_to_lengths(
    segment_ids, max_segments: int | None = None, *, padding_segment_id: int | None = 0
):
    """Length of every segment of each row, in order.

    Segments are those of the op: maximal runs of equal ids, without padding (ids below zero or
    equal to `padding_segment_id`), whatever the ids are.

    **Arguments**

    - `segment_ids`: integers [..., T].
    - `max_segments`: N, static. Needed inside `jit`; elsewhere it defaults to the largest count of
      a row.
    - `padding_segment_id`: static int or None.

    **Returns** int32 [..., N]; zeros behind the row's last segment. Segments beyond N are refused
    where the values are known and dropped inside `jit`."""
    segment_ids = _integers("segment_ids", segment_ids)
    T = segment_ids.shape[-1]
    valid = segment_ids >= 0
    if padding_segment_id is not None:
        valid &= segment_ids != padding_segment_id
    changed = segment_ids[..., 1:] != segment_ids[..., :-1]
    first = jnp.ones((*segment_ids.shape[:-1], min(T, 1)), bool)
    starts = valid & jnp.concatenate([first, changed], axis=-1)
    ordinal = jnp.cumsum(starts, axis=-1, dtype=jnp.int32) - 1

    known = _known(ordinal)
    most = None if known is None else int(known.max(initial=-1)) + 1
    if max_segments is None:
        if most is None:
            raise ValueError(
                "max_segments must be given inside jit: the shape of the result depends on it"
            )
        max_segments = most
    max_segments = positive_int("max_segments", max_segments, minimum=0)
    if most is not None and most > max_segments:
        raise ValueError(f"a row has {most} segments, more than max_segments={max_segments}")

    def count_of_row(slot):
        return jnp.zeros(max_segments, jnp.int32).at[slot].add(1, mode="drop")

    slot = jnp.where(valid, ordinal, max_segments)
    return jnp.vectorize(count_of_row, signature="(t)->(n)")(slot)


def segment_ids_to_cu_seqlens(
    segment_ids, max_segments: int | None = None, *, padding_segment_id: int | None = 0
):
    """Offsets of the segments of each row once padding is taken out: the running sum of their
    lengths.

    Where padding stands only at the end of the rows, these are the offsets in the row itself.
    Arguments as for `segment_ids_to_lengths`.

    **Returns** int32 [..., N + 1], starting at 0; behind the row's last segment its end is
    repeated."""
    lengths = segment_ids_to_lengths(
        segment_ids, max_segments, padding_segment_id=padding_segment_id
    )
    zero = jnp.zeros((*lengths.shape[:-1], 1), jnp.int32)
    return jnp.concatenate([zero, jnp.cumsum(lengths, axis=-1, dtype=jnp.int32)], axis=-1)


def positive_int(name, value, minimum=1):
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a static int, got {type(value).__name__}") from None
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def _integers(name, value):
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        if value.size:
            raise TypeError(f"{name} must be integers, got {value.dtype}")
        value = value.astype(jnp.int32)  # an empty list has no integer type of its own
    if value.ndim == 0:
        raise ValueError(f"{name} must have at least one axis, got a scalar")
    return value


def _known(array):
    """The values on the host, or None while tracing."""
    return None if isinstance(array, jax.core.Tracer) else np.asarray(array)
