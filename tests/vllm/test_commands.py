"""`trl-bridge eval` and `trl-bridge data score-rollouts` with vLLM itself."""

import json

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM

from tests.helpers.real_vllm import NEEDS_VLLM, TOLERANCE, save_model
from trl_bridge import cli


pytestmark = NEEDS_VLLM
ENGINE = ["--dtype", "float32", "--use_vllm", "--vllm_gpu_memory_utilization", "0.1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"student": save_model(folder / "student"), "teacher": save_model(folder / "teacher", seed=4)}


def evaluate(models, output, *options):
    """What was generated for each question, and what the results say of the run."""
    line = ["eval", "--model", models["student"], "--benchmarks", "builtin:addition", "--limit", "6"]
    assert cli.main([*line, "--max_new_tokens", "8", "--output_dir", str(output), *options]) == 0
    lines = [json.loads(line) for line in (output / "builtin-addition" / "completions.jsonl").open()]
    made = {(line["question"], line["sample"]): line["completion"] for line in lines if "completion" in line}
    return made, json.loads((output / "results.json").read_text())["builtin-addition"]


def test_eval_writes_what_transformers_would(tmp_path, models):
    made, results = evaluate(models, tmp_path / "vllm", *ENGINE)
    want, reference = evaluate(models, tmp_path / "transformers", "--dtype", "float32")
    assert len(want) == 6 and len(set(want.values())) > 1
    assert made == want and results["accuracy"] == reference["accuracy"]
    assert (results["engine"], reference["engine"]) == ("vllm", "transformers")


def test_eval_draws_each_sample_by_its_own_seed(tmp_path, models):
    options = ["--n", "4", "--temperature", "0.9", "--top_p", "0.95", *ENGINE]
    made, _ = evaluate(models, tmp_path / "first", *options)
    assert len(made) == 24 and len(set(made.values())) > 6
    assert evaluate(models, tmp_path / "again", *options)[0] == made


def test_rollouts_are_sampled_and_scored(tmp_path, models):
    line = ["data", "score-rollouts", "builtin:addition", "--dataset_config", "size=9, test_size=2"]
    line += ["--model", models["student"], "--teacher", models["teacher"], "--sft_teacher", models["teacher"]]
    line += ["--max_new_tokens", "6", "--samples", "3", "--reference_logprobs", "--output_dir", str(tmp_path)]
    assert cli.main([*line, *ENGINE]) == 0
    rows = load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train").to_list()
    assert len(rows) == 27 and len({tuple(row["completion_ids"]) for row in rows}) > 9
    for column, name in [("teacher_logprobs", "teacher"), ("reference_logprobs", "student")]:
        model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float64)
        for row in rows:
            ids, start = torch.tensor([row["prompt_ids"] + row["completion_ids"]]), len(row["prompt_ids"]) - 1
            with torch.no_grad():
                table = model(ids).logits[0].log_softmax(-1)
            want = [float(table[start + place, token]) for place, token in enumerate(row["completion_ids"])]
            assert row[column] == pytest.approx(want, abs=TOLERANCE)
    # Sampled from the student: what it gives its own rollouts is far above what another model gives them.
    mean = {
        column: sum(map(sum, (row[column] for row in rows))) / sum(len(row[column]) for row in rows)
        for column in ("teacher_logprobs", "reference_logprobs")
    }
    assert mean["reference_logprobs"] > mean["teacher_logprobs"] + 0.5
