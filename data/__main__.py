"""`python -m data COMMAND`: a web crawl or any other text to token shards, and the tools around them."""

import importlib
import os
import sys

import console

COMMANDS = {
    "build": "documents to token shards: data build --source SRC --out DIR",
    "decide": "what the pipeline would do with each document, and why: data decide --source SRC",
    "annotate": "every statistic of every page, once: data annotate --source SRC --out DIR",
    "filter": "other thresholds over annotations, in seconds: data filter --annotations DIR",
    "contamination": "evaluation items found in a corpus: data contamination --corpus SRC",
    "fertility": "tokenizers compared: data fertility --tokenizers A B --source SRC",
    "extend": "a vocabulary extended for a domain: data extend --tokenizer BASE --source SRC",
    "ngram": "Kneser–Ney n-gram on a shards folder: data ngram DIR",
}


def main() -> int | None:
    """Dispatch to a command; each is imported only when asked for, so that --help answers at once."""
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print("usage: python -m data COMMAND ...\n")
        for name, text in COMMANDS.items():
            print(f"  {name:<14} {text}")
        return 0
    if command not in COMMANDS:
        raise console.UserError(f"unknown command {command!r}: choose {', '.join(COMMANDS)}")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that datatrove would draw between our lines
    # Every command is a module of this room with its own main(argv).
    return importlib.import_module(f"data.{command}").main(argv)


if __name__ == "__main__":
    console.door(main)
