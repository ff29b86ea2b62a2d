"""The losses of the group methods in float64, from their formulas, and the recorders that some of them need."""

import math

import torch
from torch.nn.utils.rnn import pad_sequence

from .._upstream import pad
from ..methods.actguide import ActGuideTrainer
from ..methods.relift import ReLIFTTrainer
from ..models import tiny_tokenizer
from .groups import Pass, hint_rows, options, recording, sft_sum, token_sum
from .reference import objectives
from .reference.bridge import Optimizer, clip
from .runs import movement_error


def hpt_loss(coefficient=1.0, gamma=0.1):
    def loss(p):
        prob = p.log_p.exp()
        expert = -prob / (prob + gamma) * p.advantages.unsqueeze(1)
        off_policy = token_sum(expert, p.expert * (1 - p.sft), p.batch, p.o, p.window)
        return p.policy_loss() + off_policy + coefficient * sft_sum(-p.plain_log_p, p.sft, p.batch, p.o, p.window)

    return loss


VOCABULARY = len(tiny_tokenizer())


def shaped(prob, shaping="p_div_p", gamma=0.1, power=0.5, vocabulary=VOCABULARY):
    """The published shapings, by name."""
    values = {
        "p_div_p": lambda p: p / (p + gamma),
        "none": lambda p: p,
        "logp": torch.log,
        "p_logp": lambda p: p * torch.log(p),
        "square_root": torch.sqrt,
        "pow": lambda p: p**power,
        "rl_plus": lambda p: 2 * p / (p.detach() * 1.5 + 0.5 / vocabulary),
    }
    return values[shaping](prob)


def luffy_loss(explore=0.0, **formula):
    def loss(p):
        prob = p.log_p.exp()
        advantages = p.advantages.unsqueeze(1) * (1 - prob.detach()) ** explore
        corrected = p.advantages.unsqueeze(1) * p.batch.get("importance_sampling_ratio", torch.ones(1)).double()
        expert = token_sum(-shaped(prob, **formula) * advantages, p.expert, p.batch, p.o, p.window)
        return p.policy_loss(advantages=corrected) + expert

    return loss


def uft_loss(p):
    return p.policy_loss() + p.o["hint_coef"] * sft_sum(-p.plain_log_p, p.sft, p.batch, p.o, p.window)


def learning_tokens(p, share):
    """The prefix tokens of a micro-batch that learn, (B, T): by sorting numbers in plain Python."""
    entropy = p.entropy.detach()
    ranked = sorted((-float(entropy[place]), place) for place in map(tuple, p.expert.nonzero().tolist()))
    kept = torch.zeros_like(p.expert)
    for _, place in ranked[: len(ranked) - math.floor(len(ranked) * (1 - share) + 1e-9)]:
        kept[place] = 1.0
    return kept


def prefix_loss(p):
    """GRPO's clipped loss over all tokens, ratio at most delta where the advantage is negative."""
    advantages = p.advantages if p.advantages.dim() == 2 else p.advantages.unsqueeze(1)
    silent = p.expert * (1 - learning_tokens(p, p.o["share"]))
    advantages = advantages * (1 - silent)
    ratio = (p.log_p - p.old).exp()
    clipped = ratio.clamp(1 - p.o["eps_low"], 1 + p.o["eps_high"])
    per_token = torch.where(
        advantages >= 0,
        -advantages * torch.minimum(ratio, clipped),
        -advantages * torch.maximum(ratio, clipped).clamp(max=p.o["delta"]),
    )
    corrected = per_token * p.batch.get("importance_sampling_ratio", torch.ones(1)).double()
    per_token = torch.where(p.expert.bool(), per_token, corrected)
    if p.o["beta"]:
        delta = p.batch["ref_per_token_logps"].double() - p.log_p
        kl = (delta.exp() - delta - 1) * (ratio if p.o["bias_corrected_kl"] else 1)
        per_token = per_token + p.o["beta"] * kl
    mask = p.batch["completion_mask"].double()
    loss = token_sum(per_token, mask, p.batch, p.o, p.window)
    if p.o["entropy_coef"]:
        loss = loss - p.o["entropy_coef"] * (p.entropy * mask).sum() / mask.sum() / p.window[0]
    return loss


