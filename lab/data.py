"""Text or instructions in, an `Examples` table out.

A *document* is a Wikipedia article, the documentation of a Python module, an instruction with its
response. Each document is tokenised on its own and cut into *examples*: a prompt, and a
continuation that is scored.

    running text    consecutive rows of T + 1 tokens that share no token and never cross a
                    document's end; the first quarter of a row is its prompt
    instructions    one row each: instruction and input are the prompt, the response follows

No two rows share a token. With the usual overlap by one, the last target of a row would be the
first prompt token of the next, and would reach its own prediction through the statistics of a
cluster that holds both.
"""

import ast
import base64
import functools
import hashlib
import json
import os
import re
import sysconfig
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from common import UserError, parse_json, read_text, whole_file, write_json, write_text

SPLITS = ("train", "validation", "test")
IGNORE = -1  # a target that is not scored
END = "<|endoftext|>"
RESPONSE = "\n\n"  # between an instruction and its response; there is no other template
# name: (repository on the Hugging Face Hub, its configuration)
HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-v1"),
    "wikitext2-raw": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "alpaca": ("tatsu-lab/alpaca", None),
}


@dataclass
class Document:
    key: str  # documents with the same key are kept in one split
    prompt: str  # "" in running text
    text: str
    split: str | None = None  # None: not split by its publisher
    # Characters of the prompt that are the instruction; not part of what is fingerprinted.
    instruction: int = field(default=0, repr=False)


# ------------------------------------------------------------------------------------- sources


@functools.cache
def read_pydocs():
    """Docstrings of the standard library, a document a module, and Python's help topics."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skipped & set(name.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a few files are templates or samples, not modules
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        documents.append(Document(name.as_posix(), "", "\n\n".join(filter(None, found))))
    from pydoc_data.topics import topics

    documents += [Document(f"topic {name}", "", text) for name, text in sorted(topics.items())]
    return [document for document in documents if document.text.strip()]


def read_lines(path):
    """Lines with their newline. Only "\\n" ends a line: WikiText has Unicode separators in it."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            yield from file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); convert it first with: "
                        f"iconv -f ITS_ENCODING -t utf-8") from None


def read_wikitext(folder):
    """Articles. A title is a line ` = Title = ` between two blank lines; table rows are not."""
    title = re.compile(r" = [^=]+ = \r?\n")
    for split in SPLITS:
        lines, count = [], 0
        for line in read_lines(folder / f"{split}.txt"):
            lines.append(line)
            if len(lines) > 2 and title.fullmatch(lines[-2]):
                if not line.strip() and not lines[-3].strip():
                    yield Document(f"{split} {count}", "", "".join(lines[:-2]), split)
                    lines, count = lines[-2:], count + 1
        # Where no title is found this is no Wikipedia: sections stand for articles.
        for last in [lines] if count else grouped(lines, 1 << 16, len):
            yield Document(f"{split} {count}", "", "".join(last), split)
            count += 1


