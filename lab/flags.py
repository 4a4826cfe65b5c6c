"""The command lines of `python -m lab.run train` and `python -m lab.run eval`."""

import argparse
from pathlib import Path

from common import UserError, parse_json, read_text
from train import Help, Parser, number

PROGRAM = "python -m lab.run"
SIZES = ("pico", "nano", "small", "medium", "gpt2")  # model.py has their shapes
METHODS = ("frozen", "lora", "lora-match", "chameleon", "company-cache", "per-sample",
           "task-embedding", "scaled", "masks", "masks-alone", "library", "prompt-tuning",
           "cache")
DEFAULT_METHODS = "frozen,lora,chameleon,company-cache"
TOLD_NOTHING = ("frozen", "lora", "lora-match", "cache")  # of a cluster
ALONE = "own prompt only"
TRAINABLE = (ALONE, "shuffled", "constant")  # controls: what a head is told in a cluster's place
OF_ARTICLES = ("other articles", "no later rows")
CONTROLS = TRAINABLE + OF_ARTICLES
# What eval tells a method's heads in place of their cluster; see `scoring.Company`, and "blended"
# in heads.py.
CONTROLS_OF = {
    "chameleon": (ALONE, "shuffled", "constant", "other articles"),
    "company-cache": (ALONE, "shuffled", *OF_ARTICLES),
    "per-sample": ("shuffled",), "task-embedding": ("shuffled",), "library": ("blended",),
}
HUB_BASES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # of openai-community on the Hub
CONDITIONS = ("instruction", "instruction+input")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")

# Settings that a run folder has once; a later call into the same folder must agree with them.
ONCE = ("dataset", "base", "size", "block_size", "tokenizer", "vocab_size", "base_lr",
        "base_epochs", "base_batch_size", "dtype")
# Of these, what is asked of a base from scratch alone; another run's base has its own of OF_A_RUN
# too, which GPT-2's files leave open.
SCRATCH = ("size", "vocab_size", "base_lr", "base_epochs", "base_batch_size")
OF_A_RUN = ("tokenizer",)
OF_A_CALL = ("resume", "out", "device")  # what config.json does not keep
OF_PROMPTS = ("assign", "clusters", "static", "base_only", "json", "method", "temperature", "top_k")


MOST = 2**31 - 1
COUNT = number(int, 1, MOST)


def read_json(path):
    return parse_json(read_text(path), path)


def flag(name, value=True):
    """What a setting is called on the command line, with its value unless that is True."""
    value = ",".join(map(str, value)) if isinstance(value, list) else value
    return f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")


def methods(text):
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(METHODS)}")
    return names


def seeds(text):
    return sorted({number(int, 0, MOST)(part) for part in text.split(",")})


def rates(text):
    return list(dict.fromkeys(number(float, 1e-9, 100)(part) for part in text.split(",")))


