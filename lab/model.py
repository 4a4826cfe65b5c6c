"""A GPT-2-shaped language model, and LoRA by hand.

The model is GPT-2's (Radford et al. 2019): pre-norm blocks, learned positions, tanh GELU, an LM
head tied to the token embedding. Parameters carry the names of the published checkpoints.
LoRA (Hu et al. 2021) follows section 4.1 of its paper: the frozen W gets a trained low-rank
companion, W + (alpha / rank) B A, with A random and B zero, so that training starts at W.

Departures from GPT-2: no dropout inside attention (on a CPU it switches off the fast attention
kernel), and weights are stored (out, in) as torch does.

Dimension key, for the whole project:
    B  sequences in a batch          C  n_embd, width of the model     r  LoRA rank
    T  tokens in a sequence          V  vocabulary                     K  clusters
    P  prompt tokens                 H  attention heads                N  examples in a data set
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """Shape of a GPT; `dropout` acts on the embedding and on each residual branch."""

    block_size: int = 256
    vocab_size: int = 4096
    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 192
    dropout: float = 0.0


# The vocabulary comes from the tokenizer. "gpt2" is the published 124M model.
SIZES = {
    "pico": dict(n_layer=2, n_head=3, n_embd=48, block_size=256),
    "nano": dict(n_layer=4, n_head=3, n_embd=192, block_size=256),
    "small": dict(n_layer=6, n_head=6, n_embd=384, block_size=512),
    "medium": dict(n_layer=8, n_head=8, n_embd=512, block_size=256),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),
}


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, mask=None):
        B, T, C = x.shape
        # (B, T, 3C) -> 3 x (B, H, T, C/H)
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, keys, C/H)
        y = attend(q, k, v, mask).transpose(1, 2).reshape(B, T, C)  # (B, H, T, C/H) -> (B, T, C)
        return self.dropout(self.c_proj(y))


def attend(q, k, v, mask=None):
    """Attention of T queries q (B, H, T, C/H) over k and v (B, H, keys, C/H) -> (B, H, T, C/H).

    Causal where no mask (B, 1, T, keys) is given; a single query without one sees all keys.

    Written out for 16-bit rows on a CPU: there plain products take a third of the fused kernel's
    time, at the price of keeping T^2 probabilities, so longer rows are left to the kernel.
    """
    B, H, T, D = q.shape
    if T == 1:  # a CPU's fused kernel takes three times as long where it has nothing to tile
        scores = (q / math.sqrt(D)) @ k.mT  # (B, H, 1, C/H) @ (B, H, C/H, keys)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(dim=3) @ v  # (B, H, 1, keys) @ (B, H, keys, C/H)
    if mask is not None or q.device.type != "cpu" or q.element_size() > 2 or T > 512:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    later = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    q, k, v = (x.flatten(0, 1) for x in (q / math.sqrt(D), k, v))  # (B H, T, C/H)
    scores = torch.baddbmm(later.expand(B * H, T, T), q, k.mT)  # (B H, T, T)
    return (scores.softmax(dim=2) @ v).view(B, H, T, D)  # (B H, T, T) @ (B H, T, C/H)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, C) -> (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class Update(NamedTuple):
    """A low-rank change of the head's W: logits get B A h more.

    A and B are shared by all sequences, (r, C) and (V, r), or one per cluster, (K, r, C) and
    (K, V, r).
    """

    A: torch.Tensor
    B: torch.Tensor

    def of(self, cluster):
        """The same with each sequence's own A and B, gathered by cluster (B,)."""
        A, B = (t if t.dim() == 2 else t[cluster] for t in (self.A, self.B))
        return Update(A, B)


class LMHead(nn.Module):
    """logits = W h, and more for each of `updates`. W is frozen while an adapter is trained.

    Every head of the project is called as this one is, and differs in its updates alone, which
    may be made from statistics of the clusters.
    """

    needs_statistics = clustered_batches = reads_company = stores_clusters = False
    controls = ()  # what eval.py may tell it in place of its cluster, see `Company`

    def __init__(self, weight):
        super().__init__()
        self.weight = weight  # (V, C), the token embedding itself

    def soft_prompts(self, statistics=None, cluster=None):
        """Vectors (B, n, C) that the transformer reads before each sequence's tokens, or None."""
        return None

    def updates(self, statistics=None):
        """A list of `Update`s, made once for any number of calls."""
        return []

    def forward(self, hidden, updates=(), cluster=None, statistics=None):
        """Logits (B, T, V) of hidden (B, T, C). statistics: what `updates` were made from.

        cluster (B,) names each sequence's A and B; without it there are one for all, or one for
        each sequence in turn.
        """
        logits = F.linear(hidden, self.weight)  # (B, T, C) @ (C, V) -> (B, T, V)
        for update in updates:
            update = update if cluster is None else update.of(cluster)
            z = hidden @ update.A.mT  # (B, T, C) @ (C, r) or (B, C, r) -> (B, T, r)
            logits = logits + z @ update.B.mT  # (B, T, r) @ (r, V) or (B, r, V) -> (B, T, V)
        return logits


