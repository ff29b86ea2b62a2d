import copy
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TopPLogitsWarper,
)

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
    noisy = engines._GumbelNoise([torch.Generator().manual_seed(seed) for seed in range(noise_rows)])(None, scores)
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


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "temperature": 0.1, "top_k": 1, "do_sample": True},
        {"exponential_decay_length_penalty": (1, 3.0)},
        {"sequence_bias": {(40,): 50.0}},
        {"forced_eos_token_id": 40, "forced_bos_token_id": 41},
        {"suppress_tokens": list(range(30, 60)), "bad_words_ids": [[50]]},
        {"min_new_tokens": 6, "max_length": 9, "max_time": 1e-9},
        {"stop_strings": ["1"], "return_dict_in_generate": False, "output_scores": True},
        {"num_beams": 2, "num_return_sequences": 2, "early_stopping": True},
        {"guidance_scale": 3.0, "renormalize_logits": True, "use_cache": False},
        {"cache_implementation": "static", "prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_nothing_of_the_models_own_generation_config_counts(tiny, options, monkeypatch):
    model, _ = tiny
    plain = draw(tiny, [1, 2, 3], Sampling(12, temperature=1.0)), draw(tiny, [0] * 3, Sampling(12))
    for name, value in options.items():
        monkeypatch.setattr(model.generation_config, name, value)
    own = model.generation_config.to_dict()
    assert (draw(tiny, [1, 2, 3], Sampling(12, temperature=1.0)), draw(tiny, [0] * 3, Sampling(12))) == plain
    assert model.generation_config.to_dict() == own


def test_an_adapters_model_has_its_config_back(tiny):
    model = get_peft_model(copy.deepcopy(tiny[0]), LoraConfig(target_modules=["q_proj"], init_lora_weights=True))
    model.get_base_model().generation_config.sequence_bias = {(40,): 50.0}
    assert draw((model, tiny[1]), [0] * 3, Sampling(12)) == draw(tiny, [0] * 3, Sampling(12))
    assert model.get_base_model().generation_config.sequence_bias == {(40,): 50.0}


ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
    "mistral, a window": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "gemma3, windows": (Gemma3TextConfig, Gemma3ForCausalLM, {"sliding_window": 8, "head_dim": 8}),
    "mamba, a state": (MambaConfig, MambaForCausalLM, {}),
}


@pytest.mark.parametrize(
    "sampling", [Sampling(40), Sampling(40, temperature=1.0, top_p=0.9)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_rows_that_leave_the_batch_leave_the_others_as_they_are(family, sampling):
    """Rows end at lengths of their own, by a token or a limit: each completion is the one that it is alone."""
    config_class, model_class, more = ARCHITECTURES[family]
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 32, "num_key_value_heads": 2, "n_positions": 128, "initializer_range": 0.5}
    model = model_class(config_class(**shape, eos_token_id=None, bos_token_id=None, **more)).eval()
    # A few end tokens, so that rows end at different lengths; one in thirty.
    model.generation_config.eos_token_id = list(range(20, 24))
    prompts = [prompt_ids("1+1=" * (1 + row % 3), tokenizer) for row in range(12)]
    limits = [3, 40, 17, 40, 40, 40, 9, 40, 40, 25, 40, 40]
    seeds = list(range(12))
    together = generate_batch(model, tokenizer, prompts, seeds, sampling, limits)
    dropped = generate_batch(model, tokenizer, prompts, seeds, sampling, limits, drop_ended=True)
    alone = [
        generate_batch(model, tokenizer, [prompt], [seed], sampling, [limit])[0]
        for prompt, seed, limit in zip(prompts, seeds, limits, strict=True)
    ]
    assert dropped == together == alone
    assert [each.tokens <= limit for each, limit in zip(dropped, limits, strict=True)] == [True] * 12
    assert dropped[0].truncated == (dropped[0].tokens == 3 and dropped[0].ids[-1] not in range(20, 24))
    assert len({each.tokens for each in dropped}) > 1


def test_rows_that_have_ended_are_computed_no_more(tiny, monkeypatch):
    model, tokenizer = tiny
    sizes = []
    monkeypatch.setattr(
        model,
        "forward",
        lambda *args, forward=model.forward, **kw: (sizes.append(len(kw["input_ids"])), forward(*args, **kw))[1],
    )
    limits = [1, 2, 3, 4, 5, 6, 7, 8]
    batch = generate_batch(
        model, tokenizer, [tokenizer("1+1=")["input_ids"]] * 8, range(8), Sampling(8), limits, drop_ended=True
    )
    assert [each.tokens for each in batch] == limits and sizes == [8, 7, 6, 5, 4, 3, 2, 1]


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

    def small_memory(model, tokenizer, prompts, seeds, sampling, limits, drop_ended):
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