def train_parser():
    parser = Parser(f"{PROGRAM} train", formatter_class=Help, description="Train a small GPT, "
                    "then LoRA and ChameleonLLM adapters on top of it.")
    add = parser.add_argument
    add("--dataset", default="pydocs", help="pydocs (no network), wikitext2, wikitext2-raw, "
        "alpaca, or a .txt, .json or .jsonl file, or a folder of them")
    add("--data-dir", default="data", help="where data sets are looked for, and kept when fetched")
    add("--out", help="run folder (default: runs/DATASET)")
    add("--resume", action="store_true", help="go on with what --out holds, with its settings")
    add("--methods", type=methods, default=DEFAULT_METHODS, metavar="M,M",
        help=f"any of {', '.join(METHODS)} (heads.py, cache.py)")
    add("--trunk", choices=("joint", "shared"), default="joint", help="train each head together "
        "with LoRA in the transformer (the paper's way), or heads alone, in a minute each, on the "
        "kept states of one LoRA-adapted transformer: that of --methods lora, seed 0")
    add("--seeds", type=seeds, default="0", metavar="N,N", help="one adapter of each method per "
        "seed: initial values, batches, k-means; the base is always trained with seed 0")
    add("--base", default="scratch", help=f"scratch; OpenAI's {', '.join(HUB_BASES)}, kept in "
        "--data-dir; a folder with a GPT-2's config.json and model.safetensors (both with "
        "--tokenizer gpt2; a small --block-size saves memory); or another run's base.safetensors")
    add("--size", choices=SIZES, help="of a base from scratch: pico 0.27M parameters, nano 2.6M, "
        "small 12M, medium 27M, gpt2 124M; time grows in proportion (default: nano, on CUDA small)")
    add("--block-size", type=number(int, 4, MOST), metavar="T", help="tokens in a row: memory and "
        "time of a step grow in proportion, attention's with its square (default: by size, nano "
        "256)")
    add("--tokenizer", choices=("bpe", "gpt2"), default="bpe", help="bpe learns from training text")
    add("--vocab-size", type=number(int, 257, MOST), default=4096, metavar="V", help="of bpe; the "
        "time of the head grows in proportion")
    add("--base-lr", type=number(float, 1e-9, 100), default=3e-3, help="its peak learning rate")
    add("--base-epochs", type=number(float, 1e-9, 1e6), default=4.0, help="its passes over data")
    add("--base-batch-size", type=COUNT, default=16, help="its rows in a batch; sets the memory")
    add("--batch-size", type=COUNT, default=32, metavar="B", help="rows in a batch of an adapter "
        "and, on average, in a cluster; memory grows in proportion")
    add("--accumulate", type=COUNT, metavar="N", help="batches in a step, in turn or on as many "
        "processes: a batch N times as large in the memory of one (default: their number)")
    add("--lr", type=rates, default="1e-3", metavar="R,R", help="adapters' peak learning rate; of "
        "several, each method takes the one with the best validation loss, with its first seed")
    add("--epochs", type=number(float, 1e-9, 1e6), default=1.0, help="adapters' passes over data")
    add("--max-steps", type=COUNT, metavar="N", help="stop each training after N steps")
    add("--evaluations", type=COUNT, default=8, help="validations per training; one takes "
        "about a third of the time of training on as many tokens")
    add("--rank", type=COUNT, default=4, metavar="r", help="of every low-rank update")
    add("--alpha", type=number(float, 1e-9, 1e9), default=8.0, help="updates scale by alpha / rank")
    add("--head-form", choices=("full", "light"), default="full", help="what the hyper-network "
        "writes: full A and B (the paper's), or light, whose size ignores the vocabulary")
    add("--cluster-size", type=COUNT, metavar="N", help="members of a cluster, on average "
        "(default: a batch; company-cache's 12)")
    add("--at-hand", type=COUNT, metavar="N", help="training requests, one after the other in the "
        "data, that company-cache clusters together; as many as will be served together have "
        "mates as near as theirs (default: all)")
    add("--stat-scope", choices=("prompt", "running", "full"), help="tokens behind the statistics: "
        "the prompts', or (company-cache alone) also what continuations hold so far; full LEAKS "
        "the tokens to be predicted and shows how much (default: running where possible)")
    add("--condition", choices=CONDITIONS, default=CONDITIONS[1], help="what of an instruction's "
        "prompt the statistics and the clusters see (where it is blank the input stands for it); "
        "the model always reads all of it")
    add("--told", choices=TRAINABLE, help="a control: train with the request's own statistic, "
        "with that of a wrong cluster, or with one that says nothing (lora, lora-match and cache "
        "are told nothing anyway)")
    add("--inference", choices=("fit", "assign"), default="fit", help="cluster held-out requests "
        "by k-means among themselves, or (not company-cache) by the nearest training centroid")
    add("--device", default="auto", choices=DEVICES, help="auto: of cuda, mps, cpu the first here")
    add("--dtype", default="auto", choices=DTYPES, help="of matrix products; the 16-bit ones halve "
        "the memory of activations; auto takes what is fast, and says why")
    return parser


def eval_parser():
    parser = Parser(f"{PROGRAM} eval", formatter_class=Help,
                    description="Score a run's adapters, or continue prompts.")
    add = parser.add_argument
    add("run", help="run folder that `lab.run train` wrote")
    add("--inference", choices=("fit", "assign"), help="cluster requests by k-means among "
        "themselves, or by the nearest training centroid (default: as in training, and so always "
        "for company-cache)")
    add("--data-dir", help="where the data set lies (default: as in training)")
    add("--device", default="auto", choices=DEVICES, help="where to score")
    add("--dtype", choices=DTYPES, help="of matrix products (default: as in training)")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--anatomy", action="store_true", help="train and score a pair of heads under each flaw of "
        "the published code, instead: some minutes on a CPU")
    one("--on", metavar="DATA", help="score the jointly trained adapters on another "
        "data set instead, --dataset's names or a path: clusters are made of the requests at hand "
        "there; writes RUN/on-DATA/")
    one("--sweep", choices=("clusters", "cluster-size", "noise", "written"), help="instead, "
        "vary the company that requests keep (study.py), of heads on a shared trunk if there are "
        "any")
    add("--methods", type=methods, metavar="M,M", help="with --sweep: of these alone")
    add("--generations", type=COUNT, metavar="N", help="also continue N test "
        "instructions, greedily, and compare with their responses (needs sacrebleu, rouge-score)")
    one("--prompts", metavar="FILE", help="continue the prompts in FILE, one a line, instead (- is "
        "standard input); an answer depends on the other prompts in it")
    add = parser.add_argument_group("with --prompts").add_argument
    add("--assign", action="store_true", help="answer each prompt as if it were alone, by the "
        "update of the nearest training cluster: no answer depends on the other prompts")
    add("--clusters", type=COUNT, metavar="K", help="how many (default: as large as in training)")
    add("--static", action="store_true", help="show static LoRA's answer too")
    add("--base-only", action="store_true", help="show the frozen base's answer too")
    add("--json", action="store_true", help="print JSON alone")
    add("--method", default="chameleon", help="the adapter that continues the prompts")
    add("--seed", type=number(int, 0, MOST), default=0,
        help="adapter's (also for --sweep), sampler's")
    add("--max-new-tokens", type=COUNT, default=60, help="length, also of --generations")
    add("--temperature", type=number(float, 0, 1e3), default=0.8, help="0 is greedy")
    add("--top-k", type=COUNT, default=50, help="tokens to draw from")
    return parser


