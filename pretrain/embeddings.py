"""`python -m pretrain.embeddings CHECKPOINT TOKENIZER --out DIR`: a model for an extended tokenizer.

Each new piece starts from the mean of the rows of the pieces that it was spelled with before, so that the model reads
it as about what it read there, instead of as noise. Any Hugging Face causal LM, sharded or not.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import console
from console import UserError
from data import shards
from pretrain.sample import find_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

LISTING = "new_pieces.json"


@dataclass(frozen=True)
class EmbeddingsConfig:
    """Give a checkpoint rows for the new pieces of a tokenizer made by `python -m data extend`."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """a checkpoint folder, or the folder of a pull (then its last checkpoint)"""
    tokenizer: Annotated[Path, tyro.conf.Positional]
    """the extended tokenizer's folder"""
    out: Path
    """folder to make"""
    json: bool = False
    """print one JSON object"""


def main(argv: list[str] | None = None) -> int:
    """The result on stdout: rows before and after, and where they lie."""
    import sys

    config = console.parse(EmbeddingsConfig, sys.argv[1:] if argv is None else argv, "python -m pretrain.embeddings")
    console.print_result(extend(find_checkpoint(Path(config.checkpoint)), config.tokenizer, config.out), config.json)
    return 0


def extend(checkpoint: Path, tokenizer: Path, out: Path) -> dict[str, Any]:
    """Write to `out` the model of `checkpoint` with a row for each new piece of `tokenizer`, and the tokenizer.

    A new row of the input embedding (and of an untied head) is the mean, taken in float32, of the rows of the piece's
    old ids; every other weight keeps its bits and its dtype. Raises UserError if the two do not belong together.
    """
    base_vocab, pieces = read_listing(tokenizer)
    check_vocabulary(checkpoint, tokenizer, base_vocab)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already: delete it or choose another")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"checkpoint {checkpoint} cannot be loaded: {error}") from None
    rows, tables = grow(model, base_vocab, pieces, f"checkpoint {checkpoint}", tokenizer)
    with shards.part_folder(out) as part:
        model.save_pretrained(part)
        for path in sorted(tokenizer.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                shutil.copyfile(path, part / path.name)
    return {
        "rows_before": rows,
        "rows_after": len(tables[0]),
        "new_pieces": len(pieces),
        "tied": len(tables) == 1,
        "dtype": str(tables[0].dtype).removeprefix("torch."),
        "folder": str(out),
    }


def grow(
    model: Any, base_vocab: int, pieces: list[tuple[int, list[int]]], named: str, tokenizer: Path
) -> "tuple[int, list[Tensor]]":
    """Give `model` a row for each of `pieces` (id, old ids), in place, as `extend` says.

    Returns the rows that it had, and its tables: the input embedding and, untied, the head. Raises UserError for a
    model, called `named`, that has fewer rows than the base of `tokenizer` has ids.
    """
    import torch

    rows = int(table_of(model.get_input_embeddings()).shape[0])
    if rows < base_vocab:
        raise UserError(
            f"{named} has {rows:,} embeddings, the base of {tokenizer} {base_vocab:,} ids: extend the tokenizer that "
            "this checkpoint was trained with"
        )
    total = base_vocab + len(pieces)
    if total > rows:  # else the new ids fit into rows that the model was padded with
        model.resize_token_embeddings(total, mean_resizing=False)
    tables, head = [table_of(model.get_input_embeddings())], model.get_output_embeddings()
    if head is not None and table_of(head) is not tables[0]:
        tables.append(table_of(head))
    with torch.no_grad():
        for table in tables:
            means = [table[old].float().mean(0) for _, old in pieces]
            for (new, _), mean in zip(pieces, means, strict=True):
                table[new] = mean.to(table.dtype)
    return rows, tables


def table_of(module: Any) -> "Tensor":
    """The (ids, width) weight of an embedding or a head."""
    weight: Tensor = module.weight
    return weight


def read_listing(tokenizer: Path) -> tuple[int, list[tuple[int, list[int]]]]:
    """The size of the base vocabulary, and (id, old ids) of each new piece. Raises UserError if it is not whole."""
    path = tokenizer / LISTING
    try:
        listing = json.loads(path.read_bytes())
        base_vocab, pieces = int(listing["base_vocab"]), [(int(i), list(old)) for i, _, old in listing["pieces"]]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: make an extended tokenizer with `python -m data extend`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}): make it again with `python -m data extend`") from None
    ids = [i for i, _ in pieces]
    if not ids or ids != list(range(base_vocab, base_vocab + len(ids))):
        raise UserError(f"{path}: the new ids do not follow the base's {base_vocab:,}: make it again")
    for i, old in pieces:
        if not old or not all(isinstance(k, int) and 0 <= k < base_vocab for k in old):
            raise UserError(f"{path}: piece {i} has old ids {old}, not some of 0 to {base_vocab - 1}: make it again")
    return base_vocab, pieces


def check_vocabulary(checkpoint: Path, tokenizer: Path, base_vocab: int) -> None:
    """Raise UserError unless the checkpoint's own tokenizer is what `tokenizer` extends, id for id."""
    from tokenizers import Tokenizer

    known = []
    for folder in (checkpoint, tokenizer):
        try:
            backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{folder / 'tokenizer.json'} cannot be read ({error}): restore it") from None
        known.append({i: piece for piece, i in backend.get_vocab(with_added_tokens=True).items()})
    theirs, ours = known
    if len(theirs) != base_vocab and max(theirs, default=-1) >= base_vocab:
        raise UserError(
            f"checkpoint {checkpoint} has ids up to {max(theirs)}, {tokenizer} puts new pieces from {base_vocab}: "
            "extend the tokenizer of this checkpoint"
        )
    for i, piece in sorted(theirs.items()):
        if ours.get(i) != piece:
            raise UserError(
                f"id {i} is {piece!r} in checkpoint {checkpoint} and {ours.get(i)!r} in {tokenizer}: extend the "
                "tokenizer of this checkpoint"
            )


if __name__ == "__main__":
    console.door(main)
