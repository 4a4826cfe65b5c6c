"""Attention and LoRA as a textbook writes them: one head after the other, matrices by hand."""

import torch


def masked_softmax(scores):
    """Rows of scores (T, T) into weights; the entry (i, j) counts only for j <= i."""
    T = scores.shape[-1]
    allowed = torch.tril(torch.ones(T, T, dtype=torch.bool))
    powers = torch.exp(scores - scores.masked_fill(~allowed, float("-inf")).amax(-1, keepdim=True))
    powers = powers * allowed
    return powers / powers.sum(-1, keepdim=True)


def attend(projected, heads):
    """What the heads see, side by side; projected (B, T, 3C) holds queries, keys and values."""
    width = projected.shape[-1] // 3
    size = width // heads
    outputs = []
    for h in range(heads):
        query, key, value = (projected[..., part * width + h * size:part * width + (h + 1) * size]
                             for part in range(3))
        scores = torch.einsum("bid,bjd->bij", query, key) / size ** 0.5
        outputs.append(masked_softmax(scores) @ value)
    return torch.cat(outputs, dim=-1)


def multi_head(x, parameters, heads):
    projected = x @ parameters["c_attn.weight"].t() + parameters["c_attn.bias"]
    return attend(projected, heads) @ parameters["c_proj.weight"].t() + parameters["c_proj.bias"]


def new_pair(inputs, outputs, rank):
    """The pair (down, up) with up zero."""
    bound = inputs ** -0.5
    return (torch.rand(rank, inputs) * 2 - 1) * bound, torch.zeros(outputs, rank)


def adapted_linear(x, weight, bias, down, up, alpha):
    """A frozen layer whose matrix is changed on the fly."""
    rank = down.shape[0]
    changed = weight + (alpha / rank) * torch.matmul(up, down)
    return torch.matmul(x, changed.t()) + bias


LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def parameter_names(blocks):
    """Names of the trained and frozen parameters of a transformer with LoRA."""
    trained, frozen = [], ["tokens", "positions", "final.weight", "final.bias"]
    for block in range(blocks):
        for norm in ("ln_1", "ln_2"):
            frozen += [f"{block}.{norm}.weight", f"{block}.{norm}.bias"]
        for layer in LAYERS:
            frozen += [f"{block}.{layer}.weight", f"{block}.{layer}.bias"]
            trained += [f"{block}.{layer}.down", f"{block}.{layer}.up"]
    return trained, frozen


def normalise(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred ** 2).mean(-1, keepdim=True) + 1e-5) * weight + bias


def gelu(x):
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x ** 3)))


def one_block_model(state, tokens, rank, alpha, merge):
    """Logits of a transformer of one block with two heads, with LoRA beside its matrices or in
    them."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    pairs = {}
    for layer in LAYERS:
        down = state[f"h.0.{layer}.lora_A"]
        up = state[f"h.0.{layer}.lora_B"]
        pairs[layer] = (down, up)
        if merge:
            state[f"h.0.{layer}.weight"] = (state[f"h.0.{layer}.weight"]
                                            + alpha / rank * up @ down)
            pairs[layer] = (down, torch.zeros_like(up))

    def linear(x, layer):
        return adapted_linear(x, state[f"h.0.{layer}.weight"], state[f"h.0.{layer}.bias"],
                              *pairs[layer], alpha)

    def norm(x, name):
        return normalise(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = state["wte.weight"][tokens] + state["wpe.weight"][:tokens.shape[1]]
    inside = norm(x, "h.0.ln_1")
    x = x + linear(attend(linear(inside, "attn.c_attn"), 2), "attn.c_proj")
    x = x + linear(gelu(linear(norm(x, "h.0.ln_2"), "mlp.c_fc")), "mlp.c_proj")
    return norm(x, "ln_f") @ state["wte.weight"].t()
