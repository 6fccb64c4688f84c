"""A local model as teacher: batches of prompts, each answer the same whatever else is in its batch.

Rounding differs with the shape of a batch, and one token that tips the other way changes all that follows. So every
answer has noise of its own (Gumbel-max: argmax of logits / T + g is a sample of softmax), and where the two best tokens
are so close that rounding could decide, the logits are computed again for this answer alone, without padding.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import console
from data import sources
from posttrain.teacher import Completion, Keep, Ledger, Prompt, Question, TeacherConfig, cut
from pretrain import causal_lm

CLOSE = 1e-3  # nats between tokens that float32 rounding may swap; measured: 4e-5 between batches of SmolLM2-135M
TAIL = 64  # tokens at the end of an answer in which a stop text is looked for


class LocalModel:
    """A Hugging Face folder or GGUF file as a teacher, in float32. Raises UserError where it cannot be loaded."""

    def __init__(self, c: TeacherConfig) -> None:
        self.batch = c.batch
        path = find(c.teacher)
        self.tokenizer: Any = load_tokenizer(path)
        if c.teacher_mode == "chat" and not self.tokenizer.chat_template:
            raise console.UserError(f"--teacher {path} has no chat template: give --teacher_mode completion")
        self.chat = bool(self.tokenizer.chat_template) and c.teacher_mode != "completion"
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:8]
        self.id = f"local:{causal_lm.fingerprint(path)}:{template}"
        if c.device == "cuda" and not torch.cuda.is_available():
            raise console.UserError("--device cuda: torch sees no GPU here; use --device cpu or auto")
        device = c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.model = causal_lm.load(path).to(device)
        self.limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        ends = self.model.generation_config.eos_token_id
        known = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self.ends = sorted(end for end in known if end is not None)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a conversation by the model's template, a text as the beginning of a document."""
        if isinstance(prompt, str):
            return self._opened(prompt)
        return self._opened(self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))

    def _opened(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        begin = self.tokenizer.bos_token_id
        return ids if begin is None or ids[:1] == [begin] else [begin, *ids]

    def answer(self, questions: list[Question], keep: Keep, ledger: Ledger) -> None:
        """Answer all of `questions`, `batch` of like length at a time; one that the model cannot hold is refused."""
        ledger.counts["requests"] += len(questions)
        encoded = []
        for number, question in enumerate(questions):
            ids = self.encode(question.prompt)
            if self.limit is not None and len(ids) >= self.limit:
                ledger.count("refused")
                keep(question, Completion("", "refused"))
            else:
                encoded.append((len(ids), number, ids, question))
        # Questions of one call share their sampling; sorted by length they need little padding.
        encoded.sort(key=lambda row: row[:2])
        while encoded:
            # One that has less room than it may fill has it alone, whatever else there is to answer.
            fitting = sum(self._room(ids, q) == q.sampling.max_tokens for *_, ids, q in encoded[: self.batch])
            some, encoded = encoded[: max(1, fitting)], encoded[max(1, fitting) :]
            for (*_, question), answer in zip(some, self._answer([(ids, q) for *_, ids, q in some]), strict=True):
                keep(question, answer)

    def _room(self, ids: list[int], question: Question) -> int:
        """Tokens that an answer may have."""
        return (
            question.sampling.max_tokens
            if self.limit is None
            else min(question.sampling.max_tokens, self.limit - len(ids))
        )

    @torch.no_grad()
    def _answer(self, rows: list[tuple[list[int], Question]]) -> list[Completion]:
        width = max(len(ids) for ids, _ in rows)
        stop = rows[0][1].sampling.stop
        pad = self.ends[0] if self.ends else 0
        device = self.model.device
        padded = torch.tensor([[pad] * (width - len(ids)) + ids for ids, _ in rows], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows], device=device)
        draw = Draw(self.model, [len(ids) for ids, _ in rows], [q for _, q in rows], width, self.ends)
        out = self.model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=self._room(*rows[0]),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_beams=1,
            eos_token_id=self.ends or None,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([Stops(self.tokenizer, stop, width)]),
        )
        return [self._completion(ids, row[width:].tolist(), q) for (ids, q), row in zip(rows, out, strict=True)]

    def _completion(self, prompt: list[int], new: list[int], question: Question) -> Completion:
        # After its end a row is padded as long as others go on: no part of the answer.
        end = next((at for at, token in enumerate(new) if token in self.ends), len(new))
        text, stopped = cut(self.decode(new[:end]), question.sampling.stop)
        spent = self._spent(new, question.sampling.stop) if stopped else min(len(new), end + 1)
        return Completion(text, "stop" if stopped or end < len(new) else "length", len(prompt), spent)

    def _spent(self, new: list[int], stop: tuple[str, ...]) -> int:
        """How many of the tokens `new` it took to write the first stop text."""
        return next(n for n in range(1, len(new) + 1) if cut(self.decode(new[:n]), stop)[1])

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def close(self) -> None:
        """Nothing is under way."""


