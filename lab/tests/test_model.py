import math

import pytest
import torch
import torch.nn.functional as F

from lab.model import (
    GPT,
    SIZES,
    GPTConfig,
    KVCache,
    LoRAHead,
    LoRALinear,
    add_lora,
    attend,
    generate,
    merge_lora,
    unmerge_lora,
)

TINY = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=8)


def tiny(seed=0, lora=False):
    torch.manual_seed(seed)
    model = GPT(TINY).eval()
    for p in model.parameters():  # larger than at the start, so that differences show
        torch.nn.init.normal_(p, std=0.3)
    if lora:
        add_lora(model, rank=2, alpha=3.0)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
    return model


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_gpt2_has_its_published_size_and_names():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, **SIZES["gpt2"]))
    assert count(model) == 124_439_808
    names = {name for name, _ in model.named_parameters()}
    assert len(names) == 2 + 12 * 12 + 2
    assert {"transformer.wte.weight", "transformer.h.11.attn.c_attn.bias",
            "transformer.h.0.mlp.c_proj.weight", "transformer.ln_f.bias"} <= names


def test_nano_has_about_2_6_million_parameters_and_pico_a_tenth():
    assert count(GPT(GPTConfig(vocab_size=4096, **SIZES["nano"]))) == pytest.approx(2.6e6, rel=0.01)
    assert count(GPT(GPTConfig(vocab_size=4096, **SIZES["pico"]))) == pytest.approx(2.6e5, rel=0.03)


def test_residual_branches_start_smaller_with_depth():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_embd=192))
    assert model.transformer.h[0].mlp.c_proj.weight.std().item() == pytest.approx(
        0.02 / math.sqrt(16), rel=0.05)
    assert model.transformer.h[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


def slow_logits(model, tokens):
    """GPT-2 written out for one sequence (T,), one head and one position at a time."""
    p = dict(model.named_parameters())

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    T, C, D = len(tokens), TINY.n_embd, TINY.n_embd // TINY.n_head
    x = p["transformer.wte.weight"][tokens] + p["transformer.wpe.weight"][:T]
    for i in range(TINY.n_layer):
        at = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn")
        y = torch.zeros_like(x)
        for head in range(TINY.n_head):
            q, k, v = (qkv[:, part * C + head * D : part * C + (head + 1) * D] for part in range(3))
            for t in range(T):
                weight = (k[: t + 1] @ q[t] / math.sqrt(D)).softmax(0)
                y[t, head * D : (head + 1) * D] = weight @ v[: t + 1]
        x = x + linear(y, f"{at}.attn.c_proj")
        z = linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        x = x + linear(z, f"{at}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ p["transformer.wte.weight"].T


def test_logits_equal_a_slow_reference():
    model = tiny().double()
    tokens = torch.randint(50, (3, 16))
    expected = torch.stack([slow_logits(model, row) for row in tokens])
    torch.testing.assert_close(model(tokens), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # two kinds of attention
@torch.no_grad()
def test_a_token_changes_no_earlier_logit(dtype):
    model, tokens = tiny().to(dtype), torch.randint(50, (1, 16))
    before = model(tokens)
    for t in range(16):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 50
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("T", [1, 16, 600])
def test_attention_of_16_bit_rows_on_a_cpu_equals_float32s(T):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, T, 8, requires_grad=True) for _ in range(3))
    exact = attend(q, k, v)
    short = attend(*(x.bfloat16() for x in (q, k, v)))
    torch.testing.assert_close(short.float(), exact, rtol=0, atol=0.05)
    for mine, theirs in zip(torch.autograd.grad(short.float().square().sum(), (q, k, v)),
                            torch.autograd.grad(exact.square().sum(), (q, k, v)), strict=True):
        # To a single key, gradients of q and k are zero, but for rounding.
        assert (mine - theirs).norm() <= 0.02 * theirs.norm() + 1e-4


def test_lora_starts_at_the_frozen_model_and_trains_only_its_own():
    model, tokens = tiny(), torch.randint(50, (2, 16))
    before = model(tokens)
    add_lora(model, rank=2, alpha=4.0)
    model.lm_head = LoRAHead(model.transformer.wte.weight, rank=2, alpha=4.0)
    assert torch.equal(before, model(tokens))
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    C, V = 8, 50
    per_block = (C + 3 * C) + (C + C) + (C + 4 * C) + (4 * C + C)
    assert sum(trained.values()) == 2 * (2 * per_block) + 2 * (C + V)


def test_lora_on_the_head_alone_has_204_100_parameters_at_gpt2_size():
    head = LoRAHead(torch.empty(50257, 768, device="meta"), rank=4, alpha=1.0)
    assert head.lora_A.numel() + head.lora_B.numel() == 204_100


def test_lora_equals_the_dense_update():
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(5, 7), rank=2, alpha=3.0).double()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 5, dtype=torch.float64)
    dense = layer.weight + 3.0 / 2 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ dense.T + layer.bias)
    head = LoRAHead(torch.randn(11, 5).double(), rank=2, alpha=3.0).double()
    torch.nn.init.normal_(head.lora_B)
    dense = head.weight + 3.0 / 2 * head.lora_B @ head.lora_A
    torch.testing.assert_close(head(x[None], head.updates()), x[None] @ dense.T)


