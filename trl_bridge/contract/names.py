"""Names of our trainers that the parents do not have: one that upstream took as well would replace theirs without a word."""

# Methods and class attributes.
OWN_NAMES = frozenset(
    """
    _add_up _advance_sampler _as_rollout _begin_window _build_coordinator _build_measures _build_sft_optimizer
    _build_shadow _build_shadow_optimizer _build_teachers _check_datasets _check_packing _check_sharded_adapter
    _check_verdict_columns _copy_for_trial _copy_student _count _dead_groups _deal _draw _draw_pieces _draw_shares
    _end_of_update _entropy _example _expert_term _fill _fill_places _filled_fork _finish_window _fork
    _freeze_vision_tower _from_all_ranks _frozen_copy _guided_log_probs _guided_rollouts _guided_rows _held _is_cut
    _learner _load_renamed _load_rollouts _local_teacher _log_student _log_update _measure _meta_fork
    _micro_batches_add_up _move_coordinator _needs_policy_part _observe _pad _paid _paired_prompts
    _parent_scores_old_policy _plain_model _put_among_rollouts _record _record_guidance _record_prefixes
    _record_rewards _record_teacher _replace_dead_groups _reshard_rollouts _reshard_step _reward_guided _rows_hash
    _run_passes _run_shadow _score _score_by_teacher _score_packed _score_seeing _score_with _sealing
    _set_initial_mean _set_up_packing _sft_share _sft_term _shadow_is_due _shadow_part _step_coordinator
    _step_shadow _stop_clock _sum_over_ranks _teacher_weight _tempered_sequence_log_probs _terms _trial_batches
    _trial_optimizer _trial_prompts _tried _untempered_log_probs _update _warn_of_two_formats _weights after_step
    after_trial ask_rewards assign backend balances_experts before_trial_step between_passes buffer build_parts
    check_updates_left config_class config_or_default coordinator_state_dict count_items demonstration_pass
    demonstration_weight demonstrations_due description end_of_window expert_heads expert_loss generation
    generation_cycle has_expert_loss has_sft_term hint_probability inside_update is_logged_update live_rollouts
    places policy_due policy_inputs policy_loss policy_pass policy_weight prefix_floor prompts_differ_in_group
    prompts_per_generation rate_factor reads_steps record record_work reduce refuses_environments refuses_tools
    refuses_turns register_state render_rows resolve_weighting sample_apart sample_groups save_coordinator saved
    score_completions score_rows scores_every_rollout sees_pictures set_up_trial sft_coefficient sft_pass sft_step
    sft_steps sft_weights shadow_state_dict shards shards_adapters student take_over taken_updates teacher_top_k
    theta_state_dict token_losses token_weights trains_by_advantage try_demonstrations under_noise updates_worth
    window_metrics window_share with_signal write_experts
    """.split()
)

# Attributes of an instance.
OWN_ATTRIBUTES = frozenset(
    """
    _clock_template _frozen_base _fused _gain _live _meta_copy _observer _overlap _packing_is_checked _packs
    _pass_start _probe _scored _sft_dataset _shadow_pass _share _stepping _student _train_sampler _turns _window
    _work backend coordinator coordinator_optimizer demonstrations fresh_prompts policy rollouts shadow
    shadow_gradient student_gradient teachers template_day weighting
    """.split()
)
