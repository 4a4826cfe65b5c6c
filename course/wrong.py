"""Wrong but plausible solutions: each is our own with one string replaced by another.

`python course/grade.py --table` grades them all and prints what each loses, and what the grader
says. One that loses nothing is a hole in the hidden cases.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import grade
from common import UserError

SOLVED = Path(__file__).parent / "tests" / "solved"


@dataclass(frozen=True)
class Mistake:
    exercise: int
    name: str
    file: str
    old: str
    new: str


def source(file):
    """Our own file; what students write on their own lies beside the tests."""
    path = grade.ROOT / file if file in grade.SIX else SOLVED / file
    return path.read_text(encoding="utf-8")


def write(mistake, folder):
    """A submission with the mistake, in `folder`. UserError where the string to replace is gone."""
    folder = Path(folder)
    for file in [*grade.SIX, *(p.name for p in SOLVED.iterdir() if p.is_file())]:
        text = source(file)
        if file == mistake.file:
            if text.count(mistake.old) != 1:
                raise UserError(f"wrong.py: {mistake.name}: the string to replace is "
                                f"{text.count(mistake.old)} times in {mistake.file}")
            text = text.replace(mistake.old, mistake.new)
        (folder / file).write_text(text, encoding="utf-8")


def lost(mistake, worker, seed):
    """Points lost in the mistake's own exercise, and the first message."""
    with tempfile.TemporaryDirectory() as folder:
        write(mistake, folder)
        results = grade.grade(folder, {mistake.exercise}, seed, lambda text: None, worker=worker)
    _, messages = results[mistake.exercise]
    return sum(points for points, _ in messages), messages


def print_table(numbers, seed):
    seed = 0 if seed is None else seed
    worker, unseen = grade.Worker(), []
    print("| exercise | mistake | points lost | message |\n| ---: | --- | ---: | --- |")
    try:
        for mistake in MISTAKES:
            if mistake.exercise in numbers:
                points, messages = lost(mistake, worker, seed)
                text = telling(messages)
                print(f"| {mistake.exercise} | {mistake.name} | {points:.1f} | {text} |",
                      flush=True)
                unseen += [mistake.name] * (points == 0)
    finally:
        worker.close()
    print(f"\n{len(unseen)} mistakes lose nothing: {', '.join(unseen) or 'none'}")
    return unseen


def telling(messages):
    """The message that says most: not one that shows numbers alone."""
    texts = [text for _, text in messages]
    return next((t for t in texts if "wrong values" not in t and "shape" not in t),
                texts[0] if texts else "")


HEAD = "return super().forward(hidden) + z @ B.mT"
READ = "return tokens[:, :-1], tokens.masked_fill(~scored, IGNORE)[:, 1:]"
SCORED = "scored = real & (place >= (1 if whole else self.prompt[index, None]))"
SDPA = "y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)"
WEIGHTED = "weighted = means * count[:, None]"
RULES = "weight = distance if distance.any() else torch.ones_like(distance)"
UPDATE = "update = F.linear(z, self.lora_B)  # (B, T, r) @ (r, out) -> (B, T, out)"
LATER = "later = (document[row][:, None] == document[row]) & (row > row[:, None])"
PADDED = "per_sample_weights=real.to(embedding)"


def by_hand(scale="(C // self.n_head) ** -0.5", mask="torch.ones(T, T).triu(1).bool()"):
    """Attention in steps, with a scale and a mask."""
    return (f"p = ({scale} * q @ k.mT).masked_fill({mask}, -torch.inf).softmax(dim=-1)\n"
            f"        y = p.nan_to_num() @ v")


