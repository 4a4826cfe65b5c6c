"""Measure this project beside its peers: the same work, in one process, taken in turns.

    pip install -r bench/requirements.txt
    python bench/speed.py [--only kmeans,decode] [--quick] [--scaling]

Writes speed.md and speed.json, and with --scaling scaling.png, to results/speed. Times are medians
and "times ours" is a contender's time over this project's. The floor is the least time that the
machine needs: operations at its matrix rate or bytes at its memory bandwidth, both measured here,
whichever is longer.
"""

# ruff: noqa: E402
import argparse
import contextlib
import copy
import ctypes
import importlib
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import (UserError, choose_device, choose_dtype, keep_freed_memory, write_json,
                    write_text)
from hypernet import cluster_statistics, features, prompt_means
from lab.cluster import kmeans
from lab.common import adapt, wait
from lab.data import Corpus, Tokenizer, load_examples
from lab.model import GPT, SIZES, GPTConfig
from lab.turns import linear_cross_entropy
from model import generate, merge_lora
from train import losses

PEERS = {"scikit-learn": "sklearn.cluster", "faiss-cpu": "faiss", "transformers": "transformers",
         "fast-pytorch-kmeans": "fast_pytorch_kmeans", "peft": "peft",
         "flash-kmeans": "flash_kmeans", "liger-kernel": "liger_kernel.transformers",
         "cut-cross-entropy": "cut_cross_entropy"}
CUDA_ONLY = ("flash-kmeans", "liger-kernel", "cut-cross-entropy")

# ------------------------------------------------------------------------------------ measuring


