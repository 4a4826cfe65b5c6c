"""data.py and files.py against slow references, tiny corpora, and everything that can be wrong."""

import base64
import functools
import json
import os
import random
from itertools import chain, pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import regex
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import common
from common import UserError, write_json
from lab import data
from lab.data import END, IGNORE, SPLITS, Corpus, Tokenizer, cut, encode, load_examples
from lab.flags import read_json

quick = settings(max_examples=60, deadline=None)  # a loaded machine must not fail a test


def prose(n_words, seed=0):
    """Lines of made-up words, always the same for a seed."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("etaoinshr", k=draw.randint(2, 7))) for _ in range(200)]
    words = draw.choices(vocabulary, k=n_words)
    return "".join(" ".join(words[i : i + 9]) + "\n" for i in range(0, n_words, 9))


@functools.cache
def a_tokenizer(vocab_size=320):
    return Tokenizer.train([prose(2000)], vocab_size)


def corpus_of(folder, records):
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Corpus(str(path), folder)


def mixed_records(answer="Because {}."):
    """Instructions and running text, with what tokenizers trip over."""
    asked = [{"instruction": f"Why {i}?", "input": "é" * (i % 3), "output": answer.format(i)}
             for i in range(30)]
    return asked + [{"text": f"{i} {END}\r\n\u2028 naïve 日本 \t  🦎 {prose(20, i)}"}
                    for i in range(30)]


def fails_in_one_line(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message
    assert not [word for word in words if word not in message], message


# --------------------------------------------------------------------------------- cut, Examples


def slow_cut(documents, block_size):
    """(start, length, prompt, article) of every row, and how many documents were dropped."""
    rows, dropped, begin = [], 0, 0
    for article, (size, named) in enumerate(documents):
        step = size if named else block_size + 1  # an instruction is one row
        for start in range(begin, begin + size, step):
            length = min(block_size + 1, begin + size - start)
            prompt = named or max(1, length // 4)
            if prompt < length:
                rows.append((start, length, prompt, article))
            else:
                dropped += named > 0
        begin += size
    return rows, dropped


def index_of(documents):
    ends = np.cumsum([0] + [size for size, _ in documents])
    named = [named for _, named in documents] + [0]
    return np.array(list(zip(ends, named, [-(-n // 2) for n in named], strict=True)))


running = st.tuples(st.integers(0, 50), st.just(0))
instruction = st.tuples(st.integers(1, 25), st.integers(1, 25)).map(lambda p: (sum(p), p[0]))
some_documents = st.lists(running | instruction, min_size=1, max_size=8)


@quick
@given(some_documents, st.integers(1, 20))
@example([(1, 0), (17, 0), (16, 0), (0, 0)], 15)  # lone tokens, and a document that just fits
def test_cut_equals_the_slow_reference_and_rows_share_no_token(documents, block_size):
    index = index_of(documents)
    table = cut(np.zeros(0), index, block_size)
    columns = (table.start, table.length, table.prompt, table.article)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    assert (rows, table.dropped) == slow_cut(documents, block_size)
    seen = np.zeros(sum(size for size, _ in documents), dtype=int)
    for start, length, prompt, article in rows:
        assert 1 <= prompt < length <= block_size + 1
        assert index[article, 0] <= start and start + length <= index[article + 1, 0]
        seen[start : start + length] += 1
    assert seen.max(initial=0) <= 1
    # Running text loses nothing but a last token that is alone in its row.
    for (size, named), end in zip(documents, index[1:, 0], strict=True):
        lone = [size - 1] if size % (block_size + 1) == 1 else []
        assert named or np.flatnonzero(seen[end - size : end] == 0).tolist() == lone


@quick
@given(some_documents, st.integers(1, 20), st.randoms(use_true_random=False))
def test_batch_scores_exactly_the_continuation_and_prompts_shows_exactly_the_prompt(
        documents, block_size, draw):
    table = cut(np.arange(1, 500, dtype=np.uint16), index_of(documents), block_size)  # 0: padding
    assume(len(table))
    chosen = draw.choices(range(len(table)), k=5)
    inputs, targets = table.batch(chosen)
    whole_inputs, whole_targets = table.batch(chosen, whole=True)
    prompts, is_prompt = table.prompts(chosen)
    full, is_real = table.prompts(chosen, scope="full")
    width = max(table.length[i] for i in chosen)
    assert inputs.shape == targets.shape == (5, width - 1) and torch.equal(inputs, whole_inputs)
    assert prompts.shape == (5, max(table.prompt[i] for i in chosen)) and full.shape == (5, width)
    for b, i in enumerate(chosen):
        length, prompt = int(table.length[i]), int(table.prompt[i])
        row = [int(table.start[i]) + 1 + t for t in range(length)] + [0] * (width - length)
        assert inputs[b].tolist() == row[:-1] and full[b].tolist() == row
        for t in range(1, width):  # the target at t - 1 is token t
            assert targets[b, t - 1] == (row[t] if prompt <= t < length else IGNORE)
            assert whole_targets[b, t - 1] == (row[t] if t < length else IGNORE)
        assert prompts[b][is_prompt[b]].tolist() == row[:prompt]
        assert full[b][is_real[b]].tolist() == row[:length]


def test_records_whose_prompt_fills_a_row_are_counted_aloud(tmp_path, capsys):
    records = mixed_records() + [{"instruction": prose(80, i), "output": "x"} for i in range(30)]
    tables = load_examples(corpus_of(tmp_path, records), a_tokenizer(), 32, tmp_path / "cache")
    assert sum(table.dropped for table in tables.values()) == 30
    told = "".join(f"{split}: {table.dropped} records left out, prompt longer than a block\n"
                   for split, table in tables.items() if table.dropped)
    assert capsys.readouterr().out == told


# --------------------------------------------------------------------------------------- encode


def refuse(*_, **__):
    raise AssertionError("this must not be called again")


def test_encoded_documents_are_what_each_one_gives_alone(tmp_path):
    tokenizer, corpus = a_tokenizer(), corpus_of(tmp_path, mixed_records())
    n_documents = 0
    for split in SPLITS:
        tokens, index = encode(corpus, split, tokenizer, tmp_path / "cache")
        assert isinstance(tokens, np.memmap)
        documents = list(corpus.documents(split))
        assert len(index) == len(documents) + 1 and index[-1, 0] == len(tokens)
        for i, document in enumerate(documents):
            row = tokens[index[i, 0] : index[i + 1, 0]].tolist()
            prompt, text = row[: index[i, 1]], row[index[i, 1] :]
            assert prompt == tokenizer.encode(document.prompt)
            if document.prompt:  # a response says where it ends; running text does not
                assert text.pop() == tokenizer.end
            assert text == tokenizer.encode(document.text)
            assert tokenizer.decode(prompt) == document.prompt
            assert tokenizer.decode(text) == document.text
        n_documents += len(documents)
    assert n_documents == 60


def test_a_response_changes_no_token_of_its_prompt(tmp_path):
    prompts = []
    for answer in ("\n\n{}", "?", "é{} and much more"):
        corpus = corpus_of(tmp_path, mixed_records(answer)[:30])
        tokens, index = encode(corpus, "train", a_tokenizer(), tmp_path / "cache")
        prompts.append([tokens[start : start + n].tolist() for start, n, _ in index[:-1]])
    assert prompts[0] == prompts[1] == prompts[2] and len(prompts[0]) > 20


def test_a_cached_split_is_not_encoded_again(tmp_path, monkeypatch):
    tokenizer, cache = Tokenizer(a_tokenizer().spec), tmp_path / "cache"
    first = encode(corpus_of(tmp_path, mixed_records()), "train", tokenizer, cache)
    monkeypatch.setattr(tokenizer, "encode_batch", refuse)
    again = encode(corpus_of(tmp_path, mixed_records()), "train", tokenizer, cache)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert len(list(cache.iterdir())) == 2


def test_changed_text_tokenizer_or_code_never_meets_a_stale_cache(tmp_path, monkeypatch):
    def files_after(records, tokenizer):
        encode(corpus_of(tmp_path, records), "train", tokenizer, tmp_path / "cache")
        return len(list((tmp_path / "cache").iterdir()))

    records = mixed_records()
    assert files_after(records, a_tokenizer()) == 2
    records[3]["output"] += "."
    assert files_after(records, a_tokenizer()) == 4
    assert files_after(records, a_tokenizer(300)) == 6
    (tmp_path / "newer.py").write_bytes(Path(data.__file__).read_bytes() + b"# edited\n")
    monkeypatch.setattr(data, "__file__", str(tmp_path / "newer.py"))
    assert files_after(records, a_tokenizer(300)) == 8


def test_a_cache_of_the_right_size_but_other_tokens_is_made_again(tmp_path):
    corpus, tokenizer = corpus_of(tmp_path, mixed_records()), a_tokenizer()
    before = np.array(encode(corpus, "train", tokenizer, tmp_path / "cache")[0])
    [path] = (tmp_path / "cache").glob("*.tokens")
    path.write_bytes(bytes(path.stat().st_size))
    assert np.array_equal(encode(corpus, "train", tokenizer, tmp_path / "cache")[0], before)


def test_an_interrupted_encoding_leaves_nothing_behind(tmp_path, monkeypatch):
    corpus, tokenizer = corpus_of(tmp_path, mixed_records()), Tokenizer(a_tokenizer().spec)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(tokenizer, "encode_batch", refuse)
        encode(corpus, "train", tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(encode(corpus, "train", tokenizer, tmp_path / "cache")[0]) > 0


def test_token_ids_above_65535_survive_the_cache(tmp_path):
    words = [bytes([i]) for i in range(256)] + [b"%06d" % i for i in range(66_000)] + [b"zebra"]
    ranks = [base64.b64encode(word).decode() for word in words]
    tokenizer = Tokenizer({"name": "bpe", "pattern": r"\w+|\W+", "ranks": ranks})
    corpus = corpus_of(tmp_path, [{"text": "zebra " * i} for i in range(1, 9)])
    tokens, _ = encode(corpus, "train", tokenizer, tmp_path / "cache")
    assert set(tokens.tolist()) == {len(words) - 1, ord(" ")}


# ------------------------------------------------------------------------------------ tokenizer


def slow_bpe(tokenizer, text):
    """Merge the pair of lowest rank, again and again, word for word."""
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(tokenizer.spec["ranks"])}
    for word in regex.findall(tokenizer.spec["pattern"], text):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = [a + b for a, b in pairwise(parts)]
            mergeable = [(ranks[pair], i) for i, pair in enumerate(pairs) if pair in ranks]
            if not mergeable:
                break
            i = min(mergeable)[1]
            parts[i : i + 2] = [pairs[i]]
        yield from (ranks[part] for part in parts)


@quick
@given(st.text() | st.text("etaoinshr \n", max_size=60))
@example(f"the end: {END}")  # written out in a text, it is no end
def test_tokenizer_round_trips_and_equals_the_slow_reference(text):
    tokenizer, sizes = a_tokenizer(), a_tokenizer().bytes_per_token()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text and tokenizer.end not in tokens
    assert tokens == list(slow_bpe(tokenizer, text)) == tokenizer.encode_batch([text])[0]
    assert sizes[tokens].sum() == len(text.encode())


def test_trained_vocabulary_has_the_size_asked_for():
    tokenizer = a_tokenizer(320)
    sizes = tokenizer.bytes_per_token()
    assert tokenizer.vocab_size == len(sizes) == len(tokenizer.spec["ranks"]) + 1 == 320
    assert tokenizer.end == 319 and sizes[319] == 0 and sizes[:319].min() == 1 < sizes.max()
    assert Tokenizer.train([""], 257).vocab_size == 257
    fails_in_one_line(lambda: Tokenizer.train(["text"], 256), "--vocab-size 256", "257")


def test_a_saved_tokenizer_is_the_same_after_loading(tmp_path):
    a_tokenizer().save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == a_tokenizer().fingerprint != a_tokenizer(300).fingerprint
    assert loaded.encode(prose(50)) == a_tokenizer().encode(prose(50))
    assert (loaded.end, loaded.vocab_size) == (a_tokenizer().end, a_tokenizer().vocab_size)


def test_the_tokenizer_does_not_depend_on_held_out_text(tmp_path):
    trained, texts = [], []
    for n in range(2):
        write_splits(tmp_path / f"{n}", [prose(900), prose(90, seed=n + 1), prose(90, seed=n + 5)])
        corpus = Corpus(str(tmp_path / f"{n}"), tmp_path)
        trained.append(Tokenizer.train((d.text for d in corpus.documents("train")), 300))
        texts.append(corpus.fingerprint)
    assert trained[0].spec == trained[1].spec and texts[0] != texts[1]


def test_gpt2_without_its_vocabulary_names_the_way_out(monkeypatch):
    def unreachable(name):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("tiktoken.get_encoding", unreachable)
    fails_in_one_line(lambda: Tokenizer({"name": "gpt2"}), "TIKTOKEN_CACHE_DIR", "--tokenizer bpe")


@pytest.mark.parametrize("content", [
    None, b"", b'{"name": "bpe", "ran', b"[]", b"3", b'"gpt2"', b"{}", b'{"name": "bpe"}', b"\xff"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    fails_in_one_line(lambda: Tokenizer.load(tmp_path / "tokenizer.json"), "tokenizer.json")


DAMAGE = {
    "pattern does not parse": lambda spec: spec | {"pattern": "("},
    "pattern is no text": lambda spec: spec | {"pattern": None},
    "ranks are numbers": lambda spec: spec | {"ranks": [1, 2]},
    "ranks are an object": lambda spec: spec | {"ranks": {}},
    "ranks are not base64": lambda spec: spec | {"ranks": ["é", *spec["ranks"]]},
    "a byte has no token": lambda spec: spec | {"ranks": spec["ranks"][1:]},
    "tokens are doubled": lambda spec: spec | {"ranks": spec["ranks"] + spec["ranks"][:9]},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tokenizer_is_refused(tmp_path, damage):
    write_json(tmp_path / "tokenizer.json", DAMAGE[damage](a_tokenizer().spec))
    fails_in_one_line(lambda: Tokenizer.load(tmp_path / "tokenizer.json"), "tokenizer.json")


# --------------------------------------------------------------------------------------- splits


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


def test_splits_do_not_depend_on_how_the_path_is_spelt(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text(prose(2000))
    monkeypatch.chdir(tmp_path)
    spelt = [Corpus(path, ".") for path in ("texts", str(tmp_path / "texts"), "./texts/one.txt")]
    texts = [[[d.text for d in corpus.documents(split)] for split in SPLITS] for corpus in spelt]
    assert texts[0] == texts[1] == texts[2] and all(texts[0])


def test_blank_responses_are_dropped_and_counted(tmp_path):
    blank = ["", " ", "\n\t\n"]
    records = [{"instruction": f"Do {i}.", "input": "", "output": output}
               for i, output in enumerate(["done"] * 20 + blank)]
    corpus = alpaca_of(tmp_path, records)
    assert corpus.dropped == 3
    assert sorted(chain(*keys_of(corpus))) == sorted(f"Do {i}." for i in range(20))


# -------------------------------------------------------------------------------------- sources


def write_splits(folder, texts):
    folder.mkdir(parents=True)
    for split, text in zip(SPLITS, texts, strict=True):
        (folder / f"{split}.txt").write_bytes(text.encode())


BLANK, TITLE = " \n", " = A Title = \n"
wiki_lines = st.sampled_from([BLANK, BLANK, TITLE, TITLE, "\n", " = = Section = = \n", " = 3 \n",
                              " = Goals ; A = C = \n", " a\u2028b \x85 c\r \n", " words . \n"])


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.lists(wiki_lines, max_size=12)] * 3))
@example(([BLANK, TITLE, BLANK, " a \n", BLANK, TITLE, BLANK, TITLE, BLANK], [TITLE], []))
@example(([" x \n", TITLE, " y \n", BLANK, TITLE, " y \n", " x \n", TITLE, BLANK], [], []))
def test_articles_start_at_titles_between_blank_lines_and_lose_nothing(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("wiki")
    write_splits(folder / "texts", ["".join(lines) for lines in parts])
    documents = list(data.read_wikitext(folder / "texts"))
    for split, lines in zip(SPLITS, parts, strict=True):
        starts = [i for i in range(1, len(lines) - 1) if lines[i] == TITLE
                  and lines[i - 1].isspace() and lines[i + 1].isspace()]
        borders = [0, *starts, len(lines)]
        expected = ["".join(lines[a:b]) for a, b in pairwise(borders)]
        assert [d.text for d in documents if d.split == split] == expected
    assert len({document.key for document in documents}) == len(documents)


def test_articles_may_have_windows_line_ends(tmp_path):
    text = "".join([BLANK, TITLE, BLANK, " a \n", BLANK, TITLE, BLANK, " b \n"])
    write_splits(tmp_path / "texts", [text.replace("\n", "\r\n")] * 3)
    assert len([d for d in data.read_wikitext(tmp_path / "texts") if d.split == "train"]) == 3


def test_a_folder_that_cannot_be_read_is_no_empty_folder(tmp_path):
    with pytest.raises(OSError, match="none"):
        list(data.files_in(tmp_path / "none"))


def test_a_file_name_need_not_be_utf8(tmp_path):
    for name in (b"a.txt", b"b.txt", b"caf\xe9.txt"):
        (tmp_path / os.fsdecode(name)).write_text(prose(300))
    corpus = Corpus(str(tmp_path), tmp_path)
    assert sum(len(list(corpus.documents(split))) for split in SPLITS) > 10


def test_sections_of_a_text_file_end_at_lines_and_lose_nothing(tmp_path):
    (tmp_path / "one.txt").write_bytes(("a\u2028b\x85c\r\n" + prose(3000)).encode())
    (tmp_path / "two.txt").write_bytes(prose(500, seed=1).rstrip("\n").encode())
    whole = b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))
    documents = list(data.reader(str(tmp_path), tmp_path)())
    assert "".join(d.text for d in documents).encode() == whole
    assert all(d.text.endswith("\n") for d in documents[:-1] if d.text)
    assert len({d.key for d in documents}) == len(documents) > 20


def test_a_folder_gives_its_texts_and_its_records(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("plain\n")
    (tmp_path / "b.JSONL").write_text('\n{"instruction": " Add ", "input": "1", "output": " 2 "}\n')
    (tmp_path / "c.json").write_text('[{"text": " as it is "}]')
    (tmp_path / "d.csv").write_text("not read")
    found = [(d.prompt, d.text) for d in data.reader(str(tmp_path), tmp_path)() if d.text]
    assert found == [("", "plain\n"), ("Add\n1\n\n", "2"), ("", " as it is ")]


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
    first, second = data.read_pydocs.__wrapped__(), data.read_pydocs.__wrapped__()  # no cache
    found = {d.key: d.text for d in first if not d.key.startswith("topic ")}
    assert found == {"b.py": "In A.\n\nIn f.", "pack/a.py": "Top.\n\nIn h."}
    assert first == second and len(first) > 50


# ------------------------------------------------------------------------------------------ Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put a repository in the Hub's layout in the Hub's place: parquet files and a card."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def publish(name, tables):
        configuration = data.HUB[name][1] or "default"
        card = f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n"
        for split, columns in tables.items():
            path = f"{configuration}/{split}-00000-of-00001.parquet"
            (tmp_path / "repository" / configuration).mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "repository" / path)
            card += f"  - split: {split}\n    path: {path}\n"
        (tmp_path / "repository" / "README.md").write_text(card + "---\n")
        place = (str(tmp_path / "repository"), data.HUB[name][1])
        monkeypatch.setitem(data.HUB, name, place)

    return publish


@pytest.mark.parametrize("name", ["wikitext2", "wikitext2-raw"])
def test_wikitext_from_the_hub_is_kept_as_published_and_fetched_once(
        tmp_path, monkeypatch, hub, name):
    def stop_half_way(source, target):
        if target.name == "validation.txt":
            raise KeyboardInterrupt
        os.rename(source, target)

    article = [BLANK, TITLE, BLANK, " a\u2028b <unk> . \n", BLANK, " = = S = = \n", BLANK]
    texts = {split: [*article, f" {split} \n"] * n for n, split in enumerate(SPLITS, 1)}
    hub(name, {split: {"text": ["" if line == BLANK else line for line in lines]}
        for split, lines in texts.items()})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.os, "replace", stop_half_way)
        Corpus(name, tmp_path / "data")
    fetched = Corpus(name, tmp_path / "data")  # starts anew
    for split, lines in texts.items():
        kept = tmp_path / "data" / name / f"{split}.txt"
        assert kept.read_bytes().decode() == "".join(lines)
    monkeypatch.setattr(data, "fetch", refuse)
    again = Corpus(name, tmp_path / "data")
    assert again.fingerprint == fetched.fingerprint
    assert [len(part) for part in keys_of(again)] == [1, 2, 3]


def test_alpaca_from_the_hub_is_kept_as_published_and_fetched_once(tmp_path, monkeypatch, hub):
    records = [{"instruction": f"Do {i}.", "input": "naïve\n" * (i % 2), "output": f"{i}" * (i > 0)}
               for i in range(20)]
    columns = {field: [record[field] for record in records] for field in records[0]}
    hub("alpaca", {"train": columns | {"text": ["a template"] * 20}})
    fetched = Corpus("alpaca", tmp_path / "data")
    assert read_json(tmp_path / "data" / "alpaca" / "alpaca_data.json") == records
    monkeypatch.setattr(data, "fetch", refuse)
    again = Corpus("alpaca", tmp_path / "data")
    assert again.fingerprint == fetched.fingerprint and again.dropped == 1
    assert [len(part) for part in keys_of(again)] == [17, 1, 1]


@pytest.mark.parametrize("name, wanted", [
    ("wikitext2", "train.txt"), ("wikitext2-raw", "train.txt"), ("alpaca", "alpaca_data.json")])
def test_no_network_and_no_copy_names_the_file_and_both_ways_out(
        tmp_path, monkeypatch, name, wanted):
    def unreachable(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    fails_in_one_line(lambda: Corpus(name, tmp_path), str(tmp_path / name / wanted),
                      f"python -m lab.run train --dataset {name} --data-dir {tmp_path}",
                      "--dataset pydocs")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ bad input


LONG = json.dumps([{"instruction": prose(90, i), "output": "x"} for i in range(9)]).encode()
BAD = {  # --dataset: what is there, and words of the message
    "wikitext3": (None, ["wikitext3", "known name", "pydocs", "alpaca"]),
    "texts/missing.txt": (None, ["missing.txt"]),
    "empty.txt": (b"", ["0 documents with text"]),
    "blank.txt": (b"\n \n\n", ["0 documents with text"]),
    "table.csv": (b"a,b\n", ["table.csv", ".txt, .jsonl or .json"]),
    "one_line.txt": (b"just a line\n", ["1 documents", "at least 3"]),
    "two_lines.txt": (b"just\ntwo lines\n", ["2 documents", "at least 3"]),
    "short.txt": (b"a b\n" * 20, ["fewer than one block of 17", "--block-size"]),
    "cut.json": (b'[{"text": "a"}, {"te', ["cut.json", "not JSON"]),
    "object.json": (b'{"text": "a"}', ["object.json", "JSON array"]),
    "fields.json": (b'[{"text": "a"}, {"instruction": "a"}]', ["record 2", '"output"']),
    "strings.json": (b'["a", "b"]', ["record 1", '"text"']),
    "number.json": (b'[{"text": 3}]', ["record 1", '"text"']),
    "null.jsonl": (b'{"text": "a"}\n\n{"instruction": "a", "output": null}\n', ["line 3"]),
    "cut.jsonl": (b'{"text": "a"}\n{"text\n', ["cut.jsonl, line 2", "not JSON"]),
    "latin.txt": (b"ok\ncaf\xe9\n", ["latin.txt", "not UTF-8", "iconv"]),
    "latin.json": (b'[{"text": "caf\xe9"}]', ["latin.json", "not UTF-8"]),
    "bom.json": (b'\xef\xbb\xbf[{"text": "a"}]', ["bom.json", "BOM"]),
    "half_of_an_emoji.json": (rb'[{"text": "\ud83d"}, {"text": "a"}]', ["record 1"]),
    "long.json": (LONG, ["no row to score", "--block-size"]),
}


@pytest.mark.parametrize("dataset", BAD)
def test_bad_input_is_told_in_one_line(tmp_path, monkeypatch, dataset):
    content, words = BAD[dataset]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(dataset).write_bytes(content)
    fails_in_one_line(
        lambda: load_examples(Corpus(dataset, "data"), a_tokenizer(), 16, "cache"), *words)


def test_a_folder_without_text_and_half_a_copy_are_told_in_one_line(tmp_path):
    write_splits(tmp_path / "data" / "wikitext2", [prose(90), "", prose(90)])
    corpus = Corpus("wikitext2", tmp_path / "data")
    fails_in_one_line(lambda: load_examples(corpus, a_tokenizer(), 16, tmp_path),
                      "the validation split has no text")
    (tmp_path / "data" / "wikitext2" / "test.txt").unlink()
    fails_in_one_line(lambda: Corpus("wikitext2", tmp_path / "data"), "test.txt", "No such file")
    (tmp_path / "data" / "empty").mkdir()
    fails_in_one_line(lambda: Corpus(str(tmp_path / "data" / "empty"), "."), "empty", ".jsonl")


# ------------------------------------------------------------------------------------- condition


def test_the_instruction_is_counted_up_to_the_token_that_holds_its_end(tmp_path):
    records = [{"instruction": f"{prose(5, i)}.", "input": prose(4, i + 1), "output": "so"}
               for i in range(20)] + [{"instruction": prose(3, i), "output": "so"}
                                      for i in range(20, 40)]
    tokenizer = a_tokenizer()
    corpus = corpus_of(tmp_path, records)
    tables = load_examples(corpus, tokenizer, 200, tmp_path / "cache")
    for split in SPLITS:
        table = tables[split]
        seen = table.conditioned({"condition": "instruction"})
        assert table.conditioned({}) is table
        assert table.conditioned({"condition": "instruction+input"}) is table
        for i, document in enumerate(corpus.documents(split)):
            instruction = document.prompt[: document.instruction]
            tokens, mask = seen.prompts([i])
            shown = tokenizer.decode(tokens[0][mask[0]].tolist())
            # The token that ends the instruction may hold a line's end too, and nothing else.
            assert shown.rstrip("\n") == instruction
            assert torch.equal(seen.rows([i])[0], table.rows([i])[0])  # the model reads all of it
            assert all(map(torch.equal, seen.batch([i]), table.batch([i])))


def test_a_corpus_keeps_the_fingerprint_that_earlier_runs_remember(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"ask {i}", "input": "é", "output": "x"})
                            + "\n" for i in range(5)))
    assert Corpus(str(path), "data").fingerprint == "9df0bec219b4cbf8"
