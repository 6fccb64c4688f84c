"""Profiles: the published numbers, judging one document or millions, edits, and what a user may get wrong."""

import random
from pathlib import Path

import numpy as np
import pytest

from console import UserError
from data import edits, privacy, profiles, quality
from data.profiles import Profile, Rule


def numbers(name: str) -> dict[str, float]:
    """The bounds of a bundled profile as {"statistic.bound": number}."""
    profile = profiles.load(name)
    return {f"{rule.statistic}.{kind}": bound for rule in profile.rules for kind, bound in profiles.bounds(rule)}


def test_swallow_has_the_published_numbers() -> None:
    """arXiv:2404.17733 and the published apply_v1, no more and no less."""
    duplicate = {f"duplicate_{n}gram_character_fraction.max": (20 - n) / 100 for n in range(5, 11)}
    top = {f"top_{n}gram_character_fraction.max": (24 - 2 * n) / 100 for n in range(2, 5)}
    assert numbers("web_swallow_v1") == duplicate | top | {
        "num_letters.min": 400,
        "duplicate_paragraph_fraction.max": 0.30,
        "duplicate_sentence_fraction.max": 0.30,
        "duplicate_paragraph_fraction_in_character.max": 0.20,
        "duplicate_sentence_fraction_in_character.max": 0.20,
        "hiragana_fraction.min": 0.2,
        "katakana_fraction.max": 0.5,
        "japanese_fraction.min": 0.5,
        "num_japanese_letters.min": 400,
        "avg_sentence_length.min": 20,
        "avg_sentence_length.max": 90,
        "max_sentence_length.max": 200,
        "ellipsis_fraction.max": 0.2,
        "words_ng_fraction.below": 0.05,
    }
    profile = profiles.load("web_swallow_v1")
    assert (profile.dedup.bands, profile.dedup.rows, profile.dedup.ngram) == (40, 20, 5)
    assert profile.edits == ("western_punctuation", "footer")


def test_fineweb2_has_the_published_numbers() -> None:
    """configs/jpn_Jpan.yml of FineWeb-2; n-grams of words stand as n-grams of twice as many letters."""
    repeated = dict(zip(range(5, 11), (0.243, 0.225, 0.207, 0.19, 0.175, 0.159), strict=True))
    top = {2: 0.239, 3: 0.196, 4: 0.172}
    found = numbers("web_fineweb2_ja")
    assert {n: found[f"covered_by_repeated_{2 * n}gram.max"] for n in repeated} == repeated
    assert {n: found[f"covered_by_top_{2 * n}gram.max"] for n in top} == top
    assert found["duplicate_line_fraction.max"] == 0.328
    assert found["duplicate_line_letters_fraction.max"] == 0.1
    assert found["punctuated_line_fraction.min"] == 0.096
    assert found["newlines_per_letter.max"] == 0.13 / 2
    assert (found["bullet_line_fraction.max"], found["ellipsis_line_fraction.max"]) == (0.9, 0.3)
    assert found["num_stop_characters.min"] == 2
    profile = profiles.load("web_fineweb2_ja")
    assert (profile.dedup.bands, profile.dedup.rows, profile.min_probability) == (14, 8, 0.886)


def test_llmjp_has_the_published_numbers() -> None:
    """llm-jp-corpus v1.0.1, Japanese Common Crawl, the loose setting."""
    assert numbers("llmjp_v1") == {
        "num_kana_in_first_50.min": 1,
        "maru_fraction.min": 1 / 250,
        "words_ads_hits.max": 10,
        "words_adult_hits.max": 3,
        "words_discrimination_hits.max": 3,
        "words_violence_hits.max": 3,
        "zlib_ratio.min": 0.30,
        "zlib_ratio.max": 0.70,
    }
    tlds = "biz cc com info jp me net org site tokyo tv work xyz"
    assert profiles.load("llmjp_v1").tlds == tuple(tlds.split())


@pytest.mark.parametrize("name", profiles.bundled())
def test_a_bundled_profile_loads_and_describes_itself(name: str) -> None:
    """Every one names its source and extractor, masks all private data, and comes back from its description."""
    profile = profiles.load(name)
    assert profile.name == name and len(profile.about) > 50 and profile.extractor and profile.rules
    assert profile.privacy == privacy.KINDS
    assert profiles.from_dict(profiles.describe(profile)) == profile


def test_only_rules_about_repetition_need_it() -> None:
    """A profile of cheap rules can skip the slow statistics."""
    assert profiles.load("web_swallow_v1").asked >= {"top_2gram_character_fraction", "duplicate_paragraph_fraction"}
    assert not Profile("cheap", rules=(Rule("num_letters", min=9), Rule("words_ng_hits", max=3))).asked


