"""Train the base model, then one adapter after the other on the same frozen base.

    python -m lab.run train                                 # the Python documentation, no network
    python -m lab.run train --dataset wikitext2 --seeds 0,1,2
    python -m lab.run train --resume --out runs/wikitext2   # go on after Ctrl-C, exactly

A run folder holds
    config.json, tokenizer.json          what was asked for
    base.safetensors                     the frozen base (best by validation loss)
    adapters/NAME.safetensors            an adapter's weights, best by validation loss
    adapters/NAME.last.safetensors       the same after its last step: the training has finished
    shared/                              heads of --trunk shared, likewise
    grid/, grid.json                     trainings that choose a learning rate, and what they reach
    *.state.safetensors                  an unfinished training: weights, optimizer, generators
    metrics.jsonl                        one record per evaluation
    cache/                               tokens, memory-mapped
"""

import json
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import UserError, read_tensors, write_json, write_tensors, write_text
from lab.cluster import cluster_batches
from lab.common import (Run, adapt, adapter_path, choose_device, choose_dtype, has_finished,
                        join_processes, keep_freed_memory, label, load_base, load_weights,
                        matrix_rate, memory_advice, n_trained, open_corpus, read_plan, read_records,
                        share_trunk, wait, weights)
from lab.data import IGNORE, Tokenizer, load_examples
from lab.flags import ALONE, CONDITIONS, HUB_BASES, OF_A_CALL, TOLD_NOTHING, parse_train, read_json
from lab.interop import find_gpt2, load_gpt2
from lab.model import GPT, SIZES, GPTConfig
from lab.scoring import Company, held_out_company, losses, score, scored_bytes, summed

# ------------------------------------------------------------------------------------ training


