"""The contest of exercise 12: a stream that is not handed out, and lora-match trained on it.

Several Markov sources, each with a topic of its own, are read by a frozen base that knows their
mean. A row is told the mean embedding of the prompts in its cluster, some of which are of another
topic. Points grow along the way from lora-match to knowing the topic; a quarter of it is enough for
all.
"""

import torch
import torch.nn.functional as F

from hypernet import ChameleonHead
from model import LoRAHead
from worker import fit_head

V, C, TOPICS, T, PROMPT, CLUSTER = 32, 24, 6, 16, 12, 6
STEPS, RANK, ENOUGH = 400, 2, 0.25
ATTEMPT = 0.2  # of the points, for a head that keeps to the rules and learns anything
RATES = (3e-3, 1e-2, 3e-2)  # every head has the best of them


def n_trained(head):
    return sum(p.numel() for p in head.parameters() if p.requires_grad)


class Contest:
    def __init__(self, generator):
        self.generator = generator
        shared = self.normal(V, V)
        topic = self.normal(TOPICS, V, 3) @ self.normal(TOPICS, 3, V) / 3 ** 0.5
        words = 1.5 * self.normal(TOPICS, 1, V)  # some words are frequent in a topic
        self.logits = shared + 1.2 * topic + words  # (TOPICS, V, V)
        self.state = self.normal(V, C) / C ** 0.5  # the hidden state after each token
        mean = self.logits.softmax(dim=2).mean(dim=0).log()
        weight = torch.linalg.lstsq(self.state, mean - mean.mean(dim=1, keepdim=True)).solution.T
        self.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
        self.train, self.test = self.rows(480), self.rows(120)
        chameleon = ChameleonHead(self.weight, RANK, 2.0 * RANK, 1)
        self.most = n_trained(chameleon)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def walk(self, topic, n):
        """Tokens (N, n) of the sources topic (N,)."""
        tokens = [torch.randint(V, topic.shape, generator=self.generator)]
        for _ in range(n - 1):
            p = self.logits[topic, tokens[-1]].softmax(dim=1)
            tokens.append(torch.multinomial(p, 1, generator=self.generator)[:, 0])
        return torch.stack(tokens, dim=1)

    def rows(self, N):
        """Hidden states, targets, what each row is told, and what its clusters and loss are."""
        topic = torch.randint(TOPICS, (N,), generator=self.generator).sort().values
        tokens = self.walk(topic, PROMPT + T + 1)
        means = self.weight[tokens[:, :PROMPT]].mean(dim=1)  # (N, C)
        # Six rows side by side are a cluster. Some rows have changed places with others before.
        order = torch.arange(N)
        moved = torch.randperm(N, generator=self.generator)[:N // 8]
        order[moved] = moved.roll(1)
        cluster = torch.empty(N, dtype=torch.int64)
        cluster[order] = torch.arange(N) // CLUSTER
        clusters = torch.zeros(N // CLUSTER, C).index_add_(0, cluster, means) / CLUSTER
        read, targets = tokens[:, PROMPT:-1], tokens[:, PROMPT + 1:]
        truth = self.logits[topic[:, None], read].log_softmax(dim=2)
        oracle = -truth.gather(2, targets[:, :, None]).mean()
        return self.state[read], targets, clusters[cluster], means, clusters, float(oracle)

    def request(self, seed):
        """Arguments of `train_head`. The test's places come one by one, in an order that tells
        nothing of which follows which: a head cannot look at what comes next."""
        hidden, _, told, *_ = self.test
        n = hidden.shape[0] * T
        self.order = torch.randperm(n, generator=self.generator)
        row = self.order // T
        h, s = hidden.flatten(0, 1)[self.order][:, None], told[row]  # (n, 1, C), (n, C)
        asked = [[a, b] for a, b in zip(h.split(96), s.split(96), strict=True)]
        self.twice = torch.randperm(n, generator=self.generator)[:96]  # in other company
        asked.append([h[self.twice], s[self.twice]])
        self.seed = seed
        return [self.weight.detach().clone(), RANK, 2.0 * RANK, *self.train[3:5], *self.train[:3],
                asked, STEPS, list(RATES), seed]

    def rival(self, make):
        """Test loss of a head of ours, make() -> head, at the best of the rates."""
        losses = []
        for rate in RATES:
            torch.manual_seed(self.seed)
            head = make()
            trained = [p for p in head.parameters() if p.requires_grad]
            fit_head(head, trained, *self.train[:3], STEPS, rate, self.seed)
            with torch.no_grad():
                losses.append(cross_entropy(head(self.test[0], self.test[2]), self.test[1]))
        return min(losses)

    def chameleon(self):
        head = ChameleonHead(self.weight, RANK, 2.0 * RANK, len(self.train[4]))
        head.remember(*self.train[3:5])
        return head

    def lora_match(self):
        rank = max(1, round(self.most / (C + V)))
        return LoRAHead(self.weight, rank, 2.0 * rank)

    def judge(self, value, record):
        """(share, message) for what `train_head` has returned."""
        count, by_rate = value
        if type(count) is not int or not 0 <= count <= self.most:
            return 0.0, f"{count} trained parameters; at most {self.most}, chameleon's, are allowed"
        targets, losses = self.test[1].flatten()[self.order], []
        for *parts, again in by_rate:
            got = torch.cat(parts)
            if tuple(got.shape) != (len(self.order), 1, V):
                return 0.0, "logits (B, T, V) are expected"
            if not got.isfinite().all():
                continue  # this rate is too high for it
            if not torch.allclose(got[self.twice], again, rtol=1e-3, atol=1e-3):
                return 0.0, "a logit depends on the other rows of its batch"
            total = got.double().log_softmax(dim=2).exp().sum(dim=2)
            if not torch.allclose(total, torch.ones_like(total)):
                return 0.0, "the probabilities do not sum to 1"
            losses.append(cross_entropy(got, targets[:, None]))
        if len(by_rate) != len(RATES) or not losses:
            return 0.0, "no rate gave finite logits"
        loss, oracle = min(losses), self.test[5]
        rival, chameleon = self.rival(self.lora_match), self.rival(self.chameleon)
        frozen = cross_entropy(self.test[0] @ self.weight.T, self.test[1])
        gain, way = rival - loss, rival - oracle
        record |= {"loss": round(loss, 4), "lora-match": round(rival, 4), "gain": round(gain, 4),
                   "chameleon": round(chameleon, 4), "parameters": count}
        share = ATTEMPT * (loss < frozen - 0.02) + (1 - ATTEMPT) * max(0.0, gain / (ENOUGH * way))
        return min(1.0, share), (
            f"test loss {loss:.4f}, lora-match {rival:.4f}, chameleon {chameleon:.4f}, frozen "
            f"{frozen:.4f}, with the topic known {oracle:.4f}: {100 * gain / way:.0f}% of the way "
            f"from lora-match to the topic, all points from {100 * ENOUGH:.0f}%")


def cross_entropy(logits, targets):
    return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