def row_entropy(p):
    mask = p.batch["completion_mask"].double() * (p.batch["tool_mask"] | p.batch["expert_mask"])
    return ((p.entropy * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).detach()


def srft_loss(sft_weight=0.5, sign=-1, rl_weight=0.1, floor=-10.0, trapo=False, sft_scale=1.0):
    """The formula as printed: nothing in it is a ratio or an advantage but the expert's."""

    def loss(p):
        o, h = p.o, row_entropy(p)
        prob = p.log_p.exp()
        expert = -prob / (prob + 0.1) * p.advantages.unsqueeze(1)
        plain = p.plain_log_p.exp().detach()
        token_weight = plain / plain.clamp(min=0.1) if trapo else 1.0
        sft = sft_weight * torch.exp(sign * h) * token_weight * -p.plain_log_p
        own = (p.batch["completion_mask"] * p.batch["tool_mask"]).double()
        pushed = (p.log_p.detach() >= floor).double()
        verdicts = p.batch["verdicts"].double().unsqueeze(1)
        right, wrong = (verdicts > 0).double(), (verdicts < 0).double() * pushed
        corrected = p.batch.get("importance_sampling_ratio", torch.ones(1)).double()
        self_loss = corrected * (-rl_weight * torch.exp(h) * right * p.log_p + wrong * p.log_p)
        # KL and entropy terms are the parent's, at ratio 1.
        nothing = {**p.batch, "advantages": torch.zeros_like(p.advantages)}
        rest = objectives.policy_loss(p.log_p, p.entropy, p.log_p.detach(), nothing, o, p.window)
        total = token_sum(expert, p.expert, p.batch, o, p.window) + token_sum(self_loss, own, p.batch, o, p.window)
        return total + rest + sft_scale * sft_sum(sft, p.sft, p.batch, o, p.window)

    return loss


def watch_guidance():
    """Recorded, with the prompts that rollouts were sampled from, and the weights at the time, in the batch."""

    class Watching(recording(ActGuideTrainer)):
        born = None

        def assign(self, output, plan):
            prompts = [torch.tensor(ids) for ids in self._guided_prompts]
            super().assign(output, plan)
            if prompts:
                output["guided_prompt_ids"] = pad(prompts, padding_value=0, padding_side="left")
                ones = [torch.ones_like(ids) for ids in prompts]
                output["guided_prompt_mask"] = pad(ones, padding_value=0, padding_side="left")
            self.born = [*(self.born or []), self.snapshot()]
            output["born"] = torch.full((len(output["guided"] if prompts else output["advantages"]),), len(self.born))

    return Watching


def guide_loss(run):
    """The method's loss from its formula; old log-probabilities are formed anew from prompts and weights."""

    def loss(p):
        o, batch = p.o, p.batch
        old, advantages = p.old, p.advantages.unsqueeze(1)
        if "guided" in batch:
            weights = {n: t.double() for n, t in run.born[int(batch["born"][0]) - 1].items()}
            prompt = {"prompt_ids": batch["guided_prompt_ids"], "prompt_mask": batch["guided_prompt_mask"]}
            with torch.no_grad():
                guided, _ = objectives.scores(run.initial_model, weights, {**batch, **prompt}, o["temperature"])
            rows = batch["guided"].unsqueeze(1)
            old = torch.where(rows, guided, old)
            if o["gamma"]:
                ratio = (p.log_p.detach() - old).exp()
                advantages = torch.where(rows, advantages * ratio / (ratio + o["gamma"]), advantages)
                old = torch.where(rows, p.log_p.detach(), old)
        ratio = (p.log_p - old).exp()
        clipped = ratio.clamp(1 - o["eps_low"], 1 + o["eps_high"])
        per_token = -torch.minimum(ratio.clamp(max=o["delta"]) * advantages, clipped * advantages)
        if o["beta"]:
            gap = batch["ref_per_token_logps"].double() - p.log_p
            per_token = per_token + o["beta"] * (gap.exp() - gap - 1) * (ratio if o["bias_corrected_kl"] else 1)
        return token_sum(per_token, batch["completion_mask"].double(), batch, o, p.window)

    return loss


def distributions(p, weights, **prompt):
    """Log-probabilities over the vocabulary at each completion token, (B, T, V)."""
    batch = {**p.batch, **prompt}
    ids, mask = (torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], 1) for what in ("ids", "mask"))
    logits = torch.func.functional_call(p.model, weights, (), {"input_ids": ids, "attention_mask": mask}).logits
    length = batch["completion_ids"].size(1)
    return torch.log_softmax(logits[:, -length - 1 : -1] / p.o["temperature"], -1)


