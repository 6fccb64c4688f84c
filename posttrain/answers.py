"""Answers of a model in memory to chat prompts, greedy or sampled, and their scores on held-out items."""

from collections.abc import Sequence
from typing import Any

import torch

from posttrain import chat, scoring
from posttrain.rows import Message

BATCH = 64  # prompts answered at once


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[Message]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """One answer a prompt, without special tokens. temperature 0: the most likely token each time.

    The training's random numbers are left as they are; the same seed gives the same answers.
    """
    ids = [chat.encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0, "remove_invalid_values": True}
    device, training = next(model.parameters()).device, model.training
    model.eval()
    answers = [""] * len(ids)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for at in range(0, len(order), BATCH):
            some = order[at : at + BATCH]
            width = max(len(ids[i]) for i in some)
            padded = torch.full((len(some), width), tokenizer.pad_token_id)
            mask = torch.zeros_like(padded)
            for row, i in enumerate(some):
                padded[row, width - len(ids[i]) :] = torch.tensor(ids[i])
                mask[row, width - len(ids[i]) :] = 1
            out = model.generate(
                input_ids=padded.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                max_length=None,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
                **how,
            )
            for row, i in enumerate(some):
                answers[i] = str(tokenizer.decode(out[row, width:], skip_special_tokens=True))
    model.train(training)
    return answers


@torch.no_grad()
def sampled_kl(
    model: Any, reference: Any, tokenizer: Any, prompts: Sequence[list[Message]], max_new_tokens: int, seed: int = 0
) -> float:
    """KL of the model from `reference` in nats per token, on one answer sampled from the model to each prompt.

    The mean of log p - log p_ref over the answers' tokens; `reference` None: the model without its adapter.
    """
    said = generate(model, tokenizer, prompts, max_new_tokens, 1.0, seed)
    device, training = next(model.parameters()).device, model.training
    model.eval()
    nats, count = 0.0, 0
    for prompt, answer in zip(prompts, said, strict=True):
        if not answer.strip():
            continue
        row = chat.encode(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
        ids = torch.tensor([row["input_ids"]], device=device)
        mine = torch.tensor(row["assistant_masks"][1:], device=device).bool()

        def log_probs(other: Any, ids: torch.Tensor = ids, mine: torch.Tensor = mine) -> torch.Tensor:
            logits = other(input_ids=ids).logits[0, :-1][mine].float()
            return logits.log_softmax(-1).gather(-1, ids[0, 1:][mine][:, None])

        own = log_probs(model)
        if reference is None:
            with model.disable_adapter():
                other = log_probs(model)
        else:
            other = log_probs(reference)
        nats, count = nats + float((own - other).sum()), count + int(mine.sum())
    model.train(training)
    return nats / max(1, count)


def measure(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[Message]],
    references: Sequence[str],
    max_new_tokens: int,
    samples: int = 0,
    seed: int = 0,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(metrics of scoring.summarise, one row an item with its greedy answer).

    samples: answers an item drawn at temperature 1 beside the greedy one.
    """
    greedy = generate(model, tokenizer, prompts, max_new_tokens)
    drawn = [generate(model, tokenizer, prompts, max_new_tokens, 1.0, seed * 1000 + k) for k in range(samples)]
    scores = [scoring.score(answer, reference) for answer, reference in zip(greedy, references, strict=True)]
    again = [[scoring.score(one[i], reference) for one in drawn] for i, reference in enumerate(references)]
    rows = [
        {"prompt": prompt[-1]["content"], "reference": reference, "answer": answer, "exact": one.exact}
        | {"field_accuracy": one.field_accuracy, "valid": one.valid}
        for prompt, reference, answer, one in zip(prompts, references, greedy, scores, strict=True)
    ]
    return scoring.summarise(scores, again), rows
