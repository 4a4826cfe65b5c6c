"""The grader: what it gives to our own solution, to none, to another's, to wrong ones, cheats."""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import cases  # noqa: E402
import cheats  # noqa: E402
import copies  # noqa: E402
import grade  # noqa: E402
import open_head  # noqa: E402
import wrong  # noqa: E402
from common import UserError  # noqa: E402
from exercises import EXERCISES  # noqa: E402
from worker import decode, encode, landlock  # noqa: E402

CUT = {e.number for e in EXERCISES if e.cut}
POINTS = {e.number: e.points for e in EXERCISES}
TEXTBOOK = Path(__file__).parent / "textbook"


@pytest.fixture(scope="module")
def worker():
    torch.set_num_threads(1)
    one = grade.Worker()
    yield one
    one.close()


def points(folder, numbers, worker, seed=5, out=None):
    """Points of each exercise, and all messages."""
    lines = []
    results = grade.grade(folder, numbers, seed, say=lines.append, worker=worker, out=out)
    messages = [m for _, found in results.values() for _, m in found]
    return {n: round(earned, 6) for n, (earned, _) in results.items()}, messages, lines


def full(numbers):
    return {n: POINTS[n] for n in numbers}


def test_our_own_solution_gets_all_points(worker, tmp_path):
    numbers = CUT | {9, 11}
    assert points(copies.own(tmp_path), numbers, worker)[:2] == (full(numbers), [])


def test_an_empty_copy_gets_none_and_hears_of_nothing_but_notimplementederror(worker, tmp_path):
    found, messages, _ = points(copies.empty(tmp_path), CUT, worker)
    assert found == dict.fromkeys(CUT, 0)
    assert messages and all("NotImplementedError" in m for m in messages)


def test_a_textbook_solution_in_another_style_gets_all_points(worker):
    assert points(TEXTBOOK, CUT, worker)[:2] == (full(CUT), [])


FEW = [m for n in POINTS for m in [m for m in wrong.MISTAKES if m.exercise == n][1:3] if n != 12]


@pytest.mark.parametrize("mistake", FEW, ids=lambda m: f"{m.exercise}: {m.name}")
def test_a_wrong_solution_loses_points(worker, mistake):
    assert wrong.lost(mistake, worker, 3)[0] > 0.4


def test_every_exercise_has_five_wrong_solutions_and_each_can_be_made(tmp_path):
    for number in POINTS:
        assert sum(m.exercise == number for m in wrong.MISTAKES) >= 5
    for mistake in wrong.MISTAKES:
        wrong.write(mistake, tmp_path)


def test_a_pattern_of_answers_is_no_leak_check(worker, tmp_path):
    """Which methods leak follows from no number of a call."""
    copies.empty(tmp_path)
    earned = []
    for rule in ("next(turn)", "True", "False"):
        (tmp_path / "leak_check.py").write_text(
            "import itertools\nturn = itertools.cycle([True, False])\n"
            f"def leaks(predict, tokens, prompt, n_words): return {rule}\n")
        earned.append(points(tmp_path, {9}, worker)[0][9])
    assert earned[1:] == [0, 0] and earned[0] <= 2  # by chance, rarely, one of ten


def test_invented_numbers_that_cannot_be_earn_little(worker, tmp_path):
    copies.empty(tmp_path)

    def entry(method, lr, loss):
        return {"method": method, "lr": lr, "loss": loss, "seed": 0}

    fair = [entry(name, lr, 3.0) for name in ("lora", "lora-match", "chameleon")
            for lr in (1, 1, 1, 2)]
    (tmp_path / "false_win.json").write_text(json.dumps({
        "false": [entry("lora", 1, 1), entry("chameleon", 1, 0)], "fair": fair,
        "text": "a " * 100}))
    assert points(tmp_path, {11}, worker)[0][11] <= 1  # the file can be read


def test_an_exercise_that_cannot_be_graded_costs_itself_alone(worker, tmp_path, monkeypatch):
    copies.empty(tmp_path)
    real = grade.grade_exercise

    def fails(exercise, *rest):
        if exercise.number == 3:
            raise MemoryError
        return real(exercise, *rest)

    monkeypatch.setattr(grade, "grade_exercise", fails)
    found, messages, _ = points(tmp_path, {1, 3, 4}, worker)
    assert set(found) == {1, 3, 4} and any("could not be graded" in m for m in messages)


