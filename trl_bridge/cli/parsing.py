"""
The command line of a method: TRL's parser, strict about keys.

As with `trl`, values come from `--config FILE`, and the shell wins over the file. Beyond TRL: `--config=FILE` works, a
shipped recipe is found by name, and a key that nobody reads is an error that names the nearest one, whether it stands in
the file or on the shell, abbreviated or not, and whoever started the script.
"""

import argparse
import dataclasses
import difflib
import inspect
import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml
from trl import DatasetMixtureConfig, ModelConfig, TrlParser

from .._upstream_cli import launch_options
from ..methods.catalogue import METHODS, Method, import_by_path
from ..recipes import find_recipe
from ..yaml_core import read_spelling, read_yaml
from .arguments import FAMILY_ARGUMENTS, DatasetArguments
from .environment import check_variables
from .errors import RaisingParser, UsageError, expand_home


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

    @property
    def annotations(self) -> dict[str, str]:
        """From each key to the types that its field is written with. In the fields themselves the parser leaves one."""
        bases = [base for kind in self.dataclass_types for base in reversed(kind.__mro__)]
        return {key: str(kind) for base in bases for key, kind in inspect.get_annotations(base).items()}


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
    _check_named(parser.parse_known_args(shell)[0], method)
    script, training, model, datasets, _, rest = parser.parse_args_into_dataclasses(
        args=shell, return_remaining_strings=True
    )
    _check_rest(rest, set(parser.keys), {} if launched else launchable)
    kept = _without_subsequence(shell, rest)
    forwarded = kept if path is None else ["--config", str(path), *kept]
    return CommandLine(script, training, model, datasets, [] if launched else from_file + rest, forwarded)


def _check_named(namespace: argparse.Namespace, method: Method) -> None:
    """Refuse a line without a model or rows, before the config asks for the devices of the machine."""
    missing = [] if namespace.model_name_or_path else ["model_name_or_path"]
    missing += [] if namespace.dataset_name or namespace.datasets else ["dataset_name"]
    if missing:
        raise UsageError(
            f"{' and '.join(f'`{key}`' for key in missing)} must be set: pass `--config` with a recipe (`trl-bridge recipes "
            f"ls` lists them, such as smoke/{method.name}), or name them on the line"
        )


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
    shell, path = _take_config([expand_home(token) for token in argv])
    values, spelling = ({}, {}) if path is None else _read_config(path)
    parser = build_parser(method)
    actions, annotations = parser.keys, parser.annotations
    known = set(actions)
    launchable = {} if launched and not values else launch_options()
    others = {key: value for key, value in values.items() if key not in known}
    from_file = _launch_tokens(others, known | set(launchable), set(launchable), str(path))
    parser.set_defaults_with_config(
        **{
            key: _checked(key, value, spelling[key], actions[key], annotations[key])
            for key, value in values.items()
            if key in known
        }
    )
    return parser, shell, path, launchable, from_file


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


def _read_config(path: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe's values, and its scalars as they are written. What it says of the environment is exported."""
    try:
        text = path.read_text(encoding="utf-8")
        values, spelling = (_at_home(read(text)) for read in (read_yaml, read_spelling))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must contain a YAML mapping of keys to values")
    odd = next((key for key in values if not isinstance(key, str)), None)
    if odd is not None:
        raise UsageError(f"unknown key `{odd}` in {path}")
    variables = values.pop("env", {})
    if not isinstance(variables, dict):
        raise UsageError(f"`env` in {path} must be a mapping of variables to values")
    nested = next((name for name, value in variables.items() if isinstance(value, (dict, list))), None)
    if nested is not None:
        raise UsageError(f"`env: {nested}` in {path} must be one value")
    check_variables([str(name) for name in variables], path)
    os.environ.update(spelling.get("env", {}))
    return values, spelling


def _at_home(value: Any) -> Any:
    """A recipe's value with the home folder for `~/` in front of its texts."""
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return expand_home(value) if isinstance(value, str) else value


def _checked(key: str, value: Any, spelling: Any, action: argparse.Action, annotation: str) -> Any:
    """The file's value as the key's type."""
    outer = re.sub(r"\[.*\]", "", annotation)
    if value is None:
        return None
    if action.nargs == "+":
        # One value for a list: argparse would take a string apart into characters.
        items = list(zip(value, spelling, strict=True)) if isinstance(value, list) else [(value, spelling)]
        mappings = re.search("dict|DatasetConfig", annotation) is not None
        wrong = next((item for item, _ in items if isinstance(item, list) or isinstance(item, dict) != mappings), None)
        if wrong is not None:
            wanted = "mappings" if mappings else "single values"
            raise UsageError(f"`{key}` in the config file takes a list of {wanted}, got {wrong!r} in it")
        return [item if mappings else _checked_scalar(key, item, text, action, outer) for item, text in items]
    for kind, word, name in ((dict, "dict", "a mapping"), (list, "list", "a list")):
        if isinstance(value, kind):
            if word not in outer:
                raise UsageError(f"`{key}` in the config file takes one value, got {name}: {value!r}")
            return value
    return _checked_scalar(key, value, spelling, action, outer)


def _checked_scalar(key: str, value: Any, spelling: str, action: argparse.Action, annotation: str) -> Any:
    if value is None or not callable(action.type):
        return value
    if isinstance(value, bool) and action.type is str:
        # TRL's script reads it from the shell as text, and knows both.
        if key == "resume_from_checkpoint" or "bool" in annotation:
            return value
        raise UsageError(
            f"`{key}: {spelling}` in the config file takes a text: put it in quotes if it is meant as one"
        )
    switched = {"on": "true", "off": "false"}.get(str(value).lower()) if "bool" in annotation else None
    try:
        # As text it is what is written: `output_dir: 2024`, `model_revision: 1.10`.
        converted = spelling if action.type is str else action.type(switched or str(value))
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
        if key not in launchable and key not in LAUNCH_KEYS:
            raise UsageError(f"unknown key `{key}` in {source}{_nearest(key, known)}")
        if isinstance(value, (dict, list)):
            raise UsageError(f"`{key}` in the config file takes one value, got {value!r}")
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
    owners = _methods_with(wanted)
    if owners:
        others = f" and {len(owners) - 3} more" if len(owners) > 3 else ""
        return f" (it is a key of {', '.join(f'`trl-bridge {name}`' for name in owners[:3])}{others})"
    renamed = [_RENAMED[wanted]] if _RENAMED.get(wanted) in candidates else []
    found = renamed or difflib.get_close_matches(wanted, sorted(candidates), n=1, cutoff=0.5)
    return f" (did you mean `{prefix}{found[0]}`?)" if found else ""


def _methods_with(key: str) -> list[str]:
    """Methods that have a key."""
    found = []
    for method in METHODS.values():
        types = (*FAMILY_ARGUMENTS[method.family], import_by_path(method.config))
        if any(field.name == key for each in types for field in dataclasses.fields(each)):
            found.append(method.name)
    return found


def _without_subsequence(tokens: list[str], removed: list[str]) -> list[str]:
    """`tokens` without `removed`, an ordered subsequence of it, as argparse returns what it did not take."""
    remaining, kept = list(removed), []
    for token in tokens:
        if remaining and token == remaining[0]:
            remaining.pop(0)
        else:
            kept.append(token)
    return kept
