"""The Kneser–Ney baseline: a proper distribution, and the numbers of a textbook implementation."""

import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from data import ngram

VOCAB, ORDER = 12, 4


def distribution(model: ngram.Model, context: list[int]) -> np.ndarray:
    """(vocab,) p(every token | `context`), a context that need not begin with `<s>`."""
    rows = np.empty((model.vocab, len(context) + 1), np.int64)
    rows[:, :-1], rows[:, -1] = context, np.arange(model.vocab)
    place = np.tile(np.arange(len(context) + 1), model.vocab)
    return ngram.probabilities(model, rows.ravel(), place).reshape(rows.shape)[:, -1]


def corpus(documents: int, seed: int) -> list[list[int]]:
    """Documents of `<s> words </s>` with a skewed vocabulary; the last word never occurs."""
    rng = random.Random(seed)
    words = [3, 4, 5, 6, 7, 8, 9, 10]
    made = []
    for _ in range(documents):
        row = [1]
        for _ in range(rng.randint(0, 9)):
            row.append(min(words[int(rng.paretovariate(1.1)) % 8], row[-1] + rng.randint(1, 4) if row[-1] > 2 else 10))
        made.append([*row, 2])
    return made


class Textbook:
    """Interpolated modified Kneser–Ney written from Chen & Goodman (1998) with dictionaries, one word at a time."""

    def __init__(self, documents: list[list[int]], order: int, vocab: int) -> None:
        self.vocab, self.counts, self.cut = vocab, [], []
        for n in range(1, order + 1):
            raw = Counter(tuple(d[i : i + n]) for d in documents for i in range(len(d) - n + 1))
            longer = {tuple(d[i : i + n + 1]) for d in documents for i in range(len(d) - n)}
            before = Counter(gram[1:] for gram in longer)
            use = {g: c if n == order or g[0] == 1 else before[g] for g, c in raw.items() if g[-1] != 1}
            tally = Counter(use.values())
            n1, n2, n3, n4 = (tally[k] for k in (1, 2, 3, 4))
            cut = [0.5, 1.0, 1.5]
            if n1 * n2 * n3 * n4:
                y = n1 / (n1 + 2 * n2)
                found = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
                if all(0 < d <= k for k, d in enumerate(found, 1)):
                    cut = found
            grouped: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
            for gram, count in use.items():
                grouped[gram[:-1]][gram[-1]] = count
            self.counts.append(grouped)
            self.cut.append(cut)

    def p(self, word: int, context: tuple[int, ...]) -> float:
        context = context[max(0, len(context) - len(self.counts) + 1) :]
        lower = self.p(word, context[1:]) if context else 1 / self.vocab
        seen = self.counts[len(context)].get(context)
        if not seen:
            return lower
        d = self.cut[len(context)]
        total = sum(seen.values())
        left = sum(d[min(c, 3) - 1] for c in seen.values()) / total
        count = seen.get(word, 0)
        return (count - d[min(count, 3) - 1] if count else 0) / total + left * lower


@pytest.fixture(scope="module", params=[6, 300])
def pair(request: pytest.FixtureRequest) -> tuple[ngram.Model, Textbook]:
    """The same corpus in both: six documents (discounts fall back), and three hundred (they are estimated)."""
    documents = corpus(request.param, 1)
    return ngram.fit(np.concatenate(documents), ORDER, VOCAB), Textbook(documents, ORDER, VOCAB)


def test_equals_the_textbook_on_unseen_documents(pair: tuple[ngram.Model, Textbook]) -> None:
    model, textbook = pair
    documents = [*corpus(40, 2), [1, 11, 2], [1, 2]]
    tokens = np.concatenate(documents)
    place = ngram.places(tokens)
    ours = ngram.probabilities(model, tokens, place)[place > 0]
    theirs = [textbook.p(d[i], tuple(d[:i])) for d in documents for i in range(1, len(d))]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    starts = np.cumsum([0, *map(len, documents)])
    spent, count = ngram.bits(model, [(tokens, starts)])
    assert count == len(theirs)
    assert spent == pytest.approx(-sum(map(math.log2, theirs)))


def test_every_context_sums_to_one(pair: tuple[ngram.Model, Textbook]) -> None:
    """Seen, unseen, too long, with a word that never occurs, and none at all."""
    for context in ([1], [1, 3], [3, 4, 5], [11], [11, 3], [3, 11], [9, 9, 9, 9, 9, 9], [2], []):
        row = distribution(pair[0], context)
        assert row.min() > 0
        assert row.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(row, [pair[1].p(w, tuple(context)) for w in range(VOCAB)], rtol=1e-12)


def test_chunked_scoring_is_the_same(pair: tuple[ngram.Model, Textbook], monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents longer than a chunk are scored whole."""
    documents = corpus(30, 5)
    split = [(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))]
    whole = ngram.bits(pair[0], split)
    monkeypatch.setattr(ngram, "CHUNK", 7)
    spent, count = ngram.bits(pair[0], split)
    assert spent == pytest.approx(whole[0])
    assert count == whole[1]


def test_a_higher_order_is_no_worse_on_a_cycle() -> None:
    """A text that only a trigram can predict: what comes after "5" depends on what came before it."""
    documents = [[1, *([3, 5, 4, 5] * 20), 2] for _ in range(5)]
    tokens = np.concatenate(documents)
    split = [(tokens, np.cumsum([0, *map(len, documents)]))]
    bits = [ngram.bits(ngram.fit(tokens, order, VOCAB), split)[0] for order in (1, 2, 3)]
    assert bits[2] < 0.6 * bits[1] < 0.6 * bits[0]
