"""
BRIDGE in plain float64 autograd, unmerged: theta, w = (A, B) and theta_hat are leaves, the policy is theta + s B A.

Written from Algorithm 2 of arXiv 2509.06948 (all gradients at iterate k). Knows nothing of the trainer, of merged
weights or of projections: those are what it checks.
"""

import copy
import math

import torch

from . import objectives


class Optimizer:
    """SGD or AdamW by the textbook; decoupled decay acts on the tensors that the caller names."""

    def __init__(self, kind, size, betas=(0.9, 0.999), eps=1e-8):
        self.kind, self.betas, self.eps = kind, betas, eps
        self.clear(size)

    def clear(self, size=None):
        self.size = size or self.size
        self.t, self.m, self.v = 0, [0.0] * self.size, [0.0] * self.size

    def directions(self, gradients):
        self.t += 1
        if self.kind == "sgd":
            return gradients
        b1, b2 = self.betas
        self.m = [b1 * m + (1 - b1) * g for m, g in zip(self.m, gradients, strict=True)]
        self.v = [b2 * v + (1 - b2) * g * g for v, g in zip(self.v, gradients, strict=True)]
        scale1, scale2 = 1 - b1**self.t, 1 - b2**self.t
        return [m / scale1 / ((v / scale2).sqrt() + self.eps) for m, v in zip(self.m, self.v, strict=True)]


def clip(gradients, max_norm):
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    if not max_norm:
        return gradients, norm
    return [g * min(1.0, max_norm / (norm + 1e-6)) for g in gradients], norm


def norm(tensors):
    return math.sqrt(sum(float((t * t).sum()) for t in tensors))


