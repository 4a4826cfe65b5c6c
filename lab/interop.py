"""Transformers' files out, and PEFT's out and in, without either of them.

All of it is safetensors and JSON: nothing here executes or unpickles. GPT-2 was published with
its linear layers (in, out) (`Conv1D`); this project has torch's (out, in).

The adapters of a run folder, heads that PEFT has no words for included, have a layout of their
own: tensors under the names of the model's parameters and buffers,

    transformer.h.I.PART.lora_A (r, in), .lora_B (out, r)                     each linear layer
    lm_head.lora_A (r, C), .lora_B (V, r)                                  lora, company-cache
    lm_head.share, .trust (2,), .log_t (), .share_of (2, C), .idf (V,)             company-cache
    lm_head.hypernetwork.{0,2,4}.weight and .bias, lm_head.center,
        .spread (C,), .clusters (K, C)                                               chameleon
    the rivals' have the names of their parameters in heads.py

and in the file's header, as JSON under "info", the plan of the training (method, rank, alpha,
seed, ...; its "base" is a fingerprint of the base's shape and weights, and any other base is
refused), and what was done (step, tokens, seconds, best validation loss).
"""

import copy
import itertools
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import UserError, whole_file, write_json
from lab.cache import CacheHead
from lab.data import END
from lab.flags import read_json
from lab.heads import PromptTuningHead
from lab.scoring import is_told
from model import GPT2_SHAPE, LMHead, LoRAHead, LoRALinear, merge_lora

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out)
# What config.json says where this GPT has no choice.
FIXED = {
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


@contextmanager
def tensor_file(path):
    """Open anyone's safetensors file, to be read tensor by tensor; `UserError` if it cannot be."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, cut short or no safetensors file ({error})") from None


def write_weights(path, tensors):
    """Write a safetensors file as transformers and peft do."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        save_file(flat, temporary, metadata={"format": "pt"})


def write_tokenizer(tokenizer, folder):
    """Write a tokenizer for transformers' AutoTokenizer, which wants merges where tiktoken has
    ranks: the two parts that a token is merged from are what the tokens before it leave of it.
    """
    encoding, parts = tokenizer._encoding, []
    ranks = encoding._mergeable_ranks  # token bytes -> token id
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's spelling of bytes:
    hidden = [b for b in range(256) if b not in visible]  # these are spelt from 256 on
    spelt = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}

    def spell(token):
        return "".join(spelt[b] for b in token)

    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        pieces = [bytes([b]) for b in token]
        while len(pieces) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(pieces)]
            i = pairs.index(min(pairs))
            pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
        if len(pieces) == 2:
            parts.append([spell(piece) for piece in pieces])
    split = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated",
             "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}
    write_json(Path(folder) / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": tokenizer.end, "content": END, "special": True, "lstrip": False,
                          "rstrip": False, "single_word": False, "normalized": False}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "ignore_merges": False, "merges": parts,
                  "vocab": {spell(token): rank for token, rank in ranks.items()}}})
    write_json(Path(folder) / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END,
        "clean_up_tokenization_spaces": False})


@torch.no_grad()
def save_hf(model, folder, tokenizer, statistics=None):
    """Write a GPT, adapters merged, and its tokenizer to a folder for transformers'
    AutoModelForCausalLM and AutoTokenizer.

    `model` stays as it is. LoRA in the transformer is added to the weights written; an update of
    the head makes a head (V, C) that is no longer tied to the token embedding. A head that is told
    statistics has an update per cluster: statistics (1, C) say for which. The last token ends a
    text, as in both tokenizers here. Without a tokenizer (None) AutoTokenizer opens an empty one
    there, in silence. Raises ValueError for missing statistics, and for a cache or
    soft prompts, which a GPT-2 has no place for.
    """
    head, config = model.lm_head, model.config
    if is_told(head) and (statistics is None or len(statistics) != 1):
        raise ValueError(f"a {type(head).__name__} has an update per cluster: pass statistics of 1")
    if isinstance(head, (CacheHead, PromptTuningHead)):
        raise ValueError(f"GPT-2 has no place for what a {type(head).__name__} adds")
    merged = copy.deepcopy(model)
    merge_lora(merged)
    tensors = {name: p.T if name.endswith(CONV1D) else p  # (out, in) -> (in, out)
               for name, p in merged.transformer.named_parameters("transformer")}
    A = B = None
    if is_told(head):
        A, B = head.factors(statistics)
    elif isinstance(head, LoRAHead):
        A, B = head.lora_A, head.lora_B
    if A is not None:
        tensors["lm_head.weight"] = head.weight + (head.scale * B @ A).view_as(head.weight)
    end = config.vocab_size - 1
    if tokenizer:
        write_tokenizer(tokenizer, folder)
    write_weights(Path(folder) / "model.safetensors", tensors)
    write_json(Path(folder) / "config.json", {
        "model_type": "gpt2", **FIXED,
        **{key: getattr(config, ours) for key, ours in GPT2_SHAPE.items()},
        "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": A is None,
        "bos_token_id": end, "eos_token_id": end, "embd_pdrop": 0.0,
        "resid_pdrop": 0.0, "attn_pdrop": 0.0, "dtype": "float32",
    })


