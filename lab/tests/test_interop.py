"""Against transformers and peft, on GPT-2s of tiny size; no test fetches anything."""

import json
import os
from pathlib import Path

import pytest
import torch

from lab import train
from lab.common import adapt, adapter_path, load_adapter, open_run
from lab.data import Tokenizer
from common import UserError
from lab.interop import load_peft, save_hf, save_peft, write_weights
from lab.model import GPT, GPTConfig
from lab.tests.conftest import WORDS
from model import LoRALinear, load_gpt2, merge_lora

# Other people's warnings, about themselves, are not this project's.
pytestmark = pytest.mark.filterwarnings("ignore")
V, T, C = 257, 32, 16


@pytest.fixture(scope="module")
def transformers():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft  # noqa: F401
        import transformers
    return transformers


@pytest.fixture
def theirs(transformers, tmp_path):
    """A random GPT-2 of transformers, every parameter drawn, and the folder it saved itself in."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=C, n_layer=2, n_head=2, bos_token_id=V - 1,
        eos_token_id=V - 1)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    # Positions that count: greedy answers would repeat one token else.
    torch.nn.init.normal_(model.transformer.wpe.weight, std=3.0)
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


def ours(seed=0, **plan):
    """A random GPT of this project, with adapters that do something if a plan asks for them."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(T, V, n_layer=2, n_head=2, n_embd=C))
    if plan:
        model = adapt(model, {"rank": 3, "alpha": 5.0, "method": "lora", "head_form": "full",
                              "clusters": 2, "stat_scope": "prompt"} | plan)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    if plan.get("method") == "chameleon":
        model.lm_head.spread.fill_(1)
    return model.eval()


def batch(seed=1, rows=3, length=T):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def same(found, expected):
    difference = (found - expected).abs().max().item()
    assert difference < 1e-4 and expected.std() > 0.05, difference


