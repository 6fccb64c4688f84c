"""`python -m data build|ngram`: text to token shards, and the n-gram to beat."""

import sys

import console

COMMANDS = {
    "build": "documents to token shards: data build --source SRC --out DIR",
    "ngram": "Kneser–Ney n-gram on a shards folder: data ngram DIR",
}


def main() -> int | None:
    """Dispatch to a command; each is imported only when asked for, so that --help answers at once."""
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print("usage: python -m data COMMAND ...\n")
        for name, text in COMMANDS.items():
            print(f"  {name:<8} {text}")
        return 0
    if command == "build":
        from data import build

        return build.main(argv)
    if command == "ngram":
        from data import ngram

        return ngram.main(argv)
    raise console.UserError(f"unknown command {command!r}: choose {' or '.join(COMMANDS)}")


if __name__ == "__main__":
    console.door(main)
