"""The guard of post-training: every failure is told soon and by its name, no healthy run is ever stopped."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import console
from posttrain import exported
from posttrain.guard import Guard, Verdict
from posttrain.limits import Limits
from posttrain.trl_names import translate
from tests.conftest import REPOSITORY
from tests.posttrain.traces import FAILING, HEALTHY, Row, draw, watch

SEEDS = range(200)  # of every healthy kind
LOUD = {  # share that is found, of which rightly named, and delay in 9 of 10 runs as a share of the budget
    "nan": (1.0, 1.0, 0.0),
    "filtered nan": (1.0, 1.0, 0.08),
    "loss jumps": (0.97, 1.0, 0.25),
    "loss climbs": (0.95, 1.0, 0.25),
    "kl": (0.98, 1.0, 0.12),
    "dpo collapse": (0.98, 0.85, 0.1),
    "dpo collapse unseen": (0.9, 1.0, 0.2),
    "hacked at once": (0.96, 0.75, 0.12),
    "hacked later": (0.97, 0.75, 0.12),
    "hacked after a gain": (0.97, 0.8, 0.12),
    "length": (0.98, 0.95, 0.12),
    "entropy": (0.95, 1.0, 0.22),
    "no signal": (0.92, 1.0, 0.05),
    "quality": (0.97, 0.97, 0.12),
}


def feed(guard: Guard, rows: list[tuple[int, Row]]) -> Verdict | None:
    """The first verdict."""
    return next((verdict for step, row in rows if (verdict := guard.observe(step, row))), None)


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_run_is_never_stopped(kind: str) -> None:
    for seed in SEEDS:
        verdict, guard = watch(draw(kind, seed))
        assert verdict is None, f"seed {seed}: {verdict}"
        assert guard.status != "lost"


@pytest.mark.parametrize("kind", FAILING)
def test_a_failing_run_is_stopped_soon_and_by_its_name(kind: str) -> None:
    found, named, delays = 0, 0, []
    for seed in SEEDS[:100]:
        trace = draw(kind, seed)
        verdict = watch(trace)[0]
        if verdict is None:
            continue
        assert trace.onset is not None and verdict.step >= trace.onset, f"seed {seed}: too early, {verdict}"
        assert verdict.onset_step <= verdict.step
        found += 1
        named += verdict.kind in trace.names
        delays.append((verdict.step - trace.visible) / trace.steps)
    least, right, late = LOUD[kind]
    assert found >= least * 100 and named >= right * found
    assert np.quantile(delays, 0.9) <= late


def demo(seed: int, hacked: bool) -> Iterator[tuple[int, Row]]:
    """GRPO on the office task, 60 steps: a reward for length, as it was measured, or the task's own."""
    rng = np.random.default_rng(seed)
    speed = rng.uniform(0.7, 1.3)
    for step in range(61):
        done = min(1.0, speed * step / 8) if hacked else 0.0
        quality = 0.33 * (1 - done) if hacked else 0.50 + 0.2 * step / 60
        row = {
            "reward": (0.92 + 1.5 * done if hacked else 1.2 + 0.4 * step / 60) + rng.normal(0, 0.05),
            "kl": (1.5 * done**2 if hacked else 0.05 * step / 60) * rng.uniform(0.8, 1.2),
            "entropy": 0.06 - 0.022 * step / 60 + rng.normal(0, 0.002),
            "completions/mean_length": 40 + 51 * done + rng.normal(0, 1),
            "completions/clipped_ratio": rng.binomial(64, 0.83 * done) / 64,
            "frac_reward_zero_std": rng.binomial(8, 0.3) / 8,
            "grad_norm": abs(rng.normal(0.5, 0.1)),
            "loss": rng.normal(0, 0.01),
        }
        row = translate(row, "grpo")
        if step % 3 == 0:
            row |= {"eval/exact_match": rng.binomial(64, quality) / 64}
        yield step, row


def test_a_loophole_is_flagged_before_a_quarter_of_the_budget() -> None:
    for seed in SEEDS:
        verdict = feed(Guard("grpo", 60), list(demo(seed, hacked=True)))
        assert verdict and verdict.step < 15, f"seed {seed}: {verdict}"
        assert verdict.kind in ("reward_hacking", "length_explosion", "kl_blowup")


def test_the_same_runs_without_the_loophole_are_healthy_throughout() -> None:
    for seed in SEEDS:
        guard = Guard("grpo", 60)
        assert feed(guard, list(demo(seed, hacked=False))) is None
        assert guard.status == "healthy" and guard.events == []


