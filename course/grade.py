"""Grade a submission: points for each exercise, and for each lost case what is likely wrong.

    python course/grade.py SUBMISSION                     # a folder, or a .zip
    python course/grade.py SUBMISSION --exercises 1,2 --seed 3
    python course/grade.py SUBMISSION --out DIR           # also DIR/results.json, for Gradescope
    python course/grade.py --table                        # what wrong solutions lose (wrong.py)
    python course/grade.py --zip autograder.zip           # the same, for Gradescope to run

Inputs are drawn anew each time. The submission's functions run in a process of their own, one an
exercise, that is given inputs and nothing else; right values are computed here, and compared here.

What keeps a submission from reading them: on Linux 5.13 or later it gives up all files but
Python's and its own (Landlock), before a line of it is run. Where the grader runs as root, as on
Gradescope, it also runs as another user, to whom the reference is closed. Where neither is so, it
can open whatever you can, and the grader says so: then read what you grade, or use a container.
What runs can always lie about itself: of exercise 12's head read how many numbers it really trains,
and the points of exercises 11 and 12 are for a person to confirm.
"""

import argparse
import ast
import ctypes
import io
import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import redirect_stdout, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [p for p in (str(ROOT), str(HERE)) if p not in sys.path]

import torch  # noqa: E402

import cases  # noqa: E402
from common import UserError, printable, run_cli, write_json  # noqa: E402
from exercises import EXERCISES  # noqa: E402
from worker import decode, encode, landlock  # noqa: E402

SIX = ["model.py", "cluster.py", "hypernet.py", "data.py", "train.py", "eval.py"]
EXTRA = {9: "leak_check.py", 11: "false_win.json", 12: "my_head.py"}
SECONDS = {9: 90, 12: 90}  # of an exercise; the others get 40
MEMORY = 3 << 30  # of address space, beside what torch itself takes
LARGEST = 1 << 24  # bytes of answers that are read
RESTARTS = 4  # of a process that died, for the calls that it had not reached


# -------------------------------------------------------------------------------- the submission


def unpack(submission, folder):
    """Copy the files of a submission that count to `folder`; what is odd about them, a line each.

    From a folder or .zip, whose files may lie within one more folder. Links are not followed.
    """
    submission = Path(submission)
    if submission.is_dir():
        found = {p.relative_to(submission).as_posix(): p for p in sorted(submission.rglob("*"))
                 if p.is_file() and not p.is_symlink() and p.stat().st_size < 1 << 20}
        read = {name: p.read_bytes for name, p in list(found.items())[:2000]}
    elif submission.is_file():
        try:
            archive = zipfile.ZipFile(io.BytesIO(submission.read_bytes()))
        except Exception:  # a stranger's file: whatever is wrong with it
            raise UserError(f"{submission} is neither a folder nor a .zip") from None
        entries = [e for e in archive.infolist()[:2000] if e.file_size < 1 << 20 and not e.is_dir()]
        read = {e.filename.replace("\\", "/"): (lambda e=e: archive.read(e)) for e in entries}
    else:
        raise UserError(f"{submission} does not exist")
    wanted = {*SIX, *EXTRA.values(), "adapters.py"}
    places = {}  # a folder within the submission -> how many wanted files lie there
    for name in read:
        place, _, file = name.rpartition("/")
        if not place.startswith("__MACOSX"):
            places[place] = places.get(place, 0) + (file in wanted)
    place = max(places, key=lambda p: (places[p], -p.count("/")), default="")
    if not places.get(place):
        raise UserError(f"{submission} holds none of {', '.join(sorted(wanted))}")
    notes = [f"the files lie in {place}/: graded from there"] if place else []
    kept, room = {}, 1 << 22  # bytes
    for name in sorted(read, key=lambda name: name.rpartition("/")[2] not in wanted):
        file = name.rpartition("/")[2]
        known = re.fullmatch(r"[\w.-]{1,100}\.(py|json)", file)
        if known and name == f"{place}/{file}".removeprefix("/") and room > 0:
            try:
                kept[file] = read[name]()
                room -= len(kept[file])
            except Exception as error:
                notes.append(f"{name} cannot be read ({error})")
    for file in [*SIX, "adapters.py"]:
        if file not in kept:
            notes.append(f"{file} is missing" + "; ours is taken" * (file == "adapters.py"))
    kept.setdefault("adapters.py", (HERE / "adapters.py").read_bytes())
    kept.setdefault("common.py", (ROOT / "common.py").read_bytes())  # plumbing, of no exercise
    for file, content in kept.items():
        (folder / file).write_bytes(content)
        if b"\r\n" in content and file.endswith(".py"):
            notes.append(f"{file} has Windows line ends, which do no harm")
        if file in wanted and (problem := syntax_problem(file, content)):
            notes.append(f"{file}: {problem}")
    return notes


