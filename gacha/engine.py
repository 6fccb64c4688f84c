"""Which search engine is there, and how to keep it quiet: W&B's own (package `sweeps`) or Optuna, both optional."""

import contextlib
import importlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from console import UserError

INSTALL_SWEEPS = "pip install --no-deps sweeps==0.3.0"
INSTALL_OPTUNA = "pip install -e '.[bayes]'"
OF_OPTUNA = (
    *("constant", "categorical", "int_uniform", "uniform", "q_uniform"),
    *("log_uniform_values", "q_log_uniform_values"),
)


def version(package: str) -> str:
    """Of an installed distribution, "" if there is none. (Importing `sweeps` would find our folder of definitions.)"""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def sweeps() -> Any:
    """W&B's own engine. Raises ImportError where it is not, or lacks what it needs."""
    return importlib.import_module("sweeps")


def choose(path: str, method: str, nested: bool) -> str:
    """sweeps or optuna: which serves `method`, bayes or custom. Raises UserError, naming what to install, if none."""
    if method == "bayes" and (own := version("sweeps")):
        if nested and own.startswith("0.2."):
            # It would take every nested parameter for missing, and propose as if nothing had been learned.
            raise UserError(f"{path}: method: sweeps {own} cannot search nested parameters; {INSTALL_SWEEPS}")
        return "sweeps"
    if version("optuna"):
        return "optuna"
    own = "" if method == "custom" else f"W&B's engine ({INSTALL_SWEEPS}) or "
    raise UserError(f"{path}: method: {method} needs {own}Optuna ({INSTALL_OPTUNA})")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that a library prints, warns of or logs in the block reaches the terminal or the result on stdout."""
    root, level = logging.getLogger(), logging.root.manager.disable
    held = logging.NullHandler()
    root.addHandler(held)  # or the first warning would set up a handler for good
    logging.disable(logging.CRITICAL)
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        root.removeHandler(held)
