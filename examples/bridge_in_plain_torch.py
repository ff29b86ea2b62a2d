"""
BRIDGE on one page: rollouts, both losses and the three updates, from top to bottom, without a trainer.

    python examples/bridge_in_plain_torch.py

`BridgeTrainer` holds theta + s B A merged, which is faster and works with everything in TRL, and harder to read. This page
keeps theta, w and the shadow apart as the paper writes them (arXiv 2509.06948, Algorithm 2), and a test checks that the two
make the same updates. A tiny model learns sums of two digits in half a minute on a CPU.
"""

import argparse

import torch
from torch.func import functional_call

from trl_bridge.data.addition import addition_dataset, addition_pairs
from trl_bridge.models import tiny_model, tiny_tokenizer
from trl_bridge.rewards import closeness_reward


def log_probs(model, weights, ids, mask):
    """Log-probability of each token given those before it, (B, T - 1), of `model` with `weights`."""
    logits = functional_call(model, weights, (), {"input_ids": ids, "attention_mask": mask}).logits[:, :-1]
    return torch.log_softmax(logits, dim=-1).gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)


def rl_loss(log_p, old_log_p, batch, epsilon=0.2):
    """GRPO's clipped loss over the completion tokens of all rollouts (TRL's default, `loss_type="dapo"`)."""
    advantages = batch["advantages"].unsqueeze(1)
    ratio = (log_p - old_log_p).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    return (per_token * batch["completion_mask"]).sum() / batch["completion_mask"].sum()


def sft_loss(log_p, trained):
    """Mean negative log-likelihood of the demonstrations' trained tokens; `trained` (B, T - 1) is 1 on those."""
    return -(log_p * trained).sum() / trained.sum()


class Bridge:
    """theta, w = (A, B) and the shadow theta_hat, and one update of all three. The policy is pi(theta + s B A)."""

    def __init__(self, model, theta, a, b, scaling=1.0, lam=0.5, learning_rate=1e-3, coordinator_rate=1e-2):
        self.model, self.scaling, self.lam = model, scaling, lam
        self.theta = {name: weight.detach().clone().requires_grad_() for name, weight in theta.items()}
        self.theta_hat = {name: weight.detach().clone().requires_grad_() for name, weight in theta.items()}
        self.a = {name: weight.detach().clone().requires_grad_() for name, weight in a.items()}
        self.b = {name: weight.detach().clone().requires_grad_() for name, weight in b.items()}
        self.w = [*self.a.values(), *self.b.values()]
        rates = ((self.theta, learning_rate), (self.theta_hat, learning_rate))
        self.optimizers = [torch.optim.AdamW(list(base.values()), lr=rate, weight_decay=0.0) for base, rate in rates]
        self.optimizers.append(torch.optim.AdamW(self.w, lr=coordinator_rate, weight_decay=0.0))

    def policy(self, base):
        """The weights base + s B A."""
        return {
            name: weight + self.scaling * self.b[name] @ self.a[name] if name in self.a else weight
            for name, weight in base.items()
        }

    def rollout_log_probs(self, base, batch):
        """Log-probabilities of the completion tokens, (rollouts, C), under the policy of theta or of the shadow."""
        length = batch["completion_ids"].size(1)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        return log_probs(self.model, self.policy(base), ids, mask)[:, -length:]

    def update(self, rollouts, demonstrations):
        """
        One meta-step. All gradients are taken at the same (theta, w, theta_hat), then everything steps.

        `rollouts` were sampled from pi(theta + w) and serve both RL losses. Returns the cooperative gain: how much better
        the RL objective is at theta than at the shadow, which follows RL alone.
        """
        theta, theta_hat, w, lam = self.theta, self.theta_hat, self.w, self.lam

        # 1. RL at (theta, w). The rollouts are the policy's own, so the ratio is 1 and only its gradient counts.
        log_p = self.rollout_log_probs(theta, rollouts)
        old_log_p = log_p.detach()
        rl = rl_loss(log_p, old_log_p, rollouts)
        rl_grads = torch.autograd.grad(rl, [*theta.values(), *w])
        rl_theta, rl_w = rl_grads[: len(theta)], rl_grads[len(theta) :]

        # 2. RL at (theta_hat, w): the same rollouts, so the ratio is to the policy that sampled them.
        rl_hat = rl_loss(self.rollout_log_probs(theta_hat, rollouts), old_log_p, rollouts)
        hat_grads = torch.autograd.grad(rl_hat, [*theta_hat.values(), *w])
        hat_theta, hat_w = hat_grads[: len(theta)], hat_grads[len(theta) :]

        # 3. SFT at (theta, w).
        ids, mask, trained = (demonstrations[key] for key in ("input_ids", "attention_mask", "trained"))
        sft = sft_loss(log_probs(self.model, self.policy(theta), ids, mask), trained)
        sft_grads = torch.autograd.grad(sft, [*theta.values(), *w])
        sft_theta, sft_w = sft_grads[: len(theta)], sft_grads[len(theta) :]

        # The three updates: theta along the fused gradient, the shadow along RL only, and w along SFT's gradient and that
        # of the gain, J(theta + w) - J(theta_hat + w).
        gradients = [
            [(1 - lam) * s + lam * r for s, r in zip(sft_theta, rl_theta, strict=True)],
            hat_theta,
            [(1 - lam) * s + lam * (r - h) for s, r, h in zip(sft_w, rl_w, hat_w, strict=True)],
        ]
        for tensors, optimizer, grads in zip(
            (theta.values(), theta_hat.values(), w), self.optimizers, gradients, strict=True
        ):
            for tensor, gradient in zip(tensors, grads, strict=True):
                tensor.grad = gradient
            torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            optimizer.step()
        return (rl_hat - rl).item()


