"""From the raw rows of public datasets to a question, its gold answer and its right traces: pure functions."""

from collections.abc import Mapping
from typing import Any, NamedTuple


__all__ = ["Example", "deepmath", "knights_knaves", "limr", "math_level", "openr1_46k", "openr1_220k"]


class Example(NamedTuple):
    """What every source has."""

    question: str
    solution: str
    traces: tuple[str, ...] = ()


def math_level(row: Mapping[str, Any]) -> Example:
    """SimpleRL-Zoo: the question without the prompt around it, which is released with a doubled brace in `\\boxed{{}}`."""
    return Example(row["question"].strip(), str(row["gt_answer"]))


def limr(row: Mapping[str, Any]) -> Example:
    """LIMR: its `prompt` is the bare question."""
    return Example(row["prompt"].strip(), str(row["answer"]))


def deepmath(row: Mapping[str, Any]) -> Example:
    """DeepMath-103K: its three solutions were kept because they agree with the final answer."""
    traces = (row[f"r1_solution_{number}"] for number in (1, 2, 3))
    return Example(row["question"].strip(), str(row["final_answer"]), _traces(traces))


def openr1_220k(row: Mapping[str, Any]) -> Example:
    """OpenR1-Math-220k: the complete generations that math-verify found right; the flags stand by position."""
    right, complete = row["correctness_math_verify"] or (), row["is_reasoning_complete"] or ()
    traces = (trace for trace, *flags in zip(row["generations"] or (), right, complete, strict=False) if all(flags))
    return Example(row["problem"].strip(), str(row["answer"]), _traces(traces))


def openr1_46k(row: Mapping[str, Any]) -> Example:
    """OpenR1-Math-46k-8192: the user's turn (the system message around it is left out) and the first target."""
    question = next(message["content"] for message in reversed(row["prompt"]) if message["role"] == "user")
    targets = (message["content"] for message in (row["target"] or ())[:1])
    return Example(question.strip(), str(row["reward_model"]["ground_truth"]), _traces(targets))


def knights_knaves(row: Mapping[str, Any]) -> Example:
    """Knights and Knaves: the generator's own reasoning, then everybody's role between answer tags."""
    roles = " ".join(row["solution_text_format"].split())
    steps = [row["cot_head"], *row["cot_repeat_steps"], row["cot_foot"], f"<answer> {roles} </answer>"]
    return Example(row["quiz"].strip(), roles, ("\n".join(step.strip() for step in steps if step),))


def _traces(traces: Any) -> tuple[str, ...]:
    return tuple(_with_open_think(trace) for trace in traces if trace and trace.strip())


def _with_open_think(trace: str) -> str:
    """Traces are released with the opening tag and without it; one form makes them comparable with a chat template's."""
    trace = trace.strip()
    if "</think>" not in trace:
        return trace
    return "<think>\n" + trace.removeprefix("<think>").lstrip()
