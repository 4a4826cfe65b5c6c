"""Text or instructions in, rows of tokens out.

A *document* is an article, a module's source, a file, an instruction with its response. Each is
tokenised on its own and cut into *rows*: a prompt, and a continuation that is scored.

    running text    consecutive rows of T + 1 tokens that share no token and never cross a
                    document's end; the first quarter of a row is its prompt
    instructions    one row each: instruction and input are the prompt, the response follows

No two rows share a token. With the usual overlap by one, the last target of a row would be the
first prompt token of the next, and would reach its own prediction through the statistic of a
cluster that holds both.
"""

import ast
import base64
import hashlib
import io
import os
import re
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common import UserError, parse_json, printable, read_text, write_json, write_text

SPLITS = ("train", "validation", "test")
IGNORE = -1  # a target that is not scored
END = "<|endoftext|>"
RESPONSE = "\n\n"  # between an instruction and its response; there is no other template
PYTHON = "pycode,pymanual,pytables"  # what the data set "python" stands for
# name: (repository on the Hugging Face Hub, its configuration)
HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-v1"),
    "alpaca": ("tatsu-lab/alpaca", None),
}


@dataclass
class Document:
    key: str  # documents with the same key are kept in one split
    text: str
    prompt: str = ""  # "" in running text
    split: str | None = None  # None: not split by its publisher
    kind: int = 0  # which of several data sets it is of; no method is ever told


# ------------------------------------------------------- text that comes with Python: no network


def standard_library(*patterns):
    """(name, source) of the standard library's modules: not its tests, nor what is installed."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        name = path.relative_to(root)
        if not skipped & set(name.parts):
            yield name.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def docstrings(source):
    """The nodes of a module's docstrings, of its classes and functions too."""
    places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, places)]
    except (SyntaxError, ValueError):  # a few files are templates or samples, not modules
        nodes = []
    return [node.body[0] for node in nodes if ast.get_docstring(node, clean=False) is not None]


def read_pydocs():
    """Prose: the docstrings of the standard library, a document a module."""
    for name, source in standard_library("**/*.py"):
        texts = [node.value.value for node in docstrings(source)]
        yield Document(name, "\n\n".join("\n".join(line.strip() for line in text.splitlines())
                                         for text in texts))