def learning_rate(step, total, peak):
    """Linear warm-up over the first 5% of `total` steps, then a cosine down to 10% of `peak`."""
    warmup = max(1, round(0.05 * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


@contextmanager
def interruptible():
    """Yield a function that says whether Ctrl-C or SIGTERM has come; a second one acts at once."""
    came = []

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)
        print("\nstopping after this step ...", file=sys.stderr)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def parameter_groups(model):
    """AdamW's groups. A base decays its matrices; adapters are small and decay nothing."""
    groups, is_base = {}, model.lm_head.weight.requires_grad
    for name, p in model.named_parameters():
        group = "matrices" if p.dim() > 1 else "biases and norms"
        if not is_base:
            head = name.startswith("lm_head")
            group = type(model.lm_head).__name__ if head else "LoRA in the transformer"
        if p.requires_grad:
            groups.setdefault(group, []).append(p)
    return [dict(name=name, params=params, weight_decay=0.1 if name == "matrices" else 0.0)
            for name, params in groups.items()]


def flops_per_token(model, scored):
    """Operations that training on a token takes: two per weight and pass, and attention's.

    The backward pass repeats them for the gradients of what each layer reads and, in a base, of
    its weights; an adapter's own matrices are too small to count. scored: the share of tokens
    that need logits.
    """
    config, passes = model.config, 3 if model.lm_head.weight.requires_grad else 2
    weights = 12 * config.n_layer * config.n_embd**2 + scored * config.vocab_size * config.n_embd
    attention = 2 * config.n_layer * config.block_size * config.n_embd  # half of it is masked
    return 2 * weights * passes + 3 * attention


class Diverged(UserError):
    """The loss is no number; in a grid another learning rate may do better."""


class Objective(nn.Module):
    """A batch's summed loss as the one module that DistributedDataParallel asks for."""

    def __init__(self, run, model):
        super().__init__()
        self.run, self.model = run, model

    def forward(self, *batch):
        with self.run.autocast:
            return losses(self.model, *batch)[0]


def upcoming(run, plan, step, load, n_scored, cluster):
    """What each step from `step` on needs: its number of scored tokens, of tokens, and its batches.

    The batches are those of this process: number i of a step goes to process i modulo their
    number. One that gets none computes the first, for nothing, as all have to take part. Unless
    clusters make the batches, a step's rows are dealt to them by length.
    """
    epoch, length = None, run.examples["train"].length
    while step < plan["steps"]:
        if step // plan["steps_per_epoch"] != epoch:
            epoch = step // plan["steps_per_epoch"]
            epoch_batches = shuffled(len(length), plan["batch_size"], plan["seed"], epoch, cluster)
        first = step % plan["steps_per_epoch"] * plan["accumulate"]
        together = epoch_batches[first : first + plan["accumulate"]]
        index = torch.cat(together)
        if cluster is None and len(together) > 1:  # like lengths together: little padding
            order = torch.from_numpy(length[index]).argsort(stable=True)
            together = index[order].split(plan["batch_size"])
        mine = [(i, 1.0) for i in range(run.rank, len(together), run.world)] or [(0, 0.0)]
        loaded = [(i, share, load(together[i])) for i, share in mine]
        yield int(n_scored[index].sum()), int(length[index].sum()), loaded
        step += 1


def ahead(items):
    """`items`, each made in a thread while the one before it is in use."""
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item


def fit(run, args, path, model, plan, load, n_scored, evaluate, cluster=None):
    """Train `model`'s trainable parameters; best weights go to `path`, and are loaded at the end.

    plan: JSON of everything that shapes the training; load(index) -> tokens, targets, statistics
    and cluster as `losses` takes them; n_scored (N,), each example's scored tokens; evaluate() ->
    what `score` returns for the validation split; cluster (N,): a batch comes from one of these.
    """
    if args.compile and not plan.get("trunk"):
        for block in model.transformer.h:  # in place: keys stay, and all share one compilation
            block.compile()
    state_path = path.with_suffix(".state.safetensors")
    last_path = path.with_suffix(".last.safetensors")
    name, total = f"{label(plan)}, seed {plan['seed']}", plan["steps"]
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.95),
                                  fused=run.device.type in ("cpu", "cuda"))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # float16 has no room for small gradients: losses are scaled up, gradients down again.
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    for group in optimizer.param_groups:
        print(f"  {name}: {sum(p.numel() for p in group['params']):,} parameters, "
              f"{group['name']}, weight decay {group['weight_decay']}")
    done = {"step": 0, "tokens": 0, "seconds": 0.0, "best": math.inf}
    if state_path.exists():
        tensors, info = read_tensors(state_path)
        done = info["done"]
        load_weights(model, under(tensors, "model."), state_path)
        moments = {i: under(tensors, f"optimizer.{i}.") for i in range(len(parameters))}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        scaler.load_state_dict(info.get("scaler", {}))
        print(f"  {name}: going on from step {done['step']} of {total}")

    def save(path, tensors, **info):
        if run.rank == 0:
            write_tensors(path, tensors, {"plan": plan, "done": done, **info})

    def save_state():
        moments = {f"optimizer.{i}.{key}": tensor
                   for i, state in optimizer.state_dict()["state"].items()
                   for key, tensor in state.items()}
        current = {f"model.{n}": tensor for n, tensor in weights(model).items()}
        save(state_path, current | moments, scaler=scaler.state_dict())

    objective = Objective(run, model)
    if run.world > 1:
        objective = DistributedDataParallel(objective, forward_sync_buffers=False)
    training = {"method": label(plan), "seed": plan["seed"], "lr": plan["lr"],
                "trunk": "shared" if plan.get("trunk") else "joint"}
    log = run.folder / "metrics.jsonl"
    if run.rank == 0:  # what comes after the state is about to be written again
        kept = [r for r in read_records(run.folder)
                if training.items() - r.items() or r["step"] <= done["step"]]
        write_text(log, "".join(json.dumps(record) + "\n" for record in kept))
    evaluate_at = {round(total * (i + 1) / plan["evaluations"]) for i in range(plan["evaluations"])}
    steps = upcoming(run, plan, done["step"], load, n_scored, cluster)
    if run.device.type != "cpu":  # a CPU has nothing better to do meanwhile
        steps = ahead(steps)
    bar = tqdm(total=total, initial=done["step"], desc=name, unit="step",
               disable=True if run.rank else None)
    # torchrun stops its processes itself, and a file that is not written stays as it was.
    one = interruptible() if run.world == 1 else nullcontext(lambda: False)
    with one as stopped, bar:
        started = time.perf_counter()
        for n_step, n_read, mine in steps:
            rate = learning_rate(done["step"], total, plan["lr"])
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            for turn, (i, share, batch) in enumerate(mine):
                # Dropout is drawn anew from here: nothing to save, and any process may do it.
                torch.manual_seed((plan["seed"] * total + done["step"]) * plan["accumulate"] + i)
                last = turn + 1 == len(mine)
                with nullcontext() if last or run.world == 1 else objective.no_sync():
                    nll = objective(*batch)
                    # DistributedDataParallel takes the mean over processes: make it the sum.
                    scaler.scale(nll * (share * run.world / n_step)).backward()
                nll = nll.detach()  # what hangs on it may go before the next batch comes
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            done["step"] += 1
            done["tokens"] += n_read
            if done["step"] % 10 == 0:  # reading the loss waits for the device
                loss = nll.item() / int((batch[1] != IGNORE).sum())
                seconds = done["seconds"] + time.perf_counter() - started
                bar.set_postfix_str(f"loss {loss:.3f}, {done['tokens'] / seconds:,.0f} tokens/s")
            bar.update()
            if done["step"] in evaluate_at:
                wait(run.device)
                done["seconds"] += time.perf_counter() - started
                result = summed(*evaluate())
                if not math.isfinite(result["loss"]):
                    raise Diverged(f"{name}: the loss is {result['loss']} at step {done['step']}; "
                                   f"lower --lr (for the base --base-lr) with another --out, or "
                                   f"after deleting {path.with_suffix('.*')}")
                record = {**training, "step": done["step"], "tokens": done["tokens"],
                          "split": "validation", **result}
                if run.rank == 0:
                    with open(log, "a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                bar.write(f"{name}: step {done['step']}/{total}, validation loss "
                          f"{result['loss']:.4f}")
                if result["loss"] < done["best"]:
                    done["best"] = result["loss"]
                    save(path, weights(model))
                save_state()
                started = time.perf_counter()
            if stopped() and done["step"] < total:
                done["seconds"] += time.perf_counter() - started
                save_state()
                raise KeyboardInterrupt
    save(last_path, weights(model))
    speed = done["tokens"] / done["seconds"] / run.world
    scored = n_scored.sum() / run.examples["train"].length.sum()  # the others need no logits
    share = speed * flops_per_token(model, scored) / matrix_rate(run.device, run.dtype)
    print(f"  {name}: {speed * run.world:,.0f} tokens/s, {share:.0%} of the rate of a large matrix "
          f"product here" + " in each process" * (run.world > 1))
    if run.rank == 0:
        state_path.unlink()
    if run.world > 1:
        dist.barrier()
    if stopped():
        raise KeyboardInterrupt
    load_weights(model, read_tensors(path)[0], path)
    return done["best"]


