"""Score every adapter of a run on validation and test; draw loss against training and the clusters.

    python eval.py runs/wikitext2                       # results.json, results.md, figures
    python eval.py runs/wikitext2 --on DATA             # the same on other text
    python eval.py runs/wikitext2 --sweep clusters      # how much company is worth (study.py)
    python eval.py runs/wikitext2 --anatomy             # what the published code's flaws report
    python eval.py runs/wikitext2 --prompts prompts.txt # cluster, adapt, continue each line

A chameleon's score depends on the company that an example keeps, so controls stand beside it, from
the same weights: each example alone (its own prompt's statistic), shuffled (the statistic of
another cluster), constant (the training mean, which says nothing) and without the example's own
article. What the real statistic gains over these is what conditioning is worth; the rest is a
larger or longer-trained adapter. What a method gains over lora-match is called a gain where two
95% intervals, over seeds and over articles, both say so. Losses per example are in losses.npz.
"""

import functools
import math
import platform
import time
from pathlib import Path

from files import run_cli, whole_file, write_json, write_text
from flags import CONTROLS, eval_parser

if __name__ == "__main__":  # --help and a mistyped flag are answered before torch is loaded
    run_cli(eval_parser().parse_args)

import numpy as np
import torch
from matplotlib.figure import Figure

from common import (adapter_paths, choose_device, keep_freed_memory, label, load_adapter,
                    memory_advice, open_corpus, open_run, read_records, share_trunk, wait)
from data import Corpus, load_examples
from model import HeadAlone
from prompts import continue_prompts, score_generations, text_metrics
from scoring import held_out_company, score, scored_bytes, summed
from study import sweep


# Okabe & Ito's palette: told apart by all kinds of colour vision, and in grey.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
# Two-sided 95% points of Student's t distribution, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
TITLES = {"joint": "Trained jointly with LoRA in the transformer",
          "shared": "Heads alone, on one shared LoRA-adapted transformer"}


# ------------------------------------------------------------------------------------- scoring


def score_model(run, model, plan, args, n_bytes, control=None):
    """What an entry says of the splits, speed and latency, and the losses (N,) of each split."""
    result, rows, seconds = {}, {}, 0.0
    examples_of = run.shared if plan.get("trunk") else run.examples
    inference = args.inference or plan.get("inference")
    for split in ("validation", "test"):
        examples = examples_of[split]
        start = time.perf_counter()
        with memory_advice("lower --batch-size"):
            company = held_out_company(run, model, examples, plan, inference, control)
            rows[split], counts = score(run, model, examples, args.batch_size, company)
        seconds += time.perf_counter() - start
        found = summed(rows[split], counts)
        result[split] = found | {
            "perplexity": math.exp(found["loss"]),
            "bits_per_byte": found["nll_sum"] / math.log(2) / n_bytes[split],
        }
    n_read = sum(int(run.examples[split].length.sum()) for split in result)
    return result | {"speed": n_read / seconds, "latency": latency(run, model, company)}, rows


@torch.no_grad()
def latency(run, model, company, batch_size=32):
    """Seconds that the head takes for the next token of each of 32 requests, by their number.

    Updates are made before; a cache remembers all of the requests' rows.
    """
    head, told, length = model.lm_head, (None, None), 1
    if company is not None:
        index = company.cluster.argsort(stable=True)[:batch_size]  # whole clusters, but the last
        which = company.cluster[index].unique(return_inverse=True)[1]
        told = head.told(company.prompts, index, which, index, which)
        batch_size, told = len(index), [t.to(run.device) for t in told]
    if head.reads_company:
        length = told[0].shape[1]
    hidden = torch.randn(batch_size, length, model.config.n_embd, device=run.device,
                         dtype=run.dtype)
    updates = head.updates(told[0])
    if head.reads_company:
        call = functools.partial(head, hidden, updates, told[1], told[0], length - 1)
    else:
        updates = [u if told[1] is None else u.of(told[1]) for u in updates]
        updates = [u._replace(A=u.A.to(run.dtype), B=u.B.to(run.dtype)) for u in updates]
        call = functools.partial(head, hidden, updates)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        with run.autocast:
            call()
        wait(run.device)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / batch_size