class Reference:
    """State of BRIDGE and one update on recorded batches."""

    def __init__(self, model, theta, a, b, scaling, o):
        self.model = copy.deepcopy(model).double()
        self.model.eval()
        self.o = o
        self.theta = {n: t.double().clone() for n, t in theta.items()}
        self.hat = {n: t.clone() for n, t in self.theta.items()}
        self.a = {n: t.double().clone() for n, t in a.items()}
        self.b = {n: t.double().clone() for n, t in b.items()}
        self.scaling = scaling
        kind = o["optim"]
        self.opt = Optimizer(kind, len(self.theta))
        self.opt_hat = Optimizer(o.get("shadow_optim") or kind, len(self.theta))
        self.opt_w = Optimizer(kind, 2 * len(self.a))
        self.last_hat_w = None
        self.put_off = []

    def policy(self, base, a, b):
        return {n: t + self.added(n, a[n], b[n]) if n in a else t for n, t in base.items()}

    def added(self, name, a, b):
        """s B A; for fused experts one of each, of PEFT's rows (expert, rank) of A and columns (rank, expert) of B."""
        shape = self.model.get_parameter(name).shape
        if len(shape) == 2:
            return self.scaling * (b @ a)
        a = a.unflatten(0, (shape[0], -1)).unbind(0)
        b = b.unflatten(1, (-1, shape[0])).unbind(2)
        products = torch.stack([b_of @ a_of for a_of, b_of in zip(a, b, strict=True)])
        return self.scaling * (products if products.shape == shape else products.mT)

    def leaves(self, base):
        base = {n: t.detach().requires_grad_() for n, t in base.items()}
        a = {n: t.detach().requires_grad_() for n, t in self.a.items()}
        b = {n: t.detach().requires_grad_() for n, t in self.b.items()}
        return base, a, b

    def gradients(self, loss, base, a, b):
        leaves = [*base.values(), *a.values(), *b.values()]
        flat = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        n, w = len(base), len(a)
        w_grads = [g for pair in zip(flat[n : n + w], flat[n + w :], strict=True) for g in pair]
        frozen = self.o.get("frozen", ())
        return [g * (name not in frozen) for name, g in zip(base, flat[:n], strict=True)], w_grads

    def objective(self, log_p, entropy, old, batch, window, **changes):
        return objectives.policy_loss(log_p, entropy, old, batch, {**self.o, **changes}, window)

    def balance(self, policy, batch, window):
        """The load-balancing loss of a micro-batch, as it enters the window's sum."""
        coefficient = self.o.get("balance")
        return coefficient * objectives.rollout_balance(self.model, policy, batch) / window[0] if coefficient else 0.0

    def update(self, step, micro_batches, demonstrations, weights=None):
        """
        `micro_batches`: recorded RL batches of all ranks; `demonstrations`: recorded SFT batches; `weights`: recorded
        weights of demonstrations, or None. Returns the metrics.
        """
        o = self.o
        window = (len(micro_batches) // o.get("world_size", 1), o["steps_per_generation"])
        world = o.get("world_size", 1)
        lam = o["lam"](step)
        # RL at (theta, w), and at (theta_hat, w)
        base, a, b = self.leaves(self.theta)
        policy = self.policy(base, a, b)
        shadow_base, shadow_a, shadow_b = self.leaves(self.hat)
        shadow = self.policy(shadow_base, shadow_a, shadow_b)
        rl, rl_hat, gain, counts = 0.0, 0.0, 0.0, torch.zeros(3, dtype=torch.float64)
        scored, plain = [], {"beta": 0.0, "entropy_coef": 0.0, "teacher": None}
        for batch in micro_batches:
            log_p, entropy = objectives.scores(self.model, policy, batch, o["temperature"])
            old = batch["old_per_token_logps"].double() if "old_per_token_logps" in batch else log_p.detach()
            rl = (
                rl + (self.objective(log_p, entropy, old, batch, window) + self.balance(policy, batch, window)) / world
            )
            if o["gain"] and o.get("rows"):
                batch = {**batch, "row_weight": o["rows"](batch)}
            scored.append(
                (batch, old, float(self.objective(log_p, entropy, old, batch, window, **plain).detach()), window)
            )
        # While the server generates, the shadow sees the rollouts of the update before.
        shadows = self.put_off if o.get("overlap") else scored
        for batch, old, student, its_window in shadows if o["gain"] else ():
            log_p_hat, entropy_hat = objectives.scores(self.model, shadow, batch, o["temperature"])
            trained_old = old if o["ratio"] else log_p_hat.detach()
            balance = self.balance(shadow, batch, its_window)
            rl_hat = (
                rl_hat + (self.objective(log_p_hat, entropy_hat, trained_old, batch, its_window) + balance) / world
            )
            better = self.objective(log_p_hat, entropy_hat, old, batch, its_window, **plain)
            gain += (float(better.detach()) - student) / world
            counts += torch.stack(objectives.clip_statistics(log_p_hat, old, batch, o)).detach()
        rl_theta, rl_w = self.gradients(rl, base, a, b)
        # SFT at (theta, w): summed over the window and all ranks, divided by the token count once
        base, a, b = self.leaves(self.theta)
        policy = self.policy(base, a, b)
        parts = [objectives.demonstration_scores(self.model, policy, batch) for batch in demonstrations]
        tokens = sum(int(mask.sum()) for _, mask, _ in parts)
        used = weights or [torch.ones(()) for _ in parts]
        sft = sum((-lp * m * w.double()).sum() for (lp, m, _), w in zip(parts, used, strict=True)) / tokens
        if o.get("balance"):
            sft = sft + o["balance"] * objectives.demonstration_balance(self.model, policy, demonstrations)
        nll = sum(float((-lp * m).sum()) for lp, m, _ in parts) / tokens
        sft_theta, sft_w = self.gradients(sft, base, a, b)
        fused = [(1 - lam) * s + lam * r for s, r in zip(sft_theta, rl_theta, strict=True)]
        metrics = {
            "loss": float((1 - lam) * sft.detach() + lam * rl.detach()),
            "sft/loss": nll,
            "sft/num_tokens": tokens,
            "sft/mean_token_accuracy": sum(int(h.sum()) for _, _, h in parts) / tokens,
            "bridge/lambda": lam,
            "bridge/coordinator_norm": norm([self.added(n, self.a[n], self.b[n]) for n in self.a]),
            "bridge/coordinator_grad_norm_sft": norm(sft_w),
            "bridge/coordinator_grad_norm_rl": norm(rl_w),
            "bridge/coordinator_grad_cosine": cosine(sft_w, rl_w),
            "bridge/grad_norm_sft": norm(sft_theta),
            "bridge/grad_norm_rl": norm(rl_theta),
            "bridge/grad_cosine": cosine(sft_theta, rl_theta),
        }
        w_grads = [(1 - lam) * s + lam * r for s, r in zip(sft_w, rl_w, strict=True)]
        # The shadow's turn: every so many updates; between, its last gradient over w, and none is a bracket of zero.
        due = bool(shadows) and (step + 1) % o.get("every", 1) == 0
        self.put_off = scored
        if o["gain"]:
            if due:
                hat_theta, self.last_hat_w = self.gradients(rl_hat, shadow_base, shadow_a, shadow_b)
            hat_w = rl_w if self.last_hat_w is None else self.last_hat_w
            bracket = [r - h for r, h in zip(rl_w, hat_w, strict=True)]
            w_grads = [(1 - lam) * s + lam * g for s, g in zip(sft_w, bracket, strict=True)]
            metrics["bridge/gain_grad_norm"] = norm(bracket)
            metrics["bridge/shadow_distance"] = self.distance()
        if o["gain"] and due:
            metrics["bridge/gain"] = gain
            if counts[2] > 0:
                metrics["bridge/shadow_ratio"] = float(counts[0] / counts[2])
                metrics["bridge/shadow_clip_fraction"] = float(counts[1] / counts[2])
        factor = o["schedule"](step)
        # Decay acts on the weights that the optimizer holds, theta + s B A as they are at the iterate, or with w's step.
        held_by = [self.policy(base, self.a, self.b) for base in (self.theta, self.hat)]
        self._step_w(w_grads, factor)
        if o.get("decays_with_step_of_w"):
            held_by = [self.policy(base, self.a, self.b) for base in (self.theta, self.hat)]
        fused, metrics["grad_norm"] = clip(fused, o["max_grad_norm"])
        self._step_base(self.theta, self.opt, fused, o["lr"] * factor, held_by[0])
        if o["gain"] and due:
            hat_theta, _ = clip(hat_theta, o["max_grad_norm"])
            self._step_base(self.hat, self.opt_hat, hat_theta, o["shadow_lr"] * factor, held_by[1])
        if o["gain"] and o.get("reset") and (step + 1) % o["reset"] == 0:
            self.hat = {n: t.clone() for n, t in self.theta.items()}
            self.opt_hat.clear()
            self.last_hat_w = None
        return metrics

    def distance(self):
        return norm(self.hat[n] - self.theta[n] for n in self.theta) / norm(self.theta.values())

    def _step_w(self, gradients, factor):
        o = self.o
        gradients, _ = clip(gradients, o["max_grad_norm"])
        directions = iter(self.opt_w.directions(gradients))
        rate = o["w_lr"] * factor
        for n in self.a:
            self.a[n] = self.a[n] - rate * (next(directions) + o["weight_decay"] * self.a[n])
            self.b[n] = self.b[n] - rate * (next(directions) + o["weight_decay"] * self.b[n])

    def _step_base(self, base, optimizer, gradients, rate, held):
        for (n, t), direction in zip(list(base.items()), optimizer.directions(gradients), strict=True):
            decay = self.o["weight_decay"] if n in self.o["decaying"] else 0.0
            base[n] = t - rate * (direction + decay * held[n])


def cosine(x, y):
    dot = sum(float((a * b).sum()) for a, b in zip(x, y, strict=True))
    return dot / (norm(x) * norm(y)) if norm(x) and norm(y) else math.nan
