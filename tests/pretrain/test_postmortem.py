"""The post-mortem: what moved first and which documents were in the batch, from real pulls that are lost."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import console
from data import shards, spool
from data.loader import TokenStream
from gacha import runs
from pretrain import optim, postmortem, postmortem_batches
from pretrain.model import ModelConfig, Transformer
from pretrain.trace import Groups, Trace

if TYPE_CHECKING:
    from tests.conftest import Pull

    Puller = Callable[..., Pull]

BAD = range(40, 64)  # data steps whose batches are corrupted
FLAGS = {"tokens": 512 * 80, "checkpoint_every": 20, "val_every": 80, "lr": 3e-3}


def trace_of(checkpoint: Path) -> Trace:
    return Trace.restored(json.loads((checkpoint / "training_state.json").read_bytes())["trace"])


@pytest.fixture(scope="module")
def corrupted(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards with the windows of BAD, in the order of seed 0, overwritten by tokens drawn at random."""
    folder = tmp_path_factory.mktemp("corrupted") / "shards"
    shutil.copytree(shards_folder, folder)
    manifest = shards.load(folder)
    stream = TokenStream(folder, manifest, "train", 64)
    (entry,) = manifest["splits"]["train"]["shards"]
    tokens = np.load(folder / entry["file"])
    draw = np.random.default_rng(0)
    for step in BAD:
        for window in stream.batch_indices(step, 8, seed=0).tolist():
            tokens[window * 64 : (window + 1) * 64] = draw.integers(3, manifest["vocab_size"], 64)
    np.save(folder / entry["file"], tokens)
    return folder


