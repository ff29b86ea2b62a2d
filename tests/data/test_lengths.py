import pytest
from datasets import Dataset

from trl_bridge.data.rows import prompt_tokens, within_prompt_length
from trl_bridge.models import tiny_tokenizer


CHAT = tiny_tokenizer(chat_template=True)


def rows(*prompts):
    return Dataset.from_list([{"prompt": prompt, "solution": "1"} for prompt in prompts])


def test_a_string_has_its_own_tokens_and_a_conversation_its_template():
    assert CHAT.decode(prompt_tokens({"prompt": "1+1="}, CHAT)) == "1+1="
    # <|im_start|>user\n1+1=<|im_end|>\n, then <|im_start|>assistant\n: one token per character, three marks.
    chat = {"prompt": [{"role": "user", "content": "1+1="}]}
    assert len(prompt_tokens(chat, CHAT)) == 3 + len("user\n1+1=\nassistant\n")
    messages = {"messages": [*chat["prompt"], {"role": "assistant", "content": "a long answer"}]}
    assert prompt_tokens(messages, CHAT) == prompt_tokens(chat, CHAT)


def test_longer_prompts_are_dropped_and_counted(caplog):
    kept = within_prompt_length(rows("12345", "123", "1234"), CHAT, 4, "dataset_name")
    assert kept["prompt"][:] == ["123", "1234"]
    assert "1 of 3 rows of `dataset_name` have prompts of more than `max_prompt_length=4` tokens" in caplog.text
    caplog.clear()
    assert len(within_prompt_length(rows("12345", "123"), CHAT, 5, "dataset_name")) == 2
    assert not caplog.text


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="every prompt of `dataset_name` \\(2 rows\\)"):
        within_prompt_length(rows("12345", "1234"), CHAT, 3, "dataset_name")
    with pytest.raises(ValueError, match="have no prompt to measure"):
        within_prompt_length(Dataset.from_list([{"text": "x"}]), CHAT, 3, "dataset_name")
    with pytest.raises(ValueError, match="must be at least 1"):
        within_prompt_length(rows("1"), CHAT, 0, "dataset_name")


def test_a_stream_is_filtered_as_it_comes(caplog):
    kept = within_prompt_length(rows("12345", "123").to_iterable_dataset(), CHAT, 4, "dataset_name")
    assert [row["prompt"] for row in kept] == ["123"]
    assert "dropped uncounted" in caplog.text