MANUAL = """\
第2章 印刷のしかた
用紙をセットしてから、電源ボタンを押します。ランプが青く光るまで、30 秒ほどお待ちください。
1. 「ファイル」メニューから「印刷」を選びます。
2. 部数と用紙サイズ (A4 または B5) を確認します。
-n NUM  NUM 部だけ印刷する。省略すると 1 部になる。
紙が詰まったときは、背面のカバーを開け、ゆっくりと引き抜いてください。詳しくは第5章をご覧ください。"""
STATUTE = """\
第三条　事業者は、前条第一項の規定による届出をした者が次の各号のいずれかに該当すると認めるとき、又は\
同項の規定に違反すると認めるときは、主務省令で定めるところにより、その旨を主務大臣に報告しなければならない。
一　届出に係る事項の全部又は一部を変更したとき。
二　届出に係る事業の全部又は一部を廃止し、又は休止したとき。
２　主務大臣は、前項の報告を受けたときは、遅滞なく、その内容を公示しなければならない。"""


def verdict(name: str, text: str) -> str:
    """The rule of profile `name` that rejects `text`, or ""."""
    found = profiles.judge(profiles.load(name), quality.cheap(text) | quality.repetition(text))
    return found.rule if found else ""


def test_domain_keeps_manuals_and_statutes() -> None:
    """Which rules for web pages reject."""
    for text in (MANUAL, STATUTE):
        assert verdict("domain", text) == ""
        assert verdict("web_swallow_v1", text) != ""


@pytest.mark.parametrize("name", ["domain", "web_swallow_v1", "web_fineweb2_ja"])
@pytest.mark.parametrize("kind", ["repeated", "menu", "teasers", "strung"])
def test_low_quality_is_rejected(name: str, kind: str) -> None:
    """A block repeated, a menu, lines cut off by an ellipsis, clauses strung together by commas."""
    rng = random.Random(3)
    words = ["装置", "電源", "用紙", "印刷", "設定", "画面", "表示", "保存", "接続", "更新", "確認", "変更"]
    clauses = [
        "".join(rng.choices(words, k=3)) + "を" + "の".join(rng.choices(words, k=4)) + "にします" for _ in range(60)
    ]
    text = {
        "repeated": "。\n".join(clauses[:3] * 25) + "。",
        "menu": "\n".join(
            ["トップページ", "会社概要", "お問い合わせ", "サイトマップ", "新規会員登録", "ログイン"] * 20
        ),
        "teasers": "\n".join(clause[:20] + "…" for clause in clauses),
        "strung": "\n".join("、".join(clauses[i : i + 20]) + "、" for i in (0, 20, 40)),
    }[kind]
    assert verdict(name, text) != ""


def test_first_rule_in_order_gives_the_reason() -> None:
    """With its value and the bound it breaks; statistics not computed are skipped."""
    profile = Profile("p", rules=(Rule("num_letters", min=10), Rule("zlib_ratio", min=0.3, max=0.7)))
    assert profiles.judge(profile, {"num_letters": 9.0, "zlib_ratio": 0.9}) == ("num_letters", 9.0, 10)
    assert profiles.judge(profile, {"num_letters": 10.0, "zlib_ratio": 0.9}) == ("zlib_ratio", 0.9, 0.7)
    assert profiles.judge(profile, {"zlib_ratio": 0.1}) == ("zlib_ratio", 0.1, 0.3)
    assert profiles.judge(profile, {"num_letters": float("nan")}) is None
    assert profiles.judge(profile, {"num_letters": None, "zlib_ratio": 0.7}) is None


def test_bounds_are_inclusive_but_below() -> None:
    """`min` and `max` keep a value that equals them, `below` does not."""
    assert (
        profiles.judge(Profile("p", rules=(Rule("ellipsis_fraction", min=0.2, max=0.2),)), {"ellipsis_fraction": 0.2})
        is None
    )
    below = Profile("p", rules=(Rule("words_ng_fraction", below=0.05),))
    assert profiles.judge(below, {"words_ng_fraction": 0.05}) == ("words_ng_fraction", 0.05, 0.05)
    assert profiles.judge(below, {"words_ng_fraction": 0.0499}) is None


