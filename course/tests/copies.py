"""Makes submissions to grade: our own solution, and an empty copy of it."""

import ast
import shutil
from pathlib import Path

import grade
from exercises import EXERCISES

SOLVED = Path(__file__).parent / "solved"


def own(folder):
    """The repository's six files, and what students write on their own."""
    folder = Path(folder)
    for file in grade.SIX:
        shutil.copy(grade.ROOT / file, folder)
    shutil.copy(grade.HERE / "adapters.py", folder)
    for path in SOLVED.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


def empty(folder):
    """The same without the solutions: each body that an exercise takes away raises."""
    folder = Path(folder)
    for file in grade.SIX:
        names = {n: label for e in EXERCISES for n, label in e.cut.get(file, {}).items()}
        (folder / file).write_text(emptied((grade.ROOT / file).read_text(), names))
    shutil.copy(grade.HERE / "adapters.py", folder)
    return folder


def emptied(source, names):
    tree = ast.parse(source)
    for owner in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
        for node in owner.body:
            name = getattr(node, "name", "")
            label = names.get(name if owner is tree else f"{owner.name}.{name}")
            if label:
                error = ast.parse(f"raise NotImplementedError({label!r})").body
                node.body = error
    return ast.unparse(tree)
