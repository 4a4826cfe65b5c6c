import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: two processes, two cores

import pytest
from hypothesis import settings

from lab import flags, model

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
        patch.setitem(model.SIZES, "tiny", shape)
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


@pytest.fixture
def arguments(corpus, tmp_path):
    """Command line of a small run that trains all three methods in about a second."""
    return [
        "--dataset", str(corpus), "--size", "tiny", "--vocab-size", "300", "--batch-size", "16",
        "--dtype", "float32", "--device", "cpu", "--base-epochs", "1", "--evaluations", "3",
        "--dropout", "0.1", "--max-steps", "9", "--out", str(tmp_path / "run"),
    ]
