"""Executors: the same bytes from any number of workers, nothing finished lost to a failed task, what Slurm is told."""

import dataclasses
import gzip
import hashlib
import json
import os
import random
import sys
from pathlib import Path

import pytest

import console
from data import build, crawl, slurm

FILES, PAGES = 4, 8
PEOPLE = ["館長", "係員", "漁師", "大工", "画家", "庭師", "教授", "車掌", "薬剤師", "郵便局員"]
PLACES = ["港", "倉庫", "温室", "峠の茶屋", "研究棟", "古い駅", "中庭", "市場", "展望台", "造船所"]
DEEDS = ["荷物を降ろした", "雨宿りをした", "図面を広げた", "鐘の音を聞いた", "苗を植えた", "道具を磨いた"]


def page(number: int) -> str:
    """The text of a page of its own: plain sentences without a repeated one."""
    rng = random.Random(number)
    names = ["".join(chr(rng.randrange(0x4E00, 0x4F00)) for _ in range(3)) for _ in range(24)]
    return "\n".join(
        f"{name}という{rng.choice(PEOPLE)}は{rng.choice(PLACES)}で{rng.choice(DEEDS)}そうだが、くわしいことは分からない。"
        for name in names
    )


def record(url: str, text: str) -> bytes:
    """A gzip member with the WARC record of a page."""
    body = "".join(f"<p>{line}</p>\n" for line in text.split("\n"))
    html = f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>{url}</title></head><body>{body}</body></html>'
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + html.encode()
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
    )
    return gzip.compress(head.encode() + http + b"\r\n\r\n", mtime=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four archives, so four tasks: 32 pages, of which every file's last is the first file's first again."""
    folder = tmp_path_factory.mktemp("crawl")
    for number in range(FILES):
        texts = [page(number * PAGES + i) for i in range(PAGES - 1)] + [page(0)]
        members = (record(f"http://example.jp/{number}/{i}", text) for i, text in enumerate(texts))
        (folder / f"{number}.warc.gz").write_bytes(b"".join(members))
    return f"warc:{folder}/*.warc.gz"


def config(source: str, out: Path, workers: int = 1) -> build.BuildConfig:
    return build.BuildConfig(
        source=source, out=out, profile="domain", vocab_size=900, val_fraction=0.2, workers=workers
    )


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file but those that tell the time that was spent."""
    timed = ("manifest.json", "funnel.json", "report.html")
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in timed]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def reference(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build by one worker."""
    out = tmp_path_factory.mktemp("reference") / "shards"
    build.build(config(source, out))
    return out


def test_two_workers_give_the_same_bytes(source: str, reference: Path, tmp_path: Path) -> None:
    manifest = build.build(config(source, tmp_path / "shards", workers=2))
    assert sum(manifest["splits"][split]["documents"] for split in ("train", "val")) == FILES * (PAGES - 1)
    assert manifest["fingerprint"] == json.loads((reference / "manifest.json").read_bytes())["fingerprint"]
    assert contents(tmp_path / "shards") == contents(reference)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_failed_task_costs_no_finished_one(source: str, reference: Path, tmp_path: Path) -> None:
    flags = config(source, tmp_path / "shards")
    job = build.job(flags, build.parts_of(flags)[0], build.work_folder(flags.out) / "0")
    annotated = job.annotations / "annotations"
    in_the_way = annotated / "00002.parquet" / "x"
    in_the_way.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        build.build(flags)
    assert not flags.out.exists()
    finished = {name: (annotated / name).stat().st_mtime_ns for name in ("00000.parquet", "00001.parquet")}
    in_the_way.rmdir()
    in_the_way.parent.rmdir()
    crawl.run(job)
    assert {name: (annotated / name).stat().st_mtime_ns for name in finished} == finished
    build.build(flags)
    assert contents(flags.out) == contents(reference)


def test_ray_that_is_not_installed_is_one_line(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(console.UserError, match="ray is not installed"):
        build.build(dataclasses.replace(config(source, tmp_path / "shards"), executor="ray"))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of what `sbatch` was told: N.args and N.script a job; `queued` is what `squeue` prints."""
    told = tmp_path / "told"
    told.mkdir()
    (told / "queued").touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(
        f"""#!/bin/bash
cd {told}
[ -e refuse ] && [ "$(cat refuse)" = "$(ls *.args 2>/dev/null | wc -l)" ] && {{ echo no such partition >&2; exit 1; }}
job=$(( 101 + $(ls *.args 2>/dev/null | wc -l) ))
printf '%s\\n' "$@" > $job.args
case "$1" in
    --parsable) cat > $job.script; echo $job ;;
    *) cat "${{@: -1}}" > $job.script; echo Submitted batch job $job ;;
esac
"""
    )
    (programs / "squeue").write_text(f"#!/bin/bash\ncat {told}/queued\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(crawl, "WORTH_A_PROCESS", 1)  # a small source has its near-duplicates found by one task
    return told


def on_slurm(source: str, out: Path) -> build.BuildConfig:
    return dataclasses.replace(
        config(source, out), executor="slurm", slurm_partition="cpu", slurm_env="module load gcc", workers=3
    )


def option(told: Path, job: int, name: str) -> str | None:
    """The value of an sbatch option, of the command line or of the script."""
    lines = (told / f"{job}.args").read_text().splitlines() + (told / f"{job}.script").read_text().splitlines()
    found = [line.removeprefix("#SBATCH ").partition("=")[2] for line in lines if f"--{name}=" in line]
    return found[0] if found else None


def test_slurm_gets_an_array_a_stage_each_after_the_one_before(source: str, tmp_path: Path, cluster: Path) -> None:
    result = build.submit(on_slurm(source, tmp_path / "shards"))
    names = [option(cluster, job, "job-name") for job in range(101, 108)]
    assert names == [f"data-{n}" for n in ("annotate", "select", "buckets", "verify", "cluster", "write", "finish")]
    assert [option(cluster, job, "array") for job in range(101, 108)] == [
        "0-3%3", "0-3%3", "0-19%3", "0-99%3", "0-0%3", "0-3%3", None,
    ]  # fmt: skip
    assert [option(cluster, job, "dependency") for job in range(101, 108)] == [
        None, *(f"afterok:{job}" for job in range(101, 107)),
    ]  # fmt: skip
    assert {option(cluster, job, "kill-on-invalid-dep") for job in range(102, 108)} == {"yes"}
    assert {option(cluster, job, "partition") for job in range(101, 108)} == {"cpu"}
    assert result["job"] == "107"
    assert result["log"] == option(cluster, 107, "output") == str(tmp_path / "shards.log")
    last = (cluster / "107.script").read_text()
    assert last.index("module load gcc") < last.index("export PATH=") < last.index("-m data build")
    assert "--executor" not in last and f"--out={tmp_path / 'shards'}" in last
    assert "module load gcc" in (cluster / "101.script").read_text()


def test_slurm_is_sent_what_is_missing_in_one_array(
    source: str, tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = on_slurm(source, tmp_path / "shards")
    marks = tmp_path / ".shards.work" / "0" / "annotated" / "logs" / "annotate" / "completions"
    marks.mkdir(parents=True)
    (marks / "00001").touch()
    monkeypatch.setattr(slurm, "ARRAY", 2)
    build.submit(flags)
    folder = marks.parent
    assert json.loads((folder / "ranks_to_run.json").read_bytes()) == [0, 2, 3]
    assert option(cluster, 101, "array") == "0-1%3"  # two tasks of the array do three of ours
    assert option(cluster, 102, "array") == "0-1%3"
    assert len(list(cluster.glob("*.args"))) == 7


def test_slurm_is_not_sent_a_build_twice(source: str, tmp_path: Path, cluster: Path) -> None:
    flags = on_slurm(source, tmp_path / "shards")
    build.submit(flags)
    (cluster / "queued").write_text("107\n103\n107\n")
    with pytest.raises(console.UserError, match="scancel 103 107"):
        build.submit(flags)
    (cluster / "queued").write_text("")
    assert build.submit(flags)["job"] == "114"


def test_slurm_that_refuses_is_one_line(source: str, tmp_path: Path, cluster: Path) -> None:
    flags = on_slurm(source, tmp_path / "shards")
    with pytest.raises(console.UserError, match="--slurm_partition"):
        build.submit(dataclasses.replace(flags, slurm_partition=""))
    with pytest.raises(console.UserError, match="with a space"):
        build.submit(dataclasses.replace(flags, out=tmp_path / "my shards"))
    (cluster / "refuse").write_text("2")
    with pytest.raises(console.UserError, match=r"job buckets.*scancel 101 102"):
        build.submit(flags)


def test_no_slurm_is_one_line(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(console.UserError, match="no sbatch"):
        build.submit(on_slurm(source, tmp_path / "shards"))
    assert list(tmp_path.iterdir()) == []
