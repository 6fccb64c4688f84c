"""The page of a build: what it says of a real one, and that nothing a document says can break it."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data import build, examples, page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Elements(html.parser.HTMLParser):
    """Every element of a page with its attributes, and the text outside script and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.said = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if not self.found or self.found[-1][0] not in ("script", "style"):
            self.said += data


def record(**changes: Any) -> dict[str, Any]:
    """What `funnel.record` gives of 12 pages, of which 5 are kept."""
    reasons = {"language": ("language", 3), "avg_sentence_length": ("quality", 2), "dedup": ("dedup", 1)}
    example = {"threshold": 20.0, "id": "a.warc.gz:7", "text": "ホーム\nメニュー"}
    steps = (("records", 12), ("read", 11), ("extract", 11), ("language", 8), ("quality", 6), ("dedup", 5))
    found = {
        "source": "warc:a.warc.gz",
        "extractor": "resiliparse-2.0.1/main-1",
        "profile": {
            "name": "mine",
            "about": "",
            "language": {"code": "ja"},
            "rules": {"avg_sentence_length": {"min": 20.0, "max": 90.0}, "words_ng_fraction": {"below": 0.05}},
            "dedup": {"jaccard": 0.75},
            "privacy": ["email"],
            "tlds": [],
            "hosts": None,
            "words": {},
            "edits": [],
        },
        "records": {"records": 14, "response": 12, "warcinfo": 1, "unreadable": 1},
        "funnel": [
            {
                "step": step,
                "documents": n,
                "characters": None if step in ("records", "read") else 100 * n,
                "seconds": 0.5,
            }
            for step, n in (*steps, ("privacy", 5))
        ],
        "reasons": {
            "http_status": {"step": "read", "documents": 1, "characters": 0},
            **{name: {"step": step, "documents": n, "characters": 100 * n} for name, (step, n) in reasons.items()},
        },
        "examples": {
            "avg_sentence_length": [
                example | {"side": "dropped", "value": 11.11119, "id": "far"},
                example | {"side": "dropped", "value": 19.5, "id": "near"},
                example | {"side": "kept", "value": 20.25},
                example | {"side": "kept", "value": 88.0, "threshold": 90.0},
            ]
        },
        "duplicates": {
            "pairs": 1,
            "examples": [{"kept": "k", "dropped": "d", "jaccard": 0.7512, "difference": "…\n- 旧\n+ 新"}],
        },
        "masked_documents": 1,
        "masks": {"email": 2},
        "mask_samples": [["email", "連絡先【xxx@xxxx.xx】まで"]],
        "contaminated_documents": 0,
        "contamination": [],
        "hosts": [["www.example.jp", 8, 6]],
        "files": {"a.warc.gz": {"records": 14, "response": 12, "warcinfo": 1, "unreadable": 1}},
    }
    return found | changes