def test_columns_are_judged_like_single_documents() -> None:
    """On random statistics with gaps, ties with the bounds, and a column that was never computed."""
    rng = np.random.default_rng(1)
    names = [name for name in quality.STATISTICS if name != "zlib_ratio"]
    profile = Profile(
        "p",
        rules=(
            *(Rule(name, min=0.2, max=0.9) for name in names[:6]),
            *(Rule(name, below=0.8) for name in names[40:45]),
            Rule("zlib_ratio", min=0.3),
            Rule("words_ng_fraction", below=0.05),
        ),
    )
    columns = {name: rng.integers(0, 11, 3000) / 10 for name in names}
    for column in columns.values():
        column[rng.random(3000) < 0.3] = np.nan
    reasons, values, thresholds = profiles.judge_columns(profile, columns)
    for row in range(3000):
        found = profiles.judge(profile, {name: float(column[row]) for name, column in columns.items()})
        if found is None:
            assert reasons[row] == "" and np.isnan(values[row]) and np.isnan(thresholds[row])
        else:
            assert (reasons[row], values[row], thresholds[row]) == found
    assert {"", names[0], names[5], names[44]} <= set(reasons)


def test_language_alone_and_in_columns() -> None:
    """Both say the same; what is asked of Japanese is not asked of other languages; empty takes any."""
    rows = [
        ("ja", 0.9, 0.5, 30.0),
        ("ja", 0.4, 0.5, 30.0),
        ("ja", 0.9, 0.1, 30.0),
        ("ja", 0.9, 0.5, 3.0),
        ("en", 0.9, 0.0, 0.0),
    ]
    keys = ("lang", "lang_probability", "japanese_fraction", "kana")
    columns = {key: np.array([row[i] for row in rows]) for i, key in enumerate(keys)}
    for language, spoken in (("ja", [1, 0, 0, 0, 0]), ("en", [0, 0, 0, 0, 1]), ("", [1, 0, 1, 1, 1])):
        profile = Profile("p", language=language, min_probability=0.5, min_japanese_fraction=0.2)
        assert [profile.speaks(*row) for row in rows] == [bool(one) for one in spoken]
        assert profiles.speaks_columns(profile, columns["lang"], columns).tolist() == [bool(one) for one in spoken]


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    """A few lines suffice; files are found beside the YAML."""
    (tmp_path / "ng.txt").write_text("禁止語\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("rules:\n  num_letters: {min: 50}\n  words_ng_fraction: {below: 0.1}\nwords: {ng: ng.txt}\n")
    profile = profiles.load(str(mine))
    assert profile.name == "mine" and profile.language == "ja" and profile.privacy == privacy.KINDS
    assert profile.rules == (Rule("num_letters", min=50), Rule("words_ng_fraction", below=0.1))
    assert profile.words == {"ng": str(tmp_path / "ng.txt")}
    mine.write_text("")
    assert profiles.load(mine).rules == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("rule: {}", "unknown key rule, did you mean rules?"),
        ("rules: {num_leters: {min: 4}}", "rules: num_leters: no such statistic, did you mean num_letters?"),
        ("rules: {num_letters: {minimum: 4}}", "unknown key minimum, did you mean min?"),
        ("rules: {num_letters: {min: 1e3}}", "rules: num_letters: min: YAML takes 1e3 for a word"),
        ("rules: {num_letters: {min: 1e-3}}", "such as 1.0e-3"),
        ("rules: {num_letters: {min: four}}", "'four' is no number"),
        ("rules: {num_letters: {min: true}}", "True is no number"),
        ("rules: {num_letters: {max: .nan}}", "nan is no number"),
        ("rules: {num_letters: {min: 5, max: 4}}", "min 5 leaves nothing up to 4"),
        ("rules: {num_letters: {}}", "rules: num_letters: no bound"),
        ("rules: {num_letters: 400}", "holds int, not `key: value` pairs"),
        ("rules: [num_letters]", "rules: holds list"),
        ("rules:\n  num_letters: {min: 4}\n  num_letters: {max: 9}", ":3: num_letters a second time"),
        ("rules: {num_letters: {min: 4}", "not YAML"),
        ("just words", "holds str"),
        ("privacy: [emial]", "unknown 'emial', did you mean email?"),
        ("edits: footer", "'footer' is no list"),
        ("edits: [foot]", "unknown 'foot', did you mean footer?"),
        ("language: {code: no}", "False is no text: put it in quotes"),
        ("language: {cod: ja}", "did you mean code?"),
        ("dedup: {bands: 2.5}", "dedup: bands is 2.5: give a whole number"),
        ("dedup: {bands: 0}", "bands is 0"),
        ("words: {ng: missing.txt}", "words: ng: no file"),
        ("hosts: missing.txt", "hosts: no file"),
    ],
)
def test_mistakes_in_a_profile(tmp_path: Path, content: str, said: str) -> None:
    """Each is one line that names the file."""
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        profiles.load(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    """A bundled name misspelled, a file missing, a file of bytes."""
    with pytest.raises(UserError, match="did you mean domain"):
        profiles.load("domian")
    with pytest.raises(UserError, match="No such file"):
        profiles.load(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_bytes(b"about: \x83\x65")
    with pytest.raises(UserError, match="not UTF-8 at byte 7"):
        profiles.load(tmp_path / "mine.yaml")


def test_auto_is_for_web_archives() -> None:
    """Other sources are taken as they are."""
    chosen = profiles.choose("auto", "warc:crawl/*.warc.gz")
    assert chosen is not None and chosen.name == "domain"
    assert profiles.choose("auto", "jsonl:a.jsonl") is None
    assert profiles.choose("none", "warc:a.warc") is None


def test_thresholds_replace_and_add() -> None:
    """As numbers by name or as given on a command line; the profile itself stays as it is."""
    profile = Profile("p", rules=(Rule("num_letters", min=400), Rule("avg_sentence_length", min=20, max=90)))
    changed = profiles.with_thresholds(profile, {"avg_sentence_length.max": 95.0, "zlib_ratio.min": 0.3})
    assert changed.rules == (profile.rules[0], Rule("avg_sentence_length", min=20, max=95), Rule("zlib_ratio", min=0.3))
    assert profiles.with_thresholds(profile, ["num_letters.min=1e2"]).rules[0] == Rule("num_letters", min=100)
    assert profiles.with_thresholds(profile, ()) == profile
    for change, said in (
        ("num_leters.min=4", "did you mean num_letters"),
        ("num_letters.least=4", "STATISTIC.min"),
        ("num_letters.min=x", "'x' is no number"),
        ("num_letters.min=inf", "inf is no number"),
        ("avg_sentence_length.max=10", "min 20 leaves nothing"),
    ):
        with pytest.raises(UserError, match=said):
            profiles.with_thresholds(profile, [change])


def test_thresholds_on_the_command_line() -> None:
    """Also as W&B's agent spells a sweep's parameters, gathered into the one flag that a door declares."""
    argv = [
        "--profile",
        "domain",
        "--num_letters.min",
        "50",
        "--zlib-ratio.max=.6",
        "--thresholds",
        "a.max=1",
        "--out",
        "o",
    ]
    spelled = ["--thresholds", "num_letters.min=50", "zlib_ratio.max=.6", "a.max=1"]
    assert profiles.spell_thresholds(argv) == ["--profile", "domain", "--out", "o", *spelled]
    assert profiles.spell_thresholds(["--out", "o"]) == ["--out", "o"]


def test_another_extractor_is_a_warning() -> None:
    """The thresholds belong to one extractor's text."""
    profile = Profile("p", extractor="resiliparse-2.0.1/main-1")
    assert profiles.extractor_differs(profile, "resiliparse-2.0.1/main-1") is None
    assert "resiliparse-2.0.1/main-1" in str(profiles.extractor_differs(profile, "trafilatura-2.3.1"))
    assert profiles.extractor_differs(Profile("p"), "anything") is None


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("western_punctuation", "用紙は，白い．はい，３．１４です．", "用紙は、白い。はい、３．１４です。"),
        ("western_punctuation", "用紙は、白い．はい、Ａ，Ｂです，", "用紙は、白い。はい、Ａ，Ｂです，"),
        ("western_punctuation", "それは，，，（注）．．．", "それは、、、（注）。。。"),
        ("footer", "本文です。\nCopyright © 2024 株式会社例\nまた本文。", "本文です。"),
        (
            "footer",
            "\n".join(["サイトマップ", *["本文です。"] * 10]),
            "\n".join(["サイトマップ", *["本文です。"] * 10]),
        ),
        (
            "footer",
            "この利用規約について長い本文が続きます。\n\n終わり",
            "この利用規約について長い本文が続きます。\n\n終わり",
        ),
        ("kana_lines", "第一条\nこれは\nABC\nﾃｽﾄ\n\nア", "これは\nﾃｽﾄ\nア"),
        ("strip_urls", "詳細はhttps://example.com/a?b=1をご覧ください。", "詳細はをご覧ください。"),
        (
            "strip_ascii_runs",
            "あ" + "x" * 100 + "い\n" + "y" * 99 + "\n" + "z" * 99,
            "あい\n" + "y" * 99 + "\n" + "z" * 99,
        ),
    ],
)
def test_edits(name: str, before: str, after: str) -> None:
    """Each on a text where it acts and where it must not."""
    assert edits.EDITS[name](before) == after
