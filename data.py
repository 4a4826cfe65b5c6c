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
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import UserError, parse_json, read_text, write_json, write_text

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
        lines = source.splitlines(keepends=True)
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


def read_records(path):
    """Records of a .jsonl file or a .json array: {instruction, output[, input]} or {text}."""
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        records = [parse_json(line, f"{path}, line {number}")
                   for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        records = parse_json(text, path)
    for number, record in enumerate(records if isinstance(records, list) else [None], 1):
        fields = record if isinstance(record, dict) else {}
        given = [fields.get(name) or "" for name in ("instruction", "input", "output", "text")]
        # Half of a surrogate pair, which JSON can spell, is no text: it becomes a question mark.
        given = [v.encode(errors="replace").decode() if isinstance(v, str) else v for v in given]
        instruction, extra, output, plain = given
        known = "text" in fields or {"instruction", "output"} <= fields.keys()
        if not known or not all(isinstance(value, str) for value in given):
            raise UserError(f'{path}, record {number}: expected an object with the strings '
                            f'"instruction" and "output" (and perhaps "input"), or "text"')
        if "text" in fields:
            yield Document(plain, plain)
        else:
            prompt = "\n".join(filter(None, (instruction.strip(), extra.strip())))
            yield Document(prompt, output.strip(), prompt + RESPONSE)


def read_sections(path, name):
    """Plain text, in sections of about 64 kB, or a fortieth of it, that end where a line ends."""
    section, size, number = [], 0, 0
    text = read_text(path)
    for line in text.splitlines(keepends=True):
        section.append(line)
        size += len(line)
        if size >= min(1 << 16, len(text) // 40):
            yield Document(f"{name} {number}", "".join(section))
            section, size, number = [], 0, number + 1
    yield Document(f"{name} {number}", "".join(section))


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
    if all((path / f"{split}.txt").exists() for split in SPLITS):
        return read_wikitext(path)
    root = path.parent if path.is_file() else path
    paths = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    paths = [p for p in paths if p.suffix.lower() in (".txt", ".json", ".jsonl")]
    if not paths:
        raise UserError(f"{path}: no .txt, .json or .jsonl file there")
    if path.is_dir() and {"validation", "test"} & {p.stem.lower() for p in paths}:
        raise UserError(f"{path}: a split is kept where train.txt, validation.txt and test.txt are "
                        f"all there; add what is missing, or rename the others to have all split")
    documents, texts = [], [p for p in paths if p.suffix.lower() == ".txt"]
    for p in paths:
        if p not in texts:
            documents += read_records(p)
        elif len(texts) < 3:
            documents += read_sections(p, p.relative_to(root).as_posix())
        else:  # a file is a document; its key must not depend on where the folder lies
            documents.append(Document(p.relative_to(root).as_posix(), read_text(p)))
    return documents


def kinds(dataset):
    """Names of the data sets that --dataset names."""
    names = [PYTHON if name == "python" else name for name in dataset.split(",")]
    return ",".join(names).split(",")


def load_documents(dataset, data_dir):
    """Documents of one data set, or of several with commas between them, by split.

    What a publisher has not split is split 90/5/5 by the hash of each document's key: the same on
    every machine, whatever the order, and equal keys on one side. Returns a dict of lists, and a
    fingerprint of all text. Raises UserError for fewer than three documents.
    """
    by_split, digest = {split: [] for split in SPLITS}, hashlib.sha256()
    for kind, name in enumerate(kinds(dataset)):
        documents = [d for d in read(name, data_dir) if d.text.strip()]
        unsplit = sorted({key_hash(d.key) for d in documents if d.split is None})
        if len(unsplit) < 3 and not any(d.split for d in documents):
            raise UserError(f"--dataset {name}: {len(unsplit)} documents with text; at least 3 are "
                            f"needed, one each for training, validation and test")
        n = max(1, round(0.05 * len(unsplit)))
        for document in documents:
            digest.update(repr(document).encode(errors="replace"))
            if document.split is None:
                place = key_hash(document.key)
                document.split = ("test" if place < unsplit[n] else
                                  "validation" if place < unsplit[2 * n] else "train")
            document.kind = kind
            by_split[document.split].append(document)
    return by_split, digest.hexdigest()[:16]


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
            self._encoding = tiktoken.Encoding(spec["name"], pat_str=spec["pattern"],
                                               mergeable_ranks=ranks,
                                               special_tokens={END: len(ranks)})
        self.encode, self.decode = self._encoding.encode_ordinary, self._encoding.decode
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

    def encode_documents(self, documents):
        """(prompt tokens, text tokens) of each document, by all cores."""
        threads = os.cpu_count() or 1
        for first in range(0, len(documents), 1024):
            some = documents[first:first + 1024]
            prompts = [d.prompt for d in some]
            yield from zip(self._encoding.encode_ordinary_batch(prompts, num_threads=threads),
                           self._encoding.encode_ordinary_batch([d.text for d in some],
                                                                num_threads=threads), strict=True)

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
        tokens, real = self.read(index)  # (B, T + 1)
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