@torch.no_grad()
def sample(model, weights, prompt_ids, prompt_mask, length, eos):
    """Completions (B, length) at temperature 1, and their mask, which ends after the first end of sequence."""
    ids, mask = prompt_ids, prompt_mask
    alive = torch.ones(len(ids), 1, dtype=torch.long)
    for _ in range(length):
        logits = functional_call(model, weights, (), {"input_ids": ids, "attention_mask": mask}).logits[:, -1]
        token = torch.multinomial(logits.softmax(dim=-1), 1)
        ids, mask = torch.cat([ids, token], dim=1), torch.cat([mask, alive], dim=1)
        alive = alive * (token != eos)
    return ids[:, -length:], mask[:, -length:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer("0123456789+=")
    tokenizer.padding_side = "left"
    model = tiny_model(tokenizer)
    rows = addition_dataset(addition_pairs(max_number=9, seed=0))

    theta = dict(model.named_parameters())
    linear = {name: weight for name, weight in theta.items() if name.endswith("proj.weight")}
    a = {name: torch.randn(4, weight.size(1)) / weight.size(1) ** 0.5 for name, weight in linear.items()}
    b = {name: torch.zeros(weight.size(0), 4) for name, weight in linear.items()}
    bridge = Bridge(model, theta, a, b, learning_rate=2e-3, coordinator_rate=2e-3)

    prompts, group = 4, 8
    for step in range(steps):
        # Rollouts: 4 prompts with 8 completions each, and rewards turned into advantages within each group.
        drawn = rows.select(torch.randint(len(rows), (prompts,)).tolist())
        texts = [text for text in drawn["prompt"] for _ in range(group)]
        answers = [text for text in drawn["solution"] for _ in range(group)]
        prompt = tokenizer(texts, padding=True, return_tensors="pt")
        policy = bridge.policy(bridge.theta)
        ids, mask = sample(model, policy, prompt.input_ids, prompt.attention_mask, 3, tokenizer.eos_token_id)
        rewards = torch.tensor(closeness_reward(tokenizer.batch_decode(ids, skip_special_tokens=True), answers))
        grouped = rewards.view(prompts, group)
        advantages = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
        rollouts = {
            "prompt_ids": prompt.input_ids,
            "prompt_mask": prompt.attention_mask,
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": advantages.flatten(),
        }

        # Demonstrations: prompt and answer; only the answer's tokens are trained.
        drawn = rows.select(torch.randint(len(rows), (16,)).tolist())
        full = [p + c + tokenizer.eos_token for p, c in zip(drawn["prompt"], drawn["completion"], strict=True)]
        batch = tokenizer(full, padding=True, return_tensors="pt")
        width = batch.input_ids.size(1)
        answer_lengths = [len(tokenizer(c).input_ids) + 1 for c in drawn["completion"]]
        trained = torch.stack([(torch.arange(1, width) >= width - n).float() for n in answer_lengths])
        gain = bridge.update(rollouts, {**batch, "trained": trained})

        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3d}  reward {rewards.mean():.2f}  cooperative gain {gain:+.4f}")


if __name__ == "__main__":
    main()
