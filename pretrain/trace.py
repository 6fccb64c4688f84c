"""What a pull remembers of its last updates, for the post-mortem of one that diverges (postmortem.py).

Of every update its loss, gradient norm and batch; of those that are logged also the largest attention logit of each
layer, and the gradient norm and update RMS of each parameter group. Bounded, and saved with the checkpoint.
"""

import base64
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.model import Transformer
from pretrain.ranks import ALONE, Ranks

UPDATES, ROWS = 512, 256  # updates and logged rows that are kept
LOGIT, GRADIENT, UPDATE = "max_attn_logit", "grad_norm", "update_rms"


def group_of(name: str) -> str:
    """The group of a parameter: `embedding`, `head`, `final norm`, or `layer 3 qkv` (o, gate_up, down, norms)."""
    parts = name.split(".")
    if "layers" not in parts:
        return {"embed_tokens": "embedding", "lm_head": "head", "norm": "final norm"}[parts[-2]]
    kind = parts[-2].removesuffix("_proj") if parts[-2].endswith("_proj") else "norms"
    return f"layer {parts[parts.index('layers') + 1]} {kind}"


class Groups:
    """The parameter groups of a model, and the sums over each that are logged.

    `parameters` and `optimizers` are those of any one of its pulls; AdamW is the last of these.
    """

    def __init__(
        self, model: Transformer, parameters: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]
    ) -> None:
        groups = [group_of(name) for name in parameters]
        self.names = list(dict.fromkeys(groups))
        index = torch.tensor([self.names.index(group) for group in groups])
        sizes = torch.tensor([float(p.numel() // model.config.pulls) for p in model.parameters()])
        of_adamw = {id(p) for group in optimizers[-1].param_groups for p in group["params"]}
        mine = {group_of(name) for name, p in parameters.items() if id(p) in of_adamw}
        device = model.lm_head.weight.device
        self.index = index.to(device)
        self.sizes = torch.zeros(len(self.names)).index_add_(0, index, sizes).to(device)
        self.adamw = torch.tensor([i for i, name in enumerate(self.names) if name in mine], device=device)
        layers = [f"{LOGIT} layer {layer}" for layer in range(model.config.n_layers)]
        self.columns = [*layers, *(f"{measure} {name}" for measure in (GRADIENT, UPDATE) for name in self.names)]

    def measured(
        self, tops: Tensor, grad_norms: Tensor, step_squares: Tensor, sharers: Ranks = ALONE
    ) -> tuple[Tensor, Tensor]:
        """Update RMS over AdamW's parameters (pulls,), and all `columns` (columns, pulls), inf where not finite.

        `tops` (layers, pulls); of each parameter its gradient's norm and the sum of squares of its step in units of the
        learning rate, both (parameters, pulls), over the rows that this one of the `sharers` has.
        """
        each = torch.stack((grad_norms.square(), step_squares))
        grads, steps = sharers.sum_(each.new_zeros(2, len(self.names), each.size(2)).index_add_(1, self.index, each))
        rms = (steps[self.adamw].sum(0) / self.sizes[self.adamw].sum()).sqrt()
        return rms, known(torch.cat((tops, grads.sqrt(), (steps / self.sizes[:, None]).sqrt())))

    def gradients(self, grad_norms: Tensor, sharers: Ranks = ALONE) -> Tensor:
        """`columns` (columns, pulls) of an update that is not logged: gradient norms, NaN for what was not measured."""
        squares = grad_norms.new_zeros(len(self.names), grad_norms.size(1))
        squares = sharers.sum_(squares.index_add_(0, self.index, grad_norms.square()))
        found = squares.new_full((len(self.columns), squares.size(1)), math.nan)
        first = len(self.columns) - 2 * len(self.names)
        found[first : first + len(self.names)] = known(squares.sqrt())
        return found


def known(values: Tensor) -> Tensor:
    """NaN as inf: in a trace NaN stands for what was not measured."""
    return values.nan_to_num(nan=math.inf, posinf=math.inf)


@dataclass
class Trace:
    """The last updates of one pull."""

    columns: list[str] = field(default_factory=list)
    updates: deque[tuple[int, float, float, int]] = field(default_factory=lambda: deque(maxlen=UPDATES))
    """step (0-based), loss, gradient norm, data step"""
    rows: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=ROWS))
    """step (0-based; exact up to 2^24), then a number for each of `columns`: inf if not finite, NaN if not measured"""

    def update(self, step: int, loss: float, grad_norm: float, data_step: int) -> None:
        """One update, logged or not."""
        self.updates.append((step, loss, grad_norm, data_step))

    def log(self, step: int, values: Sequence[float]) -> None:
        """A number for each of `columns`."""
        self.rows.append(np.array((step, *values), np.float32))

    def state(self) -> dict[str, str | list[str]]:
        """For the checkpoint: exact, in JSON, which knows no inf."""
        return {
            "columns": self.columns,
            "updates": packed(np.array(self.updates, np.float64)),
            "rows": packed(np.array(self.rows, np.float32)),
        }

    @classmethod
    def restored(cls, state: dict[str, str | list[str]]) -> "Trace":
        """The trace whose `state` this is."""
        trace = cls(list(state["columns"]))
        for step, loss, grad_norm, data_step in unpacked(state["updates"], np.float64, 4).tolist():
            trace.update(int(step), loss, grad_norm, int(data_step))
        trace.rows.extend(unpacked(state["rows"], np.float32, 1 + len(trace.columns)))
        return trace


def packed(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


def unpacked(text: str | list[str], dtype: type, width: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(str(text)), dtype).reshape(-1, width)