def grouped(items, size, length):
    """Lists of items one after the other, each of just enough to have a `size` by `length(item)`;
    the last has what is left."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += length(item)
        if total >= size:
            yield group
            group, total = [], 0
    yield group


def read_sections(paths, root):
    """Plain text, in sections of at most about 64 kB that end where a line ends."""
    size = min(sum(path.stat().st_size for path in paths) // 40, 1 << 16)
    for path in paths:
        name = path.relative_to(root).as_posix()  # a key must not depend on where the folder lies
        for count, section in enumerate(grouped(read_lines(path), size, len)):
            yield Document(f"{name} {count}", "", "".join(section))


def read_records(path):
    """Records of a .jsonl file or a .json array: {instruction, output[, input]} or {text}."""
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield record_document(parse_json(line, where), where)
        return
    records = parse_json("".join(read_lines(path)), path)
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a JSON array of records")
    for number, record in enumerate(records, 1):
        yield record_document(record, f"{path}, record {number}")


def record_document(record, where):
    fields = record if isinstance(record, dict) else {}
    texts = [fields.get(name, "") for name in ("instruction", "input", "output", "text")]
    instructs, plain = {"instruction", "output"} <= fields.keys(), "text" in fields
    if not (instructs or plain) or not all(isinstance(text, str) for text in texts):
        raise UserError(f'{where}: expected an object with the strings "instruction" and "output" '
                        f'(and perhaps "input"), or with the string "text"')
    if re.search("[\ud800-\udfff]", "".join(texts)):
        raise UserError(f"{where}: half of a surrogate pair (a lone \\ud8.. to \\udf.. escape)")
    if not instructs:
        return Document(fields["text"], "", fields["text"])
    instruction = texts[0].strip()
    prompt = "\n".join(filter(None, (instruction, texts[1].strip())))
    return Document(prompt, prompt + RESPONSE, texts[2].strip(), None, len(instruction))


def fetch(name, wanted):
    """Download a data set from the Hugging Face Hub, as plain files; `wanted` is written last."""
    import datasets

    repository, configuration = HUB[name]
    try:
        tables = datasets.load_dataset(repository, configuration)
    except Exception as error:  # whatever went wrong on the way, there are two ways out
        raise UserError(
            f"{wanted} does not exist and the Hugging Face Hub cannot be reached "
            f"({type(error).__name__}); with a network, fetch it with: "
            f"python -m lab.run train --dataset {name} --data-dir {wanted.parents[1]}; "
            f"without one, use --dataset pydocs") from None
    if name == "alpaca":
        fields = ["instruction", "input", "output"]
        return write_json(wanted, tables["train"].select_columns(fields).to_list())
    for split in reversed(SPLITS):
        # The Hub has "" for a blank line; the original release has a space and a newline.
        text = "".join(line or " \n" for line in tables[split]["text"])
        write_text(wanted.with_name(f"{split}.txt"), text)


def reader(dataset, data_dir):
    """Return a function that reads the documents of a data set anew at each call."""
    folder = Path(data_dir) / dataset
    if dataset == "pydocs":
        return read_pydocs
    if dataset in HUB:
        wanted = folder / ("alpaca_data.json" if dataset == "alpaca" else "train.txt")
        if not wanted.exists():
            fetch(dataset, wanted)
        return lambda: read_records(wanted) if dataset == "alpaca" else read_wikitext(folder)
    path = Path(dataset)
    if not dataset or not path.exists():
        known = ", ".join(["pydocs", *HUB])
        raise UserError(f"no data set {dataset!r}: neither a known name ({known}) nor a file or "
                        f"folder")
    if all((path / f"{split}.txt").exists() for split in SPLITS):
        return lambda: read_wikitext(path)
    paths = [path] if path.is_file() else sorted(files_in(path))
    texts = [p for p in paths if p.suffix.lower() == ".txt"]
    records = [p for p in paths if p.suffix.lower() in (".jsonl", ".json")]
    if not texts + records:
        raise UserError(f"{path}: no .txt, .jsonl or .json file there")
    if path.is_dir() and {"validation", "test"} & {p.stem for p in texts + records}:
        raise UserError(f"{path}: a split is kept where train.txt, validation.txt and test.txt are "
                        f"all there; add what is missing, or rename the others to have all split")

    def read():
        yield from read_sections(texts, path.parent if path.is_file() else path)
        for p in records:
            yield from read_records(p)

    return read


def files_in(folder):
    """Files in a folder and in those within it; OSError if one cannot be read."""

    def fail(error):
        raise error

    for inner, _, names in os.walk(folder, onerror=fail):
        yield from (Path(inner, name) for name in names)


class Corpus:
    """The documents of a data set by split; read anew at each pass, never held in memory.

    Documents that their publisher did not split are split 90/5/5 by the hash of their key: the
    same on every machine, whatever the order, with equal keys on one side.
    """

    def __init__(self, dataset, data_dir):
        self._read = reader(dataset, data_dir)
        self.dropped, self.instructions = 0, False
        keys, presplit, digest, cuts = set(), False, hashlib.sha256(), hashlib.sha256()
        for document in self._read():
            digest.update(repr(document).encode())
            cuts.update(b"%d " % document.instruction)
            self.dropped += bool(document.prompt) and not document.text.strip()
            presplit |= document.split is not None
            self.instructions |= bool(document.prompt)
            if document.split is None and document.text.strip():
                keys.add(key_hash(document.key))
        self.fingerprint, self.cuts = digest.hexdigest()[:16], cuts.hexdigest()[:16]
        ordered = sorted(keys)
        held_out = max(1, round(0.05 * len(ordered)))
        self._limits = [ordered[i] for i in (held_out, 2 * held_out)] if len(keys) > 2 else None
        if not self._limits and not presplit:
            raise UserError(f"--dataset {dataset}: {len(keys)} documents with text; at least 3 are "
                            f"needed, one each for training, validation and test")

    def documents(self, split):
        test, validation = self._limits or (b"", b"")
        for document in self._read():
            hashed = key_hash(document.key)
            drawn = "test" if hashed < test else "validation" if hashed < validation else "train"
            if document.text.strip() and (document.split or drawn) == split:
                yield document


def key_hash(key):
    return hashlib.sha256(f"split 0: {key}".encode(errors="surrogateescape")).digest()[:8]


# ----------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """Byte-pair encoding through tiktoken; remembers how to save and to name itself."""

    def __init__(self, spec):
        """`spec` is JSON: {"name": "gpt2"}, or name, pattern and ranks of a trained one."""
        import tiktoken

        self.spec = spec
        if spec["name"] == "gpt2":
            try:
                self._encoding = tiktoken.get_encoding("gpt2")
            except Exception as error:  # requests raises a dozen kinds
                raise UserError(
                    f"cannot load tiktoken's gpt2 vocabulary ({type(error).__name__}); set "
                    f"TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bpe") from None
        else:
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"])}
            every_byte = {bytes([byte]) for byte in range(256)}
            if len(ranks) < len(spec["ranks"]) or not every_byte <= ranks.keys():
                raise ValueError("a token is doubled, or a byte has none")
            self._encoding = tiktoken.Encoding(spec["name"], pat_str=spec["pattern"],
                                               mergeable_ranks=ranks,
                                               special_tokens={END: len(ranks)})
        self.encode, self.decode = self._encoding.encode_ordinary, self._encoding.decode
        self.vocab_size = self._encoding.n_vocab
        self.end = self._encoding.eot_token
        self.fingerprint = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:16]

    @classmethod
    def train(cls, texts, vocab_size):
        """Byte-level BPE (Sennrich et al. 2016) with rustbpe, on an iterable of texts."""
        import rustbpe

        if vocab_size < 257:
            raise UserError(f"--vocab-size {vocab_size}: needs at least 257, all bytes and one end")
        trained = rustbpe.Tokenizer()
        trained.train_from_iterator(iter(texts), vocab_size=vocab_size - 1)
        ranks = sorted(trained.get_mergeable_ranks(), key=lambda pair: pair[1])
        tokens = [base64.b64encode(bytes(token)).decode() for token, _ in ranks]
        return cls({"name": "bpe", "pattern": trained.get_pattern(), "ranks": tokens})

    @classmethod
    def load(cls, path):
        spec = parse_json(read_text(path), path)
        try:
            return cls(spec)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} is not a tokenizer that lab.run train wrote") from None

    def save(self, path):
        write_json(path, self.spec)

    def encode_batch(self, texts):
        return self._encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def bytes_per_token(self):
        """(V,) bytes of text that each token stands for; 0 for the end token."""
        token_bytes = self._encoding.decode_single_token_bytes
        return torch.tensor([0 if token == self.end else len(token_bytes(token))
                             for token in range(self.vocab_size)])


# ------------------------------------------------------------------------------ tokens on disk


def encode(corpus, split, tokenizer, cache):
    """Tokenise one split into files under `cache`, unless they are there; return them mapped.

    Returns tokens (all documents, one after the other) and an index (D + 1, 3): each document's
    first token, its number of prompt tokens and how many of these begin in the instruction, 0 in
    running text; the row after the last has all tokens' number and their checksum. The files'
    name is a hash of the text, the tokenizer and this very file, so that none of them can change
    unnoticed.
    """
    key = f"{corpus.fingerprint} {corpus.cuts} {tokenizer.fingerprint} {split}".encode()
    name = hashlib.sha256(key + Path(__file__).read_bytes()).hexdigest()[:16]
    flat, index = Path(cache) / f"{split}-{name}.tokens", Path(cache) / f"{split}-{name}.index"
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    try:  # a damaged or missing file is made again
        rows = np.fromfile(index, np.int64).reshape(-1, 3)
        whole = checksum(flat) == rows[-1, 2]
    except (OSError, ValueError, IndexError):
        whole = False
    if not whole:
        written, rows = 0, []
        sizes = tokenizer.bytes_per_token().numpy() if corpus.instructions else np.zeros(0)
        with whole_file(flat) as temporary, open(temporary, "wb") as file:
            documents = corpus.documents(split)
            for batch in grouped(documents, 1 << 22, lambda d: len(d.prompt) + len(d.text)):
                prompts = tokenizer.encode_batch([document.prompt for document in batch])
                texts = tokenizer.encode_batch([document.text for document in batch])
                for document, prompt, text in zip(batch, prompts, texts, strict=True):
                    # A response says where it ends; running text goes on in its next row.
                    tokens = prompt + text + [tokenizer.end] if prompt else text
                    n_bytes = len(document.prompt[: document.instruction].encode())
                    rows.append((written, len(prompt), begin_within(prompt, n_bytes, sizes)))
                    written += len(tokens)
                    file.write(np.array(tokens, dtype=dtype).tobytes())
        rows = np.array([*rows, (written, 0, checksum(flat))], dtype=np.int64)
        with whole_file(index) as temporary:
            rows.tofile(temporary)
    if rows[-1, 0] == 0:
        raise UserError(f"the {split} split has no text")
    return np.memmap(flat, dtype=dtype, mode="r"), rows


def checksum(path):
    return zlib.crc32(np.memmap(path, mode="r")) if path.stat().st_size else 0


def begin_within(tokens, n_bytes, sizes):
    """How many of `tokens` begin in the first `n_bytes` bytes of their text; sizes (V,): of each
    token. The last may hold an instruction's last character and what follows it."""
    return int((sizes[tokens].cumsum() - sizes[tokens] < n_bytes).sum())


