"""A batch of prompts in: clusters, one update for each, and a continuation for each prompt.

AN ANSWER DEPENDS ON ITS BATCH MATES. The head is adapted to a cluster, and a prompt's cluster is
made of what else is asked at the same time: the same prompt in other company gets another
update, and may get another answer. A prompt alone is served by its nearest training cluster, from
what is stored with the weights (`company-cache`, which stores no clusters, by its own words);
`--assign` answers every prompt so, each by itself: no statistic, draw or rounding depends on the
others.
"""

import copy
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import model as core
from common import UserError, printable
from lab import cache
from lab.cache import CacheHead
from lab.cluster import assign
from lab.common import adapter_path, adapter_paths, label, load_adapter
from lab.data import END, RESPONSE, Examples, begin_within
from lab.flags import ALONE
from lab.heads import PromptTuningHead
from lab.model import generate_anew
from lab.scoring import held_out, is_told, points_of
from hypernet import prompt_means
from model import merge_lora


def adapt_to(run, model, plan, prompts, inference=None, n_clusters=None):
    """What `model` is told of each of B prompts that are asked together, and its cluster (B,).

    prompts: lists of token ids, or an `Examples` whose rows are all prompt. The first is a table of
    statistics (B, C); who knows what whom has said (B, B) for a cache; None for a head that is told
    nothing. inference, "fit" or "assign", is the plan's if not given, and n_clusters as many as the
    training's cluster size makes. A single prompt gets the statistic of the nearest training
    cluster.
    """
    head, nearest = model.lm_head, inference or plan.get("inference")
    if not isinstance(prompts, Examples):
        prompts = rows_of(run, plan, prompts)
    if not is_told(head) and not isinstance(head, CacheHead):
        return None, torch.zeros(len(prompts), dtype=torch.int64)
    if len(prompts) == 1 and stores_clusters(plan) and not plan.get("told"):
        means, _ = prompt_means(prompts.seen(plan), run.base.transformer.wte.weight)
        known = head.clusters.cpu()  # (K, C)
        cluster, _ = assign(points_of(head, means, "cpu"), points_of(head, known, "cpu"))
        return known[cluster].to(run.device), cluster
    if n_clusters:
        plan = plan | {"cluster_size": len(prompts) / min(n_clusters, len(prompts))}
    told = held_out(run, model, prompts, plan, nearest, plan.get("told"))
    if is_told(head):
        return told.table.to(run.device), told.cluster
    return told.cluster[:, None] == told.cluster, told.cluster


def stores_clusters(plan):
    """Whether a method's head keeps training clusters, to which a single prompt can go."""
    return plan["method"] not in ("company-cache", "cache", "per-sample", "task-embedding")


def rows_of(run, plan, prompts):
    """`Examples` of B lists of token ids, all prompt."""
    length = torch.tensor([len(prompt) for prompt in prompts])
    shown = length
    if plan.get("condition") == "instruction":  # as in training: what announces a response is not
        sizes = run.tokenizer.bytes_per_token()
        ends = [len(run.tokenizer.decode(prompt).rstrip().encode()) for prompt in prompts]
        shown = torch.tensor([begin_within(torch.tensor(prompt), end, sizes)
                              for prompt, end in zip(prompts, ends, strict=True)]).clamp(min=1)
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    return Examples(tokens, length.cumsum(0) - length, length, length, torch.arange(len(length)),
                    instruction=shown)


def open_method(run, method, seed):
    """A model that `decode` may change, and the plan that trained it."""
    if method == "frozen":
        return copy.deepcopy(run.base).eval(), {"method": "frozen"}
    path = adapter_path(run, method, seed)
    if not path.exists():
        raise UserError(f"--method {method} --seed {seed}: {path} does not exist; there is "
                        f"{', '.join(p.stem for p in adapter_paths(run.folder)) or 'frozen'}")
    return load_adapter(run, path)