def parse_eval(argv=None):
    """Arguments of `python -m lab.run eval`; a flag that would do nothing is refused."""
    parser = eval_parser()
    args = parser.parse_args(argv)
    goes_with = dict.fromkeys(OF_PROMPTS, ("prompts",)) | {
        "methods": ("sweep",), "max_new_tokens": ("prompts", "generations")}
    for name, questions in goes_with.items():
        if getattr(args, name) != parser.get_default(name) and not any(
                getattr(args, question) is not None for question in questions):
            raise UserError(
                f"{flag(name)} goes with {' or '.join(map(flag, questions))}; leave it out")
    if args.generations and (args.prompts is not None or args.sweep or args.anatomy):
        raise UserError("--generations goes with a run's scores; leave one out")
    if args.inference and (args.sweep or args.anatomy):
        raise UserError("--inference goes with a run's scores and --prompts; leave it out")
    if args.clusters and (args.assign or args.inference == "assign"):
        raise UserError("--clusters makes new ones, and with --assign or --inference assign "
                        "prompts go to the training's; leave one out")
    return args


def parse_train(argv):
    """Arguments of this call, and config.json of the run that its folder holds, or None.

    What is not given comes from that run: with --resume everything, else what a run has ONCE.
    """
    parser = train_parser()
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/{Path(args.dataset).resolve().stem}"
    config = remembered(Path(args.out))
    if config:
        known = config["args"]
        keys = known if args.resume else (*ONCE, "data_dir")
        parser.set_defaults(**{key: known[key] for key in keys}, out=args.out)
        args = parser.parse_args(argv)
        if args.dtype == "auto":  # what that chose then
            args.dtype = known["dtype"]
        for key in ONCE:
            if known[key] != getattr(args, key):
                raise UserError(f"{args.out} is a run with {flag(key)} {known[key]}, not "
                                f"{getattr(args, key)}; choose another --out, or leave that out")
    elif args.resume:
        raise UserError(f"--resume: {args.out} holds no run; name its folder with --out")
    if args.base != "scratch":
        published = args.base in HUB_BASES or Path(args.base).is_dir()
        for key in SCRATCH if published else SCRATCH + OF_A_RUN:
            if getattr(args, key) != parser.get_default(key):
                raise UserError(f"{flag(key)} is for a base from scratch, and --base {args.base} "
                                f"has its own; leave it out")
    for method in args.methods:
        why = None
        if args.stat_scope == "running" and method not in (*TOLD_NOTHING, "company-cache"):
            why = "--stat-scope running: only company-cache can"
        if args.trunk == "shared" and method == "prompt-tuning":
            why = "--trunk shared: prompt-tuning needs the transformer"
        if args.condition == "instruction" and method == "company-cache":
            why = "--condition instruction: company-cache remembers all that was said"
        if args.inference == "assign" and method == "company-cache":
            why = "--inference assign: company-cache keeps no centroids to assign to"
        if why:
            raise UserError(f"{why}; leave {method} out of --methods")
    return args, config


def remembered(folder):
    """config.json of a run folder; None for a new or empty one."""
    path = folder / "config.json"
    if path.exists():
        config = read_json(path)
        known = config.get("args") if isinstance(config, dict) else None
        if not isinstance(known, dict) or not {*ONCE, "data_dir"} <= known.keys():
            raise UserError(f"{path} is not what lab.run train wrote: settings are missing")
        parser = train_parser()
        try:  # what was changed by hand is checked as flags are
            checked = vars(parser.parse_args([
                flag(name, value) for name, value in known.items()
                if value != parser.get_default(name)]))
        except UserError as error:
            raise UserError(f"{path} is not what lab.run train wrote: {error}") from None
        config["args"] = {name: value for name, value in checked.items()
                          if name not in OF_A_CALL}
        return config
    if folder.exists() and (folder.is_file() or any(
            p.name not in ("cache", "tokenizer.json", "lock") and not p.name.endswith(".tmp")
            for p in folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no run; choose another --out")
    return None
