"""Train the base model, then one adapter after the other on the same frozen base.

    python train.py                                   # text that comes with Python, no network
    python train.py --dataset wikitext2 --seeds 0,1,2
    python train.py --resume --out runs/wikitext2     # go on after Ctrl-C, exactly
    torchrun --nproc_per_node=2 train.py ...          # a batch's rows dealt to two processes

A run folder holds config.json, tokenizer.json, base.safetensors (if it was trained here), one file
an adapter in adapters/ (its weights alone), metrics.jsonl with a record an evaluation, and while a
training is not finished its *.state.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from cluster import cluster_batches, kmeans, shuffled_batches
from common import (UserError, choose_device, choose_dtype, keep_freed_memory, only_writer,
                    parse_json, read_tensors, read_text, run_cli, write_json, write_tensors,
                    write_text)
from data import IGNORE, Tokenizer, cut, kinds, load_documents
from hypernet import ChameleonHead, cluster_means, cluster_statistics, features, prompt_means
from model import GPT, SIZES, GPTConfig, LoRAHead, add_lora, find_gpt2, load_gpt2

# Each method's peak learning rate: the best of a grid, on validation, for the default job
# (results/python). They need not be equal: a rate that nobody chose favours whom it suits.
RATES = {"lora": 3e-2, "lora-match": 1e-2, "chameleon": 1e-2}
HUB_BASES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
BASE_BATCH_SIZE = 16  # rows
OF_A_CALL = {"resume", "out", "device"}  # flags that a run does not keep
# Numbers in a checkpoint's header: the kind of each, and the smallest. Of those in the first line
# none is larger than the file has numbers (or 4,096).
SIZED = {"rank": 1, "clusters": 1, "vocab_size": 1, "n_layer": 1, "n_embd": 1}
COUNTS = {"seed": 0, "steps": 1, "steps_per_epoch": 1, "batch_size": 1, "evaluations": 1,
          "block_size": 1, "n_head": 1, "step": 0, "tokens": 0, **SIZED}
REALS = {"cluster_size": 1, "lr": 0, "alpha": 0, "seconds": 0, "best": -1e300}
LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28, "mps": 1 << 26}  # how many exist at a time


@dataclass
class Run:
    """A run folder, the device, and which of how many processes this is."""

    folder: Path
    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1


# ------------------------------------------------------------------------------ loss and scores


def losses(model, tokens, targets, statistics=None, dtype=torch.float32):
    """Negative log-likelihood of each row's scored targets, summed: (B,), in nats.

    tokens (B, T), targets (B, T) with IGNORE where nothing is scored, statistics (B, C). Products
    are made in `dtype`; weights, sums and losses stay as they are. Training, validation and the
    final scores are all made of this one.
    """
    device = next(model.parameters()).device
    start = int((targets != IGNORE).any(dim=0).nonzero()[0])  # before it no logits are needed
    tokens, targets = tokens.to(device), targets[:, start:].to(device)
    statistics = None if statistics is None else statistics.to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model(tokens, statistics, start=start)  # (B, T - start, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # 16 bits are too coarse
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE,
                           reduction="none")  # (B (T - start),)
    return each.view(len(tokens), -1).sum(dim=1)


def chunks(index, run, config):
    """Parts of index (B,) of so many rows that the logits of a part fit into memory."""
    size = max(1, LOGITS[run.device.type] // (config.block_size * config.vocab_size))
    return index.split(size) if len(index) else ()


def backward(run, model, rows, index, statistics, whole):
    """Gradients of the mean loss over the scored tokens of the rows index (B,), chunk by chunk.

    Each chunk's gradients are added to the others', and its logits are freed: what is kept of the
    (B, T, V) logits is one chunk. Of several processes each takes its part of the rows.
    """
    config = getattr(model, "module", model).config  # DistributedDataParallel's is within it
    n_scored = int((rows.length - (1 if whole else rows.prompt))[index].sum())
    mine, share = torch.arange(len(index))[run.rank::run.world], run.world / n_scored
    if not len(mine):  # fewer rows than processes: all must take part, this one for nothing
        mine, share = torch.zeros(1, dtype=torch.int64), 0.0
    parts = chunks(mine, run, config)
    for part in parts:
        told = None if statistics is None else statistics[part]
        with nullcontext() if part is parts[-1] or run.world == 1 else model.no_sync():
            nll = losses(model, *rows.batch(index[part], whole), told, run.dtype).sum()
            (share * nll).backward()


@torch.no_grad()
def score(run, model, rows, statistics=None, whole=False):
    """The metric: losses (N,) of all rows, summed over each row's scored tokens, and how many (N,).

    statistics (N, C) is what each row is told. No score depends on the rows beside it in a batch.
    """
    nll = torch.zeros(len(rows), dtype=torch.float64)
    count = rows.length - (1 if whole else rows.prompt)
    order = rows.length.argsort(stable=True)[run.rank::run.world]  # little padding in a batch
    for index in chunks(order, run, model.config):
        told = None if statistics is None else statistics[index]
        nll[index] = losses(model, *rows.batch(index, whole), told, run.dtype).double().cpu()
    if run.world > 1:
        nll = nll.to(run.device, torch.float32 if run.device.type == "mps" else torch.float64)
        dist.all_reduce(nll)
    return nll.cpu(), count


# ------------------------------------------------------------------------------------ the loop


def learning_rate(step, total, peak):
    """Linear warm-up over the first 5% of `total` steps, then a cosine down to 10% of `peak`."""
    warmup = max(1, round(0.05 * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def fit(run, path, model, plan, rows, batches, statistics, evaluate):
    """Train what of `model` is not frozen; write its best weights, by validation loss, to `path`.

    plan: dict of everything that shapes the training, kept with the weights; rows: see data.py;
    batches(epoch) -> index tensors; statistics(index) -> (B, C) or None; evaluate() -> losses and
    counts as `score` returns them. Goes on where the state beside `path` was left.
    """
    name = f"{plan['method']}, seed {plan['seed']}"
    whole, total = plan["method"] == "base", plan["steps"]
    evaluate_after = {round(total * (i + 1) / plan["evaluations"])
                      for i in range(plan["evaluations"])}
    state_path, log = path.with_suffix(".state"), run.folder / "metrics.jsonl"

    # An adapter is small and decays nothing; a base decays its matrices.
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() > 1],
               "weight_decay": 0.1 if whole else 0.0},
              {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=run.device.type != "mps")

    # Resume: weights, moments, the step and the best weights so far say all. Batches follow from
    # seed and epoch, and nothing else is drawn.
    done = {"step": 0, "tokens": 0, "seconds": 0.0, "best": None}
    best = {}
    if state_path.exists():
        tensors, _, reached = read_checkpoint(state_path)
        if reached.keys() != done.keys():
            raise UserError(f"{state_path} is damaged: its header does not say how far it got")
        done = reached
        load_weights(model, under("model.", tensors), state_path)
        best = under("best.", tensors)
        moments = {i: under(f"moments.{i}.", tensors) for i in range(len(parameters))}
        shapes = [{n: t.shape for n, t in m.items()} for m in moments.values()]
        if shapes != [{"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                     for group in optimizer.param_groups for p in group["params"]]:
            raise UserError(f"{state_path} is damaged: its moments do not fit this model")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        print(f"{name}: going on from step {done['step']} of {total}")

    def save_state():
        if run.rank == 0:
            tensors = {f"model.{n}": t for n, t in weights(model).items()}
            tensors |= {f"best.{n}": t for n, t in best.items()}
            for i, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"moments.{i}.{n}": t for n, t in moments.items()}
            write_tensors(state_path, tensors, {"plan": plan, "done": done})

    if run.rank == 0:  # what was recorded after the state was saved is about to come again
        records = read_records(run.folder)
        kept = [r for r in records if (r["method"], r["seed"]) != (plan["method"], plan["seed"])
                or r["step"] <= done["step"]]
        write_text(log, "".join(json.dumps(record) + "\n" for record in kept))

    objective = model
    if run.world > 1:  # gradients become the mean of all processes'
        objective = DistributedDataParallel(model)
    bar = tqdm(total=total, initial=done["step"], desc=name, unit="step",
               disable=True if run.rank else None)  # None: no bar where there is no terminal
    epoch, saved = None, time.perf_counter()
    for step in range(done["step"], total):
        if step // plan["steps_per_epoch"] != epoch:
            epoch = step // plan["steps_per_epoch"]
            drawn = batches(epoch)
        index = drawn[step % plan["steps_per_epoch"]]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, plan["lr"])

        # ---- one step
        started = time.perf_counter()
        model.train()
        backward(run, objective, rows, index, statistics(index), whole)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # ----

        done["seconds"] += time.perf_counter() - started
        done["step"] += 1
        done["tokens"] += int(rows.length[index].sum())
        bar.update()
        if done["step"] in evaluate_after:
            model.eval()
            nll, count = evaluate()
            loss = float(nll.sum() / count.sum())
            if not math.isfinite(loss):
                raise UserError(f"{name}: the loss is {loss} at step {done['step']}; lower "
                                f"{'--base-lr' if whole else '--lr'}, with another --out")
            blind = math.log(model.config.vocab_size)
            worse = f", worse than blind guessing ({blind:.1f}): lower the rate" * (loss > blind)
            bar.write(f"{name}: step {step + 1}/{total}, validation loss {loss:.4f}{worse}")
            if done["best"] is None or loss < done["best"]:
                done["best"] = loss
                best = {n: t.detach().clone() for n, t in weights(model).items()}
            if run.rank == 0:
                record = {"method": plan["method"], "seed": plan["seed"], "step": done["step"],
                          "tokens": done["tokens"], "loss": loss}
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
        if done["step"] in evaluate_after or time.perf_counter() - saved > 60:
            save_state()
            saved = time.perf_counter()
    bar.close()
    if run.rank == 0:
        write_tensors(path, best, {"plan": plan, "done": done})
        state_path.unlink()
    if run.world > 1:
        dist.barrier()
    print(f"{name}: validation loss {done['best']:.4f}, {done['tokens'] / done['seconds']:,.0f} "
          f"tokens/s")


def read_checkpoint(path):
    """Tensors, plan and progress in a file that `fit` wrote; UserError for what it cannot have
    written, so that nobody need ask again."""
    tensors, info = read_tensors(path)
    plan, done = info.get("plan"), info.get("done", {})
    config = plan.get("config", {}) if isinstance(plan, dict) else None
    if not all(isinstance(part, dict) for part in (plan, done, config)):
        raise UserError(f"{path} is damaged, or no program here wrote it: its header has no plan")
    most = max(1 << 12, sum(tensor.numel() for tensor in tensors.values()))
    for name, value in (plan | config | done).items():
        low, high = (COUNTS | REALS).get(name, 0), most if name in SIZED else 1 << 53
        types = {int} if name in COUNTS else {int, float}
        known = name in COUNTS or (name in REALS and (name, value) != ("best", None))  # none so far
        if known and not (type(value) in types and low <= value <= high):
            raise UserError(f"{path} is damaged: its header says {name} = {str(value)[:40]}")
    return tensors, plan, done


def under(prefix, tensors):
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def weights(model):
    """What a checkpoint holds: the trained parameters, and what a chameleon head remembers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


