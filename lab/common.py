"""What train.py and eval.py share: devices, processes, and how a run folder is read."""

import copy
import ctypes
import functools
import hashlib
import json
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from common import UserError, read_tensors, whole_file
from lab.baselines import MaskedHead, PerSampleHead, PromptTuningHead, ScaledHead
from lab.cache import CacheHead, CompanyCacheHead
from lab.data import Corpus, Tokenizer
from lab.flags import CONTROLS, METHODS, remembered
from lab.hypernet import ChameleonHead
from lab.model import GPT, GPTConfig, HeadAlone, LoRAHead, add_lora

# -------------------------------------------------------------------------------------- device


def choose_device(name):
    """Device, and why."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    why = "asked for"
    if name == "auto":
        name = next(device for device, present in there.items() if present)
        why = "the first of cuda, mps, cpu that is here"
    if not there[name]:
        raise UserError(f"--device {name}: this machine or this build of torch has none")
    return torch.device(name), why


def choose_dtype(name, device):
    """Type of matrix products, and why. On a CPU it is measured: the instructions differ."""
    if name != "auto":
        return getattr(torch, name), "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has it"
        return torch.float16, "this GPU has no bfloat16; losses are scaled to keep gradients"
    if device.type == "mps":
        return torch.float32, "the safe choice on MPS"
    # Other work comes and goes: compare what was measured side by side, more than once.
    rates = [[matrix_rate(device, dtype, 1) for dtype in (torch.bfloat16, torch.float32)]
             for _ in range(5)]
    ratio = median(low / exact for low, exact in rates)
    dtype = torch.bfloat16 if ratio > 1.5 else torch.float32
    return dtype, f"bfloat16 multiplies {ratio:.1f} times as fast as float32 here"


def matrix_rate(device, dtype, repeats=5):
    """Operations a second of a square matrix product, the best of a few: two per multiply-add."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, dtype=dtype, device=device)
    times = []
    while len(times) <= repeats and sum(times) < 1:  # the first call counts where one takes long
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def wait(device):
    """Until the device has done what it was asked; a CPU always has."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def keep_freed_memory():
    """Have glibc reuse large blocks instead of returning them to the system at every step.

    Each step allocates the same blocks again, and fresh pages cost a page fault each: with this,
    a nano step took 0.7 of its time (2-core CPU). Blocks of many sizes leave holes, so a call also
    returns what is free now: one training's 6 GB are no help to the next. Elsewhere than on glibc
    it does nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        libc.mallopt(option, 1 << 30)
    libc.mallopt(M_TOP_PAD, 1 << 28)
    libc.malloc_trim(0)


@contextmanager
def memory_advice(flags):
    """Tell in one line that memory has run out, and which flags help."""
    try:
        yield
    except RuntimeError as error:  # CUDA has a class of its own for this, CPU and MPS have not
        if not any(sign in str(error) for sign in ("out of memory", "can't allocate memory")):
            raise
        raise UserError(f"out of memory ({str(error).splitlines()[0][:150]}); {flags}") from None


# ----------------------------------------------------------------------------------- processes


def join_processes(device):
    """(rank, number of processes, device) among those that torchrun has started, if it has.

    Without torchrun (0, 1, device). Only rank 0 writes, into a folder that all can read. The
    processes of one machine share its cores.
    """
    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, device
    local, n_here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "mps" or (device.type == "cuda" and n_here > torch.cuda.device_count()):
        raise UserError(f"torchrun: process {local} of this machine finds no {device.type} device "
                        f"of its own; start fewer, or use --device cpu")
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, cores() // n_here))
    # The first process may fetch a data set or cluster for long while the others wait.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size(), device


