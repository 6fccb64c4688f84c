"""`python -m gacha COMMAND`: serve a sweep offline, read its runs, say what they mean."""

import importlib
import sys

import console

COMMANDS = {
    # name: (module with a main(argv), what it does)
    "run": ("agent", "serve a W&B sweep definition offline: gacha run FILE.yaml"),
    "report": ("report", "read runs, write report.html and report.json: gacha report SRC --out report.html"),
    "odds": ("finals", "statistics of repeated pulls: gacha odds FINALS.csv --group COL --value COL"),
    "serve": ("dashboard", "a live dashboard of offline runs on this machine (trackio): gacha serve SRC"),
    "workspace": ("workspace", "W&B's view of a project, as code (online): gacha workspace ENTITY/PROJECT"),
}


def main() -> int | None:
    """Dispatch to a command; each is imported only when asked for, so that --help answers at once."""
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print("usage: python -m gacha COMMAND ...\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<10} {text}")
        return 0
    if command not in COMMANDS:
        raise console.UserError(f"unknown command {command!r}: choose {', '.join(COMMANDS)}")
    return importlib.import_module(f"gacha.{COMMANDS[command][0]}").main(argv)


if __name__ == "__main__":
    console.door(main)
