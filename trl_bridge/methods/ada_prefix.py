"""AdaPrefix: rollouts continue a prefix of the expert's that is as long as it takes to succeed half of the time."""

from dataclasses import field
from typing import Any

from accelerate.utils import gather_object

from ..demonstrations.rows import prompt_key
from ..objectives.schedules import linear_ramp
from ..training.checkpoint.registry import SHARED, Registry, attribute
from ..training.group import ExpertPlan, ExpertTrainer
from ..training.group_config import ExpertConfig, require_room
from ..training.options import above, at_least, options, within


@options
class AdaPrefixConfig(ExpertConfig):
    """Configuration of [`AdaPrefixTrainer`]."""

    prefix_start: float = field(default=0.5, metadata=within(0, 1))
    """Share of the trace that a question's first rollouts begin with."""
    prefix_high: float = field(default=0.95, metadata=within(0, 1))
    """Largest share. The token that ends the trace is never in a prefix. 0 is plain GRPO."""
    prefix_target: float = field(default=0.5, metadata=within(0, 1))
    """Success rate that a question's share is steered to."""
    prefix_rate: float = field(default=0.2, metadata=above(0))
    """What the share grows by for a success rate that is 1 too low."""
    prefix_steps: int | None = field(default=None, metadata=at_least(1))
    """Updates with prefixes; then there are none. `None` is the whole run."""
    prefix_withdrawal: float = field(default=0.5, metadata=within(0, 1))
    """Share of these updates, at their end, over which `prefix_high` falls to 0, linearly."""
    loss_type: str = "dapo"
    """GRPO's loss type: 'grpo', 'dr_grpo' or 'dapo'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_scale != "trl":
            raise ValueError(
                f"`loss_scale={self.loss_scale!r}` scales an SFT term, and AdaPrefix has none. Set it to 'trl'."
            )
        require_room(self)


class AdaPrefixTrainer(ExpertTrainer):
    """
    AdaPrefix: all rollouts of a group continue one prefix of its trace, whose length is steered for each question to a
    success rate of a half, and then withdrawn.

    The rollouts of question `x` begin with `l(x) |y*|` tokens of its trace. With the share `s` of them that is right,

        l(x) <- clamp(l(x) + prefix_rate (prefix_target - s), 0, high(t))

    `high` is `prefix_high` and falls linearly to 0 at the end of `prefix_steps`, so that the last updates are GRPO's. GRPO's loss is
    that of the continuations: advantages of a group cancel on a prefix that all of its rollouts share. A group without trace is plain GRPO.

    Source: AdaPrefix (arXiv 2607.07674), which was not at hand: that each question's prefix is steered to a success rate of a half and
    then withdrawn is its idea; the rule above, its constants and the withdrawal are ours, on the parts of Prefix-RFT (arXiv 2507.01679).

    Metrics: `ada_prefix/share` (mean `l` of the groups that continue a prefix or could), `ada_prefix/success` (mean `s` of them),
    `ada_prefix/high`.

    Args: as in [`ExpertTrainer`].
    """

    config_class = AdaPrefixConfig
    args: AdaPrefixConfig
    refuses_turns = "a rollout may have to continue inside a tool's result, which no policy writes"
    _tag_names = ["trl", "ada-prefix"]
    _name = "AdaPrefix"
    _paper: dict[str, Any] = {}  # its title and authors were not at hand

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shares: dict[str, float] = {}  # by question; what no rollout has told of yet is `prefix_start`

    def high(self) -> float:
        """Largest share of a trace that a prefix has, in rollouts made now."""
        args, step = self.args, self.state.global_step
        steps = self.state.max_steps if args.prefix_steps is None else args.prefix_steps
        fall = round(steps * args.prefix_withdrawal)
        return 0.0 if step >= steps else linear_ramp(max(0, step - steps + fall), args.prefix_high, 0.0, fall or steps)

    def share_of(self, prompt: Any) -> float:
        """Share of its trace that a question's rollouts begin with now."""
        return min(self.shares.get(prompt_key(prompt), self.args.prefix_start), self.high())

    def expert_heads(self, plan: ExpertPlan, inputs: list[dict[str, Any]]) -> list[int]:
        return [
            # Without the token that ends the trace.
            0 if expert is None else int(self.share_of(example["prompt"]) * (len(expert) - 1))
            for expert, example in zip(plan.experts, inputs, strict=True)
        ]

    def assign(self, output: dict[str, Any], plan: ExpertPlan) -> None:
        rewards = self.rollouts.total_rewards().view(-1, int(self.num_generations or 0))  # (groups, G)
        rows = zip(plan.groups, plan.members, plan.experts, plan.inputs, strict=True)
        first = [(group, row["prompt"]) for group, member, expert, row in rows if member == 0 and expert is not None]
        told: list[tuple[float, float]] = []
        # Groups lie on different ranks; all of them steer every question.
        groups = sorted(gather_object(first), key=lambda pair: pair[0])
        for (group, prompt), share in zip(groups, [self.share_of(prompt) for _, prompt in groups], strict=True):
            known = rewards[group][~rewards[group].isnan()]
            if not len(known):
                continue
            success = float((known >= self.args.success_threshold).double().mean())
            told.append((share, success))
            moved = share + self.args.prefix_rate * (self.args.prefix_target - success)
            self.shares[prompt_key(prompt)] = min(max(moved, 0.0), self.args.prefix_high)
        values = {"ada_prefix/high": self.high()}
        if told:
            values["ada_prefix/share"], values["ada_prefix/success"] = (
                sum(part) / len(told) for part in zip(*told, strict=True)
            )
        self.record(values)

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.add("shares", attribute(self, "shares"), SHARED)
        saved.must_match(
            "prefix_start", "prefix_high", "prefix_target", "prefix_rate", "prefix_steps", "prefix_withdrawal"
        )
