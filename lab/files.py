"""Files that are written whole or not at all, and mistakes that are told in one line.

A run is stopped at any moment: by Ctrl-C, by a full disk, by a closed laptop. So a file is first
written under a temporary name and then renamed, which the operating system does in one step. (The
log of evaluations alone is appended to, and its reader bears a torn last line.) Tensors are kept
with safetensors and the rest as JSON; nothing is pickled, so opening a stranger's run folder
executes none of the stranger's code.
"""

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

FORMAT = 1  # of the files that write_tensors writes; those that do not say have this one


class UserError(Exception):
    """Something that the user can put right; the message says what is wrong and what to do."""


def run_cli(main, program=None):
    """Call `main()`; a `UserError` becomes one line on stderr and exit status 2.

    The line begins with the `program`'s name, by default the script's.
    """
    interruptible = signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without ± must not end a run
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:  # OSError: a full disk, a file in the way
        # Of the processes that torchrun starts, all find the same mistake: one says it.
        rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
        if isinstance(error, OSError) or rank == "0":
            print(f"{program or Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if interruptible:  # while modules are loaded, and at the end: no traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; rename it to `path` if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors lets nobody but the owner read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({error})") from None


def write_tensors(path, tensors, info=None):
    """Save a dict of tensors and, in the header of the same file, a JSON-able dict `info`.

    Without `info` the file is what others write, transformers among them.
    """
    from safetensors.torch import save_file

    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: safetensors writes several in any order, and equal files should be equal bytes.
    header = {"format": "pt"} if info is None else {
        "info": json.dumps({"version": FORMAT} | info)}
    with whole_file(path) as temporary:
        try:
            save_file(flat, temporary, metadata=header)
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"cannot write {path}: {error}") from None


@contextmanager
def tensor_file(path, device="cpu"):
    """Open anyone's safetensors file, to be read tensor by tensor; `UserError` if it cannot be."""
    try:
        open(path, "rb").close()  # safetensors calls a file missing that it may not read
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except PermissionError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged, cut short or no safetensors file ({error})") from None


def read_tensors(path, device="cpu"):
    """Return `(tensors, info)` as `write_tensors` saved them; `UserError` if that cannot be."""
    with tensor_file(path, device) as file:
        header = file.metadata() or {}
        if "info" not in header:
            raise UserError(f"{path} was not written by lab.run train: its header has no 'info'")
        info = json.loads(header["info"])
        if not isinstance(info, dict):
            raise UserError(f"{path} was not written by lab.run train: its 'info' is no object")
        version = info.pop("version", FORMAT)
        if version != FORMAT:
            raise UserError(f"{path} has format {version}, and this program reads {FORMAT}")
        return {name: file.get_tensor(name) for name in file.keys()}, info
