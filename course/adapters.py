"""The one door between the tests and your code.

The tests call these functions and nothing else, so you may rename and restructure whatever you
like, as long as you put the new names here. Tensors are float32 or float64 and on the CPU. A
function must not change what it is given.
"""

from unittest.mock import patch

import torch
from torch import Tensor


def attention(x: Tensor, weights: dict[str, Tensor], n_head: int) -> Tensor:
    """1a. x (B, T, C) -> (B, T, C); weights: c_attn.weight (3C, C) and .bias, c_proj.weight (C, C)
    and .bias."""
    from model import Attention, GPTConfig

    layer = Attention(GPTConfig(x.shape[1], 1, 1, n_head, x.shape[2])).to(x.dtype)
    layer.load_state_dict(weights)
    with torch.no_grad():
        return layer(x)


def lora_start(n_in: int, n_out: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """2a. Untrained factors A (rank, n_in) and B (n_out, rank)."""
    from model import lora_factors

    torch.manual_seed(seed)
    A, B = lora_factors(n_in, n_out, rank)
    return A.detach(), B.detach()


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor,
                alpha: float) -> Tensor:
    """2b. x (B, T, in) -> (B, T, out) through a frozen layer, weight (out, in), with LoRA."""
    return _lora_layer(weight, bias, A, B, alpha)(x).detach()


def _lora_layer(weight, bias, A, B, alpha):
    from model import LoRALinear

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
    linear.load_state_dict({"weight": weight, "bias": bias})
    layer = LoRALinear(linear.requires_grad_(False), len(A), alpha)
    layer.lora_A, layer.lora_B = torch.nn.Parameter(A), torch.nn.Parameter(B)
    return layer


