"""TRL's names for what its trainers log, as the names under which this project logs them to W&B."""

from collections.abc import Mapping

TRL_NAMES = {
    "loss": "train/loss",
    "eval_loss": "val/loss",
    "learning_rate": "train/lr",
    "grad_norm": "stability/grad_norm",
    "mean_token_accuracy": "train/token_accuracy",
    "kl": "policy/kl",
    "entropy": "policy/entropy",
    "completions/mean_length": "policy/length",
    "completions/clipped_ratio": "policy/clipped",
    "accuracy": "train/accuracy",
    "margin": "train/margin",
    "min_reward": "reward/min",
    "mean_reward": "reward/mean",
    "max_reward": "reward/max",
    "reward": "reward/mean",
    "reward_std": "reward/std",
    "frac_reward_zero_std": "reward/zero_std",
    "rewards/margins": "dpo/margin",
    "rewards/accuracies": "dpo/accuracy",
    "logps/chosen": "dpo/logp_chosen",
    "logps/rejected": "dpo/logp_rejected",
}


def translate(logs: Mapping[str, float], stage: str = "") -> dict[str, float]:
    """The numbers of one of TRL's logs under our names; `rewards/<name>/mean` becomes `reward/<name>`, others stay.

    KTO's `kl` is left out: it is nats per sequence of a mismatched pair, not nats per token of the policy.
    """
    row: dict[str, float] = {}
    for name, value in logs.items():
        if isinstance(value, (int, float)) and not (stage == "kto" and name == "kl"):
            parts = name.split("/")
            if len(parts) == 3 and parts[0] == "rewards" and parts[2] == "mean":
                name = f"reward/{parts[1]}"
            row[TRL_NAMES.get(name, name)] = float(value)
    return row
