"""What a user may get wrong before or during a pull: named in one line, and nothing paid for is lost."""

import json
import math
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import console
import train
from pretrain import checkpoint, pretrain

if TYPE_CHECKING:
    from tests.conftest import Pull

    Puller = Callable[..., Pull]
    Spawner = Callable[..., subprocess.Popen[str]]
    Argv = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"chekpoint_every": 3}, "--checkpoint_every"),
        ({"lr": "fast"}, "--lr"),
        ({"optimizer": "sgd"}, "--optimizer"),
        ({"lr": "nan"}, "--lr"),
        ({"lr": -1}, "--lr"),
        ({"warmup": 1.5}, "--warmup"),
        ({"d_model": 33}, "--n_heads"),
        ({"d_model": 6}, "--d_model"),
        ({"n_heads": 4, "n_kv_heads": 3}, "--n_kv_heads"),
        ({"batch_tokens": 500}, "--seq_len"),
        ({"tokens": 511}, "--tokens"),
        ({"log_every": 0}, "--log_every"),
        ({"seq_len": 8192, "batch_tokens": 8192, "tokens": 8192}, "val has"),
        ({"data": "nowhere"}, "nowhere: no manifest.json"),
        ({"beta1": 1.5}, "--beta1"),
        ({"eps": -1}, "--eps"),
        ({"seed": -1}, "--seed"),
        ({"init_seed": 10**30}, "--init_seed"),
        ({"momentum": 2}, "--momentum"),
        ({"grad_clip": -1}, "--grad_clip"),
        ({"z_loss": "nan"}, "--z_loss"),
        ({"weight_decay": -1}, "--weight_decay"),
        ({"rope_theta": 0}, "--rope_theta"),
        ({"norm_eps": -1}, "--norm_eps"),
        ({"price_per_hour": "nan"}, "--price_per_hour"),
    ],
)
def test_nonsense_is_named_before_anything_is_made(
    flags: dict[str, Any], says: str, tiny_flags: dict[str, Any], as_argv: "Argv", tmp_path: Path
) -> None:
    with pytest.raises(console.UserError) as error:
        pretrain.main(as_argv({**tiny_flags, "tokens": 512, **flags}, out=tmp_path / "runs"))
    assert says in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_one_is_named(
    place: str, tiny_flags: dict[str, Any], as_argv: "Argv", tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(console.UserError, match="--out"):
        pretrain.main(as_argv(tiny_flags, out=tmp_path / place))


@pytest.mark.parametrize("file", ["train-00000.tokens.npy", "val-00000.starts.npy", "manifest.json"])
def test_data_cut_short_is_named(
    file: str, tiny_flags: dict[str, Any], as_argv: "Argv", shards_folder: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(shards_folder, tmp_path / "data"))
    (data / file).write_bytes((data / file).read_bytes()[:-50])
    with pytest.raises(console.UserError, match=file):
        pretrain.main(as_argv(tiny_flags, out=tmp_path / "runs", data=data))
    assert not (tmp_path / "runs").exists()


def test_a_mistake_is_one_line_and_exit_code_2_in_the_shell(
    spawn: "Spawner", as_argv: "Argv", tiny_flags: dict[str, Any]
) -> None:
    child = spawn([sys.executable, "train.py", "pretrain", *as_argv(tiny_flags, batch_tokens=500)])
    printed, said = child.communicate(timeout=60)
    assert (child.returncode, printed) == (2, "")
    assert said == "error: --batch_tokens 500 must be a multiple of --seq_len 64\n"


def test_a_dry_run_prints_the_configuration_and_makes_nothing(
    tiny_flags: dict[str, Any],
    as_argv: "Argv",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Anywhere in the command, with W&B on; the seeds are numbers, the device a device; mistakes are still found."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = as_argv(tiny_flags, out=tmp_path / "runs", seed=4, data_seed=9)
    monkeypatch.setattr(sys, "argv", ["train.py", "pretrain", "--dry_run", *flags])
    assert train.main() == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["seed"], told["init_seed"], told["data_seed"], told["sample_seed"]) == (4, 4, 9, 4)
    assert told["device"] in ("cpu", "cuda") and told["lr"] == 3e-3
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["train.py", "pretrain", *flags, "--tokens=1", "--dry_run"])
    with pytest.raises(console.UserError, match="--tokens"):
        train.main()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """disk(size): a file system of that many bytes; again with a larger size, the same one grown."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size: int) -> Path:
        how = ["remount", f"size={size}"] if folder.is_mount() else [f"size={size}"]
        mount = ["mount", "-t", "tmpfs", "-o", ",".join(how), "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a small disk here")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(
    ("checkpoints", "saved"),
    [(2.6, [10, 20]), (0.03, [])],
)
def test_a_full_disk_is_one_line_and_the_same_command_resumes(
    checkpoints: float,
    saved: list[int],
    disk: Callable[[int], Path],
    llama: "Pull",
    pull: "Puller",
    as_argv: "Argv",
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A disk of so many checkpoints: what is lost are the steps since the last that it held."""
    pages = sum(math.ceil(path.stat().st_size / 4096) for path in llama.checkpoint.iterdir())
    out = disk(int(checkpoints * pages) * 4096)
    with pytest.raises(SystemExit) as stop:
        console.door(lambda: pretrain.main(as_argv(llama.flags, out=out)))
    assert stop.value.code == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and "No space left" in said and str(out) in said
    kept = checkpoint.folders(out / llama.folder.name)
    assert [checkpoint.step_of(folder) for folder in kept] == saved
    assert not list(out.glob("*/checkpoints/.*"))
    disk(64 << 20)
    again = pull(out, **llama.flags)
    for name in ("model.safetensors", "training_state.safetensors"):
        assert (again.checkpoint / name).read_bytes() == (llama.checkpoint / name).read_bytes()


def test_a_file_size_limit_is_a_full_disk_too(
    llama: "Pull", as_argv: "Argv", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ulimit -f, as on shared machines; this one can be tested without being root."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, ((llama.checkpoint / "training_state.safetensors").stat().st_size - 1, hard)
    )
    try:
        with pytest.raises(SystemExit) as stop:
            console.door(lambda: pretrain.main(as_argv(llama.flags, out=tmp_path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith("error: ")
