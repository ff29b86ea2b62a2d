"""
GRPO with a demonstration stream in plain float64 autograd: one weighted sum of both losses, one optimizer.

Written from the formulas of the baselines (docstrings of `trl_bridge/methods/`). Knows nothing of the trainers.
"""

import copy

import torch

from . import objectives
from .bridge import Optimizer, clip


class StreamReference:
    """
    Trained weights and one update on recorded batches.

    `o`: options of the RL loss (see `objectives.policy_loss`), `optim`, `lr`, `max_grad_norm`, `schedule`, and what the
    method adds: `rl_weight(step)`, `sft_weight(step)`, and `token_weight(p)` of a demonstrated token's probability.
    """

    def __init__(self, model, weights, o):
        self.model = copy.deepcopy(model).double()
        self.model.eval()
        self.weights = {n: t.double().clone() for n, t in weights.items()}
        self.optimizer = Optimizer(o["optim"], len(weights))
        self.o = o

    def update(self, step, micro_batches, demonstrations, weights):
        """
        `micro_batches`, `demonstrations`: recorded batches of all ranks, empty where the update has no such pass;
        `weights`: what `sft_weighting` gave for each of the latter. Returns the metrics.
        """
        o, world = self.o, self.o.get("world_size", 1)
        leaves = {n: t.clone().requires_grad_() for n, t in self.weights.items()}
        loss, metrics = torch.zeros((), dtype=torch.float64), {}
        if micro_batches:
            rl = self._rl(leaves, micro_batches) / world
            loss = loss + o["rl_weight"](step) * rl
            metrics["rl/loss"] = float(rl.detach())
        if demonstrations:
            sft, sft_metrics = self._sft(leaves, demonstrations, weights)
            if o.get("balance"):
                sft = sft + o["balance"] * objectives.demonstration_balance(self.model, leaves, demonstrations)
            loss = loss + o["sft_weight"](step) * sft
            metrics |= sft_metrics
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        gradients, _ = clip(list(gradients), o["max_grad_norm"])
        rate = o["lr"] * o["schedule"](step)
        for name, direction in zip(self.weights, self.optimizer.directions(gradients), strict=True):
            self.weights[name] = self.weights[name] - rate * direction
        return {"loss": float(loss.detach()), **metrics}

    def _rl(self, leaves, micro_batches):
        o = self.o
        window = (len(micro_batches) // o.get("world_size", 1), o["steps_per_generation"])
        total = 0.0
        for batch in micro_batches:
            log_p, entropy = objectives.scores(self.model, leaves, batch, o["temperature"])
            old = batch["old_per_token_logps"].double() if "old_per_token_logps" in batch else log_p.detach()
            total = total + objectives.policy_loss(log_p, entropy, old, batch, o, window)
            if o.get("balance"):
                total = total + o["balance"] * objectives.rollout_balance(self.model, leaves, batch) / window[0]
        return total

    def _sft(self, leaves, demonstrations, weights):
        loss, nll, tokens, hits, used = 0.0, 0.0, 0, 0, 0.0
        for batch, given in zip(demonstrations, weights, strict=True):
            log_p, mask, hit = objectives.demonstration_scores(self.model, leaves, batch)
            own = self.o["token_weight"](log_p.detach().exp())
            weight = (own if given is None else own * given.double()) * mask
            loss = loss - (weight * log_p).sum()
            nll -= float((log_p.detach() * mask).sum())
            tokens, hits, used = tokens + int(mask.sum()), hits + int(hit.sum()), used + float(weight.sum())
        metrics = {"sft/loss": nll / tokens, "sft/mean_token_accuracy": hits / tokens, "weight_mean": used / tokens}
        return loss / tokens, metrics
