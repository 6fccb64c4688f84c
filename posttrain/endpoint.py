"""A teacher behind an OpenAI-compatible endpoint: many requests at a time, within its limits, through its troubles."""

import contextlib
import email.utils
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

import console
from posttrain.teacher import Completion, Keep, Ledger, Question, TeacherConfig, cut

LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 3600.0  # seconds that Retry-After may ask for; beyond it is another day's work
NO_KEY = "no-key"  # a local server asks for none, but the client insists on one
GARBAGE_TRIES = 3  # an answer that cannot be read may have been paid for
UNANSWERED = 10  # prompts in a row without an answer: then it is not the prompts


class Pace:
    """When the next request may leave, by the two limits a minute and by what Retry-After asked for."""

    def __init__(self, requests_per_minute: float, tokens_per_minute: float) -> None:
        self.per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self.per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self.free = self.held = 0.0
        self.lock = threading.Lock()

    def wait(self, tokens: int, halt: threading.Event) -> None:
        """Wait for a turn that costs about `tokens`; returns early when `halt` is set."""
        with self.lock:
            turn = max(time.monotonic(), self.free)
            self.free = turn + max(self.per_request, self.per_token * tokens)
        while (left := max(turn, self.held) - time.monotonic()) > 0 and not halt.wait(left):
            pass

    def correct(self, tokens: int) -> None:
        """The last estimate was too low by `tokens`, or too high where that is negative."""
        with self.lock:
            self.free += self.per_token * tokens

    def hold(self, seconds: float) -> None:
        """No request leaves for so long."""
        self.held = max(self.held, time.monotonic() + seconds)


class Endpoint:
    """An endpoint as a teacher. Raises UserError where it cannot be one.

    `id` is the name of the model alone: the same model behind another host or port goes on with the same answers.
    """

    def __init__(self, c: TeacherConfig, kept_in: Path) -> None:
        self.c, self.kept_in = c, kept_in
        self.url = base_url(c.teacher)
        key = os.environ.get(c.api_key_env) or NO_KEY
        # No retries of the client's: they would be neither counted nor paced.
        self.client = openai.OpenAI(base_url=self.url, api_key=key, timeout=c.timeout, max_retries=0)
        self.id = c.teacher_model or self._only_model()
        self.chat = c.teacher_mode != "completion"
        self.pace = Pace(c.requests_per_minute, c.tokens_per_minute)
        self.pool = ThreadPoolExecutor(c.concurrency, thread_name_prefix="teacher")
        self.halt = threading.Event()
        self.unanswered = 0

    def _only_model(self) -> str:
        try:
            raw = self.client.models.with_raw_response.list()
            names = [str(model["id"]) for model in json.loads(raw.content)["data"]]
        except openai.OpenAIError as error:
            raise console.UserError(
                f"--teacher {self.url}: {plain(error)}; if it does not list its models, give --teacher_model"
            ) from None
        except (ValueError, TypeError, KeyError):
            raise console.UserError(f"--teacher {self.url} does not list its models: give --teacher_model") from None
        if len(names) != 1:
            listed = ", ".join(names[:8]) or "none"
            raise console.UserError(f"--teacher {self.url} lists several models ({listed}): give --teacher_model")
        return names[0]

    def answer(self, questions: list[Question], keep: Keep, ledger: Ledger) -> None:
        """Ask all of `questions`. Raises UserError where the endpoint refuses us or stays dead.

        Whatever ends it, answers that are under way are awaited and kept, since they are paid for.
        """
        self.halt.clear()
        futures = [self.pool.submit(self._ask, question, keep, ledger) for question in questions]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            self.halt.set()
            for future in futures:
                future.cancel()
            wait(futures)
            raise

    def _ask(self, question: Question, keep: Keep, ledger: Ledger) -> None:
        estimate = sum(map(len, texts(question))) + question.sampling.max_tokens  # Japanese: a token a character
        failed = garbage = 0
        begun = time.monotonic()
        while not self.halt.is_set():
            self.pace.wait(estimate, self.halt)
            if self.halt.is_set():
                return
            ledger.count("requests")
            try:
                raw = self._request(question)
                answer = read(raw, question)
            except openai.RateLimitError as error:
                ledger.count("rate_limited")
                if error.code == "insufficient_quota":
                    raise self._gone(plain(error)) from None
                seconds = retry_after(error.response.headers.get("retry-after", ""))
                if seconds is None:
                    seconds, failed = self._backoff(failed), failed + 1
                if time.monotonic() + seconds > begun + LONGEST_WAIT:
                    raise self._gone(f"it asks to wait for {seconds:,.0f} s more") from None
                if failed >= self.c.attempts:
                    raise self._gone(plain(error)) from None
                self.pace.hold(seconds)
                continue
            except openai.APITimeoutError:
                ledger.count("timeouts")
                trouble = f"no answer within {self.c.timeout:g} s"
            except openai.APIConnectionError as error:
                ledger.count("dropped")
                if failed + 1 >= self.c.attempts:
                    raise self._gone(plain(error)) from None
                trouble = plain(error)
            except openai.APIStatusError as error:
                status = error.status_code
                if status in (401, 402, 403, 404, 405):
                    raise self._gone(plain(error)) from None
                if status < 500 and status not in (408, 409, 425):
                    ledger.count("refused")
                    self._settle(question, keep, "refused", plain(error))
                    return
                ledger.count("server_errors")
                trouble = plain(error)
            except ValueError as error:
                ledger.count("garbage")
                garbage += 1
                trouble = f"an answer that cannot be read ({error})"
            else:
                if not answer.prompt_tokens:
                    ledger.count("without_usage")
                self.pace.correct(answer.prompt_tokens + answer.completion_tokens - estimate)
                self.unanswered = 0
                keep(question, answer)
                return
            failed += 1
            if failed >= self.c.attempts or garbage >= GARBAGE_TRIES:
                ledger.count("failed")
                self._settle(question, keep, "failed", trouble)
                return
            self.halt.wait(self._backoff(failed - 1))

    def _request(self, question: Question) -> bytes:
        s = question.sampling
        # Only what differs from the API's own defaults: some servers refuse what they do not know.
        more: dict[str, Any] = {"seed": question.draw_seed()}
        more |= {"top_p": s.top_p} if s.top_p < 1 else {}
        more |= {"presence_penalty": s.presence_penalty} if s.presence_penalty else {}
        more |= {"frequency_penalty": s.frequency_penalty} if s.frequency_penalty else {}
        more |= {"stop": list(s.stop)[:4]} if s.stop else {}  # four is what OpenAI takes; `cut` sees to the others
        more |= {"model": self.id, "max_tokens": s.max_tokens, "temperature": s.temperature}
        if isinstance(question.prompt, str):
            return self.client.completions.with_raw_response.create(prompt=question.prompt, **more).content
        messages: Any = question.prompt
        return self.client.chat.completions.with_raw_response.create(messages=messages, **more).content

    def _settle(self, question: Question, keep: Keep, reason: str, trouble: str) -> None:
        """Go on without an answer to `question`, unless the last prompts had none either."""
        self.unanswered += 1
        if self.unanswered >= UNANSWERED:
            raise self._gone(f"{self.unanswered} prompts in a row without an answer, the last for: {trouble}")
        keep(question, Completion("", reason))

    def _backoff(self, failed: int) -> float:
        return min(LONGEST_BACKOFF, self.c.backoff * 2.0**failed)

    def _gone(self, why: str) -> console.UserError:
        self.halt.set()
        return console.UserError(
            f"--teacher {self.url}, model {self.id}: {why}. All answers so far are kept in {self.kept_in}: mend it and "
            "give the same command again"
        )

    def close(self) -> None:
        self.halt.set()
        self.pool.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(OSError):
            self.client.close()


