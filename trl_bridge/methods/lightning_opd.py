"""Lightning OPD: on-policy distillation from a teacher that was asked once, before training."""

from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from .._upstream import add_fused_lm_head
from ..distillation.scored_rows import SCORES, ScoredCollator, check_tokens, rows_hash, scored_rows
from ..objectives.distill import AGGREGATIONS, reference_weights, stored_teacher_terms
from ..training.card import Carded
from ..training.checkpoint.registry import LOCAL, Registry, attribute
from ..training.checkpoint.resume import Resumable
from ..training.options import check_options, must, one_of, options
from ..training.refusals import Rules, check_best_model, other_than, refuse, refuse_pictures
from .distillation_refusals import check_backend


_REFUSED: Rules = {
    "packing": "scores belong to one sequence each",
    "eval_packing": "scores belong to one sequence each",
    "padding_free": "the stored scores are padded with their rows",
    "assistant_only_loss": "the completion's tokens are trained, all of them",
    "completion_only_loss": (
        other_than(None, True),
        "the completion's tokens are trained, and no others have a score",
    ),
    "loss_type": (other_than("nll"), "the loss is Lightning OPD's"),
    "label_smoothing_factor": "the loss is Lightning OPD's",
    "neftune_noise_alpha": (
        other_than(None),
        "its noise would enter the log-probabilities that are compared with the teacher's",
    ),
    "parallelism_config": "only data parallelism is built",
    "enable_jit_checkpoint": "it may save inside an update, which cannot be resumed exactly",
}