@pytest.mark.parametrize("spoil", ["data", "method", "names", "long"])
def test_an_odd_zip_is_told_in_a_line(tmp_path, spoil):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.py", "x = 1\n" * 99)
        archive.writestr("x" * 300 + ".py" if spoil == "long" else "b.py", "y = 1\n" * 99)
    content = bytearray(path.read_bytes())
    if spoil == "data":
        content[38:44] = b"\xff" * 6  # of the first file: its header has 30 bytes and 8 of name
    if spoil == "method":
        content[content.index(b"PK\1\2") + 6] = 99  # the version that is needed to read it
    if spoil == "names":
        at = content.index(b"PK\1\2")
        content[at + 9] |= 8  # names are UTF-8
        content[at + 46:at + 50] = b"\xff" * 4
    path.write_bytes(content)
    (tmp_path / "code").mkdir()
    try:
        grade.unpack(path, tmp_path / "code")
    except UserError as error:
        assert "neither a folder nor a .zip" in str(error)
    else:
        assert {p.name for p in (tmp_path / "code").iterdir()} <= {
            "model.py", "b.py", "adapters.py", "common.py"}


@pytest.mark.parametrize("name", cheats.CHEATS)
def test_a_cheat_earns_nothing(worker, tmp_path, name, monkeypatch):
    if name == "reads the reference" and not landlock():
        pytest.skip("this system cannot close the reference to the user who grades")
    copies.empty(tmp_path)
    (tmp_path / "adapters.py").write_text(cheats.adapters(name, [grade.ROOT, grade.HERE]))
    monkeypatch.setattr(grade, "SECONDS", dict.fromkeys(POINTS, 2))
    numbers = {1} if name == "will not be stopped" else {1, 3}
    before = set(grade.children())
    found, messages, _ = points(tmp_path, numbers, worker)
    assert found == dict.fromkeys(numbers, 0), messages
    assert set(grade.children()) - before <= {worker.process and worker.process.pid}
    assert worker.user is None or grade.tasks_of(worker.user) == 0


@pytest.mark.parametrize("harm", [
    "    while True: pass\n", "    while True: os.fork()\n", "    return bytearray(1 << 45)\n",
    "    y = []\n    while True: y.append(torch.ones(1 << 24))\n"])
def test_harm_costs_its_own_exercise_alone(worker, tmp_path, harm, monkeypatch):
    copies.own(tmp_path)
    text = (tmp_path / "adapters.py").read_text()
    harmed = text.replace("    from model import Attention, GPTConfig\n", "    import os\n" + harm)
    (tmp_path / "adapters.py").write_text(harmed)
    monkeypatch.setattr(grade, "SECONDS", {1: 2})
    assert harmed != text
    assert points(tmp_path, {1, 4}, worker)[0] == {1: 0, 4: 5}


# -------------------------------------------------------------------------------- bad input


