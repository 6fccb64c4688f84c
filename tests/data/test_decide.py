"""`python -m data decide`: a line for every page, in the source's order, whatever is broken, and one for a mistake."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import console
from data import annotate, decide
from tests.data import web

ROOT = Path(__file__).parents[2]
Line = dict[str, Any]
Decide = Callable[..., list[Line]]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Decide:
    """The lines that `decide` prints for a source: lines(source, *flags)."""

    def run(source: str, *flags: str) -> list[Line]:
        assert decide.main(["--source", source, "--workers", "1", *flags]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def archive(path: Path, *records: bytes) -> str:
    """The records as gzip members of a WARC file; its name as a source."""
    path.write_bytes(b"".join(map(web.member, records)))
    return f"warc:{path}"


def test_a_line_for_every_page_in_order_with_a_reason_for_the_dropped(lines: Decide, tmp_path: Path) -> None:
    """As the contract has it: null keeps, a rule's name drops, "dedup" names the first of the copies."""
    english = "<p>" + "This page is written in another language, and long enough to be sure of it. " * 5
    request = web.record("http://example.jp/1.html", b"GET / HTTP/1.1\r\n\r\n", kind="request")
    source = archive(
        tmp_path / "a.warc.gz",
        web.page(1),
        request,
        web.record("http://en.example/", english.encode()),
        web.page(2, status="404 Not Found"),
        web.record("http://short.example/", web.html("これは短い文です。いろいろな理由で捨てます。").encode()),
        web.page(3),
        web.record("http://twin.example/", web.html(web.prose(1) + "\n以上。").encode()),
        web.record("http://pdf.example/", b"%PDF-1.4", headers="Content-Type: application/pdf"),
    )
    found = lines(source)
    names = ["example.jp/1.html", "en.example/", "example.jp/2.html", "short.example/"]
    names += ["example.jp/3.html", "twin.example/", "pdf.example/"]
    assert [line["url"].removeprefix("http://") for line in found] == names
    reasons = [None, "language", "http_status", "num_letters", None, "dedup", "not_html"]
    assert [line["reason"] for line in found] == reasons
    assert [line["kept"] for line in found] == [reason is None for reason in reasons]
    assert all({"id", "url", "lang", "kept", "reason", "text"} <= set(line) for line in found)
    assert [line["lang"] for line in found] == ["ja", "en", "und", "ja", "ja", "ja", "und"]
    assert found[0]["text"] == web.prose(1) and found[4]["text"] == web.prose(3)
    assert found[5]["duplicate_of"] == found[0]["id"] and found[5]["value"] > 0.9
    assert found[3]["value"] < found[3]["threshold"] == 100


