"""
Speed of `code_reward`: `python benchmarks/code_reward.py`, tests per second of programs that pass.

Half of the programs read stdin, half are functions. For one wall: `TRL_BRIDGE_RUN_CODE=kernel python benchmarks/code_reward.py`.
"""

import argparse
import time

from trl_bridge.rewards import CodeReward


SCRIPT = "import sys, math, collections\na, b = map(int, sys.stdin.read().split())\nprint(a + b)"
FUNCTION = (
    "from collections import Counter\nfrom typing import List\ndef add(a: int, b: int) -> int:\n    return a + b"
)


def main() -> None:
    """Run the load and print tests per second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=20)
    parser.add_argument("--tests", type=int, default=10, help="tests of each program")
    parser.add_argument("--workers", type=int, default=None, help="programs at a time, the number of cores by default")
    arguments = parser.parse_args()
    numbers = range(arguments.tests)
    stdin = {"inputs": [f"{i} {i}" for i in numbers], "outputs": [str(2 * i) for i in numbers]}
    calls = {"inputs": [[i, i] for i in numbers], "outputs": [2 * i for i in numbers], "fn_name": "add"}
    rows = [(SCRIPT, stdin) if i % 2 else (FUNCTION, calls) for i in range(arguments.programs)]
    completions = [f"```python\n{program}\n```" for program, _ in rows]
    reward = CodeReward(allow_execution=True, workers=arguments.workers)
    reward(completions[:1], [rows[0][1]])  # finds out which wall there is
    start = time.perf_counter()
    rewards = reward(completions, [tests for _, tests in rows])
    seconds = time.perf_counter() - start
    count = arguments.programs * arguments.tests
    print(
        f"{count} tests in {seconds:.1f} s: {count / seconds:.1f} a second; {rewards.count(1.0)} of {len(rows)} paid"
    )


if __name__ == "__main__":
    main()