def lora_head(hidden: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """2b. hidden (B, T, C) -> logits (B, T, V) by a frozen head, weight (V, C), with LoRA."""
    from model import LoRAHead

    head = LoRAHead(torch.nn.Parameter(weight, requires_grad=False), len(A), alpha)
    head.lora_A, head.lora_B = torch.nn.Parameter(A), torch.nn.Parameter(B)
    return head(hidden).detach()


def lora_names(n_layer: int, rank: int) -> tuple[list[str], list[str]]:
    """2c. Names of the trained and of the frozen parameters of a GPT to which LoRA was added."""
    from model import GPT, GPTConfig, add_lora

    named = dict(add_lora(GPT(GPTConfig(8, 20, n_layer, 2, 16)), rank, 8.0).named_parameters())
    return ([n for n, p in named.items() if p.requires_grad],
            [n for n, p in named.items() if not p.requires_grad])


def lora_merged(weights: dict[str, Tensor], tokens: Tensor, rank: int, alpha: float,
                merge: bool) -> Tensor:
    """2d. Logits (B, T, V) of a GPT of one layer with LoRA, merged or not; weights: its whole
    state_dict, tokens (B, T)."""
    from model import GPT, GPTConfig, add_lora, merge_lora

    V, C = weights["transformer.wte.weight"].shape
    T = len(weights["transformer.wpe.weight"])
    model = add_lora(GPT(GPTConfig(T, V, 1, 2, C)), rank, alpha)
    model.to(weights["transformer.wte.weight"].dtype).load_state_dict(weights)
    if merge:
        merge_lora(model)
    with torch.no_grad():
        return model(tokens)


def nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """3a. points (N, C), centroids (K, C) -> cluster (N,), squared distance (N,)."""
    from cluster import nearest

    return nearest(points, centroids)


def cluster_centres(points: Tensor, cluster: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """3b. Means (k, C) of each cluster's points, zeros for none, and their number (k,)."""
    from cluster import means

    return means(points, cluster, k)


def kmeans(points: Tensor, k: int, seed: int,
           chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """3c. points (N, C) -> centroids (k, C), cluster (N,). chosen (k,): indices of the points to
    start from, in place of those of k-means++; until exercise 4 is done, it starts from any."""
    import cluster

    seeds = cluster.seeds

    def start(points, k, generator):
        if chosen is not None:
            return chosen
        try:
            return seeds(points, k, generator)
        except NotImplementedError:
            return torch.randperm(len(points), generator=generator)[torch.arange(k) % len(points)]

    with patch.object(cluster, "seeds", start):
        return cluster.kmeans(points, k, torch.Generator().manual_seed(seed))


def kmeans_seeds(points: Tensor, k: int, seed: int) -> Tensor:
    """4a. points (N, C) -> indices (k,) of the points that k-means++ starts from."""
    from cluster import seeds

    return seeds(points, k, torch.Generator().manual_seed(seed))


def cluster_batches(cluster: Tensor, batch_size: int, seed: int) -> list[Tensor]:
    """5a. cluster (N,) -> batches of one cluster each, but for leftovers: index tensors."""
    from cluster import cluster_batches

    return cluster_batches(cluster, batch_size, torch.Generator().manual_seed(seed))


def shuffled_batches(length: Tensor, batch_size: int, seed: int) -> list[Tensor]:
    """5b. length (N,) of each row in tokens -> batches of any rows: index tensors."""
    from cluster import shuffled_batches

    return shuffled_batches(length, batch_size, torch.Generator().manual_seed(seed))


def _rows(tokens, start, length, prompt, document):
    from data import Rows

    return Rows(tokens.int(), start, length, prompt, document)


def prompt_means(tokens: Tensor, start: Tensor, length: Tensor, prompt: Tensor, document: Tensor,
                 embedding: Tensor) -> tuple[Tensor, Tensor]:
    """6a. Rows, see `Rows` in data.py, and embedding (V, C) -> means (N, C), counts (N,)."""
    from hypernet import prompt_means

    return prompt_means(_rows(tokens, start, length, prompt, document), embedding)


def features(means: Tensor, center: Tensor) -> Tensor:
    """6b. means (N, C), center (C,) -> points (N, C) for k-means."""
    from hypernet import features

    return features(means, center)


def cluster_means(means: Tensor, count: Tensor, cluster: Tensor, k: int) -> Tensor:
    """6c. means (N, C), count (N,), cluster (N,) -> each cluster's statistic (k, C)."""
    from hypernet import cluster_means

    return cluster_means(means, count, cluster, k)


def _head(weight, rank, alpha, state=None):
    from hypernet import ChameleonHead

    head = ChameleonHead(torch.nn.Parameter(weight, requires_grad=False), rank, alpha, 3)
    head = head.to(weight.dtype)
    if state:
        head.load_state_dict(state, strict=False)
    return head


def hypernetwork(statistics: Tensor, start: Tensor, state: dict[str, Tensor] | None) -> Tensor:
    """7a. statistics (B, C) -> what the network writes (B, n); untrained if state is None. start
    (n,); state: the network's state_dict, keys 0.weight, 0.bias, 2.weight ... 4.bias."""
    from hypernet import HyperNetwork

    network = HyperNetwork(statistics.shape[1], start).to(start.dtype)
    if state:
        network.load_state_dict(state)
    with torch.no_grad():
        return network(statistics)


def chameleon_factors(weight: Tensor, rank: int, alpha: float, state: dict[str, Tensor],
                      statistics: Tensor) -> tuple[Tensor, Tensor]:
    """7b. weight (V, C), state: hypernetwork.0.weight ..., center (C,), spread (C,), clusters;
    statistics (B, C) -> A (B, r, C), B (B, V, r)."""
    with torch.no_grad():
        return _head(weight, rank, alpha, state).factors(statistics)


def chameleon_logits(weight: Tensor, rank: int, alpha: float, state: dict[str, Tensor] | None,
                     hidden: Tensor, statistics: Tensor) -> Tensor:
    """7c. hidden (B, T, C), statistics (B, C) -> logits (B, T, V); untrained if state is None."""
    torch.manual_seed(0)
    with torch.no_grad():
        return _head(weight, rank, alpha, state)(hidden, statistics)


def batch(tokens: Tensor, start: Tensor, length: Tensor, prompt: Tensor, document: Tensor,
          index: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """8a. Rows and the index (B,) of some -> inputs (B, T) and targets (B, T), -1 where nothing is
    scored."""
    return _rows(tokens, start, length, prompt, document).batch(index, whole)


class _Letters:
    """A tokenizer with a token a character."""

    end = 1000

    def encode_documents(self, documents):
        for d in documents:
            yield [ord(c) for c in d.prompt], [ord(c) for c in d.text]


def cut(documents: list[tuple[str, str]], block_size: int) -> list[list[int]]:
    """8b. (prompt, text) of each document, a token a character -> of each row [document, length,
    number of prompt tokens, then its tokens]. An end token is 1000."""
    from data import Document, cut

    rows = cut([Document(str(i), text, prompt) for i, (prompt, text) in enumerate(documents)],
               _Letters(), block_size)
    everything = zip(rows.document.tolist(), rows.start.tolist(), rows.length.tolist(),
                     rows.prompt.tolist(), strict=True)
    return [[d, n, p, *rows.tokens[s:s + n].tolist()] for d, s, n, p in everything]


def losses(logits_of: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
    """8c. Summed loss of each row (B,). The model is a table: the logits at place t of row b are
    logits_of[tokens[b, t]], with logits_of (V, V); targets (B, T), -1 where nothing is scored."""
    from train import losses

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(logits_of)

        def forward(self, tokens, statistics=None, start=0):
            return self.table[tokens[:, start:]]

    return losses(Model(), tokens, targets).detach()


def leak_check(predict, tokens: Tensor, prompt: Tensor, n_words: int) -> bool:
    """9. Does a method leak? predict(tokens) -> losses of every scored token (N, T), 0 where none
    is scored; tokens (N, T + 1), prompt (N,): how many tokens of each row are its prompt. True if a
    prediction depends on the token that it is scored on, on a later one of its row, or on a
    continuation of another row."""
    from leak_check import leaks

    return leaks(predict, tokens, prompt, n_words)


def controls(center: Tensor, means: Tensor, count: Tensor, cluster: Tensor, document: Tensor,
             seed: int) -> dict[str, Tensor]:
    """10a. What N rows may be told: a table (N, C) for each of "", "told own prompt",
    "told nothing", "told another cluster", "told no later rows"."""
    from eval import controls

    class Head:
        pass

    head = Head()
    head.center = center
    return controls(head, means, count, cluster, document, seed)