class Bench:
    """The machine, and the tables measured on it so far."""

    def __init__(self, args):
        self.quick, self.repeats, self.data_dir = args.quick, args.repeats, args.data_dir
        self.device = choose_device(args.device)[0]
        self.dtype, why = choose_dtype("auto", self.device)
        self.cuda, self.tables = self.device.type == "cuda", []
        self.rate = {d: matrix_rate(self.device, d) for d in (torch.float32, self.dtype)}
        block = torch.ones(1 << (24 if args.quick else 28), dtype=torch.uint8, device=self.device)
        other = block.clone()
        self.bandwidth = 2 * len(block) / self.times({"": lambda: other.copy_(block)}, 5)[""]
        name = torch.cuda.get_device_name() if self.cuda else f"CPU, {processor()}"
        rates = ", ".join(f"{short(d)} {r / 1e12:.2f} TFLOP/s" for d, r in self.rate.items())
        self.machine = (
            f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch "
            f"{torch.__version__}; {rates}, memory {self.bandwidth / 1e9:.0f} GB/s; {why}")

    def times(self, contenders, repeats=None):
        """Median seconds of each function, after one call each, taken in turns."""
        seconds = {name: [] for name in contenders}
        for turn in range((repeats or self.repeats) + 1):
            for name, function in contenders.items():
                wait(self.device)
                start = time.perf_counter()
                function()
                wait(self.device)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in seconds.items()}

    def memory(self, function):
        """Bytes that a call needs on top of what was there before it; NaN where none can tell."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            return torch.cuda.max_memory_allocated() - before
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before = proc("VmRSS")
            function()
            return proc("VmHWM") - before
        return math.nan

    def table(self, title, goal, contenders, *, unit="", work=0, ops=0, moved=0, memory=False,
              note=lambda name, seconds: ""):
        """Measure and print one table; ours is the first contender.

        contenders: name -> function; or the seconds, if measured elsewhere; or, in words, why it
        is not measured. A call does `work` of `unit`; note(name, seconds): a remark on a result.
        """
        seconds = {n: f for n, f in contenders.items() if isinstance(f, float)}
        running = {n: f for n, f in contenders.items() if callable(f)}
        for name in list(running)[1:]:
            try:
                running[name]()
            except Exception as error:  # a peer's failure is a result; ours would end the run
                del running[name]
                contenders[name] = f"failed, {type(error).__name__}: {str(error)[:80]}"
        seconds |= self.times(running)
        floor = max(ops / self.rate[self.dtype], moved / self.bandwidth)
        first = seconds.get(next(iter(contenders)), math.nan)
        floor_text = f" Floor: {show(floor)}." if floor else ""
        lines = [f"### {title}", "", f"Goal: {goal}.{floor_text}", "",
                 f"| contender | time | {unit} | times ours | memory | times floor | note |",
                 "| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
        for name, why in contenders.items():
            cells = ["", "", "", "", "", why]
            if name in seconds:
                t = seconds[name]
                cells = [show(t), f"{work / t:,.0f}" if work else "", f"{t / first:.2f}",
                         f"{self.memory(running[name]) / 1e6:,.0f} MB" if memory else "",
                         f"{t / floor:.1f}" if floor else "", note(name, seconds)]
                if name.startswith("of that"):  # a part of another contender's work
                    cells[1] = cells[2] = cells[4] = ""
            lines.append("| " + " | ".join([name, *cells]) + " |")
        text = "\n".join(lines) + "\n"
        print(text, flush=True)
        self.tables.append({"title": title, "seconds": seconds, "work": work, "unit": unit,
                            "floor": floor, "machine": self.machine, "markdown": text})


def matrix_rate(device, dtype, repeats=5):
    """Operations a second of a square matrix product, the best of a few: two per multiply-add."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, dtype=dtype, device=device)
    times = []
    while len(times) <= repeats and sum(times) < 1:  # the first call counts where one takes long
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def show(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def short(dtype):
    return str(dtype).removeprefix("torch.")


def proc(field):
    """Bytes under `field` of this process's status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def processor():
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    return platform.processor()


def peer(b, name):
    """A peer's module, and None; or None, and why it is not there."""
    if name in CUDA_ONLY and not b.cuda:
        return None, "needs CUDA"
    try:
        return importlib.import_module(PEERS[name]), None
    except ImportError as error:
        return None, "not installed" if (error.name or "-") in PEERS[name] else f"fails: {error}"


def autocast(b, dtype):
    return torch.autocast(b.device.type, dtype, enabled=dtype != torch.float32)


def shape(b, name):
    """A frozen base of one of this project's sizes, with random weights, and its description."""
    c = GPTConfig(vocab_size=50257 if name == "gpt2" else 4096, **SIZES[name])
    if b.quick:
        c = GPTConfig(64, 300, n_layer=2, n_head=2, n_embd=32)
    torch.manual_seed(0)
    says = f"{name} ({c.n_layer} layers, {c.n_embd} wide, V = {c.vocab_size:,})"
    return GPT(c).to(b.device).requires_grad_(False), says


def adapted(base, method):
    model = adapt(base, {"method": method, "rank": 4, "alpha": 8.0, "head_form": "full",
                         "clusters": 1, "stat_scope": "prompt"})
    if method == "chameleon":
        model.lm_head.spread.fill_(1.0)
    return model


def huggingface(transformers, base):
    """transformers' GPT-2 with the shape and weights of `base`; linear ones are (in, out) there."""
    c = base.config
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
        eos_token_id=None, pad_token_id=0, attn_implementation="sdpa"))
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in base.named_parameters():
            theirs[name].copy_(p.T if p.dim() == 2 and ".h." in name else p)
    return model.to(base.lm_head.weight.device)


# ----------------------------------------------------------------------------------------- rows


