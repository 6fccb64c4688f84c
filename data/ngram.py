"""The baseline to beat: an interpolated modified Kneser–Ney n-gram over the same tokens, vectorised in numpy."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import console
from data import shards
from data.shards import BOS

FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])  # discounts where the counts-of-counts give none (as KenLM's fallback)
CHUNK = 1_000_000  # tokens scored at a time


@dataclass(frozen=True)
class NgramConfig:
    """Score a Kneser–Ney n-gram on the validation split of a shards folder: what a model should beat."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Shards folder made by `python -m data build`."""
    order: int = 5
    """Longest n-gram in tokens (1 to 10)."""
    train_tokens: int = 5_000_000
    """Training tokens counted, from the start of the train shards."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(frozen=True)
class Model:
    """Order n (from 1) is at index n - 1; its n-grams are numbered by their place in `keys`.

    keys: sorted int64, number of the (n-1)-gram before the last token * vocab + last token (order 1: the token ids).
    mass: float64, each n-gram's adjusted count after discount. total, gamma: float64, for each (n-1)-gram as context,
    the sum of its adjusted counts (0: never continued) and the mass that its discounts leave to the lower order.
    """

    vocab: int
    keys: list[np.ndarray]
    mass: list[np.ndarray]
    total: list[np.ndarray]
    gamma: list[np.ndarray]


def fit(tokens: np.ndarray, order: int, vocab: int) -> Model:
    """Interpolated modified Kneser–Ney (Chen & Goodman 1998, section 3 and equations 24-27) of `tokens`.

    tokens: (n,) ids, documents one after another, each begun by `<s>`, which is a context but never predicted.
    n-grams do not cross documents. Below the highest order, and except for n-grams that begin with `<s>`, an
    n-gram's adjusted count is the number of different tokens before it.
    """
    tokens = np.asarray(tokens, np.int64)
    place = places(tokens)
    ids, keys, raw = tokens, [np.arange(vocab)], np.bincount(tokens, minlength=vocab)
    mass, total, gamma = [], [], []
    for n in range(1, order + 1):
        whole = np.flatnonzero(place >= n - 1)
        begins = np.zeros(len(keys[-1]), bool)
        begins[ids[place == n - 1]] = True
        adjusted = raw
        if n < order:
            # Where the (n+1)-grams end, and from one occurrence of each: the n-gram it ends in.
            longer = whole[place[whole] >= n]
            found, first, number, longer_raw = unique(ids[longer - 1] * vocab + tokens[longer])
            adjusted = np.where(begins, raw, np.bincount(ids[longer[first]], minlength=len(raw)))
        if n == 1:
            adjusted = adjusted.copy()
            adjusted[BOS] = 0
        context = keys[-1] // vocab if n > 1 else np.zeros(vocab, np.int64)
        contexts = len(keys[-2]) if n > 1 else 1
        cut = discounts(adjusted)[np.minimum(adjusted, 3)]
        mass.append(adjusted - cut)
        total.append(np.bincount(context, adjusted, contexts))
        gamma.append(np.bincount(context, cut, contexts) / np.maximum(total[-1], 1))
        if n < order:
            keys.append(found)
            raw = longer_raw
            ids = np.full(len(tokens), -1, np.int64)
            ids[longer] = number
    return Model(vocab, keys, mass, total, gamma)


def discounts(adjusted: np.ndarray) -> np.ndarray:
    """[0, D1, D2, D3+] of one order from how many n-grams have adjusted count 1, 2, 3 and 4."""
    n1, n2, n3, n4 = (float(np.count_nonzero(adjusted == k)) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return FALLBACK
    y = n1 / (n1 + 2 * n2)
    found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # On odd counts the estimate leaves [0, count]: a probability could turn negative.
    return found if np.all((found[1:] > 0) & (found[1:] <= [1, 2, 3])) else FALLBACK


def unique(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """np.unique with a representative index, inverse and counts, by the faster unstable sort."""
    order = np.argsort(keys)
    ranked = keys[order]
    edge = np.ones(len(keys), bool)
    edge[1:] = ranked[1:] != ranked[:-1]
    at = np.flatnonzero(edge)
    inverse = np.empty(len(keys), np.int64)
    inverse[order] = np.cumsum(edge) - 1
    return ranked[at], order[at], inverse, np.diff(at, append=len(keys))


def places(tokens: np.ndarray) -> np.ndarray:
    """(n,) how many tokens after its document's `<s>` each token stands."""
    index = np.arange(len(tokens))
    return index - np.maximum.accumulate(np.where(tokens == BOS, index, 0))


