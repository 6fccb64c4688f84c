"""The one door for training: `python train.py STAGE [--flag value ...]`, the `program:` of every sweep.

    pretrain   a model from scratch on the token shards of `python -m data build`
    continue   any Hugging Face model on more such shards, with general text replayed
    sft        a base model to one that follows instructions: chat rows, all weights or LoRA
    reward     a model that scores answers, from preferences
    dpo        preferences learned directly: DPO, IPO, KTO
    grpo       reinforcement learning from rewards by rule, model or both: GRPO, RLOO
    ppo        the same with a value model: PPO
    distill    a teacher's answers, or its probabilities on the student's own, into a small model
    office     the office task end to end: SFT, DPO, GRPO and their controls from one base
    sample     look at what came out: `python train.py sample CHECKPOINT --prompt TEXT`
    chat       talk to what came out: `python train.py chat CHECKPOINT`

--dry_run checks the flags and the inputs of a training stage, prints the configuration as JSON and trains nothing.
"""

import importlib
import os
import sys

import console

TUNING = ("sft", "reward", "dpo", "grpo", "ppo", "distill")
STAGES = ("pretrain", "continue", *TUNING, "office", "sample", "chat")


def main() -> int | None:
    """Dispatch to a stage; each is imported only when asked for, so that --help answers at once."""
    stage, *argv = sys.argv[1:] or ["--help"]
    if stage in ("-h", "--help"):
        print(f"usage: python train.py {{{','.join(STAGES)}}} [--flag value ...]\n\n{__doc__}")
        return 0
    dry_run = "--dry_run" in argv
    argv = [flag for flag in argv if flag != "--dry_run"]
    if stage == "pretrain":
        from pretrain import pretrain

        return pretrain.main(argv, dry_run)
    if stage == "continue":
        from pretrain import continued

        return continued.main(argv, dry_run)
    if stage == "sample":
        from pretrain import sample

        return sample.main(argv)
    if stage == "chat":
        from posttrain import converse

        return converse.main(argv)
    if stage == "office":
        from posttrain import chain

        return chain.main(argv, dry_run)
    if stage in TUNING:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Every one is a module of the room with its own main(argv, dry_run).
        return importlib.import_module(f"posttrain.{stage}").main(argv, dry_run)
    raise console.UserError(f"unknown stage {stage!r}: choose {' or '.join(STAGES)}")


if __name__ == "__main__":
    console.door(main)
