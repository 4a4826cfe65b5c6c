"""What the laboratory's data have beyond the core's: articles, instructions, scopes, pydocs."""

import functools
import json
import random
from itertools import chain

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common import UserError
from lab import data
from lab.data import SPLITS, Corpus, Examples, Tokenizer, load_examples

def prose(n_words, seed=0):
    """Lines of made-up words, always the same for a seed."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("etaoinshr", k=draw.randint(2, 7))) for _ in range(200)]
    words = draw.choices(vocabulary, k=n_words)
    return "".join(" ".join(words[i : i + 9]) + "\n" for i in range(0, n_words, 9))


@functools.cache
def a_tokenizer(vocab_size=320):
    return Tokenizer.learn([prose(2000)], vocab_size)


def corpus_of(folder, records):
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Corpus(str(path), folder)


def alpaca_of(folder, records):
    (folder / "alpaca").mkdir(parents=True)
    (folder / "alpaca" / "alpaca_data.json").write_text(json.dumps(records))
    return Corpus("alpaca", folder)


def keys_of(corpus):
    return [[document.key for document in corpus.documents(split)] for split in SPLITS]


@pytest.mark.parametrize("n", [3, 10, 100, 137])
def test_splits_are_90_5_5_and_disjoint_with_equal_keys_on_one_side(tmp_path, n):
    records = [{"instruction": f"Do {i}.", "input": "now" * (i % 2), "output": f"{i % 7}"}
               for i in range(n)]
    again = [record | {"output": "another answer"} for record in records]
    keys = keys_of(alpaca_of(tmp_path, records + again))
    held_out = max(1, round(n / 20))
    assert [len(set(part)) for part in keys] == [n - 2 * held_out, held_out, held_out]
    assert all(part.count(key) == 2 for part in keys for key in part)
    assert len(set().union(*keys)) == n


def test_splits_do_not_depend_on_the_order_of_records(tmp_path):
    records = [{"instruction": f"Do {i}.", "output": "done"} for i in range(80)]
    first = alpaca_of(tmp_path / "a", records)
    second = alpaca_of(tmp_path / "b", random.Random(0).sample(records, 80))
    assert keys_of(first) == keys_of(Corpus("alpaca", tmp_path / "a"))
    assert keys_of(first) != keys_of(second)
    assert [*map(sorted, keys_of(first))] == [*map(sorted, keys_of(second))]


def test_blank_responses_are_dropped_and_counted(tmp_path):
    blank = ["", " ", "\n\t\n"]
    records = [{"instruction": f"Do {i}.", "input": "", "output": output}
               for i, output in enumerate(["done"] * 20 + blank)]
    corpus = alpaca_of(tmp_path, records)
    assert corpus.dropped == 3
    assert sorted(chain(*keys_of(corpus))) == sorted(f"Do {i}." for i in range(20))


def write_splits(folder, texts):
    folder.mkdir(parents=True)
    for split, text in zip(SPLITS, texts, strict=True):
        (folder / f"{split}.txt").write_bytes(text.encode())


BLANK, TITLE = " \n", " = A Title = \n"
wiki_lines = st.sampled_from([BLANK, BLANK, TITLE, TITLE, "\n", " = = Section = = \n", " = 3 \n",
                              " = Goals ; A = C = \n", " a\u2028b \x85 c \n", " words . \n"])


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.lists(wiki_lines, max_size=12)] * 3))
@example(([BLANK, TITLE, BLANK, " a \n", BLANK, TITLE, BLANK, TITLE, BLANK], [TITLE], []))
@example(([" x \n", TITLE, " y \n", BLANK, TITLE, " y \n", " x \n", TITLE, BLANK], [], []))
def test_between_the_cores_articles_nothing_is_lost(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("wiki")
    write_splits(folder / "texts", ["".join(lines) for lines in parts])
    documents = data.read(str(folder / "texts"), "data")
    for split, lines in zip(SPLITS, parts, strict=True):
        found = "".join(d.text for d in documents if d.split == split)
        assert found.strip() == "".join(lines).strip()
    assert len({document.key for document in documents}) == len(documents)


def test_pydocs_is_prose_of_modules_and_topics():
    documents = data.read_pydocs()
    keys = [document.key for document in documents]
    assert sum(len(document.text) for document in documents) > 1_000_000
    assert len(set(keys)) == len(keys) and {"argparse.py", "json/decoder.py", "topic if"} <= {*keys}
    folders = {part for key in keys for part in key.split("/")}
    assert not folders & {"site-packages", "test", "tests", "idle_test"}
    assert all(d.text.strip() and not d.prompt and d.split is None for d in documents)
    assert json.decoder.JSONDecoder.__doc__.strip()[:40] in documents[
        keys.index("json/decoder.py")].text


def test_pydocs_reads_every_docstring_and_skips_what_is_no_module(tmp_path, monkeypatch):
    modules = {"b.py": 'class A:\n  """In A."""\n  async def f(self):\n    "In f."\nX = "no"\n',
               "pack/a.py": '"""Top."""\ndef g():\n  def h(): "In h."\n',
               "broken.py": "def (", "binary.py": "x = '\0'", "silent.py": "x = 1",
               "test/c.py": '"""No."""', "site-packages/d.py": '"""No."""'}
    for name, source in modules.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    first, second = data.read_pydocs(), data.read_pydocs()
    found = {d.key: d.text for d in first if not d.key.startswith("topic ")}
    assert found == {"b.py": "In A.\n\nIn f.", "pack/a.py": "Top.\n\nIn h."}
    assert first == second and len(first) > 50


# ------------------------------------------------------------------------------------- condition


def test_the_instruction_is_counted_up_to_the_token_that_holds_its_end(tmp_path):
    records = [{"instruction": f"{prose(5, i)}.", "input": prose(4, i + 1), "output": "so"}
               for i in range(20)] + [{"instruction": prose(3, i), "output": "so"}
                                      for i in range(20, 40)]
    tokenizer = a_tokenizer()
    corpus = corpus_of(tmp_path, records)
    tables = load_examples(corpus, tokenizer, 200)
    for split in SPLITS:
        table = tables[split]
        seen = table.seen({"condition": "instruction"})
        assert table.seen({}) is table
        assert table.seen({"condition": "instruction+input"}) is table
        for i, document in enumerate(corpus.documents(split)):
            instruction = document.prompt[: corpus.instruction[document.prompt]]
            tokens, mask = seen.prompts(torch.tensor([i]))
            shown = tokenizer.decode(tokens[0][mask[0]].tolist())
            # The token that ends the instruction may hold a line's end too, and nothing else.
            assert shown.rstrip("\n") == instruction
            # The model reads all of it.
            assert torch.equal(seen.read(torch.tensor([i]))[0], table.read(torch.tensor([i]))[0])


def test_a_corpus_keeps_the_fingerprint_that_earlier_runs_remember(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"ask {i}", "input": "é", "output": "x"})
                            + "\n" for i in range(5)))
    assert Corpus(str(path), "data").fingerprint == "9df0bec219b4cbf8"

# ------------------------------------------------------------------------------------- articles


def test_a_row_knows_the_article_that_it_was_cut_from(tmp_path):
    texts = [{"text": f"{i} {prose(20 + 9 * i, i)}"} for i in range(40)]
    corpus, tokenizer = corpus_of(tmp_path, texts), a_tokenizer()
    for split, table in load_examples(corpus, tokenizer, 16).items():
        documents = corpus.documents(split)
        assert table.article.unique().tolist() == list(range(len(documents)))
        for number, document in enumerate(documents):
            rows = (table.article == number).nonzero()[:, 0]
            tokens = torch.cat([table.tokens[a:a + n] for a, n in
                                zip(table.start[rows], table.length[rows], strict=True)])
            whole = tokenizer.encode(document.text)
            assert tokens.tolist() == whole[:len(tokens)] and len(whole) - len(tokens) <= 1


def test_the_scope_full_shows_a_statistic_the_continuation(tmp_path):
    table = load_examples(corpus_of(tmp_path, [{"text": prose(60, i)} for i in range(20)]),
                          a_tokenizer(), 16)["train"]
    index = torch.arange(len(table))
    seen = table.seen({"stat_scope": "full"})
    assert all(map(torch.equal, seen.prompts(index), table.read(index)))
    assert torch.equal(table.seen({"stat_scope": "prompt"}).prompt, table.prompt)


def test_kept_states_stand_in_the_place_of_their_tokens():
    tokens = torch.arange(20)
    rows = Examples(tokens, torch.tensor([3, 10]), torch.tensor([5, 7]), torch.tensor([1, 2]),
                    torch.arange(2), states=tokens[:, None] * 1.0)
    index = torch.tensor([1, 0])
    states, targets = rows.batch(index)
    plain, same = Examples(**vars(rows) | {"states": None}).batch(index)
    real = plain > 0
    assert torch.equal(targets, same) and torch.equal(states[..., 0][real], plain[real].float())


def test_fewer_than_three_documents_are_told(tmp_path):
    with pytest.raises(UserError, match="2 documents with text; at least 3"):
        corpus_of(tmp_path, [{"text": "a"}, {"text": "b"}])
