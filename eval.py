"""Score a run's adapters beside their controls, draw loss against LoRA; or answer prompts.

    python eval.py runs/python                         # results.md, results.json, two figures
    python eval.py runs/python --prompts FILE          # cluster the lines, adapt, continue them
    python eval.py runs/python --prompts FILE --assign # answers that depend on no other line

A chameleon's score depends on what each row is told of its cluster, so controls stand beside it:
the same weights are told the row's own prompt, another cluster, nothing (the training mean), or
their cluster without later rows of their own document. What the right cluster gains over these is
what conditioning is worth; the rest is a larger or a longer trained adapter. Every line of the
table is scored on the same tokens.
"""

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

from cluster import kmeans, nearest
from common import (UserError, choose_device, keep_freed_memory, printable, read_text, run_cli,
                    write_json, write_text, whole_file)
from data import IGNORE, RESPONSE, Tokenizer, cut, kinds, load_documents
from hypernet import cluster_means, cluster_statistics, features, prompt_means
from model import generate, merge_lora
from train import (RATES, Help, Parser, Run, base_path, fingerprint, generator, held_out_clusters,
                   load_adapter, load_base, n_trained, number, read_config, read_records, score)

# Okabe & Ito's palette: told apart by all kinds of colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


# ------------------------------------------------------------------------------------- scoring


def controls(head, means, count, cluster, document, seed):
    """What N rows may be told: a table (N, C) for each name. "" is the method, the rest controls.

    means (N, C), count (N,) and cluster (N,) are those of the rows' prompts; document (N,) is the
    one that each was cut from, in order.
    """
    own = cluster_statistics(means, count, cluster)
    tables = {"": own, "told own prompt": means,
              "told nothing": head.center.cpu().expand_as(means)}
    ids, which = cluster.unique(return_inverse=True)  # (K,), (N,) from 0 to K - 1
    if len(ids) > 1:  # each cluster is told the statistic of one other
        order = torch.randperm(len(ids), generator=generator(seed))
        other = torch.empty_like(order).scatter_(0, order, order.roll(1))  # (K,)
        tables["told another cluster"] = cluster_means(means, count, which, len(ids))[other[which]]
    # A later row of the same document is no token of the row's own, but its sequel.
    earlier = torch.empty_like(means)  # (N, C)
    for k in range(len(ids)):
        row = (which == k).nonzero()[:, 0]  # (n,), of this cluster
        later = (document[row][:, None] == document[row]) & (row > row[:, None])  # (n, n)
        weight = ~later * count[row]  # (n, n), in row i, how many tokens it hears of whom
        earlier[row] = weight @ means[row] / weight.sum(dim=1, keepdim=True)  # (n, n) @ (n, C)
    tables["told no later rows"] = earlier
    return tables


def open_base(run, config, tokenizer):
    base = load_base(base_path(run.folder, config), run.device)
    if tokenizer.vocab_size != base.config.vocab_size:
        raise UserError(f"{run.folder / 'tokenizer.json'} is not the tokenizer of this base")
    return base


