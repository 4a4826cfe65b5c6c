"""A statistic that keeps the words and where they stood: what a cluster has said, and after what.

A mean of token embeddings no longer knows which tokens it was made of. Here nothing is averaged:
the statistic of a request is every token w_i that its cluster has produced so far, with the hidden
state h_i that came before it. It does not add to the logits but mixes three distributions, the
head's, one over the request's own tokens (memory 1) and one over its mates' (2):

    p(w | h) = [softmax(W' h)_w + e^g1 M1_w + e^g2 M2_w] / (1 + e^g1 + e^g2)
    Mj_w     = sum of the softmax over memory j of t (h_i . h), where w_i = w
    gj       = gate_j(h) + a_j mj,    mj = log mean exp(t (h_i . h)) over memory j

So a request is reminded of how it, and how its mates, went on from where it is now. W' is W with
static LoRA. m says how well a memory matches, so that mates who know nothing can be left unheard.
It is the continuous cache of Grave, Joulin & Usunier (2017), which remembers a row's own history
and stands here as a rival (`CacheHead`), given to all requests of a cluster, with trained gates.

The requests of a cluster are decoded in step, and a token is known to its mates from the next step
on: it moves only logits that are made after it (scope `running`). With scope `prompt` no more than
prompts are known, and with `full` everything is: that LEAKS.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import IGNORE
from lab.cluster import kmeans, product_type
from lab.model import generate_anew
from lab.turns import linear_cross_entropy
from model import LMHead, lora_factors

NEVER = 1 << 30  # when padding is produced
WIDTH = 4096  # of the features that are clustered, whatever the vocabulary
TOGETHER = 1 << 22  # scores of all rows that are made at once
GATE_SCALE = 10  # AdamW moves all numbers alike, and the gates' have the longest way to go


class Memory(NamedTuple):
    """n tokens, remembered at q positions: weights power e^offset beside the head's 1."""

    power: torch.Tensor  # (q, n), e^score up to a factor; 0 where a token is not known yet
    token: torch.Tensor  # (n,)
    offset: torch.Tensor  # (q,), the memory's gate less the logarithm of its powers' sum


