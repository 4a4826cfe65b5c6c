"""The anatomy of an inflated result: what each flaw of the published code does to the gain.

    python -m lab.run eval runs/NAME --anatomy

Five flaws have a part in the gain over LoRA that the public code of ChameleonLLM (arXiv 2502.04315)
prints, and one habit: both arms get the same learning rate, which nobody chose. Here a LoRA head
and a chameleon head are trained and scored without any of them, with each alone, and with all.
"Reported gain" is what the flawed rule says. "Gain that is left" is what the same chameleon weights
gain by the honest rule, over one and the same LoRA: trained honestly, in the transformer and the
head, with as many parameters as chameleon's.

As in that code a row is one line of text, cut or padded to 128 tokens with the end token, and
blank lines are left out. The transformer never changes here, so its last hidden states are computed
once and each head is trained on those in seconds. In a causal model padding at the right end never
changes the state of a real token: what it changes is what is counted.

Departures from that code: batches are drawn anew every epoch, and the hyper-network starts as LoRA
does, with standardised statistics and no dropout (see `hypernet.py`).
"""

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch

from common import UserError, write_json, write_text
from hypernet import ChameleonHead, cluster_statistics, prompt_means
from lab.common import adapter_path, autocast, load_adapter, n_trained, read_records
from lab.data import IGNORE, Examples
from lab.eval import COLOURS, figure, markdown, spread
from lab.model import HeadAlone
from lab.scoring import cluster_training, held_out, score
from lab.train import shuffled
from model import LoRAHead
from train import learning_rate, losses

FLAWS = {
    "statistics": "statistics over the whole sequence",
    "last": "loss at the last position, unshifted",
    "padding": "padding counted",
    "head only": "LoRA in the head alone",
    "parameters": "33 times LoRA's parameters",
    "rate": "one learning rate, never chosen",
}
SCORING = {"statistics", "last", "padding"}  # the others are flaws of what is trained
IRRELEVANT = {"lora": {"statistics"}, "chameleon": {"parameters"}}  # change nothing for that arm
LIMITS = {"train": 4096, "validation": 1024}  # rows: a fixed draw, the same for every number
SEEDS, GRID, EPOCHS = (0, 1, 2), (1e-3, 3e-3, 1e-2, 3e-2), 1  # the same for both arms
RATE = 1e-3  # train.py's default, where it is not chosen