# ------------------------------------------------------------------------------------ examples


@dataclass
class Examples:
    """N rows of at most T + 1 tokens, as places in one long array of tokens.

    Row i is tokens[start[i] : start[i] + length[i]]; its first prompt[i] tokens are its prompt,
    and article[i] is the document that it was cut from.
    """

    tokens: np.ndarray  # (all tokens of the split,)
    start: np.ndarray  # (N,)
    length: np.ndarray  # (N,), from 2 to T + 1
    prompt: np.ndarray  # (N,), from 1 to length - 1
    article: np.ndarray  # (N,)
    dropped: int = 0  # documents whose prompt left no room for a continuation
    states: torch.Tensor | None = None  # (all tokens, C), what `batch` gives in place of tokens
    instruction: np.ndarray | None = None  # (N,), prompt tokens of it alone; None: all of them
    shown: np.ndarray | None = None  # (N,), those that statistics and clusters see; None: all

    def conditioned(self, plan):
        """The same rows, of which an adapter's statistics and clusters see what its plan says."""
        if plan.get("condition") != "instruction" or self.instruction is None:
            return self
        return replace(self, shown=self.instruction)

    def __len__(self):
        return len(self.start)

    def rows(self, index):
        """Tokens (B, W) of the rows `index` (B,), padded with 0 to the longest, and real (B, W)."""
        place, real = self.places(index)
        return torch.from_numpy(self.tokens[place.numpy()].astype(np.int64)) * real, real

    def prompts(self, index, scope="prompt"):
        """Tokens (B, W) that a statistic may look at, and a mask (B, W) of them.

        scope "full" takes the whole row, targets included: it leaks, and is there to show that.
        """
        rows, real = self.rows(index)
        if scope == "full":
            return rows, real
        shown = self.prompt if self.shown is None else self.shown
        shown = torch.from_numpy(shown[np.asarray(index)])
        width = int(shown.max())
        return rows[:, :width], torch.arange(width) < shown[:, None]

    def batch(self, index, whole=False):
        """Inputs (B, W) and targets (B, W), which are IGNORE outside the continuation.

        Inputs are tokens, or with `states` a transformer's last hidden states (B, W, C).
        targets[b, t] is the token after inputs[b, t]. `whole` scores the prompt as well (not its
        first token, which nothing predicts): how the base model is trained.
        """
        rows, real = self.rows(index)
        first = torch.ones(len(rows), 1) if whole else torch.from_numpy(
            self.prompt[np.asarray(index), None])
        scored = real & (torch.arange(rows.shape[1]) >= first)
        inputs = rows[:, :-1]
        if self.states is not None:
            inputs = self.states[self.places(index)[0][:, :-1]]  # (B, W, C)
        return inputs, rows.masked_fill(~scored, IGNORE)[:, 1:].contiguous()

    def places(self, index):
        """Where each token (B, W) of the rows `index` (B,) stands in `tokens`, padding's being 0,
        and real (B, W)."""
        index = np.asarray(index)
        place = np.arange(self.length[index].max())  # (W,)
        real = place < self.length[index, None]  # (B, W)
        return torch.from_numpy((self.start[index, None] + place) * real), torch.from_numpy(real)


