import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: two processes, two cores

import pytest
from hypothesis import settings

import torch

import train as core
from hypernet import prompt_means
from lab import fair, flags
from lab import model as lab_model
from lab.cache import CacheHead
from lab.data import Examples
from lab.scoring import cluster_training, company_batch, is_told
from model import GPT, GPTConfig

settings.register_profile("steady", deadline=None)  # machines differ and are shared
settings.load_profile("steady")

WORDS = (
    "the of and a river stone cloud house green seven light apple walks under over sings "
    "quietly winter summer road"
).split()


@pytest.fixture(autouse=True, scope="session")
def tiny_size():
    """`--size tiny`: a base that trains in no time."""
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lab_model.SIZES, "tiny", shape)
        patch.setattr(flags, "SIZES", (*flags.SIZES, "tiny"))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of .txt files on two topics: words of one half of the list, or of the other."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for i in range(8):
        words = WORDS[:10] if i % 2 else WORDS[10:]
        lines = (" ".join(draw.choices(words, k=12)) for _ in range(40))
        (folder / f"text{i}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def with_base(arguments, path):
    """The same command line on another run's base, without what that base has decided."""
    decided = [flags.flag(key) for key in flags.SCRATCH + flags.OF_A_RUN]
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    kept = [part for pair in pairs if pair[0] not in decided for part in pair]
    return [*kept, "--base", str(path)]


def rows_of(tokens, start, length, prompt, article, **more):
    """`Examples` of arrays or lists."""
    columns = (torch.as_tensor(column) for column in (tokens, start, length, prompt, article))
    return Examples(*columns, **more)


def fitted(run, model, plan, examples):
    """Have a head cluster `examples`, as if they were its training's."""
    draw = torch.Generator().manual_seed(0)
    if is_told(model.lm_head):
        means, count = prompt_means(examples.seen(plan), run.base.transformer.wte.weight)
        with torch.no_grad():
            cluster_training(run, model.lm_head, plan, means, count, draw)
    elif isinstance(model.lm_head, CacheHead):
        model.lm_head.fit_clusters(examples, plan["clusters"], draw)


@torch.no_grad()
def all_logits(model, examples, told):
    """What a model says at every place of every row (N, T, V), told what `held_out` has found."""
    index = torch.arange(len(examples))
    if not isinstance(model.lm_head, CacheHead):
        return model(examples.batch(index)[0], told and told.table)
    inputs, _, *heard = company_batch(model.lm_head, examples, told.company, index)
    hidden = model.hidden(inputs)
    log_p = model.lm_head(hidden, *heard, torch.ones(hidden.shape[:2], dtype=torch.bool))
    return log_p.view(*hidden.shape[:2], -1)[: len(index)]


@pytest.fixture
def arguments(corpus, tmp_path):
    """Command line of a small run that trains all three methods in about a second."""
    return [
        "--dataset", str(corpus), "--size", "tiny", "--vocab-size", "300", "--batch-size", "16",
        "--dtype", "float32", "--device", "cpu", "--base-epochs", "1", "--evaluations", "3",
        "--max-steps", "9", "--out", str(tmp_path / "run"),
    ]


@pytest.fixture
def few_texts(monkeypatch, corpus):
    """Every kind is half of a small corpus."""

    def documents(kind, data_dir):
        found = sorted(corpus.iterdir())
        texts = [p.read_text() for p in found[len(kind) % 2::2]]
        made = [fair.Document(f"{kind} {i}", text) for i, text in enumerate(texts)]
        return {"train": made[:2], "validation": made[2:3], "test": made[3:]}

    monkeypatch.setattr(fair, "documents_of", documents)


@pytest.fixture
def base(corpus, tmp_path):
    """A base of random weights, in the files that train.py makes."""
    tokenizer = core.Tokenizer.learn((p.read_text() for p in sorted(corpus.iterdir())), 300)
    config = {"block_size": 256, "vocab_size": tokenizer.vocab_size, "n_layer": 1, "n_head": 1,
              "n_embd": 8}
    core.write_tensors(tmp_path / "base.safetensors", core.weights(GPT(GPTConfig(**config))),
                       {"plan": {"config": config}})
    core.write_json(tmp_path / "tokenizer.json", tokenizer.spec)
    return tmp_path / "base.safetensors"
