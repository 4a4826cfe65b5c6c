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
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import train as core
from common import (UserError, choose_device, choose_dtype, keep_freed_memory,
                    only_writer, read_tensors, write_json, write_tensors, write_text)
from hypernet import cluster_statistics, prompt_means
from lab import cache
from lab.cache import CacheHead
from lab.cluster import cluster_batches
from lab.common import (Run, adapt, adapter_path, autocast, config_of, has_finished, join_processes,
                        label, load_base, load_weights, n_trained, open_corpus, read_plan,
                        read_records, share_trunk, wait, weights)
from lab.data import Tokenizer, fingerprint, load_examples
from lab.flags import (ALONE, CONDITIONS, HUB_BASES, OF_A_CALL, TOLD_NOTHING, parse_train,
                       read_json)
from lab.model import GPT, SIZES, GPTConfig
from lab.scoring import (Company, cluster_training, company_batch, held_out, is_told, score,
                         scored_bytes, summed, table)
from model import find_gpt2, load_gpt2
from train import generator, learning_rate, under

# ------------------------------------------------------------------------------------ training


class Diverged(UserError):
    """The loss is no number; in a grid another learning rate may do better."""


class Objective(nn.Module):
    """A part's summed loss as the one module that DistributedDataParallel asks for."""

    def __init__(self, run, model):
        super().__init__()
        self.run, self.model = run, model

    def forward(self, *part):
        if isinstance(self.model.lm_head, CacheHead):
            with autocast(self.run):
                return cache.losses(self.model, *part)[0]
        return core.losses(self.model, *part, dtype=self.run.dtype).sum()


def in_parts(run, model, examples, told=None, whole=False):
    """The function load(index) -> parts of a batch, of which the logits fit into memory.

    Each part is a tuple that `core.losses` takes; told(index) -> statistics (B, C).
    """

    def load(index):
        statistics, parts = told and told(index), []
        for part in core.chunks(torch.arange(len(index)), run, model.config):
            batch = examples.batch(index[part], whole)
            parts.append(batch if statistics is None else (*batch, statistics[part]))
        return parts

    return load


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
            together = index[length[index].argsort(stable=True)].split(plan["batch_size"])
        mine = [(1.0, batch) for batch in together[run.rank :: run.world]] or [(0.0, together[0])]
        yield (int(n_scored[index].sum()), int(length[index].sum()),
               [(share, load(batch)) for share, batch in mine])
        step += 1


