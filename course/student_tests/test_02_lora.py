"""Exercise 2, on numbers that can be worked out by hand."""

import torch
from torch.testing import assert_close

import adapters


def test_a_starts_random_and_b_at_zero():
    A, B = adapters.lora_start(6, 4, rank=2, seed=0)
    assert A.shape == (2, 6) and B.shape == (4, 2)
    assert (A != 0).all() and (B == 0).all()
    assert not torch.equal(A, adapters.lora_start(6, 4, rank=2, seed=1)[0])


def test_the_update_of_a_layer_by_hand():
    x = torch.tensor([[[1.0, 2.0]]])
    weight, bias = torch.eye(2), torch.tensor([1.0, 2.0])  # W x + b = (2, 4)
    A, B = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [2.0]])  # A x = 3, B A x = (3, 6)
    y = adapters.lora_linear(x, weight, bias, A, B, alpha=3.0)
    assert_close(y, torch.tensor([[[2.0 + 9.0, 4.0 + 18.0]]]))


def test_the_scale_is_alpha_over_rank():
    x = torch.tensor([[[1.0, 2.0]]])
    A, B = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 5.0], [2.0, 5.0]])
    y = adapters.lora_linear(x, torch.eye(2), torch.zeros(2), A, B, alpha=3.0)  # 3 / 2
    assert_close(y, torch.tensor([[[1.0 + 4.5, 2.0 + 9.0]]]))


def test_the_update_of_the_head_by_hand():
    hidden = torch.tensor([[[1.0, 1.0]]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # W h = (1, 1, 2)
    A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [-1.0]])  # A h = 3
    logits = adapters.lora_head(hidden, weight, A, B, alpha=2.0)
    assert_close(logits, torch.tensor([[[1.0 + 6.0, 1.0, 2.0 - 6.0]]]))


def test_only_the_factors_are_trained():
    trained, frozen = adapters.lora_names(n_layer=3, rank=2)
    assert len(trained) == 3 * 4 * 2  # four linear layers in a block, two factors each
    assert all("lora_" in name for name in trained)
    assert "transformer.wte.weight" in frozen
    assert not any("lora_" in name for name in frozen)


def whole_model(C=8, V=11, T=6, rank=2):
    """The state_dict of a GPT of one layer with LoRA; nothing in it is zero."""
    torch.manual_seed(0)
    weights = {"transformer.wte.weight": torch.randn(V, C), "transformer.wpe.weight":
               torch.randn(T, C)}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        weights |= {f"transformer.{name}.{part}": torch.randn(C) for part in ("weight", "bias")}
    for name, n_in, n_out in (("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C),
                              ("mlp.c_fc", C, 4 * C), ("mlp.c_proj", 4 * C, C)):
        for part, shape in (("weight", (n_out, n_in)), ("bias", (n_out,)),
                            ("lora_A", (rank, n_in)), ("lora_B", (n_out, rank))):
            weights[f"transformer.h.0.{name}.{part}"] = torch.randn(shape)
    return {name: tensor.double() for name, tensor in weights.items()}


def test_merging_changes_no_logit():
    tokens = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
    apart, merged = (adapters.lora_merged(whole_model(), tokens, 2, 4.0, merge=merge)
                     for merge in (False, True))
    assert apart.shape == (2, 4, 11)
    assert_close(merged, apart)
