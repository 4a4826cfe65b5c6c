"""Score every adapter of a run on validation and test; draw loss against training and the clusters.

    python -m lab.run eval RUN                       # results.json, results.md, figures
    python -m lab.run eval RUN --on DATA             # the same on other text
    python -m lab.run eval RUN --sweep clusters      # how much company is worth (study.py)
    python -m lab.run eval RUN --anatomy             # what the published code's flaws report
    python -m lab.run eval RUN --prompts prompts.txt # cluster, adapt, continue each line

A chameleon's score depends on the company that an example keeps, so controls stand beside it, from
the same weights: each example alone (its own prompt's statistic), shuffled (the statistic of
another cluster), constant (the training mean, which says nothing) and without the example's own
article. What the real statistic gains over these is what conditioning is worth; the rest is a
larger or longer-trained adapter. What a method gains over lora-match is called a gain where two
95% intervals, over seeds and over articles, both say so. Losses per example are in losses.npz.
"""

import math
import platform
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from common import (UserError, choose_device, keep_freed_memory, whole_file, write_json,
                    write_text)
from eval import COLOURS
from lab.cache import CacheHead
from lab.common import (adapter_paths, autocast, has_finished, label, load_adapter, n_trained,
                        open_corpus, open_run, read_records, share_trunk, wait)
from lab.data import Corpus, load_examples
from lab.flags import CONTROLS, CONTROLS_OF, OF_ARTICLES, parse_eval, read_json
from lab.heads import MadeHead, PromptTuningHead
from lab.model import HeadAlone
from lab.prompts import continue_prompts, score_generations, telling_words, text_metrics
from lab.scoring import held_out, is_told, score, scored_bytes, summed

MARKERS = "os^DvP*X<>ph8"
BESIDE = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}  # a legend, of the axes
# Two-sided 95% points of Student's t distribution, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
TITLES = {"joint": "Trained jointly with LoRA in the transformer",
          "shared": "Heads alone, on one shared LoRA-adapted transformer"}


# ------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def latency(run, model, examples, told, batch_size=32):
    """Seconds that the head takes for the next token of each of 32 requests, by their number.

    Updates are made before; a cache remembers all of the requests' rows.
    """
    head, length, rest = model.lm_head, 1, ()
    if told is not None:
        index = told.cluster.argsort(stable=True)[:batch_size]  # whole clusters, but the last
        batch_size = len(index)
    if isinstance(head, CacheHead):
        which = told.cluster[index].unique(return_inverse=True)[1]
        rest = [t.to(run.device) for t in head.told(examples, index, which, index, which)[1:]]
        length = rest[0].shape[1]
        wanted = torch.zeros(batch_size, length, dtype=torch.bool, device=run.device)
        wanted[:, -1] = True
        rest.append(wanted)
    elif is_told(head) and not isinstance(head, PromptTuningHead):
        A, B = head.factors(told.table[index].to(run.device))
        head = MadeHead(head.weight, (head.scale * A).to(run.dtype), B.to(run.dtype))
    hidden = torch.randn(batch_size, length, model.config.n_embd, device=run.device,
                         dtype=run.dtype)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        with autocast(run):
            head(hidden, *rest)
        wait(run.device)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / batch_size


