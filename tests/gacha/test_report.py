"""The report, through its door: what it says, what it writes, and that nothing a run says can break the page."""

import gzip
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import console
from gacha import odds, report, runs

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def write(source: Path, out: Path, *flags: str) -> tuple[str, dict[str, Any]]:
    """The page and the JSON of `gacha report source`."""
    assert report.main([str(source), "--out", str(out / "report.html"), *flags]) == 0
    loaded = json.loads((out / "report.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    return (out / "report.html").read_text(encoding="utf-8"), loaded


@pytest.fixture(scope="module")
def written(machine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Page and JSON of the machine."""
    return write(machine, tmp_path_factory.mktemp("report"))


def copy_runs(machine: Path, folder: Path, *names: str) -> Path:
    """A folder with the machine's runs of these names only."""
    for run in runs.read(machine):
        for path in run.paths if run.name in names else []:
            shutil.copytree(path.parent, folder / path.parent.name)
    return folder


class Elements(html.parser.HTMLParser):
    """Every element of a page with its attributes, and the text of executable scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def test_numbers_agree_with_the_runs(machine: Path, written: tuple[str, dict[str, Any]]) -> None:
    told = written[1]
    finals = [run.summary["val/bpb"] for run in runs.read(machine) if run.status == "ok"]
    main, other = told["recipes"]
    assert (main["recipe"], main["n"], main["n_finished"], main["n_diverged"]) == ("3f9c1a7e", 5, 4, 0)
    assert (other["recipe"], other["n_finished"], other["n_diverged"]) == ("b44e0d21", 0, 1)
    assert main["mean"] == pytest.approx(np.mean(finals)) and main["sd"] == pytest.approx(np.std(finals, ddof=1))
    assert list(main["best_of"]) == ["1", "2", "3", "4"]
    assert main["best_of"]["4"]["u"] == min(finals) == told["best"]["val_bpb"]
    assert main["best_of"]["2"]["u"] == pytest.approx(odds.best_of(finals, 2).value)
    assert main["p_diverge"] == {"k": 0, "n": 4, "p": 0.0, "lo": 0.0, "hi": pytest.approx(0.6024, abs=1e-4)}
    assert told["status"] == {"ok": 4, "crashed": 1, "diverged": 1}
    assert told["varied"] == ["lr"]
    gap = np.diff(sorted(finals))[0]
    assert told["best"]["lead"] == pytest.approx(gap) and told["best"]["lead_sd"] == pytest.approx(gap / main["sd"])
    assert told["baseline_bpb"] == 1.62


def test_costs_count_waste_savings_and_the_killed_pulls_estimate(written: tuple[str, dict[str, Any]]) -> None:
    """A full pull costs 60 s, 0.24 JPY; the diverged one stopped after 10 of 60 steps; the killed one logged 41."""
    pulls = {pull["name"]: pull for pull in written[1]["pulls"]}
    cost = written[1]["cost"]
    bad, killed = pulls["b44e0d21-s0"], pulls["3f9c1a7e-s4"]
    share = bad["tokens"] / bad["tokens_budget"]
    assert 0.1 < share < 0.3 and bad["diverged_at"] == pytest.approx(share)
    assert cost["diverged"]["money"]["JPY"] == pytest.approx(0.24 * share)
    assert cost["saved"]["money"]["JPY"] == pytest.approx(0.24 * (1 - share))
    assert cost["saved"]["seconds"] == pytest.approx(60 * (1 - share))
    assert killed["estimated"] == ["flops", "money"]
    assert killed["money"] == pytest.approx(0.24 * 42 / 60, rel=0.05)
    assert cost["total"]["money"]["JPY"] == pytest.approx(sum(pull["money"] for pull in pulls.values()))


def test_page_is_one_small_file_that_asks_the_network_for_nothing(written: tuple[str, dict[str, Any]]) -> None:
    page = written[0]
    assert len(page.encode()) < 5e6
    for tag, attributes in Elements(page).found:
        assert tag not in ("link", "iframe", "img", "base", "object", "embed", "form")
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in page
    packed = re.search(r'<script type="text/plain" id="plotly">([^<]+)<', page)
    assert packed and b"plotly.js" in gzip.decompress(b64decode(packed[1]))[:400]


def test_table_and_key_numbers_need_no_script(written: tuple[str, dict[str, Any]]) -> None:
    static = re.sub(r"<script.*?</script>", "", written[0], flags=re.DOTALL)
    for said in ("3f9c1a7e-s3", "b44e0d21-s0", "diverged", "crashed", "1.6200", "JPY", 'lang="ja"', "営業部の佐藤です"):
        assert said in static
    assert f"{written[1]['best']['val_bpb']:.4f}" in static
    heads = re.findall(r"<th[^>]*aria-sort[^>]*><button type=\"button\">([^<]+)", static)
    assert len(heads) == 13 and "val/bpb" in heads and "Money (JPY)" in heads


def test_figures_hold_every_pull_and_clip_the_diverged_one(written: tuple[str, dict[str, Any]]) -> None:
    data = json.loads(re.search(r'id="data">(.*?)</script>', written[0], re.DOTALL)[1])  # type: ignore[index]
    assert set(data["figures"]) == {"loss", "bpb", "event", "strip", "best_of"}
    drawn = {trace["meta"] for trace in data["figures"]["loss"]["data"] if "meta" in trace}
    assert drawn == {pull["run_id"] for pull in written[1]["pulls"]}
    low, high = data["figures"]["loss"]["layout"]["yaxis"]["range"]
    assert 2 < 10**low < 3 and 4 < 10**high < 20  # a log axis
    said = [note["text"] for note in data["figures"]["loss"]["layout"]["annotations"]]
    assert any("diverged at" in text for text in said)
    assert data["figures"]["bpb"]["layout"]["shapes"][0]["y0"] == 1.62


def test_what_runs_say_cannot_break_the_page(machine: Path) -> None:
    """Hostile names, recipes, projects, settings, currencies and samples stay text, also inside JSON and figures."""
    (good,) = [run for run in runs.read(machine) if run.name == "3f9c1a7e-s0"]
    (bad,) = [run for run in runs.read(machine) if run.status == "diverged"]
    for run in (good, bad):
        run.name, run.project, run.sweep_id = HOSTILE, HOSTILE, HOSTILE
        run.config |= {"recipe": HOSTILE + run.id, "seed": HOSTILE, "lr": HOSTILE + run.id, "currency": HOSTILE}
        run.config[HOSTILE] = run.id
    from gacha import page

    built = page.build(report.summarise([good, bad], HOSTILE), [good, bad])
    elements = Elements(built).found
    assert sum(tag == "script" for tag, _ in elements) == 3
    assert not any(tag == "img" for tag, _ in elements)
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert "alert(1)" in built and "<script>alert" not in built
    data = json.loads(re.search(r'id="data">(.*?)</script>', built, re.DOTALL)[1])  # type: ignore[index]
    labels = json.dumps([[figure["data"], figure["layout"]] for figure in data["figures"].values()])
    assert "&lt;/script" in labels and "<script" not in labels and "<img" not in labels


def relatives(machine: Path, plus: dict[str, Any], **config: Any) -> list[runs.Run]:
    """Runs of 300 steps on one data order, named by the keys of `plus`: what is added to each one's training loss."""
    (model,) = [run for run in runs.read(machine) if run.name == "3f9c1a7e-s0"]
    step = np.arange(1, 301)
    batches, made = np.random.default_rng(0).normal(scale=0.03, size=300), []
    for seed, (name, more) in enumerate(plus.items()):
        noise = np.random.default_rng([1, seed]).normal(scale=0.01, size=301)
        loss = 3 + 4 * np.exp(-5 * np.sqrt(step / 300)) + batches + noise[0] + noise[1:] + more
        sizes = {"data_seed": 0, "d_model": 64, "n_layers": 2, "seq_len": 64, "batch_tokens": 512, "tokens": 300 * 512}
        told = model.__dict__ | {"id": f"id-{name}", "name": name, "status": "ok"}
        told["config"] = model.config | sizes | {"lineage": {"shards": "f00d"}, "seed": seed, "recipe": "aaaa"} | config
        told["history"] = {"train/loss": runs.Series(step, step * 512.0, loss)}
        made.append(runs.Run(**told))
    return made


def at(*steps: int) -> np.ndarray:
    """A loss that is 1.5 nats higher at these steps."""
    return 1.5 * np.isin(np.arange(1, 301), steps)


def test_siblings_tell_bad_batches_from_a_pulls_own_spikes(machine: Path) -> None:
    from gacha import page

    pulls = relatives(machine, {f"a-s{i}": at(61, 121, 200) for i in range(7)} | {"a-s7": at(61, 121, 160, 200)})
    told = report.summarise(pulls, "x")
    met = told["siblings"]["bad_batches"]
    assert sorted(batch["step"] for batch in met) == [61, 121, 200]
    assert all(batch["runs"] == sorted(run.name for run in pulls) and batch["of"] == 8 for batch in met)
    assert [round(batch["excess"], 1) for batch in met] == [1.5, 1.5, 1.5] and met[0]["tokens"] % 512 == 0
    assert [(event["name"], event["step"]) for event in told["siblings"]["alone"]] == [("a-s7", 160)]
    assert told["siblings"]["above"] == []
    assert "at steps 61, 121, 200" in report.headline(told)["bad batches"]
    built = page.build(told, pulls)
    assert "<h2>Siblings</h2>" in built and "Bad batches" in built and "Spikes of one pull alone" in built
    data = json.loads(re.search(r'id="data">(.*?)</script>', built, re.DOTALL)[1])  # type: ignore[index]
    assert {61 * 512, 121 * 512, 200 * 512} <= {
        shape["x0"] for shape in data["figures"]["loss"]["layout"]["shapes"] if shape["x0"] == shape["x1"]
    }
    for run in pulls[1:]:
        run.config["data_seed"] = run.config["seed"]
    assert report.summarise(pulls, "x")["siblings"]["bad_batches"] == [], "another order is another batch"


def test_a_silent_failure_is_told_by_its_own_seeds_and_by_another_recipes(machine: Path) -> None:
    """One epsilon of 1e-3 among seeds of one recipe; then three as a recipe of their own, beside one of 1e-8."""
    from gacha import page

    slow = 0.4 * np.minimum(1.0, np.arange(300) / 30)
    pulls = relatives(machine, {f"a-s{i}": 0.0 for i in range(7)} | {"a-s7": slow})
    (row,) = report.summarise(pulls, "x")["siblings"]["above"]
    assert (row["name"], row["by"], row["setting"], row["siblings"]) == ("a-s7", ["aaaa"], None, 7)
    assert row["share"] < 0.2 and row["end_excess_nats"] == pytest.approx(0.4, abs=0.05) and not row["back"]

    good = relatives(machine, {f"a-s{i}": 0.0 for i in range(4)}, eps=1e-8)
    bad = relatives(machine, {f"b-s{i}": slow for i in range(3)}, eps=1e-3, recipe="bbbb", git_commit="later")
    told = report.summarise(good + bad, "x")
    rows = told["siblings"]["above"]
    assert sorted(row["name"] for row in rows) == ["b-s0", "b-s1", "b-s2"]
    assert all(row["by"] == ["aaaa"] and row["setting"] == "eps" and row["share"] < 0.2 for row in rows)
    assert "with eps 1e-08, not 0.001" in page.build(told, good + bad)
    assert "at its end" in report.headline(told)["above its siblings b-s0"]

    grid = []
    for i in range(4):
        grid += relatives(machine, {f"c{i}-s{j}": 0.2 * i for j in range(3)}, lr=10.0**-i, recipe=f"cccc{i}")
    assert report.summarise(grid, "x")["siblings"]["above"] == [], "a grid over lr is no row of failures"
    for run in bad:
        run.config["lr"] = 1.0
    assert report.summarise(good + bad, "x")["siblings"]["above"] == [], "two settings apart: not comparable"
    for run in bad:
        run.status = "diverged"
    assert report.summarise(bad, "x")["siblings"]["above"] == [], "a diverged pull is no silent failure"


def test_nothing_is_said_of_siblings_where_there_are_none(machine: Path, written: tuple[str, dict[str, Any]]) -> None:
    assert "<h2>Siblings</h2>" not in written[0]
    assert written[1]["siblings"] == {"bad_batches": [], "alone": [], "above": []}
    (alone,) = relatives(machine, {"a-s0": at(61)})
    assert report.summarise([alone], "x")["siblings"] == {"bad_batches": [], "alone": [], "above": []}


def test_hostile_names_stay_text_among_siblings(machine: Path) -> None:
    from gacha import page

    pulls = relatives(machine, {f"{HOSTILE}{i}": at(61) for i in range(3)} | {HOSTILE: at(61, 150)})
    pulls += relatives(
        machine, {f"{HOSTILE}-{i}": at(61) + 1 for i in range(3)}, **{HOSTILE: HOSTILE, "recipe": HOSTILE}
    )
    told = report.summarise(pulls, HOSTILE)
    assert told["siblings"]["bad_batches"] and told["siblings"]["alone"] and told["siblings"]["above"]
    elements = Elements(page.build(told, pulls)).found
    assert sum(tag == "script" for tag, _ in elements) == 3
    assert not any(tag == "img" for tag, _ in elements)
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_draws_the_figures_under_the_pages_own_policy(machine: Path, tmp_path: Path) -> None:
    write(machine, tmp_path)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--virtual-time-budget=6000", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'chromium'}"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "report.html").as_uri()], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.count('class="main-svg"') >= 5
    assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize(
    ("names", "verdict"),
    [
        (("3f9c1a7e-s0",), "only finished pull"),
        (("3f9c1a7e-s0", "3f9c1a7e-s1"), "Two finished pulls are too few"),
        (("b44e0d21-s0",), "No pull to keep"),
        (("3f9c1a7e-s4",), "No pull to keep"),
    ],
)
def test_few_pulls_are_reported_without_more_being_claimed(
    machine: Path, tmp_path: Path, names: tuple[str, ...], verdict: str
) -> None:
    source = copy_runs(machine, tmp_path / "runs", *names)
    page, told = write(source, tmp_path)
    assert verdict in page and len(told["pulls"]) == len(names)
    assert (told["best"] is None) == ("keep" in verdict)


def test_a_pull_that_logged_next_to_nothing_is_still_listed(machine: Path) -> None:
    """Killed after its first steps: no evaluation, no summary; with it, keys missing from a foreign run's config."""
    (run,) = [run for run in runs.read(machine) if run.name == "3f9c1a7e-s4"]
    run.history, run.summary, run.config, run.tables = {}, {}, {}, {}
    told = report.plain(report.summarise([run], "x"))
    assert told["pulls"][0]["val_bpb"] is None and told["best"] is None
    from gacha import page

    assert run.name in page.build(report.summarise([run], "x"), [run])


def test_selection_and_its_mistakes(machine: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "r.html")]
    assert report.main([str(machine), "--group", "b44e0d21", *out]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["status"] == {"diverged": 1}
    for argv, said in (
        ([str(machine), "--group", "nope", *out], "3f9c1a7e"),
        ([str(machine), "--sweep", "nope", *out], "--sweep nope"),
        ([str(tmp_path / "empty"), *out], "no such folder"),
        ([str(tmp_path), *out], "no W&B runs"),
        (["some-team/project", *out], "ENTITY/PROJECT"),
        (["finals.csv", *out], "CSV"),
        ([str(machine), "--out", str(tmp_path / "r.json")], "ends in .html"),
        ([str(machine), "--ot", "x"], "--out"),
    ):
        with pytest.raises(console.UserError, match=re.escape(said)):
            report.main(argv)


def test_door_prints_json_or_a_summary(machine: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gacha", "report", str(machine), "--out", str(tmp_path / "r.html")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["best"]["name"].startswith("3f9c1a7e-s")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "4 ok, 1 crashed, 1 diverged" in done.stdout and str(tmp_path / "r.html") in done.stdout
    done = subprocess.run([*command[:4], "nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def test_a_hundred_long_pulls_stay_fast_and_small(machine: Path) -> None:
    """100 pulls of 2,000 rows: statistics, figures and page in seconds, the page far below its limit."""
    (model,) = [run for run in runs.read(machine) if run.name == "3f9c1a7e-s0"]
    rng, many = np.random.default_rng(0), []
    tokens = np.linspace(1, 4e6, 2000)
    for seed in range(100):
        loss = runs.Series(np.arange(2000), tokens, 3 + 6 * np.exp(-tokens / 5e5) + rng.normal(scale=0.02, size=2000))
        bpb = runs.Series(loss.step[19::20], loss.tokens[19::20], loss.value[19::20] / 2)
        history = {"train/loss": loss, "val/bpb": bpb, "stability/grad_norm": loss}
        values = model.__dict__ | {"id": f"id{seed}", "name": f"a-s{seed}", "history": history}
        values |= {"config": model.config | {"seed": seed}, "summary": model.summary | {"val/bpb": bpb.value[-1]}}
        many.append(runs.Run(**values))
    from gacha import page

    began = time.monotonic()
    told = report.summarise(many, "x")
    built = page.build(told, many)
    assert time.monotonic() - began < 8
    assert len(built.encode()) < 5e6
    assert len(told["recipes"][0]["best_of"]) == 100 and not math.isnan(told["best"]["lead_share"])
