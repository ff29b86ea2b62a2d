"""`trl-bridge eval`, and `accelerate launch -m trl_bridge.cli.evaluate` for several GPUs."""

import difflib
import re
import sys
from dataclasses import field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import HfArgumentParser

from ..training.options import options
from .errors import RaisingParser, UsageError, json_mapping, user_errors


if TYPE_CHECKING:
    from ..evaluation.tasks import Task
    from ..generation.engines import Engine, Job, Sampling

    Work = list[tuple[Task, list[Job], Sampling]]


_PROGRAM = "trl-bridge eval"
# The paper's longest answer in evaluation.
_MAX_NEW_TOKENS = 5000


@options
class EvaluationArguments:
    """Arguments of `trl-bridge eval`."""

    model: str
    """Directory of a model, name on the hub, builtin:tiny or builtin:smollm2-135m."""
    benchmarks: str
    """Comma-separated: math500, minerva, olympiadbench, aime24, aime25, amc23, gpqa, livecodebench, knights-knaves;
    NAME=FILE for such rows from a local file; a .jsonl or .parquet file, a hub dataset, builtin:addition or
    reasoning-gym:TASK with prompt and solution columns."""
    output_dir: str | None = None
    """Folder of the results. None means eval_results/ and the model's name."""
    n: int = 1
    """Samples per question. One is greedy."""
    temperature: float | None = None
    """0 is greedy. None means 0 for one sample and 1 for more."""
    top_p: float = 0.95
    """Mass of the nucleus; not read at temperature 0."""
    max_new_tokens: int | None = None
    """Longest completion. None means 5000, or what the model's context leaves."""
    seed: int = 0
    """Seed of the samples and of the order of choices in GPQA."""
    grader: str | None = None
    """Reward function that grades, by name or dotted path, in place of each benchmark's own."""
    success_threshold: float = 1.0
    """Score from which an answer is right."""
    system_prompt: str | None = None
    """System message."""
    prompt_template: str | None = None
    """Prompt template as in training (boxed, qwen-boxed, abel, knights-knaves, or a text with {prompt}), in place of
    each benchmark's own."""
    chat_template: bool = True
    """Whether benchmark questions go through the tokenizer's chat template, where it has one."""
    chat_template_kwargs: str | None = None
    """Variables for the chat template, as JSON: '{"enable_thinking": false}'."""
    prompt_column: str | None = None
    """Column of your dataset that holds the prompts. None means 'prompt'."""
    solution_column: str | None = None
    """Column that the grader compares with. None means 'solution'."""
    dataset_config: str | None = None
    """Configuration of your dataset, or a generated task's parameters."""
    dataset_split: str | None = None
    """Split of your dataset. None means 'test', or the only one."""
    limit: int | None = None
    """First questions only."""
    batch_size: int | None = None
    """Completions at a time to start with; halved when out of memory. None means 64, vLLM 1024."""
    dtype: str = field(default="auto", metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})
    """Type of the weights."""
    model_revision: str | None = None
    """Revision of a model on the hub."""
    attn_implementation: str | None = None
    """Attention implementation."""
    trust_remote_code: bool = False
    """Whether to run code of the model's repository."""
    use_vllm: bool = False
    """Whether to generate with vLLM."""
    vllm_tensor_parallel_size: int = 1
    """GPUs for vLLM."""
    vllm_gpu_memory_utilization: float = 0.9
    """Share of the memory for vLLM."""


class _Parser(RaisingParser, HfArgumentParser):
    pass


