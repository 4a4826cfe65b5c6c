"""What train.py and eval.py share: processes, heads by name, and how a run folder is read."""

import copy
import functools
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist

import train as core
from common import UserError, choose_dtype, whole_file
from hypernet import ChameleonHead
from lab.cache import CacheHead, CompanyCacheHead
from lab.data import Corpus, Tokenizer, fingerprint
from lab.flags import CONTROLS, METHODS, remembered
from lab.heads import LightHead, MaskedHead, PromptTuningHead, ScaledHead
from lab.model import GPT, GPTConfig, HeadAlone
from model import LoRAHead, add_lora
from train import load_weights, n_trained, weights

__all__ = ["Run", "adapt", "adapter_path", "adapter_paths", "autocast", "config_of",
           "has_finished", "join_processes", "label", "load_adapter", "load_base", "load_weights",
           "n_trained", "open_corpus", "open_run", "read_plan", "read_records", "share_trunk",
           "wait", "weights"]


def autocast(run):
    """Products in the run's type; weights, sums and losses stay float32."""
    return torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32)


def wait(device):
    """Until the device has done what it was asked; a CPU always has."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


# ----------------------------------------------------------------------------------- processes


def join_processes(run):
    """As the core's. The first process may fetch a data set or cluster for long while the others
    wait; it alone prints."""
    if "LOCAL_RANK" in os.environ:
        core.join_processes(run)
        if run.rank:
            sys.stdout = open(os.devnull, "w")


# ---------------------------------------------------------------------------------- run folder


@dataclass
class Run(core.Run):
    """A run folder and what it takes to train or score in it."""

    tokenizer: Tokenizer | None = None
    examples: dict | None = None  # split -> Examples
    base: GPT | None = None
    trunk: str | None = None  # fingerprint of the transformer that heads share, see `share_trunk`
    trunk_model: GPT | None = None  # that transformer, with a head of its own
    shared: dict | None = None  # split -> Examples with its states
    grouped: tuple = (None, None)  # settings, and the clusters and head that they started from

    @functools.cached_property
    def base_fingerprint(self):
        """Adapters remember it: they fit no other base."""
        return core.fingerprint(self.base)

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


def has_finished(path):
    """Whether the training of a checkpoint has come to its end: then its last weights are there."""
    return path.exists() and path.with_suffix(".last.safetensors").exists()


def read_plan(path, kind):
    """Tensors of a checkpoint, and the plan that trained it; kind: "base" or "adapter".

    Says so where the training has not finished: what comes of it is no result yet.
    """
    tensors, plan, _ = core.read_checkpoint(path)
    wanted = {"base": "config", "adapter": "base"}[kind]
    if wanted not in plan:
        raise UserError(f"{path} holds no {kind}")
    if not has_finished(path):
        print(f"{path} is unfinished: python -m lab.run train --resume goes on with it",
              file=sys.stderr)
    return tensors, plan


def config_of(plan):
    """The shape of a base; in old plans a dropout stands beside it."""
    known = {field.name for field in fields(GPTConfig)}
    return GPTConfig(**{k: v for k, v in plan["config"].items() if k in known})


def load_base(path, device, tokenizer):
    """The frozen base of a run folder, or of a run that --base names."""
    tensors, plan = read_plan(path, "base")
    if plan["tokenizer"] != fingerprint(tokenizer):
        raise UserError(f"{path} was trained with another tokenizer than the one beside it")
    model = GPT(config_of(plan))
    load_weights(model, tensors, path)
    return model.to(device).requires_grad_(False).eval()


def label(plan):
    """What a training is called in logs, tables and figures; a leak is never left unsaid."""
    name = plan["method"] + " (LEAKS: full scope)" * (plan.get("stat_scope") == "full")
    return name + (f", trained on {plan['told']}" if plan.get("told") else "")


def adapt(base, plan):
    """The frozen base with untrained adapters, a copy; with a shared trunk the head alone."""
    weight = base.transformer.wte.weight
    if plan.get("trunk"):
        return HeadAlone(base.config, make_head(weight, plan)).to(weight.device)
    if plan["method"] == "cache":  # it stands on the frozen base
        model = copy.deepcopy(base).requires_grad_(False)
    else:
        model = add_lora(base, plan["rank"], plan["alpha"])
    model.lm_head = make_head(model.transformer.wte.weight, plan)
    return model.to(weight.device)


def make_head(weight, plan):
    """A method's untrained head: its logits are the frozen head's (but for cache's)."""
    factors, n_clusters = (weight, plan["rank"], plan["alpha"]), plan.get("clusters", 1)
    match method := plan["method"]:
        case "lora" | "lora-match":
            return LoRAHead(*factors)
        case "chameleon" | "per-sample" | "task-embedding":
            head = LightHead if plan["head_form"] == "light" else ChameleonHead
            return head(*factors, n_clusters)
        case "company-cache":
            return CompanyCacheHead(*factors, plan["stat_scope"], plan.get("at_hand"))
        case "scaled":
            return ScaledHead(*factors, n_clusters)
        case "masks" | "masks-alone" | "library":
            return MaskedHead(*factors, method, n_clusters)
        case "prompt-tuning":
            return PromptTuningHead(weight, n_clusters)
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
    run.trunk = core.fingerprint(model.transformer)
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
    for index in examples.length.argsort(stable=True).split(64):
        tokens, _ = examples.read(index)
        with autocast(run):
            hidden = model.hidden(tokens[:, :-1].to(run.device))
        places, real = examples.places(index)
        known = real[:, 1:]  # (B, W - 1)
        states[places[:, :-1][known]] = hidden.to(states.dtype).cpu()[known]


def read_records(folder):
    """Records of metrics.jsonl; what a hand has left there does not count."""
    wanted = {"method", "seed", "step", "tokens", "loss"}
    return [r for r in core.read_records(folder) if isinstance(r, dict) and wanted <= r.keys()]


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
    run = Run(folder, device, dtype, tokenizer=Tokenizer.load(folder / "tokenizer.json"))
    run.base = load_base(folder / "base.safetensors", device, run.tokenizer)
    return run, config
