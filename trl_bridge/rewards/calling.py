"""One way to call a reward function outside of training: that of TRL's trainers."""

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .completions import LogExtra, LogMetric


def _dropped(name: str, value: Any) -> None:
    """Log nothing."""


def call_reward(
    reward: Callable[..., Any],
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    trainer_state: Any,
    log_extra: LogExtra = _dropped,
    log_metric: LogMetric = _dropped,
    loop: asyncio.AbstractEventLoop | None = None,
) -> list[float | None]:
    """Rewards of one completion for each row with `prompt`, of any reward function that trains, async ones included."""
    prompts = [row["prompt"] for row in rows]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    columns = [name for name in rows[0] if name not in ("prompt", "completion", "completion_ids")]
    given = reward(
        prompts=prompts,
        completions=completions,
        completion_ids=[list(each) for each in ids],
        trainer_state=trainer_state,
        log_extra=log_extra,
        log_metric=log_metric,
        **{name: [row[name] for row in rows] for name in columns},
    )
    if inspect.isawaitable(given):
        # On a thread of its own, since a notebook's is taken; and on one loop, since a client keeps to that of its first call.
        given = asyncio.run_coroutine_threadsafe(_awaited(given), loop or _own_loop()).result()
    rewards = [None if value is None or value != value else float(value) for value in given]
    if len(rewards) != len(texts):
        raise ValueError(f"it gave {len(rewards)} scores for {len(texts)} completions")
    return rewards


async def _awaited(value: Any) -> Any:
    return await value


@functools.cache
def _own_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="async rewards").start()
    return loop