def answers(run, args, method, prompts):
    """New token ids of each prompt, each prompt's cluster, None for a head that has none, and
    whether one prompt's answer depends on the others'."""
    model, plan = open_method(run, method, args.seed)
    batches = [[prompt] for prompt in prompts] if args.assign else [prompts]
    told = [adapt_to(run, model, plan, batch, args.inference, args.clusters) for batch in batches]
    found = []
    for batch, (heard, _) in zip(batches, told, strict=True):
        found += decode(run, model, batch, args.max_new_tokens, heard,
                        temperature=args.temperature, top_k=args.top_k,
                        generator=torch.Generator(run.device).manual_seed(args.seed))
    cluster = torch.cat([cluster for _, cluster in told]).tolist()
    if args.assign and (not stores_clusters(plan) or plan.get("told") == ALONE):
        cluster = list(range(len(prompts)))
    together = len(prompts) > 1 and not args.assign
    adapted = told[0][0] is not None
    hears = (adapted and plan["method"] not in ("cache", "per-sample", "task-embedding")
             and plan.get("told") not in (ALONE, "constant"))
    # A draw depends on the draws before it.
    return found, cluster if adapted else None, together and (hears or args.temperature > 0)


def decode(run, model, prompts, max_new_tokens, told=None, **options):
    """Continue prompts, of which `model` is told what `adapt_to` has found; LoRA is merged."""
    merge_lora(model)
    options["stop_token"] = run.tokenizer.end
    if isinstance(model.lm_head, CacheHead):
        return cache.generate(model, prompts, max_new_tokens, told, **options)
    if isinstance(model.lm_head, PromptTuningHead):

        def next_logits(tokens, length):
            logits = model(tokens, told, start=int(length.min()) - 1)  # (B, T - start, V)
            return logits[torch.arange(len(tokens)), length - length.min()]

        return generate_anew(next_logits, prompts, max_new_tokens, model.config.block_size,
                             run.device, **options)
    return core.generate(model, prompts, max_new_tokens, told, **options)