def score_run(run, config, tokenizer, splits):
    """One entry for each adapter and control, for the table and results.json; the features (N, C)
    and clusters (N,) of the validation prompts, None without a chameleon; and what could not be
    scored, a line each."""
    base = open_base(run, config, tokenizer)
    mark, embedding, entries, clusters = fingerprint(base), base.transformer.wte.weight, [], None
    sizes, damaged = tokenizer.bytes_per_token(), []

    def add(model, plan, control="", tables=None):
        entry = {"name": ", ".join(filter(None, (plan["method"], control))), "seed": plan["seed"],
                 "parameters": n_trained(model), "lr": plan.get("lr"), "rank": plan.get("rank")}
        for split, rows in splits.items():
            nll, count = score(run, model, rows, tables and tables[split][control])
            nll, n = float(nll.sum()), int(count.sum())
            entry[split] = {"nll_sum": nll, "n_tokens": n, "loss": nll / n,
                            "perplexity": math.exp(min(nll / n, 100)),
                            "bits_per_byte": nll / math.log(2) / scored_bytes(rows, sizes)}
        print(f"{entry['name']}, seed {entry['seed']}: "
              + ", ".join(f"{split} {entry[split]['loss']:.4f}" for split in splits), flush=True)
        entries.append(entry)

    add(base, {"method": "frozen", "seed": 0})
    for path in adapter_paths(run.folder):
        try:
            model, plan = load_adapter(base, mark, path)
        except UserError as error:
            damaged.append(str(error))
            continue
        block_size = config["args"]["block_size"]
        if plan.get("block_size", block_size) != block_size:
            damaged.append(f"{path} was trained on rows of {plan['block_size']} tokens, not "
                           f"{block_size}")
            continue
        if plan["method"] != "chameleon":
            add(model, plan)
            continue
        tables = {}
        for split, rows in splits.items():
            means, count = prompt_means(rows, embedding)
            cluster = held_out_clusters(model.lm_head, means, plan)
            tables[split] = controls(model.lm_head, means, count, cluster, rows.document,
                                     plan["seed"])
            if split == "validation" and clusters is None:  # of the first seed, for the figure
                clusters = features(means, model.lm_head.center.cpu()), cluster
        for control in tables["validation"]:
            if control in tables["test"]:
                add(model, plan, control, tables)
    return entries, clusters, damaged


def scored_bytes(rows, sizes):
    """Bytes of text that the scored tokens stand for; sizes (V,), bytes of each token."""
    batches = (rows.batch(index)[1] for index in torch.arange(len(rows)).split(1024))
    return sum(int(sizes[targets[targets != IGNORE]].sum()) for targets in batches)


def adapter_paths(folder):
    """Files of finished adapters: method by method in the order of RATES, then by seed."""
    paths = (Path(folder) / "adapters").glob("*-seed*.safetensors")
    named = [(path.name.rsplit("-seed", 1)[0], path) for path in paths]
    known = [(list(RATES).index(name), len(path.name), path) for name, path in named
             if name in RATES]
    return [path for _, _, path in sorted(known)]


