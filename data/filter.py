"""`python -m data filter`: other thresholds over stored annotations, in seconds; one W&B run each, so that a threshold
sweep is a W&B sweep (sweeps/thresholds.yaml)."""

import collections
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import console
import tracking


@dataclass(frozen=True)
class FilterConfig:
    """What a profile would keep of an annotated source, near-duplicates aside."""

    annotations: Path
    """Folder made by `data annotate`, or by a build or decide with --annotations."""
    profile: str = "web_swallow_v1"
    """A bundled profile or a YAML file."""
    thresholds: tuple[str, ...] = ()
    """Changes to the profile, such as max_sentence_length.max=250; also spelled --max_sentence_length.max 250."""
    json: bool = False
    """Print the result as one JSON object."""


def main(argv: list[str]) -> int:
    """`python -m data filter`: the yield on stdout and as a W&B run."""
    from data import profiles

    config = console.parse(FilterConfig, profiles.spell_thresholds(argv), "python -m data filter")
    profile = profiles.with_thresholds(profiles.load(config.profile), config.thresholds)
    result = measure(config.annotations, profile)
    described = profiles.describe(profile)
    # As numbers and by the names that a sweep gives them, so that W&B can plot over them.
    pairs = (change.split("=", 1) for change in config.thresholds)
    given = {"profile": config.profile} | {name: float(value) for name, value in pairs}
    recipe = tracking.recipe_hash({"rules": described, "annotations": result["plan"]}, frozenset())
    tracker = tracking.start(
        "data",
        {**{key: str(value) for key, value in asdict(config).items()}, **given, "rules": described},
        name=f"filter-{recipe}",
        recipe=recipe,
        tags=[f"profile:{profile.name}"],
        x_axis=None,
        lineage={"annotations": result["plan"]},
    )
    tracker.log({key: value for key, value in result.items() if "/" in key}, step=0)
    tracker.summary({"status": "ok", **result})
    tracker.finish(0)
    console.print_result(result, config.json)
    return 0


def measure(folder: Path, profile: Any) -> dict[str, Any]:
    """What `profile` keeps of the annotations in `folder`: documents, characters, and what each reason drops."""
    import pyarrow.parquet as pq

    from data import annotate, select

    begun = time.perf_counter()
    plan = annotate.read_plan(folder)
    if plan["early"]:
        raise console.UserError(f"{folder}: a build's own annotations stop at the first rule: make them with annotate")
    if missing := [str(path) for name, path in profile.words.items() if name not in plan["words"]]:
        raise console.UserError(
            f"{folder}: annotated without the word list {missing[0]}: annotate again with {profile.name}"
        )
    names = ["url", "reason", "lang", "characters", *annotate.numbers(plan)]
    pages: collections.Counter[str] = collections.Counter()
    characters: collections.Counter[str] = collections.Counter()
    for path in sorted((folder / "annotations").glob("[0-9]*.parquet")):
        table = pq.read_table(path, columns=names)
        reason, _, _ = select.verdicts(table, profile)
        lengths = table["characters"].to_numpy()
        for name in set(reason.tolist()):
            pages[name] += int(np.sum(reason == name))
            characters[name] += int(np.sum(lengths[reason == name]))
    total = pages.total()
    if len(list((folder / "annotations").glob("[0-9]*.parquet"))) < len(plan["tasks"]):
        raise console.UserError(f"{folder}: not complete: run the command that was making it again")
    return {
        "kept/documents": pages[""],
        "kept/characters": characters[""],
        "kept/share": round(pages[""] / total, 6) if total else 0.0,
        **{f"dropped/{name}": pages[name] for name in sorted(pages) if name},
        "documents": total,
        "plan": annotate.fingerprint(plan),
        "seconds": round(time.perf_counter() - begun, 2),
    }
