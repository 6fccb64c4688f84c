"""Who answers prompts: a local model or an OpenAI-compatible endpoint, behind a cache that keeps every answer for good.

A stage asks, always in the same order; the answers lie on disk the moment they arrive. A stage that was killed starts
again from its beginning, is given at once what was answered before, and so ends with the same bits and nothing paid
for twice.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import console
from data.progress import progress, say

Message = dict[str, str]
Prompt = str | list[Message]
"""a text to continue, or the messages of a conversation to answer"""
NOT_RECIPE = frozenset(
    {"teacher", "cache", "api_key_env", "concurrency", "requests_per_minute", "tokens_per_minute", "timeout"}
    | {"attempts", "backoff", "batch", "device", "price_in", "price_out", "currency", "out", "json"}
)
"""fields that change how answers are got and not what they are; the teacher itself enters as its id"""


@dataclass(frozen=True)
class TeacherConfig:
    """What all stages that ask a teacher have in common."""

    teacher: str
    """folder of a Hugging Face model, a GGUF file, or http(s)://HOST[:PORT][/v1] of an OpenAI-compatible endpoint"""
    out: str
    """folder of the results; the same command goes on with what lies there"""
    teacher_model: str = ""
    """the endpoint's name for the model; empty: the only one that it lists"""
    teacher_mode: Literal["auto", "chat", "completion"] = "auto"
    """chat: the prompt is a user's turn; completion: a text to continue. auto: chat, but completion for a local model
    without a chat template"""
    cache: str = ""
    """file of all answers, may be shared by stages that run one after another; empty: OUT/answers.jsonl"""
    api_key_env: str = "OPENAI_API_KEY"
    """environment variable that holds the endpoint's key; never the key itself"""
    concurrency: int = 8
    """requests under way at a time"""
    requests_per_minute: float = 0.0
    """the endpoint's limit; 0: none"""
    tokens_per_minute: float = 0.0
    """the endpoint's limit on prompt and answer tokens together; 0: none"""
    timeout: float = 120.0
    """seconds for one answer"""
    attempts: int = 8
    """tries of one request before it counts as failed; waits after 429 are not counted"""
    backoff: float = 1.0
    """seconds after the first failed try; doubled each time up to 60"""
    batch: int = 16
    """prompts that a local model reads at a time"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """of a local model; auto: the GPU where there is one"""
    price_in: float = 0.0
    """price of a million prompt tokens"""
    price_out: float = 0.0
    """price of a million answer tokens"""
    currency: str = "JPY"
    """currency of the prices"""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; OpenAI's names and meanings."""

    max_tokens: int
    temperature: float = 0.0
    """0: the most likely token each time"""
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    """texts that end the answer and are no part of it"""
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """One answer. finish_reason: stop, length, refused (the endpoint does not take this prompt) or failed."""

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Question:
    """A prompt to be answered; `sample` tells apart several answers to the same one."""

    prompt: Prompt
    sampling: Sampling
    sample: int

    def key(self, model: str) -> str:
        """hex32 of all that an answer depends on."""
        asked = {"model": model, "prompt": self.prompt, "sampling": asdict(self.sampling), "sample": self.sample}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]

    def draw_seed(self) -> int:
        """31 bits for the generator of this answer alone."""
        told = json.dumps([self.sampling.seed, self.sample, self.prompt], sort_keys=True)
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:4], "big") >> 1


Keep = Callable[[Question, Completion], None]
"""takes an answer at once, from any thread"""


class Cache:
    """Answers by key, in memory and in an append-only JSONL file, one process at a time. `skipped` counts bad lines."""

    def __init__(self, path: Path) -> None:
        self.path, self.skipped = path, 0
        self.answers: dict[str, Completion] = {}
        self.writing = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab+")
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise console.UserError(f"{path}: the answers cannot be kept there ({error.strerror})") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise console.UserError(f"{path} is in use by another process: wait for it, or give --cache") from None
        self.file.seek(0)
        whole = 0
        for line in self.file:
            if not line.endswith(b"\n"):
                break  # torn by a kill or a power cut
            whole += len(line)
            try:
                record = json.loads(line)
                self.answers.setdefault(record.pop("key"), Completion(**record))
            except (ValueError, TypeError, KeyError, AttributeError):
                self.skipped += 1
        self.file.truncate(whole)
        if self.skipped:
            say(f"{path}: {self.skipped} lines cannot be read and are asked again")

    def put(self, key: str, answer: Completion) -> None:
        """Keep `answer` so that neither a kill nor a power cut loses it."""
        line = json.dumps({"key": key, **asdict(answer)}, ensure_ascii=False) + "\n"
        with self.writing:
            self.file.write(line.encode("utf-8", "replace"))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.answers[key] = answer

    def close(self) -> None:
        self.file.close()


