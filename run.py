"""What both programs need of the machine and of a run folder: devices, flags, weights, loading."""

import argparse
import copy
import ctypes
import functools
import hashlib
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data import Corpus, Tokenizer, load_examples
from files import UserError, read_json, read_tensors
from hypernet import ChameleonHead
from model import GPT, GPTConfig, LoRAHead, add_lora

# --------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def whole(minimum):
    def parse(text):
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number from {minimum}, not {text!r}")
        return int(text)

    return parse


def positive(text):
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return number


def listed(choices):
    def parse(text):
        names = text.split(",")
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(choices)}")
        return list(dict.fromkeys(names))

    return parse


def seeds(text):
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be whole numbers like 0,1,2, not {text!r}")
    return sorted({int(part) for part in text.split(",")})


# -------------------------------------------------------------------------------------- device


def choose_device(name):
    """Device, and why."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, present in there.items() if present)
        return torch.device(name), "the first of cuda, mps, cpu that is here"
    if not there[name]:
        raise UserError(f"--device {name}: this machine or this build of torch has none")
    return torch.device(name), "asked for"


def choose_dtype(name, device):
    """Type of matrix products, and why. On a CPU it is measured: the instructions differ."""
    if name != "auto":
        return getattr(torch, name), "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has it"
        return torch.float32, "this GPU has no bfloat16"
    if device.type == "mps":
        return torch.float32, "the safe choice on MPS"

    def seconds(dtype):
        a = torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return min(times)

    ratio = seconds(torch.float32) / seconds(torch.bfloat16)
    dtype = torch.bfloat16 if ratio > 1.5 else torch.float32
    return dtype, f"bfloat16 multiplies {ratio:.1f} times as fast as float32 here"


def keep_freed_memory():
    """Have glibc reuse large blocks instead of returning them to the system at every step.

    Each step allocates the same blocks again, and fresh pages cost a page fault each: with this,
    a nano step took 0.7 of its time (2-core CPU). Elsewhere than on glibc it does nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        libc.mallopt(option, 1 << 30)
    libc.mallopt(M_TOP_PAD, 1 << 28)


# ---------------------------------------------------------------------------------- run folder


@dataclass
class Run:
    """A run folder and what it takes to train or score in it."""

    folder: Path
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer
    examples: dict  # split -> Examples
    base: GPT | None = None

    @functools.cached_property
    def base_fingerprint(self):
        """Adapters remember it: they fit no other base."""
        digest = hashlib.sha256(json.dumps(asdict(self.base.config)).encode())
        for _, p in sorted(self.base.named_parameters()):
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @property
    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def weights(model):
    """What a checkpoint holds: the trained parameters, and a chameleon head's buffers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


@torch.no_grad()
def load_weights(model, tensors, path):
    wanted = weights(model)
    if wanted.keys() != tensors.keys() or any(
        wanted[name].shape != tensor.shape for name, tensor in tensors.items()
    ):
        odd = sorted(wanted.keys() ^ tensors.keys()) or [
            f"{n} {tuple(t.shape)}" for n, t in tensors.items() if t.shape != wanted[n].shape
        ]
        raise UserError(f"{path} does not fit this model ({odd[0]}); it is from another setting")
    for name, tensor in tensors.items():
        wanted[name].copy_(tensor)


def load_base(path, device):
    """The frozen base of a run folder, or of a run that --base names."""
    tensors, info = read_tensors(path)
    model = GPT(GPTConfig(**info["plan"]["config"]))
    load_weights(model, tensors, path)
    return model.to(device).requires_grad_(False)


def adapt(base, plan):
    """A copy of the frozen base with untrained adapters: its logits are still the base's."""
    model = copy.deepcopy(base).requires_grad_(False)
    add_lora(model, plan["rank"], plan["alpha"])
    head = model.transformer.wte.weight, plan["rank"], plan["alpha"]
    if plan["method"] == "lora":
        model.lm_head = LoRAHead(*head)
    else:
        model.lm_head = ChameleonHead(*head, plan["head_form"], plan["clusters"])
    return model


def adapter_path(run, method, seed):
    return run.folder / "adapters" / f"{method}-seed{seed}.safetensors"


def remembered(folder):
    """config.json of a run folder; None for a new or empty one."""
    if (folder / "config.json").exists():
        return read_json(folder / "config.json")
    if folder.exists() and any(path.name != "cache" for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run; choose another --out")
    return None


def open_corpus(args, config):
    """The data set; it must be the text that the run knows, if there is a run."""
    corpus = Corpus(args.dataset, args.data_dir)
    if config and config["data"] != corpus.fingerprint:
        raise UserError(f"--dataset {args.dataset} has another text than when the run was made; "
                        f"put the old text back, or choose another --out")
    return corpus


def open_run(folder, device):
    """Open a finished or half-finished run for scoring; returns it and its config.json."""
    config = remembered(folder)
    if config is None:
        raise UserError(f"{folder} holds no run; train one first: python train.py")
    args = argparse.Namespace(**config["args"])
    corpus, tokenizer = open_corpus(args, config), Tokenizer.load(folder / "tokenizer.json")
    examples = load_examples(corpus, tokenizer, args.block_size, folder / "cache")
    run = Run(folder, device, getattr(torch, args.dtype), tokenizer, examples)
    run.base = load_base(folder / "base.safetensors", device)
    return run, config
