"""The training loop: one pull, or a batch of pulls of one architecture, step by step.

One forward and backward pass serves all of them; then each has its own update, guard, W&B run and checkpoints. A pull
that diverges is closed while the others go on, and the batch is packed anew without it; under torch.compile it stays
frozen in its row until half of them are.
"""

import signal
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import console
from data import shards
from data.loader import TokenStream, ahead
from pretrain import checkpoint, clip, faults, optim, ranks, responses
from pretrain.device import data_sheet_flops, make_deterministic, measured_matmul_rate, size_name
from pretrain.model import Transformer, hugging_face_weights, load_hugging_face_weights, taken_apart
from pretrain.progress import Progress
from pretrain.pull import Pull, batch_of
from pretrain.shape import micro_batch, model_config
from pretrain.trace import Groups
from pretrain.validate import Validation, sample_texts

if TYPE_CHECKING:
    from pretrain.pretrain import PretrainConfig

# Steps that the host runs ahead of a GPU: what a step says of itself is read while the next is computed.
LAG = {"cpu": 0, "cuda": 1}


class Seen(NamedTuple):
    """What an update said of itself.

    `numbers` (rows, pulls) are loss, gradient norm, largest logit, update RMS, whether the update was skipped and
    whether a signal asks to stop; then, where it `logs`, what a trace keeps.
    """

    step: int
    pulls: list[Pull]
    lrs: list[float]
    numbers: Tensor
    arrived: torch.cuda.Event | None
    logs: bool
    grad_norms: Tensor
    """of each parameter (parameters, pulls), on the device"""


