"""The laboratory's command line.

    python -m lab.run train ...     # lab/train.py: a base, then adapters on it
    python -m lab.run eval RUN ...  # lab/eval.py: scores, tables, figures, continued prompts
    python -m lab.run fair BASE ... # lab/fair.py: heads on a base that knows other text
    python -m lab.run when RUN ...  # lab/when.py: when it pays to adapt to the company
    python -m lab.run ask RUN ...   # lab/ask.py: continue prompts through a head of `fair`
"""

import importlib
import sys

from common import UserError, run_cli

USAGE = ("python -m lab.run train ..., eval RUN ..., fair BASE ..., when RUN, ask RUN BASE FILE "
         "(each has --help)")

COMMANDS = ("train", "eval", "fair", "when", "ask")


def answer(command, arguments):
    if command in ("-h", "--help"):
        print(f"usage: {USAGE}")
    elif command not in COMMANDS:
        raise UserError(f"{command or 'no command'!r} is none of {', '.join(COMMANDS)}; "
                        f"usage: {USAGE}")
    else:
        importlib.import_module(f"lab.{command}").main(arguments)


def main():
    command, *arguments = sys.argv[1:] or [""]
    # what `run_cli` begins its line with
    sys.argv[0] = "python -m lab.run" + f" {command}" * (command in COMMANDS)
    run_cli(lambda: answer(command, arguments))


if __name__ == "__main__":
    main()
