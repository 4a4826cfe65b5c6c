"""Score every adapter of a run on validation and test; draw loss against training and the clusters.

    python eval.py runs/wikitext2                       # results.json, results.md, two figures
    python eval.py runs/wikitext2 --prompts prompts.txt # cluster, adapt, continue each line
    python eval.py runs/wikitext2 --anatomy             # what the published code's flaws report

A chameleon's score depends on the company that an example keeps, so three controls stand beside
it, from the same weights: each example alone (its own prompt's statistic), shuffled (the statistic
of another cluster) and constant (the training mean, which says nothing). What the real statistic
gains over these is what conditioning is worth; the rest is a larger or longer-trained adapter.
"""

import math
import platform
import time
from pathlib import Path

from files import UserError, run_cli, write_json, write_text
from flags import METHODS, eval_parser

if __name__ == "__main__":  # --help and a mistyped flag are answered before torch is loaded
    run_cli(eval_parser().parse_args)

import numpy as np
import torch
from matplotlib.figure import Figure

from common import (adapt, adapter_path, choose_device, keep_freed_memory, label, load_weights,
                    memory_advice, open_corpus, open_run, read_plan, read_records)
from data import RESPONSE, Examples, load_examples
from model import generate, merge_lora
from scoring import held_out_company, score, scored_bytes, summed


# Okabe & Ito's palette: told apart by all kinds of colour vision, and in grey.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
CONTROLS = ("own prompt only", "shuffled", "constant")


# ------------------------------------------------------------------------------------- scoring


def load_adapter(run, path):
    """The base with the adapter in `path` on it, and the plan that trained it."""
    tensors, plan = read_plan(path, "adapter")
    if plan["base"] != run.base_fingerprint:
        raise UserError(f"{path} was trained on another base than {run.folder}/base.safetensors")
    model = adapt(run.base, plan)
    load_weights(model, tensors, path)
    return model.eval(), plan


def score_model(run, model, plan, args, n_bytes, control=None):
    """{split: {nll_sum, n_tokens, loss, perplexity, bits_per_byte}}, and tokens scored a second."""
    result, seconds = {}, 0.0
    inference = args.inference or plan.get("inference")
    for split in ("validation", "test"):
        examples = run.examples[split]
        start = time.perf_counter()
        with memory_advice("lower --batch-size"):
            company = held_out_company(run, model, examples, plan, inference, control)
            found = summed(*score(run, model, examples, args.batch_size, company))
        seconds += time.perf_counter() - start
        result[split] = found | {
            "perplexity": math.exp(found["loss"]),
            "bits_per_byte": found["nll_sum"] / math.log(2) / n_bytes[split],
        }
    n_read = sum(int(run.examples[split].length.sum()) for split in result)
    return result | {"speed": n_read / seconds}


def score_run(run, args):
    """One entry per adapter and control: what the table and results.json are made of."""
    sizes = run.tokenizer.bytes_per_token()
    n_bytes = {split: scored_bytes(run.examples[split], sizes) for split in ("validation", "test")}
    entries = [{"name": "frozen", "seed": 0, "parameters": 0, "bytes": 0,
                **score_model(run, run.base, {}, args, n_bytes)}]
    for path in adapter_paths(run.folder):
        model, plan = load_adapter(run, path)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        finished = path.with_suffix(".last.safetensors").exists()
        for control in (None, *CONTROLS) if model.lm_head.needs_statistics else (None,):
            name = label(plan) + (f", {control}" if control else "")
            name += "" if finished else " (unfinished)"
            found = score_model(run, model, plan, args, n_bytes, control)
            print(f"{name}, seed {plan['seed']}: validation {found['validation']['loss']:.4f}, "
                  f"test {found['test']['loss']:.4f}")
            entries.append({"name": name, "seed": plan["seed"], "parameters": parameters,
                            "bytes": path.stat().st_size, **found})
    return entries


def adapter_paths(folder):
    """Best checkpoints of a run's adapters, those of one method side by side."""
    paths = [p for p in (folder / "adapters").glob("*.safetensors")
             if not p.name.endswith((".last.safetensors", ".state.safetensors"))]
    return sorted(paths, key=lambda p: (METHODS.index(p.name.split("-seed")[0]), p.name))


# --------------------------------------------------------------------------------------- table