def score_run(run, args):
    """One entry per adapter and control, for tables and results.json, and losses per example."""
    sizes = run.tokenizer.bytes_per_token()
    n_bytes = {split: scored_bytes(run.examples[split], sizes) for split in ("validation", "test")}
    entries, losses = [], {}

    def add(model, plan, control=None, path=None):
        name = label(plan) + (f", {control}" if control else "")
        finished = path is None or path.with_suffix(".last.safetensors").exists()
        name += "" if finished else " (unfinished)"
        trunk, seed = "shared" if plan.get("trunk") else "joint", plan.get("seed", 0)
        if control == "blended":
            model.lm_head.blend = True
        found, rows = score_model(run, model, plan, args, n_bytes, control)
        for split, nll in rows.items():
            losses[f"{trunk}/{name}/{seed}/{split}"] = nll
        print(f"{trunk}: {name}, seed {seed}: validation {found['validation']['loss']:.4f}, "
              f"test {found['test']['loss']:.4f}")
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        entries.append({"name": name, "trunk": trunk, "seed": seed, "lr": plan.get("lr"),
                        "parameters": parameters, "bytes": path.stat().st_size if path else 0,
                        **found})

    for trunk in ("joint", "shared"):
        paths = adapter_paths(run.folder, trunk) if trunk == "joint" or run.shared else []
        plan = {"method": "frozen", "trunk": run.trunk if trunk == "shared" else None}
        if paths or trunk == "joint":
            add(HeadAlone(run.base.config, run.base.lm_head) if plan["trunk"] else run.base, plan)
        for path in paths:
            model, plan = load_adapter(run, path)
            controls = () if plan.get("told") else model.lm_head.controls
            for control in (plan.get("told"), *controls):
                if control != "other articles" or not args.instructions:
                    add(model, plan, control, path)
    return entries, losses


# --------------------------------------------------------------------------------------- table


def spread(values, digits):
    """Mean, and standard deviation over seeds where there are several."""
    mean = f"{np.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def of_method(entries, name):
    return {entry["seed"]: entry for entry in entries if entry["name"] == name}


def difference(mine, theirs, losses, examples, split="test"):
    """Loss of `mine` less that of `theirs`, entries by seed: mean, and two 95% intervals.

    The first is Student's over paired seeds, for what training leaves to chance; the second is a
    bootstrap over articles, for what the choice of texts does: tokens of one article are no
    independent witnesses. None where there are no two seeds in common.
    """
    if not mine[0]["parameters"]:  # the frozen base, or trunk, is the same for every seed
        mine = dict.fromkeys(theirs, mine[0])
    pairs = [(mine[seed], theirs[seed]) for seed in theirs if seed in mine]
    if len(pairs) < 2:
        return None
    d = np.array([a[split]["loss"] - b[split]["loss"] for a, b in pairs])
    half = T95[min(len(d) - 1, 9)] * d.std(ddof=1) / math.sqrt(len(d))

    def rows(entry):
        return losses[f"{entry['trunk']}/{entry['name']}/{entry['seed']}/{split}"]

    nll = np.mean([rows(a) - rows(b) for a, b in pairs], axis=0)  # (N,)
    article = np.unique(examples.article, return_inverse=True)[1]
    total = np.bincount(article, nll)
    tokens = np.bincount(article, examples.length - examples.prompt)
    drawn = np.random.default_rng(0).multinomial(
        len(total), np.full(len(total), 1 / len(total)), size=2000)  # (2000, articles)
    low, high = np.percentile((drawn @ total) / (drawn @ tokens), [2.5, 97.5])
    return {"mean": d.mean(), "seeds": (d.mean() - half, d.mean() + half), "articles": (low, high)}


def verdict(found):
    low = min(found["seeds"][0], found["articles"][0])
    high = max(found["seeds"][1], found["articles"][1])
    return "gain" if high < 0 else "loss" if low > 0 else "-"


