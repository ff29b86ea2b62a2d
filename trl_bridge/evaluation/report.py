"""From records to numbers, and from numbers to a table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tables import markdown_table
from .statistics import mean_interval, pass_at_k, wilson_interval


_HEAD = (
    "benchmark",
    "questions",
    "n",
    "decoding",
    "accuracy, %",
    "95 % interval",
    "pass@n, %",
    "no answer",
    "truncated",
    "grader",
)


# What is read of each stored completion.
RECORD_FIELDS = ("score", "answered", "truncated", "tokens", "stopped", "seconds")


def summarise(
    records: Sequence[Mapping[str, Any]],
    questions: int,
    samples: int,
    threshold: float = 1.0,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """
    Accuracy, pass@k and what to look at beside them.

    All questions count: an answer whose gold the grader cannot read is wrong, and counted in `ungradable`.
    """
    used = [record for record in records if record["sample"] < samples and record["question"] < questions]
    if len(used) != questions * samples:
        raise ValueError(f"there are {len(used)} completions for {questions} questions with {samples} samples each.")
    correct = [0] * questions
    for record in used:
        correct[record["question"]] += record["score"] is not None and record["score"] >= threshold
    shares = [count / samples for count in correct]
    summary: dict[str, Any] = {"questions": questions, "n": samples, "accuracy": sum(shares) / questions}
    if samples == 1:
        summary |= {"accuracy_interval": wilson_interval(sum(correct), questions), "interval_method": "Wilson"}
    else:
        summary |= {"accuracy_interval": mean_interval(shares), "interval_method": "bootstrap over questions"}
        summary["pass_at_k"], summary["pass_at_k_interval"] = {}, {}
        for k in _ks(samples):
            values = [pass_at_k(samples, count, k) for count in correct]
            summary["pass_at_k"][str(k)] = sum(values) / questions
            summary["pass_at_k_interval"][str(k)] = mean_interval(values)
    answered = [record["answered"] for record in used if record["answered"] is not None]
    cut = [record for record in used if record["truncated"]]
    return {
        **summary,
        "mean_score": sum(record["score"] or 0.0 for record in used) / len(used),
        "success_threshold": threshold,
        "no_answer": answered.count(False) if answered else None,
        "truncated_share": sum(record["truncated"] for record in used) / len(used),
        "too_long": len({record["question"] for record in cut if record["tokens"] == 0}),
        "cut_by_context": sum(0 < record["tokens"] < (max_new_tokens or 0) for record in cut),
        "ungradable": sum(record["score"] is None for record in used),
        "grader_stopped": sum(record["stopped"] for record in used),
        "mean_tokens": sum(record["tokens"] for record in used) / len(used),
        "seconds": round(sum(record["seconds"] for record in used), 1),
    }


def _ks(samples: int) -> list[int]:
    powers = [2**exponent for exponent in range(samples.bit_length()) if 2**exponent <= samples]
    return powers if powers[-1] == samples else [*powers, samples]


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Table of results, one row per task, and what the model's context took from them."""
    table = markdown_table(_HEAD, [_cells(name, result) for name, result in results.items()])
    notes = [
        f"\n{name}: {result['too_long']} questions fill the model's context and count as wrong, {result['cut_by_context']} "
        "completions were cut by it before `--max_new_tokens`.\n"
        for name, result in results.items()
        if result.get("too_long") or result.get("cut_by_context")
    ]
    return table + "".join(notes)


def _cells(name: str, result: Mapping[str, Any]) -> list[Any]:
    sampling = result["sampling"]
    low, high = result["accuracy_interval"]
    best = result.get("pass_at_k", {}).get(str(result["n"]))
    total = result["questions"] * result["n"]
    return [
        name,
        result["questions"],
        result["n"],
        "greedy" if sampling["temperature"] == 0 else f"T={sampling['temperature']:g}, top-p {sampling['top_p']:g}",
        f"{100 * result['accuracy']:.1f}",
        f"{100 * low:.1f} to {100 * high:.1f}",
        "" if best is None else f"{100 * best:.1f}",
        "" if result["no_answer"] is None else f"{100 * result['no_answer'] / total:.1f} %",
        f"{100 * result['truncated_share']:.1f} %",
        result["grader"].rpartition(".")[2],
    ]


def write_report(folder: Path) -> str:
    """Gather the results of all tasks under a folder in `results.json` and `results.md`."""
    paths = sorted(folder.glob("*/results.json"))
    results = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    models: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        models.setdefault(result["model"], {})[name] = result
    # One folder is one model, as a rule; several are kept apart, not mixed in one table.
    table = "\n".join(f"Model: {model}\n\n{markdown(tasks)}" for model, tasks in models.items())
    (folder / "results.md").write_text(table, encoding="utf-8")
    return table
