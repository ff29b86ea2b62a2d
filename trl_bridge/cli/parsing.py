"""
The command line of a method: TRL's parser, strict about keys.

As with `trl`, values come from `--config FILE`, and the shell wins over the file. Beyond TRL: `--config=FILE` works, a
shipped recipe is found by name, and a key that nobody reads is an error that names the nearest one, whether it stands in
the file or on the shell, abbreviated or not, and whoever started the script.
"""

import argparse
import difflib
import os
from collections.abc import Iterable
from pkgutil import resolve_name
from typing import Any, NamedTuple

import yaml
from trl import DatasetMixtureConfig, ModelConfig, TrlParser

from .._upstream_cli import launch_options
from ..methods.catalogue import Method
from ..recipes import find_recipe
from .arguments import FAMILY_ARGUMENTS, DatasetArguments
from .errors import RaisingParser, UsageError


# Keys of older recipes whose new name does not look like the old one.
_RENAMED = {"torch_dtype": "dtype", "warmup_ratio": "warmup_steps", "dataset_prompt_column": "prompt_column"}
# Read by the launcher beside accelerate's own options.
LAUNCH_KEYS = ("accelerate_config",)


class CommandLine(NamedTuple):
    """What the command line and its recipe say."""

    script: DatasetArguments
    training: Any
    model: ModelConfig
    datasets: DatasetMixtureConfig
    launch: list[str]
    forwarded: list[str]


class MethodParser(RaisingParser, TrlParser):
    """TRL's parser without abbreviations, with errors that are exceptions instead of an exit."""

    def __init__(self, dataclass_types: Iterable[Any], prog: str | None = None):
        super().__init__(dataclass_types=dataclass_types, prog=prog, allow_abbrev=False)
        # Shown by --help; taken off the command line before argparse sees it.
        self.add_argument("--config", help="YAML file, or name of a shipped recipe. The shell wins over the file.")

    @property
    def keys(self) -> dict[str, argparse.Action]:
        """From each key to its action; of a switch the one that takes a value, not its `--no_` form."""
        actions = [action for action in reversed(self._actions) if action.dest not in ("help", "config")]
        return {action.dest: action for action in actions}

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """As TRL's, after a check of each value: argparse converts only those that are strings."""
        actions = self.keys
        for key, value in values.items():
            if key in actions:
                values[key] = _checked(key, value, actions[key])
        return super().set_defaults_with_config(**values)


def build_parser(method: Method) -> MethodParser:
    """Parser of a method."""
    script, model = FAMILY_ARGUMENTS[method.family]
    types = (script, import_by_path(method.config), model, DatasetMixtureConfig)
    return MethodParser(types, prog=f"trl-bridge {method.name}")


def parse_command_line(method: Method, argv: list[str], launched: bool) -> CommandLine:
    """
    Read a command line and the recipe that it names. The recipe's `env:` is exported before anything heavy is imported.
    """
    parser, shell, path, launchable, from_file = _with_recipe(method, argv, launched)
    script, training, model, datasets, _, rest = parser.parse_args_into_dataclasses(
        args=shell, return_remaining_strings=True
    )
    _check_rest(rest, set(parser.keys), {} if launched else launchable)
    kept = _without_subsequence(shell, rest)
    forwarded = kept if path is None else ["--config", str(path), *kept]
    return CommandLine(script, training, model, datasets, [] if launched else from_file + rest, forwarded)


