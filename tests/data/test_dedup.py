"""Near-duplicates: our signatures and our check through datatrove's own stages and executor."""

import functools
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import console
from data import dedup, duplicates
from data.dedup import Dedup

Index = Callable[[np.ndarray, np.ndarray], float]
KANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん"


def passage(seed: int, length: int = 600) -> str:
    """Text without repeats to speak of: any two seeds share almost no 5-gram."""
    return "".join(random.Random(seed).choices(KANA, k=length))


def with_tail(text: str, share: float, seed: int) -> str:
    """`text` with its last `share` written anew: a Jaccard index of about (1 - share) / (1 + share)."""
    keep = round(len(text) * (1 - share))
    return text[:keep] + passage(seed, len(text) - keep)


def signed(text: str, config: Dedup) -> np.ndarray:
    found = dedup.signature(text, config)
    assert found is not None
    return found


def exact(a: str, b: str) -> float:
    grams = [{text[i : i + 5] for i in range(len(text) - 4)} for text in map(dedup.shingle_text, (a, b))]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def annotate(work: Path, files: list[list[str]], config: Dedup) -> None:
    """What the crawl's first stage leaves behind: texts and signatures by file, in small row groups."""
    (work / "annotations").mkdir(parents=True, exist_ok=True)
    for rank, texts in enumerate(files):
        signatures = [dedup.signature(text, config) for text in texts]
        table = pa.table(
            {
                "text": pa.array(texts, pa.string()),
                "signature": pa.array(
                    [None if s is None else s.tobytes() for s in signatures], pa.binary(4 * config.bands * config.rows)
                ),
            }
        )
        pq.write_table(table, work / f"annotations/{rank:05d}.parquet", row_group_size=3)
        rows = np.array([row for row, s in enumerate(signatures) if s is not None], np.int64)
        kept = np.array([s for s in signatures if s is not None], np.uint32)
        dedup.write_signatures(work / "signatures", rank, kept, rows, config)


def removed(folder: Path | str, rank: int) -> np.ndarray:
    """Rows of file `rank` that `cluster_step` wants removed: sorted uint32, empty if there are none."""
    path = Path(folder) / f"{rank:06d}.remove"
    return np.fromfile(path, "<u4") if path.is_file() else np.zeros(0, np.uint32)


def deduplicate(texts: Sequence[str], config: Dedup) -> list[int | None]:
    """For each text the index of the earlier text that it duplicates, None if it is kept: all stages in memory."""
    duplicate_of: list[int | None] = [None] * len(texts)
    signed = [(i, sketch) for i, text in enumerate(texts) if (sketch := dedup.signature(text, config)) is not None]
    if not signed:
        return duplicate_of
    sketches = np.array([sketch for _, sketch in signed])
    bands = (sketches[:, i : i + config.rows] for i in range(0, sketches.shape[1], config.rows))
    documents, roots = duplicates.clusters(equal_neighbours(band) for band in bands)
    at = [int(document) for document in documents]

    def grams(i: int) -> np.ndarray:
        return np.unique(dedup.shingles(texts[signed[at[i]][0]], config.ngram))

    for kept, dropped, _ in duplicates.settle_all(roots, lambda i: sketches[at[i]], grams, config.jaccard):
        duplicate_of[signed[at[dropped]][0]] = signed[at[kept]][0]
    return duplicate_of


def equal_neighbours(band: np.ndarray) -> np.ndarray:
    """Pairs (n, 2) uint64 of consecutive equal rows of `band` once sorted: what datatrove writes for a bucket."""
    order = np.lexsort(band.T[::-1])
    same = (band[order[1:]] == band[order[:-1]]).all(1)
    return np.column_stack([order[:-1][same], order[1:][same]]).astype(np.uint64)


def run_stages(work: Path, config: Dedup, workers: int = 1, verify_tasks: int = 3) -> None:
    """datatrove's executor over buckets, our check and clusters."""
    from datatrove.executor import LocalPipelineExecutor

    check = functools.partial(
        dedup.verify,
        buckets_folder=work / "buckets",
        texts=work / "annotations",
        signatures=work / "annotations",
        verified_folder=work / "verified",
        config=config,
    )
    join = functools.partial(
        dedup.buckets, signatures_folder=work / "signatures", buckets_folder=work / "buckets", config=config
    )
    stages = [
        ("buckets", join, min(3, config.bands)),
        ("verify", check, verify_tasks),
        ("cluster", dedup.cluster_step(config, work / "verified", work / "removed"), 1),
    ]
    for name, step, tasks in stages:
        workers_here = min(workers, tasks)
        LocalPipelineExecutor([step], tasks=tasks, workers=workers_here, logging_dir=str(work / f"logs/{name}")).run()


def results(work: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(work)): path.read_bytes()
        for folder in ("verified", "removed")
        for path in sorted((work / folder).iterdir())
    }


