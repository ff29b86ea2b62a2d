"""
What each method is, and in which ways of training it is tested, untested or refused.

`docs/methods.md` is printed from here (`python -m trl_bridge.capabilities`); a method without an entry, or a test that
does not exist, fails a test.
"""

import sys
from typing import NamedTuple

from .methods.catalogue import FAMILIES, METHODS
from .survey import survey_table


WAYS = ("full", "LoRA", "DDP", "FSDP2", "ZeRO-1/2/3", "vLLM", "resume")
"""Full fine-tuning, a LoRA student (`peft_config`), backends, vLLM's rollouts (with a stand-in engine), exact resume."""

REFUSED, UNTESTED = "refused", "untested"


class Capability(NamedTuple):
    """A method's entry."""

    paper: str
    extra_state: str
    ways: dict[str, str]


_BACKENDS = "distributed/test_backends.py::test_two_ranks_equal_the_reference"
_STREAMS = "distributed/test_streams.py::test_two_ranks_equal_the_reference"
_GROUPS = "distributed/test_groups.py::test_two_ranks_equal_the_reference"
_ALL_METHODS = "methods/test_all_methods.py::"


def _ways(file: str, **changes: str) -> dict[str, str]:
    """Entries of a file that follows the others' names; `changes` by lower-case way (`zero` for ZeRO)."""
    stream = file in ("naive_mix", "alternating", "chord")
    equals = "test_updates_equal_reference" if file == "alternating" else "test_update_equals_reference"
    own = f"methods/test_{file}.py::"
    ways = {
        "full": own + (equals if stream else "test_update_equals_the_reference"),
        "lora": own + "test_update_of_a_lora_student" if stream else _ALL_METHODS + "test_lora_student",
        "ddp": _STREAMS if stream else _GROUPS,
        "fsdp2": _STREAMS if stream else _GROUPS,
        "zero": _STREAMS if stream else _GROUPS,
        "vllm": _ALL_METHODS + "test_limits_are_grpo_with_vllm_to_the_bit",
        "resume": own + ("test_stop_and_resume" if stream else "test_resume_is_exact"),
    }
    return dict(zip(WAYS, {**ways, **changes}.values(), strict=True))


def _distilled(file: str) -> dict[str, str]:
    own, both = f"methods/test_{file}.py::", "methods/test_opd_and_aopd.py::"
    update, resume = own + "test_update_equals_the_reference", own + "test_resume_is_exact"
    ddp = "distributed/test_distillation.py::test_two_ranks_equal_the_reference"
    lora, vllm = both + "test_lora_student", both + "test_rollouts_of_vllm"
    return dict(zip(WAYS, (update, lora, ddp, REFUSED, REFUSED, vllm, resume), strict=True))


