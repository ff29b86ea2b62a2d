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
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM, Trainer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer, SFTTrainer
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler, add_fused_lm_head

import trl_bridge
from tests.helpers.contract import OWN_ATTRIBUTES, OWN_NAMES, assert_in_order, place_of, readers_of, source_of
from tests.helpers.training import small_config, small_model, small_trainer
from trl_bridge import BridgeTrainer, ExpertTrainer, LightningOPDTrainer
from trl_bridge._upstream import (
    attend_in_segments,
    isolated_bookkeeping,
    linear_layers_only,
    policy_term_only,
    scored_by,
    set_up_again,
)
from trl_bridge.methods.catalogue import METHODS
from trl_bridge.methods.two_stage import _ColdStart, _Reinforcement
from trl_bridge.training.checkpoint.resume import BufferResumable, Resumable, ResumableTrainer, Sealed
from trl_bridge.training.demonstrations import Demonstrations
from trl_bridge.training.packed_trainer import PackedTrainer
from trl_bridge.training.policy import PolicyLoss
from trl_bridge.training.shaping import ShapedTrainer
from trl_bridge.training.stream import DemonstrationTrainer
from trl_bridge.training.student import StudentTrainer


BASES = (
    Sealed,
    Resumable,
    BufferResumable,
    ResumableTrainer,
    PackedTrainer,
    StudentTrainer,
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

# Parameters and defaults of what is overridden or called, without annotations.
SIGNATURES = {
    "trl.GRPOTrainer.__init__": "(self, model, reward_funcs=None, args=None, train_dataset=None, eval_dataset=None, processing_class=None, reward_processing_classes=None, callbacks=None, optimizers=(None, None), quantization_config=None, peft_config=None, tools=None, rollout_func=None, environment_factory=None)",
    "trl.GRPOTrainer.compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "trl.GRPOTrainer._compute_loss": "(self, model, inputs)",
    "trl.GRPOTrainer.training_step": "(self, model, inputs, num_items_in_batch)",
    "trl.GRPOTrainer._prepare_inputs": "(self, generation_batch)",
    "trl.GRPOTrainer._generate_and_score_completions": "(self, inputs)",
    "trl.GRPOTrainer._generate": "(self, prompts)",
    "trl.GRPOTrainer._generate_single_turn": "(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False)",
    "trl.GRPOTrainer._calculate_rewards": "(self, inputs, prompts, completions, completion_ids_list)",
    "trl.GRPOTrainer._get_per_token_logps_and_entropies": "(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, compute_aux_loss=False, pixel_values=None, image_grid_thw=None, num_images=None, pixel_attention_mask=None, spatial_shapes=None, num_tiles=None, image_sizes=None, token_type_ids=None, mm_token_type_ids=None, image_position_ids=None)",
    "trl.GRPOTrainer._get_train_sampler": "(self, dataset=None)",
    "trl.GRPOTrainer._save_checkpoint": "(self, model, trial)",
    "trl.GRPOTrainer._load_optimizer_and_scheduler": "(self, checkpoint)",
    "trl.GRPOTrainer.create_model_card": "(self, model_name=None, dataset_name=None, tags=None)",
    "trl.GRPOTrainer.log": "(self, logs, start_time=None)",
    "trl.SFTTrainer.__init__": "(self, model, args=None, data_collator=None, train_dataset=None, eval_dataset=None, processing_class=None, compute_loss_func=None, compute_metrics=None, callbacks=None, optimizers=(None, None), optimizer_cls_and_kwargs=None, preprocess_logits_for_metrics=None, quantization_config=None, peft_config=None, formatting_func=None)",
    "trl.SFTTrainer.compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "trl.SFTTrainer._prepare_dataset": "(self, dataset, processing_class, args, packing, formatting_func, dataset_name)",
    "trl.SFTTrainer._set_signature_columns_if_needed": "(self)",
    "transformers.Trainer._get_num_items_in_batch": "(self, batch_samples, device)",
    "trl.DistillationTrainer.__init__": "(self, model, teacher_model=None, args=None, train_dataset=None, eval_dataset=None, processing_class=None, callbacks=None, optimizers=(None, None), quantization_config=None, peft_config=None, tools=None)",
    "trl.DistillationTrainer.compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "trl.DistillationTrainer._compute_loss": "(self, unwrapped_student, inputs, num_items_in_batch)",
    "trl.DistillationTrainer._generate_and_score_completions": "(self, inputs)",
    "trl.DistillationTrainer._get_last_hidden_state": "(self, unwrapped_model, input_ids, attention_mask, logits_to_keep, pixel_values=None, image_grid_thw=None, pixel_attention_mask=None, spatial_shapes=None, image_sizes=None, token_type_ids=None, mm_token_type_ids=None, image_position_ids=None)",
    "trl.experimental.server_distillation.ServerDistillationTrainer._get_teacher_token_logprobs_from_server": "(self, inputs, aligned_prompt_length)",
    "trl.generation.vllm_client.VLLMClient.__init__": "(self, base_url=None, host='0.0.0.0', server_port=8000, group_port=51216, connection_timeout=0.0)",
    "trl.generation.vllm_client.VLLMClient.generate": "(self, prompts, features=None, n=1, repetition_penalty=1.0, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=16, logprobs=0, structured_outputs_regex=None, generation_kwargs=None)",
    "trl.generation.vllm_client.VLLMClient.get_sequence_logprobs": "(self, sequences, prompt_lengths, top_logprobs=100, temperature=1.0, chunk_size=0, max_concurrent_requests=4)",
    "transformers.Trainer.train": "(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)",
    "transformers.Trainer.training_step": "(self, model, inputs, num_items_in_batch=None)",
    "transformers.Trainer.hyperparameter_search": "(self, hp_space=None, compute_objective=None, n_trials=20, direction='minimize', backend=None, hp_name=None, **kwargs)",
    "transformers.Trainer._prepare_for_training": "(self, max_steps, train_dataloader, resume_from_checkpoint)",
    "transformers.Trainer._run_epoch": "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
    "transformers.Trainer._save_checkpoint": "(self, model, trial)",
    "transformers.Trainer._save_optimizer_and_scheduler": "(self, output_dir)",
    "transformers.Trainer._load_optimizer_and_scheduler": "(self, checkpoint)",
    "transformers.Trainer._load_best_model": "(self)",
    "transformers.Trainer._load_rng_state": "(self, checkpoint)",
    "transformers.Trainer._finalize_training": "(self, trial, num_train_samples, start_time)",
    "transformers.Trainer._push_from_checkpoint": "(self, checkpoint_folder)",
    "transformers.Trainer._get_output_dir": "(self, trial)",
    "transformers.Trainer.get_decay_parameter_names": "(self, model)",
    "transformers.Trainer.get_optimizer_cls_and_kwargs": "(args, model=None)",
    "transformers.TrainerCallback.on_optimizer_step": "(self, args, state, control, **kwargs)",
    "trl.trainer.utils.add_fused_lm_head": "(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=('log_probs',))",
    "trl.trainer.sft_trainer.DataCollatorForLanguageModeling.__init__": "(self, pad_token_id, padding_free=False, return_position_ids=False, pad_to_multiple_of=None, return_tensors='pt')",
    "peft.LoraModel.__init__": "(self, model, peft_config, adapter_name, low_cpu_mem_usage=False, state_dict=None)",
    "peft.LoraModel.unload": "(self)",
    "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers": "(peft_config, model, conversions)",
    "accelerate.Accelerator.no_sync": "(self, model)",
    "accelerate.Accelerator.backward": "(self, loss, **kwargs)",
    "accelerate.Accelerator.autocast": "(self, autocast_handler=None)",
    "accelerate.Accelerator.prepare_model": "(self, model, device_placement=None, evaluation_mode=False)",
    "accelerate.Accelerator.unwrap_model": "(self, model, keep_fp32_wrapper=True, keep_torch_compile=True)",
    "accelerate.Accelerator.reduce": "(self, tensor, reduction='sum', scale=1.0)",
}


# What an instance of `GRPOTrainer` has, and our parts read.
READ = (
    "_buffered_inputs _entropy_bonus_enabled _entropy_window_stats _last_world_entropy _logs _metrics "
    "_pending_extra_logs _pending_metrics _step _tokenizer accelerator aux_loss_enabled beta callback_handler "
    "chat_template chat_template_kwargs entropy_coef eos_token_ids epsilon_high epsilon_low importance_sampling_level "
    "model num_generations num_iterations optimizer processing_class ref_model reward_func_names reward_funcs reward_weights state "
    "temperature train_dataset use_adaptive_entropy"
).split()


def _resolve(dotted):
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"{dotted} is gone")


