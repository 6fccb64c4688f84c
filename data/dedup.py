"""Near-duplicates: Rensa signatures for datatrove's bucket and cluster stages, with an exact check in between.

`write_signatures` (every task of the corpus) -> `buckets` (up to one task a band) -> `verify` (any number of tasks) ->
`cluster_step` (one task) -> datatrove's MinhashDedupFilter (every task again). Documents are named (file, row): the
task that read them and their row in its annotations. The earliest of some duplicates is the one that survives.
"""

import dataclasses
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from console import UserError, write_atomic
from data.duplicates import Candidates, clusters, settle_all


@dataclass(frozen=True)
class Dedup:
    """Which pairs are duplicates: `bands` x `rows` MinHash values of character n-grams, then the exact Jaccard index.

    A pair at similarity s becomes a candidate with probability 1 - (1 - s**rows)**bands (Leskovec et al., Mining of
    Massive Datasets, 3.4.2): .998 at .8, .98 at .75 for the defaults. A candidate at or above `jaccard` is a duplicate.
    The default lies under .8 because an extractor's noise moves the index of two copies by about .03 either way.
    `jaccard` 0 takes every candidate for a duplicate, as pipelines without an exact check do.
    """

    bands: int = 20
    rows: int = 6
    ngram: int = 5
    jaccard: float = 0.75
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("bands", "rows", "ngram"):
            if getattr(self, name) < 1:
                raise UserError(f"dedup: {name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.jaccard <= 1:
            raise UserError(f"dedup: jaccard is {self.jaccard}: it must lie between 0 and 1")


def shingle_text(text: str) -> str:
    """What is compared: `text` without white space.

    Extractors and encodings disagree about line ends, indents and spaces between scripts, and Japanese carries no
    meaning there. Case, digits and width stay: pages that differ in them alone are rare, and folding them would make
    tables of figures or form letters look alike.
    """
    return "".join(text.split())


def shingles(text: str, n: int) -> np.ndarray:
    """A 64-bit hash of every character n-gram of `shingle_text(text)`, in order of appearance, repeats included.

    Integer arithmetic on code points only, so the same on every machine. Two different n-grams of a pair of documents
    with 10^6 of them share a hash with a chance of 10^-7: the Jaccard index of these hashes is called exact.
    """
    codes = np.frombuffer(shingle_text(text).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    count = max(0, len(codes) - n + 1)
    hashed = np.zeros(count, np.uint64)
    for i in range(n):
        hashed *= np.uint64(0x9E3779B97F4A7C15)
        hashed += codes[i : i + count] + np.uint64(1)
    hashed ^= hashed >> np.uint64(32)
    hashed *= np.uint64(0xD6E8FEB86659FD93)
    return hashed ^ (hashed >> np.uint64(32))


def signature(text: str, config: Dedup) -> np.ndarray | None:
    """MinHash signature of `text`, uint32 (bands * rows,), or None if it is shorter than one n-gram.

    Rensa's RMinHash, that is Fast Similarity Sketching (Dahlgaard, Knudsen and Thorup, arXiv 1704.04370).
    """
    from rensa import RMinHash

    hashed = shingles(text, config.ngram)
    if not len(hashed):
        return None
    ends = np.array([0, len(hashed)], np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashed, ends, config.bands * config.rows, config.seed)
    return np.array(matrix.to_rows()[0], np.uint32)


def write_signatures(folder: Path | str, rank: int, signatures: np.ndarray, rows: np.ndarray, config: Dedup) -> None:
    """Task `rank`'s `signatures` (n, bands * rows) of its documents `rows` (n,), one sorted file a band.

    The format of datatrove 0.10's MinhashDedupSignature: little-endian uint32, the band's hashes and then the document.
    """
    signatures = np.asarray(signatures, np.uint32).reshape(len(rows), config.bands * config.rows)
    for band in range(config.bands):
        records = np.column_stack([signatures[:, band * config.rows : (band + 1) * config.rows], rows]).astype("<u4")
        records = records[np.lexsort(records.T[::-1])]
        path = Path(folder) / f"bucket_{band:03d}" / f"{rank:05d}.minhash.sig"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        records.tofile(part)  # not flushed to the disk: twenty files a task, which a power cut would only make anew
        part.replace(path)


def buckets(
    data: object,
    rank: int,
    world_size: int,
    *,
    signatures_folder: Path | str,
    buckets_folder: Path | str,
    config: Dedup,
) -> None:
    """datatrove's stage that joins documents with an equal band, as a step for up to as many tasks as bands.

    Its own tasks are one a band, which for small corpora takes longer to start than to run.
    """
    from datatrove.pipeline.dedup import MinhashDedupBuckets

    del data
    for band in range(rank, config.bands, world_size):
        # Its default of 5 records a read is meant for thousands of remote files.
        step = MinhashDedupBuckets(
            str(signatures_folder), str(buckets_folder), config=datatrove_config(config), lines_to_buffer=256
        )
        step.run(None, band, config.bands)


def cluster_step(config: Dedup, verified_folder: Path | str, removed_folder: Path | str) -> Any:
    """datatrove's stage that turns pairs into the rows to remove from each file; one task."""
    from datatrove.pipeline.dedup import MinhashDedupCluster

    # It only checks that the number of files is a multiple of the buckets, which verify's tasks need not be.
    any_count = dataclasses.replace(datatrove_config(config), num_buckets=1)
    return MinhashDedupCluster(str(verified_folder), str(removed_folder), config=any_count, lines_to_buffer=256)


def datatrove_config(config: Dedup) -> Any:
    """`config` in datatrove's words; the hash function named there is never called, the signatures being ours."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    return MinhashConfig(config.ngram, config.bands, config.rows, config.seed, hash_config=HashConfig(32, "sha1"))


def verify(
    _data: object,
    rank: int,
    world_size: int,
    *,
    buckets_folder: Path | str,
    texts: Path | str,
    signatures: Path | str,
    verified_folder: Path | str,
    config: Dedup,
) -> None:
    """Check the candidates exactly; a datatrove step for any number of tasks, which share the clusters of candidates.

    `texts` and `signatures` hold `{file:05d}.parquet` with a column of that name, less its s. Written when all is done:
    `pairs-{rank:05d}.parquet` (see `pairs`) and `{rank:05d}_00.dups`, the same pairs for `cluster_step`.

    Memory: about 400 bytes a document that has a candidate (measured; 16 of them stay), one row group, CACHE_BYTES of
    shingles, and a signature for each kept document of the cluster at hand. The texts that a task needs are copied in
    one pass over the files to a temporary file in `verified_folder`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents, roots = clusters(read_pairs(path) for path in sorted(Path(buckets_folder).glob("*.dups")))
    mine = (roots * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) % np.uint64(world_size) == rank
    documents, roots = documents[mine], roots[mine]
    verified = Path(verified_folder)
    verified.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=verified) as file:  # without a name: it vanishes with a killed task
        candidates = Candidates(file, Path(texts), Path(signatures), documents, config.bands * config.rows)

        def grams(i: int) -> np.ndarray:
            return np.unique(shingles(candidates.text(i), config.ngram))

        found = list(settle_all(roots, candidates.signature, grams, config.jaccard))
    kept, dropped = (documents[np.array([pair[side] for pair in found], np.int64)] for side in (0, 1))
    named = np.column_stack([kept >> np.uint64(32), kept, dropped >> np.uint64(32), dropped]).astype("<u4")
    table = pa.table(
        {name: named[:, i] for i, name in enumerate(("kept_file", "kept_row", "dropped_file", "dropped_row"))}
        | {"jaccard": np.array([pair[2] for pair in found], np.float64)}
    )
    boxed = io.BytesIO()
    pq.write_table(table, boxed)
    write_atomic(verified / f"pairs-{rank:05d}.parquet", boxed.getvalue())
    # The kept document comes first: datatrove's union by size then makes it, and nothing else, the cluster's root.
    write_atomic(verified / f"{rank:05d}_00.dups", named.tobytes())


def pairs(verified_folder: Path | str) -> Iterator[tuple[tuple[int, int], tuple[int, int], float]]:
    """((file, row) kept, (file, row) dropped, Jaccard index) of every duplicate that `verify` found."""
    import pyarrow.parquet as pq

    for path in sorted(Path(verified_folder).glob("pairs-*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches():
            for a, i, b, j, jaccard in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield (a, i), (b, j), jaccard


def read_pairs(path: Path) -> np.ndarray:
    """A .dups file as (n, 2) uint64: a document is `file << 32 | row`."""
    named = np.fromfile(path, "<u4").reshape(-1, 4).astype(np.uint64)
    return named[:, 0::2] << np.uint64(32) | named[:, 1::2]
