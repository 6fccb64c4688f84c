"""`python -m gacha workspace ENTITY/PROJECT`: W&B's view of a project, as code: recipes with the bands of their seeds.

W&B's own new view shows every run as a line of its own over steps. This one groups by recipe over tokens, and has the
house's metrics in sections: loss, final values against the learning rate, stability, speed, cost.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

import console
from console import UserError
from gacha import online

LOSS = ("val/bpb", "val/loss", "train/loss")
STABILITY = ("grad_norm", "loss_z", "max_attn_logit", "update_rms")
SPEED = ("tokens_per_second", "mfu", "step_seconds")
COST = ("device_seconds", "flops", "money")
PULLS = 100  # lines of single pulls in a panel; W&B shows 10 by default and leaves the others out without a word


@dataclass(frozen=True)
class Config:
    """Save a view of a W&B project that compares recipes over their seeds; each call saves a new one."""

    project: Annotated[str, tyro.conf.Positional]
    """ENTITY/PROJECT on the W&B server."""
    sweep: str = ""
    """Only runs of this W&B sweep id."""
    name: str = ""
    """Name of the view; by default `gacha`, with the sweep's id."""
    dry_run: bool = False
    """Print the view as JSON, save nothing, ask no server."""


def main(argv: Sequence[str]) -> int:
    """Save the view, print its address. Raises UserError without the package, the key, the project or an answer."""
    config = console.parse(Config, argv, "python -m gacha workspace")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", config.project):
        raise UserError(f"{config.project}: give ENTITY/PROJECT, as in the address of the project's page")
    os.environ.setdefault("WANDB_SILENT", "true")
    name = config.name or " ".join(filter(None, ("gacha", config.sweep)))
    entity, project = config.project.split("/")
    view = build(entity, project, name, config.sweep)
    if config.dry_run:
        spec = view._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        print(json.dumps({"name": name, "spec": spec}))
        return 0
    api = online.connect(config.project)
    with online.told_in_one_line(config.project, api.settings["base_url"]):
        view.save()
        print(view.url)
    return 0


def build(entity: str, project: str, name: str, sweep: str) -> Any:
    """The view, not saved yet. Raises UserError without the package wandb-workspaces."""
    wr: Any
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError:
        raise UserError("the view needs wandb-workspaces: pip install -e '.[workspace]'") from None

    def band(metric: str, **more: Any) -> Any:
        """A metric over tokens: the mean of each recipe's pulls and the band of their standard deviation."""
        grouped = {"groupby": wr.Config("recipe"), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        return wr.LinePlot(title=metric, x="tokens", y=[metric], **grouped, **more)

    def pulls(metric: str) -> Any:
        """A metric over tokens, a line a pull."""
        return wr.LinePlot(title=f"{metric}, every pull", x="tokens", y=[metric], max_runs_to_show=PULLS)

    def bars(metric: str, how: str, **more: Any) -> Any:
        """A summary metric, a bar a recipe."""
        return wr.BarPlot(title=metric, metrics=[metric], groupby=wr.Config("recipe"), groupby_aggfunc=how, **more)

    x, y = wr.Config("lr"), wr.SummaryMetric("val/bpb")
    against_lr = wr.ScatterPlot(title="final val/bpb against lr", x=x, y=y, log_x=True)

    sections = [
        ws.Section(name="Recipes: mean and sd of their seeds", panels=[band(key) for key in LOSS], is_open=True),
        ws.Section(name="Pulls", panels=[pulls(key) for key in LOSS], is_open=True),
        ws.Section(
            name="Finals", panels=[against_lr, bars("val/bpb", "mean", groupby_rangefunc="minmax")], is_open=True
        ),
        ws.Section(name="Stability", panels=[pulls(f"stability/{key}") for key in STABILITY]),
        ws.Section(name="Speed", panels=[band(f"perf/{key}") for key in SPEED]),
        ws.Section(name="Cost", panels=[bars(f"cost/{key}", "sum") for key in COST]),
    ]
    filters = [expr.Metric("JobType") == "pretrain"]
    if sweep:
        filters.append(expr.Metric("Sweep") == sweep)
    return ws.Workspace(
        name=name,
        entity=entity,
        project=project,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=PULLS),
        runset_settings=ws.RunsetSettings(
            filters=filters,
            order=[expr.Ordering(expr.Summary("val/bpb"), ascending=True)],
            pinned_columns=["run:displayName", "summary:status", "summary:val/bpb", "config:lr", "config:seed"],
        ),
    )