@dataclass
class Ledger:
    """What was asked and what it cost. `counts` are of this process, as they happened: requests, rate_limited,
    timeouts, dropped, server_errors, garbage, refused, failed, empty, without_usage, answers, cached."""

    price_in: float
    price_out: float
    counts: Counter[str] = field(default_factory=Counter)
    paid: Counter[str] = field(default_factory=Counter)
    used: dict[str, Completion] = field(default_factory=dict)
    counting: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str) -> None:
        with self.counting:
            self.counts[name] += 1

    def money(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Price of so many tokens, in the currency of the configuration."""
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6

    def total(self) -> dict[str, Any]:
        """The answers that the result rests on, whenever they were paid for: the same after any number of restarts."""
        tokens_in = sum(answer.prompt_tokens for answer in self.used.values())
        tokens_out = sum(answer.completion_tokens for answer in self.used.values())
        named = {"answers": len(self.used), "prompt_tokens": tokens_in, "completion_tokens": tokens_out}
        return named | {"money": round(self.money(tokens_in, tokens_out), 6)}

    def session(self) -> dict[str, Any]:
        """What this process asked for and paid."""
        spent = self.money(self.paid["prompt_tokens"], self.paid["completion_tokens"])
        return {**self.counts, **self.paid, "money": round(spent, 6)}


class Backend(Protocol):
    """What endpoint.Endpoint and local_teacher.LocalModel have in common; each is imported only where it is used."""

    id: str
    chat: bool

    def answer(self, questions: list[Question], keep: Keep, ledger: Ledger) -> None: ...

    def close(self) -> None: ...


class Teacher:
    """Answers prompts through `backend`, asking only for what `cache` lacks. `id` names the model, `chat` its mode."""

    def __init__(self, backend: Backend, cache: Cache, ledger: Ledger) -> None:
        self.backend, self.cache, self.ledger = backend, cache, ledger
        self.id, self.chat = backend.id, backend.chat
        self.doubtful: dict[str, Completion] = {}

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples: Sequence[int] | None = None, name: str = ""
    ) -> list[Completion]:
        """One answer per prompt, in order; `samples` are the numbers of the answers, 0 by default; with a `name`,
        progress is shown under it.

        The same prompt and number has one answer, however often it is asked. Raises UserError where the teacher takes
        nothing more; what it answered before that is kept.
        """
        numbers = samples if samples is not None else [0] * len(prompts)
        questions = [Question(prompt, sampling, number) for prompt, number in zip(prompts, numbers, strict=True)]
        keys = [question.key(self.id) for question in questions]
        missing = {key: q for key, q in zip(keys, questions, strict=True) if key not in self.cache.answers}
        if missing:
            named = {id(question): key for key, question in missing.items()}
            shown = progress(name, len(missing), "answers") if name else contextlib.nullcontext(lambda _: None)
            with shown as advance:

                def keep(question: Question, answer: Completion) -> None:
                    self._record(named[id(question)], answer)
                    advance(1)

                self.backend.answer(list(missing.values()), keep, self.ledger)
        self.ledger.counts["cached"] += len(set(keys)) - len(missing)
        answers = [self.cache.answers.get(key) or self.doubtful[key] for key in keys]
        self.ledger.used.update(zip(keys, answers, strict=True))
        return answers

    def _record(self, key: str, answer: Completion) -> None:
        if answer.finish_reason in ("refused", "failed"):
            # It is the prompt's own fault only if the teacher answers others, and then it must be kept: what is asked
            # later may build on it. If the teacher is dead, the next start asks again.
            with self.ledger.counting:
                self.doubtful[key] = answer
            return
        with self.ledger.counting:
            settled, self.doubtful = self.doubtful, {}
        for one, failure in settled.items():
            self.cache.put(one, failure)
        self.cache.put(key, answer)
        self.ledger.count("answers")
        if not answer.text.strip():
            self.ledger.count("empty")
        with self.ledger.counting:
            self.ledger.paid["prompt_tokens"] += answer.prompt_tokens
            self.ledger.paid["completion_tokens"] += answer.completion_tokens

    def close(self) -> None:
        """Wait for answers that are under way, and let another process have the cache."""
        self.backend.close()
        self.cache.close()


def is_url(teacher: str) -> bool:
    return teacher.startswith(("http://", "https://"))


def check(c: TeacherConfig) -> None:
    """Raises UserError naming a flag whose value makes no sense."""
    for name in ("concurrency", "attempts", "batch"):
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    for name in ("requests_per_minute", "tokens_per_minute", "price_in", "price_out"):
        if not 0 <= getattr(c, name) < float("inf"):
            raise console.UserError(f"--{name} {getattr(c, name)}: must be 0 or more")
    for name in ("timeout", "backoff"):
        if not 0 < getattr(c, name) < float("inf"):
            raise console.UserError(f"--{name} {getattr(c, name)}: must be a positive number of seconds")


def open_teacher(c: TeacherConfig) -> Teacher:
    """The teacher of a configuration. Raises UserError where there is none, or its cache is in use."""
    check(c)
    cache = Cache(Path(c.cache) if c.cache else Path(c.out) / "answers.jsonl")
    try:
        if is_url(c.teacher):
            from posttrain.endpoint import Endpoint

            backend: Backend = Endpoint(c, cache.path)
        else:
            from posttrain.local_teacher import LocalModel

            backend = LocalModel(c)
    except BaseException:
        cache.close()
        raise
    return Teacher(backend, cache, Ledger(c.price_in, c.price_out))


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """`text` before the first of the texts `stop`, and whether there was one: servers differ in how many they take."""
    at = min((found for found in (text.find(mark) for mark in stop) if found >= 0), default=-1)
    return (text[:at], True) if at >= 0 else (text, False)
