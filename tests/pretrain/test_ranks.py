"""A pull on two processes: the curve of one, killed, stopped, resumed on another number, weights whole or shared out.

Two ranks start slowly, so that each of the three launches here is asked several things.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from console import UserError
from gacha import runs
from pretrain import checkpoint, ranks
from pretrain.ranks import Ranks

if TYPE_CHECKING:
    from tests.conftest import Pull

    Puller = Callable[..., Pull]
    Spawner = Callable[..., subprocess.Popen[str]]
    Argv = Callable[..., list[str]]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# Seven sequences: neither the ranks' shares nor the micro-batches are of one size.
UNEVEN: dict[str, Any] = {
    "batch_tokens": 7 * 64,
    "micro_batch_tokens": 2 * 64,
    "tokens": 7 * 64 * 20,
    "checkpoint_every": 5,
}
UNEVEN |= {"z_loss": 1e-4, "seed": 3, "val_tokens": 1100}
AS_CLOSE = 1e-5


@pytest.fixture
def launch(spawn: "Spawner", as_argv: "Argv", tiny_flags: dict[str, Any]) -> "Spawner":
    """Start a pull on two ranks, recorded offline in `out`."""

    def start(out: Path, **flags: Any) -> subprocess.Popen[str]:
        argv = as_argv({**tiny_flags, **flags, "json": True}, out=out)
        mine = {"WANDB_MODE": "offline", "WANDB_DIR": str(out), "HOME": str(out)}
        return spawn([*TORCHRUN, "train.py", "pretrain", *argv], **mine)

    return start


def curve(out: Path, metric: str = "train/loss", name: str | None = None) -> dict[int, float]:
    """A metric by step, of the one run in `out` or that of the pull `name`."""
    (run,) = (run for run in runs.read(out) if name in (None, run.name))
    series = run.history[metric]
    return dict(zip(series.step.tolist(), series.value.tolist(), strict=True))


def assert_agree(found: dict[int, float], expected: dict[int, float], since: int, until: int) -> None:
    """`found` has every step in (since, until], and is as `expected` there and wherever else it has a step."""
    assert set(range(since + 1, until + 1)) <= found.keys() <= expected.keys()
    steps = sorted(found)
    np.testing.assert_allclose([found[s] for s in steps], [expected[s] for s in steps], rtol=AS_CLOSE)


def wait_for(pattern: str, folder: Path, child: subprocess.Popen[str]) -> None:
    while not list(folder.glob(pattern)):
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.002)


def test_two_ranks_killed_go_on_as_one_with_the_same_curve(
    launch: "Spawner",
    pull: "Puller",
    descendants: Callable[[int], dict[int, str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """AdamW, by ddp, SIGKILL to all that is ours at once; then the same command without torchrun."""
    flags = {**UNEVEN, "tokens": 7 * 64 * 40}
    whole = pull(tmp_path / "whole", offline=True, **flags)
    two = tmp_path / "two"
    child = launch(two, **flags)
    wait_for("*/checkpoints/step-00000010", two, child)
    for process, name in descendants(child.pid).items():
        if not name.startswith("wandb"):
            os.kill(process, signal.SIGKILL)
    with (two / whole.folder.name / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # free once the first rank's last thread is gone
    saved = checkpoint.step_of(checkpoint.folders(two / whole.folder.name)[-1])
    assert 10 <= saved < 40
    again = pull(two, offline=True, **flags)
    assert f"from step {saved}" in capfd.readouterr().err
    assert again.code == 0 and again.folder.name == whole.folder.name
    assert_agree(curve(two), curve(tmp_path / "whole"), saved, 40)
    assert again.result["val/bpb"] == pytest.approx(whole.result["val/bpb"], rel=1e-6)


def test_fsdp_takes_over_from_one_process_and_hands_back(launch: "Spawner", pull: "Puller", tmp_path: Path) -> None:
    """Muon, Qwen3, activations computed again; two ranks from step 5 of one process, and one from their step 15."""
    more = {"optimizer": "muon", "qk_norm": True, "tie_embeddings": False, "checkpoint_activations": True}
    flags = {**UNEVEN, **more}
    one, two = tmp_path / "one", tmp_path / "two"
    early = pull(two, **{**flags, "checkpoint_every": 10})
    whole = pull(one, offline=True, **flags)
    shutil.rmtree(early.checkpoint)
    (early.folder / "result.json").unlink()

    child = launch(two, **flags, sharding="fsdp")
    printed, said = child.communicate(timeout=120)
    assert child.returncode == 0, said
    assert f"resuming {early.folder} from step 10" in said
    assert len(printed.splitlines()) == 1, "one rank prints the result"
    result = json.loads(printed)
    assert result["val/bpb"] == pytest.approx(whole.result["val/bpb"], rel=1e-6)
    for metric in ("train/loss", "stability/grad_norm", "stability/update_rms", "stability/max_attn_logit"):
        assert_agree(curve(two, metric), curve(one, metric), 10, 20)
    assert_agree(curve(two, "val/bpb"), curve(one, "val/bpb"), 19, 20)

    sharded = early.folder / "checkpoints" / "step-00000020"
    assert {path.suffix for path in (sharded / "training_state").iterdir()} == {".safetensors"}
    exported, expected = (load_file(folder / "model.safetensors") for folder in (sharded, whole.checkpoint))
    assert exported.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(exported[name], weight, rtol=1e-4, atol=1e-6)

    shutil.rmtree(sharded)
    (early.folder / "result.json").unlink()
    back = pull(two, offline=True, **flags)
    assert back.code == 0
    assert_agree(curve(two), curve(one), 15, 20)


def test_a_signal_to_one_rank_stops_all_at_one_step(
    launch: "Spawner", descendants: Callable[[int], dict[int, str]], tmp_path: Path
) -> None:
    """Two pulls together on two ranks by ddp; the second rank alone hears SIGTERM."""
    child = launch(tmp_path, **UNEVEN | {"tokens": 7 * 64 * 3000, "checkpoint_every": 3000, "pulls": 2})
    wait_for("*-s4/checkpoints/step-00000000", tmp_path, child)
    ours = (Path(f"/proc/{process}/environ") for process in descendants(child.pid))
    (second,) = (int(path.parent.name) for path in ours if b"LOCAL_RANK=1\0" in path.read_bytes())
    os.kill(second, signal.SIGTERM)
    printed, said = child.communicate(timeout=120)
    assert said.count("stopped by SIGTERM") == 1 and "exitcode  : 143" in said
    pulls = json.loads(printed)["pulls"]
    assert [one["status"] for one in pulls] == ["stopped", "stopped"]
    (tokens,) = {one["tokens"] for one in pulls}
    assert {Path(one["checkpoint"]).name for one in pulls} == {f"step-{tokens // (7 * 64):08d}"}


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_the_batch(world: int) -> None:
    """Every sequence once, in order, in as many parts on each rank, however uneven."""
    ids = torch.arange(7).expand(2, -1)[:, :, None].repeat(1, 1, 4)
    seen, numbers = [], set()
    for rank in range(world):
        team = Ranks(rank, world)
        share = ids[:, team.share(7)]
        parts = team.micro_batches(share, share + 1, 2, 7)
        numbers.add(len(parts))
        assert all(part.size(1) <= 2 for part, _ in parts)
        scored = [part[0, (targets[0] >= 0).all(1), 0] for part, targets in parts]
        seen += torch.cat(scored).tolist()
    assert seen == list(range(7)) and len(numbers) == 1


def test_what_cannot_be_shared_is_said() -> None:
    with pytest.raises(UserError, match="3 sequences are too few for 4 ranks"):
        Ranks(0, 4).share(3)
    with pytest.raises(UserError, match="--sharding fsdp: shares one model out, not 2 pulls"):
        ranks.choose("fsdp", Ranks(0, 2), 1000, 2)