def test_a_zip_with_one_folder_too_many_a_missing_file_and_windows_line_ends(worker, tmp_path):
    folder = copies.own(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in folder.glob("*.py"):
            text = path.read_bytes()
            if path.name == "hypernet.py":
                continue
            if path.name == "cluster.py":
                text = text.replace(b"\n", b"\r\n")
            archive.writestr(f"homework/final/{path.name}", text)
            archive.writestr(f"__MACOSX/homework/{path.name}", b"\0")
    found, messages, lines = points(tmp_path / "x.zip", {4, 6}, worker)
    assert found == {4: 5, 6: 0} and all("hypernet" in m for m in messages)
    notes = "\n".join(line for line in lines if line.startswith("note"))
    for said in ("homework/final/", "hypernet.py is missing", "cluster.py has Windows line ends"):
        assert notes.count(said) == 1


def test_a_syntax_error_costs_what_needs_the_file(worker, tmp_path):
    copies.own(tmp_path)
    (tmp_path / "cluster.py").write_text("def f(:\n")
    found, messages, lines = points(tmp_path, {1, 4}, worker)
    assert found == {1: 10, 4: 0} and all("SyntaxError" in m for m in messages)
    assert sum("cluster.py: syntax error in line 1" in line for line in lines) == 1


def test_what_is_no_submission_is_one_line_and_status_2(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for argv in (["nowhere"], [str(tmp_path)], [str(tmp_path / "notes.txt")], [],
                 ["x", "--exercises", "77"], ["x", "--exercises", "a"]):
        with pytest.raises(UserError):
            grade.main(argv)
    ran = subprocess.run([sys.executable, grade.HERE / "grade.py", "nowhere"], capture_output=True,
                         text=True)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1


def test_an_input_that_is_changed_costs_the_case(worker, tmp_path):
    copies.own(tmp_path)
    text = (tmp_path / "adapters.py").read_text()
    line = "    from hypernet import features\n"
    (tmp_path / "adapters.py").write_text(text.replace(line, line + "    means += 1\n"))
    _, messages, _ = points(tmp_path, {6}, worker)
    assert any("changed what it was given" in m for m in messages)


# -------------------------------------------------------------------------------- what is written


def test_results_are_rewritten_after_each_exercise(worker, tmp_path, monkeypatch):
    out = tmp_path / "out"
    seen = []
    real = grade.grade_exercise

    def watched(exercise, *rest):
        if (out / "results.json").exists():
            seen.append(json.loads((out / "results.json").read_text())["score"])
        return real(exercise, *rest)

    monkeypatch.setattr(grade, "grade_exercise", watched)
    points(TEXTBOOK, {4, 5, 9}, worker, out=out)
    results = json.loads((out / "results.json").read_text())
    assert seen == [5, 10] and results["score"] == 10
    assert [t["max_score"] for t in results["tests"]] == [5, 5, 10]
    assert "leak_check.py is missing" in results["tests"][2]["output"]


def test_the_autograder_holds_what_grading_needs_and_no_more(tmp_path):
    grade.write_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = set(archive.namelist())
        assert archive.getinfo("run_autograder").external_attr >> 16 == 0o755
        assert b"\r" not in archive.read("run_autograder")
        archive.extractall(tmp_path / "source")
    assert {"setup.sh", "run_autograder", "model.py", "course/grade.py"} <= names
    assert not any("tests" in n for n in names)
    temporary = tempfile.mkdtemp(dir="/tmp")
    os.chmod(temporary, 0o755)
    ran = subprocess.run([sys.executable, "source/course/grade.py", TEXTBOOK, "--exercises", "4"],
                         cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | {"TMPDIR": temporary})
    assert ran.returncode == 0 and "4. k-means++: 5.0 of 5" in ran.stdout, ran.stdout + ran.stderr
    os.rmdir(temporary)  # nothing is left behind


def test_the_open_exercise_pays_for_a_gain_alone(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(open_head, "STEPS", 150)
    copies.own(tmp_path)
    found, messages, _ = points(tmp_path, {12}, worker, out=tmp_path / "out")
    line = json.loads((tmp_path / "out" / "leaderboard.jsonl").read_text())
    assert found[12] > 1 and line["gain"] > 0, messages


def test_what_crosses_to_the_grader_is_plain():
    for value in (torch.randn(2, 0, 3), torch.tensor(True), [1, (2.5, None)],
                  {"a": torch.arange(3)}):
        assert cases.identical(decode(json.loads(json.dumps(encode(value)))), value)
    for odd in ({"tensor": ["torch.float32", [2], [1]]}, {"tensor": ["float", [1], [1]]},
                {"tensor": ["torch.int8", [-1], []]}, {"tensor": ["torch.int8", [1], ["1"]]},
                {"class": "x"}, {"tensor": ["torch.int64", [1], [1 << 70]]}, [1]):
        with pytest.raises(ValueError, match="cannot have written"):
            decode(odd)


def test_the_same_seed_draws_the_same_and_another_does_not():
    def drawn(seed):
        return [call for case in cases.draw(6, seed, None) for call in case.calls]

    assert cases.identical(drawn(1), drawn(1)) and not cases.identical(drawn(1), drawn(2))


