"""What the laboratory's models have beyond the core's: sizes, soft prompts, a head by itself.

The dimension key (B, T, C, V, H, r, K, P, N) is at the top of the core's model.py.
"""

import math
from dataclasses import replace

import torch
import torch.nn as nn

import model as core
from model import GPTConfig, choose_token

__all__ = ["GPT", "SIZES", "GPTConfig", "HeadAlone", "generate_anew"]

# The core's, but for "pico", which results/ has in this shape; block_size is the default.
SIZES = {
    "pico": dict(n_layer=2, n_head=3, n_embd=48, block_size=256),
    "nano": core.SIZES["nano"] | {"block_size": 256},
    "small": core.SIZES["small"] | {"block_size": 512},
    "medium": dict(n_layer=8, n_head=8, n_embd=512, block_size=256),
    "gpt2": core.SIZES["gpt2"] | {"block_size": 1024},
}


class GPT(core.GPT):
    """The core's, which reads a head's soft prompts, where it has any, before the tokens."""

    def __init__(self, config):
        super().__init__(config)
        for name, p in self.named_parameters():  # so started the bases of results/
            if name.endswith("c_proj.weight"):  # drawn twice
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:  # whatever the width
                p.data *= math.sqrt(config.n_embd / 768)

    def forward(self, tokens, statistics=None, start=0, cache=None, position=None):
        """Logits (B, T - start, V), as the core's; soft prompts go without a cache."""
        if not hasattr(self.lm_head, "soft_prompts"):
            return super().forward(tokens, statistics, start, cache, position)
        body = self.transformer
        place = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        x = body.wte(tokens) + body.wpe(place)  # (B, T, C)
        soft = self.lm_head.soft_prompts(statistics)  # (B, n, C), at no position
        x = torch.cat([soft.to(x.dtype), x], dim=1)  # (B, n + T, C)
        for block in body.h:
            x = block(x)
        hidden = body.ln_f(x[:, soft.shape[1]:])  # (B, T, C)
        return self.lm_head(hidden[:, start:], statistics)


class HeadAlone(nn.Module):
    """A model whose transformer has run already: in place of tokens it reads last hidden states."""

    def __init__(self, config, lm_head):
        super().__init__()
        self.config, self.lm_head = replace(config, n_layer=0), lm_head

    def forward(self, states, statistics=None, start=0):
        return self.lm_head(states[:, start:], statistics)  # (B, T, C) -> (B, T - start, V)


@torch.no_grad()
def generate_anew(next_logits, prompts, max_new_tokens, context, device, temperature=0.0,
                  top_k=None, stop_token=None, generator=None):
    """As the core's `generate`, but each step computes all again: for what no cache is made for.

    next_logits(tokens, length) -> logits (B, V) of the token after the first length (B,) tokens of
    each row; tokens (B, room) hold anything beyond these. `stop_token` is kept among a row's
    tokens, but not returned. `context` is the most that a row may hold.
    """
    if not all(0 < len(prompt) < context for prompt in prompts):
        raise ValueError(f"prompts must have from 1 to {context - 1} tokens")
    room = min(max(map(len, prompts)) + max_new_tokens, context)
    tokens = torch.tensor([prompt + [0] * (room - len(prompt)) for prompt in prompts],
                          device=device)  # (B, room)
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
    going = torch.ones_like(length, dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits = next_logits(tokens[:, :int(length.max())], length).float()
        chosen = choose_token(logits, temperature, top_k, generator)  # (B,)
        row = going.nonzero()[:, 0]
        tokens[row, length[row]] = chosen[row]
        length = length + going
        going = going & (length < context) & (chosen != (-1 if stop_token is None else stop_token))
        if not going.any():
            break
    new = [row[len(prompt):n] for row, prompt, n in
           zip(tokens.tolist(), prompts, length.tolist(), strict=True)]
    return [text[:-1] if text and text[-1] == stop_token else text for text in new]