def _shape(function):
    parameters = inspect.signature(function).parameters.values()
    bare = (str(p.replace(annotation=inspect.Parameter.empty)).replace(" = ", "=") for p in parameters)
    return f"({', '.join(bare)})"


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    return small_trainer(folder, GRPOTrainer, args=small_config(folder, GRPOConfig))


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    return small_trainer(tmp_path_factory.mktemp("bridge"))


# Signatures and names


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    method = name.rpartition(".")[2]
    ours = [place_of(vars(cls)[method]) for cls in OURS if inspect.isfunction(vars(cls).get(method))]
    assert _shape(_resolve(name)) == SIGNATURES[name], f"overridden in {ours}" if ours else readers_of(method)


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


def _assigned(function):
    """Attributes of `self` that a method sets."""
    tree = ast.parse(source_of(function))
    targets = [t for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets]
    targets += [n.target for n in ast.walk(tree) if isinstance(n, (ast.AugAssign, ast.AnnAssign))]
    return {t.attr for t in targets if isinstance(t, ast.Attribute) and getattr(t.value, "id", "") == "self"}


def test_loss_sets_only_what_isolation_puts_back():
    protected = {"entropy_coef", "_last_world_entropy", "_entropy_window_stats"}
    assert _assigned(GRPOTrainer._compute_loss) == protected, place_of(isolated_bookkeeping)
    assert _assigned(GRPOTrainer._calculate_rewards) == set(), place_of(isolated_bookkeeping)
    for name in protected:
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