def score_run(run, args):
    """One entry per adapter and control, for tables and results.json, and losses per example."""
    sizes, entries, losses = run.tokenizer.bytes_per_token(), [], {}
    n_bytes = {split: scored_bytes(rows, sizes) for split, rows in run.examples.items()}

    def add(model, plan, control=None, path=None):
        name, seed = label(plan), plan.get("seed", 0)
        if not has_finished(path or run.folder / "base.safetensors"):
            name += " (unfinished)"
        if control != plan.get("told"):
            name += f", {control}"
        if control == "blended":
            model.lm_head.blend = True
        keep_freed_memory()
        found = {}
        for split, examples in (run.shared if plan.get("trunk") else run.examples).items():
            told = held_out(run, model, examples, plan, args.inference, control)
            nll, counts = score(run, model, examples, told)
            losses[f"{trunk}/{name}/{seed}/{split}"] = nll.numpy()
            found[split] = result = summed(nll, counts)
            # Of a training gone wrong it may be beyond all numbers.
            result["perplexity"] = math.exp(result["loss"]) if result["loss"] < 100 else None
            result["bits_per_byte"] = result["nll_sum"] / math.log(2) / n_bytes[split]
        found["latency"] = latency(run, model, examples, told)
        print(f"{trunk}: {name}, seed {seed}: validation {found['validation']['loss']:.4f}, "
              f"test {found['test']['loss']:.4f}")
        entries.append({"name": name, "trunk": trunk, "seed": seed, "lr": plan.get("lr"),
                        "parameters": n_trained(model), "bytes": path.stat().st_size if path else 0,
                        "plan": plan, **found})

    frozen = {"joint": run.base}
    if run.shared:
        frozen["shared"] = HeadAlone(run.base.config, run.base.lm_head)
    for trunk in frozen:  # what is damaged is said before the work, not after it
        for path in adapter_paths(run.folder, trunk):
            load_adapter(run, path)
    for trunk, model in frozen.items():
        add(model, {"method": "frozen", "trunk": run.trunk if trunk == "shared" else None})
        for path in adapter_paths(run.folder, trunk):
            model, plan = load_adapter(run, path)
            controls = () if plan.get("told") else CONTROLS_OF.get(plan["method"], ())
            for control in (plan.get("told"), *controls):
                if control not in OF_ARTICLES or not args.instructions:  # each is an article
                    add(model, plan, control, path)
    return entries, losses


# --------------------------------------------------------------------------------------- table


