"""Write a student's copy of the project: the six files, without what the exercises ask for.

    python course/build.py OUT            # every exercise is open
    python course/build.py OUT --from 4   # exercises 1 to 3 are solved: begin at the fourth

The cutter reads the files as they are today, so there is no second version of the code to keep up.
It stops when a function that `exercises.py` names is gone, and when a line of a solution stands
anywhere in the copy.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, read_text, run_cli
from course.exercises import EXERCISES

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
WHOLE = ["common.py", "requirements.txt", "LICENSE"]
CORE = ["data.py", "model.py", "cluster.py", "hypernet.py", "train.py", "eval.py"]
SHAPE = re.compile(r"\([\w ()*/+-]+,[^()]*\)")  # (N,) or (B, T, C/H)
TELLING = 16  # characters: a line that is shorter, such as `else:`, says nothing of a solution

README = """# ChameleonLLM: the exercises

A small GPT, LoRA, k-means and a hyper-network, in six files: data.py, model.py, cluster.py,
hypernet.py, train.py and eval.py. Some of their functions are empty: `raise
NotImplementedError("2a")` says which part of which exercise goes there. You write them.

Set up once (Python 3.11 or later):

```sh
python3 -m venv .venv && . .venv/bin/activate
pip install -r requirements-dev.txt
```

Then read the first handout in `handouts/`, write the function, and run its tests in this folder:

```sh
python -m pytest tests/test_01_attention.py
```

| exercise | handout | points | minutes | level | here |
| --- | --- | ---: | ---: | --- | --- |
{table}

The letters B, T, C, V, r, K and N are explained at the top of model.py. Where a function was cut,
its docstring is left, and comments with the shapes of the steps of one solution: yours may take
other steps. You may add functions and files. You may rename and rebuild what you like, as long as
`adapters.py`, through which the tests call your code, names it. The tests in `tests/` are a part of
those that count: your code is graded with other numbers too. Exercises 9, 11 and 12 have none
there. A bare `pytest` fails in all exercises that are open. If a test stops at another part's
number (`pytest --tb=line` shows it whole), do that part first, or ask for a copy in which it is
solved.

To hand in, pack this folder, without `.venv` and `runs`.
"""


# ------------------------------------------------------------------------------------- the cut


def parse(source, file):
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise UserError(f"{file} is not Python ({error})") from None


def find(tree, name, file):
    """The function "f" or method "Class.f" in a module's tree."""
    node = tree
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        same = [n for n in node.body if isinstance(n, kinds) and n.name == part]
        if not same:
            raise UserError(f"{file} has no {name}, which course/exercises.py names; put its new "
                            f"name there")
        node = same[-1]
    return node


