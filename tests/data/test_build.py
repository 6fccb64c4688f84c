"""`python -m data build`, as a user runs it: sources, shards, reuse, and one line for every mistake."""

import bz2
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece as spm

import console
from data import build, inquiries, shards

ROOT = Path(__file__).parents[2]
WORDS = [
    "お問い合わせ",
    "注文番号",
    "株式会社",
    "納期",
    "請求書",
    "ありがとうございます",
    "本日",
    "確認",
    "いたします",
    "送料",
    "税込",
    "円",
    "です",
    "の",
    "を",
    "は",
]


def texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(rng.choices([*WORDS, "\n", "①", str(rng.randint(0, 99))], k=rng.randint(5, 60))) + "。"
        for _ in range(n)
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """300 documents as JSON lines, one of them blank."""
    path = tmp_path / "corpus.jsonl"
    rows = [json.dumps({"id": f"d{i}", "text": text}, ensure_ascii=False) for i, text in enumerate(texts(300))]
    path.write_text("\n".join([*rows, '{"id": "blank", "text": " \\n"}']) + "\n", encoding="utf-8")
    return path


def run(source: str, out: Path, **flags: Any) -> dict[str, Any]:
    """The manifest of a small build."""
    defaults: dict[str, Any] = {"vocab_size": 420, "val_fraction": 0.1, "baseline_tokens": 0}
    return build.build(build.BuildConfig(source=source, out=out, **{**defaults, **flags}))