def make_table(entries, losses, examples):
    """Markdown: one row per method, over its seeds, and its difference to lora-match if it is
    there."""
    head = ["method", "trained parameters", "bytes on disk", "head, µs/token", "learning rate",
            "validation loss", "test loss", "test perplexity", "test bits/byte"]
    rival = of_method(entries, "lora-match")
    if len(rival) > 1:
        head += ["test loss less lora-match's", "95% over seeds", "95% over articles", ""]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in dict.fromkeys(entry["name"] for entry in entries):
        mine = of_method(entries, name)
        same = list(mine.values())
        rates = sorted({f"{entry['lr']:g}" for entry in same if entry["lr"]})
        cells = [name, f"{same[0]['parameters']:,}", f"{same[0]['bytes']:,}",
                 f"{1e6 * np.median([entry['latency'] for entry in same]):.1f}", ", ".join(rates)]
        for split, key, digits in (("validation", "loss", 4), ("test", "loss", 4),
                                   ("test", "perplexity", 2), ("test", "bits_per_byte", 4)):
            cells.append(spread([entry[split][key] for entry in same], digits))
        if len(rival) > 1:
            found = difference(mine, rival, losses, examples) if name != "lora-match" else None
            cells += [""] * 4 if found is None else [
                f"{found['mean']:+.4f}",
                *(f"{found[of][0]:+.4f} to {found[of][1]:+.4f}" for of in ("seeds", "articles")),
                verdict(found)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def make_notes(run, dataset, entries):
    tokens = entries[0]
    n_seeds = len({entry["seed"] for entry in entries[1:]})
    return (
        f"Data {dataset}, base of {sum(p.numel() for p in run.base.parameters()):,} "
        f"parameters, {n_seeds} seed{'s' * (n_seeds != 1)}"
        f"{' (± is the standard deviation)' * (n_seeds > 1)}. Losses in nats per scored "
        f"token: {tokens['validation']['n_tokens']:,} of validation, "
        f"{tokens['test']['n_tokens']:,} of test, the same for every method. Names after a comma "
        f"are controls: the same weights, told something else in the cluster's place. A gain or a "
        f"loss is what lies outside both intervals. Learning rates were chosen on validation where "
        f"grid.json lists several. Head: time for the next token of 32 requests, over 32, their "
        f"updates being made and all that a cache may know remembered, on {run.device} in "
        f"{str(run.dtype).removeprefix('torch.')}.\n"
    )


# ------------------------------------------------------------------------------------- figures


def draw_losses(records, frozen, path):
    """Validation loss against training tokens; seeds are a band around their mean."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(frozen, color="0.4", linestyle="--", label="frozen base")
    for i, method in enumerate(dict.fromkeys(record["method"] for record in records)):
        curves = {}
        for record in records:
            if record["method"] == method:
                curve = curves.setdefault(record["seed"], [(0, frozen)])
                curve.append((record["tokens"] / 1e6, record["loss"]))
        shortest = min(map(len, curves.values()))
        points = np.array([curve[:shortest] for curve in curves.values()])  # (seeds, points, 2)
        x, mean = points[..., 0].mean(axis=0), points[..., 1].mean(axis=0)
        name = f"{method}, {len(curves)} seed{'s' * (len(curves) > 1)}"
        axes.plot(x, mean, "os^Dv"[i % 5] + "-", color=COLOURS[i], label=name, markersize=5)
        axes.fill_between(x, points[..., 1].min(axis=0), points[..., 1].max(axis=0),
                          color=COLOURS[i], alpha=0.2, linewidth=0)
    axes.set_xlabel("training tokens of the adapter (millions)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def draw_costs(entries, path):
    """Test loss against trained parameters: who is below and to the left of whom."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(entries[0]["test"]["loss"], color="0.4", linestyle="--", label="frozen")
    names = [name for name in dict.fromkeys(entry["name"] for entry in entries[1:])
             if not any(name.endswith(f", {control}") for control in CONTROLS)]
    for i, name in enumerate(names):
        mine = of_method(entries, name).values()
        values = [entry["test"]["loss"] for entry in mine]
        parameters = next(entry["parameters"] for entry in mine)
        axes.errorbar(parameters, np.mean(values), yerr=np.std(values), capsize=3, markersize=7,
                      fmt="os^DvP*X<>dph"[i % 13], color=COLOURS[i % 7], label=name)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("test loss (nats per token)")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def typical_words(present, mine, tokenizer, n=3):
    """Words that set a cluster apart: present (N, V) in which examples, of which `mine` (N,)."""
    inside = present[mine].sum(axis=0)
    expected = present.mean(axis=0) * mine.sum()
    strength = inside * np.log(np.maximum(inside, 0.1) / np.maximum(expected, 0.1))
    words = []
    for token in np.argsort(-strength, kind="stable"):
        word = tokenizer.decode([int(token)])
        # Whole words of some length: pieces of words say little to a reader.
        if len(word) > 3 and word[0] == " " and word[1:].isalpha() and inside[token] > 1:
            words.append(word.strip())
        if len(words) == n:
            break
    return words


def draw_clusters(run, model, plan, inference, path, n_labels=7):
    """Validation prompts in the plane of most variance (PCA), coloured by cluster."""
    examples = run.examples["validation"]
    company = held_out_company(run, model, examples, plan, inference)
    features = company.prompts.features(model.lm_head.center.cpu())
    cluster = company.cluster.numpy()
    centred = features - features.mean(dim=0)
    _, scales, axes_of = torch.linalg.svd(centred, full_matrices=False)
    plane = (centred @ axes_of[:2].T).numpy()  # (N, C) @ (C, 2) -> (N, 2)
    share = (scales.square() / scales.square().sum())[:2].tolist()
    sizes = np.bincount(cluster)
    largest = np.argsort(-sizes, kind="stable")[:n_labels]
    tokens, mask = (t.numpy() for t in examples.prompts(np.arange(len(examples)),
                                                         plan["stat_scope"]))
    present = np.zeros((len(examples), run.tokenizer.vocab_size), dtype=bool)
    present[np.nonzero(mask)[0], tokens[mask]] = True
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    others = ~np.isin(cluster, largest)
    if others.any():
        axes.scatter(*plane[others].T, s=8, color="0.8", linewidths=0,
                     label=f"{len(sizes) - len(largest)} smaller clusters")
    for i, which in enumerate(largest):
        mine = cluster == which
        words = " ".join(typical_words(present, mine, run.tokenizer))
        axes.scatter(*plane[mine].T, s=22, color=COLOURS[i], marker="os^DvP*"[i], linewidths=0,
                     label=f"{sizes[which]}: {words}")
    axes.set_xlabel(f"first principal component ({share[0]:.0%} of variance)")
    axes.set_ylabel(f"second principal component ({share[1]:.0%} of variance)")
    axes.set_title(f"{label(plan)}: {len(examples):,} validation prompts in {len(sizes)} clusters",
                   fontsize=11)
    axes.legend(title="members: typical words", frameon=False, fontsize=9,
                loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------------------- main


def main(argv=None):
    """Score the run, or continue prompts; returns the entries of results.json, or token ids."""
    args = eval_parser().parse_args(argv)
    keep_freed_memory()
    folder = Path(args.run)
    run, config = open_run(folder, choose_device(args.device)[0], args.dtype)
    if args.prompts is not None:
        return continue_prompts(run, config, args)
    metrics = text_metrics(config) if args.generations else None
    data_dir, out = args.data_dir or config["args"]["data_dir"], folder
    if args.on:
        corpus, out = Corpus(args.on, data_dir), folder / f"on-{Path(args.on).stem}"
    else:
        corpus = open_corpus(config["args"]["dataset"], data_dir, config)
    if args.anatomy:
        from anatomy import dissect  # it builds on this file

        return dissect(run, config, corpus)
    run.examples = load_examples(
        corpus, run.tokenizer, config["args"]["block_size"], folder / "cache")
    del run.examples["train"]
    if adapter_paths(folder, "shared") and not args.on:
        share_trunk(run)
    if args.sweep:
        return sweep(run, args, args.sweep, COLOURS)
    args.instructions = corpus.instructions
    entries, losses = score_run(run, args)
    test = run.examples["test"]
    text = ""
    for trunk, title in TITLES.items():
        part = [entry for entry in entries if entry["trunk"] == trunk]
        if part and (trunk == "shared" or len(part) > 1 or len(part) == len(entries)):
            text += f"## {title}\n\n{make_table(part, losses, test)}\n"
    text += make_notes(run, args.on or config["args"]["dataset"], entries)
    generations = []
    if metrics:
        generations, more = score_generations(run, args, metrics)
        text += more
    write_text(out / "results.md", text)
    write_json(out / "results.json", {
        "args": {key: value for key, value in config["args"].items() if key != "data_dir"},
        "data": corpus.fingerprint, "torch": torch.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "entries": entries,
        "generations": generations,
    })
    with whole_file(out / "losses.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **losses)
    print("\n" + text)
    if args.on:  # the figures are of the training's own data
        return entries
    trunk = entries[-1]["trunk"] if not adapter_paths(folder) else "joint"
    part = [entry for entry in entries if entry["trunk"] == trunk]
    drawn = {(entry["name"], entry["lr"], trunk) for entry in part}
    records = [r for r in read_records(folder)
               if (r["method"], r.get("lr"), r.get("trunk")) in drawn]
    draw_losses(records, part[0]["validation"]["loss"], folder / "loss.png")
    part = [entry for entry in entries if entry["trunk"] == entries[-1]["trunk"]]
    draw_costs(part, folder / "pareto.png")
    print(f"wrote {folder / 'loss.png'} and {folder / 'pareto.png'}")
    chameleons = [path for trunk in TITLES for path in adapter_paths(folder, trunk)
                  if path.name.startswith("chameleon")]
    if chameleons and len(run.examples["validation"]) > 2:
        model, plan = load_adapter(run, chameleons[0])
        draw_clusters(run, model, plan, args.inference or plan["inference"],
                      folder / "clusters.png")
        print(f"wrote {folder / 'clusters.png'}")
    return entries


if __name__ == "__main__":
    run_cli(main)
