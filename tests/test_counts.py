import math

import numpy as np
import pytest
import torch

from counts import CountsHead, diffuse
from data import Examples
from files import UserError
from model import LMHead
from scoring import Company

V, C, R = 12, 5, 3  # R: tokens between two refreshes


def examples_of(lengths, prompts, seed=0):
    lengths = np.array(lengths)
    tokens = np.random.default_rng(seed).integers(0, V, lengths.sum())
    start = np.cumsum(lengths) - lengths
    return Examples(tokens, start, lengths, np.array(prompts), np.arange(len(lengths)))


def head_of(scope="running"):
    torch.manual_seed(0)
    return CountsHead(torch.randn(V, C), 2, 4.0, scope, R)


def test_parameters_are_loras_and_a_few():
    head = CountsHead(torch.empty(50257, 768, device="meta"), 4, 8.0)
    trained = sum(p.numel() for p in head.parameters() if p is not head.weight)
    assert trained == 4 * (50257 + 768) + 2 * (768 + 2)


def test_an_untrained_head_gives_the_frozen_heads_logits_exactly():
    head, hidden = head_of(), torch.randn(3, 4, C)
    statistics = torch.randint(5, (3, 2, V)).float()
    logits = head(hidden, head.updates(statistics), torch.arange(3))
    assert torch.equal(logits, LMHead(head.weight)(hidden))


@pytest.mark.parametrize("scope", ["prompt", "running", "full"])
def test_what_is_told_equals_counting_one_token_at_a_time(scope):
    examples = examples_of([14, 9, 14, 5, 11, 2], [4, 3, 6, 1, 2, 1])
    cluster, head = torch.tensor([0, 1, 0, 1, 0, 2]), head_of(scope)
    index = torch.tensor([4, 1, 0, 5])
    statistics, which = Company(head, examples, cluster).told(index)
    assert which.shape == (4, examples.length[index].max() - 1)

    def counted(i, known):
        """Tokens of row i: its prompt, and `known` of its continuation."""
        length = {"prompt": examples.prompt[i], "full": examples.length[i],
                  "running": min(examples.prompt[i] + known, examples.length[i])}[scope]
        row = examples.tokens[examples.start[i] :][:length]
        return torch.tensor([(row == token).sum() for token in range(V)]).float()

    for b, i in enumerate(index.tolist()):
        for t in range(examples.prompt[i] - 1, examples.length[i] - 1):  # predicts token t + 1
            known = (t + 1 - examples.prompt[i]) // R * R
            mates = [j for j in range(6) if cluster[j] == cluster[i]]
            own, company = statistics[which[b, t]]
            assert torch.equal(own, counted(i, known))
            assert torch.equal(company, sum(counted(j, known) for j in mates))


def test_the_update_is_the_gated_log_ratio_of_smoothed_frequencies():
    head, hidden = head_of(), torch.randn(1, 2, C)
    for p in (head.gate, head.gate_bias):
        torch.nn.init.normal_(p)
    head.frequency.copy_(torch.rand(V).softmax(0))
    statistics = torch.randint(5, (1, 2, V)).float()
    expected = hidden @ head.weight.T
    for term in range(2):
        c, m, g = statistics[0, term], math.exp(head.log_mass[term].item()), head.frequency
        b = ((c + m * g) / (c.sum() + m) / g).log()
        expected = expected + (hidden @ head.gate[term] + head.gate_bias[term])[..., None] * b
    found = head(hidden, head.updates(statistics), torch.tensor([0]))
    torch.testing.assert_close(found, expected)


def test_topics_are_grouped_and_the_frequencies_are_those_of_the_text():
    draw, rows = np.random.default_rng(0), []
    for topic in draw.permutation(np.repeat(range(3), 10)):
        rows.append(draw.integers(4 * topic, 4 * topic + 4, 12))
    tokens = np.concatenate(rows)
    column = np.arange(30)
    examples = Examples(tokens, 12 * column, np.full(30, 12), np.full(30, 8), column)
    head = head_of()
    cluster = head.fit_clusters(examples, 3, torch.Generator().manual_seed(0))
    topic = torch.from_numpy(tokens[::12] // 4)
    assert torch.equal(cluster[:, None] == cluster, topic[:, None] == topic)
    expected = torch.bincount(torch.from_numpy(tokens), minlength=V) + 1.0
    torch.testing.assert_close(head.frequency, expected / expected.sum())
    with pytest.raises(UserError, match="assign"):
        head.group(examples, None, None)


def test_diffused_features_equal_a_slow_loop():
    features = torch.nn.functional.normalize(torch.rand(40, 6, dtype=torch.float64), dim=1)
    found = diffuse(features, torch.float64, neighbours=3, rounds=2)
    similarity = features @ features.T
    graph = torch.zeros_like(similarity)
    for i in range(40):
        for j in similarity[i].argsort(descending=True)[:4]:  # itself and 3 more
            graph[i, j] = similarity[i, j]
    expected = features
    for _ in range(2):
        expected = torch.nn.functional.normalize(graph @ expected, dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
