"""The method: the statistic of a cluster in, a low-rank update of the LM head out.

ChameleonLLM (Yuksel & Sawaf 2025, arXiv 2502.04315; published code, class LoRALinearHyper): the
requests of a cluster are summed up by a mean of their token embeddings, and a small network turns
that mean into the factors of a LoRA update of the LM head, made for this cluster and thrown away.

    prompts -> means (N, C) -> clusters (N,) -> statistics (N, C) -> A (B, r, C), B (B, V, r)
            -> logits = W h + (alpha / rank) B A h

A row carries its statistic: one vector (C,), the same for all rows of a cluster. What the rows are
told is a table (N, C), so a control is another table, and no score depends on the other rows in a
batch.

Departures from the published code: the mean is taken over prompt tokens only, never over tokens to
be predicted; every token weighs alike, not every request; statistics are standardised, which the
network's dropout of 0.5 gives way to; and the network starts as plain LoRA, A random and B zero
whatever the statistic, so that the first logits are the frozen head's.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LMHead, lora_factors


# ---------------------------------------------------------------------------------- statistics


@torch.no_grad()
def prompt_means(rows, embedding):
    """Mean embedding (N, C) of each row's prompt tokens, and their number (N,).

    rows: see data.py; embedding (V, C), the frozen base's. This is all that a statistic ever sees
    of a row: no token of a continuation.
    """
    mean = []
    for index in torch.arange(len(rows)).split(1024):
        tokens, real = rows.prompts(index)  # (B, P) each
        total = F.embedding_bag(tokens.to(embedding.device), embedding, mode="sum",
                                per_sample_weights=real.to(embedding))  # (B, P) -> (B, C)
        mean.append(total.cpu() / real.sum(dim=1, keepdim=True))
    return torch.cat(mean), rows.prompt.float()


def features(means, center):
    """What k-means clusters: mean embeddings, less the corpus's, on the unit sphere (N, C)."""
    return F.normalize(means - center, dim=1)


def cluster_means(means, count, cluster, K):
    """Each cluster's statistic (K, C): the mean embedding of all its prompt tokens.

    means (N, C) and count (N,) are each row's, cluster (N,) from 0 to K - 1. Every token weighs
    alike, so this is not a mean of means. A cluster without a row gets the mean of all.
    """
    weighted = means * count[:, None]  # (N, C), sums over each row's tokens
    total = means.new_zeros(K, means.shape[1]).index_add_(0, cluster, weighted)  # (N, C) -> (K, C)
    n = count.new_zeros(K).index_add_(0, cluster, count)[:, None]  # (N,) -> (K, 1)
    return torch.where(n > 0, total / n.clamp(min=1), weighted.sum(dim=0) / count.sum())


def cluster_statistics(means, count, cluster):
    """Each row's statistic (N, C): that of the cluster that it is in."""
    return cluster_means(means, count, cluster, int(cluster.max()) + 1)[cluster]


# --------------------------------------------------------------------------------- the network


class HyperNetwork(nn.Sequential):
    """C -> 64 -> 32 -> n_out with two ReLUs, as in the published code: (B, C) -> (B, n_out).

    64 C + 64 + 64 * 32 + 32 + 33 n_out parameters: the output layer is nearly all of them. Its
    weights, which make the output depend on the statistic, start at zero; its bias is `start`
    (n_out,), which is what an untrained network writes.
    """

    def __init__(self, n_in, start):
        super().__init__(nn.Linear(n_in, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),
                         nn.Linear(32, len(start)))
        nn.init.zeros_(self[-1].weight)
        self[-1].bias.data.copy_(start)


class ChameleonHead(LMHead):
    """logits = W h + (alpha / rank) B(s) A(s) h, where s is the statistic of the row's cluster.

    The network writes A (r, C) and B (V, r) whole: 33 r (C + V) parameters in its output layer.
    With GPT-2's C = 768 and V = 50,257 and r = 4 it has 6,786,596, 33 times LoRA's 204,100.
    `clusters` (K, C), the statistics of the training clusters, are kept with the weights to serve a
    request that asks alone; `center` and `spread` (C,) standardise a statistic.
    """

    def __init__(self, weight, rank, alpha, n_clusters):
        super().__init__(weight)
        V, C = weight.shape
        self.rank, self.scale = rank, alpha / rank
        A, B = lora_factors(C, V, rank)
        start = torch.cat([A.detach().flatten(), B.detach().flatten()])
        self.hypernetwork = HyperNetwork(C, start)
        for name, shape in (("center", (C,)), ("spread", (C,)), ("clusters", (n_clusters, C))):
            self.register_buffer(name, torch.zeros(shape))

    def remember(self, means, clusters):
        """Keep what inference needs of the training prompts: means (N, C), clusters (K, C)."""
        self.center.copy_(means.mean(dim=0))
        self.spread.copy_(means.std(dim=0, correction=0))
        self.clusters.copy_(clusters)

    def factors(self, statistics):
        """A (B, r, C) and B (B, V, r) for statistics (B, C)."""
        V, C = self.weight.shape
        s = (statistics - self.center) / self.spread.clamp(min=1e-6)  # (B, C)
        s = s.where(self.spread > 1e-6, 0)  # what never varied in training says nothing
        A, B = self.hypernetwork(s).split([self.rank * C, V * self.rank], dim=1)
        return A.view(-1, self.rank, C), B.view(-1, V, self.rank)  # from (B, r C) and (B, V r)

    def forward(self, hidden, statistics):
        A, B = self.factors(statistics)
        z = self.scale * hidden @ A.mT  # (B, T, C) @ (B, C, r) -> (B, T, r)
        return super().forward(hidden) + z @ B.mT  # (B, T, r) @ (B, r, V) -> (B, T, V)