class LoRAHead(LMHead):
    """logits = W h + (alpha / rank) B A h, with A (r, C) and B (V, r) trained.

    rank * (C + V) parameters. It cannot be merged: W is also the token embedding, and adding the
    update to it would change what the model reads, not only what it predicts.
    """

    def __init__(self, weight, rank, alpha):
        super().__init__(weight)
        V, C = weight.shape
        self.scale = alpha / rank
        self.lora_A, self.lora_B = lora_factors(C, V, rank, weight.device)

    def updates(self, statistics=None):
        return [Update(self.scale * self.lora_A, self.lora_B)]


class GPT(nn.Module):
    """Decoder-only transformer; `lm_head` may be exchanged for any head with LMHead's call."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = LMHead(self.transformer.wte.weight)
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 n_layer branches add up: keep their sum's scale
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def hidden(self, tokens, cache=None, pad=None, soft=None):
        """Last hidden states (B, T, C) of token ids (B, T).

        `cache` is a list of one `KVCache` per layer; tokens then continue what it holds. `pad`
        (B,) counts the padding tokens at the left of each sequence, which nothing attends to.
        `soft` (B, n, C), without a cache, are vectors to read first, at no position.
        """
        T = tokens.shape[1]
        past = cache[0].length if cache else 0
        position = torch.arange(past, past + T, device=tokens.device)  # (T,)
        key = torch.arange(cache[0].room if past else T, device=tokens.device)  # (keys,)
        mask = key <= position[:, None] if past else None  # (T, keys); None is causal as well
        if pad is not None:
            # A padding query may see itself: a row of nothing but masked keys would be NaN.
            real = (key >= pad[:, None, None]) | (key == position[:, None])  # (B, T, keys)
            mask = ((key <= position[:, None]) & real)[:, None]  # (B, 1, T, keys)
            # Padding has no position, nor has what follows a full context: neither is read.
            position = (position - pad[:, None]).clamp(0, self.config.block_size - 1)  # (B, T)
        x = self.transformer.wte(tokens) + self.transformer.wpe(position)  # (B, T, C)
        if soft is not None:
            x = torch.cat([soft.to(x.dtype), x], dim=1)  # (B, n + T, C)
            if mask is not None:  # all may see them, and they themselves only what is before them
                causal = mask.new_ones(x.shape[1], x.shape[1]).tril()
                mask = F.pad(mask, (soft.shape[1], 0, soft.shape[1], 0), value=True) & causal
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache[layer] if cache else None, mask)
        return self.transformer.ln_f(x[:, -T:])

    def forward(self, tokens, statistics=None, cluster=None):
        """Logits (B, T, V) of token ids (B, T); statistics (K, C) and cluster (B,) adapt them."""
        hidden = self.hidden(tokens, soft=self.lm_head.soft_prompts(statistics, cluster))
        return self.lm_head(hidden, self.lm_head.updates(statistics), cluster, statistics)


class HeadAlone(nn.Module):
    """A model whose transformer has run already: in place of tokens it reads last hidden states."""

    def __init__(self, config, lm_head):
        super().__init__()
        self.config, self.lm_head = replace(config, n_layer=0), lm_head

    def hidden(self, states, soft=None):
        return states  # (B, T, C)


# ---------------------------------------------------------------------------------------- LoRA


def lora_factors(n_in, n_out, rank, device=None):
    """A (rank, n_in) random, B (n_out, rank) zero: their product starts at zero."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    A = nn.Parameter(torch.empty(rank, n_in, device=device))
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, nn.Parameter(torch.zeros(n_out, rank, device=device))