def damaged(kind: int, rng: random.Random) -> bytes:
    """One thing that is no good record, as it would be stored between gzip members."""
    page = web.page(rng.randrange(10**6, 10**7))
    stored = web.member(page)
    flipped = bytearray(stored)
    for _ in range(5):
        flipped[rng.randrange(12, len(stored))] ^= 0xFF
    broken: list[Callable[[], bytes]] = [
        lambda: stored[: rng.randrange(4, len(stored) - 1)],
        lambda: stored[rng.randrange(1, len(stored) - 1) :],
        lambda: bytes(flipped),
        lambda: rng.randbytes(rng.choice([1, 20, 40_000])),
        lambda: b"\0" * 5_000,
        lambda: b"\x1f\x8b\x08" * 700,
        lambda: b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + rng.randbytes(500),
        lambda: gzip.compress(b"<html>no record</html>"),
        *(
            lambda length=length: web.member(web.page(4, length=length))
            for length in (0, 10, len(page) // 2, len(page) + 50, 10**12, 10**20, -5, "abc", "")
        ),
        lambda: web.member(page[: page.index(b"\r\n\r\n")]),
        lambda: web.member(page.replace(b"WARC/1.0\r\n", b"WARC/1.0\r\nX: " + b"a" * 200_000 + b"\r\n")),
        lambda: web.member(web.record("http://h.example/", b"x", headers="X: " + "b" * 100_000)),
        lambda: web.member(web.record("http://s.example/", b"x", status="abc")),
        lambda: web.member(web.record("http://big.example/", b"<html>" + b" " * (20 << 20))),
        lambda: web.member(
            web.record(
                "http://bomb.example/",
                gzip.compress(gzip.compress(b" " * (20 << 20))),
                headers="Content-Type: text/html\r\nContent-Encoding: gzip, gzip",
            )
        ),
        lambda: web.member(
            web.record(
                "http://chunk.example/",
                b"ff\r\n<html>cut",
                headers="Content-Type: text/html\r\nTransfer-Encoding: chunked",
            )
        ),
        lambda: web.member(web.record("http://deep.example/", b"<html><body>" + b"<div class=nav>" * 50_000)),
        lambda: web.member(
            web.record("http://wide.example/", b"<html><body " + b" ".join(b"a%d=x" % i for i in range(30_000)) + b">x")
        ),
    ]
    return broken[kind]()


KINDS = 25


def test_damage_costs_no_record_but_the_damaged_and_every_one_is_told(lines: Decide, tmp_path: Path) -> None:
    """A file for each kind of damage, with good records before and behind it, and all of them in one more file."""
    rng = random.Random(3)
    good: dict[str, set[str]] = {}
    seam: list[bytes] = []
    for kind in range(KINDS):
        seeds = range(10 * kind, 10 * kind + 3)
        stored = [web.member(web.page(seed)) for seed in seeds]
        bad = damaged(kind, rng)
        name = f"{kind:02d}.warc.gz"
        (tmp_path / name).write_bytes(stored[0] + bad + stored[1] + stored[2])
        good[name] = {web.mark(seed) for seed in seeds}
        seam += [damaged(kind, rng), web.member(web.page(10_000 + kind))]
    (tmp_path / "all.warc.gz").write_bytes(b"".join(seam))
    good["all.warc.gz"] = {web.mark(10_000 + kind) for kind in range(KINDS)}
    (tmp_path / "empty.warc.gz").touch()
    (tmp_path / "no.warc.gz").write_bytes(rng.randbytes(3_000))
    (tmp_path / "folder.warc.gz").mkdir()

    found = lines(f"warc:{tmp_path}/*.warc.gz")
    by_file: dict[str, list[Line]] = {}
    for line in found:
        by_file.setdefault(line["id"].rpartition(":")[0], []).append(line)
    for name, marks in good.items():
        kept = [line["text"] for line in by_file[name] if line["kept"]]
        assert {mark for mark in marks if any(mark in text for text in kept)} == marks, name
        assert len(kept) == len(marks), name
        dropped = [line["reason"] for line in by_file[name] if not line["kept"]]
        assert len(dropped) >= (1 if name != "all.warc.gz" else KINDS // 2), name
        assert None not in dropped
    assert [line["reason"] for line in by_file["empty.warc.gz"]] == ["cut_short"]
    assert [line["reason"] for line in by_file["no.warc.gz"]] == ["damaged"]


def test_a_file_cut_anywhere_keeps_what_stands_before_the_cut(lines: Decide, tmp_path: Path) -> None:
    stored = [web.member(web.page(seed)) for seed in range(5)]
    rng, whole = random.Random(1), {}
    for number in range(20):
        at = rng.randrange(1, sum(map(len, stored)))
        (tmp_path / f"{number}.warc.gz").write_bytes(b"".join(stored)[:at])
        whole[f"{number}.warc.gz"] = sum(sum(map(len, stored[: i + 1])) <= at for i in range(5))
    # Every file holds the same pages, of which a profile would keep one: none of them is a decision here.
    found = lines(f"warc:{tmp_path}/*.warc.gz", "--profile", "none")
    for name, count in whole.items():
        of_file = [line for line in found if line["id"].startswith(f"{name}:")]
        assert [line["text"] for line in of_file[:count]] == [web.prose(seed) for seed in range(count)]
        assert [line["reason"] for line in of_file[count:]] == ["cut_short"], name


def test_a_wrong_charset_costs_no_page(lines: Decide, tmp_path: Path) -> None:
    """Python codecs that are none for text, encodings that read any byte, nonsense, nothing."""
    declared = ["utf-16", "utf-7", "rot13", "unicode_escape", "iso-8859-1", "windows-1252", "あ", "x" * 3_000, ""]
    records: list[bytes] = []
    for name in declared:
        for codec in ("utf_8", "cp932", "euc_jp", "iso2022_jp"):
            body = web.html(web.prose(len(records)), f'<meta charset="{name}">').encode(codec)
            records.append(web.record(f"http://{codec}.example/", body, f"Content-Type: text/html; charset={name}"))
    found = lines(archive(tmp_path / "a.warc.gz", *records))
    assert [line["text"] for line in found] == [web.prose(seed) for seed in range(len(records))]


def test_a_url_that_is_none_costs_no_page(lines: Decide, tmp_path: Path) -> None:
    urls = [
        "http://[::1",
        "http://]",
        "",
        "日本語",
        "http://a.jp:99999999/",
        "http://\udcff.jp/",
        "javascript:alert(1)",
    ]
    records = (web.record(url, web.html(web.prose(seed)).encode()) for seed, url in enumerate(urls))
    found = lines(archive(tmp_path / "a.warc.gz", *records))
    assert [line["text"] for line in found if line["kept"]] == [web.prose(seed) for seed in range(len(urls))]


def test_names_of_headers_in_lower_case(lines: Decide, tmp_path: Path) -> None:
    source = archive(tmp_path / "a.warc.gz", web.page(1).replace(b"WARC-Type", b"warc-type"))
    assert [line["kept"] for line in lines(source)] == [True]


def test_a_record_without_a_type_is_told(lines: Decide, tmp_path: Path) -> None:
    source = archive(tmp_path / "a.warc.gz", web.page(1).replace(b"WARC-Type: response\r\n", b""), web.page(2))
    assert [line["reason"] for line in lines(source)] == ["damaged", None]


def test_text_in_front_of_the_first_member(lines: Decide, tmp_path: Path) -> None:
    (tmp_path / "a.warc.gz").write_bytes(b"WARC/1.0\r\n" + web.member(web.page(1)) + web.member(web.page(2)))
    assert [line["reason"] for line in lines(f"warc:{tmp_path}/a.warc.gz")] == ["damaged", None, None]


def test_one_file_in_many_tasks_gives_the_same_lines(
    lines: Decide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere, also inside records and damage, and with copies on either side of a cut; by two workers too."""
    texts = [web.page(seed) for seed in (1, 2, 3, 1, 4, 5, 6, 2, 7, 8, 9, 10)]
    stored = [web.member(text) for text in texts]
    stored[5] = stored[5][:-40]
    stored.insert(8, b"garbage" * 200)
    (tmp_path / "a.warc.gz").write_bytes(b"".join(stored))
    source = f"warc:{tmp_path}/a.warc.gz"
    whole = lines(source)
    assert [line["reason"] for line in whole].count("dedup") == 2
    monkeypatch.setattr(annotate, "SLICE_BYTES", 1_500)
    assert len(annotate.tasks(source, whole=False)) > 7
    assert lines(source) == whole
    assert lines(source, "--workers", "2") == whole
    assert lines(source, "--max_documents", "5", "--profile", "none") == [
        line | {"kept": line["kept"] or line["reason"] == "dedup", "reason": None if line["text"] else line["reason"]}
        for line in ({key: line[key] for key in ("id", "url", "lang", "kept", "reason", "text")} for line in whole[:5])
    ]


def test_wet_and_json_lines(lines: Decide, tmp_path: Path) -> None:
    records = [web.record(f"http://{n}.example/", web.prose(n).encode(), kind="conversion") for n in range(3)]
    archive(tmp_path / "a.wet.gz", *records)
    found = lines(f"wet:{tmp_path}/a.wet.gz")
    assert [(line["url"], line["text"]) for line in found] == [(f"http://{n}.example/", web.prose(n)) for n in range(3)]
    texts = [web.prose(1), "short", "", "\ud800" + web.prose(2), "\0" * 50, web.prose(1)]
    rows = [json.dumps({"name": f"d{i}", "body": text}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    flags = ("--text_key", "body", "--id_key", "name", "--profile", "domain")
    found = lines(f"jsonl:{tmp_path}/a.jsonl", *flags)
    assert [line["id"] for line in found] == [f"d{i}" for i in range(6)]
    assert [line["reason"] for line in found] == [None, "language", "no_text", None, "language", "dedup"]
    # Without a profile documents are taken as they are.
    found = lines(f"jsonl:{tmp_path}/a.jsonl", *flags[:-2])
    assert [line["reason"] for line in found] == [None, None, "no_text", None, None, None]


OWN = """\
about: ten lines of one's own
language: {code: ja, min_probability: 0.2}
rules:
  num_letters: {min: 50}
  max_sentence_length: {max: 200}
  words_bad_hits: {max: 0}
words: {bad: bad.txt}
dedup: {jaccard: 0.8}
privacy: [email]
edits: [footer]
"""


def test_a_profile_of_ones_own_and_thresholds_as_flags(lines: Decide, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    (tmp_path / "bad.txt").write_text("カスバカ\n", encoding="utf-8")
    told = web.prose(3) + "\n連絡は a@example.net か03-4567-8912まで。"
    pages = [web.prose(1), web.prose(2) + "\nカスバカとは言わない。", told]
    records = [web.record(f"http://{n}.example/", web.html(text).encode()) for n, text in enumerate(pages)]
    source = archive(tmp_path / "a.warc.gz", *records)
    own = ("--profile", str(tmp_path / "own.yaml"))
    found = lines(source, *own)
    assert [line["reason"] for line in found] == [None, "words_bad_hits", None]
    assert "a@example.net" not in found[2]["text"] and "03-4567-8912" in found[2]["text"]
    for flags in (("--max_sentence_length.max", "40"), ("--thresholds", "max_sentence_length.max=40")):
        assert {line["reason"] for line in lines(source, *own, *flags)} == {"max_sentence_length"}


def test_annotations_are_kept_and_serve_the_same_source_alone(lines: Decide, tmp_path: Path) -> None:
    source, kept = archive(tmp_path / "a.warc.gz", web.page(1), web.page(2)), str(tmp_path / "kept")
    first = lines(source, "--annotations", kept)
    before = {path: path.stat().st_mtime_ns for path in Path(kept, "annotations").iterdir()}
    assert lines(source, "--annotations", kept) == first
    assert {path: path.stat().st_mtime_ns for path in Path(kept, "annotations").iterdir()} == before
    other = archive(tmp_path / "b.warc.gz", web.page(3))
    with pytest.raises(console.UserError, match="was annotated from another source"):
        lines(other, "--annotations", kept)
    with pytest.raises(console.UserError, match="holds no annotations"):
        lines(other, "--annotations", str(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in Path(kept, "annotations").iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--profile", "web_swallow"), "did you mean web_swallow_v1"),
        (("--profile", "nothing.yaml"), "nothing.yaml"),
        (("--max_sentense_length.max", "3"), "did you mean max_sentence_length"),
        (("--max_sentence_length.max", "abc"), "'abc' is no number"),
        (("--thresholds", "foo"), "threshold foo"),
        (("--source", "warc:/nowhere/*.gz"), "no file there"),
        (("--source", "warcs:a"), "unknown source"),
        (("--nonsense", "1"), "--nonsense"),
        pytest.param(
            ("--max_documents", "-1"),
            "max_documents",
        ),
    ],
)
def test_a_mistake_is_one_line(lines: Decide, tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    source = archive(tmp_path / "a.warc.gz", web.page(1))
    with pytest.raises(console.UserError) as caught:
        lines(source, *flags)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def cli(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m data decide ...` in a process of its own, as a user has it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "data", "decide", *argv]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_what_a_worker_cannot_read_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n')
    done = cli("--source", "jsonl:*.jsonl", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")
    assert "a.jsonl:2: not JSON" in done.stderr and "Traceback" not in done.stderr


def test_head_may_close_the_pipe(tmp_path: Path) -> None:
    source = archive(
        tmp_path / "a.warc.gz", *(web.page(seed, headers="Content-Type: text/html") for seed in range(120))
    )
    command = [sys.executable, "-m", "data", "decide", "--source", source, "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout and child.stderr
        assert json.loads(child.stdout.readline())["kept"]
        child.stdout.close()
        told = child.stderr.read().decode()
    assert child.returncode == 0 and "Traceback" not in told
