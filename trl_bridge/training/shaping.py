"""What LUFFY, SRFT and HPT share: expert tokens in the RL loss, with a shaped probability in place of a ratio."""

from dataclasses import field
from typing import Any

import torch

from ..objectives.expert import SHAPINGS, shaped_probability
from .group import ExpertTrainer
from .group_config import ExpertConfig
from .options import above, at_least, one_of, options


# On-policy ratios are not clipped in the released codes: a range that no ratio leaves.
UNCLIPPED = 1e6
SHAPING_FIELDS = ("policy_shaping", "policy_shaping_gamma", "policy_shaping_exponent", "rl_plus_exponent")


@options
class ShapedConfig(ExpertConfig):
    """Configuration of [`ShapedTrainer`]."""

    policy_shaping: str = field(default="p_div_p", metadata=one_of(*SHAPINGS))
    """Shaping of the expert's probability (see `objectives.expert.shaped_probability`)."""
    policy_shaping_gamma: float = field(default=0.1, metadata=above(0))
    """Constant of the shaping 'p_div_p'."""
    policy_shaping_exponent: float = field(default=0.5, metadata=above(0))
    """Exponent of the shaping 'pow'."""
    rl_plus_exponent: float = field(default=0.0, metadata=at_least(0))
    """The expert's advantage is multiplied by the detached `(1 - p)^exponent` (RL-PLUS, whose released code has 0.5).
    0 leaves it."""


class ShapedTrainer(ExpertTrainer):
    """The template with LUFFY's loss of expert tokens, `-f(p_t) A`, unclipped (arXiv 2504.14945)."""

    config_class = ShapedConfig

    def expert_loss(self, log_probs: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        args = self.args
        values = shaped_probability(
            log_probs,
            args.policy_shaping,
            gamma=args.policy_shaping_gamma,
            exponent=args.policy_shaping_exponent,
            vocab_size=1 if args.preset == "code" else self._plain_model.config.get_text_config().vocab_size,
        )
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        if args.rl_plus_exponent:
            advantages = advantages * (1 - log_probs.detach().exp()).clamp(min=0.0) ** args.rl_plus_exponent
        return -values * advantages
