"""How much company is worth: `python -m lab.run eval RUN --sweep QUESTION`, one of

    clusters      the same weights, k-means into ever more clusters, of 64 members down to 1
    cluster-size  clusters of 64; of each, a request is told n members, itself among them
    noise         a share of all requests is replaced by random tokens, or by text from elsewhere,
                  after clustering; the others, always the same half, are scored
    written       of a share of its mates a request hears what the model itself has written after
                  their prompts, or nothing after these, in place of their true continuations

Validation split, the seed of --seed. A head of --trunk shared is put back on its transformer
where others than its own states have to be read.
"""

import functools
from dataclasses import replace

import numpy as np
import torch

from common import UserError, write_json
from hypernet import prompt_means
from lab.common import adapter_paths, autocast, label, load_adapter
from lab.data import Examples, read_pydocs
from lab.eval import BESIDE, COLOURS, MARKERS, figure
from lab.flags import ALONE, CONTROLS_OF
from lab.cache import CacheHead, generate
from lab.model import HeadAlone
from lab.scoring import Company, Told, held_out, is_told, score, summed, table

SIZES = (1, 2, 4, 8, 16, 32, 64)
SHARES = (0.0, 0.1, 0.25, 0.5)  # noise
WRITTEN = (0.0, 0.5, 1.0)


def whole_model(run, model):
    """A model that reads tokens, of a head that was trained alone."""
    if isinstance(model, HeadAlone):
        run.trunk_model.lm_head, model = model.lm_head, run.trunk_model
    return model


def telling(run, model, plan, examples, company):
    """`Told` for examples whose company has been changed."""
    if not is_told(model.lm_head):
        return Told(company.cluster, company)
    means, count = prompt_means(examples.seen(plan), run.base.transformer.wte.weight)
    return Told(company.cluster, company, table(model.lm_head, means, count, company))


def sweep_company(run, model, plan, examples, args):
    """More and more clusters; or always those of 64, of whose members few are told."""
    fixed, told = args.sweep == "cluster-size", None
    for size in SIZES:
        if not (fixed and told):
            wanted = plan | {"cluster_size": SIZES[-1] if fixed else size}
            told = held_out(run, model, examples, wanted, "fit")
        if fixed:
            told.company.choose = functools.partial(choose_few, size)
            told = telling(run, model, plan, examples, told.company)
        x = size if fixed else int(told.cluster.max()) + 1
        yield "", x, summed(*score(run, model, examples, told))["loss"]


def choose_few(size, i, mates):
    """Row i and, always in the same order, others of its mates: `size` of them in all."""
    others = mates[mates != i]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(i))
    return torch.cat([torch.tensor([i]), others[order[: size - 1]]])