@pytest.mark.parametrize("every", [1, 5, 10])
@pytest.mark.parametrize("held_out", [True, False])
def test_the_measured_collapse_of_dpo_is_flagged(every: int, held_out: bool) -> None:
    """513 pairs at a learning rate of 3e-4: loss, margins and accuracy improve while 83% become 7%."""
    rng, guard, verdict = np.random.default_rng(every), Guard("dpo", 128), None
    for step in range(129):
        done = min(1.0, step / 90)
        row = {
            "loss": 0.67 - 0.22 * done + rng.normal(0, 0.03),
            "rewards/margins": 0.07 + 1.4 * done + rng.normal(0, 0.05),
            "rewards/accuracies": 0.53 + 0.23 * done + rng.normal(0, 0.05),
            "logps/chosen": -0.8 - 17.7 * done + rng.normal(0, 0.3),
            "entropy": 0.083 + 0.076 * done,
            "grad_norm": 2.0,
        }
        row = translate(row, "dpo") if step and step % every == 0 else {}
        if held_out and step % 16 == 0:
            row["eval/exact_match"] = rng.binomial(64, 0.83 - 0.76 * done) / 64
        verdict = verdict or guard.observe(step, row)
    assert verdict and verdict.kind == "dpo_collapse" and verdict.step < 100
    assert guard.status == "lost" and verdict.evidence.keys() >= {"margin", "logp_chosen"}
    assert guard.best_step in ((0, 16, 32) if held_out else (-1,))


@pytest.mark.parametrize("kind", [*HEALTHY, *FAILING])
def test_a_guard_continues_from_its_state_as_if_nothing_had_happened(kind: str) -> None:
    for seed in range(3):
        trace = draw(kind, seed)
        through, saved = Guard(trace.stage, trace.steps), Guard(trace.stage, trace.steps)
        for number, (step, row) in enumerate(trace.rows):
            told = through.observe(step, row)
            assert saved.observe(step, row) == told
            if number % 5 == 0:
                saved = Guard(**json.loads(json.dumps(saved.state(), allow_nan=False)))
        assert saved.state() == through.state() and saved.status == through.status


# --- one rule at a time -----------------------------------------------------------------------------------------------
def sft(loss: list[float], norm: float | None = 1.0) -> list[tuple[int, Row]]:
    """Rows of these losses; `norm` is the gradient's where the loss is 0, and None leaves it out everywhere."""
    norms = [{} if norm is None else {"stability/grad_norm": 1.0 if value else norm} for value in loss]
    return [(step, {"train/loss": value, **norms[step]}) for step, value in enumerate(loss)]