def base_url(teacher: str) -> str:
    """The endpoint's address, with /v1 where no path is given. Raises UserError where it holds a secret."""
    try:
        parts = urlsplit(teacher)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if not parts.hostname:
        raise console.UserError("--teacher: not an address; write http://HOST:PORT/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        # Not repeated here: it may be a key.
        raise console.UserError(
            "--teacher: the address may hold neither user, password nor query, since it is recorded; a key goes into "
            "the environment variable that --api_key_env names"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/') or '/v1'}"


def texts(question: Question) -> list[str]:
    prompt = question.prompt
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


def read(raw: bytes, question: Question) -> Completion:
    """The answer in the body of a response. Raises ValueError where there is none."""
    try:
        body = json.loads(raw)
        choice = body["choices"][0]
        text = choice["text"] if isinstance(question.prompt, str) else choice["message"]["content"]
        usage = body.get("usage") or {}
        spent = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}, {len(raw)} bytes") from None
    if not isinstance(text, str | None):
        raise ValueError(f"its text is a {type(text).__name__}")
    # Half a surrogate pair, which JSON can spell and UTF-8 cannot.
    whole = (text or "").encode("utf-8", "replace").decode()
    kept, stopped = cut(whole, question.sampling.stop)
    reason = "length" if choice.get("finish_reason") == "length" and not stopped else "stop"
    return Completion(kept, reason, *spent)


def retry_after(header: str) -> float | None:
    """Seconds that a Retry-After header asks to wait: a number, or a date (RFC 9110, 10.2.3); None where it does not.

    Never less than a tenth of a second, so that a server that says 0 is not asked in a tight loop.
    """
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.1, seconds) if seconds == seconds else None


def plain(error: openai.OpenAIError) -> str:
    """One short line of what went wrong, without what the endpoint may have repeated of our key."""
    if isinstance(error, openai.APIStatusError):
        body = error.body
        said = body.get("message") if isinstance(body, dict) else None
        told = " ".join(str(said or error.response.reason_phrase).split())
        key = error.request.headers.get("authorization", "").removeprefix("Bearer ")
        return f"it answered {error.status_code}: {told.replace(key, '(key)')[:200] if key != NO_KEY else told[:200]}"
    if isinstance(error, openai.APIConnectionError) and error.__cause__:
        return f"no connection ({' '.join(str(error.__cause__).split())[:200] or type(error.__cause__).__name__})"
    return f"{type(error).__name__}"
