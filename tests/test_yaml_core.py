"""YAML 1.2's core schema, at every depth."""

import math

import pytest

from trl_bridge.yaml_core import read_spelling, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in "yes no on off y n Yes NO On".split()),
        *((word, word) for word in "1:30 12:30:45 2024-01-01 1_000 0b1 +.inf.a 5e 1e5x = . 1.2.3 08x".split()),
        ("true", True),
        ("False", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("5e-7", 5e-7),
        ("5E7", 5e7),
        ("+1.e3", 1e3),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("010", 10),
        ("+7", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("9007199254740993", 9007199254740993),
        ("'5e-7'", "5e-7"),
        ('"no"', "no"),
    ],
)
def test_scalars_at_every_depth(text, value):
    got = read_yaml(f"a: {text}\nb:\n  c:\n    - {text}\n    - d: {text}\n")
    deep = got["b"]["c"]
    assert [got["a"], deep[0], deep[1]["d"]] == [value] * 3
    assert all(type(each) is type(value) for each in (got["a"], deep[0], deep[1]["d"]))


def test_nan_merges_and_spelling():
    assert math.isnan(read_yaml("a: .nan")["a"])
    assert read_yaml("a: &x {p: 1, q: no}\nb:\n  <<: *x\n  p: 2\n")["b"] == {"p": 2, "q": "no"}
    assert read_spelling("a: 1.10\nb: [0o7, {c: no}]") == {"a": "1.10", "b": ["0o7", {"c": "no"}]}
