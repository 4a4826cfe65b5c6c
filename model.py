"""A GPT-2-shaped language model, and LoRA by hand.

The model is GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, tanh GELU, an LM head
tied to the token embedding. Parameters have the names of the published checkpoints; linear layers
are stored (out, in), as torch does. LoRA is section 4.1 of Hu et al. (2021): a frozen W gets a
trained low-rank companion, W + (alpha / rank) B A. A starts random and B zero, so that training
starts at W.

Dimension key, for the whole project:
    B  rows in a batch           C  n_embd, width of the model     r  rank
    T  tokens in a row           V  vocabulary                     K  clusters
    P  prompt tokens of a row    H  attention heads                N  rows of a split
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from common import UserError, parse_json, read_text


@dataclass
class GPTConfig:
    block_size: int = 256  # T at most
    vocab_size: int = 4096
    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 192


# The vocabulary comes from the tokenizer, T from --block-size. "gpt2" is the published shape.
SIZES = {
    "pico": dict(n_layer=2, n_head=2, n_embd=64),
    "nano": dict(n_layer=4, n_head=3, n_embd=192),
    "small": dict(n_layer=6, n_head=6, n_embd=384),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
}


# ----------------------------------------------------------------------------------------- GPT


class Attention(nn.Module):
    """Causal self-attention: softmax(q k^T / sqrt(C/H)) v, where no query sees a later key."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, position=None):
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, C) @ (C, 3C) -> (B, T, 3C)
        q, k, v = qkv.view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # (B, T, H, C/H) each
        mask = None
        if cache is not None:  # generation: k and v become those of all positions, room of them
            keys, values = cache  # (B, room, H, C/H) each
            row = torch.arange(B, device=x.device)[:, None]  # (B, 1), beside position (B, T)
            keys[row, position], values[row, position] = k.to(keys.dtype), v.to(values.dtype)
            k, v = keys, values
            place = torch.arange(k.shape[1], device=x.device)  # (room,)
            mask = (place <= position[:, :, None])[:, None]  # (B, 1, T, room)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T or room, C/H)
        # (B, H, T, C/H) @ (B, H, C/H, T or room) @ (B, H, T or room, C/H) -> (B, H, T, C/H)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, H, T, C/H) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, C) @ (C, 4C) -> (B, T, 4C)
        return self.c_proj(x)  # (B, T, 4C) @ (4C, C) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, position=None):
        x = x + self.attn(self.ln_1(x), cache, position)
        return x + self.mlp(self.ln_2(x))


class LMHead(nn.Module):
    """logits = W h. Every head of the project is called as this one is.

    weight (V, C) is the token embedding itself. hidden (B, T, C) -> logits (B, T, V); statistics
    (B, C), one vector a row, is what a head is told of the row's cluster. This one is told nothing.
    """

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, hidden, statistics=None):
        return F.linear(hidden, self.weight)  # (B, T, C) @ (C, V) -> (B, T, V)


