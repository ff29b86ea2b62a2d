"""
What trl_bridge relies on in TRL, transformers, PEFT and accelerate. A failure here says what changed upstream.

A renamed parent method turns an override into dead code without a word; these tests are where that is heard.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import requests
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM, Trainer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler, add_fused_lm_head

import trl_bridge
from tests.helpers.contract import place_of, readers_of, source_of
from tests.helpers.training import small_config, small_model, small_trainer
from trl_bridge import BridgeTrainer, ExpertTrainer
from trl_bridge._upstream import (
    SERVER_GONE,
    attend_in_segments,
    isolated_bookkeeping,
    linear_layers_only,
    policy_term_only,
    scored_by,
    set_up_again,
)
from trl_bridge.contract.names import OWN_ATTRIBUTES, OWN_NAMES
from trl_bridge.contract.tables import ASSIGNED, ATTRIBUTES, CALLED, OVERRIDDEN
from trl_bridge.methods.catalogue import METHODS
from trl_bridge.methods.two_stage import _ColdStart, _Reinforcement
from trl_bridge.training.checkpoint.resume import BufferResumable, Resumable, ResumableTrainer, Sealed
from trl_bridge.training.packed_trainer import PackedTrainer
from trl_bridge.training.policy import PolicyLoss
from trl_bridge.training.shaping import ShapedTrainer
from trl_bridge.training.stream import DemonstrationTrainer
from trl_bridge.training.student import StudentTrainer
from trl_bridge.training.trial import TrialTrainer


BASES = (
    Sealed,
    Resumable,
    BufferResumable,
    ResumableTrainer,
    PackedTrainer,
    StudentTrainer,
    TrialTrainer,
    DemonstrationTrainer,
    ExpertTrainer,
    ShapedTrainer,
)
# Of the catalogue; two stages are no trainer of transformers, but run two.
LEAVES = [
    cls
    for cls in (pkgutil.resolve_name(method.trainer) for method in METHODS.values())
    if cls.__module__.startswith("trl_bridge.") and issubclass(cls, Trainer)
]
OURS = (*BASES, *LEAVES, _ColdStart, _Reinforcement)

ROOMS = ("training", "methods")

SIGNATURES = OVERRIDDEN | CALLED
READ = ATTRIBUTES["trl.GRPOTrainer"].split()


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    return small_trainer(folder, GRPOTrainer, args=small_config(folder, GRPOConfig))


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    return small_trainer(tmp_path_factory.mktemp("bridge"))


# Signatures and names


def _without_annotations(function):
    parameters = inspect.signature(function).parameters.values()
    bare = (str(p.replace(annotation=inspect.Parameter.empty)).replace(" = ", "=") for p in parameters)
    return f"({', '.join(bare)})"


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    method = name.rpartition(".")[2]
    ours = [place_of(vars(cls)[method]) for cls in OURS if inspect.isfunction(vars(cls).get(method))]
    found = _without_annotations(pkgutil.resolve_name(name))
    assert found == SIGNATURES[name], f"overridden in {ours}" if ours else readers_of(method)


def _takes_only_what_is_named(function):
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return not any(p.kind in variable for p in inspect.signature(function).parameters.values())


@pytest.mark.parametrize("name", CALLED)
def test_what_may_grow_is_what_ours_would_take(name):
    owner, method = name.rpartition(".")[::2]
    parent = pkgutil.resolve_name(owner)
    extending = [
        vars(cls)[method] for cls in OURS if inspect.isfunction(vars(cls).get(method)) and parent in cls.__mro__
    ]
    assert method == "__init__" or not any(map(_takes_only_what_is_named, extending))


def _subclasses(cls):
    rooms = tuple(f"trl_bridge.{room}" for room in ROOMS)
    for module in pkgutil.walk_packages(trl_bridge.__path__, "trl_bridge."):
        # DeepSpeed is an extra; no trainer is defined beside it.
        if module.name.startswith(rooms) and not module.name.endswith(("__main__", "backends.zero")):
            importlib.import_module(module.name)
    found, waiting = set(), [cls]
    while waiting:
        for sub in waiting.pop().__subclasses__():
            if sub.__module__.startswith("trl_bridge.") and sub not in found:
                found.add(sub)
                waiting.append(sub)
    return found


def _parent(cls):
    """The class upstream that a trainer stands on first."""
    return next(base for base in cls.__mro__ if not base.__module__.startswith("trl_bridge."))


def test_all_trainers_are_looked_at():
    found = _subclasses(Trainer)
    rooms = {cls for cls in found if cls.__module__.split(".")[1] in ROOMS}
    assert rooms == set(OURS)


def _defined(cls):
    python = {name for name in vars(cls) if name.startswith("__") and name != "__init__"}
    return set(vars(cls)) - python - {"_abc_impl"}


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_names_are_the_parents_or_our_own(cls):
    unknown = {name for name in _defined(cls) if not hasattr(_parent(cls), name)} - OWN_NAMES
    # A method may have helpers of its own: what its class itself calls.
    if cls in LEAVES:
        unknown -= set(re.findall(r"\bself\.(\w+)", source_of(cls)))
    assert not unknown, f"{unknown}: overrides of nothing? If they are new, add them to OWN_NAMES"


def test_own_names_are_used_and_are_not_the_parents(grpo):
    defined = set().union(*map(_defined, OURS))
    assert OWN_NAMES <= defined, f"stale: {OWN_NAMES - defined}"
    taken = {name for name in OWN_NAMES | OWN_ATTRIBUTES if hasattr(grpo, name)}
    assert not taken, f"the parent now has {taken} too"


def test_own_attributes(grpo, bridge):
    new = set(vars(bridge)) - set(vars(grpo))
    # A patched or wrapped method is no attribute of ours.
    assert new <= OWN_ATTRIBUTES, new - OWN_ATTRIBUTES
    assert OWN_ATTRIBUTES - new <= {"_train_sampler"}  # set once training asks for it


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_overrides_take_what_the_parent_takes(cls):
    for name in _defined(cls):
        ours, theirs = inspect.unwrap(vars(cls)[name]), getattr(_parent(cls), name, None)
        if not inspect.isfunction(ours) or not inspect.isfunction(theirs):
            continue
        taken = inspect.signature(ours).parameters
        kinds = {p.kind for p in taken.values()}
        if kinds >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            continue
        # Upstream never calls a constructor: our own do, by keyword.
        if cls in BASES and name == "__init__" and inspect.Parameter.VAR_KEYWORD in kinds:
            continue
        missing = set(inspect.signature(theirs).parameters) - set(taken)
        assert not missing, f"{cls.__name__}.{name} does not take {missing}"


def _super_calls(cls):
    tree = ast.parse(source_of(cls))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
            if getattr(node.value.func, "id", "") == "super":
                yield node.attr


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_overrides_and_super_calls_are_in_the_table(cls):
    methods = {name for name in _defined(cls) if inspect.isfunction(getattr(_parent(cls), name, None))}
    used = methods | {name for name in _super_calls(cls) if name not in OWN_NAMES}
    missing = used - {name.rpartition(".")[2] for name in SIGNATURES}
    assert not missing, missing


# What an instance has


@pytest.mark.parametrize("name", READ)
def test_attribute_that_we_read(grpo, name):
    assert hasattr(grpo, name), readers_of(name)


def test_loss_is_scaled_by_the_trainer_itself():
    assert GRPOTrainer.loss_is_scaled_for_ga is True, place_of(DemonstrationTrainer.compute_loss)


def test_loss_sets_only_what_isolation_puts_back():
    for name in ASSIGNED["trl.GRPOTrainer._compute_loss"]:
        assert f'"{name}"' in source_of(isolated_bookkeeping)


def test_isolation_puts_everything_back(grpo):
    kept = {name: getattr(grpo, name) for name in READ}
    grpo._metrics["train"]["kept"].append(1.0)
    with isolated_bookkeeping(grpo, (0.5, 0.25)):
        assert (grpo.entropy_coef, grpo._last_world_entropy) == (0.5, 0.25)
        grpo._metrics["train"]["kept"].append(2.0)
        grpo._pending_extra_logs["column"].append("value")
        grpo._pending_metrics["metric"].append(1.0)
        grpo._entropy_window_stats = torch.ones(2)
    assert grpo._metrics["train"].pop("kept") == [1.0]
    assert not grpo._pending_extra_logs and not grpo._pending_metrics
    assert all(getattr(grpo, name) is value for name, value in kept.items())


def test_loss_asks_once_for_scores_and_reads_the_model_nowhere_else():
    # Scores that are given stand for the forward, whatever the model.
    tree = ast.parse(source_of(GRPOTrainer._compute_loss))
    asked = [n for n in ast.walk(tree) if getattr(n, "attr", "") == "_get_per_token_logps_and_entropies"]
    read = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "model"]
    assert len(asked) == len(read) == 1, place_of(PolicyLoss.loss_of)


def test_scores_from_elsewhere_reach_the_loss_only_inside(grpo):
    own = grpo._get_per_token_logps_and_entropies
    with scored_by(grpo, lambda *args, **kwargs: "given"):
        assert grpo._get_per_token_logps_and_entropies() == "given"
    assert grpo._get_per_token_logps_and_entropies == own


def test_terms_that_the_gain_leaves_out_are_those_that_the_loss_reads():
    for name in ("beta", "_entropy_bonus_enabled", "aux_loss_enabled"):
        assert f'"{name}"' in source_of(policy_term_only)


def test_all_linear_of_a_mixture_of_experts_is_converted_by_one_function():
    # Where PEFT no longer converts, or by another function, `linear_layers_only` does nothing, and may go.
    config = MixtralConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=9,
    )

    def targets():
        model = LoraModel(MixtralForCausalLM(config), lora := LoraConfig(target_modules="all-linear"), "default")
        return {type(m).__name__ for m in model.modules() if isinstance(m, LoraLayer)}, lora.target_parameters

    kinds, parameters = targets()
    assert "ParamWrapper" in kinds and parameters, place_of(linear_layers_only)
    with linear_layers_only():
        assert targets() == ({"Linear"}, None)
    assert targets()[1] == parameters


# Rollouts and scores

BATCH = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"}


def _generated(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    return trainer._generate_and_score_completions([{"prompt": "1+1="} for _ in range(16)])


@pytest.mark.parametrize(
    ("options", "more"),
    [({}, set()), ({"num_iterations": 2}, {"old_per_token_logps"})],
    ids=["plain", "iterations"],
)
def test_keys_of_a_generation_batch(tmp_path, options, more):
    trainer = small_trainer(tmp_path, GRPOTrainer, args=small_config(tmp_path, GRPOConfig, **options))
    batch = _generated(trainer)
    missing = (BATCH | more) - batch.keys()
    assert not missing, {name: readers_of(name) for name in missing}
    assert ("old_per_token_logps" in batch) == bool(more)  # its absence says that the ratio is one
    assert batch["advantages"].shape == (16,) and batch["completion_ids"].shape == batch["completion_mask"].shape


def test_scores_are_three(grpo):
    batch = _generated(grpo)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    scores = grpo._get_per_token_logps_and_entropies(grpo.model, ids, mask, length, compute_entropy=True)
    assert isinstance(scores, tuple) and len(scores) == 3
    assert scores[0].shape == scores[1].shape == batch["completion_ids"].shape and scores[2] is None


# The fused head


def test_fields_of_the_fused_output():
    assert {"log_probs", "entropy", "label_mask", "is_top1", "aux_loss"} <= set(
        FusedCausalLMOutput.__dataclass_fields__
    )


def test_fused_head_is_set_on_the_instance_and_divides_by_the_temperature():
    model = small_model()
    assert "forward" not in vars(model)
    add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy", "is_top1"))
    assert "forward" in vars(model)
    ids = torch.arange(3, 11).reshape(2, 4)
    outputs = model(input_ids=ids, labels=ids, fused_lm_head=True)
    with torch.no_grad():
        log_p = (small_model()(ids).logits[:, :-1] / 0.5).log_softmax(-1)
    want = log_p.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    assert torch.allclose(outputs.log_probs, want, atol=1e-5)
    assert outputs.label_mask.all() and outputs.is_top1.shape == want.shape
    assert model(input_ids=ids, labels=ids).logits.shape == (2, 4, model.config.vocab_size)


def test_autocast_wrapper_is_set_on_the_instance(tmp_path):
    trainer = small_trainer(tmp_path, GRPOTrainer, args=small_config(tmp_path, GRPOConfig, bf16=True))
    trainer.accelerator.prepare_model(trainer.model)
    assert "_original_forward" in vars(trainer.model)


# The order of things in transformers


def test_sampler_draws_each_epoch_from_one_generator():
    def sampler():
        return RepeatSampler(list(range(6)), mini_repeat_count=1, seed=3)

    straight = sampler()
    first, second = list(straight), list(straight)
    assert first != second and straight.shuffle and straight.num_samples == 6
    skipping = sampler()
    torch.randperm(skipping.num_samples, generator=skipping.generator)
    assert list(skipping) == second


def test_name_of_a_checkpoint():
    assert f"{PREFIX_CHECKPOINT_DIR}-" == "checkpoint-", readers_of("PREFIX_CHECKPOINT_DIR")


# Lightning OPD


# The model card


def test_model_card(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.create_model_card(model_name="mine")
    card = next(Path(trainer.args.output_dir).glob("README.md")).read_text()
    assert "This model was trained with BRIDGE" in card
    for text in (BridgeTrainer._paper["title"], BridgeTrainer._paper["id"], "chen2026bridge", "- bridge", "- trl"):
        assert text in card, text


def test_arguments_that_look_for_their_device_make_accelerate_forget(tmp_path):
    args = small_config(tmp_path, GRPOConfig)
    Accelerator(cpu=True)
    assert AcceleratorState._shared_state
    set_up_again(args)
    assert not AcceleratorState._shared_state
    assert args.process_index == 0


# Packed passes


def test_head_on_labels_only_is_decided_by_one_name():
    # The kernel has the name from its own module, where it stays what it was.
    assert chunked_logprob._use_triton is not None and "_use_triton" in vars(trl_utils)


def test_a_mask_of_four_dimensions_is_taken_as_it_is():
    config = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=9)
    config._attn_implementation = "sdpa"
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for create in (create_causal_mask, create_sliding_window_causal_mask):
        config.sliding_window = 4
        made = create(config, torch.zeros(1, 6, 8), mask, past_key_values=None, position_ids=torch.arange(6)[None])
        assert made is mask


def test_attention_is_asked_for_by_name_and_with_the_forwards_keywords():
    attend_in_segments()
    seen = []

    class Seen:
        def attend(self, attention, module, query, key, value, **kwargs):
            seen.append(kwargs.get("scaling"))
            return attention(module, query, key, value, None, **kwargs)

    model = small_model()
    ids = torch.arange(6)[None]
    plain = model(ids).logits
    assert torch.equal(model(ids, packed_segments=Seen()).logits, plain)
    assert len(seen) == model.config.num_hidden_layers and None not in seen


def test_a_dead_rollout_enters_the_loss_by_its_advantage_only():
    source = source_of(GRPOTrainer._compute_loss)
    terms = ("-clamped_ratios * advantages", "coef_1 * advantages", "coef_2 * advantages", "-soft_coef_1 * advantages")
    assert all(term in source for term in (*terms, "-phi_seq * advantages"))
    # What is added to them: the KL, the entropy bonus and the experts' load, with each of which every rollout is run.
    added = re.findall(r"loss = (?:per_token_loss|loss) [+-] (.+)", source)
    assert added == [
        "self.beta * per_token_kl",
        "apply_coef * entropy_loss",
        "self.router_aux_loss_coef * aux_loss / normalizer",
    ]


def test_a_server_that_is_gone_raises_what_is_caught():
    assert SERVER_GONE is requests.ConnectionError
