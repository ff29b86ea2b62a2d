"""
What trl_bridge relies on in TRL, transformers, PEFT and accelerate, as tables: names, signatures, attributes, and what stands in
which function. Lines of ours that rest on an entry are named beside it.
"""

from typing import NamedTuple


# Parameters and defaults, without annotations. Upstream calls ours in the place of these.
OVERRIDDEN = {
    "trl.GRPOTrainer.compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "trl.GRPOTrainer._compute_loss": "(self, model, inputs)",
    "trl.GRPOTrainer.training_step": "(self, model, inputs, num_items_in_batch)",
    "trl.GRPOTrainer._prepare_inputs": "(self, generation_batch)",
    "trl.GRPOTrainer._generate_and_score_completions": "(self, inputs)",
    "trl.GRPOTrainer._generate": "(self, prompts)",
    "trl.GRPOTrainer._tool_call_loop": "(self, prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields)",
    "trl.GRPOTrainer._generate_single_turn": "(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False)",
    "trl.GRPOTrainer._calculate_rewards": "(self, inputs, prompts, completions, completion_ids_list)",
    "trl.GRPOTrainer._save_checkpoint": "(self, model, trial)",
    "trl.GRPOTrainer._load_optimizer_and_scheduler": "(self, checkpoint)",
    "trl.SFTTrainer.compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "trl.SFTTrainer._prepare_dataset": "(self, dataset, processing_class, args, packing, formatting_func, dataset_name)",
    "trl.SFTTrainer._set_signature_columns_if_needed": "(self)",
    "transformers.Trainer._get_num_items_in_batch": "(self, batch_samples, device)",
    "trl.DistillationTrainer.compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "trl.DistillationTrainer._compute_loss": "(self, unwrapped_student, inputs, num_items_in_batch)",
    "trl.DistillationTrainer._generate_and_score_completions": "(self, inputs)",
    "transformers.Trainer.training_step": "(self, model, inputs, num_items_in_batch=None)",
    "transformers.Trainer._prepare_for_training": "(self, max_steps, train_dataloader, resume_from_checkpoint)",
    "transformers.Trainer._save_checkpoint": "(self, model, trial)",
    "transformers.Trainer._save_optimizer_and_scheduler": "(self, output_dir)",
    "transformers.Trainer._load_optimizer_and_scheduler": "(self, checkpoint)",
    "transformers.Trainer._load_best_model": "(self)",
    "transformers.Trainer._load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "transformers.Trainer._load_rng_state": "(self, checkpoint)",
    "trl.generation.vllm_client.VLLMClient.init_communicator": "(self, device=0)",
    "trl.generation.vllm_client.VLLMClient.update_named_params": "(self, metadata, named_params)",
    "transformers.TrainerCallback.on_optimizer_step": "(self, args, state, control, **kwargs)",
}