def read_prompts(name):
    """Lines of a file, or of standard input, that are not blank."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
        texts = [line.removesuffix("\r") for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {name}: {error}") from None
    if not texts:
        raise UserError(f"--prompts {name}: there is no prompt, one a line")
    return texts


def telling_words(texts, members, n=4):
    """Words that set the texts `members` apart from all `texts`; of equals, the longer ones."""
    words = [set(re.findall(r"[^\W\d_]{4,}", text.lower())) for text in texts]
    everywhere = Counter(word for own in words for word in own)
    inside = Counter(word for i in members for word in words[i])
    strength = {word: count * math.log(count * len(words) / (everywhere[word] * len(members)))
                for word, count in inside.items()}
    return sorted(inside, key=lambda w: (strength[w], inside[w], len(w), w), reverse=True)[:n]


def continue_prompts(run, config, args):
    """Cluster the prompts of a file, adapt the head to each cluster, continue each prompt.

    Prints text, or JSON; returns a list of lists of new token ids.
    """
    texts = read_prompts(args.prompts)
    # The model is asked as it was trained: an instruction ends with what announces the response.
    end = RESPONSE if config.get("instructions") else ""
    prompts = [run.tokenizer.encode(text.strip() + end if end else text) for text in texts]
    context = run.base.config.block_size
    for text, prompt in zip(texts, prompts, strict=True):
        if len(prompt) >= context:
            raise UserError(f"--prompts: {text[:40]!r}... has {len(prompt)} tokens and the model "
                            f"reads {context} at most, prompt and continuation; shorten it")
    found, cluster, depends = answers(run, args, args.method, prompts)
    beside = {name: answers(run, args, method, prompts)[0]
              for name, method in (("static", "lora"), ("base_only", "frozen"))
              if getattr(args, name)}
    adapted, cluster = cluster is not None, cluster or [0] * len(texts)
    text_of = run.tokenizer.decode
    shown = [{"prompt": text, "cluster": own if adapted else None, "continuation": text_of(new)}
             | {name: text_of(rows[i]) for name, rows in beside.items()}
             for i, (text, own, new) in enumerate(zip(texts, cluster, found, strict=True))]
    groups = []
    for c in sorted(set(cluster)):
        members = [i for i, own in enumerate(cluster) if own == c]
        groups.append({"cluster": c, "prompts": members, "words": telling_words(texts, members)})
    if args.json:
        print(json.dumps({
            "method": args.method, "seed": args.seed, "clusters": groups if adapted else [],
            "depends_on_batch_mates": depends,
            "answers": shown}, indent=2))
        return found
    for group in groups:
        members = group["prompts"]
        if adapted:
            print(printable(f"\n# cluster {group['cluster'] + 1}: {len(members)} "
                            f"prompt{'s' * (len(members) > 1)}, one update"
                            + f"; {', '.join(group['words'])}" * bool(group["words"])))
        for entry in (shown[i] for i in members):
            print(printable(f"\n{entry['prompt']}[{entry['continuation']}]"))
            for name in beside:
                print(printable(f"  {name.replace('_', ' ')}: [{entry[name]}]"))
    if adapted and depends:
        print("\nThese answers depend on each other's prompts; --assign gives some that do not.")
    return found


def text_metrics(corpus, dataset):
    """The function (answers, references) -> BLEU and ROUGE-L; UserError if they cannot be had."""
    if not corpus.instructions:
        raise UserError(f"--generations: {dataset} has no instructions")
    try:
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(f"--generations: {error.name} is not installed; pip install sacrebleu "
                        f"rouge-score") from None

    class Characters:
        def tokenize(self, text):
            return [c for c in text if not c.isspace()]

    def compare(found, wanted):
        # Both know words by Latin letters and spaces: other writing is compared by characters.
        letters = [c for text in wanted for c in text if c.isalpha()]
        other = sum(not c.isascii() for c in letters) > 0.2 * len(letters)
        if other:
            print("BLEU and ROUGE-L by characters: the responses are not in Latin letters")
        scorer = RougeScorer(["rougeL"], tokenizer=Characters() if other else None)
        pairs = zip(wanted, found, strict=True)
        rouge = [scorer.score(right, mine)["rougeL"].fmeasure for right, mine in pairs]
        bleu = sacrebleu.corpus_bleu(found, [wanted], tokenize="char" if other else "13a")
        return {"bleu": bleu.score, "rouge_l": 100 * float(np.mean(rouge))}

    return compare


def score_generations(run, args, compare):
    """Greedy answers to test instructions, compared with their responses.

    The same args.generations instructions, of those that leave room for an answer, for every
    joint adapter, clustered among themselves. Returns entries for results.json.
    """
    test, entries = run.examples["test"], []
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    order = order[test.prompt[order] < run.base.config.block_size]  # has room
    chosen = order[: args.generations].sort().values
    start, n_prompt, length = test.start[chosen], test.prompt[chosen], test.length[chosen]
    rows = Examples(test.tokens, start, n_prompt, n_prompt, test.article[chosen],
                    instruction=test.instruction[chosen])
    tokens = [test.tokens[a : a + n].tolist() for a, n in zip(start, length, strict=True)]
    prompts = [row[:n] for row, n in zip(tokens, n_prompt, strict=True)]
    wanted = [run.tokenizer.decode(row[n:]).removesuffix(END)
              for row, n in zip(tokens, n_prompt, strict=True)]
    for path in (None, *adapter_paths(run.folder)):
        model, plan = load_adapter(run, path) if path else open_method(run, "frozen", 0)
        if plan.get("told"):  # a control has no answers of its own
            continue
        told, _ = adapt_to(run, model, plan, rows, args.inference)
        texts = []
        size = len(prompts) if isinstance(model.lm_head, CacheHead) else 64
        for turn in torch.arange(len(prompts)).split(size):
            heard = None if told is None else told[turn.to(told.device)]
            found = decode(run, model, [prompts[i] for i in turn], args.max_new_tokens, heard)
            texts += [run.tokenizer.decode(new) for new in found]
        entries.append({"name": label(plan), "seed": plan.get("seed", 0),
                        "n": len(texts), **compare(texts, wanted)})
    return entries
