"""Conversations in which tools are called."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


# Schemas of the tools that prompts are rendered with, by the environment that offers them; of `None` where there is one set.
Schemas = Mapping[str | None, Sequence[Mapping[str, Any]]]


def calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name and arguments of the calls in a message."""
    return [call.get("function") or call for call in message.get("tool_calls") or []]


def check_calls(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], place: str, advice: str
) -> None:
    """Refuse a conversation that calls tools whose schemas the prompt would not have."""
    known = {(tool.get("function") or tool).get("name") for tool in tools}
    for message in messages:
        names = [call.get("name") for call in calls(message)]
        if not tools and (any(names) or message["role"] == "tool"):
            raise ValueError(
                f"{place} uses tools, and nothing says which there are. Pass the trainer's `tools`{advice}."
            )
        for name in names:
            if tools and name not in known:
                raise ValueError(
                    f"{place} calls {name!r}, which is none of the tools ({', '.join(sorted(map(str, known)))}). Correct the name, "
                    "or pass the tool."
                )


def with_arguments(messages: Any, place: str) -> Any:
    """Messages whose calls have arguments as a rollout's have them: by name, without what a dataset's schema filled in."""
    if not isinstance(messages, list) or not any(calls(message) for message in messages):
        return messages
    return [
        {**message, "tool_calls": [_with_arguments(call, place) for call in message["tool_calls"]]}
        if calls(message)
        else message
        for message in messages
    ]


def _with_arguments(call: dict[str, Any], place: str) -> dict[str, Any]:
    if call.get("function"):
        return {**call, "function": _with_arguments(call["function"], place)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place}: the arguments of a call of {call.get('name')!r} are no JSON: {error}."
            ) from error
    if isinstance(arguments, dict):
        arguments = {name: value for name, value in arguments.items() if value is not None}
    elif arguments is not None:
        raise ValueError(
            f"{place}: the arguments of a call of {call.get('name')!r} are no JSON object: {arguments!r}."
        )
    return {**call, "arguments": arguments or {}}


def is_shown(message: Mapping[str, Any], text: str) -> bool:
    """Whether a template has written a message's calls, or what a tool has answered, into its part of a conversation."""
    shown = "".join(text.split())
    parts = [message["content"]] if message["role"] == "tool" and isinstance(message.get("content"), str) else []
    for call in calls(message):
        arguments = call.get("arguments") or {}
        parts += [call.get("name") or "", *arguments, *(v for v in arguments.values() if isinstance(v, str))]
    # As it stands, or as JSON.
    return all(
        any("".join(form.split()) in shown for form in (part, json.dumps(part, ensure_ascii=False)[1:-1]))
        for part in parts
    )
