"""README's commands run, its tables are those of results/, its links lead somewhere."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import eval as evaluation
import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "results"


def commands():
    """Every call of train.py and eval.py in README's code, as lists of arguments."""
    code = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S) + re.findall(r"`(.*?)`", README))
    calls = re.findall(r"python (train|eval)\.py ?([^&`\n]*)", code)
    return sorted({(name, arguments.strip()) for name, arguments in calls})


@pytest.mark.parametrize("name, arguments", commands())
def test_the_commands_run(name, arguments, finished_run, corpus, tmp_path):
    given = shlex.split(arguments)
    if name == "train":  # the same flags, on less text and for fewer steps
        train.main([*given, "--dataset", str(corpus), "--base-dataset", str(corpus), "--size",
                    "tiny", "--vocab-size", "300", "--block-size", "24", "--max-steps", "2",
                    "--base-epochs", "0.1", "--evaluations", "1", "--out", str(tmp_path / "r")])
    else:
        (tmp_path / "p.txt").write_text("the river\nand a stone\n")
        given = [str(finished_run) if a.startswith("runs/") else a for a in given]
        evaluation.main([str(tmp_path / "p.txt") if a == "FILE" else a for a in given])


def test_every_flag_that_readme_names_is_there():
    known = {flag for parser in (train.make_parser(), evaluation.make_parser())
             for action in parser._actions for flag in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+(?![\w-])", README)) <= known


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_links_to_lines_lead_to_what_they_name():
    found = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(found) > 10
    for name, file, number in found:
        line = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        last = name.split(".")[-1]
        assert re.match(rf"\s*(def|class) {last}\b", line), (name, line)


def rows_of(text):
    """Cells of each table row in markdown, by the first cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {row[0]: row[1:] for row in cells if not row[0].startswith("---")}


@pytest.mark.parametrize("folder", ["python", "python-pico"])
def test_the_tables_are_those_of_results(folder):
    entries = json.loads((RESULTS / folder / "results.json").read_text())["entries"]
    kept = (RESULTS / folder / "results.md").read_text(encoding="utf-8")
    assert kept.startswith(evaluation.make_table(entries))
    table = README.split("<!-- " + folder + " -->")[1].split("\n\n")[0]
    shown, whole = rows_of(table), rows_of(kept)
    assert len(shown) > 5
    for name, (parameters, validation, test) in shown.items():
        if name != "method":
            assert [parameters, validation, test] == [whole[name][i] for i in (1, 3, 4)]


def test_python_is_as_pyproject_says():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"Python {wanted.removeprefix('>=')} or later" in README


def test_readme_is_short():
    assert len(README.split()) <= 2000
    tables = re.findall(r"(?:^\|.*\n)+", README, re.M)
    assert len(tables) <= 3 and all(t.count("\n") <= 12 for t in tables)
