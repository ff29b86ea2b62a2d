"""
The package on the map of "A Survey of Reinforcement Learning for Large Reasoning Models" (arXiv 2509.08827).

The places are the survey's components and problems, by name; which method belongs where is our reading. `docs/methods.md` prints it.
"""

from typing import NamedTuple

from .methods.catalogue import METHODS


__all__ = ["PLACES", "Place", "survey_table"]


class Place(NamedTuple):
    """A place on the map."""

    title: str
    ours: str
    upstream: str
    left_out: str


PLACES = {
    "verifiable": Place(
        "reward design: verifiable",
        "`math_reward`, `choice_reward`, `code_reward`, `knights_knaves_reward`, `reasoning_gym_reward`, `route_reward`, "
        "`boxed_format_reward`",
        "`accuracy_reward`, `reasoning_accuracy_reward`, `think_format_reward`",
        "formal proof checkers: a language server each, not a function",
    ),
    "generative": Place(
        "reward design: generative",
        "",
        "any reward model or judge as a reward function",
        "judges: the claims here rest on rewards that can be checked",
    ),
    "dense": Place(
        "reward design: dense",
        "",
        "`DistillationTrainer`, `experimental.gold`, `experimental.sdpo`",
        "process reward models: a model to train and to serve, which TRL's reward functions can call",
    ),
    "unsupervised": Place(
        "reward design: unsupervised",
        "",
        "any function",
        "majority votes and confidence as reward: they measure no correctness",
    ),
    "shaping": Place(
        "reward design: shaping",
        "`noisy(reward, p, seed)`, to see what a wrong verifier does; weights of several rewards",
        "`reward_weights`, `scale_rewards`, `multi_objective_aggregation`, overlong masks and punishments",
        "pass@k as reward",
    ),
    "critic-based": Place(
        "policy optimisation: critic-based", "", "", "a critic: one more model, and TRL has dropped PPO"
    ),
    "critic-free": Place(
        "policy optimisation: critic-free",
        "every loss of `GRPOTrainer` that [support.md](support.md) calls tested, inside every method",
        "`GRPOTrainer`, `RLOOTrainer`",
        "new advantages: TRL's house, and a comparison should differ in one thing",
    ),
    "off-policy": Place(
        "policy optimisation: off-policy, with expert data",
        "`sft_weighting`: which demonstrations to transfer",
        "vLLM's sampling correction; `experimental.async_grpo`",
        "replay of the policy's own old rollouts",
    ),
    "regularisation": Place(
        "policy optimisation: regularisation",
        "a frozen copy of its own start for BRIDGE's KL term",
        "`beta`, entropy coefficient and its controller",
        "",
    ),
    "sampling": Place(
        "sampling: dynamic and structured",
        "gates on a group's success (HPT, SRFT, ReLIFT), hints and prefixes",
        "temperature, `top_p`, `num_generations`",
        "tree search: no batch generation for it in TRL",
    ),
    "sharpening": Place(
        "problems: sharpening or discovery",
        "`trl-bridge eval` gives avg@k and the unbiased pass@k with intervals",
        "",
        "a verdict",
    ),
    "sft": Place(
        "problems: RL against SFT",
        "the comparison itself ([baselines.md](baselines.md)); cold start and SFT as rows of it",
        "`SFTTrainer`",
        "",
    ),
    "corpora": Place(
        "resources: static corpora and environments",
        "`trl-bridge data`: the sources of [data.md](data.md), reasoning-gym tasks, `builtin:routes`",
        "`datasets`, `environment_factory`, `tools`",
        "copies of public data: sources are names and column maps",
    ),
    "infrastructure": Place(
        "resources: infrastructure",
        "DDP, FSDP2 and ZeRO as the table above says",
        "accelerate, DeepSpeed, vLLM",
        "a rollout engine of our own",
    ),
    "applications": Place(
        "applications",
        "mathematics, logic, routes, code, multiple choice",
        "tool use, vision, multi-turn environments",
        "agents and vision: refused, with a message, where a method has not been tested on them",
    ),
}
"""Places of the map by key, in the survey's order."""


def survey_table() -> list[str]:
    """The map as the lines of a Markdown table."""
    here: dict[str, list[str]] = {key: [] for key in PLACES}
    for name, method in METHODS.items():
        here[method.place].append(f"`{name}`")
    lines = ["| place | methods | beside them | TRL has | left out |", "| --- | --- | --- | --- | --- |"]
    for key, place in PLACES.items():
        cells = (place.title, ", ".join(here[key]), place.ours, place.upstream, place.left_out)
        lines.append("| " + " | ".join(cell or "-" for cell in cells) + " |")
    return lines
