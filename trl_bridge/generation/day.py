"""The day that chat templates print: one for a whole run, however long it takes and however often it is resumed."""

import datetime
import json
import string
from typing import Any


# As long as a date can be written: prompts are measured with it, so that no day drops other rows than the next.
LONGEST_DAY = "2026-09-30"


def today() -> str:
    """The day that the machine's clock shows, as 2026-11-30."""
    return datetime.date.today().isoformat()


def clock_template(tokenizer: Any, named: str | None = None) -> str | None:
    """The chat template, a tokenizer's own or a named one, that asks for the time; `None` where it does not."""
    template = named or getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if template and "strftime_now" in template else None


def stopped(template: str, day: str) -> str:
    """A chat template whose clock stands at a day."""
    date = datetime.date.fromisoformat(day)
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters]
    written = json.dumps([[directive, date.strftime(directive)] for directive in directives])
    # A macro, for transformers turns variables that are functions into text. It goes before the global of its name. The
    # line break is the block's own (`trim_blocks`), so that the template still begins a line (`lstrip_blocks`).
    return (
        "{% macro strftime_now(format) %}{% set said = namespace(text=format) %}"
        f"{{% for directive, value in {written} %}}"
        "{% set said.text = said.text.replace(directive, value) %}{% endfor %}{{ said.text }}{% endmacro %}\n"
    ) + template


def template_kwargs(tokenizer: Any, day: str, own: dict[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of `apply_chat_template` with which the clock stands at a day. `own` ones win."""
    template = clock_template(tokenizer)
    return {**({} if template is None else {"chat_template": stopped(template, day)}), **(own or {})}
