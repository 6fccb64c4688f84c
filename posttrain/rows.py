"""The rows of chat data that every post-training stage reads, from the formats that people have them in."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from console import UserError
from data import sources

if TYPE_CHECKING:
    from datasets import Dataset

Message = dict[str, str]
Kind = Literal["messages", "preference", "prompt", "labelled"]

HEADINGS = {"system": "前提", "user": "指示", "assistant": "応答"}  # the roles, as our own template calls them
SHAPES = {
    "messages": "{messages: [{role, content}, ...]}",
    "preference": "{prompt, chosen, rejected}",
    "prompt": "{prompt, reference, ...}",
    "labelled": "{prompt, completion, label}",
}
SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
BAD_ROWS_SHOWN = 20


def load_rows(source: str, kind: Kind | None = None) -> "Dataset":
    """The chat rows of `source`, all of one kind (of `kind`, if given), as the stages take them.

    source: a .jsonl file (.gz, .zst too), a .parquet file, a glob of either with `jsonl:` or `parquet:` before it, or
    `hf:NAME[:CONFIG][:SPLIT]`, also a local folder. Beside the project's own rows it takes prompt/completion, Alpaca's
    instruction/input/output and ShareGPT's conversations; texts in place of messages are a user's or an assistant's.
    Other columns come along. Raises UserError; of several bad rows each is named on stderr first.
    """
    import datasets

    rows: list[dict[str, Any]] = []
    mistakes: list[str] = []
    for where, record in records(source):
        try:
            row = standard(record, kind)
            found = kind_of(row)
            if found != (wanted := kind or kind_of(rows[0] if rows else row)):
                raise ValueError(f"is a row of {SHAPES[found]}, not of {SHAPES[wanted]}")
            rows.append(row)
        except ValueError as error:
            mistakes.append(f"{where}: {error}")
    if len(mistakes) > 1:
        for mistake in mistakes[:BAD_ROWS_SHOWN]:
            print(mistake, file=sys.stderr)
        raise UserError(f"{source}: {len(mistakes)} bad rows, the first: {mistakes[0]}: mend or remove them")
    if mistakes:
        raise UserError(f"{mistakes[0]}: mend or remove the row")
    if not rows:
        raise UserError(f"{source}: no rows in it")
    names = dict.fromkeys(name for row in rows for name in row)
    table = [{name: row.get(name) for name in names} for row in rows]
    return datasets.Dataset.from_list(table, on_mixed_types="use_json")


def records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of `source` as it stands, with the place to name in an error. Raises UserError."""
    scheme, _, rest = source.partition(":")
    if scheme == "hf" and rest:
        yield from hub_records(rest)
        return
    path = rest if scheme in ("jsonl", "parquet") and rest else source
    filesystem, paths, _ = sources.match(path)
    for path in paths:
        if scheme == "parquet" or path.endswith(".parquet"):
            yield from parquet_records(filesystem, path)
            continue
        with sources.opened(filesystem, path) as file:
            offset = 0
            for number, raw in enumerate(file, 1):
                where = f"{path}:{number}"
                line = sources.decode(raw, where, offset).removeprefix("\ufeff").strip()
                offset += len(raw)
                if not line:
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not JSON ({error}): give one JSON object per line") from None
                if not isinstance(record, dict):
                    raise UserError(f"{where}: a JSON {type(record).__name__}, not an object")
                yield where, record


