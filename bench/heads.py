"""The time of each head for the next token of each of 32 requests, as lab's tables have it.

    python -m lab.run train --dataset wikitext2 --base-epochs 1e-9 --methods frozen --out runs/time
    python bench/heads.py runs/time

Untrained heads of lab/train.py's defaults, in turns in one process, among the clusters of the test
split: neither the base nor what a head has learnt changes its time.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import choose_device, keep_freed_memory, run_cli
from lab.common import adapt, open_corpus, open_run
from lab.data import load_examples
from lab.eval import latency
from lab.flags import COUNT, DEVICES, train_parser
from lab.scoring import held_out
from lab.train import adapter_plan
from train import Parser


@torch.no_grad()
def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="run folder that `python -m lab.run train` wrote")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--repeats", type=COUNT, default=5)
    args = parser.parse_args()
    keep_freed_memory()
    run, config = open_run(Path(args.run), choose_device(args.device)[0])
    settings = config["args"]
    corpus = open_corpus(settings["dataset"], settings["data_dir"], config)
    run.examples = load_examples(corpus, run.tokenizer, settings["block_size"])
    defaults = train_parser().parse_args([])
    defaults.accumulate = 1
    heads = {"frozen": (run.base, None)}
    for method in ("lora", "chameleon", "cache", "company-cache"):
        plan = adapter_plan(run, defaults, method, 0, 1e-3)
        model = adapt(run.base, plan).eval()
        heads[method] = model, held_out(run, model, run.examples["test"], plan)
    times = {name: [] for name in heads}
    for _ in range(args.repeats):
        for name, (model, told) in heads.items():
            times[name].append(1e6 * latency(run, model, run.examples["test"], told))
    print(f"{settings['dataset']}, {run.device}, {settings['dtype']}, {torch.get_num_threads()} "
          f"threads, medians of {args.repeats}:", flush=True)
    for name, values in times.items():
        ratio = statistics.median(values) / statistics.median(times["lora"])
        print(f"  {name}: {statistics.median(values):,.0f} µs a token, {ratio:.1f} x lora")


if __name__ == "__main__":
    run_cli(main)