def probabilities(model: Model, tokens: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(n,) p(token | the up to order-1 tokens before it, `place` of which are in its document)."""
    tokens = np.asarray(tokens, np.int64)
    p = model.mass[0][tokens] / max(model.total[0][0], 1) + model.gamma[0][0] / model.vocab
    if not model.total[0][0]:
        p = np.full(len(tokens), 1 / model.vocab)
    ids = tokens
    for n in range(2, len(model.keys) + 1):
        keys, mass, total, gamma = (part[n - 1] for part in (model.keys, model.mass, model.total, model.gamma))
        if not len(keys):
            break
        context = np.where(place >= n - 1, np.roll(ids, 1), -1)
        known = np.flatnonzero((context >= 0) & (total[context] > 0))
        context = context[known]
        wanted = context * model.vocab + tokens[known]
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        found = keys[at] == wanted
        p[known] = np.where(found, mass[at], 0) / total[context] + gamma[context] * p[known]
        ids = np.full(len(tokens), -1, np.int64)
        ids[known[found]] = at[found]
    return p


def bits(model: Model, split: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, int]:
    """The sum of -log2 p over every token of `split` but `<s>`, and how many tokens that is."""
    total, count = 0.0, 0
    for tokens in chunks(split):
        place = places(tokens)
        total -= float(np.log2(probabilities(model, tokens, place)[place > 0]).sum())
        count += int(np.count_nonzero(place))
    return total, count


def chunks(split: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """The tokens of `split` in whole documents, about CHUNK at a time."""
    for tokens, starts in split:
        begin = 0
        while begin < len(starts) - 1:
            end = int(np.searchsorted(starts, starts[begin] + CHUNK, side="right")) - 1
            end = max(end, begin + 1)
            yield np.asarray(tokens[starts[begin] : starts[end]])
            begin = end


def baseline(folder: Path, manifest: dict[str, Any], order: int, train_tokens: int) -> dict[str, Any]:
    """Fit on the first `train_tokens` tokens of "train", score all of "val": the manifest's `baseline` entry.

    val_bpb: bits for every piece and `</s>` (not `<s>`) per UTF-8 byte of the validation text.
    """
    parts, left = [], train_tokens
    for tokens, _ in shards.open_split(folder, manifest, "train"):
        parts.append(np.asarray(tokens[:left]))
        left -= len(parts[-1])
        if left <= 0:
            break
    train = np.concatenate(parts)
    model = fit(train, order, manifest["vocab_size"])
    spent, val_tokens = bits(model, shards.open_split(folder, manifest, "val"))
    return {
        "name": f"kneser_ney_{order}gram",
        "order": order,
        "val_bpb": spent / manifest["splits"]["val"]["bytes"],
        "train_tokens": len(train),
        "val_tokens": val_tokens,
    }


def main(argv: list[str]) -> int | None:
    """`python -m data ngram DIR`."""
    config = console.parse(NgramConfig, argv, "python -m data ngram")
    if not 1 <= config.order <= 10:
        raise console.UserError(f"--order {config.order}: choose 1 to 10")
    if config.train_tokens < 1:
        raise console.UserError(f"--train_tokens {config.train_tokens}: at least 1")
    manifest, begun = shards.load(config.folder), time.perf_counter()
    if shards.document_ids(manifest) != (BOS, shards.EOS):
        raise console.UserError(f"{config.folder}: built with a model's own tokenizer, for which there is no baseline")
    result = baseline(config.folder, manifest, config.order, config.train_tokens)
    result |= {"seconds": round(time.perf_counter() - begun, 2), "folder": str(asdict(config)["folder"])}
    console.print_result(result, config.json)
    return 0
