import functools
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from datasets import Dataset

from tests.helpers.tools import TOKENIZER, agent_model, agent_trainer, assistant, external, texts, user
from trl_bridge import BridgeTrainer, PackedGRPOTrainer
from trl_bridge.data.consultants import Consultants, local_model, served_model
from trl_bridge.data.search import search
from trl_bridge.evaluation import AccuracyCallback
from trl_bridge.rewards import answer_reward, closeness_reward, math_reward


def consultants(reward, row, **options):
    made = Consultants(reward, search, lambda question: f"think of {question}", **options)
    assert made.reset(prompt=[user("1+41=")], **row) is None  # what it returns would go into the prompt
    return made


def test_a_verdict_is_of_the_rollouts_row_and_there_are_so_many():
    asked = consultants(math_reward, {"solution": "42"}, verdicts=3)
    answers = ("\\boxed{41}", "\\boxed{42}", "42", "\\boxed{42}")  # the third is none to this reward
    assert [asked.verify(answer) for answer in answers] == ["wrong", "right", "wrong", "no more verdicts"]
    asked.reset(prompt="1+40=", solution="41")
    assert [asked.verify("\\boxed{41}"), asked.verify("\\boxed{42}")] == ["right", "wrong"]
    assert consultants(answer_reward, {"solution": "42"}).verify(42) == "right"  # a call may write a number


def test_a_graded_reward_says_no_more_than_right_or_wrong():
    asked = consultants(closeness_reward, {"solution": "42"}, verdicts=9)
    values = {answer: closeness_reward([answer], solution=["42"])[0] for answer in ("41", "40", "0", "42")}
    assert len(set(values.values())) > 2
    assert {asked.verify(answer) for answer in ("41", "40", "0")} == {"wrong"}
    assert asked.verify("42") == "right"


def test_what_cannot_be_judged():
    async def unknown(completions, **kwargs):
        return [None for _ in completions]

    assert consultants(unknown, {"solution": "42"}).verify("42") == "cannot be judged"

    def fails(completions, solution, **kwargs):
        raise ValueError(f"not a gold: {solution}")

    with pytest.raises(RuntimeError) as raised:
        consultants(fails, {"solution": "42"}).verify("7")
    assert str(raised.value) == "cannot be judged"  # TRL tells it to the policy


def test_the_other_two():
    asked = consultants(math_reward, {"solution": "42"})
    assert asked.knowledge("Amber Acorn") == search("Amber Acorn")
    assert asked.reasoning("1+41=") == "think of 1+41="


def consult(name, **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    turn = TOKENIZER.apply_chat_template([{**assistant(""), "tool_calls": [call]}], tokenize=False)
    return TOKENIZER(turn.split("assistant\n")[1].strip())["input_ids"]


ROWS = [("1+1=", "2"), ("2+1=", "3"), ("2+2=", "4"), ("3+2=", "5")]


class Consulting:
    """In front of a trainer: rollouts verify 3, look up, reason and verify again in turn, then answer."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self.generation_config.max_new_tokens = 6
        ids, log_probs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        turns = [
            consult("verify", answer="3"), consult("knowledge", query="Amber Acorn"), consult("reasoning", question="?"),
            consult("verify", answer="3"),
        ]  # fmt: skip
        for row, prompt in enumerate(prompt_ids):
            done = TOKENIZER.decode(prompt).count("<|im_start|>tool")
            ids[row] = turns[done] if done < len(turns) else [*ids[row][:5], TOKENIZER.eos_token_id]
        return ids, log_probs


@pytest.mark.parametrize("trainer_class", [PackedGRPOTrainer, BridgeTrainer])
def test_a_run_consults_and_what_is_said_is_no_ones_loss(tmp_path, trainer_class):
    seen = []

    def reward(completions, solution, **kwargs):
        seen.extend(zip(completions, solution, strict=True))
        return answer_reward([turns[-1]["content"] for turns in completions], solution=solution)

    def judge(completions, solution, **kwargs):
        return answer_reward(completions, solution=solution)

    rows = Dataset.from_list([{"prompt": [user(q)], "solution": s, "secret": f"gold{s}"} for q, s in ROWS])
    options = {} if trainer_class is PackedGRPOTrainer else {
        "sft_dataset": Dataset.from_list([{"prompt": [user(q)], "completion": [assistant(s)]} for q, s in ROWS])
    }  # fmt: skip
    trainer = agent_trainer(
        tmp_path,
        type(trainer_class.__name__, (Consulting, trainer_class), {}),
        train_dataset=rows,
        reward_funcs=reward,
        environment_factory=functools.partial(Consultants, judge, search, lambda question: "so it is"),
        max_completion_length=512,
        **options,
    )
    batches, prepare = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(prepare(inputs)) or batches[-1]
    alone = AccuracyCallback(trainer, rows, judge, max_new_tokens=4)
    before = alone.measure()
    trainer.train()
    assert len(seen) >= 8 and {solution for _, solution in seen} > {"3"}
    for turns, solution in seen:
        said = [turn["content"] for turn in turns if turn["role"] == "tool"]
        assert said == ["right" if solution == "3" else "wrong", search("Amber Acorn"), "so it is", "no more verdicts"]
        assert "gold" not in json.dumps(turns)
    for batch in batches:
        assert external(batch).any(dim=1).all()
        for own, theirs in zip(
            texts(batch, batch["completion_mask"].bool() & ~external(batch)),
            texts(batch, external(batch)),
            strict=True,
        ):
            assert "so it is" in theirs and "so it is" not in own and "verify" not in theirs
    # And without them, in the end.
    assert before["eval_accuracy_rows"] == alone.measure()["eval_accuracy_rows"] == 4


def test_a_local_model_answers_as_it_does_greedily():
    model = agent_model()
    ask, state = local_model(model, TOKENIZER, max_new_tokens=6), torch.get_rng_state()
    ids = TOKENIZER.apply_chat_template([user("1+1=")], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.size(1) :]
    assert ask("1+1=") == TOKENIZER.decode(answer, skip_special_tokens=True) == ask("1+1=") != ""
    assert torch.equal(torch.get_rng_state(), state)


def test_a_served_model_is_asked_greedily():
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            asked.append((self.path, json.loads(self.rfile.read(length))))
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "two"}}
            body = json.dumps({"id": "1", "created": 0, "model": "m", "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        ask = served_model(f"http://127.0.0.1:{server.server_port}/v1", "Qwen/Qwen3-8B", max_new_tokens=9)
        assert ask("1+1=") == "two"
    finally:
        server.shutdown()
        server.server_close()
    ((path, body),) = asked
    assert path == "/v1/chat/completions"
    assert body["model"] == "Qwen/Qwen3-8B" and body["messages"] == [user("1+1=")]
    assert body["max_tokens"] == 9 and body["temperature"] == 0
