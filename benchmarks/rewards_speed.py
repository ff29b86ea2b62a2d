"""
Speed of `math_reward`: `python benchmarks/rewards_speed.py`.

Easy: completions of 2,000 characters, integer and fraction answers, half of them wrong. Plain math-verify runs on a part
of the same completions. Hostile: a batch of 512, of which 5 % try to stall the verifier.
"""

import argparse
import random
import time

from math_verify import LatexExtractionConfig, parse, verify

from trl_bridge.rewards import MathReward


HOSTILE = (
    "2^{2^{2^{100}}}",
    "9^{9^{9^{9}}}-1",
    r"\binom{10^9}{5\cdot 10^8}",
    r"\sum_{k=1}^{10^{12}} \frac{1}{k!}x",
    r"\int e^{x^{x^x}} dx",
    "10^{10^{10}}+x",
    "((10000!)!)!",
    "9" * 100_000,
    "{" * 50_000 + "}" * 50_000,
)


def easy(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Completions and golds; every other answer is wrong, every third a fraction."""
    rng = random.Random(seed)
    completions, golds = [], []
    for index in range(count):
        value, other = rng.randint(-999, 999), rng.randint(2, 99)
        gold, wrong = str(value), str(value + 1)
        if index % 3 == 0:
            gold, wrong = rf"\frac{{{value}}}{{{other}}}", rf"\frac{{{value + 1}}}{{{other}}}"
        shown = gold if index % 2 else wrong
        thought = "Let us compute $x_1 + 2 = 5$ step by step. " * 50
        completions.append(f"{thought[:1980]}\\boxed{{{shown}}}")
        golds.append(gold)
    return completions, golds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    arguments = parser.parse_args()

    completions, golds = easy(arguments.count)
    metrics: dict[str, float] = {}
    start = time.perf_counter()
    rewards = MathReward()(completions, golds, log_metric=metrics.__setitem__)
    seconds = time.perf_counter() - start
    right = sum(reward == index % 2 for index, reward in enumerate(rewards))
    print(
        f"math_reward: {arguments.count / seconds:,.0f} easy completions/s, {right / arguments.count:.2%} scored right,"
    )
    print(f"             symbolic {metrics['math_reward/symbolic_fraction']:.2%}")

    part = 500
    start = time.perf_counter()
    for completion, gold in zip(completions[:part], golds[:part], strict=True):
        answer = parse(completion, extraction_config=[LatexExtractionConfig(boxed_match_priority=0)])
        verify(parse(f"${gold}$"), answer)
    print(f"math-verify: {part / (time.perf_counter() - start):,.0f} easy completions/s")

    golds = [f"x^2+{index % 97}x+1" for index in range(512)]
    completions = [rf"\boxed{{1+{index % 97}x+x\cdot x}}" for index in range(512)]
    hostile = list(range(0, 512, 20))
    for turn, index in enumerate(hostile):
        completions[index] = rf"\boxed{{{HOSTILE[turn % len(HOSTILE)]}+{turn}}}"
    start = time.perf_counter()
    rewards = MathReward()(completions, golds, log_metric=metrics.__setitem__)
    seconds = time.perf_counter() - start
    honest = [reward for index, reward in enumerate(rewards) if index not in hostile]
    print(
        f"hostile batch: 512 answers, {len(hostile)} hostile: {seconds:.1f} s (deadline 30 s), honest ones right: "
        f"{sum(honest):.0f} of {len(honest)}, timeouts {metrics['math_reward/timeouts']:.0f}, symbolic "
        f"{metrics['math_reward/symbolic_fraction']:.0%}"
    )


if __name__ == "__main__":
    main()
