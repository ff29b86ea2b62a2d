"""
Fuzz of the rewards with hostile strings: `python benchmarks/rewards_fuzz.py --count 100000`.

Every string goes through the whole of `math_reward` against several golds. It fails on an exception, a wrong type, a
reward for a string that is not the gold's value, a batch beyond its deadline, or memory growth.
"""

import argparse
import random
import resource
import time

from trl_bridge.rewards import MathReward


PIECES = (
    *"0123456789+-*/^_=<>(){}[]|,.;:!&%$#~'\"\\ \n\t\x00xyzeiABC", "\ud800", "\udfff", "\u202e", "🙂", "½", "²", "∞", "√",
    r"\frac", r"\sqrt", r"\boxed{", r"\text{", r"\left(", r"\right)", r"\begin{pmatrix}", r"\end{pmatrix}", r"\cup", r"\pm",
    r"\infty", r"\sum_{k=1}^{9}", r"\int", r"\lim", r"\log", r"\sin", r"\binom", r"\pi", r"\ldots", r"\in", r"\mathbb{R}",
    "</think>", "<think>", "####", "the answer is ", "\\\\", r"\{", r"\}", "10^", "^{", "!!", "%s", "{0}", "__import__('os')",
    "or", "and", "nan", "inf", "1e999", "cm", "mod", r"\pmod{", r"\cases", "import os", "eval(", "1/0", "0^0", "0/0",
)  # fmt: skip
GOLDS = (
    "12",
    r"\frac{3}{4}",
    "x^2+1",
    r"(3, \infty)",
    r"\text{Evelyn}",
    r"\{1,2\}",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
)
SPECIALS = (
    "2^{2^{2^{100}}}", "9" * 100_000, "{" * 50_000, "}" * 50_000, "(" * 1000 + ")" * 1000, "((9999!)!)!", "\x00" * 1000,
    r"\sqrt{" * 39 + "2" + "}" * 39, r"\frac{1}{" * 39 + "2" + "}" * 39, "\\" * 10_000, r"\boxed" * 5_000, ",1" * 900,
    "x^" * 500 + "x", "+".join("xyzabc") * 200, "-" * 1900 + "1", "^" * 1999, r"\pm" * 600, "1" + "0" * 399 + ".5", "$" * 3999,
)  # fmt: skip


def hostile(rng: random.Random) -> str:
    """One hostile answer: pieces in random order, a mutated gold, or one of the special ones with a twist."""
    kind = rng.random()
    if kind < 0.001:
        return rng.choice(SPECIALS) + str(rng.randint(0, 9))
    if kind < 0.2:
        text = list(rng.choice(GOLDS))
        for _ in range(rng.randint(1, 4)):
            text.insert(rng.randint(0, len(text)), rng.choice(PIECES))
        return "".join(text)
    return "".join(rng.choices(PIECES, k=rng.randint(1, 14)))


def run(count: int, seed: int, batch: int, limit: float, progress: bool = False) -> dict[str, float]:
    """Fuzz and return what was measured; raises `AssertionError` at the first fault."""
    rng = random.Random(seed)
    reward = MathReward(fallback="text", limit=limit, batch_limit=60.0)
    totals = {"strings": 0.0, "paid": 0.0, "timeouts": 0.0, "slowest_batch": 0.0}
    start_memory = None
    while totals["strings"] < count:
        size = min(batch, count - int(totals["strings"]))
        answers = [hostile(rng) for _ in range(size)]
        completions = [text if rng.random() < 0.3 else rf"so \boxed{{{text}}}" for text in answers]
        golds = [rng.choice(GOLDS) for _ in range(size)]
        metrics: dict[str, float] = {}
        begin = time.perf_counter()
        rewards = reward(completions, golds, log_metric=metrics.__setitem__)
        seconds = time.perf_counter() - begin
        assert len(rewards) == size and all(value in (0.0, 1.0) for value in rewards)
        assert seconds < 66.0, f"a batch took {seconds:.1f} s"
        totals["strings"] += size
        totals["paid"] += sum(value or 0.0 for value in rewards)
        totals["timeouts"] += metrics["math_reward/timeouts"]
        totals["slowest_batch"] = max(totals["slowest_batch"], seconds)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if progress and totals["strings"] % (10 * batch) == 0:
            print(f"{totals['strings']:.0f} strings, {totals['paid']:.0f} paid, {memory:.0f} MB", flush=True)
        # The caches fill up at first: growth counts from the second tenth on.
        if start_memory is None and totals["strings"] >= count / 10:
            start_memory = memory
        totals["growth_mb"] = memory - (start_memory or memory)
    assert totals["growth_mb"] < 300, f"memory grew by {totals['growth_mb']:.0f} MB"
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1_000)
    parser.add_argument("--limit", type=float, default=2.0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    totals = run(arguments.count, arguments.seed, arguments.batch, arguments.limit, progress=True)
    print(
        f"{time.perf_counter() - start:.0f} s: " + ", ".join(f"{name} {value:.1f}" for name, value in totals.items())
    )


if __name__ == "__main__":
    main()