class LoRALinear(nn.Module):
    """A frozen linear layer and its update: y = W x + b + (alpha / rank) B A x.

    Takes over the parameters of `linear`, under the same names. rank * (in + out) parameters
    are trained.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)  # (out, in)
        self.bias = linear.bias.requires_grad_(False)  # (out,)
        self.scale = alpha / rank
        self.merged = False
        n_out, n_in = linear.weight.shape
        self.lora_A, self.lora_B = lora_factors(n_in, n_out, rank, linear.weight.device)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)  # (..., in) -> (..., out)
        if self.merged:
            return y
        z = F.linear(x, self.lora_A).flatten(0, -2)  # (..., in) @ (in, r) -> (tokens, r)
        # (tokens, out) + (tokens, r) @ (r, out), in one pass over the large tensor
        return torch.addmm(y.flatten(0, -2), z, self.lora_B.T, alpha=self.scale).view_as(y)

    @torch.no_grad()
    def set_merged(self, merged):
        if merged != self.merged:
            sign = 1 if merged else -1
            self.weight += sign * self.scale * (self.lora_B @ self.lora_A)  # (out, r) @ (r, in)
            self.merged = merged


def add_lora(model, rank, alpha):
    """Freeze `model` and put a `LoRALinear` in place of each linear layer of its transformer.

    The LM head and the embeddings stay as they are. Raises ValueError if no layer matches.
    """
    model.requires_grad_(False)
    body = model.transformer
    found = [(name, m) for name, m in body.named_modules() if isinstance(m, nn.Linear)]
    if not found:
        raise ValueError("add_lora found no linear layer (has the model LoRA already?)")
    for name, linear in found:
        body.set_submodule(name, LoRALinear(linear, rank, alpha))
    return model


def merge_lora(model, merged=True):
    """Add each LoRA update of the transformer to its weight, for speed; twice is once.

    The weights hold the update afterwards, so this is never done in passing: not by train() or
    eval(), and not to the head (see `LoRAHead`).
    """
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.set_merged(merged)


def unmerge_lora(model):
    """Undo `merge_lora`, up to rounding; twice is once."""
    merge_lora(model, merged=False)


# ---------------------------------------------------------------------------------- generation


class KVCache:
    """Keys and values of one layer, (B, H, room, C/H) each: `length` tokens, then zeros.

    A whole block of memory from the start: nothing is copied to make it longer, and its products
    need no copy either, as they would for a part of it. `GPT.hidden` masks what is not yet there.
    """

    def __init__(self, room):
        self.room, self.length = room, 0

    def append(self, k, v):
        """Keys and values that new ones (B, H, T, C/H) see: themselves, or, later, all the room."""
        start, self.length = self.length, self.length + k.shape[2]
        if start == 0:
            B, H, _, D = k.shape
            self.k, self.v = k.new_zeros(B, H, self.room, D), v.new_zeros(B, H, self.room, D)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return (self.k, self.v) if start else (k, v)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, *, statistics=None, cluster=None, temperature=0.0,
             top_k=None, stop_token=None, generator=None, use_cache=True):
    """Continue each prompt; returns a list of lists of new token ids.

    prompts: B lists of token ids, of any lengths; statistics (K, C) and cluster (B,), or who knows
    what whom has said (B, B), adapt the head. temperature 0 takes the most likely token; otherwise
    one is drawn, with `generator`, from the `top_k` most likely at that temperature. A sequence
    ends before `stop_token`, after max_new_tokens, or where the context is full. Raises ValueError
    for an empty prompt and for one that fills the context.

    For bfloat16 give it a model after `model.transformer.to(torch.bfloat16)`, which leaves the
    hyper-network as it is: autocast would convert every frozen weight anew for each token.
    """
    device = next(model.parameters()).device
    context = model.config.block_size
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    if shortest == 0:
        raise ValueError("an empty prompt cannot be continued")
    if longest >= context:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in a context of {context}")
    # Prompts are padded at the left, so that all sequences grow at the right together.
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    masked = pad if shortest < longest else None  # without padding there is nothing to mask
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    soft = model.lm_head.soft_prompts(statistics, cluster)
    use_cache = use_cache and soft is None
    room = min(longest + max_new_tokens, context + longest - shortest)
    cache = [KVCache(room) for _ in model.transformer.h] if use_cache else None
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    updates = model.lm_head.updates(statistics)
    if cluster is not None and not model.lm_head.reads_company:  # gathered just once
        updates = [update.of(cluster) for update in updates]
    updates = [Update(*(t.to(model.lm_head.weight.dtype) for t in update)) for update in updates]
    new, past = tokens, None  # past: all hidden states (B, T, C), for a head that remembers them
    while tokens.shape[1] < longest + max_new_tokens and not done.all():
        hidden = model.hidden(new if use_cache else tokens, cache, masked, soft)
        if model.lm_head.reads_company:
            past = hidden if past is None or not use_cache else torch.cat([past, hidden], dim=1)
            stop = -1 if stop_token is None else stop_token
            told = model.lm_head.decoding(tokens, pad, longest, stop, context)
            logits = model.lm_head(past, updates, cluster, told, past.shape[1] - 1)[:, 0]  # (B, V)
        else:
            last = hidden[:, -1:].contiguous()  # else torch copies a frozen W once per sequence
            logits = model.lm_head(last, updates)[:, 0].float()  # (B, V)
        if temperature == 0:
            new = logits.argmax(dim=1, keepdim=True)  # (B, 1)
        else:
            if top_k is not None:
                kept = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                logits = logits.masked_fill(logits < kept, -math.inf)
            logits = (logits - logits.amax(dim=1, keepdim=True)) / max(temperature, 1e-30)
            new = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)  # (B, 1)
        if stop_token is not None:
            new = new.masked_fill(done[:, None], stop_token)  # its mates learn nothing from it
            done |= new[:, 0] == stop_token
        tokens = torch.cat([tokens, new], dim=1)
        done |= tokens.shape[1] - pad >= context
    continuations = [row[: context - len(prompt)]
                     for row, prompt in zip(tokens[:, longest:].tolist(), prompts, strict=True)]
    return [c[: c.index(stop_token)] if stop_token in c else c for c in continuations]
