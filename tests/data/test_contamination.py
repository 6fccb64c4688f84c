"""Contamination: copies of evaluation items are found however they are laid out, and nothing else is."""

import gzip
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import console
from data import contamination, overlap, shards, sources
from data.overlap import Index, Rules

CHARACTERS = "".join(map(chr, [*range(0x3042, 0x3094), *range(0x30A2, 0x30F4), *range(0x4E00, 0x4F80)]))


def prose(length: int, seed: int) -> str:
    """Text that no other seed gives: characters at random with a mark now and then."""
    rng = random.Random(seed)
    text = "".join(rng.choice(CHARACTERS) + ("、" if rng.random() < 0.08 else "") for _ in range(length))
    return text + "。"


def index(*texts: str, **rules: Any) -> Index:
    return Index(Rules(**rules), [("set", f"i{number}", "text", text) for number, text in enumerate(texts)])


def inside(text: str, seed: int = 900) -> str:
    """`text` between two stretches of something else."""
    return prose(700, seed) + "\n" + text + "\n" + prose(700, seed + 1)


def changed(text: str, share: float) -> str:
    rng = random.Random(5)
    return "".join(rng.choice(CHARACTERS) if rng.random() < share else c for c in text)


def full_width(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


ITEM = prose(150, 1) + "Python 3.11 では x=42 です。" + prose(150, 2)
PLANTINGS: dict[str, Callable[[str], str]] = {
    "verbatim": lambda text: text,
    "reflowed": lambda text: "\n  ".join(text[i : i + 25] for i in range(0, len(text), 25)),
    "full width": full_width,
    "upper case": str.upper,
    "other marks": lambda text: text.translate(str.maketrans("、。", "，．")),
    "no marks": lambda text: text.replace("、", "").replace("。", ""),
    "5% changed": lambda text: changed(text, 0.05),
    "10% changed": lambda text: changed(text, 0.10),
    "half of it": lambda text: text[: len(text) // 2],
}


@pytest.mark.parametrize("kind", PLANTINGS)
def test_a_planted_item_is_found_and_no_other(kind: str) -> None:
    others = [prose(300, seed) for seed in range(10, 30)]
    made = index(*others, ITEM)
    found = made.hits("d", inside(PLANTINGS[kind](ITEM)))
    assert [(hit.item, hit.set, hit.document) for hit in found] == [("i20", "set", "d")]
    assert made.hits("d", inside("")) == []


def test_what_a_hit_says() -> None:
    piece = ITEM[40:110]
    hit = index(ITEM).hits("page", inside(f"引用ここから「{piece}」まで"))[0]
    assert hit.by == "run" and hit.key == "text"
    assert hit.run == len(overlap.folded(piece))
    grams = len(overlap.folded(ITEM)) - 12
    assert hit.overlap == round((hit.run - 12) / grams, 4)
    assert piece in hit.excerpt_document and piece in hit.excerpt_item
    assert len(hit.excerpt_document) < 200
    whole = index(ITEM).hits("page", ITEM)[0]
    assert (whole.by, whole.overlap, whole.jaccard) == ("overlap", 1.0, 1.0)
    assert whole.run == len(overlap.folded(ITEM))


def test_the_run_is_a_piece_of_the_item_not_a_chain_of_its_parts() -> None:
    # The two parts share twelve characters, so that all grams of the document are the item's; the document is not.
    seam = prose(30, 3)[:12].replace("、", "あ")
    one, two, three, four = (prose(60, seed).replace("、", "い").replace("。", "う")[:40] for seed in range(4, 8))
    hit = index(one + seam + two + three + seam + four, run=45).hits("d", one + seam + four)[0]
    assert hit.run == 52
    assert set(overlap.hashed(overlap.folded(one + seam + four), 13)) <= set(
        overlap.hashed(overlap.folded(one + seam + two + three + seam + four), 13)
    )


def test_equal_hashes_are_confirmed_on_the_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    document = inside(prose(300, 44))
    real = overlap.hashed
    # A hash under which every gram collides with every other; 5-grams keep theirs.
    monkeypatch.setattr(overlap, "hashed", lambda codes, n: real(codes, n) * np.uint64(n != 13))
    made = index(ITEM, shortest=13)
    assert len(made.matches(overlap.folded(document))[0]) > 1000
    assert made.hits("d", document) == []


def test_hash_of_runs_is_that_of_each_run_alone() -> None:
    codes = overlap.folded(prose(200, 8))
    for n in (1, 2, 5, 8, 13, 14, 31):
        alone = [overlap.hashed(codes[i : i + n], n)[0] for i in range(len(codes) - n + 1)]
        np.testing.assert_array_equal(overlap.hashed(codes, n), alone)
    assert len(overlap.hashed(codes[:12], 13)) == 0


def test_a_long_document_is_searched_across_its_blocks() -> None:
    made, block = index(ITEM), overlap.BLOCK
    for start in (block - 400, block - 150, block - 6, 2 * block - 13):
        before = prose(2 * block, 60).replace("、", "")[:start]
        hit = made.hits("d", before + ITEM + before)[0]
        assert (hit.overlap, hit.run) == (1.0, len(overlap.folded(ITEM)))


def test_regular_edits_of_a_whole_page_are_found_by_minhash_alone() -> None:
    found = 0
    for seed in range(20):
        item = prose(400, 100 + seed).replace("、", "").replace("。", "")
        edited = "".join("A" if i % 12 == 11 else c for i, c in enumerate(item))
        made = index(item)
        assert len(made.matches(overlap.folded(edited))[0]) == 0
        hits = made.hits("d", edited)
        found += [hit.by for hit in hits] == ["jaccard"]
        assert all(hit.overlap == 0 and hit.run == 0 and hit.excerpt_document for hit in hits)
    assert found >= 12


def test_template_text_of_many_items_does_not_flag() -> None:
    template = (
        "次の文章を読んで、あとの設問に対する答えとして最も適切なものを選択肢の中から一つ選び、"
        "その記号を解答欄に記入しなさい。ただし、同じ記号を二度使ってはならない。"
    )
    items = [template + prose(60, seed) for seed in range(12)]
    assert index(*items, common=10).hits("d", inside(template)) == []
    assert {hit.item for hit in index(*items, common=12).hits("d", inside(template))} == {f"i{k}" for k in range(12)}
    assert [hit.item for hit in index(*items, common=10).hits("d", inside(items[3]))] == ["i3"]


def test_one_passage_under_many_questions_is_no_template() -> None:
    fields = [("set", f"q{k}", "context", ITEM) for k in range(15)]
    found = Index(Rules(common=10), fields).hits("d", inside(ITEM))
    assert [hit.item for hit in found] == [f"q{k}" for k in range(15)]


def test_short_items_have_to_be_there_as_a_whole() -> None:
    item = prose(40, 9).replace("、", "").replace("。", "")
    made = index(item)
    assert [hit.run for hit in made.hits("d", inside(item))] == [40]
    assert made.hits("d", inside(item[:-1])) == []


def test_what_cannot_be_looked_for_is_said() -> None:
    template = prose(80, 70)
    made = index("東京", "。、！？", "答え" * 40, ITEM, *(template + str(k) for k in range(4)), common=3)
    states = [*made.states["set"].values()]
    assert states[:4] == ["too_short", "too_short", "indistinct", "clean"]
    assert set(states[4:]) == {"indistinct"}
    assert made.hits("d", inside("東京" + "答え" * 40)) == []
    assert index("東京").hits("d", inside("東京")) == []


def test_an_item_is_looked_for_by_its_longest_fields() -> None:
    fields = [("set", "a", "question", ITEM), ("set", "a", "answer", "はい"), ("set", "b", "answer", "いいえ")]
    made = Index(Rules(), fields)
    assert made.states["set"] == {"a": "clean", "b": "too_short"}
    assert [(hit.item, hit.key) for hit in made.hits("d", ITEM + "はい、いいえ")] == [("a", "question")]


def test_an_index_travels_between_processes() -> None:
    made = index(ITEM, prose(90, 3))
    again = pickle.loads(pickle.dumps(made))  # noqa: S301 - as a pool of workers does
    document = inside(changed(ITEM, 0.03))
    assert again.hits("d", document) == made.hits("d", document) != []


def test_strange_documents_are_searched_like_others() -> None:
    made = index(ITEM)
    for text in ("", "あ", "。" * 100, "\ud800" * 100, "\0" * 100, "👍" * 50, "ー" * 100_000, "\U0010ffff" * 60):
        assert made.hits("d", text) == []
    assert made.hits("d", "\ud800" + ITEM + "👍")[0].overlap == 1.0
    assert made.hits("d", ITEM * 300)[0].overlap == 1.0


def test_common_phrases_are_settled_and_whole_copies_are_not() -> None:
    made = index(ITEM)
    piece, whole = ITEM[50:120], ITEM
    found = {k: made.hits(f"d{k}", inside(piece if k < 12 else whole, 200 + k)) for k in range(24)}
    assert all(len(hits) == 1 for hits in found.values())
    assert sorted(overlap.settled(found, 10)) == list(range(12, 24))
    assert sorted(overlap.settled(found, 12)) == list(range(24))


# ---- the door


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


@pytest.fixture
def given(tmp_path: Path) -> dict[str, str]:
    """20 documents, of which d3 holds question q1, d5 answer q2 and d9 both items of another set."""
    questions = [{"id": f"q{k}", "question": prose(120, 300 + k), "answer": prose(90, 400 + k)} for k in range(5)]
    questions.append({"id": "short", "question": "首都は？", "answer": "東京"})
    more = [{"id": f"m{k}", "question": prose(80, 500 + k), "answer": "はい"} for k in range(2)]
    texts = [prose(400, 600 + k) for k in range(20)]
    texts[3] += questions[1]["question"]
    texts[5] = questions[2]["answer"] + texts[5]
    texts[9] += more[0]["question"] + texts[4] + more[1]["question"]
    rows = [{"id": f"d{k}", "text": text} for k, text in enumerate(texts)]
    return {
        "corpus": write_jsonl(tmp_path / "corpus.jsonl", rows),
        "questions": write_jsonl(tmp_path / "questions.jsonl", questions),
        "more": write_jsonl(tmp_path / "more.jsonl", more),
    }


def test_door_writes_hits_items_and_the_corpus_without(
    given: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--corpus", given["corpus"], "--eval_sets", given["questions"], given["more"]]
    argv += ["--eval_keys", "question,answer", "--items", str(tmp_path / "items.json"), "--json"]
    printed, tables = [], {}
    for suffix, dropped in (("jsonl", "jsonl.gz"), ("csv", "jsonl"), ("parquet", "parquet")):
        out, drop = tmp_path / f"hits.{suffix}", tmp_path / f"kept.{dropped}"
        assert contamination.main([*argv, "--out", str(out), "--drop", str(drop)]) == 0
        printed.append(json.loads(capsys.readouterr().out))
        kept = list(sources.read(f"{'parquet' if dropped == 'parquet' else 'jsonl'}:{drop}"))
        assert [document.id for document in kept] == [f"d{k}" for k in range(20) if k not in (3, 5, 9)]
        tables[suffix] = out
    result = printed[0]
    assert {key: result[key] for key in ("items", "items_clean", "items_dirty", "items_too_short")} == {
        "items": 8,
        "items_clean": 3,
        "items_dirty": 4,
        "items_too_short": 1,
    }
    assert (result["documents"], result["documents_hit"], result["hits"]) == (20, 3, 4)
    assert result["sets"][given["more"]] == {"clean": 0, "dirty": 2, "too_short": 0, "indistinct": 0}
    items = json.loads((tmp_path / "items.json").read_text())
    assert items[given["questions"]]["dirty"] == ["q1", "q2"] and items[given["questions"]]["too_short"] == ["short"]
    rows = [json.loads(line) for line in tables["jsonl"].read_text().splitlines()]
    assert [(row["document"], row["item"], row["key"]) for row in rows] == [
        ("d3", "q1", "question"),
        ("d5", "q2", "answer"),
        ("d9", "m0", "question"),
        ("d9", "m1", "question"),
    ]
    assert pq.read_table(tables["parquet"]).to_pylist() == rows
    assert tables["csv"].read_text().splitlines()[0].startswith("item,set,key,document,by,overlap,run,jaccard")
    with gzip.open(tmp_path / "kept.jsonl.gz") as file:
        assert file.read() == (tmp_path / "kept.jsonl").read_bytes()


def test_door_takes_a_shards_folder(shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = shards.load(shards_folder)["documents"][0]["file"]
    texts = {row["id"]: row["text"] for row in pq.read_table(shards_folder / name).to_pylist()}
    copied = max(texts, key=lambda name: len(texts[name]))
    sets = write_jsonl(tmp_path / "eval.jsonl", [{"text": texts[copied]}, {"text": ITEM}])
    out = tmp_path / "hits.jsonl"
    assert contamination.main(["--corpus", str(shards_folder), "--eval_sets", sets, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "documents" in printed and "eval.jsonl" in printed and "1 dirty" in printed
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["item"] for row in found} == {"eval.jsonl:1"}
    assert copied in {row["document"] for row in found}


def test_a_clean_corpus_gives_an_empty_table_and_itself(
    given: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = write_jsonl(tmp_path / "eval.jsonl", [{"id": "x", "text": ITEM}])
    out, drop = tmp_path / "hits.parquet", tmp_path / "kept.jsonl"
    argv = ["--corpus", given["corpus"], "--eval_sets", sets, "--out", str(out), "--drop", str(drop), "--json"]
    assert contamination.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["documents_hit"] == 0
    assert pq.read_table(out).num_rows == 0 and "excerpt_item" in pq.read_table(out).column_names
    assert drop.read_bytes() == (tmp_path / "corpus.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"eval_sets": "jsonl:nowhere/*.jsonl"}, "no file there"),
        ({"eval_keys": "body"}, "no key 'body'"),
        ({"corpus": "nonsense"}, "unknown source"),
        ({"corpus": "."}, "no manifest.json"),
        ({"overlap": "0"}, "--overlap 0.0"),
        ({"jaccard": "1.5"}, "--jaccard 1.5"),
        ({"ngram": "2"}, "--ngram 2"),
        ({"run": "12"}, "--run 12"),
        ({"common": "0"}, "--common 0"),
        ({"out": "hits.txt"}, ".jsonl, .csv, .parquet"),
        ({"drop": "no/such/folder/kept.jsonl"}, "no folder"),
        ({"eval_id_key": "set"}, "two items of id 'jsquad'"),
    ],
)
def test_mistakes_are_one_line(
    flags: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"x{k}", "set": "jsquad", "text": prose(80, k)} for k in range(2)]
    good = {"corpus": write_jsonl(tmp_path / "c.jsonl", rows), "eval_sets": write_jsonl(tmp_path / "e.jsonl", rows)}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(console.UserError) as caught:
        contamination.main([f"--{name}={value}" for name, value in {**good, **flags}.items()])
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_corpus_that_breaks_off_leaves_no_file(given: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "corpus.jsonl"
    broken.write_bytes(broken.read_bytes() + b'{"id": 1')
    drop = tmp_path / "kept.jsonl"
    with pytest.raises(console.UserError, match="not JSON"):
        contamination.main(
            ["--corpus", given["corpus"], "--eval_sets", given["more"], "--eval_keys", "question", "--drop", str(drop)]
        )
    assert not drop.exists() and not list(tmp_path.glob(".kept*"))
