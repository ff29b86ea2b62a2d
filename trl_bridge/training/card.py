"""What a model card says beyond TRL's: how this very model was trained."""

import dataclasses
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..tables import markdown_table


# A card is published: these may hold a password, or name a place, a server or an account.
_PRIVATE = re.compile(
    r"(token|key|init_kwargs|headers|_dir|_url|_host|run_name|resume_from_checkpoint)$|^(hub_|deepspeed$|fsdp_config$|accelerator_config$|local_rank$)"
)
_SECRET = re.compile(r"(token|key|init_kwargs|headers)$")
_FIGURES = re.compile(r"(reward$|eval_|(train_)?loss$|(?!completions/|clip_ratio/|profiling/|rewards/|sampling/)\w+/)")


class Carded:
    """A trainer whose model card ends with how the model was trained."""

    card_lines: Sequence[str] = ()
    """What the trainer's starter adds: the command, the names of the data."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As TRL's trainers, with the method's version, options, rows and figures."""
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        if not self.is_world_process_zero():
            return
        rows = {name: getattr(self, name, None) for name in ("train_dataset", "_sft_dataset", "eval_dataset")}
        lines = [
            f"Method: {self._name}, by trl-bridge {__version__}",
            *self.card_lines,
            *_sizes(rows),
            f"Processes: {self.accelerator.num_processes}",
        ]
        options = [(f"`{name}`", f"`{value}`") for name, value in changed_options(self.args)]
        figures = [(f"`{name}`", f"{value:.4g}") for name, value in last_figures(self.state.log_history).items()]
        parts = ["## How it was trained", "\n".join(f"- {line}" for line in lines)]
        parts += [f"Options that are not the default:\n\n{markdown_table(['option', 'value'], options)}"]
        if figures:
            text = f"Figures as last logged, at update {self.state.global_step}:"
            parts += [f"{text}\n\n{markdown_table(['metric', 'value'], figures, left=1)}"]
        with (Path(self.args.output_dir) / "README.md").open("a", encoding="utf-8") as card:
            card.write("\n\n" + "\n\n".join(part.rstrip() for part in parts) + "\n")


def _sizes(rows: Mapping[str, Any]) -> Iterator[str]:
    for name, dataset in rows.items():
        if hasattr(dataset, "__len__"):
            yield f"`{name.lstrip('_')}`: {len(dataset)} rows"


def changed_options(args: Any) -> list[tuple[str, Any]]:
    """Options of a config that differ from its defaults, the preset always, and nothing that should not be published."""
    values, found = args.to_dict(), []
    for field in dataclasses.fields(args):
        make: Any = field.default_factory
        default: Any = field.default if make is dataclasses.MISSING else make()
        if (
            field.init
            and not _PRIVATE.search(field.name)
            and (field.name == "preset" or values[field.name] != default)
        ):
            found.append((field.name, values[field.name]))
    return found


def last_figures(log: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each metric that says how a run went; transformers logs None where there was none."""
    return {k: v for entry in log for k, v in entry.items() if _FIGURES.match(k) and v is not None}


def shown_command(program: str, tokens: Iterable[str]) -> str:
    """A command line without the values of options that may hold a password."""
    shown, hides = [program], False
    for token in tokens:
        name, equals, _ = token.partition("=")
        is_option = name.startswith("--")
        is_secret = is_option and bool(_SECRET.search(name))
        if hides and not is_option:
            shown.append("...")
        else:
            shown.append(f"{name}=..." if is_secret and equals else shlex.quote(token))
        hides = is_secret and not equals
    return " ".join(shown)
