"""A teacher on a server: the same update as with the model at hand, and refusals of servers that do not say enough."""

import pytest
import torch

from tests.helpers.distillation import distillation_trainer, recording, replay, small_teacher, weights_of
from tests.helpers.groups import assert_resumes
from tests.helpers.scoring_server import vllm_server
from tests.helpers.training import movement_error
from trl_bridge import AOPDTrainer, OPDTrainer
from trl_bridge.distillation.scoring import ServedTeacher


VOCABULARY = 15
SGD = {"optim": "sgd", "learning_rate": 5e-3, "max_steps": 1}


@pytest.fixture(autouse=True)
def client_without_vllm(request, monkeypatch):
    """TRL's client refuses to be made where vLLM is not installed, which it does not need to ask for scores."""
    if "without_vllm" not in request.node.name:
        monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)


def served(folder, trainer_class, url, **changes):
    return distillation_trainer(folder, trainer_class, teacher_model_server_url=url, **changes)


@pytest.mark.parametrize(
    ("trainer_class", "options"),
    [
        (OPDTrainer, {}),
        (AOPDTrainer, {"aopd_top_k": VOCABULARY}),
        (AOPDTrainer, {"aopd_top_k": 3}),
        (OPDTrainer, {"temperature": 0.7}),
        (AOPDTrainer, {"aopd_top_k": 3, "temperature": 1.4, "aopd_allow_temperature": True}),
    ],
    ids=["opd", "aopd, everything", "aopd, three", "opd, cold", "aopd, hot"],
)
def test_update_is_that_of_a_teacher_at_hand(tmp_path, trainer_class, options):
    local = distillation_trainer(tmp_path, trainer_class, **options, **SGD)
    start = weights_of(local)
    local.train()
    with vllm_server(small_teacher()) as (url, requests):
        trainer = served(tmp_path, recording(trainer_class), url, **options, **SGD)
        trainer.train()
        # The checks at the start, of what is granted and of the temperature, and one request for each batch of rollouts.
        *checks, asked = requests
        assert len(checks) == (3 if "temperature" in options else 1) and len(asked["prompt"]) == 8
        assert asked["temperature"] == trainer.args.temperature
    assert movement_error(weights_of(trainer), weights_of(local), start) < 1e-4
    assert max(replay(trainer)) < 2e-4


def test_resume_is_exact_and_asks_nothing_twice(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "aopd_top_k": 4}
    with vllm_server(small_teacher()) as (url, requests):
        assert_resumes(tmp_path, lambda folder, **more: served(folder, AOPDTrainer, url, **options, **more), stop=1)
        asked = [request for request in requests if len(request["prompt"]) > 1]
    assert len(asked) == 2 + 1 + 1


def test_more_tokens_than_the_vocabulary_has_are_not_asked_for(tmp_path):
    with vllm_server(small_teacher()) as (url, requests):
        trainer = served(tmp_path, AOPDTrainer, url, aopd_top_k=99)
    assert trainer.served_teacher.top_k == VOCABULARY
    assert requests[0]["prompt_logprobs"] == VOCABULARY


@pytest.mark.parametrize(
    ("server_options", "message"),
    [
        ({"most": 5}, "refuses 8 log-probabilities.*greater than max allowed: 5.*--max-logprobs 8"),
        ({"granted": 5}, "grants 6 of 8 log-probabilities.*--max-logprobs 8"),
    ],
)
def test_a_server_that_grants_less_is_refused(tmp_path, server_options, message):
    with vllm_server(small_teacher(), **server_options) as (url, requests):
        with pytest.raises(ValueError, match=message):
            served(tmp_path, AOPDTrainer, url, aopd_top_k=8)


def test_a_server_that_ignores_the_temperature_is_refused(tmp_path):
    with vllm_server(small_teacher(), deaf=True) as (url, requests):
        with pytest.raises(ValueError, match=r"scores at another temperature than 0.7.*processed_logprobs"):
            served(tmp_path, OPDTrainer, url, temperature=0.7)
        served(tmp_path, OPDTrainer, url)


def test_a_batch_with_a_completion_that_does_not_count(tmp_path):
    """A completion that was cut may be masked as a whole: it is not asked about, and has zeros."""
    batch = {
        "prompt_ids": torch.tensor([[0, 4, 5], [3, 4, 5], [0, 0, 7]]),
        "completion_ids": torch.tensor([[5, 6], [7, 8], [9, 1]]),
    }
    batch["prompt_mask"] = (batch["prompt_ids"] > 0).long()
    batch["completion_mask"] = torch.tensor([[1, 1], [0, 0], [1, 0]])
    with vllm_server(small_teacher()) as (url, requests):
        teacher = ServedTeacher(url, top_k=2, vocab_size=VOCABULARY)
        scores = teacher.score(batch)
        assert requests[-1]["prompt"] == [[4, 5, 5, 6], [7, 9]]
        nothing = teacher.score({**batch, "completion_mask": torch.zeros(3, 2, dtype=torch.long)})
    for name, value in scores.items():
        assert value.shape[:2] == (3, 2) and not value[1].any() and not value[2, 1].any(), name
        assert not nothing[name].any() and nothing[name].shape == value.shape
    with torch.no_grad():
        table = small_teacher()(torch.tensor([[4, 5, 5, 6]])).logits[0].log_softmax(-1)
    assert torch.allclose(scores["teacher_log_probs"][0], table[[1, 2], [5, 6]], atol=1e-5)
    assert torch.allclose(scores["teacher_top_log_probs"][0], table[1:3].topk(2).values, atol=1e-5)
    assert scores["teacher_top_ids"][0].tolist() == table[1:3].topk(2).indices.tolist()


@pytest.mark.parametrize(
    ("server_options", "message"),
    [
        ({"keeps_sampled_token": False}, "gave no score for [1-9][0-9]* of [0-9]+ tokens"),
        ({"first_id": 9}, "named token [0-9]+, and the student's vocabulary has 15"),
    ],
)
def test_answers_that_cannot_be_used_are_refused(tmp_path, server_options, message):
    with vllm_server(small_teacher(), **server_options) as (url, requests):
        trainer = served(tmp_path, AOPDTrainer, url, aopd_top_k=3)
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_no_server(tmp_path):
    with vllm_server(small_teacher()) as (url, _):
        pass
    with pytest.raises(OSError, match=f"can't be reached at {url}"):
        served(tmp_path, OPDTrainer, url, teacher_model_server_timeout=0.0)


def test_without_vllm(tmp_path):
    with pytest.raises(ImportError, match="vLLM is not installed"):
        distillation_trainer(tmp_path, OPDTrainer, teacher_model_server_url="http://127.0.0.1:9")
