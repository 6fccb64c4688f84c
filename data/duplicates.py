"""Which candidates are duplicates: clusters of pairs, the exact check inside a cluster, and how two texts differ."""

import array
import difflib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from console import UserError

MISSED = 1e-5  # chance that a screen turns away a pair that lies exactly at the threshold
EXACT_CHECKS = 64  # kept documents that one document is compared with exactly, best estimate first
CACHE_BYTES = 256 << 20  # shingles held while a task verifies
COMPARED_SENTENCES, COMPARED_CHARACTERS = 400, 20_000  # of each text, past what both begin with: bounds difflib's work


def clusters(bands: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The documents that occur in pairs, sorted, and for each the smallest document that it is connected with.

    A band is pairs of documents, uint64 (n, 2). They are joined band by band, so that what is held between two bands
    grows with the documents and not with the pairs.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    documents = roots = np.zeros(0, np.uint64)
    for band in bands:
        if not len(band):
            continue
        ends = np.concatenate([documents, band[:, 0], roots, band[:, 1]])
        documents, inverse = np.unique(ends, return_inverse=True)
        del ends
        at = inverse.astype(np.int32 if len(documents) < 2**31 else np.int64).reshape(2, -1)
        graph = csr_array((np.ones(at.shape[1], np.float64), (at[0], at[1])), shape=(len(documents),) * 2)
        _, label = connected_components(graph, directed=False)
        roots = documents[np.unique(label, return_index=True)[1][label]]
    return documents, roots


class Candidates:
    """The signatures and texts of `documents` (sorted `file << 32 | row`), copied from the columns of these names in
    `signatures/{file:05d}.parquet` and `texts/{file:05d}.parquet`, whose row groups go side by side.

    They lie in `file`, in their order, so that a cluster's documents can be read one by one wherever they came from.
    Raises UserError if a signature is not of `hashes` values.
    """

    def __init__(self, file: IO[bytes], texts: Path, signatures: Path, documents: np.ndarray, hashes: int) -> None:
        self.file, self.width = file, hashes * 4
        self.starts = array.array("q", [0])
        files = documents >> np.uint64(32)
        rows = (documents & np.uint64(0xFFFFFFFF)).astype(np.int64)
        cuts = np.flatnonzero(np.diff(files)) + 1
        for start, part in zip([0, *cuts.tolist()], np.split(rows, cuts), strict=True):
            if len(part):
                name = f"{int(files[start]):05d}.parquet"
                self.copy(texts / name, signatures / name, part)

    def copy(self, texts: Path, signatures: Path, rows: np.ndarray) -> None:
        """Append the documents at the sorted `rows` of two files, with one row group of each in memory at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetFile(texts) as source, pq.ParquetFile(signatures) as signed:
            end = 0
            for group in range(source.num_row_groups):
                start, end = end, end + source.metadata.row_group(group).num_rows
                wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
                if not len(wanted):
                    continue
                texts_of, sketches = (
                    file.read_row_group(group, columns=[name])[name].take(pa.array(wanted)).to_pylist()
                    for file, name in ((source, "text"), (signed, "signature"))
                )
                for text, sketch in zip(texts_of, sketches, strict=True):
                    if sketch is None or len(sketch) != self.width:
                        found = len(sketch or b"") // 4
                        raise UserError(
                            f"{signatures}: signatures of {found} hashes where the profile's bands * rows is "
                            f"{self.width // 4}: annotate again with this profile"
                        )
                    size = self.file.write(sketch) + self.file.write(text.encode())
                    self.starts.append(self.starts[-1] + size)

    def signature(self, i: int) -> np.ndarray:
        """The signature of the i-th document, uint32."""
        self.file.seek(self.starts[i])
        return np.frombuffer(self.file.read(self.width), "<u4")

    def text(self, i: int) -> str:
        """The text of the i-th document."""
        self.file.seek(self.starts[i] + self.width)
        return self.file.read(self.starts[i + 1] - self.starts[i] - self.width).decode()


def settle_all(
    roots: np.ndarray, signature: Callable[[int], np.ndarray], grams: Callable[[int], np.ndarray], threshold: float
) -> Iterator[tuple[int, int, float]]:
    """`settle` for each cluster: documents are numbered in their order, and a cluster's have an equal root."""
    order = np.argsort(roots, kind="stable")
    cuts = np.flatnonzero(np.diff(roots[order])) + 1
    held = lately_used(grams)
    for members in np.split(order, cuts):
        yield from settle(members.tolist(), signature, held, threshold)


def settle(
    members: Sequence[int], signature: Callable[[int], np.ndarray], grams: Callable[[int], np.ndarray], threshold: float
) -> Iterator[tuple[int, int, float]]:
    """(kept, dropped, Jaccard index) of the duplicates among `members`, taken in order.

    A member is a duplicate of a kept one if their Jaccard index reaches `threshold`, otherwise it is kept: no chains,
    nothing dropped without a kept twin, and no twins kept. The kept ones are screened by the lowest bit of each hash
    (b-bit minwise hashing, Li and König, arXiv 0910.3349), then by the hashes, then checked exactly from the best
    estimate down. With k kept ones a member costs about 4 ns * k * hashes / 64 and at most EXACT_CHECKS exact checks;
    what that limit can lose is a pair at the threshold among more than so many that look as close.
    """
    kept: list[int] = []
    for member in members:
        own = signature(member)
        own_bits = low_bits(own)
        if not kept:
            bits, hashes = np.zeros((len(own_bits), 4), np.uint64), np.zeros((4, len(own)), np.uint32)
            least_bits, least_hashes = screens(len(own), threshold)
        differing = np.bitwise_count(bits[:, : len(kept)] ^ own_bits[:, None]).sum(0, dtype=np.int32)
        near = np.flatnonzero(differing <= len(own) - least_bits)
        agreeing = (hashes[near] == own).sum(1)
        near, agreeing = near[agreeing >= least_hashes], agreeing[agreeing >= least_hashes]
        for k in near[np.argsort(-agreeing, kind="stable")][:EXACT_CHECKS]:
            index = jaccard(grams(kept[k]), grams(member))
            if index >= threshold:
                yield kept[k], member, index
                break
        else:
            if len(kept) == len(hashes):
                bits = np.concatenate([bits, np.zeros_like(bits)], axis=1)
                hashes = np.concatenate([hashes, np.zeros_like(hashes)])
            bits[:, len(kept)], hashes[len(kept)] = own_bits, own
            kept.append(member)


@lru_cache(maxsize=8)
def screens(hashes: int, threshold: float) -> tuple[int, int]:
    """How many low bits, and how many hashes, two signatures at the threshold share in all but MISSED of all cases."""
    from scipy.stats import binom

    return int(binom.ppf(MISSED, hashes, (1 + threshold) / 2)), int(binom.ppf(MISSED, hashes, threshold))


def low_bits(hashes: np.ndarray) -> np.ndarray:
    """The lowest bit of each hash, packed into uint64 words and filled up with zeros."""
    packed = np.packbits((hashes & 1).astype(np.uint8))
    return np.pad(packed, (0, -len(packed) % 8)).view(np.uint64)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard index of two sets, each a sorted array without repeats."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(1, len(a) + len(b) - common)


def lately_used(make: Callable[[int], np.ndarray]) -> Callable[[int], np.ndarray]:
    """`make`, holding on to the arrays asked for last, up to CACHE_BYTES of them."""
    held: OrderedDict[int, np.ndarray] = OrderedDict()
    total = 0

    def get(i: int) -> np.ndarray:
        nonlocal total
        if i in held:
            held.move_to_end(i)
            return held[i]
        made = held[i] = make(i)
        total += made.nbytes
        while total > CACHE_BYTES and len(held) > 1:
            total -= held.popitem(last=False)[1].nbytes
        return made

    return get


def difference(a: str, b: str, limit: int = 800) -> str:
    """How `a` and `b` differ, by sentences: `- ` only in a, `+ ` only in b, `…` equal; at most `limit` characters.

    White space is folded. Only the start of what differs is looked at, so texts of megabytes take no longer.
    """
    old, new = sentences(a), sentences(b)
    same = next((i for i, (x, y) in enumerate(zip(old, new, strict=False)) if x != y), min(len(old), len(new)))
    old, new = shortened(old[same:]), shortened(new[same:])
    lines = ["…"] if same else []
    for what, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if what == "equal":
            lines.append("…")
            continue
        paired = min(j - i, m - k)
        for x, y in zip(old[i : i + paired], new[k : k + paired], strict=True):
            lines += window(x, y)
        lines += [f"- {clip(x)}" for x in old[i + paired : j]] + [f"+ {clip(y)}" for y in new[k + paired : m]]
    shown: list[str] = []
    for line in lines:
        if sum(map(len, shown)) + len(shown) + len(line) > limit - 2:
            break
        shown.append(line)
    if len(shown) < len(lines) and shown[-1:] != ["…"]:
        shown.append("…")
    return "\n".join(shown)[:limit]


def sentences(text: str) -> list[str]:
    """`text` cut after Japanese and western full stops and at line ends, white space folded, empty ones left out."""
    parts = re.findall(r"[^\n。．！？!?]+[。．！？!?]*", text)
    return [folded for part in parts if (folded := " ".join(part.split()))]


def shortened(parts: list[str]) -> list[str]:
    """The first of `parts`, as many as `difference` compares."""
    kept, room = [], COMPARED_CHARACTERS
    for part in parts[:COMPARED_SENTENCES]:
        if room <= 0:
            break
        kept.append(part[:room])
        room -= len(part)
    return kept


def window(old: str, new: str) -> list[str]:
    """Two versions of a sentence as two lines, cut to the neighbourhood of the first character that differs."""
    at = next((i for i, (x, y) in enumerate(zip(old, new, strict=False)) if x != y), min(len(old), len(new)))
    start = max(0, at - 20)
    return [f"{sign} {'…' if start else ''}{clip(text[start:])}" for sign, text in (("-", old), ("+", new))]


def clip(text: str, width: int = 100) -> str:
    """`text`, or its first `width` characters and an ellipsis."""
    return text if len(text) <= width else text[:width] + "…"
