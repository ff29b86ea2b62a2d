"""The common body of all training scripts, built like TRL's `scripts/grpo.py`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..methods.catalogue import METHODS, Method, import_by_path
from ..processes import end_with_starter, stoppable
from .errors import UsageError, user_errors


if TYPE_CHECKING:
    from .arguments import RewardArguments
    from .parsing import CommandLine


# Named as their packages are.
_REPORTERS = {"clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"}  # fmt: skip


def run(name: str, argv: list[str]) -> None:
    """What `accelerate launch -m trl_bridge.cli.train METHOD ...` runs: parse, build, train, save."""
    method, program = METHODS[name], f"trl-bridge {name}"
    end_with_starter()
    parsed: list[CommandLine] = []
    with stoppable(program, lambda: _how_to_resume(parsed)):
        with user_errors(program):
            # Imported late, so that a signal finds its handler.
            from .parsing import parse_command_line

            parsed.append(parse_command_line(method, argv, launched=True))
        main(method, parsed[0])


def _how_to_resume(parsed: "list[CommandLine]") -> str:
    """The end of the line that a signal leaves."""
    if not parsed:
        return " before it had begun"
    folder = Path(parsed[0].training.output_dir)
    # Those of a method in stages lie in a folder for each.
    saved = [*folder.glob("checkpoint-*/trainer_state.json"), *folder.glob("*/checkpoint-*/trainer_state.json")]
    if not saved:
        return ", before there was a checkpoint to resume from (`save_steps`)"
    newest = max(saved, key=lambda path: path.stat().st_mtime).parent
    return f": the same command with `--resume_from_checkpoint true` goes on from {newest}"


def main(method: Method, line: "CommandLine") -> None:
    """Train a method and save the model."""
    program = f"trl-bridge {method.name}"
    with user_errors(program):
        checkpoint = _resume_from(line.training)
        _check_reporters(line.training.report_to)
        trainer = build_trainer(method, line)
        trainer.card_lines = _card_lines(method, line)
    with user_errors(program, only_ours=True):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.print("✅ Training completed.")

    trainer.save_model(line.training.output_dir)
    trainer.save_state()  # its log: `trl-bridge plot`
    trainer.create_model_card()
    trainer.accelerator.print(f"💾 Model saved to {line.training.output_dir}.")

    if line.training.push_to_hub:
        trainer.push_to_hub(dataset_name=line.script.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()


def _card_lines(method: Method, line: "CommandLine") -> list[str]:
    """What the model card says of the command that has trained it."""
    from ..recipes import recipe_folder
    from ..training.card import shown_command

    paths, folder = [Path(token) for token in line.forwarded], recipe_folder()
    tokens = [
        path.relative_to(folder).with_suffix("").as_posix() if path.is_relative_to(folder) else token
        for path, token in zip(paths, line.forwarded, strict=True)
    ]
    given = vars(line.script)
    keys = (
        "dataset_name",
        "dataset_config",
        "sft_dataset_name",
        "sft_dataset_config",
        "prompt_template",
        "reward_funcs",
    )
    named = {"model_name_or_path": line.model.model_name_or_path, **{key: given.get(key) for key in keys}}
    command = shown_command(f"trl-bridge {method.name}", tokens)
    return [f"Command: `{command}`", *(f"`{key}`: `{value}`" for key, value in named.items() if value)]


def build_trainer(method: Method, line: "CommandLine") -> Any:
    """The trainer that a command line describes, ready to train."""
    from trl import get_peft_config, get_quantization_config

    from ..demonstrations.rows import check_size
    from .arguments import RewardArguments
    from .datasets import load_splits

    evaluate = line.training.eval_strategy != "no"
    splits = load_splits(line.script, line.datasets, evaluate, line.model, line.training)
    arguments: dict[str, Any] = {"args": line.training, **splits}
    if isinstance(line.script, RewardArguments):
        arguments["reward_funcs"] = _reward_functions(line.script)
        # TRL's own trainer does not look.
        check_size(splits["train_dataset"], line.training.generation_batch_size // line.training.num_generations)
    arguments.update(_model_arguments(line))
    if names := getattr(line.script, "tools", None):
        arguments["tools"] = _tools(method, names)
    if method.family == "distillation":
        arguments["teacher_model"] = _teacher(line)
    # The coordinator is always there, so its keys count without `use_peft`.
    line.model.use_peft = line.model.use_peft or method.family == "bridge"
    return import_by_path(method.trainer)(
        **arguments,
        quantization_config=get_quantization_config(line.model),
        peft_config=get_peft_config(line.model),
    )


def _reward_functions(arguments: "RewardArguments") -> list[Any]:
    """Reward model and reward functions that the script arguments name."""
    from ..rewards.by_name import reward_function

    rewards: list[Any] = [arguments.reward_model_name_or_path] if arguments.reward_model_name_or_path else []
    rewards += [reward_function(name) for name in arguments.reward_funcs or []]
    if not rewards:
        raise ValueError(
            "`reward_funcs` is not set: name at least one reward function (or `reward_model_name_or_path`)"
        )
    return rewards


def _tools(method: Method, names: list[str]) -> list[Any]:
    from ..rewards.by_name import function_at

    if method.name == "two-stage":
        raise ValueError(
            "`tools`: the two stages of two-stage have none. Train with `trl-bridge bridge` or `naive-mix`"
        )
    return [function_at(path, "tools") for path in names]


def _model_arguments(line: "CommandLine") -> dict[str, Any]:
    """`model`, and for a model made in memory its tokenizer. One that is loaded by name gets its `model_init_kwargs`."""
    from ..models import check_found, check_name, is_builtin, load, load_processing_class

    training = line.training
    name = check_name(line.model.model_name_or_path, "model_name_or_path", line.model.dtype)
    if is_builtin(name):
        if getattr(training, "use_vllm", False) and training.vllm_mode == "colocate":
            raise ValueError(
                f"`vllm_mode='colocate'` loads the model by its name, and {name} is made in memory. Save it and its tokenizer "
                "(`trl_bridge.models.load` and `load_tokenizer`) to a folder and set `model_name_or_path` to that."
            )
        training.model_init_kwargs = None
        return {"model": load(name, training.seed), "processing_class": load_processing_class(name)}
    check_found(name, "model_name_or_path", line.model.model_revision, training.trust_remote_code)
    training.model_init_kwargs = _init_kwargs(line, line.model.model_revision, training.model_init_kwargs)
    return {"model": name}


def _teacher(line: "CommandLine") -> Any:
    """The teacher, loaded as TRL's script loads it; a tiny one has the seed after the student's."""
    from ..models import check_found, check_name, is_builtin, load

    training = line.training
    if training.teacher_model_name_or_path is None:
        return None  # on a server, or the trainer says that there is none
    name = check_name(training.teacher_model_name_or_path, "teacher_model_name_or_path")
    if is_builtin(name):
        training.teacher_model_init_kwargs = None
        return load(name, training.seed + 1)
    check_found(name, "teacher_model_name_or_path", training.teacher_model_revision, training.trust_remote_code)
    revision, own = training.teacher_model_revision, training.teacher_model_init_kwargs
    training.teacher_model_init_kwargs = _init_kwargs(line, revision, own)
    return name


def _init_kwargs(line: "CommandLine", revision: str | None, own: dict[str, Any] | None) -> dict[str, Any]:
    """How a model is loaded; what the config says wins."""
    return {
        "revision": revision,
        "trust_remote_code": line.training.trust_remote_code,
        "attn_implementation": line.model.attn_implementation,
        "dtype": line.model.dtype,
        **(own or {}),
    }


def _check_reporters(names: list[str]) -> None:
    """Refuse where a package is missing: transformers looks for it once the model is loaded."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    missing = set(names) & _REPORTERS - set(get_available_reporting_integrations())
    for name in sorted(missing):
        package = name.replace("_", "-")
        raise UsageError(
            f"`report_to: {name}`: the package is not installed (`pip install {package}`); `none` reports nowhere"
        )


def _resume_from(training: Any) -> str | bool | None:
    """`resume_from_checkpoint`, checked now: the trainer would look for it only after everything else is built."""
    value = training.resume_from_checkpoint
    # A YAML file gives a boolean, the shell a string.
    if value in (None, False) or str(value).lower() in ("false", "none"):
        return None
    if value is True or str(value).lower() == "true":
        # A method whose checkpoints lie elsewhere says so itself.
        found = getattr(training, "can_resume", lambda: any(Path(training.output_dir).glob("checkpoint-*")))
        if not found():
            raise UsageError(f"`resume_from_checkpoint` is set, but {training.output_dir} holds no checkpoint")
        return True
    if not Path(value).is_dir():
        raise UsageError(f"`resume_from_checkpoint`: there is no directory {value}")
    return str(value)


if __name__ == "__main__":
    # `accelerate launch -m trl_bridge.cli.train METHOD ...`
    run(sys.argv[1], sys.argv[2:])
