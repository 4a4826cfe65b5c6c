"""Exercise 12, one way: a trained update of low rank, of which a cluster gets more or less in each
direction, and a bias that the statistic writes."""

import torch
import torch.nn as nn

from model import LMHead, lora_factors


class MyHead(LMHead):
    def __init__(self, weight, rank, alpha, n_clusters):
        super().__init__(weight)
        V, C = weight.shape
        self.scale = alpha / rank
        self.A, self.B = lora_factors(C, V, 8 * rank)
        self.gate = nn.Linear(C, 8 * rank)
        self.bias = nn.Linear(C, V, bias=False)
        nn.init.zeros_(self.bias.weight)
        for name, shape in (("center", (C,)), ("spread", (C,)), ("clusters", (n_clusters, C))):
            self.register_buffer(name, torch.zeros(shape))

    def remember(self, means, clusters):
        self.center.copy_(means.mean(dim=0))
        self.spread.copy_(means.std(dim=0))
        self.clusters.copy_(clusters)

    def forward(self, hidden, statistics):
        s = (statistics - self.center) / self.spread  # (B, C)
        z = hidden @ self.A.T * self.gate(s)[:, None]  # (B, T, 8 r)
        return super().forward(hidden) + self.scale * z @ self.B.T + self.bias(s)[:, None]
