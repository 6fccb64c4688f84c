"""Profiles: which documents are worth keeping. YAML files, each standing alone; data/profiles/*.yaml are bundled.

rules:                                  # in this order; the first that rejects gives the reason
  num_letters: {min: 400}               # rejects below 400
  max_sentence_length: {max: 200}       # rejects above 200
  words_ng_fraction: {below: 0.05}      # rejects at .05 and above
words: {ng: my_words.txt}               # one word a line, beside the YAML file
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from console import UserError
from data.dedup import Dedup
from data.edits import EDITS
from data.privacy import KINDS
from data.quality import REPETITION, STATISTICS

FOLDER = Path(__file__).with_name("profiles")
BOUNDS = ("min", "max", "below")
LANGUAGE_KEYS = {"code": "language", "min_probability": "min_probability"} | {
    key: key for key in ("min_japanese_fraction", "min_kana")
}
KEYS = ("about", "extractor", "language", "tlds", "hosts", "words", "rules", "dedup", "privacy", "edits")
OF_A_LIST = re.compile(r"words_\w+_(hits|fraction)")
THRESHOLD = re.compile(r"--([\w-]+)\.(min|max|below)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Rule:
    """What a statistic must be: at least `min`, at most `max`, smaller than `below`."""

    statistic: str
    min: float | None = None
    max: float | None = None
    below: float | None = None


class Verdict(NamedTuple):
    """The rule that rejects, by its statistic's name, the statistic and the bound it breaks."""

    rule: str
    value: float
    threshold: float


@dataclass(frozen=True)
class Profile:
    """Everything that decides whether a document is kept, and what is changed in it; see the module and `describe`."""

    name: str
    about: str = ""
    extractor: str = ""
    """Version of the extractor whose text the thresholds were set on; empty: any."""
    language: str = "ja"
    """ISO 639-1 code; empty: any language."""
    min_probability: float = 0.0
    min_japanese_fraction: float = 0.0
    min_kana: float = 10.0
    """The last two are asked of Japanese alone."""
    tlds: tuple[str, ...] = ()
    """Top-level domains allowed; none: all."""
    hosts: str | None = None
    """File of blocked hosts."""
    words: dict[str, str] = field(default_factory=dict)
    """Name of a word list and its file: gives the statistics `words_NAME_hits` and `words_NAME_fraction`."""
    rules: tuple[Rule, ...] = ()
    dedup: Dedup = field(default_factory=Dedup)
    privacy: tuple[str, ...] = KINDS
    edits: tuple[str, ...] = ()

    @functools.cached_property
    def asked(self) -> frozenset[str]:
        """The statistics of `quality.repetition`, the slower half, that a rule is about."""
        return frozenset(rule.statistic for rule in self.rules) & frozenset(REPETITION)

    def speaks(self, lang: str, probability: float, japanese_fraction: float, kana: float) -> bool:
        """Whether a text identified as `lang` with `probability` is in the profile's language."""
        if self.language != "ja":
            return self.language in ("", lang) and probability >= self.min_probability
        enough = japanese_fraction >= self.min_japanese_fraction and kana >= self.min_kana
        return lang == "ja" and probability >= self.min_probability and enough


