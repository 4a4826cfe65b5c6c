"""The laboratory's command line.

    python -m lab.run train ...     # lab/train.py: a base, then adapters on it
    python -m lab.run eval RUN ...  # lab/eval.py: scores, tables, figures, continued prompts
"""

import importlib
import sys

from common import UserError, run_cli

USAGE = "python -m lab.run train ..., or python -m lab.run eval RUN ... (each has --help)"


def answer(command, arguments):
    if command in ("-h", "--help"):
        print(f"usage: {USAGE}")
    elif command not in ("train", "eval"):
        raise UserError(f"{command or 'no command'!r} is neither train nor eval; usage: {USAGE}")
    else:
        importlib.import_module(f"lab.{command}").main(arguments)


def main():
    command, *arguments = sys.argv[1:] or [""]
    # what `run_cli` begins its line with
    sys.argv[0] = "python -m lab.run" + f" {command}" * (command in ("train", "eval"))
    run_cli(lambda: answer(command, arguments))


if __name__ == "__main__":
    main()
