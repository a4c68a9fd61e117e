"""The segment table as the GPU builds it, by the same code, against its definition.

No GPU: a loop plays the threads, under the address and undefined behaviour sanitizers.
"""

import itertools
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).parent.parent
CHUNK, BUCKETS, PADDING, UNTOUCHED, SHORT = 64, 16, -1, -77, 32
# (threads, positions of a thread): what segment_table_host.cc compiles. The last is the GPU's.
SHAPES = [(1, 1), (3, 2), (16, 1), (4, 32), (128, 8)]


class Tables:
    """segment_table_host.cc, compiled once; `of` sends it ids and returns its tables."""

    def __init__(self, folder):
        program = folder / "segment_table_host"
        command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
        command += ["-Wno-unknown-pragmas", "-fsanitize=undefined,address"]
        command += ["-fno-sanitize-recover=all"]
        command += [f"-I{ROOT / 'cuda'}", ROOT / "tests" / "segment_table_host.cc"]
        subprocess.run([*command, "-o", program], check=True, timeout=300)
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def of(self, ids, padding_id, shape, in_token_order, short_apart):
        B, T = ids.shape
        padding = (0, 0) if padding_id is None else (1, padding_id)
        options = [int(in_token_order), int(short_apart)]
        line = map(str, [*shape, *options, B, T, *padding, *ids.ravel().tolist()])
        print(" ".join(line), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the program ended: see its output"
        values = np.array(answer.split(), np.int64)
        blocks, chunk_count, segment_count, *short_counts = values[:7]
        chunks, segments = values[7 + B :].reshape(2, B * T, 4)
        short = [segments[:0]] * 4  # of each kind
        end = segment_count
        if short_apart:
            for kind in reversed(range(4)):
                end, start = end + short_counts[kind], end
                short[kind] = segments[start:end]
        else:
            assert short_counts == [UNTOUCHED] * 4
        # Nothing is written behind the counts.
        assert (chunks[chunk_count:] == UNTOUCHED).all()
        assert (segments[end:] == UNTOUCHED).all()
        return dict(
            blocks=blocks,
            chunks=chunks[:chunk_count].tolist(),
            segments=segments[:segment_count].tolist(),
            short=[entries.tolist() for entries in short],
            row_segments=values[7 : 7 + B].tolist(),
        )

    def close(self):
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = Tables(tmp_path_factory.mktemp("segment_table"))
    yield program
    program.close()


def bucket(segment, buckets):
    """Powers of two of the chunks of an entry, the last open."""
    chunks = -(-segment[2] // CHUNK)
    return min((chunks - 1).bit_length(), buckets - 1)


def short_kind(entry):
    """Padding, one token, at most 16, more."""
    return 0 if entry[3] == PADDING else 1 if entry[2] == 1 else 2 if entry[2] <= 16 else 3


def definition(ids, padding_id, in_token_order, short_apart):
    chunks, segments, row_segments = [], [], []
    short = [[], [], [], []]
    for row, row_ids in enumerate(ids.tolist()):
        keys = [None if i < 0 or i == padding_id else i for i in row_ids]  # padding is one key
        ordinal = start = 0
        while start < len(keys):
            end = start
            while end < len(keys) and keys[end] == keys[start]:
                end += 1
            segment = PADDING if keys[start] is None else ordinal
            entry = [row, start, end - start, segment]
            if short_apart and end - start <= SHORT:
                short[short_kind(entry)].append(entry)
            else:
                for at in range(start, end, CHUNK):
                    chunks.append([row, at, min(CHUNK, end - at), segment])
                if segment != PADDING:
                    segments.append(entry)
            ordinal += segment != PADDING
            start = end
        row_segments.append(ordinal)
    if not in_token_order:
        buckets = BUCKETS - 4 if short_apart else BUCKETS
        # Stable: by position inside a bucket.
        segments.sort(key=lambda segment: bucket(segment, buckets), reverse=True)
    return dict(chunks=chunks, segments=segments, short=short, row_segments=row_segments)


def check(tables, ids, padding_id, shape):
    ids = np.asarray(ids, np.int32)
    for options in itertools.product((False, True), (False, True)):
        got = tables.of(ids, padding_id, shape, *options)
        blocks = got.pop("blocks")
        assert 1 <= blocks <= shape[0]
        assert got == definition(ids, padding_id, *options)


INT32 = st.integers(-(2**31), 2**31 - 1)
FEW = st.integers(-2, 3)  # ids that meet again, and padding


@st.composite
def packed_rows(draw):
    """Ids [B, T]: runs of every length, of any ids, and the id of padding."""
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 300))
    ids = draw(st.sampled_from([INT32, FEW]))
    longest = draw(st.sampled_from([1, 3, 70, 300]))
    rows = []
    for _ in range(B):
        row = []
        while len(row) < T:
            row += [draw(ids)] * draw(st.integers(1, longest))
        rows.append(row[:T])
    return rows, draw(st.one_of(st.none(), FEW, st.sampled_from(rows[0])))


@given(packed=packed_rows(), shape=st.sampled_from(SHAPES))
@example(packed=([[1] * 300, [1] * 300], None), shape=(3, 2))
@example(packed=([[0] * 300], 0), shape=(16, 1))
@example(packed=([[2**31 - 1, -(2**31)] * 150], None), shape=(1, 1))
@settings(max_examples=500, deadline=None)
def test_tables_are_the_definition(tables, packed, shape):
    ids, padding_id = packed
    check(tables, ids, padding_id, shape)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_border_of_chunks_tiles_and_blocks(tables, T, shape):
    generator = np.random.default_rng(T)
    for length in (1, 2, 16, 17, 32, 33, 63, 64, 65, 300):
        check(tables, np.arange(3 * T).reshape(3, T) // length, None, shape)
    check(tables, generator.integers(-1, 3, (2, T)), 0, shape)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_long_rows(tables, shape):
    """Segments over many blocks, many tiles in a block, and every bucket up to 2^9 chunks."""
    generator = np.random.default_rng(0)
    lengths = [64 * 2**power for power in range(9)] + [64 * 2**power + 1 for power in range(9)]
    lengths = generator.permutation(lengths + [1] * 50)
    check(tables, np.repeat(np.arange(len(lengths)), lengths)[None], 7, shape)
    rows = np.cumsum(generator.random((5, 4001)) < 0.01, axis=1)
    check(tables, rows, 3, shape)
    check(tables, np.ones((2, 200_000), np.int32), None, shape)