def bench_kmeans(b):
    N, C, K, steps = (2000, 32, 40, 3) if b.quick else (46_800, 768, 1462, 10)
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(K, C, generator=generator)[torch.randint(K, (N,), generator=generator)]
    points = F.normalize(points + 2 * torch.randn(N, C, generator=generator), dim=1)
    seeds = points[torch.randperm(N, generator=generator)[:K]]
    x, init = points.to(b.device), seeds.to(b.device)

    def ours(dtype, _=None):
        return kmeans(x, K, generator, steps, 0, init, dtype=dtype).centroids

    def sklearn(module):
        return module.KMeans(K, init=seeds.numpy(), n_init=1, max_iter=steps, tol=0,
                             algorithm="lloyd").fit(points.numpy()).cluster_centers_

    def faiss(module):
        fitted = module.Kmeans(C, K, niter=steps, max_points_per_centroid=N,
                               min_points_per_centroid=1)
        fitted.train(points.numpy(), init_centroids=seeds.numpy())
        return fitted.centroids

    def fast(module):
        fitted = module.KMeans(K, max_iter=steps, tol=0)
        fitted.fit_predict(x, centroids=init.clone())
        return fitted.centroids

    def flash(module):
        low, start = (t.to(torch.bfloat16)[None] for t in (x, init))
        return module.batch_kmeans_Euclid(
            low, K, max_iters=steps, tol=0, init_centroids=start)[1][0]

    def plain(_):
        centroids = init
        for _ in range(steps):
            cluster = torch.addmm(centroids.square().sum(1), x, centroids.T, alpha=-2).argmin(1)
            count = torch.bincount(cluster, minlength=K).clamp(min=1)
            centroids = torch.zeros_like(init).index_add_(0, cluster, x) / count[:, None]
        return centroids

    found, contenders = {}, {}
    for name, function, needs in (
            *((f"this project, {short(d)}", partial(ours, d), None)
              for d in dict.fromkeys((b.dtype, torch.float32))),
            ("scikit-learn", sklearn, "scikit-learn"), ("faiss", faiss, "faiss-cpu"),
            ("fast-pytorch-kmeans", fast, "fast-pytorch-kmeans"),
            ("flash-kmeans, bfloat16", flash, "flash-kmeans"),
            ("plain torch, N x K at once", plain, None)):
        module, why = peer(b, needs) if needs else (None, None)
        contenders[name] = why or (lambda name=name, function=function, module=module:
                                   found.update({name: function(module)}))

    def inertia(name):
        centroids = torch.as_tensor(found[name]).to(b.device, torch.float32)
        return sum(torch.cdist(part, centroids).amin(1).square().sum().item()
                   for part in x.split(2048))

    b.table(f"k-means: N = {N:,}, C = {C}, K = {K:,}, {steps} Lloyd steps from the same seeds",
            "twice as fast as the fastest peer, in under 200 MB of memory", contenders,
            ops=2 * N * K * C * steps, moved=4 * N * C * steps, memory=True,
            note=lambda name, _: f"inertia x {inertia(name) / inertia('this project, float32'):.5f}"
            + (", on the CPU" if b.cuda and name in ("scikit-learn", "faiss") else ""))


