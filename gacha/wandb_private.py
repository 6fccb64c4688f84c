"""What the sweep agent takes from inside wandb: its own expansion of the command and its own parameter file.

Semi-private, therefore in one place and pinned with wandb 0.31: a copy of our own would drift from the real agent.
"""

import os
from pathlib import Path
from typing import Any


def sweep_argv(command: list[Any] | None, program: str, params: dict[str, Any], json_path: Path) -> list[str]:
    """The argv of one run, as wandb_agent.Agent._command_run builds it; `command` None is W&B's default.

    Writes `json_path` if the command asks for ${args_json_file}. An unknown macro is dropped, as the real agent does.
    """
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    # A copy: create_sweep_command fills ${envvar:...} in place.
    template = create_sweep_command(list(command) if command else None)
    macros = create_sweep_command_args({"args": wrapped(params)})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [program]}
    macros |= {"args_json_file": [str(json_path)]}
    if "${args_json_file}" in template:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(macros["args_json"][0], encoding="utf-8")
    argv: list[str] = []
    for chunk in map(str, template):
        is_macro = chunk.startswith("${") and chunk.endswith("}")
        argv += macros.get(chunk[2:-1], []) if is_macro else [chunk]
    return argv


def save_sweep_params(path: Path, params: dict[str, Any]) -> None:
    """Write the file that WANDB_SWEEP_PARAM_PATH names, from which `wandb.init` fills and locks run.config."""
    from wandb.sdk.lib.config_util import save_config_file_from_dict

    save_config_file_from_dict(os.fspath(path), wrapped(params))


def wrapped(params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`params` as W&B sends them to agents: every top-level value under the key `value`."""
    return {name: {"value": value} for name, value in params.items()}