MISTAKES = [Mistake(*m) for m in (
    # 1
    (1, "no 1 / sqrt(d)", "model.py", SDPA, by_hand(scale="1.0")),
    (1, "1 / sqrt(C)", "model.py", SDPA, by_hand(scale="C ** -0.5")),
    (1, "no mask", "model.py", SDPA, by_hand(mask="torch.zeros(T, T).bool()")),
    (1, "mask off by one, sees the next", "model.py", SDPA,
     by_hand(mask="torch.ones(T, T).triu(2).bool()")),
    (1, "mask off by one, does not see itself", "model.py", SDPA,
     by_hand(mask="torch.ones(T, T).triu(0).bool()")),
    (1, "mask the other way round", "model.py", SDPA,
     by_hand(mask="torch.ones(T, T).tril(-1).bool()")),
    (1, "q and k exchanged", "model.py", "q, k, v = qkv.view", "k, q, v = qkv.view"),
    (1, "heads cut in the wrong order", "model.py",
     "qkv.view(B, T, 3, self.n_head, C // self.n_head).unbind(2)",
     "qkv.view(B, T, self.n_head, 3, C // self.n_head).unbind(3)"),
    (1, "heads not brought together", "model.py", "y.transpose(1, 2).reshape(B, T, C)",
     "y.reshape(B, T, C)"),
    # 2
    (2, "B random at the start", "model.py", "nn.Parameter(torch.zeros(n_out, rank))",
     "nn.Parameter(torch.randn(n_out, rank))"),
    (2, "A zero too", "model.py", "nn.init.kaiming_uniform_(A, a=math.sqrt(5))",
     "nn.init.zeros_(A)"),
    (2, "alpha / rank forgotten", "model.py",
     "z = F.linear(x, self.scale * self.lora_A)", "z = F.linear(x, self.lora_A)"),
    (2, "alpha / rank twice", "model.py", UPDATE, UPDATE.replace("self.lora_B)",
                                                                 "self.scale * self.lora_B)")),
    (2, "the bias forgotten", "model.py", "F.linear(x, self.weight, self.bias) + update",
     "F.linear(x, self.weight) + update"),
    (2, "base not frozen", "model.py", "model = copy.deepcopy(base).requires_grad_(False)",
     "model = copy.deepcopy(base)"),
    (2, "attention alone gets LoRA", "model.py", "if isinstance(m, nn.Linear)]\n    if not found",
     "if isinstance(m, nn.Linear) and \"attn\" in name]\n    if not found"),
    (2, "merged without alpha / rank", "model.py",
     "update = layer.scale * (layer.lora_B @ layer.lora_A)",
     "update = layer.lora_B @ layer.lora_A"),
    (2, "merged, the bias lost", "model.py",
     "nn.Parameter(layer.weight + update), layer.bias",
     "nn.Parameter(layer.weight + update), nn.Parameter(0 * layer.bias)"),
    # 3
    (3, "the farthest centroid", "cluster.py", ".argmax(dim=1)  # (n, C)",
     ".argmin(dim=1)  # (n, C)"),
    (3, "ties to the higher index", "cluster.py",
     "best = torch.addmm(-half, x, centroids.T).argmax(dim=1)",
     "best = len(half) - 1 - torch.addmm(-half, x, centroids.T).flip(1).argmax(dim=1)"),
    (3, "distance not squared", "cluster.py", "(x - centroids[best]).square().sum(dim=1))  # (n,)",
     "(x - centroids[best]).square().sum(dim=1).sqrt())"),
    (3, "empty cluster's mean is 0 / 0", "cluster.py", "total / count.clamp(min=1)[:, None], count",
     "total / count[:, None], count"),
    (3, "sums, not means", "cluster.py", "total / count.clamp(min=1)[:, None], count",
     "total, count"),
    (3, "empty cluster kept stale", "cluster.py",
     "centroids, count = means(points, cluster, k)\n        empty = (count == 0).nonzero()[:, 0]\n"
     "        farthest = distance.topk(min(len(empty), len(points))).indices\n"
     "        centroids[empty[:len(farthest)]] = points[farthest]",
     "old = centroids\n        centroids, count = means(points, cluster, k)\n"
     "        centroids = centroids.where(count[:, None] > 0, old)"),
    (3, "empty cluster left at zero", "cluster.py",
     "centroids[empty[:len(farthest)]] = points[farthest]", "pass"),
    (3, "one step", "cluster.py", "for _ in range(max_steps):", "for _ in range(1):"),
    (3, "centroids moved once more than points", "cluster.py",
     "    return centroids, cluster\n\n\ndef",
     "    return means(points, cluster, k)[0] + 0.05, cluster\n\n\ndef"),
    (3, "NaN let through", "cluster.py", "if not points.isfinite().all():", "if False:"),
    # 4
    (4, "by distance, not its square", "cluster.py", RULES, RULES.replace("distance if",
                                                                         "distance.sqrt() if")),
    (4, "any points", "cluster.py", RULES, "weight = torch.ones_like(distance)"),
    (4, "the farthest, not drawn", "cluster.py",
     "seed = torch.searchsorted(total, drawn, right=True).clamp(max=N - 1)",
     "seed = weight.argmax() if chosen else torch.searchsorted(total, drawn, right=True)"),
    (4, "distance to the last seed", "cluster.py",
     "distance = torch.minimum(distance, to_seed.clamp(min=0))",
     "distance = to_seed.clamp(min=0)"),
    (4, "the first is the first point", "cluster.py",
     "weight = torch.ones_like(square)  # the first is any point",
     "weight = torch.ones_like(square)\n    weight[1:] = 0"),
    (4, "not the generator's draws", "cluster.py", "torch.rand((), generator=generator).to(total)",
     "torch.rand(()).to(total)"),
    # 5
    (5, "last batch dropped (clusters)", "cluster.py",
     "list(torch.cat(rest).split(batch_size) if rest else ())", "[]"),
    (5, "leftovers not packed", "cluster.py",
     "full + list(torch.cat(rest).split(batch_size) if rest else ())", "full + rest"),
    (5, "batches of any rows, not clusters", "cluster.py",
     "    for k in cluster.unique():\n        parts += "
     "order[cluster[order] == k].split(batch_size)",
     "    parts += order.split(batch_size)"),
    (5, "rows not shuffled", "cluster.py",
     "order = torch.randperm(len(cluster), generator=generator)",
     "order = torch.arange(len(cluster))"),
    (5, "a row's place, not its number", "cluster.py", "order[cluster[order] == k].split",
     "(cluster[order] == k).nonzero()[:, 0].split"),
    (5, "last batch dropped (shuffled)", "cluster.py", "batches = order.split(batch_size)\n",
     "batches = [b for b in order.split(batch_size) if len(b) == batch_size]\n"),
    (5, "not sorted by length", "cluster.py", "part[length[part].argsort(stable=True)]", "part"),
    (5, "batches not shuffled", "cluster.py",
     "    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]\n\n\ndef "
     "shuffled", "    return batches\n\n\ndef shuffled"),
    # 6
    (6, "padding counted", "hypernet.py", "total.cpu() / real.sum(dim=1, keepdim=True)",
     "total.cpu() / real.shape[1]"),
    (6, "padding has an embedding", "hypernet.py", PADDED,
     "per_sample_weights=0 * real.to(embedding)"
                                                           " + 1"),
    (6, "statistics of whole rows", "hypernet.py", "tokens, real = rows.prompts(index)",
     "tokens, real = rows.read(index)"),
    (6, "sums, not means", "hypernet.py", "total.cpu() / real.sum(dim=1, keepdim=True)",
     "total.cpu()"),
    (6, "the centre not taken off", "hypernet.py", "F.normalize(means - center, dim=1)",
     "F.normalize(means, dim=1)"),
    (6, "not on the sphere", "hypernet.py", "F.normalize(means - center, dim=1)", "means - center"),
    (6, "normalised over rows", "hypernet.py", "F.normalize(means - center, dim=1)",
     "F.normalize(means - center, dim=0)"),
    (6, "0 / 0 at the centre", "hypernet.py", "F.normalize(means - center, dim=1)",
     "(means - center) / (means - center).norm(dim=1, keepdim=True)"),
    (6, "mean of means", "hypernet.py", WEIGHTED,
     "count = torch.ones_like(count)\n    " + WEIGHTED),
    (6, "empty clusters get zeros", "hypernet.py", "weighted.sum(dim=0) / count.sum())",
     "0 * weighted.sum(dim=0))"),
    (6, "empty clusters get a mean of means", "hypernet.py", "weighted.sum(dim=0) / count.sum())",
     "means.mean(dim=0))"),
    # 7
    (7, "last weights random", "hypernet.py", "        nn.init.zeros_(self[-1].weight)\n", ""),
    (7, "the bias is not `start`", "hypernet.py", "self[-1].bias.data.copy_(start)",
     "nn.init.zeros_(self[-1].bias)"),
    (7, "ReLU missing", "hypernet.py",
     "nn.Linear(n_in, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()",
     "nn.Linear(n_in, 64), nn.Identity(), nn.Linear(64, 32), nn.Identity()"),
    (7, "GELU", "hypernet.py", "nn.Linear(n_in, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()",
     "nn.Linear(n_in, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU()"),
    (7, "spread not used", "hypernet.py", " / self.spread.clamp(min=1e-6)  # (B, C)", ""),
    (7, "centre not used", "hypernet.py", "s = (statistics - self.center) /", "s = statistics /"),
    (7, "spread of zero divides", "hypernet.py",
     "s = s.where(self.spread > 1e-6, 0)  # what never varied in training says nothing", "pass"),
    (7, "B laid out as (r, V)", "hypernet.py", "B.view(-1, V, self.rank)  # from",
     "B.view(-1, self.rank, V).mT  # from"),
    (7, "B comes first", "hypernet.py",
     "A, B = self.hypernetwork(s).split([self.rank * C, V * self.rank], dim=1)",
     "B, A = self.hypernetwork(s).split([V * self.rank, self.rank * C], dim=1)"),
    (7, "alpha / rank forgotten", "hypernet.py", "z = self.scale * hidden @ A.mT",
     "z = hidden @ A.mT"),
    (7, "update of another row", "hypernet.py", "A, B = self.factors(statistics)",
     "A, B = self.factors(statistics.roll(1, 0))"),
    (7, "one update for all rows", "hypernet.py", "z = self.scale * hidden @ A.mT",
     "A, B = A[:1], B[:1]\n        z = self.scale * hidden @ A.mT"),
    (7, "the frozen head missing", "hypernet.py", HEAD, "return z @ B.mT"),
    # 8
    (8, "targets not shifted", "data.py", READ, READ.replace("[:, 1:]", "[:, :-1]")),
    (8, "prompts scored", "data.py", SCORED, "scored = real & (place >= 1)"),
    (8, "last prompt token scored", "data.py", SCORED, SCORED.replace("index, None]))",
                                                                      "index, None] - 1))")),
    (8, "first continuation token not scored", "data.py", SCORED, SCORED.replace(">=", ">")),
    (8, "padding scored", "data.py", SCORED, SCORED.replace("real & ", "")),
    (8, "rows overlap by one", "data.py", "range(0, len(tokens), width)]",
     "range(0, len(tokens), width - 1)]"),
    (8, "short last row dropped", "data.py", "range(0, len(tokens), width)]",
     "range(0, len(tokens) - block_size, width)]"),
    (8, "no end token", "data.py", "tokens = prompt + text + [tokenizer.end]",
     "tokens = prompt + text"),
    (8, "rows of T tokens", "data.py", "width = block_size + 1", "width = block_size"),
    (8, "means, not sums", "train.py", "return each.view(len(tokens), -1).sum(dim=1)",
     "return each.view(len(tokens), -1).mean(dim=1)"),
    (8, "what is ignored is scored", "train.py",
     "targets.flatten(), ignore_index=IGNORE,", "targets.flatten().clamp(min=0),"),
    (8, "one sum for all rows", "train.py", "return each.view(len(tokens), -1).sum(dim=1)",
     "return each.sum().expand(len(tokens)) / len(tokens)"),
    # 9
    (9, "always True", "leak_check.py", "    before = predict(tokens)", "    return True"),
    (9, "always False", "leak_check.py", "    before = predict(tokens)", "    return False"),
    (9, "its own token not tested", "leak_check.py", "if abs(total - 1) > 1e-6:", "if False:"),
    (9, "its own row alone", "leak_check.py", "if not same.all():", "if not same[row].all():"),
    (9, "other rows alone", "leak_check.py", "same[row, place - 1:] = True", "same[row] = True"),
    (9, "its own loss may not change", "leak_check.py", "same[row, place - 1:]",
     "same[row, place:]"),
    (9, "what comes after may not change", "leak_check.py", "same[row, place - 1:] = True",
     "same[row, place - 1] = True"),
    (9, "prompts changed too", "leak_check.py", "range(int(prompt[row]), tokens.shape[1])",
     "range(1, tokens.shape[1])"),
    (9, "the first row alone", "leak_check.py", "range(len(tokens)):", "range(1):"),
    (9, "too coarse", "leak_check.py", "rtol=1e-7, atol=1e-9", "rtol=0.3, atol=0.3"),
    # 10
    (10, "own prompt is the cluster", "eval.py", "\"told own prompt\": means,",
     "\"told own prompt\": own,"),
    (10, "nothing is zeros", "eval.py", "head.center.cpu().expand_as(means)", "0 * means"),
    (10, "another cluster is its own", "eval.py", "order.roll(1))  # (K,)", "order)  # (K,)"),
    (10, "another row's, not another cluster's", "eval.py",
     "cluster_means(means, count, which, len(ids))[other[which]]", "own.roll(1, 0)"),
    (10, "clusters told a mean of means", "eval.py",
     "cluster_means(means, count, which, len(ids))[other[which]]",
     "cluster_means(means, 0 * count + 1, which, len(ids))[other[which]]"),
    (10, "earlier rows left out", "eval.py", LATER, LATER.replace(" > ", " < ")),
    (10, "later rows of all documents left out", "eval.py", LATER,
     "later = row > row[:, None]"),
    (10, "later rows left in", "eval.py", LATER, "later = (row > row[:, None]) & False"),
    (10, "no later rows: not by tokens", "eval.py", "weight = ~later * count[row]  # (n, n)",
     "weight = ~later * torch.ones_like(count[row])  # (n, n)"),
    # 11
    (11, "no false win", "false_win.json", "\"loss\": 4.67", "\"loss\": 6.67"),
    (11, "the false win at two rates", "false_win.json", "\"lr\": 0.003, \"loss\": 5.61",
     "\"lr\": 0.001, \"loss\": 5.61"),
    (11, "not the best rate", "false_win.json", "\"loss\": 4.40", "\"loss\": 4.00"),
    (11, "one rate alone", "false_win.json", "\"lr\": 0.01, \"loss\": 4.55",
     "\"lr\": 0.03, \"loss\": 4.55"),
    (11, "two seeds", "false_win.json", "{\"method\": \"chameleon\", \"lr\": 0.01, \"loss\": 4.17",
     "{\"method\": \"chameleon\", \"lr\": 0.1, \"loss\": 4.17"),
    (11, "not a number", "false_win.json", "\"loss\": 4.05", "\"loss\": NaN"),
    (11, "hardly a text", "false_win.json", "\"text\": \"These numbers",
     "\"text\": \"Short.\", \"more\": \"These numbers"),
    # 12
    (12, "a bias alone, no update", "my_head.py", "return super().forward(hidden) + self.scale * z",
     "return super().forward(hidden) + 0 * z"),
    (12, "too many parameters", "my_head.py", "self.bias = nn.Linear(C, V, bias=False)",
     "self.bias = nn.Linear(C, V, bias=False)\n        self.more = nn.Linear(100, 1000)"),
    (12, "a look at the other rows", "my_head.py", "s = (statistics - self.center)",
     "s = (statistics - statistics.mean(dim=0))"),
    (12, "the statistic is not used", "my_head.py", "s = (statistics - self.center) / self.spread",
     "s = 0 * statistics"),
    (12, "one number, not V", "my_head.py", "+ self.bias(s)[:, None]",
     "+ self.bias(s)[:, None, :1].repeat(1, 1, 2)"),
    (12, "divided by zero", "my_head.py", "self.spread.copy_(means.std(dim=0))", "pass"),
)]
