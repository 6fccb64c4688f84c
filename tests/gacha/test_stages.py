"""The report of post-training: planted gains, no gains, harm and failures, read back from real offline W&B runs."""

import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import console
import tracking
from gacha import duel, gains, odds, page, report, runs, stages, stages_text

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
ITEMS = 200
SFT, COLLAPSED = (0.85, 0.82, 0.88, 0.84, 0.3), (0.4, 0.35, 0.3)
RANDOM = (0.02, 0.05, 0.03)
DPO = (0.01, -0.015, 0.005, -0.005, 0.01)
GRPO = (0.07, 0.05, 0.08, 0.06, 0.075)


def log_stage(
    stage: str,
    recipe: str,
    seed: int,
    start: float,
    end: float,
    *,
    kl: float = 0.0,
    status: str = "ok",
    summary: dict[str, Any] | None = None,
    lineage: dict[str, Any] | None = None,
    **config: Any,
) -> None:
    """One run of 20 updates through tracking.py, its held-out score going from `start` to `end`."""
    tracker = tracking.start(
        stage,
        {"seed": seed, "task": "office", "control": False, "lr": 1e-4, "currency": "JPY"} | config,
        name=f"{recipe}-s{seed}",
        recipe=recipe,
        tags=["office"],
        x_axis="step",
        alone=False,
        lineage={"model": "f00d", "model_run": None} | (lineage or {}),
        project="office",
    )
    for step in range(21):
        done = step / 20
        row: dict[str, float] = {"step": step, "train/loss": 2 - done, "train/lr": 1e-4}
        if kl:
            row |= {"policy/kl": kl * done, "reward/mean": 0.2 + 0.5 * done, "policy/length": 40 - 5 * done}
        if step % 5 == 0:
            row |= {"eval/exact_match": start + (end - start) * done, "base/bpb": 1.5 + (0.01 + seed / 1000) * done}
        tracker.log(row, step=step)
    told: dict[str, Any] = {"status": status, "stop_reason": "", "eval/n": ITEMS, "cost/device_seconds": 30.0}
    for name, less in (("exact_match", 1.0), ("field_accuracy", 0.9), ("valid", 0.5)):
        for kind, drop in (("", 0.0), ("sampled_", 0.05)):
            told[f"eval_before/{kind}{name}"] = max(0.0, 1 - less * (1 - start) - drop)
            told[f"eval/{kind}{name}"] = max(0.0, 1 - less * (1 - end) - drop)
    told |= {
        "eval_before/sampled_sd": 0.2,
        "eval/sampled_sd": 0.1,
        "base/bpb_before": 1.5,
        "base/bpb": 1.51 + seed / 1000,
    }
    for field, value in (("氏名", end), ("city", 0.35 * end), ("date", end)):
        told |= {f"eval/field/{field}": value, f"eval_before/field/{field}": start}
    tracker.summary(told | (summary or {}))
    if status == "diverged":
        row_of = [12, 0, "dpo_collapse", "", 10, None, json.dumps({"logp_chosen": -18.5})]
        columns: list[str | int] = ["step", "tokens", "kind", "batch", "warn_step", "recovered_step", "evidence"]
        tracker.table("stability/events", columns, [row_of], step=20)
    tracker.finish(3 if status == "diverged" else 0)


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The office task's road: SFT and its control, a DPO that brings nothing, one that harms, GRPO, a lonely KTO."""
    import wandb

    folder = tmp_path_factory.mktemp("office")
    wandb.teardown()  # it reads the environment once, and another test of this process may have made it do so
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            environment.setenv(name, str(folder))
        rng = np.random.default_rng(0)
        for seed, end in enumerate(SFT):
            log_stage("sft", "aaaa", seed, 0.0, end)
        for seed, end in enumerate(RANDOM):
            log_stage("sft", "cccc", seed, 0.0, end, control=True)
        for seed, gain in enumerate(DPO):
            log_stage("dpo", "dddd", seed, 0.85, 0.85 + gain, kl=0.05, lineage={"model_run": f"aaaa-s{seed}"})
        for seed, end in enumerate(COLLAPSED):
            log_stage("dpo", "eeee", seed, 0.85, end, kl=0.5, lr=1e-2)
        said = {"stop_reason": "dpo_collapse", "verdict": "chosen answers lost 17.7 nats"}
        log_stage("dpo", "eeee", 3, 0.85, 0.1, kl=2.0, lr=1e-2, status="diverged", summary=said)
        for seed, gain in enumerate(GRPO):
            log_stage("grpo", "bbbb", seed, 0.5, 0.5 + gain, kl=0.03 + 0.01 * rng.random())
        log_stage("kto", "ffff", 0, 0.85, 0.88)
    wandb.teardown()
    return folder


