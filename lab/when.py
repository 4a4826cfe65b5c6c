"""When does it pay to adapt to the company? Four sweeps over a finished fair test, one figure.

    python -m lab.run when runs/mixed

Nothing is trained: the `counts` heads of lab/fair.py are scored on validation with other companies.
The gain is how far `counts` is below the better of the frozen base, `lora` and `lora-match`; the
worth of company how far it is below the same head when it is trained on own prompts and told them.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import train as core
from cluster import kmeans
from common import UserError, choose_device, read_tensors, whole_file, write_json
from eval import COLOURS
from hypernet import features
from lab.fair import (CLUSTER, OWN, SEEN, UNSEEN, Stream, counts_of, company, make_head, mean,
                      means_of, pick, Table)
from lab.model import HeadAlone
from matplotlib.figure import Figure

ARMS = {"lora": "lora", "lora-match": "lora-match", "counts": "counts",
        "counts, trained on own prompts": "counts"}


def load(run, stream, arm, seed):
    """A trained head of a finished fair test, from adapters/ or, of the first seed, the grid's
    best."""
    path = run.folder / "adapters" / f"{arm}-seed{seed}.safetensors"
    if not path.exists():
        raise UserError(f"{path} is missing; make it first: python -m lab.run fair ...")
    model = HeadAlone(stream.config, make_head(ARMS[arm], stream.weight, 1))
    core.load_weights(model, read_tensors(path)[0], path)
    return model


class Sweep:
    """Losses of all heads on any rows, with any company."""

    def __init__(self, run, seeds):
        tensors = read_tensors(run.folder / "states.safetensors")[0]
        self.run, self.stream, self.seeds = run, Stream(tensors), seeds
        self.static = {}  # of rows, the best static head's loss for each seed
        self.models = {(arm, seed): load(run, self.stream, arm, seed)
                       for arm in ARMS for seed in seeds}

    def losses(self, rows, size=CLUSTER, seen=None):
        """Gain and worth of company (seeds,) on `rows`, whose statistics see `seen` alone."""
        seen, weight = rows if seen is None else seen, self.stream.weight
        counts, means = counts_of(seen, weight), mean(means_of(seen, weight))
        one, found = torch.ones(len(rows), 1), []
        key = tuple(rows.start.tolist())
        if key not in self.static:
            frozen = HeadAlone(self.stream.config, make_head("frozen", weight, 1))
            least = self.mean_loss(frozen, rows, None)
            self.static[key] = [min(least, *(self.mean_loss(self.models[arm, seed], rows, None)
                                             for arm in ("lora", "lora-match")))
                                for seed in self.seeds]
        for seed, best in zip(self.seeds, self.static[key], strict=True):
            points = features(means, self.stream.center)
            cluster = kmeans(points, max(1, round(len(rows) / size)), core.generator(seed))[1]
            total = company(counts, cluster, "", rows.document, rows.kind, None)
            own = Table(counts, counts, one)
            mine = self.mean_loss(self.models["counts", seed], rows, Table(counts, total, one))
            alone = self.mean_loss(self.models["counts, trained on own prompts", seed], rows, own)
            found.append((best - mine, alone - mine))
        return torch.tensor(found).T.tolist()

    def mean_loss(self, model, rows, table):
        nll, count = core.score(self.run, model, rows, table)
        return float(nll.sum() / count.sum())


def some_rows(rows, kinds, n):
    """n rows, as many of each of the kinds."""
    each = [(rows.kind == k).nonzero()[:, 0][:max(1, n // len(kinds))] for k in kinds]
    return pick(rows, torch.cat(each))


def sweeps(sweep):
    """Name of each sweep -> {x: (gain of each seed, worth of each seed)}."""
    rows = sweep.stream.rows["validation"]
    unseen = sweep.stream.sets["validation, unseen"]
    found = {"rows in a cluster": {n: sweep.losses(unseen, size=n)
                                   for n in (1, 2, 4, 8, 16, 32, 64)}}
    found["tokens of a prompt"] = {}
    for n in (4, 8, 16, 32, 64):
        seen = replace(unseen, prompt=unseen.prompt.clamp(max=n))
        found["tokens of a prompt"][n] = sweep.losses(unseen, seen=seen)
    smallest = min(int((rows.kind == k).sum()) for k in range(len(SEEN + UNSEEN)))
    order = [4, 0, 5, 1, 6, 2, 7, 3]  # of a kind that is unseen, one that is seen, and so on
    found["kinds in the stream"] = {
        n: sweep.losses(some_rows(rows, order[:n], smallest)) for n in (1, 2, 4, 8)}
    names = SEEN + UNSEEN + OWN
    found["kind of text"] = {
        names[k]: sweep.losses(pick(rows, (rows.kind == k).nonzero()[:, 0]))
        for k in sorted(set(rows.kind.tolist()), reverse=True)}
    return found


def draw(found, path):
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(2, 2).flat, found.items(), strict=True):
        for i, label in enumerate(("gain over the best static head", "worth of company")):
            values = torch.tensor([point[i] for point in points.values()])  # (x, seeds)
            x = torch.arange(len(points))
            axes.plot(x, values.mean(dim=1), "o-" if name != "kind of text" else "o",
                      color=COLOURS[i], label=label)
            axes.fill_between(x, values.amin(dim=1), values.amax(dim=1), color=COLOURS[i],
                              alpha=0.2, linewidth=0)
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set(xlabel=name, ylabel="nats per token", xticks=range(len(points)))
        axes.set_xticklabels(points, rotation=30 if name == "kind of text" else 0)
        axes.grid(alpha=0.3)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    print(f"wrote {path}")


def make_parser():
    parser = core.Parser(prog="lab.run when")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("run", help="folder that lab.run fair wrote")
    parser.add_argument("--seeds", default="0,1,2",
                        type=lambda text: core.some(core.number(int, 0, 2**31), text))
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    run = core.Run(Path(args.run), choose_device("cpu")[0])
    found = sweeps(Sweep(run, args.seeds))
    write_json(run.folder / "when.json", found)
    draw(found, run.folder / "when.png")
    return found