def spread(values, digits):
    """Mean, and standard deviation over seeds where there are several."""
    values = torch.tensor(values, dtype=torch.float64)
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def make_table(entries):
    """Markdown: a line for each method and control, over its seeds."""
    head = ["method", "seeds", "trained parameters", "learning rate", "validation loss",
            "test loss", "test perplexity", "test bits a byte"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in dict.fromkeys(entry["name"] for entry in entries):
        same = [entry for entry in entries if entry["name"] == name]
        cells = [name, str(len(same)), f"{same[0]['parameters']:,}", f"{same[0]['lr'] or 0:g}"]
        for split, key, digits in (("validation", "loss", 4), ("test", "loss", 4),
                                   ("test", "perplexity", 2), ("test", "bits_per_byte", 4)):
            cells.append(spread([entry[split][key] for entry in same], digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------- figures


def draw_losses(records, frozen, path):
    """Validation loss against training tokens, and the same less LoRA's; seeds are a band."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = {}  # method -> (seeds, points, 2): tokens in millions, loss
    for name in RATES:
        by_seed = {}
        for record in records:
            if record["method"] == name:
                by_seed.setdefault(record["seed"], [(0.0, frozen)]).append(
                    (record["tokens"] / 1e6, record["loss"]))
        if by_seed:
            shortest = min(map(len, by_seed.values()))
            curves[name] = torch.tensor([curve[:shortest] for curve in by_seed.values()])
    if not curves:
        return
    left.axhline(frozen, color="0.4", linestyle="--", label="frozen base")
    rival = next(iter(curves))  # lora, where it is there
    for i, (name, curve) in enumerate(curves.items()):
        points = min(curve.shape[1], curves[rival].shape[1])
        less = curve[:, :points, 1] - curves[rival][:, :points, 1].mean(dim=0)
        for axes, tokens, y in ((left, curve[0, :, 0], curve[:, :, 1]),
                                (right, curve[0, :points, 0], less)):
            label = f"{name}, {len(curve)} seed{'s' * (len(curve) > 1)}"
            axes.plot(tokens, y.mean(dim=0), "o-", markersize=4, color=COLOURS[i], label=label)
            axes.fill_between(tokens, y.amin(dim=0), y.amax(dim=0), color=COLOURS[i], alpha=0.2,
                              linewidth=0)
    left.set(title="validation loss", ylabel="nats per token")
    right.set(title=f"the same, less that of {rival}: below 0 is better")
    for axes in (left, right):
        axes.set_xlabel("training tokens of the adapter (millions)")
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False)
    save(figure, path)


def draw_clusters(points, cluster, kind, names, path):
    """Validation prompts (N, C) in their two widest directions, and what each cluster holds."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    centered = points - points.mean(dim=0)
    directions = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -2:]  # (C, C) -> (C, 2)
    plane = centered @ directions  # (N, C) @ (C, 2) -> (N, 2)
    K = int(cluster.max()) + 1
    counts = torch.zeros(K, len(names)).index_put_(
        (cluster, kind), torch.ones(len(kind)), accumulate=True)  # (K, kinds)
    counts = counts[counts.argmax(dim=1).argsort(stable=True)]  # clusters of one kind side by side
    bottom = torch.zeros(K)
    for i, name in enumerate(names):
        own = plane[kind == i]  # (n, 2)
        left.scatter(own[:, 0], own[:, 1], s=6, color=COLOURS[i % 7], label=name)
        right.bar(torch.arange(K), counts[:, i], bottom=bottom, color=COLOURS[i % 7], label=name)
        bottom += counts[:, i]
    pure = float(counts.amax(dim=1).sum() / counts.sum())
    left.set(title="prompts, in their two widest directions", xticks=[], yticks=[])
    right.set(title=f"clusters: {pure:.0%} of rows are of the main kind of theirs",
              xlabel="cluster", ylabel="rows", ylim=(0, 1.05 * float(bottom.max())))
    right.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=7,
                  frameon=False)
    save(figure, path)


def save(figure, path):
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    print(f"wrote {path}")


# ------------------------------------------------------------------------------------- prompts


def answer(run, config, tokenizer, args):
    """Cluster the lines of a file, write each cluster's update, continue each line.

    An answer depends on the other lines: they are the company that its statistic is made of. With
    --assign, or for a single line, the nearest training cluster's statistic is told instead, each
    line is continued by itself, and nothing depends on the others. Returns the new token ids.
    """
    text = read_text("/dev/stdin" if args.prompts == "-" else args.prompts)
    texts = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not texts:
        raise UserError(f"--prompts {args.prompts}: there is no prompt, one a line")
    base = open_base(run, config, tokenizer)
    end = RESPONSE if config["instructions"] else ""  # asked as the model was trained
    prompts = [tokenizer.encode(text.strip() + end if end else text) for text in texts]
    room = base.config.block_size
    for text, prompt in zip(texts, prompts, strict=True):
        if len(prompt) >= room:
            raise UserError(f"--prompts: {text[:40]!r}... has {len(prompt)} tokens, and the model "
                            f"reads {room} at most, prompt and answer; shorten it")
    model, plan = base, {"method": "frozen"}
    if args.method != "frozen":
        path = run.folder / "adapters" / f"{args.method}-seed{args.seed}.safetensors"
        if not path.exists():
            there = ", ".join(p.stem for p in adapter_paths(run.folder))
            raise UserError(f"{path} does not exist; there is {there or 'no adapter'}")
        model, plan = load_adapter(base, fingerprint(base), path)
    merge_lora(model)
    # What is told nothing of a cluster depends on no other line either.
    assign = args.assign or len(texts) == 1 or plan["method"] != "chameleon"
    cluster, statistics = torch.zeros(len(texts), dtype=torch.int64), None
    if plan["method"] == "chameleon":
        head, embedding = model.lm_head, base.transformer.wte.weight.cpu()
        means = torch.stack([embedding[torch.tensor(p)].mean(dim=0) for p in prompts])  # (B, C)
        points = features(means, head.center.cpu())
        if assign:
            known = head.clusters.cpu()  # (K, C)
            cluster, _ = nearest(points, features(known, head.center.cpu()))
            statistics = known[cluster]
        else:
            k = args.clusters or max(1, round(len(texts) / plan["cluster_size"]))
            cluster = kmeans(points, min(k, len(texts)), generator(args.seed))[1]
            count = torch.tensor([float(len(p)) for p in prompts])
            statistics = cluster_statistics(means, count, cluster)
        statistics = statistics.to(run.device)
    new = []
    batches = torch.arange(len(texts)).split(1 if assign else len(texts))
    for index in batches:
        new += generate(model, [prompts[i] for i in index], args.max_new_tokens,
                        None if statistics is None else statistics[index.to(run.device)],
                        args.temperature, args.top_k, tokenizer.end,
                        torch.Generator(run.device).manual_seed(args.seed))
    for k in cluster.unique().tolist():
        if statistics is not None:
            name = "training cluster" if assign else "cluster"
            print(f"# {name} {k + 1}: {int((cluster == k).sum())} prompts, one update")
        for i in (cluster == k).nonzero()[:, 0].tolist():
            print(printable(f"{texts[i]}[{tokenizer.decode(new[i])}]\n"))
    if statistics is not None and not assign:
        print("These answers depend on each other's prompts; --assign gives some that do not.")
    return new


# ---------------------------------------------------------------------------------------- main


def make_parser():
    parser = Parser(prog="eval.py", description="Score a run's adapters, or continue prompts.",
                    formatter_class=Help)
    add, count = parser.add_argument, number(int, 1, 2**31)
    add("run", help="run folder that train.py wrote")
    add("--data-dir", help="where the data set lies (default: as in training)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--prompts", metavar="FILE", help="continue the prompts in FILE, one a line (- is standard "
        "input), instead of scoring")
    add = parser.add_argument_group("with --prompts").add_argument
    add("--method", default="chameleon", choices=("frozen", *RATES))
    add("--seed", type=number(int, 0, 2**31), default=0, help="the adapter's, and the sampler's")
    add("--assign", action="store_true", help="answer each prompt as if it were alone, by the "
        "update of the nearest training cluster")
    add("--clusters", type=count, metavar="K", help="how many (default: as large as in training)")
    add("--max-new-tokens", type=count, default=40, metavar="N")
    add("--temperature", type=number(float, 0, 1e3), default=0.8, help="0 is greedy")
    add("--top-k", type=count, default=50, metavar="N", help="tokens to draw from")
    return parser


def main(argv=None):
    """Score a run; returns the entries of its table. With --prompts, the new token ids."""
    args = make_parser().parse_args(argv)
    keep_freed_memory()
    config, (device, _) = read_config(args.run), choose_device(args.device)
    asked = config["args"]
    run = Run(Path(args.run), device, getattr(torch, asked["dtype"]))
    tokenizer = Tokenizer.load(run.folder / "tokenizer.json")
    if args.prompts is not None:
        return answer(run, config, tokenizer, args)
    documents, data = load_documents(asked["dataset"], args.data_dir or asked["data_dir"])
    if data != config["data"]:
        raise UserError(f"--dataset {asked['dataset']} has other text than when {args.run} was "
                        f"made; put the old text back, or train again with another --out")
    splits = {split: cut(documents[split], tokenizer, asked["block_size"])
              for split in ("validation", "test")}
    entries, clusters, damaged = score_run(run, config, tokenizer, splits)
    table = make_table(entries)
    note = (f"Adapters on {asked['dataset']}; the base has read {config['read']}. Losses in nats "
            f"per scored token, {entries[0]['validation']['n_tokens']:,} of validation and "
            f"{entries[0]['test']['n_tokens']:,} of test, the same for every line; ± is the "
            f"standard deviation over seeds. \"told ...\" are controls: the same weights, told "
            f"something else than their cluster.\n")
    write_text(run.folder / "results.md", table + "\n" + note)
    write_json(run.folder / "results.json", {"args": asked, "data": data, "entries": entries})
    print(f"\n{table}\n{note}")
    draw_losses(read_records(run.folder), entries[0]["validation"]["loss"],
                run.folder / "loss.png")
    if clusters:
        kind = torch.tensor([d.kind for d in documents["validation"]])
        draw_clusters(*clusters, kind[splits["validation"].document],
                      kinds(asked["dataset"]), run.folder / "clusters.png")
    if damaged:  # the others' work is kept
        raise UserError(f"not scored: {'; '.join(damaged)}")
    return entries


if __name__ == "__main__":
    run_cli(main)
