"""`python -m data annotate` once, then `filter` again and again: what it keeps is what `decide` and `build` keep."""

import collections
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import console
from data import annotate, build, decide, filter, profiles
from tests.data import web

ROOT = Path(__file__).parents[2]
Rules = tuple[str, ...]
# Our sentences end in one of four ways, which the published rules take for repetition.
LOOSER = tuple(f"--duplicate_{n}gram_character_fraction.max={limit}" for n, limit in enumerate((0.22, *[0.2] * 5), 5))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 pages of one to twelve paragraphs, some with what a rule is about, some in other languages."""
    records = []
    for seed in range(60):
        text = web.prose(seed, 4 * (1 + seed % 12))
        if seed % 5 == 1:
            text += "\n" + "、".join(web.prose(seed + 1_000, 8).replace("。", "").split("\n")) + "。"
        if seed % 7 == 2:
            text += "\n" + f"{web.mark(seed)}の話をもう一度ここでくり返しておく。\n" * 30
        if seed % 11 == 3:
            text = "This page is about something else and it is not written in Japanese at all. " * 9
        if seed % 13 == 4:
            text += "続きを読む…\n" * 40
        records.append(web.record(f"http://host{seed % 3}.example/{seed}", web.html(text).encode()))
    path = tmp_path_factory.mktemp("crawl") / "a.warc.gz"
    path.write_bytes(b"".join(map(web.member, records)))
    return f"warc:{path}"


@pytest.fixture(scope="module")
def annotations(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annotated") / "annotations"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_MODE", "disabled")
        assert annotate.main(["--source", source, "--out", str(folder), "--workers", "1"]) == 0
    return folder


@pytest.mark.parametrize(
    ("profile", "flags"),
    [
        ("domain", ()),
        ("web_swallow_v1", LOOSER),
        ("web_swallow_v1", (*LOOSER, "--max_sentence_length.max", "600", "--num_letters.min=150")),
        ("web_fineweb2_ja", ()),
    ],
)
def test_filter_decide_and_a_build_that_stops_early_agree(
    source: str,
    annotations: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    profile: str,
    flags: Rules,
) -> None:
    """Near-duplicates aside, which filter does not look for and this source does not hold: by reason, and by page."""
    assert filter.main(["--annotations", str(annotations), "--profile", profile, *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    flags = ("--source", source, "--profile", profile, "--workers", "1", *flags)
    assert decide.main([*flags, "--annotations", str(annotations)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    reasons = collections.Counter(line["reason"] for line in lines)
    assert 3 < reasons[None] < 57 and reasons["dedup"] == 0
    assert told["documents"] == len(lines) == 60 and told["kept/documents"] == reasons.pop(None)
    assert {key.removeprefix("dropped/"): n for key, n in told.items() if key.startswith("dropped/")} == reasons
    sizes = ("--vocab_size", "560", "--val_fraction", "0.3", "--baseline_tokens", "0", "--normalize", "none")
    assert build.main([*flags, *sizes, "--out", str(tmp_path / "out")]) == 0
    rows = pq.read_table(tmp_path / "out" / "documents-00000.parquet").to_pylist()
    kept = [(line["id"], line["text"]) for line in lines if line["kept"]]
    assert [(row["id"], row["text"]) for row in rows] == kept
    (found,) = json.loads((tmp_path / "out" / "funnel.json").read_bytes())
    assert {name: row["documents"] for name, row in found["reasons"].items()} == reasons
    assert {step["step"]: step["documents"] for step in found["funnel"]}["privacy"] == len(kept)


def measured(folder: Path, name: str, *changes: str) -> dict[str, Any]:
    return filter.measure(folder, profiles.with_thresholds(profiles.load(name), changes))


def test_a_looser_threshold_keeps_more(annotations: Path) -> None:
    kept = [measured(annotations, "domain", f"num_letters.min={n}")["kept/documents"] for n in (100, 500, 1_500, 1e6)]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[1] > kept[2] > kept[3] == 0


def test_mistakes_are_one_line(annotations: Path, tmp_path: Path) -> None:
    with pytest.raises(console.UserError, match="no annotations"):
        measured(tmp_path, "domain")
    (tmp_path / "own.yaml").write_text("words: {bad: bad.txt}\nrules: {words_bad_hits: {max: 0}}\n")
    (tmp_path / "bad.txt").write_text("カスバカ\n", encoding="utf-8")
    with pytest.raises(console.UserError, match=r"without the word list .*bad.txt"):
        measured(annotations, str(tmp_path / "own.yaml"))
    (tmp_path / "plan.json").write_bytes((annotations / "plan.json").read_bytes())
    (tmp_path / "annotations").mkdir()
    with pytest.raises(console.UserError, match="not complete"):
        measured(tmp_path, "domain")


def test_annotations_of_another_source_are_not_overwritten(source: str, tmp_path: Path) -> None:
    kept, other = tmp_path / "kept", tmp_path / "b.warc.gz"
    assert annotate.main(["--source", source, "--out", str(kept), "--workers", "1"]) == 0
    before = {path.name: path.read_bytes() for path in (kept / "annotations").iterdir()}
    other.write_bytes(web.member(web.page(1)))
    with pytest.raises(console.UserError, match="was annotated from another"):
        annotate.main(["--source", f"warc:{other}", "--out", str(kept), "--workers", "1"])
    assert {path.name: path.read_bytes() for path in (kept / "annotations").iterdir()} == before


def test_a_threshold_sweep_is_a_sweep(annotations: Path, tmp_path: Path) -> None:
    """A W&B definition as sweeps/thresholds.yaml, served offline: a run a threshold, each with its yield."""
    text = (ROOT / "sweeps" / "thresholds.yaml").read_text(encoding="utf-8")
    head = text[: text.index("  max_sentence_length.max")].replace("out/crawl/annotations", str(annotations))
    head = head.replace("web_swallow_v1", "domain")
    (tmp_path / "sweep.yaml").write_text(head + "  num_letters.min:\n    values: [150, 900]\n", encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "gacha", "run", str(tmp_path / "sweep.yaml")]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, timeout=100)
    from gacha import runs

    read: Callable[[str | Path], list[Any]] = runs.read
    found = {int(run.config["num_letters.min"]): run for run in read(tmp_path)}
    assert {run.status for run in found.values()} == {"ok"}
    for limit in (150, 900):
        wanted = measured(annotations, "domain", f"num_letters.min={limit}")
        assert found[limit].summary["kept/documents"] == wanted["kept/documents"] > 0
    assert found[150].summary["kept/documents"] > found[900].summary["kept/documents"]
