"""Kill trainings and scorings at random moments; what goes on must end as if nothing had happened.

    python tests/kill.py        # about six minutes

40 SIGKILLs at any moment, ten of them at a rename of a file (before it or after), then 10 SIGINTs
and 10 SIGTERMs, all while train.py runs on a tiny base; 10 SIGKILLs while eval.py runs. After each
the same command goes on; at its end tensors and records are those of a run that nobody stopped, to
the last bit, and no half-written file or unfinished state is left.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common import read_tensors  # noqa: E402
from train import read_records  # noqa: E402

CHILD = """
import os, signal, sys
import model, train
import eval as evaluation
model.SIZES["tiny"] = dict(n_layer=2, n_head=2, n_embd=16)
real, clock, at, calls = os.replace, train.time.perf_counter, int(os.environ["KILL_AT"]), 0
train.time.perf_counter = lambda: 1000 * clock()  # a state is saved at almost every step

def replace(a, b):
    global calls
    calls += 1
    if calls == at and at % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
train.run_cli({"train": train.main, "eval": evaluation.main}[sys.argv.pop(1)])
"""


def start(program, arguments, kill_at=0):
    return subprocess.Popen([sys.executable, "-c", CHILD, program, *arguments], cwd=ROOT,
                            env=os.environ | {"KILL_AT": str(kill_at), "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def contents(folder):
    tensors = {p.name: {n: t.tolist() for n, t in read_tensors(p)[0].items()}
               for p in sorted(folder.rglob("*.safetensors"))}
    results = folder / "results.json"
    return tensors, read_records(folder), results.exists() and results.read_text()


def attempt(program, arguments, wanted, folder, stops, seconds, draw):
    """Stop the program as `stops` say, one after the other, then let it end; are all well?"""
    well = 0
    for stop in stops:
        resumed = ["--resume"] * (program == "train" and (folder / "config.json").exists())
        at = draw.randint(1, 24) if stop == "rename" else 0
        process = start(program, [*arguments, *resumed], at)
        if stop != "rename":
            # While Python imports torch, Ctrl-C shows Python's own traceback.
            time.sleep(draw.uniform(0.6 if stop == signal.SIGINT else 0, 1) * seconds)
            process.send_signal(stop)
        error = process.communicate()[1]
        well += "Traceback" not in error and "error:" not in error
    resumed = ["--resume"] * (program == "train" and (folder / "config.json").exists())
    process = start(program, [*arguments, *resumed])
    error = process.communicate()[1]
    left = [p.name for p in folder.rglob("*") if p.suffix in (".tmp", ".state")]
    if process.returncode or left or contents(folder) != wanted:
        print(f"stopped by {stops}: status {process.returncode}, left {left}, {error[-500:]}")
        return 0
    return well


def main():
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "text.txt"
        text.write_text("".join(f"{draw.choice('abc')} {draw.choice('def')} line {i}\n"
                                for i in range(4000)))
        flags = ["--dataset", str(text), "--base-dataset", str(text), "--size", "tiny",
                 "--vocab-size", "300", "--block-size", "32", "--dtype", "float32",
                 "--base-epochs", "1", "--max-steps", "30", "--device", "cpu"]
        whole = Path(temporary) / "whole"
        began = time.perf_counter()
        assert start("train", [*flags, "--out", str(whole)]).wait() == 0
        seconds = time.perf_counter() - began
        wanted = contents(whole)
        for name, stops, n in (("SIGKILL", [signal.SIGKILL] * 3, 10), ("rename", ["rename"] * 2, 5),
                               ("SIGINT", [signal.SIGINT] * 2, 5),
                               ("SIGTERM", [signal.SIGTERM] * 2, 5)):
            well = 0
            for i in range(n):
                folder = Path(temporary) / f"{name}{i}"
                arguments = [*flags, "--out", str(folder)]
                well += attempt("train", arguments, wanted, folder, stops, seconds, draw)
            print(f"train.py, {name}: {well} of {n * len(stops)} went on, equal to the last bit",
                  flush=True)
        began = time.perf_counter()
        assert start("eval", [str(whole)]).wait() == 0
        seconds, well = time.perf_counter() - began, 0
        wanted = contents(whole)
        for _ in range(10):
            well += attempt("eval", [str(whole)], wanted, whole, [signal.SIGKILL], seconds, draw)
        print(f"eval.py, SIGKILL: {well} of 10 went on")


if __name__ == "__main__":
    main()
