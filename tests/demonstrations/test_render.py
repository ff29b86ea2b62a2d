import logging

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_bridge.demonstrations.render import prompt_key, render_demonstrations


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens a think block; the answer's turn is rendered as it is written.
THINK = CHATML.replace("assistant\n", "assistant\n<think>\n")
# As THINK, but what a message says before `</think>` is dropped.
DROPPING = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")


def tokenizer(template: str | None = CHATML, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per character; the markers of the templates are one token each."""
    special = ["<pad>", "<|im_end|>", "<unk>", "<|im_start|>", "<bos>"]
    vocabulary = {token: index for index, token in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        bos_token="<bos>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def render(rows: list[dict], tok: PreTrainedTokenizerFast, **kwargs) -> Dataset:
    kwargs.setdefault("eos_token_id", tok.eos_token_id)
    return render_demonstrations(Dataset.from_list(rows), tok, **kwargs)


def trained(example: dict, tok: PreTrainedTokenizerFast) -> str:
    return tok.decode([label for label in example["labels"] if label != -100])


def context(example: dict, tok: PreTrainedTokenizerFast) -> str:
    ids = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label == -100]
    return tok.decode(ids)


def grpo_prompt_ids(prompt, tok: PreTrainedTokenizerFast, **chat_template_kwargs) -> list[int]:
    """The prompt's tokens by TRL's own code, without a trainer around it."""
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.processing_class = tok
    trainer.tools = None
    trainer.chat_template = None
    trainer.chat_template_kwargs = chat_template_kwargs
    trainer.environment_factories = None
    trainer._is_vlm = False
    return trainer._tokenize_prompts([prompt])[0][0]


FORMATS = {
    "standard prompt-completion": {"prompt": "1+1=", "completion": "2"},
    "conversational prompt-completion": {"prompt": [user("1+1=")], "completion": [assistant("2")]},
    "messages": {"messages": [user("1+1="), assistant("2")]},
}


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("bos", [False, True])
def test_prompt_is_grpos_and_completion_ends_once(row, bos):
    tok = tokenizer(bos=bos)
    example = render([row], tok)[0]
    prompt = row.get("prompt", row.get("messages", [None])[:-1])
    prompt_ids = grpo_prompt_ids(prompt, tok)
    assert example["input_ids"][: len(prompt_ids)] == prompt_ids
    assert example["labels"] == [-100] * len(prompt_ids) + tok("2<|im_end|>", add_special_tokens=False)["input_ids"]
    assert example["input_ids"][len(prompt_ids) :] == example["labels"][len(prompt_ids) :]
    assert example["row"] == 0 and example["prompt_key"] == prompt_key(prompt)


@pytest.mark.parametrize("bos", [False, True])
def test_text_trains_all_but_the_first_token(bos):
    tok = tokenizer(bos=bos)
    example = render([{"text": "1+1=2"}], tok)[0]
    assert example["input_ids"] == tok("1+1=2")["input_ids"] + [tok.eos_token_id]
    assert example["labels"] == [-100, *example["input_ids"][1:]]
    assert example["prompt_key"] == ""


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1=", "completion": "2<|im_end|>"},
        {"prompt": "1+1=", "completion": "2<|im_end|>\n"},
        {"prompt": "1+1=", "completion": "2<|im_end|><|im_end|>"},
        {"text": "12<|im_end|>"},
        {"messages": [user("1+1="), assistant("2<|im_end|>")]},
    ],
)
def test_eos_is_never_doubled(row):
    tok = tokenizer()
    assert trained(render([row], tok)[0], tok) == "2<|im_end|>"


def test_what_follows_an_inner_eos_is_kept():
    tok = tokenizer()
    row = {"prompt": [user("1+1=")], "completion": [assistant("is"), user("go on"), assistant("2")]}
    expected = "is<|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
    assert trained(render([row], tok)[0], tok) == expected
    # A template that writes no EOS after the last turn.
    bare = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}"
    assert trained(render([row], tokenizer(bare))[0], tok) == "is<|im_end|>go on<|im_end|>2<|im_end|>"


def test_several_stop_tokens():
    tok = tokenizer(CHATML.replace("<|im_end|>\n", "<bos>\n"))
    row = {"messages": [user("1+1="), assistant("2")]}
    stops = [tok.eos_token_id, tok.bos_token_id]
    assert trained(render([row], tok, eos_token_id=stops)[0], tok) == "2<bos>"
    assert trained(render([row], tok)[0], tok) == "2<bos>\n<|im_end|>"
    assert trained(render([{"prompt": "1+1=", "completion": "2"}], tok, eos_token_id=stops)[0], tok) == "2<|im_end|>"


def test_messages_train_the_last_assistant_message_only():
    tok = tokenizer()
    conversation = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    example = render([{"messages": conversation}], tok)[0]
    assert trained(example, tok) == "d<|im_end|>"
    assert example["input_ids"][: -len("d") - 1] == grpo_prompt_ids(conversation[:3], tok)


def test_from_value_conversations():
    tok = tokenizer()
    rows = [{"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}]
    example = render(rows, tok)[0]
    assert trained(example, tok) == "b<|im_end|>"
    assert example["prompt_key"] == prompt_key([user("a")])


def test_generation_prompt_that_opens_a_think_block():
    tok = tokenizer(THINK)
    row = {"prompt": [user("1+1=")], "completion": [assistant("<think>\nadd</think>2")]}
    example = render([row], tok)[0]
    prompt_ids = grpo_prompt_ids(row["prompt"], tok)
    assert tok.decode(prompt_ids).endswith("<think>\n")
    assert example["input_ids"][: len(prompt_ids)] == prompt_ids
    assert trained(example, tok) == "add</think>2<|im_end|>"
    with pytest.raises(ValueError, match="row 1.*think block"):
        render([row, {"prompt": [user("1+1=")], "completion": [assistant("2")]}], tok)


def test_template_that_drops_the_reasoning_is_refused():
    rows = [{"prompt": [user("1+1=")], "completion": [assistant(text)]} for text in ("2", "<think>add</think>2")]
    assert len(render(rows[:1], tokenizer(DROPPING))) == 1
    with pytest.raises(ValueError, match="row 1: the chat template drops a part of the completion's `content`"):
        render(rows, tokenizer(DROPPING))


def test_template_and_its_arguments_are_those_of_generation():
    tok = tokenizer(None)
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n' + mark|default('')")
    template = template.replace(
        "+ message['content']", "+ (mark if message['role'] == 'assistant' else '') + message['content']"
    )
    row = {"messages": [user("1+1="), assistant("2")]}
    example = render([row], tok, chat_template=template, chat_template_kwargs={"mark": "!"})[0]
    assert context(example, tok).endswith("assistant\n!") and trained(example, tok) == "2<|im_end|>"
    with pytest.raises(
        ValueError, match="`sft_dataset` row 0 is conversational, but the tokenizer has no chat template"
    ):
        render([row], tok)


def test_fields_filled_with_none_by_the_schema_do_not_count():
    seen = CHATML.replace("message['content']", "message['content'] + message.keys()|list|join(',')")
    tok = tokenizer(seen)
    row = {"messages": [user("a"), {**assistant("b"), "tool_calls": [{"type": "function"}]}]}
    rows = Dataset.from_list([row, {"messages": [user("a"), assistant("b")]}])
    assert rows[1]["messages"][0]["tool_calls"] is None
    example = render_demonstrations(rows, tok, eos_token_id=tok.eos_token_id)[1]
    assert trained(example, tok) == "brole,content<|im_end|>"
    assert example["input_ids"][: -len("brole,content") - 1] == grpo_prompt_ids([user("a")], tok)
    assert example["prompt_key"] == prompt_key([user("a")])


def test_merge_across_the_boundary_leaves_the_prompt_as_generated():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<eos>": 3}, [("a", "b")]))
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    assert tok("ab")["input_ids"] == [2]
    example = render([{"prompt": "a", "completion": "b"}], tok)[0]
    assert example["input_ids"] == [0, 1, 3] and example["labels"] == [-100, 1, 3]


def test_completion_gets_no_word_start_mark():
    backend = Tokenizer(models.BPE({"▁": 0, "1": 1, "2": 2, "=": 3, "<eos>": 4, "<unk>": 5}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    assert tok("2")["input_ids"] == [0, 2]
    assert render([{"prompt": "1=", "completion": "2"}], tok)[0]["input_ids"] == [0, 1, 3, 2, 4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1+1=", "completion": ""}, "row 1 has no completion tokens"),
        ({"prompt": "1+1=", "completion": "<|im_end|>"}, "row 1 has no completion tokens"),
        ({"prompt": "1+1=", "completion": None}, "row 1: `completion` is null"),
        ({"prompt": None, "completion": "2"}, "row 1: `prompt` is null"),
        ({"prompt": [user("1+1=")], "completion": [assistant("")]}, "row 1 has no completion tokens"),
        ({"prompt": [], "completion": [assistant("2")]}, "row 1 has no prompt"),
        ({"messages": [user("1+1=")]}, "row 1 has no completion tokens"),
        ({"messages": [assistant("2")]}, "row 1 has no prompt"),
        ({"text": ""}, "row 1 has no completion tokens"),
    ],
)
def test_rows_without_a_demonstration_are_named(row, message):
    good = {"prompt": "1+1=", "completion": "2"}
    if "messages" in row:
        good = FORMATS["messages"]
    elif "text" in row:
        good = {"text": "1+1=2"}
    elif isinstance(row["prompt"], list):
        good = FORMATS["conversational prompt-completion"]
    with pytest.raises(ValueError, match=message):
        render([good, row], tokenizer())


def test_datasets_without_demonstrations_are_refused():
    tok = tokenizer()
    with pytest.raises(ValueError, match="`sft_dataset` has a `prompt` column but no `completion`"):
        render([{"prompt": "1+1="}], tok)
    with pytest.raises(ValueError, match="`sft_dataset` has none of the columns needed .*'question'"):
        render([{"question": "1+1="}], tok)
    with pytest.raises(ValueError, match="row 0 has a picture, which a tokenizer cannot show"):
        render([{"prompt": "1", "completion": "2", "image": "x"}], tok)
    with pytest.raises(ValueError, match="`sft_dataset` is empty"):
        render_demonstrations(Dataset.from_dict({"text": []}), tok, eos_token_id=1)
    with pytest.raises(TypeError, match="`sft_dataset` must be a `datasets.Dataset`"):
        render_demonstrations([{"text": "a"}], tok, eos_token_id=1)
    with pytest.raises(ValueError, match="row 0: prompt and completion must be"):
        render([{"prompt": "1+1=", "completion": [assistant("2")]}], tok)
    with pytest.raises(ValueError, match="row 0: the chat template refuses the conversation: no system"):
        render([FORMATS["messages"]], tokenizer("{{ raise_exception('no system') }}"))


def test_overlong():
    tok = tokenizer()
    rows = [{"prompt": "1+1=", "completion": completion} for completion in ("2", "two, or 1+1", "3")]
    assert render(rows, tok, max_length=6)["row"][:] == [0, 2]
    assert render(rows, tok, max_length=100)["row"][:] == [0, 1, 2]
    cut = render(rows, tok, max_length=6, overlong="truncate")
    assert cut["row"][:] == [0, 1, 2]
    assert trained(cut[1], tok) == "tw" and len(cut[1]["input_ids"]) == len(cut[1]["labels"]) == 6
    with pytest.raises(ValueError, match=r"1 of 3 .* longer than `sft_max_length=6` \(the first is row 1 with 16 tok"):
        render(rows, tok, max_length=6, overlong="error")
    with pytest.raises(ValueError, match="Every demonstration of `sft_dataset` is longer than `sft_max_length=5`"):
        render(rows, tok, max_length=5)
    with pytest.raises(ValueError, match="row 0: nothing of the completion is left"):
        render(rows, tok, max_length=4, overlong="truncate")
    with pytest.raises(ValueError, match="`sft_overlong` must be one of"):
        render(rows, tok, overlong="shorten")
    with pytest.raises(ValueError, match="`sft_max_length` must be at least 2"):
        render(rows, tok, max_length=1)


@pytest.mark.parametrize(("overlong", "word"), [("drop", "dropped"), ("truncate", "cut")])
def test_overlong_count_is_logged(caplog, overlong, word):
    rows = [{"prompt": "1+1=", "completion": completion} for completion in ("2", "two, or 1+1")]
    with caplog.at_level(logging.WARNING, logger="trl_bridge"):
        render(rows, tokenizer(), max_length=6, overlong=overlong)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 of 2 demonstrations" in caplog.text and word in caplog.text


def test_rows_keep_their_index_and_the_collator_takes_them():
    tok = tokenizer()
    rows = [
        {"prompt": "1+1=", "completion": "2", "answer": "2"},
        {"prompt": "3+10=", "completion": "13", "answer": "13"},
    ]
    rendered = render(rows, tok)
    assert rendered.column_names == ["input_ids", "labels", "row", "prompt_key"]
    assert rendered["row"][:] == [0, 1]
    features = [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in rendered]
    batch = DataCollatorForLanguageModeling(pad_token_id=tok.pad_token_id)(features)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)
    assert (batch["labels"] != -100).sum(dim=1).tolist() == [2, 3]
    assert torch.equal(batch["input_ids"][batch["labels"] != -100], batch["labels"][batch["labels"] != -100])


def test_a_torch_formatted_dataset_and_several_processes():
    tok = tokenizer()
    rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(4)]
    plain = render(rows, tok)
    formatted = render_demonstrations(
        Dataset.from_list(rows).with_format("torch"), tok, eos_token_id=tok.eos_token_id, num_proc=2
    )
    assert plain[:] == formatted[:]


def test_prompt_key():
    assert prompt_key([user("a")]) == prompt_key([{"content": "a", "role": "user", "tool_calls": None}])
    assert prompt_key([user("a")]) == prompt_key([user([{"type": "text", "text": "a", "image": None}])])
    keys = [prompt_key(p) for p in ("a", "b", [user("a")], [assistant("a")], [user("a"), user("a")], [user("ä")])]
    assert len(set(keys)) == len(keys)
