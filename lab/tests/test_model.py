import math

import pytest
import torch

from lab.model import GPT, SIZES, GPTConfig, HeadAlone, generate_anew
from model import GPT as CoreGPT
from model import generate

TINY = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=8)
PROMPTS = [[3], [7, 1, 4, 9, 9], [2, 5]]


def tiny(kind=GPT):
    torch.manual_seed(0)
    model = kind(TINY).eval()
    for p in model.parameters():  # larger than at the start, so that differences show
        torch.nn.init.normal_(p, std=0.3)
    return model.double()


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_nano_has_about_2_6_million_parameters_and_pico_a_tenth():
    def size(name):
        return count(GPT(GPTConfig(vocab_size=4096, **SIZES[name])))

    assert size("nano") == pytest.approx(2.6e6, rel=0.01)
    assert size("pico") == 265_536 and size("medium") == pytest.approx(27.4e6, rel=0.01)


def test_residual_branches_start_smaller_with_depth():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_embd=192))
    assert model.transformer.h[0].mlp.c_proj.weight.std().item() == pytest.approx(
        0.02 / math.sqrt(16), rel=0.05)
    assert model.transformer.h[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_it_is_the_cores_model_where_nothing_is_read_before_the_tokens():
    model, theirs = tiny(), tiny(CoreGPT)
    theirs.load_state_dict(model.state_dict())
    tokens = torch.randint(50, (2, 16))
    assert torch.equal(model(tokens, start=3), theirs(tokens)[:, 3:])
    states = theirs.hidden(tokens)
    assert torch.equal(HeadAlone(TINY, theirs.lm_head)(states, start=3), theirs(tokens)[:, 3:])


@pytest.mark.parametrize("steps", [0, 1, 8, 100])
@pytest.mark.parametrize("stop", [None, "met"])
def test_computing_all_again_continues_as_the_core_does(steps, stop):
    model = tiny()
    stop = generate(model, PROMPTS, 8)[1][3] if stop else None

    def next_logits(tokens, length):
        return model(tokens)[torch.arange(len(tokens)), length - 1]

    options = {"temperature": 0.7, "top_k": 5}
    for given in ({}, options):
        expected, found = (function(*arguments, stop_token=stop, **given,
                                    generator=torch.Generator().manual_seed(0))
                           for function, arguments in (
                               (generate, (model, PROMPTS, steps)),
                               (generate_anew, (next_logits, PROMPTS, steps, 16, "cpu"))))
        assert found == expected
    with pytest.raises(ValueError):
        generate_anew(next_logits, [[1] * 16], 1, 16, "cpu")