class GPT(nn.Module):
    """Decoder-only transformer; `lm_head` may be exchanged for any head with LMHead's call."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = LMHead(self.transformer.wte.weight)
        # GPT-2's 0.02 suits its width of 768. A narrow model that starts there lingers at guessing
        # by frequency, and when it leaves that behind depends on how sums were rounded.
        std = 0.02 * math.sqrt(768 / config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 n_layer branches add up: keep their sum's scale
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, tokens, cache=None, position=None):
        """Last hidden states (B, T, C) of token ids (B, T).

        When text is generated, `cache` holds keys and values of each layer (see `generate`) and
        position (B, T) says where the tokens stand; else they stand at 0 to T - 1.
        """
        T = tokens.shape[1]
        where = torch.arange(T, device=tokens.device) if position is None else position
        x = self.transformer.wte(tokens) + self.transformer.wpe(where)  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache[layer] if cache else None, position)
        return self.transformer.ln_f(x)

    def forward(self, tokens, statistics=None, start=0, cache=None, position=None):
        """Logits (B, T - start, V) of token ids (B, T): those at the places from `start` on.

        statistics (B, C) adapts the head, row by row. The logits at place t predict token t + 1.
        """
        hidden = self.hidden(tokens, cache, position)[:, start:].contiguous()
        return self.lm_head(hidden, statistics)


# ----------------------------------------------------------------------- GPT-2's published weights

GPT2_SHAPE = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer",
              "n_head": "n_head", "n_embd": "n_embd"}
GPT2_FORM = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
             "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
             "tie_word_embeddings": True}


def find_gpt2(name, data_dir):
    """The folder DATA_DIR/NAME with config.json and model.safetensors of a published GPT-2 ("gpt2",
    "gpt2-medium" ...), fetched once from the Hugging Face Hub; UserError if it cannot be had.
    """
    folder = Path(data_dir) / name
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():
            try:
                from huggingface_hub import hf_hub_download  # comes with `datasets`

                hf_hub_download(f"openai-community/{name}", file, local_dir=folder)
            except Exception as error:  # whatever went wrong on the way, there are two ways out
                raise UserError(
                    f"{folder / file} does not exist and the Hugging Face Hub cannot be reached "
                    f"({type(error).__name__}); put it there, or use --base scratch") from None
    return folder


@torch.no_grad()
def load_gpt2(folder):
    """The GPT in a folder of the Hub's layout. UserError for a file that is no GPT-2's."""
    folder = Path(folder)
    given = parse_json(read_text(folder / "config.json"), folder / "config.json")
    for name, value in GPT2_FORM.items():
        if isinstance(given, dict) and given.get(name, value) != value:
            raise UserError(f"{folder}/config.json: {name} is {given[name]}, and GPT-2's {value}; "
                            f"this code computes no other form")
    try:
        sizes = {ours: given[theirs] for theirs, ours in GPT2_SHAPE.items()}
        model = GPT(GPTConfig(**sizes))
        index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
        if index.exists():  # large ones come in several files
            files = set(parse_json(read_text(index), index)["weight_map"].values())
        stored = {name: t for file in files for name, t in load_file(folder / file).items()}
    except (KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no GPT-2 ({type(error).__name__}: {error})") from None
    stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    for name, p in model.transformer.named_parameters():
        tensor = stored.get(name, torch.empty(0, 0))
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T  # published (in, out), here (out, in)
        if tensor.shape != p.shape:
            raise UserError(f"{folder}/model.safetensors: {name} is missing, or has another shape "
                            f"than config.json says")
        p.copy_(tensor)
    return model


# ---------------------------------------------------------------------------------------- LoRA


def lora_factors(n_in, n_out, rank):
    """A (rank, n_in) random, B (n_out, rank) zero: their product starts at zero."""
    A = nn.Parameter(torch.empty(rank, n_in))
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, nn.Parameter(torch.zeros(n_out, rank))


class LoRALinear(nn.Module):
    """A frozen linear layer and its update: y = W x + b + (alpha / rank) B A x.

    rank * (in + out) parameters are trained. alpha / rank is the update's scale.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # (out, in), (out,), frozen
        self.scale = alpha / rank
        n_out, n_in = linear.weight.shape
        self.lora_A, self.lora_B = lora_factors(n_in, n_out, rank)

    def forward(self, x):
        z = F.linear(x, self.scale * self.lora_A)  # (B, T, in) @ (in, r) -> (B, T, r)
        update = F.linear(z, self.lora_B)  # (B, T, r) @ (r, out) -> (B, T, out)
        return F.linear(x, self.weight, self.bias) + update


class LoRAHead(LMHead):
    """logits = W h + (alpha / rank) B A h, with A (r, C) and B (V, r) trained.

    It cannot be merged: W is the token embedding too, and adding the update to it would change
    what the model reads, not only what it predicts.
    """

    def __init__(self, weight, rank, alpha):
        super().__init__(weight)
        V, C = weight.shape
        self.scale = alpha / rank
        self.lora_A, self.lora_B = lora_factors(C, V, rank)

    def forward(self, hidden, statistics=None):
        z = F.linear(hidden, self.scale * self.lora_A)  # (B, T, C) @ (C, r) -> (B, T, r)
        update = F.linear(z, self.lora_B)  # (B, T, r) @ (r, V) -> (B, T, V)
        return super().forward(hidden) + update