_ENTRIES = {
    "bridge": Capability(
        "arXiv 2509.06948",
        "coordinator, shadow, stream",
        {
            "full": "methods/bridge/test_update.py::test_update_equals_reference",
            # A deviation from the paper: `lean=True`.
            "LoRA": "methods/bridge/test_lean.py::test_update_equals_reference",
            "DDP": _BACKENDS,
            "FSDP2": _BACKENDS,
            "ZeRO-1/2/3": _BACKENDS,
            "vLLM": "methods/bridge/test_options_run.py::test_vllm_ratios_reach_the_shadow",
            "resume": "methods/bridge/test_resume.py::test_resume_is_exact",
        },
    ),
    "naive-mix": Capability("baseline of arXiv 2504.14945", "stream", _ways("naive_mix")),
    "alternating": Capability("baseline of arXiv 2509.06948", "stream", _ways("alternating")),
    "chord": Capability("arXiv 2508.11408", "stream", _ways("chord")),
    "luffy": Capability(
        "arXiv 2504.14945",
        "none",
        _ways("luffy", vllm="methods/test_luffy.py::test_vllm_corrects_own_tokens_alone"),
    ),
    "srft": Capability("arXiv 2506.19767", "none", _ways("srft", vllm="methods/test_srft.py::test_vllm")),
    "hpt": Capability(
        "arXiv 2509.04419; SuperRL: 2506.01096",
        "none",
        _ways(
            "hpt",
            lora="methods/test_hpt.py::test_lora_student",
            vllm=_ALL_METHODS + "test_update_with_vllm_equals_the_reference",
        ),
    ),
    "relift": Capability(
        "arXiv 2506.07527",
        "buffer, second optimizer",
        _ways(
            "relift",
            lora="methods/test_relift.py::test_lora_student_and_its_reference",
            **dict.fromkeys(
                ("ddp", "fsdp2", "zero"), "distributed/test_groups.py::test_relift_on_two_ranks_equals_the_reference"
            ),
        ),
    ),
    "uft": Capability(
        "arXiv 2505.16984",
        "none",
        _ways("uft", vllm=_ALL_METHODS + "test_update_with_vllm_equals_the_reference"),
    ),
    "prefix-rft": Capability(
        "arXiv 2507.01679",
        "none",
        _ways("prefix_rft", vllm="methods/test_prefix_rft.py::test_vllm_corrects_own_tokens_alone"),
    ),
    "actguide": Capability(
        "arXiv 2605.12004",
        "none",
        _ways(
            "actguide",
            lora="methods/test_actguide.py::test_lora_student_and_its_reference",
            **dict.fromkeys(
                ("ddp", "fsdp2", "zero"),
                "distributed/test_groups.py::test_actguide_on_two_ranks_equals_the_reference",
            ),
            vllm="methods/test_actguide.py::test_vllm_keeps_guided_rows",
        ),
    ),
    "lightning-opd": Capability(
        "arXiv 2604.13010",
        "none",
        {
            "full": "methods/test_lightning_opd.py::test_update_equals_an_online_teacher",
            "LoRA": "methods/test_lightning_opd.py::test_lora_student",
            "DDP": "distributed/test_lightning.py::test_two_ranks_equal_the_reference",
            "FSDP2": REFUSED,
            "ZeRO-1/2/3": REFUSED,
            "vLLM": "distillation/test_scoring.py::test_vllm_samples",
            "resume": "methods/test_lightning_opd.py::test_resume_is_exact",
        },
    ),
    "opd": Capability(
        "arXiv 2306.13649, by sampled tokens",
        "teacher",
        _distilled("opd"),
    ),
    "aopd": Capability("arXiv 2605.06387", "teacher", _distilled("aopd")),
    "two-stage": Capability(
        "cold start of arXiv 2501.12948",
        "which stage is done",
        dict(
            zip(
                WAYS,
                (
                    "methods/test_two_stage.py::test_is_sft_and_then_grpo",
                    "methods/test_two_stage.py::test_one_adapter_goes_through_both_stages",
                    *["distributed/test_two_stage.py::test_two_ranks_equal_the_reference"] * 3,
                    UNTESTED,
                    "methods/test_two_stage.py::test_a_run_that_is_cut_off_ends_as_one_that_is_not",
                ),
                strict=True,
            )
        ),
    ),
}


def capabilities() -> dict[str, Capability]:
    """The entries of our methods, in the order of [`METHODS`]."""
    ours = [name for name, method in METHODS.items() if method.trainer.startswith("trl_bridge.")]
    return {name: _ENTRIES[name] for name in ours}


def _cell(entry: str, tests: list[str]) -> str:
    if entry in (REFUSED, UNTESTED):
        return entry
    if entry not in tests:
        tests.append(entry)
    return f"tested [{tests.index(entry) + 1}]"


def as_markdown() -> str:
    """The page `docs/methods.md`."""
    lines = [
        "# Methods",
        "",
        "One interface, one data schema, one set of metric names: every trainer is a `GRPOTrainer` (for distillation "
        "TRL's distillation or SFT trainer) with its own config, and a verb of `trl-bridge`. The docstring of each holds its "
        "formula, its source and every deviation; [baselines.md](baselines.md) and [distillation.md](distillation.md) say "
        "how to choose and how to compare them.",
        "",
        "This page is printed by `python -m trl_bridge.capabilities`.",
        "",
        "| verb | trainer | what | reads | source | state beside the student |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    table, tests = [], list[str]()
    for name, entry in capabilities().items():
        method = METHODS[name]
        reads = FAMILIES[method.family].split(";")[0]
        trainer = method.trainer.rpartition(".")[2]
        lines.append(f"| `{name}` | `{trainer}` | {method.summary} | {reads} | {entry.paper} | {entry.extra_state} |")
        table.append(f"| `{name}` | " + " | ".join(_cell(entry.ways[way], tests) for way in WAYS) + " |")
    lines += [
        "",
        "TRL's own `grpo` and `sft` are verbs too.",
        "",
        "## What is tested",
        "",
        "*Tested*: the test with that number runs it and compares with the float64 reference, or bit for bit. *Refused*: an "
        "error at start-up says so. *Untested*: nothing stands in the way that we know of, and nobody has looked. vLLM is "
        "tested with a stand-in for the engine. `BridgeTrainer`'s `peft_config` is its coordinator, so its student is never "
        "a LoRA.",
        "",
        "| method | " + " | ".join(WAYS) + " |",
        "| --- " * (len(WAYS) + 1) + "|",
        *table,
        "",
        *(f"{number}. `tests/{test}`" for number, test in enumerate(tests, start=1)),
        "",
        "## On the map of the field",
        "",
        "The places are the components and problems of *A Survey of Reinforcement Learning for Large Reasoning Models* "
        "([arXiv 2509.08827](https://arxiv.org/abs/2509.08827)); which method belongs where is our reading, and most would "
        "fit two.",
        "",
        *survey_table(),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
