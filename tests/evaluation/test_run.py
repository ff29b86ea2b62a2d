import json

import pytest

from tests.helpers.evaluation import FIXTURES, ScriptedEngine
from trl_bridge.evaluation import Prompting, Sampling, Task, TransformersEngine, evaluate_task, load_task, make_jobs
from trl_bridge.evaluation.report import markdown, summarise, write_report
from trl_bridge.generation.records import Store, model_fingerprint


pytestmark = pytest.mark.usefixtures("quick_batches")
SAMPLED = Sampling(6, temperature=1.0)
MODEL = {"path": "some/model"}


def amc(**options):
    return load_task("amc23", "amc23", str(FIXTURES / "amc23.jsonl"), **options)


def evaluate(folder, tiny, engine, task=None, n=4, sampling=SAMPLED, model=MODEL, seed=0):
    task = amc() if task is None else task
    jobs = make_jobs(task, tiny[1], n, seed)
    return evaluate_task(task, jobs, engine, sampling, folder, model=model, seed=seed)


def lines(folder):
    records = [json.loads(line) for line in (folder / "completions.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def right(question, sample):
    """Sample 0 of question 0, all of question 2."""
    golds = ["204", "33", "126"]
    answers = question == 2 or (question, sample) == (0, 0)
    return f"\\boxed{{{golds[question] if answers else 7}}}" if sample < 3 else "no box"


def test_the_numbers_and_what_stands_beside_them(tmp_path, tiny):
    results = evaluate(tmp_path / "amc23", tiny, ScriptedEngine(right))
    assert (results["questions"], results["n"]) == (3, 4)
    assert results["accuracy"] == pytest.approx((1 / 4 + 0 + 3 / 4) / 3)
    assert results["pass_at_k"]["1"] == pytest.approx(results["accuracy"])
    assert results["pass_at_k"]["2"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert results["pass_at_k"]["4"] == pytest.approx(2 / 3)
    low, high = results["accuracy_interval"]
    assert 0 <= low < results["accuracy"] < high <= 1
    assert results["no_answer"] == 3 and results["truncated_share"] == 0 and results["ungradable"] == 0
    assert results["grader"] == "trl_bridge.rewards.math_reward" and results["mean_tokens"] == 5
    assert results["prompt_format"]["template"].startswith("{prompt}") and results["prompt_format"]["chat_template"]
    assert results["source"] == {"file": str(FIXTURES / "amc23.jsonl")}
    assert set(results["versions"]) == {"trl_bridge", "transformers", "torch"}
    assert json.loads((tmp_path / "amc23" / "results.json").read_text()) == json.loads(json.dumps(results))
    first = lines(tmp_path / "amc23")[0]
    assert first["prompt"][0]["content"].startswith("How many") and first["gold"] == "204"
    assert (first["answer"], first["score"], first["completion"]) == ("204", 1.0, "\\boxed{204}")
    table = write_report(tmp_path)
    assert "| amc23 | 3 | 4 | T=1, top-p 1 | 33.3 |" in table and "| 66.7 | 25.0 % | 0.0 % | math_reward |" in table
    assert (tmp_path / "results.md").read_text() == table and "amc23" in json.loads(
        (tmp_path / "results.json").read_text()
    )


def test_one_greedy_sample_has_wilsons_interval(tmp_path, tiny):
    results = evaluate(tmp_path, tiny, ScriptedEngine(right), n=1, sampling=Sampling(6))
    assert results["accuracy"] == pytest.approx(2 / 3) and results["interval_method"] == "Wilson"
    assert results["accuracy_interval"] == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert "pass_at_k" not in results and "| greedy | 66.7 | 20.8 to 93.9 |  |" in markdown({"amc23": results})


def test_a_prompt_that_fills_the_context_is_counted_and_stops_nobody(tmp_path, tiny):
    rows = [{"prompt": prompt, "solution": "2"} for prompt in ("1+1=", "x" * 40, "y" * 45, "z" * 30)]
    task = Task("mine", rows, load_task("amc23", "amc23", str(FIXTURES / "amc23.jsonl")).grader, "math_reward", {})
    jobs = make_jobs(task, tiny[1], 2, 0, context=40)
    sampling = Sampling(20, temperature=1.0)
    results = evaluate_task(task, jobs, TransformersEngine(*tiny), sampling, tmp_path / "mine", model=MODEL)
    free = make_jobs(task, tiny[1], 2, 0)
    evaluate_task(task, free, TransformersEngine(*tiny), sampling, tmp_path / "free", model=MODEL)
    short, full = lines(tmp_path / "mine"), lines(tmp_path / "free")
    assert [(record["question"], record["tokens"]) for record in short if record["question"] in (1, 2)] == [
        (1, 0), (1, 0), (2, 0), (2, 0),
    ]  # fmt: skip
    # The others have their own length: that of the first question is not that of the longest.
    assert short[:2] == full[:2]
    cut = [record for record in short[6:] if record["truncated"]]
    assert cut and all(record["tokens"] == 10 for record in cut)
    assert all(
        long["completion"].startswith(each["completion"]) for each, long in zip(short[6:], full[6:], strict=True)
    )
    assert results["too_long"] == 2 and results["cut_by_context"] == len(cut) and results["questions"] == 4
    assert f"2 questions fill the model's context and count as wrong, {len(cut)} completions" in write_report(tmp_path)
    again = ScriptedEngine(None)
    again.name = "transformers"
    evaluate_task(task, jobs, again, sampling, tmp_path / "mine", model=MODEL)
    assert again.drawn == [] and lines(tmp_path / "mine") == short


def test_the_longest_prompts_go_first_beside_their_likes(tmp_path, tiny):
    rows = [{"prompt": "1" * length, "solution": "2"} for length in (3, 30, 5, 40)]
    task = Task("mine", rows, lambda completions, **kwargs: [1.0] * len(completions), "mine", {})
    engine = TransformersEngine(*tiny, batch_size=3)
    seen = []
    original = engine.in_batches
    engine.in_batches = lambda jobs, work: original(
        jobs, lambda batch: (seen.append([len(j.ids) for j in batch]), work(batch))[1]
    )
    evaluate_task(task, make_jobs(task, tiny[1], 2, 0), engine, SAMPLED, tmp_path / "a", model=MODEL)
    assert seen == [[40, 40, 30], [30, 5, 5], [3, 3]]
    evaluate_task(
        task,
        make_jobs(task, tiny[1], 2, 0),
        TransformersEngine(*tiny, batch_size=1),
        SAMPLED,
        tmp_path / "b",
        model=MODEL,
    )
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


@pytest.mark.parametrize("killed_after", [1, 9])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, tiny, killed_after):
    """With the real engine: the same completions, whatever the batches were."""

    class Killed(TransformersEngine):
        def __call__(self, jobs, sampling):
            drawn = 0
            for batch in super().__call__(jobs, sampling):
                yield batch
                drawn += len(batch)
                if drawn >= killed_after:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "killed", tiny, Killed(*tiny, batch_size=2))
    kept = lines(tmp_path / "killed")
    assert killed_after <= len(kept) < 12
    # The kill came in the middle of a line, too.
    with open(tmp_path / "killed" / "completions.jsonl", "a") as file:
        file.write('{"question": 2, "sam')
    resumed = evaluate(tmp_path / "killed", tiny, TransformersEngine(*tiny, batch_size=5))
    whole = evaluate(tmp_path / "whole", tiny, TransformersEngine(*tiny, batch_size=12))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    ignored = {"seconds", "date"}
    assert {k: v for k, v in resumed.items() if k not in ignored} == {
        k: v for k, v in whole.items() if k not in ignored
    }


def test_finished_completions_are_not_repeated_and_samples_may_be_added(tmp_path, tiny):
    engine = ScriptedEngine(right, dies_after=6)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, tiny, engine)
    rest = ScriptedEngine(right)
    evaluate(tmp_path, tiny, rest)
    assert not set(rest.drawn) & set(engine.drawn) and len(rest.drawn) == 6
    more = ScriptedEngine(right)
    assert evaluate(tmp_path, tiny, more, n=5)["n"] == 5
    assert sorted(more.drawn) == [(0, 4), (1, 4), (2, 4)]
    none = ScriptedEngine(right)
    fewer = evaluate(tmp_path, tiny, none, n=2)
    assert none.drawn == [] and fewer["accuracy"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert len(lines(tmp_path)) == 15


def test_another_configuration_in_the_same_folder_is_refused_by_name(tmp_path, tiny):
    evaluate(tmp_path, tiny, ScriptedEngine(right))
    judge = ("judge", lambda completions, **kwargs: [0.0] * len(completions))
    other_engine = ScriptedEngine(right)
    other_engine.name = "vllm"
    for changes, named in [
        ({"model": {"path": "other"}}, "`model` .*some/model.*now .*other"),
        ({"task": amc(prompting=Prompting(template="{prompt}!"))}, "`prompt_format` .*, `rows`"),
        ({"task": amc(prompting=Prompting(chat_template_kwargs={"x": 1}))}, "`prompt_format`"),
        ({"task": amc(grader=judge)}, "`grader` .*now .*judge"),
        ({"task": amc(limit=2)}, "`rows`"),
        ({"sampling": Sampling(6, temperature=0.5)}, '`sampling` .*"temperature": 1.0.*now .*"temperature": 0.5'),
        ({"seed": 1}, r"`seed` \(0, now 1\)"),
        ({"engine": other_engine}, "`engine`"),
    ]:
        with pytest.raises(ValueError, match=f"`output_dir`: .*{named}"):
            evaluate(tmp_path, tiny, changes.pop("engine", ScriptedEngine(right)), **changes)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds completions but no config.json"):
        evaluate(tmp_path, tiny, ScriptedEngine(right))


def test_greedy_with_several_samples_is_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match="`n: 4` at temperature 0"):
        evaluate(tmp_path, tiny, ScriptedEngine(right), sampling=Sampling(6))
    with pytest.raises(ValueError, match="`n` must be 1 or more"):
        make_jobs(amc(), tiny[1], 0, 0)


