"""Train the base model, then one adapter after the other on the same frozen base.

    python train.py                                   # the Python documentation, no network
    python train.py --dataset wikitext2 --seeds 0,1,2
    python train.py --resume --out runs/wikitext2     # go on after Ctrl-C, exactly

Every method is trained on the same examples and scored by the same rule: the negative
log-likelihood of the continuation's tokens, each predicted from what stands before it, summed and
then divided by their number. The statistics that adapt a head come from prompt tokens alone.

A run folder holds
    config.json, tokenizer.json          what was asked for
    base.safetensors                     the frozen base (best by validation loss)
    adapters/NAME.safetensors            an adapter's weights, best by validation loss
    adapters/NAME.last.safetensors       the same after its last step: the training has finished
    *.state.safetensors                  an unfinished training: weights, optimizer, generators
    metrics.jsonl                        one record per evaluation
    cache/                               tokens, memory-mapped
"""

import json
import math
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from cluster import cluster_batches
from data import IGNORE, Tokenizer, load_examples
from files import UserError, read_tensors, run_cli, write_json, write_tensors, write_text
from hypernet import Prompts
from model import GPT, SIZES, GPTConfig
from common import (ONCE, Parser, Run, adapt, adapter_path, choose_device, choose_dtype,
                    keep_freed_memory, label, listed, load_base, load_weights, number, open_corpus,
                    read_plan, read_records, remembered, seeds, weights)
from scoring import company, row_losses, score, scored_bytes, summed

METHODS = ("frozen", "lora", "chameleon")

# ----------------------------------------------------------------------------------- arguments


def make_parser():
    parser = Parser(
        "train.py",
        description="Train a small GPT, then LoRA and ChameleonLLM adapters on top of it.",
    )
    add = parser.add_argument
    add("--dataset", default="pydocs", help="pydocs (no network), wikitext2, wikitext2-raw, "
        "alpaca, or a .txt, .json or .jsonl file, or a folder of them")
    add("--data-dir", default="data", help="where data sets are looked for, and kept when fetched")
    add("--out", help="run folder (default: runs/DATASET)")
    add("--resume", action="store_true", help="go on with what --out holds, with its settings")
    add("--methods", type=listed(METHODS), default=",".join(METHODS), metavar="M,M",
        help=f"any of {','.join(METHODS)}")
    add("--seeds", type=seeds, default="0", metavar="N,N", help="one adapter of each method per "
        "seed: initial values, batches, k-means; the base is always trained with seed 0")
    add("--base", default="scratch", help="scratch, or another run's base.safetensors")
    add("--size", choices=SIZES, help="of a base from scratch: nano 2.6M parameters, small 12M, "
        "gpt2 124M, at their vocabularies; time grows in proportion (default: nano, on CUDA small)")
    add("--block-size", type=number(int, 4), metavar="T", help="tokens in a row: memory and time "
        "of a step grow in proportion, attention's with its square (default: by size, nano 256)")
    add("--tokenizer", choices=("bpe", "gpt2"), default="bpe",
        help="bpe is trained on the training split")
    add("--vocab-size", type=number(int, 257), default=4096, metavar="V", help="of bpe; the "
        "logits, the largest tensor in training, grow in proportion")
    add("--base-lr", type=number(float, 1e-9, 100), default=3e-3, help="its peak learning rate")
    add("--base-epochs", type=number(float, 1e-9, 1e6), default=4.0, help="its passes over data")
    add("--base-batch-size", type=number(int, 1), default=16, help="rows in a step of the base; "
        "memory grows in proportion")
    add("--dropout", type=number(float, 0, 0.99), default=0.0, help="on the embedding and the "
        "residual branches, while the base and the adapters are trained")
    add("--batch-size", type=number(int, 1), default=32, metavar="B", help="rows in a step of an "
        "adapter and, on average, in a cluster; memory grows in proportion")
    add("--lr", type=number(float, 1e-9, 100), default=1e-3, help="adapters' peak learning rate")
    add("--epochs", type=number(float, 1e-9, 1e6), default=1.0, help="adapters' passes over data")
    add("--max-steps", type=number(int, 1), metavar="N", help="stop each training after N steps")
    add("--evaluations", type=number(int, 1), default=8, help="validations per training; one takes "
        "about a third of the time of training on as many tokens")
    add("--rank", type=number(int, 1), default=4, metavar="r", help="of every low-rank update")
    add("--alpha", type=number(float, 1e-9, 1e9), default=8.0, help="updates scale by alpha / rank")
    add("--head-form", choices=("full", "light"), default="full", help="what the hyper-network "
        "writes: full A and B (the paper's), or light, whose size ignores the vocabulary")
    add("--clusters", type=number(int, 1), metavar="K", help="k-means clusters of the training "
        "prompts (default: one per batch)")
    add("--stat-scope", choices=("prompt", "full"), default="prompt", help="tokens behind the "
        "statistics; full LEAKS the tokens to be predicted and is there to show how much")
    add("--inference", choices=("fit", "assign"), default="fit", help="cluster held-out requests "
        "by k-means among themselves, or by the nearest training centroid")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="auto is the "
        "first of cuda, mps, cpu that is there")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of matrix "
        "products; bfloat16 halves their memory; auto takes it where it is fast")
    add("--compile", action="store_true", help="torch.compile: a minute to start, then faster "
        "steps on CUDA")
    return parser