@pytest.fixture(scope="module")
def lost(pull: "Puller", corrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> "Pull":
    """A pull that reads the corrupted windows and is stopped for it."""
    return pull(tmp_path_factory.mktemp("lost"), offline=True, data=corrupted, **FLAGS)


def test_the_documents_of_a_bad_batch_are_shown(lost: "Pull", corrupted: Path) -> None:
    assert lost.code == 3
    (event,) = postmortem.read(lost.folder)["events"]
    assert abs(event["onset_step"] - BAD[0]) <= 2 and event["loss_left_step"] == BAD[0]
    found = event["batches"]
    assert found["hard_step"] in BAD and "Look at its documents" in found["says"]
    assert [row["data_step"] for row in found["batches"]] == [row["step"] for row in found["batches"]]
    for row in found["batches"]:
        good, _ = row["losses"].values()
        assert (good > 7.2) == (row["step"] in BAD)  # random tokens of 1,536: at least ln(1536) = 7.3
    manifest = shards.load(corrupted)
    stream = TokenStream(corrupted, manifest, "train", 64)
    _, starts = shards.open_split(corrupted, manifest, "train")[0]
    rows = [row for group in spool.spooled(corrupted, manifest["documents"]) for row in group]
    ids = [name for split, _, name in rows if split == "train"]
    tokenizer = Tokenizer.from_file(str(corrupted / "tokenizer" / "tokenizer.json"))
    batch = stream.batch_indices(found["hard_step"], 8, seed=0).tolist()
    assert sorted(window["window"] for window in found["windows"]) == sorted(batch)
    for window in found["windows"]:
        first, last = window["window"] * 64, (window["window"] + 1) * 64
        assert tokenizer.decode(stream.slice(first, last).tolist(), skip_special_tokens=False) in window["text"]
        numbers = [document["document"] for document in window["documents"]]
        assert [document["id"] for document in window["documents"]] == [ids[number] for number in numbers]
        assert starts[numbers[0]] <= first < starts[numbers[0] + 1] and starts[numbers[-1]] <= last
        assert starts[numbers[-1] + 1] >= last


def test_wandb_has_the_table(lost: "Pull") -> None:
    (run,) = runs.read(lost.folder.parent)
    rows = runs.table(run.tables["stability/postmortem"])
    assert {row["what"] for row in rows} == {"series", "window"}
    (event,) = postmortem.read(lost.folder)["events"]
    assert [row["name"] for row in rows if row["what"] == "series"] == [m["series"] for m in event["movers"]]


def test_the_page_is_drawn_again_and_what_it_shows_is_escaped(
    lost: "Pull", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert postmortem.main([str(lost.folder), "--out", str(page)]) == 0
    assert "Look at its documents" in capsys.readouterr().out
    assert page.read_bytes() == (lost.folder / "postmortem.html").read_bytes()
    assert postmortem.main([str(lost.folder), "--out", str(page), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    evil = "</p><script>alert(1)</script>"
    record["pull"] = record["events"][0]["verdict"] = evil
    record["events"][0]["batches"]["windows"][0]["text"] = evil + "\u202e\x07"
    postmortem.draw(record, page)
    text = page.read_text(encoding="utf-8")
    assert "alert(1)" in text and "<script>alert" not in text and "\u202e" not in text and "\\u0007" in text


def test_a_healthy_pull_writes_nothing_and_says_so(llama: "Pull", tmp_path: Path) -> None:
    assert not list(llama.folder.glob("postmortem*"))
    for folder, says in ((llama.folder, "stays healthy has none"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(console.UserError) as error:
            postmortem.main([str(folder)])
        assert says in str(error.value) and str(folder) in str(error.value)
    (tmp_path / "postmortem.json").write_text("{")
    with pytest.raises(console.UserError, match="not JSON"):
        postmortem.main([str(tmp_path)])


def test_a_gradient_that_is_not_finite_names_its_group(pull: "Puller", tmp_path: Path) -> None:
    """Also in an update that is not logged: the gradients' norms are known there too."""
    made = pull(tmp_path, **{**FLAGS, "log_every": 2, "fault": "nan@40"})
    assert made.code == 3
    (event,) = postmortem.read(made.folder)["events"]
    gone = [mover for mover in event["movers"] if mover["peak"] == "inf"]
    assert {mover["series"] for mover in gone} == {"grad_norm", "grad_norm embedding"}
    assert {mover["left_step"] for mover in gone} == {40}
    assert event["rows"]["step"][-1] == 40 and event["rows"]["max_attn_logit layer 0"][-1] is None


def test_a_post_mortem_that_fails_costs_a_line(
    pull: "Puller", corrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(postmortem, "draw", full)
    made = pull(tmp_path, data=corrupted, **FLAGS)
    assert made.code == 3 and made.result["status"] == "diverged"
    assert "No space left on device" in capsys.readouterr().err


def test_the_trace_is_what_was_logged(llama: "Pull") -> None:
    """The largest logit of all layers, and norms whose squares add up."""
    (run,) = runs.read(llama.folder.parent)
    trace = trace_of(llama.checkpoint)
    rows = np.array(trace.rows)
    assert rows[:, 0].tolist() == list(range(30)) == [update[0] for update in trace.updates]
    column = {name: rows[:, 1 + i] for i, name in enumerate(trace.columns)}
    tops = [series for name, series in column.items() if name.startswith("max_attn_logit layer")]
    grads = [series for name, series in column.items() if name.startswith("grad_norm ")]
    assert len(tops) == 2 and len(grads) == 2 + 2 * 5
    np.testing.assert_allclose(np.max(tops, axis=0), run.history["stability/max_attn_logit"].value, rtol=1e-6)
    assert (tops[0] != tops[1]).all()
    norms = run.history["stability/grad_norm"].value
    np.testing.assert_allclose(np.sqrt(np.square(grads).sum(0)), norms, rtol=1e-5)
    np.testing.assert_allclose([update[2] for update in trace.updates], norms, rtol=1e-6)
    np.testing.assert_allclose([update[1] for update in trace.updates], run.history["train/loss"].value, rtol=1e-6)
    assert [update[3] for update in trace.updates] == list(range(30))


def test_the_trace_survives_a_resume_to_the_bit(llama: "Pull", pull: "Puller", tmp_path: Path) -> None:
    expected = trace_of(llama.checkpoint).state()
    copied = tmp_path / llama.folder.name
    shutil.copytree(llama.folder, copied)
    (copied / "result.json").unlink()
    shutil.rmtree(copied / "checkpoints" / llama.checkpoint.name)
    again = pull(tmp_path, **llama.flags)
    assert again.folder == copied and trace_of(again.checkpoint).state() == expected


def test_a_pull_of_several_has_the_trace_that_it_has_alone(pull: "Puller", llama: "Pull", tmp_path: Path) -> None:
    from pretrain import pretrain

    flags = {**llama.flags, "seed": "4,5", "optimizer": "muon", "tokens": 512 * 12, "val_every": 12}
    alone = pull(tmp_path / "alone", **{**flags, "seed": 5})
    pretrain.main([f"--{name}={value}" for name, value in {**flags, "out": tmp_path / "both"}.items()])
    both = tmp_path / "both" / alone.folder.name / "checkpoints" / alone.checkpoint.name
    mine, theirs = trace_of(alone.checkpoint), trace_of(both)
    assert mine.columns == theirs.columns
    np.testing.assert_allclose(np.array(theirs.rows), np.array(mine.rows), rtol=2e-3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_update_rms_of_each_group_is_how_far_it_moved(kind: Any) -> None:
    made = Transformer(ModelConfig(64, 32, 2, 2, 1, 48, 16, True, False, 1e4, 1e-6))
    made.init_weights([0])
    own = optim.own_parameters(made, 0)
    used = optim.make_optimizers(own, made.config, kind, betas=(0.9, 0.95), eps=1e-8, momentum=0.95, weight_decay=0.0)
    optim.set_learning_rate(used, 1e-2)
    groups = Groups(made, own, used)
    ids = torch.randint(0, 64, (1, 4, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in made.named_parameters()}
        made(ids, ids.roll(1, 2), 0.0)[0].backward()
        norms = optim.parameter_norms(made)
        for optimizer in used:
            optimizer.measures = True  # type: ignore[attr-defined]
            optimizer.step()
        squares = optim.step_squares(own, used)[:, None]
        rms, found = groups.measured(torch.ones(2, 1), norms, squares)
        made.zero_grad(set_to_none=True)
    moved: dict[str, list[torch.Tensor]] = {}
    for (name, p), index in zip(made.named_parameters(), groups.index.tolist(), strict=True):
        moved.setdefault(groups.names[index], []).append(((p.detach() - before[name]) / 1e-2).flatten())
    assert len(groups.names) == 3 + 2 * 5
    for name, parts in moved.items():
        expected = torch.cat(parts).square().mean().sqrt().item()
        at = groups.columns.index(f"update_rms {name}")
        assert found[at, 0].item() == pytest.approx(expected, rel=1e-2), name
    assert rms.item() == pytest.approx(optim.update_rms(used).item(), rel=1e-5)


def test_documents_of_a_window_over_several_shards(tmp_path: Path) -> None:
    """Against the documents of every single token."""
    draw = np.random.default_rng(0)
    writer = shards.Writer(tmp_path, "train", "<u2", shard_tokens=60)
    lengths = draw.integers(0, 40, 30).tolist()
    for length in lengths:
        writer.add(draw.integers(3, 100, length).tolist(), 0)
    entries = writer.close()
    assert len(entries) > 5
    manifest = {"splits": {"train": {"shards": entries}}}
    places = [(e["file"], place) for e in entries for place in range(e["documents"])]
    owner = [number for number, length in enumerate(lengths) for _ in range(length + 2)]
    for window in range(len(owner) // 16):
        expected = [(*places[n], n) for n in sorted(set(owner[window * 16 : (window + 1) * 16]))]
        assert postmortem_batches.documents(tmp_path, manifest, window, 16) == expected


def test_what_leaves_its_trend_is_found_where_it_leaves() -> None:
    """And neither noise, nor a steady rise, nor a fall, nor an outlier that was over long before."""
    draw = np.random.default_rng(0)
    steps = np.arange(0, 400, 2)
    noise = np.exp(0.05 * draw.standard_normal((len(steps), 6)))
    noise[:, 1] *= np.exp(steps / 100)  # a steady rise
    noise[150:, 2] *= 0.2  # a gradient that falls
    noise[100:102, 3] *= 30  # over
    noise[170:, 4] *= np.exp(0.3 * np.arange(30))
    noise[176:, 5] *= 0.2  # an update RMS may fall
    names = [f"grad_norm layer {i} qkv" for i in range(5)] + ["update_rms embedding"]
    found = postmortem.departures(names, steps, noise, onset=360, best=340)
    left = {mover["series"]: mover["left_step"] for mover in found}
    assert left.keys() == {names[4], names[5]}
    assert 340 <= left[names[4]] <= 346 and left[names[5]] == 352


def test_a_steady_rise_counts_where_the_loss_has_long_been_above_its_best() -> None:
    draw = np.random.default_rng(0)
    steps = np.arange(0, 400, 2)
    values = np.exp(0.05 * draw.standard_normal((len(steps), 3)))
    values[:, 1] *= np.exp(steps / 60)
    values[:, 2] *= np.exp(np.maximum(0, steps - 250) / 60)
    names = [f"max_attn_logit layer {layer}" for layer in range(3)]
    assert [m["series"] for m in postmortem.departures(names, steps, values, 360, best=350)] == []
    drifting = postmortem.departures(names, steps, values, 360, best=200)
    assert [(m["series"], m["drifts"]) for m in drifting] == [(name, True) for name in names[1:]]
    assert drifting[0]["left_step"] <= 230 and 260 <= drifting[1]["left_step"] <= 300


@pytest.mark.parametrize("best", [60, 170])
def test_noise_alone_moves_nothing(best: int) -> None:
    """500 healthy series, Student's t with 3 degrees of freedom: heavy tails."""
    draw = np.random.default_rng(1)
    values = np.exp(0.1 * draw.standard_t(3, (200, 500)))
    found = postmortem.departures([f"grad_norm {i}" for i in range(500)], np.arange(200), values, 180, best)
    assert len(found) <= 5


def test_a_pull_that_goes_back_tells_each_time(pull: "Puller", tmp_path: Path) -> None:
    """What is passed over is told by its data step, and a pull that recovers keeps what it told."""
    bad = (*range(40, 54), *range(100, 120))
    more = {"tokens": 512 * 120, "fault": "batch@40-53,batch@100-119", "on_divergence": "rewind"}
    made = pull(tmp_path, **{**FLAGS, **more})
    assert made.result["status"] == "spiked"
    first, second, *_ = postmortem.read(made.folder)["events"]
    assert (first["retry"], second["retry"]) == (0, 1)
    for event in (first, second):
        hard = event["batches"]["hard_step"]
        data_steps = dict(zip(event["updates"]["step"], event["updates"]["data_step"], strict=True))
        assert data_steps[hard] in bad
        assert {window["window"] for window in event["batches"]["windows"]} == {None}
    assert second["batches"]["hard_step"] < 100
    assert (made.folder / "postmortem.html").read_text(encoding="utf-8").count("A hard batch") >= 2


@pytest.mark.parametrize("response", ["stop", "ignore"])
def test_too_short_a_past_is_told(response: str, pull: "Puller", tmp_path: Path) -> None:
    made = pull(tmp_path, optimizer="muon", lr=1e30, warmup=0.0, tokens=512 * 20, on_divergence=response)
    (event,) = postmortem.read(made.folder)["events"]
    assert made.code == 3 and not event["judged"] and math.isfinite(event["onset_step"])
    assert "Too early to tell" in (made.folder / "postmortem.html").read_text(encoding="utf-8")
