"""Text in, rows out: what is read, how it is split, and that no two rows share a token."""

import itertools
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
from common import UserError
from data import IGNORE, SPLITS, Document, Tokenizer, cut, load_documents


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the river runs under the stone house and over the green stone\n" * 9]
    return Tokenizer.learn(texts, 270)


class Letters:
    """A tokenizer with a token a character."""

    end = 1000

    def encode_documents(self, documents):
        return [([*map(ord, d.prompt)], [*map(ord, d.text)]) for d in documents]


# ---------------------------------------------------------------------------------------- rows


@given(st.lists(st.text("abcdefg", min_size=1, max_size=40), min_size=1, max_size=6),
       st.integers(2, 9))
def test_running_text_is_cut_into_rows_that_share_no_token(texts, T):
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    if all((len(text) % (T + 1)) < 2 and len(text) < T + 1 for text in texts):
        return  # not one row of two tokens
    rows = cut(documents, Letters(), T)
    seen = [t for i in range(len(rows))
            for t in range(int(rows.start[i]), int(rows.start[i] + rows.length[i]))]
    assert len(seen) == len(set(seen))
    bounds = [0]
    for text in texts:
        bounds.append(bounds[-1] + len(text))
    for start, n, prompt in zip(rows.start, rows.length, rows.prompt, strict=True):
        assert 2 <= n <= T + 1 and prompt == max(1, n // 4)
        assert any(a <= start and start + n <= b for a, b in itertools.pairwise(bounds))
    missing = sum(map(len, texts)) - len(seen)
    assert missing <= len(texts)  # a last row of a single token has nothing to score


def test_a_batch_has_the_next_tokens_as_targets_of_the_continuation_alone():
    rows = cut([Document("a", "abcdefghij"), Document("b", "klm")], Letters(), 7)
    assert rows.length.tolist() == [8, 2, 3] and rows.prompt.tolist() == [2, 1, 1]
    tokens, targets = rows.batch(torch.tensor([0, 2]))
    assert "".join(map(chr, tokens[0])) == "abcdefg"
    assert [chr(t) if t != IGNORE else "-" for t in targets[0]] == list("-cdefgh")
    assert [chr(t) if t != IGNORE else "-" for t in targets[1]] == list("lm-----")
    whole = rows.batch(torch.tensor([0]), whole=True)[1]
    assert "".join(map(chr, whole[0])) == "bcdefgh"
    prompts, real = rows.prompts(torch.tensor([0, 2]))
    assert prompts.tolist() == [[97, 98], [107, 0]]
    assert real.tolist() == [[True, True], [True, False]]


def test_an_instruction_is_one_row_whose_response_is_scored_with_its_end(capsys):
    documents = [Document("q", "yes", "ask\n\n"), Document("r", "y" * 50, "ask\n\n"),
                 Document("s", "no", "x" * 30)]
    rows = cut(documents, Letters(), 12)
    assert rows.prompt.tolist() == [5, 5] and rows.length.tolist() == [9, 13]
    targets = rows.batch(torch.tensor([0]))[1][0]
    assert targets[targets != IGNORE].tolist() == [*map(ord, "yes"), 1000]
    assert capsys.readouterr().out == ("1 records left out, their prompt fills a row; 1 responses "
                                       "cut off where a row ends\n")


def test_text_without_a_row_is_refused():
    with pytest.raises(UserError, match="no row to score"):
        cut([Document("a", "x")], Letters(), 7)


# -------------------------------------------------------------------------------------- splits


def write(folder, name, text):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_documents_are_split_by_their_keys_alone(tmp_path):
    records = [{"text": f"text {i % 90}"} for i in range(100)]
    write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, records)))
    splits, mark = load_documents(str(tmp_path / "a.jsonl"), ".")
    keys = [{d.key for d in splits[split]} for split in SPLITS]
    assert len(set.union(*keys)) == sum(map(len, keys)) == 90
    assert [len(k) for k in keys] == [82, 4, 4]
    write(tmp_path, "b.jsonl", "\n".join(map(json.dumps, reversed(records))))
    again, other = load_documents(str(tmp_path / "b.jsonl"), ".")
    assert [{d.key for d in again[split]} for split in SPLITS] == keys
    assert mark != other and load_documents(str(tmp_path / "a.jsonl"), ".")[1] == mark