def fit(run, path, model, plan, load, n_scored, evaluate, cluster=None):
    """Train `model`'s trainable parameters; best weights go to `path`, and are loaded at the end.

    plan: JSON of everything that shapes the training; load(index) -> parts of a batch, see
    `in_parts`; n_scored (N,), each example's scored tokens; evaluate() -> what `score` returns for
    the validation split; cluster (N,): a batch comes from one of these.
    """
    state_path = path.with_suffix(".state.safetensors")
    last_path = path.with_suffix(".last.safetensors")
    name, total = f"{label(plan)}, seed {plan['seed']}", plan["steps"]
    whole = plan["method"] == "base"
    parameters = [p for p in model.parameters() if p.requires_grad]
    # A base decays its matrices; adapters are small and decay nothing.
    groups = [{"params": [p for p in parameters if (p.dim() > 1) == wide],
               "weight_decay": 0.1 if whole and wide else 0.0} for wide in (True, False)]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]],
                                  betas=(0.9, 0.95), fused=run.device.type in ("cpu", "cuda"))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    print(f"  {name}: {sum(p.numel() for p in parameters):,} parameters")
    done = {"step": 0, "tokens": 0, "seconds": 0.0, "best": None}
    if state_path.exists():
        tensors, _, found = core.read_checkpoint(state_path)
        if found.keys() != done.keys():
            raise UserError(f"{state_path} is damaged: its header does not say how far it got")
        done = found
        load_weights(model, under("model.", tensors), state_path)
        moments = {i: under(f"optimizer.{i}.", tensors) for i in range(len(parameters))}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        print(f"  {name}: going on from step {done['step']} of {total}")

    def save(path, tensors, **info):
        if run.rank == 0:
            write_tensors(path, tensors, {"plan": plan, "done": done, **info})

    def save_state():
        moments = {f"optimizer.{i}.{key}": tensor
                   for i, state in optimizer.state_dict()["state"].items()
                   for key, tensor in state.items()}
        current = {f"model.{n}": tensor for n, tensor in weights(model).items()}
        save(state_path, current | moments)

    objective = Objective(run, model)
    if run.world > 1:
        objective = DistributedDataParallel(objective)
    training = {"method": label(plan), "seed": plan["seed"], "lr": plan["lr"],
                "trunk": "shared" if plan.get("trunk") else "joint"}
    log = run.folder / "metrics.jsonl"
    if run.rank == 0:  # what comes after the state is about to be written again
        kept = [r for r in read_records(run.folder)
                if training.items() - r.items() or r["step"] <= done["step"]]
        write_text(log, "".join(json.dumps(record) + "\n" for record in kept))
    evaluate_at = {round(total * (i + 1) / plan["evaluations"]) for i in range(plan["evaluations"])}
    steps = upcoming(run, plan, done["step"], load, n_scored, cluster)
    bar = tqdm(total=total, initial=done["step"], desc=name, unit="step",
               disable=True if run.rank else None)
    with bar:
        started = saved = time.perf_counter()
        for n_step, n_read, batches in steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done["step"], total, plan["lr"])
            model.train()
            parts = [(share, part) for share, batch in batches for part in batch]
            for turn, (share, part) in enumerate(parts, 1):
                last = turn == len(parts)
                with nullcontext() if last or run.world == 1 else objective.no_sync():
                    # DistributedDataParallel takes the mean over processes: make it the sum.
                    nll = objective(*part) * (share * run.world / n_step)
                    nll.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done["step"] += 1
            done["tokens"] += n_read
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
                if done["best"] is None or result["loss"] < done["best"]:
                    done["best"] = result["loss"]
                    save(path, weights(model))
                save_state()
                started = saved = time.perf_counter()
            elif time.perf_counter() - saved > 60:
                done["seconds"] += time.perf_counter() - started
                save_state()
                started = saved = time.perf_counter()
    save(last_path, weights(model))
    print(f"  {name}: {done['tokens'] / done['seconds']:,.0f} tokens/s")
    if run.rank == 0:
        state_path.unlink()
    if run.world > 1:
        dist.barrier()
    load_weights(model, read_tensors(path)[0], path)
    return done["best"]


def is_finished(path, plan, resume):
    """Whether `path` is trained already. Raises rather than overwrite what `plan` did not make."""
    state_path = path.with_suffix(".state.safetensors")
    finished = has_finished(path)
    for existing in (path, state_path):
        if existing.exists():
            made_with = {"accumulate": 1, "condition": CONDITIONS[1]}
            made_with |= core.read_checkpoint(existing)[1]
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
    if cluster is None:
        cluster = torch.zeros(n_examples, dtype=torch.int64)
    return cluster_batches(cluster, batch_size, generator(seed, epoch))


# -------------------------------------------------------------------------------- base, adapters


def base_plan(run, args, config):
    """Everything that shapes the base's training, as its file will remember it."""
    return {
        "method": "base", "seed": 0, "lr": args.base_lr, "batch_size": args.base_batch_size,
        "tokenizer": fingerprint(run.tokenizer), "config": asdict(config),
        **plan_steps(len(run.examples["train"]), args.base_batch_size, args.base_epochs, args),
    }


def train_base(run, args, plan):
    """Train a base from scratch on whole rows, prompts included."""
    train, validation = run.examples["train"], run.examples["validation"]
    torch.manual_seed(0)
    model = GPT(GPTConfig(**plan["config"])).to(run.device)
    best = fit(run, run.folder / "base.safetensors", model, plan,
               in_parts(run, model, train, whole=True), train.length - 1,
               lambda: score(run, model, validation, whole=True))
    sizes = run.tokenizer.bytes_per_token()
    n_bytes = scored_bytes(replace(validation, prompt=torch.ones_like(validation.prompt)), sizes)
    bits = best * float((validation.length - 1).sum()) / math.log(2)
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
    head, cluster, load = model.lm_head, None, in_parts(run, model, train)
    if is_told(head):
        means, count = prompt_means(train.seen(plan), run.base.transformer.wte.weight)
    if is_told(head) or isinstance(head, CacheHead):
        draw = torch.Generator().manual_seed(seed)

        def group():
            with torch.no_grad(), autocast(run):
                found = (cluster_training(run, head, plan, means, count, draw) if is_told(head)
                         else head.fit_clusters(train, plan.get("clusters", 1), draw))
            return found, {n: t.detach().to("cpu", copy=True) for n, t in weights(head).items()}

        settings = plan | {"lr": None}  # the rates of a grid start from one clustering
        if run.grouped[0] != settings:
            run.grouped = settings, run.from_first(group)
        found, start = run.grouped[1]
        head.load_state_dict(start, strict=False)
        company = Company(found, args.told, draw.manual_seed(seed))
        by_cluster = method not in ("cache", "per-sample", "task-embedding") and not args.told
        cluster = company.cluster if by_cluster else None

    def told(index):
        """Statistics (B, C); the paper's is that of what of the cluster is in the batch."""
        if by_cluster:
            return cluster_statistics(means[index], count[index], cluster[index])
        return known[index]

    def hear(index):
        """The one part of a cache's batch; what is known of a cluster is what is in the batch."""
        if not by_cluster:
            return [company_batch(head, train, company, index)]
        which = cluster[index].unique(return_inverse=True)[1]
        rows, *heard = head.told(train, index, which, index, which)
        return [(*train.batch(rows), *heard)]

    if is_told(head):
        known = None if by_cluster else table(head, means, count, company)
        load = in_parts(run, model, train, told)
    elif isinstance(head, CacheHead):
        load = hear
    theirs = held_out(run, model, validation, plan, control=args.told)
    fit(run, path, model, plan, load, train.length - train.prompt,
        lambda: score(run, model, validation, theirs), cluster)


