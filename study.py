"""How much company is worth: `eval.py RUN --sweep clusters|cluster-size|noise`.

    clusters      the same weights, k-means into ever more clusters, of 64 members down to 1
    cluster-size  clusters of 64; of each, a request is told n members, itself among them
    noise         a share of all requests is replaced by random tokens, or by text from elsewhere,
                  after clustering; the others, always the same half, are scored

Validation split, the seed of --seed. A head of --trunk shared is put back on its transformer
where others than its own states have to be read.
"""

import copy
from dataclasses import replace

import numpy as np
import torch
from matplotlib.figure import Figure

from common import adapter_paths, label, load_adapter
from data import read_pydocs
from files import write_json
from scoring import held_out_company, score

SIZES = (1, 2, 4, 8, 16, 32, 64)
SHARES = (0.0, 0.1, 0.25, 0.5)


def whole_model(run, model):
    """A model that reads tokens, of a head that was trained alone."""
    if hasattr(model, "transformer"):
        return model
    whole = copy.copy(run.trunk_model)
    whole._modules = dict(whole._modules, lm_head=model.lm_head)
    return whole


def company_of(run, model, plan, examples, size, control=None):
    return held_out_company(run, model, examples, plan | {"cluster_size": size}, "fit", control)


def loss_of(run, model, examples, company, batch_size, rows=slice(None)):
    nll, counts = score(run, model, examples, batch_size, company)
    return float(nll[rows].sum() / counts[rows].sum())


def sweep_clusters(run, model, plan, examples, args):
    for size in SIZES:
        company = company_of(run, model, plan, examples, size)
        yield "", int(company.cluster.max()) + 1, loss_of(
            run, model, examples, company, args.batch_size)


def sweep_cluster_size(run, model, plan, examples, args):
    for size in SIZES:
        company = company_of(run, model, plan, examples, SIZES[-1])

        def few(i, mates, size=size):
            order = torch.Generator().manual_seed(i)
            others = mates[mates != i]
            others = others[torch.randperm(len(others), generator=order)[: size - 1]]
            return torch.cat([torch.tensor([i]), others])

        company.choose = few
        yield "", size, loss_of(run, model, examples, company, args.batch_size)


def sweep_noise(run, model, plan, examples, args):
    draw = np.random.default_rng(0)
    order = draw.permutation(len(examples))
    scored = np.sort(order[len(order) // 2 :])
    text = "\n\n".join(document.text for document in read_pydocs()[:400])
    elsewhere = np.array(run.tokenizer.encode(text))
    sources = {"random tokens": draw.integers(0, run.tokenizer.vocab_size, len(elsewhere)),
               "Python's documentation": elsewhere}
    model, examples = whole_model(run, model), replace(examples, states=None)
    company = held_out_company(run, model, examples, plan, plan["inference"])
    for kind, source in sources.items():
        for share in SHARES:
            tokens = np.array(examples.tokens)
            for i in order[: round(share * len(order))]:
                row = slice(examples.start[i], examples.start[i] + examples.length[i])
                start = draw.integers(len(source) - examples.length[i])
                tokens[row] = source[start : start + examples.length[i]]
            noisy = replace(examples, tokens=tokens)
            company.prompts = model.lm_head.read(noisy, run.base.transformer.wte)
            yield kind, share, loss_of(run, model, noisy, company, args.batch_size, scored)


SWEEPS = {"clusters": (sweep_clusters, "clusters of the validation requests"),
          "cluster-size": (sweep_cluster_size, "requests that a statistic is made of"),
          "noise": (sweep_noise, "share of requests that were replaced")}


def sweep(run, args, kind, colours):
    """Draw sweep-KIND.png and write sweep-KIND.json; returns its records."""
    trunk = "shared" if run.shared else "joint"
    records = []
    for path in adapter_paths(run.folder, trunk):
        model, plan = load_adapter(run, path)
        wanted = "own prompt only" in model.lm_head.controls or (
            kind == "noise" and plan["method"] == "per-sample")
        if not wanted or plan.get("told") or plan["seed"] != args.seed or (
                args.methods and plan["method"] not in args.methods):
            continue
        examples = (run.shared if plan.get("trunk") else run.examples)["validation"]
        for variant, x, loss in SWEEPS[kind][0](run, model, plan, examples, args):
            records.append({"method": label(plan), "seed": plan["seed"], "variant": variant,
                            "x": x, "loss": loss})
            print(f"{label(plan)}, seed {plan['seed']} {variant} {x}: {loss:.4f}", flush=True)
    write_json(run.folder / f"sweep-{kind}.json", records)
    draw(records, kind, colours, run.folder / f"sweep-{kind}.png")
    return records


def draw(records, kind, colours, path):
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = list(dict.fromkeys((r["method"], r["variant"]) for r in records))
    methods = list(dict.fromkeys(method for method, _ in lines))
    for method, variant in lines:
        mine = [r for r in records if (r["method"], r["variant"]) == (method, variant)]
        i = methods.index(method)
        x = sorted({r["x"] for r in mine})
        y = [np.mean([r["loss"] for r in mine if r["x"] == at]) for at in x]
        style = "--" if variant.startswith("random") else "-"
        axes.plot(x, y, "os^DvP*X"[i % 8] + style, color=colours[i % len(colours)],
                  label=", ".join(filter(None, (method, variant))), markersize=5)
    if kind != "noise":
        axes.set_xscale("log", base=2)
    low, high = axes.get_ylim()
    middle, half = (low + high) / 2, max((high - low) / 2, 0.005)  # noise is not to fill the figure
    axes.set_ylim(middle - half, middle + half)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel(SWEEPS[kind][1])
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
