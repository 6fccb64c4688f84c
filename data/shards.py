"""Token shards on disk: written atomically, checked before use, opened as memory maps. The format is in `load`."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from console import UserError

FORMAT = 1
UNK, BOS, EOS = 0, 1, 2  # ids of <unk>, <s>, </s> in every tokenizer of ours
REBUILD = "delete the folder and rebuild with `python -m data build`"


def load(folder: Path | str) -> dict[str, Any]:
    """The manifest of a shards folder, after the cheap checks of `verify`.

    Every document is `<s> pieces </s>`, with the ids that `document_ids` gives; where they are one, a single id between
    documents ends one and opens the next. A split's k-th shard is `SPLIT-0000k.tokens.npy` (1-D uint16 or uint32) and
    `SPLIT-0000k.starts.npy` (int64: where each document starts, then the number of tokens); `token_bytes.npy`
    (uint16) says how many UTF-8 bytes of text each id stands for; `documents-*.parquet` hold the texts themselves.
    """
    return verify(folder)


def verify(folder: Path | str, full: bool = False) -> dict[str, Any]:
    """The manifest of `folder` once every file in it has the size the manifest says; `full` also hashes the shards.

    Raises UserError naming the file that is missing, cut short or changed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    try:
        dtype, files = np.dtype(manifest["dtype"]), [f"tokenizer/{manifest['tokenizer']['file']}"]
        for split in ("train", "val"):
            for shard in manifest["splits"][split]["shards"]:
                name, starts = shard["file"], starts_name(shard["file"])
                check_array(folder / name, dtype, shard["tokens"], "tokens")
                check_array(folder / starts, np.dtype("<i8"), shard["documents"] + 1, "starts")
                if full and hash_files(folder / name, folder / starts) != shard["sha256"]:
                    raise UserError(f"shard changed: {folder / name} is not what the manifest says: {REBUILD}")
        check_array(folder / "token_bytes.npy", np.dtype("<u2"), manifest["vocab_size"], "entries")
        files += ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
        files += [part["file"] for part in manifest.get("documents", [])]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'manifest.json'}: incomplete ({error!r}): {REBUILD}") from None
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: {REBUILD}")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as it stands. Raises UserError if `folder` is none of our shards folders."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: no manifest.json, so no shards folder: make one with `python -m data build --out {folder}`"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): {REBUILD}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: format {found}, this version reads format {FORMAT}: {REBUILD}")
    return manifest


def document_ids(manifest: dict[str, Any]) -> tuple[int, int]:
    """The ids that open and end a document; a manifest that names none is of a tokenizer of ours."""
    made = manifest.get("tokenizer", {})
    return made.get("bos_id", BOS), made.get("eos_id", EOS)


def check_array(path: Path, dtype: np.dtype, length: int, unit: str) -> None:
    """Raise UserError unless `path` is an .npy file of `length` entries of `dtype`, whole to its last byte."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"npy version {version}")
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            entries = (os.fstat(file.fileno()).st_size - file.tell()) / found.itemsize
    except FileNotFoundError:
        raise UserError(f"shard missing: {path}: {REBUILD}") from None
    except ValueError as error:
        raise UserError(f"{path}: not an .npy file ({error}): {REBUILD}") from None
    if entries < length:
        raise UserError(f"shard cut short: {path} has {int(entries)} {unit}, manifest says {length}: {REBUILD}")
    if shape != (length,) or entries != length or found != dtype:
        raise UserError(
            f"{path}: {shape} of {found} in {entries:g} entries, manifest says {length} {unit} of {dtype}: {REBUILD}"
        )


def open_split(folder: Path | str, manifest: dict[str, Any], split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The shards of "train" or "val" as (tokens, starts) memory maps, in order."""
    names = [shard["file"] for shard in manifest["splits"][split]["shards"]]
    return [
        (
            np.load(Path(folder) / name, mmap_mode="r", allow_pickle=False),
            np.load(Path(folder) / starts_name(name), mmap_mode="r", allow_pickle=False),
        )
        for name in names
    ]


def starts_name(tokens_name: str) -> str:
    """The file of document starts that goes with a file of tokens."""
    return tokens_name.replace(".tokens.npy", ".starts.npy")


class Writer:
    """Documents of one split, appended to shards of about `shard_tokens` tokens; a document is never cut."""

    def __init__(
        self, folder: Path, split: str, dtype: str, shard_tokens: int, bos_id: int = BOS, eos_id: int = EOS
    ) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self.before, self.after = [bos_id], [eos_id] if eos_id != bos_id else []
        self.shards: list[dict[str, Any]] = []
        self.file: BinaryIO | None = None

    def add(self, ids: list[int], text_bytes: int) -> None:
        """Append one document: its piece ids without `<s>` and `</s>`, and the UTF-8 bytes of its text."""
        if self.file is None:
            self.name = f"{self.split}-{len(self.shards):05d}.tokens.npy"
            self.file = (self.folder / self.name).open("wb")
            write_header(self.file, self.dtype, 0)
            self.starts, self.bytes = [0], 0
        document = [*self.before, *ids, *self.after]
        self.file.write(np.array(document, self.dtype).tobytes())
        self.starts.append(self.starts[-1] + len(document))
        self.bytes += text_bytes
        if self.starts[-1] >= self.shard_tokens:
            self.close()

    def close(self) -> list[dict[str, Any]]:
        """Finish the shard being written; returns the manifest's entries of all shards so far."""
        if self.file is not None:
            tokens = self.starts[-1]
            self.file.seek(0)
            write_header(self.file, self.dtype, tokens)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None
            starts = self.folder / starts_name(self.name)
            with starts.open("wb") as file:
                np.save(file, np.array(self.starts, "<i8"), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            digest = hash_files(self.folder / self.name, starts)
            entry = {"file": self.name, "tokens": tokens, "documents": len(self.starts) - 1, "bytes": self.bytes}
            self.shards.append(entry | {"sha256": digest})
        return self.shards


def write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """The .npy header of a 1-D array; numpy pads it so that it keeps its size whatever `length` becomes."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    )


def hash_files(*paths: Path) -> str:
    """SHA-256 of the files one after another, as hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def fingerprint(manifest: dict[str, Any]) -> str:
    """hex16 of the data a model sees: tokenizer, tokens and their order; not of paths, times or machines."""
    seen = [manifest["format"], manifest["dtype"], manifest["tokenizer"]["sha256"]]
    seen += [[shard["sha256"] for shard in manifest["splits"][split]["shards"]] for split in ("train", "val")]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


@contextlib.contextmanager
def part_folder(out: Path) -> Iterator[Path]:
    """A locked, empty folder `.NAME.part` beside `out`, renamed to `out` when the block ends and removed if it fails.

    What a killed build left there is cleared first. Raises UserError while another build writes to the same `out`.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - "." and ".." have no name; a link at `out` stays one
    part = out.with_name(f".{out.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {out}: {error.filename} is no folder: choose another --out") from None
    # The lock lies inside and moves with the folder, so that no lock file stays behind in the parent.
    with (part / ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(lock.fileno()), (part / ".lock").stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise UserError(f"another build is writing {out}: wait for it, or choose another --out")
        for path in part.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield part
            try:
                part.rename(out)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
                raise UserError(f"--out {out}: another build finished there meanwhile: choose another --out") from None
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        (out / ".lock").unlink()