def test_terms_that_the_gain_leaves_out_are_read_by_the_loss():
    for name in ("beta", "_entropy_bonus_enabled", "aux_loss_enabled"):
        assert_in_order(GRPOTrainer._compute_loss, f"self.{name}", ours=policy_term_only)
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
    ours = StudentTrainer._get_per_token_logps_and_entropies  # what a replay stands in for
    assert_in_order(GRPOTrainer._compute_loss, "per_token_logps, entropies, aux_loss =", ours=ours)
    asked = source_of(GRPOTrainer._compute_loss).count("self._get_per_token_logps_and_entropies(")
    assert asked == 1, place_of(ours)


def test_keys_that_the_loss_reads():
    source = source_of(GRPOTrainer._compute_loss)
    for name in ("old_per_token_logps", "importance_sampling_ratio", "ref_per_token_logps", "advantages", "tool_mask"):
        assert f'"{name}"' in source, readers_of(name)


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


def test_upload_and_rotation_are_left_out_of_saving_by_their_options():
    for option in ("if self.args.push_to_hub:\n", "save_total_limit=self.args.save_total_limit"):
        assert_in_order(Trainer._save_checkpoint, option, ours=Sealed._save_checkpoint)


def test_parts_are_written_before_upload_and_rotation():
    assert_in_order(
        Trainer._save_checkpoint,
        "self.save_model(",
        "self._save_optimizer_and_scheduler(",
        "self._save_rng_state(",
        "self.state.save_to_json(",
        "self._push_from_checkpoint(",
        "rotate_checkpoints(",
        ours=Resumable._save_optimizer_and_scheduler,
    )
    assert f"{PREFIX_CHECKPOINT_DIR}-" == "checkpoint-", readers_of("PREFIX_CHECKPOINT_DIR")
    assert_in_order(Trainer._save_checkpoint, "_get_output_dir(", ours=Sealed._save_checkpoint)


