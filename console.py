"""What every door shares: the command line, one-line errors and their exit codes, atomic writes."""

import contextlib
import dataclasses
import difflib
import errno
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

AGAIN = 2.0  # seconds
EXIT_USER, EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 3, 130, 143
# What the machine refuses through no fault of the code: said in one line, like any other mistake to mend.
MACHINE_SAYS_NO = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM, errno.EMFILE}

# Set where an exit hook of a library is known to hang or to complain about what was already said: `door` skips them.
skip_exit_hooks = False

T = TypeVar("T")


class UserError(Exception):
    """Something the user can mend: one line that names the file, key or record and says what to do."""


def parse(config_class: type[T], argv: Sequence[str], prog: str) -> T:
    """`argv` as an instance of `config_class` (a dataclass, read by tyro). Raises UserError on a bad flag."""
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(
                config_class,
                prog=prog,
                args=spell_booleans(config_class, argv),
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    raise UserError(f"{unbox(boxed.getvalue(), names)} (see {prog} --help)")


def spell_booleans(config_class: type, argv: Sequence[str]) -> list[str]:
    """`--flag`, `--flag true` and `--flag=True` all become `--flag=True`: people, YAML and W&B differ."""
    names = {field.name for field in dataclasses.fields(config_class) if field.type in (bool, "bool")}
    spelled, rest = [], list(argv)
    while rest:
        flag, given, value = rest.pop(0).partition("=")
        if flag.removeprefix("--").replace("-", "_") not in names or not flag.startswith("--"):
            spelled.append(flag + given + value)
            continue
        if not given:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "True"
        spelled.append(f"{flag}={value.capitalize()}")
    return spelled


def unbox(text: str, names: Sequence[str]) -> str:
    """tyro's drawn error box as one line: the message, and of `names` those that an unknown flag may have meant."""
    rows = [row.strip("│╭╰╮╯ \n") for row in text.splitlines()]
    rows = [row for row in rows if row]
    rules = [i for i, row in enumerate(rows) if set(row) <= {"─"}]
    message = " ".join(rows[1 : rules[0]] if rules else rows[1:])
    unknown = re.search(r"Unrecognized options: --([\w-]+)", message)
    meant = difflib.get_close_matches(unknown.group(1).replace("-", "_"), names, n=2) if unknown else []
    return message + (f"; did you mean {' or '.join(f'--{name}' for name in meant)}?" if meant else "")


def door(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave with the house's exit codes: a user's mistake is one line, never a traceback."""
    try:
        code = main()
        sys.stdout.flush()
    except UserError as mistake:
        # Of the ranks that torchrun starts on a machine one speaks: they all make the same mistake.
        code = say_error(str(mistake)) if os.environ.get("LOCAL_RANK", "0") == "0" else EXIT_USER
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # `... | head` closed our stdout: nothing is wrong.
        discard_stdout()
        code = 0
    except OSError as refusal:
        if refusal.errno not in MACHINE_SAYS_NO:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            discard_stdout()
        code = say_error(f"{refusal.strerror}: {refusal.filename2 or refusal.filename or 'the output folder'}")
    if skip_exit_hooks:
        os._exit(code or 0)
    sys.exit(code or 0)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block with exit code 143, also where the signal reached its child processes first.

    Told again after AGAIN seconds: what the handler raises is lost where Python cannot raise, as in a callback or a
    `__del__`, and is not complained of there.
    """
    told = False

    def handle(*_: Any) -> None:
        nonlocal told
        told = True
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
        sys.exit(EXIT_TERMINATED)

    complain = sys.unraisablehook

    def complain_of_others(unraisable: Any) -> None:
        if not (told and isinstance(unraisable.exc_value, SystemExit)):
            complain(unraisable)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGALRM, handle)
    sys.unraisablehook = complain_of_others
    try:
        yield
    except UserError:
        raise
    except Exception:
        time.sleep(0.2)
        if not told:
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = complain
    if told:
        sys.exit(EXIT_TERMINATED)


def discard_stdout() -> None:
    """Send what stdout still holds to nowhere: it has failed once, and flushing it again at exit would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_error(line: str) -> int:
    """`line` on stderr, whitespace folded so that it stays one line; returns the user's exit code."""
    print("error: " + " ".join(line.split()), file=sys.stderr, flush=True)
    return EXIT_USER


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """The result on stdout: one JSON object, or aligned `key  value` lines for a person."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    width = max((len(key) for key in result), default=0)
    for key, value in result.items():
        print(f"{key:<{width}}  {value:,}" if isinstance(value, int) else f"{key:<{width}}  {value}")


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, also after a power cut."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