def parse_values(method: Method, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read a command line without building the method's config, which asks for the devices of the machine at hand."""
    parser, shell, _, launchable, from_file = _with_recipe(method, argv, launched=False)
    namespace, rest = parser.parse_known_args(shell)
    _check_rest(rest, set(parser.keys), launchable)
    return namespace, from_file + rest


def _with_recipe(
    method: Method, argv: list[str], launched: bool
) -> tuple[MethodParser, list[str], Any, dict[str, argparse.Action], list[str]]:
    """Parser with the recipe's values as defaults, shell, recipe, the launcher's options, and those in the recipe."""
    shell, path = _take_config(argv)
    values = {} if path is None else _read_config(path)
    parser = build_parser(method)
    known = set(parser.keys)
    launchable = {} if launched and not values else launch_options()
    from_file = _launch_tokens(values, known, set(launchable), str(path))
    parser.set_defaults_with_config(**{key: value for key, value in values.items() if key in known})
    return parser, shell, path, launchable, from_file


def import_by_path(path: str) -> Any:
    """Import what a dotted path names."""
    # With a colon: a module's own import errors are not mistaken for a name that it does not have.
    return resolve_name(":".join(path.rsplit(".", 1)))


def _take_config(argv: list[str]) -> tuple[list[str], Any]:
    """Command line without `--config`, and the file that it names."""
    shell, names, tokens = [], [], iter(argv)
    for token in tokens:
        if token == "--config":
            names.append(next(tokens, ""))
        elif token.startswith("--config="):
            names.append(token.removeprefix("--config="))
        else:
            shell.append(token)
    if len(names) > 1:
        raise UsageError("`--config` is given twice")
    if names and not names[0]:
        raise UsageError("`--config` needs a file or the name of a recipe")
    return shell, find_recipe(names[0]) if names else None


def _read_config(path: Any) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must contain a YAML mapping of keys to values")
    variables = values.pop("env", {})
    if not isinstance(variables, dict):
        raise UsageError(f"`env` in {path} must be a mapping of variables to values")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    return values


def _checked(key: str, value: Any, action: argparse.Action) -> Any:
    """The file's value as the key's type, where it is a scalar or a list of scalars."""
    if value is None or isinstance(value, dict):
        return value
    if action.nargs == "+":
        # One value for a list: argparse would take a string apart into characters.
        return [_checked_scalar(key, item, action) for item in (value if isinstance(value, list) else [value])]
    return value if isinstance(value, list) else _checked_scalar(key, value, action)


def _checked_scalar(key: str, value: Any, action: argparse.Action) -> Any:
    if not isinstance(value, (str, int, float)) or not callable(action.type):
        return value
    try:
        # YAML's own true is kept where the key takes strings too (`resume_from_checkpoint: true`).
        converted = value if action.type is str else action.type(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        kind = getattr(action.type, "__name__", "value")
        raise UsageError(f"`{key}: {value}` in the config file is not a valid {kind}") from error
    if action.choices is not None and converted not in action.choices:
        raise UsageError(f"`{key}: {value}` in the config file: choose from {', '.join(map(str, action.choices))}")
    return converted


def _launch_tokens(values: dict[str, Any], known: set[str], launchable: set[str], source: str) -> list[str]:
    """Options of the launcher in a file, in shell form. `True` is a flag: accelerate's switches take no value."""
    tokens = []
    for key, value in values.items():
        if key in known:
            continue
        if key not in launchable and key not in LAUNCH_KEYS:
            raise UsageError(f"unknown key `{key}` in {source}{_nearest(str(key), known | launchable)}")
        if value is True:
            tokens.append(f"--{key}")
        elif value is not None and value is not False:
            tokens += [f"--{key}", str(value)]
    return tokens


def _check_rest(rest: list[str], known: set[str], launchable: dict[str, argparse.Action]) -> None:
    """Everything on the shell that the method did not take must be an option of the launcher, spelt out."""
    tokens = iter(rest)
    for token in tokens:
        name, equals, _ = token.removeprefix("--").partition("=")
        if not token.startswith("-"):
            raise UsageError(f"unexpected argument `{token}`")
        if name not in launchable and not (launchable and name in LAUNCH_KEYS):
            late = " (an option of `accelerate launch`: it goes before `-m`)" if name in launch_options() else ""
            raise UsageError(f"unknown option `{token}`{late or _nearest(name, known | set(launchable), '--')}")
        switch = name in launchable and launchable[name].nargs == 0
        if not switch and not equals and next(tokens, None) is None:
            raise UsageError(f"`{token}` needs a value")


def _nearest(key: str, candidates: set[str], prefix: str = "") -> str:
    wanted = key.lstrip("-").replace("-", "_")
    renamed = [_RENAMED[wanted]] if _RENAMED.get(wanted) in candidates else []
    found = renamed or difflib.get_close_matches(wanted, sorted(candidates), n=1, cutoff=0.5)
    return f" (did you mean `{prefix}{found[0]}`?)" if found else ""


def _without_subsequence(tokens: list[str], removed: list[str]) -> list[str]:
    """`tokens` without `removed`, an ordered subsequence of it, as argparse returns what it did not take."""
    remaining, kept = list(removed), []
    for token in tokens:
        if remaining and token == remaining[0]:
            remaining.pop(0)
        else:
            kept.append(token)
    return kept
