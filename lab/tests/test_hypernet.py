import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lab.hypernet import ChameleonHead, HyperNetwork, batch_statistics
from lab.model import LMHead, LoRAHead

C, V, r = 6, 20, 2


def head_of(form, seed=0, trained=True):
    torch.manual_seed(seed)
    head = ChameleonHead(torch.randn(V, C, dtype=torch.float64), r, 3.0, form).double()
    head.center.normal_()
    head.spread.fill_(0.5)
    if trained:
        for p in head.hypernetwork.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return head


@pytest.mark.parametrize("form, parameters", [("full", 6_786_596), ("light", 254_048)])
def test_parameter_counts_at_gpt2_size(form, parameters):
    head = ChameleonHead(torch.empty(50257, 768, device="meta"), 4, 1.0, form)
    assert sum(p.numel() for p in head.parameters() if p is not head.weight) == parameters
    network = HyperNetwork(768, torch.zeros(204_100))
    assert sum(p.numel() for p in network.parameters()) == 6_786_596


@pytest.mark.parametrize("form", ["full", "light"])
def test_an_untrained_head_gives_the_frozen_heads_logits_exactly(form):
    head = head_of(form, trained=False)
    hidden = torch.randn(3, 4, C, dtype=torch.float64)
    statistics = torch.randn(2, C, dtype=torch.float64)
    frozen = LMHead(head.weight)(hidden)
    assert torch.equal(head(hidden, head.updates(statistics), torch.tensor([0, 1, 0])), frozen)


@pytest.mark.parametrize("form", ["full", "light"])
def test_the_first_step_moves_it_whatever_the_statistic(form):
    head = head_of(form, trained=False)
    head.weight.requires_grad_(False)
    hidden = torch.randn(3, 4, C, dtype=torch.float64)
    logits = head(hidden, head.updates(torch.randn(1, C, dtype=torch.float64)))
    logits.logsumexp(-1).sum().backward()
    assert head.hypernetwork.layers[-1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("form", ["full", "light"])
def test_the_factored_update_equals_a_dense_one_made_for_each_row(form):
    head = head_of(form)
    hidden = torch.randn(5, 4, C, dtype=torch.float64)
    statistics = torch.randn(3, C, dtype=torch.float64)
    cluster = torch.tensor([2, 0, 0, 1, 2])
    logits = head(hidden, head.updates(statistics), cluster)
    for row in range(5):
        out = head.hypernetwork((statistics[cluster[row]] - head.center) / head.spread)
        A, B = out[: r * C].view(r, C), out[r * C :].view(-1, r)
        update = B @ A if form == "full" else head.weight @ B @ A
        expected = hidden[row] @ (head.weight + 3.0 / r * update).T
        torch.testing.assert_close(logits[row], expected)


@pytest.mark.parametrize("form", ["full", "light"])
def test_a_mixed_batch_equals_its_clusters_one_by_one(form):
    head = head_of(form)
    hidden = torch.randn(6, 4, C, dtype=torch.float64)
    statistics, cluster = torch.randn(2, C, dtype=torch.float64), torch.tensor([0, 1] * 3)
    logits = head(hidden, head.updates(statistics), cluster)
    for k in range(2):
        alone = head(hidden[cluster == k], head.updates(statistics[k : k + 1]))
        torch.testing.assert_close(logits[cluster == k], alone)


def test_with_a_constant_output_it_is_lora():
    head = head_of("full")
    lora = LoRAHead(head.weight, r, 3.0).double()
    torch.nn.init.normal_(lora.lora_B)
    with torch.no_grad():
        head.hypernetwork.layers[-1].weight.zero_()
        head.hypernetwork.layers[-1].bias.copy_(
            torch.cat([lora.lora_A.flatten(), lora.lora_B.flatten()]))
    hidden = torch.randn(3, 4, C, dtype=torch.float64)
    updates = head.updates(torch.randn(2, C, dtype=torch.float64))
    logits = head(hidden, updates, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(logits, lora(hidden, lora.updates()))


def test_a_direction_that_never_varied_in_training_says_nothing():
    head = head_of("full")
    head.spread[2] = 0
    statistics = torch.randn(1, C, dtype=torch.float64)
    moved = statistics.clone()
    moved[0, 2] += 100
    for here, there in zip(head.updates(statistics)[0], head.updates(moved)[0], strict=True):
        assert torch.equal(here, there)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="full or light"):
        ChameleonHead(torch.randn(V, C), r, 1.0, "other")


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_statistics_are_the_mean_over_a_clusters_tokens(B, T, K, seed):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, T, generator=generator) < 0.6
    cluster = torch.randint(K, (B,), generator=generator)
    count = mask.sum(dim=1).double()
    mean = (embeddings * mask[:, :, None]).sum(dim=1) / count.clamp(min=1)[:, None]
    found = batch_statistics(mean, count, cluster)
    for k in range(int(cluster.max()) + 1):
        tokens = [embeddings[b, t] for b in range(B) for t in range(T)
                  if cluster[b] == k and mask[b, t]]
        expected = torch.stack(tokens).mean(0) if tokens else torch.zeros(C, dtype=torch.float64)
        torch.testing.assert_close(found[k], expected)


def test_the_head_costs_no_dense_update_per_cluster():
    head = head_of("full")
    shapes = []
    original = F.linear

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                shapes.append(tuple(out.shape))
            return out

    with Watch():
        head(torch.randn(4, 3, C, dtype=torch.float64),
             head.updates(torch.randn(4, C, dtype=torch.float64)), torch.arange(4))
    assert F.linear is original
    assert (4, 3, V) in shapes
    assert not any(shape[-2:] == (V, C) and len(shape) == 3 for shape in shapes)