@pytest.fixture(scope="module")
def built(shards_folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and result of a small build."""
    manifest = json.loads((shards_folder / "manifest.json").read_text())
    return manifest, build.summary(build.BuildConfig(source="inquiries", out=shards_folder), manifest)


def test_a_build_without_a_profile_has_its_documents_and_shards(built: tuple[dict[str, Any], dict[str, Any]]) -> None:
    manifest, result = built
    said = Elements(page.build([], *built)).said
    assert f"{result['documents']} documents in shards" in said
    for split in ("train", "val"):
        assert f"{manifest['splits'][split]['tokens']:,}" in said
    assert manifest["fingerprint"] in said and manifest["tokenizer"]["sha256"] in said
    assert f"{manifest['baseline']['val_bpb']:.4f} bits per byte" in said
    assert "The funnel" not in said


def test_the_answer_the_reasons_and_the_thresholds_are_said(built: tuple[dict[str, Any], dict[str, Any]]) -> None:
    said = Elements(page.build([record()], *built)).said
    assert "5 of 12 pages kept" in said
    assert "language (3), avg_sentence_length (2)" in said  # the largest reasons first
    assert "5.14 k pages or 514 k characters kept per CPU-hour" in said  # in 3.5 s
    assert "≥ 20, ≤ 90" in said and "< 0.05" in said
    assert said.index("near") < said.index("far")
    assert "--avg_sentence_length.min 11.11 this rule lets the 2 shown pass" in said
    assert (
        "0.751" in said
        and "- 旧" in said
        and "連絡先【xxx@xxxx.xx】まで" in said
        and "Masked: 2, in\n1 of 5 doc" in said
    )
    assert "www.example.jp" in said and "Files: 1 of 1 damaged" in said


@pytest.mark.parametrize("kind", ["min", "max", "below"])
@pytest.mark.parametrize("value", [1.0, 19.99999, 0.123456, 0.00012345, 123456.7, -3.00001])
def test_a_proposed_threshold_lets_its_example_pass(kind: str, value: float) -> None:
    bound = float(examples.outward(value, kind))
    assert {"min": value >= bound, "max": value <= bound, "below": value < bound}[kind]
    assert bound == pytest.approx(value, rel=2e-3)


def test_parts_of_a_mix_are_added_up_and_told_apart(built: tuple[dict[str, Any], dict[str, Any]]) -> None:
    parts = [record(), record(source="jsonl:b.jsonl")]
    shown = [{"source": one["source"], "repeats": 2.0, "documents": 5, "train_bytes": 500} for one in parts]
    mixed = page.build(parts, built[0] | {"source": "", "mix": shown}, built[1])
    assert "10 of 24 documents kept" in Elements(mixed).said
    anchors = [attributes["id"] for _, attributes in Elements(mixed).found if attributes.get("id")]
    assert len(anchors) == len(set(anchors))
    assert {"rule0-1", "rule1-1"} <= set(anchors)


def test_contamination_is_told_where_it_was_looked_for(built: tuple[dict[str, Any], dict[str, Any]]) -> None:
    step = {"step": "contamination", "documents": 5, "characters": 500, "seconds": 0.1}
    hit = {"item": "q1", "set": "exam", "overlap": 0.875, "excerpt_item": "問題", "excerpt_document": "本文の問題"}
    funnel = [*record()["funnel"][:-1], step, record()["funnel"][-1]]
    looked = Elements(page.build([record(funnel=funnel)], *built)).said
    assert "an evaluation item: 0; dropped for it: 0" in looked
    found = Elements(page.build([record(funnel=funnel, contaminated_documents=1, contamination=[hit])], *built)).said
    assert "an evaluation item: 1;" in found and "0.875" in found and "本文の問題" in found
    assert "Contamination" not in Elements(page.build([record()], *built)).said


def hostile(value: Any) -> Any:
    """`value` with HOSTILE behind every string of it."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value + HOSTILE if isinstance(value, str) and value not in ("dropped", "kept") else value


def test_what_documents_say_cannot_break_the_page(built: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Hostile ids, texts, hosts, file names, rules, reasons, kinds, sources and profiles stay text, in figures too."""
    bad = hostile(record())
    for where in (bad["reasons"], bad["examples"], bad["masks"], bad["files"], bad["records"], bad["profile"]["rules"]):
        for key in [*where]:
            where[key + HOSTILE] = where.pop(key)
    manifest = hostile({"source": "s", "config": {HOSTILE: "x"}, "fingerprint": "f"})
    hit = {HOSTILE: HOSTILE, "excerpt_item": HOSTILE}
    bad["funnel"].insert(-1, {"step": "contamination", "documents": 5, "characters": 5, "seconds": 0.0})
    bad["funnel"][3]["step"] = "language"
    bad["contamination"] = [hit]
    made = page.build([bad], {**built[0], **manifest}, {**built[1], "fingerprint": HOSTILE})
    elements = Elements(made).found
    assert sum(tag == "script" for tag, _ in elements) == 3
    assert not {tag for tag, _ in elements} & {"img", "link", "iframe", "base", "object", "embed", "form"}
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert "alert(1)" in made and "<script>alert" not in made
    for _, attributes in elements:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    data = json.loads(re.search(r'id="data">(.*?)</script>', made, re.DOTALL)[1])  # type: ignore[index]
    labels = json.dumps([figure["data"] for figure in data["figures"].values()])
    assert "&lt;/script" in labels and "<script" not in labels and "<img" not in labels


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_draws_the_figures_and_asks_for_nothing(
    built: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(page.build([record()], *built), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--virtual-time-budget=6000", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'chromium'}"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.count('class="main-svg"') >= 2
    assert "CONSOLE" not in done.stderr
