"""A statistic that keeps the words: how often each token stands in the prompts of a cluster.

A mean of token embeddings no longer knows which tokens it was made of. Here a cluster's statistic
is its token counts c (V,), and the update of the head is of rank 1, B = b and A = a trained gate:

    logits = W h + gate(h) b,    b_w = log( (c_w + m g_w) / (sum(c) + m) / g_w )

b compares a token's frequency in the cluster, smoothed by m pseudo-counts, with its frequency g in
the training text; the gate, linear in h, says where that matters. It is the unigram rescaling of
fast marginal adaptation (Kneser, Peters & Klakow 1997) with a gate in place of their exponent. One
such update is made for a request's cluster and one for the request itself, beside static LoRA.

In the `running` scope the counts grow while the requests of a cluster are decoded in step: every
`refresh` tokens, what all of them have produced by then is counted too. A token then moves only
logits, its mates' included, that are made after it.
"""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from cluster import kmeans
from files import UserError
from hypernet import product_type, table
from model import LoRAHead, Update

TERMS = 2  # the request's own counts, and its cluster's


class CountsHead(LoRAHead):
    """Static LoRA on the head and two gated log-ratios of token counts.

    rank * (C + V) + 2 (C + 2) parameters, and two buffers (V,): g, and the inverse document
    frequencies that weigh tokens for clustering.
    """

    needs_statistics, clustered_batches = True, False

    def __init__(self, weight, rank, alpha, scope="running", refresh=16):
        super().__init__(weight, rank, alpha)
        V, C = weight.shape
        self.scope, self.refresh = scope, refresh
        self.gate = nn.Parameter(torch.zeros(TERMS, C, device=weight.device))
        self.gate_bias = nn.Parameter(torch.zeros(TERMS, device=weight.device))
        self.log_mass = nn.Parameter(torch.full((TERMS,), math.log(64), device=weight.device))
        self.register_buffer("frequency", torch.full((V,), 1 / V, device=weight.device))
        self.register_buffer("idf", torch.ones(V, device=weight.device))

    def read(self, examples, embedding):
        return examples

    def fit_clusters(self, examples, k, generator):
        """Cluster (N,) of the training examples; measures token frequencies on the way."""
        V = len(self.idf)
        tokens = torch.zeros(V)
        documents = torch.zeros(V)
        for rows in torch.arange(len(examples)).split(1024):
            row, token, _ = self.seen(examples, rows, "full")
            tokens += torch.bincount(token, minlength=V)
            row, token, _ = self.seen(examples, rows, "prompt")
            documents += torch.bincount(torch.unique(row * V + token) % V, minlength=V)
        self.frequency.copy_((tokens + 1) / (tokens + 1).sum())
        self.idf.copy_(torch.log((len(examples) + 1) / (documents + 1)))
        return self.group(examples, k, generator)

    def group(self, examples, k, generator):
        """Cluster (N,) by k-means on tf-idf vectors, each first drawn towards its neighbours."""
        if k is None:
            raise UserError("--inference assign: counts keeps no centroids to assign to; use fit")
        V, idf = len(self.idf), self.idf.cpu()
        features = table(len(examples), V)
        for rows in torch.arange(len(examples)).split(1024):
            row, token, _ = self.seen(examples, rows, "prompt")
            count = torch.bincount(row * V + token, minlength=len(rows) * V).view(-1, V)
            features[rows] = F.normalize(count.float().log1p() * idf, dim=1)
        dtype = product_type(self.weight.device)
        features = diffuse(features.to(self.weight.device), dtype)
        cluster = kmeans(features, min(k, len(examples)), generator, dtype=dtype).cluster.cpu()
        return cluster.unique(return_inverse=True)[1]

    def seen(self, examples, index, scope=None):
        """Row (n,) within `index` (B,), token (n,) and segment (n,) of what may be counted.

        Segment 0 is the prompt, then follow `refresh` tokens of the continuation each; what is
        predicted in a segment may know the segments before it and, of 0, itself.
        """
        scope = scope or self.scope
        index = np.asarray(index)
        tokens, real = examples.rows(index)
        prompt, shown = (torch.from_numpy(column[index, None])
                         for column in (examples.prompt, examples.shown))
        place = torch.arange(tokens.shape[1])  # (W,)
        offset = place - prompt  # (B, W)
        if scope != "full":
            real = real & ((place < shown) | (offset >= 0))
        segment = (offset.div(self.refresh, rounding_mode="floor") + 1).clamp(min=0)
        if scope != "running":
            real = real if scope == "full" else real & (offset < 0)
            segment = torch.zeros_like(segment)
        return real.nonzero()[:, 0], tokens[real], segment[real]

    def counts(self, examples, index, group, K, S):
        """Token counts (K, S, V) of K groups of examples, as of each of S segments."""
        V = len(self.idf)
        row, token, segment = self.seen(examples, index)
        place = ((group[row] * S + segment) * V + token)[segment < S]
        return torch.bincount(place, minlength=K * S * V).view(K, S, V).cumsum(dim=1)

    def told(self, examples, index, which, members, group):
        """Statistics (B S, 2, V) of the rows `index`, and of each target (B, T) which is its.

        which (B,) names each row's cluster, group (M,) that of each of the `members` (M,).
        """
        B, K = len(index), int(which.max()) + 1
        index = np.asarray(index)
        prompt = torch.from_numpy(examples.prompt[index, None])
        offset = torch.arange(1, int(examples.length[index].max())) - prompt  # (B, T)
        segment = torch.zeros_like(offset)
        if self.scope == "running":
            segment = offset.clamp(min=0) // self.refresh
        S = int(segment.max()) + 1 if segment.numel() else 1
        own = self.counts(examples, index, torch.arange(B), B, S)
        company = torch.zeros_like(own)
        if len(members):
            company = self.counts(examples, members, group, K, S)[which]
        statistics = torch.stack([own, company], dim=2).flatten(0, 1).float()  # (B S, 2, V)
        return statistics, torch.arange(B)[:, None] * S + segment

    def updates(self, statistics):
        mass, g = self.log_mass.exp()[:, None], self.frequency
        total = statistics.sum(dim=2, keepdim=True)  # (K, 2, 1)
        b = torch.log((statistics + mass * g) / ((total + mass) * g))  # (K, 2, V)
        return [*super().updates(), Update(self.gate, b.mT, self.gate_bias)]


def diffuse(features, dtype, neighbours=5, rounds=8):
    """Features (N, V), of length 1, each replaced `rounds` times by the mean of its nearest.

    Short prompts of one article share few words; those that share some bring the others together.
    The graph of neighbours is made once, by N^2 V multiply-adds.
    """
    low, chunks = features.to(dtype), torch.arange(len(features)).split(512)
    near = [(low[rows] @ low.T).float().topk(min(neighbours + 1, len(low)), dim=1)
            for rows in chunks]  # (n, N) -> (n, m)
    for _ in range(rounds):
        mixed = torch.empty_like(features)
        for rows, (weight, index) in zip(chunks, near, strict=True):
            near_by = weight.clamp(min=0)[:, :, None] * features[index]  # (n, m, V)
            mixed[rows] = F.normalize(near_by.sum(dim=1), dim=1)
        features = mixed
    return features
