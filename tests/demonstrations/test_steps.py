import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from trl_bridge.demonstrations.group import Experts
from trl_bridge.demonstrations.steps import piece_ends, step_ends
from trl_bridge.models import tiny_tokenizer


PLAIN = tiny_tokenizer()
CHAT = tiny_tokenizer(chat_template=True)


def merging_tokenizer(*words):
    """Byte-level BPE with these words as tokens, blanks, line breaks and parts of characters included."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    merges = []
    for word in words:
        symbols = [piece for piece, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(word)][0]
        left = symbols[0]
        for right in symbols[1:]:
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
            left += right
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


class Slow:
    """A tokenizer without a fast backend."""

    is_fast = False

    def __init__(self, tokenizer):
        self.decode = tokenizer.decode


def heads(tokenizer, steps, ids=None):
    """The text up to the end of each step."""
    ids = tokenizer("".join(steps))["input_ids"] if ids is None else ids
    ends = step_ends(ids, steps, tokenizer)
    assert step_ends(ids, steps, Slow(tokenizer)) == ends
    assert len(ends) == len(steps) and ends == sorted(ends) and ends[-1] == len(ids)
    return [tokenizer.decode(ids[:end]) for end in ends]


def test_one_token_for_each_character():
    assert heads(PLAIN, ["1+1", "=2. ", "So 2"]) == ["1+1", "1+1=2. ", "1+1=2. So 2"]


@pytest.mark.parametrize(
    ("words", "steps", "first"),
    [
        # The token holds text of the first step: it goes with it.
        ([".\n\n"], ["a.", "\n\nb"], "a.\n\n"),
        (["ab"], ["xa", "by"], "xab"),
        # The token holds but the blank of the first step: it goes with the second.
        ([" b"], ["a. ", "b"], "a."),
        (["\n\nb"], ["a.\n\n", "b"], "a."),
        # White space of its own goes where the steps put it.
        (["\n\n"], ["a.\n\n", "b"], "a.\n\n"),
        (["\n\n"], ["a.", "\n\nb"], "a."),
        (["\n\n"], ["a.\n", "\nb"], "a."),
        # A token that holds a step and parts of its neighbours.
        (["abc"], ["a", "b", "cd"], "abc"),
        # Parts of characters.
        ([], ["é", "😀b"], "é"),
        (["é" + "\N{GRINNING FACE}"], ["é", "😀b"], "é😀"),
    ],
)
def test_merges_across_the_end_of_a_step(words, steps, first):
    tokenizer = merging_tokenizer(*words)
    for word in words:
        assert len(tokenizer(word)["input_ids"]) == 1
    assert heads(tokenizer, steps)[0] == first


def test_half_a_character_in_a_token():
    # The last token of the first step ends with the first byte of the second step's character.
    tokenizer = merging_tokenizer("a")
    ids = tokenizer("a😀b")["input_ids"]
    assert len(ids) == 6
    assert step_ends(ids, ["a", "😀", "b"], tokenizer) == [1, 5, 6]
    half = merging_tokenizer("😀")
    half.backend_tokenizer.model = BPE(
        {**half.get_vocab(), "að": 500},
        [("a", "ð")],  # "ð" stands for the first byte of the emoji
    )
    ids = half("a😀b")["input_ids"]
    assert ids[0] == 500
    assert heads(half, ["a", "😀", "b"], ids) == ["a😀", "a😀", "a😀b"]


def test_blank_and_empty_steps():
    assert heads(PLAIN, ["  ", "a", " ", " ", "b", ""]) == ["  ", "  a", "  a ", "  a  ", "  a  b", "  a  b"]


def test_what_a_template_puts_around_the_text():
    ids = PLAIN("<think></think>\n\na. b.\n")["input_ids"]
    assert heads(PLAIN, ["a. ", "b."], ids) == ["<think></think>\n\na. ", "<think></think>\n\na. b.\n"]
    # It may take white space off, or change it.
    assert heads(PLAIN, ["\n a.\n", "b. "], PLAIN("a. b.")["input_ids"]) == ["a. ", "a. b."]
    with pytest.raises(ValueError, match="`expert_steps` is not in the rendered trace"):
        step_ends(PLAIN("a-b")["input_ids"], ["a", "b"], PLAIN)


@pytest.mark.parametrize(
    ("count", "pieces", "cuts"),
    [
        (1, 5, [0, 10]),
        (3, 5, [0, 10, 20, 30]),
        (5, 5, [0, 10, 20, 30, 40, 50]),
        # round(7 i / 5) for i = 1, ..., 5: 1, 3, 4, 6, 7.
        (7, 5, [0, 10, 30, 40, 60, 70]),
        (7, 1, [0, 70]),
    ],
)
def test_pieces_of_steps(count, pieces, cuts):
    assert piece_ends([10 * (step + 1) for step in range(count)], pieces) == cuts


# The column


def experts(rows, tokenizer=PLAIN, **changes):
    options = {"eos_token_id": [tokenizer.eos_token_id], "max_length": 20, "overlong": "skip", "seed": 5}
    return Experts(Dataset.from_list(rows), tokenizer, steps=True, **{**options, **changes})


def drawn(found, prompt, tokenizer=PLAIN, group=0):
    ids, ends = found.draw(prompt, 0, group), found.step_ends(prompt, 0, group)
    return [tokenizer.decode(ids[:end]) for end in ends]


def test_steps_of_rows_with_and_without():
    found = experts(
        [
            {"prompt": "a", "expert": "1. 2", "expert_steps": ["1. ", "2"]},
            {"prompt": "b", "expert": "1. 2", "expert_steps": None},
            {"prompt": "c", "expert": None, "expert_steps": ["left over"]},
            {"prompt": "d", "expert": "x" * 30, "expert_steps": ["x" * 30]},
        ]
    )
    assert drawn(found, "a") == ["1. ", "1. 2"]
    assert found.step_ends("b", 0, 0) == []
    assert found.draw("d", 0, 0) is None


def test_steps_of_several_traces():
    found = experts(
        [
            {"prompt": "a", "expert": ["1,2", "", "34"], "expert_steps": [["1,", "2"], [], ["3", "4"]]},
            {"prompt": "a", "expert": ["5;6"], "expert_steps": [["5;", "6"]]},
        ]
    )
    seen = {tuple(drawn(found, "a", group=group)) for group in range(40)}
    assert seen == {("1,", "1,2"), ("3", "34"), ("5;", "5;6")}


@pytest.mark.parametrize("content", ["1. 2", [{"type": "text", "text": "1. 2"}]])
def test_steps_of_conversations(content):
    prompt = [{"role": "user", "content": "a"}]
    rows = [{"prompt": prompt, "expert": [{"role": "assistant", "content": content}], "expert_steps": ["1. ", "2"]}]
    if not isinstance(content, str):
        # The tiny template does not render blocks; one that does.
        tokenizer = tiny_tokenizer(chat_template=True)
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "message['content']",
            "(message['content'] if message['content'] is string else message['content'][0]['text'])",
        )
    else:
        tokenizer = CHAT
    found = experts(rows, tokenizer)
    assert drawn(found, prompt, tokenizer) == ["1. ", "1. 2"]


def test_other_methods_do_not_read_the_column():
    rows = [{"prompt": "a", "expert": "12", "expert_steps": ["not", "it"]}]
    found = Experts(Dataset.from_list(rows), PLAIN, eos_token_id=[1], max_length=9, overlong="skip", seed=5)
    assert not found.has_steps and found.step_ends("a", 0, 0) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"expert": "1. 2", "expert_steps": ["1.", "2"]}, "row 1: the strings of `expert_steps` do not join"),
        ({"expert": "1. 2", "expert_steps": ["1. "]}, "row 1: the strings of `expert_steps` do not join"),
        ({"expert": ["1", "2"], "expert_steps": [["1"]]}, "row 1 has 2 traces in `expert` and steps for 1"),
    ],
)
def test_steps_that_do_not_fit_are_refused(row, message):
    other = {"expert": None, "expert_steps": None}
    if isinstance(row["expert"], list):
        other = {"expert": [], "expert_steps": []}
    with pytest.raises(ValueError, match=message):
        experts([{"prompt": "a", **other}, {"prompt": "b", **row}])


def test_a_template_that_changes_the_text_is_refused():
    tokenizer = tiny_tokenizer(chat_template=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | upper")
    prompt = [{"role": "user", "content": "a"}]
    rows = [{"prompt": prompt, "expert": "one", "expert_steps": ["o", "ne"]}]
    with pytest.raises(ValueError, match="row 0"):
        experts(rows, tokenizer)
