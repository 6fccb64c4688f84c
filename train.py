"""The one door for training: `python train.py STAGE [--flag value ...]`, the `program:` of every sweep.

    pretrain   a model from scratch on the token shards of `python -m data build`
    continue   any Hugging Face model on more such shards, with general text replayed
    sample     look at what came out: `python train.py sample CHECKPOINT --prompt TEXT`
    chat       talk to what came out: `python train.py chat CHECKPOINT`

--dry_run checks the flags and the inputs of a training stage, prints the configuration as JSON and trains nothing.
"""

import sys

import console

STAGES = ("pretrain", "continue", "sample", "chat")


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
    raise console.UserError(f"unknown stage {stage!r}: choose {' or '.join(STAGES)}")


if __name__ == "__main__":
    console.door(main)
