"""`python -m pretrain.coordcheck`: does what a few updates do to the activations depend on the model's size?

The coordinate check of Yang et al. 2022 (Tensor Programs V, appendix D.1): train the same recipe at several widths (or
depths) for some steps and look at how far each activation has moved, as RMS over its coordinates, on one fixed batch.
Under μP the change is the same at every width, under SP it grows. A slope is in octaves per doubling: 0 flat, 1 in
proportion to the size.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import console
import tracking
import webpage
from data import shards
from data.loader import TokenStream
from pretrain import optim
from pretrain.device import make_deterministic
from pretrain.model import ModelConfig, Transformer

PROBE_SEQUENCES = 8  # of the validation split: the batch that activations are compared on
PARAMETRIZATIONS: tuple[Literal["sp", "mup"], ...] = ("sp", "mup")
COLOURS = ["crashed", "recipe1", "recipe2", "recipe3", "recipe4", "ok", "stopped", "spiked"]


@dataclass(frozen=True)
class CoordCheckConfig:
    data: str
    """folder of token shards, made by `python -m data build`"""
    widths: str = "64,128,256,512"
    """d_model of the models, the first one the base of μP"""
    depths: str = ""
    """n_layers of the models, the first one the base; then depth is what grows, at the first of widths"""
    n_layers: int = 2
    """blocks where the widths grow"""
    head_dim: int = 16
    """units of a head; a wider model has more heads"""
    qk_norm: bool = False
    """RMSNorm on queries and keys"""
    tie_embeddings: bool = True
    """the output head is the embedding"""
    seq_len: int = 64
    """tokens of a sequence"""
    batch_tokens: int = 1024
    """tokens of one update"""
    steps: int = 10
    """updates, at a constant learning rate"""
    seeds: int = 3
    """models of each size, trained together: 0, 1, ..."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices by Muon, the rest by AdamW"""
    lr: float = 4e-3
    """learning rate at the base size; too low a one moves nothing, too high a one saturates"""
    weight_decay: float = 0.1
    """decoupled, on matrices only"""
    out: str = "coordcheck.html"
    """the page to write"""
    json: bool = False
    """print the result as one JSON object"""


def main(argv: list[str]) -> int:
    """Train every size under both parametrizations, and write the page."""
    c = console.parse(CoordCheckConfig, argv, "python -m pretrain.coordcheck")
    axis = "depth" if c.depths else "width"
    widths, depths = whole_numbers(c.widths, "widths"), whole_numbers(c.depths or str(c.n_layers), "depths")
    check(c, widths)
    sizes = [(widths[0], depth) for depth in depths] if c.depths else [(width, depths[0]) for width in widths]
    if len(sizes) < 2:
        raise console.UserError(f"--{axis}s {c.depths or c.widths}: a slope needs two sizes")
    manifest = shards.load(Path(c.data))
    recipe = tracking.recipe_hash(
        {**dataclasses.asdict(c), "data": manifest["fingerprint"]}, leave_out=frozenset({"out", "json"})
    )
    tracker = tracking.start(
        "coordcheck",
        dataclasses.asdict(c),
        name=f"coordcheck-{recipe}",
        recipe=recipe,
        tags=[f"data:{manifest['fingerprint']}"],
        x_axis=None,
        lineage={"shards": manifest["fingerprint"]},
    )
    status = "crashed"
    try:
        moved: dict[str, list[dict[str, np.ndarray]]] = {}
        for parametrization in PARAMETRIZATIONS:
            moved[parametrization] = []
            for width, depth in sizes:
                print(f"{parametrization}: d_model {width}, {depth} layers", file=sys.stderr, flush=True)
                moved[parametrization].append(measure(c, manifest, parametrization, width, depth, sizes[0]))
        result = summarise(axis, [size[axis == "depth"] for size in sizes], moved)
        page = webpage.build("Coordinate check · llm-gacha", *draw(c, result))
        console.write_atomic(Path(c.out), page.encode())
        columns: list[str | int] = ["parametrization", "activation", "of", "slope", "lo", "hi"]
        tracker.table("slopes", columns, [[row[column] for column in columns] for row in result["slopes"]], step=0)
        status = "ok"
    finally:
        tracker.summary({"status": status})
        tracker.finish(0 if status == "ok" else 1)
    if c.json:
        console.print_result({**result, "page": c.out}, as_json=True)
        return 0
    print(f"octaves of change after {c.steps} updates per doubling of {axis}, with 95% intervals over {c.seeds} seeds")
    for name in result["activations"]:
        sp, mup = (spoken(slope_of(result, parametrization, name, "change")) for parametrization in PARAMETRIZATIONS)
        print(f"{name:<13}  sp {sp:<24}  mup {mup}")
    print(f"page           {c.out}")
    return 0