def test_a_broken_line_that_is_not_the_last_is_refused(tmp_path):
    (tmp_path / "completions.jsonl").write_text(
        '{"question": 0, "sample": 0}\n{"quest\n{"question": 1, "sample": 0}\n'
    )
    with pytest.raises(ValueError, match="line 2 of .*completions.jsonl is no JSON"):
        Store(tmp_path).read()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("3", "is no record"),
        ("[]", "is no record"),
        ("null", "is no record"),
        ("", "is no JSON"),
        ('{"sample": 0, "text": ""}', "lacks `question`"),
        ('{"question": "1", "sample": 0, "text": ""}', "has an odd `question`"),
        ('{"question": 1, "sample": -1, "text": ""}', "has an odd `sample`"),
        ('{"question": 1, "sample": true, "text": ""}', "has an odd `sample`"),
        ('{"question": 1, "sample": 0}', "lacks `text`"),
        ('{"question": 1, "sample": 0, "text": "\udcff"}', "is no JSON"),
    ],
)
def test_an_odd_line_is_refused_by_its_number_and_file(tmp_path, line, said):
    text = f'{{"question": 0, "sample": 0, "text": ""}}\n{line}\n'
    (tmp_path / "completions-1.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="`output_dir`: line 2 of .*completions-1.jsonl") as refusal:
        Store(tmp_path, fields=("text",)).read()
    assert said in str(refusal.value)


@pytest.mark.parametrize("content", ["", '{"model": ', "[1]", "null"])
def test_damaged_settings_are_refused_by_their_file(tmp_path, tiny, content):
    evaluate(tmp_path, tiny, ScriptedEngine(right))
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="`output_dir`: .*config.json is damaged"):
        evaluate(tmp_path, tiny, ScriptedEngine(right))