def test_a_published_split_is_kept(tmp_path):
    title = "\n = A Title = \n\n"
    for split in SPLITS:
        text = f"{title} {split} one\n{title} {split} two\n\n = = Sec = = \n"
        write(tmp_path, f"{split}.txt", text)
    splits, _ = load_documents(str(tmp_path), ".")
    for split in SPLITS:
        assert [f"{split} one" in splits[split][0].text, len(splits[split])] == [True, 2]
        assert "Sec" in splits[split][1].text


NAMED = [  # files of a folder, and the split of each
    {"train.txt": "train", "val.txt": "validation"},
    {"Train.TXT": "train", "Test.txt": "test"},
    {"x.train.txt": "train", "x.dev.txt": "validation", "x.test.txt": "test"},
    {"train/a.txt": "train", "train/b.jsonl": "train", "test/a.txt": "test"},
    {"train-00000-of-00001.jsonl": "train", "valid-00000-of-00001.jsonl": "validation",
     "test-00000-of-00001.jsonl": "test"},
    {"training.txt": "train"},
]


@pytest.mark.parametrize("files", NAMED, ids=lambda files: " ".join(files))
def test_a_split_that_file_names_tell_is_kept(tmp_path, capsys, files):
    for name in files:
        lines = [f"{name} {i}" for i in range(60)]
        text = "\n".join(json.dumps({"text": line}) for line in lines) if name.endswith("jsonl") \
            else "\n".join(lines)
        write((tmp_path / name).parent, Path(name).name, text)
    splits, _ = load_documents(str(tmp_path), ".")
    printed = capsys.readouterr().out
    for split in SPLITS:
        words = {word for d in splits[split] for word in d.text.split() if not word.isdigit()}
        own = {name for name in files if files[name] == split}
        assert words == (own or words & {name for name in files if files[name] == "train"}) != set()
        line = next(line for line in printed.splitlines() if f": {split} is " in line)
        assert (all(name in line for name in own) and own) or "made of a part of train" in line
    texts = [d.text for found in splits.values() for d in found]
    assert len(texts) == len(set(texts))  # what was made of train is no longer in it


@pytest.mark.parametrize("files, message", [
    (["train.txt", "notes.txt"], "names a split, and notes.txt names none"),
    (["test.txt", "validation.txt"], "and none names train"),
    (["train/test.txt", "train/a.txt"], "names two splits, test and train"),
])
def test_a_split_that_cannot_be_told_is_refused(tmp_path, files, message):
    for name in files:
        write((tmp_path / name).parent, Path(name).name, "a\nb\nc\n")
    with pytest.raises(UserError, match=message):
        load_documents(str(tmp_path), ".")


def test_what_is_not_read_is_mentioned(tmp_path, capsys):
    write(tmp_path, "a.txt", "one\ntwo\nthree\n")
    for name in ("b.md", "c.txt.gz", "d.csv"):
        write(tmp_path, name, "?")
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent, target_is_directory=True)
    load_documents(str(tmp_path), ".")
    line = capsys.readouterr().out.splitlines()[0]
    assert "4 files not read" in line and all(end in line for end in (".csv", ".gz", ".md"))
    assert "elsewhere" in line


def test_what_is_no_plain_file_is_not_opened(tmp_path, capsys):
    """A pipe would wait for ever, and /dev/zero never ends."""
    write(tmp_path, "a.txt", "one\ntwo\nthree\n")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone")
    splits, _ = load_documents(str(tmp_path), ".")
    assert "3 files not read" in capsys.readouterr().out
    assert sorted(d.text for s in splits.values() for d in s) == ["one\n", "three\n", "two\n"]
    for name in ("pipe.txt", "endless.txt"):
        with pytest.raises(UserError, match=r"no \.txt, \.json or \.jsonl file"):
            load_documents(str(tmp_path / name), ".")


