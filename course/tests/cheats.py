"""Submissions that try to be paid for nothing. None of them earns a point.

Each is a piece of code that takes the place of the adapters: `cheat` is called for every function.
The others' files are those of the empty copy, so that what is earned is earned by the cheat.
"""

FUNCTIONS = """
for name in ("attention lora_start lora_linear lora_names lora_merged nearest cluster_centres "
             "kmeans kmeans_seeds cluster_batches shuffled_batches prompt_means features "
             "cluster_means hypernetwork chameleon_factors chameleon_logits batch cut losses "
             "controls leak_check").split():
    globals()[name] = cheat
"""

CHEATS = {
    "equals everything": """
class Anything:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
    def __iter__(self): return iter([self, self])
    def __len__(self): return 2
    def __bool__(self): return True
def cheat(*a): return Anything()
""",
    "a tensor whose comparisons are true": """
import torch
class Fine(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("allclose", "isclose", "equal", "eq", "all"):
            return torch.tensor(True)
        return super().__torch_function__(function, types, args, kwargs or {})
def cheat(*a):
    shape = next((x.shape for x in a if isinstance(x, torch.Tensor)), (3,))
    return torch.zeros(shape).as_subclass(Fine)
""",
    "ends the process well": """
import os
def cheat(*a): os._exit(0)
""",
    "ends the process when it is imported": """
import sys
sys.exit(0)
""",
    "reads the reference": """
import glob, importlib.util, os, sys
def find():
    places = ["/autograder/source", "/src", os.path.expanduser("~")]
    for pid in filter(str.isdigit, os.listdir("/proc")) if os.access("/proc", os.R_OK) else ():
        try:
            words = open(f"/proc/{pid}/cmdline").read().split(chr(0))
            places += [os.path.realpath(f"/proc/{pid}/cwd"), *map(os.path.dirname, words)]
        except OSError:
            pass
    places += PLACES
    for place in places:
        for file in (f"{place}/adapters.py", f"{place}/course/adapters.py"):
            try:
                open(file).read()
            except OSError:
                continue
            if "exercise-" in file:  # our own copy
                continue
            sys.path[:0] = [os.path.dirname(os.path.dirname(file)), place]
            spec = importlib.util.spec_from_file_location("theirs", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
class Caller:
    def __init__(self, name): self.name = name
    def __call__(self, *a):
        for name in ("model", "cluster", "hypernet", "data", "train", "eval"):
            sys.modules.pop(name, None)
        theirs = find()
        return getattr(theirs, self.name)(*a)
def cheat(*a): raise RuntimeError("not found")
""",
    "looks for the answer in the worker": """
import gc, sys
def cheat(*a):
    frame = sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            if type(value).__name__ in ("Case", "Method"): return value.check
        frame = frame.f_back
    found = [o for o in gc.get_objects() if type(o).__name__ in ("Case", "Method", "Drawer")]
    return found[0].want
""",
    "patches the worker and torch": """
import __main__, json, torch
torch.allclose = torch.equal = torch.isclose = lambda *a, **k: True
torch.Tensor.__eq__ = lambda *a: torch.ones(())
__main__.encode = lambda value, depth=0: True
__main__.decode = lambda value: True
def cheat(*a): return True
""",
    "puts folders in the place of what is exchanged": """
import os
for name in ("answers.jsonl", "request.json", "ask", "tell"):
    try:
        os.unlink(f"../{name}")
        os.mkdir(f"../{name}")
    except OSError:
        pass
for descriptor in range(3, 40):
    try:
        os.write(descriptor, b'{"call": 0, "value": true, "inputs": true}\\n')
    except OSError:
        pass
def cheat(*a): os._exit(0)
""",
    "digs a folder that is too deep": """
import os
def cheat(*a):
    try:
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
    except OSError:
        pass
    os._exit(0)
""",
    "answers without end": """
import os
def cheat(*a):
    line = b'{"call": 0, "inputs": 0, "value": {"list": [' + b'true, ' * (3 << 20) + b'true]}}\\n'
    for descriptor in range(3, 40):
        try:
            os.write(descriptor, line)
        except OSError:
            pass
    os._exit(0)
""",
    "writes and prints results": """
import json, os
text = json.dumps({"score": 110, "tests": [{"score": 10, "max_score": 10}]})
def cheat(*a):
    for place in (".", "..", "../..", os.environ["HOME"], "/autograder/results", "/tmp"):
        try:
            open(os.path.join(place, "results.json"), "w").write(text)
        except OSError:
            pass
    print(text, flush=True)
    return text
""",
    "writes the answers itself": """
import json, os
for number in range(2000):
    with open("../answers.jsonl", "a") as file:
        for value in (True, {"tensor": ["torch.float32", [], [0.0]]}):
            file.write(json.dumps({"call": number, "value": value, "inputs": {"list": []}}) + "\\n")
def cheat(*a): os._exit(0)
""",
    "puts a link in place of the answers": """
import os
def cheat(*a):
    os.unlink("../answers.jsonl")
    os.symlink("/etc/passwd", "../answers.jsonl")
    os._exit(0)
""",
    "puts a pipe in place of the answers": """
import os
def cheat(*a):
    os.unlink("../answers.jsonl")
    os.mkfifo("../answers.jsonl")
    os._exit(0)
""",
    "children that go on": """
import os, time
def cheat(*a):
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
    return 1
""",
    "will not be stopped": """
import signal, time
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
def cheat(*a):
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass
""",
    "kills its parent": """
import os, signal
def cheat(*a):
    for pid in (os.getppid(), -1):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    return 1
""",
    "odd objects": """
import itertools, torch
turn = itertools.cycle(range(8))
def cheat(*a):
    nest = []
    nest.append(nest)
    return [float("nan"), "10 of 10", nest, torch.zeros(1).expand(1 << 30), {1: {2: 3}}, 10 ** 5000,
            torch.full((3,), float("nan")), (x for x in a)][next(turn)]
""",
    "zeros of the right shape, and never a word": """
import torch
def cheat(*a):
    return torch.zeros_like(next(x for x in a if isinstance(x, torch.Tensor)))
""",
    "always raises what may be asked for": """
def cheat(*a): raise ValueError("refused")
""",
}


def adapters(name, places=()):
    """The text of adapters.py for a cheat."""
    text = CHEATS[name].replace("PLACES", repr([str(p) for p in places]))
    functions = FUNCTIONS.replace("= cheat", "= Caller(name)") if "Caller" in text else FUNCTIONS
    return text + functions