@options
class LightningOPDConfig(SFTConfig):
    """
    Configuration of [`LightningOPDTrainer`]: everything of [`~trl.SFTConfig`] that does not concern its loss, and the
    fields below. `learning_rate` and `max_length` have other defaults than in [`~trl.SFTConfig`] (`2e-5` and `1024`).
    """

    learning_rate: float = 2e-6
    """The initial learning rate for AdamW."""
    max_length: int | None = field(
        default=None,
        metadata=must("be at least 2 (a prompt's token and a trained one)", lambda value: value >= 2),
    )
    """Longest rollout in tokens, prompt included; longer ones lose their end. `None`: no limit, since rollouts have the
    length that they were sampled with."""
    advantage_clip: float | None = field(
        default=10.0, metadata=must("be above 0, or None for no bound", lambda value: value > 0)
    )
    """Bound of a token's advantage, in nats. `None` sets none, as in the released program; 10 is what readers of the
    paper's third version report."""
    loss_aggregation: str = field(default="sequence", metadata=one_of(*AGGREGATIONS))
    """'sequence': mean over sequences of each one's mean over its tokens (as published). 'token': mean over all
    tokens."""
    require_same_teacher: bool = True
    """Whether to refuse scores of another model than the one that wrote the student's SFT data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)
        refuse(self, _REFUSED)
        if self.truncation_mode != "keep_start":
            raise NotImplementedError(
                "`truncation_mode` must be 'keep_start': a rollout without its prompt has no score."
            )
        if (self.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise NotImplementedError(
                "`dataset_kwargs={'skip_prepare_dataset': True}` is not supported by LightningOPDConfig: rows are checked "
                "and laid out with their scores. Remove it."
            )
        check_best_model(self)


class LightningOPDTrainer(Carded, Resumable, SFTTrainer):
    r"""
    Lightning OPD (arXiv 2604.13010) on TRL's `SFTTrainer`.

    `y` is one completion of each prompt, sampled once from the model that training starts from, `l_T` the teacher's stored
    log-probabilities of its tokens. No teacher and no sampler is needed while training:

        A_t = sg[clamp(l_T,t - log p(y_t | x, y_<t), -c, c)]
        L   = - mean_i 1/|y_i| sum_t A_t log p(y_t | x, y_<t)

    The advantage is recomputed with the current policy in every update; the rollouts are not drawn again. Rows come from
    `trl-bridge data score-rollouts`, which says who sampled and who scored; scores of another tokenizer, chat template or
    teacher than the student's SFT data are refused.

    Deviations from the released program (`jet-ai-projects/Lightning-OPD`): advantages are clamped at `advantage_clip=10`
    (`None` for its way); its PPO ratio is one with one update per batch and its clipping is left out; sampled token ids are
    kept as they are, with the end of sequence, where it decodes and tokenises again and drops that token.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student: the model that the rollouts were sampled from.
        args ([`LightningOPDConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`]):
            Scored rollouts: `prompt_ids`, `completion_ids`, `teacher_logprobs`, `scored_with`, optionally
            `reference_logprobs` (the student's own at the start, for metrics).
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            The same kind of rows.
        data_collator, compute_loss_func, compute_metrics, preprocess_logits_for_metrics, formatting_func:
            Must be `None`: the loss, its batches and its metrics are the method's own.
        processing_class, callbacks, optimizers, optimizer_cls_and_kwargs, quantization_config, peft_config:
            As in [`~trl.SFTTrainer`].

    Raises:
        ValueError: rows that cannot be trained on; see [`~trl_bridge.distillation.scored_rows.scored_rows`].
        NotImplementedError: an option of TRL's trainer that would change the loss, or a backend that is not supported.
    """

    _tag_names = ["trl", "lightning-opd"]
    _name = "Lightning OPD"
    _paper = {
        "title": "Lightning OPD: Efficient Post-Training for Large Reasoning Models with Offline On-Policy Distillation",
        "id": "2604.13010",
    }

    args: LightningOPDConfig
    config_class = LightningOPDConfig

    def __init__(
        self,
        model: Any,
        args: LightningOPDConfig | None = None,
        data_collator: None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        compute_loss_func: None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable | None = None,
    ):
        given = {
            "data_collator": data_collator,
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
            "formatting_func": formatting_func,
        }
        for name, value in given.items():
            if value is not None:
                raise NotImplementedError(
                    f"`{name}` is not supported: rows, loss and metrics are Lightning OPD's own."
                )
        if args is None:
            args = LightningOPDConfig("lightning-opd")
        if not isinstance(args, LightningOPDConfig):
            raise TypeError(f"`args` must be a `LightningOPDConfig`, got {type(args).__name__}.")
        if getattr(peft_config, "is_prompt_learning", False):
            raise NotImplementedError("`peft_config`: virtual tokens are not supported. Use LoRA.")
        if isinstance(train_dataset, Dataset) and not len(train_dataset):
            raise ValueError("`train_dataset` is empty.")
        refuse_pictures(type(self).__name__, processing_class, model)
        self._rows: list[Any] = []
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        refuse_pictures(type(self).__name__, self.processing_class, self.model)
        check_backend(self.accelerator, self.model)
        if self.accelerator.parallelism_config is not None:
            raise NotImplementedError("`parallelism_config` is not supported: only data parallelism is built.")
        student: Any = self.model
        for name, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_tokens(rows, student.get_input_embeddings().num_embeddings, name)
        # TRL's trainer has no option for it, and its head would round logits, and so advantages, to 16 bits.
        plain: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        add_fused_lm_head(plain, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy", "is_top1"))
        self.data_collator = ScoredCollator(
            pad_token_id=self.data_collator.pad_token_id, pad_to_multiple_of=self.data_collator.pad_to_multiple_of
        )

    # Rows

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        if isinstance(dataset, Dataset) and {"input_ids", "labels", SCORES[0]} <= set(dataset.column_names):
            return dataset  # evaluation of what was laid out before
        rows, identities = scored_rows(
            dataset,
            self._tokenizer,
            require_same_teacher=args.require_same_teacher,
            max_length=args.max_length,
            num_proc=args.dataset_num_proc,
            what="train_dataset" if dataset_name == "train" else f"eval_dataset ({dataset_name})",
        )
        rows = rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows
        if dataset_name == "train":
            self._rows = [len(rows), rows_hash(rows), *identities]
        return rows

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns: Any = list(dict.fromkeys([*columns, *SCORES]))

    # The loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        if self.args.loss_aggregation == "sequence":
            # One label for each row: TRL's trainer then counts sequences over the window and the ranks.
            batch_samples = [{"labels": _one_label(batch["labels"])} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """
        TRL's loss, which is minus the sum of the log-probabilities over a count, with the method's terms in their
        place. All that TRL's trainer does beside it (metrics, ranks, the auxiliary loss of a mixture of experts) stays.
        """
        if return_outputs:
            raise NotImplementedError("Lightning OPD evaluates its loss and metrics alone; use `evaluate`.")
        scores = {name: inputs[name][:, 1:] for name in SCORES if name in inputs}  # (B, L - 1), as TRL shifts labels
        kept = {name: value for name, value in inputs.items() if name not in SCORES}

        def scored(**arguments: Any) -> Any:
            outputs = model(**arguments)
            outputs.log_probs = self._terms(outputs, scores, num_items_in_batch is None)
            return outputs

        return super().compute_loss(scored, kept, num_items_in_batch=num_items_in_batch)

    def _terms(self, outputs: Any, scores: dict[str, torch.Tensor], alone: bool) -> torch.Tensor:
        args, mask = self.args, outputs.label_mask  # (B, L - 1)
        terms, sums = stored_teacher_terms(
            outputs.log_probs, scores[SCORES[0]], mask, args.advantage_clip, args.loss_aggregation
        )
        if SCORES[1] in scores:
            sums |= reference_weights(outputs.log_probs, scores[SCORES[1]], mask)
        self._record(sums)
        if alone and args.loss_aggregation == "sequence":
            # Without a count for the window (evaluation) TRL's trainer divides by this batch's tokens.
            terms = terms * mask.sum() / len(mask)
        return -terms  # in the place of log-probabilities, whose sum TRL's trainer negates

    def _record(self, sums: dict[str, torch.Tensor]) -> None:
        gathered = self.accelerator.gather(torch.stack([value.float() for value in sums.values()])[None])
        total = dict(zip(sums, gathered.sum(dim=0).tolist(), strict=True))
        mean = {name: value / max(total["tokens"], 1) for name, value in total.items()}
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["opd/advantage_mean"].append(mean["advantage"])
        metrics["opd/advantage_abs"].append(mean["advantage_abs"])
        metrics["opd/advantage_clip_fraction"].append(mean["clipped"])
        metrics["opd/teacher_logprob"].append(mean["teacher_logprob"])
        metrics["opd/reverse_kl"].append(-mean["advantage"])
        if "weight" in mean:
            metrics["opd/weight_mean"].append(mean["weight"])
            metrics["opd/weight_std"].append(max(mean["weight_squared"] - mean["weight"] ** 2, 0.0) ** 0.5)

    # Resuming

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.must_match("advantage_clip", "loss_aggregation", "max_length", train_dataset=self._rows)
        saved.add("num_tokens", attribute(self, "_total_train_tokens"), LOCAL)


def _one_label(labels: torch.Tensor) -> torch.Tensor:
    """`(B, 2)`: nothing, and one label, which a shift leaves where it is counted."""
    counted = labels.new_full((len(labels), 2), -100)
    counted[:, 1] = 0
    return counted