SMALL = Dedup(bands=8, rows=4, jaccard=0.75)
ORIGINALS = [passage(seed) for seed in range(4)]
FILES = [
    [ORIGINALS[0], "短い", ORIGINALS[1], passage(10)],
    [passage(11), with_tail(ORIGINALS[1], 0.05, 20), ORIGINALS[0] + "。", ORIGINALS[2], ORIGINALS[2]],
    ["短い", passage(12), " ".join(ORIGINALS[2]), ORIGINALS[3], with_tail(ORIGINALS[0], 0.5, 21)],
]
DROPPED = {0: [], 1: [1, 2, 4], 2: [2]}


@pytest.fixture(autouse=True)
def quiet() -> None:
    import datatrove.executor  # noqa: F401 - it sets up its own log when first imported
    from loguru import logger

    logger.disable("datatrove")


def test_copies_across_files_are_dropped_and_their_first_is_kept(tmp_path: Path) -> None:
    annotate(tmp_path, FILES, SMALL)
    run_stages(tmp_path, SMALL)
    assert {rank: removed(tmp_path / "removed", rank).tolist() for rank in range(3)} == DROPPED
    found = {dropped: (kept, index) for kept, dropped, index in dedup.pairs(tmp_path / "verified")}
    assert {dropped: kept for dropped, (kept, _) in found.items()} == {
        (1, 1): (0, 2),
        (1, 2): (0, 0),
        (1, 4): (1, 3),
        (2, 2): (1, 3),
    }
    for (file, row), ((kept_file, kept_row), index) in found.items():
        assert index == pytest.approx(exact(FILES[kept_file][kept_row], FILES[file][row]), abs=1e-12)


def test_workers_and_tasks_do_not_change_the_result(tmp_path: Path) -> None:
    for work, workers, tasks in ((tmp_path / "one", 1, 1), (tmp_path / "two", 2, 5)):
        annotate(work, FILES, SMALL)
        run_stages(work, SMALL, workers, tasks)
    one, two = tmp_path / "one", tmp_path / "two"
    assert sorted(dedup.pairs(one / "verified")) == sorted(dedup.pairs(two / "verified"))
    assert [path.name for path in sorted((one / "removed").iterdir())]
    for path in (one / "removed").iterdir():
        assert path.read_bytes() == (two / "removed" / path.name).read_bytes()


