"""Runs a submission's functions, in a process that holds no answer: see grade.py.

This script never sees the reference. It is started once and imports torch; for each exercise it
forks a fresh child, which gives up its rights, takes its limits, reads a request (which functions
to call, with what) and writes one line of JSON for each call. What the child says is not believed:
the grader computes the right values elsewhere, and compares them there.
"""

import ctypes
import json
import math
import os
import resource
import sys

import torch

DTYPES = {str(d): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64,
                              torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32,
                              torch.int64)}
LARGEST = 1 << 21  # numbers in a tensor


def encode(value, depth=0):
    """A value of tensors, lists, dicts and plain values as JSON can hold it."""
    if isinstance(value, torch.Tensor):
        if value.numel() > LARGEST:
            raise ValueError(f"a tensor of {value.numel():,} numbers was returned, which is absurd")
        value = value.detach().cpu().to_dense()
        return {"tensor": [str(value.dtype), list(value.shape), value.flatten().tolist()]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)) and depth < 8:
        return {"list": [encode(v, depth + 1) for v in value]}
    if isinstance(value, dict) and depth < 8:
        return {"dict": [[str(k), encode(v, depth + 1)] for k, v in value.items()]}
    raise TypeError(f"a {type(value).__name__} was returned, not tensors, lists or numbers")


def decode(value):
    """What `encode` was given; ValueError for anything that it cannot have written."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is dict and len(value) == 1:
        (kind, content), = value.items()
        if kind == "tensor" and type(content) is list and len(content) == 3:
            dtype, shape, numbers = content
            plain = type(shape) is list and all(type(n) is int and 0 <= n <= LARGEST for n in shape)
            if (plain and len(shape) < 9 and type(numbers) is list
                    and math.prod(shape) == len(numbers) and all(
                        type(n) in (bool, int, float) for n in numbers)):
                try:
                    return torch.tensor(numbers, dtype=DTYPES[dtype]).view(shape)
                except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
                    pass
        if kind == "list" and type(content) is list:
            return [decode(v) for v in content]
        if kind == "dict" and type(content) is list:
            return {str(k): decode(v) for k, v in content}
    raise ValueError("an answer that the worker cannot have written")


# ------------------------------------------------------------------------------------- the child


def landlock():
    """Version of Linux's Landlock, by which a process gives up files; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, ctypes.CDLL(None, use_errno=True).syscall(444, None, 0, 1))


def close_files(folder):
    """Give up all files but those of Python (read alone) and of `folder`, TCP, and signals to
    processes outside: as far as this system's Landlock can (docs.kernel.org/userspace-api)."""
    version, libc = landlock(), ctypes.CDLL(None, use_errno=True)
    if not version:
        return
    everything = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    attributes = (ctypes.c_uint64 * 3)(everything, 3, 3)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = libc.syscall(444, ctypes.byref(attributes), size, 0)
    read, read_file = 1 | 4 | 8, 4
    allowed = {folder: everything, "/dev/null": read_file | 2, "/dev/urandom": read_file,
               f"/proc/{os.getpid()}": read}
    for path in (sys.prefix, sys.base_prefix, *sys.path[1:], "/usr", "/lib", "/lib64", "/etc",
                 "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"):
        allowed.setdefault(path, read)
    for path, access in allowed.items():
        if os.path.exists(path):
            descriptor = os.open(path, os.O_PATH)
            if not os.path.isdir(path):
                access &= 1 | 2 | 4
            rule = access.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
            libc.syscall(445, rules, 1, rule, 0)
            os.close(descriptor)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if rules < 0 or libc.syscall(446, rules, 0):
        raise OSError("Landlock is there and cannot be used")
    os.close(rules)


