"""Packing documents as they come, into batches of rows of one length.

Best fit over a bounded number of rows: each piece of a document goes into the open row that it
fills most tightly; where none has room a new one is opened and, if there are too many, the fullest
is closed. Closed rows make the batches."""

import bisect
from collections.abc import Iterable, Iterator

import numpy as np

from ._packing import (
    PackedDocuments,
    checked_documents,
    pieces_of,
    positive_int,
    refuse_long,
    rows_of_pieces,
)

__all__ = ["PackedStream"]


class PackedStream(Iterator[PackedDocuments]):
    """Batches of packed rows from an iterable of token documents.

        for batch in PackedStream(documents, seq_len=4096, batch_size=8):
            loss = train_step(batch.tokens, batch.targets, batch.loss_mask, batch.segment_ids)

    A plain iterator: it runs in any thread or process, and what it reads may be a generator, a list
    or a data set of grain. What comes out depends on the documents and the arguments alone; every
    token of every document comes out once, unless `drop_remainder` drops the last ones.

    **Arguments**

    - `documents`: yields 1-D integer sequences. Empty ones are skipped.
    - `seq_len`: T, the row length.
    - `batch_size`: B, the rows of a batch.
    - `open_rows`: how many rows wait to be filled. More of them waste less and hold documents back
      for longer; they hold `open_rows * seq_len` tokens of memory at most.
    - `long_documents`: "split" or "error", as for `pack_documents`.
    - `padding_token`: fills `tokens` at padding and `targets` where a document has no next token.
    - `drop_remainder`: whether to drop a last batch of fewer rows. By default rows of padding
      alone fill it up.

    **Yields** `PackedDocuments` of [B, T] numpy arrays, the integers int32.

    **Raises** `ValueError` as `pack_documents` does, when a bad document is reached."""

    def __init__(
        self,
        documents: Iterable,
        seq_len: int,
        batch_size: int,
        *,
        open_rows: int = 64,
        long_documents: str = "split",
        padding_token: int = 0,
        drop_remainder: bool = False,
    ):
        self.seq_len = positive_int("seq_len", seq_len)
        self.batch_size = positive_int("batch_size", batch_size)
        self.open_rows = positive_int("open_rows", open_rows)
        if long_documents not in ("split", "error"):
            raise ValueError(f"long_documents must be 'split' or 'error', got {long_documents!r}")
        self.long_documents = long_documents
        self.padding_token = int(_int32(padding_token, "padding_token"))
        self.drop_remainder = drop_remainder
        self._documents = iter(documents)
        self._read = 0  # documents
        self._open = []  # (room, number, pieces) sorted: the fullest first, of these the oldest
        self._opened = 0
        self._closed = []  # rows: lists of pieces

    def __next__(self):
        while len(self._closed) < self.batch_size:
            try:
                document = next(self._documents)
            except StopIteration:
                self._closed += [row for _, _, row in self._open]
                self._open = []
                break
            self._add(document)
        rows, self._closed = self._closed[: self.batch_size], self._closed[self.batch_size :]
        if not rows or (self.drop_remainder and len(rows) < self.batch_size):
            raise StopIteration
        rows += [[]] * (self.batch_size - len(rows))
        return rows_of_pieces(rows, self.seq_len, np.int32, self.padding_token)

    def get_state(self) -> dict:
        """What has been read and not yet come out, as JSON can hold it.

        With the state of whatever yields the documents, taken at the same time, `set_state` goes
        on exactly where this stream is."""
        plain = lambda pieces: [
            [document[start : stop + 1].tolist(), stop - start] for document, start, stop in pieces
        ]
        return {
            "read": self._read,
            "opened": self._opened,
            "open": [[room, number, plain(pieces)] for room, number, pieces in self._open],
            "closed": [plain(pieces) for pieces in self._closed],
        }

    def set_state(self, state: dict) -> None:
        """Go on from `get_state`, of a stream with the same arguments; the documents must go on
        behind the `state["read"]` first ones."""
        pieces = lambda plain: [
            (np.asarray(tokens, np.int32), 0, length) for tokens, length in plain
        ]
        self._read, self._opened = state["read"], state["opened"]
        self._open = [(room, number, pieces(plain)) for room, number, plain in state["open"]]
        self._closed = [pieces(plain) for plain in state["closed"]]

    def _add(self, document):
        number, self._read = self._read, self._read + 1
        for checked in checked_documents([document], first=number):
            if self.long_documents == "error":
                refuse_long([checked], self.seq_len)
            tokens = _int32(checked, f"documents[{number}]")
            for piece in pieces_of(tokens, self.seq_len):
                self._place(piece)

    def _place(self, piece):
        _, start, stop = piece
        length = stop - start
        at = bisect.bisect_left(self._open, length, key=lambda row: row[0])
        if at < len(self._open):
            room, number, pieces = self._open.pop(at)
        else:
            room, number, pieces = self.seq_len, self._opened, []
            self._opened += 1
        pieces.append(piece)
        if room == length:
            self._closed.append(pieces)
            return
        bisect.insort(self._open, (room - length, number, pieces), key=lambda row: row[:2])
        if len(self._open) > self.open_rows:
            self._closed.append(self._open.pop(0)[2])


def _int32(tokens, name):
    """The same numbers as int32; a batch's type must not depend on what is in it."""
    tokens = np.asarray(tokens)
    info = np.iinfo(np.int32)
    if tokens.size and (tokens.min() < info.min or tokens.max() > info.max):
        raise ValueError(
            f"{name} does not fit int32: it reaches from {tokens.min()} to {tokens.max()}"
        )
    return tokens.astype(np.int32)
