"""
Recipes: YAML files for the command line, shipped with the package, found by name.

A recipe's name is its path under the recipe folder without `.yaml`, such as `smoke/bridge`.
"""

import difflib
import shutil
from pathlib import Path


_PACKAGE = Path(__file__).parent
# Accelerate's configs are named by `--accelerate_config`, they are no recipes.
_ACCELERATE_CONFIGS = "accelerate_configs"


class RecipeNotFoundError(FileNotFoundError):
    """Neither a file nor a shipped recipe."""


def recipe_folder() -> Path:
    """Folder that holds the recipes: in the wheel a part of the package, in a checkout the top-level `recipes/`."""
    shipped = _PACKAGE / "recipe_files"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "recipes"


def list_recipes() -> list[str]:
    """Names of all recipes."""
    folder = recipe_folder()
    paths = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in paths if path.parts[0] != _ACCELERATE_CONFIGS)


def accelerate_configs() -> dict[str, Path]:
    """Configs for `accelerate launch`. Each is in a folder, so that none has the name of one of TRL's."""
    folder = recipe_folder() / _ACCELERATE_CONFIGS
    paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return dict(sorted(paths.items()))


def find_recipe(name: str | Path) -> Path:
    """File of a recipe. An existing file goes before a shipped recipe of that name."""
    if Path(name).is_file():
        return Path(name)
    wanted = str(name).removesuffix(".yaml")
    names = list_recipes()
    if wanted in names:
        # Not `with_suffix`: in `qwen2.5-3b` it would take `.5-3b` for an ending.
        return recipe_folder() / f"{wanted}.yaml"
    nearest = difflib.get_close_matches(wanted, names, n=1)
    hint = f"did you mean `{nearest[0]}`?" if nearest else "`trl-bridge recipes ls` lists the recipes"
    raise RecipeNotFoundError(f"no file and no recipe is called {str(name)!r} ({hint})")


def summary_line(path: Path) -> str:
    """First line of a file's header."""
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def copy_recipe(name: str, target: str | Path, force: bool = False) -> Path:
    """Copy a recipe, or a config for `accelerate launch`, to a file of your own."""
    source = accelerate_configs().get(name.removesuffix(".yaml")) or find_recipe(name)
    path = Path(target)
    if path.is_dir():
        path = path / source.name
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; `--force` overwrites it")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)
    return path