def body_lines(node, lines, file):
    """First and last line, from 1, of what is taken away: all but signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body or body[0].lineno == node.lineno:
        raise UserError(f"{file}: {node.name} has no body on lines of its own that could be cut")
    first = min(n.lineno for n in (body[0], *getattr(body[0], "decorator_list", ())))
    while lines[first - 2].lstrip().startswith("#"):  # what is remarked on its first statement
        first -= 1
    return first, node.end_lineno


def gives_away(comment, node):
    """Does a comment hold code of the function? A call, an index, an attribute or a sum of it."""
    kinds = (ast.Call, ast.Subscript, ast.Attribute, ast.BinOp, ast.Compare, ast.Assign)
    squeezed = comment.replace(" ", "")
    return any(ast.unparse(n).replace(" ", "") in squeezed
               for n in ast.walk(node) if isinstance(n, kinds))


def cut(source, names, file):
    """`source` without the bodies of names (name -> label), and the lines that were taken away."""
    lines, tree = source.splitlines(), parse(source, file)
    comments = {token.start[0]: token.string
                for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    parts = [(find(tree, name, file), label) for name, label in names.items()]
    taken = []
    for node, label in sorted(parts, key=lambda part: -part[0].lineno):  # upwards: numbers hold
        first, last = body_lines(node, lines, file)
        indent = " " * (node.col_offset + 4)
        kept = [comments[n] for n in range(first, last + 1) if n in comments]
        kept = [c for c in kept if SHAPE.search(c) and not gives_away(c, node)]
        taken += lines[first - 1:last]
        lines[first - 1:last] = [indent + line
                                 for line in (*kept, f'raise NotImplementedError("{label}")')]
    return "\n".join(lines) + "\n", taken


def cut_all(first):
    """Texts of the six files, with the exercises from `first` on taken away, and what was taken."""
    texts, taken = {}, []
    for file in CORE:
        names = {name: label for e in EXERCISES if e.number >= first
                 for name, label in e.cut.get(file, {}).items()}
        texts[file], gone = cut(read_text(ROOT / file), names, file)
        taken += gone
    unknown = {file for e in EXERCISES for file in e.cut} - set(CORE)
    if unknown:
        raise UserError(f"course/exercises.py names {min(unknown)}, which is none of the six files")
    return texts, taken


# ------------------------------------------------------------------------------------ the scan


def normal(line):
    """A line without its comment and with no space that does not matter."""
    return " ".join(line.split("  #")[0].split())


def scan(texts, taken, uncut):
    """(file, line) of each solution line that stands in a copy; texts: file -> text.

    A line of a solution counts if it has TELLING characters at least, is no comment and does not
    also stand in code that was not cut, `uncut`: what everyone may read gives nothing away. It is
    found as a part of a longer line too, as in a handout's text.
    """
    free = [normal(line) for line in uncut]
    wanted = {normal(line) for line in taken}
    wanted = {w for w in wanted if len(w) >= TELLING and not w.startswith("#")
              and not any(w in line for line in free)}
    return [(file, w) for file, text in texts.items() for line in map(normal, text.splitlines())
            for w in wanted if w in line]


def uncut_lines(first):
    """What stays of the six files, told apart by place and not by what the cutter has written."""
    stays = []
    for file in CORE:
        source = read_text(ROOT / file)
        lines, tree = source.splitlines(), parse(source, file)
        for exercise in EXERCISES:
            for name in exercise.cut.get(file, {}) if exercise.number >= first else ():
                start, last = body_lines(find(tree, name, file), lines, file)
                lines[start - 1:last] = [""] * (last - start + 1)
        stays += lines
    return stays


# ------------------------------------------------------------------------------------ the copy


def handout(number):
    """Path of an exercise's handout."""
    found = sorted((COURSE / "handouts").glob(f"{number:02}-*.md"))
    if len(found) != 1:
        raise UserError(f"course/handouts has {len(found)} files {number:02}-*.md; one is needed")
    return found[0]


def copy_of(first):
    """Every file of a student's copy, file -> text, and the lines that were taken away."""
    texts, taken = cut_all(first)
    for name in WHOLE:
        texts[name] = read_text(ROOT / name)
    texts["adapters.py"] = read_text(COURSE / "adapters.py")
    pytest = [line for line in read_text(ROOT / "requirements-dev.txt").splitlines()
              if line.startswith(("-r", "pytest=="))]
    texts["requirements-dev.txt"] = "\n".join(pytest) + "\n"
    texts["pytest.ini"] = "[pytest]\npythonpath = .\n"  # whatever folder the copy lies in
    table = []
    for e in EXERCISES:
        path = handout(e.number)
        texts[f"handouts/{path.name}"] = read_text(path)
        given = "solved" if e.number < first else "open"
        table.append(f"| {e.number}. {e.title} | [{path.name}](handouts/{path.name}) | {e.points} "
                     f"| {e.minutes} | {e.level} | {given} |")
    for path in sorted((COURSE / "student_tests").glob("test_*.py")):
        texts[f"tests/{path.name}"] = read_text(path)
    texts["README.md"] = README.format(table="\n".join(table))
    return texts, taken


def build(out, first=1):
    """Write the copy into the folder `out`, which must be empty or not there."""
    out = Path(out)
    if not 1 <= first <= len(EXERCISES) + 1:
        raise UserError(f"--from {first}: there are exercises 1 to {len(EXERCISES)}; "
                        f"{len(EXERCISES) + 1} leaves all solved")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; name another")
    texts, taken = copy_of(first)
    found = scan(texts, taken, uncut_lines(first))
    if found:
        raise UserError(f"{found[0][0]} would give away a line of a solution: {found[0][1]}")
    for name, text in texts.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return texts


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def main(argv=None):
    parser = Parser(prog="build.py", description="Write a student's copy of the project.")
    parser.add_argument("out", metavar="OUT", help="a new or empty folder")
    parser.add_argument("--from", dest="first", type=int, default=1, metavar="N",
                        help="leave the exercises before N solved (default: 1)")
    args = parser.parse_args(argv)
    texts = build(args.out, args.first)
    print(f"wrote {len(texts)} files to {args.out}; no line of a solution is in them")


if __name__ == "__main__":
    run_cli(main)
