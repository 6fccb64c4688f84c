"""`python -m pretrain.sensitivity RUNS`: what does a learning rate that is off cost, and what makes it cost less?

Learning-rate sensitivity of Wortsman et al. 2023 (arXiv 2309.14322, section 2.2): with pulls over a grid of learning
rates, S = mean over the grid of min(loss, loss at initialization) - lowest loss of the grid. A variant (with QK-norm,
another epsilon) is better the smaller its S. Reads finished pulls over variants, learning rates and seeds, as
sweeps/lr_sensitivity.yaml makes them; says also how many diverged where, and whether the largest attention logit told
so before.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import console
import webpage
from gacha import runs
from pretrain.sensitivity_page import draw, spoken, told_of_logits
from pretrain.transfer import Curve, estimate

LOST = 0.2  # share of what the best learning rate learned that a pull at a higher one may end without
TIMES = 2.0  # seeds of one learning rate never differ so much in their largest attention logit (measured: 1.94)
# What does not make a variant: the axes of the study, and where, when and how often a pull was computed and looked at.
NOT_COMPARED = frozenset({"lr", "seed", "init_seed", "data_seed", "sample_seed", "data", "out", "pulls", "each"})
NOT_COMPARED |= {"recipe", "git_commit", "hardware", "versions", "device", "price_per_hour", "currency", "json"}
NOT_COMPARED |= {"head_dim", "micro_batch_tokens", "checkpoint_activations", "sharding", "compile"}
NOT_COMPARED |= {"val_every", "log_every", "checkpoint_every"}


@dataclass(frozen=True)
class SensitivityConfig:
    runs: tyro.conf.Positional[str]
    """folder of offline W&B runs"""
    by: str = ""
    """fields that make a variant, as qk_norm,z_loss; empty: all in which the pulls differ, but lr and seeds"""
    out: str = "sensitivity.html"
    """the page to write"""
    json: bool = False
    """print the result as one JSON object"""


@dataclass(frozen=True)
class Pull:
    """What is asked of one finished pull."""

    loss: float
    """final validation loss in nats per token; inf where it is not finite, or the pull was stopped as diverged"""
    status: str
    train: runs.Series
    """training loss"""
    logits: runs.Series | None
    """largest attention logit"""
    rms: float
    """update RMS over the last tenth of the rows; NaN where none was logged"""


@dataclass(frozen=True)
class Variant:
    """A recipe but for its learning rate: its pulls by (learning rate, seed)."""

    name: str
    fields: dict[str, Any]
    lrs: list[float]
    seeds: list[int]
    pulls: dict[tuple[float, int], Pull]

    @property
    def at_init(self) -> float:
        """Loss at initialization: the first row of the pulls at the lowest learning rate, which hardly moved them."""
        return float(np.mean([self.pulls[self.lrs[0], seed].train.value[0] for seed in self.seeds]))

    @property
    def curve(self) -> Curve:
        """Final losses (learning rates, seeds), none above that at initialization."""
        loss = [[min(self.pulls[lr, seed].loss, self.at_init) for seed in self.seeds] for lr in self.lrs]
        return Curve(np.log2(self.lrs), np.array(loss))

    @property
    def best(self) -> tuple[float, float]:
        """The learning rate with the lowest mean loss, and that loss."""
        mean = self.curve.loss.mean(1)
        return self.lrs[int(mean.argmin())], float(mean.min())

    def lost(self, lr: float, seed: int) -> bool:
        """Whether a pull diverged, or at more than the best learning rate ended far from what can be learned."""
        pull, (best_lr, best) = self.pulls[lr, seed], self.best
        far = min(pull.loss, self.at_init) > best + LOST * (self.at_init - best)
        return pull.status == "diverged" or (lr > best_lr and far)


def main(argv: list[str]) -> int:
    """Read the pulls, say how sensitive each variant is, write the page."""
    c = console.parse(SensitivityConfig, argv, "python -m pretrain.sensitivity")
    variants = collect(runs.read(c.runs), c.runs, [name for name in c.by.split(",") if name])
    result = summarise(variants)
    page = webpage.build("Learning-rate sensitivity · llm-gacha", *draw(result, variants, c.runs))
    console.write_atomic(Path(c.out), page.encode())
    if c.json:
        console.print_result({**result, "page": c.out}, as_json=True)
        return 0
    first, wide = variants[0].name, max(len("variant"), *(len(variant.name) for variant in variants))
    print(f"{'variant':<{wide}}  seeds  S, 95%                    S less {first}'s, 95%       best lr  loss    lost")
    for row in result["variants"]:
        less = spoken(row["against_first"]) if row["against_first"] else ""
        print(
            f"{row['name']:<{wide}}  {row['seeds']:>5}  {spoken(row['sensitivity']):<24}  {less:<24}  "
            f"{row['best_lr']:<7g}  {row['best_loss']:.4f}  {row['lost']} of {row['pulls']}"
        )
    for row in result["variants"]:
        print(f"{row['name']}: {told_of_logits(row)}")
    print(f"page: {c.out}")
    return 0


def collect(found: list[runs.Run], folder: str, by: list[str]) -> list[Variant]:
    """Variants over the learning rates that all of them have. Raises UserError for pulls that make no study.

    A seed counts where every one of these learning rates has it.
    """
    pulls: list[tuple[dict[str, Any], Pull]] = []
    unfinished = 0
    for run in found:
        if run.job_type != "pretrain" or "lr" not in run.config:
            continue
        pull = finished(run)
        unfinished += pull is None
        pulls += [(run.config, pull)] if pull else []
    if unfinished:
        print(f"{unfinished} pulls without a final validation loss are left out", file=sys.stderr)
    if not pulls:
        raise console.UserError(f"{folder}: no finished pull (sweeps/lr_sensitivity.yaml makes some)")
    first = pulls[0][0]
    names = {name for config, _ in pulls for name in config} - NOT_COMPARED
    differ = sorted(name for name in names if any(config.get(name) != first.get(name) for config, _ in pulls))
    if "lineage" in differ:
        raise console.UserError(f"{folder}: pulls of different data: give a folder with one study's pulls")
    if unknown := [name for name in by if name not in names]:
        raise console.UserError(f"--by {unknown[0]}: no field of these pulls")
    if by and (more := [name for name in differ if name not in by]):
        raise console.UserError(f"--by {','.join(by)}: the pulls of {folder} differ in {more[0]} as well: add it")
    by = by or differ
    groups: dict[str, list[tuple[dict[str, Any], Pull]]] = defaultdict(list)
    for config, pull in pulls:
        groups[json.dumps([config.get(name) for name in by])].append((config, pull))
    lrs = sorted(set.intersection(*({config["lr"] for config, _ in group} for group in groups.values())))
    variants = []
    for group in groups.values():
        fields = {name: group[0][0].get(name) for name in by}
        own = {(config["lr"], config["seed"]): pull for config, pull in group if config["lr"] in lrs}
        seeds = sorted(set.intersection(*({seed for lr, seed in own if lr == each} for each in lrs))) if lrs else []
        if len(lrs) < 3 or len(seeds) < 2:
            had = f"{len(lrs)} learning rates in common with all variants, and {len(seeds)} seeds in common at these"
            raise console.UserError(f"{folder}: {named(fields)}: {had}; needs three and two")
        own = {(lr, seed): pull for (lr, seed), pull in own.items() if seed in seeds}
        variants.append(Variant(named(fields), fields, lrs, seeds, own))
    return sorted(variants, key=lambda variant: [(isinstance(v, str), v) for v in variant.fields.values()])


def finished(run: runs.Run) -> Pull | None:
    """What the study asks of a run; None where it has not ended."""
    config, history = run.config, run.history
    budget = config["tokens"] // config["batch_tokens"] * config["batch_tokens"]
    losses, train = history.get("val/loss"), history.get("train/loss")
    ended = losses is not None and losses.tokens[-1] >= budget
    if run.state != "finished" or train is None or not (ended or run.status == "diverged"):
        return None
    loss = float(losses.value[-1]) if losses is not None and ended else math.inf
    rms = history.get("stability/update_rms")
    return Pull(
        loss=loss if math.isfinite(loss) else math.inf,
        status=run.status,
        train=train,
        logits=history.get("stability/max_attn_logit"),
        rms=math.nan if rms is None else float(np.median(rms.value[-max(1, len(rms.value) // 10) :])),
    )


def named(fields: dict[str, Any]) -> str:
    """`qk_norm, z_loss 0.0001`; `base` where all are off."""
    parts = []
    for name, value in fields.items():
        if value is True:
            parts.append(name)
        elif value:
            parts.append(f"{name} {value:g}" if isinstance(value, float | int) else f"{name} {value}")
    return ", ".join(parts) or "base"


def mean_excess(mean: np.ndarray) -> float:
    """S of a variant's mean losses (learning rates,)."""
    return float(np.mean(mean - mean.min()))


