"""GPT, LoRA and generation, against transformers, plain formulas and slow references."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import model
from common import UserError
from model import (GPT, GPTConfig, LMHead, LoRAHead, LoRALinear, add_lora, generate, load_gpt2,
                   merge_lora)
from tests.conftest import random_adapter, random_gpt, randomise

TOKENS = torch.arange(24).view(2, 12) % 31


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny GPT-2 as transformers writes it, and that model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=2))
    randomise(theirs)
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return folder, theirs.eval()


def test_the_published_weights_give_the_logits_of_transformers(published):
    folder, theirs = published
    ours = load_gpt2(folder)
    with torch.no_grad():
        assert torch.allclose(ours(TOKENS), theirs(TOKENS).logits, atol=1e-4)


@pytest.mark.parametrize("spoil", ["missing", "shape", "config", "json", "weights", "relu",
                                   "untied"])
def test_what_is_no_gpt2_is_refused_in_a_line(published, tmp_path, spoil):
    tensors = {n: p.clone() for n, p in published[1].transformer.named_parameters()}
    config = json.loads((published[0] / "config.json").read_text())
    if spoil == "missing":
        del tensors["h.0.attn.c_attn.weight"]
    if spoil == "shape":
        tensors["wte.weight"] = torch.zeros(7, 16)
    if spoil == "config":
        del config["n_layer"]
    if spoil == "relu":
        config["activation_function"] = "relu"
    if spoil == "untied":
        config["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text("[" if spoil == "json" else json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    if spoil == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError) as error:
        load_gpt2(tmp_path)
    assert "\n" not in error.value.args[0] and str(tmp_path) in str(error.value)


def test_gpt2_is_fetched_from_the_hub_once(published, tmp_path, monkeypatch):
    import huggingface_hub

    def download(repository, file, local_dir):
        assert repository == "openai-community/gpt2"
        local_dir.mkdir(exist_ok=True)
        (local_dir / file).write_bytes((published[0] / file).read_bytes())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_gpt2(model.find_gpt2("gpt2", tmp_path)).config.n_embd == 16
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # would now raise
    assert model.find_gpt2("gpt2", tmp_path) == tmp_path / "gpt2"
    with pytest.raises(UserError, match="gpt2-xl"):
        model.find_gpt2("gpt2-xl", tmp_path)


def test_attention_is_the_formula(gpt):
    attention, x = gpt.transformer.h[0].attn, torch.randn(2, 5, 16, dtype=torch.float64)
    q, k, v = attention.c_attn(x).split(16, dim=2)
    expected = torch.zeros_like(x)
    for b in range(2):
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            for t in range(5):
                scores = q[b, t, part] @ k[b, :t + 1, part].T / math.sqrt(8)
                expected[b, t, part] = scores.softmax(dim=0) @ v[b, :t + 1, part]
    assert torch.allclose(attention(x), attention.c_proj(expected))


def test_no_logit_depends_on_a_later_token(gpt):
    changed = TOKENS.clone()
    changed[:, 7:] = 30 - changed[:, 7:]
    before, after = gpt(TOKENS), gpt(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_start_leaves_out_logits_and_changes_none(gpt):
    assert torch.allclose(gpt(TOKENS, start=5), gpt(TOKENS)[:, 5:])


def test_the_head_is_the_token_embedding(gpt):
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    assert torch.allclose(gpt(TOKENS), gpt.hidden(TOKENS) @ gpt.transformer.wte.weight.T)


def test_a_new_gpt_has_gpt2s_scales():
    for n_embd, std in ((768, 0.02), (192, 0.04)):  # in proportion to 1 / sqrt(n_embd)
        fresh = GPT(GPTConfig(64, 500, n_layer=8, n_head=4, n_embd=n_embd))
        assert fresh.transformer.wte.weight.std().item() == pytest.approx(std, rel=0.05)
        into = fresh.transformer.h[3].mlp.c_proj.weight.std().item()
        assert into == pytest.approx(std / 4, rel=0.1)
        assert not fresh.transformer.h[0].attn.c_attn.bias.any()


# ---------------------------------------------------------------------------------------- LoRA


def test_lora_is_the_formula_and_starts_at_zero():
    linear, x = torch.nn.Linear(5, 7), torch.randn(2, 3, 5)
    layer = LoRALinear(linear, rank=2, alpha=6.0)
    assert torch.equal(layer(x), linear(x))
    assert layer.lora_A.any()
    torch.nn.init.normal_(layer.lora_B)
    expected = linear(x) + 3.0 * (x @ layer.lora_A.T @ layer.lora_B.T)
    assert torch.allclose(layer(x), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_lora_of_peft_gives_the_same_logits(published):
    peft = pytest.importorskip("peft")
    folder, theirs = published
    ours = add_lora(load_gpt2(folder), rank=3, alpha=6.0)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)).eval()
    layers = dict(theirs.named_modules())
    for name, layer in ours.named_modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B)
            adapter = layers[f"base_model.model.{name}"]
            adapter.lora_A["default"].weight.data.copy_(layer.lora_A)
            adapter.lora_B["default"].weight.data.copy_(layer.lora_B)
    with torch.no_grad():
        assert torch.allclose(ours(TOKENS), theirs(TOKENS).logits, atol=1e-3)


def test_lora_trains_its_factors_alone_and_leaves_the_base_as_it_was(gpt):
    before = {n: p.clone() for n, p in gpt.named_parameters()}
    adapted = add_lora(gpt, 2, 4.0)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 2  # A and B of four layers a block, two blocks
    assert all(".lora_" in name for name in trained)
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(1.0)
    assert all(torch.equal(before[n], p) for n, p in gpt.named_parameters())


def test_lora_without_a_place_to_sit_is_an_error(gpt):
    with pytest.raises(ValueError, match="no linear layer"):
        add_lora(add_lora(gpt, 2, 4.0), 2, 4.0)


@pytest.mark.parametrize("method", ["lora", "chameleon"])
def test_merging_changes_no_logit(gpt, method):
    adapted, s = random_adapter(gpt, method), torch.randn(2, 16).double()
    before = adapted(TOKENS, s)
    merge_lora(adapted)
    assert not any(isinstance(m, LoRALinear) for m in adapted.modules())
    assert torch.allclose(adapted(TOKENS, s), before)


def test_the_lora_head_is_the_formula(gpt):
    head = LoRAHead(gpt.lm_head.weight, rank=2, alpha=6.0).double()
    h = torch.randn(2, 4, 16).double()
    assert torch.equal(head(h), gpt.lm_head(h))
    torch.nn.init.normal_(head.lora_B)
    W = head.weight + 3.0 * head.lora_B @ head.lora_A
    assert torch.allclose(head(h), F.linear(h, W))


# ---------------------------------------------------------------------------------- generation


def slow(adapted, prompt, n, statistic):
    """Greedy continuation, each token from a full pass over all that is before it."""
    tokens = list(prompt)
    for _ in range(n):
        if len(tokens) >= adapted.config.block_size:
            break
        logits = adapted(torch.tensor([tokens]), statistic)[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt):]


PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [8]]


@pytest.mark.parametrize("method", ["frozen", "lora", "chameleon"])
def test_the_cache_changes_no_token(gpt, method):
    adapted = gpt if method == "frozen" else random_adapter(gpt, method)
    s = torch.randn(3, 16).double()
    found = generate(adapted, PROMPTS, 20, s)
    assert found == [slow(adapted, p, 20, s[i:i + 1]) for i, p in enumerate(PROMPTS)]
    assert [len(new) for new in found] == [9, 5, 11]  # to the end of a context of 12


def test_generation_ends_before_the_stop_token_and_at_the_limit(gpt):
    free = generate(gpt, PROMPTS, 4)
    assert [len(new) for new in free] == [4, 4, 4]
    stop = free[0][2]
    cut = generate(gpt, PROMPTS, 4, stop_token=stop)
    for new, whole in zip(cut, free, strict=True):
        assert new == (whole[:whole.index(stop)] if stop in whole else whole)


def test_sampling_follows_the_distribution_and_top_k(gpt):
    logits = gpt(torch.tensor([[3, 1, 4]]))[0, -1]
    draws = generate(gpt, [[3, 1, 4]] * 3000, 1, temperature=2.0, top_k=3,
                     generator=torch.Generator().manual_seed(0))
    top = logits.topk(3)
    share = torch.tensor(draws)[:, 0].bincount(minlength=31) / 3000
    assert torch.allclose(share[top.indices].double(), (top.values / 2).softmax(dim=0), atol=0.04)
    assert share[top.indices].sum() == 1


@pytest.mark.parametrize("prompt", [[], [1] * 12])
def test_prompts_without_room_are_refused(gpt, prompt):
    with pytest.raises(ValueError, match="from 1 to 11"):
        generate(gpt, [[1], prompt], 3)


def test_generation_goes_through_the_heads_forward():
    class Always(LMHead):
        def forward(self, hidden, statistics=None):
            return super().forward(hidden) + 1e6 * F.one_hot(torch.tensor(7), 31)

    built = random_gpt()
    built.lm_head = Always(built.lm_head.weight)
    assert generate(built, [[1, 2]], 3) == [[7, 7, 7]]


def test_loras_first_values():
    """A is uniform within 1 / sqrt(n_in), as `nn.Linear`'s own weights start; B is zero."""
    torch.manual_seed(0)
    A, B = model.lora_factors(400, 30, 50)
    assert not B.any() and B.shape == (30, 50)
    assert A.abs().max() <= 1 / 20 and A.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.03)