def whole_numbers(text: str, flag: str) -> list[int]:
    """`64,128` as numbers. Raises UserError."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise console.UserError(f"--{flag} {text}: give different whole numbers, as 64,128,256")
    return numbers


def check(c: CoordCheckConfig, widths: list[int]) -> None:
    """Raises UserError naming the flag that does not fit."""
    for name in ("head_dim", "seq_len", "steps", "batch_tokens"):
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    if c.seeds < 2:
        raise console.UserError(f"--seeds {c.seeds}: an interval needs at least 2")
    if c.head_dim % 2 or any(width % c.head_dim for width in widths):
        raise console.UserError(f"--head_dim {c.head_dim}: must be even and divide every width of --widths {c.widths}")
    if c.batch_tokens % c.seq_len:
        raise console.UserError(f"--batch_tokens {c.batch_tokens} must be a multiple of --seq_len {c.seq_len}")
    if not 0 < c.lr < math.inf:
        raise console.UserError(f"--lr {c.lr}: must be positive")


def measure(
    c: CoordCheckConfig,
    manifest: dict[str, Any],
    parametrization: Literal["sp", "mup"],
    width: int,
    depth: int,
    base: tuple[int, int],
) -> dict[str, np.ndarray]:
    """RMS of each activation's change since step 0, and of the activation: (2, steps, seeds), a model per seed."""
    make_deterministic("cpu", 0)
    folder = Path(c.data)
    config = ModelConfig(
        vocab_size=manifest["vocab_size"],
        d_model=width,
        n_layers=depth,
        n_heads=width // c.head_dim,
        n_kv_heads=width // c.head_dim,
        d_ff=3 * width,  # SwiGLU's usual 8/3 would be rounded, to another ratio at every width
        seq_len=c.seq_len,
        qk_norm=c.qk_norm,
        tie_embeddings=c.tie_embeddings,
        rope_theta=1e4,
        norm_eps=1e-6,
        pulls=c.seeds,
        parametrization=parametrization,
        base_width=base[0],
        base_depth=base[1],
        base_head_dim=c.head_dim,
    )
    model = Transformer(config)
    model.init_weights(list(range(c.seeds)))
    pulls = []
    for row in range(c.seeds):
        own = optim.own_parameters(model, row)
        told = {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.95, "weight_decay": c.weight_decay}
        pulls.append((own, optim.make_optimizers(own, config, c.optimizer, **told)))  # type: ignore[arg-type]
    train = TokenStream(folder, manifest, "train", c.seq_len)
    validation = TokenStream(folder, manifest, "val", c.seq_len)
    probe, _ = validation.windows(np.arange(min(PROBE_SEQUENCES, validation.n_windows)))
    probe = probe.expand(c.seeds, -1, -1)
    first, changes = activations(model, probe), []
    for step in range(c.steps):
        batches = [train.batch(step, c.batch_tokens // c.seq_len, seed) for seed in range(c.seeds)]
        ids, targets = (torch.stack(part) for part in zip(*batches, strict=True))
        model(ids, targets, 0.0)[0].backward()
        for row, (own, optimizers) in enumerate(pulls):
            optim.hand_over(model, row, own)
            optim.set_learning_rate(optimizers, c.lr)
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad(set_to_none=True)
        now = activations(model, probe)
        changes.append({name: torch.stack((rms(now[name] - first[name]), rms(now[name]))) for name in first})
    return {name: torch.stack([change[name] for change in changes], dim=1).numpy() for name in first}


def rms(x: Tensor) -> Tensor:
    """Over all but the first dimension, the pulls."""
    return x.flatten(1).square().mean(1).sqrt()


@torch.no_grad()
def activations(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    """What `ids` (pulls, batch, length) makes of the model's activations, by the names of the page."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    places = [("embedding", model.model.embed_tokens)]
    for number, layer in enumerate(model.model.layers):
        places += [(f"attention {number}", layer.self_attn), (f"mlp {number}", layer.mlp)]  # type: ignore[list-item]
        places += [(f"residual {number}", layer)]  # type: ignore[list-item]
    hooks = [module.register_forward_hook(keep(name)) for name, module in places]
    seen["logits"] = model.lm_head(model.model(ids)[0])
    for hook in hooks:
        hook.remove()
    return {name: seen[name] for name in [name for name, _ in places] + ["logits"]}


def summarise(axis: str, sizes: list[int], moved: dict[str, list[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """After the last update: the change and the size by seed, and their slopes with Student's interval over seeds.

    Depths differ in their blocks: there the residual stream behind the last one is compared.
    """
    rows: list[dict[str, Any]] = []
    for parametrization, found in moved.items():
        for name in found[0]:
            if axis == "depth" and name not in ("embedding", "logits", "residual 0"):
                continue
            ends = [one[name if axis == "width" or " " not in name else last_residual(one)][:, -1] for one in found]
            for kind, values in zip(("change", "size"), np.stack(ends, axis=1), strict=True):
                by_seed = np.polyfit(np.log2(sizes), np.log2(values), 1)[0]
                half = stats.t.ppf(0.975, len(by_seed) - 1) * by_seed.std(ddof=1) / math.sqrt(len(by_seed))
                mean = float(by_seed.mean())
                rows.append(
                    {
                        "parametrization": parametrization,
                        "activation": "last residual" if axis == "depth" and " " in name else name,
                        "of": kind,
                        "slope": round(mean, 4),
                        "lo": round(mean - half, 4),
                        "hi": round(mean + half, 4),
                        "rms": values.round(6).tolist(),
                    }
                )
    names = list(dict.fromkeys(row["activation"] for row in rows))
    return {"axis": axis, "sizes": sizes, "activations": names, "slopes": rows}


def last_residual(activations: dict[str, np.ndarray]) -> str:
    return [name for name in activations if name.startswith("residual")][-1]


def slope_of(result: dict[str, Any], parametrization: str, activation: str, kind: str) -> dict[str, Any]:
    """The row of `summarise`'s slopes."""
    wanted = (parametrization, activation, kind)
    rows: list[dict[str, Any]] = result["slopes"]
    return next(row for row in rows if (row["parametrization"], row["activation"], row["of"]) == wanted)


def spoken(row: dict[str, Any]) -> str:
    return f"{row['slope']:+.2f} ({row['lo']:+.2f} to {row['hi']:+.2f})"


def draw(c: CoordCheckConfig, result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The page's body and figures, given `summarise`'s numbers."""
    drawn: dict[str, Any] = {name: figure(name, result) for name in PARAMETRIZATIONS}
    changes = [row for row in result["slopes"] if row["of"] == "change"]
    worst = {
        name: max((row for row in changes if row["parametrization"] == name), key=lambda row: abs(row["slope"]))
        for name in PARAMETRIZATIONS
    }
    kinds = [(name, kind) for kind in ("change", "size") for name in PARAMETRIZATIONS]
    heads = ["Activation", *(f"#{'SP' if name == 'sp' else 'μP'} {kind}" for name, kind in kinds)]
    rows = []
    for activation in result["activations"]:
        slopes = [slope_of(result, name, activation, kind) for name, kind in kinds]
        rows.append([webpage.words(activation), *(webpage.number(row["slope"], spoken(row)) for row in slopes)])
    caption = "RMS of the change on one validation batch; a line per activation, a dot per seed. Logarithmic axes."
    places = "".join(
        webpage.figure(name, drawn, title, caption) for name, title in (("sp", "SP"), ("mup", "μP")) if name in drawn
    )
    axis = result["axis"]
    body = f"""<section class="hero"><p class="kicker">{escape(c.data)} · {escape(c.optimizer)}, lr {c.lr:g},
{c.steps} updates, {c.seeds} seeds</p>
<h1>Coordinate check</h1>
<p class="lead">How far {c.steps} updates move each activation, from {axis} {result["sizes"][0]} to
{result["sizes"][-1]}. The steepest line under SP is {escape(worst["sp"]["activation"])}:
{worst["sp"]["slope"]:+.2f} octaves per doubling; under μP {escape(worst["mup"]["activation"])}:
{worst["mup"]["slope"]:+.2f}.</p></section>
<section><div class="pair">{places}</div></section>
<section><h2>Slopes</h2>{webpage.table("Slopes", heads, rows)}
<p class="caption">log2 of the RMS after the last update over log2 of the {axis}: 0 is flat, 1 in proportion. In
brackets Student's 95% interval over seeds. The size of the logits may fall under μP: at initialisation they are noise
that is averaged over the width.</p></section>"""
    return body, drawn


def figure(parametrization: str, result: dict[str, Any]) -> dict[str, Any]:
    """Change over size, one line (mean over seeds) per activation; both figures on the same axes."""
    import plotly.graph_objects as go

    changes = [row for row in result["slopes"] if row["of"] == "change"]
    every = [value for row in changes for seeds in row["rms"] for value in seeds]
    drawn = webpage.blank(380, result["axis"], "RMS of the change")
    sizes = result["sizes"]
    for number, row in enumerate(row for row in changes if row["parametrization"] == parametrization):
        colour, name = webpage.C[COLOURS[number % len(COLOURS)]], webpage.literal(row["activation"])
        dash = ("solid", "dash", "dot")[number // len(COLOURS) % 3]
        values = np.array(row["rms"])
        line = {"color": colour, "width": 2, "dash": dash}
        mean = np.exp2(np.log2(values).mean(1)).tolist()
        drawn.add_trace(go.Scatter(x=sizes, y=mean, name=name, mode="lines", line=line, showlegend=True))
        dots = {"x": np.repeat(sizes, values.shape[1]).tolist(), "y": values.ravel().tolist(), "name": name}
        drawn.add_trace(go.Scatter(**dots, mode="markers", marker={"color": colour, "size": 5, "opacity": 0.6}))
    drawn.update_xaxes(type="log", tickvals=sizes, ticktext=[str(size) for size in sizes])
    drawn.update_yaxes(type="log", dtick=1, range=[math.log10(min(every)) - 0.1, math.log10(max(every)) + 0.1])
    drawn.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2})
    plain: dict[str, Any] = json.loads(drawn.to_json())
    return plain


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
