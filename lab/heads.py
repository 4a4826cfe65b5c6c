"""The rivals: other ways to adapt the head to a cluster, or not to need to.

Each is called as the core's `ChameleonHead` is, head(hidden, statistics), and told the same
statistic, so that a table compares ideas and nothing else. Those that add a low-rank update differ
in `factors` alone. "lora-match" is `LoRAHead` with as many trained parameters as chameleon,
"per-sample" a `ChameleonHead` that is told each row's own statistic (as Hyperdecoders, Ivison &
Peters 2022, which write adapters for each input), and "task-embedding" the same, told that of the
instruction alone. What brings more than a statistic to a row stands in cache.py.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from hypernet import ChameleonHead, HyperNetwork
from lab.cluster import kmeans
from model import LMHead, lora_factors


class ToldHead(ChameleonHead):
    """What `ChameleonHead` keeps of the training prompts, without its network."""

    def __init__(self, weight, rank, alpha, n_clusters=1):
        LMHead.__init__(self, weight)
        C = weight.shape[1]
        self.rank, self.scale = rank, alpha / rank
        for name, shape in (("center", (C,)), ("spread", (C,)), ("clusters", (n_clusters, C))):
            self.register_buffer(name, torch.zeros(shape))

    def standardised(self, statistics):
        s = (statistics - self.center) / self.spread.clamp(min=1e-6)  # (B, C)
        return s.where(self.spread > 1e-6, 0)  # what never varied in training says nothing


class LightHead(ToldHead):
    """logits = W h + (alpha / rank) W P(s) A(s) h: the network writes A (r, C) and P (C, r).

    33 r (2 C) parameters in its output layer, whatever the vocabulary: 254,048 in all for GPT-2. It
    can only move h within the space that W reads, W (h + scale P A h).
    """

    def __init__(self, weight, rank, alpha, n_clusters=1):
        super().__init__(weight, rank, alpha, n_clusters)
        C = weight.shape[1]
        A, P = lora_factors(C, C, rank)
        start = torch.cat([A.detach().flatten(), P.detach().flatten()])
        self.hypernetwork = HyperNetwork(C, start)

    def factors(self, statistics):
        C = self.weight.shape[1]
        A, P = self.hypernetwork(self.standardised(statistics)).chunk(2, dim=1)  # (B, r C) each
        P = P.view(-1, C, self.rank).to(self.weight.dtype)
        return A.view(-1, self.rank, C), self.weight @ P  # (V, C) @ (B, C, r) -> (B, V, r)


class ScaledHead(ToldHead):
    """logits = W h + (alpha / rank) B diag(d(s)) A h: A and B are trained, as LoRA's are, and the
    network writes only the r numbers d between them.

    As Zhyper (Abdalla et al. 2025), which modulates shared factors by a vector per context;
    simplified to the head. rank (C + V) parameters and the network's.
    """

    def __init__(self, weight, rank, alpha, n_clusters=1):
        super().__init__(weight, rank, alpha, n_clusters)
        V, C = weight.shape
        self.lora_A, self.lora_B = lora_factors(C, V, rank)
        self.hypernetwork = HyperNetwork(C, torch.ones(rank))

    def factors(self, statistics):
        d = self.hypernetwork(self.standardised(statistics))  # (B, C) -> (B, r)
        return d[:, :, None] * self.lora_A, self.lora_B  # (B, r, C), (V, r)


class MaskedHead(ToldHead):
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

    def __init__(self, weight, rank, alpha, kind, n_clusters=1):
        super().__init__(weight, rank, alpha, n_clusters)
        V, C = weight.shape
        self.M = min(self.M, n_clusters)
        self.kind, self.blend = kind, kind != "library"
        self.lora_A, self.lora_B = lora_factors(C, V, self.M * rank)
        block = torch.eye(self.M).repeat_interleave(rank, dim=1)  # (M, M r)
        if kind == "library":
            self.register_buffer("masks", block)
        else:
            self.masks = nn.Parameter(torch.ones_like(block))
        if kind == "masks":
            self.selector = nn.Parameter(torch.zeros(self.M, C))
        else:
            self.register_buffer("selector", torch.zeros(self.M, C))

    def choose_groups(self, centroids, generator):
        """Put the training clusters' centroids (K, C) into M groups."""
        self.selector.data.copy_(
            F.normalize(kmeans(centroids, self.M, generator).centroids, dim=1))

    def weights(self, statistics):
        """Share (B, M) of each mask in the blend of each statistic (B, C)."""
        s = F.normalize(statistics - self.center, dim=1)
        cosine = s @ F.normalize(self.selector, dim=1).T  # (B, C) @ (C, M) -> (B, M)
        alone = not self.blend or (self.training and self.kind != "masks")
        if alone:
            return F.one_hot(cosine.argmax(dim=1), self.M).to(cosine)
        return (cosine / self.temperature).softmax(dim=1)

    def factors(self, statistics):
        m = self.weights(statistics) @ self.masks  # (B, M) @ (M, M r) -> (B, M r)
        return m[:, :, None] * self.lora_A, self.lora_B  # (B, M r, C), (V, M r)


class PromptTuningHead(ToldHead):
    """The network writes n = 8 soft prompt vectors, which the transformer reads before the tokens.

    As HyperPrompt (He et al. 2022), which writes prompts for every layer from a task's embedding;
    simplified to the input, and to chameleon's statistic. The head itself stays frozen.
    """

    n = 8

    def __init__(self, weight, n_clusters=1):
        super().__init__(weight, 1, 1.0, n_clusters)
        start = torch.randn(self.n * weight.shape[1]) * 0.02  # as large as a token's embedding
        self.hypernetwork = HyperNetwork(weight.shape[1], start)

    def soft_prompts(self, statistics):
        out = self.hypernetwork(self.standardised(statistics))  # (B, C) -> (B, n C)
        return out.view(len(out), self.n, -1)

    def forward(self, hidden, statistics=None):
        return LMHead.forward(self, hidden)


class MadeHead(LMHead):
    """A head whose update is made: A (B, r, C) with the scale in it, B (B, V, r) or (V, r)."""

    def __init__(self, weight, A, B):
        super().__init__(weight)
        self.A, self.B = A, B

    def forward(self, hidden, statistics=None):
        z = hidden @ self.A.mT  # (B, T, C) @ (B, C, r) -> (B, T, r)
        return super().forward(hidden) + z @ self.B.mT  # (B, T, r) @ (B, r, V) -> (B, T, V)
