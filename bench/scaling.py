"""Time and memory against one size at a time: what `python bench/speed.py --scaling` draws."""

import contextlib
import ctypes
import math
import tempfile
import threading
from pathlib import Path

import matplotlib
import numpy as np
import torch
from speed import adapted, autocast, our_loss, proc, training_step

from common import write_json
from lab.cluster import kmeans
from lab.model import GPT, GPTConfig
from lab.turns import linear_cross_entropy

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter


def scaling(b, out):
    """Time and memory against one size at a time, with slopes on logarithmic axes."""
    shrink = 8 if b.quick else 1
    generator = torch.Generator().manual_seed(0)

    def clustering(N=8192 // shrink, K=256 // shrink):
        x = torch.randn(N, 256, device=b.device)
        return lambda: kmeans(x, K, generator, max_iters=5, tol=0, init=x[:K].clone(),
                              dtype=b.dtype)

    def head(V=8192 // shrink, r=4, n=2048 // shrink):
        hidden = torch.randn(n, 256, device=b.device, dtype=b.dtype, requires_grad=True)
        weight = torch.randn(V, 256, device=b.device)
        z = torch.randn(n, r, device=b.device, requires_grad=True)
        B = torch.randn(V, r, device=b.device, requires_grad=True)
        targets = torch.randint(V, (n,), device=b.device)

        def step():
            with autocast(b, b.dtype):
                linear_cross_entropy(hidden, weight, targets, [(z, B)])[0].backward()
        return step

    def whole_step(T):
        torch.manual_seed(0)
        base = GPT(GPTConfig(2048, 4096 // shrink, 2, 3, 192)).to(b.device)
        tokens = torch.randint(4096 // shrink, (2, T))
        return training_step(b, adapted(base, "lora"), our_loss(b, tokens, tokens), b.dtype)

    folder = tempfile.TemporaryDirectory()
    mapped_file = Path(folder.name) / "points"

    def mapped(N):
        x = np.memmap(mapped_file, np.float32, "w+", shape=(N, 64))
        for start in range(0, N, 1 << 14):
            x[start : start + (1 << 14)] = np.random.default_rng(start).normal(
                size=(min(1 << 14, N - start), 64))
        x.flush()
        x = torch.from_numpy(np.memmap(mapped_file, np.float32, "r+", shape=(N, 64)))
        return lambda: kmeans(x, 64, generator, max_iters=3, tol=0, init=x[:64].clone(),
                              dtype=b.dtype)

    panels = {
        "k-means from a mapped file: N": (mapped, [n // shrink for n in
                                                   (10_000, 32_000, 100_000, 316_000, 1_000_000)]),
        "k-means: examples N": (lambda n: clustering(N=n), [2**i // shrink for i in range(12, 17)]),
        "k-means: clusters K": (lambda k: clustering(K=k), [2**i // shrink for i in range(6, 11)]),
        "head and loss: vocabulary V": (lambda v: head(V=v),
                                        [2**i // shrink for i in range(11, 17)]),
        "head and loss: rank r": (lambda r: head(r=r), [1, 2, 4, 8, 16, 32]),
        "LoRA step: length T": (whole_step, [2**i // shrink for i in range(7, 12)]),
    }
    figure, axes = plt.subplots(2, len(panels), figsize=(2.8 * len(panels), 5.6),
                                layout="constrained")
    measured = {}
    for column, (title, (make, sizes)) in enumerate(panels.items()):
        from_file = title.startswith("k-means from")
        times, bytes_ = [], []
        for size in sizes:
            function = make(size)
            times.append(b.times({"": function}, min(3, b.repeats))[""])
            bytes_.append(anonymous(function) if from_file else b.memory(function))
        measured[title] = {"sizes": sizes, "seconds": times, "bytes": bytes_}
        for row, (values, unit) in enumerate(((times, "seconds"), (bytes_, "bytes"))):
            values = np.maximum(values, 1e-9)
            slope = np.polyfit(np.log(sizes), np.log(values), 1)[0]
            panel = axes[row, column]
            panel.loglog(sizes, values, "o-", label=f"slope {slope:.2f}")
            middle = math.sqrt(values.min() * values.max())  # two decades, else noise looks large
            low, high = min(values.min(), middle / 10), max(values.max(), middle * 10)
            panel.set_ylim(low / 1.3, high * 1.3)
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_minor_formatter(NullFormatter())
            if max(sizes) / min(sizes) < 100:
                panel.set_xticks(sizes[::2], [f"{n:,}" for n in sizes[::2]])
            kind = "anonymous " if from_file and row else "extra " if row else ""
            panel.set(xlabel=title, ylabel=kind + unit)
            panel.legend(frameon=False)
    folder.cleanup()
    figure.suptitle(b.machine, fontsize=8)
    figure.savefig(out / "scaling.png", dpi=130)
    plt.close(figure)
    write_json(out / "scaling.json", measured | {"machine": b.machine})


def anonymous(function):
    """Bytes of memory that is no file's (RssAnon), at the most, that `function` adds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    seen, done, before = [], threading.Event(), proc("RssAnon")

    def watch():
        while not done.wait(0.01):
            with contextlib.suppress(OSError):
                seen.append(proc("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    seen.append(proc("RssAnon"))
    done.set()
    watcher.join()
    return max(seen, default=math.nan) - before