def rewrite(folder, change, config=None):
    """Put `change(tensors)` and other settings in place of what a folder holds."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    write_weights(folder / "model.safetensors", tensors)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | (config or {})))


# --------------------------------------------------------------------------------- whole models


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_transformers_model_gives_the_same_logits_here(theirs, prefix):
    model, folder = theirs

    def rename(tensors):
        renamed = {prefix + n.removeprefix("transformer."): t for n, t in tensors.items()}
        tensors.clear()
        tensors.update(renamed)
        if not prefix:  # what published files have besides: masks, and a copy of the embedding
            tensors["h.0.attn.bias"] = torch.ones(1, 1, T, T)
            tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    rewrite(folder, rename)
    same(load_gpt2(folder)(batch()), model(batch()).logits)


@torch.no_grad()
@pytest.mark.parametrize("plan", [{}, {"method": "lora"}, {"method": "chameleon"},
                                  {"method": "chameleon", "head_form": "light"}])
@pytest.mark.parametrize("merged", [False, True])
def test_a_model_saved_here_gives_the_same_logits_in_transformers(
        plan, merged, transformers, tmp_path):
    model = ours(**plan)
    statistics = torch.randn(1, C) if plan.get("method") == "chameleon" else None
    expected = model(batch(), statistics)
    if merged:
        merge_lora(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    save_hf(model, tmp_path, None, statistics)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert opened.config.tie_word_embeddings == (not plan)
    same(opened(batch()).logits, expected)
    if not plan:  # and back
        assert torch.equal(load_gpt2(tmp_path)(batch()), expected)


def test_what_a_gpt2_cannot_say_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="update per cluster"):
        save_hf(ours(method="chameleon"), tmp_path, None)
    with pytest.raises(ValueError, match="no place"):
        save_hf(ours(method="company-cache"), tmp_path, None)
    with pytest.raises(ValueError, match="no place"):
        save_hf(ours(method="prompt-tuning"), tmp_path, None, torch.ones(1, C))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def byte_gpt2(monkeypatch):
    """A `gpt2` tokenizer of single bytes, for a vocabulary of 257."""
    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiktoken.Encoding(
        name, pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256}))


def arguments_of(corpus, base, out):
    return ["--dataset", str(corpus), "--base", str(base), "--out", str(out), "--device", "cpu",
            "--dtype", "float32", "--max-steps", "2", "--evaluations", "1", "--batch-size", "4",
            "--block-size", "16"]


@pytest.mark.filterwarnings("error")
def test_a_run_on_a_folder_keeps_its_base_and_leaves_what_others_can_open(
        theirs, byte_gpt2, tmp_path, corpus, capsys, transformers):
    import peft

    model, folder = theirs
    arguments = arguments_of(corpus, folder, tmp_path / "run")
    train.main([*arguments, "--methods", "lora"])
    (folder / "model.safetensors").unlink()  # from here on the run is on its own
    train.main([*arguments, "--methods", "lora,chameleon,company-cache"])
    run, _ = open_run(tmp_path / "run", torch.device("cpu"))
    assert run.tokenizer.spec == {"name": "gpt2"} and run.base.config.block_size == T
    with torch.no_grad():
        same(run.base(batch(length=16)), model(batch(length=16)).logits)
    adapted, _ = load_adapter(run, adapter_path(run, "lora", 0))
    save_peft(adapted, tmp_path / "peft")
    with torch.no_grad(), pytest.warns(UserWarning):  # about the tied head, when merged
        again = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
        same(again(batch(length=16)).logits, adapted(batch(length=16)))


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(theirs, tmp_path, corpus, monkeypatch):
    def spelled(self, spec):
        self.spec, self.vocab_size = spec, V + 1

    monkeypatch.setattr(Tokenizer, "__init__", spelled)
    with pytest.raises(UserError, match="vocabulary of 257 and the gpt2 tokenizer one of 258"):
        train.main(arguments_of(corpus, theirs[1], tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


# ------------------------------------------------------------------------------------------ LoRA


@torch.no_grad()
def trained_by_peft(model, folder, targets, **options):
    import peft

    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM",
        **options)).eval()
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    adapted.save_pretrained(folder)
    return adapted(batch()).logits


@torch.no_grad()
@pytest.mark.parametrize("targets", [
    ["c_attn"], ["c_attn", "c_proj", "c_fc"], ["c_attn", "lm_head"]])
def test_a_peft_adapter_gives_the_same_logits_here(targets, theirs, tmp_path):
    model, folder = theirs
    base = load_gpt2(folder)
    frozen = base(batch())
    expected = trained_by_peft(model, tmp_path / "peft", targets)
    found = load_peft(base, tmp_path / "peft")
    same(found(batch()), expected)
    assert (expected - frozen).abs().max() > 0.1 and torch.equal(base(batch()), frozen)
    trained = {name for name, p in found.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    merge_lora(found)
    same(found(batch()), expected)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "chameleon"])
def test_an_adapter_saved_here_gives_the_same_logits_in_peft_and_again_here(
        method, transformers, tmp_path):
    import peft

    model = ours(method=method)
    if method == "chameleon":
        with pytest.raises(ValueError, match="no place for a ChameleonHead"):
            save_peft(model, tmp_path / "peft")
    save_peft(model, tmp_path / "peft", head=method == "lora")
    base = ours()
    base.load_state_dict(model.state_dict(), strict=False)  # the frozen part alone
    save_hf(base, tmp_path / "base", None)
    expected = model(batch()) if method == "lora" else model.hidden(batch()) @ base.lm_head.weight.T
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    same(peft.PeftModel.from_pretrained(opened, tmp_path / "peft").eval()(batch()).logits, expected)
    same(load_peft(base, tmp_path / "peft")(batch()), expected)


def test_a_merged_model_and_one_without_lora_have_no_adapter_to_save(tmp_path):
    model = ours(method="lora")
    merge_lora(model)
    for without in (model, ours()):
        with pytest.raises(ValueError, match="not merged"):
            save_peft(without, tmp_path)


@pytest.mark.parametrize("options, said", [
    ({"use_dora": True}, "use_dora"), ({"use_rslora": True}, "use_rslora"),
    ({"rank_pattern": {"c_attn": 2}}, "rank_pattern"), ({"bias": "all"}, "bias"),
    ({"lora_alpha": "much"}, "lora_alpha"), ({"peft_type": "IA3"}, "not that of a LoRA"),
])
def test_an_adapter_of_another_kind_is_refused_in_one_line(options, said, tmp_path):
    save_peft(ours(method="lora"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | options))
    with pytest.raises(UserError, match=said) as error:
        load_peft(ours(), tmp_path)
    assert "\n" not in error.value.args[0]


def test_an_adapter_of_another_model_is_refused(theirs, tmp_path):
    save_peft(ours(method="lora"), tmp_path / "a")
    small = GPT(GPTConfig(T, V, n_layer=1, n_head=2, n_embd=C))
    with pytest.raises(UserError, match=r"LoRA of transformer\.h\.1\S* does not fit"):
        load_peft(small, tmp_path / "a")
    trained_by_peft(theirs[0], tmp_path / "b", ["lm_head"])
    with pytest.raises(UserError, match="another base"):
        load_peft(ours(), tmp_path / "b")


# ------------------------------------------------------------------------------------- tokenizer


def test_gpt2_ids_equal_transformers_on_the_same_files(transformers, tmp_path):
    """Needs tiktoken's two files of gpt2 in TIKTOKEN_CACHE_DIR."""
    files = list(Path(os.environ.get("TIKTOKEN_CACHE_DIR", tmp_path)).iterdir())
    if len(files) < 2:
        pytest.skip("no gpt2 vocabulary in TIKTOKEN_CACHE_DIR")
    kinds = {path.read_bytes()[:1]: path.read_text("utf-8") for path in files}
    (tmp_path / "vocab.json").write_text(kinds[b"{"], "utf-8")
    (tmp_path / "merges.txt").write_text(kinds[b"#"], "utf-8")
    expected = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    text = " ".join(WORDS) + "\n\n\tIt's 1,234.5 é 漢字 🦎  don't\r\n <unk> @-@ = Title = \n"
    tokenizer = Tokenizer({"name": "gpt2"})
    assert tokenizer.encode(text) == expected(text)["input_ids"]


