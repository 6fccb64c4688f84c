"""`--mix FILE.yaml`: sources in given shares, each document of a part repeated up to so many times.

sources:
  - {source: "jsonl:general/*.jsonl.gz", weight: 0.7}
  - {source: "jsonl:statutes.jsonl.gz", weight: 0.3, epochs: 4, profile: domain}
"""

import difflib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from console import UserError


@dataclass(frozen=True)
class Part:
    """One source of a mix."""

    source: str
    """As --source."""
    weight: float | None = None
    """Share of the mix in UTF-8 bytes, relative to the other weights; None: no part has one."""
    epochs: float = 1.0
    """Without weights: how often each document goes in. With weights: how often at most.

    1 unless said, with weights too: a repeat is a decision about the data. Up to about 4 epochs are nearly as good as
    new data, at 16 half of the value is gone (Muennighoff et al. 2023, arXiv 2305.16264).
    """
    text_key: str | None = None
    """Of this part alone; None: as --text_key."""
    id_key: str | None = None
    """Of this part alone; None: as --id_key."""
    profile: str | None = None
    """Quality profile of this part alone; None: as --profile."""


def read(path: Path) -> list[Part]:
    """The parts of a mix file. Raises UserError naming the file and the key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--mix {path}: no file there: check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"--mix {path}: not YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("sources"), list) or not content["sources"]:
        raise UserError(f"{path}: needs a key 'sources' with a list of {{source: SRC, weight: W, epochs: E}}")
    if unknown := [str(key) for key in content if key != "sources"]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}: the file holds 'sources' alone")
    parts = [part(entry, f"{path}: sources[{i}]") for i, entry in enumerate(content["sources"])]
    without = [p.source for p in parts if p.weight is None]
    if 0 < len(without) < len(parts):
        raise UserError(f"{path}: {without[0]} has no weight and others have one: give it to all parts or to none")
    return parts


def part(entry: Any, where: str) -> Part:
    """The Part of one entry. Raises UserError that begins with `where`."""
    names = [field.name for field in fields(Part)]
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {entry!r} is no mapping: write {{source: SRC, weight: W, epochs: E}}")
    for key in entry:
        if key not in names:
            meant = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {meant[0]!r}?" if meant else f"choose from {', '.join(names)}"
            raise UserError(f"{where}: unknown key {key!r}: {hint}")
    if "source" not in entry:
        raise UserError(f"{where}: no key 'source': say what to read, such as source: jsonl:corpus/*.jsonl.gz")
    for key, value in entry.items():
        if key not in ("weight", "epochs"):
            if not isinstance(value, str) or not value:
                raise UserError(f"{where}: {key} is {value!r}: it must be text")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{where}: {key} is {value!r}: it must be a number above 0 (in YAML 1.0e-3, not 1e-3)")
    return Part(**entry)


def plan(parts: list[Part], bytes_of_each: list[int]) -> list[float]:
    """How often each part's documents go in, given the UTF-8 bytes of its training documents.

    Without weights: its epochs. With weights: shares of bytes as the weights have it, and the largest mix in which no
    part exceeds its epochs; the part that would run out first then goes in exactly `epochs` times.
    Raises UserError for a part without a byte.
    """
    for p, size in zip(parts, bytes_of_each, strict=True):
        if size <= 0:
            raise UserError(f"--mix: {p.source} has no training document: check it, or take it out of the mix")
    weighted = [(p.weight, p.epochs, size) for p, size in zip(parts, bytes_of_each, strict=True) if p.weight]
    if not weighted:
        return [p.epochs for p in parts]
    scale = min(epochs * size / weight for weight, epochs, size in weighted)
    # min: the scarcest part must not lose or gain a copy to rounding.
    return [min(epochs, scale * weight / size) for weight, epochs, size in weighted]


def copies(repeats: float, share: float) -> int:
    """How often a document goes in whose hash falls at `share` in [0, 1): the whole part of `repeats`, and once more
    for as large a share of documents as its fraction says.

    So it depends on nothing but the document. `share` must be uniform over the documents asked about: not the hash
    that chose the validation documents, whose small values are gone from the training split.
    """
    whole = math.floor(repeats)
    return whole + (share < repeats - whole)
