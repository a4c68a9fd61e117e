"""The packer loses nothing and wastes little; the converters agree with loops over Python lists."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashkda._packing import (
    cu_seqlens_to_segment_ids,
    lengths_to_segment_ids,
    pack_documents,
    segment_ids_to_cu_seqlens,
    segment_ids_to_lengths,
)
from jax_flashkda._packing_stream import PackedStream

documents_strategy = st.lists(st.lists(st.integers(-3, 300), max_size=40), max_size=25)


def runs(ids, padding_segment_id=0):
    """[(start, stop)] of every segment of one row, by the definition."""
    found, start = [], 0
    for value, group in itertools.groupby(np.asarray(ids).tolist()):
        stop = start + len(list(group))
        if value >= 0 and value != padding_segment_id:
            found.append((start, stop))
        start = stop
    return found


def unpack(packed):
    """Every packed piece as (tokens, targets, loss_mask), in row order."""
    return [
        tuple(array[row, start:stop].tolist() for array in packed[:3])
        for row in range(packed.tokens.shape[0])
        for start, stop in runs(packed.segment_ids[row])
    ]


@settings(deadline=None)
@given(documents_strategy, st.integers(1, 50))
def test_every_token_appears_once_with_its_successor(documents, seq_len):
    packed = pack_documents(documents, seq_len, padding_token=-7)
    expected = []
    for document in documents:
        following = [*document[1:], -7]
        has_target = [True] * (len(document) - 1) + [False]
        for start in range(0, len(document), seq_len):
            piece = slice(start, start + seq_len)
            expected.append((document[piece], following[piece], has_target[piece]))
    assert sorted(unpack(packed)) == sorted(expected)

    padding = packed.segment_ids == 0
    assert (packed.tokens[padding] == -7).all() and (packed.targets[padding] == -7).all()
    assert not packed.loss_mask[padding].any()
    assert (packed.targets[~packed.loss_mask] == -7).all()
    assert {array.shape for array in packed} == {packed.tokens.shape}
    assert packed.tokens.shape[1] == seq_len


@settings(deadline=None)
@given(documents_strategy, st.integers(1, 50))
def test_rows_are_filled_from_the_left_with_ids_from_one(documents, seq_len):
    for row in pack_documents(documents, seq_len).segment_ids:
        used = int((row > 0).sum())
        assert used > 0 and (row[used:] == 0).all()
        assert row[0] == 1 and set(np.diff(row[:used])) <= {0, 1}


@settings(deadline=None)
@given(documents_strategy, st.integers(1, 50))
def test_at_most_one_row_is_less_than_half_full(documents, seq_len):
    used = (pack_documents(documents, seq_len).segment_ids > 0).sum(axis=1)
    assert (used * 2 < seq_len).sum() <= 1


def test_little_is_wasted_on_documents_of_many_lengths():
    lengths = np.random.default_rng(0).lognormal(5.0, 1.5, 3000).astype(int) + 1
    packed = pack_documents([np.ones(n, np.uint8) for n in lengths], 1024)
    assert (packed.segment_ids == 0).mean() < 0.005


def test_packing_is_deterministic_and_keeps_the_order_among_equals():
    packed = pack_documents([[1, 1], [2, 2, 2], [3, 3], [4]], 4)
    np.testing.assert_array_equal(packed.tokens, [[2, 2, 2, 4], [1, 1, 3, 3]])
    np.testing.assert_array_equal(packed.segment_ids, [[1, 1, 1, 2], [1, 1, 2, 2]])
    np.testing.assert_array_equal(packed.loss_mask, [[1, 1, 0, 0], [1, 0, 1, 0]])


def test_pieces_of_a_split_document_are_segments_with_targets_across_the_cut():
    packed = pack_documents([[5, 6, 7, 8, 9]], 2)
    np.testing.assert_array_equal(packed.tokens, [[5, 6], [7, 8], [9, 0]])
    np.testing.assert_array_equal(packed.targets, [[6, 7], [8, 9], [0, 0]])
    np.testing.assert_array_equal(packed.loss_mask, [[1, 1], [1, 1], [0, 0]])


def test_types_and_empty_input():
    for documents in ([], [[]], [np.zeros(0, np.uint8)]):
        packed = pack_documents(documents, 8)
        assert packed.tokens.shape == (0, 8) and packed.tokens.dtype == np.int32
    assert pack_documents([np.ones(3, np.uint8)], 8).tokens.dtype == np.int32
    assert pack_documents([np.full(3, 2**40)], 8).tokens.dtype == np.int64
    assert pack_documents([[1]], 8).segment_ids.dtype == np.int32


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(documents=[[1.5]]), r"documents\[0\] has shape \(1,\) and type float64"),
        (dict(documents=[[1], [[2]]]), r"documents\[1\] has shape \(1, 1\)"),
        (dict(documents=["text"]), "encode text first"),
        (dict(documents=[np.ones(2, np.uint64)]), "use int64 or a smaller type"),
        (dict(seq_len=0), "seq_len must be at least 1, got 0"),
        (dict(long_documents="drop"), "long_documents must be 'split' or 'error', got 'drop'"),
        (
            dict(documents=[[1] * 9, [1] * 4], long_documents="error"),
            r"1 of 2 documents are longer than seq_len=8 \(the longest has 9 tokens\): raise",
        ),
    ],
)
def test_pack_documents_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_documents(**{"documents": [[1]], "seq_len": 8, **arguments})


def test_seq_len_must_be_static():
    with pytest.raises(TypeError, match="seq_len must be a static int, got float"):
        pack_documents([[1]], 8.0)


# Few shapes, because each compiles anew.
segment_id_rows = st.sampled_from([1, 12]).flatmap(
    lambda T: st.lists(st.lists(st.integers(-2, 3), min_size=T, max_size=T), min_size=2, max_size=2)
)


@settings(deadline=None)
@given(segment_id_rows, st.sampled_from([0, 2, None]))
def test_lengths_and_cu_seqlens_of_arbitrary_ids(rows, padding_segment_id):
    T = len(rows[0])
    expected = []
    for row in rows:
        lengths = [stop - start for start, stop in runs(row, padding_segment_id)]
        expected.append(lengths + [0] * (T - len(lengths)))
    lengths = segment_ids_to_lengths(rows, T, padding_segment_id=padding_segment_id)
    assert lengths.dtype == jnp.int32 and lengths.tolist() == expected
    offsets = segment_ids_to_cu_seqlens(rows, T, padding_segment_id=padding_segment_id)
    assert offsets.tolist() == [[0, *itertools.accumulate(row)] for row in expected]


def test_max_segments_defaults_to_the_fullest_row():
    ids = jnp.array([[1, 2, 2, 0, 1], [0, 0, -1, 5, 5]])
    assert segment_ids_to_lengths(ids).tolist() == [[1, 2, 1], [2, 0, 0]]
    assert segment_ids_to_cu_seqlens(ids).tolist() == [[0, 1, 3, 4], [0, 2, 2, 2]]
    assert segment_ids_to_lengths(jnp.zeros((2, 0), int)).shape == (2, 0)
    assert segment_ids_to_cu_seqlens(jnp.zeros((2, 3), int)).tolist() == [[0], [0]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_lengths_and_cu_seqlens_to_ids(lengths):
    ids = [n + 1 for n, length in enumerate(lengths) for _ in range(length)]
    expected = ids + [0] * (20 - len(ids))
    offsets = [0, *itertools.accumulate(lengths)]
    assert lengths_to_segment_ids(lengths, 20).tolist() == expected
    assert cu_seqlens_to_segment_ids(offsets, 20).tolist() == expected


def test_rows_without_segments_and_rows_that_are_just_full():
    assert lengths_to_segment_ids([], 3).tolist() == [0, 0, 0]
    assert lengths_to_segment_ids([2, 1], 3).tolist() == [1, 1, 2]
    assert lengths_to_segment_ids([[2, 1], [0, 0]], 3).tolist() == [[1, 1, 2], [0, 0, 0]]
    assert cu_seqlens_to_segment_ids([0], 0).shape == (0,)
    assert cu_seqlens_to_segment_ids([0, 2, 3], 3).tolist() == [1, 1, 2]


def test_converters_work_in_jit_with_static_bounds():
    ids = jnp.array([[1, 1, 2, 0, 3, 3], [4, 4, 4, 4, -1, 0]])

    @jax.jit
    def round_trip(ids):
        lengths = segment_ids_to_lengths(ids, 4)
        offsets = segment_ids_to_cu_seqlens(ids, 4)
        return lengths, lengths_to_segment_ids(lengths, 6), cu_seqlens_to_segment_ids(offsets, 6)

    lengths, from_lengths, from_offsets = round_trip(ids)
    assert lengths.tolist() == [[2, 1, 2, 0], [4, 0, 0, 0]]
    assert from_lengths.tolist() == [[1, 1, 2, 3, 3, 0], [1, 1, 1, 1, 0, 0]]
    assert from_offsets.tolist() == from_lengths.tolist()
    # Beyond the bound, segments are dropped, never written to another one's slot.
    assert jax.jit(lambda ids: segment_ids_to_lengths(ids, 1))(ids).tolist() == [[2], [4]]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: lengths_to_segment_ids([3, 4], 6),
            ValueError,
            "lengths sum to 7, more than seq_len=6",
        ),
        (
            lambda: lengths_to_segment_ids([-1], 6),
            ValueError,
            "lengths must not be negative, got -1",
        ),
        (
            lambda: lengths_to_segment_ids([1.0], 6),
            TypeError,
            "lengths must be integers, got float32",
        ),
        (lambda: lengths_to_segment_ids(3, 6), ValueError, "at least one axis, got a scalar"),
        (lambda: cu_seqlens_to_segment_ids([1, 2], 6), ValueError, "cu_seqlens must start at 0"),
        (
            lambda: cu_seqlens_to_segment_ids([0, 4, 2], 6),
            ValueError,
            "pad unused entries with the last",
        ),
        (lambda: cu_seqlens_to_segment_ids([0, 8], 6), ValueError, "end at 8, beyond seq_len=6"),
        (
            lambda: cu_seqlens_to_segment_ids(jnp.zeros(0, int), 6),
            ValueError,
            "must hold N . 1 offsets",
        ),
        (
            lambda: segment_ids_to_lengths([1, 2], 1),
            ValueError,
            "2 segments, more than max_segments=1",
        ),
        (
            lambda: jax.jit(segment_ids_to_lengths)(jnp.ones(3, int)),
            ValueError,
            "max_segments must be given inside jit",
        ),
    ],
)
def test_converters_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Streams.


def stream_of(documents, seq_len=16, batch_size=3, **options):
    return PackedStream(iter(documents), seq_len, batch_size, padding_token=-7, **options)


@settings(deadline=None)
@given(documents_strategy, st.integers(1, 50), st.integers(1, 4), st.integers(1, 5))
def test_a_stream_holds_what_packing_at_once_holds(documents, seq_len, batch_size, open_rows):
    batches = list(stream_of(documents, seq_len, batch_size, open_rows=open_rows))
    pieces = [piece for batch in batches for piece in unpack(batch)]
    assert sorted(pieces) == sorted(unpack(pack_documents(documents, seq_len, padding_token=-7)))
    for number, batch in enumerate(batches):
        assert {array.shape for array in batch} == {(batch_size, seq_len)}
        assert [array.dtype for array in batch] == [np.int32, np.int32, bool, np.int32]
        padding = batch.segment_ids == 0
        assert (batch.tokens[padding] == -7).all() and not batch.loss_mask[padding].any()
        assert (batch.targets[~batch.loss_mask] == -7).all()
        if number + 1 < len(batches):
            assert (batch.segment_ids[:, 0] == 1).all()  # rows of padding alone: at the end

    whole = list(
        stream_of(documents, seq_len, batch_size, open_rows=open_rows, drop_remainder=True)
    )
    full = [batch for batch in batches if (batch.segment_ids[:, 0] == 1).all()]
    assert len(whole) == len(full)
    for batch, expected in zip(whole, full, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, expected)


def test_a_stream_reads_no_further_than_its_open_rows_need():
    drawn = []

    def endless():
        for number in itertools.count():
            drawn.append(number)
            yield np.full(1 + number % 13, number, np.uint16)

    next(stream_of(endless(), seq_len=16, batch_size=3, open_rows=4))
    assert sum(1 + number % 13 for number in drawn) <= (3 + 5) * 16


def test_a_stream_wastes_little():
    lengths = np.random.default_rng(0).lognormal(5.0, 1.5, 3000).astype(int) + 1
    documents = [np.ones(n, np.uint8) for n in lengths]
    waste = {}
    for open_rows in (1, 16, 64):
        batches = PackedStream(documents, 1024, 8, open_rows=open_rows, drop_remainder=True)
        waste[open_rows] = np.mean([batch.segment_ids == 0 for batch in batches])
    assert waste[64] <= waste[16] < 0.01 < waste[1]


def test_a_stream_goes_on_from_its_state():
    documents = [list(range(1, 2 + 7 * n % 40)) for n in range(60)]
    whole = list(stream_of(documents, open_rows=4))
    stream = stream_of(documents, open_rows=4)
    for stop in range(len(whole)):
        state = json.loads(json.dumps(stream.get_state()))
        resumed = stream_of(documents[state["read"] :], open_rows=4)
        resumed.set_state(state)
        rest = list(resumed)
        assert len(rest) == len(whole) - stop
        jax.tree.map(np.testing.assert_array_equal, rest, whole[stop:])
        next(stream)


def test_a_stream_of_a_grain_data_set():
    grain = pytest.importorskip("grain", reason="the package itself does not need grain")
    documents = [np.full(1 + 7 * n % 40, n, np.int32) for n in range(60)]
    data = grain.MapDataset.source(documents).shuffle(seed=0).to_iter_dataset()
    reader = iter(data)
    stream = stream_of(reader)
    next(stream)
    read, packed = reader.get_state(), stream.get_state()
    expected = list(stream)

    reader = iter(data)
    reader.set_state(read)
    stream = stream_of(reader)
    stream.set_state(packed)
    rest = list(stream)
    assert len(rest) == len(expected) > 10
    jax.tree.map(np.testing.assert_array_equal, rest, expected)


@pytest.mark.parametrize(
    "documents, options, message",
    [
        ([[1]], dict(seq_len=0), "seq_len must be at least 1, got 0"),
        ([[1]], dict(batch_size=0), "batch_size must be at least 1, got 0"),
        ([[1]], dict(open_rows=0), "open_rows must be at least 1, got 0"),
        ([[1]], dict(long_documents="cut"), "must be 'split' or 'error', got 'cut'"),
        ([[1], [1] * 17], dict(long_documents="error"), "longer than seq_len=16"),
        ([[1], [0.5]], {}, r"documents\[1\] has shape \(1,\) and type float64"),
        ([[1], [2**31]], {}, r"documents\[1\] does not fit int32: .* from 2147483648 to"),
    ],
)
def test_a_stream_refuses(documents, options, message):
    with pytest.raises(ValueError, match=message):
        list(stream_of(documents, **options))