@torch.no_grad()
def load_weights(model, tensors, path):
    wanted = weights(model)
    odd = {(n, t.shape, t.dtype) for n, t in wanted.items()} ^ {
        (n, t.shape, t.dtype) for n, t in tensors.items()}
    if odd:
        name = min(name for name, _, _ in odd)
        raise UserError(f"{path} is of another setting: {name} does not fit this model")
    for name, tensor in tensors.items():
        wanted[name].copy_(tensor)


def check_before(run, path, plan, resume):
    """UserError rather than overwrite what `plan` did not make, or what was interrupted and is not
    to be resumed."""
    state_path = path.with_suffix(".state")
    for existing in (path, state_path):
        if existing.exists():
            made_with = read_checkpoint(existing)[1]
            for key in plan:
                if made_with.get(key) != plan[key]:
                    raise UserError(f"{existing} was made with {key} = {made_with.get(key)}, not "
                                    f"{plan[key]}; choose another --out, or delete that file")
    if path.exists() and run.rank == 0:  # a kill came between the last two things that `fit` does
        state_path.unlink(missing_ok=True)
    elif state_path.exists() and not resume:
        raise UserError(f"{state_path} is an interrupted training; add --resume to go on with it, "
                        f"choose another --out, or delete that file")


def read_records(folder):
    """Records of metrics.jsonl. A torn last line, such as a kill can leave, does not count."""
    path, records = folder / "metrics.jsonl", []
    wanted = {"method", "seed", "step", "tokens", "loss"}
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and wanted <= record.keys() and all(
                type(record[n]) in (int, float) for n in wanted - {"method"}):
            records.append(record)
    return records


