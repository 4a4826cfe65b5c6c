import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: two processes, two cores

import pytest
import torch
from hypothesis import settings

import model
import train

settings.register_profile("steady", deadline=None)  # machines differ and are shared
settings.load_profile("steady")
# For a longer search: pytest tests -k "any_ or shown_cannot or share_no_token"
# --hypothesis-profile fuzz
settings.register_profile("fuzz", deadline=None, max_examples=20_000)

WORDS = ("the of and a river stone cloud house green seven light apple walks under over sings "
         "quietly winter summer road").split()


@pytest.fixture(autouse=True, scope="session")
def tiny_size():
    """`--size tiny`: a base that trains in no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "tiny", dict(n_layer=2, n_head=2, n_embd=16))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of .txt files on two topics: words of one half of the list, or of the other."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for i in range(8):
        words = WORDS[:10] if i % 2 else WORDS[10:]
        lines = (" ".join(draw.choices(words, k=12)) for _ in range(40))
        (folder / f"text{i}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def arguments(corpus, tmp_path):
    """Command line of a small run that trains the base and all three methods in seconds."""
    return ["--dataset", str(corpus), "--base-dataset", str(corpus), "--size", "tiny",
            "--vocab-size", "300", "--block-size", "24", "--batch-size", "16", "--dtype", "float32",
            "--device", "cpu", "--base-epochs", "0.3", "--evaluations", "3", "--max-steps", "9",
            "--out", str(tmp_path / "run")]


@pytest.fixture(scope="session")
def finished_run(corpus, tmp_path_factory):
    """A run folder with a base and an adapter of each method."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return train.main(["--dataset", str(corpus), "--base-dataset", str(corpus), "--size", "tiny",
                       "--vocab-size", "300", "--block-size", "24", "--dtype", "float32",
                       "--device", "cpu", "--base-epochs", "0.5", "--evaluations", "2",
                       "--max-steps", "12", "--cluster-size", "16", "--out", str(out)])


@pytest.fixture
def gpt():
    """A tiny GPT in double precision whose every parameter is random: no zero hides a mistake."""
    return random_gpt()


def random_gpt(block_size=12, vocab_size=31):
    torch.manual_seed(0)
    built = model.GPT(model.GPTConfig(block_size, vocab_size, n_layer=2, n_head=2, n_embd=16))
    randomise(built)
    return built.double().requires_grad_(False).eval()


def randomise(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))


def random_adapter(base, method, rank=2, clusters=3):
    """`base` with adapters of a method, as after some training: nothing of them is zero."""
    torch.manual_seed(1)
    plan = {"method": method, "rank": rank, "alpha": 4.0, "clusters": clusters}
    adapted = train.make_adapter(base.float(), plan)
    for _name, p in adapted.named_parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.randn_like(p))
    for _name, buffer in adapted.named_buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5)
    return adapted.double().eval()