def short_rows(documents, tokenizer, T, limit):
    """Tokens (N, T), padded with the end token, and `Examples` of their real tokens.

    One row a line of running text, or an instruction with its response. Of what does not fit
    into T tokens the rest is dropped; blank lines, and rows without a continuation, are left out.
    """
    texts = [(d.prompt, line) for d in documents
             for line in ([d.text] if d.prompt else d.text.split("\n")) if line.strip()]
    chosen = np.random.default_rng(0).permutation(len(texts))[:limit]
    rows, prompts = [], []
    for prompt, text in (texts[i] for i in chosen):
        prompt = tokenizer.encode(prompt)
        row = (prompt + tokenizer.encode(text) + [tokenizer.end] * bool(prompt))[:T]
        n = len(prompt) or max(1, len(row) // 4)  # a prompt as in data.py
        if n < len(row):
            rows.append(row)
            prompts.append(n)
    if not rows:
        raise UserError(f"--anatomy: no line has a prompt and a continuation within {T} tokens")
    padded = torch.tensor([row + [tokenizer.end] * (T - len(row)) for row in rows])
    place, length = torch.arange(len(rows)), torch.tensor([len(row) for row in rows])
    return padded, Examples(padded.view(-1), place * T, length, torch.tensor(prompts), place)


@dataclass
class CachedRows(Examples):
    """Rows whose transformer has been run: states (N, T, C), and targets (N, T).

    targets[i, t] is what states[i, t] is scored on, IGNORE where it is not.
    """

    targets: torch.Tensor | None = None

    def batch(self, index, whole=False):
        """States (B, n, C) and targets (B, n): each row's scored places first, and no more columns
        than the most that a row has. A head looks at each place by itself."""
        targets = self.targets[index]  # (B, T)
        n = int((targets != IGNORE).sum(dim=1).max())
        place = (targets == IGNORE).long().argsort(dim=1, stable=True)[:, :n]  # (B, n)
        row = torch.arange(len(index))[:, None]
        return self.states[index][row, place], targets[row, place]


def under(flaws, rows, states):
    """The same rows as a set of flaws sees them: what is real, and what is scored."""
    N, T = states.shape[:2]
    seen = replace(rows, length=torch.full((N,), T) if "padding" in flaws else rows.length)
    targets = torch.full((N, T), IGNORE)
    if "last" in flaws:
        last = seen.length[:, None] - 1
        targets.scatter_(1, last, rows.tokens.view(N, T).gather(1, last))
    else:
        honest = seen.batch(torch.arange(N))[1]  # (N, longest - 1): the token after each
        targets[:, : honest.shape[1]] = honest
    return CachedRows(**vars(seen) | {"states": states}, targets=targets)


@torch.no_grad()
def last_states(run, model, tokens):
    """Last hidden states (N, T, C) of tokens (N, T), kept on the CPU in the products' type."""
    with autocast(run):
        return torch.cat([model.hidden(rows.to(run.device)).to(run.dtype).cpu()
                          for rows in tokens.split(64)])


def make_head(arm, flaws, weight, rank, alpha, n_clusters):
    """An untrained head; LoRA's rank is raised until it has as many parameters as chameleon.

    Its alpha stays as it is (`lora-match` raises it with the rank): here the stronger rival.
    """
    chameleon = ChameleonHead(weight, rank, alpha, n_clusters)
    if arm == "chameleon":
        return chameleon
    if "parameters" not in flaws:
        rank = round(n_trained(chameleon) / sum(weight.shape))
    return LoRAHead(weight, rank, alpha)


def scope(flaws):
    return "full" if "statistics" in flaws else "prompt"


class Laboratory:
    """The rows, their states under both transformers, and what was trained and scored on them."""

    def __init__(self, run, args, corpus, adapted=None):
        T = min(128, run.base.config.block_size)
        self.run, self.args, self.rows, self.states = run, args, {}, {}
        for split, limit in LIMITS.items():
            tokens, self.rows[split] = short_rows(corpus.documents(split), run.tokenizer, T, limit)
            for name, model in (("adapted", adapted or run.base), ("frozen", run.base)):
                self.states[split, name] = last_states(run, model, tokens)
        # Many rows of the table ask the same; it is trained and scored once.
        self.trained, self.score = functools.cache(self.train), functools.cache(self.score)

    def see(self, split, flaws):
        trunk = "frozen" if "head only" in flaws else "adapted"
        return under(flaws, self.rows[split], self.states[split, trunk])

    def train(self, arm, flaws, seed, lr):
        """A head after EPOCHS passes over the training rows, as `flaws` see them."""
        run, args, rows = self.run, self.args, self.see("train", flaws)
        N, batch_size = len(rows), args["batch_size"]
        k, weight = -(-N // batch_size), run.base.transformer.wte.weight
        torch.manual_seed(seed)
        head = make_head(arm, flaws, weight, args["rank"], args["alpha"], k).to(run.device)
        model, cluster = HeadAlone(run.base.config, head), None
        if arm == "chameleon":
            plan = {"method": arm, "clusters": k, "stat_scope": scope(flaws)}
            means, count = prompt_means(rows.seen(plan), weight)
            with torch.no_grad(), autocast(run):
                cluster = cluster_training(run, head, plan, means, count,
                                           torch.Generator().manual_seed(seed))
        parameters = [p for p in head.parameters() if p is not head.weight]
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
        batches = [b for e in range(EPOCHS) for b in shuffled(N, batch_size, seed, e, cluster)]
        for step, index in enumerate(batches):
            optimizer.param_groups[0]["lr"] = learning_rate(step, len(batches), lr)
            states, targets = rows.batch(index)
            told = None
            if cluster is not None:
                told = cluster_statistics(means[index], count[index], cluster[index])
            nll = losses(model, states, targets, told, run.dtype).sum()
            (nll / (targets != IGNORE).sum()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return head

    def score(self, head, by, seed, control=None):
        """Mean negative log-likelihood of the validation rows, in nats, by the project's metric."""
        model, rows = HeadAlone(self.run.base.config, head), self.see("validation", by)
        plan = {"method": "chameleon", "cluster_size": self.args["batch_size"], "seed": seed,
                "stat_scope": scope(by)}
        told = held_out(self.run, model, rows, plan, "fit", control)
        # Not `score`'s own: what is scored is in the targets, and under a flaw not all of that.
        nll, _ = score(self.run, model, rows, told)
        return float(nll.sum() / (rows.targets != IGNORE).sum())

    def rate(self, arm, flaws):
        """The learning rate of GRID that does best with seed 0, by the rule that it is for."""
        if "rate" in flaws:
            return RATE
        return min(GRID, key=lambda lr: self.loss(arm, flaws, flaws, 0, lr))

    def loss(self, arm, flaws, by, seed, lr=None, control=None):
        """Loss of an arm that was trained under `flaws` and is scored under `by` (frozensets)."""
        lr = lr or self.rate(arm, flaws - IRRELEVANT[arm])
        flaws, by = flaws - IRRELEVANT[arm] - {"rate"}, by & {"head only", *SCORING}
        head = self.trained(arm, flaws, seed, lr)
        return self.score(head, by - IRRELEVANT[arm], seed, control)


def gain(lora, chameleon):
    """Nats per token that chameleon's losses are lower by, a number per seed."""
    return [theirs - own for theirs, own in zip(lora, chameleon, strict=True)]


def compare(lab, flaws):
    """What a set of flaws reports, and what is left of it: lists with a number per seed."""
    none, trunk = frozenset(), flaws & {"head only"}

    def losses_of(arm, trained, by, control=None):
        return [lab.loss(arm, trained, by, seed, control=control) for seed in SEEDS]

    found = {arm: losses_of(arm, flaws, flaws) for arm in IRRELEVANT}
    found["chameleon, shuffled"] = losses_of("chameleon", flaws, flaws, "shuffled")
    found["chameleon by the honest rule"] = losses_of("chameleon", flaws, trunk)
    found["reported gain"] = gain(found["lora"], found["chameleon"])
    found["gain, shuffled"] = gain(found["lora"], found["chameleon, shuffled"])
    found["gain left"] = gain(losses_of("lora", none, none), found["chameleon by the honest rule"])
    found["learning rates"] = [lab.rate(arm, flaws) for arm in IRRELEVANT]
    if flaws & SCORING or not flaws:
        found["re-scored"] = {arm: losses_of(arm, none, flaws & SCORING) for arm in IRRELEVANT}
        found["re-scored"]["reported gain"] = gain(*found["re-scored"].values())
    return found


def dissect(run, config, corpus):
    """Write anatomy.md, .json and .png into the run folder; returns what is in the .json."""
    joint = [r for r in read_records(run.folder)
             if (r["method"], r.get("trunk")) == ("lora", "joint")]
    best = adapter_path(run, "lora", min(joint, key=lambda r: r["loss"])["seed"]) if joint else None
    adapted = load_adapter(run, best)[0] if best and best.exists() else None
    lab = Laboratory(run, config["args"], corpus, adapted)
    notes = make_notes(lab, adapted)
    print(notes)
    cases = {"none (honest)": frozenset(), **{FLAWS[f]: frozenset({f}) for f in FLAWS},
             "last position and one learning rate": frozenset({"last", "rate"}),
             "the first five": frozenset(FLAWS) - {"rate"}, "all six": frozenset(FLAWS)}
    if adapted is None:  # then there is no LoRA in the transformer to leave out
        del cases[FLAWS["head only"]]
    found = {}
    for name, flaws in cases.items():
        found[name] = case = compare(lab, flaws)
        print(f"{name}: reported gain {spread(case['reported gain'], 3)}, "
              f"left {spread(case['gain left'], 3)}", flush=True)
    table = make_table(found)
    write_text(run.folder / "anatomy.md", table + "\n" + notes)
    write_json(run.folder / "anatomy.json", {"notes": notes, "seeds": SEEDS, "cases": found})
    print(f"\n{table}")
    draw(found, run.folder / "anatomy.png")
    return found


def make_table(found):
    """Markdown: a row per flaw, trained and scored under it, and re-scored under it alone."""
    rows = [("flaw", "LoRA", "chameleon", "reported gain", "the same, shuffled",
             "gain that is left", "reported gain, re-scored alone")]
    for name, case in found.items():
        cells = [spread(case[key], 3) for key in (
            "lora", "chameleon", "reported gain", "gain, shuffled", "gain left")]
        cells.append(spread(case["re-scored"]["reported gain"], 3) if "re-scored" in case else "")
        rows.append([name, *cells])
    return markdown(rows)


def make_notes(lab, adapted):
    rows, heads = lab.rows["validation"], [
        n_trained(make_head(arm, flaws, lab.run.base.lm_head.weight, lab.args["rank"], 1.0, 1))
        for arm, flaws in (("chameleon", ()), ("lora", ()), ("lora", ("parameters",)))]
    T = lab.states["validation", "frozen"].shape[1]
    padded = float((rows.length < T).double().mean())
    return (
        f"Nats per token that the row's rule scores, ± over {len(SEEDS)} seeds; a gain of 0.01 is "
        f"1% of perplexity. 'Shuffled': the same weights are told another cluster's statistic. "
        f"'Gain that is left': they are scored by the honest rule, against the LoRA of the first "
        f"row. 'Re-scored alone': the heads of the first row, not trained again. "
        f"{len(lab.rows['train']):,} training rows, passed over {EPOCHS} times, and {len(rows):,} "
        f"validation rows of at most {T} tokens; {padded:.0%} of the latter end in "
        f"padding. Learning rate: for either arm the best of {GRID} with seed 0, by the rule of "
        f"its row; as one rate {RATE}. Parameters: chameleon {heads[0]:,}, LoRA "
        f"{heads[1]:,} or, 33 times fewer, {heads[2]:,}."
        + " The run has no joint LoRA adapter: the transformer is the frozen one." * (not adapted)
        + "\n")


def draw(found, path, widest=20):
    """Reported gain against what is left of it; a loss beyond `widest` nats is written out."""
    place, ticks = np.arange(len(found))[::-1], [-10, -1, -0.1, -0.01, 0, 0.01, 0.1, 1, 10]
    with figure(path, "gain over LoRA (nats per token; logarithmic beyond ±0.01)", "", (8.5, 4.5),
                "x", loc="outside upper center", ncols=2) as axes:
        for key, marker, name, colour, shift in (
                ("reported gain", "o", "reported: trained and scored under the flaw", 1, 0.15),
                ("gain left", "s", "left: the same weights by the honest rule", 0, -0.15)):
            gains = np.array([case[key] for case in found.values()])  # (rows, seeds)
            at, mean, colour = place + shift, gains.mean(axis=1), COLOURS[colour]
            axes.plot(mean.clip(-widest, widest), at, marker, color=colour, label=name)
            axes.hlines(at, gains.min(axis=1).clip(-widest), gains.max(axis=1).clip(-widest),
                        color=colour)
            for x, y in zip(mean, at, strict=True):
                if x < -widest:
                    axes.annotate(f"{x:,.0f}", (-widest, y), (6, -9), textcoords="offset points",
                                  color=colour, fontsize=9)
        axes.axvline(0, color="0.4", linewidth=1)
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks(place, list(found))
