"""The rivals: other ways to adapt the head to a cluster, or not to need to.

Each is called as `ChameleonHead` is and told the same statistic, so that a table compares ideas
and nothing else. "lora-match" is `LoRAHead` with as many trained parameters as chameleon, and a
row's own cache stands in cache.py.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from lab.cluster import kmeans
from lab.hypernet import ChameleonHead, ClusteredHead, HyperNetwork
from lab.model import Update, lora_factors


class PerSampleHead(ChameleonHead):
    """A hyper-network that reads one example at a time: every request is its own cluster.

    As Hyperdecoders (Ivison & Peters 2022), which write adapters for each input; simplified to
    the head and to chameleon's network and statistic. Told the instruction alone (--condition
    instruction) it is "task-embedding", a hyper-network that reads a description of the task.
    """

    clustered_batches = stores_clusters = False
    controls = ("shuffled",)

    def fit_clusters(self, prompts, k, generator):
        super().fit_clusters(prompts, 1, generator)
        return self.group(prompts)

    def group(self, prompts, k=None, generator=None):
        return torch.arange(len(prompts.mean))


class ScaledHead(ClusteredHead):
    """logits = W h + (alpha / rank) B diag(d(s)) A h: A and B are trained, as LoRA's are, and the
    network writes only the r numbers d between them.

    As Zhyper (Abdalla et al. 2025), which modulates shared factors by a vector per context;
    simplified to the head. rank (C + V) parameters and the network's.
    """

    def __init__(self, weight, rank, alpha, n_clusters=1, scope="prompt"):
        super().__init__(weight, n_clusters, scope)
        V, C = weight.shape
        self.scale = alpha / rank
        self.lora_A, self.lora_B = lora_factors(C, V, rank, weight.device)
        self.hypernetwork = HyperNetwork(C, torch.ones(rank)).to(weight.device)

    def updates(self, statistics):
        d = self.hypernetwork(self.standardised(statistics))  # (K, C) -> (K, r)
        return [Update(self.scale * d[:, :, None] * self.lora_A, self.lora_B)]


class MaskedHead(ClusteredHead):
    """logits = W h + (alpha / rank) B diag(m(s)) A h, with m a blend of M masks over the rank.

    The factors have rank M times `rank`. Training clusters are put into M groups by k-means; a
    selector (M, C), at first the groups' centroids, compares the statistic to each, and a softmax
    of the cosines / `temperature` blends.

    kind: "masks", changeable masks that are trained together with the selector, every example
        with the blend that it will get at inference;
    "masks-alone": the same, but each mask is trained on its own group's examples alone, so that a
        blend is first seen at inference;
    "library": the masks are fixed blocks, so that these are M separate LoRAs of rank `rank`, one
        for each group (as LoraHub, Huang et al. 2023, and LoraRetriever, Zhao et al. 2024),
        trained on its own group and used alone at inference, or, in eval.py's row "blended",
        mixed.

    M = 8, or as many as there are clusters. The masks alone take M * M rank numbers, the factors
    M rank (C + V).
    """

    M, temperature = 8, 0.1

    def __init__(self, weight, rank, alpha, kind, n_clusters=1, scope="prompt"):
        super().__init__(weight, n_clusters, scope)
        V, C = weight.shape
        self.M = min(self.M, n_clusters)
        self.scale, self.kind, self.blend = alpha / rank, kind, kind != "library"
        self.controls = ("blended",) if kind == "library" else ()
        self.lora_A, self.lora_B = lora_factors(C, V, self.M * rank, weight.device)
        block = torch.eye(self.M, device=weight.device).repeat_interleave(rank, dim=1)
        selector = torch.zeros(self.M, C, device=weight.device)
        if kind == "library":
            self.register_buffer("masks", block)
        else:
            self.masks = nn.Parameter(torch.ones_like(block))
        if kind == "masks":
            self.selector = nn.Parameter(selector)
        else:
            self.register_buffer("selector", selector)

    def fit_clusters(self, prompts, k, generator):
        cluster = super().fit_clusters(prompts, k, generator)
        groups = kmeans(self.centroids, self.M, generator).centroids  # of centroids (K, C)
        self.selector.data.copy_(F.normalize(groups, dim=1))
        return cluster

    def weights(self, statistics):
        """Share (K, M) of each mask in the blend of each cluster."""
        s = F.normalize(statistics - self.center, dim=1)
        cosine = s @ F.normalize(self.selector, dim=1).T  # (K, C) @ (C, M) -> (K, M)
        alone = not self.blend or (self.training and self.kind != "masks")
        if alone:
            return F.one_hot(cosine.argmax(dim=1), self.M).to(cosine)
        return (cosine / self.temperature).softmax(dim=1)

    def updates(self, statistics):
        m = self.weights(statistics) @ self.masks  # (K, M) @ (M, M r) -> (K, M r)
        return [Update(self.scale * m[:, :, None] * self.lora_A, self.lora_B)]


class PromptTuningHead(ClusteredHead):
    """The network writes n = 8 soft prompt vectors, which the transformer reads before the tokens.

    As HyperPrompt (He et al. 2022), which writes prompts for every layer from a task's embedding;
    simplified to the input, and to chameleon's statistic. The head itself stays frozen.
    """

    n = 8

    def __init__(self, weight, n_clusters=1, scope="prompt"):
        super().__init__(weight, n_clusters, scope)
        start = torch.randn(self.n * weight.shape[1]) * 0.02  # as large as a token's embedding
        self.hypernetwork = HyperNetwork(weight.shape[1], start).to(weight.device)

    def soft_prompts(self, statistics, cluster=None):
        out = self.hypernetwork(self.standardised(statistics))
        return out.view(len(out), self.n, -1)[cluster]  # (K, n C) -> (B, n, C)
