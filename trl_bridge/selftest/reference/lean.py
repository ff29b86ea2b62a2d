"""
Lean mode in plain float64 autograd: on a frozen base theta, w and theta_hat are adapters of their own, and the policy is
base + s_theta B_theta A_theta + s_w B_w A_w. Knows nothing of slices, of one adapter for two, or of held scalings.
"""

from .bridge import Reference, norm


class LeanReference(Reference):
    """`theta` and `hat` hold A and B of an adapter, as (weight's name, "A" or "B"); `scaling` is w's."""

    def __init__(self, model, theta, theta_scaling, a, b, scaling, o):
        self.base = {n: p.detach().double() for n, p in model.named_parameters()}
        self.theta_scaling = theta_scaling
        super().__init__(model, theta, a, b, scaling, o)

    def change(self, adapter):
        """What an adapter adds to each of its weights."""
        names = {name for name, _ in adapter}
        return {n: self.theta_scaling * adapter[n, "B"] @ adapter[n, "A"] for n in names}

    def policy(self, base, a, b):
        change = self.change(base)
        return {n: w + change[n] + self.scaling * (b[n] @ a[n]) if n in change else w for n, w in self.base.items()}

    def distance(self):
        hat, theta = self.change(self.hat), self.change(self.theta)
        difference = norm(hat[n] - theta[n] for n in theta)
        return difference / norm(theta.values()) if difference else 0.0

    def _step_base(self, base, optimizer, gradients, rate, held):
        # Nothing is merged: each adapter decays by itself.
        for (n, t), direction in zip(list(base.items()), optimizer.directions(gradients), strict=True):
            base[n] = t - rate * (direction + self.o["weight_decay"] * t)