def cores():
    """Processor cores that this process may use: a container's share, not the whole machine."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(there, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or "max"
        return there


# ---------------------------------------------------------------------------------- run folder


@dataclass
class Run:
    """A run folder and what it takes to train or score in it."""

    folder: Path
    device: torch.device
    dtype: torch.dtype = torch.float32
    tokenizer: Tokenizer | None = None
    examples: dict | None = None  # split -> Examples
    base: GPT | None = None
    trunk: str | None = None  # fingerprint of the transformer that heads share, see `share_trunk`
    trunk_model: GPT | None = None  # that transformer, with a head of its own
    shared: dict | None = None  # split -> Examples with its states
    grouped: tuple = (None, None)  # settings, and the clusters and head that they started from
    rank: int = 0  # of this process, among `world`
    world: int = 1

    @functools.cached_property
    def base_fingerprint(self):
        """Adapters remember it: they fit no other base."""
        return tensors_digest(dict(self.base.named_parameters()), asdict(self.base.config))

    @property
    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def add_up(self, array):
        """Sum of every process's `array`."""
        if self.world == 1:
            return array
        total = torch.from_numpy(array).to(self.device)
        dist.all_reduce(total)
        return total.cpu().numpy()

    def from_first(self, make):
        """What `make()` returns in the first process, for all."""
        box = [make() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def first_goes_ahead(self):
        """Have the first process go through a block alone, then the others find what it left."""
        if self.rank:
            dist.barrier()
        yield
        if self.world > 1 and not self.rank:
            dist.barrier()


def tensors_digest(tensors, config=None):
    digest = hashlib.sha256(json.dumps(config).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


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


def has_finished(path):
    """Whether the training of a checkpoint has come to its end: then its last weights are there."""
    return path.exists() and path.with_suffix(".last.safetensors").exists()


def read_plan(path, kind):
    """Tensors of a checkpoint, and the plan that trained it; kind: "base" or "adapter".

    Says so where the training has not finished: what comes of it is no result yet.
    """
    tensors, info = read_tensors(path)
    plan = info.get("plan")
    wanted = {"base": "config", "adapter": "base"}[kind]
    if not isinstance(plan, dict) or wanted not in plan:
        raise UserError(f"{path} holds no {kind}")
    if not has_finished(path):
        print(f"{path} is unfinished: python -m lab.run train --resume goes on with it",
              file=sys.stderr)
    return tensors, plan


def load_base(path, device, tokenizer):
    """The frozen base of a run folder, or of a run that --base names."""
    tensors, plan = read_plan(path, "base")
    if plan["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"{path} was trained with another tokenizer than the one beside it")
    model = GPT(GPTConfig(**plan["config"]))
    load_weights(model, tensors, path)
    return model.to(device).requires_grad_(False).eval()


def n_trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def label(plan):
    """What a training is called in logs, tables and figures; a leak is never left unsaid."""
    name = plan["method"] + " (LEAKS: full scope)" * (plan.get("stat_scope") == "full")
    return name + (f", trained on {plan['told']}" if plan.get("told") else "")


def adapt(base, plan):
    """The frozen base with untrained adapters, a copy; with a shared trunk the head alone."""
    if plan.get("trunk"):
        return HeadAlone(base.config, make_head(base.transformer.wte.weight, plan))
    model = copy.deepcopy(base).requires_grad_(False)
    if plan["method"] != "cache":  # it stands on the frozen base
        add_lora(model, plan["rank"], plan["alpha"])
    model.lm_head = make_head(model.transformer.wte.weight, plan)
    return model


def make_head(weight, plan):
    """A method's untrained head: its logits are the frozen head's (but for cache's)."""
    factors = weight, plan["rank"], plan["alpha"]
    told = {"n_clusters": plan.get("clusters", 1), "scope": plan.get("stat_scope")}
    match method := plan["method"]:
        case "lora" | "lora-match":
            return LoRAHead(*factors)
        case "chameleon" | "per-sample" | "task-embedding":
            head = ChameleonHead if method == "chameleon" else PerSampleHead
            return head(*factors, plan["head_form"], **told)
        case "company-cache":
            return CompanyCacheHead(*factors, plan["stat_scope"], plan.get("at_hand"))
        case "scaled":
            return ScaledHead(*factors, **told)
        case "masks" | "masks-alone" | "library":
            return MaskedHead(*factors, method, **told)
        case "prompt-tuning":
            return PromptTuningHead(weight, **told)
        case "cache":
            return CacheHead(weight)


ADAPTERS = {"joint": "adapters", "shared": "shared"}  # where --trunk joint or shared keeps them


def adapter_path(run, method, seed, trunk="joint"):
    return run.folder / ADAPTERS[trunk] / f"{method}-seed{seed}.safetensors"


def adapter_paths(folder, trunk="joint"):
    """Best checkpoints of a run's adapters, those of one method side by side."""
    place = folder / ADAPTERS[trunk]
    paths = [p for p in (place.iterdir() if place.exists() else ()) if p.suffix == ".safetensors"
             and not p.name.endswith((".last.safetensors", ".state.safetensors"))]

    def rank(path):
        method = path.name.split("-seed")[0]
        for control in CONTROLS:
            method = method.removesuffix(f"-{control}")
        if method not in METHODS:
            raise UserError(f"{path} is no adapter that lab.run train has named; move it away")
        return METHODS.index(method), path.name

    return sorted(paths, key=rank)


def load_adapter(run, path):
    """The base with the adapter in `path` on it, and the plan that trained it."""
    tensors, plan = read_plan(path, "adapter")
    if plan["base"] != run.base_fingerprint:
        raise UserError(f"{path} was trained on another base than {run.folder}/base.safetensors")
    if plan.get("trunk") != (run.trunk if plan.get("trunk") else None):
        raise UserError(f"{path} was trained on another trunk than "
                        f"{adapter_path(run, 'lora', 0)}; delete one of them")
    model = adapt(run.base, plan)
    load_weights(model, tensors, path)
    return model.eval(), plan


def share_trunk(run):
    """Have heads read the states of one LoRA-adapted transformer: that of `lora`, seed 0.

    It is run once; its last hidden states lie in the run's cache, in the type that products are
    made in, so that nothing is lost.
    """
    path = adapter_path(run, "lora", 0)
    if not has_finished(path):
        raise UserError(f"--trunk shared: heads share the transformer of {path}, which is not "
                        f"finished; train it first with --methods lora --trunk joint")
    model = run.trunk_model = load_adapter(run, path)[0]
    run.trunk = tensors_digest({n: p for n, p in model.named_parameters()
                                if not n.startswith("lm_head")})
    run.shared, kind = {}, str(run.dtype).removeprefix("torch.")
    with run.first_goes_ahead():
        for split, examples in run.examples.items():
            shape = len(examples.tokens), run.base.config.n_embd
            mapped = functools.partial(torch.from_file, size=math.prod(shape), dtype=run.dtype)
            file = run.folder / "cache" / f"{split}-{run.trunk}.{kind}"
            whole = math.prod(shape) * run.dtype.itemsize
            if not (file.exists() and file.stat().st_size == whole):
                with whole_file(file) as temporary:
                    if hasattr(os, "posix_fallocate"):  # a full disk would else kill the process
                        with open(temporary, "wb") as room:
                            os.posix_fallocate(room.fileno(), 0, whole)
                    states = mapped(str(temporary), shared=True).view(shape)
                    write_states(run, model, examples, states)
            run.shared[split] = replace(examples, states=mapped(str(file)).view(shape))


@torch.no_grad()
def write_states(run, model, examples, states):
    """Last hidden states of every token, (all tokens, C); the last of a row predicts nothing."""
    for index in np.array_split(np.argsort(examples.length), -(-len(examples) // 64)):
        tokens, real = examples.rows(index)
        with run.autocast:
            hidden = model.hidden(tokens[:, :-1].to(run.device))
        known = real[:, 1:]  # (B, W - 1)
        states[examples.places(index)[0][:, :-1][known]] = hidden.to(states.dtype).cpu()[known]


def read_records(folder):
    """Records of metrics.jsonl. A damaged line, such as a kill can leave, does not count."""
    path, records = folder / "metrics.jsonl", []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    wanted = {"method", "seed", "step", "tokens", "loss"}
    return [r for r in records if isinstance(r, dict) and wanted <= r.keys()]


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
        raise UserError(f"{folder} holds no run; train one first: python -m lab.run train")
    dtype = choose_dtype(dtype or config["args"]["dtype"], device)[0]
    run = Run(folder, device, dtype, Tokenizer.load(folder / "tokenizer.json"))
    run.base = load_base(folder / "base.safetensors", device, run.tokenizer)
    return run, config