def cli(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m data ...` in a process of its own, as a user has it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "data", *argv]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


def mistake(source: str, out: Path, **flags: Any) -> str:
    """What the one line says; nothing of the output folder may be left."""
    with pytest.raises(console.UserError) as caught:
        run(source, out, **flags)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not out.with_name(f".{out.name}.part").exists()
    return str(caught.value)


def test_shards_hold_every_document_in_order_between_its_control_tokens(corpus: Path, tmp_path: Path) -> None:
    """Tokens decode to the normalised documents of each split; the manifest counts what is there."""
    manifest = run(f"jsonl:{corpus}", tmp_path / "out", shard_tokens=3000)
    assert manifest == shards.verify(tmp_path / "out", full=True)
    processor = spm.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer" / "tokenizer.model"))
    token_bytes = np.load(tmp_path / "out" / "token_bytes.npy")
    rows = pq.read_table([tmp_path / "out" / part["file"] for part in manifest["documents"]]).to_pylist()
    assert [row["id"] for row in rows] == [f"d{i}" for i in range(300)]
    assert manifest["skipped_blank"] == 1
    assert len(manifest["splits"]["train"]["shards"]) > 1
    for split in ("train", "val"):
        counts, stored = manifest["splits"][split], [row["text"] for row in rows if row["split"] == split]
        decoded, summed = [], 0
        for tokens, starts in shards.open_split(tmp_path / "out", manifest, split):
            assert tokens.dtype == np.dtype("<u2") == np.dtype(manifest["dtype"])
            assert starts[0] == 0 and starts[-1] == len(tokens)
            summed += int(token_bytes[tokens].sum())
            for begin, end in itertools.pairwise(starts):
                assert tokens[begin] == 1 and tokens[end - 1] == 2
                decoded.append(processor.decode(tokens[begin + 1 : end - 1].tolist()))
        assert decoded == stored and "①" not in "".join(stored)
        assert counts["documents"] == len(stored) == sum(shard["documents"] for shard in counts["shards"])
        assert counts["bytes"] == summed == sum(len(text.encode()) for text in stored)
        assert counts["characters"] == sum(map(len, stored))
        assert counts["tokens"] == sum(shard["tokens"] for shard in counts["shards"])
    assert 10 <= manifest["splits"]["val"]["documents"] <= 60


def test_the_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    """Shuffled, and with duplicates: the same texts are held out."""
    held = []
    for name, lines in (("a", texts(200)), ("b", sorted(texts(200)) + texts(200)[:50])):
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
        run(f"jsonl:{source}", tmp_path / name)
        rows = pq.read_table(tmp_path / name / "documents-00000.parquet").to_pylist()
        held.append({row["text"] for row in rows if row["split"] == "val"})
        assert not held[-1] & {row["text"] for row in rows if row["split"] == "train"}
    assert held[0] == held[1]


def test_same_input_same_bits_whatever_the_path_and_container(corpus: Path, tmp_path: Path) -> None:
    """jsonl, gz, zst, bz2, parquet, hf and files give one fingerprint; fewer documents another."""
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    raw = corpus.read_bytes()
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "x.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "x.jsonl.zst").write_bytes(pa.compress(raw, "zstd").to_pybytes())
    (tmp_path / "x.jsonl.bz2").write_bytes(bz2.compress(raw))
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / "x.parquet", row_group_size=40)
    (tmp_path / "texts").mkdir()
    for i, row in enumerate(rows):
        (tmp_path / "texts" / f"{i:04}.txt").write_text(row["text"], encoding="utf-8")
    sources = [f"jsonl:{corpus}", f"jsonl:{tmp_path}/g/*.gz", f"jsonl:{tmp_path}/x.jsonl.zst"]
    sources += [f"jsonl:{tmp_path}/x.jsonl.bz2", f"parquet:{tmp_path}/hub/*.parquet", f"hf:{tmp_path}/hub"]
    sources += [f"files:{tmp_path}/texts/**/*.txt"]
    found = {s: run(s, tmp_path / f"out{i}", baseline_tokens=9000)["fingerprint"] for i, s in enumerate(sources)}
    assert len(set(found.values())) == 1, found
    assert run(f"jsonl:{corpus}", tmp_path / "less", max_documents=250)["fingerprint"] not in found.values()


def test_inquiries_keep_their_facts(tmp_path: Path) -> None:
    """The embedded corpus: facts travel with their text, the seed decides the bits."""
    first = run("inquiries", tmp_path / "a", documents=150, vocab_size=1500, seed=3)
    rows = pq.read_table(tmp_path / "a" / "documents-00000.parquet").to_pylist()
    assert len(rows) == 150
    for row, document in zip(rows, inquiries.documents(150, 3), strict=True):
        facts = json.loads(row["facts"])
        assert facts.pop("kind") == document.kind and list(facts) == list(document.facts)
        before = [value for value in document.facts.values() if isinstance(value, str) and value in document.text]
        assert before and [value for value in before if value not in facts.values()] == []
        assert [value for value in before if value not in row["text"]] == []
    assert (
        run("inquiries", tmp_path / "b", documents=150, vocab_size=1500, seed=3)["fingerprint"] == first["fingerprint"]
    )
    assert (
        run("inquiries", tmp_path / "c", documents=150, vocab_size=1500, seed=4)["fingerprint"] != first["fingerprint"]
    )


def test_command_line_prints_json_says_already_built_and_refuses_another_build(corpus: Path, tmp_path: Path) -> None:
    argv = ["build", "--source", f"jsonl:{corpus.name}", "--out", "out", "--vocab_size", "420", "--val_fraction", "0.1"]
    first = cli(*argv, "--json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["documents"] == 300 and 0 < result["baseline_bpb"] < 8
    again = cli(*argv, "--json", cwd=tmp_path)
    assert (again.returncode, json.loads(again.stdout)) == (0, result)
    assert "already built" in again.stderr
    other = cli(*argv[:-1], "0.2", cwd=tmp_path)
    assert other.returncode == 2 and "val_fraction 0.1 then, 0.2 now" in other.stderr
    with corpus.open("a") as file:
        file.write('{"text": "もう一件"}\n')
    changed = cli(*argv, cwd=tmp_path)
    assert changed.returncode == 2 and "corpus.jsonl" in changed.stderr and changed.stderr.count("\n") == 1
    scored = cli("ngram", "out", "--order", "5", "--json", cwd=tmp_path)
    assert round(json.loads(scored.stdout)["val_bpb"], 4) == result["baseline_bpb"]


def test_help_is_quick_and_unknown_commands_are_one_line(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert "build" in cli("--help", cwd=tmp_path).stdout
    assert time.monotonic() - begun < 1
    for argv in (["bild"], ["build", "--sorce", "x"], ["ngram", "nowhere"]):
        failed = cli(*argv, cwd=tmp_path)
        assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


def test_a_tokenizer_can_be_reused(corpus: Path, tmp_path: Path) -> None:
    first = run(f"jsonl:{corpus}", tmp_path / "a")
    second = run(f"jsonl:{corpus}", tmp_path / "b", tokenizer=tmp_path / "a", vocab_size=8000, max_documents=200)
    assert second["tokenizer"] == first["tokenizer"] and second["vocab_size"] == 420
    assert "tokenizer.model is missing" in mistake(f"jsonl:{corpus}", tmp_path / "c", tokenizer=tmp_path)


def test_mistakes_in_the_source_name_the_place(corpus: Path, tmp_path: Path) -> None:
    """Each is one line; the output folder and its part are gone."""
    good, packed = b'{"text": "a"}\n', gzip.compress(corpus.read_bytes())
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "c.parquet")
    files = {
        "files:l.txt": (b"abc\xe3", "l.txt: not UTF-8 at byte 3"),
        "jsonl:u.jsonl": (good + good[:-3] + b"\xff", "u.jsonl:2: not UTF-8 at byte 25"),
        "jsonl:j.jsonl": (good + b"{", "j.jsonl:2: not JSON"),
        "jsonl:k.jsonl": (good + b'{"body": 1, "x": 2}', "k.jsonl:2: no key 'text'; its keys: body, x"),
        "jsonl:n.jsonl": (b'{"text": 3}', "n.jsonl:1: 'text' holds int"),
        "jsonl:a.jsonl": (b"[1]", "a.jsonl:1: a JSON list"),
        "jsonl:s.jsonl": (b'{"text": "\\ud800"}', "'s.jsonl:1': character 0 is half a surrogate"),
        "jsonl:e.jsonl": (b"", "empty corpus, no document"),
        "jsonl:b.jsonl": (b'{"text": " \\n"}', "empty corpus, 1 blank"),
        "jsonl:one.jsonl": (good, "no val documents: all 1 fell to train"),
        "jsonl:t.jsonl.gz": (packed[:-200], "t.jsonl.gz: cut short"),
        "jsonl:x.jsonl.gz": (good, "x.jsonl.gz: cut short or damaged"),
        "jsonl:x.jsonl.zst": (good, "x.jsonl.zst: cut short or damaged"),
        "parquet:p.parquet": (good, "p.parquet: not a Parquet file"),
    }
    expected = {
        f"parquet:{tmp_path}/c.parquet": "c.parquet: no column 'text': choose --text_key from body",
        f"files:{tmp_path}/none/*.txt": "no file there",
        f"files:{tmp_path}": "it is a folder",
        "warc:x.warc.gz": "no file there",
        "web:x": "unknown source",
    }
    for source, (raw, says) in files.items():
        scheme, name = source.split(":")
        (tmp_path / name).write_bytes(raw)
        expected[f"{scheme}:{tmp_path / name}"] = says
    for source, says in expected.items():
        assert says in mistake(source, tmp_path / "out"), source
    assert "no train documents" in mistake(f"jsonl:{tmp_path}/one.jsonl", tmp_path / "out", val_fraction=0.9999999)
    assert "too high" in mistake(f"jsonl:{corpus}", tmp_path / "out", vocab_size=60_000)
    (tmp_path / "hub").mkdir()
    assert "hf:" in mistake(f"hf:{tmp_path}/hub", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep.txt").write_text("x")
    with pytest.raises(console.UserError, match="no shards folder"):
        run(f"jsonl:{corpus}", tmp_path / "mine")
    assert (tmp_path / "mine" / "keep.txt").exists()


def test_damaged_shards_are_named(corpus: Path, tmp_path: Path) -> None:
    """Cut short, missing, of another format or changed in place: found before a run is paid for."""
    out = tmp_path / "out"
    manifest = run(f"jsonl:{corpus}", out)
    path = out / "train-00000.tokens.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    tokens = manifest["splits"]["train"]["tokens"]
    says = rf"cut short: .*train-00000.tokens.npy has {tokens - 50} tokens.*{tokens}"
    with pytest.raises(console.UserError, match=says):
        shards.load(out)
    path.write_bytes(whole[:-2] + b"\x07\x00")
    shards.load(out)
    with pytest.raises(console.UserError, match="shard changed"):
        shards.verify(out, full=True)
    path.write_bytes(whole[:50])
    with pytest.raises(console.UserError, match=r"not an [.]npy file"):
        shards.load(out)
    path.unlink()
    with pytest.raises(console.UserError, match="shard missing"):
        shards.load(out)
    path.write_bytes(whole)
    (out / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(console.UserError, match="format 99"):
        shards.load(out)


HALF = """
import pathlib, sys, time
from data import shards
with shards.part_folder(pathlib.Path(sys.argv[1])) as part:
    (part / "train-00000.tokens.npy").write_bytes(b"half")
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_killed_build_leaves_only_its_part_and_the_next_one_clears_it(corpus: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a build; while it lives, a second build to the same folder is refused."""
    out, part = tmp_path / "out", tmp_path / ".out.part"
    holder = subprocess.Popen([sys.executable, "-c", HALF, str(out)], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"in\n"
    with pytest.raises(console.UserError, match="another build is writing"):
        run(f"jsonl:{corpus}", out)
    holder.kill()
    holder.communicate()
    assert not out.exists() and (part / "train-00000.tokens.npy").read_bytes() == b"half"
    run(f"jsonl:{corpus}", out)
    shards.verify(out, full=True)
    assert not part.exists() and not (out / ".lock").exists()


FULL = """
import pathlib, subprocess, sys
small = pathlib.Path(sys.argv[2]); small.mkdir()
mount = ["mount", "-t", "tmpfs", "-o", "size=" + sys.argv[3], "tmpfs", small]
if subprocess.run(mount, capture_output=True).returncode:
    sys.exit(77)
build = [sys.executable, "-m", "data", "build", "--source", "jsonl:" + sys.argv[1], "--out", small / "out"]
build += ["--vocab_size", "420", "--val_fraction", "0.1"]
done = subprocess.run(build, capture_output=True, text=True)
print(done.returncode, sorted(p.name for p in small.iterdir()), done.stderr.strip().splitlines()[-1])
"""


@pytest.mark.parametrize("size", ["8k", "48k", "80k"])
def test_a_full_disk_is_one_line_and_leaves_nothing(corpus: Path, tmp_path: Path, size: str) -> None:
    """A small tmpfs in a mount namespace of its own, full while spooling, at the tokenizer, in the shards."""
    argv = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", FULL]
    argv += [str(corpus), str(tmp_path / "small"), size]
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare on this machine")
    if done.returncode in (1, 77) and not done.stdout:
        pytest.skip("this machine lets no user mount a tmpfs")
    assert done.stdout.startswith("2 [] error: No space left on device"), done.stdout + done.stderr
