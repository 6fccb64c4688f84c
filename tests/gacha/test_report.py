"""The report, through its door: what it says, what it writes, and that nothing a run says can break the page."""

import csv
import gzip
import html.parser
import itertools
import json
import math
import os
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
from scipy import stats

import console
from gacha import duel, odds, report, runs, stopping

DOCS = Path(__file__).resolve().parents[2] / "docs"

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def write(source: Path, out: Path, *flags: str) -> tuple[str, dict[str, Any]]:
    """The page and the JSON of `gacha report source`."""
    assert report.main([str(source), "--out", str(out / "report.html"), "--log", "false", *flags]) == 0
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
    (table,) = re.findall(r'<table id="pulls">.*?</table>', static, re.DOTALL)
    heads = re.findall(r"<th[^>]*aria-sort[^>]*><button type=\"button\">([^<]+)", table)
    assert len(heads) == 13 and "val/bpb" in heads and "Money (JPY)" in heads


def test_figures_hold_every_pull_and_clip_the_diverged_one(written: tuple[str, dict[str, Any]]) -> None:
    data = json.loads(re.search(r'id="data">(.*?)</script>', written[0], re.DOTALL)[1])  # type: ignore[index]
    assert set(data["figures"]) == {"loss", "value", "event", "strip", "best_of", "learning_rates"}
    drawn = {trace["meta"] for trace in data["figures"]["loss"]["data"] if "meta" in trace}
    assert drawn == {pull["run_id"] for pull in written[1]["pulls"]}
    low, high = data["figures"]["loss"]["layout"]["yaxis"]["range"]
    assert 2 < 10**low < 3 and 4 < 10**high < 20  # a log axis
    said = [note["text"] for note in data["figures"]["loss"]["layout"]["annotations"]]
    assert any("diverged at" in text for text in said)
    assert data["figures"]["value"]["layout"]["shapes"][0]["y0"] == 1.62


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
    out = ["--log", "false", "--out", str(tmp_path / "r.html")]
    assert report.main([str(machine), "--group", "b44e0d21", *out]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["status"] == {"diverged": 1}
    for argv, said in (
        ([str(machine), "--group", "nope", *out], "3f9c1a7e"),
        ([str(machine), "--sweep", "nope", *out], "--sweep nope"),
        ([str(tmp_path / "empty"), *out], "no such folder"),
        ([str(tmp_path), *out], "no W&B runs"),
        (["some-team/project", *out], "no folder here, and no W&B key"),
        ([str(tmp_path / "finals.csv"), *out], "finals.csv"),
        ([str(machine), "--job_type", "sft", *out], "pretrain; choose one with --job_type"),
        ([str(machine), "--by", "lrr", *out], "--by lrr: no run's config has it; there are lr"),
        ([str(machine), "--value", "val/bpp", *out], "--value val/bpp: no pull has it; there are val/bpb"),
        (
            [str(machine), "--duel", "b44e0d21", "3f9c1a7e", *out],
            "no recipe of two finals by this name; there are 3f9c",
        ),
        ([str(machine), "--higher_is_better", "--lower_is_better", *out], "give one of them"),
        ([str(machine), "--out", str(tmp_path / "r.json")], "ends in .html"),
        ([str(machine), "--ot", "x"], "--out"),
    ):
        with pytest.raises(console.UserError, match=re.escape(said)):
            report.main(argv)


def test_door_prints_json_or_a_summary(machine: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gacha", "report", str(machine), "--out", str(tmp_path / "r.html"), "--log=False"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["best"]["name"].startswith("3f9c1a7e-s")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "4 ok, 1 crashed, 1 diverged" in done.stdout and str(tmp_path / "r.html") in done.stdout
    done = subprocess.run([*command[:4], "nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def many(machine: Path, n: int, recipes: int, rows: int) -> list[runs.Run]:
    """n pulls of `recipes` recipes in memory; one in twenty diverges half way, and says so."""
    (model,) = [run for run in runs.read(machine) if run.name == "3f9c1a7e-s0"]
    rng, made = np.random.default_rng(0), []
    steps, tokens = np.arange(1, rows + 1), np.linspace(1, 4e6, rows)
    for i in range(n):
        recipe, seed = i % recipes, i // recipes
        values = 3 + 6 * np.exp(-tokens / 5e5) + rng.normal(scale=0.02, size=rows) + rng.normal(scale=0.01)
        values += 0.05 * recipe / recipes
        last = rows // 2 if i % 20 == 19 else rows
        loss = runs.Series(steps[:last], tokens[:last], values[:last])
        every = max(1, rows // 100)
        bpb = runs.Series(*(column[every - 1 :: every] for column in loss))
        history = {"train/loss": loss, "val/bpb": bpb, "stability/grad_norm": loss}
        told = model.__dict__ | {"id": f"id{i}", "name": f"r{recipe}-s{seed}", "history": history}
        told["config"] = model.config | {"seed": seed, "recipe": f"r{recipe}", "lr": 1e-3 * 2 ** (recipe % 4)}
        told["summary"] = model.summary | {"val/bpb": bpb.value[-1], "tokens": tokens[last - 1]}
        made.append(runs.Run(**told | {"status": "diverged" if last < rows else "ok"}))
    return made


@pytest.mark.parametrize(("recipes", "banded"), [(10, 5), (500, 5)])
def test_a_thousand_pulls_stay_fast_and_small(machine: Path, recipes: int, banded: int) -> None:
    """Statistics, figures and page in seconds; few lines drawn, the others waiting; no more elements than a table."""
    from gacha import page

    pulls = many(machine, 1000, recipes, rows=120)
    began = time.process_time()
    told = report.summarise(pulls, "x")
    built = page.build(told, pulls)
    assert time.process_time() - began < 12
    assert len(built.encode()) < 5e6 and len(Elements(built).found) < 40_000
    ks = list(map(int, told["recipes"][0]["best_of"]))
    assert ks[-1] == told["recipes"][0]["n_finals"] and ks == sorted(ks) and len(ks) < 50
    data = json.loads(re.search(r'id="data">(.*?)</script>', built, re.DOTALL)[1])  # type: ignore[index]
    loss = data["figures"]["loss"]
    drawn = {trace["meta"] for trace in loss["data"] if "meta" in trace}
    assert len(loss["data"]) < 60 and len(drawn) >= 3 * min(banded, 3)
    assert {one["run"] for one in loss["more"]} | drawn == {run.id for run in pulls}
    assert not {one["run"] for one in loss["more"]} & drawn
    assert sum(trace.get("fill") == "tonexty" for trace in loss["data"]) == banded


def test_of_many_pulls_the_silent_failure_is_still_found(machine: Path) -> None:
    """Beyond the number that is examined one by one, those that lie highest are."""
    pulls = relatives(machine, {f"a-s{i}": 0.0 for i in range(150)} | {"a-s150": 0.3, "a-s151": 0.2})
    rows = report.summarise(pulls, "x")["siblings"]["above"]
    assert [row["name"] for row in rows[:2]] == ["a-s150", "a-s151"]


def finals(tmp_path: Path, **groups: list[float]) -> Path:
    """A CSV of finals, a row per pull."""
    lines = ["recipe,seed,score"]
    for name, values in groups.items():
        lines += [f'"{name}",{seed},{float(value)!r}' for seed, value in enumerate(values)]
    path = tmp_path / "finals.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_csv_of_finals_is_reported_as_its_statistics_say(tmp_path: Path) -> None:
    """Recipes, odds, target, price, reservation value and duels are those of gacha/odds.py and gacha/duel.py."""
    rng = np.random.default_rng(1)
    groups = {name: list(rng.normal(mean, 0.02, size=9)) for name, mean in (("甲", 0.5), ("乙", 0.53), ("丙", 0.4))}
    source = finals(tmp_path, **groups)
    flags = ["--higher_is_better", "--target", "0.53", "--cost", "5", "--worth", "1000", "--duel", "甲", "丙"]
    page, told = write(source, tmp_path, *flags)
    assert told["value"]["metric"] == "score" and told["value"]["lower_is_better"] is False
    assert [recipe["recipe"] for recipe in told["recipes"]] == ["乙", "甲", "丙"], "the best mean first"
    assert told["best"]["value"] == max(groups["乙"]) and "val_bpb" not in told["best"]
    main = told["recipes"][0]
    for got in odds.best_of_curve(groups["乙"], lower_is_better=False):
        assert main["best_of"][str(got.k)]["u"] == pytest.approx(got.u)
        assert main["best_of"][str(got.k)]["lo"] == pytest.approx(got.lo)
    hits = sum(value >= 0.53 for value in groups["乙"])
    assert main["p_hit"]["3"]["p"] == pytest.approx(odds.p_hit(hits, 9, 3).value)
    assert main["to_target"]["pulls"] == odds.price(hits / 9, 5.0).pulls
    assert main["to_target"]["spend"] == pytest.approx(5 * main["to_target"]["pulls"])
    assert main["p_one_sided"] == pytest.approx(odds.p_one_sided(groups["乙"], 0.53, lower_is_better=False))
    assert main["reservation"]["value"] == pytest.approx(odds.reservation(groups["乙"], 5 / 1000, False).value)
    fought = duel.duel(groups["甲"], groups["丙"], lower_is_better=False, names=("甲", "丙"))
    assert (told["duel"]["welch_p"], told["duel"]["verdict"]) == (pytest.approx(fought.welch_p), "甲 is better")
    assert told["duel"]["p_improvement"]["value"] == pytest.approx(fought.p_improvement.value)
    pairs = {frozenset((pair["a"], pair["b"])): pair["holm_p"] for pair in told["duel"]["pairs"]}
    named = list(itertools.combinations(("乙", "甲", "丙"), 2))
    expected = duel.holm([stats.ttest_ind(groups[a], groups[b], equal_var=False).pvalue for a, b in named])
    assert pairs == {frozenset(names): pytest.approx(p) for names, p in zip(named, expected, strict=True)}
    for said in ("甲 is better than 丙", "Odds of reaching the target", "Every pair", "Stop at"):
        assert said in page
    assert told["learning_rates"] is None and told["stopping"] == []


def test_a_csv_of_curves_brings_early_stopping(tmp_path: Path) -> None:
    """The frontier and the ranks are those that gacha/stopping.py finds on the same curves."""
    rng, lines, curves = np.random.default_rng(2), ["config,run,step,val_loss"], []
    x = np.arange(100, 1001, 100)
    for run in range(12):
        curve = 3 + 3 * np.exp(-x / 300) + rng.normal(scale=0.03) + rng.normal(scale=0.005, size=len(x))
        curves.append((x.astype(float), curve))
        lines += [f"one,r{run},{step},{loss!r}" for step, loss in zip(x, map(float, curve), strict=True)]
    (tmp_path / "curves.csv").write_text("\n".join(lines) + "\n")
    page, told = write(tmp_path / "curves.csv", tmp_path)
    found = stopping.frontier(*stopping.align(curves))
    (judged,) = told["stopping"]
    assert [one["family"] for one in judged["frontier"]] == [one.family for one in found]
    for ours, theirs in zip(judged["frontier"], found, strict=True):
        assert ours["saved"] == pytest.approx(theirs.saved._asdict())
        assert ours["regret"] == pytest.approx(theirs.regret._asdict())
    assert judged["buys_most"]["saved"]["value"] == pytest.approx(stopping.buys_most(found).saved.value)
    assert "Compute saved against regret" in page and "When the rank is known" in page
    figures = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["figures"]  # type: ignore[index]
    assert figures["value"]["layout"]["xaxis"]["title"]["text"] == "step"


def test_regret_over_several_recipes_is_told_in_sd_of_their_seeds(tmp_path: Path) -> None:
    """Four learning rates scatter far more than their seeds: in sd of all finals no regret would look like much."""
    _, told = write(DOCS / "early_stopping.csv", tmp_path, "--by", "lr")
    with (DOCS / "early_stopping.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = {row["run"]: row for row in rows}.values()
    groups = [[float(row["val_bpb"]) for row in last if row["lr"] == lr] for lr in {row["lr"] for row in rows}]
    pooled = float(np.mean([np.var(group, ddof=1) for group in groups])) ** 0.5
    one, everyone = told["stopping"]
    assert (one["n"], everyone["n"], everyone["sd_of"]) == (8, 32, "seeds")
    found = [(rule["regret"]["value"], rule["regret_sd"]["value"]) for rule in everyone["frontier"]]
    assert max(found)[0] > 0 and all(sd == pytest.approx(regret / pooled, abs=1e-12) for regret, sd in found)


def test_learning_rates_are_lines_of_the_other_settings(machine: Path) -> None:
    """Two widths over three rates; the highest rate diverges for one of them, and is no final of it."""
    from gacha import page

    (model,) = [run for run in runs.read(machine) if run.name == "3f9c1a7e-s0"]
    pulls = []
    for width in (64, 128):
        for lr, mean in ((1e-3, 1.6), (1e-2, 1.5), (1e-1, 1.7)):
            for seed in range(3):
                name = f"{width}-{lr}"
                config = model.config | {"recipe": name, "seed": seed, "lr": lr, "width": width}
                value = mean - width / 1000 + 0.01 * seed
                own: dict[str, Any] = {
                    "id": f"{name}-{seed}",
                    "name": f"{name}-{seed}",
                    "config": config,
                    "history": {},
                }
                own |= {"summary": {"val/bpb": value}, "status": "diverged" if name == "64-0.1" else "ok"}
                pulls.append(runs.Run(**model.__dict__ | own))
    told = report.summarise(pulls, "x")
    wide, narrow = told["learning_rates"]["lines"]
    assert (wide["settings"], narrow["settings"]) == ({"width": 128}, {"width": 64})
    assert wide["best_lr"] == narrow["best_lr"] == 1e-2
    assert wide["sensitivity"] == pytest.approx((0.1 + 0 + 0.2) / 3)
    assert (narrow["all_diverged"], narrow["points"][-1]["diverged"], narrow["points"][-1]["n"]) == (1, 3, 0)
    assert [wide["points"][0][key] for key in ("lr", "n", "diverged")] == [1e-3, 3, 0]
    assert [wide["points"][0][key] for key in ("lo", "mean", "hi")] == pytest.approx([1.472, 1.482, 1.492])
    assert "Final over learning rate" in page.build(told, pulls)
    by_width = report.summarise(pulls, "x", by="width")
    assert [recipe["recipe"] for recipe in by_width["recipes"]] == ["128", "64"]
    assert [recipe["n"] for recipe in by_width["recipes"]] == [9, 9]


def test_hostile_and_hopeless_csvs_make_pages_too(tmp_path: Path) -> None:
    """Hostile recipes and columns through the door; then a single pull, and pulls that all diverged."""
    names = [HOSTILE.replace('"', '""') + end for end in "abc"]
    source = finals(tmp_path, **{name: [1.0, 1.1, 1.3] for name in names})
    source.write_text(source.read_text(encoding="utf-8").replace("score", "loss<img src=x>"), encoding="utf-8")
    page, told = write(source, tmp_path, "--value", "loss<img src=x>", "--target", "1.2")
    assert told["recipes"][0]["recipe"] == HOSTILE + "a" and told["value"]["metric"] == "loss<img src=x>"
    elements = Elements(page).found
    assert sum(tag == "script" for tag, _ in elements) == 3
    assert not any(tag == "img" for tag, _ in elements)
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert "<img" not in json.dumps(data["figures"])
    page, told = write(finals(tmp_path, alone=[1.0]), tmp_path)
    assert "only finished pull" in page and told["duel"] is None and told["recipes"][0]["best_of"]["1"]["lo"] is None
    page, told = write(finals(tmp_path, lost=[math.nan, math.inf]), tmp_path)
    assert "No pull to keep" in page and told["recipes"][0]["p_diverge"]["k"] == 2


def test_runs_without_job_types_are_pulls_and_recorded_reports_are_not(machine: Path, tmp_path: Path) -> None:
    found = runs.read(machine)
    for run in found:
        run.job_type = ""
    assert len(report.select(found, "", "")) == len(found)
    source = copy_runs(machine, tmp_path / "runs", "3f9c1a7e-s0", "3f9c1a7e-s1")
    command = [sys.executable, "-m", "gacha", "report", str(source), "--out", str(tmp_path / "r.html")]
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(source)}
    assert "recorded" in subprocess.run(command, check=True, env=env, capture_output=True, text=True).stdout
    assert [run.job_type for run in runs.read(source)].count("report") == 1
    assert len(write(source, tmp_path)[1]["pulls"]) == 2
