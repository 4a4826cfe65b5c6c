"""What the laboratory's rows have beyond the core's: articles, instructions, kept states.

The reading, the tokenizers and the cutting are the core's (data.py at the top). Beside them stand
the data set "pydocs" of results/, which article a row was cut from, which tokens of its prompt are
the instruction, and what a statistic may see of it: the scope "full", which LEAKS, is there to show
that.
"""

import ast
import hashlib
import itertools
import json
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import data as core
from common import UserError
from data import END, IGNORE, RESPONSE, SPLITS, Document, Rows, Tokenizer, cut

__all__ = ["END", "IGNORE", "RESPONSE", "SPLITS", "Corpus", "Document", "Examples", "Tokenizer",
           "begin_within", "load_examples", "read_pydocs"]

# ------------------------------------------------------------------------------------- sources


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
        documents.append(Document(name.as_posix(), "\n\n".join(filter(None, found))))
    from pydoc_data.topics import topics

    documents += [Document(f"topic {name}", text) for name, text in sorted(topics.items())]
    return [document for document in documents if document.text.strip()]


def read(dataset, data_dir):
    """The documents of a data set; of those that are split already, nothing is lost between."""
    if dataset == "pydocs":
        return read_pydocs()
    documents = list(core.read(dataset, data_dir))
    for document, following in itertools.pairwise(documents):
        # WikiText's; the sections of any other text are whole.
        if document.split == following.split == document.key.split(" ")[0]:
            document.text += "\n"  # between two articles, which the core leaves out
    return documents


def read_instructions(dataset, data_dir):
    """How many characters of each record's prompt are its instruction: a dict by prompt."""
    path, found = Path(data_dir) / dataset if dataset == "alpaca" else Path(dataset), {}
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        known = file.suffix.lower() in (".json", ".jsonl") and file.is_file()
        for _, record in core.parse_records(file) if known else ():
            parts = [part.strip() for part in core.understand(record)[0]]
            if parts:
                found["\n".join(filter(None, parts)) + RESPONSE] = len(parts[0])
    return found


class Corpus:
    """The documents of a data set by split, as the core splits them."""

    def __init__(self, dataset, data_dir):
        documents, digest = read(dataset, data_dir), hashlib.sha256()
        for d in documents:
            digest.update(f"Document(key={d.key!r}, prompt={d.prompt!r}, text={d.text!r}, "
                          f"split={d.split!r})".encode(errors="replace"))
        self.fingerprint = digest.hexdigest()[:16]
        self.instructions = any(d.prompt for d in documents)
        self.dropped = sum(bool(d.prompt) and not d.text.strip() for d in documents)
        self.instruction = read_instructions(dataset, data_dir) if self.instructions else {}
        documents = [d for d in documents if d.text.strip()]
        self.by_split = {split: [] for split in SPLITS}
        for d in core.deal(documents, dataset):
            self.by_split[d.split].append(d)

    def documents(self, split):
        return self.by_split[split]


def fingerprint(tokenizer):
    return hashlib.sha256(json.dumps(tokenizer.spec).encode()).hexdigest()[:16]


def begin_within(tokens, n_bytes, sizes):
    """How many of `tokens` (n,) begin in the first `n_bytes` bytes of their text; sizes (V,): of
    each token. The last may hold an instruction's last character and what follows it."""
    return int((sizes[tokens].cumsum(0) - sizes[tokens] < n_bytes).sum())


# ------------------------------------------------------------------------------------ examples


@dataclass
class Examples(Rows):
    """The core's rows; an article is a document."""

    instruction: torch.Tensor | None = None  # (N,), prompt tokens of it alone; None: all of them
    states: torch.Tensor | None = None  # (all tokens, C), what `batch` gives in place of tokens

    @property
    def article(self):
        return self.document

    def seen(self, plan):
        """The same rows, with that for prompt of which a statistic and clusters see the tokens.

        Scope "full" is the whole row, targets included: it LEAKS.
        """
        if plan.get("stat_scope") == "full":
            return replace(self, prompt=self.length)
        if plan.get("condition") == "instruction" and self.instruction is not None:
            return replace(self, prompt=self.instruction)
        return self

    def batch(self, index, whole=False):
        """As the core's; with `states` the inputs are a transformer's last hidden states (B, T, C).
        """
        tokens, targets = super().batch(index, whole)
        if self.states is None:
            return tokens, targets
        return self.states[self.places(index)[0][:, :-1]], targets

    def places(self, index):
        """Where each token (B, W) of the rows `index` (B,) stands in `tokens`, padding's being 0,
        and real (B, W)."""
        place = torch.arange(int(self.length[index].max()))  # (W,)
        real = place < self.length[index, None]  # (B, W)
        return (self.start[index, None] + place) * real, real


def load_examples(corpus, tokenizer, block_size):
    """`Examples` of all three splits, by name; says what was left out."""
    examples = {}
    for split in SPLITS:
        documents = corpus.documents(split)
        if not documents:
            raise UserError(f"the {split} split has no text")
        examples[split] = rows = Examples(**vars(cut(documents, tokenizer, block_size)))
        if corpus.instructions:
            rows.instruction = rows.prompt.clone()
            sizes = tokenizer.bytes_per_token()
            for i, (start, n, number) in enumerate(zip(
                    rows.start.tolist(), rows.prompt.tolist(), rows.document.tolist(),
                    strict=True)):
                prompt = documents[number].prompt
                if prompt:
                    n_bytes = len(prompt[:corpus.instruction[prompt]].encode())
                    shown = begin_within(rows.tokens[start:start + n].long(), n_bytes, sizes)
                    rows.instruction[i] = shown or n  # where it is blank the input stands for it
    return examples