def write(source: Path, out: Path, *flags: str) -> tuple[str, dict[str, Any]]:
    """The page and the JSON of `gacha report source`."""
    assert report.main([str(source), "--out", str(out / "report.html"), "--log", "false", *flags]) == 0
    loaded = json.loads((out / "report.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    return (out / "report.html").read_text(encoding="utf-8"), loaded


@pytest.fixture(scope="module")
def written(office: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Page and JSON of the office runs."""
    return write(office, tmp_path_factory.mktemp("report"))


def stage_of(told: dict[str, Any], stage: str, recipe: str) -> dict[str, Any]:
    """One stage of report.json."""
    (found,) = [one for one in told["stages"]["stages"] if (one["stage"], one["recipe"]) == (stage, recipe)]
    return found


def text_of(page: str) -> str:
    """What a reader without scripts sees."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)))


class Elements(html.parser.HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def test_planted_gains_are_found_and_their_interval_is_scipys(written: tuple[str, dict[str, Any]]) -> None:
    for stage, recipe, ends, start in (("sft", "aaaa", SFT, 0.0), ("grpo", "bbbb", np.array(GRPO) + 0.5, 0.5)):
        told = stage_of(written[1], stage, recipe)
        one, theirs = told["scores"]["exact_match"], stats.ttest_1samp(np.array(ends) - start, 0)
        interval = theirs.confidence_interval()
        assert (one["lo"], one["hi"], one["p"]) == pytest.approx((interval.low, interval.high, theirs.pvalue))
        assert one["change"] == pytest.approx(np.mean(ends) - start) and one["verdict"] == "gain"
        assert [seed["after"] for seed in one["seeds"]] == pytest.approx(ends)
        p = odds.probability(5, 5)
        assert told["gained"] == {"k": 5, "n": 5, "p": 1.0, "lo": pytest.approx(p.lo), "hi": 1.0}
    sampled = stage_of(written[1], "grpo", "bbbb")["scores"]["sampled_exact_match"]
    assert sampled["verdict"] == "gain" and sampled["lo"] > 0


def test_where_a_stage_brings_nothing_the_report_says_so(written: tuple[str, dict[str, Any]]) -> None:
    told = stage_of(written[1], "dpo", "dddd")
    one = told["scores"]["exact_match"]
    assert one["verdict"] == "no gain" and one["lo"] < 0 < one["hi"]
    assert told["gained"]["k"] == 3 and told["collapsed"]["k"] == 0
    assert told["from"] == "sft aaaa", "its start is named by the run it came from"
    text = text_of(written[0])
    assert "dpo (lr 0.0001) no gain exact_match" in text


def test_holm_is_over_the_stages_that_are_no_controls(written: tuple[str, dict[str, Any]]) -> None:
    claims = [one for one in written[1]["stages"]["stages"] if not one["control"]]
    ps = [one["scores"]["exact_match"]["p"] for one in claims]
    expected = duel.holm([math.nan if p is None else p for p in ps])
    ours = [one["scores"]["exact_match"]["holm_p"] for one in claims]
    assert [x for x in ours if x is not None] == pytest.approx([x for x in expected if not math.isnan(x)])
    assert stage_of(written[1], "sft", "cccc")["scores"]["exact_match"]["holm_p"] is None


def test_harm_collapses_and_the_guards_evidence_are_told(written: tuple[str, dict[str, Any]]) -> None:
    bad = stage_of(written[1], "dpo", "eeee")
    assert bad["scores"]["exact_match"]["verdict"] == "harm" and bad["n_diverged"] == 1
    assert (bad["collapsed"]["k"], bad["collapsed"]["n"]) == (4, 4)
    assert bad["collapsed"]["lo"] == pytest.approx(odds.probability(4, 4).lo)
    collapses = {row["name"]: row["collapse"] for row in written[1]["stages"]["runs"] if row["collapse"]}
    assert collapses == {f"eeee-s{seed}": "below its start" for seed in range(3)} | {
        "eeee-s3": "diverged",
        "aaaa-s4": "far below its siblings",
    }
    failures = {one["name"]: one for one in written[1]["stages"]["failures"]}
    assert failures.keys() == collapses.keys()
    lost = failures["eeee-s3"]
    assert (lost["status"], lost["stop_reason"]) == ("diverged", "dpo_collapse")
    assert lost["events"] == [{"step": 12, "kind": "dpo_collapse", "evidence": '{"logp_chosen": -18.5}'}]
    assert lost["evidence"]["policy/kl"] == [0.0, 2.0]
    text = text_of(written[0])
    for said in ("dpo collapse", "chosen answers lost 17.7 nats", "policy/kl 0 → 2", "far below its siblings"):
        assert said in text


def test_one_seed_is_not_known_and_has_the_error_of_its_items(written: tuple[str, dict[str, Any]]) -> None:
    one = stage_of(written[1], "kto", "ffff")["scores"]["exact_match"]
    assert one["verdict"] == "one seed: not known" and one["p"] is None
    error = gains.items_error(0.85, 0.88, ITEMS)
    assert (one["lo"], one["hi"]) == pytest.approx((error.lo, error.hi)) and error.lo < 0 < error.hi
    assert "one seed: not known" in text_of(written[0])


def test_newcombes_interval_is_the_papers() -> None:
    """Newcombe 1998, table II, method 10: 9/10 - 3/10 and 10/10 - 0/10."""
    for a, b, lo, hi in ((9, 3, 0.1705, 0.8090), (10, 0, 0.6075, 1.0)):
        error = gains.items_error(b / 10, a / 10, 10)
        assert (error.lo, error.hi) == pytest.approx((lo, hi), abs=1e-4)


def test_pretraining_is_told_from_random_weights_by_welch(written: tuple[str, dict[str, Any]]) -> None:
    (control,) = written[1]["stages"]["controls"]
    found = control["scores"]["exact_match"]
    difference, p = duel.welch(np.array(SFT), np.array(RANDOM))
    assert (control["recipe"], control["control"]) == ("aaaa", "cccc")
    assert (found["value"], found["lo"], found["hi"], found["p"]) == pytest.approx((*difference, p))
    assert "Pretrained weights against random ones" in written[0]


def test_seeds_without_scatter_are_judged_by_their_items() -> None:
    """Two seeds that gain the same 2 points on 50 items: a t interval would be a point, and sure."""
    alike = gains.paired([(0.5, 0.52), (0.5, 0.52)], 50)
    assert alike["lo"] < 0 < alike["hi"] and alike["p"] > 0.5
    assert gains.word(alike, alike["p"], False) == "no gain"
    assert gains.word(gains.paired([(0.5, 0.52)] * 2), math.nan, False) == "seeds alike: not known"
    assert gains.paired([(1.0, 1.0)] * 3, 50)["p"] == 1
    assert gains.word(gains.paired([]), math.nan, False) == "not measured"
    sure = gains.paired([(0.1, 0.9)] * 3, 200)
    assert gains.word(sure, sure["p"], False) == "gain"


def test_base_fields_and_scores_stand_apart(written: tuple[str, dict[str, Any]]) -> None:
    told = stage_of(written[1], "sft", "aaaa")
    assert written[1]["stages"]["scores"] == [*stages.SCORES, stages.SPREAD]
    assert (
        told["base"]["verdict"] == "harm"
        and told["base"]["change"] == pytest.approx(0.012)
        and told["fields"]["city"]["after"] < 0.3
    )
    text = text_of(written[0])
    for said in ("氏名", "sampling sd", "Bits per byte", "sampled field accuracy"):
        assert said in text
    (table,) = re.findall(r'aria-label="Fields".*?</table>', written[0], re.DOTALL)
    (city,) = re.findall(r"<tr><th[^>]*>city.*?</tr>", table)
    assert city.count('class="harm"') >= 4 and 'class="harm"' not in table.split("city")[0]


def test_figures_hold_seeds_curves_and_frontier(written: tuple[str, dict[str, Any]]) -> None:
    figures = json.loads(re.search(r'id="data">(.*?)</script>', written[0], re.DOTALL)[1])["figures"]  # type: ignore[index]
    names = {"stage_gains", "stage_sft", "stage_dpo", "stage_kto", "stage_grpo", "stage_reward", "stage_quality"}
    assert set(figures) == names
    assert len(figures["stage_reward"]["data"]) == 14, "a path for each run that measured its KL"
    assert len(figures["stage_gains"]["layout"]["yaxis"]["ticktext"]) == 6


def test_door_prints_a_line_a_stage(office: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(office, tmp_path)
    lines = dict(re.findall(r"^(\S.*?)  +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert lines["runs"] == "22 ok, 1 diverged"
    assert lines["sft aaaa"].startswith("gain: exact_match 0.0% to 73.8%, +73.8 points (95% +")
    assert lines["sft aaaa"].endswith("5 seeds; 1 of 5 collapsed")
    assert lines["dpo dddd"].startswith("no gain: ") and lines["kto ffff"].startswith("one seed: not known")
    assert lines["control sft cccc"].startswith("pretrained +70.5 points against random weights on exact_match (95%")
    assert report.main([str(office), "--out", str(tmp_path / "r.html"), "--log=False", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]["main"] == "exact_match"


def test_a_report_of_stages_is_recorded_too(office: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gacha", "report", str(office), "--out", str(tmp_path / "r.html")]
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    assert "recorded" in subprocess.run(command, check=True, env=env, capture_output=True, text=True).stdout
    (run,) = runs.read(tmp_path)
    rows = runs.table(run.tables["stages"])
    assert {(row["stage"], row["verdict"]) for row in rows if row["score"] == "exact_match"} >= {("dpo", "no gain")}


def test_section_stands_beside_pulls_and_a_stages_own_pulls(machine: Path, office: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(machine, both / "machine")
    shutil.copytree(office, both / "office")
    page, told = write(both, tmp_path)
    assert told["best"]["recipe"] == "3f9c1a7e" and len(told["stages"]["stages"]) == 6
    assert 'href="#s-stages"' in page and "<h2>The pulls</h2>" in page and "<h2>Post-training" in page
    page, told = write(both, tmp_path, "--job_type", "grpo")
    assert told["value"]["metric"] == "eval/exact_match" and not told["value"]["lower_is_better"]
    assert told["best"]["value"] == pytest.approx(0.58) and told["recipes"][0]["n_finals"] == 5
    page, told = write(both, tmp_path, "--group", "bbbb")
    assert [one["recipe"] for one in told["stages"]["stages"]] == ["bbbb"] and told["pulls"] == []
    assert "<em>1 of 1</em> stage gains" in page
    page, told = write(both, tmp_path, "--group", "3f9c1a7e")
    assert told["stages"] is None and "Post-training" not in page


def test_mistakes_are_told(office: Path, tmp_path: Path) -> None:
    out = ["--log", "false", "--out", str(tmp_path / "r.html")]
    for argv, said in (
        (["--target", "0.9"], "name it by --job_type, one of sft, dpo, grpo, kto"),
        (["--value", "eval/exact"], "--value eval/exact: no run has it before and after; there are exact_match"),
        (["--group", "nope"], "no pretrain runs"),
    ):
        with pytest.raises(console.UserError, match=re.escape(said)):
            report.main([str(office), *argv, *out])
    _, told = write(office, tmp_path, "--value", "eval/field_accuracy")
    assert told["stages"]["main"] == "field_accuracy"


def test_what_runs_say_cannot_break_the_page(office: Path) -> None:
    found = runs.read(office)
    for run in found:
        run.name, run.project = HOSTILE + run.id, HOSTILE
        run.config |= {"recipe": HOSTILE + str(run.config["recipe"]), "seed": HOSTILE + str(run.config["seed"])}
        run.config |= {HOSTILE: run.config["recipe"], "lr": HOSTILE + str(run.config["lr"])}
        run.config["lineage"] = {"model": HOSTILE, "model_run": HOSTILE}
        run.summary |= {"stop_reason": HOSTILE, "verdict": HOSTILE, f"eval/field/{HOSTILE}": 0.1}
        run.summary |= {f"eval/{HOSTILE}": 0.5, f"eval_before/{HOSTILE}": 0.4}
    told = stages.summarise(found, found, main=HOSTILE)
    assert told is not None and told["main"] == HOSTILE
    built = page.build_stages(stages.alone(told, HOSTILE, found, "now"), found)
    elements = Elements(built).found
    assert sum(tag == "script" for tag, _ in elements) == 3
    assert not any(tag == "img" for tag, _ in elements)
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    data = json.loads(re.search(r'id="data">(.*?)</script>', built, re.DOTALL)[1])  # type: ignore[index]
    assert "<img" not in json.dumps(data["figures"]) and "<script" not in json.dumps(data["figures"])


def many(office: Path, n: int, recipes: int) -> list[runs.Run]:
    """n runs of `recipes` recipes in memory, one in twenty diverged."""
    found = {run.name: run for run in runs.read(office)}
    model, made = found["bbbb-s0"], []
    rng = np.random.default_rng(0)
    for i in range(n):
        stage, seed = ("sft", "dpo", "grpo", "ppo")[i % recipes % 4], i // recipes
        steps = np.arange(1, 201)
        kl = runs.Series(steps, np.full(200, np.nan), np.cumsum(rng.random(200)) / 1000)
        history = {"policy/kl": kl, "reward/mean": kl, "train/loss": kl}
        history["eval/exact_match"] = runs.Series(*(column[9::10] for column in kl))
        told = model.__dict__ | {"id": f"id{i}", "name": f"r{i % recipes}-s{seed}", "job_type": stage}
        told["config"] = model.config | {"seed": seed, "recipe": f"r{i % recipes}", "lr": 1e-4 * (1 + i % recipes)}
        told["summary"] = model.summary | {"eval/exact_match": 0.6 + 0.02 * rng.standard_normal()}
        told |= {"history": history, "status": "diverged" if i % 20 == 19 else "ok"}
        made.append(runs.Run(**told))
    return made


@pytest.mark.parametrize("recipes", [10, 250])
def test_a_thousand_runs_stay_small(office: Path, recipes: int) -> None:
    found = many(office, 1000, recipes)
    told = stages.summarise(found, found)
    assert told is not None and len(told["stages"]) == recipes
    built = page.build_stages(stages.alone(told, "x", found, "now"), found)
    assert len(built.encode()) < 5e6 and len(Elements(built).found) < 40_000
    assert len(stages_text.headline(told)) <= 21


def test_a_seed_pulled_twice_counts_once_and_the_undecided_do_not(office: Path) -> None:
    found = [run for run in runs.read(office) if run.config["recipe"] == "bbbb"]
    again = runs.Run(**found[0].__dict__ | {"id": "again", "started": found[0].started + 9})
    again.summary = again.summary | {"eval/exact_match": 0.9}
    killed = runs.Run(
        **found[1].__dict__ | {"id": "killed", "status": "crashed", "config": found[1].config | {"seed": 9}}
    )
    told = stages.summarise([*found, again, killed], found)
    assert told is not None and told["repeated"] == 1
    (one,) = told["stages"]
    assert (one["n"], one["n_decided"], one["scores"]["exact_match"]["n"]) == (6, 5, 5)
    assert max(seed["after"] for seed in one["scores"]["exact_match"]["seeds"]) == 0.9
    assert [row["name"] for row in told["failures"]] == [killed.name]


def test_runs_without_scores_are_told_as_not_measured(office: Path) -> None:
    (run,) = [run for run in runs.read(office) if run.name == "ffff-s0"]
    bare = runs.Run(**run.__dict__ | {"summary": {}, "history": {}, "config": {}, "job_type": "reward"})
    told = stages.summarise([bare], [bare])
    assert told is not None and told["scores"] == []
    assert stages_text.headline(told) == {"reward ffff": "not measured: no run has a score before and after"}
    assert "not measured" in page.build_stages(stages.alone(told, "x", [bare], "now"), [bare])


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_draws_the_figures(office: Path, tmp_path: Path) -> None:
    write(office, tmp_path)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--virtual-time-budget=6000", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'chromium'}"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "report.html").as_uri()], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.count('class="main-svg"') >= 7
    assert "CONSOLE" not in done.stderr
