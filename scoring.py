"""The metric: one number for every method, from the same tokens.

A loss is the negative log-likelihood of the continuations' tokens, each predicted from what stands
before it, summed over tokens and then divided by their number. Prompts and padding are not scored.
A chameleon's loss depends on the company that an example keeps, so `company` chooses that for a
whole split at once, and no score depends on the batches that it is computed in.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from data import IGNORE
from hypernet import Prompts

LOGITS_BYTES = 1 << 26  # float32 logits that exist at one time; more tokens are taken in turns


class LinearCrossEntropy(torch.autograd.Function):
    """Head and loss in one, by turns, so that the (n, V) table of all logits never exists.

    With logits x = W h + B z, p = softmax(x) and y the target, the gradient of -log p_y in x is
    g = p - e_y; so it is W^T g in h, g h^T in W, B^T g in z and g z^T in B. All of these are at
    hand while a turn's logits are: no logits are kept and none is computed twice, and the
    backward pass only scales what the forward pass has left.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, z, B, counts):
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        exact = torch.promote_types(dtype, torch.float32)  # of the softmax, and of sums
        h, W = hidden.to(dtype), weight.to(dtype)
        losses = torch.empty(len(targets), dtype=exact, device=hidden.device)
        train_h, train_W, _, train_z, train_B, _ = ctx.needs_input_grad
        d_h = torch.empty_like(h) if train_h else None
        d_W = torch.zeros_like(weight, dtype=exact) if train_W else None
        d_z = d_B = None
        if B is not None:
            z, B = z.to(dtype), B.to(dtype)
            d_z = torch.empty_like(z) if train_z else None
            d_B = torch.zeros_like(B, dtype=exact) if train_B else None
        for k, rows in turns(counts, max(1, LOGITS_BYTES // (4 * len(weight)))):
            x = h[rows] @ W.T  # (m, C) @ (C, V) -> (m, V)
            if B is not None:
                x.addmm_(z[rows], B[k].T)  # (m, r) @ (r, V) -> (m, V)
            log_p = F.log_softmax(x, dim=1, dtype=exact)
            target = targets[rows, None]
            losses[rows] = -log_p.gather(1, target)[:, 0]
            if not any(ctx.needs_input_grad):
                continue
            g = log_p.exp_()
            g = g.scatter_add_(1, target, -torch.ones_like(target, dtype=exact)).to(dtype)
            if train_h:
                d_h[rows] = g @ W  # (m, V) @ (V, C) -> (m, C)
            if train_W:
                d_W += g.T @ h[rows]  # (V, m) @ (m, C) -> (V, C)
            if train_z:
                d_z[rows] = g @ B[k]  # (m, V) @ (V, r) -> (m, r)
            if train_B:
                d_B[k] += g.T @ z[rows]  # (V, m) @ (m, r) -> (V, r)
        ctx.gradients = d_h, d_W, None, d_z, d_B, None
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        return tuple(d if d is None else d * upstream for d in ctx.gradients)


def turns(counts, size):
    """(k, slice) for `counts` tokens of each cluster that lie side by side, `size` at a time."""
    start = 0
    for k, count in enumerate(counts):
        for first in range(start, start + count, size):
            yield k, slice(first, min(first + size, start + count))
        start += count


def linear_cross_entropy(hidden, weight, targets, z=None, B=None, counts=None):
    """Summed negative log-likelihood, which can be differentiated, and each token's (n,).

    hidden (n, C), weight (V, C), targets (n,); logits are W h, or W h + B[k] z with z (n, r) and
    B (K, V, r), where the first counts[0] tokens have k = 0, the next counts[1] k = 1 and so on.
    Products are made in autocast's type, the softmax and all sums in float32. At most
    LOGITS_BYTES of logits exist at a time, and whatever autograd needs is made on the way.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()
    return LinearCrossEntropy.apply(hidden, weight, targets, z, B, counts or [len(targets)])


def losses(model, tokens, targets, statistics=None, cluster=None):
    """Negative log-likelihood of the scored targets, in nats: summed (), and of each row (B,).

    tokens and targets (B, T), IGNORE where nothing is scored, statistics (K, C) and cluster (B,)
    lie on the CPU, so that nothing here waits for the device. The sum can be differentiated, the
    rows cannot.
    """
    head, device = model.lm_head, model.lm_head.weight.device

    def send(x):
        if x is None or device.type != "cuda":
            return x if x is None else x.to(device)
        return x.pin_memory().to(device, non_blocking=True)  # unpinned, it would wait

    hidden = model.hidden(send(tokens))
    factors = head.factors(send(statistics))
    place = (targets.flatten() != IGNORE).nonzero()[:, 0]  # (n,) of B * T
    z = B = counts = None
    if factors is not None:
        z, B = head.project(hidden, factors, send(cluster)), factors[1]
        if len(B) > 1:  # tokens of a cluster side by side
            k = cluster[place // targets.shape[1]]
            place, counts = place[k.argsort(stable=True)], k.bincount(minlength=len(B)).tolist()
    wanted, place = send(targets.flatten()[place]), send(place)

    def scored(x):
        return x.flatten(0, 1).index_select(0, place)  # (B, T, ...) -> (n, ...)

    total, each = linear_cross_entropy(
        scored(hidden), head.weight, wanted, z if z is None else scored(z), B, counts)
    rows = each.new_zeros(targets.numel()).index_copy_(0, place, each)  # (B * T,)
    return total, rows.view(targets.shape).sum(dim=1)


def summed(losses, counts):
    """What `score` returns, as metrics.jsonl and results.json have it."""
    nll, n = float(losses.sum()), int(counts.sum())
    return {"nll_sum": nll, "n_tokens": n, "loss": nll / n}


def scored_bytes(examples, sizes, whole=False):
    """Bytes of text that the scored tokens stand for; sizes (V,) from `bytes_per_token`."""
    total = 0
    for index in torch.arange(len(examples)).split(1024):
        targets = examples.batch(index, whole)[1]
        total += int(sizes[targets[targets != IGNORE]].sum())
    return total


@torch.no_grad()
def score(run, model, examples, batch_size, statistics=None, cluster=None, whole=False):
    """Score every example: losses (N,) in nats, float64, and scored tokens (N,).

    statistics (K, C) and cluster (N,) are the company that the examples keep: chosen for all of
    them together, so that no result depends on `batch_size`, nor on the number of processes.
    """
    model.eval()
    nll, counts = np.zeros(len(examples)), np.zeros(len(examples), dtype=np.int64)
    by_length = np.argsort(examples.length, kind="stable")  # little padding within a batch
    batches = np.split(by_length, range(batch_size, len(examples), batch_size))
    for index in batches[run.rank :: run.world]:
        tokens, targets = examples.batch(index, whole)
        s, c = statistics, None
        if cluster is not None:
            used, c = cluster[torch.from_numpy(index)].unique(return_inverse=True)
            s = statistics[used]
        with run.autocast:
            rows = losses(model, tokens, targets, s, c)[1]
        nll[index] = rows.cpu().numpy()  # summed up in float64 from here on
        counts[index] = (targets != IGNORE).sum(dim=1).numpy()
    return run.add_up(nll), run.add_up(counts)


def company(run, model, examples, plan, inference, control=None):
    """Statistics (K, C) and cluster (N,) of held-out examples, on the CPU, as `score` takes them.

    inference: "fit", k-means on the requests at hand, or "assign", the nearest training centroid.
    control: None, or what replaces the statistic: "own prompt only", "shuffled" or "constant".
    """
    head = model.lm_head
    if not head.needs_statistics:
        return {}
    prompts = Prompts(examples, model.transformer.wte, plan["stat_scope"])
    if control == "own prompt only":
        cluster = torch.arange(len(examples))
        statistics = prompts.statistics(cluster)
    else:
        k = max(1, round(len(examples) / plan["cluster_size"])) if inference == "fit" else None
        generator = torch.Generator().manual_seed(plan["seed"])
        with run.autocast:
            cluster, statistics = head.group(prompts, k, generator)
    if control == "shuffled":  # every cluster gets another one's statistic
        order = torch.randperm(len(statistics), generator=generator)
        statistics = statistics[order.roll(1)[order.argsort()]]
    elif control == "constant":
        statistics = head.center.cpu().expand_as(statistics)
    return {"statistics": statistics, "cluster": cluster}
