"""The doors: their exit codes, flags in every spelling, mistakes in one line, --help without heavy imports."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

import console
import train

Spawner = Callable[..., subprocess.Popen[str]]


@dataclass(frozen=True)
class Config:
    learning_rate: float
    """a float"""
    name: str = "x"
    """text"""
    steps: int | None = None
    """an int, or nothing"""
    kind: Literal["a", "b"] = "a"
    """a choice"""
    qk_norm: bool = False
    """a switch"""
    tie: bool = True
    """a switch that is on"""


def leave(main: Callable[[], int | None]) -> Any:
    with pytest.raises(SystemExit) as stop:
        console.door(main)
    return stop.value.code


def fail(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3), (143, 143)])
def test_what_main_returns_is_the_exit_code(returned: int | None, code: int) -> None:
    assert leave(lambda: returned) == code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (console.UserError("f.yaml:\n  no  such key"), 2, "error: f.yaml: no such key\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 2, "error: No space left on device: out/x\n"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "error: Permission denied: out\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(fail(error)) == code
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("bug", [ZeroDivisionError(), OSError(errno.EIO, "Input/output error"), KeyError("x")])
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    """Python then exits with 1."""
    with pytest.raises(type(bug)):
        console.door(fail(bug))


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_leaves_early_is_no_error(buffered: bool, spawn: Spawner) -> None:
    """`... --help | head -1`, whether Python writes at once or at its end."""
    child = spawn([sys.executable, "train.py", "--help"], PYTHONUNBUFFERED="" if buffered else "1")
    assert child.stdout and child.stderr
    child.stdout.close()
    said = child.stderr.read()
    assert (child.wait(timeout=30), said) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full_is_one_line(spawn: Spawner) -> None:
    child = spawn(["sh", "-c", f"{sys.executable} train.py --help >/dev/full"])
    said = child.communicate(timeout=30)[1]
    assert child.returncode == 2 and said.startswith("error: No space left on device") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--qk_norm"], True),
        (["--qk_norm=true"], True),
        (["--qk_norm=True"], True),
        (["--qk_norm", "true"], True),
        (["--qk-norm"], True),
        (["--qk_norm", "--name", "y"], True),
        (["--qk_norm=false"], False),
        (["--qk_norm", "False"], False),
        ([], False),
    ],
)
def test_a_switch_has_many_spellings(argv: list[str], expected: bool) -> None:
    """People write --flag, YAML true, W&B's agent --flag=True."""
    assert console.parse(Config, ["--learning_rate", "1e-3", *argv], "x").qk_norm is expected
    assert console.parse(Config, [*argv, "--learning_rate=.001"], "x").learning_rate == 1e-3


def test_flags_take_their_values_as_they_are() -> None:
    config = console.parse(
        Config, ["--learning-rate=3e-4", "--name", "true", "--steps", "7", "--kind=b", "--tie=false"], "x"
    )
    assert config == Config(3e-4, "true", 7, "b", False, False)
    assert console.parse(Config, ["--learning_rate=1", "--name=件名=1"], "x").name == "件名=1"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--learning_rat", "1e-3"], "--learning_rate"),
        (["--learning_rate", "1e-3", "--stpes=3"], "did you mean --steps?"),
        (["--learning_rate", "1e-3", "--qknorm", "true"], "did you mean --qk_norm?"),
        (["--learning_rate", "fast"], "fast"),
        (["--learning_rate", "1", "--kind", "c"], "--kind"),
        (["--learning_rate", "1", "--qk_norm=maybe"], "qk_norm"),
        ([], "--learning_rate"),
        (["--learning_rate", "1", "more"], "more"),
    ],
)
def test_a_bad_flag_is_named_in_one_line(argv: list[str], says: str) -> None:
    with pytest.raises(console.UserError) as error:
        console.parse(Config, argv, "train.py x")
    assert says in str(error.value) and "(see train.py x --help)" in str(error.value)
    assert not set("\n│╭╰─") & set(str(error.value))


def test_results_are_for_people_or_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"name": "件名", "val/bpb": 0.71, "tokens": 1234567}
    console.print_result(result, as_json=True)
    line = capsys.readouterr().out
    assert json.loads(line) == result and line.count("\n") == 1 and "件名" in line
    console.print_result(result, as_json=False)
    assert capsys.readouterr().out == "name     件名\nval/bpb  0.71\ntokens   1,234,567\n"


def test_an_atomic_write_replaces_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    console.write_atomic(path, b"old")
    console.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        console.write_atomic(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"new"


ASKED = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
    run(sys.argv[0], run_name="__main__")
finally:
    heavy = {"torch", "transformers", "wandb", "datasets", "sentencepiece", "plotly", "pyarrow", "scipy"}
    print(sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(("door", "names"), [("train.py", "pretrain"), ("gacha", "report"), ("data", "build")])
def test_help_answers_without_heavy_imports(door: str, names: str, spawn: Spawner) -> None:
    child = spawn([sys.executable, "-c", ASKED, door])
    printed, said = child.communicate(timeout=30)
    assert (child.returncode, said) == (0, "")
    assert names in printed and printed.splitlines()[-1] == "[]"


def test_an_unknown_stage_names_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "pretrian", "--lr", "1"])
    with pytest.raises(console.UserError, match=r"'pretrian'.*pretrain"):
        train.main()


def test_sigterm_within_a_finalizer_is_told_again_without_a_traceback() -> None:
    """Python cannot raise there, and would complain on stderr of what it dropped."""
    code = (
        "import os, signal, time, console\n"
        "class Closes:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.01)\n"
        "with console.terminable():\n"
        "    Closes()\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (143, "")
