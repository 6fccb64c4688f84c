"""The loader: an order that is a pure function of seed and step, over windows that ignore shard boundaries."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.loader import TokenStream, permuted
from data.shards import BOS, starts_name


def opened(folder: Path, seq_len: int) -> TokenStream:
    """The shards in `folder` through the manifest's entries that the loader reads."""
    files = [{"file": path.name} for path in sorted(folder.glob("*.tokens.npy"))]
    return TokenStream(folder, {"splits": {"train": {"shards": files}}}, "train", seq_len)


def stream(folder: Path, lengths: list[int], seq_len: int, dtype: Any = np.uint16) -> tuple[TokenStream, np.ndarray]:
    """Shards of these lengths with a `<s>` about every tenth token, and their concatenation."""
    rng = np.random.default_rng(sum(lengths))
    arrays = [rng.integers(2, 50_000, length).astype(dtype) for length in lengths]
    folder = folder / "-".join(map(str, lengths))
    folder.mkdir(exist_ok=True)
    for number, array in enumerate(arrays):
        array[rng.random(len(array)) < 0.1] = BOS
        np.save(folder / f"train-{number:05d}.tokens.npy", array)
        np.save(folder / starts_name(f"train-{number:05d}.tokens.npy"), np.flatnonzero(array == BOS))
    return opened(folder, seq_len), np.concatenate(arrays).astype(np.int64)


def test_permuted_is_a_bijection_whatever_n() -> None:
    """All small n, those around powers of two and four, and some large ones."""
    sizes = [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 65_537, 100_003]
    for n in sizes:
        order = permuted(np.arange(n), n, key=[3, 0])
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(n)), n


def test_permuted_handles_an_n_that_no_memory_holds() -> None:
    """O(1) memory: positions of a trillion windows, each drawn alone as in a batch."""
    n = 10**12 + 39
    some = np.arange(n - 500, n)
    order = permuted(some, n, key=[0, 0])
    assert len(set(order.tolist())) == 500 and order.min() >= 0 and order.max() < n
    assert np.array_equal(np.concatenate([permuted(some[i : i + 1], n, key=[0, 0]) for i in range(500)]), order)


def test_permuted_looks_random_and_each_key_orders_differently() -> None:
    """Neighbours land far apart (a third of n on average) and no two keys agree in more places than chance."""
    n = 5000
    orders = [permuted(np.arange(n), n, key=[seed, epoch]) for seed in range(4) for epoch in range(4)]
    for i, order in enumerate(orders):
        assert abs(np.abs(np.diff(order)).mean() / (n / 3) - 1) < 0.1
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.06
        for other in orders[:i]:
            assert (order == other).sum() < 12


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_windows_cross_shards_as_if_there_were_one(tmp_path: Path, dtype: Any) -> None:
    """Every slice of a stream of seven shards, one of a single token and one empty, equals the concatenation's."""
    tokens, whole = stream(tmp_path, [5, 1, 40, 0, 3, 17, 9], 4, dtype)
    assert tokens.n_tokens == len(whole) == 75
    for start in range(75):
        for stop in range(start + 1, 76):
            assert np.array_equal(tokens.slice(start, stop), whole[start:stop]), (start, stop)


@pytest.mark.parametrize("n_tokens", [64, 65, 66, 129, 130])
def test_windows_cover_what_fits_and_bos_is_never_a_target(tmp_path: Path, n_tokens: int) -> None:
    """Inputs are the text, targets the text one later; together the windows predict each token at most once."""
    tokens, whole = stream(tmp_path, [30, n_tokens - 30], 16)
    assert tokens.n_windows == (n_tokens - 1) // 16
    ids, targets = (tensor.numpy() for tensor in tokens.windows(np.arange(tokens.n_windows)))
    end = tokens.n_windows * 16
    assert np.array_equal(ids.ravel(), whole[:end])
    following = whole[1 : end + 1]
    assert (following == BOS).any()
    assert np.array_equal(targets.ravel(), np.where(following == BOS, -1, following))


def test_every_window_comes_once_an_epoch_and_each_epoch_in_another_order(tmp_path: Path) -> None:
    """With a batch size that does not divide the epoch, so that batches reach over its end."""
    tokens, _ = stream(tmp_path, [700, 301], 16)
    n = tokens.n_windows
    served = np.concatenate([tokens.batch_indices(step, 7, seed=2) for step in range(3 * n // 7 + 1)])
    epochs = [served[i * n : (i + 1) * n] for i in range(3)]
    assert n == 62
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(n))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    """Another process that asks for step 5 first gets what the one that began at 0 got; another seed another."""
    tokens, whole = stream(tmp_path, [500, 500], 16)
    served = {step: tokens.batch(step, 4, seed=9) for step in range(12)}
    fresh = opened(tmp_path / "500-500", 16)
    for step in (5, 0, 11):
        for ours, theirs in zip(fresh.batch(step, 4, seed=9), served[step], strict=True):
            assert ours.equal(theirs)
    assert not fresh.batch(5, 4, seed=10)[0].equal(served[5][0])
    rows = {tuple(whole[i * 16 : (i + 1) * 16]) for i in range(fresh.n_windows)}
    assert {tuple(row) for row in served[3][0].tolist()} <= rows


def test_a_batch_larger_than_the_corpus_still_fills(tmp_path: Path) -> None:
    tokens, _ = stream(tmp_path, [40], 16)
    assert tokens.n_windows == 2
    assert sorted(tokens.batch_indices(0, 6, seed=0).tolist()) == [0, 0, 0, 1, 1, 1]
