"""The laboratory's command line.

    python -m lab.run train ...     # lab/train.py: a base, then adapters on it
    python -m lab.run eval RUN ...  # lab/eval.py: scores, tables, figures, continued prompts
"""

import importlib
import sys

from lab.files import UserError, run_cli
from lab.flags import PROGRAM, parse_eval, train_parser

USAGE = f"{PROGRAM} train ..., or {PROGRAM} eval RUN ... (each has --help)"
ANSWERS = {"train": lambda arguments: train_parser().parse_args(arguments), "eval": parse_eval}


def answer(command, arguments):
    """--help and what is mistyped are answered here, before torch is loaded."""
    if command in ("-h", "--help"):
        print(f"usage: {USAGE}")
        sys.exit()
    if command not in ANSWERS:
        raise UserError(f"{command or 'no command'!r} is neither train nor eval; usage: {USAGE}")
    ANSWERS[command](arguments)


def main():
    command, *arguments = sys.argv[1:] or [""]
    program = f"{PROGRAM} {command}" if command in ANSWERS else PROGRAM
    run_cli(lambda: answer(command, arguments), program)
    run_cli(lambda: importlib.import_module(f"lab.{command}").main(arguments), program)


if __name__ == "__main__":
    main()
