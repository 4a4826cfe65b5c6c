"""The metric: one number for every method, from the same tokens.

A loss is the negative log-likelihood of the continuations' tokens, each predicted from what stands
before it, summed over tokens and then divided by their number. Prompts and padding are not scored.
A chameleon's loss depends on the company that an example keeps, so `company` chooses that for a
whole split at once, and no score depends on the batches that it is computed in.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import IGNORE
from hypernet import Prompts

LOGITS_BYTES = 1 << 28  # logits that exist at one time; more rows than that are taken in turns


def row_losses(head, hidden, targets, statistics=None, cluster=None):
    """Summed negative log-likelihood (B,) of each row's scored targets, in nats.

    hidden (B, T, C), targets (B, T) with IGNORE where nothing is scored. The head is applied to
    as many rows at a time as LOGITS_BYTES allows; in training the logits are then computed again
    for the backward pass instead of being kept.
    """
    # Positions before the first scored one in any row need no logits: a quarter of running text.
    first = int((targets != IGNORE).any(dim=0).int().argmax())
    hidden, targets = hidden[:, first:], targets[:, first:]

    def part(hidden, targets, cluster):
        logits = head(hidden, statistics, cluster).float()  # (b, T, V)
        losses = F.cross_entropy(  # (b * T, V) and (b * T,) -> (b * T,)
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
        )
        return losses.view(targets.shape).sum(dim=1)  # (b * T,) -> (b, T) -> (b,)

    rows = max(1, LOGITS_BYTES // (4 * targets.shape[1] * head.weight.shape[0]))
    if cluster is None:
        cluster = torch.zeros(len(targets), dtype=torch.int64, device=targets.device)
    parts = list(zip(hidden.split(rows), targets.split(rows), cluster.split(rows), strict=True))
    if len(parts) > 1 and torch.is_grad_enabled():
        return torch.cat([checkpoint(part, *p, use_reentrant=False) for p in parts])
    return torch.cat([part(*p) for p in parts])


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
def score(model, examples, batch_size, autocast, statistics=None, cluster=None, whole=False):
    """Score every example: losses (N,) in nats, float64, and scored tokens (N,).

    statistics (K, C) and cluster (N,) are the company that the examples keep: chosen for all of
    them together, so that no result depends on `batch_size`.
    """
    device = next(model.parameters()).device
    model.eval()
    losses, counts = np.zeros(len(examples)), np.zeros(len(examples), dtype=np.int64)
    by_length = np.argsort(examples.length, kind="stable")  # little padding within a batch
    for index in np.split(by_length, range(batch_size, len(examples), batch_size)):
        tokens, targets = (t.to(device) for t in examples.batch(index, whole))
        s, c = statistics, None
        if cluster is not None:
            used, c = cluster[torch.from_numpy(index).to(cluster.device)].unique(
                return_inverse=True)
            s = statistics[used]
        with autocast:
            rows = row_losses(model.lm_head, model.hidden(tokens), targets, s, c)
        losses[index] = rows.cpu().numpy()  # summed up in float64 from here on
        counts[index] = (targets != IGNORE).sum(dim=1).cpu().numpy()
    return losses, counts


def company(model, examples, plan, inference, control=None):
    """Statistics (K, C) and cluster (N,) of held-out examples, as `score` takes them.

    inference: "fit", k-means on the requests at hand, or "assign", the nearest training centroid.
    control: None, or what replaces the statistic: "own prompt only", "shuffled" or "constant".
    """
    head = model.lm_head
    if not head.needs_statistics:
        return {}
    prompts = Prompts(examples, model.transformer.wte, plan["stat_scope"])
    if control == "own prompt only":
        cluster = torch.arange(len(examples), device=prompts.mean.device)
        return {"statistics": prompts.statistics(cluster), "cluster": cluster}
    k = max(1, round(len(examples) / plan["cluster_size"])) if inference == "fit" else None
    generator = torch.Generator().manual_seed(plan["seed"])
    cluster, statistics = head.group(prompts, k, generator)
    if control == "shuffled":  # every cluster gets another one's statistic
        order = torch.randperm(len(statistics), generator=generator).to(statistics.device)
        statistics = statistics[order.roll(1)[order.argsort()]]
    elif control == "constant":
        statistics = head.center.expand_as(statistics)
    return {"statistics": statistics, "cluster": cluster}
