"""`python -m pretrain.stability CURVE.csv` on exported curves of every shape that people have."""

import gzip
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import console
from pretrain import curve


def learning(steps: int, noise: float = 0.05, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 2.8 + 7.5 * (1 + np.arange(steps) / 20) ** -0.5 + rng.normal(0, noise, steps)


def write(path: Path, loss: Any, step: Any = None, header: str = "step,loss", text: str = "") -> str:
    steps = np.arange(1, len(loss) + 1) if step is None else step
    rows = text or "".join(f"{at},{value}\n" for at, value in zip(steps, loss, strict=True))
    path.write_text(f"{header}\n{rows}")
    return str(path)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What the command prints of a curve, with --json."""

    def ask(*argv: str) -> dict[str, Any]:
        capsys.readouterr()
        assert curve.main([*argv, "--json"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert list(result) == ["verdict", "events", "spike_score"]
        for event in result["events"]:
            assert list(event) == ["step", "kind", "warn_step", "recovered_step", "evidence"]
        return result

    return ask


# Averages over 200 steps, as the LUMI logs are.
LEARNED = [9.3, 6.7, 5.9, 5.4, 5.1, 4.8, 4.5, 4.3, 4.1, 3.9, 3.8, 3.75, 3.7, 3.66, 3.62, 3.6, 3.57, 3.55]
EARLY = [6.36, 5.39, 4.85, 4.48, 4.2, 4.01]
LOUD = [6.01, 5.83, 5.64, 5.91, 5.63, 5.61, 5.89, 5.82, 5.67]
STUCK = [9.2, 8.7, 8.7, 8.3, 8.2, 8.2, 8.1, 8.1, 8.15, 8.1, 8.1, 8.05, 8.1, 8.1, 8.1, 8.05, 8.1, 8.1]
SLOWLY = [9.9, 8.9, 8.4, 8.4, 8.3, 8.2, 8.1, 8.0, 7.95, 8.0, 8.05, 8.1, 8.15, 8.25, 8.35, 8.4, 8.5, 8.52]


@pytest.mark.parametrize(
    ("loss", "verdict"),
    [
        (LEARNED, "healthy"),
        (STUCK, "not_learning"),
        (SLOWLY, "diverged"),
        ([*LEARNED[:12], 5.7, 4.8, 5.5, 5.4, 5.5, 5.6], "diverged"),
        # Few rows before it, and so loud after it that the noise can be known from neither.
        ([*EARLY, 5.87, 5.78, 5.94, 5.66, 5.55, 5.79, 5.47, 5.78, 5.92, 5.77, 5.96, 5.71, *LOUD], "diverged"),
        ([*LEARNED[:12], 5.7, *LEARNED[13:]], "recovered"),
        ([*LEARNED[:12], 5.7, 5.2, 4.1, *LEARNED[15:]], "recovered"),
        ([*LEARNED[:12], math.nan, math.nan], "nan"),
        ([*LEARNED[:12], math.nan, *LEARNED[13:]], "recovered"),
        ([10.9, 10.8, 10.6, 10.4, 10.1, 9.9, 9.7, 9.6], "not_learning"),
    ],
)
def test_logs_of_few_rows(tmp_path: Path, told: Callable[..., dict[str, Any]], loss: list[float], verdict: str) -> None:
    path = write(tmp_path / "log.csv", loss, 200 * np.arange(1, len(loss) + 1))
    assert told(path)["verdict"] == verdict


@pytest.mark.parametrize("rows", [3, 11, 60])
def test_a_test_run_of_a_hundred_steps_has_learned_too_little_to_be_blamed(
    tmp_path: Path, told: Callable[..., dict[str, Any]], rows: int
) -> None:
    """Megatron's golden values: 10.9 to 9.5 nats in 50 steps."""
    loss = 10.9 - 1.4 * np.linspace(0, 1, rows) ** 1.2 + np.random.default_rng(rows).normal(0, 0.03, rows)
    assert told(write(tmp_path / "golden.csv", loss))["verdict"] == "healthy"


def spoil(loss: np.ndarray, kind: str) -> np.ndarray:
    loss, n = loss.copy(), len(loss)
    later = np.arange(n - n // 2)
    if kind == "single bad batches":
        loss[[n // 4, n // 2, n - 1]] += 2.5
    elif kind == "spike":
        loss[n // 2 :] += 3.0 * np.exp(-later / (n / 60))
    elif kind == "rises and stays":
        loss[n // 2 :] += np.minimum(3.0, later * 0.1)
    elif kind == "rises in the last steps":
        loss[-n // 100 :] += 3.0
    elif kind == "returns late":
        loss[n // 2 : -n // 10] += 5.0
    elif kind == "ends in nan":
        loss[-5:] = math.nan
    elif kind == "another mixture":
        loss[n // 2 :] += 0.8
    elif kind == "learning rate steps":
        loss[n // 2 :] -= 0.4
    return loss


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("nothing", "healthy"),
        ("single bad batches", "healthy"),
        ("spike", "recovered"),
        ("rises and stays", "diverged"),
        ("rises in the last steps", "diverged"),
        ("returns late", "recovered"),
        ("ends in nan", "nan"),
        ("another mixture", "healthy"),
        ("learning rate steps", "healthy"),
    ],
)
def test_logs_of_many_rows(
    tmp_path: Path, told: Callable[..., dict[str, Any]], kind: str, verdict: str, every: int
) -> None:
    for rows in (600, 3000):
        loss = spoil(learning(rows), kind)
        result = told(write(tmp_path / "log.csv", loss, every * np.arange(rows)))
        assert result["verdict"] == verdict, (rows, result)
        if verdict in ("diverged", "nan"):
            assert all(event["step"] >= every * rows // 3 for event in result["events"])
        if kind == "rises and stays":
            lost = next(event for event in result["events"] if event["kind"] == "divergence")
            assert lost["step"] < lost["evidence"]["online_step"] < every * rows * 0.6


@pytest.mark.parametrize("rows", [8, 20, 80, 400])
def test_the_noise_of_small_batches_is_no_rise(tmp_path: Path, told: Callable[..., dict[str, Any]], rows: int) -> None:
    """A fine-tuned model: 0.3 nats learned, 0.2 nats of noise."""
    for seed in range(10):
        noise = np.random.default_rng([seed, rows]).normal(0, 0.2, rows)
        path = write(tmp_path / "log.csv", 1.5 + 0.3 * np.exp(-np.arange(rows) / 10) + noise, 10 * np.arange(rows))
        assert told(path)["verdict"] == "healthy"


def test_siblings_tell_a_bad_batch_from_a_spike_and_a_run_that_learns_less(
    tmp_path: Path, told: Callable[..., dict[str, Any]]
) -> None:
    batch = np.random.default_rng(9).normal(0, 0.05, 1000)  # what is hard about each batch is so for every seed
    for seed in range(4):
        loss = learning(1000, 0.02, seed) + batch
        loss[[300, 301, 302, 600]] += 2.0
        write(tmp_path / f"seed-{seed}.csv", loss)
    alone, pattern = str(tmp_path / "seed-0.csv"), str(tmp_path / "*.csv")
    assert told(alone)["verdict"] == "recovered"
    result = told(alone, "--siblings", pattern)
    assert result["verdict"] == "bad_batch"
    assert [(e["step"], e["kind"]) for e in result["events"]] == [(301, "bad_batch"), (601, "bad_batch")]
    assert all(e["evidence"]["siblings_hit"] == 3 for e in result["events"])
    own = learning(1000, 0.02, 7) + batch
    own[500:506] += 2.0
    assert told(write(tmp_path / "own.csv", own), "--siblings", pattern)["verdict"] == "recovered"
    slow = 10.3 - 0.4 * (10.3 - learning(1000, 0.02, 8)) + batch
    result = told(write(tmp_path / "slow.csv", slow), "--siblings", str(tmp_path / "seed-*.csv"))
    above = [event for event in result["events"] if event["kind"] == "above_siblings"]
    assert result["verdict"] == "not_learning" and above and above[0]["step"] <= 200


def test_gradient_norms_warn(tmp_path: Path, told: Callable[..., dict[str, Any]]) -> None:
    rows, norms = spoil(learning(1000), "rises and stays"), np.exp(np.random.default_rng(0).normal(-1, 0.1, 1000))
    norms[495:] *= 30
    text = "".join(f"{i},{a},{b},\n" for i, (a, b) in enumerate(zip(rows, norms, strict=True)))
    result = told(write(tmp_path / "log.csv", rows, header="step,train/loss,stability/grad_norm,train/lr", text=text))
    assert [e["warn_step"] for e in result["events"] if e["kind"] == "divergence"] == [495]


@pytest.mark.parametrize(
    "header",
    [
        "step,loss",
        "Step,train_loss",
        "iteration,lm loss",
        "_step,train/loss",
        "Step,brave-run-7 - train/loss",
        "global_step,training_loss",
    ],
)
def test_names_of_columns(tmp_path: Path, told: Callable[..., dict[str, Any]], header: str) -> None:
    assert told(write(tmp_path / "a.csv", LEARNED, 200 * np.arange(1, 19), header))["verdict"] == "healthy"


def test_rows_without_a_loss_are_left_out_and_a_resumed_log_replaces_what_it_repeats(
    tmp_path: Path, told: Callable[..., dict[str, Any]]
) -> None:
    rows = "".join(f"{200 * i},{x},\n{200 * i},,{x + 0.1}\n" for i, x in enumerate([*LEARNED[:12], 7.7, 8.7, 9.7], 1))
    lost = write(tmp_path / "a.csv", [], header="step,loss,val_loss", text=rows)
    assert told(lost)["verdict"] == "diverged"
    again = rows + "".join(f"{200 * i},{x},\n" for i, x in enumerate(LEARNED[10:], 11))
    assert told(write(tmp_path / "a.csv", [], header="step,loss,val_loss", text=again))["verdict"] == "healthy"
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    assert told(str(tmp_path / "a.csv.gz"))["verdict"] == "healthy"


@pytest.mark.parametrize(
    ("counter", "verdict"), [("0,0", "healthy"), ("3,0", "nan"), ("0,150", "nan"), ("0,4", "healthy")]
)
def test_megatrons_counters_of_lost_steps(
    tmp_path: Path, told: Callable[..., dict[str, Any]], counter: str, verdict: str
) -> None:
    rows = [f"{200 * i},{x},{'0,0' if i < 16 else counter}\n" for i, x in enumerate(LEARNED, 1)]
    path = write(tmp_path / "a.csv", [], header="step,loss,nan_steps,skipped_steps", text="".join(rows))
    assert told(path)["verdict"] == verdict


def test_the_spike_score_counts_losses_seven_deviations_away(
    tmp_path: Path, told: Callable[..., dict[str, Any]]
) -> None:
    loss = 3 + np.random.default_rng(0).normal(0, 0.1, 2000)
    assert told(write(tmp_path / "a.csv", loss))["spike_score"] == 0
    loss[[500, 900, 1500, 1800]] += 2.0
    assert told(write(tmp_path / "a.csv", loss))["spike_score"] == pytest.approx(0.2)


def test_a_person_reads_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curve.main([write(tmp_path / "a.csv", SLOWLY, 200 * np.arange(1, 19))]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert "diverged" in first and "18 rows" in first and any("divergence" in line for line in rest)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such file"),
        ("", "no column step"),
        ("step,val_loss\n1,2\n", "'val_loss'"),
        ("loss\n1\n", "no column step"),
        ("step,loss\n", "no row"),
        ("step,loss\n1,\n2,\n", "no row"),
        ("step,loss\n1,high\n", "line 2: loss is 'high'"),
        ("step,loss\nnan,3\n", "line 2: the step is nan"),
        ("Step,a - train/loss,b - train/loss\n1,2,3\n", "2 columns of train/loss"),
        ("step,loss\n\0\n", "line 2"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "a.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(console.UserError, match=says) as told:
        curve.main([str(path)])
    assert "a.csv" in str(told.value) and "\n" not in str(told.value)


def test_what_is_no_text_and_siblings_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\x1f\x8b\x08broken")
    (tmp_path / "b.csv").write_bytes(b"step,loss\n\xff\xfe,1\n")
    for name in ("a.csv", "b.csv"):
        with pytest.raises(console.UserError, match="not a CSV file"):
            curve.main([str(tmp_path / name)])
    with pytest.raises(console.UserError, match="folder"):
        curve.main([str(tmp_path)])
    alone = write(tmp_path / "c.csv", LEARNED)
    with pytest.raises(console.UserError, match="no other file"):
        curve.main([alone, "--siblings", alone])


def test_the_door(tmp_path: Path, spawn: Callable[..., Any]) -> None:
    path = write(tmp_path / "a.csv", STUCK, 200 * np.arange(1, 19))
    child = spawn([sys.executable, "-m", "pretrain.stability", path, "--json"])
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and json.loads(out)["verdict"] == "not_learning", err
    child = spawn([sys.executable, "-m", "pretrain.stability", str(tmp_path / "b.csv")])
    out, err = child.communicate(timeout=60)
    assert child.returncode == 2 and not out and err.count("\n") == 1 and "no such file" in err