def parse_args(argv):
    """Arguments of this call, and config.json of the run that its folder holds, or None.

    What is not given comes from that run: with --resume everything, else what a run has ONCE.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/{Path(args.dataset).stem}"
    config = remembered(Path(args.out))
    if config:
        known = config["args"]
        parser.set_defaults(
            **{key: known[key] for key in (known if args.resume else (*ONCE, "data_dir"))})
        args = parser.parse_args([*(argv if argv is not None else sys.argv[1:]),
                                  "--out", args.out])
        for key in ONCE:
            if known[key] != getattr(args, key):
                raise UserError(
                    f"{args.out} is a run with --{key.replace('_', '-')} {known[key]}, not "
                    f"{getattr(args, key)}; choose another --out, or leave that flag out"
                )
    elif args.resume:
        raise UserError(f"--resume: {args.out} holds no run; name its folder with --out")
    return args, config


def learning_rate(step, total, peak):
    """Linear warm-up over the first 5% of `total` steps, then a cosine down to 10% of `peak`."""
    warmup = max(1, round(0.05 * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


# ------------------------------------------------------------------------------------ training


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
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if any("lora_" in name for name, _ in trained):
        groups = {
            "LoRA in the transformer": [p for n, p in trained if not n.startswith("lm_head")],
            f"{type(model.lm_head).__name__}": [p for n, p in trained if n.startswith("lm_head")],
        }
        return [dict(name=n, params=ps, weight_decay=0.0) for n, ps in groups.items()]
    return [
        dict(name="matrices", params=[p for _, p in trained if p.dim() > 1], weight_decay=0.1),
        dict(name="biases and norms", params=[p for _, p in trained if p.dim() == 1],
             weight_decay=0.0),
    ]


def drop_records(folder, method, seed, after):
    """Remove the records of a training that a resumed run is about to write again."""
    kept = [r for r in read_records(folder)
            if (r["method"], r["seed"]) != (method, seed) or r["step"] <= after]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))


def fit(run, path, model, plan, batches, batch_loss, evaluate):
    """Train `model`'s trainable parameters; best weights go to `path`, and are loaded at the end.

    plan: JSON of everything that shapes the training, among it method, seed, lr, steps and
    evaluations; batches(epoch) -> index tensors; batch_loss(index) -> summed loss and number of
    scored tokens; evaluate() -> what `score` returns for the validation split.
    """
    state_path = path.with_suffix(".state.safetensors")
    last_path = path.with_suffix(".last.safetensors")
    name, total = f"{label(plan)}, seed {plan['seed']}", plan["steps"]
    groups = parameter_groups(model)
    optimizer = torch.optim.AdamW(
        groups, betas=(0.9, 0.95), fused=run.device.type in ("cpu", "cuda"))
    parameters = [p for g in groups for p in g["params"]]
    # Dropout draws from the device's generator; batches have generators of their own.
    draws = torch if run.device.type == "cpu" else torch.get_device_module(run.device)
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        print(f"  {name}: {count:,} parameters, {group['name']}, weight decay "
              f"{group['weight_decay']}")
    done = {"step": 0, "tokens": 0, "seconds": 0.0, "best": math.inf}
    if state_path.exists():
        tensors, info = read_tensors(state_path)
        done = info["done"]
        load_weights(model, under(tensors, "model."), state_path)
        moments = {}
        for key, tensor in under(tensors, "optimizer.").items():
            i, key = key.split(".")
            moments.setdefault(int(i), {})[key] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        draws.set_rng_state(tensors["generator"])
        print(f"  {name}: going on from step {done['step']} of {total}")
    drop_records(run.folder, label(plan), plan["seed"], done["step"])

    def save_state():
        moments = {f"optimizer.{i}.{key}": tensor
                   for i, state in optimizer.state_dict()["state"].items()
                   for key, tensor in state.items()}
        current = {f"model.{n}": tensor for n, tensor in weights(model).items()}
        current["generator"] = draws.get_rng_state()
        write_tensors(state_path, current | moments, {"plan": plan, "done": done})

    evaluate_at = {round(total * (i + 1) / plan["evaluations"]) for i in range(plan["evaluations"])}
    epoch, epoch_batches = None, []
    bar = tqdm(total=total, initial=done["step"], desc=name, unit="step", disable=None)
    with interruptible() as stopped, bar:
        while done["step"] < total:
            started = time.perf_counter()
            if done["step"] // plan["steps_per_epoch"] != epoch:
                epoch = done["step"] // plan["steps_per_epoch"]
                epoch_batches = batches(epoch)
            index = epoch_batches[done["step"] % plan["steps_per_epoch"]]
            rate = learning_rate(done["step"], total, plan["lr"])
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            nll, n_tokens = batch_loss(index)
            loss = nll / n_tokens
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done["step"] += 1
            done["tokens"] += int(run.examples["train"].length[index].sum())
            if done["step"] % 10 == 0:  # reading the loss waits for the device
                bar.set_postfix_str(f"loss {loss.item():.3f}, "
                                    f"{done['tokens'] / done['seconds']:,.0f} tokens/s")
            done["seconds"] += time.perf_counter() - started
            bar.update()
            if done["step"] in evaluate_at:
                result = summed(*evaluate())
                if not math.isfinite(result["loss"]):
                    raise UserError(f"{name}: the loss is {result['loss']} at step {done['step']}; "
                                    f"lower --lr (--base-lr for the base)")
                record = {"method": label(plan), "seed": plan["seed"], "step": done["step"],
                          "tokens": done["tokens"], "split": "validation", **result}
                with open(run.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                bar.write(f"{name}: step {done['step']}/{total}, validation loss "
                          f"{result['loss']:.4f}")
                if result["loss"] < done["best"]:
                    done["best"] = result["loss"]
                    write_tensors(path, weights(model), {"plan": plan, "done": done})
                save_state()
            if stopped() and done["step"] < total:
                save_state()
                raise KeyboardInterrupt
    write_tensors(last_path, weights(model), {"plan": plan, "done": done})
    state_path.unlink()
    if stopped():
        raise KeyboardInterrupt
    load_weights(model, read_tensors(path, run.device)[0], path)


def under(tensors, prefix):
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def is_finished(path, plan, resume):
    """Whether `path` is trained already. Raises rather than overwrite what `plan` did not make."""
    state_path = path.with_suffix(".state.safetensors")
    finished = path.exists() and path.with_suffix(".last.safetensors").exists()
    for existing in (path, state_path):
        if existing.exists():
            made_with = read_tensors(existing)[1]["plan"]
            for key in plan:
                if made_with.get(key) != plan[key]:
                    raise UserError(
                        f"{existing} was made with {key} = {made_with.get(key)}, not {plan[key]}; "
                        f"choose another --out, or delete that file"
                    )
    if state_path.exists() and not finished and not resume:
        raise UserError(
            f"{state_path} is an interrupted training; add --resume to go on with it, choose "
            f"another --out, or delete that file"
        )
    return finished


def plan_steps(n_examples, batch_size, epochs, max_steps, evaluations):
    per_epoch = -(-n_examples // batch_size)
    steps = max(1, round(epochs * per_epoch))
    steps = min(steps, max_steps or steps)
    return {"steps": steps, "steps_per_epoch": per_epoch, "evaluations": min(evaluations, steps)}


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
        **plan_steps(len(run.examples["train"]), args.base_batch_size, args.base_epochs,
                     args.max_steps, args.evaluations),
    }


def train_base(run, args, plan):
    """Train a base from scratch on whole rows, prompts included."""
    path = run.folder / "base.safetensors"
    train, validation = run.examples["train"], run.examples["validation"]
    torch.manual_seed(0)
    model = GPT(GPTConfig(**plan["config"])).to(run.device)
    if args.compile:
        compile_blocks(model)

    def batch_loss(index):
        tokens, targets = (t.to(run.device) for t in train.batch(index, whole=True))
        with run.autocast:
            rows = row_losses(model.lm_head, model.hidden(tokens), targets)
        return rows.sum(), (targets != IGNORE).sum()

    def evaluate():
        return score(model, validation, args.batch_size, run.autocast, whole=True)

    fit(run, path, model, plan, lambda epoch: shuffled(len(train), plan["batch_size"], 0, epoch),
        batch_loss, evaluate)
    sizes = run.tokenizer.bytes_per_token()
    nll, n_bytes = evaluate()[0].sum(), scored_bytes(validation, sizes, whole=True)
    print(f"base: {nll / math.log(2) / n_bytes:.4f} bits a byte on whole validation rows")


def compile_blocks(model):
    """In place: state_dict keys stay as they are, and all blocks share one compilation."""
    for block in model.transformer.h:
        block.compile()


def adapter_plan(run, args, method, seed):
    """Everything that shapes an adapter's training, as its file will remember it."""
    N = len(run.examples["train"])
    plan = {
        "method": method, "seed": seed, "base": run.base_fingerprint, "rank": args.rank,
        "alpha": args.alpha, "lr": args.lr, "batch_size": args.batch_size,
        **plan_steps(N, args.batch_size, args.epochs, args.max_steps, args.evaluations),
    }
    if method == "chameleon":
        k = args.clusters or -(-N // args.batch_size)
        plan |= {"head_form": args.head_form, "clusters": k, "cluster_size": N / k,
                 "stat_scope": args.stat_scope, "inference": args.inference}
    return plan


def train_adapter(run, args, method, seed):
    """Train one adapter on the continuations of the training split; best and last are kept."""
    plan, path = adapter_plan(run, args, method, seed), adapter_path(run, method, seed)
    if is_finished(path, plan, args.resume):
        print(f"{path.stem}: trained before")
        return
    train, validation = run.examples["train"], run.examples["validation"]
    torch.manual_seed(seed)
    model = adapt(run.base, plan)
    if args.compile:
        compile_blocks(model)
    prompts = cluster = None
    if model.lm_head.needs_statistics:
        prompts = Prompts(train, run.base.transformer.wte, plan["stat_scope"])
        if path.with_suffix(".state.safetensors").exists():  # the very same clusters
            saved = read_tensors(path.with_suffix(".state.safetensors"))[0]
            load_weights(model, under(saved, "model."), path)
        else:
            model.lm_head.fit_clusters(prompts, torch.Generator().manual_seed(seed))
        cluster = model.lm_head.nearest(prompts).cpu()
    held_out = company(model, validation, plan, plan.get("inference"))

    def batch_loss(index):
        tokens, targets = (t.to(run.device) for t in train.batch(index))
        statistics = mates = None
        if prompts is not None:
            mates = cluster[index].unique(return_inverse=True)[1].to(run.device)  # (B,)
            statistics = prompts.statistics(mates, index.to(run.device))  # of this batch's members
        with run.autocast:
            rows = row_losses(model.lm_head, model.hidden(tokens), targets, statistics, mates)
        return rows.sum(), (targets != IGNORE).sum()

    fit(run, path, model, plan,
        lambda epoch: shuffled(len(train), args.batch_size, seed, epoch, cluster), batch_loss,
        lambda: score(model, validation, args.batch_size, run.autocast, **held_out))


# ---------------------------------------------------------------------------------------- main


def write_settings(run, args, corpus):
    run.tokenizer.save(run.folder / "tokenizer.json")
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "out", "device")}
    write_json(run.folder / "config.json", {
        "args": settings, "data": corpus.fingerprint, "instructions": corpus.instructions,
        "torch": torch.__version__,
    })


