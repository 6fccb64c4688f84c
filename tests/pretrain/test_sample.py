"""`train.py sample`: text that goes on from the prompt, the same for the same seed."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import console
import train

if TYPE_CHECKING:
    from tests.conftest import Pull

Sample = Callable[..., str]


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sample:
    """The door itself: sample(folder, *flags) is what it printed."""

    def ask(folder: Path, *flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", "sample", str(folder), "--max_new_tokens", "12", *flags])
        assert train.main() == 0
        return capsys.readouterr().out

    return ask


def test_a_sample_begins_with_its_prompt_and_depends_on_its_seed(llama: "Pull", sample: Sample) -> None:
    """A checkpoint, or the pull's folder for its last one; the temperature of 0 has no luck in it."""
    first = sample(llama.checkpoint, "--prompt", "件名")
    assert first.startswith("件名") and len(first) > len("件名") + 3
    assert sample(llama.folder, "--prompt", "件名") == first
    assert sample(llama.folder, "--prompt", "件名", "--seed", "1") != first
    greedy = [sample(llama.folder, "--prompt=件名", "--temperature=0", f"--seed={seed}") for seed in (0, 1)]
    assert greedy[0] == greedy[1] != first


def test_many_samples_are_one_json_object(qwen: "Pull", sample: Sample) -> None:
    """From nothing a document from its beginning; a prompt in full-width letters is read as the corpus was."""
    told = json.loads(sample(qwen.folder, "--n_samples", "3", "--json", "--prompt", "TEL:"))
    assert told["prompt"] == "TEL:" and told["checkpoint"] == str(qwen.checkpoint)
    assert len(set(told["samples"])) == 3 and all(text.startswith("TEL:") for text in told["samples"])
    assert json.loads(sample(qwen.folder, "--json"))["samples"][0]


def copied(pull: "Pull", to: Path) -> Path:
    return Path(shutil.copytree(pull.checkpoint, to / "checkpoint"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("config.json", Path.unlink),
        ("config.json", cut),
        ("tokenizer.json", Path.unlink),
        ("tokenizer.json", cut),
        ("model.safetensors", Path.unlink),
        ("model.safetensors", cut),
    ],
)
def test_a_damaged_checkpoint_is_named(
    file: str, harm: Callable[[Path], Any], llama: "Pull", sample: Sample, tmp_path: Path
) -> None:
    folder = copied(llama, tmp_path)
    harm(folder / file)
    with pytest.raises(console.UserError, match=str(folder)):
        sample(folder)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--temperature=-1"], "--temperature"),
        (["--top_p=0"], "--top_p"),
        (["--n_samples=0"], "--n_samples"),
        (["--max_new_tokens=0"], "--max_new_tokens"),
        (["--prompt", "件名" * 100], "shorten it"),
    ],
)
def test_nonsense_is_named(flags: list[str], says: str, llama: "Pull", sample: Sample) -> None:
    with pytest.raises(console.UserError, match=says):
        sample(llama.folder, *flags)


def test_a_folder_without_checkpoint_is_named(sample: Sample, tmp_path: Path) -> None:
    with pytest.raises(console.UserError, match="nowhere"):
        sample(tmp_path / "nowhere")
    with pytest.raises(console.UserError, match=r"lacks config\.json"):
        sample(tmp_path)