def test_merge_and_unmerge_are_idempotent_and_leave_the_tied_head_alone():
    model, tokens = tiny(lora=True).double(), torch.randint(50, (2, 16))
    model.lm_head = LoRAHead(model.transformer.wte.weight, 2, 3.0).double()
    torch.nn.init.normal_(model.lm_head.lora_B)
    before, embedding = model(tokens), model.transformer.wte.weight.clone()
    weights = [m.weight.clone() for m in model.modules() if isinstance(m, LoRALinear)]
    for change, moved in ((merge_lora, True), (merge_lora, True), (unmerge_lora, False),
                          (unmerge_lora, False)):
        change(model)
        torch.testing.assert_close(model(tokens), before)
        assert torch.equal(model.transformer.wte.weight, embedding)
        now = [m.weight for m in model.modules() if isinstance(m, LoRALinear)]
        assert moved != all(map(torch.allclose, now, weights))


def test_add_lora_refuses_a_model_without_linear_layers():
    with pytest.raises(ValueError, match="no linear layer"):
        add_lora(tiny(lora=True), rank=2, alpha=1.0)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_must_be_positive(rank):
    with pytest.raises((ValueError, ZeroDivisionError)):
        LoRAHead(torch.empty(5, 4), rank, 1.0)


# ---------------------------------------------------------------------------------- generation

PROMPTS = [[3], [7, 1, 4, 9, 9], [2, 5]]


def slow_greedy(model, prompt, n):
    """One prompt alone, unpadded, everything computed again for each token."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + n, TINY.block_size):  # each prompt has its own room
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt):]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_equals_a_slow_loop_on_each_prompt_alone(use_cache):
    model = tiny(lora=True).double()
    found = generate(model, PROMPTS, 8, use_cache=use_cache)
    assert found == [slow_greedy(model, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(row) for row in found}) > 1


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_equals_a_slow_loop_without_padding(use_cache):
    model, prompts = tiny(lora=True).double(), [[3, 8], [7, 1], [2, 5]]
    found = generate(model, prompts, 8, use_cache=use_cache)
    assert found == [slow_greedy(model, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("pad", [None, torch.tensor([0, 2, 1])])
def test_a_cache_filled_in_parts_gives_the_hidden_states_of_the_whole(pad):
    model, tokens = tiny().double(), torch.randint(50, (3, 12))
    cache = [KVCache(room=14) for _ in range(TINY.n_layer)]
    parts = [model.hidden(part, cache, pad) for part in tokens.split([3, 1, 5, 1, 2], dim=1)]
    whole = model.hidden(tokens, pad=pad)
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, 2:], whole[:, 2:])  # 2: all padding
    assert cache[0].length == 12


def test_a_bfloat16_transformer_generates_beside_a_float32_head_whose_updates_are_made_once():
    model = tiny(lora=True)
    model.lm_head = LoRAHead(model.transformer.wte.weight, rank=2, alpha=3.0)
    torch.nn.init.normal_(model.lm_head.lora_B)
    made, updates = [], model.lm_head.updates
    model.lm_head.updates = lambda statistics: made.append(1) or updates(statistics)
    exact = generate(model, PROMPTS, 1)
    model.transformer.to(torch.bfloat16)
    found = generate(model, PROMPTS, 8)
    assert [len(row) for row in found] == [8, 8, 8] and len(made) == 2
    assert [row[:1] for row in found] == exact


def test_each_continuation_ends_where_its_own_context_is_full():
    model = tiny().double()
    found = generate(model, PROMPTS, 100)
    assert [len(row) for row in found] == [15, 11, 14]
    assert found == [slow_greedy(model, prompt, 100) for prompt in PROMPTS]


def test_generation_ends_before_the_stop_token():
    model = tiny().double()
    whole = generate(model, PROMPTS, 8)
    stop = whole[1][3]
    cut = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert generate(model, PROMPTS, 8, stop_token=stop) == cut


def test_top_1_is_greedy_and_draws_follow_the_generator():
    model = tiny()

    def draw(seed, **options):
        return generate(model, PROMPTS, 8, temperature=1.0,
                        generator=torch.Generator().manual_seed(seed), **options)

    assert draw(0, top_k=1) == generate(model, PROMPTS, 8)
    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize("top_k", [None, 3])
def test_draws_have_the_models_probabilities(top_k):
    model = tiny()
    probabilities = model(torch.tensor([[3]]))[0, 0].div(0.7).softmax(0)
    if top_k:
        others = probabilities.argsort(descending=True)[top_k:]
        probabilities = probabilities.index_fill(0, others, 0) / (1 - probabilities[others].sum())
    drawn = generate(model, [[3]] * 4000, 1, temperature=0.7, top_k=top_k,
                     generator=torch.Generator().manual_seed(0))
    seen = torch.bincount(torch.tensor(drawn)[:, 0], minlength=50) / 4000
    assert F.l1_loss(seen, probabilities, reduction="sum") < 0.1


def test_prompts_that_cannot_be_continued_are_refused():
    with pytest.raises(ValueError, match="no room"):
        generate(tiny(), [[1] * 16], 1)
    with pytest.raises(ValueError, match="empty"):
        generate(tiny(), [[1], []], 1)
