"""Continue prompts through a head of a finished fair test, on its base: a published model too.

    python -m lab.run ask runs/pretrained smollm2 PROMPTS --arm counts

PROMPTS is a file with one prompt a line. Prompts are clustered among themselves; what a head is
told is made of the prompts of a row's cluster alone, or of its own where the arm was trained so, as
in the test. With company an answer depends on its neighbours; that of a single prompt is itself.
Only the words that the test has scored can be said. Greedy.
"""

from pathlib import Path

import torch

import train as core
from cluster import kmeans
from common import UserError, printable, read_tensors, read_text
from hypernet import ChameleonHead, features
from lab import fair
from lab.fair import CountsHead, Kept, Table, company, counts_of, mean, means_of
from lab.model import HeadAlone
from model import GPTConfig


def read_prompts(base, texts, vocabulary, n_new):
    """Prompts, to be continued by n_new tokens, as rows of kept states that are all prompt; and
    their token ids in full."""
    within = torch.full((base.vocab_size,), -1)
    within[vocabulary] = torch.arange(len(vocabulary))
    tokens, states, shape, ids = [], [], [], []
    for text in texts:
        whole = next(iter(base.tokenizer.encode_documents([fair.Document(text, text)])))[1]
        if len(whole) + n_new > base.room:
            raise UserError(f"{text[:40]!r} has {len(whole)} tokens; with {n_new} more they are "
                            f"too many for a base that reads {base.room}")
        read = torch.tensor(whole)
        hidden = base.hidden(read[None])[0]  # (P, C)
        known = (within[read] >= 0).nonzero()[:, 0]
        if not len(known):
            raise UserError(f"{text[:40]!r} has no word that the test has scored")
        shape.append((sum(map(len, tokens)), len(known), len(known)))
        tokens.append(within[read[known]])
        # The state before each word but the first, as in `keep_states`.
        states.append(torch.cat([hidden[known[1:] - 1], hidden[:1] * 0]))
        ids.append(list(whole))
    start, length, prompt = torch.tensor(shape).T
    row = torch.arange(len(texts))
    return Kept(torch.cat(tokens).int(), start, length, prompt, row, states=torch.cat(states),
                kind=row * 0), ids


def statistics_of(head, rows, weight, center, seed, control=""):
    """What a head is told of each prompt, and the clusters (N,); control as in `company`."""
    summed = means_of(rows, weight)
    k = max(1, round(len(rows) / fair.CLUSTER))
    cluster = kmeans(features(mean(summed), center), k, core.generator(seed))[1]

    def of_company(x):
        return company(x, cluster, control, rows.document, rows.kind, None)

    if isinstance(head, CountsHead):
        counts = counts_of(rows, weight)
        return Table(counts, of_company(counts), torch.ones(len(rows), 1)), cluster
    return mean(of_company(summed)) if isinstance(head, ChameleonHead) else None, cluster


@torch.no_grad()
def continue_rows(base, head, vocabulary, ids, told, n_new):
    """Greedy continuations: new token ids, a list for each prompt; each is decoded by itself."""
    new = []
    for i, prompt in enumerate(ids):
        read, statistics = list(prompt), None if told is None else told[torch.tensor([i])]
        for _ in range(n_new):
            hidden = base.hidden(torch.tensor(read)[None])[:, -1:]  # (1, 1, C)
            chosen = int(vocabulary[head(hidden, statistics)[0, 0].argmax()])
            if chosen == base.end:
                break
            read.append(chosen)
        new.append(read[len(prompt):])
    return new


def make_parser():
    parser, count = core.Parser(prog="lab.run ask"), core.number(int, 1, 2**31)
    add = parser.add_argument
    add("run", help="folder that lab.run fair wrote")
    add("base", help="the base that it was made with")
    add("prompts", help="a file with a prompt a line")
    add("--arm", default="counts", choices=("frozen", *fair.ARMS))
    add("--seed", type=core.number(int, 0, 2**31), default=0)
    add("--max-new-tokens", type=count, default=20)
    return parser


@torch.no_grad()
def main(argv=None):
    args = make_parser().parse_args(argv)
    texts = [line for line in read_text(args.prompts).split("\n") if line.strip()]
    if not texts:
        raise UserError(f"{args.prompts}: there is no prompt, one a line")
    folder, device = Path(args.run), torch.device("cpu")
    tensors, info = read_tensors(folder / "states.safetensors")
    base = fair.open_base(args.base, device)
    if info.get("asked", {}).get("base") != base.name:
        raise UserError(f"{folder} was made with another base than {args.base}")
    vocabulary, stream = tensors["vocabulary"], fair.Stream(tensors)
    weight = stream.weight
    model = HeadAlone(GPTConfig(1, *weight.shape[:1], 0, 1, weight.shape[1]), fair.make_head(
        fair.ARMS.get(args.arm, fair.Arm("frozen")).head, weight,
        int(stream.cluster("train", args.seed).max()) + 1))
    if args.arm != "frozen":
        path = folder / "adapters" / f"{args.arm}-seed{args.seed}.safetensors"
        core.load_weights(model, core.read_checkpoint(path)[0], path)
    rows, ids = read_prompts(base, texts, vocabulary, args.max_new_tokens)
    control = fair.ARMS[args.arm].told if args.arm != "frozen" else ""
    told, cluster = statistics_of(model.lm_head, rows, weight, stream.center, args.seed, control)
    if told is None or control:  # each for itself
        cluster = torch.zeros_like(cluster)
    new = continue_rows(base, model.lm_head, vocabulary, ids, told, args.max_new_tokens)
    for k in cluster.unique().tolist():
        if told is not None and not control:
            print(f"# cluster {k + 1}: the company of {int((cluster == k).sum())} prompts")
        for i in (cluster == k).nonzero()[:, 0].tolist():
            print(printable(f"{texts[i]}[{base.decode(new[i])}]\n"))
    return new
