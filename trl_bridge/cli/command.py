"""
The command `trl-bridge`: training methods by verb, and tools.

`trl-bridge METHOD --config recipe.yaml [--key value ...]` feels like `trl`: the same parser, the same launch behaviour.
Nothing heavy is imported before a verb is known.
"""

import importlib.metadata
import sys
from pkgutil import resolve_name

from .. import __version__
from ..methods.catalogue import METHODS
from ..processes import stoppable
from ..recipes import accelerate_configs, copy_recipe, find_recipe, list_recipes, summary_line
from .errors import ToolParser, expand_home, user_errors


TOOLS: dict[str, tuple[str, str]] = {
    "compare": (
        "trl_bridge.cli.compare:main",
        "train methods on the same data, rollouts, seeds and tuned rates; write a table and pictures",
    ),
    "data": ("trl_bridge.cli.data:main", "list, show, check and prepare datasets"),
    "demo": (
        "trl_bridge.cli.demo:main",
        "compare GRPO, cold start and BRIDGE on a small task, in minutes on a CPU",
    ),
    "env": ("trl_bridge.cli.command:env", "print versions, for bug reports"),
    "eval": (
        "trl_bridge.cli.evaluate:main",
        "accuracy and pass@k of a model on the usual benchmarks or your rows",
    ),
    "init": ("trl_bridge.cli.init:main", "write a commented recipe and rows to replace into a folder"),
    "memory": ("trl_bridge.cli.memory:main", "estimate the memory of one GPU for a run, before it is launched"),
    "merge": ("trl_bridge.cli.merge:main", "merge a LoRA adapter into its model"),
    "plot": ("trl_bridge.cli.plot:main", "draw reward, gain, weights and efficiency of a run"),
    "recipes": ("trl_bridge.cli.command:recipes", "list the shipped recipes (`ls`) or copy one (`cp NAME FILE`)"),
    "selftest": (
        "trl_bridge.cli.selftest:main",
        "train each method for a few updates, and compare them with a reference, on this machine",
    ),
}
"""From each tool's verb to its function, `module:function` taking the verb's own arguments, and one line of help."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    arguments = [expand_home(token) for token in (sys.argv[1:] if argv is None else argv)]
    verb = arguments[0] if arguments and not arguments[0].startswith("-") else None
    program = "trl-bridge" if verb is None else f"trl-bridge {verb}"
    with user_errors(program), stoppable(program):
        if verb in METHODS:
            return _train(verb, arguments[1:])
        if verb in TOOLS:
            return resolve_name(TOOLS[verb][0])(arguments[1:])
        # Only --help and --version are left, and verbs that do not exist, which argparse refuses with the list of verbs.
        _top_parser().parse_args(arguments)
        _top_parser().print_help()
    return 0


def _train(name: str, argv: list[str]) -> int:
    from .launch import launch
    from .parsing import parse_command_line

    line = parse_command_line(METHODS[name], argv, launched=False)
    return launch(METHODS[name], line.launch, line.forwarded)


def _top_parser() -> ToolParser:
    parser = ToolParser(
        prog="trl-bridge",
        description="Cooperative SFT and RL post-training for TRL.",
        epilog="`trl-bridge VERB --help` shows the options of a verb.",
    )
    parser.add_argument("--version", action="version", version=f"trl-bridge {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb")
    for method in METHODS.values():
        verbs.add_parser(method.name, help=f"train: {method.summary}")
    for name, (_, summary) in TOOLS.items():
        verbs.add_parser(name, help=summary)
    return parser


def recipes(argv: list[str]) -> int:
    """`trl-bridge recipes`."""
    parser = ToolParser(prog="trl-bridge recipes", description="Recipes shipped with trl-bridge.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("ls", help="list the recipes, and the configs for `--accelerate_config`")
    copy = actions.add_parser("cp", help="copy a recipe or a config to a file of your own")
    copy.add_argument("name", metavar="NAME", help="recipe or config, such as smoke/bridge or bridge/zero3")
    copy.add_argument("file", metavar="FILE", help="file to write, or a folder that exists")
    copy.add_argument("--force", action="store_true", help="overwrite a file that exists")
    arguments = parser.parse_args(argv)
    if arguments.action == "cp":
        print(f"wrote {copy_recipe(arguments.name, arguments.file, arguments.force)}")
        return 0
    recipe_files = {name: find_recipe(name) for name in list_recipes()}
    config_files = accelerate_configs()
    width = max(map(len, [*recipe_files, *config_files]), default=0)
    for name, path in recipe_files.items():
        print(f"{name:{width}}  {summary_line(path)}")
    print("\nFor `--accelerate_config`, beside TRL's own:")
    for name, path in config_files.items():
        print(f"{name:{width}}  {summary_line(path)}")
    return 0


def env(argv: list[str]) -> int:
    """
    `trl-bridge env`: what `trl env` prints, our version, and those of the packages that the rewards compare with.
    """
    parser = ToolParser(prog="trl-bridge env", description="Print versions, for bug reports.")
    parser.parse_args(argv)
    from .._upstream_cli import print_trl_env

    print_trl_env()
    print(f"- trl-bridge version: {__version__}")
    for package in ("math-verify", "latex2sympy2_extended", "reasoning-gym"):
        found = any(importlib.metadata.distributions(name=package))
        print(f"- {package} version: {importlib.metadata.version(package) if found else 'not installed'}")
    from ..rewards.sandbox import report

    print(f"- isolation of code_reward: {report()}")
    return 0
