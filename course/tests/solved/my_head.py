"""Exercise 12, one way: a written update of low rank, and a bias that the statistic chooses."""

import torch.nn as nn

from model import LMHead, lora_factors


class MyHead(LMHead):
    rate = 1e-2

    def __init__(self, weight, rank, statistics):
        super().__init__(weight)
        V, C = weight.shape
        self.register_buffer("center", statistics.mean(dim=0))
        self.register_buffer("spread", statistics.std(dim=0).clamp(min=1e-6))
        self.A, self.B = lora_factors(C, V, 16)
        self.gate = nn.Linear(C, 16)  # how much of each of 16 directions a cluster gets
        self.bias = nn.Linear(C, V, bias=False)
        nn.init.zeros_(self.bias.weight)

    def forward(self, hidden, statistics):
        s = (statistics - self.center) / self.spread  # (B, C)
        z = hidden @ self.A.T * self.gate(s)[:, None]  # (B, T, 16)
        return super().forward(hidden) + 4 * z @ self.B.T + self.bias(s)[:, None]
