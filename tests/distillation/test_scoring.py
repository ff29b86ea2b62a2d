"""`trl-bridge data score-rollouts`: what is stored, its scores, a kill at any place, and what is refused."""

import copy
import json
import math
import sys
import types

import pytest
import torch
from datasets import load_dataset

from tests.helpers.scoring_server import vllm_server
from trl_bridge import cli
from trl_bridge.cli import score_rollouts
from trl_bridge.distillation import collect, scoring
from trl_bridge.distillation.identity import tokenizer_hash
from trl_bridge.distillation.scoring import LocalTeacher, Rollout, ServedTeacher, check_scores
from trl_bridge.distillation.teacher import head_of
from trl_bridge.generation import engines
from trl_bridge.models import tiny_model, tiny_tokenizer
from trl_bridge.objectives.lm_head import teacher_scores


SIZES = {"hidden_size": 32, "layers": 2}
ROLLOUTS = [Rollout([5, 6], [7, 8, 9, 1]), Rollout([5], [1]), Rollout([9, 9, 9, 8], [3, 4, 4])]


@pytest.fixture(autouse=True)
def quick_batches(monkeypatch):
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a student that stops now and then, and of a teacher."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer(chat_template=True)
    for name, seed in (("student", 1), ("teacher", 2)):
        model = tiny_model(tokenizer, seed=seed, **SIZES)
        with torch.no_grad():
            model.lm_head.weight *= 20
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def arguments(models, output, *more, rows="size=9, test_size=2"):
    base = ["data", "score-rollouts", "builtin:addition", "--dataset_config", rows, "--model", models / "student"]
    base += ["--teacher", models / "teacher", "--sft_teacher", models / "teacher", "--output_dir", output]
    base += ["--max_new_tokens", "6", "--batch_size", "4", "--score_batch_size", "4", "--temperature", "1"]
    return list(map(str, [*base, *more]))


def read(path):
    kind = {".parquet": "parquet", ".jsonl": "json"}[path.suffix]
    return load_dataset(kind, data_files=str(path), split="train", cache_dir=str(path.parent / "cache")).to_list()


def reference_scores(model, rollout):
    """Float64, one by one, from whole logits."""
    model = copy.deepcopy(model).double()
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    with torch.no_grad():
        table = model(ids).logits[0].log_softmax(-1)
    start = len(rollout.prompt_ids) - 1
    return [float(table[start + place, token]) for place, token in enumerate(rollout.completion_ids)]


def test_local_scores_equal_float64_and_the_input_may_be_ragged():
    model = tiny_model(tiny_tokenizer(), seed=4, **SIZES)
    want = [reference_scores(model, rollout) for rollout in ROLLOUTS]
    got = [scores for batch in LocalTeacher(model, 2)(ROLLOUTS) for scores in batch]
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, abs=2e-6)


def test_local_scores_of_a_model_in_16_bits_are_not_rounded():
    model = tiny_model(tiny_tokenizer(), seed=4, **SIZES).bfloat16()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    rollout = ROLLOUTS[2]
    ids = torch.tensor(rollout.prompt_ids + rollout.completion_ids)
    with torch.no_grad():
        hidden = model.base_model(ids[None]).last_hidden_state[0, 3:-1]
    want = teacher_scores(hidden, ids[4:], head_of(model, 1.0)).log_probs  # as on-policy distillation has them
    ((got,),) = LocalTeacher(model)([rollout])
    assert got == pytest.approx(want.tolist(), abs=1e-5)


def test_a_server_gives_the_same_scores_through_trls_client(monkeypatch):
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)
    model = tiny_model(tiny_tokenizer(), seed=4, **SIZES)
    want = [reference_scores(model, rollout) for rollout in ROLLOUTS]
    with vllm_server(model) as (url, requests):
        teacher = ServedTeacher(url + "/", batch_size=2)
        assert teacher.model == "the-teacher"
        got = [scores for batch in teacher(ROLLOUTS) for scores in batch]
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, abs=2e-6)
    assert [len(request["prompt"]) for request in requests] == [2, 1]
    assert requests[0]["prompt"][0] == [5, 6, 7, 8, 9, 1] and requests[0]["temperature"] == 1.0
    with pytest.raises(ValueError, match="`batch_size`"):
        ServedTeacher(url, batch_size=0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [([-1.0], "4 completion tokens and 1 scores"), ([-1.0, -math.inf, -1, -1], "token 1 is -inf"), ([0.2] * 4, "0.2")],
)
def test_scores_that_are_none(scores, message):
    with pytest.raises(ValueError, match=f"row 3.*{message}"):
        check_scores(ROLLOUTS[0], scores, "row 3")
    with pytest.raises(ValueError, match="empty completion"):
        check_scores(Rollout([1], []), [], "row 3")


