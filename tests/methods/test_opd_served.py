"""A teacher on a server: the same update as with the model at hand, and refusals of servers that do not say enough."""

import pytest

from tests.helpers.distillation import distillation_trainer, recording, replay, small_teacher, weights
from tests.helpers.groups import assert_resumes
from tests.helpers.scoring_server import vllm_server
from tests.helpers.training import movement_error
from trl_bridge import AOPDTrainer, OPDTrainer


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
    [(OPDTrainer, {}), (AOPDTrainer, {"aopd_top_k": VOCABULARY}), (AOPDTrainer, {"aopd_top_k": 3})],
    ids=["opd", "aopd, everything", "aopd, three"],
)
def test_update_is_that_of_a_teacher_at_hand(tmp_path, trainer_class, options):
    local = distillation_trainer(tmp_path, trainer_class, **options, **SGD)
    start = weights(local)
    local.train()
    with vllm_server(small_teacher()) as (url, requests):
        trainer = served(tmp_path, recording(trainer_class), url, **options, **SGD)
        trainer.train()
        # The check at the start, and one request for each batch of rollouts.
        assert len(requests) == 1 + 1 and len(requests[1]["prompt"]) == 8
    assert movement_error(weights(trainer), weights(local), start) < 1e-4
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
    assert trainer.served_teacher.loss_top_k == VOCABULARY
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
