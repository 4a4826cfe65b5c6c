"""A statistic that keeps the words and where they stood: what a cluster has said, and after what.

A mean of token embeddings no longer knows which tokens it was made of. Here nothing is averaged.
The statistic of a request is every token w_i that its cluster has produced so far, with the
hidden state h_i that came before it, and the update of the head is of as high a rank as there are
tokens: A holds the states, B a one where the tokens are, and a softmax stands between them,

    p(w | h) = (1 - l) softmax(W' h)_w + l [B softmax(t A h + o)]_w,    l = sigmoid(gate(h) + a m).

So a request is reminded of how its mates went on from where it is now. W' is W with static LoRA,
m, the logarithm of the mean of exp(t A h + o), says how well the memories match, and o is what a
request's own tokens have before its mates'. It is the continuous cache of Grave, Joulin & Usunier
(2017), which remembers a row's own history and stands here as a rival (`CacheHead`), given to all
requests of a cluster, with a trained gate.

The requests of a cluster are decoded in step, and a token is known to its mates from the next step
on: it moves only logits that are made after it (scope `running`). With scope `prompt` no more than
prompts are known, and with `full` everything is: that LEAKS.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from cluster import kmeans
from files import UserError
from hypernet import product_type, table
from model import LMHead, Update, lora_factors

NEVER = 1 << 30  # when padding is produced
FASTER = 10  # AdamW moves all numbers alike, and these two have the longest way to go


class CacheHead(LMHead):
    """A continuous cache of each row's own history on the frozen base, as in its paper.

    l and t, which the paper chose by search, are trained: 2 parameters.
    """

    needs_statistics, clustered_batches, reads_company = True, False, True
    own = 0.0

    def __init__(self, weight, scope="running"):
        super().__init__(weight)
        self.scope = scope
        self.share = nn.Parameter(torch.tensor(-2.0, device=weight.device))  # l, before a sigmoid
        self.log_t = nn.Parameter(torch.tensor(-1.0, device=weight.device))

    def read(self, examples, embedding):
        return examples

    def fit_clusters(self, examples, k, generator):
        return self.group(examples)

    def group(self, examples, k=None, generator=None):
        return torch.arange(len(examples))

    def told(self, examples, index, which, members, group):
        """What `losses` is told of the rows `index` and those of `members` that are not among them:
        of each position the token that follows, and its place in the continuation, negative in the
        prompt: (B, T, 2); and who knows what whom has said, (B, B). Everybody knows itself.
        """
        rows = read_together(index, members)
        tokens, real = examples.rows(rows)
        prompt = torch.from_numpy(examples.prompt[rows.numpy(), None])
        place = (torch.arange(tokens.shape[1]) - prompt).masked_fill(~real, NEVER)  # (B, T + 1)
        statistics = torch.stack([tokens * real, place], dim=2)[:, 1:]  # (B, T, 2)
        where = torch.zeros(len(examples), dtype=torch.int64)
        where[rows] = torch.arange(len(rows))
        knows = torch.zeros(len(rows), len(rows), dtype=torch.bool)
        knows[: len(index), : len(index)] = torch.eye(len(index), dtype=torch.bool)
        who, whom = (which[:, None] == group).nonzero().unbind(1)
        knows[who, where[members[whom]]] = True
        return statistics, knows

    def decoding(self, tokens, pad, longest, stop, context):
        """As `told`, statistics (B, T, 2) of sequences (B, T) that are decoded in step: prompts
        with `pad` (B,) tokens of padding before them end at `longest`, and `stop`, or a full
        `context`, ends a row."""
        following = tokens.roll(-1, dims=1)  # the last one is yet to come
        place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        nothing = (place <= pad[:, None]) | ((place > longest) & (tokens == stop))  # (B, T)
        nothing |= place - pad[:, None] >= context
        return torch.stack([following, (place - longest).masked_fill(nothing, NEVER)], dim=2)

    def gate(self, hidden, match):
        """l (q,) of hidden (q, C), before the sigmoid; match (q,), how well memories match, is the
        logarithm of exp(score)'s mean."""
        return self.share.expand(match.shape)

    def attention(self, b, queries, hidden, statistics, knows):
        """What is remembered at the positions `queries` (q,) of row b: the logarithm (q, n) of the
        share of each of n tokens, the tokens (n,), and l (q,) before its sigmoid."""
        near = knows[b].nonzero()[:, 0]
        token, place = statistics[near].flatten(0, 1).unbind(1)  # (rows T,)
        now = statistics[b, queries, 1, None]  # (q, 1)
        if self.scope == "running":
            known = place < now  # (q, rows T)
        else:
            known = (place < (0 if self.scope == "prompt" else NEVER)).expand(len(queries), -1)
        ever = known.any(dim=0)
        keys, known = hidden[near].flatten(0, 1)[ever], known[:, ever]  # (n, C), (q, n)
        own = (near == b).repeat_interleave(hidden.shape[1])[ever]  # (n,)
        h = hidden[b, queries]
        q = (h.float() * (self.log_t.exp() / math.sqrt(h.shape[1]))).to(h.dtype)
        scores = (q @ keys.T).float() + self.own * own  # (q, C) @ (C, n) -> (q, n)
        scores = scores.where(known, -1e9)
        total, n = scores.logsumexp(dim=1), known.sum(dim=1)
        match = (total - n.clamp(min=1).log()).where(n > 0, 0)
        gate = self.gate(h, match).float().where(n > 0, -1e9)  # nothing to remember: l is 0
        return scores - total[:, None], token[ever], gate

    def recall(self, hidden, statistics, knows, targets, wanted):
        """Logarithms of l / (1 - l) times the memory's probability of the targets (B, T), where
        `wanted` (B, T), and of 1 - l (B, T), both from l's logit: l may round to 1.

        The transformer is trained neither to be remembered nor to ask: it is taken as it is.
        """
        hidden, zero = hidden.detach(), torch.zeros(targets.shape[1], 2, device=hidden.device)
        rows = []
        for b in range(len(hidden)):
            queries = wanted[b].nonzero()[:, 0]
            share, token, gate = self.attention(b, queries, hidden, statistics, knows)
            hit = token == targets[b, queries, None]  # (q, n)
            odds = gate + share.where(hit, -1e9).logsumexp(dim=1)
            found = torch.stack([odds, -F.softplus(gate)], dim=1)
            rows.append(zero.index_add(0, queries, found))  # (q, 2) -> (T, 2)
        return torch.stack(rows).unbind(2)  # (B, T)

    def forward(self, hidden, updates=(), knows=None, statistics=None, first=0):
        """Log-probabilities (B, T - first, V) of the positions from `first` on; logits are the same
        up to a constant."""
        log_p = super().forward(hidden[:, first:], updates).float().log_softmax(dim=2)
        queries = torch.arange(first, hidden.shape[1], device=hidden.device)
        rows = []
        for b, p in enumerate(log_p.exp()):  # (q, V)
            share, token, gate = self.attention(b, queries, hidden, statistics, knows)
            part = gate.sigmoid()[:, None]  # l (q, 1)
            rows.append(((1 - part) * p).index_add(1, token, part * share.exp()))  # (q, n)
        return torch.stack(rows).log()


