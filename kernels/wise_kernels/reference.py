"""The definition of every op in plain fp32 PyTorch: this file is the spec, the implementations never call it. N tokens,
F inputs and O outputs of the edited projection, J memories D_j [O, F], B sequences of T tokens (N = B T).
"""

import torch


def dense_neuron(values, columns, bounds, width):
    """D [J, O, F] of a bank in the neuron layout: column columns[r] of D_j is values[r], r in memory j."""
    dense = torch.zeros(len(bounds) - 1, values.shape[1], width)
    for j in range(len(bounds) - 1):
        for r in range(bounds[j], bounds[j + 1]):
            dense[j, :, columns[r]] = values[r].float()
    return dense


def dense_element(values, bits, bounds, width):
    """D [J, O, F] of a bank in the element layout: set bit v (row-major) of memory j is values[bounds[j] + v]."""
    dense = torch.zeros(bits.shape[0], bits.shape[1], width)
    for j in range(bits.shape[0]):
        v = int(bounds[j])
        for o in range(bits.shape[1]):
            for c in range(width):
                if (int(bits[j, o, c // 32]) >> (c % 32)) & 1:
                    dense[j, o, c] = values[v].float()
                    v += 1
    return dense


def dual_forward(a, weight, bias, dense):
    """y = a W^T + b, side_j = a D_j^T, norms_j = ||side_j||_2 by token (eq. 3)."""
    a = a.float()
    y = a @ weight.float().t()
    if bias is not None:
        y = y + bias.float()
    side = torch.einsum("nf,jof->jno", a, dense)
    return y, side, side.square().sum(-1).sqrt()


def gated_add(y, a, dense, choice):
    """y_n + a_n D_j^T for j = choice[n // T], y_n where the choice is -1 (eq. 6)."""
    y = y.float().clone()
    for n in range(y.shape[0]):
        j = int(choice[n // (y.shape[0] // choice.shape[0])])
        if j >= 0:
            y[n] += dense[j] @ a[n].float()
    return y


def route(norms, prompt_mask, thresholds, leverage=None, reduction="mean"):
    """score_j = mean (max) of norms_j over a sequence's prompt, over sqrt(mean leverage_j); top-1 by score / eps."""
    thresholds = thresholds.expand(prompt_mask.shape[0], norms.shape[0])  # [J], or by sequence
    scores = torch.zeros(prompt_mask.shape[0], norms.shape[0])
    choice = torch.full((prompt_mask.shape[0],), -1)
    for b, mask in enumerate(prompt_mask):
        best = float("-inf")
        for j in range(norms.shape[0]):
            tokens = norms[j].view(prompt_mask.shape)[b][mask].float()
            if len(tokens):
                scores[b, j] = tokens.mean() if reduction == "mean" else tokens.max()
                if leverage is not None:
                    mean = leverage[j].view(prompt_mask.shape)[b][mask].float().mean()
                    scores[b, j] = scores[b, j] / mean.clamp_min(1e-30).sqrt()
            ratio = float(scores[b, j].detach() / thresholds[b, j])
            if scores[b, j] > thresholds[b, j] and ratio > best:
                best, choice[b] = ratio, j
    return scores, choice


def leverage(a, columns, bounds, factors):
    """a_S P_j a_S^T with P_j = U_j U_j^T."""
    out = torch.zeros(len(bounds) - 1, a.shape[0])
    for j in range(len(bounds) - 1):
        rows = slice(bounds[j], bounds[j + 1])
        for n in range(a.shape[0]):
            out[j, n] = (a[n, columns[rows]].float() @ factors[rows].float()).square().sum()
    return out


def sketched_route(a, dense, sketched, within, prompt_mask, thresholds, leverage=None, reduction="mean"):
    """route by norms ||a_t D_j^T||, made exact only where sketched ones, ||a_t G_j^T||, do not decide: exact scores lie
    within [low, high] times sketched scores. dense [J, O, F], sketched [J, s, F]."""
    low, high = within
    norms, rough = (torch.einsum("nf,jof->jno", a.float(), d).square().sum(-1).sqrt() for d in (dense, sketched))
    exact = route(norms, prompt_mask, thresholds, leverage, reduction)[0]
    scores = route(rough, prompt_mask, thresholds, leverage, reduction)[0]
    choice = torch.full((len(prompt_mask),), -1)
    for b, eps in enumerate(thresholds.expand(scores.shape)):
        rivals = [j for j in range(len(dense)) if high * scores[b, j] > eps[j]]
        sure = [low * scores[b, j] / eps[j] for j in rivals if low * scores[b, j] > eps[j]]
        rivals = [j for j in rivals if high * scores[b, j] / eps[j] >= max(sure, default=0)]
        if len(rivals) > 1 or (rivals and low * scores[b, rivals[0]] <= eps[rivals[0]]):
            scores[b, rivals] = exact[b, rivals]
        rivals = [j for j in rivals if scores[b, j] > eps[j]]
        if rivals:
            choice[b] = max(rivals, key=lambda j: scores[b, j] / eps[j])
    return scores, choice


def masked_update(dense, mask, a, dy, state, lr, step, optimizer, momentum, betas, eps, weight_decay, clamp):
    """One step on D [O, F] inside `mask`: g = M * (dY^T a), SGD or Adam, decoupled decay, clamp. state: {"m", "v"}."""
    grad = (dy.float().t() @ a.float()) * mask
    dense = dense.float() * (1 - lr * weight_decay)
    if optimizer == "sgd":
        state["m"] = momentum * state["m"] + grad
        dense = dense - lr * state["m"]
    else:
        state["m"] = betas[0] * state["m"] + (1 - betas[0]) * grad
        state["v"] = betas[1] * state["v"] + (1 - betas[1]) * grad * grad
        first, second = state["m"] / (1 - betas[0] ** step), state["v"] / (1 - betas[1] ** step)
        dense = dense - lr * first / (second.sqrt() + eps)
    return dense if clamp is None else dense.clamp(-clamp, clamp)


def ties_merge(values, index, density, weights=None):
    """TIES (Yadav et al. 2023): trim by magnitude, elect the sign of the sum, mean over the entries that agree."""
    union = sorted(set(torch.cat(index).tolist()))
    weights = [1.0] * len(values) if weights is None else weights
    stack = torch.zeros(len(values), len(union), values[0].shape[1], dtype=torch.float64)
    for i, (shard, rows) in enumerate(zip(values, index, strict=True)):
        if shard.numel() == 0:
            continue
        keep = max(1, int(density * shard.numel() + 0.5))
        cut = shard.double().abs().flatten().sort(descending=True).values[keep - 1]
        for row, r in zip(shard.double(), rows.tolist(), strict=True):
            stack[i, union.index(r)] = torch.where(row.abs() >= cut, row, 0.0)
    elected = stack.sum(0).sign()
    agree = ((stack.sign() == elected) & (stack != 0)) * torch.tensor(weights, dtype=torch.float64)[:, None, None]
    count = agree.sum(0)
    merged = torch.where(count > 0, (agree * stack).sum(0) / count.clamp_min(1e-300), 0.0)
    return merged.float(), torch.tensor(union, dtype=torch.int64)
