"""The loop of continued pretraining: one pull of one transformers model, on a domain with general text replayed."""

import math
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import console
from data import shards
from data.loader import TokenStream
from pretrain import causal_lm, checkpoint, embeddings, optim
from pretrain.causal_lm import CausalLM
from pretrain.device import make_deterministic, measured_matmul_rate, size_name
from pretrain.progress import Progress
from pretrain.pull import Pull
from pretrain.validate import Validation

if TYPE_CHECKING:
    from pretrain.continued import ContinueConfig


class Inputs(NamedTuple):
    """What the flags name, once it is known to fit together: manifests, and (base vocabulary, new pieces)."""

    model: Path
    domain: dict[str, Any]
    general: dict[str, Any] | None
    new_pieces: tuple[int, list[tuple[int, list[int]]]] | None


def adapt(c: "ContinueConfig", inputs: Inputs, pull: Pull, lineage: dict[str, Any], stop_signals: list[int]) -> int:
    """Train to the end, to divergence or to a signal; `pull.result` says what became of it. Returns the exit code."""
    assert c.data_seed is not None and c.replay is not None
    make_deterministic(c.device, c.seed)
    steps, n_sequences = c.tokens // c.batch_tokens, c.batch_tokens // c.seq_len
    micro = (c.micro_batch_tokens or c.batch_tokens) // c.seq_len
    saved = checkpoint.folders(pull.folder)[-1:]
    state: dict[str, Any] = {}
    if saved:
        state = checkpoint.verify(saved[0])
        model = causal_lm.load(saved[0])
    else:
        model = causal_lm.load(inputs.model)
        if inputs.new_pieces:
            embeddings.grow(model, *inputs.new_pieces, f"--model {inputs.model}", Path(c.tokenizer or ""))
        rows = len(embeddings.table_of(model.get_input_embeddings()))
        if rows < inputs.domain["vocab_size"]:
            raise console.UserError(
                f"--model {inputs.model} has {rows:,} embeddings, fewer than the {inputs.domain['vocab_size']:,} ids "
                f"of --data {c.data}: build that with the model's own tokenizer"
            )
    model.to(c.device)
    bos_id, eos_id = shards.document_ids(inputs.domain)
    lm, parameters = CausalLM(model, bos_id), dict(model.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": c.weight_decay, "lr_scale": 1.0},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)
    if saved:
        training = checkpoint.load_training(saved[0], dict(parameters))
        checkpoint.restore_training(training, parameters, [optimizer])
        pull.resume(state)
        print(f"resuming {pull.folder} from step {pull.step}", file=sys.stderr)

    domain = TokenStream(Path(c.data), inputs.domain, "train", c.seq_len)
    general = TokenStream(Path(c.general), inputs.general, "train", c.seq_len) if c.general and inputs.general else None
    validations = {"val": Validation(Path(c.data), inputs.domain, c.val_tokens, c.seq_len)}
    if c.general and inputs.general:
        validations["val_general"] = Validation(Path(c.general), inputs.general, c.val_tokens, c.seq_len)
    window, wanted = (part.to(c.device) for part in validations["val"].stream.windows(np.zeros(1, int)))
    lm.try_own_head(window, wanted)

    peak_flops, flops_per_token = measured_matmul_rate(c.device, c.dtype), lm.flops_per_token(c.seq_len)
    pull.open(
        "continue",
        tags=[f"size:{size_name(lm.n_params())}", f"data:{lineage['shards']}", f"model:{lineage['model']}"],
        lineage=lineage,
        hardware=torch.cuda.get_device_name() if c.device == "cuda" else None,
        alone=True,
    )
    for part in filter(None, (lineage["shards"], lineage["general"])):
        pull.tracker.use_artifact(f"shards-{part}:latest")
    progress = Progress(steps, pull.step, c.batch_tokens)

    def say(line: str) -> None:
        progress.say(line)
        pull.write_log(line)

    epochs = steps * c.batch_tokens * (1 - c.replay) / domain.n_tokens
    say(
        f"{pull.name}: {type(model).__name__}, {lm.n_params():,} parameters, {steps:,} steps of {c.batch_tokens:,} "
        f"tokens ({epochs:.2f} epochs of the domain, {c.replay:.0%} replayed), "
        f"on {c.device}, W&B run {pull.tracker.id} ({pull.tracker.mode})"
    )
    if not lm.own_head:
        say("its logits are more than its head's product: taken whole from the model, which costs memory")
    mark = time.perf_counter()

    def autocast() -> torch.autocast:
        return torch.autocast(c.device, torch.bfloat16, enabled=c.dtype == "bfloat16")

    def validate() -> None:
        with autocast():
            scores = {part: v.score(lm.token_nll, 1, lm.device)[0] for part, v in validations.items()}
        pull.val = {key.replace("val", part, 1): x for part, score in scores.items() for key, x in score.items()}
        pull.tracker.log({"tokens": pull.tokens, "step": pull.step, **pull.val}, step=pull.step)

    def save() -> None:
        loader = {"data_seed": c.data_seed, "shards": lineage["shards"], "general": lineage["general"]}
        checkpoint.save(
            pull.folder,
            lm.weights(),
            {name: t.cpu() for name, t in checkpoint.training_tensors(parameters, [optimizer]).items()},
            lm.config(),
            pull.state(loader, bos_id, eos_id) | {"start": pull.summary},
            Path(c.data) / "tokenizer",
            pull.guard.keep_before,
        )
        pull.saved_step = pull.step

    def charge() -> None:
        nonlocal mark
        now = time.perf_counter()
        pull.seconds, mark = pull.seconds + now - mark, now

    def update() -> bool:
        """Compute, judge, apply and log the next update; False for one that the guard stops before it is applied."""
        started, step = time.perf_counter(), pull.step
        logs = (step + 1) % c.log_every == 0 or step + 1 == steps
        ids, targets = mixed_batch(domain, general, c.replay or 0.0, step, n_sequences, c.data_seed or 0)
        count, loss = (targets >= 0).sum().to(c.device), 0.0
        for first in range(0, n_sequences, micro):
            some = slice(first, first + micro)
            with autocast():
                objective = lm.loss(ids[some].to(c.device), targets[some].to(c.device), count)
            objective.backward()
            loss += objective.item()
        norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
        lr = optim.learning_rate(
            step, steps, schedule=c.schedule, peak=c.lr, warmup=c.warmup, decay=c.decay, final=c.final_lr
        )
        if words := pull.observe(step, loss, norm.item()):
            say(words)
        lost = pull.verdict is not None and c.on_divergence == "stop"
        if not lost:
            optim.clip(parameters, norm, c.grad_clip)
            optim.set_learning_rate([optimizer], lr)
            optimizer.step()
            pull.step += 1
        optimizer.zero_grad(set_to_none=True)
        step_seconds = time.perf_counter() - started
        rate = c.batch_tokens / step_seconds
        progress.keep_pace(rate)
        if logs or lost:
            row = {
                "tokens": (step + 1) * c.batch_tokens,
                "step": step + 1,
                "train/loss": loss,
                "train/lr": lr,
                "stability/grad_norm": norm.item(),
                "stability/loss_z": pull.guard.loss_z,
                "perf/tokens_per_second": rate,
                "perf/step_seconds": step_seconds,
                "perf/mfu": flops_per_token * rate / peak_flops,
            }
            pull.tracker.log(row if lost else row | rms_of(optimizer), step=step + 1)
        bpb = [pull.val["val/bpb"]] if pull.val else []
        progress.show(step + 1, [loss], bpb, pull.guard.status)
        pull.write_log(progress.text(step + 1, [loss], bpb, pull.guard.status), now=step + 1 == steps)
        return not lost

    status, exit_code = "crashed", 1
    try:
        if saved:
            pull.summary = state["start"]
        else:
            validate()
            pull.summary = {f"start/{key}": value for key, value in (pull.val or {}).items()}
            pull.tracker.summary(pull.summary)
            say("before the first step: " + ", ".join(f"{key} {value:.4f}" for key, value in (pull.val or {}).items()))
            save()
        while pull.step < steps and not stop_signals:
            if not update():
                break
            last = pull.step == steps
            if pull.step % c.val_every == 0 or last:
                validate()
            if pull.step % c.checkpoint_every == 0 or last:
                save()
            charge()
        if pull.step == steps and (words := pull.judge_end()):
            say(words)
        if pull.verdict and (c.on_divergence == "stop" or pull.step == steps):
            status = "diverged"
            if c.on_divergence == "stop":
                checkpoint.drop_since(pull.folder, pull.verdict.onset_step)
        elif pull.step < steps:
            status, exit_code = "stopped", 128 + stop_signals[0]
            if pull.saved_step != pull.step:
                save()
            pull.tracker.mark_preempting()
            came = signal.Signals(stop_signals[0]).name
            say(f"stopped by {came} at step {pull.step}, saved: the same command resumes")
        else:
            status = "spiked" if pull.guard.spikes else "ok"
            if pull.val is None:  # killed between its last checkpoint and its end
                validate()
            kept = checkpoint.folders(pull.folder)[-1]
            pull.tracker.artifact(f"model-{pull.name}", "model", [kept], {"step": pull.step, **(pull.val or {})})
    except OSError as refusal:
        if refusal.errno in console.MACHINE_SAYS_NO:
            status, exit_code = "stopped", console.EXIT_USER
            kept_text = (
                f"the last checkpoint is step {pull.saved_step}" if pull.saved_step >= 0 else "nothing was saved"
            )
            say(f"stopped at step {pull.step} ({refusal.strerror}); {kept_text}")
        raise
    finally:
        progress.close()
        charge()
        if pull.val and "val_general/bpb" in pull.val:
            pull.summary = {"val_general/bpb": pull.val["val_general/bpb"], **pull.summary}
            pull.tracker.summary(pull.summary)
        exit_code = pull.close(status, exit_code, flops_per_token)
    return exit_code


def mixed_batch(
    domain: TokenStream, general: TokenStream | None, replay: float, step: int, n_sequences: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of global batch `step`, each (n_sequences, seq_len), the replayed sequences last.

    How many of them up to a batch is its share, rounded: each has it to within one sequence, all together exactly.
    Either stream goes on where its last batch ended, so that what is seen is a pure function of (seed, step).
    """
    before, after = (math.floor(k * n_sequences * replay + 0.5) for k in (step, step + 1))
    places = [(domain, np.arange(step * n_sequences - before, (step + 1) * n_sequences - after))]
    places += [(general, np.arange(before, after))] if general else []
    batches = [stream.windows(stream.ordered(place, seed)) for stream, place in places if len(place)]
    ids, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    return ids, targets


def rms_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The size of the update just taken, as a metric; a pass over all moments, hence only where rows are logged."""
    return {"stability/update_rms": float(optim.update_rms([optimizer]))}
