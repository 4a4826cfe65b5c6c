"""What train.py and eval.py share: flags, devices, and how a run folder is read."""

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

from data import Corpus, Tokenizer
from files import UserError, read_json, read_tensors
from hypernet import ChameleonHead
from model import GPT, GPTConfig, LoRAHead, add_lora

# --------------------------------------------------------------------------------------- flags


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        silent = action.default in (None, False) or "default" in action.help
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def __init__(self, *args, **options):
        super().__init__(*args, formatter_class=Help, **options)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def number(kind, low, high=2**31 - 1):
    """An argparse type: an int or a float from `low` to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} from {low} to {high}, not {text!r}")
        return value

    return parse


def listed(choices):
    def parse(text):
        names = text.split(",")
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(choices)}")
        return list(dict.fromkeys(names))

    return parse


def seeds(text):
    return sorted({number(int, 0)(part) for part in text.split(",")})


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
    examples: dict | None = None  # split -> Examples
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
    odd = {(n, t.shape) for n, t in wanted.items()} ^ {(n, t.shape) for n, t in tensors.items()}
    if odd:
        raise UserError(f"{path} is of another setting: {min(odd)[0]} does not fit this model")
    for name, tensor in tensors.items():
        wanted[name].copy_(tensor)


def read_plan(path, kind):
    """Tensors of a checkpoint, and the plan that trained it; kind: "base" or "adapter"."""
    tensors, info = read_tensors(path)
    plan = info.get("plan") or {}
    if {"base": "config", "adapter": "base"}[kind] not in plan:
        raise UserError(f"{path} holds no {kind}")
    return tensors, plan


def load_base(path, device, tokenizer):
    """The frozen base of a run folder, or of a run that --base names."""
    tensors, plan = read_plan(path, "base")
    if plan["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"{path} was trained with another tokenizer than the one beside it")
    model = GPT(GPTConfig(**plan["config"]))
    load_weights(model, tensors, path)
    return model.to(device).requires_grad_(False)


def label(plan):
    """What a training is called in logs, tables and figures; a leak is never left unsaid."""
    return plan["method"] + (" (LEAKS: full scope)" if plan.get("stat_scope") == "full" else "")


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


# Settings that a run folder has once; a later call into the same folder must agree with them.
ONCE = ("dataset", "base", "size", "block_size", "tokenizer", "vocab_size", "base_lr",
        "base_epochs", "base_batch_size", "dropout", "dtype")


def remembered(folder):
    """config.json of a run folder; None for a new or empty one."""
    path = folder / "config.json"
    if path.exists():
        config = read_json(path)
        known = config.get("args") if isinstance(config, dict) else None
        if not isinstance(known, dict) or not {*ONCE, "data_dir"} <= known.keys():
            raise UserError(f"{path} is not what train.py wrote: settings are missing")
        return config
    if folder.exists() and (folder.is_file() or any(p.name != "cache" for p in folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no run; choose another --out")
    return None


def read_records(folder):
    """Records of metrics.jsonl. A kill can tear its last line, which then does not count."""
    path, records = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def open_corpus(dataset, data_dir, config):
    """The data set; it must be the text that the run knows, if there is a run."""
    corpus = Corpus(dataset, data_dir)
    if config and config.get("data") != corpus.fingerprint:
        raise UserError(f"--dataset {dataset} has another text than when the run was made; put the "
                        f"old text back, or choose another run folder")
    return corpus


def open_run(folder, device, dtype=None):
    """A finished or half-finished run, without its examples, and its config.json."""
    config = remembered(folder)
    if config is None:
        raise UserError(f"{folder} holds no run; train one first: python train.py")
    dtype = choose_dtype(dtype or config["args"]["dtype"], device)[0]
    run = Run(folder, device, dtype, Tokenizer.load(folder / "tokenizer.json"))
    run.base = load_base(folder / "base.safetensors", device, run.tokenizer)
    return run, config
