"""`train.py chat` on a tiny model: a pipe, a terminal, commands, and what stops an answer."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import console
from posttrain import converse, models

Talker = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(llama: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talker:
    """talk(input, *flags): exit code, stdout and stderr of the chat door, in this process, on a pull of 64 tokens."""
    import torch

    torch.set_num_threads(1)

    def run(said: str, *flags: str, checkpoint: Path | str = llama.folder) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        capsys.readouterr()
        code = converse.main([str(checkpoint), *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_pipe_is_a_conversation(talk: Talker, llama: Any) -> None:
    code, out, err = talk("納期は?\n金額は?\n", "--max_new_tokens=8", "--json")
    result = json.loads(out)
    assert code == 0 and result["checkpoint"] == str(llama.checkpoint)
    assert "has no chat template: it was never trained to answer" in err
    assert [turn["user"] for turn in result["turns"]] == ["納期は?", "金額は?"]
    assert all(turn["tokens"] == 8 or turn["stopped_by"] == "end" for turn in result["turns"])
    assert json.loads(talk("納期は?\n金額は?\n", "--max_new_tokens=8", "--json")[1]) == result, (
        "same seed, same answers"
    )
    assert json.loads(talk("納期は?\n金額は?\n", "--max_new_tokens=8", "--json", "--seed=1")[1]) != result
    # As text: what streams is what the JSON holds.
    plain = talk("納期は?\n金額は?\n", "--max_new_tokens=8")[1]
    assert plain == "".join(turn["assistant"] + "\n" for turn in result["turns"])


def test_commands(talk: Talker) -> None:
    greedy = ("--max_new_tokens=6", "--temperature=0", "--json")
    said = "品名は?\n/reset\n品名は?\n/system 短く\n品名は?\n\n/quit\n納期は?\n"
    turns = json.loads(talk(said, *greedy)[1])["turns"]
    assert [turn["user"] for turn in turns] == ["品名は?"] * 3, "blank lines say nothing, /quit leaves"
    assert turns[0] == turns[1], "a reset conversation begins again"
    told = json.loads(talk("品名は?\n", *greedy, "--system=短く")[1])["turns"]
    assert told == turns[2:], "/system and --system are the same"


def test_a_long_conversation_forgets_its_beginning(talk: Talker) -> None:
    _, out, err = talk("納期は?\n" * 6, "--max_new_tokens=12", "--json")
    assert len(json.loads(out)["turns"]) == 6 and "the oldest turn no longer fits" in err
    _, out, err = talk("長" * 80 + "\n納期は?\n", "--max_new_tokens=12", "--json")
    assert [turn["user"] for turn in json.loads(out)["turns"]] == ["納期は?"] and "do not fit" in err


def test_ctrl_c_stops_an_answer(talk: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupter:
        seen = 0

        def put(self, _: Any) -> None:
            self.seen += 1
            if self.seen == 4:  # the prompt, and three tokens
                os.kill(os.getpid(), signal.SIGINT)

        def end(self) -> None:
            pass

    turns: list[dict[str, Any]] = []
    monkeypatch.setattr(converse, "streamer", lambda _: Interrupter())
    reset = converse.Talk.reset

    def noted(self: converse.Talk, system: str) -> None:
        self.turns = turns
        reset(self, system)

    monkeypatch.setattr(converse.Talk, "reset", noted)
    before = signal.getsignal(signal.SIGINT)
    code, _, _ = talk("納期は?\n金額は?\n", "--max_new_tokens=20", "--temperature=2")
    assert code == 0 and signal.getsignal(signal.SIGINT) is before
    assert [turn["user"] for turn in turns] == ["納期は?", "金額は?"]
    assert all(turn["stopped_by"] in ("interrupted", "end") and turn["tokens"] <= 4 for turn in turns)


def test_streamed_japanese_comes_piece_by_piece(llama: Any) -> None:
    import torch

    tokenizer = models.load_tokenizer(llama.checkpoint)
    pieces: list[str] = []
    streamer = converse.streamer(tokenizer)
    streamer.on_finalized_text = lambda text, **_: pieces.append(text)
    streamer.put(torch.tensor([0]))  # stands for the prompt
    for i in tokenizer("ありがとうございます𠮷野", add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert "".join(pieces) == "ありがとうございます𠮷野" and "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 4


def test_mistakes(talk: Talker, tmp_path: Path, llama: Any) -> None:
    for flags, checkpoint, says in (
        (("--temperature=-1",), llama.folder, "--temperature must be 0 or more"),
        (("--max_new_tokens=0",), llama.folder, "--max_new_tokens 0: must be at least 1"),
        ([], tmp_path / "none", "no such model"),
        ([], tmp_path, "lacks config.json"),
    ):
        with pytest.raises(console.UserError, match=says):
            talk("a\n", *flags, checkpoint=checkpoint)
    (tmp_path / models.ADAPTER).write_text('{"base_model_name_or_path": "gone"}')
    with pytest.raises(console.UserError, match="is an adapter, and its base cannot be opened: gone: no such model"):
        models.base_of(models.find(str(tmp_path)))
    with pytest.raises(console.UserError, match=r"lacks adapter_model\.safetensors"):
        talk("a\n", checkpoint=tmp_path)
    (tmp_path / models.ADAPTER).write_text("{")
    with pytest.raises(console.UserError, match="cannot be read"):
        models.base_of(tmp_path)


def test_a_terminal(llama: Any) -> None:
    """A prompt, an answer, Ctrl-C at the prompt, Ctrl-D."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "train.py", "chat", str(llama.folder), "--max_new_tokens=5"]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""

    def wait_for(text: bytes, count: int = 1) -> None:
        nonlocal seen
        end = time.monotonic() + 90
        while seen.count(text) < count and time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                seen += os.read(ours, 4096)
        assert seen.count(text) >= count, seen.decode(errors="replace")

    try:
        wait_for(b"> ")
        assert b"Ctrl-D leaves" in seen
        os.write(ours, "納期は?\n".encode())
        wait_for(b"> ", 2)
        time.sleep(0.5)  # readline prints its prompt a moment before it listens
        child.send_signal(signal.SIGINT)
        wait_for(b"> ", 3)
        os.write(ours, b"\x04")
        assert child.wait(30) == 0
    finally:
        child.kill()
        os.close(ours)