def lowest(mean: np.ndarray) -> float:
    """Loss at the best learning rate."""
    return float(mean.min())


def summarise(variants: list[Variant]) -> dict[str, Any]:
    """Each variant's S and lowest loss, alone and less those of the first one, as [value, low, high]; see the names.

    `lost` counts the pulls that Variant.lost says are, `diverged` those that the guard did. Of the lost ones
    `logit_first` are those whose largest attention logit left the ordinary before their loss did, in the median
    `median_lead` updates before; `others_left`: of `others`, all other pulls at higher learning rates than the best,
    those whose logit did. `cells` is a row for each learning rate of each variant.
    """
    told, cells = [], []
    for variant in variants:
        curve, pulls = variant.curve, list(variant.pulls.values())
        best_lr, best = variant.best
        lost = [key for key in variant.pulls if variant.lost(*key)]
        others = [key for key in variant.pulls if key[0] > best_lr and key not in lost]
        left = {key: departures(variant.pulls[key], variant.pulls[best_lr, key[1]]) for key in (*lost, *others)}
        leads = [loss - logit for loss, logit in (left[key] for key in lost) if loss and logit and logit < loss]
        told.append(
            {
                "name": variant.name,
                "fields": variant.fields,
                "seeds": len(variant.seeds),
                "pulls": len(pulls),
                "sensitivity": estimate(mean_excess, curve),
                "against_first": against(mean_excess, variant, variants[0]),
                "loss_at_init": round(variant.at_init, 4),
                "best_lr": best_lr,
                "best_loss": round(best, 4),
                "best_loss_against_first": against(lowest, variant, variants[0]),
                "diverged": sum(pull.status == "diverged" for pull in pulls),
                "lost": len(lost),
                "logit_first": len(leads),
                "median_lead": float(np.median(leads)) if leads else None,
                "others": len(others),
                "others_left": sum(left[key][1] is not None for key in others),
            }
        )
        for lr, losses in zip(variant.lrs, curve.loss, strict=True):
            at_lr = [variant.pulls[lr, seed] for seed in variant.seeds]
            tops = [np.nan_to_num(pull.logits.value, nan=math.inf).max() for pull in at_lr if pull.logits is not None]
            cells.append(
                {
                    "variant": variant.name,
                    "lr": lr,
                    "loss": round(float(losses.mean()), 4),
                    "loss_low": round(float(losses.min()), 4),
                    "loss_high": round(float(losses.max()), 4),
                    "lost": sum(variant.lost(lr, seed) for seed in variant.seeds) / len(at_lr),
                    "diverged": sum(pull.status == "diverged" for pull in at_lr) / len(at_lr),
                    "spiked": sum(pull.status == "spiked" for pull in at_lr) / len(at_lr),
                    "max_logit": number_or_none(np.median(tops) if tops else math.nan),
                    "update_rms": number_or_none(np.median([pull.rms for pull in at_lr])),
                }
            )
    by = list(variants[0].fields)
    return {"by": by, "lrs": variants[0].lrs, "times": TIMES, "variants": told, "cells": cells}


