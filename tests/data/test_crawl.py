"""A crawl built from end to end: killed and taken up again, private, mixed, recorded, and nothing left behind."""

import collections
import contextlib
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sentencepiece as spm

import console
from data import build, shards
from tests.data import web

ROOT = Path(__file__).parents[2]
Spawner = Callable[..., subprocess.Popen[str]]
Descendants = Callable[[int], dict[int, str]]
PERSONAL = {
    "taro.yamada@example-shop.co.jp": "連絡先はtaro.yamada@example-shop.co.jpまで。",
    "03-4567-8912": "電話番号は03-4567-8912です。",
    "123456789018": "マイナンバーは123456789018です。",
    "4111 1111 1111 1111": "カード番号は4111 1111 1111 1111です。",
    "160-0022": "住所は〒160-0022東京都新宿区です。",
    "133.11.93.5": "接続元のIPアドレスは133.11.93.5でした。",
}


def write(path: Path, texts: list[str]) -> None:
    """A WARC file of these texts as pages."""
    name = path.name.partition(".")[0]
    records = (web.record(f"http://{name}.example/{n}", web.html(text).encode()) for n, text in enumerate(texts))
    path.write_bytes(b"".join(map(web.member, records)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three archives of 40 pages; some are copies, some too short, and in some stand personal data of every kind."""
    folder = tmp_path_factory.mktemp("crawl")
    for number in range(3):
        texts = [web.prose(100 * number + n, 20) for n in range(40)]
        texts[7], texts[8] = "".join(list(PERSONAL.values())[:2]), texts[3]
        for n in range(10, 40, 5):
            texts[n] = "\n".join([*PERSONAL.values(), texts[n]])
        texts[11] = texts[10] + "\n以上。"
        texts[20 : 20 + number] = [web.prose(13, 20)] * number
        texts[30] = ("\n".join(PERSONAL.values()) + "\n") * 20
        write(folder / f"{number}.warc.gz", texts)
    return f"warc:{folder}/*.warc.gz"


SIZES = ("--vocab_size=700", "--val_fraction=0.1", "--baseline_tokens=0", "--workers=1")


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file but those that tell the time that was spent."""
    timed = ("manifest.json", "funnel.json", "report.html")
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in timed]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def recorded(source: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A build that nothing disturbed, and the folder of its offline W&B run."""
    import wandb

    home = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as environment, contextlib.redirect_stdout(io.StringIO()):
        environment.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            environment.setenv(name, str(home / "runs"))
        (home / "runs").mkdir()
        wandb.teardown()  # it reads the environment once
        try:
            assert not build.main(["--source", source, "--out", str(home / "out"), *SIZES])
        finally:
            wandb.teardown()
    assert sorted(path.name for path in home.iterdir()) == ["out", "runs"]
    return home / "out", home / "runs"


def killed(
    spawn: Spawner, source: str, out: Path, at: str, how: signal.Signals, workers: int = 1
) -> subprocess.Popen[str]:
    """A build that was sent a signal when the file `at` beside `out` was there, and has ended."""
    command = [sys.executable, "-m", "data", "build", "--source", source, f"--out={out}", *SIZES]
    child = spawn([*command, f"--workers={workers}"], WANDB_MODE="disabled")
    while not list(out.parent.glob(at)):
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.002)
    child.send_signal(how)
    child.wait(60)
    return child


@pytest.mark.parametrize(
    ("at", "how", "code"),
    [
        (".out.work/0/annotated/annotations/00001.parquet", signal.SIGKILL, -9),
        (".out.work/0/decisions/00001.parquet", signal.SIGTERM, 143),
        (".out.work/0/verified/*.dups", signal.SIGKILL, -9),
        (".out.part", signal.SIGTERM, 143),
    ],
)
def test_a_build_killed_anywhere_goes_on_to_the_same_bytes(
    spawn: Spawner, source: str, recorded: tuple[Path, Path], tmp_path: Path, at: str, how: signal.Signals, code: int
) -> None:
    out = tmp_path / "here" / "out"
    out.parent.mkdir()
    child = killed(spawn, source, out, at, how)
    assert child.returncode == code and (how == signal.SIGTERM or not out.exists())  # it may come at the very end
    if how == signal.SIGTERM:
        assert "Traceback" not in child.communicate()[1]
    assert build.main(["--source", source, "--out", str(out), *SIZES]) == 0
    assert contents(out) == contents(recorded[0])
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_build_killed_after_its_last_step_leaves_nothing_either(
    source: str, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "here" / "out"
    (out.parent / ".out.work" / "0" / "documents").mkdir(parents=True)
    out.symlink_to(recorded[0])
    assert build.main(["--source", source, "--out", str(out), *SIZES]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_nothing_outlives_a_killed_build(spawn: Spawner, descendants: Descendants, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": web.prose(n, 80)}) + "\n" for n in range(100))
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(rows * 40)  # a task of some seconds
    command = ["build", "--source", f"jsonl:{tmp_path}/*.jsonl", "--profile=domain", f"--out={tmp_path / 'out'}"]
    child = spawn([sys.executable, "-m", "data", *command, "--workers=2"], WANDB_MODE="disabled")
    while len(list(tmp_path.glob(".out.work/0/annotated/progress/0000?"))) < 2:
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.01)
    started = descendants(child.pid)
    assert len(started) > 3
    child.kill()
    child.wait()
    left = [pid for pid in started if pid != child.pid]
    for _ in range(50):
        left = [pid for pid in left if Path(f"/proc/{pid}").exists()]
        time.sleep(0.1 if left else 0.0)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left


def test_two_builds_of_one_folder_are_one_line(spawn: Spawner, source: str, tmp_path: Path) -> None:
    (tmp_path / ".out.work").mkdir()
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    other = spawn([sys.executable, "-c", hold, str(tmp_path / ".out.work" / ".lock")])
    assert other.stdout and other.stdout.readline() == "1\n"
    with pytest.raises(console.UserError, match=r"another build is at work in .*\.out\.work"):
        build.main(["--source", source, "--out", str(tmp_path / "out"), *SIZES])
    assert not (tmp_path / "out").exists()


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file below `folder`, the strings of a Parquet file as JSON."""
    for path in folder.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            if path.suffix == ".parquet":
                raw = json.dumps(pq.read_table(path).to_pylist(), ensure_ascii=False).encode()
            yield path.relative_to(folder).as_posix(), raw


def test_no_personal_datum_is_told_anywhere(recorded: tuple[Path, Path]) -> None:
    """Neither the corpus, nor its page, nor any table of examples, masks or differences of duplicates has one."""
    for folder in recorded:
        for name, raw in files(folder):
            for datum in (*PERSONAL, *(datum.replace(" ", "").replace("-", "") for datum in PERSONAL)):
                assert datum.encode() not in raw, (name, datum)
    (found,) = json.loads((recorded[0] / "funnel.json").read_bytes())
    assert set(found["masks"]) == {"email", "phone", "my_number", "card", "postal", "ip"}
    # Six pages of each file hold all kinds, one of them a copy or another rule's; copies of a page with them go too.
    assert found["masked_documents"] >= 3 * 4


def test_what_became_of_every_page_is_in_the_run(recorded: tuple[Path, Path]) -> None:
    from gacha import runs

    out, folder = recorded
    (run,) = runs.read(folder)
    manifest = shards.load(out)
    assert (run.status, run.job_type, run.group) == ("ok", "data", manifest["fingerprint"])
    assert "domain" in str(run.config["profiles"]) and run.summary["documents"] == 105
    tables = {
        path.relative_to(folder).as_posix().partition("media/table/")[2].rsplit("_", 2)[0]: runs.table(path)
        for path in folder.rglob("*.table.json")
        if "latest-run" not in path.parts
    }
    named = {"funnel", "reasons", "duplicates", "masks", "hosts", "rule/num_letters", "rule/avg_sentence_length"}
    assert named <= set(tables) and all(tables.values())
    steps = ["records", "read", "extract", "language", "quality", "dedup", "privacy"]
    assert [row["step"] for row in tables["funnel"]] == steps
    counts = [row["documents"] for row in tables["funnel"]]
    assert counts == sorted(counts, reverse=True) and counts[0] == 120 and counts[-1] == 105
    assert sum(row["documents"] for row in tables["reasons"]) == 120 - 105
    assert {row["host"]: row["pages"] for row in tables["hosts"]} == {f"{n}.example": 40 for n in range(3)}
    assert {row["side"] for rows in tables.values() for row in rows if "side" in row} == {"kept", "dropped"}


def test_all_tables_of_a_step_are_read_back(recorded: tuple[Path, Path]) -> None:
    from gacha import runs

    (run,) = runs.read(recorded[1])
    assert {"funnel", "reasons", "duplicates", "masks", "hosts", "rule/num_letters"} <= set(run.tables)


def test_a_mix_has_its_shares_and_no_copies_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in tokens; validation documents are in training nowhere; and a part has a profile of its own."""
    monkeypatch.chdir(tmp_path)
    general = [{"id": f"g{n}", "text": web.prose(n)} for n in range(300)]
    domain = [{"id": f"d{n}", "body": web.prose(1_000 + n)} for n in range(40)] + [{"id": "short", "body": "短い。"}]
    for name, rows in (("general", general), ("domain", domain)):
        Path(f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Path("mix.yaml").write_text(
        "sources:\n  - {source: 'jsonl:general.jsonl', weight: 0.7}\n"
        "  - {source: 'jsonl:domain.jsonl', weight: 0.3, epochs: 5, text_key: body, profile: domain}\n"
    )
    assert build.main(["--mix", "mix.yaml", "--out", "out", *SIZES]) == 0
    manifest = shards.load("out")
    processor = spm.SentencePieceProcessor(model_file="out/tokenizer/tokenizer.model")
    texts = {row["text"]: row["id"] for row in pq.read_table("out/documents-00000.parquet").to_pylist()}
    assert len(texts) == 340 and "short" not in texts.values()
    named: dict[str, list[str]] = {}
    tokens: collections.Counter[str] = collections.Counter()
    for split in ("train", "val"):
        for ids, starts in shards.open_split(Path("out"), manifest, split):
            for begin, end in itertools.pairwise(starts):
                name = texts[processor.decode(np.asarray(ids[begin + 1 : end - 1]).tolist())]
                named.setdefault(split, []).append(name)
                tokens[name[0]] += int(end - begin) if split == "train" else 0
    assert tokens["d"] / tokens.total() == pytest.approx(0.3, abs=0.02)
    assert not set(named["train"]) & set(named["val"]) and len(set(named["val"])) == len(named["val"])
    times = collections.Counter(named["train"])
    assert {n for name, n in times.items() if name[0] == "g"} == {1}
    assert {n for name, n in times.items() if name[0] == "d"} in ({3, 4}, {2, 3}, {3})
    seen: dict[str, int] = {}
    for at, name in enumerate(named["train"]):
        assert at - seen.get(name, -100) > 1
        seen[name] = at


def test_items_of_evaluation_sets_are_found_and_dropped(source: str, tmp_path: Path) -> None:
    planted = [web.prose(seed, 20).split("\n")[1] for seed in (1, 105, 220)]
    items = [{"question": text, "answer": "はい"} for text in [*planted, web.prose(9_999)]]
    (tmp_path / "eval.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    flags = ("--source", source, *SIZES, f"--eval_sets=jsonl:{tmp_path}/eval.jsonl", "--eval_keys=question")
    assert build.main([*flags, "--out", str(tmp_path / "all")]) == 0
    assert build.main([*flags, "--out", str(tmp_path / "clean"), "--drop_contaminated"]) == 0
    wanted = {"http://0.example/1", "http://1.example/5", "http://2.example/20"}
    for name, dropped in (("all", set()), ("clean", wanted - {"http://2.example/20"})):
        (found,) = json.loads((tmp_path / name / "funnel.json").read_bytes())
        urls: dict[str, Any] = {
            row["id"]: json.loads(row["facts"])["url"]
            for row in pq.read_table(tmp_path / name / "documents-00000.parquet").to_pylist()
        }
        assert {row["item"] for row in found["contamination"]} == {"eval.jsonl:1", "eval.jsonl:2"}
        assert {"http://0.example/1", "http://1.example/5"} - set(urls.values()) == dropped
        assert found["reasons"].get("contamination", {"documents": 0})["documents"] == len(dropped)
