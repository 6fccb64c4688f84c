"""The framing of a `run-<id>.wandb` file: a LevelDB log, https://github.com/google/leveldb/blob/main/doc/log_format.md.

A header of 7 bytes, then blocks of 32 KiB. A chunk is checksum (u32), size (u16), kind (u8) and data, and never crosses
a block; a record is one FULL chunk, or FIRST, MIDDLEs and LAST. W&B's checksum is the plain CRC-32 of kind and data.
"""

import struct
import zlib

MAGIC = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
BLOCK, HEAD = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
UNPACK = struct.Struct("<IHB").unpack_from
SEEDS = [zlib.crc32(bytes([kind])) for kind in range(5)]


def split(data: bytes, start: int) -> tuple[list[bytes | None], int]:
    """The records of `data`, which begins at byte `start` of its file, and the number of bytes that they took.

    None stands for a damaged stretch: reading goes on at the next block, where a chunk always starts. What has not been
    written to its end takes no bytes: read on from there once the file has grown. `start` is a record's beginning.
    """
    records: list[bytes | None] = []
    keep, unpack, crc32, seeds, seed = records.append, UNPACK, zlib.crc32, SEEDS, SEEDS[FULL]
    position, end, taken, parts = 0, len(data), 0, None
    stop_of_block = BLOCK - start % BLOCK
    while position + HEAD <= end:
        checksum, size, kind = unpack(data, position)
        begin = position + HEAD
        stop = begin + size
        if (
            kind == FULL
            and stop <= stop_of_block
            and stop <= end
            and crc32(chunk := data[begin:stop], seed) == checksum
        ):
            keep(chunk)
            taken, position, parts = stop, stop, None
            continue
        # All that is rarer than a whole record: 1 chunk in 50 at a block's end, and damage.
        if begin > stop_of_block or (kind == 0 and size == 0 and checksum == 0 and stop_of_block <= end):
            position, stop_of_block = stop_of_block, stop_of_block + BLOCK
            continue
        fits = 1 <= kind <= 4 and stop <= stop_of_block
        if fits and stop > end:
            break
        if not fits or crc32(chunk := data[begin:stop], seeds[kind]) != checksum:
            if stop_of_block >= end:
                break
            keep(None)
            taken, position, parts = stop_of_block, stop_of_block, None
            stop_of_block += BLOCK
            continue
        position = stop
        if kind == FIRST:
            parts = chunk
            continue
        if parts is not None:  # the rest of a record whose beginning was lost is dropped with it
            parts += chunk
            if kind == MIDDLE:
                continue
            keep(parts)
            parts = None
        taken = position
    return records, taken