def markdown(rows):
    """A table of rows of cells, the first row its head; numbers, to the right, but in column 1."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines) + "\n"


def spread(values, digits):
    """Mean, and standard deviation over seeds where there are several."""
    mean = f"{np.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def of_method(entries, name):
    return {entry["seed"]: entry for entry in entries if entry["name"] == name}


def difference(mine, theirs, losses, examples):
    """Loss of `mine` less that of `theirs`, entries by seed: mean, and two 95% intervals.

    The first is Student's over paired seeds, for what training leaves to chance; the second is a
    bootstrap over articles, for what the choice of texts does: tokens of one article are no
    independent witnesses. None where there are no two seeds in common.
    """
    first = next(iter(mine.values()))
    if not first["parameters"]:  # the frozen base, or trunk, is the same for every seed
        mine = dict.fromkeys(theirs, first)
    pairs = [(mine[seed], theirs[seed]) for seed in theirs if seed in mine]
    if len(pairs) < 2:
        return None
    d = np.array([a["test"]["loss"] - b["test"]["loss"] for a, b in pairs])
    half = T95[min(len(d) - 1, 9)] * d.std(ddof=1) / math.sqrt(len(d))

    def rows(entry):
        return losses[f"{entry['trunk']}/{entry['name']}/{entry['seed']}/test"]

    nll = np.mean([rows(a) - rows(b) for a, b in pairs], axis=0)  # (N,)
    article = np.unique(examples.article.numpy(), return_inverse=True)[1]
    total = np.bincount(article, nll)
    tokens = np.bincount(article, (examples.length - examples.prompt).numpy())
    draw, n = np.random.default_rng(0), len(total)
    samples = (draw.integers(n, size=n) for _ in range(2000))
    ratios = [total[sample].sum() / tokens[sample].sum() for sample in samples]
    # One article is no sample of articles: nothing can be said of others.
    articles = tuple(np.percentile(ratios, [2.5, 97.5])) if n > 1 else (-math.inf, math.inf)
    return {"mean": d.mean(), "seeds": (d.mean() - half, d.mean() + half), "articles": articles}


def verdict(found):
    """In a word; a difference that is printed as zero is none."""
    if abs(found["mean"]) < 5e-5:
        return "-"
    low = min(found["seeds"][0], found["articles"][0])
    high = max(found["seeds"][1], found["articles"][1])
    return "gain" if high < 0 else "loss" if low > 0 else "-"


def make_table(entries, losses, examples):
    """Markdown: one row per method, over its seeds, and its difference to lora-match if it is
    there."""
    head = ["method", "seeds", "trained parameters", "bytes on disk", "head, µs/token",
            "learning rate", "validation loss", "test loss", "test perplexity", "test bits/byte"]
    rival = of_method(entries, "lora-match")
    if len(rival) > 1:
        head += ["test loss less lora-match's", "95% over seeds", "95% over articles", ""]
    rows = [head]
    for name in dict.fromkeys(entry["name"] for entry in entries):
        mine = of_method(entries, name)
        same = list(mine.values())
        rates = sorted({f"{entry['lr']:g}" for entry in same if entry["lr"]})
        cells = [name, str(len(same)), f"{same[0]['parameters']:,}", f"{same[0]['bytes']:,}",
                 f"{1e6 * np.median([entry['latency'] for entry in same]):.1f}", ", ".join(rates)]
        for split, key, digits in (("validation", "loss", 4), ("test", "loss", 4),
                                   ("test", "perplexity", 2), ("test", "bits_per_byte", 4)):
            values = [entry[split][key] for entry in same]
            cells.append("" if None in values else spread(values, digits))
        if name != "lora-match":
            cells += compared(mine, rival, losses, examples)
        rows.append(cells + [""] * (len(head) - len(cells)))
    return markdown(rows)


def compared(*them):
    """Cells of a `difference`, none where there is none."""
    found = difference(*them)
    return [] if found is None else [
        f"{found['mean']:+.4f}", *(f"{found[of][0]:+.4f} to {found[of][1]:+.4f}"
                                   for of in ("seeds", "articles")), verdict(found)]


def worth_of_company(entries, losses, examples):
    """Markdown: what each method's statistic is worth over each control; "" without two seeds."""
    rows = []
    for name in dict.fromkeys(entry["name"] for entry in entries):
        for control in (f"{joined}{c}" for joined in (", ", ", trained on ") for c in CONTROLS):
            cells = compared(of_method(entries, name), of_method(entries, name + control), losses,
                             examples)
            rows += [[name, control.removeprefix(", "), *cells]] if cells else []
    head = ["method", "less its control", "test loss", "95% over seeds", "95% over articles", ""]
    return markdown([head, *rows]) if rows else ""


def make_notes(run, dataset, inference, entries):
    tokens = entries[0]
    grouped = " Each request has its nearest training cluster." * (inference == "assign")
    return (
        f"Data {dataset}, base of {sum(p.numel() for p in run.base.parameters()):,} "
        f"parameters; ± is the standard deviation over seeds.{grouped} Losses in nats per "
        f"scored token: {tokens['validation']['n_tokens']:,} of validation, "
        f"{tokens['test']['n_tokens']:,} of test, the same for every method. Names after a comma "
        f"are controls: the same weights, told something else in the cluster's place. A gain or a "
        f"loss is what lies outside both intervals. Learning rates were chosen on validation where "
        f"grid.json lists several. Head: time for the next token of 32 requests, over 32, their "
        f"updates being made and all that a cache may know remembered, on {run.device} in "
        f"{str(run.dtype).removeprefix('torch.')}.\n"
    )


# ------------------------------------------------------------------------------------- figures


