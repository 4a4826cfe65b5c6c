"""The rivals' heads against their formulas, written out for one request at a time."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lab.common import Run
from lab.heads import LightHead, MadeHead, MaskedHead, PromptTuningHead, ScaledHead
from lab.model import GPT, GPTConfig
from lab.prompts import decode
from model import LMHead

C, V, r, K = 6, 20, 2, 9


def told(head):
    """`head` with weights that do something, and K statistics."""
    torch.manual_seed(0)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.5)
    head.center.normal_()
    head.spread.fill_(0.5)
    return head.double(), torch.randn(K, C, dtype=torch.float64)


def check_logits(head, statistics, factor):
    """factor(s): what stands on the diagonal between A and B where s is the statistic."""
    hidden, cluster = torch.randn(5, 4, C, dtype=torch.float64), torch.tensor([2, 0, 0, 8, 2])
    logits = head(hidden, statistics[cluster])
    A, B = head.factors(statistics[cluster])  # made once, they give the same
    torch.testing.assert_close(MadeHead(head.weight, head.scale * A, B)(hidden), logits)
    for row, k in enumerate(cluster):
        update = head.lora_B @ torch.diag(factor(statistics[k])) @ head.lora_A  # (V, C)
        expected = hidden[row] @ (head.weight + head.scale * update).T
        torch.testing.assert_close(logits[row], expected)


def test_light_writes_both_factors_in_the_space_of_hidden_states():
    head, statistics = told(LightHead(torch.randn(V, C).double(), r, 3.0))
    hidden, cluster = torch.randn(5, 4, C, dtype=torch.float64), torch.tensor([2, 0, 0, 8, 2])
    logits = head(hidden, statistics[cluster])
    for row, k in enumerate(cluster):
        out = head.hypernetwork(((statistics[k] - head.center) / head.spread)[None])[0]
        A, P = out[: r * C].view(r, C), out[r * C :].view(C, r)
        expected = hidden[row] @ (head.weight + head.scale * head.weight @ P @ A).T
        torch.testing.assert_close(logits[row], expected)


def test_light_has_its_parameters_at_gpt2_size():
    head = LightHead(torch.empty(50257, 768, device="meta"), 4, 1.0)
    assert sum(p.numel() for p in head.parameters() if p is not head.weight) == 254_048


@pytest.mark.parametrize("head", [LightHead(torch.randn(V, C), r, 3.0),
                                  ScaledHead(torch.randn(V, C), r, 3.0),
                                  MaskedHead(torch.randn(V, C), r, 3.0, "masks", K),
                                  PromptTuningHead(torch.randn(V, C))])
def test_an_untrained_head_gives_the_frozen_heads_logits(head):
    head.spread.fill_(0.5)
    hidden = torch.randn(3, 4, C)
    assert torch.equal(head(hidden, torch.randn(3, C)), LMHead(head.weight)(hidden))


@pytest.mark.parametrize("head", [LightHead(torch.randn(V, C), r, 3.0),
                                  ScaledHead(torch.randn(V, C), r, 3.0)])
def test_a_direction_that_never_varied_in_training_says_nothing(head):
    head, statistics = told(head)
    head.spread[2] = 0
    moved = statistics.clone()
    moved[:, 2] += 100
    assert all(map(torch.equal, head.factors(statistics), head.factors(moved)))


def test_scaled_writes_the_numbers_between_two_trained_factors():
    head, statistics = told(ScaledHead(torch.randn(V, C).double(), r, 3.0))
    check_logits(head, statistics,
                 lambda s: head.hypernetwork((s - head.center) / head.spread))


@pytest.mark.parametrize("kind", ["masks", "masks-alone", "library"])
@pytest.mark.parametrize("training", [False, True])
def test_masks_are_blended_or_one_is_taken(kind, training):
    head, statistics = told(MaskedHead(torch.randn(V, C).double(), r, 3.0, kind, n_clusters=K))
    head.selector.data.normal_()
    head.train(training)

    def factor(s):
        cosines = torch.stack([F.cosine_similarity(s - head.center, row, dim=0)
                               for row in head.selector])
        blended = kind == "masks" or (kind == "masks-alone" and not training)
        share = torch.softmax(10 * cosines, 0) if blended else (cosines == cosines.max()).double()
        return sum(w * mask for w, mask in zip(share, head.masks, strict=True))

    check_logits(head, statistics, factor)
    if kind == "library" and not training:
        head.blend = True
        cosines = F.normalize(statistics - head.center) @ F.normalize(head.selector).T  # (K, M)
        torch.testing.assert_close(head.weights(statistics), (10 * cosines).softmax(dim=1))


def test_with_few_clusters_there_are_no_more_masks_than_these():
    head = MaskedHead(torch.randn(V, C), r, 3.0, "masks", n_clusters=3)
    assert head.masks.shape == (3, 3 * r) and head.selector.shape == (3, C)


@pytest.mark.parametrize("prompts", [[[3, 8], [7, 1]], [[3], [7, 1, 4, 4], [2, 5]]])
def test_soft_prompts_are_read_in_generation_too(prompts):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=V, n_layer=2, n_head=2, n_embd=C)).eval()
    for p in model.transformer.h.parameters():
        torch.nn.init.normal_(p, std=1.0)
    model.lm_head, statistics = told(PromptTuningHead(model.lm_head.weight))
    model.double()
    run = Run(None, torch.device("cpu"), tokenizer=SimpleNamespace(end=None))
    statistics = statistics[: len(prompts)]
    found = decode(run, model, prompts, 5, statistics)
    for k, (prompt, new) in enumerate(zip(prompts, found, strict=True)):
        row = list(prompt)
        for _ in range(5):
            logits = model(torch.tensor([row]), statistics[k : k + 1])
            row.append(int(logits[0, -1].argmax()))
        assert new == row[len(prompt) :]
    other = decode(run, model, prompts, 5, -statistics)
    assert other != found  # else they would not have been read at all