def syntax_problem(file, content):
    if not file.endswith(".py"):
        return None
    try:
        ast.parse(content)
    except SyntaxError as error:
        return f"syntax error in line {error.lineno}, {error.msg}: nothing that needs it can be run"
    except (ValueError, RecursionError, MemoryError) as error:
        return f"cannot be parsed ({type(error).__name__}: {str(error)[:80]})"
    return None


# -------------------------------------------------------------------------------- the worker


class Worker:
    """The process that forks a child for each exercise, and what is left of those children."""

    def __init__(self):
        place = Path(tempfile.gettempdir()).resolve()
        reached = all(p.stat().st_mode & 1 for p in (place, *place.parents))  # by another user
        self.home = Path(tempfile.mkdtemp(prefix="grade-", dir=place if reached else "/tmp"))
        self.home.chmod(0o711)
        shutil.copy(HERE / "worker.py", self.home)
        # Nobody else has this number, so its processes can be counted and ended.
        self.user = 200_000 + os.getpid() % 100_000 if os.geteuid() == 0 else None
        self.library = ""
        if self.user and not open_to_all(Path(os.__file__).parent):  # as under /root: take a copy
            self.library = str(self.home / "library")
            shutil.copytree(Path(os.__file__).parent, self.library, ignore=shutil.ignore_patterns(
                "test", "tests", "idlelib", "site-packages", "ensurepip", "config-*", "lib2to3",
                "tkinter", "turtledemo", "pydoc_data", "*.opt-?.pyc"))
        if self.user and not open_to_all(Path(torch.__file__).parent):
            self.user = None
            print("note: torch lies in a private folder, so submissions run as the user root")
        self.process, self.heard = None, b""
        self.before = frozenset(children())  # none of a submission's
        if not landlock() and (self.user is None or open_to_all(ROOT)):
            print("note: a submission can read the reference here; see the top of grade.py")
        if sys.platform == "linux":  # orphans of a submission become ours, to be ended
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER

    def start(self):
        keep = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "LD_LIBRARY_PATH")}
        if self.library:
            keep["PYTHONPATH"] = f"{self.library}:{self.library}/lib-dynload"
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-B", str(self.home / "worker.py")], cwd=self.home,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env=keep | {"OMP_NUM_THREADS": "1", "USER": "student"})
        self.heard = b""

    def end(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(OSError):  # what was still to be written has no reader
                    pipe.close()
        self.process = None

    def close(self):
        self.end()
        remove(self.home)

    def line(self, until):
        """The next line of the worker, or None where it is late, or gone."""
        while b"\n" not in self.heard:
            wait = max(0.0, until - time.monotonic())
            ready = select.select([self.process.stdout], [], [], wait)[0]
            read = os.read(self.process.stdout.fileno(), 1 << 12) if ready else b""
            if not read:
                return None
            self.heard += read
        line, _, self.heard = self.heard.partition(b"\n")
        return line.decode()

    def calls(self, code, requests, seconds, predict):
        """Make calls (function, arguments) on the submission in the folder `code`.

        A list of ("value", value, inputs afterwards), ("error", name, text) or ("lost", why).
        predict(call, tokens) answers exercise 9.
        """
        folder = Path(tempfile.mkdtemp(prefix="exercise-", dir=self.home))
        folder.chmod(0o711)  # the submission's is `code` in it alone
        shutil.copytree(code, folder / "code")
        for pipe in ("ask", "tell"):
            os.mkfifo(folder / pipe)
        (folder / "answers.jsonl").touch()
        if self.user:
            for path in [folder / "code", *(folder / "code").rglob("*")]:
                os.chown(path, self.user, self.user)
        until = time.monotonic() + seconds
        results, lost = {}, {}
        for _ in range(RESTARTS + 1):
            left = [[i, name, encode(arguments)] for i, (name, arguments) in enumerate(requests)
                    if i not in results and i not in lost]
            if not left:
                break
            (folder / "request.json").write_text(json.dumps({"calls": left}), encoding="utf-8")
            (folder / "answers.jsonl").write_bytes(b"")
            ended = self.child(folder, until, predict)
            results = read_answers(folder, len(requests)) | results
            if ended is None:  # late: there is no time for the others either
                why = f"not finished within {seconds} seconds (an endless loop?)"
                lost |= {i: why for i, _, _ in left if i not in results}
            else:
                for first in [i for i, _, _ in left if i not in results][:1]:
                    lost[first] = ended
        remove(folder)
        never = "not run: the process had died too often"
        return [results.get(i, ("lost", lost.get(i, never))) for i in range(len(requests))]

    def child(self, folder, until, predict):
        """Have one child make the calls in `folder`; how it died, None where it is late."""
        if self.process is None or self.process.poll() is not None:
            self.end()
            self.start()
        user = self.user or os.geteuid()
        limits = {"seconds": max(1, round(until - time.monotonic())), "memory": MEMORY,
                  "user": self.user, "processes": tasks_of(user) + 40}
        ask = os.open(folder / "ask", os.O_RDWR | os.O_NONBLOCK)
        tell = os.open(folder / "tell", os.O_RDWR | os.O_NONBLOCK)
        pid, status, asked = None, None, b""
        try:
            self.process.stdin.write(json.dumps([str(folder), limits]).encode() + b"\n")
            self.process.stdin.flush()
            pid = int(self.line(time.monotonic() + 60))
            while time.monotonic() < until and status is None:
                wait = max(0.0, until - time.monotonic())
                heard = b"\n" in self.heard  # it may have come with the line before
                ready = [] if heard else select.select([self.process.stdout, ask], [], [], wait)[0]
                if ask in ready:
                    asked = answer_asked(asked + os.read(ask, 1 << 16), tell, predict)
                if heard or self.process.stdout in ready:
                    status = self.line(time.monotonic() + 5) or "9"
        except (TypeError, ValueError, OSError):  # the worker itself is gone
            status = "9"
        finally:
            os.close(ask)
            os.close(tell)
            if pid and status is None:  # it may not lead a group of its own yet
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.sweep(pid)
        if status is None:
            if self.line(time.monotonic() + 5) is None:  # its end was not told: begin anew
                self.end()
            return None
        return ("the process was ended from within (os._exit?)" if int(status) < 256 and
                not int(status) & 127 else "the process died (out of memory, or killed?)")

    def sweep(self, pid):
        """End all that a child has left: its group, its user's processes, our new children."""
        known = {self.process.pid, *self.before}
        for _ in range(50):
            found = set()
            if pid:
                try:
                    os.killpg(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    text = (entry / "stat").read_text()
                    owner = entry.stat().st_uid
                except OSError:
                    continue
                state, parent = text.rpartition(")")[2].split()[:2]
                mine = int(parent) == os.getpid() and int(entry.name) not in known
                if mine and state == "Z":
                    os.waitpid(int(entry.name), os.WNOHANG)
                elif state != "Z" and (mine or (self.user and owner == self.user)):
                    found.add(int(entry.name))
            for other in found:
                try:
                    os.kill(other, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if not found:
                return
            time.sleep(0.02)


def remove(folder):
    """Take a folder away, however deep a stranger has made it."""
    subprocess.run(["rm", "-rf", str(folder)], check=False, stderr=subprocess.DEVNULL)


def open_to_all(path):
    """May every user read what is in this folder?"""
    return all(p.stat().st_mode & 0o005 == 0o005 for p in (path, *path.parents))


def children():
    """Processes that are children of this one."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
                yield int(entry.name)
        except OSError:
            pass


def tasks_of(user):
    """How many processes and threads a user has: the limit on them counts all."""
    count = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.stat().st_uid == user:
                count += len(os.listdir(entry / "task"))
        except OSError:
            pass
    return count


def answer_asked(asked, tell, predict):
    """Answer each whole line of what a child has asked; the rest is returned."""
    *lines, rest = asked.split(b"\n")
    for line in lines:
        try:
            question = json.loads(line)
            answer = {"losses": encode(predict(question["call"], decode(question["tokens"])))}
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            answer = {"error": "predict takes tokens of the shape and kind that were given"}
        try:
            os.write(tell, json.dumps(answer).encode() + b"\n")
        except OSError:
            pass  # nobody reads what was asked for
    return rest if len(rest) < 1 << 22 else b""


def read_answers(folder, n):
    """call -> what a child has written of it. The file is a stranger's."""
    path, answers = folder / "answers.jsonl", {}
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            lines = file.read(LARGEST).split(b"\n") if regular else []
    except OSError:
        return {}
    for line in lines:
        try:
            answer = json.loads(line)
            number = answer["call"]
            if type(number) is not int or not 0 <= number < n or number in answers:
                continue
            if "error" in answer:
                name, text = answer["error"]
                answers[number] = ("error", str(name)[:60], str(text)[:300])
            else:
                answers[number] = ("value", decode(answer["value"]), decode(answer["inputs"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return answers


# -------------------------------------------------------------------------------- grading


def grade_exercise(exercise, worker, code, seed, records):
    """Points (earned, possible) and a message a lost case, each with its points."""
    extra = EXTRA.get(exercise.number)
    if extra and not (code / extra).exists():
        return 0.0, [(exercise.points, f"{extra} is missing")]
    with redirect_stdout(io.StringIO()):  # what our own files say
        drawn = cases.draw(exercise.number, seed, code)
    requests = [call for case in drawn for call in case.calls]
    methods = {}
    for number, (name, arguments) in enumerate(requests):
        if name == "leak_check":  # the method stays here
            methods[number], requests[number] = arguments[0], (name, arguments[1:])

    def predict(number, tokens):
        return methods[number](tokens)

    seconds = SECONDS.get(exercise.number, 40)
    results = worker.calls(code, requests, seconds, predict) if requests else []
    total, earned, messages, at = sum(case.weight for case in drawn), 0.0, [], 0
    for case in drawn:
        part = results[at:at + len(case.calls)]
        sent = requests[at:at + len(case.calls)]
        at += len(case.calls)
        share, message = judge(case, part, sent)
        records |= case.record
        worth = exercise.points * case.weight / total
        earned += worth * share
        if share < 1:
            messages.append((worth * (1 - share), f"{case.name}: {message}"))
    return earned, messages


def judge(case, results, sent):
    """The share of a case's points that was earned, and what is wrong."""
    values = []
    for i, (result, (name, arguments)) in enumerate(zip(results, sent, strict=True)):
        kind, *rest = result
        refused = case.raises and i < len(results) - 1
        if kind == "error" and refused and rest[0] == case.raises:
            values.append(None)
        elif kind == "error":
            still = ": that part is open" * (rest[0] == "NotImplementedError")
            return 0.0, f"{name} raised {rest[0]}: {printable(rest[1])}{still}"
        elif kind == "lost":
            return 0.0, f"{name} gave no answer: {rest[0]}"
        elif refused:
            return 0.0, f"{name} should raise {case.raises}"
        elif not cases.identical(rest[1], decode(encode(arguments))):
            return 0.0, f"{name} changed what it was given; work on a copy"
        else:
            values.append(rest[0])
    try:
        found = case.check(values)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError,
            OverflowError) as error:
        return 0.0, f"an answer of an odd kind ({type(error).__name__}: {printable(error)[:100]})"
    share, message = found if isinstance(found, tuple) else (0.0 if found else 1.0, found or "")
    return share, printable(message)


def grade(submission, numbers, seed, say=print, out=None, worker=None):
    """Grade; returns {exercise: (earned, messages)}. Results are rewritten after each exercise."""
    own, results = worker, {}
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder)
        notes = unpack(submission, code)
        notes = [printable(note).replace("\n", "\\n") for note in notes]
        for note in notes:
            say(f"note: {note}")
        own = own or Worker()
        try:
            for exercise in EXERCISES:
                if exercise.number not in numbers:
                    continue
                records = {}  # for the leaderboard
                try:
                    results[exercise.number] = grade_exercise(exercise, own, code, seed, records)
                except Exception as error:  # it costs this exercise alone
                    results[exercise.number] = 0.0, [
                        (exercise.points, f"could not be graded ({type(error).__name__})")]
                earned, messages = results[exercise.number]
                say(f"{exercise.number:2d}. {exercise.title}: {earned:.1f} of {exercise.points}")
                for points, message in messages:
                    say(f"      -{points:.1f}  {message}")
                if out and exercise.number == 12 and records:
                    with open(Path(out) / "leaderboard.jsonl", "a", encoding="utf-8") as file:
                        line = {"when": time.strftime("%Y-%m-%d %H:%M"),
                                "submission": Path(submission).name, **records}
                        file.write(json.dumps(line) + "\n")
                if out:
                    write_json(Path(out) / "results.json", gradescope(results, notes, numbers))
        finally:
            if worker is None:
                own.close()
    return results


def gradescope(results, notes, numbers):
    tests = []
    for exercise in EXERCISES:
        if exercise.number in numbers:
            earned, messages = results.get(exercise.number, (0.0, [(0, "not graded yet")]))
            tests.append({"name": f"{exercise.number}. {exercise.title}", "score": round(earned, 2),
                          "max_score": exercise.points, "output": "\n".join(
                              f"-{p:.1f}  {m}" for p, m in messages) or "all right"})
    return {"score": round(sum(t["score"] for t in tests), 2), "tests": tests,
            "output": "\n".join(notes), "visibility": "visible"}


# -------------------------------------------------------------------------------- Gradescope's zip

SETUP = """#!/usr/bin/env bash
# Gradescope runs this once, as root, when the autograder is built.
set -e
apt-get update
for version in 3.13 3.12 3.11; do  # the newest that this system has
    apt-get install -y python$version-venv && break
done
python$version -m venv /opt/venv
/opt/venv/bin/pip install --no-cache-dir -r /autograder/source/requirements.txt \\
    --extra-index-url https://download.pytorch.org/whl/cpu
"""
RUN = """#!/usr/bin/env bash
# Gradescope runs this for each submission. The reference is closed to the user who runs it.
chmod -R go-rwx /autograder/source
mkdir -p /autograder/results
chmod 700 /autograder/results
chmod go-rwx /autograder/submission
cd /autograder
OMP_NUM_THREADS=1 /opt/venv/bin/python source/course/grade.py submission --out results \\
    || [ -f results/results.json ] \\
    || echo '{"score": 0, "output": "The submission cannot be read: hand in the six files."}' \\
    > results/results.json
"""


def write_zip(path):
    files = [*(ROOT / name for name in [*SIX, "common.py", "requirements.txt"]),
             *(HERE / f"{name}.py" for name in ("grade", "cases", "worker", "adapters", "exercises",
                                            "open_head"))]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.relative_to(ROOT))
        for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o755 << 16
            archive.writestr(entry, text)


# -------------------------------------------------------------------------------- main


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def main(argv=None):
    parser = Parser(prog="grade.py", description=__doc__.splitlines()[0])
    parser.add_argument("submission", nargs="?", help="a folder or .zip with the six files")
    parser.add_argument("--out", metavar="DIR", help="write results.json there")
    parser.add_argument("--exercises", default="", help="which, as 1,2 (default: all)")
    parser.add_argument("--seed", type=int, help="draw the same inputs again")
    parser.add_argument("--table", action="store_true", help="what wrong solutions lose")
    parser.add_argument("--zip", metavar="OUT", help="write the autograder for Gradescope")
    args = parser.parse_args(argv)
    known = {e.number for e in EXERCISES}
    if not re.fullmatch(r"(\d+(,\d+)*)?", args.exercises):
        raise UserError(f"--exercises {args.exercises}: numbers with commas, as 1,2")
    numbers = {int(n) for n in args.exercises.split(",") if n} or known
    if numbers - known:
        raise UserError(f"--exercises: there is no exercise {min(numbers - known)}")
    torch.set_num_threads(1)
    if args.zip:
        write_zip(args.zip)
        print(f"wrote {args.zip}")
    elif args.table:
        import wrong

        wrong.print_table(numbers, args.seed)
    elif args.submission is None:
        raise UserError("name a folder or a .zip to grade (see --help)")
    else:
        seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(4))
        results = grade(args.submission, numbers, seed, out=args.out)
        possible = sum(e.points for e in EXERCISES if e.number in results)
        earned = sum(earned for earned, _ in results.values())
        print(f"points: {earned:.1f} of {possible} (drawn with --seed {seed})")


if __name__ == "__main__":
    run_cli(main)