def against(of: Callable[[np.ndarray], float], variant: Variant, other: Variant) -> list[float] | None:
    """A variant's figure less another's, as [value, low, high]; of the same seeds each is compared with itself."""
    mine, theirs, n = variant.curve, other.curve, len(variant.lrs)
    if variant is other:
        return None
    if variant.seeds != other.seeds:
        return estimate(lambda a, b: of(a) - of(b), mine, theirs)
    both = Curve(np.concatenate((mine.x, theirs.x)), np.concatenate((mine.loss, theirs.loss)))
    return estimate(lambda mean: of(mean[:n]) - of(mean[n:]), both)


def number_or_none(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def departures(pull: Pull, best: Pull) -> tuple[int | None, int | None]:
    """Updates at which a pull's loss and its largest attention logit leave those of `best`, its seed at the best rate.

    Both have seen the same batches, so that what differs is the learning rate's doing. The loss leaves where it is
    above for good, the logit where it is first TIMES as large; None where it does not.
    """
    step, mine, other = np.intersect1d(pull.train.step, best.train.step, return_indices=True)
    above = ~(pull.train.value[mine] <= best.train.value[other])
    below = np.flatnonzero(~above)
    since = below[-1] + 1 if len(below) else 0
    loss = int(step[since]) if since < len(step) else None
    if pull.logits is None or best.logits is None:
        return loss, None
    step, mine, other = np.intersect1d(pull.logits.step, best.logits.step, return_indices=True)
    large = ~(pull.logits.value[mine] <= TIMES * best.logits.value[other])
    return loss, int(step[large.argmax()]) if large.any() else None


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
