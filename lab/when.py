"""When does it pay to adapt to the company? Four sweeps over a finished fair test, one figure.

    python -m lab.run when runs/mixed

Nothing is trained: the `counts` heads of lab/fair.py are scored on validation with other companies.
The gain is how far `counts` is below the better of the frozen base, `lora` and `lora-match`; the
worth of company how far it is below the same head when it is trained on own prompts and told them.
"""

from dataclasses import replace
from pathlib import Path

import torch

import train as core
from cluster import kmeans
from common import UserError, read_tensors, whole_file, write_json
from eval import COLOURS
from hypernet import features
from lab import fair
from lab.fair import (CLUSTER, KINDS, SEEN, UNSEEN, Stream, counts_of, company, make_head, mean,
                      means_of, pick, Table)
from lab.model import HeadAlone
from matplotlib.figure import Figure

ARMS = ("lora", "lora-match", "counts", "counts, trained on own prompts")


def load(run, stream, arm, seed):
    """A trained head of a finished fair test."""
    path = run.folder / "adapters" / f"{arm}-seed{seed}.safetensors"
    if not path.exists():
        raise UserError(f"{path} is missing; make it first: python -m lab.run fair ...")
    model = HeadAlone(stream.config, make_head(fair.ARMS[arm].head, stream.weight, 1))
    core.load_weights(model, read_tensors(path)[0], path)
    return model


class Sweep:
    """Losses of all heads on any rows, with any company."""

    def __init__(self, run, seeds):
        tensors = read_tensors(run.folder / "states.safetensors")[0]
        self.run, self.stream, self.seeds = run, Stream(tensors), seeds
        self.known = {}
        self.models = {(arm, seed): load(run, self.stream, arm, seed)
                       for arm in ARMS for seed in seeds}
        frozen = HeadAlone(self.stream.config, make_head("frozen", self.stream.weight, 1))
        self.models |= {("frozen", seed): frozen for seed in seeds}

    def losses(self, rows, size=CLUSTER, seen=None, n_scored=None):
        """Sums of losses (seeds, 5) of the first n_scored `rows`, and tokens: of the frozen base,
        lora, lora-match, counts, and counts on own prompts. Statistics see `seen` alone.
        """
        seen, weight = rows if seen is None else seen, self.stream.weight
        counts, means = counts_of(seen, weight), mean(means_of(seen, weight))
        scored = torch.arange(len(rows) if n_scored is None else n_scored)
        some, one, sums = pick(rows, scored), torch.ones(len(rows), 1), []
        for seed in self.seeds:
            points = features(means, self.stream.center)
            cluster = kmeans(points, max(1, round(len(rows) / size)), core.generator(seed))[1]
            total = company(counts, cluster, "", rows.document, rows.kind, None)
            static = [self.static(arm, seed, some) for arm in ("frozen", "lora", "lora-match")]
            told = [self.loss("counts", seed, some, Table(counts, total, one)),
                    self.loss("counts, trained on own prompts", seed, some,
                              Table(counts, counts, one))]
            sums.append(static + told)
        return torch.tensor(sums), int((some.length - some.prompt).sum())

    def loss(self, arm, seed, rows, table=None):
        return float(core.score(self.run, self.models[arm, seed], rows, table)[0].sum())

    def static(self, arm, seed, rows):
        """The loss of a head that is told nothing: the same for every company."""
        key = (arm, seed if arm != "frozen" else 0, *rows.start.tolist())
        if key not in self.known:
            self.known[key] = self.loss(arm, seed, rows)
        return self.known[key]


def gain_and_worth(sums, n):
    """Gain over the best static head, and worth of company, of each seed: two lists of nats."""
    frozen, lora, match, counts, alone = (sums / n).T
    best = torch.stack([frozen, lora, match]).amin(dim=0)
    return (best - counts).tolist(), (alone - counts).tolist()


def in_turn(rows, kind):
    """Rows of a kind, one of each document, then a second of each, and so on: an index."""
    mine = (rows.kind == kind).nonzero()[:, 0]
    seen, turn = {}, []
    for document in rows.document[mine].tolist():
        turn.append(seen.get(document, 0))
        seen[document] = turn[-1] + 1
    return mine[torch.tensor(turn).argsort(stable=True)]


def of_kinds(sweep, rows, n, in_all=64, size=8, scored=8):
    """Gain and worth where n kinds share a stream of 64 rows: 8 rows of each kind are scored, the
    same for every n, and the kinds take turns as the one that is scored."""
    total, tokens, kinds = 0, 0, len(SEEN + UNSEEN)
    order = [4, 0, 5, 1, 6, 2, 7, 3]  # of a kind that is unseen, one that is seen, and so on
    for first in range(kinds):
        mixed = [order[(first + i) % kinds] for i in range(n)]
        index = [in_turn(rows, kind)[:in_all // n] for kind in mixed]
        sums, count = sweep.losses(pick(rows, torch.cat(index)), size=size,
                                   n_scored=min(scored, len(index[0])))
        total, tokens = total + sums, tokens + count
    return gain_and_worth(total, tokens)


def sweeps(sweep):
    """Name of each sweep -> {x: (gain of each seed, worth of each seed)}."""
    rows = sweep.stream.rows["validation"]
    unseen = sweep.stream.sets["validation, unseen"]
    found = {"rows in a cluster": {n: gain_and_worth(*sweep.losses(unseen, size=n))
                                   for n in (1, 2, 4, 8, 16, 32, 64)}}
    found["tokens of a prompt"] = {}
    for n in (4, 8, 16, 32, 64):
        seen = replace(unseen, prompt=unseen.prompt.clamp(max=n))
        found["tokens of a prompt"][n] = gain_and_worth(*sweep.losses(unseen, seen=seen))
    found["kinds in the stream"] = {n: of_kinds(sweep, rows, n) for n in (1, 2, 4, 8)}
    found["kind of text"] = {
        KINDS[k]: gain_and_worth(*sweep.losses(pick(rows, (rows.kind == k).nonzero()[:, 0])))
        for k in sorted(set(rows.kind.tolist()), reverse=True)}
    return found


def draw(found, path):
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(2, 2).flat, found.items(), strict=True):
        for i, label in enumerate(("gain over the best static head", "worth of company")):
            values = torch.tensor([point[i] for point in points.values()])  # (x, seeds)
            x = torch.arange(len(points))
            mean_of, low, high = values.mean(dim=1), values.amin(dim=1), values.amax(dim=1)
            if name == "kind of text":  # kinds have no order: nothing to connect
                axes.errorbar(x, mean_of, torch.stack([mean_of - low, high - mean_of]), fmt="o",
                              capsize=3, color=COLOURS[i], label=label)
                continue
            axes.plot(x, mean_of, "o-", color=COLOURS[i], label=label)
            axes.fill_between(x, low, high, color=COLOURS[i], alpha=0.2, linewidth=0)
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
    parser.formatter_class = core.Help
    parser.add_argument("run", help="folder that lab.run fair wrote")
    parser.add_argument("--seeds", default="0,1,2",
                        type=lambda text: core.some(core.number(int, 0, 2**31), text))
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    run = core.Run(Path(args.run), torch.device("cpu"))
    found = sweeps(Sweep(run, args.seeds))
    write_json(run.folder / "when.json", found)
    draw(found, run.folder / "when.png")
    return found
