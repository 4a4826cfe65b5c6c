"""Exercise 1, on numbers that can be worked out by hand."""

import math

import torch
from torch.testing import assert_close

import adapters


def weights(C, query_key):
    """v and the output are x itself; q and k are x times `query_key`."""
    one = torch.eye(C)
    return {"c_attn.weight": torch.cat([query_key * one, query_key * one, one]),
            "c_attn.bias": torch.zeros(3 * C), "c_proj.weight": one, "c_proj.bias": torch.zeros(C)}


def test_equal_scores_give_the_mean_of_what_came_so_far():
    x = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [2.0, 6.0]]])
    y = adapters.attention(x, weights(2, 0.0), n_head=1)
    assert_close(y, torch.tensor([[[1.0, 0.0], [2.0, 0.0], [2.0, 2.0]]]))


def test_scores_are_divided_by_the_root_of_a_heads_width():
    # The second place: score a a / sqrt(4) = ln 3 for itself, 0 for the first: weights 3/4 and 1/4.
    a = math.sqrt(2 * math.log(3))
    x = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [a, 0.0, 0.0, 0.0]]])
    y = adapters.attention(x, weights(4, 1.0), n_head=1)
    assert_close(y[0, 1], torch.tensor([0.75 * a, 0.0, 0.0, 0.0]))


def test_each_head_has_weights_of_its_own():
    # Two heads of width 2. The first gives its own place 3/4 as above, the second 4/5.
    a = math.sqrt(math.sqrt(2) * math.log(3))
    b = math.sqrt(math.sqrt(2) * math.log(4))
    x = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [a, 0.0, b, 0.0]]])
    y = adapters.attention(x, weights(4, 1.0), n_head=2)
    assert_close(y[0, 1], torch.tensor([0.75 * a, 0.0, 0.8 * b, 0.0]))


def test_no_place_sees_a_later_one():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    changed = x.clone()
    changed[:, 3:] += 1.0
    before, after = (adapters.attention(t, weights(4, 1.0), n_head=2) for t in (x, changed))
    assert before.shape == (2, 5, 4)
    assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])