PEFT = "base_model.model."  # what peft puts before the names of the model that it wraps
# Variants of LoRA that would need other arithmetic; all are off where a config leaves them out.
VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save",
            "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
            "use_qalora", "alora_invocation_tokens", "arrow_config")


def save_peft(model, folder, head=True):
    """Write the model's LoRA to a folder for peft's `PeftModel.from_pretrained`.

    The head's static LoRA goes along as the target "lm_head". Never merge it there: W is the token
    embedding too (`save_hf` writes a merged model). PEFT has no place for heads that are told
    statistics; head=False writes the transformer's LoRA alone. Raises ValueError where that is not
    asked for, for a model without LoRA, and after merge_lora.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("save_peft needs a model with LoRA that is not merged")
    if head and is_told(model.lm_head):
        raise ValueError(f"PEFT has no place for a {type(model.lm_head).__name__}; head=False "
                         f"writes the LoRA of the transformer alone")
    if head and isinstance(model.lm_head, LoRAHead):
        layers["lm_head"] = model.lm_head
    first = next(iter(layers.values()))
    short = sorted({name.split(".")[-1] for name in layers})
    meant = {name for name, m in model.named_modules()  # what peft would put LoRA into
             if isinstance(m, (LoRALinear, torch.nn.Linear, LMHead))
             and name.split(".")[-1] in short}
    write_weights(Path(folder) / "adapter_model.safetensors", {
        f"{PEFT}{name}.{part}.weight": getattr(layer, part)
        for name, layer in layers.items() for part in ("lora_A", "lora_B")})
    write_json(Path(folder) / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None,
        "r": len(first.lora_A), "lora_alpha": first.scale * len(first.lora_A), "lora_dropout": 0.0,
        "bias": "none", "inference_mode": True,
        # transformers keeps GPT-2's linear layers (in, out); peft corrects this for lm_head.
        "fan_in_fan_out": True,
        "target_modules": short if meant == layers.keys() else sorted(layers),
    })


@torch.no_grad()
def load_peft(base, folder):
    """A copy of the GPT `base` with the LoRA of a PEFT folder, in the layers that it names.

    Raises UserError for another kind of adapter, or one that does not fit.
    """
    path = Path(folder) / "adapter_model.safetensors"
    config = read_json(Path(folder) / "adapter_config.json")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: adapter_config.json is not that of a LoRA")
    odd = [key for key in VARIANTS if config.get(key)]
    odd += ["bias"] * (config.get("bias", "none") != "none")
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal"):
        odd.append("init_lora_weights")  # the others change the base itself
    if odd:
        raise UserError(f"{folder}: the LoRA has {odd[0]} = {config[odd[0]]}, which is not "
                        f"supported here")
    model = copy.deepcopy(base).requires_grad_(False)
    alpha, layers = config.get("lora_alpha"), {}
    if type(alpha) not in (int, float):
        raise UserError(f"{folder}: adapter_config.json has no lora_alpha")
    with tensor_file(path) as file:
        for name in file.keys():
            module, _, part = name.removeprefix(PEFT).removesuffix(".weight").rpartition(".")
            if part in ("lora_A", "lora_B"):
                layers.setdefault(module, {})[part] = file.get_tensor(name)
            elif name != f"{PEFT}lm_head.base_layer.weight":  # peft adds what a target ties
                raise UserError(f"{path}: {name} is not a LoRA's")
            elif not torch.equal(file.get_tensor(name).float(), base.lm_head.weight.cpu()):
                raise UserError(f"{path} was trained on another base: lm_head.weight differs")
    there = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, LMHead))}
    for name, found in layers.items():
        layer = there.get(name)
        n_out, n_in = layer.weight.shape if layer is not None else (0, 0)
        A, B = (found.get(part, torch.empty(0, 0)) for part in ("lora_A", "lora_B"))
        if A.dim() != 2 or B.dim() != 2 or not len(A) == B.shape[1] > 0 or (
                A.shape[1], B.shape[0]) != (n_in, n_out):
            raise UserError(f"{path}: the LoRA of {name} does not fit this base")
        if layer is model.lm_head:
            adapted = LoRAHead(layer.weight, len(A), alpha)
        else:
            adapted = LoRALinear(layer, len(A), alpha)
        model.set_submodule(name, adapted)
        adapted.lora_A.copy_(A)
        adapted.lora_B.copy_(B)
    if not layers:
        raise UserError(f"{path} holds no LoRA")
    return model