@pytest.mark.parametrize("name", ["train/loss", "val/loss", "stability/grad_norm", "policy/kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_ends_a_run_at_once_and_is_told_once(name: str, value: float) -> None:
    guard = Guard("grpo", 100)
    assert feed(guard, sft([0.5] * 5)) is None
    verdict = guard.observe(5, {"train/loss": 0.5, name: value})
    assert verdict and (verdict.kind, verdict.step, verdict.onset_step) == ("nonfinite", 5, 5)
    assert str(verdict) == f"lost at step 5 (nonfinite; since step 5; {name} {value})"
    assert guard.observe(6, {name: value}) is None and guard.status == "lost"


def test_a_filtered_nan_is_seen_through() -> None:
    """TRL prints 0.0; what had been near 0, one odd batch and RL's loss are no such thing."""
    for norm in (0.0, None):
        verdict = feed(Guard("sft", 100), sft([6.65, 6.685, 6.6, 0.0, 0.0, 0.0], norm))
        assert verdict and (verdict.kind, verdict.onset_step, verdict.step) == ("nonfinite", 3, 4)
    assert feed(Guard("sft", 100), sft([6.6, 6.6, 6.6, 0.0, 6.6, 0.0, 6.6], norm=0.0)) is None
    assert feed(Guard("sft", 100), sft([0.3, 0.1, 0.02, 0.001, 0.0, 0.0], norm=0.0)) is None
    assert feed(Guard("grpo", 100), sft([0.3, 0.2, -0.2, 0.0, 0.0, 0.0], norm=0.0)) is None
    assert feed(Guard("distill", 100), sft([0.0] * 20, norm=0.0)) is None


def test_a_loss_that_is_level_without_a_gradient_is_lost_and_at_zero_it_is_learnt() -> None:
    guard = Guard("sft", 60)
    rows = [(5.8, 2.5), (7.3, 0.0), (7.3, 0.0), (7.3, 0.0)]
    told = [guard.observe(n, {"train/loss": a, "stability/grad_norm": b}) for n, (a, b) in enumerate(rows, 1)]
    assert told[:3] == [None] * 3 and told[3] and (told[3].kind, told[3].onset_step) == ("loss_divergence", 2)
    learnt = Guard("sft", 60)
    assert not any(learnt.observe(n, {"train/loss": 1e-6, "stability/grad_norm": 0.0}) for n in range(1, 60))


def test_two_rows_of_high_kl_are_outliers_and_three_are_a_blowup() -> None:
    for high, lost in (([50.0, 60.0], False), ([1.2] * 3, True), ([0.5] * 40, False)):
        guard = Guard("ppo", 50)
        rows = [(step, {"policy/kl": kl}) for step, kl in enumerate([0.01] * 5 + high)]
        assert (feed(guard, rows) is not None) == lost
    assert [(one.kind, one.recovered_step) for one in guard.events] == [("kl_blowup", None)]
    for step in range(45, 50):
        guard.observe(step, {"policy/kl": 0.02})
    assert guard.events[0].recovered_step == 47


def test_limits_can_be_set_and_survive_the_checkpoint() -> None:
    guard = Guard("grpo", 50, Limits(kl_max=0.1, kl_warn=0.05))
    guard = Guard(**json.loads(json.dumps(guard.state())))
    assert feed(guard, [(step, {"policy/kl": 0.2}) for step in range(3)])


def test_a_fall_is_told_once_whatever_else_moves_later() -> None:
    """And again if the score has come back since."""
    guard, told = Guard("grpo", 100), []
    for step in range(60):
        score = 0.8 if step < 10 or 30 <= step < 40 else 0.1
        row: dict[str, Any] = {"reward/mean": np.float32(step), "eval/exact_match": np.float32(score)}
        if verdict := guard.observe(step, row | {"policy/length": 10 + step}):
            told.append((verdict.kind, verdict.step))
        json.dumps(guard.state())
    assert told == [("reward_hacking", 10), ("reward_hacking", 40)]
    assert guard.events[0].recovered_step == 30 and guard.status == "lost" and guard.best_step == 0


def test_noise_of_few_items_is_no_fall_and_the_same_fall_over_many_is() -> None:
    scores = [0.5, 0.55, 0.5, 0.38, 0.4, 0.36, 0.34, 0.33]
    for items, lost in ((16.0, False), (64.0, False), (10_000.0, False)):
        rows = [(step, {"eval/exact_match": score, "eval/n": items}) for step, score in enumerate(scores)]
        assert (feed(Guard("sft", 100), rows) is not None) == lost
    scores = [0.5, 0.5, 0.2, 0.2, 0.2]
    for items, lost in ((16.0, False), (256.0, True)):
        rows = [(step, {"eval/exact_match": score, "eval/n": items}) for step, score in enumerate(scores)]
        assert (feed(Guard("sft", 100), rows) is not None) == lost


def test_a_fall_is_believed_at_the_second_evaluation_unless_it_is_huge() -> None:
    for scores, at in (([0.6, 0.15, 0.15], 2), ([0.9, 0.02, 0.02], 1), ([0.6, 0.15, 0.6, 0.15, 0.6], None)):
        verdict = feed(Guard("sft", 100), [(step, {"eval/exact_match": score}) for step, score in enumerate(scores)])
        assert (verdict and verdict.step) == at
        if verdict:
            assert (verdict.kind, verdict.onset_step) == ("quality_fall", 1)


def test_the_best_step_is_the_judges_and_without_one_that_of_the_validation_loss() -> None:
    guard = Guard("sft", 100)
    assert guard.best_step == -1
    for step, loss in enumerate([2.0, 1.5, 1.7]):
        guard.observe(step, {"val/loss": loss})
    assert guard.best_step == 1
    for step, score in enumerate([0.2, 0.4, 0.4, 0.3], 3):
        guard.observe(step, {"eval/exact_match": score, "val/loss": 1.0})
    assert guard.best_step == 4
    other = Guard("reward", 100, judge="eval/accuracy")
    assert other.observe(0, {"eval/accuracy": 0.7, "eval/exact_match": 0.9}) is None and other.best_step == 0


def test_rewards_that_are_all_equal_are_an_event_and_from_the_start_on_a_verdict() -> None:
    def rows(start: float) -> list[tuple[int, Row]]:
        return [(step, {"reward/zero_std": start if step < 30 else 1.0}) for step in range(100)]

    guard = Guard("grpo", 100)
    assert feed(guard, rows(0.3)) is None
    assert [(one.kind, one.step) for one in guard.events] == [("no_signal", 30)] and guard.status == "warning"
    verdict = feed(Guard("grpo", 100), rows(1.0))
    assert verdict and (verdict.kind, verdict.step, verdict.onset_step) == ("no_signal", 20, 0)


def test_long_answers_are_no_failure_while_quality_rises() -> None:
    def rows(last: float) -> list[tuple[int, Row]]:
        found: list[tuple[int, Row]] = []
        for step in range(100):
            grown = min(1.0, step / 40)
            found.append((step, {"policy/length": 50 + 300 * grown, "policy/clipped": 0.8 * grown}))
            if step % 5 == 0:
                found[-1][1]["eval/exact_match"] = 0.2 + (last - 0.2) * grown
        return found

    guard = Guard("grpo", 100)
    assert feed(guard, rows(0.9)) is None and guard.status == "warning"
    verdict = feed(Guard("grpo", 100), rows(0.2))
    assert verdict and verdict.kind == "length_explosion"


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="one of sft, reward"):
        Guard("sleep", 10)  # type: ignore[arg-type]


def test_a_row_costs_the_same_late_as_early_and_memory_is_bounded() -> None:
    rng, guard = np.random.default_rng(0), Guard("grpo", 5000)
    for step in range(5000):
        flips = 1.0 if step // 12 % 2 else 0.0
        guard.observe(step, {"policy/kl": 0.5 * flips, "reward/zero_std": flips, "reward/mean": rng.normal()})
    assert len(guard.events) <= 200
    assert len(json.dumps(guard.state())) < 60_000


# --- names and the command --------------------------------------------------------------------------------------------
def test_trl_s_names_become_ours_and_kto_s_kl_is_not_the_policy_s() -> None:
    logs = {"loss": 0.5, "kl": 0.1, "rewards/exact/mean": 0.3, "rewards/margins": 1.0, "epoch": 0.5, "note": "x"}
    ours = {"train/loss": 0.5, "policy/kl": 0.1, "reward/exact": 0.3, "dpo/margin": 1.0, "epoch": 0.5}
    assert translate(logs, "grpo") == ours  # type: ignore[arg-type]
    assert "policy/kl" not in translate({"kl": 3.0}, "kto")


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert exported.main([*argv, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert list(result) == ["status", "verdict", "best_step", "events"]
    return result


def test_the_command_judges_csv_and_jsonl_under_trl_s_names_and_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.csv"
    kl = [0.01] * 5 + [3.0] * 5
    path.write_text("step,run - train/kl,reward\n" + "".join(f"{s},{v},1.0\n{s},,\n" for s, v in enumerate(kl, 1)))
    result = told(capsys, str(path), "--stage", "grpo")
    assert result["status"] == "lost" and result["verdict"]["kind"] == "kl_blowup" and result["verdict"]["step"] == 8
    assert exported.main([str(path), "--stage", "grpo"]) == 0
    assert "lost at step 8 (kl_blowup" in capsys.readouterr().out
    path = tmp_path / "log.jsonl"
    rows: list[dict[str, Any]] = [{"step": s, "train/loss": 0.5, "completions": [1], "on": True} for s in range(9)]
    rows += [{"step": 4, "train/loss": 0.5}, {"step": 10, "train/loss": "NaN", "eval/loss": 2.0}]
    path.write_text("\n".join(map(json.dumps, rows)))
    result = told(capsys, str(path), "--stage", "sft")
    assert result["verdict"] == {"kind": "nonfinite", "step": 10, "onset_step": 10, "evidence": {"train/loss": "nan"}}
    path.write_text("\n".join(json.dumps({"step": s, "eval/exact_match": 0.5}) for s in range(5)))
    result = told(capsys, str(path), "--stage", "sft")
    assert (result["status"], result["verdict"], result["best_step"]) == ("healthy", None, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no row has a step"),
        ("a,b\n1,2\n", "no row has a step"),
        ("step,b\n1,2\n", "none of its columns is judged: b"),
        ("step,loss\nnan,2\n", "line 2: the step is nan"),
        ('{"step": 1}\n{"step"', "line 2: not JSON"),
        ('{"step": 1}\n[1]', "line 2: give one JSON object"),
    ],
)
def test_a_log_that_cannot_be_read_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(console.UserError, match=says):
        exported.main([str(path), "--stage", "sft"])
    with pytest.raises(console.UserError, match="no such file"):
        exported.main([str(tmp_path / "none.csv"), "--stage", "sft"])
    with pytest.raises(console.UserError, match="is a folder"):
        exported.main([str(tmp_path), "--stage", "sft"])


def test_the_door_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,0.5\n2,nan\n")
    door = [sys.executable, "-m", "posttrain.guard", str(path), "--stage", "sft"]
    done = subprocess.run(door, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "nonfinite" in done.stdout
    done = subprocess.run([*door[:-1], "sleep"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    code = "import sys, posttrain.exported; sys.exit(bool({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
