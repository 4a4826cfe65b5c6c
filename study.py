"""How much company is worth: `eval.py RUN --sweep clusters|cluster-size|noise`.

    clusters      the same weights, k-means into ever more clusters, of 64 members down to 1
    cluster-size  clusters of 64; of each, a request is told n members, itself among them
    noise         a share of all requests is replaced by random tokens, or by text from elsewhere,
                  after clustering; the others, always the same half, are scored

Validation split, the seed of --seed. A head of --trunk shared is put back on its transformer
where others than its own states have to be read.
"""

import functools
from dataclasses import replace

import numpy as np
import torch

from common import adapter_paths, label, load_adapter
from data import read_pydocs
from eval import BESIDE, COLOURS, MARKERS, figure
from files import UserError, write_json
from model import HeadAlone
from scoring import held_out_company, score, summed

SIZES = (1, 2, 4, 8, 16, 32, 64)
SHARES = (0.0, 0.1, 0.25, 0.5)


def whole_model(run, model):
    """A model that reads tokens, of a head that was trained alone."""
    if isinstance(model, HeadAlone):
        run.trunk_model.lm_head, model = model.lm_head, run.trunk_model
    return model


def sweep_company(run, model, plan, examples, args):
    """More and more clusters; or always those of 64, of whose members few are told."""
    fixed, company = args.sweep == "cluster-size", None
    for size in SIZES:
        if not (fixed and company):
            wanted = plan | {"cluster_size": SIZES[-1] if fixed else size}
            company = held_out_company(run, model, examples, wanted, "fit")
        if fixed:
            company.choose = functools.partial(choose_few, size)
        x = size if fixed else int(company.cluster.max()) + 1
        yield "", x, summed(*score(run, model, examples, args.batch_size, company))["loss"]


def choose_few(size, i, mates):
    """Row i and, always in the same order, others of its mates: `size` of them in all."""
    others = mates[mates != i]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(i))
    return torch.cat([torch.tensor([i]), others[order[: size - 1]]])


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
            for i in order[: int(share * len(order))]:
                row = slice(examples.start[i], examples.start[i] + examples.length[i])
                start = draw.integers(len(source) - examples.length[i])
                tokens[row] = source[start : start + examples.length[i]]
            noisy = replace(examples, tokens=tokens)
            company.prompts = model.lm_head.read(noisy.conditioned(plan), run.base.transformer.wte)
            nll, counts = score(run, model, noisy, args.batch_size, company)
            yield kind, share, summed(nll[scored], counts[scored])["loss"]


SWEEPS = {"clusters": (sweep_company, "clusters of the validation requests"),
          "cluster-size": (sweep_company, "requests that a statistic is made of, at most"),
          "noise": (sweep_noise, "share of requests that were replaced")}


def sweep(run, args):
    """Draw sweep-KIND.png and write sweep-KIND.json; returns its records."""
    kind, records = args.sweep, []
    for path in adapter_paths(run.folder, "shared") + adapter_paths(run.folder):
        model, plan = load_adapter(run, path)
        trunk = "shared" if plan.get("trunk") else "joint"
        if records and records[0]["trunk"] != trunk:  # joint adapters only where no head is alone
            break
        wanted = "own prompt only" in model.lm_head.controls or (
            kind == "noise" and plan["method"] == "per-sample")
        if not wanted or plan.get("told") or plan["seed"] != args.seed or (
                args.methods and plan["method"] not in args.methods):
            continue
        examples = (run.shared if plan.get("trunk") else run.examples)["validation"]
        for variant, x, loss in SWEEPS[kind][0](run, model, plan, examples, args):
            records.append({"method": label(plan), "trunk": trunk, "seed": plan["seed"],
                            "variant": variant, "x": x, "loss": loss})
            print(f"{label(plan)}, seed {plan['seed']} {variant} {x}: {loss:.4f}", flush=True)
    if not records:
        raise UserError(f"--sweep {kind}: {run.folder} has no adapter with seed {args.seed} that "
                        f"is told of a cluster" + f" among {args.methods}" * bool(args.methods))
    write_json(run.folder / f"sweep-{kind}.json", records)
    draw(records, kind, run.folder / f"sweep-{kind}.png")
    return records


def draw(records, kind, path):
    curves = {}  # of each method and variant, over x
    for r in records:
        curves.setdefault((r["method"], r["variant"]), {})[r["x"]] = r["loss"]
    methods = list(dict.fromkeys(method for method, _ in curves))
    with figure(path, SWEEPS[kind][1], "validation loss (nats per token)", **BESIDE) as axes:
        for (method, variant), curve in curves.items():
            i, style = methods.index(method), "--" if variant.startswith("random") else "-"
            axes.plot(*zip(*sorted(curve.items()), strict=True), MARKERS[i % 8] + style,
                      color=COLOURS[i % 7], markersize=5,
                      label=", ".join(filter(None, (method, variant))))
        if kind != "noise":
            axes.set_xscale("log", base=2)
        low, high = axes.get_ylim()
        middle, half = (low + high) / 2, max((high - low) / 2, 0.005)  # noise is not to fill it
        axes.set_ylim(middle - half, middle + half)
        axes.ticklabel_format(axis="y", useOffset=False)
