"""What the six files share: one-line errors, files that are written whole, the device.

A run is stopped at any moment: by Ctrl-C, a full disk, a closed laptop. So a file is written under
a temporary name and then renamed, which the operating system does in one step. Tensors are kept
with safetensors and the rest as JSON: opening a stranger's run folder executes nothing.
"""

import ctypes
import json
import os
import sys
import time
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


class UserError(Exception):
    """Something that the user can put right; the message says what is wrong and what to do, in one
    line, whatever odd name or text it repeats."""

    def __str__(self):
        return printable(super().__str__()).replace("\n", "\\n")


def run_cli(main):
    """Call `main()`; a `UserError` becomes one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a pipe may know ASCII alone
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)  # a reader that has gone away is noticed now
    except KeyboardInterrupt:
        more = "; --resume goes on with a training" * ("train" in sys.argv[0])
        print(f"\nstopped{more}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:  # OSError: a full disk, a file in the way
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:  # CUDA has a class for this, CPU and MPS have not
        if not any(sign in str(error) for sign in ("out of memory", "can't allocate memory")):
            raise
        print(f"{Path(sys.argv[0]).name}: error: out of memory; a smaller --block-size, --size "
              f"or --batch-size needs less", file=sys.stderr)
        sys.exit(2)


# --------------------------------------------------------------------------------------- files


@contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; rename it to `path` if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # a full disk says nothing of the file
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def only_writer(folder):
    """Hold `folder` against a second writer, until the block ends or the process dies; what a kill
    has left of half-written files is cleared. Of torchrun's processes the first holds it for all.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    folder, new = Path(folder), not Path(folder).exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    if path.is_symlink():
        raise UserError(f"{path} is a link; take it away")
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder} is being written by {file.read(100).strip()}; wait for it, "
                            f"or choose another --out") from None
        except (ImportError, OSError):
            print(f"{folder} cannot be locked here; let no second program write to it")
        file.truncate(0)
        file.write(f"process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        for name in (".config.json", ".tokenizer.json", ".metrics.jsonl", ".*.safetensors",
                     ".*.state"):
            for leftover in (*folder.glob(f"{name}.tmp"), *folder.glob(f"*/{name}.tmp")):
                leftover.unlink()
        try:
            yield
        finally:
            nothing = new and os.listdir(folder) == ["lock"]
            if nothing and os.name == "posix":  # elsewhere an open file cannot be taken away
                path.unlink()
                folder.rmdir()


def printable(text):
    """Text as a terminal can be shown it: control characters, and those that turn the direction of
    writing, are spelt out; what joins emoji or parts words is left."""
    odd = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return "".join(c.encode("unicode_escape").decode()
                   if unicodedata.category(c) in odd and c not in "\n\t\u200c\u200d" else c
                   for c in str(text))


def write_text(path, text):
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); convert it first, for example "
                        f"with iconv -t utf-8") from None


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from None


def write_tensors(path, tensors, info):
    """Save a dict of tensors and, in the header of the same file, a dict `info` as JSON."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(flat, metadata={"info": json.dumps(info)}))


def read_tensors(path):
    """(tensors, info) as `write_tensors` saved them; UserError if that cannot be."""
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})["info"])
            # Copies: a file that is mapped cannot be replaced on Windows.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        odd = [n for n, t in tensors.items() if t.is_floating_point()
               and not t.to(torch.float32).isfinite().all()]
        if odd or not isinstance(info, dict):
            raise ValueError(f"{odd[0]} holds a number that is not finite" if odd else "no header")
        return tensors, info
    except FileNotFoundError:
        raise UserError(f"{path} is missing, or closed to you") from None
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or train.py did not write it ({error})") from None


# -------------------------------------------------------------------------------------- device


def choose_device(name):
    """Device, and why."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(device for device, present in there.items() if present)
        return torch.device(name), "the first of cuda, mps, cpu that is here"
    if not there[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has none; leave "
                        f"it out")
    return torch.device(name), "asked for"


def choose_dtype(name, device):
    """Type of matrix products, and why. On a CPU it is measured: the instructions differ."""
    if name != "auto":
        return getattr(torch, name), "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has it"
        return torch.float32, "this GPU has no bfloat16"
    if device.type == "mps":
        return torch.float32, "the safe choice on MPS"
    times = {torch.bfloat16: [], torch.float32: []}
    for dtype in [*times] * 5:  # in turns: other work on the machine comes and goes
        a = torch.ones(1024, 1024, dtype=dtype)
        start = time.perf_counter()
        a @ a
        times[dtype].append(time.perf_counter() - start)
    ratio = min(times[torch.float32]) / min(times[torch.bfloat16])
    dtype = torch.bfloat16 if ratio > 1.5 else torch.float32
    return dtype, f"bfloat16 multiplies {ratio:.1f} times as fast as float32 here"


def keep_freed_memory():
    """Have glibc reuse large blocks instead of returning them to the system at every step.

    Fresh pages cost a page fault each: a step took 1.4 times as long without this. Elsewhere than
    on glibc it does nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        libc.mallopt(option, 1 << 30)
