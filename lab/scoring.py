"""The metric, and the company that held-out examples keep.

A loss is the negative log-likelihood of the continuations' tokens, each predicted from what stands
before it, summed over tokens and then divided by their number. Prompts and padding are not scored.
What a row is told depends on the company that it keeps, so that is chosen for a whole split at
once: for the heads of the core's kind it is a table (N, C) of statistics, a row each, and a control
is another table. No score depends on the batches that it is computed in.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

import train as core
from data import IGNORE
from eval import scored_bytes
from hypernet import ChameleonHead, cluster_means, features, prompt_means
from lab import cache
from lab.cache import CacheHead
from lab.cluster import assign, kmeans
from lab.common import autocast
from lab.flags import ALONE

__all__ = ["Company", "Told", "cluster_training", "held_out", "is_told", "score", "scored_bytes",
           "summed", "table"]

ROWS = 64  # that a cache scores at a time


def is_told(head):
    """Whether a head is told a statistic."""
    return isinstance(head, ChameleonHead)


def summed(losses, counts):
    """What `score` returns, as metrics.jsonl and results.json have it."""
    nll, n = float(losses.sum()), int(counts.sum())
    return {"nll_sum": nll, "n_tokens": n, "loss": nll / n}


# ------------------------------------------------------------------------------------- company


class Company:
    """Who keeps whose company among N examples.

    cluster (N,). control: None, or what takes the place of the cluster: "own prompt only",
    "shuffled" (another cluster, none if there is no other), "constant" (none), "other articles"
    (the cluster without the rest of the example's own `article` (N,)), or "no later rows" (without
    what comes after the example in its article).
    """

    def __init__(self, cluster, control=None, generator=None, article=None):
        if control == ALONE:
            cluster = torch.arange(len(cluster))
        self.cluster = cluster = cluster.unique(return_inverse=True)[1]  # those with members
        members = list(cluster.argsort(stable=True).split(cluster.bincount().tolist()))
        if control == "shuffled":  # every cluster gets another one's members
            order = torch.randperm(len(members), generator=generator)
            members = [members[i] for i in order.roll(1)[order.argsort()]]
        if control == "constant" or (control == "shuffled" and len(members) == 1):
            members = [alone[:0] for alone in members]
        self.members = members
        self.choose = None  # of a row and its cluster's members: which of them it is told
        if control in ("other articles", "no later rows"):

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


def table(head, means, count, company):
    """What each row is told (N, C): the mean embedding of all prompt tokens of its company.

    means (N, C) and count (N,) are of each row's prompt. Without company it is the training mean,
    which says nothing.
    """
    told, N = torch.empty_like(means), len(means)
    for index in torch.arange(N).split(256 if company.choose else N):
        which, members, group = company.kept(index)
        if len(members):
            K = int(which.max()) + 1
            told[index] = cluster_means(means[members], count[members], group, K)[which]
        else:
            told[index] = head.center.cpu()
    return told


# ------------------------------------------------------------------------------------ clusters


def points_of(head, means, device):
    """What k-means clusters, (N, C) on `device`."""
    return features(means, head.center.cpu()).to(device)


def cluster_training(run, head, plan, means, count, generator):
    """Cluster (N,) of the training prompts; `head` keeps what inference needs."""
    K = plan["clusters"]
    head.center.copy_(means.mean(dim=0))
    if plan["method"] in ("per-sample", "task-embedding"):  # every request is its own cluster
        head.remember(means, head.center[None])
        return torch.arange(len(means))
    points = points_of(head, means, run.device)
    centroids = kmeans(points, K, generator, dtype=run.dtype).centroids
    cluster = assign(points, centroids)[0].cpu()
    head.remember(means, cluster_means(means, count, cluster, K))
    if hasattr(head, "choose_groups"):
        head.choose_groups(centroids, generator)
    return cluster


def group(run, head, plan, means, inference, generator):
    """Cluster (N,) of held-out prompts: by k-means on the requests at hand, or the nearest of the
    training's."""
    if plan["method"] in ("per-sample", "task-embedding"):
        return torch.arange(len(means))
    points = points_of(head, means, run.device)
    if inference == "assign":
        return assign(points, points_of(head, head.clusters.cpu(), run.device))[0].cpu()
    k = max(1, round(len(means) / plan["cluster_size"]))
    return kmeans(points, k, generator, dtype=run.dtype).cluster.cpu()


@dataclass
class Told:
    """What held-out examples are told: a table of statistics, or the company that a cache reads."""

    cluster: torch.Tensor  # (N,)
    company: Company
    table: torch.Tensor | None = None  # (N, C)
    points: torch.Tensor | None = None  # (N, C), what was clustered


def held_out(run, model, examples, plan, inference=None, control=None):
    """`Told` for held-out examples; None for a head that is told nothing.

    inference: "fit", k-means on the requests at hand, or "assign", the nearest training cluster,
    where the head keeps any; the plan's if not given.
    """
    head, means, count, points = model.lm_head, None, None, None
    if not is_told(head) and not isinstance(head, CacheHead):
        return None
    generator = torch.Generator().manual_seed(plan["seed"])
    inference = inference or plan.get("inference", "fit")
    if is_told(head):
        means, count = prompt_means(examples.seen(plan), run.base.transformer.wte.weight)
        points = points_of(head, means, "cpu")

    def clusters():
        with autocast(run):
            if means is not None:
                found = group(run, head, plan, means, inference, generator)
            else:
                k = max(1, round(len(examples) / plan.get("cluster_size", 1)))
                found = head.group(examples, k, generator)
        return found, generator.get_state()

    cluster, state = run.from_first(clusters)
    generator.set_state(state)  # all processes draw the same wrong clusters
    company = Company(cluster, control, generator, examples.article)
    told = None if means is None else table(head, means, count, company)
    return Told(company.cluster, company, told, points)


# --------------------------------------------------------------------------------------- score


def score(run, model, examples, told=None, whole=False, chosen=None):
    """Losses (N,) in nats, float64, and scored tokens (N,); with `chosen` (N,) 0 elsewhere."""
    model.eval()
    if isinstance(model.lm_head, CacheHead):
        return score_company(run, model, examples, told.company, chosen)
    nll, count = core.score(run, model, examples, told and told.table, whole)
    if chosen is not None:
        nll, count = nll * chosen, count * chosen
    return nll, count


@torch.no_grad()
def score_company(run, model, examples, company, chosen=None):
    """The same for a cache, which reads rows beside those that are scored."""
    nll = torch.zeros(len(examples), dtype=torch.float64)
    count = examples.length - examples.prompt
    order = examples.length.argsort(stable=True)  # little padding in a batch
    if chosen is not None:
        order, count = order[chosen[order]], count * chosen
    if len(company.members) < len(examples):  # each cluster is read once
        order = order[company.cluster[order].argsort(stable=True)]
    for index in order.split(ROWS)[run.rank::run.world]:
        batch = company_batch(model.lm_head, examples, company, index)
        with autocast(run):
            nll[index] = cache.losses(model, *batch)[1][:len(index)].double().cpu()
    if run.world > 1:
        nll = nll.to(run.device)
        dist.all_reduce(nll)
    return nll.cpu(), count


def company_batch(head, examples, company, index):
    """All that `cache.losses` takes of the rows `index` (B,). Rows that the head has to read beside
    them follow, unscored."""
    rows, *told = head.told(examples, index, *company.kept(index))
    inputs, targets = examples.batch(rows)
    targets[len(index):] = IGNORE
    return inputs, targets, *told
