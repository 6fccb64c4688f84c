"""History and summary records decoded in bulk, as numpy sees their bytes: several times protobuf's speed.

On the wire an item of either is `0a L key 82 01 n value`: L bytes in all, the key a field of its own (or several, where
it is nested), and n bytes of JSON. So the items of a whole file are found by `82 01`, which no JSON text contains, and
every length is checked to lead exactly to the next item. A record in which one does not, or which holds anything but
numbers, is left to protobuf.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

HISTORY, SUMMARY = 0x12, 0x1A
"""The first byte of the message in a Record."""
ITEM, STEP_FIELD, MARK = 0x0A, 0x12, b"\x82\x01"
PADDING = 512
"""Bytes after the last record that may be looked at and mean nothing."""
NUMBER = np.zeros(256, bool)
NUMBER[list(b"-0123456789NI")] = True
"""First bytes of a number, NaN and Infinity among them."""
MASKS = np.array([(1 << 8 * n) - 1 for n in range(8)] + [2**64 - 1], np.uint64)
PRIME = np.uint64(0x9E3779B97F4A7C15)


class Column(NamedTuple):
    """One key's values by the record that they are in, two arrays of one length."""

    key: bytes
    """The key field of a HistoryItem, as protobuf reads it."""
    record: np.ndarray
    value: np.ndarray


class Decoded(NamedTuple):
    columns: list[Column]
    """Of the history records that are numbers throughout."""
    records: np.ndarray
    """The index of those records."""
    steps: np.ndarray
    """Their `_step`."""
    summary: list[tuple[int, bytes, bytes]]
    """Record, key field and JSON of each key's last update, in order."""
    rest: np.ndarray
    """Records for protobuf, in order."""


def decode(payloads: list[bytes]) -> Decoded:
    """What the history and summary records among `payloads` say, and which records are still to be read."""
    text = b"".join(payloads) + bytes(PADDING)
    data = np.frombuffer(text, np.uint8)
    size = np.fromiter(map(len, payloads), np.int64, len(payloads))
    stop = np.cumsum(size)
    tag, begin, length = messages(data, stop - size)
    history = tag == HISTORY
    plain = (history | (tag == SUMMARY)) & (begin + length <= stop)

    marks = np.flatnonzero(data == MARK[0])
    marks = marks[data[marks + 1] == MARK[1]]
    counts = np.diff(np.searchsorted(marks, stop), prepend=0)
    owner = np.repeat(np.arange(len(payloads)), counts)
    stop = np.where(plain, begin + length, stop)
    value = marks + 3
    end = value + data[marks + 2]
    start = np.concatenate(([0], end[:-1]))
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    start[first] = begin[owner[first]]
    last = np.flatnonzero(np.diff(owner, append=-1))
    whole = end - start - 2
    fits = (data[start] == ITEM) & (data[start + 1] == whole) & (whole < 128) & (data[marks + 2] < 128)
    fits &= (end <= stop[owner]) & (marks >= start + 2)
    plain[owner[~fits]] = False
    plain[counts == 0] = False
    mine, after = owner[last], end[last]
    left = stop[mine] - after
    # A history record ends with its step: field 2, of L bytes, that are a field 1.
    trailer = history[mine] & (data[after] == STEP_FIELD) & (data[after + 1] == left - 2) & (data[after + 2] == 8)
    plain[mine[(left != 0) & ~trailer]] = False

    key = start + 2
    name = fingerprints(data, key, marks - key)
    is_step = name == STEP
    in_history = history[owner]
    plain[owner[in_history & ~(NUMBER[data[value]] & (end > value))]] = False
    stepped = np.zeros(len(payloads), bool)
    stepped[owner[is_step]] = True
    plain &= stepped | ~history

    rows = plain & history
    numbers = np.flatnonzero(rows[owner])
    values = cast(data, value[numbers], end[numbers])
    if values is None or not np.isfinite(values[is_step[numbers]]).all():
        plain, rows, numbers, values = plain & ~history, np.zeros_like(rows), numbers[:0], np.empty(0)
    columns = [
        Column(text[key[at[0]] : marks[at[0]]], owner[at], values[where])
        for where in groups(name[numbers])
        for at in [numbers[where]]
    ]
    steps = np.zeros(len(payloads), np.int64)
    chosen = is_step[numbers]
    steps[owner[numbers[chosen]]] = values[chosen]

    updates = np.flatnonzero((plain & ~history)[owner])
    final = sorted(int(updates[where[-1]]) for where in groups(name[updates]))
    summary = [(int(owner[i]), text[key[i] : marks[i]], text[value[i] : end[i]]) for i in final]
    at = np.flatnonzero(rows)
    return Decoded(columns, at, steps[at], summary, np.flatnonzero(~plain))


def messages(data: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tag, first byte and length of the message in each Record that begins with its number; tag 0 for others."""
    at = start + 1
    for _ in range(9):
        at += data[at] >= 128
    tag = np.where(data[start] == 8, data[at + 1], 0)
    begin = at + 3
    length = (data[at + 2] & 127).astype(np.int64)
    for place in range(1, 4):
        more = data[begin - 1] >= 128
        length += np.where(more, (data[begin] & 127).astype(np.int64) << 7 * place, 0)
        begin += more
    tag[data[begin - 1] >= 128] = 0
    return tag, begin, length


def fingerprints(data: np.ndarray, start: np.ndarray, size: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each stretch of `data`."""
    words = np.ndarray(len(data) - 7, np.dtype("<u8"), data, strides=(1,))
    found = size.astype(np.uint64) * PRIME
    for place in range(0, int(size.max(initial=0)), 8):
        some = np.flatnonzero(size > place)
        word = words[start[some] + place] & MASKS[np.minimum(size[some] - place, 8)]
        mixed = (found[some] ^ word) * PRIME
        found[some] = mixed ^ (mixed >> np.uint64(29))
    return found


STEP = fingerprints(np.frombuffer(b"\x12\x05_step" + bytes(8), np.uint8), np.zeros(1, int), np.full(1, 7))[0]


def groups(names: np.ndarray) -> list[np.ndarray]:
    """The indices of each distinct name, ascending; groups in no particular order."""
    order = np.argsort((names >> np.uint64(48)).astype(np.uint16), kind="stable")  # a radix sort: 16 bits of it do
    ranked = names[order]
    cuts = np.flatnonzero(ranked[1:] != ranked[:-1])
    short = ranked >> np.uint64(48)
    if np.count_nonzero(short[1:] != short[:-1]) != len(cuts):
        order = np.argsort(names, kind="stable")
        ranked = names[order]
        cuts = np.flatnonzero(ranked[1:] != ranked[:-1])
    return np.split(order, cuts + 1) if len(names) else []


def cast(data: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray | None:
    """The numbers written in stretches of `data` that follow each other, or None where one is no number."""
    edge = np.zeros(len(data), np.int8)
    edge[start] = 1
    edge[stop] -= 1
    digits = data[np.cumsum(edge, dtype=np.int8).view(bool)]
    offsets = np.concatenate(([0], np.cumsum(stop - start))).astype(np.int32)
    texts = pa.StringArray.from_buffers(len(start), pa.py_buffer(offsets), pa.py_buffer(digits))
    try:
        return pc.cast(texts, pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        return None
