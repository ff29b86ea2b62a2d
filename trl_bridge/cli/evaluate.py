"""`trl-bridge eval`, and `accelerate launch -m trl_bridge.cli.evaluate` for several GPUs."""

import difflib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import HfArgumentParser

from .errors import UsageError, user_errors


if TYPE_CHECKING:
    from ..evaluation.tasks import Task
    from ..generation.generate import Engine, Job, Sampling


__all__ = ["EvaluationArguments", "main"]

_PROGRAM = "trl-bridge eval"
# The paper's longest answer in evaluation.
_MAX_NEW_TOKENS = 5000


@dataclass
class EvaluationArguments:
    """Arguments of `trl-bridge eval`."""

    model: str = field(
        metadata={"help": "Directory of a model, name on the hub, builtin:tiny or builtin:smollm2-135m."}
    )
    benchmarks: str = field(
        metadata={
            "help": "Comma-separated: math500, minerva, olympiadbench, aime24, aime25, amc23, gpqa, livecodebench, "
            "knights-knaves; NAME=FILE for such rows from a local file; a .jsonl or .parquet file, a hub dataset, "
            "builtin:addition or reasoning-gym:TASK with prompt and solution columns."
        }
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the results. None means eval_results/ and the model's name."}
    )
    n: int = field(default=1, metadata={"help": "Samples per question. One is greedy."})
    temperature: float | None = field(
        default=None, metadata={"help": "0 is greedy. None means 0 for one sample and 1 for more."}
    )
    top_p: float = field(default=0.95, metadata={"help": "Mass of the nucleus; not read at temperature 0."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest completion. None means 5000, or what the model's context leaves."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the samples and of the order of choices in GPQA."})
    grader: str | None = field(
        default=None,
        metadata={"help": "Reward function that grades, by name or dotted path, in place of each benchmark's own."},
    )
    success_threshold: float = field(default=1.0, metadata={"help": "Score from which an answer is right."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message."})
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Prompt template as in training (boxed, qwen-boxed, abel, knights-knaves, or a text with {prompt}), in "
            "place of each benchmark's own."
        },
    )
    chat_template: bool = field(
        default=True,
        metadata={"help": "Whether benchmark questions go through the tokenizer's chat template, where it has one."},
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={"help": "Variables for the chat template, as JSON: '{\"enable_thinking\": false}'."},
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of your dataset that holds the prompts. None means 'prompt'."}
    )
    solution_column: str | None = field(
        default=None, metadata={"help": "Column that the grader compares with. None means 'solution'."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of your dataset, or a generated task's parameters."}
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split of your dataset. None means 'test', or the only one."}
    )
    limit: int | None = field(default=None, metadata={"help": "First questions only."})
    batch_size: int | None = field(
        default=None,
        metadata={"help": "Completions at a time to start with; halved when out of memory. None means 64, vLLM 1024."},
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the weights.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of a model on the hub."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code of the model's repository."})
    use_vllm: bool = field(default=False, metadata={"help": "Whether to generate with vLLM."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs for vLLM."})
    vllm_gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of the memory for vLLM."})


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: list[str] | None = None) -> int:
    """Evaluate a model."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    # Imported late, so that --help and a wrong option answer at once.
    import torch
    from accelerate import PartialState

    from ..evaluation.report import write_report
    from ..evaluation.run import check_task, evaluate_task

    # Unless told so, several ranks without an accelerator would each believe that they are alone.
    state = PartialState(cpu=not torch.accelerator.is_available())
    if arguments.use_vllm and state.num_processes > 1:
        raise UsageError("`use_vllm` runs in one process: use `vllm_tensor_parallel_size` in place of several ranks")
    with state.main_process_first():
        setup = _Setup(arguments)
    output = Path(arguments.output_dir or f"eval_results/{_folder_name(arguments.model)}")
    common: dict[str, Any] = {"model": setup.identity, "seed": arguments.seed}
    for task, jobs, sampling in setup.work:
        # All of them before the first: the last one's mistake must not come to light after hours.
        check_task(task, jobs, setup.engine_name, sampling, output / task.name, **common)
    engine = setup.engine()
    for task, jobs, sampling in setup.work:
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
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"`limit` must be 1 or more, got {arguments.limit}")
    if arguments.n < 1:
        raise UsageError(f"`n` must be 1 or more, got {arguments.n}")
    return arguments


class _Setup:
    """Model, tasks and jobs; everything that can be refused is refused here, before anything is generated."""

    def __init__(self, arguments: EvaluationArguments):
        from ..evaluation.run import longest_prompt, make_jobs
        from ..evaluation.tasks import parse_benchmarks

        self.arguments = arguments
        self.engine_name = "vllm" if arguments.use_vllm else "transformers"
        entries = parse_benchmarks(arguments.benchmarks)
        grader = None if arguments.grader is None else (arguments.grader, _grader(arguments.grader))
        self.model: Any = None
        self.tokenizer: Any
        self.context: int | None
        self.identity: dict[str, Any]
        if arguments.model.startswith("builtin:"):
            self.model, self.tokenizer, self.context, self.identity = _builtin(arguments)
        else:
            self.tokenizer, self.context, self.identity = _tokenizer(arguments)
        self.work: list[tuple[Task, list[Job], Sampling]] = []
        for folder, (name, path) in entries.items():
            task = self._task(folder, name, path, grader)
            jobs = make_jobs(task, self.tokenizer, arguments.n, arguments.seed)
            self.work.append((task, jobs, self._sampling(task, longest_prompt(jobs))))

    def _task(self, folder: str, name: str, path: str | None, grader: tuple[str, Callable] | None) -> "Task":
        from ..evaluation.tasks import Prompting, load_task

        arguments = self.arguments
        prompting = Prompting(
            arguments.system_prompt,
            arguments.prompt_template,
            arguments.chat_template
            and (self.tokenizer.chat_template is not None or arguments.system_prompt is not None),
            _template_kwargs(arguments.chat_template_kwargs),
        )
        return load_task(
            folder,
            name,
            path,
            prompting=prompting,
            grader=grader,
            prompt_column=arguments.prompt_column,
            solution_column=arguments.solution_column,
            dataset_config=arguments.dataset_config,
            dataset_split=arguments.dataset_split,
            limit=arguments.limit,
            seed=arguments.seed,
        )

    def _sampling(self, task: "Task", longest: int) -> "Sampling":
        from ..generation.generate import Sampling

        arguments = self.arguments
        left = None if self.context is None else self.context - longest
        wanted = arguments.max_new_tokens
        if left is not None and left < (wanted or 1):
            raise UsageError(
                f"`max_new_tokens: {wanted or 1}`: the longest prompt of {task.name} has {longest} tokens and the model's "
                f"context {self.context}, which leaves {max(left, 0)}"
            )
        if wanted is None:
            wanted = _MAX_NEW_TOKENS if left is None else min(_MAX_NEW_TOKENS, left)
        temperature = arguments.temperature
        if temperature is None:
            temperature = 0.0 if arguments.n == 1 else 1.0
        return Sampling(wanted, temperature, arguments.top_p)

    def engine(self) -> "Engine":
        """The engine, with the weights loaded."""
        arguments = self.arguments
        if arguments.use_vllm:
            from ..evaluation.run import longest_prompt
            from ..generation.vllm_engine import VllmEngine

            if arguments.model.startswith("builtin:"):
                raise UsageError(
                    "`use_vllm` needs a model on disk or on the hub; the built-in ones are made in memory"
                )
            return VllmEngine(
                arguments.model,
                max(longest_prompt(jobs) + sampling.max_new_tokens for _, jobs, sampling in self.work),
                1024 if arguments.batch_size is None else arguments.batch_size,
                dtype=arguments.dtype,
                revision=arguments.model_revision,
                trust_remote_code=arguments.trust_remote_code,
                tensor_parallel_size=arguments.vllm_tensor_parallel_size,
                gpu_memory_utilization=arguments.vllm_gpu_memory_utilization,
            )
        from accelerate import PartialState

        from ..generation.generate import TransformersEngine

        if self.model is None:
            self.model = _load(arguments)
        batch_size = 64 if arguments.batch_size is None else arguments.batch_size
        return TransformersEngine(self.model.to(PartialState().device), self.tokenizer, batch_size)


def _template_kwargs(text: str | None) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UsageError(f"`chat_template_kwargs: {text}` is no JSON mapping")
    return values


def _grader(name: str) -> Callable[..., Any]:
    from .rewards import reward_function

    try:
        return reward_function(name)
    except ValueError as error:
        raise UsageError(str(error).replace("`reward_funcs`", "`grader`")) from error


def _builtin(arguments: EvaluationArguments) -> tuple[Any, Any, int, dict[str, Any]]:
    from .. import models

    if arguments.dtype not in ("auto", "float32"):
        raise UsageError(f"`model: {arguments.model}` is float32; remove `dtype: {arguments.dtype}`")
    tokenizer: Any
    model: Any
    if arguments.model == "builtin:tiny":
        tokenizer = models.tiny_tokenizer(chat_template=True)
        model = models.tiny_model(tokenizer, seed=arguments.seed)
    elif arguments.model == "builtin:smollm2-135m":
        model, tokenizer = models.load_smollm2()
    else:
        raise UsageError(f"`model: {arguments.model}`: the built-in models are builtin:tiny and builtin:smollm2-135m")
    return model, tokenizer, model.config.max_position_embeddings, {"path": arguments.model}


def _tokenizer(arguments: EvaluationArguments) -> tuple[Any, int | None, dict[str, Any]]:
    """Tokenizer, context and identity of a model, without its weights."""
    from transformers import AutoConfig, AutoTokenizer

    from ..generation.records import model_fingerprint

    name = arguments.model
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        raise UsageError(f"`model`: there is no directory {name}")
    options = {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    identity: dict[str, Any] = {"path": name, "dtype": arguments.dtype}
    if Path(name).is_dir():
        identity["weights"] = model_fingerprint(Path(name))
    if (Path(name) / "adapter_config.json").is_file():
        # An adapter's directory has no config of its own; its base is looked up when the weights are loaded.
        return tokenizer, None, identity
    config = AutoConfig.from_pretrained(name, **options)
    identity["revision"] = getattr(config, "_commit_hash", None)
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None), identity


def _load(arguments: EvaluationArguments) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=arguments.dtype,
        revision=arguments.model_revision,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
    )


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