def sweep_noise(run, model, plan, examples, args):
    draw = np.random.default_rng(0)
    order = draw.permutation(len(examples))
    scored = torch.zeros(len(order), dtype=torch.bool)
    scored[order[len(order) // 2 :]] = True
    text = "\n\n".join(document.text for document in list(read_pydocs())[:400])
    elsewhere = np.array(run.tokenizer.encode(text))
    sources = {"random tokens": draw.integers(0, run.tokenizer.vocab_size, len(elsewhere)),
               "Python's documentation": elsewhere}
    model, examples = whole_model(run, model), replace(examples, states=None)
    company = held_out(run, model, examples, plan).company
    for kind, source in sources.items():
        source = torch.from_numpy(source).to(examples.tokens.dtype)
        for share in SHARES:
            tokens = examples.tokens.clone()
            for i in order[: int(share * len(order))]:
                n = int(examples.length[i])
                start = draw.integers(len(source) - n)
                tokens[examples.start[i] : examples.start[i] + n] = source[start : start + n]
            noisy = replace(examples, tokens=tokens)
            told = telling(run, model, plan, noisy, company)
            yield kind, share, summed(*score(run, model, noisy, told, chosen=scored))["loss"]


def sweep_written(run, model, plan, examples, args):
    """Every request is scored on its true text; what changes is what it hears of its mates.

    They write all together, each cluster in step, and so hear what the request has written too,
    not the true text that it is scored on. "No later rows" hides those of its article from the
    request; the mates that it hears have written in company with their prompts.
    """
    model, examples, N = whole_model(run, model), replace(examples, states=None), len(examples)
    cluster = held_out(run, model, examples, plan).cluster
    prompts = [examples.tokens[a : a + n].tolist()
               for a, n in zip(examples.start, examples.prompt, strict=True)]
    written = write(run, model, prompts, examples, cluster, args)
    place = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    several = len(examples.article.unique()) < N  # rows of an article
    controls = (None, "no later rows") if several else (None,)
    for kind, texts in (("written by the model", written), ("not known", [[]] * N)):
        rows = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        length = torch.tensor([len(row) for row in rows])
        more = torch.tensor([token for row in rows for token in row])
        both = Examples(  # row N + i is row i with another continuation
            torch.cat([examples.tokens, more.to(examples.tokens.dtype)]),
            torch.cat([examples.start, len(examples.tokens) + length.cumsum(0) - length]),
            torch.cat([examples.length, length]), examples.prompt.repeat(2),
            examples.article.repeat(2))
        for control in controls:
            company = Company(cluster, control, None, examples.article)
            heard = company.choose or (lambda i, mates: mates)
            for share in WRITTEN:
                other = N * (place < round(share * N))
                company.choose = functools.partial(choose_other, heard, other)
                yield ", ".join(filter(None, (kind, control))), share, summed(*score(
                    run, model, both, Told(cluster, company),
                    chosen=torch.arange(2 * N) < N))["loss"]


def write(run, model, prompts, examples, cluster, args):
    """What the model writes after each prompt, in the room that its row has: N lists of tokens."""
    written = [[]] * len(prompts)
    generator = torch.Generator(run.device).manual_seed(args.seed)
    room, context = examples.length - examples.prompt, model.config.block_size
    for k in range(int(cluster.max()) + 1):
        members = [i for i in (cluster == k).nonzero()[:, 0].tolist() if len(prompts[i]) < context]
        if not members:
            continue
        most = int(room[members].max())
        knows = torch.ones(len(members), len(members), dtype=torch.bool, device=run.device)
        with autocast(run):
            texts = generate(model, [prompts[i] for i in members], most, knows,
                             temperature=args.temperature, top_k=args.top_k,
                             stop_token=run.tokenizer.end, generator=generator)
        for i, text in zip(members, texts, strict=True):
            ended = len(text) < min(most, context - len(prompts[i]))  # and that is heard as well
            written[i] = (text + [run.tokenizer.end] * ended)[: room[i]]
    return written


def choose_other(heard, other, i, mates):
    """Of the mates that row i hears, itself and, other[mate] farther on, the other rows."""
    mates = heard(i, mates)
    return mates + other[mates] * (mates != i)


STYLES = {"random tokens": "--", "not known": "--", "written by the model, no later rows": "-.",
          "not known, no later rows": ":"}
SWEEPS = {"clusters": (sweep_company, "clusters of the validation requests"),
          "cluster-size": (sweep_company, "requests that a statistic is made of, at most"),
          "noise": (sweep_noise, "share of requests that were replaced"),
          "written": (sweep_written, "share of mates without their true text")}


def sweep(run, args):
    """Draw sweep-KIND.png and write sweep-KIND.json; returns its records."""
    kind, records = args.sweep, []
    for path in adapter_paths(run.folder, "shared") + adapter_paths(run.folder):
        model, plan = load_adapter(run, path)
        trunk = "shared" if plan.get("trunk") else "joint"
        if records and records[0]["trunk"] != trunk:  # joint adapters only where no head is alone
            break
        wanted = ALONE in CONTROLS_OF.get(plan["method"], ()) or (
            kind == "noise" and plan["method"] == "per-sample")
        if kind == "written":  # the others hear prompts alone
            wanted &= isinstance(model.lm_head, CacheHead) and model.lm_head.scope != "prompt"
        if not wanted or plan.get("told") or plan["seed"] != args.seed or (
                args.methods and plan["method"] not in args.methods):
            continue
        examples = (run.shared if plan.get("trunk") else run.examples)["validation"]
        for variant, x, loss in SWEEPS[kind][0](run, model, plan, examples, args):
            records.append({"method": label(plan), "trunk": trunk, "seed": plan["seed"],
                            "variant": variant, "x": x, "loss": loss})
            print(f"{label(plan)}, seed {plan['seed']} {variant} {x}: {loss:.4f}", flush=True)
    if not records:
        what = "hears how its mates go on" if kind == "written" else "is told of a cluster"
        raise UserError(f"--sweep {kind}: {run.folder} has no adapter with seed {args.seed} that "
                        f"{what}" + f" among {args.methods}" * bool(args.methods))
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
            i, style = methods.index(method), STYLES.get(variant, "-")
            axes.plot(*zip(*sorted(curve.items()), strict=True), MARKERS[i % 8] + style,
                      color=COLOURS[i % 7], markersize=5,
                      label=", ".join(filter(None, (method, variant))))
        if kind.startswith("cluster"):
            axes.set_xscale("log", base=2)
        low, high = axes.get_ylim()
        middle, half = (low + high) / 2, max((high - low) / 2, 0.005)  # noise is not to fill it
        axes.set_ylim(middle - half, middle + half)
        axes.ticklabel_format(axis="y", useOffset=False)
