"""The hidden cases: what is drawn for each exercise, and what an answer is compared with.

A case makes calls on the submission (names of functions in adapters.py, and arguments) and judges
the values. Right values come from this repository's own files, in this process. Where a mistake is
likely, its value is computed too: an answer that equals it says what went wrong.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F

import adapters as ours

F32, F64 = torch.float32, torch.float64
LEAST_RATES = 2  # of each method in exercise 11
DTYPES = (F32, F64)


@dataclass
class Case:
    name: str
    weight: float
    calls: list  # of (name of a function in adapters.py, arguments)
    check: Callable | None  # values of the calls -> None, a message, or (share, message)
    raises: str | None = None  # the exception that every call but the last has to raise
    record: dict = field(default_factory=dict)  # what a leaderboard keeps of it


def draw(number, seed, code):
    """The cases of an exercise; code: the folder of the submission (for what is read, not run)."""
    return Drawer(seed * 100 + number, code).__getattribute__(f"exercise_{number}")()


# -------------------------------------------------------------------------------- comparisons


def identical(a, b):
    """Are two decoded values the same, to the bit?"""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def close(a, b, tolerance):
    a, b = a.double(), b.double()
    scale = float(b.abs().max()) if b.numel() else 0.0
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance * (1 + scale)).all())


def compare(got, want, wrong=None, tolerance=None):
    """None if a tensor is as it should be, else a message. wrong: likely cause -> its value."""
    if not isinstance(got, torch.Tensor):
        return f"a tensor is expected, not a {type(got).__name__}"
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)} where {tuple(want.shape)} is expected"
    if not got.isfinite().all():
        return "some numbers are not finite"
    tolerance = tolerance or (1e-9 if want.dtype == F64 else 1e-4)
    if close(got, want, tolerance):
        return None
    for cause, value in (wrong or {}).items():
        value = value() if callable(value) else value
        if close(got, value, max(tolerance, 1e-6)) and not close(value, want, tolerance):
            return cause
    if close(got, want, 1e-3) and want.is_floating_point():
        return "right to three digits only: is something computed in less than the inputs' dtype?"
    return f"wrong values: {numbers(got)} where {numbers(want)} is expected"


def numbers(tensor):
    return "[" + ", ".join(f"{float(n):.4g}" for n in tensor.flatten()[:4]) + ", ...]"


def first(*messages):
    return next((m for m in messages if m), None)


class Drawer:
    """Draws the cases of one exercise."""

    def __init__(self, seed, code=None):
        self.generator = torch.Generator().manual_seed(seed)
        self.random = random.Random(seed)
        self.code = code

    def normal(self, *shape, dtype=F32):
        return torch.randn(*shape, generator=self.generator, dtype=F64).to(dtype)

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def seed(self):
        return self.random.randrange(1 << 30)

    def permutation(self, n):
        """One that leaves nothing in its place."""
        return torch.arange(n).roll(self.random.randrange(1, n))

    def value(self, name, weight, call, cause=None, tolerance=None, pick=None):
        """A case of one call whose value is compared with ours; pick: which of several values."""
        function, arguments = call
        want = getattr(ours, function)(*arguments)

        def check(values):
            got, right = values[0], want
            if pick is None and isinstance(want, tuple):
                return first(*(f"value {i + 1}: {m}" for i, (g, w) in
                               enumerate(zip(got, want, strict=True))
                               if (m := compare(g, w, None, tolerance))))
            if pick is not None:
                got, right = got[pick], want[pick]
            return compare(got, right, cause, tolerance)

        return Case(name, weight, [call], check)

    # ---------------------------------------------------------------------------- 1. attention

    def attention_inputs(self, B, T, C, dtype):
        weights = {"c_attn.weight": self.normal(3 * C, C, dtype=dtype) / C ** 0.5 * 2,
                   "c_attn.bias": self.normal(3 * C, dtype=dtype),
                   "c_proj.weight": self.normal(C, C, dtype=dtype) / C ** 0.5,
                   "c_proj.bias": self.normal(C, dtype=dtype)}
        return self.normal(B, T, C, dtype=dtype), weights

    def exercise_1(self):
        found = []
        for dtype, H in ((F32, 2), (F64, 3), (F32, 1)):
            x, w = self.attention_inputs(self.random.randint(2, 4), self.random.randint(5, 9),
                                         H * self.random.choice((4, 6)), dtype)
            found.append(self.value(f"values, {H} heads, {str(dtype)[6:]}", 2,
                                    ("attention", [x, w, H]), attention_mistakes(x, w, H)))
        x, w = self.attention_inputs(3, 7, 8, F64)
        t = self.random.randint(2, 5)
        flipped = x.clone()
        flipped[:, t] += 1
        want = ours.attention(flipped, w, 2)

        def check_flip(values):
            a, b = values
            if not torch.allclose(a[:, :t], b[:, :t]):
                return (f"place {t} was changed and an earlier place moved: does a query see later "
                        f"keys?")
            return compare(b, want, attention_mistakes(flipped, w, 2))

        found.append(Case("a changed later place changes nothing before", 2,
                          [("attention", [x, w, 2]), ("attention", [flipped, w, 2])], check_flip))
        order = self.permutation(3)

        def check_order(values):
            if not torch.allclose(values[0][order], values[1]):
                return "rows of a batch are not independent of their order"
            return compare(values[1], ours.attention(x[order], w, 2))

        found.append(Case("rows in another order", 1,
                          [("attention", [x, w, 2]), ("attention", [x[order], w, 2])], check_order))
        found.append(self.value("a single place", 1, (
            "attention", [*self.attention_inputs(2, 1, 4, F32), 2])))
        return found

    # ---------------------------------------------------------------------------- 2. LoRA

    def exercise_2(self):
        n_in, n_out, rank, s = 7, 5, 3, self.seed()

        def check_start(values):
            (A, B), (A2, _), (A3, _) = values
            if tuple(A.shape) != (rank, n_in) or tuple(B.shape) != (n_out, rank):
                return (f"shapes {tuple(A.shape)} and {tuple(B.shape)}: A is (rank, in), "
                        f"B (out, rank)")
            if B.any():
                return "B is not zero at the start: training would not start at the frozen layer"
            if not A.any():
                return "A is zero too: then neither factor ever gets a gradient"
            if not torch.equal(A, A2) or torch.equal(A, A3):
                return "A is not drawn at random from torch's generator"
            return "A's entries are huge" if A.abs().max() > 3 else None

        found = [Case("factors at the start", 2, [("lora_start", [n_in, n_out, rank, s + i])
                                                  for i in (0, 0, 1)],
                      check_start)]
        for dtype, alpha, r in ((F32, 12.0, 4), (F64, 1.0, 3)):
            x, W, b = (self.normal(*shape, dtype=dtype) for shape in ((2, 4, 6), (5, 6), (5,)))
            A, B = self.normal(r, 6, dtype=dtype), self.normal(5, r, dtype=dtype)
            base, update = x @ W.T + b, x @ A.T @ B.T
            causes = {"looks as if alpha / rank were forgotten": base + update,
                      "looks as if the update were scaled by alpha, not alpha / rank":
                          base + alpha * update,
                      "looks as if the update were scaled by 1 / rank": base + update / r,
                      "looks as if the scale were rank / alpha": base + r / alpha * update,
                      "looks as if alpha / rank counted twice": base + (alpha / r) ** 2 * update,
                      "the frozen layer's bias is missing": base - b + alpha / r * update,
                      "the frozen layer itself is missing": alpha / r * update,
                      "the update is missing": base,
                      "looks as if the update were subtracted": base - alpha / r * update}
            found.append(self.value(f"a layer's values, alpha {alpha:g}, rank {r}", 2,
                                    ("lora_linear", [x, W, b, A, B, alpha]), causes))
        zero = torch.zeros_like(B)
        found.append(self.value("step 0: with B zero it is the frozen layer", 1,
                                ("lora_linear", [x, W, b, A, zero, alpha])))

        def check_additive(values):
            nothing, one, two = values
            if close(one, nothing, 1e-9) or not close(two - nothing, 2 * (one - nothing), 1e-9):
                return "the update is not in proportion to alpha"
            return compare(two, ours.lora_linear(x, W, b, A, B, 2 * alpha))

        found.append(Case("twice alpha is twice the update", 1,
                          [("lora_linear", [x, W, b, A, B, a]) for a in (0.0, alpha, 2 * alpha)],
                          check_additive))
        n_layer = self.random.randint(1, 3)

        def check_names(values):
            trained, frozen = values[0]
            if any("wte" in n or "wpe" in n for n in trained):
                return "the embeddings are trained: is the base frozen?"
            if any("lora" in n.lower() for n in frozen) and not trained:
                return "nothing is trained"
            if len(trained) > 8 * n_layer:
                return "more than the factors is trained: is the base frozen?"
            if len({*trained, *frozen}) < len(trained) + len(frozen):
                return "a name stands there twice"
            if len(trained) < 8 * n_layer:
                return (f"{len(trained)} trained tensors where {8 * n_layer} are expected: has "
                        f"each of the {4 * n_layer} linear layers its two factors?")
            right = len(ours.lora_names(n_layer, 2)[1])
            return None if len(frozen) == right else f"{len(frozen)} frozen tensors, not {right}"

        found.append(Case("what is trained, what is frozen", 2, [("lora_names", [n_layer, 2])],
                          check_names))
        state = {"transformer.wte.weight": (9, 8), "transformer.wpe.weight": (6, 8)}
        for name, wide, deep in (("attn.c_attn", 24, 8), ("attn.c_proj", 8, 8),
                                  ("mlp.c_fc", 32, 8), ("mlp.c_proj", 8, 32)):
            state |= {f"transformer.h.0.{name}.weight": (wide, deep),
                      f"transformer.h.0.{name}.bias": (wide,),
                      f"transformer.h.0.{name}.lora_A": (3, deep),
                      f"transformer.h.0.{name}.lora_B": (wide, 3)}
        for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
            state |= {f"transformer.{name}.weight": (8,), f"transformer.{name}.bias": (8,)}
        state = {name: self.normal(*shape) / 2 for name, shape in state.items()}
        state["lm_head.weight"] = state["transformer.wte.weight"]
        tokens = self.integers(0, 9, 2, 5)
        want = ours.lora_merged(state, tokens, 3, 6.0, False)
        plain = {n: t if "lora_B" not in n else torch.zeros_like(t) for n, t in state.items()}

        def check_merged(values):
            apart, merged = values
            if m := compare(apart, want):
                return f"before merging: {m}"
            unscaled = ours.lora_merged(state, tokens, 3, 3.0, False)
            return compare(merged, want, {
                "merging loses the update": ours.lora_merged(plain, tokens, 3, 6.0, False),
                "merging forgets alpha / rank": unscaled,
                "merging adds the update twice": ours.lora_merged(state, tokens, 3, 12.0, False)})

        found.append(Case("merged, the model says the same", 2,
                          [("lora_merged", [state, tokens, 3, 6.0, m]) for m in (False, True)],
                          check_merged))
        return found

    # ---------------------------------------------------------------------------- 3. Lloyd

    def blobs(self, k, each, C, noise=0.3):
        """k far groups of points, shuffled: points and the group of each."""
        group = torch.arange(k).repeat_interleave(each)
        group = group[torch.randperm(len(group), generator=self.generator)]
        centres = 20 * torch.eye(k, C) + self.normal(1, C)
        return centres[group] + noise * self.normal(len(group), C), group

    def exercise_3(self):
        found = []
        for dtype, N in ((F32, 40), (F64, 2500)):
            points, centroids = self.normal(N, 5, dtype=dtype), self.normal(7, 5, dtype=dtype)
            table = (points[:, None] - centroids).square().sum(dim=2)
            causes = {"the distance is not squared": table.amin(dim=1).sqrt(),
                      "the distance is that to the farthest centroid": table.amax(dim=1),
                      "|x|^2 is missing from the distance":
                          table.amin(dim=1) - points.square().sum(dim=1)}
            found.append(Case(f"nearest, {N} points, {str(dtype)[6:]}", 1,
                              [("nearest", [points, centroids])],
                              lambda v, t=table, c=causes: first(
                                  compare(v[0][0], t.argmin(dim=1), {
                                      "the farthest centroid, not the nearest": t.argmax(dim=1)}),
                                  compare(v[0][1], t.amin(dim=1), c, 1e-5))))
        centroids = torch.tensor([[0.0, 0], [2, 0], [0, 2], [2, 0]])[:, :2]
        points = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0], [3, 0], [5, 5]])
        found.append(Case("ties go to the lower index", 1, [("nearest", [points, centroids])],
                          lambda v: compare(v[0][0], torch.tensor([0, 0, 0, 1, 1, 1]), {
                              "ties go to the higher index": torch.tensor([3, 2, 3, 3, 3, 3])})))
        for dtype in DTYPES:
            points, cluster = self.normal(30, 4, dtype=dtype), self.integers(0, 5, 30)
            cluster[cluster == 2] = 3  # cluster 2 and the last one are empty
            want, count = ours.cluster_centres(points, cluster, 6)
            causes = {"looks like sums, not means": want * count.clamp(min=1)[:, None],
                      "looks as if every cluster were divided by the same number":
                          want * count.clamp(min=1)[:, None] / 30 * 6,
                      "empty clusters get the mean of all points, not zeros":
                          want.where(count[:, None] > 0, points.mean(dim=0)),
                      "divided by one more than the number of points":
                          want * count[:, None] / (count[:, None] + 1)}
            found.append(Case(f"means with empty clusters, {str(dtype)[6:]}", 1,
                              [("cluster_centres", [points, cluster, 6])],
                              lambda v, w=want, n=count, c=causes: first(
                                  "an empty cluster's mean is not zero: is 0 divided by 0?"
                                  if not torch.as_tensor(v[0][0]).isfinite().all() else None,
                                  compare(v[0][0], w, c), compare(v[0][1], n))))
        points, group = self.blobs(4, 15, 6)
        chosen = torch.stack([(group == g).nonzero()[0, 0] for g in range(4)])
        centres = ours.cluster_centres(points, group, 4)[0]
        found.append(Case("k-means of four far groups", 2,
                          [("kmeans", [points, 4, 0, chosen])],
                          lambda v: first(compare(v[0][1], group), compare(v[0][0], centres))))
        order = self.permutation(len(points))
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        found.append(Case("points in another order", 1,
                          [("kmeans", [points[order], 4, 0, place[chosen]])],
                          lambda v: first(compare(v[0][1], group[order]),
                                          compare(v[0][0], centres))))
        points, bad = self.normal(300, 3), torch.arange(8)
        right = inertia(points, *ours.kmeans(points, 8, 0, bad))

        def check_steps(values, points=points):
            c, n = values[0]
            if tuple(c.shape) != (8, 3) or tuple(n.shape) != (300,):
                return "shapes: centroids are (k, C), cluster is (N,)"
            if not torch.equal(((points[:, None] - c) ** 2).sum(dim=2).argmin(dim=1), n):
                return "a point is not in the cluster of its nearest centroid"
            if inertia(points, c, n) > 1.02 * right:
                return (f"the sum of squared distances is {inertia(points, c, n):.1f}, not "
                        f"{right:.1f}: are there steps enough, each with new means?")
            return None

        found.append(Case("k-means takes steps until they gain little", 2,
                          [("kmeans", [points, 8, 0, bad])], check_steps))
        found.append(Case("a cluster that loses all points moves to the farthest point", 3,
                          [("kmeans", [*lost_points(self.random.randint(0, 3)), 0, chosen])
                           for chosen in [torch.tensor([0, 1, 2])]], check_lost))
        points = self.normal(3, 2)[torch.tensor([0, 1, 2, 0, 1, 2, 0])]

        def check_few(values):
            c, n = values[0]
            if len(c) != 5:
                return f"{len(c)} centroids where k = 5"
            if not c.isfinite().all():
                return "an empty cluster's centroid is not finite: is 0 divided by 0?"
            if not close(c[n], points, 1e-5):
                return "three distinct points and k = 5: each should be a centroid"
            return None

        found.append(Case("k larger than the number of distinct points", 1,
                          [("kmeans", [points, 5, 0, torch.tensor([0, 1, 2, 3, 4])])], check_few))
        nan = self.normal(6, 2)
        nan[self.random.randrange(6), 1] = math.nan
        found.append(Case("a point that is not finite, or no point, is refused", 1,
                          [("kmeans", [nan, 2, 0, torch.tensor([0, 1])]),
                           ("kmeans", [nan[:0], 2, 0, torch.tensor([0, 1])]),
                           ("kmeans", [centroids[:2], 2, 0, torch.tensor([0, 1])])],
                          lambda v: compare(v[2][0], centroids[:2]), raises="ValueError"))
        return found

    # ---------------------------------------------------------------------------- 4. k-means++

    def exercise_4(self):
        points = torch.tensor([[0.0], [1.0], [3.0], [7.0]]) * self.random.choice((1, 2, 5))
        points = points[torch.randperm(4, generator=self.generator)]
        start = self.seed()
        found = [Case("how often each is drawn", 6,
                      [("kmeans_seeds", [points, 3, start + i]) for i in range(800)],
                      lambda values, points=points: check_draws(points, values))]
        points, group = self.blobs(6, 8, 100, noise=0.01)

        def check_groups(values):
            for chosen in values:
                if tuple(chosen.shape) != (6,) or chosen.is_floating_point():
                    return "k indices are expected"
                if len(group[chosen].unique()) < 6:
                    return "six far groups, six seeds: they are not one of each group"
            return None

        found.append(Case("one seed of each far group, 100 dimensions", 2,
                          [("kmeans_seeds", [points, 6, start + i]) for i in range(20)],
                          check_groups))
        same = self.normal(3, 2, dtype=F64)[torch.tensor([0, 1, 2, 1, 0, 0])] + 50

        def check_same(values):
            for chosen in values:
                if len(same[chosen[:3]].unique(dim=0)) < 3:
                    return "a point at distance zero was drawn though others were left"
                if tuple(chosen.shape) != (5,) or not 0 <= chosen.min() <= chosen.max() < 6:
                    return "five indices from 0 to 5 are expected"
            return None

        found.append(Case("k larger than the number of distinct points", 1,
                          [("kmeans_seeds", [same, 5, start + i]) for i in range(20)], check_same))

        def check_again(values):
            if not torch.equal(values[0], values[1]):
                return "the same generator gives other seeds: is everything drawn with it?"
            return "whatever the generator, the seeds are the same" if all(
                torch.equal(values[0], v) for v in values[2:]) else None

        points = self.normal(50, 3)
        found.append(Case("drawn with the generator", 1,
                          [("kmeans_seeds", [points, 4, start + i]) for i in (0, 0, 1, 2, 3)],
                          check_again))
        return found

    # ---------------------------------------------------------------------------- 5. batches

    def exercise_5(self):
        found, size = [], self.random.choice((4, 5))
        cluster = torch.tensor([0] * (2 * size + 1) + [3] * (3 * size) + [7] * (size - 1) + [8])
        cluster = cluster[torch.randperm(len(cluster), generator=self.generator)]
        seeds = [self.seed() for _ in range(6)]
        calls = [("cluster_batches", [cluster, size, s]) for s in seeds]
        N = len(cluster)

        def check_pure(values):
            for batches in values:
                pure = sum(len(b) == size and len(cluster[b].unique()) == 1 for b in batches)
                if pure < 5:
                    return (f"{pure} full batches of one cluster where 5 are possible: is each "
                            f"batch of one cluster, but for leftovers?")
            return None

        def check_order(values):
            again, other = values[0], values[2:]
            if not identical(again, values[1]):
                return "the same seed gives other batches"
            if all(identical(again, b) for b in other):
                return "whatever the seed, the batches are the same: are they drawn anew?"
            together = [{frozenset(b.tolist()) for b in batches
                         if cluster[b].eq(3).all() and len(b) == size} for batches in values[1:]]
            if all(t == together[0] for t in together):
                return "the same rows share a batch in every epoch: are rows shuffled?"
            kinds = [[int(cluster[b[0]]) for b in batches] for batches in values[1:]]
            if all(k == sorted(k) for k in kinds) or all(k == kinds[0] for k in kinds):
                return "the clusters come in the same order in every epoch: are batches shuffled?"
            if all(len(b[-1]) < size for b in values[1:]):
                return "the short batch is always the last: are batches shuffled?"
            return None

        found.append(Case("every row once, none dropped", 2, calls,
                          lambda v: first(*(check_once(b, N, size) for b in v))))
        found.append(Case("batches of one cluster", 2, calls, lambda v: first(
            *(check_once(b, N, size) for b in v), check_pure(v))))
        found.append(Case("drawn anew with the seed", 1, [calls[0], *calls], lambda v: first(
            *(check_once(b, N, size) for b in v), check_order(v))))
        lonely = [("cluster_batches", [torch.arange(7), 3, seeds[0]]),
                  ("cluster_batches", [torch.full((6,), 2), 3, seeds[0]])]
        found.append(Case("clusters of one row; one cluster alone", 1, lonely, lambda v: first(
            check_once(v[0], 7, 3), check_once(v[1], 6, 3))))

        length = self.integers(2, 200, 203)
        calls = [("shuffled_batches", [length, 8, s]) for s in seeds]

        def padded(batches):
            return sum(int(length[b].max()) * len(b) - int(length[b].sum()) for b in batches)

        def check_padding(values):
            for arguments, batches in zip(calls, values, strict=True):
                if padded(batches) > 1.5 * padded(ours.shuffled_batches(*arguments[1])):
                    return "much padding: do rows of like length share a batch?"
            return None

        def check_anew(values):
            again, other = values[0], values[2:]
            if not identical(again, values[1]):
                return "the same seed gives other batches"
            if all(identical(again, b) for b in other):
                return "whatever the seed, the batches are the same: are they drawn anew?"
            for batches in values:
                longest = torch.tensor([float(length[b].max()) for b in batches])
                rank = longest.argsort().argsort().double()
                order = torch.arange(len(rank)).double()
                if abs(float(torch.corrcoef(torch.stack([rank, order]))[0, 1])) > 0.9:
                    return "batches come sorted by length: shuffle them"
            if all(len(b[-1]) < 8 for b in values):
                return "the short batch is always the last: are batches shuffled?"
            return None

        found.append(Case("shuffled: every row once, none dropped", 2, calls,
                          lambda v: first(*(check_once(b, 203, 8) for b in v))))
        found.append(Case("shuffled: little padding", 1, calls, lambda v: first(
            *(check_once(b, 203, 8) for b in v), check_padding(v))))
        found.append(Case("shuffled: drawn anew with the seed", 1, [calls[0], *calls],
                          lambda v: first(*(check_once(b, 203, 8) for b in v), check_anew(v))))
        return found

    # ---------------------------------------------------------------------------- 6. statistics

    def rows(self, N, longest=9, vocabulary=11):
        """Rows of unequal lengths: the arguments tokens, start, length, prompt, document."""
        length = self.integers(3, longest + 1, N)
        prompt = (length.double() * (0.2 + 0.6 * torch.rand(N, generator=self.generator))).long()
        prompt = prompt.clamp(min=1).minimum(length - 1)
        start = length.cumsum(dim=0) - length
        tokens = self.integers(0, vocabulary, int(length.sum()))
        return [tokens, start, length, prompt, torch.arange(N) // 3]

    def exercise_6(self):
        found = []
        for dtype, N in ((F32, 6), (F64, 5), (F32, 1500)):
            rows = self.rows(N)
            embedding = self.normal(11, 4, dtype=dtype) + 1
            tokens, start, length, prompt, _ = rows
            want = ours.prompt_means(*rows, embedding)[0]
            longest = int(prompt.max())
            gap = (longest - prompt)[:, None]
            sums = want * prompt[:, None]
            whole = torch.stack([embedding[tokens[s:s + n]].mean(dim=0) for s, n in
                                 zip(start, length, strict=True)])
            causes = {"padding is counted: divide by the number of real tokens": sums / longest,
                      "padding is counted: it has the embedding of token 0":
                          (sums + gap * embedding[0]) / longest,
                      "padding has the embedding of token 0": (sums + gap * embedding[0])
                          / prompt[:, None],
                      "looks like sums, not means": sums,
                      "the whole row is averaged: continuations must not be seen": whole,
                      "divided by the row's length, not the prompt's": sums / length[:, None]}
            found.append(Case(f"prompt means of {N} rows, {str(dtype)[6:]}", 1 + (N < 9),
                              [("prompt_means", [*rows, embedding])],
                              lambda v, w=want, c=causes, p=prompt: first(
                                  compare(v[0][0], w, c), compare(v[0][1], p.double(), {}, 1e-6))))
        rows = self.rows(6)
        other = rows[0].clone()
        n = self.random.randrange(6)
        at = slice(int(rows[1][n] + rows[3][n]), int(rows[1][n] + rows[2][n]))
        other[at] = (other[at] + 3) % 11
        embedding = self.normal(11, 4)
        unmoved = ours.prompt_means(*rows, embedding)[0]
        found.append(Case("a changed continuation changes nothing", 1,
                          [("prompt_means", [*rows, embedding]),
                           ("prompt_means", [other, *rows[1:], embedding])],
                          lambda v: first(
                              None if torch.equal(v[0][0], v[1][0]) else
                              "a continuation was changed and a mean moved: that is a leak",
                              compare(v[0][0], unmoved))))
        means, center = self.normal(7, 5, dtype=F64), self.normal(5, dtype=F64)
        causes = {"the centre is not taken off": F.normalize(means, dim=1),
                  "centred after it was normalised": F.normalize(means, dim=1) - center,
                  "not on the unit sphere": means - center,
                  "normalised over rows, not over each row": F.normalize(means - center, dim=0)}
        found.append(self.value("features", 1, ("features", [means, center]), causes))
        found.append(self.value("features of a row at the centre", 1, (
            "features", [torch.cat([means, center[None]]), center])))
        for dtype in DTYPES:
            means, count = self.normal(9, 4, dtype=dtype), self.integers(1, 40, 9).to(dtype)
            cluster = torch.tensor([0, 3, 0, 1, 3, 3, 1, 0, 4])
            want = ours.cluster_means(means, count, cluster, 6)
            plain = ours.cluster_means(means, torch.ones_like(count), cluster, 6)
            everyone = (means * count[:, None]).sum(dim=0) / count.sum()
            empty = torch.tensor([False, False, True, False, False, True])[:, None]
            causes = {"a mean of means: every token weighs alike, not every row":
                          plain.where(~empty, everyone),
                      "a mean of means, also for the empty clusters": plain,
                      "empty clusters get zeros, not the mean of all": want.where(~empty, 0),
                      "empty clusters get a mean of means": want.where(~empty, means.mean(dim=0)),
                      "looks like sums, not means": want * torch.zeros(6, dtype=dtype).index_add_(
                          0, cluster, count).clamp(min=1)[:, None]}
            found.append(self.value(f"cluster means, {str(dtype)[6:]}", 2,
                                    ("cluster_means", [means, count, cluster, 6]), causes))
        order = self.permutation(9)
        found.append(Case("rows in another order", 1,
                          [("cluster_means", [means[order], count[order], cluster[order], 6])],
                          lambda v: compare(v[0], want)))
        return found

    # ---------------------------------------------------------------------------- 7. chameleon

    def chameleon_inputs(self, dtype, V=9, C=6, r=2, B=4):
        weight = self.normal(V, C, dtype=dtype)
        n = r * (C + V)
        shapes = {"0": (64, C), "2": (32, 64), "4": (n, 32)}
        state = {}
        for layer, (n_out, n_in) in shapes.items():
            name = f"hypernetwork.{layer}"
            state[f"{name}.weight"] = self.normal(n_out, n_in, dtype=dtype) / n_in ** 0.5
            state[f"{name}.bias"] = self.normal(n_out, dtype=dtype) / 2
        state |= {"center": self.normal(C, dtype=dtype), "clusters": self.normal(3, C, dtype=dtype),
                  "spread": self.normal(C, dtype=dtype).abs() + 0.3}
        return weight, state, self.normal(B, C, dtype=dtype)

    def exercise_7(self):
        found = []
        start, statistics = self.normal(13, dtype=F64), self.normal(4, 5, dtype=F64)
        found.append(Case("untrained, the network writes `start`, whatever the statistic", 1,
                          [("hypernetwork", [statistics, start, None])],
                          lambda v, start=start: compare(v[0], start.expand(4, 13), {
                              "nothing is written: is the last bias `start`?":
                                  torch.zeros(4, 13)}, 1e-5)))
        for dtype in DTYPES:
            _, state, s = self.chameleon_inputs(dtype)
            net = {n.removeprefix("hypernetwork."): t for n, t in state.items() if "." in n}
            start = self.normal(30, dtype=dtype)
            found.append(self.value(f"what a trained network writes, {str(dtype)[6:]}", 1,
                                    ("hypernetwork", [s, start, net]), network_mistakes(net, s)))
        weight, state, s = self.chameleon_inputs(F64)
        factors = ours.chameleon_factors(weight, 2, 8.0, state, s)

        def told(s, state=state):
            net = {n.removeprefix("hypernetwork."): t for n, t in state.items() if "." in n}
            return run_network(net, s)

        c, d = state["center"], state["spread"]
        inputs = {"the spread is not used": s - c, "the centre is not used": s / d,
                  "the statistic is not standardised": s, "multiplied by the spread": (s - c) * d,
                  "the spread is taken as a variance": (s - c) / d.sqrt()}
        outputs = {cause: told(x) for cause, x in inputs.items()}
        right = told((s - c) / d)

        def check_factors(values):
            (A, B), n = values[0], 2 * 6
            if tuple(A.shape) != (4, 2, 6) or tuple(B.shape) != (4, 9, 2):
                return f"shapes {tuple(A.shape)}, {tuple(B.shape)}: A is (B, r, C), B is (B, V, r)"
            if close(A, A[:1].expand_as(A), 1e-12):
                return "the update is the same for every row: is the row's statistic used?"
            for cause, out in outputs.items():
                if close(A, out[:, :n].view(4, 2, 6), 1e-9):
                    return cause
            return first(
                compare(A, factors[0], {
                    "A is cut from the end: it comes first": right[:, -n:].view(4, 2, 6),
                    "A's numbers are laid out as (C, r)": right[:, :n].view(4, 6, 2).mT}),
                compare(B, factors[1], {
                    "B's numbers are laid out as (r, V)": right[:, n:].view(4, 2, 9).mT}))

        found.append(Case("factors", 2, [("chameleon_factors", [weight, 2, 8.0, state, s])],
                          check_factors))
        flat = state | {"spread": state["spread"].clone()}
        flat["spread"][2] = 0
        found.append(self.value("factors where a number never varied in training", 1,
                                ("chameleon_factors", [weight, 2, 8.0, flat, s])))
        for dtype in DTYPES:
            weight, state, s = self.chameleon_inputs(dtype)
            hidden = self.normal(4, 5, 6, dtype=dtype)
            A, B = ours.chameleon_factors(weight, 2, 8.0, state, s)
            base = hidden @ weight.T
            update = hidden @ A.mT @ B.mT
            causes = {"looks as if alpha / rank were forgotten": base + update,
                      "looks as if the update were scaled by alpha, not alpha / rank":
                          base + 8 * update,
                      "the frozen head is missing": 4 * update,
                      "the update is missing": base,
                      "the update is the same for every row: is the row's statistic used?":
                          base + 4 * hidden @ A[:1].mT @ B[:1].mT,
                      "a row gets the update of another row":
                          base + 4 * hidden @ A.roll(1, 0).mT @ B.roll(1, 0).mT,
                      "a row gets the update of the row after it":
                          base + 4 * hidden @ A.flip(0).mT @ B.flip(0).mT,
                      "the update is the mean of all rows'":
                          base + 4 * hidden @ A.mean(0).T @ B.mean(0).T}
            found.append(self.value(f"logits, {str(dtype)[6:]}", 2,
                                    ("chameleon_logits", [weight, 2, 8.0, state, hidden, s]),
                                    causes))
        call = [weight, 2, 8.0, None, hidden, s]
        found.append(Case("step 0: the frozen head's logits", 1, [("chameleon_logits", call)],
                          lambda v: compare(v[0], hidden @ weight.T) and
                          "an untrained head's logits are not the frozen head's: does B start at "
                          "zero, and the last weights?"))
        order, want = self.permutation(4), ours.chameleon_logits(weight, 2, 8.0, state, hidden, s)
        found.append(Case("rows in another order", 1,
                          [("chameleon_logits", [weight, 2, 8.0, state, hidden[order], s[order]])],
                          lambda v: compare(v[0], want[order])))
        found.append(Case("one row alone, twice as large: additive in the hidden state", 1,
                          [("chameleon_logits", [weight, 2, 8.0, state, 2 * hidden[:1], s[:1]])],
                          lambda v: compare(v[0], 2 * want[:1])))
        return found

    # ---------------------------------------------------------------------------- 8. scored tokens

    def exercise_8(self):
        found = []
        for whole in (False, True):
            rows = self.rows(8)
            rows[0] = rows[0] + 1  # so that 0 is padding alone
            index = torch.randperm(8, generator=self.generator)[:5]
            tokens, start, length, prompt, _ = rows
            W = int(length[index].max())
            place = torch.arange(W)
            full = tokens[(start[index, None] + place).clamp(max=len(tokens) - 1)]
            real = place < length[index, None]

            def targets(scored, shift=1, full=full, real=real):
                kept = torch.where(scored & real, full, -1)
                return kept[:, 1:] if shift else kept[:, :-1]

            p = prompt[index, None]
            want = targets(place >= (1 if whole else p))
            causes = {"targets are not shifted: the target at place t is token t + 1":
                          targets(place >= (1 if whole else p), shift=0),
                      "prompts are scored": targets(place >= 1),
                      "prompts are not scored, though `whole` asks for it": targets(place >= p),
                      "the last prompt token is scored": targets(place >= p - 1),
                      "the first token after the prompt is not scored": targets(place > p),
                      "padding is scored": torch.where(
                          place >= (1 if whole else p), full * real, -1)[:, 1:],
                      "a row's last token is not scored": targets(
                          (place >= (1 if whole else p)) & (place < length[index, None] - 1))}

            def check_batch(values, want=want, causes=causes, full=full, real=real):
                inputs, got = values[0]
                if tuple(inputs.shape) != tuple(want.shape):
                    return (f"inputs {tuple(inputs.shape)}, not {tuple(want.shape)}: T is one less "
                            f"than the longest row's tokens")
                return first(compare(got, want, causes),
                             compare(torch.where(real[:, 1:], inputs, 0),
                                     torch.where(real[:, 1:], full[:, :-1], 0)))

            found.append(Case(f"a batch{', whole rows' * whole}", 2,
                              [("batch", [*rows, index, whole])], check_batch))
        letters = "".join(self.random.choice("abcdefgh") for _ in range(60))
        n = self.random.randint(9, 12)
        for name, documents in (
                ("running text", [("", letters[:31]), ("", letters[31:]), ("", "ab")]),
                ("running text whose last row has one token", [("", (letters * 2)[:2 * n + 3])]),
                ("instructions", [(letters[:4], letters[4:8]), (letters[:6], letters[6:40])]),
                ("an instruction that fills a row; mixed with text",
                 [(letters[:n + 4], "abc"), ("", letters[:20]), (letters[:n + 1], "abc"),
                  (letters[:n], "xyz")])):
            want = ours.cut(documents, n)
            found.append(Case(f"cut: {name}", 1, [("cut", [documents, n])],
                              lambda v, want=want, n=n: check_cut(v[0], want, n)))
        for dtype in DTYPES:
            table, tokens = self.normal(7, 7, dtype=dtype), self.integers(0, 7, 4, 6)
            goal = self.integers(0, 7, 4, 6)
            for row, cut in enumerate((2, 1, 4, 3)):
                goal[row, :cut] = -1
            goal[1, 4:] = -1
            want = ours.losses(table, tokens, goal)
            n = (goal != -1).sum(dim=1)
            each = F.cross_entropy(table[tokens].flatten(0, 1).double(),
                                   goal.clamp(min=0).flatten(), reduction="none").view(4, 6)
            causes = {"means, not sums": want / n, "means over places, not sums": want / 5,
                      "means over all places, not sums": want / 6,
                      "what is ignored is scored": each.sum(dim=1),
                      "what is ignored is scored, from where one row is": each[:, 1:].sum(dim=1),
                      "one number for all rows": want.mean().expand(4),
                      "one sum for all rows": want.sum().expand(4),
                      "bits, not nats": want / math.log(2), "the sign is wrong": -want,
                      "a row's last token is not scored": (each * (goal != -1))[:, :-1].sum(dim=1),
                      "a row's first scored token is not": want - each.gather(
                          1, (goal != -1).double().argmax(dim=1)[:, None])[:, 0]}
            found.append(self.value(f"losses, {str(dtype)[6:]}", 1,
                                    ("losses", [table, tokens, goal]), causes))
        goal = goal.clone()
        goal[2] = -1
        found.append(self.value("losses with a row in which nothing is scored", 1,
                                ("losses", [table, tokens, goal])))
        order = self.permutation(4)
        found.append(self.value("losses with rows in another order", 1,
                                ("losses", [table, tokens[order], goal[order]])))
        return found

    # ---------------------------------------------------------------------------- 9. leaks

    def exercise_9(self):
        """Each leak with an honest twin: whoever always says the same gets nothing."""
        found = []
        for leak, twin, hint in (
                ("whole row", "own prompt", "what a row is told is a mean over its whole row"),
                ("whole rows of the cluster", "prompts of the cluster",
                 "what a row is told is a mean over whole rows of its cluster"),
                ("continuation of the next row", "prompt of the next row",
                 "what a row is told contains the continuation of another row"),
                ("running, with the scored token", "running",
                 "a running statistic includes the token that is scored: change that token, and "
                 "ask whether the probabilities of all its values still sum to 1"),
                ("target", "nothing", "the target itself is read: change the scored token alone"),
                ("next but one", "nothing", "a prediction reads the token after its target"),
                ("first scored token counted as prompt", "own prompt",
                 "the statistic's prompt is one token too long"),
                ("one row alone", "prompts of the cluster",
                 "one row alone leaks: look at every row"),
                ("clusters of whole rows", "prompts of the cluster",
                 "the statistic is of prompts, but whole rows choose the cluster"),
                ("faint", "prompts of the cluster",
                 "the leak is small, a hundredth of the others")):
            kinds = []
            while len(set(kinds)) < 2:  # not drawn by the seed: no pattern to be guessed
                kinds = random.SystemRandom().choices([leak, twin], k=6)
            calls = []
            for kind in kinds:
                method = Method(self, kind)
                calls.append(("leak_check", [method, method.tokens, method.prompt, method.V]))

            def check(values, hint=hint, right=tuple(kind == leak for kind in kinds)):
                if values != list(right):
                    if any(r and v is not True for r, v in zip(right, values, strict=True)):
                        return f"a leak is not seen: {hint}"
                    return "an honest method is called leaking; it differs by this alone: " + hint
                return None

            found.append(Case(f"leak {len(found) + 1}", 1, calls, check))
        return found

    # ---------------------------------------------------------------------------- 10. controls

    def exercise_10(self):
        found, N, C = [], 10, 4
        names = ["", "told own prompt", "told nothing", "told another cluster",
                 "told no later rows"]
        for dtype, cluster in ((F32, torch.tensor([0, 2, 0, 1, 2, 1, 0, 1, 2, 0])),
                               (F64, torch.tensor([5, 1, 1, 5, 3, 3, 1, 5, 3, 5]))):
            center, means = self.normal(C, dtype=dtype), self.normal(N, C, dtype=dtype)
            count = self.integers(1, 9, N).to(dtype)
            document = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3])
            seeds = [self.seed() for _ in range(3)]
            arguments = [center, means, count, cluster, document]
            tables = ours.controls(*arguments, seeds[0])
            place = torch.arange(N)
            own = cluster[:, None] == cluster
            sequel = (document[:, None] == document) & (place > place[:, None])
            earlier = place <= place[:, None]

            def heard(mask, means=means, count=count):
                weight = mask * count
                return weight @ means / weight.sum(dim=1, keepdim=True)

            rolled = heard(own).roll(1, 0)
            causes = {
                "": {"a mean of means: every token weighs alike":
                     (own.to(dtype) @ means) / own.sum(dim=1, keepdim=True), "own prompts": means},
                "told own prompt": {"it is told its cluster": tables[""]},
                "told nothing": {"zeros: nothing is the training mean": torch.zeros(N, C)},
                "told no later rows": {
                    "all later rows are left out, not those of the same document alone":
                        heard(own & earlier),
                    "no later row is left out": tables[""],
                    "earlier rows are left out, not later ones":
                        heard(own & ~((document[:, None] == document) & (place < place[:, None]))),
                    "all other rows of the document are left out":
                        heard(own & ~((document[:, None] == document) & (place != place[:, None]))),
                    "a mean of means: every token weighs alike":
                        (own & ~sequel).to(dtype) @ means
                        / (own & ~sequel).sum(dim=1, keepdim=True),
                    "rows of other clusters are heard": heard(~sequel)}}
            for name in names:
                if name != "told another cluster":
                    found.append(Case(f"{name or 'the method'}, {str(dtype)[6:]}", 1,
                                      [("controls", [*arguments, seeds[0]])],
                                      lambda v, n=name, t=tables, c=causes: compare(
                                          v[0][n], t[n], c[n])))

            def check_other(values, cluster=cluster, own=tables[""], rolled=rolled):
                seen = set()
                for v in values:
                    got = v["told another cluster"]
                    if m := compare(got, got.detach().clone()):
                        return m
                    if tuple(got.shape) != (N, C):
                        return f"shape {tuple(got.shape)}, not {(N, C)}"
                    if close(got, rolled, 1e-4):
                        return "rows are told the statistic of the row beside them"
                    told = []
                    for k in cluster.unique():
                        rows = (cluster == k).nonzero()[:, 0]
                        if not close(got[rows], got[rows[:1]].expand(len(rows), C), 1e-5):
                            return "rows of one cluster are told different things"
                        match = [int(j) for j in cluster.unique() if close(
                            got[rows[0]], own[(cluster == j).nonzero()[0, 0]], 1e-4)]
                        if not match:
                            return "a row is told something that is no cluster's statistic"
                        if match == [int(k)]:
                            return "a cluster is told its own statistic: it must be another's"
                        told += match
                    if len(set(told)) < len(told):
                        return "two clusters are told the same one: each is told of one other"
                    seen.add(tuple(told))
                return None

            found.append(Case(f"told another cluster, {str(dtype)[6:]}", 2,
                              [("controls", [*arguments, s]) for s in seeds], check_other))
        lonely = torch.zeros(N, dtype=torch.int64)
        found.append(Case("one cluster alone", 1,
                          [("controls", [center, means, count, lonely, document, 0])],
                          lambda v: first(
                              "there is no other cluster to be told" if
                              "told another cluster" in v[0] else None,
                              *(compare(v[0][n], t) for n, t in ours.controls(
                                  center, means, count, lonely, document, 0).items()))))
        return found

    # ---------------------------------------------------------------------------- 11. the false win

    def exercise_11(self):
        """No code is run: the numbers of a file are looked at. A person reads its text."""
        given = {}

        def reading(values):
            try:
                given.update(json.loads((self.code / "false_win.json").read_text("utf-8-sig")))
            except (ValueError, TypeError, RecursionError, OSError) as error:
                return f"false_win.json is no JSON object ({type(error).__name__})"
            missing = {"false", "fair", "text"} - given.keys()
            return f"{', '.join(sorted(missing))} missing" if missing else None

        def entries(part, method):
            """(rate, loss) of a method's entries, one for each rate and seed, of losses that can
            be: 8.3 is blind guessing."""
            found = {(number(e["lr"]), e["seed"]): number(e["loss"]) for e in given[part]
                     if e["method"] == method and type(e["seed"]) is int}
            return [(rate, loss) for (rate, _), loss in found.items() if 2 < loss < 20]

        def false_win(values):
            lora, ours = dict(entries("false", "lora")), dict(entries("false", "chameleon"))
            both = lora.keys() & ours.keys()
            if not both:
                return "\"false\" is to have lora and chameleon at one rate, and has not"
            return None if all(ours[rate] < lora[rate] for rate in both) else (
                "\"false\" is to show chameleon below lora, and it does not")

        def fair(method):
            def check(values):
                by_rate = {}
                for rate, loss in entries("fair", method):
                    by_rate.setdefault(rate, []).append(loss)
                if len(by_rate) < LEAST_RATES:
                    return f"{len(by_rate)} rates where {LEAST_RATES} at least are needed"
                chosen = max(by_rate, key=lambda rate: len(by_rate[rate]))
                if len(by_rate[chosen]) < 3:
                    return "no rate has three seeds"
                best = min(by_rate, key=lambda rate: sum(by_rate[rate]) / len(by_rate[rate]))
                return None if best == chosen else (
                    f"three seeds are at the rate {chosen:g}, and {best:g} is better")
            return check

        def text(values):
            words = str(given["text"]).split()
            if not 100 <= len(words) <= 400:
                return f"{len(words)} words of text, not 100 to 400"
            return None if len(set(words)) > 50 else "the text is the same words again and again"

        return [Case("the file", 1, [], reading), Case("the false win", 2, [], false_win),
                *(Case(f"fair: {n}", 2, [], fair(n)) for n in ("lora", "lora-match", "chameleon")),
                Case("the text (a person reads it)", 1, [], text)]

    # ---------------------------------------------------------------------------- 12. the open one

    def exercise_12(self):
        from open_head import Contest

        contest = Contest(self.generator)
        case = Case("lora-match beaten", 1, [("train_head", contest.request(self.seed()))], None)
        case.check = lambda values: contest.judge(values[0], case.record)
        return [case]


# -------------------------------------------------------------------------------- likely mistakes


def attention_mistakes(x, w, H):
    """Likely cause -> what attention says then."""
    B, T, C = x.shape
    d = C // H
    q, k, v = F.linear(x, w["c_attn.weight"], w["c_attn.bias"]).split(C, dim=2)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)

    def attend(q, k, v, scale=d ** -0.5, hidden=later, heads=H, dim=-1):
        q, k, v = (t.reshape(B, T, heads, C // heads).transpose(1, 2) for t in (q, k, v))
        p = (scale * q @ k.mT).masked_fill(hidden, -math.inf).softmax(dim=dim).nan_to_num()
        y = (p @ v).transpose(1, 2).reshape(B, T, C)
        return F.linear(y, w["c_proj.weight"], w["c_proj.bias"]), y

    mixed = F.linear(x, w["c_attn.weight"], w["c_attn.bias"]).view(B, T, H, 3, d).unbind(3)
    return {"looks as if 1 / sqrt(d) were forgotten": attend(q, k, v, scale=1.0)[0],
            "scaled by 1 / sqrt(C), not by the width of a head":
                attend(q, k, v, scale=C ** -0.5)[0],
            "scaled by 1 / d, not 1 / sqrt(d)": attend(q, k, v, scale=1 / d)[0],
            "every query sees all keys: is the mask there?":
                attend(q, k, v, hidden=later & False)[0],
            "the mask is off by one: a query sees the next key":
                attend(q, k, v, hidden=later.triu(2))[0],
            "the mask is off by one: a query does not see its own key":
                attend(q, k, v, hidden=torch.ones(T, T, dtype=torch.bool).triu())[0],
            "the mask is the other way round": attend(q, k, v, hidden=later.T)[0],
            "q, k and v are taken in another order": attend(k, q, v)[0],
            "v is taken for q or k": attend(q, v, k)[0],
            "looks like a single head": attend(q, k, v, heads=1)[0],
            "the heads are cut out of q, k, v in the wrong order": attend(*mixed)[0],
            "the softmax is over queries, not keys": attend(q, k, v, dim=-2)[0],
            "the output projection is missing": attend(q, k, v)[1]}


def inertia(points, centroids, cluster):
    return float((points - centroids[cluster]).square().sum())


def lost_points(shift):
    """Points (N, 2) and k = 3 for which the second of the seeds 0, 1, 2 loses both of its points in
    the first step, to its neighbours on either side. One point lies far off."""
    line = [-1.19, -0.42, 1.3, 0.42] + [-0.81] * 300 + [0.82] * 300 + [0.82]
    points = torch.tensor([[x, 0.0] for x in line])
    points[-1, 1] = 8.0
    return points + shift, 3


def check_lost(values):
    c, n = values[0]
    if len(c) != 3:
        return f"{len(c)} centroids where k = 3"
    if not c.isfinite().all():
        return "an empty cluster's centroid is not finite: is 0 divided by 0?"
    if len(n.unique()) < 3:
        return ("a cluster is empty at the end: one that loses all points moves to the farthest "
                "point")
    alone = (n == n[-1]).sum()
    return None if alone == 1 else ("the farthest point is not a cluster of its own: where does a "
                                    "centroid without points move to?")


def check_draws(points, values):
    """Are triples of seeds drawn as k-means++ draws them? Else, which other rule explains them?"""
    chosen = torch.stack(values)
    if tuple(chosen.shape[1:]) != (3,) or not 0 <= chosen.min() <= chosen.max() < len(points):
        return "three indices of points are expected"
    if any(len(set(c)) < 3 for c in chosen.tolist()):
        return "a point was drawn twice, though others were left"
    distance = (points - points.T).abs().double()
    rules = {
        "right": lambda near, last: near.square(),
        "drawn by distance, not by its square": lambda near, last: near,
        "drawn from all points alike, not by distance": lambda near, last: (near > 0).double(),
        "drawn by the distance to the last seed, not the nearest":
            lambda near, last: last.square() * (near > 0),
        "drawn by the fourth power of the distance": lambda near, last: near ** 4,
        "the farthest point is taken, not drawn":
            lambda near, last: (near == near.max()).double() + 1e-6 * (near > 0)}
    triples, count = chosen.unique(dim=0, return_counts=True)
    likelihood = {}
    for rule, weigh in rules.items():
        total = 0.0
        for (a, b, c), times in zip(triples.tolist(), count.tolist(), strict=True):
            w = weigh(distance[a], distance[a])
            v = weigh(torch.minimum(distance[a], distance[b]), distance[b])
            p = float(w[b] / w.sum() * v[c] / v.sum()) / len(points)
            total += times * math.log(max(p, 1e-12))
        likelihood[rule] = total
    firsts = chosen[:, 0].bincount(minlength=len(points)).double()
    n, k = len(chosen), len(points)
    if float((firsts - n / k).square().sum() / (n / k)) > 35:  # chi square, 3 degrees of freedom
        return "the first seed is not any point with the same chance"
    best = max(likelihood, key=likelihood.get)
    if best != "right":
        return best
    # Twice the log of how much better the triples explain themselves: 23 degrees of freedom.
    own = sum(t * math.log(t / n) for t in count.tolist())
    worse = 2 * (own - likelihood["right"])
    return "not drawn by the square of the distance" if worse > 80 else None


def check_once(batches, N, size):
    """Every row once, in as few batches as possible?"""
    if not isinstance(batches, list) or not all(isinstance(b, torch.Tensor) for b in batches):
        return "a list of index tensors is expected"
    rows = torch.cat(batches).tolist() if batches else []
    if len(set(rows)) < len(rows):
        return "a row comes twice"
    if sorted(rows) != list(range(N)):
        return f"{N - len(rows)} rows of {N} never come: is the last batch dropped?"
    if max(map(len, batches)) > size:
        return f"a batch has more than {size} rows"
    if len(batches) != -(-N // size):
        return f"{len(batches)} batches where {-(-N // size)} would do: are leftovers packed?"
    return None


def run_network(net, s, activation=F.relu):
    for layer in "024":
        s = F.linear(s, net[f"{layer}.weight"], net[f"{layer}.bias"])
        s = activation(s) if layer != "4" else s
    return s


def network_mistakes(net, s):
    x = F.linear(s, net["0.weight"], net["0.bias"])
    last = F.linear(F.linear(F.relu(x), net["2.weight"], net["2.bias"]), net["4.weight"],
                    net["4.bias"])
    second = F.linear(F.relu(F.linear(x, net["2.weight"], net["2.bias"])), net["4.weight"],
                      net["4.bias"])
    return {"the ReLUs are missing": run_network(net, s, lambda x: x),
            "the second ReLU is missing": last, "the first ReLU is missing": second,
            "a ReLU follows the last layer": F.relu(run_network(net, s)),
            "GELU, not ReLU": run_network(net, s, F.gelu),
            "tanh, not ReLU": run_network(net, s, torch.tanh)}


def check_cut(got, want, block_size):
    """Rows as lists [document, length, prompt, tokens ...]."""
    got = [list(map(int, row)) for row in got]
    if got == want:
        return None
    if any(row[1] != len(row) - 3 for row in got):
        return "a row's length is not the number of its tokens"
    if any(row[1] > block_size + 1 for row in got):
        return f"a row has more than block_size + 1 = {block_size + 1} tokens"
    if any(row[1] == block_size + 1 for row in want) and all(row[1] <= block_size for row in got):
        return "rows are too short: a full row has block_size + 1 tokens, T inputs and T targets"
    pairs = [(a, b) for a, b in pairwise(got) if a[0] == b[0] and len(a) > 4]
    if pairs and all(a[-1] == b[3] for a, b in pairs if len(b) > 3):
        return "rows overlap by one token: no two rows may share a token"
    if len(got) < len(want):
        return f"{len(got)} rows where {len(want)} are expected: is a short last row lost?"
    if len(got) > len(want):
        return (f"{len(got)} rows where {len(want)} are expected: is a row without a scored token "
                f"kept?")
    for a, b in zip(got, want, strict=True):
        if a[3:] != b[3:]:
            if a[3:] == b[3:-1]:
                return "a row lacks its last token (a response ends with the end token)"
            return "a row has other tokens than expected"
        if a[2] != b[2]:
            return f"a row of {a[1]} tokens has a prompt of {a[2]}, not {b[2]}"
        if a[0] != b[0]:
            return "a row has the number of another document"
    return None


def number(value):
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]} is not a finite number")
    return value


# -------------------------------------------------------------------------------- leaking methods


class Method:
    """A method of exercise 9, honest or not: logits = table[token] + what is told."""

    def __init__(self, drawer, kind):
        self.kind = kind
        self.V, N, W = drawer.random.choice((4, 5)), 4, drawer.random.choice((7, 8))
        self.table = 1.5 * drawer.normal(self.V, self.V, dtype=F64)
        self.told = 3 * drawer.normal(self.V, self.V, dtype=F64)
        self.tokens = drawer.integers(0, self.V, N, W)
        self.prompt = drawer.integers(2, 5, N)
        self.row = drawer.random.randrange(N)
        self.cluster = torch.tensor([0, 0, 1, 1])[torch.randperm(N, generator=drawer.generator)]

    def __call__(self, tokens):
        if (not isinstance(tokens, torch.Tensor) or tokens.shape != self.tokens.shape
                or tokens.is_floating_point() or not 0 <= tokens.min() <= tokens.max() < self.V):
            raise ValueError("other tokens than those of the method")
        tokens = tokens.long()
        place = torch.arange(tokens.shape[1])
        logits = self.table[tokens[:, :-1]] + self.statistic(tokens, place) @ self.told  # (N, T, V)
        each = -logits.log_softmax(dim=2).gather(2, tokens[:, 1:, None])[:, :, 0]
        return each * (place[1:] >= self.prompt[:, None])

    def statistic(self, tokens, place):
        """What each place is told, (N, T, V): shares of tokens."""
        N, W = tokens.shape
        one = F.one_hot(tokens, self.V).double()  # (N, W, V)
        is_prompt = (place < self.prompt[:, None]).double()[:, :, None]  # (N, W, 1)
        prompts = (one * is_prompt).sum(dim=1) / self.prompt[:, None]  # (N, V)
        same = (self.cluster[:, None] == self.cluster).double()
        same /= same.sum(dim=1, keepdim=True)
        kind, whole = self.kind, one.mean(dim=1)
        running = one.cumsum(dim=1) / (place[:, None] + 1)
        if kind == "running":
            return running[:, :-1]
        if kind == "running, with the scored token":
            return running[:, 1:]
        if kind == "target":
            return one[:, 1:]
        if kind == "next but one":
            return torch.cat([one[:, 2:], torch.zeros(N, 1, self.V, dtype=F64)], dim=1)
        longer = (place <= self.prompt[:, None]).double()[:, :, None]
        rest = (one * (1 - is_prompt)).sum(dim=1) / (W - self.prompt[:, None])
        alone = same @ prompts
        alone[self.row] = whole[self.row]
        chosen = tokens.sum(dim=1) % 2
        told = {"nothing": 0 * prompts, "own prompt": prompts, "whole row": whole,
                "prompts of the cluster": same @ prompts, "whole rows of the cluster": same @ whole,
                "prompt of the next row": prompts.roll(-1, 0),
                "continuation of the next row": rest.roll(-1, 0),
                "first scored token counted as prompt":
                    (one * longer).sum(dim=1) / (self.prompt[:, None] + 1),
                "one row alone": alone, "faint": same @ prompts + 0.01 * rest.roll(-1, 0),
                "clusters of whole rows": torch.stack([prompts[chosen == k].sum(dim=0) / N
                                                       for k in (0, 1)])[chosen]}[kind]
        return told[:, None].expand(N, W - 1, self.V)