def test_a_record_without_a_score_is_refused(tmp_path, tiny):
    evaluate(tmp_path, tiny, ScriptedEngine(right))
    file = tmp_path / "completions.jsonl"
    first, *others = file.read_text().splitlines(keepends=True)
    file.write_text(first.replace('"score"', '"scoer"') + "".join(others))
    with pytest.raises(ValueError, match="line 1 of .*completions.jsonl lacks `score`"):
        evaluate(tmp_path, tiny, ScriptedEngine(right))


def test_files_of_several_ranks_become_one(tmp_path):
    for rank, question in ((1, 0), (0, 1), (2, 2)):
        Store(tmp_path, rank).append([{"question": question, "sample": 0, "text": "ä\u2028"}])
    assert len(list(tmp_path.glob("*.jsonl"))) == 3
    assert [record["question"] for record in Store(tmp_path).finish()] == [0, 1, 2]
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["completions.jsonl"]
    assert [record["question"] for record in Store(tmp_path).read()] == [0, 1, 2]


def record(question, sample, score, **values):
    base = {"answered": True, "truncated": False, "stopped": False, "tokens": 1, "seconds": 0.0}
    return {"question": question, "sample": sample, "score": score, **base, **values}


def test_what_cannot_be_graded_counts_as_wrong_and_is_counted():
    summary = summarise([record(0, 0, None), record(1, 0, 1.0), record(2, 0, 0.6, truncated=True)], 3, 1)
    assert summary["accuracy"] == pytest.approx(1 / 3) and summary["ungradable"] == 1
    assert summary["mean_score"] == pytest.approx(1.6 / 3) and summary["truncated_share"] == pytest.approx(1 / 3)
    assert summarise([record(0, 0, 0.6)], 1, 1, threshold=0.5)["accuracy"] == 1.0
    with pytest.raises(ValueError, match="2 completions for 3 questions"):
        summarise([record(0, 0, 1.0), record(1, 0, 1.0)], 3, 1)


def test_a_model_saved_again_at_the_same_path_is_another_one(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 3_000_000)
    before = model_fingerprint(tmp_path)
    assert model_fingerprint(tmp_path) == before
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert model_fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"0" * 2_999_999 + b"1")
    assert model_fingerprint(tmp_path) != before
    with pytest.raises(FileNotFoundError, match="`model`: .* holds no weights"):
        model_fingerprint(FIXTURES)