class Draw(LogitsProcessor):
    """Leaves of each row's logits the one token that is drawn, by temperature, nucleus, penalties and its own noise."""

    def __init__(self, model: Any, lengths: list[int], questions: list[Question], width: int, ends: list[int]) -> None:
        self.model, self.lengths, self.questions, self.width, self.ends = model, lengths, questions, width, ends
        self.noise = [torch.Generator().manual_seed(question.draw_seed()) for question in questions]
        self.again = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (batch, vocabulary) with 0 at the token drawn and -inf elsewhere."""
        drawn = torch.full_like(scores, -torch.inf)
        for row, question in enumerate(self.questions):
            sampling, new = question.sampling, input_ids[row, self.width :]
            if len(new) and int(new[-1]) in self.ends:
                drawn[row, self.ends[0]] = 0.0
                continue
            noise = None
            if sampling.temperature > 0:
                # Drawn on the CPU, so that a GPU draws the same.
                uniform = torch.rand(scores.shape[1], generator=self.noise[row]).clamp_min(1e-38)
                noise = -torch.log(-torch.log(uniform)).to(scores.device)
            token, sure = choose(scores[row], new, sampling, noise)
            if not sure:
                self.again += 1
                alone = input_ids[row : row + 1, self.width - self.lengths[row] :]
                token, _ = choose(self.model(input_ids=alone, use_cache=False).logits[0, -1], new, sampling, noise)
            drawn[row, token] = 0.0
        return drawn


def choose(logits: Tensor, new: Tensor, sampling: Any, noise: Tensor | None) -> tuple[int, bool]:
    """The token that is drawn from `logits` (vocabulary), and whether rounding could not have chosen another.

    `new` are the answer's tokens so far, which the penalties of OpenAI's API count.
    """
    logits = logits.float()
    if len(new) and (sampling.presence_penalty or sampling.frequency_penalty):
        times = torch.bincount(new, minlength=len(logits))
        logits = logits - sampling.presence_penalty * (times > 0) - sampling.frequency_penalty * times
    if noise is None:
        best = logits.topk(2)
        return int(best.indices[0]), bool(best.values[0] - best.values[1] > CLOSE)
    logits = logits / sampling.temperature
    close = CLOSE / min(1.0, sampling.temperature)
    certain = possible = torch.ones_like(logits, dtype=torch.bool)
    if sampling.top_p < 1:
        ordered = logits.sort(descending=True).values
        before = ordered.softmax(0).cumsum(0) - ordered.softmax(0)  # mass of the likelier tokens
        fewer = max(1, int((before < sampling.top_p - CLOSE).sum()))
        more = int((before < sampling.top_p + CLOSE).sum())
        inside = ordered[max(1, int((before < sampling.top_p).sum())) - 1]
        possible = logits >= ordered[more - 1] - close
        certain = logits > ordered[fewer] + close if fewer < len(ordered) else possible
        chosen = int(torch.where(logits >= inside, logits + noise, -torch.inf).argmax())
    else:
        chosen = int((logits + noise).argmax())
    rivals = torch.where(possible, logits + noise, -torch.inf).topk(2)
    sure = bool(certain[chosen]) and bool(rivals.values[0] - rivals.values[1] > close)
    return chosen, sure and chosen == int(rivals.indices[0])


class Stops(StoppingCriteria):
    """Ends a row whose answer holds one of the texts `stop`."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Any:
        """Booleans (batch,)."""
        if not self.stop:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tails = self.tokenizer.batch_decode(input_ids[:, self.width :][:, -TAIL:], skip_special_tokens=True)
        return torch.tensor([cut(tail, self.stop)[1] for tail in tails], device=input_ids.device)


def find(name: str) -> Path:
    """As causal_lm.find, with the flag named as it is here."""
    try:
        return causal_lm.find(name)
    except console.UserError as mistake:
        raise console.UserError(str(mistake).replace("--model", "--teacher", 1)) from None


def load_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of a folder or GGUF file. Raises UserError."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    causal_lm.quieten()
    folder, how = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **how)
    except (OSError, ValueError, KeyError) as error:
        raise console.UserError(f"--teacher {path}: no tokenizer ({sources.first_line(error)})") from None
