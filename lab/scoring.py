"""The metric: one number for every method, from the same tokens.

A loss is the negative log-likelihood of the continuations' tokens, each predicted from what stands
before it, summed over tokens and then divided by their number. Prompts and padding are not scored.
A chameleon's loss depends on the company that an example keeps, so that is chosen for a whole split
at once, and no score depends on the batches that it is computed in.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lab.data import IGNORE
from lab.hypernet import product_type

LOGITS_BYTES = 1 << 26  # float32 logits that exist at one time; more tokens are taken in turns


class LinearCrossEntropy(torch.autograd.Function):
    """Head and loss in one, by turns, so that the (n, V) table of all logits never exists.

    With logits x = W h + B z, p = softmax(x) and y the target, the gradient of -log p_y in x is
    g = p - e_y; so it is W^T g in h, g h^T in W, B^T g in z and g z^T in B. All of these are at
    hand while a turn's logits are: no logits are kept and none is computed twice, and the
    backward pass only scales what the forward pass has left.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, counts, log_extra, *updates):
        dtype = product_type(hidden.device, hidden.dtype)
        exact = torch.promote_types(dtype, torch.float32)  # of the softmax, and of sums
        h, W, *updates = (t.to(dtype) for t in (hidden, weight, *updates))
        losses = torch.empty(len(targets), dtype=exact, device=hidden.device)
        trained = ctx.needs_input_grad
        d_h = torch.empty_like(h) if trained[0] else None
        d_W = torch.zeros_like(W, dtype=exact) if trained[1] else None
        d_log_extra = None if log_extra is None else torch.empty_like(log_extra)
        # z, B of each update; sums over tokens are kept exact
        d_updates = [None if not needed else torch.zeros_like(t, dtype=exact if i % 2 else dtype)
                     for i, (t, needed) in enumerate(zip(updates, trained[5:], strict=True))]
        size = max(1, LOGITS_BYTES // (4 * len(weight)))
        for first in range(0, len(targets), size):
            end = min(first + size, len(targets))
            x = h[first:end] @ W.T  # (m, C) @ (C, V) -> (m, V)
            parts = []  # tokens of this turn that share a B: which update, which B, which tokens
            for i in range(0, len(updates), 2):
                sizes = counts if len(updates[i + 1]) > 1 else [len(targets)]
                parts += [(i, k, slice(a, b), slice(a - first, b - first))
                          for k, a, b in within(sizes, first, end)]
            for i, k, rows, here in parts:
                x[here].addmm_(updates[i][rows], updates[i + 1][k].T)  # (m, r) @ (r, V)
            log_p = F.log_softmax(x, dim=1, dtype=exact)
            target = targets[first:end, None]
            log_py = log_p.gather(1, target)[:, 0]
            losses[first:end] = -log_py
            if log_extra is not None:  # -log(p_y + e^x): the gradient is g p_y / (p_y + e^x)
                losses[first:end] = -torch.logaddexp(log_py, log_extra[first:end])
                ratio = (log_py + losses[first:end]).exp()
                d_log_extra[first:end] = ratio - 1
            if not any(trained):
                continue
            g = log_p.exp_()
            g = g.scatter_add_(1, target, -torch.ones_like(target, dtype=exact))
            if log_extra is not None:
                g *= ratio[:, None]
            g = g.to(dtype)
            if d_h is not None:
                d_h[first:end] = g @ W  # (m, V) @ (V, C) -> (m, C)
            if d_W is not None:
                d_W += g.T @ h[first:end]  # (V, m) @ (m, C) -> (V, C)
            for i, k, rows, here in parts:
                if d_updates[i] is not None:
                    d_updates[i][rows] = g[here] @ updates[i + 1][k]  # (m, V) @ (V, r)
                if d_updates[i + 1] is not None:
                    d_updates[i + 1][k] += g[here].T @ updates[i][rows]  # (V, m) @ (m, r)
        ctx.gradients = d_h, d_W, None, None, d_log_extra, *d_updates
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        return tuple(None if d is None else d * upstream for d in ctx.gradients)


def within(counts, first, end):
    """(k, from, to) of each cluster's tokens between `first` and `end`, lying side by side."""
    start = 0
    for k, count in enumerate(counts):
        a, b = max(start, first), min(start := start + count, end)
        if a < b:
            yield k, a, b


def linear_cross_entropy(hidden, weight, targets, updates=(), counts=None, log_extra=None):
    """Summed negative log-likelihood, which can be differentiated, and each token's (n,).

    hidden (n, C), weight (V, C), targets (n,); logits are W h, and for each of `updates`, a pair
    z (n, r) and B, B z more with B (V, r), or B[k] z with B (K, V, r) and k = 0 for the first
    counts[0] tokens, 1 for the next counts[1] and so on. With log_extra (n,) a target's
    probability p counts as p + exp(log_extra). Products are made in autocast's type, the softmax
    and all sums in float32. At most LOGITS_BYTES of logits exist at a time; what autograd needs is
    made on the way.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()
    flat = [tensor for z, B in updates for tensor in (z, B if B.dim() == 3 else B[None])]
    return LinearCrossEntropy.apply(hidden, weight, targets, counts, log_extra, *flat)


def losses(model, tokens, targets, statistics=None, cluster=None):
    """Negative log-likelihood of the scored targets, in nats: summed (), and of each row (B,).

    tokens (B, T) are what the model reads; targets (B, T), IGNORE where nothing is scored,
    statistics (K, ...) and cluster (B,), or what a cache is told, lie on the CPU, so that nothing
    here waits for the device (a cache does). The sum can be differentiated, the rows cannot.
    """
    head, device = model.lm_head, model.lm_head.weight.device

    def send(x):
        if device.type == "cuda" and x is not None:
            return x.pin_memory().to(device, non_blocking=True)  # unpinned, it would wait
        return None if x is None else x.to(device)

    told, which = send(statistics), send(cluster)
    hidden = model.hidden(send(tokens), soft=head.soft_prompts(told, which))
    updates = head.updates(told)
    place = (targets.flatten() != IGNORE).nonzero()[:, 0]  # (n,) of B * T
    K, counts = max((len(u.B) for u in updates if u.B.dim() == 3), default=1), None
    if K > 1:  # tokens of a cluster side by side
        k = cluster[:, None].expand(targets.shape).flatten()[place]
        place, counts = place[k.argsort(stable=True)], k.bincount(minlength=K).tolist()
    wanted, place = send(targets.flatten()[place]), send(place)

    def scored(x):
        return x.flatten(0, 1).index_select(0, place)  # (B, T, ...) -> (n, ...)

    pairs, log_extra = [], None
    for A, B in updates:
        z = hidden @ (A if A.dim() == 2 else A[which]).mT  # (B, T, C) @ (C, r) or (B, C, r)
        pairs.append((scored(z), B))  # B[k] is multiplied with all of k's
    if head.reads_company:
        aim = send(targets)
        log_extra, log_share = map(scored, head.recall(hidden, told, which, aim, aim != IGNORE))
    total, each = linear_cross_entropy(
        scored(hidden), head.weight, wanted, pairs, counts, log_extra)
    if head.reads_company:
        total, each = total - log_share.sum(), each - log_share.detach()
    rows = each.new_zeros(targets.numel()).index_copy_(0, place, each)  # (B * T,)
    return total, rows.view(targets.shape).sum(dim=1)


def summed(losses, counts):
    """What `score` returns, as metrics.jsonl and results.json have it."""
    nll, n = float(losses.sum()), int(counts.sum())
    return {"nll_sum": nll, "n_tokens": n, "loss": nll / n}


def scored_bytes(examples, sizes, whole=False):
    """Bytes of text that the scored tokens stand for; sizes (V,) from `bytes_per_token`."""
    batches = (examples.batch(rows, whole)[1] for rows in torch.arange(len(examples)).split(1024))
    return sum(int(sizes[targets[targets != IGNORE]].sum()) for targets in batches)


@torch.no_grad()
def score(run, model, examples, batch_size, company=None, whole=False, chosen=None):
    """Score every example: losses (N,) in nats, float64, and scored tokens (N,).

    With `chosen` (N,) only where that is true; the others have 0 of both.

    `company` is what the examples keep: a `Company`, chosen for all of them together, so that no
    result depends on `batch_size`, nor on the number of processes.
    """
    model.eval()
    counts = torch.zeros(len(examples), dtype=torch.int64)
    nll = counts.double()
    order = torch.from_numpy(examples.length).argsort(stable=True)  # little padding in a batch
    if chosen is not None:
        order = order[chosen[order]]
    if company and model.lm_head.reads_company and len(company.members) < len(examples):
        # each cluster is read once
        order = order[company.cluster[order].argsort(stable=True)]
    for index in order.split(batch_size)[run.rank :: run.world]:
        batch = company.batch(examples, index) if company else examples.batch(index, whole)
        with run.autocast:
            rows = losses(model, *batch)[1][: len(index)]
        nll[index] = rows.cpu().double()  # summed up in float64 from here on
        counts[index] = (batch[1][: len(index)] != IGNORE).sum(dim=1)
    return run.add_up(nll.numpy()), run.add_up(counts.numpy())


class Company:
    """Who keeps whose company among N examples: what a head is told of them.

    head, prompts: see `read` and `told` of the head; cluster (N,). control: None, or what takes
    the place of the cluster: "own prompt only", "shuffled" (another cluster, none if there is no
    other), "constant" (none), "other articles" (the cluster without the rest of the example's own
    `article` (N,)), or "no later rows" (without what comes after the example in its article).
    """

    def __init__(self, head, prompts, cluster, control=None, generator=None, article=None):
        if control == "own prompt only":
            cluster = torch.arange(len(cluster))
        cluster = cluster.unique(return_inverse=True)[1]  # number the clusters that have members
        self.head, self.prompts, self.cluster = head, prompts, cluster
        members = cluster.argsort(stable=True).split(cluster.bincount().tolist())
        if control == "shuffled":  # every cluster gets another one's members
            order = torch.randperm(len(members), generator=generator)
            members = [members[i] for i in order.roll(1)[order.argsort()]]
        if control == "constant" or (control == "shuffled" and len(members) == 1):
            members = [alone[:0] for alone in members]
        self.members = members
        self.choose = None  # of a row and its cluster's members: which of them it is told
        if control in ("other articles", "no later rows"):
            article = torch.from_numpy(article)

            def choose(i, mates):
                kept = mates == i if control == "other articles" else mates <= i  # in its article
                return mates[(article[mates] != article[i]) | kept]

            self.choose = choose

    def kept(self, index):
        """Of the rows `index` (B,): which company each keeps (B,), and the `members` (M,) of those
        companies, with the `group` (M,) of each."""
        used, which = self.cluster[index].unique(return_inverse=True)
        members = [self.members[k] for k in used.tolist()]
        if self.choose:  # no two rows may keep the same company
            members = [self.choose(i, members[k])
                       for i, k in zip(index.tolist(), which.tolist(), strict=True)]
            which = torch.arange(len(index))
        group = torch.repeat_interleave(torch.tensor([len(own) for own in members]))
        return which, torch.cat(members), group

    def told(self, index):
        """Statistics and cluster of the rows `index` (B,), as `losses` takes them."""
        return self.head.told(self.prompts, index, *self.kept(index))[1:]

    def among(self, index):
        """The same where no more is known of their clusters than the rows `index` (B,)."""
        which = self.cluster[index].unique(return_inverse=True)[1]
        return self.head.told(self.prompts, index, which, index, which)[1:]

    def batch(self, examples, index):
        """All that `losses` takes of the rows `index` (B,). Rows that the head has to read beside
        them follow, unscored."""
        rows, *told = self.head.told(self.prompts, index, *self.kept(index))
        inputs, targets = examples.batch(rows)
        targets[len(index) :] = IGNORE
        return inputs, targets, *told


def held_out_company(run, model, examples, plan, inference, control=None):
    """The `Company` of held-out examples; None for a head that is told nothing.

    inference: "fit", k-means on the requests at hand, or "assign", the nearest training centroid,
    where the head keeps any.
    """
    head = model.lm_head
    if not head.needs_statistics:
        return None
    prompts = head.read(examples.conditioned(plan), run.base.transformer.wte)
    assigned = inference == "assign" and head.stores_clusters
    k = None if assigned else max(1, round(len(examples) / plan.get("cluster_size", 1)))
    generator = torch.Generator().manual_seed(plan["seed"])

    def group():
        with run.autocast:
            return head.group(prompts, k, generator), generator.get_state()

    cluster, state = run.from_first(group)
    generator.set_state(state)  # all processes draw the same wrong clusters
    return Company(head, prompts, cluster, control, generator, examples.article)