def test_a_task_killed_half_way_leaves_nothing_and_gives_the_same_bytes_when_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotate(tmp_path / "whole", FILES, SMALL)
    run_stages(tmp_path / "whole", SMALL)
    annotate(tmp_path / "cut", FILES, SMALL)
    checked = []

    def killed(a: np.ndarray, b: np.ndarray, index: Index = duplicates.jaccard) -> float:
        checked.append(1)
        if len(checked) == 2:
            raise KeyboardInterrupt
        return index(a, b)

    with monkeypatch.context() as patched:
        patched.setattr(duplicates, "jaccard", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stages(tmp_path / "cut", SMALL, verify_tasks=1)
    assert list((tmp_path / "cut/verified").iterdir()) == []
    run_stages(tmp_path / "cut", SMALL)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_a_chain_drops_its_middle_only() -> None:
    a = passage(0)
    b, c = a[60:] + passage(1, 60), a[120:] + passage(1, 60) + passage(2, 60)
    assert exact(a, b) > 0.75 and exact(b, c) > 0.75 and exact(a, c) < 0.75
    config = Dedup(bands=16, rows=4)
    assert deduplicate([a, b, c], config) == [None, 0, None]
    assert deduplicate([b, a, c], config) == [None, 0, 0]


def test_every_dropped_text_has_a_kept_twin_and_no_two_kept_texts_are_twins() -> None:
    edits = random.Random(0)
    texts = [with_tail(passage(edits.randrange(5)), edits.choice([0, 0.05, 0.1, 0.2, 0.3]), i) for i in range(60)]
    found = deduplicate(texts, Dedup(bands=24, rows=4))
    for i, of in enumerate(found):
        assert of is None or (of < i and found[of] is None and exact(texts[of], texts[i]) >= 0.75)
    kept = [text for text, of in zip(texts, found, strict=True) if of is None]
    assert all(exact(a, b) < 0.75 for i, a in enumerate(kept) for b in kept[:i])
    assert 5 < len(kept) < 50


def test_white_space_is_no_difference_but_a_digit_is() -> None:
    text = passage(0)
    spaced = "\n　".join(text[i : i + 40] for i in range(0, len(text), 40))
    assert np.array_equal(signed(text, Dedup()), signed(spaced, Dedup()))
    assert deduplicate([text, spaced], Dedup(jaccard=1.0)) == [None, 0]
    assert deduplicate(["表の値は11234です", "表の値は11235です"], Dedup(jaccard=1.0)) == [None, None]


def test_signatures_are_the_same_on_every_machine() -> None:
    # Written down once: another machine, another rensa or another numpy must not change what a corpus was filtered by.
    short = signed("吾輩は猫である。名前はまだ無い。", Dedup(bands=2, rows=3))
    assert short.dtype == np.uint32 and short.tolist() == [
        1338201209,
        91295371,
        114933646,
        23850508,
        1320916338,
        79055775,
    ]
    assert int(signed(passage(0, 5000), Dedup()).astype(np.uint64).sum()) == 3476181212


def test_signatures_estimate_the_jaccard_index() -> None:
    for share in (0.02, 0.1, 0.3):
        a, b = passage(1, 3000), with_tail(passage(1, 3000), share, 2)
        estimate = np.mean(signed(a, Dedup(50, 20)) == signed(b, Dedup(50, 20)))
        assert estimate == pytest.approx(exact(a, b), abs=0.06)


def test_texts_shorter_than_one_ngram_have_no_signature_and_stay() -> None:
    assert dedup.signature("四 文字 だ", Dedup()) is None
    assert dedup.signature("", Dedup()) is None
    assert deduplicate(["短い", "短い", ""], Dedup()) == [None, None, None]
    assert deduplicate(["五文字です", "五文字です"], Dedup()) == [None, 0]
    assert deduplicate([], Dedup()) == []


@pytest.mark.parametrize("files", [[["短い", ""], []], [[passage(0), passage(0)]]], ids=["no signatures", "one file"])
def test_stages_on_next_to_nothing(tmp_path: Path, files: list[list[str]]) -> None:
    config = Dedup(bands=2, rows=2)
    annotate(tmp_path, files, config)
    run_stages(tmp_path, config)
    copies = len(files[0]) if len(files) == 1 else 0
    assert removed(tmp_path / "removed", 0).tolist() == ([1] if copies else [])
    assert len(list(dedup.pairs(tmp_path / "verified"))) == (1 if copies else 0)


def test_lone_surrogates_do_not_break_anything() -> None:
    text = passage(0) + "\ud83d"
    assert deduplicate([text, text], SMALL) == [None, 0]


def test_boilerplate_pages_cost_a_bounded_number_of_exact_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    # 300 pages that share 60 % of their text: no two are duplicates, every pair is a candidate.
    texts = [with_tail(passage(0, 300), 0.22, seed) for seed in range(1, 301)]
    checks: list[int] = []

    def counted(a: np.ndarray, b: np.ndarray, index: Index = duplicates.jaccard) -> float:
        checks.append(1)
        return index(a, b)

    monkeypatch.setattr(duplicates, "jaccard", counted)
    monkeypatch.setattr(duplicates, "EXACT_CHECKS", 4)
    assert deduplicate([*texts, texts[7]], Dedup())[-1] == 7
    assert 300 < len(checks) <= 4 * 301


def test_shingles_are_held_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "CACHE_BYTES", 100)
    made: list[int] = []

    def make(i: int) -> np.ndarray:
        made.append(i)
        return np.zeros(5)

    get = duplicates.lately_used(make)
    for i in (1, 2, 1, 3, 1, 2):
        get(i)
    assert made == [1, 2, 3, 2]


def test_annotations_of_another_profile_are_refused_in_one_line(tmp_path: Path) -> None:
    annotate(tmp_path, FILES, SMALL)
    run_stages(tmp_path, SMALL)
    with pytest.raises(console.UserError, match="annotate again"):
        dedup.verify(
            None,
            0,
            1,
            buckets_folder=tmp_path / "buckets",
            texts=tmp_path / "annotations",
            signatures=tmp_path / "annotations",
            verified_folder=tmp_path / "again",
            config=Dedup(14, 8),
        )


@pytest.mark.parametrize("wrong", [{"bands": 0}, {"rows": 0}, {"ngram": 0}, {"jaccard": 1.5}])
def test_impossible_settings_are_the_users_mistake(wrong: dict[str, Any]) -> None:
    with pytest.raises(console.UserError, match=next(iter(wrong))):
        Dedup(**wrong)


def test_difference_shows_what_changed_and_stays_short() -> None:
    a = "".join(f"これは{i}番目の文です。" for i in range(50))
    b = a.replace("これは30番目の文です。", "これは三十番目の文です。").replace("これは40番目の文です。", "")
    shown = duplicates.difference(a, b).split("\n")
    assert shown == [
        "…",
        "- これは30番目の文です。",
        "+ これは三十番目の文です。",
        "…",
        "- これは40番目の文です。",
        "…",
    ]
    assert duplicates.difference(a, a) == "…"
    assert duplicates.difference("", "新しい文。") == "+ 新しい文。"


def test_difference_of_megabytes_is_bounded() -> None:
    a, b = passage(0, 1_000_000), "".join(f"{passage(seed, 30)}。" for seed in range(30_000))
    calls = [0]

    def count(_frame: FrameType | None, event: str, _arg: object) -> None:
        calls[0] += event == "call"

    sys.setprofile(count)
    try:
        shown = duplicates.difference(a, b, limit=500)
    finally:
        sys.setprofile(None)
    assert 0 < len(shown) <= 500
    assert calls[0] < 200_000
