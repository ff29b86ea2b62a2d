"""vLLM itself under TRL's generation: small models that its CPU kernels take, one engine for many runs, each sync looked at."""

import contextlib
import copy
import importlib.util
import os
import pkgutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from tests.helpers.distillation import distillation_config
from tests.helpers.groups import group_trainer, hint_rows
from tests.helpers.streams import make
from tests.helpers.training import digits_reward, rl_rows, sft_rows, small_config, small_lora, small_trainer
from trl_bridge.methods.catalogue import METHODS
from trl_bridge.models import tiny_model, tiny_tokenizer


NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm`"),
]

TOLERANCE = 1e-5  # nats
# Now and then a token is where a layer's sums all but cancel: up to 5e-5 off a float64 forward, beside neighbours at 1e-7.
# Weights of the update before are off by 1e-2.
ROUNDING = 3e-4


def save_model(folder, tied=False, seed=3):
    """A model with an opinion, so that stale weights show in its log-probabilities, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, hidden_size=64, heads=2, layers=2, seed=seed, tie_word_embeddings=tied)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# Runs of every method


VLLM = {
    "use_vllm": True,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "max_completion_length": 10,
    "model_init_kwargs": {"dtype": "float32"},
}
SERVER = {**VLLM, "vllm_mode": "server", "vllm_server_timeout": 60.0}
COLOCATE = {**VLLM, "vllm_mode": "colocate", "vllm_dtype": "float32", "vllm_max_model_length": 400}

_CHANGES = {
    "bridge": {},
    "bridge-default-coordinator": {"peft_config": None},
    "bridge-selective": {"preset": "selective"},
    "bridge-lean": {"lean": True},
    "bridge-overlap": {"shadow_overlap": True},
    "bridge-lean-overlap": {"lean": True, "shadow_overlap": True},
    "alternating": {"first": "rl", "rl_steps": 1, "sft_steps": 1},
    "uft": {"hint_steps": 4},
    "hpt": {"gate": 1, "gate_off": 2},
    "actguide": {"train_dataset": hint_rows(steps=True), "hard_threshold": 1.0, "expert_max_length": 20},
}
LORA = ["grpo-lora", "chord-lora", "luffy-lora", "opd-lora"]
CASES = [*_CHANGES, *(n for n, m in METHODS.items() if m.family in ("stream", "group") and n not in _CHANGES)]
CASES += ["grpo", "opd", "aopd", *LORA]  # of the others one has no rollouts, and the other is TRL's SFT
SERVED_ALONE = ["bridge-overlap", "bridge-lean-overlap"]
# A tied head that is as sharp makes the rollouts of a group alike: these have demonstrations to move by.
TIED = ["bridge", "bridge-default-coordinator", "bridge-selective", "bridge-lean", "uft", "hpt"]


def build(case, folder, model, **options):
    """A trainer of a method, or of a variant of it, on a model that is on disk."""
    name = case.split("-lora")[0] if case in LORA else "bridge" if case.startswith("bridge") else case
    trainer_class = pkgutil.resolve_name(METHODS[name].trainer)
    changes = {**_CHANGES.get(case, {}), **options}
    if case in LORA:
        changes["peft_config"] = small_lora()
    if name == "bridge":
        return small_trainer(folder, trainer_class, model=model, **changes)
    if name in ("opd", "aopd"):
        return _distillation(folder, trainer_class, model, **changes)
    if METHODS[name].family == "group":
        return group_trainer(folder, trainer_class, model=model, **{"train_dataset": hint_rows(), **changes})
    if name == "two-stage":
        return _two_stage(folder, trainer_class, model, **changes)
    return make(trainer_class, folder, model=model, **changes)


def _two_stage(folder, trainer_class, model, **changes):
    return trainer_class(
        model=model,
        reward_funcs=digits_reward,
        args=small_config(folder, pkgutil.resolve_name(METHODS["two-stage"].config), sft_max_steps=1, **changes),
        train_dataset=rl_rows(),
        sft_dataset=sft_rows(),
        processing_class=tiny_tokenizer(),
    )


def _distillation(folder, trainer_class, model, peft_config=None, teacher_model=None, **changes):
    teacher = teacher_model
    if teacher is None and "teacher_model_server_url" not in changes:
        teacher = tiny_model(tiny_tokenizer(), hidden_size=48, layers=2, seed=5)
    return trainer_class(
        model=model,
        teacher_model=teacher,
        args=distillation_config(folder, trainer_class.config_class, **changes),
        train_dataset=rl_rows(),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


# What the engine holds


def policy_of(trainer):
    """The policy's weights under the plain model's names, each under every name that it has."""
    plain = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(plain, "merge_and_unload"):
        # Of tensors alone: TRL's forwards are bound to the model that they were made for.
        plain = copy.deepcopy(plain).merge_and_unload()
    return {name: w.detach().clone() for name, w in plain.named_parameters(remove_duplicate=False)}


_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def weights_of(llm):
    """The engine's own tensors."""
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def largest_difference(engine, policy):
    """Between an engine's weights and a policy's, each of which must have its counterpart."""
    differences, seen = [], set()
    for name, weight in engine.items():
        fused = next((key for key in _FUSED if key in name), None)
        parts = [name.replace(fused, part) for part in _FUSED[fused]] if fused else [name]
        want = torch.cat([policy[part] for part in parts])
        seen |= set(parts)
        # vLLM pads the vocabulary.
        differences.append(float((weight[: len(want)] - want).abs().max()))
    left = set(policy) - seen
    assert all(torch.equal(policy[n], policy["model.embed_tokens.weight"]) for n in left), left
    return max(differences)


def log_probs(trainer, prompts, completions):
    """The policy's log-probabilities of each completion token, by a forward of its own."""
    plain = trainer.accelerator.unwrap_model(trainer.model)
    found, was_training = [], plain.training
    plain.eval()
    with torch.no_grad():
        for prompt, completion in zip(prompts, completions, strict=True):
            logits = plain(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
            chosen = torch.tensor(completion).unsqueeze(1)
            found.append(logits.log_softmax(-1).gather(1, chosen).squeeze(1).tolist())
    plain.train(was_training)
    return found


SEQUENCE = list(range(3, 40, 2))


class Watched:
    """TRL's own syncs and generations, each of which is compared with the policy right after it."""

    def __init__(self, monkeypatch):
        self._trained = None
        self.syncs, self.weights, self.log_probs, self.changes = 0, [], [], []
        self._held = None
        sync, generate = VLLMGeneration.sync_weights, VLLMGeneration.generate

        def watched_sync(generation):
            served = generation.mode == "server"
            if served and self.syncs:
                self.changes.append(max(self._off_the_server(generation.vllm_client)))
            sync(generation)
            self.syncs += 1
            if served:
                self.log_probs.append(_most(self._off_the_server(generation.vllm_client)))
            else:
                held = weights_of(generation.llm)
                self.weights.append(largest_difference(held, policy_of(self.trainer)))
                if self._held is not None:
                    self.changes.append(max(float((held[n] - self._held[n]).abs().max()) for n in held))
                self._held = held

        def watched_generate(generation, prompts, *args, **kwargs):
            found = generate(generation, prompts, *args, **kwargs)
            ids, completions, scores = found[:3]
            if scores is not None and not _is_a_stand_in(scores):
                self._compare(ids, completions, scores)
            return found

        monkeypatch.setattr(VLLMGeneration, "sync_weights", watched_sync)
        monkeypatch.setattr(VLLMGeneration, "generate", watched_generate)

    @property
    def trainer(self):
        """The trainer whose policy is sampled from; of two stages the second."""
        return getattr(self._trained, "_second", self._trained)

    def _off_the_server(self, client):
        """How far the server is off the policy on one sequence."""
        found = client.get_sequence_logprobs([SEQUENCE], [1], top_logprobs=1)["actual_logprobs"][0]
        own = log_probs(self.trainer, [SEQUENCE[:1]], [SEQUENCE[1:]])[0]
        return [abs(a - b) for (a,), b in zip(found, own, strict=True)]

    def _compare(self, ids, completions, scores):
        own = log_probs(self.trainer, ids, completions)
        pairs = ((a[0], b) for one, two in zip(scores, own, strict=True) for a, b in zip(one, two, strict=True))
        self.log_probs.append(_most(abs(a - b) for a, b in pairs))

    def run(self, trainer, **train):
        """Train, and hold every sync and every generation to the policy."""
        self._trained = trainer
        if not hasattr(trainer, "_second"):
            trainer.vllm_generation.logprobs = 0  # distillation asks for none
        trainer.train(**train)
        assert self.syncs and len(self.log_probs) >= self.syncs
        assert max(self.log_probs) < TOLERANCE, self.log_probs
        assert max(self.weights, default=0) < 1e-6, self.weights
        assert min(self.changes) > 1e-3, "a policy that stays as it was shows nothing"


def _most(differences):
    """What nine tokens of ten are within; none is beyond rounding."""
    ordered = sorted(differences)
    assert ordered[-1] < ROUNDING
    return ordered[len(ordered) * 9 // 10 - 1]


def _is_a_stand_in(scores):
    """What `shadow_overlap` hands to TRL while the server works."""
    return all(row == [[0.0]] for row in scores)


class SharedEngines:
    """Engines by what they are built with: TRL builds one for each trainer, which takes longer than its run."""

    def __init__(self):
        self._built, self._build = {}, vllm_generation.LLM

    def __call__(self, **options):
        key = (options["model"], options.get("dtype"))
        if key not in self._built:
            # Without a compiler's half minute.
            self._built[key] = self._build(**options, enforce_eager=True)
        return self._built[key]


# A server


@contextlib.contextmanager
def server(model, log, port=None):
    """The process and the URL of a vLLM server."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    # Not `vllm serve`, whose console script does not start from the CPU build (it asks for a package named `vllm`).
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "400", "--enforce-eager"]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "32"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(process, url, log)
        yield process, url
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(process, url, log, seconds=400):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, open(log).read()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(1)
    raise AssertionError(f"the server is not up after {seconds} seconds: {open(log).read()[-3000:]}")