def plan_steps(n_rows, batch_size, epochs, evaluations, limit=math.inf):
    per_epoch = -(-n_rows // batch_size)
    steps = min(max(1, round(epochs * per_epoch)), limit)
    return {"batch_size": batch_size, "steps": steps, "steps_per_epoch": per_epoch,
            "evaluations": min(evaluations, steps)}


def generator(seed, epoch=0):
    """The same draws for the same seed and epoch: nothing to save for resuming."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)


# ------------------------------------------------------------------------------------- the base


def base_plan(args, tokenizer, text, n_rows):
    """Everything that shapes a base's training; text: the fingerprint of what it reads."""
    config = GPTConfig(args.block_size, tokenizer.vocab_size, **SIZES[args.size])
    return {"method": "base", "seed": 0, "lr": args.base_lr, "config": asdict(config), "text": text,
            "asked_vocab_size": args.vocab_size,
            **plan_steps(n_rows, BASE_BATCH_SIZE, args.base_epochs, args.evaluations)}


def train_base(run, path, plan, train, validation):
    """Train a base from scratch on whole rows, prompts included."""
    torch.manual_seed(plan["seed"])
    model = GPT(GPTConfig(**plan["config"])).to(run.device)
    fit(run, path, model, plan, train,
        lambda epoch: shuffled_batches(train.length, plan["batch_size"], generator(0, epoch)),
        lambda index: None, lambda: score(run, model, validation, whole=True))


def base_path(folder, config):
    """Where a run's base lies: in its own folder, or where config.json says."""
    return Path(config["base"]) if config["base"] else Path(folder) / "base.safetensors"


def load_base(path, device):
    """The frozen base in a file that train.py wrote, or in a folder of GPT-2's weights."""
    if Path(path).is_dir():
        model = load_gpt2(path)
    else:
        tensors, plan, _ = read_checkpoint(path)
        sizes = plan.get("config", {})
        if sizes.keys() != asdict(GPTConfig()).keys():
            raise UserError(f"{path} holds no base; name a base.safetensors or a GPT-2's folder")
        L, C, words = sizes["n_layer"], sizes["n_embd"], sizes["vocab_size"] + sizes["block_size"]
        most = sum(t.numel() for t in tensors.values())
        if C % sizes["n_head"] or 12 * L * C * C + words * C > most:
            raise UserError(f"{path} is damaged: its header says {sizes}")
        model = GPT(GPTConfig(**sizes))
        load_weights(model, tensors, path)
    return model.to(device).requires_grad_(False).eval()


def fingerprint(model):
    """An adapter remembers its base's: it fits no other."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(name.encode() + p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------- the adapters


def make_adapter(base, plan):
    """The frozen base with the untrained adapters of plan["method"]; its logits are the base's."""
    device, rank, alpha = base.lm_head.weight.device, plan["rank"], plan["alpha"]
    model = add_lora(base, rank, alpha)
    if plan["method"] == "chameleon":
        model.lm_head = ChameleonHead(model.transformer.wte.weight, rank, alpha, plan["clusters"])
    else:
        model.lm_head = LoRAHead(model.transformer.wte.weight, rank, alpha)
    return model.to(device)


def n_trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_plan(args, base, base_fingerprint, method, seed, n_rows):
    """Everything that shapes an adapter's training, as its file will remember it."""
    plan = {"method": method, "seed": seed, "base": base_fingerprint, "rank": args.rank,
            "alpha": args.alpha, "block_size": args.block_size, "lr": args.lr or RATES[method],
            **plan_steps(n_rows, args.batch_size, args.epochs, args.evaluations, args.max_steps)}
    told = {"clusters": max(1, round(n_rows / args.cluster_size)),
            "cluster_size": args.cluster_size, "batches": args.batches}
    if method == "lora-match":  # LoRA whose rank gives it as many parameters as chameleon
        chameleon = n_trained(make_adapter(base, plan | told | {"method": "chameleon"}))
        plan["rank"] = max(1, round(chameleon / n_trained(make_adapter(base, plan | {"rank": 1}))))
        plan["alpha"] = args.alpha / args.rank * plan["rank"]
    return plan | told if method == "chameleon" else plan


def held_out_clusters(head, means, plan):
    """Cluster (N,) of held-out prompts, means (N, C): k-means on the requests at hand."""
    k = max(1, round(len(means) / plan["cluster_size"]))
    return kmeans(features(means, head.center.cpu()), k, generator(plan["seed"]))[1]


def train_adapter(run, path, base, plan, train, validation):
    """Train one adapter on the continuations of the training split."""
    torch.manual_seed(plan["seed"])
    model, seed, size = make_adapter(base, plan), plan["seed"], plan["batch_size"]
    told = held_out = None

    if plan["method"] == "chameleon":
        head, embedding = model.lm_head, base.transformer.wte.weight
        means, count = prompt_means(train, embedding)
        points = features(means, means.mean(dim=0)).to(run.device)
        cluster = kmeans(points, plan["clusters"], generator(seed))[1].cpu()
        head.remember(means, cluster_means(means, count, cluster, plan["clusters"]))
        told = cluster_statistics(means, count, cluster)  # (N, C)
        their_means, their_count = prompt_means(validation, embedding)
        theirs = held_out_clusters(head, their_means, plan)
        held_out = cluster_statistics(their_means, their_count, theirs)

    def batches(epoch):
        if plan.get("batches") == "clustered":
            return cluster_batches(cluster, size, generator(seed, epoch))
        return shuffled_batches(train.length, size, generator(seed, epoch))

    def statistics(index):
        if told is None:
            return None
        if plan["batches"] == "shuffled":
            return told[index]
        # The paper's: the statistic of what of the cluster is in the batch.
        return cluster_statistics(means[index], count[index], cluster[index])

    fit(run, path, model, plan, train, batches, statistics,
        lambda: score(run, model, validation, held_out))


def load_adapter(base, base_fingerprint, path):
    """The base with the adapter in `path` on it, and the plan that trained it."""
    tensors, plan, _ = read_checkpoint(path)
    if plan.get("base") != base_fingerprint:
        raise UserError(f"{path} is not an adapter of this base")
    name = f"{plan.get('method')}-seed{plan.get('seed')}"
    wanted = {"rank", "alpha", *(("clusters", "cluster_size") if "chameleon" in name else ())}
    if path.stem != name or not wanted <= plan.keys():
        raise UserError(f"{path} holds {name} and not what its name says, or is damaged")
    model = make_adapter(base, plan)
    load_weights(model, tensors, path)
    return model.eval(), plan


# ---------------------------------------------------------------------------------------- main


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or "default" in action.help
        return action.help if silent else super()._get_help_string(action)


def number(kind, low, high):
    """An argparse type: an int or a float from `low` to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low} to {high}, not {text!r}")
        return value

    return parse


def some(kind, text):
    """A list of what stands between commas, each checked by `kind`, none twice."""
    return list(dict.fromkeys(kind(part) for part in text.split(",")))


def method(text):
    if text not in RATES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(RATES)}")
    return text


def make_parser():
    parser = Parser(prog="train.py", formatter_class=Help,
                    description="Train a small GPT, then LoRA and ChameleonLLM adapters on it.")
    add, count = parser.add_argument, number(int, 1, 2**31)
    rate = number(float, 1e-9, 100)
    add("--dataset", default="python", help="what the adapters learn: python (text that comes with "
        "it, no network), wikitext2, alpaca, a .txt, .json or .jsonl file or a folder of them, or "
        "several with commas between them")
    add("--data-dir", default="data", help="where data sets and weights are looked for, and kept "
        "when fetched")
    add("--base", default="auto", help="scratch: train one; gpt2, gpt2-medium...: OpenAI's; a "
        "folder with such weights; another run's base.safetensors. auto: gpt2 where there is a GPU "
        "and the weights can be had (not for --dataset python), else scratch")
    add("--base-dataset", default="pydocs", help="what a base from scratch, and its tokenizer, "
        "learn: better other text than the adapters', or these have nothing to learn")
    add("--size", choices=SIZES, default="nano", help="of a base from scratch")
    add("--methods", type=lambda text: some(method, text), default="lora,lora-match,chameleon",
        metavar="M,M", help="which adapters; lora-match has as many parameters as chameleon")
    add("--seeds", type=lambda text: some(number(int, 0, 2**31), text), default="0", metavar="N,N",
        help="an adapter of each method for each: initial values, batches, k-means; a base has 0")
    add("--out", help="run folder (default: runs/DATASET)")
    add("--resume", action="store_true", help="go on with what --out holds, with its settings")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of matrix products; auto takes what is fast, and says why")
    add("--block-size", type=number(int, 4, 1 << 20), default=256, metavar="T",
        help="tokens in a row")
    add("--vocab-size", type=number(int, 257, 1 << 20), default=4096, metavar="V",
        help="of the tokenizer of a base from scratch")
    add("--base-lr", type=rate, default=3e-3, help="peak learning rate of the base")
    add("--base-epochs", type=number(float, 1e-9, 1e6), default=2.0, help="its passes over text")
    add("--lr", type=rate, help="of the adapters (default: each method's own, "
        f"{', '.join(f'{name} {value:g}' for name, value in RATES.items())})")
    add("--epochs", type=number(float, 1e-9, 1e6), default=1.0, help="the adapters' passes")
    add("--max-steps", type=count, default=60, help="but at most so many steps of an adapter")
    add("--batch-size", type=count, default=16, metavar="B", help="rows in an adapter's batch")
    add("--batches", choices=("shuffled", "clustered"), default="shuffled", help="chameleon's: any "
        "rows, each with the statistic of its cluster, or the paper's, each of one cluster (as far "
        "as --cluster-size fills them)")
    add("--cluster-size", type=count, default=8, metavar="N", help="rows in a cluster, on average")
    add("--rank", type=count, default=4, metavar="r", help="of every low-rank update")
    add("--alpha", type=number(float, 1e-9, 1e9), default=8.0, help="updates scale by alpha / rank")
    add("--evaluations", type=count, default=5, help="validations in a training")
    return parser


def parse(argv):
    """The arguments; with --resume those of the run, but for what is given now."""
    parser = make_parser()
    args = parser.parse_args(argv)
    names = [Path(name).resolve() for name in args.dataset.split(",")]
    args.out = args.out or "runs/" + "-".join(p.stem if p.is_file() else p.name for p in names)
    if Path(args.out).resolve() in names:
        raise UserError(f"--out {args.out} is a folder of text; choose another for what is made")
    try:
        "".join(map(str, vars(args).values())).encode()
    except UnicodeEncodeError:  # no page and no JSON could name it
        raise UserError("a name that is not UTF-8 stands among the flags; rename that file "
                        "or folder") from None
    if args.resume:
        kept = read_config(args.out)
        parser.set_defaults(**kept["args"] | {"base": kept["base"] or "scratch"}, out=args.out)
        args = parser.parse_args(argv)
    return args


def read_config(folder):
    """config.json of a run folder: settings, the data's fingerprint, the base's place."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{folder} holds no run; train one first: python train.py")
    config = parse_json(read_text(path), path)
    flags = vars(make_parser().parse_args([])).keys() - OF_A_CALL
    wanted = {"args": dict, "data": str, "base": str, "read": str, "instructions": bool}
    if not (isinstance(config, dict)
            and all(isinstance(config.get(name), kind) for name, kind in wanted.items())
            and config["args"].keys() == flags):
        raise UserError(f"{path} is not what this train.py wrote")
    given = [f"--{name.replace('_', '-')}="
             + (",".join(map(str, value)) if isinstance(value, list) else str(value))
             for name, value in config["args"].items() if value is not None]
    try:  # what a flag may not be, a file may not say
        same = (vars(make_parser().parse_args(given)).items() >= config["args"].items()
                and config["args"]["dtype"] != "auto")
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not same:
        raise UserError(f"{path} is damaged: it has settings that train.py spells otherwise")
    return config