def test_text_in_one_line_or_with_old_line_ends_is_cut_into_documents(tmp_path):
    words = " ".join(f"word{i}" for i in range(120_000))
    for text in (words, "\r".join(f"line {i}" for i in range(400))):
        (tmp_path / "x.txt").write_bytes(text.encode())
        splits, _ = load_documents(str(tmp_path / "x.txt"), ".")
        assert sum(map(len, splits.values())) >= 15
        assert max(len(d.text) for d in splits["train"]) <= 1 << 16
        found = sorted((d.key for split in splits.values() for d in split),
                       key=lambda key: int(key.split()[1]))
        by_key = {d.key: d.text for split in splits.values() for d in split}
        assert "".join(by_key[key] for key in found) == text.replace("\r", "\n")


def test_several_data_sets_each_have_their_own_splits(tmp_path):
    for name, n in (("a", 40), ("b", 20)):
        write(tmp_path, f"{name}.jsonl",
              "\n".join(json.dumps({"text": f"{name} {i}"}) for i in range(n)))
    splits, _ = load_documents(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", ".")
    assert [[sum(d.kind == k for d in splits[s]) for k in (0, 1)] for s in SPLITS] == [
        [36, 18], [2, 1], [2, 1]]


# --------------------------------------------------------------------------------------- files


def test_a_conversation_that_another_goes_on_with_is_left_out(tmp_path):
    """Its answer would stand in the other's prompt, and so in a statistic."""
    talk = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    other = [turn("user", "a"), turn("assistant", "x")]
    records = [{"messages": talk[:2]}, {"messages": talk}, {"messages": other}]
    path = write(tmp_path, "x.jsonl", "\n".join(map(json.dumps, records))) / "x.jsonl"
    assert [d.text for d in data.read_records(path)] == ["d", "x"]


def test_text_that_is_held_out_is_not_trained_on(tmp_path, capsys):
    """Whether a publisher's splits share it, a data set holds another, or a link leads to it."""
    for split, n in (("train", 9), ("test", 3), ("dev", 2)):
        write(tmp_path / "a", f"{split}.jsonl",
              "\n".join(json.dumps({"text": f"text {i}"}) for i in range(n)))
    splits, _ = load_documents(str(tmp_path / "a"), ".")
    assert sorted(d.text for d in splits["train"]) == [f"text {i}" for i in range(3, 9)]
    assert "3 training documents left out" in capsys.readouterr().out
    for i in range(30):
        write(tmp_path / "b" / ("sub" * (i % 2)), f"{i}.txt", f"text {i}")
        write(tmp_path / "b" / ".ipynb_checkpoints", f"{i}-checkpoint.txt", f"text {i}")
    splits, _ = load_documents(f"{tmp_path}/b,{tmp_path}/b/sub", ".")
    held_out = {d.text for split in SPLITS[1:] for d in splits[split]}
    assert not held_out & {d.text for d in splits["train"]}


def test_a_run_folder_within_its_text_is_not_read(tmp_path, capsys):
    write(tmp_path, "a.txt", "one\ntwo\nthree\n")
    before = load_documents(str(tmp_path), ".")[1]
    for name in ("lock", "config.json", "metrics.jsonl", "adapters/notes.txt"):
        write((tmp_path / "runs" / "x" / name).parent, Path(name).name, "{}")
    assert load_documents(str(tmp_path), ".")[1] == before
    assert "4 files not read" in capsys.readouterr().out
    write(tmp_path / "other", "lock", "of another program")
    write(tmp_path / "other", "b.txt", "four\nfive\n")
    assert load_documents(str(tmp_path), ".")[1] != before


def test_a_form_feed_ends_no_line_of_code(monkeypatch):
    source = '"""Of the module."""\nx = 1\n\f\n\ndef f():\n    """Of f."""\n    return 1\n'
    monkeypatch.setattr(data, "standard_library", lambda *patterns: [("a.py", source)])
    assert data.read_pycode().__next__().text == "x = 1\n\f\n\ndef f():\n    return 1\n"


def test_three_files_without_titles_are_no_wikitext(tmp_path):
    for split in SPLITS:
        write(tmp_path, f"{split}.txt", f"{split} one\n" * 30)
    splits, _ = load_documents(str(tmp_path), ".")
    assert all(len(found) > 20 for found in splits.values())


def test_one_object_in_many_lines(tmp_path):
    write(tmp_path, "x.json", json.dumps({"text": "a\nb"}, indent=1))
    assert [d.text for d in data.read_records(tmp_path / "x.json")] == ["a\nb"]
    write(tmp_path, "y.json", json.dumps({"data": [{"text": "a"}]}, indent=1))
    with pytest.raises(UserError, match="record 1: expected an object"):
        list(data.read_records(tmp_path / "y.json"))


def test_records_of_instructions(tmp_path):
    records = [{"instruction": " Add. ", "input": "1 1", "output": " 2 "},
               {"instruction": "Greet.", "input": None, "output": "Hi"},
               {"instruction": "Nothing.", "output": " "}]
    path = write(tmp_path, "x.json", json.dumps(records)) / "x.json"
    found = list(data.read_records(path))
    assert [(d.prompt, d.text) for d in found] == [
        ("Add.\n1 1\n\n", "2"), ("Greet.\n\n", "Hi"), ("Nothing.\n\n", "")]


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("record, prompt, text", [
    ({"prompt": "Add 1 1", "completion": " 2"}, "Add 1 1\n\n", "2"),
    ({"instruction": "Add.", "context": "1 1", "response": "2", "category": "sums"},
     "Add.\n1 1\n\n", "2"),
    ({"instruction": "Add.", "input": "", "output": "2", "text": "All of it."}, "Add.\n\n", "2"),
    ({"instruction": None, "output": None, "text": "Plain."}, "", "Plain."),
    ({"messages": [turn("system", "Be brief."), turn("user", "1 1?"), turn("assistant", "2")]},
     "Be brief.\n1 1?\n\n", "2"),
    ({"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "c"),
                   turn("assistant", "d")]}, "a\nb\nc\n\n", "d"),
])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_layouts_of_records(tmp_path, capsys, name, record, prompt, text):
    """JSON Lines are read whatever the file is called; a record of nulls is passed over."""
    lines = [json.dumps(record), json.dumps({"text": None})]
    path = write(tmp_path, name, "\n".join(lines)) / name
    assert [(d.prompt, d.text) for d in data.read_records(path)] == [(prompt, text)]
    unread = {"category", "text"} & record.keys() if prompt else set()
    assert ("not read of its records: " + ", ".join(unread) in capsys.readouterr().out) == (
        unread != set())