def read_pycode():
    """Code: modules of four packages of the standard library, without their docstrings."""
    packages = ("asyncio", "email", "multiprocessing", "unittest")
    for name, source in standard_library(*(f"{package}/*.py" for package in packages)):
        lines = list(io.StringIO(source))  # splitlines() would end one at a form feed too
        for node in docstrings(source):
            lines[node.lineno - 1:node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        yield Document(name, "".join(lines))


def read_pymanual():
    """Reference manual: the topics of Python's help()."""
    from pydoc_data.topics import topics

    return [Document(name, text) for name, text in sorted(topics.items())]


def read_pytables():
    """Tables: the modules that say which character each byte of an encoding stands for."""
    return [Document(*item) for item in standard_library("encodings/iso*.py", "encodings/mac*.py")]


# ---------------------------------------------------------------------------------- other text


def read_wikitext(folder):
    """Articles, split by their publisher. A title is a line ` = Title = ` between blank lines."""
    for split in SPLITS:
        articles, lines = [[]], read_text(folder / f"{split}.txt").split("\n")
        for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
            title = line.startswith(" = ") and line.rstrip().endswith(" =") and line.count("=") == 2
            if title and not before.strip() and not after.strip():
                articles.append([])
            articles[-1].append(line)
        for number, article in enumerate(articles):
            yield Document(f"{split} {number}", "\n".join(article), split=split)


def parse_records(path):
    """(where, object) of a JSON array or of JSON Lines; a field that is null is not there."""
    text = read_text(path)
    lines = [(f"{path}, line {number}", line)
             for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix.lower() == ".jsonl" or re.match(r"\s*\{.*\}\s*\n\s*\{", text):
        records = [(where, parse_json(line, where)) for where, line in lines]
    else:
        found = parse_json(text, path)
        records = [(f"{path}, record {number}", r)
                   for number, r in enumerate(found if isinstance(found, list) else [found], 1)]
    for where, record in records:
        fields = record.items() if isinstance(record, dict) else ()
        if not fields or any(value is not None for _, value in fields):
            yield where, {name: value for name, value in fields if value is not None}


def read_records(path):
    """Documents of a file of records, in one of the layouts that `understand` knows."""
    records, unread = list(parse_records(path)), set()
    said = [turns_of(record) for _, record in records]
    # A conversation that another record goes on with would have its answer in that one's prompt.
    begun = {turns[:n] for turns in said for n in range(1, len(turns))}
    for (where, record), turns in zip(records, said, strict=True):
        parts, output, names = understand(record)
        if turns in begun:
            continue
        if not all(isinstance(part, str) for part in (*parts, output)):
            raise UserError(f'{where}: expected an object with the strings '
                            f'"instruction" and "output" (and perhaps "input"), or "prompt" and '
                            f'"completion", or "text", or "messages" with an answer of the '
                            f'assistant')
        # Half of a surrogate pair, which JSON can spell, is no text: it becomes a question mark.
        *parts, output = (v.encode(errors="replace").decode() for v in (*parts, output))
        unread |= record.keys() - names
        if not parts:
            yield Document(output, output)
        else:
            prompt = "\n".join(filter(None, (part.strip() for part in parts)))
            yield Document(prompt, output.strip(), prompt + RESPONSE)
    if unread:
        print(f"{printable(path)}: not read of its records: {printable(', '.join(sorted(unread)))}")


def understand(record):
    """What a record says, in a layout that is common: the parts of its prompt (none in plain text),
    what follows them, and the names of the fields that were read. What follows is None in no known
    layout."""
    for first, more, output in (("instruction", "input", "output"), ("prompt", None, "completion"),
                                ("instruction", "context", "response")):
        if {first, output} <= record.keys():
            return [record[first], record.get(more, "")], record[output], {first, more, output}
    turns = turns_of(record)
    if len(turns) > 1:
        *said, answer = (content for _, content in turns)
        return said, answer, {"messages"}
    return [], record.get("text"), {"text"}


def turns_of(record):
    """(role, content) of each turn of a conversation, to the assistant's last; () without one."""
    turns = record.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return ()
    turns = [(turn.get("role"), turn.get("content")) for turn in turns]
    if not all(isinstance(part, str) for turn in turns for part in turn):
        return ()
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    return tuple(turns)


def read_sections(path, name, split=None):
    """Plain text, in sections of about 64 kB, or a fortieth of it, that end where a line ends; a
    line that is longer than a section, or a third of the text, is cut."""
    section, size, number = [], 0, 0
    text = read_text(path)
    longest = min(1 << 16, max(1000, len(text) // 3))
    for line in text.splitlines(keepends=True):
        for first in range(0, len(line), longest):
            section.append(line[first:first + longest])
            size += len(section[-1])
            if size >= min(1 << 16, len(text) // 40):
                yield Document(f"{name} {number}", "".join(section), split=split)
                section, size, number = [], 0, number + 1
    yield Document(f"{name} {number}", "".join(section), split=split)


def fetch(name, wanted):
    """Download a data set from the Hugging Face Hub, as plain files; `wanted` is written last."""
    import datasets

    repository, configuration = HUB[name]
    try:
        tables = datasets.load_dataset(repository, configuration)
    except Exception as error:  # whatever went wrong on the way, there are two ways out
        raise UserError(
            f"{wanted} does not exist and the Hugging Face Hub cannot be reached "
            f"({type(error).__name__}); put the file there, or name a folder that has it with "
            f"--data-dir, or leave --dataset out") from None
    if name == "alpaca":
        fields = ["instruction", "input", "output"]
        return write_json(wanted, tables["train"].select_columns(fields).to_list())
    for split in reversed(SPLITS):
        # The Hub has "" for a blank line; the original release has a space and a newline.
        text = "".join(line or " \n" for line in tables[split]["text"])
        write_text(wanted.with_name(f"{split}.txt"), text)


def read(name, data_dir):
    """The documents of one data set: a known name, a file, or a folder."""
    known = {"pydocs": read_pydocs, "pycode": read_pycode, "pymanual": read_pymanual,
             "pytables": read_pytables}
    if name in known:
        return known[name]()
    if name in HUB:
        wanted = Path(data_dir) / name / ("alpaca_data.json" if name == "alpaca" else "train.txt")
        if not wanted.exists():
            fetch(name, wanted)
        return read_records(wanted) if name == "alpaca" else read_wikitext(wanted.parent)
    path = Path(name)
    if not name or not path.exists():
        raise UserError(f"no data set {name!r}: neither a known name (python, "
                        f"{', '.join([*known, *HUB])}) nor a file or folder")
    names = {p.name for p in path.iterdir() if p.name[0] != "."} if path.is_dir() else ()
    if names == {f"{split}.txt" for split in SPLITS}:
        articles = list(read_wikitext(path))
        if len(articles) > 3:  # there are titles
            return articles
    return read_files(path)


def read_files(path):
    """The documents of a .txt, .json or .jsonl file, or of all that are in a folder.

    Where the files of a folder name their splits, these are kept: see `split_of`.
    """
    root = path.parent if path.is_file() else path
    found = [path] if path.is_file() else sorted(
        p for p in path.rglob("*") if p.is_symlink() or not p.is_dir())
    found = [p for p in found
             if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    # A run folder within, perhaps of this very text, holds none.
    runs = {p.parent for p in found if p.name == "lock" and (p.parent / "config.json").exists()}
    paths = [p for p in found if p.suffix.lower() in (".txt", ".json", ".jsonl") and p.is_file()
             and not runs & set(p.parents)]
    names = {p: p.relative_to(root).as_posix() for p in paths}
    if not paths:
        raise UserError(f"{path}: no .txt, .json or .jsonl file there")
    if len(found) > len(paths):
        endings = sorted({p.suffix or p.name for p in found if p not in names})
        print(f"{printable(path)}: {len(found) - len(paths)} files not read, only .txt, .json and "
              f".jsonl are, no link to a folder, no run folder: "
              f"{printable(', '.join(endings)[:80])}")
    split = {p: split_of(names[p]) if path.is_dir() else None for p in paths}
    named = [p for p in paths if split[p]]
    unnamed = [p for p in paths if not split[p]]
    if named and (unnamed or "train" not in split.values()):
        odd = f", and {names[unnamed[0]]} names none" if unnamed else ", and none names train"
        raise UserError(f"{path}: {names[named[0]]} names a split{odd}; name the split of every "
                        f"file, for example by folders train, validation and test, or rename it")
    for name in SPLITS if named else ():
        files = [names[p] for p in named if split[p] == name]
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        print(f"{printable(path)}: {name} is " + (printable(", ".join(files[:3])) + more if files
                                                  else "made of a part of train"))
    documents, texts = [], Counter(split[p] for p in paths if p.suffix.lower() == ".txt")
    for p in paths:
        if p.suffix.lower() != ".txt":
            documents += [replace(d, split=split[p]) for d in read_records(p)]
        elif texts[split[p]] < 3:
            documents += read_sections(p, names[p], split[p])
        else:  # a file is a document; its key must not depend on where the folder lies
            documents.append(Document(names[p], read_text(p), split=split[p]))
    return documents


def split_of(name):
    """The split that a file's place in its folder names, or None: Test.txt, x.train.jsonl,
    dev/a.txt, train-00000-of-00001.jsonl."""
    words = {"train": "train", "training": "train", "validation": "validation",
             "valid": "validation", "val": "validation", "dev": "validation", "test": "test"}
    found = {words[word] for word in re.split(r"[\W\d_]+", name.lower()) if word in words}
    if len(found) > 1:
        raise UserError(f"{name} names two splits, {' and '.join(sorted(found))}; rename it")
    return found.pop() if found else None


def kinds(dataset):
    """Names of the data sets that --dataset names."""
    names = [PYTHON if name == "python" else name for name in dataset.split(",")]
    return ",".join(names).split(",")


def load_documents(dataset, data_dir):
    """Documents of one data set, or of several with commas between them, by split.

    What a publisher has not split is split 90/5/5 by the hash of each document's key: the same on
    every machine, whatever the order, and equal keys on one side. If validation or test alone is
    missing, it is made of 5% of the training text. Returns a dict of lists, and a fingerprint of
    all text. Raises UserError for too few documents.
    """
    by_split, digest = {split: [] for split in SPLITS}, hashlib.sha256()
    for kind, name in enumerate(kinds(dataset)):
        found = list(read(name, data_dir))
        documents = [d for d in found if d.text.strip()]
        if blank := sum(bool(d.prompt) for d in found) - sum(bool(d.prompt) for d in documents):
            print(f"{name}: {blank} records left out, nothing follows their prompt")
        digest.update("".join(map(repr, documents)).encode(errors="replace"))
        for document in deal(documents, name):
            document.kind = kind
            by_split[document.split].append(document)
    held_out = {(d.prompt, d.text) for split in SPLITS[1:] for d in by_split[split]}
    train = [d for d in by_split["train"] if (d.prompt, d.text) not in held_out]
    if n := len(by_split["train"]) - len(train):
        print(f"{n} training documents left out, they stand in validation or test too")
    if not train:
        raise UserError(f"--dataset {dataset}: all of its training text is held out too")
    by_split["train"] = train
    return by_split, digest.hexdigest()[:16]


def deal(documents, name):
    """Give documents (of the data set `name`) their splits, where a publisher has not."""
    published = {d.split for d in documents}
    missing = [split for split in ("test", "validation") if split not in published]
    dealt = sorted({key_hash(d.key) for d in documents if d.split in (None, "train")})
    if len(dealt) <= len(missing):
        raise UserError(f"--dataset {name}: {len(dealt)} documents with text; at least "
                        f"{len(missing) + 1} are needed, one each for training"
                        + "".join(f" and {split}" for split in missing))
    n = max(1, round(0.05 * len(dealt)))
    made = {place: missing[i // n] for i, place in enumerate(dealt[:n * len(missing)])}
    for document in documents:
        if document.split in (None, "train"):
            document.split = made.get(key_hash(document.key), "train")
    return documents


def key_hash(key):
    return hashlib.sha256(f"split 0: {key}".encode(errors="replace")).digest()


# ----------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """Byte-pair encoding by tiktoken: GPT-2's, or one learnt from text.

    `spec` is JSON: {"name": "gpt2"}, or name, pattern and ranks (base64) of one that was learnt.
    """

    def __init__(self, spec):
        import tiktoken

        self.spec = spec
        if spec["name"] == "gpt2":
            try:
                self._encoding = tiktoken.get_encoding("gpt2")
            except Exception as error:  # requests raises a dozen kinds
                raise UserError(
                    f"cannot load tiktoken's gpt2 vocabulary ({type(error).__name__}); set "
                    f"TIKTOKEN_CACHE_DIR to a folder that has it, or use --base scratch") from None
        else:
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"])}
            if not spec["pattern"] or not {bytes([b]) for b in range(256)} <= ranks.keys():
                raise ValueError("it cannot spell every text")
            self._encoding = tiktoken.Encoding(spec["name"], pat_str=spec["pattern"],
                                               mergeable_ranks=ranks,
                                               special_tokens={END: len(ranks)})
        self.decode = self._encoding.decode
        self.vocab_size, self.end = self._encoding.n_vocab, self._encoding.eot_token

    @classmethod
    def learn(cls, texts, vocab_size):
        """Byte-level BPE (Sennrich et al. 2016) by rustbpe, from an iterable of texts."""
        import rustbpe

        learnt = rustbpe.Tokenizer()
        learnt.train_from_iterator(iter(texts), vocab_size=vocab_size - 1)
        ranks = sorted(learnt.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls({"name": "bpe", "pattern": learnt.get_pattern(),
                    "ranks": [base64.b64encode(bytes(token)).decode() for token, _ in ranks]})

    @classmethod
    def load(cls, path):
        """The tokenizer that train.py has kept in a run folder."""
        try:
            return cls(parse_json(read_text(path), path))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged: no tokenizer ({error})") from None

    def encode(self, text):
        """Token ids. A long run of spaces makes tiktoken panic: such text is encoded in parts."""
        if re.search(r"\s{10000}", text):
            half = len(text) // 2
            return self.encode(text[:half]) + self.encode(text[half:])
        return self._encoding.encode_ordinary(text)

    def encode_documents(self, documents):
        """(prompt tokens, text tokens) of each document, by all cores."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            yield from zip(threads.map(self.encode, (d.prompt for d in documents)),
                           threads.map(self.encode, (d.text for d in documents)), strict=True)

    def bytes_per_token(self):
        """(V,) bytes of text that each token stands for; 0 for the end token."""
        token_bytes = self._encoding.decode_single_token_bytes
        return torch.tensor([0 if token == self.end else len(token_bytes(token))
                             for token in range(self.vocab_size)])


# ---------------------------------------------------------------------------------------- rows


@dataclass
class Rows:
    """N rows of at most T + 1 tokens, as places in one long tensor of tokens.

    Row i is tokens[start[i] : start[i] + length[i]]; its first prompt[i] tokens are its prompt.
    """

    tokens: torch.Tensor  # (all tokens of the split,) int32
    start: torch.Tensor  # (N,)
    length: torch.Tensor  # (N,), from 2 to T + 1
    prompt: torch.Tensor  # (N,), from 1 to length - 1
    document: torch.Tensor  # (N,), the number of the document that it was cut from

    def __len__(self):
        return len(self.start)

    def read(self, index):
        """Tokens (B, W) of the rows index (B,), 0 beyond their ends, and which are real (B, W)."""
        place = torch.arange(int(self.length[index].max()))  # (W,)
        real = place < self.length[index, None]  # (B, W)
        at = (self.start[index, None] + place) * real  # (B, W)
        return self.tokens[at].long() * real, real

    def prompts(self, index):
        """Prompt tokens (B, P) of the rows index (B,), and which are real (B, P)."""
        P = int(self.prompt[index].max())
        real = torch.arange(P) < self.prompt[index, None]  # (B, P)
        return self.read(index)[0][:, :P] * real, real

    def batch(self, index, whole=False):
        """What a model reads (B, T), and targets (B, T): the next tokens, where they are scored.

        Targets are IGNORE outside the continuation. `whole` scores prompts too (all but the first
        token, which nothing predicts): that is how a base is trained.
        """
        tokens, real = self.read(index)  # (B, T + 1), T here that of the longest of these rows
        place = torch.arange(tokens.shape[1])
        scored = real & (place >= (1 if whole else self.prompt[index, None]))
        return tokens[:, :-1], tokens.masked_fill(~scored, IGNORE)[:, 1:]


def cut(documents, tokenizer, block_size):
    """Documents into `Rows` with T = block_size; says what of the instructions was left out."""
    pieces, rows, end, dropped, shortened = [], [], 0, 0, 0
    width = block_size + 1
    for number, (prompt, text) in enumerate(tokenizer.encode_documents(documents)):
        if prompt:  # a response says where it ends
            tokens = prompt + text + [tokenizer.end]
            dropped += len(prompt) >= width
            shortened += len(prompt) < width < len(tokens)
            lengths = [(0, min(len(tokens), width), len(prompt))]
        else:  # running text goes on in its next row
            tokens = text
            lengths = [(first, n := min(len(tokens) - first, width), max(1, n // 4))
                       for first in range(0, len(tokens), width)]
        rows += [(end + first, n, p, number) for first, n, p in lengths if p < n]
        pieces.append(np.array(tokens, dtype=np.int32))
        end += len(tokens)
    if dropped or shortened:
        print(f"{dropped} records left out, their prompt fills a row; {shortened} responses cut "
              f"off where a row ends")
    if not rows:
        raise UserError("a split has no row to score; give more text, or longer prompts more room "
                        "by a larger --block-size")
    return Rows(torch.from_numpy(np.concatenate(pieces)), *torch.tensor(rows).T)