def cut(tokens, documents, block_size):
    """Cut the documents of `encode` into `Examples` with T = block_size."""
    # given, instruction: prompt tokens that the document names itself, else 0
    (start, given, instruction), end = documents[:-1].T, documents[1:, 0]
    width = block_size + 1
    n_rows = np.where(given > 0, 1, -(-(end - start) // width))
    article = np.repeat(np.arange(len(start)), n_rows)
    row = np.arange(len(article)) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows)
    start = start[article] + row * width
    length = np.minimum(end[article] - start, width)
    prompt = np.where(given[article] > 0, given[article], np.maximum(1, length // 4))
    instruction = np.where(instruction[article] > 0, instruction[article], prompt)
    kept = prompt < length  # leaves out rows of one token, and prompts that fill the row
    table = (column[kept] for column in (start, length, prompt, article))
    return Examples(tokens, *table, dropped=int((~kept & (given[article] > 0)).sum()),
                    instruction=instruction[kept])


def load_examples(corpus, tokenizer, block_size, cache):
    """`Examples` of all three splits, by name; says what was left out."""
    examples = {}
    for split in SPLITS:
        tokens, documents = encode(corpus, split, tokenizer, cache)
        if not documents[:, 1].any() and len(tokens) <= block_size:
            raise UserError(f"the {split} split has {len(tokens)} tokens, fewer than one block of "
                            f"{block_size + 1}; give more text or a smaller --block-size")
        examples[split] = table = cut(tokens, documents, block_size)
        if table.dropped:
            print(f"{split}: {table.dropped} records left out, prompt longer than a block")
        longer = (np.diff(documents[:, 0]) > block_size + 1) & (documents[:-1, 1] > 0)
        if longer.sum() > table.dropped:
            print(f"{split}: {longer.sum() - table.dropped} responses cut off where a block ends")
        if not len(table):
            raise UserError(f"the {split} split has no row to score; raise --block-size")
    return examples
