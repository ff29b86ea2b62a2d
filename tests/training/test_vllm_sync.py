"""What TRL's own code hands to vLLM, colocate and server: the policy, tensor by tensor. The engine and the client record."""

import types

import pytest
import requests
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from tests.helpers import engines
from tests.helpers.groups import group_trainer
from tests.helpers.streams import make
from tests.helpers.training import adapters, small_model, small_trainer
from trl_bridge import BridgeTrainer, LUFFYTrainer, NaiveMixTrainer


class Generation(VLLMGeneration):
    """TRL's own, which builds the engine and pushes the weights; only sampling needs a stand-in."""

    generate = engines.Engine.generate


class Colocated:
    """Stands in for `vllm.LLM`: keeps what it is built with and what is loaded into it."""

    def __init__(self, **options):
        self.options, self.pushes, self._open = options, [], []
        runner = types.SimpleNamespace(model=types.SimpleNamespace(load_weights=self._load))
        executor = types.SimpleNamespace(driver_worker=types.SimpleNamespace(model_runner=runner))
        self.llm_engine = types.SimpleNamespace(model_executor=executor)
        events.append("vLLM's share")

    def _load(self, pairs):
        if not self._open:
            events.append("weights pushed")
        self._open += [(name, weight.detach().clone()) for name, weight in pairs]

    def reset_prefix_cache(self):
        # TRL's last call of a push.
        self.pushes.append(self._open)
        self._open = []


events: list[str] = []


@pytest.fixture(params=["colocate", "server"])
def vllm(request, monkeypatch):
    """Options of a run with the stand-ins, and the function that returns what was pushed."""
    events.clear()
    engines.serve(monkeypatch.setattr)
    monkeypatch.setattr(vllm_generation, "LLM", Colocated, raising=False)
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Generation)
    # Colocate mode sets them for vLLM; here they would reach later tests.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    engine = "llm" if request.param == "colocate" else "vllm_client"
    options = {"use_vllm": True, "vllm_mode": request.param, "max_steps": 2, "learning_rate": 1e-2}
    return options, lambda trainer: getattr(trainer.vllm_generation, engine).pushes


class Policies(TrainerCallback):
    """The policy before the first update and after each, under the plain model's names."""

    def __init__(self, policy):
        self.policy, self.seen = policy, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append(self.policy())

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.policy())


def trained_with_policies(trainer, policy):
    callback = Policies(policy)
    trainer.add_callback(callback)
    trainer.train()
    return callback.seen


def assert_pushed(pushes, policies, rtol=0.0, atol=0.0):
    """Each generation was given the policy of its update: every weight once, under the plain model's name, and no other."""
    names = [name for name, _ in small_model().named_parameters()]
    assert len(pushes) == len(policies) - 1 == 2
    for push, policy in zip(pushes, policies, strict=False):
        assert [name for name, _ in push] == names
        for name, weight in push:
            torch.testing.assert_close(weight, policy[name], rtol=rtol, atol=atol)
    changed = [not torch.equal(x, y) for (_, x), (_, y) in zip(pushes[0], pushes[-1], strict=True)]
    assert all(changed), "a weight that stays as it was shows nothing"


