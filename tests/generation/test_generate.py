import sys
import types

import pytest
import torch
from transformers import TopPLogitsWarper

from trl_bridge.generation import engines
from trl_bridge.generation.engines import (
    Generated,
    Job,
    Sampling,
    TransformersEngine,
    VllmEngine,
    generate_batch,
    job_seed,
    prompt_ids,
)
from trl_bridge.models import tiny_tokenizer


pytestmark = pytest.mark.usefixtures("quick_batches")
TEXTS = ["1+1=", "a much longer prompt, so that the others are padded: ", "?"]


def draw(tiny, seeds, sampling, texts=TEXTS):
    model, tokenizer = tiny
    return generate_batch(model, tokenizer, [prompt_ids(text, tokenizer) for text in texts], seeds, sampling)


def test_greedy_equals_generate_one_by_one(tiny):
    model, tokenizer = tiny
    batch = draw(tiny, [0, 0, 0], Sampling(12))
    for text, generated in zip(TEXTS, batch, strict=True):
        ids = torch.tensor([prompt_ids(text, tokenizer)])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True) == generated.text


def test_a_sample_depends_on_its_seed_alone(tiny):
    sampling = Sampling(12, temperature=1.0, top_p=0.95)
    together = draw(tiny, [1, 2, 3], sampling)
    for place in range(3):
        assert draw(tiny, [place + 1], sampling, [TEXTS[place]]) == [together[place]]
    assert draw(tiny, [3, 2, 1], sampling)[1] == together[1]
    assert draw(tiny, [4, 5, 6], sampling) != together
    assert len({each.text for each in draw(tiny, list(range(8)), sampling, ["1+1="] * 8)}) == 8


@pytest.mark.parametrize("sampling", [Sampling(1, temperature=0.7), Sampling(1, temperature=1.5, top_p=0.5)])
def test_samples_follow_the_softmax(tiny, sampling):
    model, tokenizer = tiny
    ids = torch.tensor([prompt_ids("7", tokenizer)])
    with torch.no_grad():
        logits = model(ids).logits[:, -1] * 3  # sharper, so that few tokens carry most of the mass
    seen = torch.zeros(logits.shape[-1])
    noise_rows = 4000
    scores = logits.expand(noise_rows, -1) / sampling.temperature
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    noisy = engines._GumbelNoise(range(noise_rows), torch.device("cpu"))(None, scores)
    for token in noisy.argmax(-1).tolist():
        seen[token] += 1
    expected = scores[0].softmax(-1)
    assert (seen[expected == 0] == 0).all()
    # Five standard errors of each token's share.
    assert ((seen / noise_rows - expected).abs() <= 5 * (expected / noise_rows).sqrt() + 1e-9).all()


def test_nothing_global_is_touched(tiny):
    model, _ = tiny
    before = torch.get_rng_state()
    config = model.generation_config.to_dict()
    draw(tiny, [1, 2, 3], Sampling(4, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.generation_config.to_dict() == config


def test_the_models_own_sampling_options_do_not_count(tiny):
    model, _ = tiny
    plain = draw(tiny, [1, 2, 3], Sampling(12, temperature=1.0)), draw(tiny, [0] * 3, Sampling(12))
    options = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "temperature": 0.1, "top_k": 1, "do_sample": True}
    before = {name: getattr(model.generation_config, name) for name in options}
    try:
        for name, value in options.items():
            setattr(model.generation_config, name, value)
        assert (draw(tiny, [1, 2, 3], Sampling(12, temperature=1.0)), draw(tiny, [0] * 3, Sampling(12))) == plain
    finally:
        for name, value in before.items():
            setattr(model.generation_config, name, value)


def test_truncated_and_finished(tiny):
    _, tokenizer = tiny
    end = tokenizer.eos_token_id
    one = tokenizer("1")["input_ids"]
    assert engines._generated([*one, end, end, end], [end], tokenizer) == Generated("1", 2, False, [*one, end])
    assert engines._generated(one * 3, [end], tokenizer) == Generated("111", 3, True, one * 3)
    assert engines._generated([end], [end], tokenizer) == Generated("", 1, False, [end])


def test_conversations_go_through_the_chat_template(tiny):
    _, tokenizer = tiny
    ids = prompt_ids([{"role": "user", "content": "1+1"}], tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = tiny_tokenizer(chat_template=True)
    tokenizer.chat_template = "{{ greeting }}{{ messages[0]['content'] }}"
    ids = prompt_ids([{"role": "user", "content": "1+1"}], tokenizer, {"greeting": "Hi "})
    assert tokenizer.decode(ids) == "Hi 1+1"
    with pytest.raises(ValueError, match="no chat template"):
        prompt_ids([{"role": "user", "content": "1+1"}], tiny_tokenizer())


def test_seeds_differ_by_everything():
    seeds = [job_seed(s, name, q, k) for s in (0, 1) for name in ("a", "b") for q in range(20) for k in range(20)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_sampling_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        Sampling(**{"max_new_tokens": 4, **options})


def jobs_of(tiny, count):
    _, tokenizer = tiny
    return [Job(i, 0, prompt_ids(f"{i}+", tokenizer), i) for i in range(count)]


def test_the_batch_is_halved_until_it_fits_and_nothing_is_lost(tiny, monkeypatch):
    tried = []

    def small_memory(model, tokenizer, prompts, seeds, sampling):
        tried.append(len(prompts))
        if len(prompts) > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return [Generated(str(seed), 1, False) for seed in seeds]

    monkeypatch.setattr(engines, "generate_batch", small_memory)
    engine = TransformersEngine(*tiny, batch_size=16)
    texts = [each.text for batch in engine(jobs_of(tiny, 11), Sampling(4)) for each in batch]
    assert texts == [str(i) for i in range(11)]
    assert tried == [11, 8, 4, 4, 3]
    # The size that was found holds for the next task.
    assert list(map(len, engine(jobs_of(tiny, 6), Sampling(4)))) == [4, 2]
    with pytest.raises(ValueError, match="`batch_size`"):
        TransformersEngine(*tiny, batch_size=0)


def test_vllm_gets_tokens_and_a_seed_for_each_completion(tiny, monkeypatch):
    calls = {}

    class LLM:
        def __init__(self, **options):
            calls["options"] = options

        def generate(self, prompts, sampling_params, use_tqdm):
            calls.setdefault("batches", []).append((prompts, sampling_params))
            reasons = ["length" if params["seed"] == 2 else "stop" for params in sampling_params]
            return [
                types.SimpleNamespace(
                    outputs=[types.SimpleNamespace(text=f"t{p['seed']}", token_ids=[1, 2], finish_reason=reason)]
                )
                for p, reason in zip(sampling_params, reasons, strict=True)
            ]

    stand_in = types.SimpleNamespace(LLM=LLM, SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    engine = VllmEngine("some/model", max_model_len=99, batch_size=2, tensor_parallel_size=4)
    assert calls["options"] == {"model": "some/model", "max_model_len": 99, "tensor_parallel_size": 4}
    jobs = jobs_of(tiny, 3)
    drawn = [each for batch in engine(jobs, Sampling(7, temperature=0.6, top_p=0.9)) for each in batch]
    assert drawn == [Generated(f"t{i}", 2, i == 2, [1, 2]) for i in range(3)]
    prompts, params = calls["batches"][0]
    assert prompts == [{"prompt_token_ids": job.ids} for job in jobs[:2]]
    assert params[1] == {"n": 1, "temperature": 0.6, "top_p": 0.9, "max_tokens": 7, "seed": 1}


def test_without_vllm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-bridge\[vllm\]'"):
        VllmEngine("m", 10)