def spread(values, digits):
    """Mean, and standard deviation over seeds where there are several."""
    mean = f"{np.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def make_table(entries):
    """Markdown: one row per method, over its seeds."""
    head = ("method", "trained parameters", "bytes on disk", "validation loss", "test loss",
            "test perplexity", "test bits/byte", "tokens/s")
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in dict.fromkeys(entry["name"] for entry in entries):
        same = [entry for entry in entries if entry["name"] == name]
        cells = [name, f"{same[0]['parameters']:,}", f"{same[0]['bytes']:,}"]
        for split, key, digits in (("validation", "loss", 4), ("test", "loss", 4),
                                   ("test", "perplexity", 2), ("test", "bits_per_byte", 4)):
            cells.append(spread([entry[split][key] for entry in same], digits))
        cells.append(f"{np.median([entry['speed'] for entry in same]):,.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def make_notes(run, config, entries):
    args, tokens = config["args"], entries[0]
    n_seeds = len({entry["seed"] for entry in entries[1:]})
    return (
        f"Data {args['dataset']}, base of {sum(p.numel() for p in run.base.parameters()):,} "
        f"parameters, {n_seeds} seed{'s' * (n_seeds != 1)}"
        f"{' (± is the standard deviation)' * (n_seeds > 1)}. Losses in nats per scored "
        f"token: {tokens['validation']['n_tokens']:,} of validation, "
        f"{tokens['test']['n_tokens']:,} of test, the same for every method. Chameleon's and "
        f"counts' depend on the company an example keeps; 'own prompt only', 'shuffled' and "
        f"'constant' are controls with the same weights. "
        f"tokens/s: scoring, clustering included, on {run.device} in "
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


# ------------------------------------------------------------------------------------- prompts


def continue_prompts(run, config, args):
    """Cluster the prompts of a file, adapt the head to each cluster, continue each prompt."""
    try:
        lines = Path(args.prompts).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {args.prompts}: {error}") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UserError(f"--prompts {args.prompts}: the file has no prompt, one a line")
    # The model is asked as it was trained: an instruction ends with what announces the response.
    end = RESPONSE if config.get("instructions") else ""
    prompts = [run.tokenizer.encode(text + end) for text in texts]
    context = run.base.config.block_size
    for text, prompt in zip(texts, prompts, strict=True):
        if len(prompt) >= context:
            raise UserError(f"--prompts: {text[:40]!r}... has {len(prompt)} tokens and the model "
                            f"reads {context} at most, prompt and continuation; shorten it")
    if args.method == "frozen":
        model, plan = run.base.eval(), {"method": "frozen"}
    else:
        path = adapter_path(run, args.method, args.seed)
        if not path.exists():
            raise UserError(f"--method {args.method} --seed {args.seed}: {path} does not exist; "
                            f"there is {', '.join(p.stem for p in adapter_paths(run.folder))}")
        model, plan = load_adapter(run, path)
    length = np.array([len(prompt) for prompt in prompts])
    company = held_out_company(  # rows that are all prompt
        run, model, Examples(np.concatenate(prompts), length.cumsum() - length, length, length,
                        np.arange(len(length))), plan, args.inference or plan.get("inference"))
    requests = {}
    if company:
        statistics, cluster = company.told(torch.arange(len(prompts)))
        cluster = cluster if cluster.dim() == 1 else cluster[:, -1]
        requests = {"statistics": statistics.to(run.device), "cluster": cluster.to(run.device)}
    merge_lora(model)
    model.transformer.to(run.dtype)  # once: autocast would convert each weight for each token
    continuations = generate(
        model, prompts, args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
        stop_token=run.tokenizer.end, **requests,
        generator=torch.Generator(run.device).manual_seed(args.seed))
    groups = company.cluster.tolist() if company else [0] * len(texts)
    for group in sorted(set(groups)):
        if company:
            members = groups.count(group)
            print(f"\n# cluster {group + 1}: {members} prompt{'s' * (members > 1)}, one update")
        for text, tokens, mine in zip(texts, continuations, groups, strict=True):
            if mine == group:
                print(f"\n{text}[{run.tokenizer.decode(tokens)}]")
    return continuations


# ---------------------------------------------------------------------------------------- main


def main(argv=None):
    """Score the run, or continue prompts; returns the entries of results.json, or token ids."""
    args = eval_parser().parse_args(argv)
    keep_freed_memory()
    folder = Path(args.run)
    run, config = open_run(folder, choose_device(args.device)[0], args.dtype)
    if args.prompts is not None:
        return continue_prompts(run, config, args)
    corpus = open_corpus(
        config["args"]["dataset"], args.data_dir or config["args"]["data_dir"], config)
    if args.anatomy:
        from anatomy import dissect  # it builds on this file

        return dissect(run, config, corpus)
    run.examples = load_examples(
        corpus, run.tokenizer, config["args"]["block_size"], folder / "cache")
    entries = score_run(run, args)
    table, notes = make_table(entries), make_notes(run, config, entries)
    write_text(folder / "results.md", table + "\n" + notes)
    write_json(folder / "results.json", {
        "args": {key: value for key, value in config["args"].items() if key != "data_dir"},
        "data": config["data"], "torch": torch.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "entries": entries,
    })
    print("\n" + table + "\n" + notes)
    records = [record for record in read_records(folder) if record["method"] != "base"]
    draw_losses(records, entries[0]["validation"]["loss"], folder / "loss.png")
    print(f"wrote {folder / 'loss.png'}")
    chameleons = [path for path in adapter_paths(folder) if path.name.startswith("chameleon")]
    if chameleons and len(run.examples["validation"]) > 2:
        model, plan = load_adapter(run, chameleons[0])
        draw_clusters(run, model, plan, args.inference or plan["inference"],
                      folder / "clusters.png")
        print(f"wrote {folder / 'clusters.png'}")
    return entries


if __name__ == "__main__":
    run_cli(main)