def self_teacher_loss(args, weight=1.0, gate=False, direction="reverse", clip=torch.inf, share=None, averages=None):
    """Of rows of `hint_rows(every=2)` with `{prompt}{demonstration}!`; the teacher's prompts are rendered anew."""
    tokenizer = tiny_tokenizer()
    traces = {row["prompt"]: row["expert"] for row in hint_rows(every=2)}

    def hints(p):
        rows = []
        for ids, mask in zip(p.batch["prompt_ids"], p.batch["prompt_mask"], strict=True):
            prompt = tokenizer.decode(ids[mask.bool()]).replace(" ", "")
            rows.append((prompt, traces[prompt]))
        texts = [prompt if trace is None else f"{prompt}{trace}!" for prompt, trace in rows]
        made = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        there = torch.tensor([[trace is not None] for _, trace in rows])
        return {"prompt_ids": made["input_ids"], "prompt_mask": made["attention_mask"]}, there

    def loss(p):
        prompt, hinted = hints(p)
        own = {n: t.detach() for n, t in p.weights.items()} if averages is None else averages[p.batch["update"]]
        mask = p.batch["completion_mask"].double()
        with torch.no_grad():
            log_q = distributions(p, own, **prompt)
        if args.objective == "rlsd":
            ids = p.batch["completion_ids"].unsqueeze(2)
            ratio = log_q.gather(2, ids).squeeze(2) - p.log_p.detach()
            a = p.advantages.unsqueeze(1)
            evidence = torch.where(a > 0, ratio.exp(), torch.where(a < 0, (-ratio).exp(), 1.0)).clamp(0.8, 1.2)
            c = share(p.batch["update"])
            return p.policy_loss(advantages=torch.where(hinted, a * (1 - c + c * evidence), a))
        log_p = distributions(p, p.weights)
        terms = log_p.exp() * (log_p - log_q) if direction == "reverse" else log_q.exp() * (log_q - log_p)
        kl = terms.clamp(max=clip).sum(-1) * hinted
        if gate:
            kl = kl * (p.advantages > 0).unsqueeze(1)
        total = weight * token_sum(kl, mask, p.batch, p.o, p.window)
        return total + (p.policy_loss() if args.objective == "sdpg" else 0.0)

    return loss


def watch_buffer():
    """The recording trainer, which keeps what each SFT step trained on, and the buffer after each update."""

    class Watching(recording(ReLIFTTrainer)):
        def after_step(self):
            before, steps = list(self.buffer), self.sft_steps
            super().after_step()
            left = before[len(self.buffer) :] if self.sft_steps > steps else []
            self.taken = [*getattr(self, "taken", []), left]
            self.kept = [*getattr(self, "kept", []), list(self.buffer)]

    Watching.__name__ = "ReLIFTTrainer"
    return Watching


def mean_nll(model, weights, demonstrations):
    """Mean over all completion tokens, at temperature 1."""
    ids = [torch.tensor(prompt + completion) for _, prompt, completion in demonstrations]
    labels = [torch.tensor([-100] * len(prompt) + completion) for _, prompt, completion in demonstrations]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    log_p, mask, _ = objectives.demonstration_scores(model, weights, batch)
    return -(log_p * mask).sum() / mask.sum()


def replay_relift(trainer):
    """Each update in float64: GRPO's step, then the SFT step with its own moments, clipping and rate."""
    args = trainer.args
    world = getattr(trainer, "world_size", 1)  # of a run whose windows hold all ranks' micro-batches
    o = options(args, world_size=world)
    sft_rate = args.learning_rate if args.sft_learning_rate is None else args.sft_learning_rate
    sft_norm = args.max_grad_norm if args.sft_max_grad_norm is None else args.sft_max_grad_norm
    model = trainer.initial_model.double().eval()
    theta = {n: t.double().clone() for n, t in trainer.start.items()}
    optimizer = Optimizer(o["optim"], len(theta), eps=args.adam_epsilon)
    sft_optimizer = Optimizer(o["optim"], len(theta), eps=args.adam_epsilon) if args.separate_optimizer else optimizer
    errors, losses = [], []
    for step, (window, state, taken) in enumerate(zip(trainer.windows, trainer.states, trainer.taken, strict=True)):
        shape = (len(window) // world, o["steps_per_generation"])
        leaves = {n: t.detach().requires_grad_() for n, t in theta.items()}
        loss = sum(Pass(model, leaves, batch, o, shape).policy_loss() for batch in window) / world
        theta = _step(theta, leaves, loss, optimizer, o["max_grad_norm"], o["lr"] * o["schedule"](step))
        if taken:
            leaves = {n: t.detach().requires_grad_() for n, t in theta.items()}
            loss = mean_nll(model, leaves, taken)
            theta = _step(theta, leaves, loss, sft_optimizer, sft_norm, sft_rate * o["schedule"](step))
        losses.append(loss.item() if taken else None)
        errors.append(movement_error(state, theta, trainer.start))
    return errors, losses


def _step(theta, leaves, loss, optimizer, max_norm, rate):
    gradients, _ = clip(list(torch.autograd.grad(loss, list(leaves.values()))), max_norm)
    directions = optimizer.directions(gradients)
    return {name: theta[name] - rate * step for name, step in zip(theta, directions, strict=True)}