class CacheHead(LMHead):
    """A continuous cache of each row's own history on the frozen base, as in its paper.

    Its weight l = sigmoid(share) and t, which the paper chose by search, are trained: 2 parameters.
    """

    def __init__(self, weight, scope="running"):
        super().__init__(weight)
        self.scope = scope
        self.share = nn.Parameter(torch.tensor(-2.0))
        self.log_t = nn.Parameter(torch.tensor(-1.0))

    def update(self, hidden):
        """Of a low-rank update of W, if any: z (..., r) of hidden (..., C), and B (V, r)."""
        return ()

    def fit_clusters(self, examples, k, generator):
        return self.group(examples)

    def group(self, examples, k=None, generator=None):
        return torch.arange(len(examples))

    def told(self, examples, index, which, members, group):
        """The rows `index`, then the `members` that are not among them, and what `losses` hears:
        of each position the token that follows, and its place in the continuation, negative in the
        prompt: (B, T, 2); and who knows what whom has said, (B, B). Everybody knows itself.
        """
        rows = torch.cat([index, members[~torch.isin(members, index)].unique()])
        tokens, real = examples.read(rows)
        place = torch.arange(tokens.shape[1]) - examples.prompt[rows, None]  # (B, T + 1)
        place = place.masked_fill(~real, NEVER)
        statistics = torch.stack([tokens, place], dim=2)[:, 1:]  # (B, T, 2)
        where = torch.zeros(len(examples), dtype=torch.int64)
        where[rows] = torch.arange(len(rows))
        knows = torch.zeros(len(rows), len(rows), dtype=torch.bool)
        knows[: len(index), : len(index)] = torch.eye(len(index), dtype=torch.bool)
        who, whom = (which[:, None] == group).nonzero().unbind(1)
        knows[who, where[members[whom]]] = True
        return rows, statistics, knows

    def gate(self, hidden, match, memory):
        """Logarithm of a memory's weight (q,) at hidden (q, C); memory: 0, a row's own, or 1, its
        mates'; match (q,), how well it matches, is the logarithm of exp(score)'s mean."""
        return self.share.expand(match.shape)

    def memories(self, wanted, hidden, statistics, knows):
        """What is remembered at the positions `wanted` (B, T), of all rows or one after the other.

        Yields the row and the position (Q,) of each, the `Memory`s of a row's own and of its mates'
        tokens, as far as there are such, and the logarithm (Q,) of the share that they leave to the
        head.
        """
        T, scale = hidden.shape[1], self.log_t.exp() / math.sqrt(hidden.shape[2])
        asking = wanted.any(dim=1).nonzero()[:, 0]
        # Where little is asked, as in decoding (128 rows of 256 tokens, at most), one product for
        # all rows takes a third of the time of a small one for each.
        together = int(wanted.sum()) * wanted.numel() <= TOGETHER
        for rows in asking.split(max(1, len(asking) if together else 1)):
            near = knows[rows].any(dim=0).nonzero()[:, 0]
            token, place = statistics[near].flatten(0, 1).unbind(1)  # (near T,)
            ever = (place < (0 if self.scope == "prompt" else NEVER)).nonzero()[:, 0]  # (n,)
            token, place, whose = token[ever], place[ever], near[ever // T]
            keys = hidden[near].flatten(0, 1)[ever]  # (n, C)
            row, at = wanted[rows].nonzero().unbind(1)
            row = rows[row]  # (Q,)
            h = hidden[row, at]  # (Q, C)
            q = (h.float() * scale).to(h.dtype)
            scores = (q @ keys.T).float()  # (Q, C) @ (C, n) -> (Q, n)
            known, own = knows[row][:, whose], whose == row[:, None]  # (Q, n)
            if self.scope == "running":
                known = known & (place < statistics[row, at, 1, None])
            parts = [(scores, known & own, token), (scores, known & ~own, token)]
            if len(rows) == 1:  # fewer tokens are its own than are its mates'
                parts[0] = tuple(part[..., whose == rows] for part in parts[0])
            yield row, at, *self.weighed(h, parts)

    def weighed(self, hidden, parts):
        """`Memory`s, and the logarithm (Q,) of the share that they leave to the head; parts, for a
        row's own and its mates': scores (Q, n), whether they count (Q, n), and the tokens (n,)."""
        gates, found = [torch.zeros(len(hidden), device=hidden.device)], []
        for memory, (scores, known, token) in enumerate(parts):
            n = known.sum(dim=1)
            if not n.any():
                continue
            top = scores.detach().where(known, -1e9).amax(dim=1, keepdim=True)
            # A CPU takes ten times as long for what is no normal number; e^-70 is one, and little.
            power = (scores - top).clamp(-70, 0).exp().where(known, 0)
            total = power.sum(dim=1).clamp(min=1).log()  # without any known 0, else 1 and more
            match = (top[:, 0] + total - n.clamp(min=1).log()).where(n > 0, 0)
            gates.append(self.gate(hidden, match, memory).float().where(n > 0, -1e9))
            found.append(Memory(power, token, gates[-1] - total))
        return found, -torch.stack(gates).logsumexp(dim=0)

    def recall(self, hidden, statistics, knows, targets, wanted):
        """Of the targets (B, T), where `wanted` (B, T): the logarithm of what the memories add to
        the head's probability of a target, and that of the divisor's inverse, both (B, T).

        In logarithms, as a memory's weight may be past float32. The transformer is trained neither
        to be remembered nor to ask: it is taken as it is.
        """
        found = torch.zeros(*targets.shape, 2, device=hidden.device)
        for row, at, memories, log_share in self.memories(
                wanted, hidden.detach(), statistics, knows):
            target = targets[row, at, None]  # (Q, 1)
            log_extra = [torch.full_like(log_share, -1e9)]  # nothing to remember
            for power, token, offset in memories:
                right = (power * (token == target)).sum(dim=1)
                log_extra.append(offset + right.where(right > 0, 1).log().where(right > 0, -1e9))
            here = torch.stack([torch.stack(log_extra).logsumexp(dim=0), log_share], dim=1)
            found = found.index_put((row, at), here)  # (Q, 2) -> (B, T, 2)
        return found.unbind(2)

    def forward(self, hidden, statistics, knows, wanted):
        """Log-probabilities (n, V) at the n positions where `wanted` (B, T) is true, row after row:
        logits, up to a constant. statistics and knows as `told` makes them."""
        asking = hidden[wanted]  # (n, C)
        logits = super().forward(asking)
        if pair := self.update(asking):
            logits = logits + F.linear(*pair)  # (n, r) @ (r, V)
        log_p, p = logits.float().log_softmax(dim=1), []
        for row, _, memories, log_share in self.memories(wanted, hidden, statistics, knows):
            first = sum(map(len, p))  # rows and positions come in order
            p.append((log_p[first:first + len(row)] + log_share[:, None]).exp())  # (Q, V)
            for power, token, offset in memories:
                share = (offset + log_share).exp()[:, None] * power  # (Q, n)
                p[-1] = p[-1].index_add(1, token, share)  # (Q, n) -> (Q, V)
        return torch.cat(p).log()


class CompanyCacheHead(CacheHead):
    """Static LoRA on the head, and the cache that the requests of a cluster share.

    rank (C + V) + 2 C + 5 parameters, and a buffer (V,), the inverse document frequencies that
    weigh tokens for clustering. at_hand: how many requests are clustered together in training
    (None: all). Among more of them mates are nearer, so let it be as many as are served together.
    """

    def __init__(self, weight, rank, alpha, scope="running", at_hand=None):
        super().__init__(weight, scope)
        V, C = weight.shape
        self.scale, self.at_hand = alpha / rank, at_hand
        self.lora_A, self.lora_B = lora_factors(C, V, rank)
        # Of both memories; the mates' starts the lower.
        self.share = nn.Parameter(torch.tensor([-0.2, -0.4]))
        self.share_of = nn.Parameter(torch.zeros(2, C))
        self.trust = nn.Parameter(torch.zeros(2))
        self.register_buffer("idf", torch.ones(V))

    def update(self, hidden):
        return F.linear(hidden, self.scale * self.lora_A), self.lora_B

    def gate(self, hidden, match, memory):
        gate = hidden @ self.share_of[memory].to(hidden.dtype)  # (q, C) @ (C,) -> (q,)
        return gate + GATE_SCALE * (self.share[memory] + self.trust[memory] * match)

    def fit_clusters(self, examples, k, generator):
        """Cluster (N,) of the training examples; measures document frequencies on the way."""
        documents = torch.zeros(len(self.idf))
        for rows in torch.arange(len(examples)).split(1024):
            documents += (self.prompt_counts(examples, rows) > 0).sum(dim=0)
        self.idf.copy_(torch.log((len(examples) + 1) / (documents + 1)))
        N = len(examples)
        parts = torch.arange(N).tensor_split(-(-N // (self.at_hand or N)) if k > 1 else 1)
        found, n = [], 0
        for rows in parts:
            share = max(1, round(k * len(rows) / N))
            found.append(n + self.group(examples, share, generator, rows))
            n = int(found[-1].max()) + 1
        return torch.cat(found)

    def prompt_counts(self, examples, index):
        """How often each token stands in each prompt of the rows `index` (B,): (B, V)."""
        V = len(self.idf)
        tokens, mask = examples.prompts(index)
        place = (torch.arange(len(index))[:, None] * V + tokens)[mask]
        return torch.bincount(place, minlength=len(index) * V).view(-1, V)

    def group(self, examples, k, generator, rows=None):
        """Cluster (N,), of `rows` (N,) if given, by k-means on tf-idf vectors, each first drawn
        towards its neighbours."""
        rows = torch.arange(len(examples)) if rows is None else rows
        if k == 1:
            return torch.zeros(len(rows), dtype=torch.int64)
        V = len(self.idf)
        # Random signs keep the angles between sparse rows, nearly (Achlioptas 2003), in less room.
        signs = torch.empty(V, WIDTH).bernoulli_(generator=generator) * 2 - 1 if V > WIDTH else None
        features = torch.empty(len(rows), min(V, WIDTH))
        for part in torch.arange(len(rows)).split(1024):
            count = self.prompt_counts(examples, rows[part])  # (B, V)
            tf_idf = count.float().log1p() * self.idf.cpu()
            if signs is not None:
                with torch.autocast("cpu", enabled=False):
                    tf_idf = tf_idf.to_sparse() @ signs  # (B, V) @ (V, WIDTH)
            features[part] = F.normalize(tf_idf, dim=1)
        device = self.weight.device
        dtype = product_type(device)
        features = diffuse(features, device, dtype).to(device)
        return kmeans(features, min(k, len(rows)), generator, dtype=dtype).cluster.cpu()


def diffuse(features, device, dtype, neighbours=5, rounds=8):
    """Features (N, W), of length 1, each replaced `rounds` times by the mean of its nearest.

    Short prompts of one article share few words; those that share some bring the others together.
    The graph of neighbours is made once, by N^2 W multiply-adds on `device`.
    """
    low, m = features.to(device, dtype), min(neighbours + 1, len(features))
    near = [(rows @ low.T).float().topk(m, dim=1) for rows in low.split(512)]  # (n, N) -> (n, m)
    weight, column = (torch.cat(parts).flatten().cpu() for parts in zip(*near, strict=True))
    row = torch.arange(len(low)).repeat_interleave(m)  # (N m,), as the two others
    graph = torch.sparse_coo_tensor(torch.stack([row, column]), weight.clamp(min=0).to(features),
                                    (len(low), len(low)), check_invariants=True)
    with torch.autocast("cpu", enabled=False):
        for _ in range(rounds):
            features = F.normalize(graph @ features, dim=1)  # (N, N) @ (N, W)
    return features


def losses(model, tokens, targets, statistics, knows):
    """Negative log-likelihood of the scored targets, in nats: summed (), and of each row (B,).

    tokens (B, T) are what the model reads; targets (B, T), IGNORE where nothing is scored;
    statistics and knows as `told` makes them. The sum can be differentiated, the rows cannot.
    """
    head, device = model.lm_head, model.lm_head.weight.device
    tokens, targets, statistics, knows = (
        t.to(device) for t in (tokens, targets, statistics, knows))
    hidden = hidden_of(model, tokens)  # (B, T, C)
    wanted = targets != IGNORE  # (B, T), n of them
    log_extra, log_share = (x[wanted] for x in head.recall(hidden, statistics, knows, targets,
                                                           wanted))
    pair = head.update(hidden)
    pairs = [(pair[0][wanted], pair[1])] if pair else []
    total, each = linear_cross_entropy(
        hidden[wanted], head.weight, targets[wanted], pairs, log_extra)
    rows = each.new_zeros(targets.shape).index_put_(
        wanted.nonzero(as_tuple=True), each - log_share.detach())
    return total - log_share.sum(), rows.sum(dim=1)


def hidden_of(model, tokens):
    """Last hidden states (B, T, C); they have been given where a head stands alone."""
    return model.hidden(tokens) if hasattr(model, "hidden") else tokens


@torch.no_grad()
def generate(model, prompts, max_new_tokens, knows, stop_token=None, **options):
    """Continue prompts in step, B lists of tokens: a token is known to those who know its row,
    knows (B, B), from the next step on. options: see `generate_anew`.
    """
    device = model.lm_head.weight.device
    prompt = torch.tensor([len(p) for p in prompts], device=device)[:, None]  # (B, 1)
    knows = knows.to(device)

    def next_logits(tokens, length):
        place = torch.arange(1, tokens.shape[1] + 1, device=device)  # (T,), of what follows
        known = place < length[:, None]  # (B, T)
        following = torch.stack([tokens.roll(-1, dims=1),
                                 (place - prompt).masked_fill(~known, NEVER)], dim=2)  # (B, T, 2)
        return model.lm_head(model.hidden(tokens), following, knows, place == length[:, None])

    return generate_anew(next_logits, prompts, max_new_tokens, model.config.block_size, device,
                         stop_token=stop_token, **options)