def speaks_columns(profile: Profile, lang: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """`Profile.speaks` over rows, (n,) bool; columns lang_probability, japanese_fraction, kana; NaN is not enough."""
    spoken = columns["lang_probability"] >= profile.min_probability
    if profile.language:
        spoken = spoken & (lang == profile.language)
    if profile.language == "ja":
        spoken = spoken & (columns["japanese_fraction"] >= profile.min_japanese_fraction)
        spoken = spoken & (columns["kana"] >= profile.min_kana)
    return np.asarray(spoken, bool)


def judge(profile: Profile, statistics: Mapping[str, Any]) -> Verdict | None:
    """The first rule of `profile` that rejects; None keeps. Statistics that are missing, None or NaN are skipped."""
    for rule in profile.rules:
        value = statistics.get(rule.statistic)
        if value is None or math.isnan(value):
            continue
        if rule.min is not None and value < rule.min:
            return Verdict(rule.statistic, value, rule.min)
        if rule.max is not None and value > rule.max:
            return Verdict(rule.statistic, value, rule.max)
        if rule.below is not None and value >= rule.below:
            return Verdict(rule.statistic, value, rule.below)
    return None


def judge_columns(profile: Profile, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`judge` over rows: reasons (n,) object, "" where kept, then values and thresholds (n,), NaN where kept."""
    length = len(next(iter(columns.values())))
    reasons = np.full(length, "", object)
    values, thresholds = np.full(length, np.nan), np.full(length, np.nan)
    undecided = np.arange(length)
    for rule in profile.rules:
        if rule.statistic not in columns:
            continue
        of_rule = np.asarray(columns[rule.statistic], float)
        for kind, bound in bounds(rule):
            found = of_rule[undecided]
            rejected = found < bound if kind == "min" else found > bound if kind == "max" else found >= bound
            rows = undecided[rejected]
            reasons[rows], values[rows], thresholds[rows] = rule.statistic, found[rejected], bound
            undecided = undecided[~rejected]
    return reasons, values, thresholds


def bounds(rule: Rule) -> list[tuple[str, float]]:
    """The bounds that `rule` sets: ("min" | "max" | "below", its value), in the order they are tried."""
    given = [(kind, getattr(rule, kind)) for kind in BOUNDS]
    return [(kind, bound) for kind, bound in given if bound is not None]


def bundled() -> list[str]:
    """The names of the bundled profiles."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def choose(name: str, source: str) -> Profile | None:
    """The profile `name`; "auto" is domain, the mildest, for web archives and "none", that is None, for the rest."""
    if name == "auto":
        name = "domain" if source.partition(":")[0] in ("warc", "wet") else "none"
    return None if name == "none" else load(name)


def load(name_or_path: str | Path) -> Profile:
    """The bundled profile of that name, or the one in a YAML file. Raises UserError naming file and key."""
    name, names = str(name_or_path), bundled()
    path = FOLDER / f"{name}.yaml" if name in names else Path(name)
    if name not in names and path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"profile {name}: unknown{meant(name, names)}; choose one of {', '.join(names)} or a .yaml file"
        )
    try:
        node = yaml.compose(path.read_text("utf-8"), yaml.SafeLoader)
        refuse_repeats(node, path)
        content = yaml.SafeLoader("").construct_document(node) if node else {}
    except OSError as error:
        raise UserError(f"profile {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: convert it first") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({error})") from None
    return from_dict(table(content, str(path), KEYS) | {"name": path.stem}, str(path), path.parent)


def refuse_repeats(node: Any, path: Path) -> None:
    """Raise UserError if a key stands twice in a mapping: YAML would keep the last without a word."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    seen = set()
    for key, value in pairs:
        if key.value in seen:
            raise UserError(f"{path}:{key.start_mark.line + 1}: {key.value} a second time: keep one of them")
        seen.add(key.value)
        refuse_repeats(value, path)


def describe(profile: Profile) -> dict[str, Any]:
    """`profile` as plain dicts, lists and numbers: what a run's config shows and `from_dict` reads."""
    return {
        "name": profile.name,
        "about": profile.about,
        "extractor": profile.extractor,
        "language": {key: getattr(profile, name) for key, name in LANGUAGE_KEYS.items()},
        "tlds": list(profile.tlds),
        "hosts": profile.hosts,
        "words": dict(profile.words),
        "rules": {rule.statistic: dict(bounds(rule)) for rule in profile.rules},
        "dedup": dataclasses.asdict(profile.dedup),
        "privacy": list(profile.privacy),
        "edits": list(profile.edits),
    }


def from_dict(content: Mapping[str, Any], where: str = "profile", folder: Path | None = None) -> Profile:
    """The inverse of `describe`; what is left out has its default. Files are looked for in `folder`.

    Raises UserError naming `where` and the key.
    """
    given = table(content, where, ("name", *KEYS))
    language = table(given.get("language"), f"{where}: language", tuple(LANGUAGE_KEYS))
    made: dict[str, Any] = {
        LANGUAGE_KEYS[key]: text(value, f"{where}: language: code")
        if key == "code"
        else number(value, f"{where}: {key}")
        for key, value in language.items()
    }
    for key in ("name", "about", "extractor"):
        if key in given:
            made[key] = text(given[key], f"{where}: {key}")
    if given.get("hosts") is not None:
        made["hosts"] = existing(given["hosts"], f"{where}: hosts", folder)
    words = table(given.get("words"), f"{where}: words")
    made["words"] = {name: existing(file, f"{where}: words: {name}", folder) for name, file in words.items()}
    for name in words:
        if not re.fullmatch(r"\w+", name):
            raise UserError(f"{where}: words: {name}: a name of letters, digits and _ only")
    made["rules"] = tuple(
        make_rule(name, f"{where}: rules: {name}", bounds)
        for name, bounds in table(given.get("rules"), f"{where}: rules").items()
    )
    sizes = table(given.get("dedup"), f"{where}: dedup", tuple(key.name for key in dataclasses.fields(Dedup)))
    sizes = {key: number(value, f"{where}: dedup: {key}") for key, value in sizes.items()}
    for key, value in sizes.items():
        if key != "jaccard" and value != int(value):
            raise UserError(f"{where}: dedup: {key} is {value}: give a whole number")
    try:
        made["dedup"] = Dedup(**{key: value if key == "jaccard" else int(value) for key, value in sizes.items()})
    except UserError as mistake:
        raise UserError(f"{where}: {mistake}") from None
    for key, choice in (("tlds", None), ("privacy", KINDS), ("edits", tuple(EDITS))):
        if key in given:
            made[key] = names_of(given[key], f"{where}: {key}", choice)
    return Profile(**({"name": where} | made))


def make_rule(statistic: str, where: str, content: Any) -> Rule:
    """The rule about `statistic` with the bounds in `content`. Raises UserError for unknown names and empty ranges."""
    if statistic not in STATISTICS and not OF_A_LIST.fullmatch(statistic):
        raise UserError(f"{where}: no such statistic{meant(statistic, STATISTICS)}")
    limits = {key: number(bound, f"{where}: {key}") for key, bound in table(content, where, BOUNDS).items()}
    if not limits:
        raise UserError(f"{where}: no bound: give one, such as {{max: 0.2}}")
    rule = Rule(statistic, **limits)
    highest = min(rule.max if rule.max is not None else math.inf, rule.below if rule.below is not None else math.inf)
    if rule.min is not None and (rule.min > highest or rule.min == rule.below):
        raise UserError(f"{where}: min {rule.min:g} leaves nothing up to {highest:g}: swap them")
    return rule


def with_thresholds(profile: Profile, changes: Mapping[str, float] | Iterable[str]) -> Profile:
    """`profile` with bounds replaced or added: {"max_sentence_length.max": 250.0}, or "max_sentence_length.max=250".

    A rule that is new comes last. Raises UserError for unknown statistics and bounds.
    """
    pairs = changes.items() if isinstance(changes, Mapping) else (change.partition("=")[::2] for change in changes)
    rules = {rule.statistic: dict(bounds(rule)) for rule in profile.rules}
    for name, value in pairs:
        statistic, _, bound = name.partition(".")
        if bound not in BOUNDS:
            raise UserError(
                f"threshold {name}: write STATISTIC.min, STATISTIC.max or STATISTIC.below, then = and a number"
            )
        try:
            limit = float(value)
        except ValueError:
            raise UserError(f"threshold {name}: {value!r} is no number") from None
        rules[statistic] = rules.get(statistic, {}) | {bound: limit}
    made = tuple(make_rule(name, f"{profile.name}, threshold of {name}", limits) for name, limits in rules.items())
    return dataclasses.replace(profile, rules=made)


def spell_thresholds(argv: Sequence[str]) -> list[str]:
    """`--max_sentence_length.max 250`, also with =, as one `--thresholds max_sentence_length.max=250` at the end.

    Raises UserError for a bound without a number.
    """
    rest, spelled, left = [], [], list(argv)
    while left:
        flag = left.pop(0)
        if found := THRESHOLD.fullmatch(flag):
            statistic, bound, value = found.groups()
            if value is None:
                if not left or left[0].startswith("--"):
                    raise UserError(f"{flag}: give a number, such as {flag} 0.5")
                value = left.pop(0)
            spelled.append(f"{statistic.replace('-', '_')}.{bound}={value}")
        elif flag == "--thresholds":
            while left and not left[0].startswith("--"):
                spelled.append(left.pop(0))
        else:
            rest.append(flag)
    return [*rest, "--thresholds", *spelled] if spelled else rest


def extractor_differs(profile: Profile, installed: str) -> str | None:
    """A line for the user if the profile's thresholds were set on another extractor's text, else None."""
    if profile.extractor in ("", installed):
        return None
    return (
        f"profile {profile.name} was set on text of {profile.extractor}; this is {installed}: its rules may fit worse"
    )


def table(content: Any, where: str, known: Sequence[str] = ()) -> dict[str, Any]:
    """`content` as a dict with string keys, {} for nothing. Raises UserError for other things and keys not `known`."""
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: holds {type(content).__name__}, not `key: value` pairs")
    for key in content:
        if not isinstance(key, str) or (known and key not in known):
            raise UserError(f"{where}: unknown key {key}{meant(str(key), known)}; known: {', '.join(known)}")
    return dict(content)


def number(value: Any, where: str) -> float:
    """`value` as a finite float. Raises UserError, with the spelling YAML takes for a number such as 1e-3."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value):
        raise UserError(f"{where}: YAML takes {value} for a word: write it with point and sign, such as 1.0e-3")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {value!r} is no number")
    return float(value)


def text(value: Any, where: str) -> str:
    """`value` if it is a string. Raises UserError; YAML reads `no` as false, hence the hint."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {value!r} is no text: put it in quotes")
    return value


def existing(value: Any, where: str, folder: Path | None) -> str:
    """The absolute path of the file `value`, relative to `folder`. Raises UserError if there is none."""
    path = ((folder or Path()) / text(value, where)).resolve()
    if not path.is_file():
        raise UserError(f"{where}: no file {path}")
    return str(path)


def names_of(value: Any, where: str, choice: Sequence[str] | None) -> tuple[str, ...]:
    """`value` as a tuple of strings, all from `choice` if there is one. Raises UserError for any other."""
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: {value!r} is no list: write [a, b]")
    for name in value:
        if choice is not None and name not in choice:
            raise UserError(f"{where}: unknown {name!r}{meant(str(name), choice)}; choose from {', '.join(choice)}")
    return tuple(text(name, where) for name in value)


def meant(name: str, known: Sequence[str]) -> str:
    """ ", did you mean X?" for a misspelled name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else ""