def test_rows_hold_sampled_tokens_their_end_and_who_made_them(models, tmp_path, capsys):
    assert cli.main(arguments(models, tmp_path, "--samples", "2", "--reference_logprobs")) == 0
    shown = capsys.readouterr()
    assert shown.out.count("tokens/s") == 2 and "wrote 18 rollouts" in shown.out and str(tmp_path) in shown.out
    assert "sampling" in shown.err and "scoring" in shown.err  # the progress bars
    rows = read(tmp_path / "train.parquet")
    tokenizer = tiny_tokenizer(chat_template=True)
    assert [(row["row"], row["sample"]) for row in rows] == [(q, s) for q in range(9) for s in range(2)]
    ended = [row for row in rows if not row["truncated"]]
    assert ended and len(ended) < len(rows)
    for row in rows:
        assert (row["completion_ids"][-1] == tokenizer.eos_token_id) is not row["truncated"]
        assert len(row["completion_ids"]) == len(row["teacher_logprobs"]) == len(row["reference_logprobs"])
        for folder, column in (("teacher", "teacher_logprobs"), ("student", "reference_logprobs")):
            model = tiny_model_at(models / folder)
            want = reference_scores(model, Rollout(row["prompt_ids"], row["completion_ids"]))
            assert row[column] == pytest.approx(want, abs=1e-4), column
    assert len({tuple(row["prompt_ids"]) for row in rows}) == 9
    identity = json.loads(rows[0]["scored_with"])
    assert identity["teacher"]["model"] == str(models / "teacher") == identity["sft_teacher"]
    assert identity["tokenizer"] == tokenizer_hash(tokenizer) and identity["chat_template"] is None
    assert identity["student"]["model"] == str(models / "student") and len(identity["student"]["weights"]) == 16
    assert identity["student"]["weights"] != identity["teacher"]["weights"]
    assert identity["sampling"] == {
        "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 6, "seed": 0, "engine": "transformers"
    }  # fmt: skip