def under(tensors, prefix):
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def is_finished(path, plan, resume):
    """Whether `path` is trained already. Raises rather than overwrite what `plan` did not make."""
    state_path = path.with_suffix(".state.safetensors")
    finished = has_finished(path)
    for existing in (path, state_path):
        if existing.exists():
            made_with = {"accumulate": 1, "condition": CONDITIONS[1]}
            made_with |= read_tensors(existing)[1]["plan"]
            for key in plan:
                if made_with.get(key) != plan[key]:
                    raise UserError(f"{existing} was made with {key} = {made_with.get(key)}, not "
                                    f"{plan[key]}; choose another --out, or delete that file")
    if state_path.exists() and not finished and not resume:
        raise UserError(f"{state_path} is an interrupted training; add --resume to go on with it, "
                        f"choose another --out, or delete that file")
    return finished


def plan_steps(n_examples, batch_size, epochs, args):
    per_epoch = -(-n_examples // (batch_size * args.accumulate))
    steps = min(max(1, round(epochs * per_epoch)), args.max_steps or math.inf)
    return {"steps": steps, "steps_per_epoch": per_epoch, "accumulate": args.accumulate,
            "evaluations": min(args.evaluations, steps)}


def shuffled(n_examples, batch_size, seed, epoch, cluster=None):
    """Batches of one epoch, the same for the same seed and epoch: nothing to save for resuming."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
    if cluster is None:
        cluster = torch.zeros(n_examples, dtype=torch.int64)
    return cluster_batches(cluster, batch_size, generator)


# -------------------------------------------------------------------------------- base, adapters


def base_plan(run, args, config):
    """Everything that shapes the base's training, as its file will remember it."""
    return {
        "method": "base", "seed": 0, "lr": args.base_lr, "batch_size": args.base_batch_size,
        "tokenizer": run.tokenizer.fingerprint, "config": asdict(config),
        **plan_steps(len(run.examples["train"]), args.base_batch_size, args.base_epochs, args),
    }


def train_base(run, args, plan):
    """Train a base from scratch on whole rows, prompts included."""
    train, validation = run.examples["train"], run.examples["validation"]
    torch.manual_seed(0)
    model = GPT(GPTConfig(**plan["config"])).to(run.device)
    best = fit(run, args, run.folder / "base.safetensors", model, plan,
               lambda index: train.batch(index, whole=True), train.length - 1,
               lambda: score(run, model, validation, args.batch_size, whole=True))
    n_bytes = scored_bytes(validation, run.tokenizer.bytes_per_token(), whole=True)
    bits = best * (validation.length - 1).sum() / math.log(2)
    print(f"base: {bits / n_bytes:.4f} bits a byte on whole validation rows")


def adapter_plan(run, args, method, seed, lr):
    """Everything that shapes an adapter's training, as its file will remember it."""
    N = len(run.examples["train"])
    plan = {
        "method": method, "seed": seed, "base": run.base_fingerprint, "rank": args.rank,
        "alpha": args.alpha, "lr": lr, "batch_size": args.batch_size,
        **plan_steps(N, args.batch_size, args.epochs, args),
    }
    if args.trunk == "shared":
        plan["trunk"] = run.trunk
    if method == "lora-match":
        untold = type(args)(**vars(args) | {"told": None})
        chameleon = adapter_plan(run, untold, "chameleon", seed, lr)
        wanted, of_lora = (n_trained(adapt(run.base, of))
                           for of in (chameleon, plan | {"method": "lora"}))
        rank = max(1, round(args.rank * wanted / of_lora))
        plan |= {"rank": rank, "alpha": args.alpha / args.rank * rank}
    if method not in TOLD_NOTHING:
        cache = method == "company-cache"
        size = args.cluster_size or (12 if cache else args.batch_size)
        scope = args.stat_scope or ("running" if cache else "prompt")
        alone = method in ("per-sample", "task-embedding")
        k = 1 if alone or args.told == ALONE else -(-N // size)
        if k == 1 and args.told == "shuffled" and not alone:
            raise UserError("--told shuffled: there is one cluster alone; lower --cluster-size")
        plan |= {"clusters": k, "cluster_size": N / -(-N // size), "stat_scope": scope,
                 "inference": args.inference,
                 "condition": CONDITIONS[0] if method == "task-embedding" else args.condition}
        if args.told:
            plan["told"] = args.told
        if cache:
            plan["at_hand"] = args.at_hand
        if alone or method == "chameleon":
            plan["head_form"] = args.head_form
    return plan


def place_of(run, args, method, seed):
    """Path of an adapter, with what it was told in its name if that is a control."""
    told = f"-{args.told}" if args.told and method not in TOLD_NOTHING else ""
    return adapter_path(run, method + told, seed, args.trunk)


def grid_paths(run, args, method):
    """Where the first seed is trained at each of several learning rates: grid/."""
    stem = f"{args.trunk}-{place_of(run, args, method, args.seeds[0]).stem}"
    return {lr: run.folder / "grid" / f"{stem}-lr{lr:g}.safetensors" for lr in args.lr}


def choose_rate(run, args, method):
    """The learning rate of `args.lr` with the best validation loss at the first seed.

    The best is copied from grid/ to its place among the adapters; grid.json keeps the outcomes.
    """
    if len(args.lr) == 1:
        return args.lr[0]
    place, paths = place_of(run, args, method, args.seeds[0]), grid_paths(run, args, method)
    name, outcomes = f"{args.trunk} {place.stem}", {}
    for lr, path in paths.items():
        try:
            train_adapter(run, args, method, args.seeds[0], lr, path)
            outcomes[lr] = read_tensors(path)[1]["done"]["best"]
        except Diverged as error:
            print(error)
            if run.rank == 0:  # or the same command would find it unfinished
                for left in (path, path.with_suffix(".state.safetensors")):
                    left.unlink(missing_ok=True)
    if not outcomes:
        raise UserError(f"{name}: no rate of --lr gave a number; lower them")
    best = min(outcomes, key=outcomes.get)
    print(f"{name}: validation loss by learning rate: "
          + ", ".join(f"{lr:g} {loss:.4f}" for lr, loss in outcomes.items()))
    if run.rank == 0:
        grid = run.folder / "grid.json"
        write_json(grid, (read_json(grid) if grid.exists() else {}) | {name: outcomes})
    with run.first_goes_ahead():  # the others find what it has copied
        if not is_finished(place, adapter_plan(run, args, method, args.seeds[0], best), True):
            for suffix in (".safetensors", ".last.safetensors"):
                chosen = read_tensors(paths[best].with_suffix(suffix))
                write_tensors(place.with_suffix(suffix), *chosen)
    return best


def train_adapter(run, args, method, seed, lr, path):
    """Train one adapter on the continuations of the training split; best and last are kept."""
    plan = adapter_plan(run, args, method, seed, lr)
    if is_finished(path, plan, args.resume):
        print(f"{path.stem}: trained before")
        return
    examples = run.shared if args.trunk == "shared" else run.examples
    train, validation = examples["train"], examples["validation"]
    keep_freed_memory()
    torch.manual_seed(seed)
    model = adapt(run.base, plan)
    head, company, cluster = model.lm_head, None, None
    if head.needs_statistics:
        prompts = head.read(train.conditioned(plan), run.base.transformer.wte)
        generator = torch.Generator().manual_seed(seed)

        def group():
            with run.autocast:
                found = head.fit_clusters(prompts, plan.get("clusters", 1), generator)
            return found, {n: t.detach().to("cpu", copy=True) for n, t in weights(head).items()}

        settings = plan | {"lr": None}  # the rates of a grid start from one clustering
        if run.grouped[0] != settings:
            run.grouped = settings, run.from_first(group)
        found, start = run.grouped[1]
        head.load_state_dict(start, strict=False)
        company = Company(head, prompts, found, args.told, generator.manual_seed(seed))
        cluster = company.cluster if head.clustered_batches and not args.told else None
    held_out = held_out_company(run, model, validation, plan, plan.get("inference"), args.told)

    def load(index):
        if company is None:
            return train.batch(index)
        if cluster is None:
            return company.batch(train, index)
        return *train.batch(index), *company.among(index)

    keep_freed_memory()  # clustering's blocks are of other sizes than a step's
    fit(run, args, path, model, plan, load, train.length - train.prompt,
        lambda: score(run, model, validation, args.batch_size, held_out), cluster)


# ---------------------------------------------------------------------------------------- main


@memory_advice("halve --batch-size and double --accumulate, or lower --rank; or, with another "
               "--out, halve --base-batch-size or lower --block-size or --size")
def main(argv=None):
    """Train what the arguments ask for; returns the run folder's path."""
    args, before = parse_train(argv)
    keep_freed_memory()
    device, why_device = choose_device(args.device)
    rank, world, device = join_processes(device)
    run = Run(Path(args.out), device, rank=rank, world=world)
    run.dtype, why_dtype = run.from_first(lambda: choose_dtype(args.dtype, device))
    args.dtype = str(run.dtype).removeprefix("torch.")  # so that a resumed run computes as before
    print(f"device {device}: {why_device}; {args.dtype}: {why_dtype}; "
          f"{torch.get_num_threads()} threads" + f", {world} processes" * (world > 1))
    args.accumulate = args.accumulate or world

    # First everything is checked: until then the folder gets a cache of tokens and nothing else.
    folder, base_path = run.folder, run.folder / "base.safetensors"
    trained = None if args.base == "scratch" else Path(args.base)
    if has_finished(base_path):
        trained = base_path
    published = None
    if trained and trained != base_path and (args.base in HUB_BASES or trained.is_dir()):
        with run.first_goes_ahead():
            published = load_gpt2(
                find_gpt2(args.base, args.data_dir), args.block_size, args.dropout)
        config, args.tokenizer = published.config, "gpt2"
    elif args.base != "scratch":
        if not has_finished(trained):
            raise UserError(f"--base {trained}: not a base.safetensors whose training has finished")
        config = GPTConfig(**read_plan(trained, "base")[1]["config"])
    else:
        why_size = "asked for" if args.size else f"the default on {device.type}"
        args.size = args.size or ("small" if device.type == "cuda" else "nano")
        config = GPTConfig(**SIZES[args.size], dropout=args.dropout)
        config.block_size = args.block_size or config.block_size
    args.block_size = args.block_size or config.block_size
    if args.block_size > config.block_size:
        raise UserError(f"--block-size {args.block_size}: {args.base} reads {config.block_size}")
    with run.first_goes_ahead():  # a data set may have to be fetched
        corpus = open_corpus(args.dataset, args.data_dir, before)
    if args.condition != CONDITIONS[1] and not corpus.instructions:
        raise UserError(f"--condition {args.condition}: {args.dataset} has no instructions")
    if "task-embedding" in args.methods and not corpus.instructions:
        raise UserError(f"--methods task-embedding: {args.dataset} has no instructions")
    if corpus.dropped:
        print(f"{corpus.dropped} records left out: their response is blank")

    def tokenizer_spec():
        if before or (args.base != "scratch" and not published):
            return Tokenizer.load((folder if before else trained.parent) / "tokenizer.json").spec
        if args.tokenizer == "gpt2":
            return {"name": "gpt2"}
        texts = (document.prompt + document.text for document in corpus.documents("train"))
        return Tokenizer.train(texts, args.vocab_size).spec

    run.tokenizer = Tokenizer(run.from_first(tokenizer_spec))
    if published and config.vocab_size != run.tokenizer.vocab_size:
        raise UserError(f"--base {args.base} has a vocabulary of {config.vocab_size:,} and the "
                        f"gpt2 tokenizer one of {run.tokenizer.vocab_size:,}")
    config.vocab_size = run.tokenizer.vocab_size
    if args.base != "scratch":  # config.json tells what the base has
        args.tokenizer, args.vocab_size = run.tokenizer.spec["name"], config.vocab_size
        args.dropout = config.dropout
    with run.first_goes_ahead():
        run.examples = load_examples(corpus, run.tokenizer, args.block_size, folder / "cache")
    for split, table in run.examples.items():
        print(f"{split}: {len(table):,} examples, {table.length.sum():,} tokens, "
              f"{(table.length - table.prompt).sum():,} of them scored")
    methods = [method for method in args.methods if method != "frozen"]
    if trained:
        run.base = (published.to(device).requires_grad_(False) if published
                    else load_base(trained, device, run.tokenizer))
        print(f"base: {trained}, trained before: {config.n_layer} layers of width {config.n_embd}, "
              f"vocabulary {config.vocab_size:,}, dropout {config.dropout:g}")
        if args.trunk == "shared":
            share_trunk(run)
        for method in methods:
            asked = [(args.seeds[0], *item) for item in grid_paths(run, args, method).items()]
            places = [(n, args.lr[0], place_of(run, args, method, n)) for n in args.seeds]
            if len(args.lr) == 1:
                asked = places
            elif not any(path.exists() for _, _, path in asked):
                for _, _, place in places:  # so it was not chosen from this grid
                    if place.exists():
                        raise UserError(f"{place} was trained at a rate of its own; delete it to "
                                        f"choose one of several, or name one --lr")
            for seed, lr, path in asked:
                is_finished(path, adapter_plan(run, args, method, seed, lr), args.resume)
    elif args.trunk == "shared":
        raise UserError(f"--trunk shared: {folder} has no base and no trunk; train them first with "
                        f"--methods lora --trunk joint")
    else:
        is_finished(base_path, plan := base_plan(run, args, config), args.resume)
        print(f"base: {args.size} ({why_size}), {config.n_layer} layers of width "
              f"{config.n_embd}, rows of {args.block_size} tokens, "
              f"{args.base_batch_size} in a batch, {plan['steps']} steps")

    try:
        if rank == 0:
            run.tokenizer.save(folder / "tokenizer.json")
            settings = {k: v for k, v in vars(args).items() if k not in OF_A_CALL}
            write_json(folder / "config.json", {
                "args": settings, "data": corpus.fingerprint,
                "instructions": corpus.instructions, "torch": torch.__version__})
        if run.base is None:
            train_base(run, args, plan)
            run.base = load_base(base_path, device, run.tokenizer)
        elif trained != base_path and rank == 0:
            for suffix in (".safetensors", ".last.safetensors"):
                if published:
                    tensors = dict(run.base.named_parameters())
                    info = {"plan": {"method": "base", "tokenizer": run.tokenizer.fingerprint,
                                     "config": asdict(config)}}
                else:
                    tensors, info = read_tensors(trained.with_suffix(suffix))
                write_tensors(base_path.with_suffix(suffix), tensors, info)
        for method in methods:
            lr = choose_rate(run, args, method)
            for seed in args.seeds:
                train_adapter(run, args, method, seed, lr, place_of(run, args, method, seed))
    except KeyboardInterrupt:
        print(f"stopped; go on with: python -m lab.run train --resume --out {folder}",
              file=sys.stderr)
        sys.exit(130)
    finally:
        if world > 1:
            dist.destroy_process_group()
    for state in sorted(folder.rglob("*.state.safetensors")):
        if not has_finished(state.with_suffix("").with_suffix(".safetensors")):
            print(f"{state} is unfinished: --resume with its method and settings goes on with it")
    print(f"done; the table and the figures: python -m lab.run eval {folder}")
    return folder