@pytest.mark.parametrize("record", [
    {"messages": []}, {"messages": [turn("user", "a")]}, {"messages": [turn("assistant", "a")]},
    {"messages": [turn("user", 1), turn("assistant", "a")]}, {"messages": ["a", "b"]},
    {"prompt": "a"}, {"prompt": 0, "completion": "a"}, {"text": []}, {}])
def test_records_of_no_layout_are_refused(tmp_path, record):
    path = write(tmp_path, "x.jsonl", json.dumps(record)) / "x.jsonl"
    with pytest.raises(UserError, match="line 1: expected an object"):
        list(data.read_records(path))


@pytest.mark.parametrize("name, text, message", [
    ("x.json", "[", "is not JSON"), ("x.json", '{"text":', "line 1"),
    ("x.json", "[1]", "record 1"), ("x.jsonl", '{"text": "a"}\n\n{"text": 1}', "line 3"),
    ("x.jsonl", '{"text": "a"}\n{', "line 2"), ("x.json", "[" * 100000, "is not JSON"),
    ("x.json", '[{"instruction": "a"}]', "record 1"), ("x.txt", "one", "at least 3"),
    ("x.pdf", "?", "no .txt, .json or .jsonl"), ("validation.txt", "a", "and none names train"),
])
def test_bad_files_are_refused_in_a_line(tmp_path, name, text, message):
    write(tmp_path, name, text)
    with pytest.raises(UserError, match=message) as error:
        load_documents(str(tmp_path), ".")
    assert "\n" not in error.value.args[0]


