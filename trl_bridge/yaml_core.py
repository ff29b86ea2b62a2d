"""YAML by the core schema of version 1.2, at every depth: what is by it no number, true, false or null, is text."""

import re
from typing import Any

import yaml


_RESOLVED = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    """PyYAML knows version 1.1, where `no` is false, `5e-7` text, `010` eight and `1:30` ninety."""

    yaml_implicit_resolvers: dict[str, Any] = {}


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


for _name, (_pattern, _first) in _RESOLVED.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_yaml(text: str) -> Any:
    """The values in a YAML text."""
    return yaml.load(text, _Loader)


def read_spelling(text: str) -> Any:
    """The same, every scalar as it is written."""
    return yaml.load(text, yaml.BaseLoader)
