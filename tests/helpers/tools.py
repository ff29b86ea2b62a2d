"""Runs with tools: a small model whose rollouts call one, prompts, and demonstrations that call it too."""

import copy

import torch
from datasets import Dataset
from transformers.utils import get_json_schema

from tests.helpers.training import PAIRS, small_config, small_lora
from trl_bridge import BridgeTrainer
from trl_bridge.models import tiny_model, tiny_tokenizer


def add(a: int, b: int) -> str:
    """
    Adds.

    Args:
        a: A number.
        b: Another one.

    Returns:
        The sum.
    """
    return f"sum {a + b}"


TOOLS = [add]
SCHEMA = get_json_schema(add)
TOKENIZER = tiny_tokenizer(tools=True)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def call(a, b, name="add"):
    arguments = {"a": a, "b": b}
    return {**assistant(""), "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


def told(content, name="add"):
    return {"role": "tool", "name": name, "content": content}


def trace(a, b):
    """A call, its result, and an answer of another length for each pair."""
    return [call(a, b), told(add(a, b)), assistant(f"{a + b}" + "!" * (3 * ((a + b) % 4)))]


def tool_prompts():
    return Dataset.from_dict({"prompt": [[user(f"{a}+{b}=")] for a, b in PAIRS]})


def tool_demonstrations():
    return Dataset.from_list([{"messages": [user(f"{a}+{b}="), *trace(a, b)]} for a, b in PAIRS])


def turns_reward(completions, **kwargs):
    """Digits of the last turn, and half for each result of a tool."""
    return [
        sum(c.isdigit() for c in messages[-1]["content"]) + 0.5 * sum(m["role"] == "tool" for m in messages)
        for messages in completions
    ]


CALL_IDS = TOKENIZER(TOKENIZER.apply_chat_template([call(1, 2)], tokenize=False).split("assistant\n")[1].strip())[
    "input_ids"
]


class Calls:
    """
    In front of a trainer: every second rollout's first turn is a call, and every second of those has another one.

    What else is sampled is cut to six tokens.
    """

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self.generation_config.max_new_tokens = 6
        return with_calls(prompt_ids, *super()._generate_single_turn(prompt_ids, *args, **kwargs))


def with_calls(prompt_ids, ids, log_probs):
    assert log_probs is None
    for row, prompt in enumerate(prompt_ids):
        turns = TOKENIZER.decode(prompt).count("<|im_start|>tool")
        calls = turns < 2 and row % 2 == turns % 2
        ids[row] = list(CALL_IDS) if calls else [*ids[row][:5], TOKENIZER.eos_token_id]
    return ids, log_probs


def calling(trainer_class):
    return type(trainer_class.__name__, (Calls, trainer_class), {})


def agent_model():
    return tiny_model(TOKENIZER, hidden_size=32, layers=2, seed=3, max_position_embeddings=1024)


def agent_trainer(folder, trainer_class, *, peft_config="default", model=None, **changes):
    """A trainer of any class of ours with tools, or with what `changes` say in their place."""
    names = (
        "train_dataset", "sft_dataset", "reward_funcs", "callbacks", "tools", "environment_factory", "rollout_func",
        "eval_dataset", "processing_class",
    )  # fmt: skip
    kwargs = {name: changes.pop(name) for name in names if name in changes}
    if not {"environment_factory", "rollout_func"} & kwargs.keys():
        kwargs.setdefault("tools", TOOLS)
    kwargs.setdefault("reward_funcs", turns_reward)
    kwargs.setdefault("train_dataset", tool_prompts())
    if hasattr(trainer_class, "demonstrations_due"):
        kwargs.setdefault("sft_dataset", tool_demonstrations())
    if issubclass(trainer_class, BridgeTrainer):
        kwargs["peft_config"] = small_lora() if peft_config == "default" else peft_config
    elif peft_config != "default":
        kwargs["peft_config"] = peft_config
    kwargs.setdefault("processing_class", copy.deepcopy(TOKENIZER))
    args = small_config(
        folder, trainer_class.config_class, **{"max_completion_length": 128, "max_steps": 2, **changes}
    )
    trainer = trainer_class(model=model or agent_model(), args=args, **kwargs)
    if hasattr(trainer, "initial_model"):
        trainer.initial_model = agent_model()
    return trainer


def external(batch):
    """Tokens of a batch of rollouts that a tool has written, (B, T)."""
    return batch["completion_mask"].bool() & (batch["tool_mask"] == 0)


def texts(batch, mask):
    """The marked tokens of each row."""
    return [TOKENIZER.decode(ids[there]) for ids, there in zip(batch["completion_ids"], mask.bool(), strict=True)]


def leaves(scores):
    """Scores of a micro-batch as leaves of a graph."""
    return tuple(part if part is None else part.detach().clone().requires_grad_() for part in scores)


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]