def read_together(index, members):
    """Rows `index` (B,), then the `members` that are not among them, each once."""
    others = members[~torch.isin(members, index)].unique()
    return torch.cat([index, others])


class CompanyCacheHead(CacheHead):
    """Static LoRA on the head, and the cache that the requests of a cluster share.

    rank (C + V) + C + 4 parameters, and a buffer (V,), the inverse document frequencies that
    weigh tokens for clustering.
    """

    clustered_batches = True
    controls = ("own prompt only", "shuffled", "other articles", "no later rows")

    def __init__(self, weight, rank, alpha, scope="running"):
        super().__init__(weight, scope)
        V, C = weight.shape
        self.scale = alpha / rank
        self.lora_A, self.lora_B = lora_factors(C, V, rank, weight.device)
        self.share_of = nn.Parameter(torch.zeros(C, device=weight.device))
        self.trust = nn.Parameter(torch.zeros(2, device=weight.device))
        self.register_buffer("idf", torch.ones(V, device=weight.device))

    def updates(self, statistics=None):
        return [Update(self.scale * self.lora_A, self.lora_B)]

    @property
    def own(self):
        """What a token's score gains by being the request's own."""
        return FASTER * self.trust[0]

    def gate(self, hidden, match):
        gate = hidden @ self.share_of.to(hidden.dtype) + self.share  # (q, C) @ (C,) -> (q,)
        return gate + FASTER * self.trust[1] * match

    def fit_clusters(self, examples, k, generator):
        """Cluster (N,) of the training examples; measures document frequencies on the way."""
        documents = torch.zeros(len(self.idf))
        for rows in torch.arange(len(examples)).split(1024):
            documents += (self.prompt_counts(examples, rows) > 0).sum(dim=0)
        self.idf.copy_(torch.log((len(examples) + 1) / (documents + 1)))
        return self.group(examples, k, generator)

    def prompt_counts(self, examples, index):
        """How often each token stands in each prompt of the rows `index` (B,): (B, V)."""
        V = len(self.idf)
        tokens, mask = examples.prompts(index)
        place = (torch.arange(len(index))[:, None] * V + tokens)[mask]
        return torch.bincount(place, minlength=len(index) * V).view(-1, V)

    def group(self, examples, k=None, generator=None):
        """Cluster (N,) by k-means on tf-idf vectors, each first drawn towards its neighbours."""
        if k is None:
            raise UserError("--inference assign: company-cache keeps no centroids; use fit")
        if k == 1:
            return torch.zeros(len(examples), dtype=torch.int64)
        features = table(len(examples), len(self.idf))
        for rows in torch.arange(len(examples)).split(1024):
            count = self.prompt_counts(examples, rows)
            features[rows] = F.normalize(count.float().log1p() * self.idf.cpu(), dim=1)
        device = self.weight.device
        dtype = product_type(device)
        features = diffuse(features, device, dtype).to(device)
        return kmeans(features, min(k, len(examples)), generator, dtype=dtype).cluster.cpu()


def diffuse(features, device, dtype, neighbours=5, rounds=8):
    """Features (N, V), of length 1, each replaced `rounds` times by the mean of its nearest.

    Short prompts of one article share few words; those that share some bring the others together.
    The graph of neighbours is made once, by N^2 V multiply-adds on `device`.
    """
    low, m = features.to(device, dtype), min(neighbours + 1, len(features))
    near = [(rows @ low.T).float().topk(m, dim=1) for rows in low.split(512)]  # (n, N) -> (n, m)
    weight, column = (torch.cat(parts).flatten().cpu() for parts in zip(*near, strict=True))
    row = torch.arange(len(low)).repeat_interleave(m)  # (N m,), as the two others
    graph = torch.sparse_coo_tensor(torch.stack([row, column]), weight.clamp(min=0).to(features),
                                    (len(low), len(low)), check_invariants=True)
    with torch.autocast("cpu", enabled=False):
        for _ in range(rounds):
            features = F.normalize(graph @ features, dim=1)  # (N, N) @ (N, V)
    return features