def tiny_model_at(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_conversations_go_through_the_template(models, tmp_path):
    more = ("--system_prompt", "Add.", "--format", "jsonl", "--limit", "2")
    assert cli.main(arguments(models, tmp_path, *more)) == 0
    rows = read(tmp_path / "train.jsonl")
    tokenizer = tiny_tokenizer(chat_template=True)
    prompt = tokenizer.decode(rows[0]["prompt_ids"])
    assert len(rows) == 2 and prompt.startswith("<|im_start|>system") and "Add.<|im_end|>" in prompt
    assert json.loads(rows[0]["scored_with"])["chat_template"] is not None


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", ["rollouts", "teacher"])
def test_killed_and_resumed_gives_the_same_file(models, tmp_path, monkeypatch, stage):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert cli.main(arguments(models, straight)) == 0
    append = collect.Store.append

    def dies(store, records):
        records = list(records)
        if store.folder.name == stage and len(store.read()) >= 4:
            # Half of a batch reaches the disk, the last line of it in part.
            append(store, records[:2])
            with open(store.path, "ab") as file:
                file.write(b'{"question": 7, "sam')
            raise Killed
        append(store, records)

    with monkeypatch.context() as patched:
        patched.setattr(collect.Store, "append", dies)
        with pytest.raises(Killed):
            cli.main(arguments(models, halves))
    assert not (halves / "train.parquet").exists()
    assert cli.main(arguments(models, halves)) == 0
    assert (halves / "train.parquet").read_bytes() == (straight / "train.parquet").read_bytes()
    names = [f"{folder}/completions.jsonl" for folder in ("rollouts", "teacher")]
    assert all(
        sorted((halves / name).read_text().splitlines()) == sorted((straight / name).read_text().splitlines())
        for name in names
    )


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(models, tmp_path, monkeypatch, capsys):
    assert cli.main(arguments(models, tmp_path)) == 0
    before = (tmp_path / "train.parquet").read_bytes()
    with monkeypatch.context() as patched:
        for module, name in ((engines, "generate_batch"), (scoring.LocalTeacher, "_scores")):
            patched.setattr(module, name, None)
        capsys.readouterr()
        assert cli.main(arguments(models, tmp_path)) == 0
    assert "all there already" in capsys.readouterr().out
    assert (tmp_path / "train.parquet").read_bytes() == before
    for more, name in ((("--seed", "1"), "sampling"), (("--limit", "5"), "prompts")):
        with pytest.raises(SystemExit):
            cli.main(arguments(models, tmp_path, *more))
        assert f"another `{name}`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments(models, tmp_path), "--teacher", str(models / "student")])
    assert "another `teacher`" in capsys.readouterr().err


def test_a_server_scores_the_same_rows(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)
    assert cli.main(arguments(models, tmp_path / "local")) == 0
    teacher = tiny_model_at(models / "teacher")
    with vllm_server(teacher, str(models / "teacher")) as (url, _):
        assert cli.main(arguments(models, tmp_path / "served", "--teacher_url", url)) == 0
    local, served = read(tmp_path / "local/train.parquet"), read(tmp_path / "served/train.parquet")
    for a, b in zip(local, served, strict=True):
        assert a["completion_ids"] == b["completion_ids"]
        assert a["teacher_logprobs"] == pytest.approx(b["teacher_logprobs"], abs=1e-4)
    assert json.loads(served[0]["scored_with"])["teacher"] == {"model": str(models / "teacher"), "engine": "vllm"}
    with vllm_server(teacher, "another") as (url, _), pytest.raises(SystemExit):
        cli.main(arguments(models, tmp_path / "refused", "--teacher_url", url))
    assert "serves another" in capsys.readouterr().err
    with (
        vllm_server(teacher, str(models / "teacher"), keeps_sampled_token=False) as (url, _),
        pytest.raises(SystemExit),
    ):
        cli.main(arguments(models, tmp_path / "refused", "--teacher_url", url))
    assert "is -inf, which is no log-probability" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--temperature", "0"), "`--temperature` must be above 0"),
        (("--samples", "0"), "`--samples` must be 1 or more"),
        (("--max_new_tokens", "510"), "which leaves"),
        (("--chat_template_kwargs", "[1]"), "no JSON mapping"),
        (("--model", "builtin:tiny", "--use_vllm"), "`use_vllm` needs a model on disk"),
        (("--teacher", "builtin:tiny", "--teacher_url", "http://x"), "made in memory"),
        (("--teacher", "other"), "another vocabulary"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_sampled(models, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(models)
    if not (models / "other").exists():
        other = tiny_tokenizer("0123456789", chat_template=True)
        tiny_model(other, **SIZES).save_pretrained(models / "other")
        other.save_pretrained(models / "other")
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments(models, tmp_path / "out", *more))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("context", "url", "left"), [(9, None, 5), (9, "http://x", 4), (600, "http://x", 508)])
def test_completions_fit_the_contexts_of_both_models(models, tmp_path, context, url, left):
    config = json.loads((models / "teacher/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    options = types.SimpleNamespace(model=str(models / "student"), teacher=str(tmp_path), teacher_url=url)
    settings = {"max_new_tokens": None, "temperature": 1.0, "top_p": 1.0}
    jobs = [types.SimpleNamespace(ids=[5] * size) for size in (2, 4)]
    vars(options).update(settings)
    assert score_rollouts._sampling(options, jobs).max_new_tokens == left
    options.max_new_tokens = left + 1
    with pytest.raises(ValueError, match=f"`--max_new_tokens {left + 1}`.*which leaves {left}"):
        score_rollouts._sampling(options, jobs)


def test_needs_a_model_and_one_process(models, tmp_path, monkeypatch, capsys):
    line = arguments(models, tmp_path / "out")
    place = line.index("--model")
    with pytest.raises(SystemExit):
        cli.main(line[:place] + line[place + 2 :])
    assert "`--model` is needed" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        cli.main(line)
    assert "--teacher_url" in capsys.readouterr().err


def test_vllm_samples(models, tmp_path, monkeypatch):
    class LLM:
        def __init__(self, **options):
            assert options["model"] == str(models / "student") and options["max_model_len"] == 4 + 6

        def generate(self, prompts, sampling_params, use_tqdm):
            # Text that would be tokenised otherwise: the ids are what counts.
            answers = [
                ([7, 2, 1], "stop") if params["seed"] % 2 else ([7] * 6, "length") for params in sampling_params
            ]
            assert all(params["temperature"] == 1.0 and params["max_tokens"] == 6 for params in sampling_params)
            outputs = (types.SimpleNamespace(text="?", token_ids=ids, finish_reason=why) for ids, why in answers)
            return [types.SimpleNamespace(outputs=[output]) for output in outputs]

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=dict))
    assert cli.main(arguments(models, tmp_path, "--use_vllm")) == 0
    rows = read(tmp_path / "train.parquet")
    assert {tuple(row["completion_ids"]) for row in rows} == {(7, 2, 1), (7,) * 6}
    assert all(row["truncated"] is (row["completion_ids"][-1] != 1) for row in rows)
    assert json.loads(rows[0]["scored_with"])["sampling"]["engine"] == "vllm"
