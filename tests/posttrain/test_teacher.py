"""Teachers: an endpoint with every trouble it can have, a local model, and what is never paid for twice."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import console
from posttrain import teacher
from posttrain.teacher import Completion, Sampling, TeacherConfig
from tests.posttrain import scripted_teacher
from tests.posttrain.scripted_teacher import Trouble, prompt_of

GREEDY = Sampling(max_tokens=16)
PROMPTS = [f"質問{number}" for number in range(12)]


def echo(asked: dict[str, Any]) -> str:
    return "答え:" + prompt_of(asked)


def ask(url: str, out: Path, prompts: list[str] = PROMPTS, sampling: Sampling = GREEDY, **flags: Any) -> Any:
    """Answers to `prompts` as user's turns, and the ledger's counts."""
    more = {"timeout": 5.0, "backoff": 0.01, "attempts": 3, **flags}
    asked = teacher.open_teacher(TeacherConfig(teacher=url, out=str(out), **more))
    try:
        chat: list[teacher.Prompt] = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return asked.generate(chat if asked.chat else prompts, sampling), asked.ledger
    finally:
        asked.close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_answers_come_in_order_and_are_paid_for_once(tmp_path: Path) -> None:
    with scripted_teacher.serving(echo) as server:
        answers, ledger = ask(server.url, tmp_path, price_in=100.0, price_out=1000.0)
        assert [answer.text for answer in answers] == ["答え:" + prompt for prompt in PROMPTS]
        again, second = ask(server.url, tmp_path, price_in=100.0, price_out=1000.0)
        assert again == answers and len(server.asked) == len(PROMPTS)
    spent_in, spent_out = sum(map(len, PROMPTS)), sum(len("答え:" + prompt) for prompt in PROMPTS)
    assert ledger.session()["money"] == pytest.approx((spent_in * 100 + spent_out * 1000) / 1e6)
    assert second.session()["money"] == 0 and second.total() == ledger.total()
    assert ledger.counts["answers"] == len(PROMPTS) and second.counts["cached"] == len(PROMPTS)


def test_every_trouble_is_counted_and_survived(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    def troubled(asked: dict[str, Any]) -> str | bytes | Trouble:
        prompt = prompt_of(asked)
        seen[prompt] += 1
        if seen[prompt] > 1:
            return echo(asked)
        troubles: dict[str, bytes | Trouble] = {
            "質問0": Trouble(429, {"Retry-After": "0.3"}),
            "質問1": Trouble(429),
            "質問2": Trouble(0),
            "質問3": Trouble(200, sleep=1.5),
            "質問4": Trouble(503),
            "質問5": b"<html>gateway</html>",
            "質問6": b'{"choices": []}',
            "質問7": b"",
        }
        return troubles.get(prompt, echo(asked))

    with scripted_teacher.serving(troubled) as server:
        answers, ledger = ask(server.url, tmp_path, timeout=0.5, concurrency=4)
        assert [answer.text for answer in answers] == ["答え:" + prompt for prompt in PROMPTS]
        assert len(server.asked) == len(PROMPTS) + 8
        assert len(server.answered) == len(set(server.answered)) == len(PROMPTS)
    counts = {name: ledger.counts[name] for name in ("rate_limited", "dropped", "timeouts", "server_errors", "garbage")}
    assert counts == {"rate_limited": 2, "dropped": 1, "timeouts": 1, "server_errors": 1, "garbage": 3}
    assert ledger.counts["requests"] == len(PROMPTS) + 8


def test_retry_after_holds_all_requests(tmp_path: Path) -> None:
    times: list[float] = []

    def limited(asked: dict[str, Any]) -> str | Trouble:
        times.append(time.monotonic())
        return Trouble(429, {"Retry-After": "0.6"}) if len(times) == 1 else echo(asked)

    with scripted_teacher.serving(limited) as server:
        ask(server.url, tmp_path, concurrency=1)
    assert times[1] - times[0] >= 0.6 and times[-1] - times[1] < 3


def test_limits_a_minute_are_kept(tmp_path: Path) -> None:
    with scripted_teacher.serving(echo) as server:
        begun = time.monotonic()
        ask(server.url, tmp_path / "requests", PROMPTS[:6], requests_per_minute=600)
        assert 0.5 <= time.monotonic() - begun < 3
        begun = time.monotonic()
        # An estimate is 3 characters and 16 tokens of answer, of which 9 tokens in all turn out to be spent.
        ask(server.url, tmp_path / "tokens", PROMPTS[:6], tokens_per_minute=3000, concurrency=1)
        assert 5 * 9 * 60 / 3000 * 0.8 <= time.monotonic() - begun < 4


def test_a_teacher_that_dies_half_way_costs_nothing_twice(tmp_path: Path) -> None:
    count = 0

    def dying(asked: dict[str, Any]) -> str | Trouble:
        nonlocal count
        count += 1
        return echo(asked) if count <= 5 else Trouble(0)

    with scripted_teacher.serving(dying) as server:
        with pytest.raises(console.UserError, match=r"answers so far are kept in .*answers.jsonl") as stopped:
            ask(server.url, tmp_path, concurrency=2)
        assert "\n" not in str(stopped.value)
        paid = list(server.answered)
        assert len(paid) == 5
    with pytest.raises(console.UserError, match="no connection"):  # gone for good
        ask(server.url, tmp_path, teacher_model="scripted", concurrency=2)
    with scripted_teacher.serving(echo) as back:
        answers, _ = ask(back.url, tmp_path, concurrency=2)
        assert [answer.text for answer in answers] == ["答え:" + prompt for prompt in PROMPTS]
        assert len(back.answered) == len(PROMPTS) - 5 and not set(back.answered) & set(paid)


def test_one_bad_prompt_does_not_end_a_stage_and_is_not_asked_again(tmp_path: Path) -> None:
    def picky(asked: dict[str, Any]) -> str | bytes | Trouble:
        if prompt_of(asked) == "質問3":
            return Trouble(400, body=b'{"error": {"message": "context length"}}')
        return b"not JSON" if prompt_of(asked) == "質問4" else "" if prompt_of(asked) == "質問5" else echo(asked)

    with scripted_teacher.serving(picky) as server:
        answers, ledger = ask(server.url, tmp_path, concurrency=1)
        assert [answer.finish_reason for answer in answers[2:7]] == ["stop", "refused", "failed", "stop", "stop"]
        assert ledger.counts["refused"] == ledger.counts["failed"] == ledger.counts["empty"] == 1
        before = len(server.asked)
        assert ask(server.url, tmp_path, concurrency=1)[0] == answers and len(server.asked) == before


@pytest.mark.parametrize(("status", "requests"), [(401, 1), (404, 1), (400, 10), (500, 30)])
def test_a_teacher_that_answers_nothing_ends_in_one_line(tmp_path: Path, status: int, requests: int) -> None:
    with scripted_teacher.serving(lambda _: Trouble(status)) as server:
        with pytest.raises(console.UserError, match=f"it answered {status}") as stopped:
            ask(server.url, tmp_path, concurrency=1)
        assert len(server.asked) == requests and "\n" not in str(stopped.value)
        # What may be the teacher's fault is not held against the prompts.
        assert (tmp_path / "answers.jsonl").read_bytes() == b""


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEACHERS_KEY", "sk-very-secret")
    with scripted_teacher.serving(echo) as server:
        ask(server.url, tmp_path, api_key_env="TEACHERS_KEY")
        assert {asked["authorization"] for asked in server.asked} == {"Bearer sk-very-secret"}
    leak = b'{"error": {"message": "no such key: sk-very-secret"}}'
    with (
        scripted_teacher.serving(lambda _: Trouble(401, body=leak)) as server,
        pytest.raises(console.UserError, match="401") as stopped,
    ):
        ask(server.url, tmp_path / "other", api_key_env="TEACHERS_KEY")
    said = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "secret" not in str(stopped.value) + said.out + said.err and b"secret" not in written
    with pytest.raises(console.UserError, match="neither user, password nor query") as refused:
        ask("http://me:sk-very-secret@127.0.0.1:1/v1", tmp_path / "third")
    assert "secret" not in str(refused.value)


def test_stop_texts_and_cut_answers(tmp_path: Path) -> None:
    with scripted_teacher.serving(lambda _: ("一\n二\n三", "length")) as server:
        answers, _ = ask(server.url, tmp_path, ["a"], Sampling(max_tokens=9, stop=("\n三",)))
        assert answers == [Completion("一\n二", "stop", 1, 5)]
        assert ask(server.url, tmp_path, ["a"])[0][0].finish_reason == "length"
        raw, _ = ask(server.url, tmp_path, ["a"], teacher_mode="completion")
        assert raw[0].text == "一\n二\n三" and server.asked[-1]["prompt"] == "a"


def test_a_torn_or_damaged_cache_loses_no_other_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with scripted_teacher.serving(echo) as server:
        answers, _ = ask(server.url, tmp_path, concurrency=1)
        lines = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
        lines[3] = b'{"key": 1}\n'
        (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
        assert ask(server.url, tmp_path)[0] == answers and len(server.asked) == len(PROMPTS) + 2
    assert "1 lines cannot be read" in capfd.readouterr().err
    kept = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_bytes().splitlines()]
    assert len(kept) == len(PROMPTS) + 1


def test_a_cache_serves_one_process_at_a_time(tmp_path: Path) -> None:
    first = teacher.Cache(tmp_path / "answers.jsonl")
    with pytest.raises(console.UserError, match="in use by another process"):
        teacher.Cache(tmp_path / "answers.jsonl")
    first.close()
    teacher.Cache(tmp_path / "answers.jsonl").close()


@pytest.fixture(scope="module")
def base(llama: Any) -> str:
    import torch

    torch.set_num_threads(1)
    return str(llama.checkpoint)


SAMPLED = Sampling(max_tokens=12, temperature=1.0, top_p=0.9, presence_penalty=0.5, seed=3)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(max_tokens=12, temperature=0.7, stop=("。", "の"))])
def test_a_local_answer_is_the_same_alone_and_in_any_batch(base: str, tmp_path: Path, sampling: Sampling) -> None:
    prompts = ["お問い合わせ", "件名: 納期", "x", "ご担当者様\n\n商品が届きません。" * 3, "請求書", "会議室の予約"]
    together, ledger = ask(base, tmp_path / "a", prompts, sampling, batch=6)
    assert ledger.counts["requests"] == 6 and all(answer.completion_tokens for answer in together)
    assert ask(base, tmp_path / "b", prompts[::-1], sampling, batch=4)[0] == together[::-1]
    assert ask(base, tmp_path / "c", prompts, sampling, batch=1)[0] == together
    # A stage that was killed: half the answers lie there, and the rest are asked in batches of another make.
    lines = (tmp_path / "a" / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a" / "answers.jsonl").write_bytes(b"".join(lines[::2]))
    resumed, ledger = ask(base, tmp_path / "a", prompts, sampling, batch=6)
    assert resumed == together and ledger.counts["cached"] == 3


def test_a_local_teacher_draws_by_seed_and_sample(base: str, tmp_path: Path) -> None:
    config = TeacherConfig(teacher=base, out=str(tmp_path))
    asked = teacher.open_teacher(config)
    drawn = Sampling(max_tokens=8, temperature=1.0)
    texts = [answer.text for answer in asked.generate(["お"] * 8, drawn, samples=range(8))]
    assert len(set(texts)) > 4
    assert asked.generate(["お"], Sampling(max_tokens=8, temperature=1.0, seed=1))[0].text != texts[0]
    # More than the model holds: refused; less room than wanted: an answer as long as the room.
    limit = asked.backend.limit  # type: ignore[attr-defined]
    long, full = "あ" * limit * 2, "あ" * (limit - 8)
    ids = asked.backend.encode(full)  # type: ignore[attr-defined]
    answers = asked.generate([long, full, "お"], Sampling(max_tokens=64))
    asked.close()
    assert answers[0].finish_reason == "refused" and len(ids) + answers[1].completion_tokens <= limit


def test_drawn_tokens_follow_the_distribution() -> None:
    import torch

    from posttrain.local_teacher import choose

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    new = torch.tensor([0, 0], dtype=torch.long)
    sampling = Sampling(max_tokens=1, temperature=0.8, top_p=0.9, presence_penalty=0.3, frequency_penalty=0.2)
    expected = ((logits - torch.tensor([0.3 + 0.4, 0, 0, 0])) / 0.8).softmax(0)
    expected[3] = 0.0  # outside of the nucleus: the others hold 0.93
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(4)
    for _ in range(4000):
        noise = -torch.log(-torch.log(torch.rand(4, generator=generator)))
        drawn[choose(logits, new, sampling, noise)[0]] += 1
    assert torch.allclose(drawn / 4000, expected / expected.sum(), atol=0.03)
    tied = torch.tensor([1.0, 1.0 + 1e-5, 0.0])
    assert choose(tied, new, GREEDY, None) == (1, False) and choose(logits, new, GREEDY, None) == (0, True)


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    cache = teacher.Cache(tmp_path / "answers.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: cache.put(str(number), Completion("あ" * 300, "stop")), range(200)))
    cache.close()
    again = teacher.Cache(tmp_path / "answers.jsonl")
    assert len(again.answers) == 200 and not again.skipped
    again.close()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"teacher": "nowhere"}, "--teacher nowhere"),
        ({"teacher": "http://"}, "not an address"),
        ({"teacher": "http://127.0.0.1:1", "concurrency": 0}, "--concurrency 0"),
        ({"teacher": "http://127.0.0.1:1", "price_in": float("nan")}, "--price_in nan"),
        ({"teacher": "http://127.0.0.1:1"}, "no connection"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, flags: dict[str, Any], said: str) -> None:
    with pytest.raises(console.UserError, match=said) as mistake:
        teacher.open_teacher(TeacherConfig(out=str(tmp_path), **flags))
    assert "\n" not in str(mistake.value)
