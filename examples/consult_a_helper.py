"""
A policy that may consult helpers while it is trained, and is evaluated without them: GRPO with tools, about a minute on a CPU.

    python examples/consult_a_helper.py

Nothing is downloaded. This is in the spirit of AIPO (arXiv 2605.08401), and not that method: what a consultant says comes in as a tool's
result, and TRL's mask leaves its tokens out of the loss.

The three consultants (`trl_bridge.data.consultants`) verify a guess, look the sum up, and ask a tiny model that has learned sums. The
policy, another tiny model, has learned manners alone: to guess, mostly wrong, and to consult each of them. GRPO finds out that consulting
pays, though it has a price. What it does without consultants is printed as it is: it has not learned to add by itself.
"""

import argparse
import copy
import functools
import random

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_bridge.data.addition import addition_pairs
from trl_bridge.data.consultants import Consultants, local_model
from trl_bridge.data.search import SearchEngine
from trl_bridge.evaluation import AccuracyCallback
from trl_bridge.models import tiny_model, tiny_tokenizer


OPTIONS = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", activation_checkpointing=False)

# A chat template and its way back, short enough for a model of 0.1 million weights. Qwen's and others' need neither: TRL
# knows them. TRL asks that a template renders the calls' names and arguments.
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}"
    "{% elif message.role == 'tool' %}<said>{{ message.content }}</said>"
    "{% else %}<answer>{{ message.content }}{% for call in message.tool_calls or [] %}"
    '<call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</call>'
    "{% endfor %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<answer>",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close_pattern": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}
ARGUMENTS = {"verify": "answer", "knowledge": "query", "reasoning": "question"}


def make_tokenizer():
    tokenizer = tiny_tokenizer()
    # One token for what is the same in every call: a model this small should not have to spell JSON.
    calls = [f'{{"name": "{name}", "arguments": {{"{argument}": "' for name, argument in ARGUMENTS.items()]
    tokenizer.add_tokens(["<answer>", "<call>", "</call>", "<said>", "</said>", "right", "wrong", *calls, '"}}'])
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = RESPONSES
    return tokenizer


def learn(tokenizer, texts, steps, name):
    """A tiny model that has learned texts by heart."""
    model = tiny_model(tokenizer)
    args = SFTConfig(
        f"outputs/consult-{name}", max_steps=steps, learning_rate=4e-3, per_device_train_batch_size=32, **OPTIONS
    )
    SFTTrainer(model, args=args, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer).train()
    return model


def conversation(question, answer, guess, consultant):
    """A guess, or a consultant's reply and what follows from it."""
    messages, said = [{"role": "user", "content": question}], {"knowledge": answer, "reasoning": answer}
    if consultant is None:
        return [*messages, {"role": "assistant", "content": guess}]
    said["verify"] = "right" if guess == answer else "wrong"
    asked = {ARGUMENTS[consultant]: guess if consultant == "verify" else question}
    call = {"type": "function", "function": {"name": consultant, "arguments": asked}}
    return [
        *messages,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": consultant, "content": said[consultant]},
        {"role": "assistant", "content": guess if said[consultant] == "right" else answer},
    ]


def right_answer(completions, solution, **kwargs):
    """1 if the last message is the policy's, and is the sum."""
    last = [messages[-1] for messages in completions]
    return [
        float(message["role"] == "assistant" and message.get("content", "") == wanted)
        for message, wanted in zip(last, solution, strict=True)
    ]


def consultations(completions, **kwargs):
    """How often a consultant was asked."""
    return [float(sum(message["role"] == "tool" for message in messages)) for messages in completions]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--steps", type=int, default=60, help="steps of GRPO (60)")
    parser.add_argument("--sft_steps", type=int, default=600, help="steps of SFT, of each model (600)")
    options = parser.parse_args()

    tokenizer, rng = make_tokenizer(), random.Random(0)
    sums = {f"{a}+{b}=": str(a + b) for a, b in addition_pairs(max_number=9, seed=0)}
    helper = learn(
        tokenizer, [f"{question}{answer}<eos>" for question, answer in sums.items()], options.sft_steps, "helper"
    )
    tokenizer_of_helper = copy.copy(tokenizer)
    tokenizer_of_helper.chat_template = None  # it has learned plain text
    kinds = (None, None, *ARGUMENTS)
    guesses = {q: [answer, *rng.choices([str(n) for n in range(19)], k=2)] for q, answer in sums.items()}
    manners = [
        conversation(q, sums[q], rng.choice(guesses[q]), kind) for q in sums for kind in kinds for _ in range(2)
    ]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in manners]
    policy = learn(tokenizer, texts, options.sft_steps, "policy")

    addition_table = SearchEngine(list(sums.items()))
    consultants = functools.partial(
        Consultants,
        reward=right_answer,
        knowledge=lambda query: addition_table.search(query).split("=")[-1].strip(),
        reasoning=local_model(helper, tokenizer_of_helper, max_new_tokens=3),
    )

    rows = [{"prompt": [{"role": "user", "content": q}], "solution": answer} for q, answer in sums.items()]
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=[right_answer, consultations],
        args=GRPOConfig(
            "outputs/consult-grpo",
            max_steps=options.steps,
            learning_rate=1e-3,
            per_device_train_batch_size=32,  # 4 sums with 8 rollouts each
            num_generations=8,
            max_completion_length=24,
            reward_weights=[1.0, -0.05],
            scale_rewards="none",  # else the price alone would decide in groups that are all wrong
            max_tool_calling_iterations=1,
            logging_steps=1,
            disable_tqdm=True,
            **OPTIONS,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory=consultants,
    )
    alone = AccuracyCallback(trainer, trainer.train_dataset, right_answer, max_new_tokens=4, batch_size=100)
    before = alone.measure()["eval_accuracy"]
    trainer.train()

    log = [entry for entry in trainer.state.log_history if "tools/call_frequency" in entry]
    width = max(1, len(log) // 5)
    print("\n| steps | consultations, per answer | failed | right answers |\n|---|---|---|---|")
    for part in (log[:width], log[-width:]):
        names = ("tools/call_frequency", "tools/failure_frequency", "rewards/right_answer/mean")
        means = [sum(entry[name] for entry in part) / len(part) for name in names]
        print(f"| {part[0]['step']} to {part[-1]['step']} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    after = alone.measure()["eval_accuracy"]
    print(f"\nWithout consultants, greedily, {before:.2f} of the answers were right before and {after:.2f} are after.")


if __name__ == "__main__":
    main()