@contextmanager
def figure(path, x_label, y_label, size=(8, 4.5), grid="both", **legend):
    """Axes to draw on, which are then labelled and saved."""
    axes = Figure(figsize=size, layout="constrained").subplots()
    yield axes
    axes.set(xlabel=x_label, ylabel=y_label)
    outside = legend.get("loc", "").startswith("outside")
    (axes.figure if outside else axes).legend(frameon=False, **legend)
    if grid:
        axes.grid(alpha=0.3, axis=grid)
    axes.figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def draw_losses(records, frozen, path):
    """Validation loss against training tokens; seeds are a band around their mean."""
    with figure(path, "training tokens of the adapter (millions)",
                "validation loss (nats per token)", loc="outside upper center", ncols=2) as axes:
        axes.axhline(frozen, color="0.4", linestyle="--", label="frozen base")
        for i, method in enumerate(dict.fromkeys(record["method"] for record in records)):
            curves = {}
            for record in records:
                if record["method"] == method:
                    # Training starts where the frozen base is; a cache helps untrained.
                    start = [] if "cache" in method else [(0, frozen)]
                    curve = curves.setdefault(record["seed"], start)
                    curve.append((record["tokens"] / 1e6, record["loss"]))
            shortest = min(map(len, curves.values()))
            points = np.array([curve[:shortest] for curve in curves.values()])  # (seeds, points, 2)
            x, loss = points[..., 0].mean(axis=0), points[..., 1]
            name = f"{method}, {len(curves)} seed{'s' * (len(curves) > 1)}"
            axes.plot(x, loss.mean(axis=0), MARKERS[i % 13] + "-", color=COLOURS[i % 7],
                      label=name, markersize=5)
            axes.fill_between(x, loss.min(axis=0), loss.max(axis=0), color=COLOURS[i % 7],
                              alpha=0.2, linewidth=0)


def draw_costs(entries, path):
    """Test loss against trained parameters: who is below and to the left of whom."""
    names = [name for name in dict.fromkeys(entry["name"] for entry in entries[1:])
             if not name.endswith(tuple(f", {control}" for control in CONTROLS))]
    with figure(path, "trained parameters", "test loss (nats per token)", **BESIDE) as axes:
        axes.set_title(TITLES[entries[0]["trunk"]], fontsize=11)
        axes.axhline(entries[0]["test"]["loss"], color="0.4", linestyle="--", label="frozen")
        for i, name in enumerate(names):
            mine = list(of_method(entries, name).values())
            values = [entry["test"]["loss"] for entry in mine]
            deviation = np.std(values, ddof=1) if len(values) > 1 else None
            axes.errorbar(mine[0]["parameters"], np.mean(values), yerr=deviation, capsize=3,
                          markersize=7, fmt=MARKERS[i % 13], color=COLOURS[i % 7], label=name)
        # Whole decades: always two to label, and no steps between them, which would not fit.
        digits = [len(str(entry["parameters"])) for entry in entries[1:]] or [1]
        axes.set(xscale="log", xlim=(10 ** (min(digits) - 1), 10 ** max(digits)))
        axes.xaxis.set_minor_formatter("")


def draw_clusters(run, model, plan, inference, path):
    """Validation prompts in the plane of most variance (PCA), coloured by cluster."""
    examples = run.examples["validation"]
    told = held_out(run, model, examples, plan, inference)
    features, cluster = told.points, told.cluster.numpy()
    centred = features - features.mean(dim=0)
    _, scales, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = (centred @ directions[:2].T).numpy()  # (N, C) @ (C, 2) -> (N, 2)
    share = (scales.square() / scales.square().sum())[:2].tolist()
    sizes = np.bincount(cluster)
    largest = np.argsort(-sizes, kind="stable")[: len(COLOURS)]
    prompts = zip(*examples.seen({"stat_scope": plan["stat_scope"]}).prompts(
        torch.arange(len(examples))), strict=True)
    texts = [run.tokenizer.decode(tokens[mask].tolist()) for tokens, mask in prompts]
    labels = [f"{nth} principal component ({part:.0%} of variance)"
              for nth, part in zip(("first", "second"), share, strict=True)]
    with figure(path, *labels, (8, 5.5), None, title="members: typical words", fontsize=9,
                **BESIDE) as axes:
        others = ~np.isin(cluster, largest)
        if others.any():
            axes.scatter(*plane[others].T, s=8, color="0.8", linewidths=0,
                         label=f"{len(sizes) - len(largest)} smaller clusters")
        for i, which in enumerate(largest):
            mine = cluster == which
            words = " ".join(telling_words(texts, np.flatnonzero(mine), 3))
            axes.scatter(*plane[mine].T, s=22, color=COLOURS[i], marker=MARKERS[i], linewidths=0,
                         label=f"{sizes[which]}: {words}")
        axes.set_title(f"{label(plan)}: {len(examples):,} validation prompts in {len(sizes)} "
                       f"clusters", fontsize=11)


