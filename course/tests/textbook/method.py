"""The statistic of a cluster, the network, the head: sums written out."""

import torch


def average_prompts(tokens, start, prompt, table):
    rows = [table[tokens[s:s + p].long()].mean(dim=0) for s, p in zip(start.tolist(),
                                                                      prompt.tolist(), strict=True)]
    return torch.stack(rows), prompt.clone()


def on_sphere(means, centre):
    moved = means - centre
    length = moved.pow(2).sum(dim=1, keepdim=True).sqrt()
    return moved / length.clamp(min=1e-12)


def pooled(means, counts, labels, k):
    """Each cluster's mean over tokens; the mean of all tokens for a cluster without any."""
    sums = means * counts.unsqueeze(1)
    result = []
    for j in range(k):
        mine = labels == j
        if not mine.any():
            mine = torch.ones_like(mine)
        result.append(sums[mine].sum(dim=0) / counts[mine].sum())
    return torch.stack(result)


class Writer:
    """Three layers, given as weights and biases."""

    def __init__(self, layers):
        self.layers = layers

    @classmethod
    def untrained(cls, width, start):
        sizes = [(64, width), (32, 64)]
        kind = start.dtype
        layers = [(torch.randn(a, b, dtype=kind) / b ** 0.5, torch.zeros(a, dtype=kind))
                  for a, b in sizes]
        return cls([*layers, (torch.zeros(len(start), 32, dtype=kind), start)])

    @classmethod
    def stored(cls, state, prefix=""):
        return cls([(state[f"{prefix}{i}.weight"], state[f"{prefix}{i}.bias"]) for i in (0, 2, 4)])

    def __call__(self, s):
        for weight, bias in self.layers[:2]:
            s = torch.clamp(s @ weight.t() + bias, min=0)
        weight, bias = self.layers[2]
        return s @ weight.t() + bias


def standardise(s, centre, spread):
    safe = torch.where(spread > 1e-6, spread, torch.ones_like(spread))
    return torch.where(spread > 1e-6, (s - centre) / safe, torch.zeros_like(s))


def write_factors(weight, rank, state, told):
    words, width = weight.shape
    written = Writer.stored(state, "hypernetwork.")(standardise(told, state["center"],
                                                                state["spread"]))
    down = torch.stack([row[:rank * width].reshape(rank, width) for row in written])
    up = torch.stack([row[rank * width:].reshape(words, rank) for row in written])
    return down, up


def logits(weight, rank, alpha, state, hidden, told):
    plain = torch.einsum("btc,vc->btv", hidden, weight)
    if state is None:  # a network that has learnt nothing writes an update of zero
        return plain
    down, up = write_factors(weight, rank, state, told)
    return plain + alpha / rank * torch.einsum("bvr,brc,btc->btv", up, down, hidden)


def pick_batch(tokens, start, length, prompt, rows, whole):
    longest = int(length[rows].max())
    inputs = torch.zeros(len(rows), longest - 1, dtype=torch.long)
    targets = torch.full((len(rows), longest - 1), -1)
    for b, row in enumerate(rows.tolist()):
        text = tokens[start[row]:start[row] + length[row]].long()
        first = 1 if whole else int(prompt[row])
        inputs[b, :len(text) - 1] = text[:-1]
        targets[b, first - 1:len(text) - 1] = text[first:]
    return inputs, targets


def split_documents(documents, T, end=1000):
    rows = []
    for number, (prompt, text) in enumerate(documents):
        codes, asked = [ord(c) for c in text], [ord(c) for c in prompt]
        if asked:
            row = (asked + codes + [end])[:T + 1]
            pieces = [(row, len(asked))]
        else:
            cuts = [codes[i:i + T + 1] for i in range(0, len(codes), T + 1)]
            pieces = [(row, max(1, len(row) // 4)) for row in cuts]
        rows += [[number, len(row), p, *row] for row, p in pieces if len(row) > p]
    return rows


def summed_losses(table, tokens, targets):
    result = []
    for read, wanted in zip(tokens, targets, strict=True):
        loss = torch.zeros((), dtype=table.dtype)
        for r, w in zip(read.tolist(), wanted.tolist(), strict=True):
            if w >= 0:
                loss = loss + torch.logsumexp(table[r], 0) - table[r, w]
        result.append(loss)
    return torch.stack(result)


def tell(centre, means, counts, labels, documents, seed):
    """The tables of the controls."""
    n, names = len(means), sorted(set(labels.tolist()))

    def mean_of(rows):
        return sum(means[j] * counts[j] for j in rows) / sum(counts[j] for j in rows)

    of = {k: mean_of([j for j in range(n) if labels[j] == k]) for k in names}
    tables = {"": torch.stack([of[int(k)] for k in labels]), "told own prompt": means.clone(),
              "told nothing": centre.repeat(n, 1)}
    if len(names) > 1:
        turn = 1 + seed % (len(names) - 1)
        next_one = {k: names[(i + turn) % len(names)] for i, k in enumerate(names)}
        tables["told another cluster"] = torch.stack([of[next_one[int(k)]] for k in labels])
    tables["told no later rows"] = torch.stack([
        mean_of([j for j in range(n) if labels[j] == labels[i]
                 and not (documents[j] == documents[i] and j > i)]) for i in range(n)])
    return tables