def parquet_records(filesystem: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with filesystem.open(path, "rb") as file:
        try:
            table = pq.read_table(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not a Parquet file, or damaged ({sources.first_line(error)})") from None
    for number, record in enumerate(table.to_pylist(), 1):
        yield f"{path}, row {number}", record


def hub_records(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a dataset of the Hugging Face hub, of a folder of data files, or of one that `save_to_disk` wrote."""
    import datasets

    folder, config, split = [*name.split(":"), "", ""][:3]
    try:
        if (Path(folder) / "state.json").is_file():
            rows = datasets.load_from_disk(folder)
        else:
            rows = datasets.load_dataset(folder, config or None, split=split or "train")
    except Exception as error:  # datasets has no common base for "missing", "no network", "bad config", "bad data"
        raise UserError(f"hf:{name}: cannot be opened ({type(error).__name__}: {sources.first_line(error)})") from None
    for number, record in enumerate(rows, 1):
        yield f"hf:{name}, row {number}", dict(record)


def kind_of(row: dict[str, Any]) -> Kind:
    """Which of SHAPES a row that `standard` returned is."""
    if "messages" in row:
        return "messages"
    return "preference" if "chosen" in row else "labelled" if "completion" in row else "prompt"


def standard(record: dict[str, Any], kind: Kind | None = None) -> dict[str, Any]:
    """`record`, of any shape that `load_rows` takes, in ours. Raises ValueError saying what is wrong with it.

    Published sets often hold one conversation in several columns: of these the one that `kind` asks for is taken.
    """
    row = {key: value for key, value in record.items() if value is not None}
    if "conversations" in row:
        row["messages"] = [from_sharegpt(turn) for turn in listed(row.pop("conversations"), "conversations")]
    elif "instruction" in row and "output" in row:
        parts = [row.pop("instruction"), row.pop("input", "")]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("instruction and input must be texts")
        row["prompt"] = "\n\n".join(part for part in parts if part.strip())
        row["completion"] = row.pop("output")
    if "messages" in row and (kind or "messages") == "messages":
        row["messages"] = conversation(row["messages"], "messages", "assistant")
        return {key: value for key, value in row.items() if key not in ("prompt", "completion", "chosen", "rejected")}
    if row.pop("messages", None) and "prompt" not in row and "chosen" not in row:
        raise ValueError(f"is a row of {SHAPES['messages']}, not of {SHAPES[kind or 'prompt']}")
    if ("chosen" in row) != ("rejected" in row):
        raise ValueError("chosen and rejected come in pairs; one is missing")
    if "chosen" in row:
        share_prompt(row)
    if "prompt" not in row:
        keys = ", ".join(record) or "none at all"
        raise ValueError(f"has none of messages, prompt, conversations, instruction; its keys: {keys}")
    row["prompt"] = conversation(spoken(row["prompt"], "user"), "prompt", "user")
    for key in ("chosen", "rejected", "completion"):
        if key in row:
            row[key] = conversation(spoken(row[key], "assistant"), key, "assistant", first="assistant")
    if "completion" in row and "label" not in row:
        row["messages"] = row.pop("prompt") + row.pop("completion")
    return row


def share_prompt(row: dict[str, Any]) -> None:
    """Take the turns that whole conversations in `chosen` and `rejected` begin with as the prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not (isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) > 1):
        return
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected differ before their last message")
    row |= {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def spoken(value: Any, role: str) -> Any:
    """A plain text as the one message that it stands for."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def listed(value: Any, key: str) -> list[dict[str, Any]]:
    """`value` if it is a list of objects that is not empty. Raises ValueError."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"{key} must be a list of messages")
    return value


def from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    """One turn of ShareGPT's as one of ours; turns that are ours already stay."""
    if "from" not in turn:
        return turn
    if turn["from"] not in SHAREGPT:
        raise ValueError(f"conversations: unknown speaker {turn['from']!r}; known are {', '.join(SHAREGPT)}")
    return {"role": SHAREGPT[turn["from"]], "content": turn.get("value")}


def conversation(value: Any, key: str, last: str, first: str = "user") -> list[Message]:
    """`value` as messages whose roles alternate from `first` to `last`, after a system message at most. ValueError."""
    turns = listed(value, key)
    for number, turn in enumerate(turns, 1):
        if turn.get("role") not in HEADINGS:
            raise ValueError(f"{key}, message {number}: role {turn.get('role')!r} is not system, user or assistant")
        if not isinstance(turn.get("content"), str):
            raise ValueError(f"{key}, message {number}: content is no text")
        if not turn["content"].strip():
            raise ValueError(f"{key}, message {number}: the {turn['role']}'s content is empty")
    roles = [turn["role"] for turn in turns]
    talk = roles[1:] if roles[0] == "system" and first == "user" else roles
    other = {"user": "assistant", "assistant": "user"}
    expected = first
    for number, role in enumerate(talk, len(roles) - len(talk) + 1):
        if role != expected:
            raise ValueError(f"{key}, message {number}: the {role} speaks where the {expected} should")
        expected = other[expected]
    if not talk or talk[-1] != last:
        raise ValueError(f"{key}: the last message is not the {last}'s")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