def main(argv=None):
    """Score the run, or continue prompts; returns the entries of results.json, or token ids."""
    args = parse_eval(argv)
    keep_freed_memory()
    folder = Path(args.run)
    run, config = open_run(folder, choose_device(args.device)[0], args.dtype)
    if args.prompts is not None:
        return continue_prompts(run, config, args)
    data_dir, out = args.data_dir or config["args"]["data_dir"], folder
    dataset = config["args"]["dataset"]
    if args.on is not None:
        corpus, out = Corpus(args.on, data_dir), folder / f"on-{Path(args.on).stem}"
        kept = out / "results.json"
        if kept.exists() and read_json(kept)["data"] != corpus.fingerprint:
            raise UserError(f"--on {args.on}: {out} holds the scores of another text; move it away")
    else:
        corpus = open_corpus(dataset, data_dir, config)
    metrics = text_metrics(corpus, args.on or dataset) if args.generations else None
    if args.anatomy:
        from lab.anatomy import dissect  # it builds on this file

        return dissect(run, config, corpus)
    run.examples = load_examples(corpus, run.tokenizer, config["args"]["block_size"])
    del run.examples["train"]
    if adapter_paths(folder, "shared") and not args.on:
        share_trunk(run)
    if args.sweep:
        from lab.study import sweep  # so does it

        return sweep(run, args)
    args.instructions = corpus.instructions
    entries, losses = score_run(run, args)
    parts = {trunk: [entry for entry in entries if entry["trunk"] == trunk] for trunk in TITLES}
    text = "".join(
        f"## {TITLES[trunk]}\n\n{make_table(part, losses, run.examples['test'])}\n"
        f"{worth_of_company(part, losses, run.examples['test'])}\n"
        for trunk, part in parts.items() if part)
    scored_on = f"{args.on} (adapters of {dataset})" if args.on else dataset
    text += make_notes(run, scored_on, args.inference, entries)
    generations = score_generations(run, args, metrics) if metrics else []
    if generations:
        rows = [(e["name"], str(e["seed"]), f"{e['bleu']:.2f}", f"{e['rouge_l']:.2f}")
                for e in generations]
        text += (f"\n{markdown([('method', 'seed', 'BLEU', 'ROUGE-L'), *rows])}\n"
                 f"The same {generations[0]['n']} test instructions for all, continued greedily by "
                 f"at most {args.max_new_tokens} tokens.\n")
    print("\n" + text)
    write_text(out / "results.md", text)
    write_json(out / "results.json", {
        "dataset": scored_on, "inference": args.inference,
        "data": corpus.fingerprint, "torch": torch.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "entries": entries,
        "generations": generations,
    })
    with whole_file(out / "losses.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **losses)
    if args.on:  # the figures are of the training's own data
        return entries
    drawn = {(entry["name"], entry["seed"], entry["lr"], "joint") for entry in parts["joint"]}
    records = [r for r in read_records(folder)
               if (r["method"], r["seed"], r.get("lr"), r.get("trunk")) in drawn]
    draw_losses(records, entries[0]["validation"]["loss"], folder / "loss.png")
    draw_costs(parts["shared"] or parts["joint"], folder / "pareto.png")
    chameleons = [path for trunk in TITLES for path in adapter_paths(folder, trunk)
                  if path.name.startswith("chameleon-seed")]
    if chameleons and len(run.examples["validation"]) > 2:
        model, plan = load_adapter(run, chameleons[0])
        draw_clusters(run, model, plan, args.inference or plan["inference"],
                      folder / "clusters.png")
    return entries
