"""`python train.py chat CHECKPOINT`: talk to any causal LM, from a terminal or a pipe.

Commands: /reset forgets the conversation, /system TEXT sets the system message and forgets too, /quit leaves, as
Ctrl-D does. Ctrl-C stops an answer. On a pipe each line of stdin is one turn of the same conversation.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

import console
from posttrain import models

KNOWN = ("/reset", "/system", "/quit")


@dataclass(frozen=True)
class ChatConfig:
    checkpoint: Annotated[str, tyro.conf.Positional]
    """folder of a run, a checkpoint, a Hugging Face model or a PEFT adapter; or a GGUF file"""
    base: str | None = None
    """model that an adapter goes on, where the one that it names has moved"""
    system: str = ""
    """system message to begin with"""
    max_new_tokens: int = 512
    """tokens of an answer at most"""
    temperature: float = 0.7
    """softmax temperature; 0: the most likely token each time"""
    top_p: float = 0.95
    """nucleus: probability mass that is sampled from"""
    seed: int = 0
    """sampling seed"""
    json: bool = False
    """print one JSON object with all turns at the end, instead of answers as they come"""


@dataclass
class Talk:
    """A conversation with a loaded model."""

    config: ChatConfig
    model: Any
    tokenizer: Any
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    def reset(self, system: str) -> None:
        """Forget everything but `system`."""
        self.messages = [{"role": "system", "content": system}] if system.strip() else []

    def ask(self, text: str) -> None:
        """One turn: `text` into the conversation, the answer to stdout and into the conversation."""
        import torch

        self.messages.append({"role": "user", "content": text})
        ids, room = self.fit()
        if room < 1:
            self.messages.pop()
            print(f"{len(ids)} tokens do not fit in the model's context: say less", file=sys.stderr, flush=True)
            return
        sampling = {"do_sample": True, "temperature": self.config.temperature, "top_p": self.config.top_p, "top_k": 0}
        self.interrupted = False
        with torch.no_grad(), self.stoppable():
            row = self.model.generate(
                torch.tensor([ids], device=self.model.device),
                attention_mask=torch.ones((1, len(ids)), dtype=torch.long, device=self.model.device),
                max_new_tokens=min(self.config.max_new_tokens, room),
                stopping_criteria=[lambda scored, *_, **__: torch.full((len(scored),), self.interrupted)],
                streamer=None if self.config.json else streamer(self.tokenizer),
                **(sampling if self.config.temperature > 0 else {"do_sample": False}),
            )[0, len(ids) :].tolist()
        answer = self.tokenizer.decode(row, skip_special_tokens=True)
        ends = self.model.generation_config.eos_token_id
        ended = bool(row) and row[-1] in (ends if isinstance(ends, list) else [ends])
        why = "end" if ended else "interrupted" if self.interrupted else "length"
        self.turns.append({"user": text, "assistant": answer, "tokens": len(row), "stopped_by": why})
        self.messages.append({"role": "assistant", "content": answer})

    def fit(self) -> tuple[list[int], int]:
        """Ids of the prompt, and tokens left for the answer; the oldest turns go where there would be none."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 10**9
        wanted = min(self.config.max_new_tokens, limit // 2)
        while True:
            # A "</s>" or "<|im_end|>" that somebody types stays text.
            ids = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
            )
            first = 1 if self.messages[0]["role"] == "system" else 0
            if len(ids) + wanted <= limit or len(self.messages) - first < 3:
                return list(ids), limit - len(ids)
            del self.messages[first : first + 2]
            print("(the oldest turn no longer fits and is forgotten)", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Ctrl-C ends the answer, not the program."""

        def stop(*_: Any) -> None:
            self.interrupted = True

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def streamer(tokenizer: Any) -> Any:
    """transformers' TextStreamer, which waits for a space after all but Chinese characters, for Japanese too."""
    from transformers import TextStreamer

    class JapaneseStreamer(TextStreamer):
        def _is_chinese_char(self, cp: int) -> bool:
            return cp >= 0x2E80 and cp != 0xFFFD  # the latter stands for a character whose bytes are not all there

    return JapaneseStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def main(argv: list[str]) -> int:
    """Load, then answer until the input ends."""
    config = console.parse(ChatConfig, argv, "train.py chat")
    if config.temperature < 0 or not 0 < config.top_p <= 1:
        raise console.UserError("--temperature must be 0 or more, --top_p above 0 and at most 1")
    if config.max_new_tokens < 1:
        raise console.UserError(f"--max_new_tokens {config.max_new_tokens}: must be at least 1")
    path = models.find(config.checkpoint)
    import torch

    from posttrain import chat

    on_gpu = torch.cuda.is_available()
    model, tokenizer = models.load(path, torch.bfloat16 if on_gpu else torch.float32, config.base)
    model.to("cuda" if on_gpu else "cpu")
    if chat.install_template(tokenizer, model):
        print(f"{path} has no chat template: it was never trained to answer", file=sys.stderr, flush=True)
    torch.manual_seed(config.seed)
    talk = Talk(config, model, tokenizer)
    talk.reset(config.system)
    for line in lines():
        command, _, rest = line.partition(" ")
        if command == "/quit":
            break
        if command in ("/reset", "/system"):
            talk.reset(rest if command == "/system" else config.system)
        elif line.strip():
            talk.ask(line)
    if config.json:
        console.print_result({"checkpoint": str(path), "seed": config.seed, "turns": talk.turns}, as_json=True)
    return 0


def lines() -> Iterator[str]:
    """What people type, or the lines of a pipe, until there are no more."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history
    print(f"{', '.join(KNOWN)}; Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\nCtrl-D leaves", file=sys.stderr)
