"""Faults planted in a pull on purpose, to study what notices them and what mends them (`--fault TEXT`).

    batch@120           all sequences of the batch of data step 120 are tokens drawn uniformly
    repeat@120          all of them are one drawn n-gram, over and over
    lr*50@120-139       the learning rate times 50 in updates 120 to 139
    nan@120             one element of the gradient of update 120 is NaN
    forget_moments@120  the optimizer's state is dropped before update 120, as by a resume that does not load it
    forget_count@120    Adam's step count is 0 again before update 120, and its moments stay
    restart_data@120    from update 120 on the data comes again from data step 0: a sampler that forgot its place
Several are separated by commas; updates and data steps count from 0. A bad batch belongs to its data: a pull that
passes over the data does not meet it, and pulls of every seed meet the same tokens. All others happen once, and not
again in a pull that went back to before them.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from console import UserError
from data.loader import TokenStream
from pretrain import ranks
from pretrain.model import Transformer

if TYPE_CHECKING:
    from pretrain.pull import Pull

FORM = re.compile(r"(batch|repeat|nan|forget_moments|forget_count|restart_data|lr\*([0-9.eE+-]+))@(\d+)(?:-(\d+))?")
LASTING = ("batch", "repeat", "lr", "nan")  # that a range of steps makes sense for
NGRAM = 8  # tokens of what `repeat` repeats


class Fault(NamedTuple):
    """From step `first` to step `last`, of data for batch and repeat, else of updates."""

    kind: str
    first: int
    last: int
    factor: float = 1.0


def parse(text: str, updates: int) -> list[Fault]:
    """The faults of `--fault`, for a pull of so many updates. Raises UserError."""
    found = []
    for piece in filter(None, map(str.strip, text.split(","))):
        told = FORM.fullmatch(piece)
        if not told:
            raise UserError(
                f"--fault {piece}: is none of batch@N, repeat@N, lr*FACTOR@N, nan@N (N or FIRST-LAST), "
                "forget_moments@N, forget_count@N, restart_data@N"
            )
        kind, first = told[1].partition("*")[0], int(told[3])
        last = int(told[4] or first)
        try:
            factor = float(told[2] or 1)
        except ValueError:
            factor = math.nan
        if not 0 < factor < math.inf:
            raise UserError(f"--fault {piece}: {told[2]} is no factor of a learning rate: give a positive number")
        if last < first or (last > first and kind not in LASTING):
            raise UserError(f"--fault {piece}: {told[3]}-{told[4]} is no range that {kind} can have; give {kind}@N")
        if last >= updates:
            raise UserError(f"--fault {piece}: step {last} is beyond the budget of {updates} updates")
        found.append(Fault(kind, first, last, factor))
    return found


def bad_batch(
    faults: Sequence[Fault], data_step: int, n_sequences: int, stream: TokenStream, vocab_size: int
) -> tuple[Tensor, Tensor] | None:
    """Inputs and targets (sequences, seq_len) that stand in for the batch of a data step; None where it is sound."""
    kinds = [f.kind for f in faults if f.kind in ("batch", "repeat") and f.first <= data_step <= f.last]
    if not kinds:
        return None
    draw, width = np.random.default_rng(data_step), stream.seq_len + 1
    if kinds[0] == "batch":
        rows = draw.integers(vocab_size, size=(n_sequences, width))
    else:
        rows = np.tile(np.resize(draw.integers(vocab_size, size=NGRAM), width), (n_sequences, 1))
    targets = rows[:, 1:].copy()
    if stream.bos_id != stream.eos_id:
        targets[targets == stream.bos_id] = -1
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets)


def lr_factor(faults: Sequence[Fault], update: int, over: int) -> float:
    """What the learning rate of an update is multiplied by; faults that began before update `over` are over."""
    return math.prod(fault.factor for fault in _due(faults, "lr", update, over))


def restarted(faults: Sequence[Fault], update: int, over: int) -> int | None:
    """The update from which data comes again from its start, if one from `over` to `update` is such."""
    found = [fault.first for fault in faults if fault.kind == "restart_data" and over <= fault.first <= update]
    return max(found, default=None)


def strike(model: Transformer, pulls: Sequence["Pull"], update: int) -> None:
    """Do to the gradients and optimizers of `pulls`, one in each row of `model`, what is planted for an update."""
    for row, pull in enumerate(pulls):
        over = pull.recovery.reached
        if _due(pull.planted, "nan", update, over):
            _spoil_gradient(model, row)
        if _due(pull.planted, "forget_moments", update, over):
            for optimizer in pull.optimizers:
                optimizer.state.clear()
        if _due(pull.planted, "forget_count", update, over):
            for state in (state for optimizer in pull.optimizers for state in optimizer.state.values()):
                if "step" in state:  # Muon's momentum has no count
                    state["step"].zero_()


def _due(faults: Sequence[Fault], kind: str, update: int, over: int) -> list[Fault]:
    return [fault for fault in faults if fault.kind == kind and over <= fault.first <= update <= fault.last]


@torch.no_grad()
def _spoil_gradient(model: Transformer, row: int) -> None:
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        own = ranks.local(parameter.grad)
        if own.numel():  # fsdp may leave a rank no rows
            own[(row if model.config.pulls > 1 else 0, *[0] * (own.ndim - 1))] = math.nan
            return
