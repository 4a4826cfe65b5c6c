"""Statistics and the hyper-network, against loops and plain formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import Rows
from hypernet import (ChameleonHead, HyperNetwork, cluster_means, cluster_statistics, features,
                      prompt_means)
from tests.conftest import random_adapter


def make_rows(lengths, prompts, seed=0):
    tokens = torch.randint(31, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    length = torch.tensor(lengths)
    return Rows(tokens.int(), length.cumsum(0) - length, length, torch.tensor(prompts),
                torch.zeros_like(length))


def test_prompt_means_are_the_means_of_the_prompts_embeddings(gpt):
    rows, embedding = make_rows([5, 9, 2, 6], [2, 7, 1, 1]), gpt.transformer.wte.weight
    means, count = prompt_means(rows, embedding)
    assert count.tolist() == [2, 7, 1, 1]
    for i in range(4):
        start = int(rows.start[i])
        prompt = rows.tokens[start:start + int(rows.prompt[i])].long()
        assert torch.allclose(means[i], embedding[prompt].mean(dim=0))


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 6))
def test_a_clusters_statistic_is_the_mean_over_all_its_tokens(seed, N, K):
    g = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(int(torch.randint(1, 9, (), generator=g)), 4, generator=g)
              for _ in range(N)]
    own = torch.randint(K, (N,), generator=g)
    means = torch.stack([t.mean(dim=0) for t in tokens])
    count = torch.tensor([float(len(t)) for t in tokens])
    found = cluster_means(means, count, own, K)
    for k in range(K):
        members = [t for t, o in zip(tokens, own, strict=True) if o == k]
        expected = torch.cat(members or tokens).mean(dim=0)  # an empty cluster: the mean of all
        assert torch.allclose(found[k], expected, atol=1e-5)
    assert torch.equal(cluster_statistics(means, count, own), found[own])
    order = torch.randperm(N, generator=g)  # a row's statistic is its cluster's in any order
    again = cluster_statistics(means[order], count[order], own[order])
    assert torch.allclose(again, found[own][order], atol=1e-5)


def test_features_lie_on_the_unit_sphere_around_the_corpus_mean():
    means = torch.randn(20, 6) + 5
    points = features(means, means.mean(dim=0))
    assert torch.allclose(points.norm(dim=1), torch.ones(20))
    away = means[3] - means.mean(dim=0)
    assert torch.allclose(points[3], away / away.norm(), atol=1e-6)


def test_the_network_is_two_relus_between_three_layers():
    network = HyperNetwork(6, torch.randn(10))
    for p in network.parameters():
        torch.nn.init.normal_(p)
    s = torch.randn(5, 6)
    (w1, b1), (w2, b2), (w3, b3) = [(m.weight.detach().numpy(), m.bias.detach().numpy())
                                    for m in network if hasattr(m, "weight")]
    h = np.maximum(s.numpy() @ w1.T + b1, 0)
    h = np.maximum(h @ w2.T + b2, 0)
    np.testing.assert_allclose(network(s).detach().numpy(), h @ w3.T + b3, rtol=1e-4, atol=1e-3)
    # Not linear: without the ReLUs these two would be equal.
    a, b = s[:1], s[1:2]
    assert not torch.allclose(network(a + b) + network(0 * a), network(a) + network(b), atol=1e-2)


def test_an_untrained_network_writes_its_start_whatever_it_is_told():
    start = torch.randn(10)
    assert torch.equal(HyperNetwork(6, start)(torch.randn(3, 6)), start.expand(3, 10))


def test_parameters_at_gpt2s_scale():
    with torch.device("meta"):
        weight = torch.empty(50257, 768)
        head = ChameleonHead(weight, rank=4, alpha=8.0, n_clusters=1)
    assert sum(p.numel() for p in head.hypernetwork.parameters()) == 6_786_596
    assert (head.hypernetwork[-1].out_features) == 204_100 == 4 * (768 + 50257)


def test_an_untrained_head_gives_the_frozen_heads_logits(gpt):
    head = ChameleonHead(gpt.lm_head.weight, 2, 4.0, 3).double()
    h, s = torch.randn(2, 5, 16).double(), torch.randn(2, 16).double()
    assert torch.equal(head(h, s), gpt.lm_head(h))


def test_the_head_is_the_formula_row_by_row(gpt):
    head = random_adapter(gpt, "chameleon").lm_head
    h, s = torch.randn(3, 5, 16).double(), torch.randn(3, 16).double()
    logits = head(h, s)
    for i in range(3):
        told = (s[i] - head.center) / head.spread
        out = head.hypernetwork(told[None])[0]
        A, B = out[:2 * 16].view(2, 16), out[2 * 16:].view(31, 2)
        W = head.weight + 4.0 / 2 * B @ A
        assert torch.allclose(logits[i], h[i] @ W.T)
        assert torch.allclose(logits[i:i + 1], head(h[i:i + 1], s[i:i + 1]))  # whoever is beside it


def test_the_statistic_matters_and_what_never_varied_says_nothing(gpt):
    head = random_adapter(gpt, "chameleon").lm_head
    h, s = torch.randn(1, 5, 16).double(), torch.randn(1, 16).double()
    other = s + torch.eye(16)[3]
    assert not torch.allclose(head(h, s), head(h, other))
    head.spread[3] = 0
    assert torch.equal(head(h, s), head(h, other))


def test_what_a_head_remembers():
    head = ChameleonHead(torch.randn(31, 16), 2, 4.0, n_clusters=2)
    means, clusters = torch.randn(9, 16), torch.randn(2, 16)
    head.remember(means, clusters)
    assert torch.allclose(head.center, means.mean(dim=0))
    assert torch.allclose(head.spread, torch.from_numpy(means.numpy().std(axis=0)))
    assert torch.equal(head.clusters, clusters)
    with pytest.raises(RuntimeError):
        head.remember(means, torch.randn(3, 16))
