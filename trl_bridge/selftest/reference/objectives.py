"""Losses in plain float64 torch, written from the papers' formulas and TRL's documentation. No trainer, no TRL."""

import torch


# What a model that sees reads beside tokens.
SEEN = "pixel_values image_grid_thw pixel_attention_mask token_type_ids mm_token_type_ids".split()


def seen(batch):
    values = {name: batch[name] for name in SEEN if batch.get(name) is not None}
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


def scores(model, weights, batch, temperature=1.0):
    """Log-probabilities and entropies of the completion tokens, (B, C) each, at logits / temperature."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask, **seen(batch)}
    logits = torch.func.functional_call(model, weights, (), inputs).logits
    length = batch["completion_ids"].size(1)
    log_p = torch.log_softmax(logits[:, -length - 1 : -1] / temperature, dim=-1)
    chosen = log_p.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    return chosen, -(log_p.exp() * log_p).sum(-1)


def load_balance(model, weights, ids, mask):
    """
    Load-balancing loss of a mixture of experts (arXiv 2101.03961, equations 4 to 6, as transformers has it for several
    experts a token): E sum_e f_e P_e, with f_e the times that a token was sent to e and P_e the router's probability of e,
    both means over all tokens that are there and all layers.
    """
    inputs = {"input_ids": ids, "attention_mask": mask, "output_router_logits": True}
    layers = torch.func.functional_call(model, weights, (), inputs).router_logits
    there = mask.reshape(-1).bool()
    probs = torch.cat([torch.softmax(layer.double(), dim=-1)[there] for layer in layers])
    sent = torch.zeros_like(probs).scatter(1, probs.topk(model.config.num_experts_per_tok, dim=-1).indices, 1.0)
    return probs.size(1) * (sent.mean(0) * probs.mean(0)).sum()


def rollout_balance(model, weights, batch):
    """`load_balance` of a micro-batch of rollouts, prompts included."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return load_balance(model, weights, ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1))


def demonstration_balance(model, weights, batches):
    """Mean of `load_balance` over micro-batches of demonstrations; one without a trained token adds nothing."""
    trained = [batch for batch in batches if (batch["labels"] != -100).any()]
    return sum(load_balance(model, weights, b["input_ids"], b["attention_mask"]) for b in trained) / len(batches)


def policy_loss(log_p, entropy, old_log_p, batch, o, window):
    """
    GRPO's loss of one micro-batch, as it enters the window's sum.

    `batch["row_weight"]`, (B,), multiplies what each row adds, and leaves every divisor as it is. With
    `batch["teacher_log_p"]`, (B, C), and `batch["update"]`, its number, `o["teacher"]` (form, kl, clip, weight of an update's
    number) adds a teacher's term.
    `o`: options (loss_type, level, eps_low, eps_high, beta, entropy_coef, max_completion_length);
    `window`: number of micro-batches, and generation batch's steps.
    """
    mask = batch["completion_mask"].double()
    if "tool_mask" in batch:
        mask = mask * batch["tool_mask"].double()
    counted = mask * batch["row_weight"].double().unsqueeze(1) if "row_weight" in batch else mask
    advantages = batch["advantages"].double()
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    teacher = o.get("teacher") if "teacher_log_p" in batch else None
    if teacher:
        there = mask.bool() & ~batch["teacher_log_p"].isnan()
        if "expert_mask" in batch:
            there = there & (batch["expert_mask"] == 0)
        gap = torch.where(there, log_p - batch["teacher_log_p"], 0.0)
        if teacher["form"] == "advantage":
            limit = teacher.get("clip") or torch.inf
            advantages = advantages - teacher["weight"](batch["update"]) * gap.detach().clamp(-limit, limit)
    log_ratio = log_p - old_log_p
    if o["level"] == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1)
    ratio = log_ratio.exp()
    kind = o["loss_type"]
    if kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        clipped = ratio.clamp(1 - o["eps_low"], 1 + o["eps_high"])
        per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    elif kind == "cispo":
        per_token = -ratio.clamp(max=o["eps_high"]).detach() * advantages * log_p
    elif kind == "sapo":
        tau = torch.where(advantages > 0, o["sapo_pos"], o["sapo_neg"])
        per_token = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    elif kind == "vespo":
        log_w = ((log_p - old_log_p).clamp(-20, 20) * mask).sum(1, keepdim=True).detach()
        k = torch.where(advantages >= 0, o["vespo_k"][0], o["vespo_k"][1])
        lam = torch.where(advantages >= 0, o["vespo_lambda"][0], o["vespo_lambda"][1])
        phi = (lam + k * log_w - lam * log_w.exp()).exp()
        per_token = -phi * advantages * log_p
    if o.get("beta"):
        delta = batch["ref_per_token_logps"].double() - log_p
        per_token = per_token + o["beta"] * (delta.exp() - delta - 1) * (ratio if o["bias_corrected_kl"] else 1)
    if teacher and teacher["form"] == "loss":
        kl = gap**2 / 2 if teacher["kl"] == "k2" else (-gap).exp() + gap - 1
        per_token = per_token + teacher["weight"](batch["update"]) * kl
    steps, generation_steps = window
    if kind in ("grpo", "sapo"):
        loss = ((per_token * counted).sum(1) / mask.sum(1).clamp(min=1)).mean() / steps
    elif kind == "bnpo":
        loss = (per_token * counted).sum() / mask.sum() / steps
    elif kind == "dr_grpo":
        loss = (per_token * counted).sum() / (mask.size(0) * o["max_completion_length"]) / steps
    elif kind == "luspo":
        loss = (per_token * counted).sum(1).mean() / steps
    else:
        tokens = batch["num_items_in_batch"].double() * steps / generation_steps / o.get("world_size", 1)
        loss = (per_token * counted).sum() / tokens
    if o.get("entropy_coef"):
        loss = loss - o["entropy_coef"] * (entropy * counted).sum() / mask.sum() / steps
    return loss


def clip_statistics(log_p, old_log_p, batch, o):
    """Sum of the ratio, of clipped tokens, and number of tokens; of rollouts with an advantage where others are not run."""
    mask = batch["completion_mask"].double()
    if "row_weight" in batch:
        mask = mask * (batch["row_weight"] > 0).unsqueeze(1)
    advantages = batch["advantages"].double().unsqueeze(1)
    if o.get("live_only"):
        mask = mask * (advantages != 0)
    ratio = (log_p - old_log_p).exp()
    outside = ((ratio < 1 - o["eps_low"]) & (advantages < 0)) | ((ratio > 1 + o["eps_high"]) & (advantages > 0))
    return (ratio * mask).sum(), (outside * mask).sum(), mask.sum()


def demonstration_scores(model, weights, batch):
    """Log-probabilities, mask and greedy hits of demonstrations at temperature 1, (B, T - 1) each."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **seen(batch)}
    logits = torch.func.functional_call(model, weights, (), inputs).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    log_p = torch.log_softmax(logits, dim=-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return log_p, mask, (logits.argmax(-1) == labels) & mask