def choose_base(args, device):
    """What --base auto stands for, and why."""
    if args.base != "auto":
        return args.base, "asked for"
    if args.dataset == "python":
        return "scratch", "the default for --dataset python"
    if device.type != "cuda":
        return "scratch", "there is no GPU"
    try:
        find_gpt2("gpt2", args.data_dir)
    except UserError as error:
        return "scratch", str(error)
    return "gpt2", "there is a GPU, and the weights are at hand"


def join_processes(run):
    """Take the place among the processes that torchrun has started, if it has."""
    if "LOCAL_RANK" not in os.environ:
        return
    local = int(os.environ["LOCAL_RANK"])
    if run.device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"torchrun: there is no GPU for process {local}; start fewer")
        run.device = torch.device("cuda", local)
        torch.cuda.set_device(run.device)
    dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
    run.rank, run.world = dist.get_rank(), dist.get_world_size()
    if run.rank:  # the first speaks for all
        sys.stdout = open(os.devnull, "w")


def main(argv=None):
    """Train what the arguments ask for; returns the run folder's path."""
    args = parse(argv)
    keep_freed_memory()
    with only_writer(args.out):
        return train(args)


def train(args):
    """Read and check everything, then train."""
    device, why_device = choose_device(args.device)
    run = Run(Path(args.out), device)
    join_processes(run)
    run.dtype, why_dtype = choose_dtype(args.dtype, device)
    if run.world > 1:  # it may have been measured: all take what the first has found
        box = [run.dtype]
        dist.broadcast_object_list(box)
        run.dtype = box[0]
    args.dtype = str(run.dtype).removeprefix("torch.")  # so that a resumed run computes as before
    print(f"device {run.device}: {why_device}; {args.dtype}: {why_dtype}")

    # ---- First everything is read and checked: until then nothing is written.
    args.base, why_base = choose_base(args, device)
    scratch, own = args.base == "scratch", run.folder / "base.safetensors"
    place = own if scratch else Path(args.base)
    if args.base in HUB_BASES:
        place = find_gpt2(args.base, args.data_dir)
    if not scratch and (place / "base.safetensors").exists():  # a run folder
        place /= "base.safetensors"
    if not scratch and not place.exists():
        raise UserError(f"--base {args.base}: neither scratch, auto, {', '.join(HUB_BASES)} nor a "
                        f"folder or file")
    base = load_base(place, run.device) if place.exists() else None
    documents, data = load_documents(args.dataset, args.data_dir)
    if (run.folder / "config.json").exists():
        before = read_config(run.folder)
        if before["data"] != data:
            raise UserError(f"{run.folder} is a run on other text than --dataset {args.dataset} "
                            f"has now; choose another --out")
        if before["base"] != ("" if scratch else str(place.resolve())):
            raise UserError(f"{run.folder} is a run on another base, {before['base'] or own}; "
                            f"choose another --out")
    if scratch:
        base_documents, base_text = load_documents(args.base_dataset, args.data_dir)
    if place.is_dir():
        tokenizer = Tokenizer({"name": "gpt2"})
    elif not scratch or own.exists() or own.with_suffix(".state").exists():
        tokenizer = Tokenizer.load(place.parent / "tokenizer.json")
    else:
        texts = (d.prompt + d.text for d in base_documents["train"])
        tokenizer = Tokenizer.learn(texts, args.vocab_size)

    def rows_of(documents):
        return [cut(documents[split], tokenizer, args.block_size)
                for split in ("train", "validation")]

    rows, validation = rows_of(documents)
    if scratch:
        base_rows = rows_of(base_documents)
        plan = base_plan(args, tokenizer, base_text, len(base_rows[0]))
        check_before(run, own, plan, args.resume)
    paths = {(name, seed): run.folder / "adapters" / f"{name}-seed{seed}.safetensors"
             for name in args.methods for seed in args.seeds}
    others = {}
    for path in (run.folder / "adapters").glob("*-seed*.safetensors"):
        name, _, seed = path.stem.partition("-seed")
        others |= {(name, int(seed)): path} if name in RATES and seed.isdecimal() else {}

    def plan_of(name, seed):
        return adapter_plan(args, base, mark, name, seed, len(rows))

    if base is not None:
        if args.block_size > base.config.block_size or (
                base.config.vocab_size != tokenizer.vocab_size):
            raise UserError(f"--base {place} reads rows of {base.config.block_size} tokens at "
                            f"most, of {base.config.vocab_size} kinds; --block-size is "
                            f"{args.block_size}, and the tokenizer knows {tokenizer.vocab_size}")
        mark = fingerprint(base)
        for (name, seed), path in (others | paths).items():
            # One table is of one setting: what other calls have made is checked too.
            free = () if name in args.methods else ("lr", "clusters", "cluster_size", "batches")
            wanted = {k: v for k, v in plan_of(name, seed).items() if k not in free}
            check_before(run, path, wanted, args.resume)
    elif others:
        raise UserError(f"{run.folder / 'adapters'} has adapters of a base that is gone; choose "
                        f"another --out, or delete that folder")
    read = args.base_dataset if scratch else str(place)
    if not scratch and place.is_file():
        with suppress(UserError):  # where it lies in its run's folder, that tells
            read = read_config(place.parent)["read"]
    print(f"the base has read: {read} ({why_base}); the adapters will read: {args.dataset}, "
          f"{len(rows):,} rows, {rows.length.sum():,} tokens")
    kind = torch.tensor([d.kind for d in documents["train"]])[rows.document]  # (N,)
    shares = kind.bincount(weights=rows.length) / rows.length.sum()
    if len(shares) > 1:
        print("of which " + ", ".join(f"{name} {share:.0%}" for name, share in
                                      zip(kinds(args.dataset), shares.tolist(), strict=True)))

    # ---- Then it is written down, and trained.
    if run.rank == 0:
        kept = {k: v for k, v in vars(args).items() if k not in OF_A_CALL}
        write_json(run.folder / "config.json", {
            "args": kept, "data": data, "base": "" if scratch else str(place.resolve()),
            "read": read, "instructions": any(d.prompt for d in documents["train"])})
        write_json(run.folder / "tokenizer.json", tokenizer.spec)
    if base is None:
        train_base(run, own, plan, *base_rows)
        base = load_base(own, run.device)
        mark = fingerprint(base)
    for key, path in paths.items():
        if path.exists():
            print(f"{path}: trained before")
        else:
            train_adapter(run, path, base, plan_of(*key), rows, validation)
    if run.world > 1:
        dist.destroy_process_group()
    print(f"done; the table and the figures: python eval.py {run.folder}")
    return run.folder


if __name__ == "__main__":
    run_cli(main)