def confine(folder, limits):
    """Give up what a submission does not need: another user's rights, files, memory, processes."""
    memory = limits["memory"]
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="utf-8") as file:  # torch may reserve much
            memory += int(file.read().split()[0]) * resource.getpagesize()
        with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write("1000")  # where the machine's memory runs out, this process goes first
    for name, most in (("AS", memory), ("FSIZE", 1 << 26), ("CORE", 0),
                       ("CPU", limits["seconds"] + 5), ("NPROC", limits["processes"])):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    if limits["user"] is not None:
        if sys.platform == "linux":  # no memory that outlives the process, or that others share
            ctypes.CDLL(None).unshare(0x08000000)  # CLONE_NEWIPC
        os.setgroups([])
        os.setgid(limits["user"])
        os.setuid(limits["user"])
    close_files(folder)


def run(folder, limits):
    """Make the calls of one request."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.closerange(3, 256)
    # All but `code` is opened here: the submission cannot put anything else in its place.
    with open(os.path.join(folder, "request.json"), encoding="utf-8") as file:
        request = json.load(file)
    answers = open(os.path.join(folder, "answers.jsonl"), "a", encoding="utf-8")
    ask = open(os.path.join(folder, "ask"), "w", encoding="utf-8")
    tell = open(os.path.join(folder, "tell"), encoding="utf-8")
    os.chdir(os.path.join(folder, "code"))
    os.environ |= {"HOME": os.getcwd(), "TMPDIR": os.getcwd()}
    sys.path[:] = [os.getcwd(), *(p for p in sys.path if p and p != os.path.dirname(__file__))]
    confine(os.getcwd(), limits)
    for number, name, arguments in request["calls"]:
        arguments = decode(arguments)
        answer = {"call": number}
        try:
            asker = [asker_of(number, ask, tell)] * (name == "leak_check")
            answer["value"] = encode(call(name, [*asker, *arguments]))
            answer["inputs"] = encode(arguments)
        except MemoryError:
            answer["error"] = ["MemoryError", "no memory is left"]
        except BaseException as error:  # a submission may raise anything
            answer["error"] = [type(error).__name__, str(error)[:300]]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def call(name, arguments):
    if name == "train_head":
        return train_head(*arguments)
    import adapters

    return getattr(adapters, name)(*arguments)


def asker_of(number, ask, tell):
    """The `predict` of exercise 9: tokens go to the grader, which holds the method."""

    def predict(tokens):
        print(json.dumps({"call": number, "tokens": encode(tokens)}), file=ask, flush=True)
        answer = json.loads(tell.readline())
        if "error" in answer:
            raise ValueError(answer["error"])
        return decode(answer["losses"])

    return predict


def train_head(weight, rank, alpha, means, clusters, hidden, targets, statistics, asked, steps,
               rates, seed):
    """12. Train my_head.MyHead as every head is trained, at each rate; how many parameters it
    trains, and at each rate its logits for each (hidden, statistics) that is asked for.

    means (N, C), clusters (K, C), hidden (N, T, C), targets (N, T), statistics (N, C).
    """
    from my_head import MyHead

    logits = []
    for rate in rates:
        torch.manual_seed(seed)
        head = MyHead(torch.nn.Parameter(weight, requires_grad=False), rank, alpha, len(clusters))
        head.remember(means, clusters)
        parameters = [p for p in head.parameters() if p.requires_grad]
        fit_head(head, parameters, hidden, targets, statistics, steps, rate, seed)
        with torch.no_grad():
            logits.append([head(h, s) for h, s in asked])
    return sum(p.numel() for p in parameters), logits


def fit_head(head, parameters, hidden, targets, statistics, steps, rate, seed):
    """AdamW on batches of 16 rows, the rate falling to zero in a straight line."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        index = torch.randint(len(hidden), (16,), generator=generator)
        logits = head(hidden[index], statistics[index])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[index].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


# ------------------------------------------------------------------------------------- the parent


def main():
    """Fork a child for each line of standard input; print its number, and later how it ended."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, limits = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                run(folder, limits)
            finally:
                os._exit(0)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
