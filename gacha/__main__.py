"""`python -m gacha run|report`: serve a sweep offline, read its runs."""

import sys

import console

COMMANDS = {
    "run": "serve a W&B sweep definition offline: gacha run FILE.yaml",
    "report": "read runs, write report.html and report.json: gacha report SRC --out report.html",
}


def main() -> int | None:
    """Dispatch to a command; each is imported only when asked for, so that --help answers at once."""
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print("usage: python -m gacha COMMAND ...\n")
        for name, text in COMMANDS.items():
            print(f"  {name:<8} {text}")
        return 0
    if command == "run":
        from gacha import agent

        return agent.main(argv)
    if command == "report":
        from gacha import report

        return report.main(argv)
    raise console.UserError(f"unknown command {command!r}: choose {' or '.join(COMMANDS)}")


if __name__ == "__main__":
    console.door(main)