def training_step(b, model, loss, dtype):
    """A function that takes one step: loss under autocast, gradient clipped, AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=b.device.type in ("cpu", "cuda"))
    model.train()

    def step():
        with autocast(b, dtype):
            value = loss(model)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training_batch(b, base, name):
    B, T = (4, 32) if b.quick else (32, 256) if name == "nano" else (8, 256)
    if b.cuda and name == "gpt2" and not b.quick:
        B, T = 32, 1024
    rows = torch.randint(base.config.vocab_size, (B, T + 1))
    return B, T, rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def step_work(c, B, T):
    """Operations of a LoRA step: all products forward, and backward into activations alone."""
    matrices = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
    attention = 2 * c.n_layer * c.n_embd * T  # two products, half of which are masked
    return B * T * (4 * matrices + 3 * attention)


def our_loss(b, tokens, targets, statistics=None):
    return lambda model: (losses(model, tokens, targets, statistics, b.dtype).sum()
                          / targets.numel())


def bench_step(b):
    peft, no_peft = peer(b, "peft")
    transformers, no_transformers = peer(b, "transformers")
    why = no_peft or no_transformers
    for name in ("nano", "gpt2"):
        base, says = shape(b, name)
        B, T, tokens, targets = training_batch(b, base, name)
        ids = tokens.to(b.device)
        contenders = {"this project": training_step(
            b, adapted(base, "lora"), our_loss(b, tokens, targets), b.dtype)}
        for low in (False, True):
            label = f"transformers + peft, {short(b.dtype) + ' weights' if low else 'autocast'}"
            contenders[label] = why
            if not why:
                model = huggingface(transformers, base).to(b.dtype if low else torch.float32)
                model = peft.get_peft_model(model, peft.LoraConfig(
                    r=4, lora_alpha=8, lora_dropout=0.0, fan_in_fan_out=True,
                    target_modules=["c_attn", "c_proj", "c_fc", "lm_head"]))
                # The labels are shifted inside: one target fewer a row than ours.
                contenders[label] = training_step(
                    b, model, lambda model, ids=ids: model(input_ids=ids, labels=ids).loss,
                    torch.float32 if low else b.dtype)
        b.table(f"LoRA training step, rank 4: {says}, {B} x {T} tokens, {short(b.dtype)}",
                "2 times the tokens/s of the faster peer on a CPU, 1.3 on CUDA", contenders,
                unit="tokens/s", work=B * T, ops=step_work(base.config, B, T), memory=True)


def bench_chameleon(b):
    for name in ("nano", "gpt2"):
        base, says = shape(b, name)
        B, T, tokens, targets = training_batch(b, base, name)
        statistics = torch.randn(1, base.config.n_embd).expand(B, -1)  # of one cluster
        contenders = {
            "LoRA": training_step(b, adapted(base, "lora"), our_loss(b, tokens, targets), b.dtype),
            "chameleon": training_step(b, adapted(base, "chameleon"),
                                       our_loss(b, tokens, targets, statistics), b.dtype)}
        b.table(f"chameleon step beside LoRA step: {says}, {B} x {T} tokens, {short(b.dtype)}",
                "chameleon takes at most 1.05 times LoRA's time and memory", contenders,
                unit="tokens/s", work=B * T, ops=step_work(base.config, B, T), memory=True)


def bench_head(b):
    n, C, V, r = (256, 32, 300, 4) if b.quick else (8192, 768, 50_257, 4)
    torch.manual_seed(0)
    given = {"hidden": torch.randn(n, C, device=b.device, dtype=b.dtype),
             "weight": 0.02 * torch.randn(V, C, device=b.device),
             "z": torch.randn(n, r, device=b.device),
             "B": 0.02 * torch.randn(V, r, device=b.device)}
    targets = torch.randint(V, (n,), device=b.device)

    def ours(_, hidden, weight, z=None, B=None):
        updates = [] if z is None else [(z, B)]
        return linear_cross_entropy(hidden, weight, targets, updates)[0]

    def materialised(_, hidden, weight, z=None, B=None):
        logits = F.linear(hidden, weight)
        if z is not None:
            logits = logits + F.linear(z, B)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def liger(module, hidden, weight, **_):
        loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return loss(weight.to(b.dtype), hidden, targets)

    def cce(module, hidden, weight, **_):
        return module.linear_cross_entropy(hidden, weight.to(b.dtype), targets, reduction="sum")

    for adapter in (True, False):
        gradients, contenders = {}, {}
        trained = ("hidden", "z", "B") if adapter else ("hidden", "weight")

        def step(name, loss, module, trained=trained, gradients=gradients):
            inputs = {k: given[k].detach().requires_grad_(k in trained)
                      for k in given if k in ("weight", *trained)}
            with autocast(b, b.dtype):
                total = loss(module, **inputs)
            total.backward()
            gradients[name] = {k: t.grad for k, t in inputs.items() if t.grad is not None}

        for name, loss in (("this project", ours), ("materialised logits", materialised),
                           ("liger-kernel", liger), ("cut-cross-entropy", cce)):
            module, why = peer(b, name) if name in PEERS else (None, None)
            contenders[name] = why or partial(step, name, loss, module)

        def note(name, _, adapter=adapter, gradients=gradients):
            if adapter and name in PEERS:
                return "without the low-rank update"
            exact = gradients["materialised logits"]
            worst = max(((g - exact[k]).abs().max() / exact[k].abs().max()).item()
                        for k, g in gradients[name].items())
            return f"gradients: {worst:.1e} of the largest from the materialised ones"

        case = "weight frozen, rank-4 update" if adapter else "weight trained"
        b.table(f"head and loss, forward and backward: {n:,} tokens, V = {V:,}, C = {C}, {case}, "
                f"{short(b.dtype)}", "a quarter of the materialised logits' memory, no slower",
                contenders, unit="tokens/s", work=n, ops=(4 if adapter else 6) * n * V * C,
                memory=True, note=note)


def bench_prepare(b):
    C, T, sample, steps = (32, 256, 50, 1) if b.quick else (768, 256, 2000, 2)
    name, says = "pydocs" if b.quick else "wikitext2", {}
    try:
        tokenizer = Tokenizer({"name": "gpt2"})
    except UserError as error:
        return b.table(name, "50 times faster", {"this project": f"left out: {error}"})
    wte = torch.nn.Embedding(tokenizer.vocab_size, C, device=b.device).requires_grad_(False)
    wpe = torch.nn.Embedding(T, C, device=b.device).requires_grad_(False)

    def ours():
        means, _ = prompt_means(load_examples(Corpus(name, b.data_dir), tokenizer, T)["train"],
                                wte.weight)
        K = max(1, len(means) // 32)
        with autocast(b, b.dtype):
            kmeans(features(means, means.mean(dim=0)).to(b.device), K,
                   torch.Generator().manual_seed(0), dtype=b.dtype)
        says[True] = (f"all three splits; {len(means):,} rows in {K:,} clusters, k-means until it "
                      f"stops")

    def published():
        """One line of text at a time, whole rows of padding, a loop over clusters: estimated."""
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        corpus = Corpus(name, b.data_dir)
        lines = [line for split in ("train", "validation") for d in corpus.documents(split)
                 for line in d.text.splitlines() if line.strip()]

        def one(example):
            ids = tokenizer.encode(example["text"])[:T]
            ids += [tokenizer.end] * (T - len(ids))
            return {"input_ids": ids, "labels": list(ids), "raw_text": example["text"]}

        def column(embed):
            return [embed(torch.tensor(example["input_ids"], device=b.device)[None])[0].tolist()
                    for example in table]

        start = time.perf_counter()
        table = Dataset.from_dict({"text": lines[:sample]}).map(one)
        table = table.add_column(
            "input", column(lambda ids: (wte(ids) + wpe(torch.arange(T, device=b.device))).mean(1)))
        table = table.add_column(
            "mean", column(lambda ids: F.normalize(wte(ids).mean(dim=1), dim=1)))
        kept = [example["mean"] for example in table]
        each = (time.perf_counter() - start) / len(lines[:sample])
        x = torch.tensor(kept, device=b.device).repeat(-(-len(lines) // len(kept)), 1)
        x = x[: len(lines)] + 0.001 * torch.randn(len(lines), C, device=b.device)
        k = len(lines) // 32
        centroids = x[torch.randperm(len(lines))[:k].to(b.device)]
        wait(b.device)
        start = time.perf_counter()
        for _ in range(steps):
            cluster = torch.cdist(x, centroids).argmin(dim=1)
            centroids = torch.stack([x[cluster == i].mean(dim=0) if (cluster == i).any()
                                     else centroids[i] for i in range(k)])
        wait(b.device)
        step = (time.perf_counter() - start) / steps
        says[False] = (f"{len(lines):,} lines at {1000 * each:.2f} ms (measured on "
                       f"{len(kept):,}), 10 steps of k = {k:,} at {step:.2f} s (on {steps})")
        return each * len(lines) + 10 * step

    title = f"{name} made ready for training: tokens, embeddings (C = {C}), clusters"
    contenders = {"this project": ours, "the published code's way, estimated": None}
    try:
        contenders["the published code's way, estimated"] = published()
    except UserError as error:  # no data or vocabulary, and no network to fetch them from
        contenders = dict.fromkeys(contenders, f"left out: {error}")
    b.table(title, "50 times faster", contenders, note=lambda name, _: says[name == "this project"])


def bench_decode(b):
    B, P, new = (4, 8, 8) if b.quick else (32, 32, 64)
    transformers, why = peer(b, "transformers")
    for name in ("nano", "gpt2"):
        base, says = shape(b, name)
        c = base.eval().config
        tokens = torch.randint(c.vocab_size, (B, P), device=b.device)
        contenders = {}
        for dtype in dict.fromkeys((b.dtype, torch.float32)):
            contenders[f"this project, {short(dtype)}"] = partial(
                generate, copy.deepcopy(base).to(dtype), tokens.tolist(), new)
            contenders[f"transformers, {short(dtype)}"] = why or partial(
                huggingface(transformers, base).eval().to(dtype).generate, tokens,
                attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False)
        chameleon = adapted(base, "chameleon").eval()
        merge_lora(chameleon)
        head, count = chameleon.lm_head, torch.full((B,), float(P))

        def statistics(head=head, wte=chameleon.transformer.wte.weight, tokens=tokens, count=count):
            means = wte[tokens].mean(dim=1)  # (B, C)
            points = features(means, head.center)
            cluster = kmeans(points, B // 4, torch.Generator().manual_seed(0)).cluster
            return cluster_statistics(means, count.to(b.device), cluster)

        @torch.no_grad()
        def adaptation(head=head, statistics=statistics):
            head.factors(statistics())

        def requested(model=chameleon, statistics=statistics, tokens=tokens):
            generate(model, tokens.tolist(), new, statistics())

        whole = f"this project, chameleon, {B // 4} clusters"
        part = "of that, clusters and updates, made once"
        contenders |= {whole: requested, part: adaptation}
        matrices, head = 12 * c.n_layer * c.n_embd**2, c.vocab_size * c.n_embd
        b.table(f"greedy decoding: {says}, {B} prompts of {P}, {new} new tokens each, "
                f"{short(b.dtype)}",
                "2 times the tokens/s of the faster peer; clusters and updates 5% of the time",
                contenders, unit="tokens/s", work=B * new,
                ops=2 * B * ((P + new - 1) * matrices + new * head),
                moved=b.dtype.itemsize * new * (matrices + head),
                note=lambda name, t, whole=whole, part=part:
                f"{t[part] / t[whole]:.1%} of its time" if name == part else "")


def bench_import(b):
    def start(*command):
        return lambda: subprocess.run([sys.executable, *command], cwd=ROOT, check=True,
                                      stdout=subprocess.DEVNULL)

    b.table("import and --help, in a process of its own", "under a second", {
        "lab.run train --help": start("-m", "lab.run", "train", "--help"),
        "lab.run eval --help": start("-m", "lab.run", "eval", "--help"),
        "import lab.train": start("-c", "import lab.train"),
        "import lab.eval": start("-c", "import lab.eval"),
        "import torch": start("-c", "import torch"), "python, nothing": start("-c", "pass")})


# ----------------------------------------------------------------------------------------- main

ROWS = {"kmeans": bench_kmeans, "step": bench_step, "chameleon": bench_chameleon,
        "head": bench_head, "prepare": bench_prepare, "decode": bench_decode,
        "import": bench_import}


def version(name):
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} not installed"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(ROWS), help="rows to measure: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="calls that a median is of")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all")
    parser.add_argument("--scaling", action="store_true", help="draw scaling.png, and no table")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--data-dir", default="data", help="where wikitext2 lies")
    parser.add_argument("--out", default=str(ROOT / "results/speed"), help="folder of the results")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    for name in names:
        if name not in ROWS:
            parser.error(f"--only {name}: not one of {', '.join(ROWS)}")
    args.repeats = 1 if args.quick else args.repeats
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    b, out = Bench(args), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    print(b.machine, "\n")
    if args.scaling:
        from scaling import scaling

        return scaling(b, out)
    for name in names:
        ROWS[name](b)
    versions = ", ".join(map(version, PEERS))
    head = f"Machine: {b.machine}. Medians of {b.repeats}.\n\nPeers: {versions}.\n"
    text = "\n".join([head, *(table.pop("markdown") for table in b.tables)])
    write_text(out / "speed.md", text)
    write_json(out / "speed.json", {"machine": b.machine, "peers": versions, "tables": b.tables})


if __name__ == "__main__":
    main()