# ---------------------------------------------------------------------------------------- main


def main(argv=None):
    """Train what the arguments ask for; returns the run folder's path."""
    args, before = parse_train(argv)
    keep_freed_memory()
    with only_writer(args.out):
        return train(args, before)


def train(args, before):
    """Read and check everything, then train; `before` is the config.json of a run that goes on."""
    device, why_device = choose_device(args.device)
    run = Run(Path(args.out), device)
    join_processes(run)
    rank, world, device = run.rank, run.world, run.device
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
                trained if trained.is_dir() else find_gpt2(args.base, args.data_dir))
        config, args.tokenizer = published.config, "gpt2"
    elif args.base != "scratch":
        if not has_finished(trained):
            raise UserError(f"--base {trained}: not a base.safetensors whose training has finished")
        config = config_of(read_plan(trained, "base")[1])
    else:
        why_size = "asked for" if args.size else f"the default on {device.type}"
        args.size = args.size or ("small" if device.type == "cuda" else "nano")
        config = GPTConfig(**SIZES[args.size])
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
        return Tokenizer.learn(texts, args.vocab_size).spec

    run.tokenizer = Tokenizer(run.from_first(tokenizer_spec))
    if published and config.vocab_size != run.tokenizer.vocab_size:
        raise UserError(f"--base {args.base} has a vocabulary of {config.vocab_size:,} and the "
                        f"gpt2 tokenizer one of {run.tokenizer.vocab_size:,}")
    config.vocab_size = run.tokenizer.vocab_size
    if args.base != "scratch":  # config.json tells what the base has
        args.tokenizer, args.vocab_size = run.tokenizer.spec["name"], config.vocab_size
    run.examples = load_examples(corpus, run.tokenizer, args.block_size)
    for split, rows in run.examples.items():
        print(f"{split}: {len(rows):,} examples, {rows.length.sum():,} tokens, "
              f"{(rows.length - rows.prompt).sum():,} of them scored")
    methods = [method for method in args.methods if method != "frozen"]
    if trained:
        run.base = (published.to(device).requires_grad_(False) if published
                    else load_base(trained, device, run.tokenizer))
        print(f"base: {trained}, trained before: {config.n_layer} layers of width {config.n_embd}, "
              f"vocabulary {config.vocab_size:,}")
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
            write_json(folder / "tokenizer.json", run.tokenizer.spec)
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
                    info = {"plan": {"method": "base", "tokenizer": fingerprint(run.tokenizer),
                                     "config": asdict(config)}}
                else:
                    tensors, info = read_tensors(trained.with_suffix(suffix))
                write_tensors(base_path.with_suffix(suffix), tensors, info)
        for method in methods:
            lr = choose_rate(run, args, method)
            for seed in args.seeds:
                train_adapter(run, args, method, seed, lr, place_of(run, args, method, seed))
    finally:
        if world > 1:
            dist.destroy_process_group()
    for state in sorted(folder.rglob("*.state.safetensors")):
        if not has_finished(state.with_suffix("").with_suffix(".safetensors")):
            print(f"{state} is unfinished: --resume with its method and settings goes on with it")
    print(f"done; the table and the figures: python -m lab.run eval {folder}")
    return folder
