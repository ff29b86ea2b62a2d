"""Options said once: help, documentation and bounds of a config from its fields and the strings below them."""

import dataclasses
import inspect
from dataclasses import dataclass, field

import pytest
from trl import ScriptArguments, TrlParser

import trl_bridge
from trl_bridge.cli.arguments import FAMILY_ARGUMENTS
from trl_bridge.training import options as module
from trl_bridge.training.options import above, at_least, check_options, must, one_of, options, within


@options
class Base:
    """A base."""

    share: float = field(default=0.5, metadata=within(0, 1))
    """Share of `rows`, in 100 %
    of them."""
    count: int | None = field(default=3, metadata=at_least(1))
    """How many."""
    kind: str = field(default="a", metadata=one_of("a", "b"))
    """Which kind."""
    bare: int = 0


@options
class Derived(Base):
    """A derived one."""

    kind: str = field(default="c", metadata=one_of("a", "c"))
    """Which of other kinds."""
    rate: float = field(default=1.0, metadata=above(0))
    """Rate."""


@dataclass
class Plain(Base):
    """One that redefines an option without the decorator."""

    share: float = 7.0


def test_the_string_below_a_field_is_its_help():
    fields = {each.name: each.metadata for each in dataclasses.fields(Derived)}
    assert fields["share"]["help"] == "Share of rows, in 100 %% of them."
    assert fields["kind"] == {"choices": ["a", "c"], "help": "Which of other kinds."}
    assert fields["bare"] == {}


def test_the_parser_takes_help_and_choices_and_bounds_outlive_it():
    parser = TrlParser([Derived, ScriptArguments])
    text = " ".join(parser.format_help().split())
    assert "Share of rows, in 100 % of them. (default: 0.5)" in text
    assert "--kind {a,c}" in text
    config, _ = parser.parse_args_and_config(["--share", "0.25", "--kind", "a"])
    assert (config.share, config.kind, config.count) == (0.25, "a", 3)
    # The parser has written a type without None into the field.
    check_options(Derived(count=None))


def test_the_documentation_lists_options_with_the_inherited_ones():
    assert inspect.getdoc(Derived) == inspect.cleandoc("""
        A derived one.

        Parameters:
            share (`float`, defaults to `0.5`, must lie in [0, 1]):
                Share of `rows`, in 100 %
                of them.
            count (`int | None`, defaults to `3`, must be at least 1):
                How many.
            kind (`str`, defaults to `'c'`, must be one of 'a', 'c'):
                Which of other kinds.
            rate (`float`, defaults to `1.0`, must be above 0):
                Rate.
    """)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Base(share=1.5), r"`share` must lie in \[0, 1\], got 1.5\."),
        (Base(share=float("nan")), r"`share` must lie in \[0, 1\], got nan\."),
        (Base(share=None), r"`share` must lie in \[0, 1\], got None\."),
        (Base(count=0), "`count` must be at least 1, got 0"),
        (Base(kind="c"), "`kind` must be one of 'a', 'b', got 'c'"),
        (Derived(kind="b"), "`kind` must be one of 'a', 'c', got 'b'"),
        (Derived(share=-1), "`share` must lie in"),
        (Derived(rate=0.0), "`rate` must be above 0, got 0.0"),
        (Plain(count=-1), "`count` must be at least 1, got -1"),
    ],
)
def test_values_out_of_bounds_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_options(config)


@pytest.mark.parametrize("config", [Base(), Base(count=None), Base(share=0), Derived(), Derived(kind="a"), Plain()])
def test_values_in_bounds_are_not(config):
    assert check_options(config) is None


def test_words_of_bounds():
    assert at_least(0)["bound"].words == "not be negative"
    assert must("be even", lambda value: value % 2 == 0)["bound"].holds(4)


def test_without_source_there_is_no_help(monkeypatch):
    def unreadable(_):
        raise OSError("could not get source code")

    monkeypatch.setattr(module.inspect, "getsource", unreadable)

    @options
    class Zipped:
        """Of a zip."""

        share: float = field(default=0.5, metadata=within(0, 1))
        """Never read."""

    assert dict(dataclasses.fields(Zipped)[0].metadata) == {}
    assert Zipped.__doc__ == "Of a zip."
    with pytest.raises(ValueError, match="`share` must lie in"):
        check_options(Zipped(share=2))


CONFIGS = [getattr(trl_bridge, name) for name in trl_bridge.__all__ if name.endswith("Config")]
SCRIPTS = {kind for kinds in FAMILY_ARGUMENTS.values() for kind in kinds if kind.__module__.startswith("trl_bridge")}


@pytest.mark.parametrize("config", [*CONFIGS, *sorted(SCRIPTS, key=str)], ids=lambda config: config.__name__)
def test_every_option_of_ours_has_its_sentence(config):
    own = [each for each in dataclasses.fields(config) if each.name in inspect.get_annotations(config)]
    assert all(each.metadata["help"] and f"    {each.name} (" in config.__doc__ for each in own)
