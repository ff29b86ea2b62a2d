"""
A policy that may consult a helper model while it answers: TRL's GRPO with a tool, under a minute on a CPU.

    python examples/consult_a_helper.py

Nothing is downloaded. This is our own example of training with a helper, not the method of a paper: what the helper says
comes in through `tools=`, TRL's mask leaves its tokens out of the loss, so nothing has to be corrected for their origin.

The helper is a tiny model that has learned sums of two digits. The policy, another one, has learned manners alone: half
of the conversations that it saw guess the sum, the other half ask the helper. GRPO finds out that asking pays.
"""

import argparse
import random

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_bridge.data.addition import addition_pairs
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


def make_tokenizer():
    tokenizer = tiny_tokenizer()
    # One token for what is the same in every call: a model this small should not have to spell JSON.
    call = ['{"name": "consult", "arguments": {"question": "', '"}}']
    tokenizer.add_tokens(["<answer>", "<call>", "</call>", "<said>", "</said>", *call])
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


def conversation(question, answer, asks):
    messages = [{"role": "user", "content": question}]
    if asks:
        call = {"type": "function", "function": {"name": "consult", "arguments": {"question": question}}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "consult", "content": answer},
        ]
    return [*messages, {"role": "assistant", "content": answer}]


def right_answer(completions, solution, **kwargs):
    """1 if the last message is the policy's, and is the sum."""
    last = [messages[-1] for messages in completions]
    return [
        float(message["role"] == "assistant" and message.get("content", "") == wanted)
        for message, wanted in zip(last, solution, strict=True)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--steps", type=int, default=30, help="steps of GRPO (30)")
    parser.add_argument("--sft_steps", type=int, default=300, help="steps of SFT, of each model (300)")
    options = parser.parse_args()

    tokenizer, rng = make_tokenizer(), random.Random(0)
    sums = {f"{a}+{b}=": str(a + b) for a, b in addition_pairs(max_number=9, seed=0)}
    helper = learn(
        tokenizer, [f"{question}{answer}<eos>" for question, answer in sums.items()], options.sft_steps, "helper"
    )
    helper.eval()
    manners = [conversation(q, str(rng.randrange(19)), asks) for q in sums for asks in (True, False) for _ in range(2)]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in manners]
    policy = learn(tokenizer, texts, options.sft_steps, "policy")

    def consult(question: str) -> str:
        """
        Ask the helper.

        Args:
            question: A sum, such as "3+4=".
        """
        ids = tokenizer(question, return_tensors="pt")
        with torch.no_grad():
            output = helper.generate(**ids, max_new_tokens=3, do_sample=False)
        return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    rows = [{"prompt": [{"role": "user", "content": q}], "solution": answer} for q, answer in sums.items()]
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=right_answer,
        args=GRPOConfig(
            "outputs/consult-grpo",
            max_steps=options.steps,
            learning_rate=1e-3,
            per_device_train_batch_size=32,  # 4 sums with 8 rollouts each
            num_generations=8,
            max_completion_length=24,
            max_tool_calling_iterations=1,
            logging_steps=1,
            disable_tqdm=True,
            **OPTIONS,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        tools=[consult],
    )
    trainer.train()

    log = [entry for entry in trainer.state.log_history if "tools/call_frequency" in entry]
    width = max(1, len(log) // 5)
    print("\n| steps | calls of the helper, per answer | failed calls | right answers |\n|---|---|---|---|")
    for part in (log[:width], log[-width:]):
        names = ("tools/call_frequency", "tools/failure_frequency", "reward")
        means = [sum(entry[name] for entry in part) / len(part) for name in names]
        print(f"| {part[0]['step']} to {part[-1]['step']} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")


if __name__ == "__main__":
    main()
