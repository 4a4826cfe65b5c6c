"""Head and loss by turns, for what looks at few positions of many rows: company-cache."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lab.cluster import product_type

LOGITS_BYTES = 1 << 26  # float32 logits that exist at one time; more tokens are taken in turns


class LinearCrossEntropy(torch.autograd.Function):
    """Head and loss in one, by turns, so that the (n, V) table of all logits never exists.

    With logits x = W h + B z, p = softmax(x) and y the target, the gradient of -log p_y in x is
    g = p - e_y; so it is W^T g in h, g h^T in W, B^T g in z and g z^T in B. All of these are at
    hand while a turn's logits are: no logits are kept and none is computed twice, and the
    backward pass only scales what the forward pass has left.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, log_extra, *updates):
        dtype = product_type(hidden.device, hidden.dtype)
        exact = torch.promote_types(dtype, torch.float32)  # of the softmax, and of sums
        h, W, *updates = (t.to(dtype) for t in (hidden, weight, *updates))
        losses = torch.empty(len(targets), dtype=exact, device=hidden.device)
        trained = ctx.needs_input_grad
        d_h = torch.empty_like(h) if trained[0] else None
        d_W = torch.zeros_like(W, dtype=exact) if trained[1] else None
        d_log_extra = None if log_extra is None else torch.empty_like(log_extra)
        # z, B of each update; sums over tokens are kept exact
        d_updates = [None if not needed else torch.zeros_like(t, dtype=exact if i % 2 else dtype)
                     for i, (t, needed) in enumerate(zip(updates, trained[4:], strict=True))]
        size = max(1, LOGITS_BYTES // (4 * len(weight)))
        for first in range(0, len(targets), size):
            end = min(first + size, len(targets))
            x = h[first:end] @ W.T  # (m, C) @ (C, V) -> (m, V)
            for z, B in zip(updates[::2], updates[1::2], strict=True):
                x.addmm_(z[first:end], B.T)  # (m, r) @ (r, V)
            log_p = F.log_softmax(x, dim=1, dtype=exact)
            target = targets[first:end, None]
            log_py = log_p.gather(1, target)[:, 0]
            losses[first:end] = -log_py
            if log_extra is not None:  # -log(p_y + e^x): the gradient is g p_y / (p_y + e^x)
                losses[first:end] = -torch.logaddexp(log_py, log_extra[first:end])
                ratio = (log_py + losses[first:end]).exp()
                d_log_extra[first:end] = ratio - 1
            if not any(trained):
                continue
            g = log_p.exp_()
            g = g.scatter_add_(1, target, -torch.ones_like(target, dtype=exact))
            if log_extra is not None:
                g *= ratio[:, None]
            g = g.to(dtype)
            if d_h is not None:
                d_h[first:end] = g @ W  # (m, V) @ (V, C) -> (m, C)
            if d_W is not None:
                d_W += g.T @ h[first:end]  # (V, m) @ (m, C) -> (V, C)
            for i in range(0, len(updates), 2):
                if d_updates[i] is not None:
                    d_updates[i][first:end] = g @ updates[i + 1]  # (m, V) @ (V, r)
                if d_updates[i + 1] is not None:
                    d_updates[i + 1] += g.T @ updates[i][first:end]  # (V, m) @ (m, r)
        ctx.gradients = d_h, d_W, None, d_log_extra, *d_updates
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        return tuple(None if d is None else d * upstream for d in ctx.gradients)


def linear_cross_entropy(hidden, weight, targets, updates=(), log_extra=None):
    """Summed negative log-likelihood, which can be differentiated, and each token's (n,).

    hidden (n, C), weight (V, C), targets (n,); logits are W h, and for each of `updates`, a pair
    z (n, r) and B (V, r), B z more. With log_extra (n,) a target's probability p counts as
    p + exp(log_extra). Products are made in autocast's type, the softmax and all sums in float32.
    At most LOGITS_BYTES of logits exist at a time; what autograd needs is made on the way.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()
    flat = [tensor for pair in updates for tensor in pair]
    return LinearCrossEntropy.apply(hidden, weight, targets, log_extra, *flat)