# These we call, or take the arguments of as they come: more optional ones do no harm.
CALLED = {
    "trl.GRPOTrainer.__init__": "(self, model, reward_funcs=None, args=None, train_dataset=None, eval_dataset=None, processing_class=None, reward_processing_classes=None, callbacks=None, optimizers=(None, None), quantization_config=None, peft_config=None, tools=None, rollout_func=None, environment_factory=None)",
    "trl.GRPOTrainer._get_per_token_logps_and_entropies": "(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, compute_aux_loss=False, pixel_values=None, image_grid_thw=None, num_images=None, pixel_attention_mask=None, spatial_shapes=None, num_tiles=None, image_sizes=None, token_type_ids=None, mm_token_type_ids=None, image_position_ids=None)",
    "trl.GRPOTrainer._get_train_sampler": "(self, dataset=None)",
    "trl.GRPOTrainer.create_model_card": "(self, model_name=None, dataset_name=None, tags=None)",
    "trl.GRPOTrainer.log": "(self, logs, start_time=None)",
    "trl.SFTTrainer.__init__": "(self, model, args=None, data_collator=None, train_dataset=None, eval_dataset=None, processing_class=None, compute_loss_func=None, compute_metrics=None, callbacks=None, optimizers=(None, None), optimizer_cls_and_kwargs=None, preprocess_logits_for_metrics=None, quantization_config=None, peft_config=None, formatting_func=None)",
    "trl.DistillationTrainer.__init__": "(self, model, teacher_model=None, args=None, train_dataset=None, eval_dataset=None, processing_class=None, callbacks=None, optimizers=(None, None), quantization_config=None, peft_config=None, tools=None)",
    "trl.DistillationTrainer._get_last_hidden_state": "(self, unwrapped_model, input_ids, attention_mask, logits_to_keep, pixel_values=None, image_grid_thw=None, pixel_attention_mask=None, spatial_shapes=None, image_sizes=None, token_type_ids=None, mm_token_type_ids=None, image_position_ids=None)",
    "trl.generation.vllm_client.VLLMClient.__init__": "(self, base_url=None, host='0.0.0.0', server_port=8000, group_port=51216, connection_timeout=0.0)",
    "trl.generation.vllm_client.VLLMClient.generate": "(self, prompts, features=None, n=1, repetition_penalty=1.0, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=16, logprobs=0, structured_outputs_regex=None, generation_kwargs=None)",
    "trl.generation.vllm_client.VLLMClient.get_sequence_logprobs": "(self, sequences, prompt_lengths, top_logprobs=100, temperature=1.0, chunk_size=0, max_concurrent_requests=4)",
    "transformers.Trainer.train": "(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)",
    "transformers.Trainer.hyperparameter_search": "(self, hp_space=None, compute_objective=None, n_trials=20, direction='minimize', backend=None, hp_name=None, **kwargs)",
    "transformers.Trainer._run_epoch": "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
    "transformers.Trainer._finalize_training": "(self, trial, num_train_samples, start_time)",
    "transformers.Trainer._push_from_checkpoint": "(self, checkpoint_folder)",
    "transformers.Trainer._get_output_dir": "(self, trial)",
    "transformers.Trainer.get_decay_parameter_names": "(self, model)",
    "transformers.Trainer.get_optimizer_cls_and_kwargs": "(args, model=None)",
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

# Names that are no documented API, beside those above.
NAMES = (
    "accelerate.state.GradientState._set_sync_gradients",
    "peft.tuners.lora.ParamWrapper",
    "transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref",
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.register",
    "transformers.trainer.SCHEDULER_NAME",
    "transformers.trainer_utils.rotate_checkpoints",
    "trl.chat_template_utils.parse_response",
    "trl.models.prepare_deepspeed",
    "trl.models.prepare_fsdp",
    "trl.models.utils.disable_gradient_checkpointing",
    "trl.trainer.utils._use_triton",
    "trl.trainer.utils.pad",
)

# Attributes of an instance that we read.
ATTRIBUTES = {
    "trl.GRPOTrainer": (
        "_buffered_inputs _entropy_bonus_enabled _entropy_window_stats _last_world_entropy _logs "
        "_metrics _pending_extra_logs _pending_metrics _step _tokenizer accelerator aux_loss_enabled beta "
        "callback_handler chat_template chat_template_kwargs entropy_coef environment_factories eos_token_ids epsilon_high epsilon_low importance_sampling_level "
        "model num_generations num_iterations optimizer processing_class ref_model reward_func_names reward_funcs reward_weights router_aux_loss_coef state "
        "temperature tools train_dataset use_adaptive_entropy"
    ),
    "trl.DistillationTrainer": (
        "_buffered_inputs _forward_redirection _metrics _step _tokenizer _total_train_tokens accelerator chat_template model "
        "processing_class state teacher_model temperature"
    ),
}


class Order(NamedTuple):
    """Pieces that stand in a function's source one after the other, and the line of ours that rests on it."""

    function: str
    pieces: tuple[str, ...]
    ours: str


_TEMPLATE = "trl_bridge.training.stream.DemonstrationTrainer"
_LIGHTNING = "trl_bridge.methods.lightning_opd.LightningOPDTrainer"
_RESUMABLE = "trl_bridge.training.checkpoint.resume.Resumable"
_SEALED = "trl_bridge.training.checkpoint.resume.Sealed"
_OPD = "trl_bridge.methods.opd.OPDTrainer"
_VLLM = "trl.generation.vllm_generation.VLLMGeneration"
_FITTED = "trl_bridge.generation.vllm_training.fitted_vllm"

ORDERS = (
    # The engine and the client are built by names that stand in their module.
    Order(
        f"{_VLLM}._init_vllm",
        ("self.vllm_client = VLLMClient(", ".init_communicator(device=", "self.llm = LLM("),
        _FITTED,
    ),
    Order(
        f"{_VLLM}.sync_weights",
        ("self.vllm_client.update_named_params(self._weight_metadata, self._iter_named_params())",),
        _FITTED,
    ),
    # An adapter is merged while the weights are walked through, and no longer.
    Order(
        f"{_VLLM}._iter_named_params",
        ("model.merge_adapter()", "yield name, param.data", "model.unmerge_adapter()"),
        _FITTED,
    ),
    # When vLLM is given the weights, and where a run starts.
    Order(
        "trl.GRPOTrainer._generate_single_turn",
        ("self.state.global_step != self._last_loaded_step", "self.vllm_generation.sync_weights()"),
        "trl_bridge._upstream.forget_synced_weights",
    ),
    Order(
        "transformers.Trainer._inner_training_loop",
        ("self._prepare_for_training(", "self.callback_handler.on_train_begin(", "self._run_epoch("),
        "trl_bridge.training.trial.TrialTrainer.set_up_trial",
    ),
    # Only with tools, and with environments: nothing of a trainer without them.
    Order(
        "trl.GRPOTrainer._generate_and_score_completions",
        ("self._sync_tool_dicts = []", "self._async_tool_dicts = []"),
        "trl_bridge._upstream.run_tools",
    ),
    Order("trl.GRPOTrainer._tokenize_prompts", ("self._env_tools[name]",), "trl_bridge._upstream.tool_schemas"),
    Order("trl.GRPOTrainer._compute_loss", ("self.beta",), "trl_bridge._upstream.policy_term_only"),
    Order("trl.GRPOTrainer._compute_loss", ("self._entropy_bonus_enabled",), "trl_bridge._upstream.policy_term_only"),
    Order("trl.GRPOTrainer._compute_loss", ("self.aux_loss_enabled",), "trl_bridge._upstream.policy_term_only"),
    # What a replay stands in for.
    Order(
        "trl.GRPOTrainer._compute_loss",
        ("per_token_logps, entropies, aux_loss =", "self._get_per_token_logps_and_entropies("),
        "trl_bridge.training.student.StudentTrainer._get_per_token_logps_and_entropies",
    ),
    *(
        Order("trl.GRPOTrainer._compute_loss", (f'"{key}"',), "trl_bridge.training.policy.PolicyLoss.loss_of")
        for key in (
            "old_per_token_logps",
            "importance_sampling_ratio",
            "ref_per_token_logps",
            "advantages",
            "tool_mask",
        )
    ),
    Order("transformers.Trainer._save_checkpoint", ("if self.args.push_to_hub:\n",), f"{_SEALED}._save_checkpoint"),
    Order(
        "transformers.Trainer._save_checkpoint",
        ("save_total_limit=self.args.save_total_limit",),
        f"{_SEALED}._save_checkpoint",
    ),
    Order(
        "transformers.Trainer._save_checkpoint",
        (
            "self.save_model(",
            "self._save_optimizer_and_scheduler(",
            "self._save_rng_state(",
            "self.state.save_to_json(",
            "self._push_from_checkpoint(",
            "rotate_checkpoints(",
        ),
        f"{_RESUMABLE}._save_optimizer_and_scheduler",
    ),
    Order("transformers.Trainer._save_checkpoint", ("_get_output_dir(",), f"{_SEALED}._save_checkpoint"),
    # F is read before the student is clipped; the parts beside the student step after it, before its rate moves on.
    Order(
        "transformers.Trainer._run_epoch",
        (
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
        ),
        f"{_TEMPLATE}.end_of_window",
    ),
    # A micro-batch is counted after its passes.
    Order(
        "trl.GRPOTrainer.training_step", ("super().training_step(", "self._step += 1"), f"{_TEMPLATE}.training_step"
    ),
    Order(
        "transformers.Trainer.training_step",
        ("compute_loss_context_manager()", "self.compute_loss(", "accelerator.backward("),
        f"{_TEMPLATE}.compute_loss",
    ),
    # Evaluation calls `compute_loss` as well, and the template tells it by the model's mode.
    Order("trl.GRPOTrainer.prediction_step", ("self.compute_loss(model, inputs)",), f"{_TEMPLATE}.compute_loss"),
    # Best model and resume go through the methods that we extend.
    Order("transformers.Trainer._finalize_training", ("self._load_best_model()",), f"{_RESUMABLE}._load_best_model"),
    Order(
        "transformers.Trainer._prepare_for_training",
        ("self._load_optimizer_and_scheduler(",),
        f"{_RESUMABLE}._load_optimizer_and_scheduler",
    ),
    Order(
        "transformers.Trainer._run_epoch",
        ("self._load_rng_state(resume_from_checkpoint)",),
        f"{_RESUMABLE}._load_rng_state",
    ),
    Order(
        "transformers.Trainer._inner_training_loop",
        ("self._prepare_for_training(",),
        f"{_RESUMABLE}._prepare_for_training",
    ),
    # A generation batch is made anew, split as pairing expects, and buffered.
    Order(
        "trl.GRPOTrainer._prepare_inputs",
        (
            "self._generate_and_score_completions(generation_batch)",
            "shuffle_sequence_dict(generation_batch)",
            "split_tensor_dict(",
            "self._buffered_inputs = [unsplit",
            "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]",
        ),
        "trl_bridge.training.packed_trainer.PackedTrainer._prepare_inputs",
    ),
    # The parent scores the old policy first.
    Order(
        "trl.GRPOTrainer._generate_and_score_completions",
        (
            "= self._generate(prompts)",
            "% generate_every != 0 or (",
            "old_per_token_logps, _, _ =",
            "self._get_per_token_logps_and_entropies(",
            "ref_per_token_logps, _, _ =",
            "rewards_per_func = self._calculate_rewards(",
        ),
        "trl_bridge.methods.actguide.ActGuideTrainer._parent_scores_old_policy",
    ),
    # The fused head scores labels only by the word of one function.
    Order("trl.trainer.utils.add_fused_lm_head", ("compact = _use_triton(",), "trl_bridge._upstream.compact_head"),
    # The SFT loss is minus the sum of the log-probabilities over a count; ours, in float32, is put in the head's place.
    Order(
        "trl.SFTTrainer.compute_loss",
        (
            "outputs = model(**inputs, fused_lm_head=True)",
            "per_token_loss = -outputs.log_probs",
            "num_tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch",
            "loss = per_token_loss.sum() / ",
            "loss * (self.accelerator.num_processes // self.get_tp_size())",
            "outputs.entropy",
        ),
        f"{_LIGHTNING}.compute_loss",
    ),
    Order("trl.SFTTrainer.compute_loss", ("self._total_train_tokens",), f"{_LIGHTNING}.compute_loss"),
    Order(
        "trl.SFTTrainer.__init__",
        ("add_fused_lm_head(", 'outputs=("log_probs", "entropy", "is_top1")'),
        f"{_LIGHTNING}.__init__",
    ),
    Order("trl.SFTTrainer.__init__", ("self._prepare_dataset(",), f"{_LIGHTNING}._prepare_dataset"),
    Order(
        "transformers.Trainer._get_num_items_in_batch",
        ('batch["labels"][..., 1:]', "labels.ne(-100).sum()", ".gather("),
        f"{_LIGHTNING}._get_num_items_in_batch",
    ),
    # The loss is asked for inside the wrapped forward, with a count for each process.
    Order(
        "trl.DistillationTrainer.compute_loss",
        (
            'inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes',
            "loss, entropy_sum, num_valid_tokens = self._forward_redirection(",
            "self._compute_loss, unwrapped_student, inputs, num_items_in_batch",
            "gather_for_metrics",
        ),
        f"{_OPD}._compute_loss",
    ),
    # A window is a whole generation batch: `loss_aggregation="sequence"` counts on it.
    Order(
        "trl.DistillationTrainer._prepare_inputs",
        ("self._step % generate_every == 0", "split_tensor_dict(generation_batch, "),
        f"{_OPD}._compute_loss",
    ),
    Order(
        "trl.DistillationTrainer._get_train_sampler",
        ("repeat_count=self.args.gradient_accumulation_steps",),
        f"{_OPD}._compute_loss",
    ),
)

# Pieces that stand just so often, since each of them is one place that we replace or put back.
COUNTS = (
    ("trl.GRPOTrainer._compute_loss", "self._get_per_token_logps_and_entropies(", 1),
    ("trl.trainer.utils.add_fused_lm_head", "_use_triton(", 1),
    ("trl.SFTTrainer.compute_loss", "outputs.log_probs", 2),  # the second one is DFT's
)

# Attributes that a method sets: no others, or a call without a trace would leave one (`isolated_bookkeeping`).
ASSIGNED = {
    "trl.GRPOTrainer._compute_loss": {"entropy_coef", "_last_world_entropy", "_entropy_window_stats"},
    "trl.GRPOTrainer._calculate_rewards": set(),
}