def plain(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def theta_plus_w(trainer):
    """theta + s B A from the parts that users read, in float64; s is 1 here."""
    policy = {name: weight.double() for name, weight in trainer.theta_state_dict().items()}
    a, b = adapters(trainer.coordinator_state_dict())
    for name in a:
        policy[name] = policy[name] + b[name].double() @ a[name].double()
    return {name: weight.float() for name, weight in policy.items()}


def merged_adapter(trainer):
    """The base's weights plus scale x B A, from PEFT's own tensors."""
    state = {name.removeprefix("base_model.model."): w.detach() for name, w in trainer.model.named_parameters()}
    policy = {name.replace(".base_layer", ""): w.clone() for name, w in state.items() if "lora_" not in name}
    for name, a in state.items():
        if "lora_A" in name:
            b = state[name.replace("lora_A", "lora_B")]
            policy[name.replace(".lora_A.default", "")] += 2.0 * b @ a
    return policy


def test_bridge_pushes_theta_plus_w(tmp_path, vllm):
    options, pushes = vllm
    trainer = small_trainer(tmp_path, BridgeTrainer, **options)
    start = theta_plus_w(trainer)
    policies = trained_with_policies(trainer, lambda: (plain(trainer), theta_plus_w(trainer)))
    assert_pushed(pushes(trainer), [merged for merged, _ in policies])
    assert_pushed(pushes(trainer), [parts for _, parts in policies], rtol=1e-5, atol=1e-6)
    # Neither theta nor the shadow is what was pushed.
    last = dict(pushes(trainer)[-1])
    name = "model.layers.0.self_attn.q_proj.weight"
    for other in (start, trainer.theta_state_dict(), trainer.shadow_state_dict()):
        assert (last[name] - other[name]).abs().max() > 1e-3


STREAM = (NaiveMixTrainer, make)
GROUP = (LUFFYTrainer, lambda trainer_class, folder, **changes: group_trainer(folder, trainer_class, **changes))


@pytest.mark.parametrize("method", [STREAM, GROUP], ids=["stream", "group"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_baselines_push_their_policy(tmp_path, vllm, method, adapter):
    options, pushes = vllm
    trainer_class, build = method
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    trainer = build(trainer_class, tmp_path, peft_config=lora if adapter else None, **options)
    policies = trained_with_policies(trainer, lambda: (merged_adapter if adapter else plain)(trainer))
    if not adapter:
        assert_pushed(pushes(trainer), policies)
        return
    # Embeddings, norms and head are not trained, and are pushed as they are.
    untrained = [n for n, _ in small_model().named_parameters() if not n.endswith("_proj.weight")]
    assert all(torch.equal(dict(pushes(trainer)[-1])[name], policies[0][name]) for name in untrained)
    for push, policy in zip(pushes(trainer), policies, strict=False):
        assert [name for name, _ in push] == [name for name, _ in small_model().named_parameters()]
        for name, weight in push:
            torch.testing.assert_close(weight, policy[name], rtol=1e-4, atol=1e-5)
    first, last = (dict(pushes(trainer)[index]) for index in (0, -1))
    assert not torch.equal(
        first["model.layers.0.self_attn.q_proj.weight"], last["model.layers.0.self_attn.q_proj.weight"]
    )


def test_vllm_takes_its_share_before_the_shadow_is_there(tmp_path, vllm):
    """The order that docs/distributed.md states."""
    options, _ = vllm
    if options["vllm_mode"] == "server":
        return

    class Ordered(BridgeTrainer):
        def _build_coordinator(self, peft_config):
            events.append("coordinator")
            return super()._build_coordinator(peft_config)

        def _build_shadow(self):
            assert not self.optimizer.state, "the student's optimizer has no state before its first step"
            events.append("shadow")
            return super()._build_shadow()

    trainer = small_trainer(tmp_path, Ordered, vllm_gpu_memory_utilization=0.25, **options)
    assert events == ["vLLM's share", "coordinator"] and trainer.shadow is None
    assert trainer.vllm_generation.llm.options["gpu_memory_utilization"] == 0.25
    trainer.train()
    assert events[:4] == ["vLLM's share", "coordinator", "shadow", "weights pushed"]


def test_a_server_that_goes_away_is_named_and_nothing_is_lost(tmp_path, vllm):
    options, _ = vllm
    if options["vllm_mode"] == "colocate":
        return
    saving = {**options, "save_strategy": "steps", "save_steps": 1}
    trainer = small_trainer(tmp_path, BridgeTrainer, **saving)
    generate, asked = trainer.vllm_generation.generate, []

    def goes_away(*args, **kwargs):
        asked.append(kwargs)
        if len(asked) > 1:
            sent = requests.Request("POST", "http://there:8000/v1/completions").prepare()
            raise requests.ConnectionError("refused", request=sent)
        return generate(*args, **kwargs)

    trainer.vllm_generation.generate = goes_away
    with pytest.raises(
        ConnectionError, match=r"http://there:8000/.* does not answer any more\..*from .*checkpoint-1\."
    ):
        trainer.train()
    resumed = small_trainer(tmp_path, BridgeTrainer, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