# ------------------------------------------------------------------------------- what goes along


@pytest.mark.parametrize("text", [
    "the river runs, 12345 times; it's 3.5!\n\n  and on", "Größe naïve 河流 🙂\u200d🙂", " " * 40,
    ""])
def test_transformers_has_our_tokens(transformers, corpus, tmp_path, text):
    texts = [p.read_text() for p in sorted(corpus.iterdir())] + ["Größe 河流, don't 12 345\n"] * 9
    tokenizer = Tokenizer.learn(texts, 400)
    save_hf(GPT(GPTConfig(8, 400, 1, 1, 8)), tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.decode(theirs.encode(text)) == text
    assert len(theirs) == tokenizer.vocab_size and theirs.eos_token_id == tokenizer.end


def test_saving_again_widens_no_adapter(tmp_path):
    """Layers that PEFT's short names would not single out are named in full."""
    base = ours()
    adapted = ours(method="lora")
    for name, module in list(adapted.named_modules()):
        if isinstance(module, LoRALinear) and ".1." in name:
            adapted.set_submodule(name, torch.nn.Linear(*module.weight.shape[::-1]))
    kept = {n for n, m in adapted.named_modules() if isinstance(m, LoRALinear)}
    save_peft(adapted, tmp_path / "a")
    again = load_peft(base, tmp_path / "a")
    assert {n for n, m in again.named_modules() if isinstance(m, LoRALinear)} == kept
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert kept <= set(targets)


def test_a_base_in_several_files_is_read(transformers, theirs, tmp_path):
    model, folder = theirs
    whole = load_gpt2(folder)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    parts = load_gpt2(tmp_path / "parts")
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(p, q), name