def test_parts_step_before_the_student_is_clipped():
    assert_in_order(
        Trainer._run_epoch,
        "self.current_gradient_accumulation_steps =",
        "_set_sync_gradients(do_sync_step)",
        "self.training_step(",
        "self._clip_grad_norm(",
        "self.optimizer.step()",
        ".on_optimizer_step(",
        "self.lr_scheduler.step()",
        "model.zero_grad()",
        "self.state.global_step += 1",
        ".on_step_end(",
        "self._maybe_log_save_evaluate(",
        ours=DemonstrationTrainer.end_of_window,
    )


def test_micro_batch_is_counted_after_its_passes():
    ours = DemonstrationTrainer.training_step
    assert_in_order(GRPOTrainer.training_step, "super().training_step(", "self._step += 1", ours=ours)
    order = ("compute_loss_context_manager()", "self.compute_loss(", "accelerator.backward(")
    assert_in_order(Trainer.training_step, *order, ours=DemonstrationTrainer.compute_loss)
    # Evaluation calls `compute_loss` as well, and the template tells it by the model's mode.
    assert_in_order(
        GRPOTrainer.prediction_step, "self.compute_loss(model, inputs)", ours=DemonstrationTrainer.compute_loss
    )


def test_best_model_and_resume_go_through_the_methods_that_we_extend():
    for caller, call in (
        (Trainer._finalize_training, "self._load_best_model()"),
        (Trainer._prepare_for_training, "self._load_optimizer_and_scheduler("),
        (Trainer._run_epoch, "self._load_rng_state(resume_from_checkpoint)"),
        (Trainer._inner_training_loop, "self._prepare_for_training("),
    ):
        extended = call.removeprefix("self.").partition("(")[0]
        ours = next(vars(cls)[extended] for cls in OURS if extended in vars(cls))
        assert_in_order(caller, call, ours=ours)


def test_generation_batch_is_split_as_pairing_expects():
    assert_in_order(
        GRPOTrainer._prepare_inputs,
        "self._generate_and_score_completions(",
        "shuffle_sequence_dict(",
        "split_tensor_dict(",
        "self._buffered_inputs[self._step % self.args.steps_per_generation]",
        ours=Demonstrations.pair,
    )


# Lightning OPD


def test_sft_loss_is_minus_the_sum_of_the_log_probabilities_over_a_count():
    assert_in_order(
        SFTTrainer.compute_loss,
        "outputs = model(**inputs, fused_lm_head=True)",
        "per_token_loss = -outputs.log_probs",
        "num_tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch",
        "loss = per_token_loss.sum() / ",
        "loss * (self.accelerator.num_processes // self.get_tp_size())",
        "outputs.entropy",
        ours=LightningOPDTrainer.compute_loss,
    )
    # Read in that place alone; the second one is DFT's.
    assert source_of(SFTTrainer.compute_loss).count("outputs.log_probs") == 2, place_of(
        LightningOPDTrainer.compute_loss
    )
    # Ours, in float32, is put in its place.
    head = ("add_fused_lm_head(", 'outputs=("log_probs", "entropy", "is_top1")')
    assert_in_order(SFTTrainer.__init__, *head, ours=LightningOPDTrainer.__init__)
    assert_in_order(SFTTrainer.__init__, "self._prepare_dataset(", ours=LightningOPDTrainer._prepare_dataset)
    assert "self._total_train_tokens" in source_of(SFTTrainer.compute_loss), readers_of("_total_train_tokens")


def test_items_are_counted_by_labels():
    order = ('batch["labels"][..., 1:]', "labels.ne(-100).sum()", ".gather(")
    assert_in_order(Trainer._get_num_items_in_batch, *order, ours=LightningOPDTrainer._get_num_items_in_batch)


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
    source = source_of(trl_utils.add_fused_lm_head)
    assert source.count("_use_triton(") == 1 and "compact = _use_triton(" in source
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


def test_generation_batches_are_made_anew_and_buffered():
    assert_in_order(
        GRPOTrainer,  # the method's own source is hidden by a decorator
        "self._generate_and_score_completions(generation_batch)",
        "shuffle_sequence_dict(generation_batch)",
        "self._buffered_inputs = [unsplit",
        "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]",
        ours=PackedTrainer._prepare_inputs,
    )


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