def main(argv=None):
    """Train what the arguments ask for; returns the run folder's path."""
    args, before = parse_args(argv)
    keep_freed_memory()
    device, why_device = choose_device(args.device)
    dtype, why_dtype = choose_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")  # so that a resumed run computes as before
    print(f"device {device}: {why_device}; {args.dtype}: {why_dtype}")

    # First everything is checked: until then the folder gets a cache of tokens and nothing else.
    folder, base_path = Path(args.out), Path(args.out) / "base.safetensors"
    trained = base_path
    if not (base_path.exists() and base_path.with_suffix(".last.safetensors").exists()):
        trained = None if args.base == "scratch" else Path(args.base)
    if args.base != "scratch":
        if not trained.with_suffix(".last.safetensors").exists():
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
    corpus = open_corpus(args.dataset, args.data_dir, before)
    if corpus.dropped:
        print(f"{corpus.dropped} records left out: their response is blank")
    if before or args.base != "scratch":
        tokenizer = Tokenizer.load((folder if before else trained.parent) / "tokenizer.json")
    elif args.tokenizer == "gpt2":
        tokenizer = Tokenizer({"name": "gpt2"})
    else:
        texts = (document.prompt + document.text for document in corpus.documents("train"))
        tokenizer = Tokenizer.train(texts, args.vocab_size)
    config.vocab_size = tokenizer.vocab_size
    examples = load_examples(corpus, tokenizer, args.block_size, folder / "cache")
    for split, table in examples.items():
        print(f"{split}: {len(table):,} examples, {table.length.sum():,} tokens, "
              f"{(table.length - table.prompt).sum():,} of them scored")
    run = Run(folder, device, dtype, tokenizer, examples)
    adapters = [(m, seed) for seed in args.seeds for m in args.methods if m != "frozen"]
    if trained:
        run.base = load_base(trained, device, tokenizer)
        for adapter in adapters:
            is_finished(adapter_path(run, *adapter), adapter_plan(run, args, *adapter), args.resume)
        print(f"base: {trained}, trained before")
    else:
        is_finished(base_path, plan := base_plan(run, args, config), args.resume)
        print(f"base: {args.size} ({why_size}), {config.n_layer} layers of width "
              f"{config.n_embd}, rows of {args.block_size} tokens, "
              f"{args.base_batch_size} in a batch, {plan['steps']} steps")

    try:
        write_settings(run, args, corpus)
        if run.base is None:
            train_base(run, args, plan)
            run.base = load_base(base_path, device, tokenizer)
        elif trained != base_path:
            for suffix in (".safetensors", ".last.safetensors"):
                tensors, info = read_tensors(trained.with_suffix(suffix))
                write_tensors(base_path.with_suffix(suffix), tensors, info)
        for adapter in adapters:
            train_adapter(run, args, *adapter)
    except KeyboardInterrupt:
        print(f"stopped; go on with: python train.py --resume --out {folder}", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        raise UserError("out of memory; halve --batch-size, --base-batch-size or --block-size, or "
                        "take a smaller --size or --vocab-size") from None
    print(f"done; the table and the figures: python eval.py {folder}")
    return folder


if __name__ == "__main__":
    run_cli(main)
