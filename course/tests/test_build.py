"""The student's copy: what is taken away, what is left, and what its tests say of our solution."""

import inspect
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from course import build
from course.exercises import EXERCISES

ALL = len(EXERCISES) + 1  # --from this leaves everything solved
CUT = [(file, name, label) for e in EXERCISES for file, names in e.cut.items()
       for name, label in names.items()]


def command(*words, cwd=None):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, text=True,
                          capture_output=True)


def visible(folder, *files):
    """The last line of pytest on a copy's visible tests, and all that it said."""
    done = command("-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *files, cwd=folder)
    return done.stdout.strip().splitlines()[-1], done.stdout


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    build.build(folder)
    return folder


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solved")
    build.build(folder, ALL)
    return folder


# ------------------------------------------------------------------------------ visible tests


def test_our_solution_passes_the_visible_tests_and_handouts_say_how_many(solved):
    done = command("-m", "pytest", "-v", "-p", "no:cacheprovider", cwd=solved)
    passed = re.findall(r"tests/test_(\d\d)_\w+\.py::\S+ PASSED", done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]
    for number in sorted(set(passed)):
        says = f"The last line says `{passed.count(number)} passed`"
        assert says in build.handout(int(number)).read_text(encoding="utf-8"), number


def test_in_the_empty_copy_nothing_passes_and_nothing_but_what_is_missing_fails(empty):
    last, said = visible(empty, "tests")
    reasons = {line.split(": ", 1)[1] for line in said.splitlines() if line.startswith("/")}
    assert re.fullmatch(r"\d+ failed in .*", last), said[-3000:]
    assert all(re.fullmatch(r"NotImplementedError: \d+[a-z]", reason) for reason in reasons)


@pytest.mark.parametrize("first", [4, 8])
def test_exercises_before_the_first_pass_in_a_copy(tmp_path, first):
    build.build(tmp_path, first)
    before = [f"tests/{path.name}" for path in sorted((tmp_path / "tests").glob("test_*.py"))
              if int(path.name[5:7]) < first]
    last, said = visible(tmp_path, *before)
    assert re.fullmatch(r"\d+ passed in .*", last), said[-3000:]


def test_there_is_a_visible_test_for_each_exercise_that_cuts_and_its_handout_names_it():
    for e in EXERCISES:
        found = sorted((build.COURSE / "student_tests").glob(f"test_{e.number:02}_*.py"))
        assert len(found) == bool(e.cut), e.number
        for path in found:
            text = build.handout(e.number).read_text(encoding="utf-8")
            assert f"python -m pytest tests/{path.name}" in text


# ---------------------------------------------------------------------------------- the cutter

CALL_ALL = """
import importlib, inspect, sys
for line in sys.stdin:
    file, name, label = line.split()
    function = importlib.import_module(file.removesuffix(".py"))
    for part in name.split("."):
        function = getattr(function, part)
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    try:
        function(*[None] * len(needed))
        print(name, "returned")
    except NotImplementedError as error:
        print(name, error)
"""


def test_every_cut_function_raises_its_label(empty):
    lines = "\n".join(" ".join(part) for part in CUT)
    done = subprocess.run([sys.executable, "-c", CALL_ALL], cwd=empty, text=True, input=lines,
                          capture_output=True)
    assert done.stdout.splitlines() == [f"{name} {label}" for _, name, label in CUT], done.stderr


def test_what_is_not_cut_stays_as_it_was(solved, empty):
    for file in build.CORE:
        ours = (build.ROOT / file).read_text(encoding="utf-8")
        assert (solved / file).read_text(encoding="utf-8") == ours
        assert set(map(build.normal, ours.splitlines())) >= {
            build.normal(line) for line in (empty / file).read_text(encoding="utf-8").splitlines()
            if "NotImplementedError" not in line}


SOURCE = '''
class Head:
    @property
    def update(self, x,
               y=2):
        """Why it is."""
        # (B, T), of which the first
        z = self.a(x)  # (B, T, C) @ (C, r) -> (B, T, r)
        q = z + y  # (B, r), from self.a(x)
        return q  # no shape here

    def other(self):
        return 1  # (B, T)
'''


def test_signature_decorator_docstring_and_shapes_are_kept():
    text, taken = build.cut(SOURCE, {"Head.update": "9z"}, "x.py")
    assert text == '''
class Head:
    @property
    def update(self, x,
               y=2):
        """Why it is."""
        # (B, T), of which the first
        # (B, T, C) @ (C, r) -> (B, T, r)
        raise NotImplementedError("9z")

    def other(self):
        return 1  # (B, T)
'''
    assert "        return q  # no shape here" in taken


@pytest.mark.parametrize("name", ["Head.gone", "Gone.update", "gone"])
def test_a_name_that_is_gone_is_told(name):
    with pytest.raises(build.UserError, match=f"x.py has no {name}"):
        build.cut(SOURCE, {name: "9z"}, "x.py")


def test_a_function_on_one_line_is_told():
    with pytest.raises(build.UserError, match="no body on lines of its own"):
        build.cut("def f(): return 1\n", {"f": "9z"}, "x.py")


def test_a_file_that_is_not_python_is_told():
    with pytest.raises(build.UserError, match="is not Python"):
        build.cut("def f(:\n", {"f": "9z"}, "x.py")


# ------------------------------------------------------------------------------------ the scan


def test_no_line_of_a_solution_is_in_any_copy():
    for first in range(1, ALL + 1):
        texts, taken = build.copy_of(first)
        assert build.scan(texts, taken, build.uncut_lines(first)) == []


def test_every_function_that_is_cut_has_lines_that_the_scan_knows():
    for e in EXERCISES:
        for file, names in e.cut.items():
            for name in names:
                source = build.read_text(build.ROOT / file)
                _, taken = build.cut(source, {name: "x"}, file)
                found = build.scan({file: source}, taken, build.uncut_lines(1))
                assert found, name


@pytest.mark.parametrize("place", ["handouts/06-statistic.md", "tests/test_06_statistic.py",
                                   "eval.py"])
@pytest.mark.parametrize("form", ["    {}", "> Write `{}` here", "\t{}  # a remark"])
def test_a_planted_line_is_found(place, form):
    texts, taken = build.copy_of(1)
    line = "return F.normalize(means - center, dim=1)"
    texts[place] += form.format(line) + "\n"
    assert build.scan(texts, taken, build.uncut_lines(1)) == [(place, line)]


def test_a_copy_that_would_give_a_line_away_is_not_written(tmp_path, monkeypatch):
    texts, taken = build.copy_of(1)
    texts["handouts/06-statistic.md"] += "    return F.normalize(means - center, dim=1)\n"
    monkeypatch.setattr(build, "copy_of", lambda first: (texts, taken))
    with pytest.raises(build.UserError, match="06-statistic"):
        build.build(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_copy_holds_only_what_it_should(empty):
    files = {path.relative_to(empty).as_posix() for path in empty.rglob("*") if path.is_file()
             and "__pycache__" not in path.parts}
    single = {name for name in files if "/" not in name}
    assert single == {*build.CORE, *build.WHOLE, "adapters.py", "README.md", "pytest.ini",
                      "requirements-dev.txt"}
    assert {name.split("/")[0] for name in files - single} == {"handouts", "tests"}


# ------------------------------------------------------------------------------ the command line


def test_the_command(tmp_path):
    done = command(build.COURSE / "build.py", tmp_path / "out", "--from", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no line of a solution" in done.stdout
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert [line.endswith("solved |") for line in readme.splitlines()
            if re.match(r"\| \d+\. ", line)] == [True] * 2 + [False] * (len(EXERCISES) - 2)


@pytest.mark.parametrize("words, says", [
    (["full"], "full exists and is not an empty folder"),
    (["file"], "file exists and is not an empty folder"),
    (["out", "--from", "0"], "--from 0: there are exercises 1 to 12"),
    (["out", "--from", "x"], "invalid int value"),
    ([], "required: OUT"),
])
def test_what_cannot_be_is_told_in_one_line(tmp_path, monkeypatch, capsys, words, says):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        build.run_cli(lambda: build.main(words))
    said = capsys.readouterr().err
    assert end.value.code == 2 and says in said and said.count("\n") == 1
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_gone_stops_the_command_with_one_line(tmp_path, monkeypatch, capsys):
    gone = [replace(e, cut={"model.py": {"Attention.gone": "1a"}}) if e.number == 1 else e
            for e in EXERCISES]
    monkeypatch.setattr(build, "EXERCISES", gone)
    with pytest.raises(SystemExit) as end:
        build.run_cli(lambda: build.main([str(tmp_path / "out")]))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert "model.py has no Attention.gone, which course/exercises.py names" in said
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("e", EXERCISES, ids=lambda e: str(e.number))
def test_a_handout_says_what_the_table_says(e):
    text = build.handout(e.number).read_text(encoding="utf-8")
    assert text.startswith(f"# Exercise {e.number}: {e.title}\n")
    assert f"\n{e.points} points, {e.level}, about {e.minutes} minutes on a laptop.\n" in text
    wanted = ["Why", "Task", "Not allowed", "What to hand in", "Check it", "Hints", "AI tools",
              "Changelog"]
    assert re.findall(r"^## (.+)$", text, re.M) == wanted
    assert text.count("<details>") == text.count("</details>") >= 3
    for label in {label for names in e.cut.values() for label in names.values()}:
        assert label in text
    for name in [name for names in e.cut.values() for name in names]:
        assert f"`{name}" in text


def test_the_lecturers_page_has_the_table():
    page = (build.COURSE / "README.md").read_text(encoding="utf-8")
    rows = [f"| {e.number}. {e.title} | {e.level} | {e.points} | {e.minutes} |" for e in EXERCISES]
    rows.append(f"| together | | {sum(e.points for e in EXERCISES)} "
                f"| {sum(e.minutes for e in EXERCISES)} |")
    assert "\n".join(rows) in page


def test_adapters_have_one_door_for_each_part():
    import course.adapters as adapters

    said = " ".join(f.__doc__ or "" for _, f in inspect.getmembers(adapters, inspect.isfunction))
    for _, _, label in CUT:
        assert f"{label}. " in said
