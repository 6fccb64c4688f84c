"""Similarity of Japanese instructions: segmentations, ROUGE-L, calibration, de-duplication against the plain rule."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

import bench_posttrain
import console
from posttrain import calibration, similarity
from posttrain.segmentation import SEGMENT, Segmentation, chars, content, script
from posttrain.similarity import Texts, close_pairs, dedup, signatures


def plain(texts: list[str], segmentation: str, threshold: float) -> list[tuple[int, float] | None]:
    """The greedy rule, pair by pair, in pure Python."""
    tokens = [SEGMENT[segmentation](text) or [text] for text in texts]
    fate: list[tuple[int, float] | None] = []
    for i, some in enumerate(tokens):
        scored = [(bench_posttrain.plain_score(some, tokens[j]), -j) for j in range(i) if fate[j] is None]
        best, place = max(scored, default=(0.0, 0))
        fate.append((-place, best) if best > threshold else None)
    return fate


@pytest.mark.parametrize("segmentation", ["chars", "script", "content"])
@pytest.mark.parametrize("threshold", [0.5, 0.7, similarity.THRESHOLD])
def test_dedup_is_the_plain_rule(segmentation: Segmentation, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "ROWS", 37)  # several blocks
    rng = random.Random(1)
    texts = [*bench_posttrain.write(80, rng), "", "。", "!?", "。", "a", "次の文", "以下の文"]
    rng.shuffle(texts)
    assert dedup(texts, segmentation, threshold) == plain(texts, segmentation, threshold)
    assert dedup([], segmentation, threshold) == []


def test_the_bound_rules_out_no_pair() -> None:
    rng = random.Random(2)
    # Few kinds of tokens and all lengths: what makes signatures collide.
    strings = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 90))) for _ in range(50)]
    signed = signatures(strings)
    for threshold in (0.0, 0.4, 0.7, 0.95):
        row, column, score = close_pairs((strings, signed), (strings, signed), threshold)
        expected = {
            (i, j): f
            for i, a in enumerate(strings)
            for j, b in enumerate(strings)
            if (f := bench_posttrain.plain_score(list(a), list(b))) > threshold
        }
        assert dict(zip(zip(row.tolist(), column.tolist(), strict=True), score.tolist(), strict=True)) == expected


def test_rouge_l_of_japanese() -> None:
    known = Texts("chars")
    known.add("次の文章を要約してください。")
    assert known.nearest(["次の文章を要約してください"]) == [(0, 1.0)]
    # 12 of 14 characters are common, as counted by hand: the different tasks that a cut into characters takes for one.
    assert known.nearest(["次の文章を分類してください。"])[0][1] == pytest.approx(11 / 13)
    known = Texts()
    for text in ("会議の議事録を要約してください。", "JSONで出力してください。", "。"):
        known.add(text)
    assert known.nearest(["会議の議事録を要約しなさい", "JSONで要約してください", "。"])[0] == (0, 1.0)
    scores = known.scores(["会議の議事録を要約せよ。", "JSONで要約せよ。", "。", ""])
    assert scores.shape == (4, 3) and scores[0, 0] == scores[2, 2] == 1 and scores[1, 1] < 0.7
    assert not np.isnan(scores).any() and scores[3].max() == 0
    assert Texts().nearest(["あ"]) == [(-1, 0.0)] and known.nearest([]) == []


def test_texts_are_admitted_one_after_another() -> None:
    texts = bench_posttrain.write(60, random.Random(3)) * 2
    known, fates = Texts(), []
    for begin in range(0, len(texts), 25):
        fates += known.admit(texts[begin : begin + 25], 0.7)
    fate = dedup(texts, "content", 0.7)
    assert [added for added, *_ in fates] == [one is None for one in fate]
    kept = [i for i, one in enumerate(fate) if one is None]
    assert len(known.strings) == len(kept) <= 60
    dropped = [(kept[place], score) for added, place, score in fates if not added]
    assert dropped == [one for one in fate if one is not None]


def test_segmentations() -> None:
    text = "見積依頼のメールを、英語で100字以内で書いてください。"
    assert "".join(chars("ABC、一二!")) == "abc一二"
    assert script(text)[:4] == ["見積", "依頼", "の", "メール"]
    assert content(text) == ["見", "積", "依", "頼", "メール", "英", "語", "100", "字", "以", "内"]
    assert content("あいさつを五つ") == ["あいさつ", "5"] and content("書いて") == script("書いて")
    for segment in (chars, script, content):
        assert segment("") == [] and segment("JSONの表") == segment("jsonの表")
    assert content("次の文章を要約してください。") == content("以下の文章を要約しなさい。") == ["要", "約"]


def test_calibration_beats_the_originals_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = calibration.read_pairs(calibration.PAIRS)
    dev, test = ([pair for pair in pairs if pair.split == split] for split in ("dev", "test"))
    best = calibration.choose(dev, ["chars", "script", "content"])[0]
    assert (best.segmentation, best.threshold) == (similarity.SEGMENTATION, similarity.THRESHOLD)
    ours = calibration.judge("", calibration.scores(test, SEGMENT[best.segmentation]), test, best.threshold)
    for name, segment, threshold in (("original", calibration.original, 0.7), ("chars", chars, 0.7)):
        theirs = calibration.judge(name, calibration.scores(test, segment), test, threshold)
        assert ours.f > theirs.f + 0.1
    same = calibration.Pair("次の文を要約して。", "次の文を要約して。", True, "dev")
    assert calibration.scores([same], calibration.original) == [0.0] and calibration.scores([same], content) == [1.0]
    assert calibration.main(["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["precision"] == ours.precision and told["recall"] == ours.recall
    assert calibration.main([]) == 0 and "original at 0.7" in capsys.readouterr().out


def test_dedup_door(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"instruction": "会議の議事録を要約してください。", "id": 1},
        {"instruction": "会議の議事録を要約しなさい。", "id": 2},
        {"instruction": "会議の案内を英語に訳してください。", "id": 3},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr("sys.argv", ["similarity", "dedup", str(source), f"--out={out}", "--json"])
    assert similarity.main() == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == 1
    assert [json.loads(line)["id"] for line in out.read_text(encoding="utf-8").splitlines()] == [1, 3]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{in}", "--out={out}", "--key=text"], "in.jsonl:1: no text text: give --key"),
        (["{in}", "--out={out}", "--threshold=2"], "--threshold 2"),
        (["{in}", "--out=/nowhere/x"], "--out /nowhere/x"),
        (["missing.jsonl", "--out={out}"], "missing.jsonl"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, argv: list[str], said: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"instruction": "a"}\n')
    filled = [flag.replace("{in}", str(tmp_path / "in.jsonl")).replace("{out}", str(tmp_path / "o")) for flag in argv]
    with pytest.raises(console.UserError) as mistake:
        similarity.dedup_file(filled)
    assert said in str(mistake.value)


def test_pairs_that_are_no_pairs_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": "x", "b": "y", "same": 1, "split": "dev"}\n')
    with pytest.raises(console.UserError, match=r"pairs\.jsonl:1: a pair has"):
        calibration.read_pairs(path)
    path.write_text('{"a": "x", "b": "y", "same": true, "split": "dev"}\n')
    with pytest.raises(console.UserError, match="split dev needs"):
        calibration.read_pairs(path)