def test_text_that_is_not_utf8_or_not_there_is_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_documents(str(tmp_path), ".")
    with pytest.raises(UserError, match="no data set 'nonsense'"):
        load_documents("nonsense", ".")


@pytest.mark.parametrize("name", ["wikitext2", "alpaca"])
def test_the_hub_is_asked_once_and_its_rows_become_plain_files(tmp_path, monkeypatch, name):
    class Table(dict):
        def select_columns(self, names):
            return self

        def to_list(self):
            return [{"instruction": f"do {i}", "input": "", "output": "x"} for i in range(9)]

    def load_dataset(repository, configuration):
        assert (repository, configuration) == data.HUB[name]

        def rows(split):
            articles = (["", f" = {name} = \n", "", f"{split} {name}\n"] for name in ("One", "Two"))
            return list(itertools.chain(*articles))

        return {split: Table(text=rows(split)) for split in SPLITS}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    first = load_documents(name, tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace())  # would now fail
    assert load_documents(name, tmp_path)[1] == first[1]
    if name == "wikitext2":
        assert [d.text.split("\n")[0] for d in first[0]["test"]] == [" = One = ", " = Two = "]
        assert (tmp_path / name / "test.txt").read_text().startswith(" \n = One = \n \n")
    with pytest.raises(UserError, match="cannot be reached"):
        load_documents(name, tmp_path / "elsewhere")


def test_python_has_text_of_four_kinds():
    for name in ("pydocs", *data.kinds("python")):
        splits, _ = load_documents(name, ".")
        assert all(splits[split] for split in SPLITS)
    assert data.kinds("python,x") == ["pycode", "pymanual", "pytables", "x"]
    code = " ".join(d.text for d in data.read_pycode())
    prose = next(d.text for d in data.read_pydocs() if d.key == "unittest/mock.py")
    assert "def assert_called_once_with" in code
    sentence = "assert that the mock was called exactly once"
    assert sentence in prose and sentence not in code  # what the base reads is not in the code


# ----------------------------------------------------------------------------------- tokenizer


@given(st.text(max_size=60))
def test_tokens_come_back_as_the_text_they_were(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    sizes = tokenizer.bytes_per_token()
    assert int(sizes[torch.tensor(tokenizer.encode(text), dtype=torch.int64)].sum()) == len(
        text.encode())


def test_a_tokenizer_is_kept_as_json(tokenizer, tmp_path):
    assert tokenizer.vocab_size == 270 and tokenizer.end == 269
    (tmp_path / "t.json").write_text(json.dumps(tokenizer.spec))
    assert Tokenizer.load(tmp_path / "t.json").encode("the stone") == tokenizer.encode("the stone")
    for damage in ("{}", '{"name": "bpe"}', "[]", '{"name": "bpe", "pattern": "x", "ranks": [1]}'):
        (tmp_path / "t.json").write_text(damage)
        with pytest.raises(UserError, match="damaged"):
            Tokenizer.load(tmp_path / "t.json")


def test_gpt2s_vocabulary_that_cannot_be_had_is_told_in_a_line(monkeypatch):
    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: 1 / 0)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer({"name": "gpt2"})


@given(text=st.text(max_size=60))
def test_bytes_of_tokens_add_up_to_those_of_the_text(tokenizer, text):
    sizes = tokenizer.bytes_per_token()
    assert int(sizes[tokenizer.encode(text)].sum()) == len(text.encode(errors="replace"))
    assert sizes[tokenizer.end] == 0  # it is no text