def main(argv: list[str] | None = None) -> int:
    """Evaluate a model."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    # Imported late, so that --help and a wrong option answer at once.
    import torch
    from accelerate import PartialState

    from ..evaluation.report import write_report
    from ..evaluation.run import check_task, evaluate_task
    from ..generation.day import today
    from ..training.checkpoint.folder import agreed

    # Unless told so, several ranks without an accelerator would each believe that they are alone.
    state = PartialState(cpu=not torch.accelerator.is_available())
    if arguments.use_vllm and state.num_processes > 1:
        raise UsageError("`use_vllm` runs in one process: use `vllm_tensor_parallel_size` in place of several ranks")
    output = Path(arguments.output_dir or f"eval_results/{_folder_name(arguments.model)}")
    now = agreed(today)
    with state.main_process_first():
        work, tokenizer, identity = _prepare(arguments, output, now)
    common: dict[str, Any] = {"model": identity, "seed": arguments.seed}
    for task, jobs, sampling in work:
        # All of them before the first: the last one's mistake must not come to light after hours.
        check_task(task, jobs, _engine_name(arguments), sampling, output / task.name, **common)
    engine = _engine(arguments, tokenizer, work)
    for task, jobs, sampling in work:
        folder, threshold = output / task.name, arguments.success_threshold
        evaluate_task(task, jobs, engine, sampling, folder, threshold=threshold, **common)
    if state.is_main_process:
        sys.stdout.write(f"{write_report(output)}\nCompletions and results: {output}\n")
    return 0


def _parse(argv: list[str]) -> EvaluationArguments:
    dataclass_type: Any = EvaluationArguments
    parser = _Parser(dataclass_type, prog=_PROGRAM, description="Accuracy of a model.", allow_abbrev=False)
    arguments, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if unknown:
        known = [f"--{each.name}" for each in fields(EvaluationArguments)]
        nearest = difflib.get_close_matches(
            unknown[0].partition("=")[0].replace("-", "_").replace("__", "--", 1), known, n=1
        )
        hint = f" (did you mean `{nearest[0]}`?)" if nearest else ""
        raise UsageError(f"unknown option `{unknown[0]}`{hint}")
    for name in ("limit", "n"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"`{name}` must be 1 or more, got {value}")
    return arguments


def _prepare(arguments: EvaluationArguments, output: Path, now: str) -> tuple["Work", Any, dict[str, Any]]:
    """
    Tasks with their jobs, tokenizer, and what identifies the model; everything that can be refused is refused here, before
    anything is generated.
    """
    from ..evaluation.run import make_jobs
    from ..evaluation.tasks import Prompting, load_task, parse_benchmarks
    from ..generation.engines import Sampling, fitting_length
    from ..generation.records import Store
    from ..models import check_name, context_of, load_tokenizer
    from ..rewards.by_name import reward_function

    entries = parse_benchmarks(arguments.benchmarks)
    grader = None if arguments.grader is None else (arguments.grader, reward_function(arguments.grader, "grader"))
    check_name(arguments.model, "model", arguments.dtype)
    tokenizer: Any = load_tokenizer(arguments.model, **_hub_options(arguments))
    context = context_of(arguments.model, **_hub_options(arguments))
    templated = tokenizer.chat_template is not None or arguments.system_prompt is not None
    prompting = Prompting(
        arguments.system_prompt,
        arguments.prompt_template,
        arguments.chat_template and templated,
        json_mapping("--chat_template_kwargs", arguments.chat_template_kwargs),
    )
    temperature = arguments.temperature
    if temperature is None:
        temperature = 0.0 if arguments.n == 1 else 1.0
    own = ("prompt_column", "solution_column", "dataset_config", "dataset_split", "limit", "seed")
    options = {name: getattr(arguments, name) for name in own}
    work = []
    for folder, (name, path) in entries.items():
        # One that grows over the days goes on with the day of its first start.
        dated = replace(prompting, day=Store(output / folder).day(tokenizer, now))
        task = load_task(folder, name, path, prompting=dated, grader=grader, **options)
        jobs = make_jobs(task, tokenizer, arguments.n, arguments.seed, context)
        # A question that leaves less room than the others is cut by itself; there must be one that leaves enough.
        shortest = min(len(job.ids) for job in jobs), f"the shortest prompt of {task.name}"
        length = fitting_length(*shortest, {arguments.model: context}, arguments.max_new_tokens, _MAX_NEW_TOKENS)
        work.append((task, jobs, Sampling(length, temperature, arguments.top_p)))
    return work, tokenizer, _identity(arguments)


def _identity(arguments: EvaluationArguments) -> dict[str, Any]:
    from ..generation.records import model_identity
    from ..models import is_builtin

    if is_builtin(arguments.model):
        return {"path": arguments.model}
    found = model_identity(arguments.model, **_hub_options(arguments))
    return {"path": arguments.model, "dtype": arguments.dtype, **found}


def _hub_options(arguments: EvaluationArguments) -> dict[str, Any]:
    return {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}


def _engine_name(arguments: EvaluationArguments) -> str:
    return "vllm" if arguments.use_vllm else "transformers"


def _engine(arguments: EvaluationArguments, tokenizer: Any, work: "Work") -> "Engine":
    """The engine, with the weights loaded."""
    from accelerate import PartialState

    from ..generation.engines import TransformersEngine, VllmEngine, check_vllm
    from ..models import load

    if arguments.use_vllm:
        check_vllm(arguments.model)
        return VllmEngine(
            arguments.model,
            max(
                len(job.ids) + job.limit(sampling)
                for _, jobs, sampling in work
                for job in jobs
                if job.limit(sampling) > 0
            ),
            1024 if arguments.batch_size is None else arguments.batch_size,
            dtype=arguments.dtype,
            tensor_parallel_size=arguments.vllm_tensor_parallel_size,
            gpu_memory_utilization=arguments.vllm_gpu_memory_utilization,
            **_hub_options(arguments),
        )
    model: Any = load(
        arguments.model,
        arguments.seed,
        dtype=arguments.dtype,
        attn_implementation=arguments.attn_implementation,
        **_hub_options(arguments),
    )
    batch_size = 64 if arguments.batch_size is None else arguments.batch_size
    return TransformersEngine(model.to(PartialState().device), tokenizer, batch_size)


def _folder_name(model: str) -> str:
    """Name of the results' folder: the directory's own, or the hub's name with a dash."""
    resolved = Path(model).expanduser()
    name = resolved.resolve().name if resolved.is_dir() else model
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def launched() -> NoReturn:
    """Entry point under `accelerate launch`."""
    with user_errors(_PROGRAM):
        sys.exit(main())


if __name__ == "__main__":
    launched()