def train_together(
    pulls: list[Pull], c: "PretrainConfig", manifest: dict[str, Any], first_step: int, stop_signals: list[int]
) -> None:
    """Train `pulls`, which share everything in `c` but grid.OF_A_PULL, from the checkpoints of `first_step` (or -1).

    Each pull ends with its `result` set: done, diverged, or stopped with everything saved: once `stop_signals` has one,
    or because it `went_back` and goes on from an earlier checkpoint.
    """
    device, folder, team = c.device, Path(c.data), pulls[0].team
    bos_id, eos_id = shards.document_ids(manifest)
    steps, n_sequences = c.tokens // c.batch_tokens, c.batch_tokens // c.seq_len
    micro = micro_batch(c, len(pulls))
    make_deterministic(device, pulls[0].config["init_seed"])
    model = Transformer(model_config(c, manifest, len(pulls)))
    model.init_weights([pull.config["init_seed"] for pull in pulls])
    saved = [pull.folder / "checkpoints" / f"step-{first_step:08d}" for pull in pulls if first_step >= 0]
    for row, (pull, checkpointed) in enumerate(zip(pulls, saved, strict=False)):
        state, weights = checkpoint.load(checkpointed)
        load_hugging_face_weights(model, row, weights)
        pull.resume(state)
        if team.is_first:
            print(f"resuming {pull.folder} from step {first_step}", file=sys.stderr)
    if c.compile:
        model.compile_blocks()
    sharding = ranks.choose(c.sharding, team, model.n_params(), len(pulls))
    compute = ranks.wrap(model, model.model.layers, sharding, team)
    sharers = team if sharding == "fsdp" else ranks.ALONE
    clip_states: dict[str, Tensor] = {}
    for row, pull in enumerate(pulls):
        pull.parameters = optim.own_parameters(model, row)
        clip_states[pull.name] = clip.start(c.clip, pull.parameters, device)
        pull.optimizers = optim.make_optimizers(
            pull.parameters,
            model.config,
            c.optimizer,
            betas=(c.beta1, c.beta2),
            eps=c.eps,
            momentum=c.momentum,
            weight_decay=pull.config["weight_decay"],
        )
        if saved:
            like: dict[str, Tensor] = dict(model.named_parameters() if sharers.world > 1 else pull.parameters)
            training = checkpoint.load_training(saved[row], like)
            checkpoint.restore_training(training, pull.parameters, pull.optimizers, clip_states[pull.name])

    groups = Groups(model, pulls[0].parameters, pulls[0].optimizers)
    for pull in pulls:
        pull.trace.columns = groups.columns
    train_tokens = TokenStream(folder, manifest, "train", c.seq_len)
    validation = Validation(folder, manifest, c.val_tokens, c.seq_len)
    baseline = manifest.get("baseline") if validation.is_whole_split else None
    peak_flops = measured_matmul_rate(device, c.dtype)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    data_sheet = data_sheet_flops(gpu, c.dtype) if gpu else None
    flops_per_token, n_params = model.flops_per_token(), model.n_params()
    for pull in pulls:
        pull.summary = {"baseline/kn5_bpb": baseline["val_bpb"]} if baseline else {}
        pull.open(
            "pretrain",
            tags=[f"size:{size_name(n_params)}", f"data:{manifest['fingerprint']}"],
            lineage={
                "shards": manifest["fingerprint"],
                "tokenizer": manifest["tokenizer"]["sha256"],
                "source": manifest["source"],
            },
            hardware=gpu,
            alone=len(pulls) == 1,
        )
        pull.tracker.use_artifact(f"shards-{manifest['fingerprint']}:latest")
    step = max(0, first_step)
    progress = Progress(steps, step, c.batch_tokens, shown=team.is_first)

    def say(line: str, about: list[Pull]) -> None:
        progress.say(line)
        for pull in about:
            pull.write_log(line)

    for pull in pulls:
        say(
            f"{pull.name}: {n_params:,} parameters, {steps:,} steps of {c.batch_tokens:,} tokens "
            f"({steps * c.batch_tokens / train_tokens.n_tokens:.2f} epochs), on {device}, "
            f"W&B run {pull.tracker.id} ({pull.tracker.mode})",
            [pull],
        )

    stopping: list[int] = []  # the signal that all ranks have heard of
    rows = list(pulls)  # whose weights are in which row of the model
    seen: deque[Seen] = deque()
    writer, saving = ThreadPoolExecutor(1), deque[tuple[Pull, int, Future]]()
    mark = time.perf_counter()

    def live() -> list[Pull]:
        return [pull for pull in rows if not pull.result]

    def charge() -> None:
        """Device time since the last charge, in equal parts to the pulls that it was for."""
        nonlocal mark
        now = time.perf_counter()
        for pull in live():
            pull.seconds += (now - mark) * team.world / len(live())
        mark = now

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=c.dtype == "bfloat16")

    def eager() -> Any:
        """Validation and sampling have other shapes than training, and each would be compiled anew."""
        return torch.compiler.set_stance("force_eager")

    def make_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets (rows, share, seq_len) of this rank in update `step`, and how many it scores (rows,)."""
        ids, targets = batch_of(rows, step, train_tokens, n_sequences, manifest["vocab_size"])
        batch = (ids, targets, (targets >= 0).sum((1, 2)))
        return tuple(part.pin_memory() for part in batch) if device == "cuda" else batch  # type: ignore[return-value]

    def update(step: int, batch: tuple[Tensor, Tensor, Tensor], logs: bool) -> Seen:
        """Compute and apply update `step` of every live pull. What is not finite is not applied (--on_divergence)."""
        ids, targets, counts = (part.to(device, non_blocking=True) for part in batch)
        nll = torch.zeros(len(rows), device=device)
        tops = torch.zeros(model.config.n_layers, len(rows), device=device)
        counts = team.sum_(counts)
        parts = team.micro_batches(ids, targets, micro, n_sequences)
        for number, (part_ids, part_targets) in enumerate(parts, 1):
            probe = logs and number == 1  # on rank 0 the first sequences of the batch, however it is shared out
            with ranks.backward_of_part(compute, last=number == len(parts)):
                with autocast():
                    objective, part_nll, part_tops = compute(part_ids, part_targets, c.z_loss, counts, probe)
                objective.backward()
            nll += part_nll
            tops = tops if part_tops is None else part_tops
        # A signal may reach one rank only, or each at another time: all hear of it with the loss of the same update.
        *_, told = sums = team.sum_(torch.cat((nll, torch.full((1,), float(bool(stop_signals)), device=device))))
        nll = sums[:-1]
        faults.strike(model, rows, step)
        each_norm = optim.parameter_norms(model)
        norms = optim.grad_norms(each_norm, sharers)
        sound = nll.isfinite() & norms.isfinite()
        lrs = [0.0 if pull.result else pull.lr(step) for pull in rows]
        if c.on_divergence == "skip":
            # By what the host has heard so far: to wait for the last update would leave a GPU idle.
            limits = torch.tensor([pull.recovery.limits(pull.guard) for pull in rows]).T
            if device == "cuda":
                limits = limits.pin_memory().to(device, non_blocking=True)
            sound &= (nll <= limits[0]) & (norms <= limits[1])
        skipped = (~sound).float()
        squares = torch.zeros_like(each_norm)
        for row, pull in enumerate(rows):
            if pull.result:
                continue
            optim.hand_over(model, row, pull.parameters)
            clip.clip(c.clip, pull.parameters, norms[row], c.grad_clip, clip_states[pull.name], skipped[row], sharers)
            optim.set_learning_rate(pull.optimizers, lrs[row])
            for optimizer in pull.optimizers:
                if c.on_divergence != "ignore":
                    optimizer.found_inf = skipped[row]  # type: ignore[attr-defined]
                optimizer.measures = logs  # type: ignore[attr-defined]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            pull.step = step + 1
            if logs:
                squares[:, row] = optim.step_squares(pull.parameters, pull.optimizers)
        model.zero_grad(set_to_none=True)
        rms, traced = torch.zeros_like(nll), each_norm[:0]
        if logs:
            rms, traced = groups.measured(tops, each_norm, squares, sharers)
        numbers, arrived = torch.stack((nll, norms, tops.amax(0), rms, skipped, told.expand(len(rows)))), None
        numbers = torch.cat((numbers, traced))
        if device == "cuda":
            numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return Seen(step, list(rows), lrs, numbers, arrived, logs, each_norm)

    def judge(said: Seen, started: float) -> None:
        """Let each pull's guard hear of an update, and log it; a pull that is lost ends here."""
        if said.arrived:
            said.arrived.synchronize()
        step_seconds = time.perf_counter() - started
        rate = c.batch_tokens / step_seconds
        progress.keep_pace(rate)
        there = [pull for pull in said.pulls if not pull.result]
        for at, (pull, lr, numbers) in enumerate(zip(said.pulls, said.lrs, said.numbers.T.tolist(), strict=True)):
            if pull.result:
                continue
            loss, grad_norm, top, rms, skipped, told, *traced = numbers
            if told and not stopping:
                if not stop_signals:
                    stop_signals.append(signal.SIGTERM)
                stopping.append(stop_signals[0])
            device_seconds = step_seconds * team.world / len(there)
            signals = {"lr": lr} | ({"update_rms": rms, "max_logit": top} if said.logs else {})
            words = pull.observe(said.step, loss, grad_norm, skipped > 0, device_seconds, **signals)
            lost = pull.verdict is not None and c.on_divergence != "ignore"
            pull.trace.update(said.step, loss, grad_norm, pull.data_step(said.step))
            if (words or lost) and not said.logs:
                traced = groups.gradients(said.grad_norms, sharers)[:, at].tolist()
            if traced:
                pull.trace.log(said.step, traced)
            row: dict[str, float] = {"tokens": (said.step + 1) * c.batch_tokens, "step": said.step + 1}
            if said.logs or lost:
                row |= {
                    "train/loss": loss,
                    "train/lr": lr,
                    "stability/grad_norm": grad_norm,
                    "stability/loss_z": pull.guard.loss_z,
                }
            if said.logs:
                row |= {
                    "stability/max_attn_logit": top,
                    "stability/update_rms": rms,
                    "perf/tokens_per_second": rate,
                    "perf/step_seconds": step_seconds,
                    "perf/mfu": flops_per_token * rate * len(there) / (peak_flops * team.world),
                }
                if data_sheet:
                    row["perf/mfu_data_sheet"] = row["perf/mfu"] * peak_flops / data_sheet
            if len(row) > 2:
                pull.tracker.log(row, step=said.step + 1)
            if words:
                say(words if len(pulls) == 1 else f"{pull.name}: {words}", [pull])
            if words or lost:
                explain(pull)
            if lost and pull.may_go_back:
                go_back(pull)
            elif lost:
                pull.step = said.step
                end(pull, "diverged", 0)
            else:
                bpb = [pull.val["val/bpb"]] if pull.val else []
                line = progress.text(said.step + 1, [loss], bpb, pull.guard.status)
                pull.write_log(line, now=said.step + 1 == steps)
        if still := [pull for pull in there if not pull.result]:
            bpbs = [pull.val["val/bpb"] for pull in still if pull.val]
            worst = max((pull.guard.status for pull in still), key=("healthy", "spiking", "suspect").index)
            progress.show(said.step + 1, [pull.loss for pull in still], bpbs, worst)

    def explain(pull: Pull) -> None:
        """Write the post-mortem of a pull's verdict. What goes wrong with it costs a line, not the pull."""
        if not team.is_first:
            return
        from pretrain import postmortem_batches

        try:
            with eager():
                mine = [at for at, other in enumerate(rows) if other is pull]
                alone = model.selected(mine) if sharers.world == 1 else None
                postmortem_batches.explain(pull, alone, autocast, train_tokens, folder, manifest)
        except Exception as error:
            say(f"{pull.name}: no post-mortem ({type(error).__name__}: {error})", [pull])

    def validate() -> None:
        with autocast(), eager():
            for pull, val in zip(rows, validation.evaluate(model, team), strict=True):
                if not pull.result:
                    pull.val = val
                    pull.tracker.log({"tokens": pull.tokens, "step": pull.step, **val}, step=pull.step)

    def save() -> None:
        """Copy every live pull's state; a thread writes it down while training goes on."""
        settle(wait=True)
        for row, pull in enumerate(rows):
            if pull.result:
                continue
            loader = {"data_seed": pull.config["data_seed"], "shards": manifest["fingerprint"]}
            tensors = checkpoint.training_tensors(pull.parameters, pull.optimizers, clip_states[pull.name])
            training: dict[str, Tensor] | ranks.Shards
            if sharers.world > 1:
                own: dict[str, Tensor] = dict(model.named_parameters())
                weights = ranks.gathered(own)
                training = ranks.save_shards(tensors, own, checkpoint.shards_folder(pull.folder, step, team.is_first))
                if not team.is_first:
                    saving.append((pull, pull.step, writer.submit(training.wait)))
                    continue
                weights = taken_apart(weights, model.config)
            elif team.is_first:
                weights = checkpoint.snapshot(hugging_face_weights(model, row))
                training = checkpoint.snapshot(tensors)
            else:
                pull.saved_step = pull.step
                continue
            writing = writer.submit(
                checkpoint.save,
                pull.folder,
                weights,
                training,
                checkpoint.hugging_face_config(model.config, bos_id, eos_id),
                pull.state(loader, bos_id, eos_id),
                folder / "tokenizer",
                pull.keep_before,
            )
            saving.append((pull, pull.step, writing))

    def settle(wait: bool) -> None:
        """Take note of the checkpoints that are written. Raises what writing one raised."""
        while saving and (wait or saving[0][2].done()):
            pull, saved_step, writing = saving.popleft()
            writing.result()
            pull.saved_step = saved_step

    def end(pull: Pull, status: str, exit_code: int) -> None:
        charge()
        if status == "diverged" and c.on_divergence != "ignore":
            settle(wait=True)
            assert pull.verdict
            if team.is_first:
                checkpoint.drop_since(pull.folder, pull.verdict.onset_step)
        if status == "stopped" and exit_code > 128:
            pull.tracker.mark_preempting()
        pull.report_end(pull.close(status, exit_code, flops_per_token))

    def go_back(pull: Pull) -> None:
        charge()
        settle(wait=True)
        words = responses.go_back(pull)
        say(words if len(pulls) == 1 else f"{pull.name}: {words}", [pull])
        pull.close("stopped", console.EXIT_TERMINATED, flops_per_token)

    status, exit_code = "crashed", 1
    try:
        if first_step < 0:
            save()  # a pull that is lost in its first steps leaves its initial weights, and a killed one its run id
        batches = ahead(make_batch, range(step, steps))
        while step < steps and live() and not stopping:
            started = time.perf_counter()
            last = step + 1 == steps
            seen.append(update(step, next(batches), (step + 1) % c.log_every == 0 or last))
            step += 1
            validates, saves = step % c.val_every == 0 or last, step % c.checkpoint_every == 0 or last
            while len(seen) > (0 if validates or saves or stopping else LAG[device]):
                judge(seen.popleft(), started)
            if live() and validates:
                validate()
            settle(wait=False)
            if live() and saves:
                save()
            charge()
            # A lost pull's row goes at once: its denormal numbers make a CPU three times slower. Under torch.compile,
            # where each new shape is compiled anew, once half the rows are lost.
            if 0 < len(live()) <= (len(rows) // 2 if c.compile else len(rows) - 1):
                model = model.selected([row for row, pull in enumerate(rows) if not pull.result])
                compute, rows = ranks.wrap(model, model.model.layers, sharding, team), live()
                for row, pull in enumerate(rows):
                    optim.hand_over(model, row, pull.parameters)
                if c.compile:
                    model.compile_blocks()
                batches = ahead(make_batch, range(step, steps))
        settle(wait=True)
        if live() and step < steps:
            status, exit_code = "stopped", 128 + stopping[0]
            if live()[0].saved_step != step:
                save()
                settle(wait=True)
            came = signal.Signals(stopping[0]).name
            say(f"stopped by {came} at step {step}, saved: the same command resumes", live())
        elif live():
            for pull in live():
                if words := pull.judge_end():
                    say(words if len(pulls) == 1 else f"{pull.name}: {words}", [pull])
                if words or (pull.verdict and pull.may_go_back):
                    explain(pull)
                if pull.verdict and pull.may_go_back:
                    go_back(pull)
                elif pull.verdict:
                    end(pull, "diverged", 0)
            if any(pull.val is None for pull in live()):  # killed between its last checkpoint and its end
                validate()
            seeds = [pull.config["sample_seed"] for pull in rows]
            with eager():
                texts = sample_texts(model, validation, folder / "tokenizer", eos_id, seeds) if live() else []
            for pull, samples in zip(rows, texts, strict=bool(texts)):
                if pull.result:
                    continue
                table = [[step, pull.tokens, prompt, text] for prompt, text in samples]
                pull.tracker.table("samples", ["step", "tokens", "prompt", "text"], table, step=step)
                kept = checkpoint.folders(pull.folder)[-1]
                pull.tracker.artifact(f"model-{pull.name}", "model", [kept], {"step": step, **(pull.val or {})})
                end(pull, "spiked" if pull.guard.spikes or pull.recovery.retries else "ok", 0)
    except OSError as refusal:
        if refusal.errno in console.MACHINE_SAYS_NO:
            status, exit_code = "stopped", console.EXIT_USER
            kept_step = min(pull.saved_step for pull in live())
            kept_text = f"the last checkpoint is step {kept_step}" if kept_step >= 0 else "nothing was saved yet"
            progress.say(f"stopped at step {step} ({refusal.strerror}); {kept_text}")
        raise
    finally:
        writer.shutdown()
        progress.close()
        for pull in live():
            end(pull, status, exit_code)