def add_lora(base, rank, alpha):
    """A frozen copy of a GPT with a `LoRALinear` in place of each linear layer of its transformer.

    The LM head and the embeddings stay as they are. Raises ValueError where no layer is found:
    an adapter that silently has nowhere to sit is a weak rival.
    """
    model = copy.deepcopy(base).requires_grad_(False)
    body = model.transformer
    found = [(name, m) for name, m in body.named_modules() if isinstance(m, nn.Linear)]
    if not found:
        raise ValueError("add_lora found no linear layer (has the model LoRA already?)")
    for name, linear in found:
        body.set_submodule(name, LoRALinear(linear, rank, alpha))
    return model


@torch.no_grad()
def merge_lora(model):
    """Add each LoRA update of the transformer to its weight, once and for all: W + scale B A."""
    body = model.transformer
    for name, layer in [(n, m) for n, m in body.named_modules() if isinstance(m, LoRALinear)]:
        linear = nn.Linear(*reversed(layer.weight.shape))
        update = layer.scale * (layer.lora_B @ layer.lora_A)  # (out, r) @ (r, in) -> (out, in)
        linear.weight, linear.bias = nn.Parameter(layer.weight + update), layer.bias
        body.set_submodule(name, linear)


# ---------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(model, prompts, max_new_tokens, statistics=None, temperature=0.0, top_k=None,
             stop_token=None, generator=None):
    """Continue each prompt; returns a list of lists of new token ids.

    prompts: B lists of token ids, of any lengths; statistics (B, C) as in `GPT.forward`.
    temperature 0 takes the most likely token; else one is drawn, with `generator`, from the `top_k`
    most likely ones at that temperature. A row ends before `stop_token`, after max_new_tokens, or
    where the context is full. Raises ValueError for a prompt that is empty or fills the context.
    """
    config, device = model.config, next(model.parameters()).device
    if not all(0 < len(prompt) < config.block_size for prompt in prompts):
        raise ValueError(f"prompts must have from 1 to {config.block_size - 1} tokens")
    B, longest = len(prompts), max(map(len, prompts))
    room = min(longest + max_new_tokens, config.block_size)
    padded = [prompt + [0] * (room - len(prompt)) for prompt in prompts]
    tokens = torch.tensor(padded, device=device)  # (B, room)
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
    row, done = torch.arange(B, device=device), torch.zeros(B, dtype=torch.bool, device=device)
    shape = (B, room, config.n_head, config.n_embd // config.n_head)
    dtype = model.transformer.h[0].attn.c_attn.weight.dtype
    cache = [torch.zeros(2, *shape, device=device, dtype=dtype).unbind()
             for _ in range(config.n_layer)]
    # Prompts are padded at the right: what is kept of padding is written over before it is seen.
    before = torch.arange(longest - 1, device=device).expand(B, -1)  # (B, longest - 1)
    if longest > 1:
        model.hidden(tokens[:, :longest - 1], cache, before)
    new = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        position = (length - 1)[:, None]  # (B, 1), of each row's last token
        last = tokens.gather(1, position)  # (B, 1)
        logits = model(last, statistics, cache=cache, position=position)  # (B, 1, V)
        chosen = choose_token(logits[:, 0].float(), temperature, top_k, generator)  # (B,)
        done |= chosen == stop_token if stop_token is not None else False
        for i in (~done).nonzero()[:, 0].tolist():
            new[i].append(int(chosen[i]))
        done |= length + 1 >= config.block_size
        if done.all():
            break
        length = length + ~done
        tokens[row, length - 1] = chosen  # in a row that is done nobody reads it
    return new


def choose_token(logits, temperature, top_k, generator):
    """One token id a row (B,), from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=1)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    highest = logits.amax(dim=1, keepdim=True)  # (B, 1), taken off: no temperature overflows
    probabilities = ((logits - highest) / max(temperature, 1e-30)).softmax(dim=1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
