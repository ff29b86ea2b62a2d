"""
Accuracy of `math_reward` by kind of answer, beside TRL's `accuracy_reward` and plain math-verify, on one file of
labelled pairs: `python benchmarks/rewards_accuracy.py [tests/rewards/cases.jsonl]`.

A pair is a JSON line with `kind`, `gold`, `answer` and `equal`, or `kind`, `gold`, `completion` and `right`. Answers are put
into `\\boxed{}`, completions are taken as they are. TRL's reward and
math-verify get every gold in `$...$`, which is the form that serves them best, unless `--raw` is given.
"""

import argparse
import json
import logging
from collections import defaultdict
from pathlib import Path

from math_verify import LatexExtractionConfig, parse, verify
from trl.rewards import accuracy_reward

from trl_bridge.rewards import MathReward


def boxed(answer: str) -> str:
    return answer if r"\boxed" in answer else rf"\boxed{{{answer}}}"


def wrapped(gold: str, raw: bool) -> str:
    return gold if raw or "$" in gold or r"\boxed" in gold else f"${gold}$"


def ours(rows: list[dict], raw: bool) -> list[float | None]:
    reward = MathReward(batch_limit=600.0)
    return reward([boxed(row["answer"]) for row in rows], [row["gold"] for row in rows])


def trl(rows: list[dict], raw: bool) -> list[float | None]:
    completions = [[{"role": "assistant", "content": boxed(row["answer"])}] for row in rows]
    return accuracy_reward(completions, [wrapped(row["gold"], raw) for row in rows])


def math_verify(rows: list[dict], raw: bool) -> list[float | None]:
    extraction = [LatexExtractionConfig(boxed_match_priority=0)]
    golds = [parse(wrapped(row["gold"], raw)) for row in rows]
    answers = [parse(boxed(row["answer"]), extraction_config=extraction) for row in rows]
    return [float(verify(gold, answer)) for gold, answer in zip(golds, answers, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", default="tests/rewards/cases.jsonl", type=Path)
    parser.add_argument("--raw", action="store_true", help="give the rivals the golds as they stand")
    parser.add_argument("--list", action="store_true", help="print every pair that math_reward gets wrong")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = [json.loads(line) for line in arguments.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for row in rows:
        if "completion" in row:
            row["answer"], row["equal"] = row["completion"], bool(row["right"])
    graders = {"math_reward": ours, "accuracy_reward": trl, "math-verify": math_verify}
    table: dict[str, dict[str, list[int]]] = defaultdict(lambda: {name: [0, 0, 0] for name in graders})
    for name, grader in graders.items():
        for row, reward in zip(rows, grader(rows, arguments.raw), strict=True):
            for kind in (row["kind"], "all"):
                table[kind][name][0] += reward == float(row["equal"])
                table[kind][name][1] += reward == 1.0 and not row["equal"]
                table[kind][name][2] += reward != 1.0 and row["equal"]
            if arguments.list and name == "math_reward" and reward != float(row["equal"]):
                print(f"{row['kind']}: {row['gold']} | {row['answer']} | equal {row['equal']} | reward {reward}")
    print(f"{'right / wrongly paid / wrongly refused':<24}{'pairs':>6}" + "".join(f"{name:>24}" for name in graders))
    kinds = [*sorted(kind for kind in table if kind != "all"), "all"]
    for kind in kinds:
        count = len(rows) if kind == "all" else sum(row["kind"] == kind for row in rows)
        cells = [f"{r / count:7.1%} {p:4d} {f:4d}" for r, p, f in table[kind].values()]
        print(f"{kind:<24}{count:>6}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
