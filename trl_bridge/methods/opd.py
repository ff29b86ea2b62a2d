"""OPD: on-policy distillation by sampled tokens."""

from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from ..contract import check
from ..distillation.scoring import ServedTeacher
from ..distillation.teacher import batch_of, check_tokenizers, head_of, scores_in
from ..generation.vllm_training import check_served, fitted_vllm
from ..objectives.distill import AGGREGATIONS, aggregate, policy_term
from ..objectives.lm_head import StudentScores, TeacherScores, student_scores, teacher_scores
from ..training.card import Carded
from ..training.checkpoint.registry import LOCAL, Registry, attribute
from ..training.checkpoint.resume import BufferResumable
from ..training.options import at_least, check_options, must, one_of, options
from ..training.policy import completions_of
from ..training.refusals import refuse_pictures
from ..training.student_config import VLLM_DTYPES
from .distillation_refusals import check_backend, check_config


check("trl.DistillationTrainer")


@options
class OPDConfig(DistillationConfig):
    """Configuration of [`OPDTrainer`]: everything of [`~trl.DistillationConfig`], and the loss of sampled tokens."""

    teacher_model_server_url: str | None = None
    """Base URL of a vLLM server with the teacher, in place of a local one."""
    teacher_model_server_timeout: float = 60.0
    """Seconds to wait for the teacher's server at the start."""
    teacher_offload: bool = False
    """Whether the teacher is on the CPU but while it scores. Not under ZeRO-3, which spreads it over the ranks."""
    opd_weight: float = field(default=1.0, metadata=at_least(0))
    """Weight of the sampled-token loss."""
    advantage_clip: float | None = field(
        default=None, metadata=must("be above 0 (None switches it off)", lambda value: value > 0)
    )
    """`c`: advantages `log P_T - log P_S` are clamped to `[-c, c]`. `None` leaves them."""
    loss_aggregation: str = field(default="token", metadata=one_of(*AGGREGATIONS))
    """'token': mean over the tokens of an update; 'sequence': mean over its completions of the mean over their
    tokens."""
    vllm_dtype: str | None = field(default=None, metadata=one_of(*VLLM_DTYPES))
    """As in [`StudentConfig`]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)
        check_config(self)
        if self.teacher_model_server_url is not None:
            self._check_server()

    def _check_server(self) -> None:
        if self.teacher_model_name_or_path is not None:
            raise ValueError(
                "`teacher_model_server_url` and `teacher_model_name_or_path` name two teachers. Remove one of them."
            )
        if self.teacher_offload:
            raise ValueError(
                "`teacher_offload` has no effect with `teacher_model_server_url`: there is no teacher here. Remove it."
            )


class OPDTrainer(Carded, BufferResumable, DistillationTrainer):
    """
    On-policy distillation by sampled tokens, on TRL's stable `DistillationTrainer`.

    The student answers each prompt once; every token `y_t` of the answer is trained by

        L_t = -opd_weight A_t log P_S(y_t | x, y_<t),        A_t = sg[log P_T(y_t | x, y_<t) - log P_S(y_t | x, y_<t)],

    a policy gradient whose reward at each token is the log-ratio of teacher and student. Its expectation over what the
    student may sample is the gradient of the reverse KL divergence at each position, which `DistillationTrainer` with
    `beta=1` takes over the whole vocabulary. One number for each token is all that is needed of the teacher, so it may
    be far away.
    _paper = arxiv(
        "2306.13649",
        "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        "agarwal2024on-policy",
        "Rishabh Agarwal and Nino Vieillard and Yongchao Zhou and Piotr Stanczyk and Sabela Ramos Garea and "
        "Matthieu Geist and Olivier Bachem",
        2024,
        booktitle="The Twelfth International Conference on Learning Representations, {ICLR} 2024, Vienna, Austria, May 7-11, 2024",
    )
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher. `None` takes `args.teacher_model_name_or_path`, or the server that
            `args.teacher_model_server_url` names.
        args ([`OPDConfig`], *optional*):
            Arguments.
        train_dataset, eval_dataset, processing_class, callbacks, optimizers, quantization_config, peft_config, tools:
            As in [`~trl.DistillationTrainer`].

    Raises:
        TypeError: `args` is not of the trainer's own config class.
        ValueError: there is no teacher, or one with another vocabulary.
        NotImplementedError: an option or a backend that is not supported.
    """

    config_class: type[OPDConfig] = OPDConfig
    args: OPDConfig

    _tag_names = ["trl", "trl-bridge", "opd"]
    _name = "OPD"

    def __init__(
        self,
        model: "str | PreTrainedModel",
        teacher_model: "str | PreTrainedModel | None" = None,
        args: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | DatasetDict | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
    ):
        owner = type(self).__name__
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = self.config_class(f"{name.split('/')[-1] or 'model'}-{self._name}")
        if not isinstance(args, self.config_class):
            raise TypeError(
                f"`args` of {owner} must be a `{self.config_class.__name__}`, got `{type(args).__name__}`."
            )
        refuse_pictures(owner, processing_class, model, train_dataset=train_dataset, eval_dataset=eval_dataset)
        if args.teacher_model_server_url is not None and teacher_model is not None:
            raise ValueError("`teacher_model` and `teacher_model_server_url` are two teachers. Remove one of them.")
        teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
        if teacher_model is None and args.teacher_model_server_url is None:
            raise ValueError(
                f"{owner} needs a teacher: pass `teacher_model`, or set `teacher_model_name_or_path` or "
                "`teacher_model_server_url`."
            )
        with fitted_vllm(args):
            super().__init__(
                model=model,
                teacher_model=teacher_model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
            )
        refuse_pictures(owner, self.processing_class, self.model)
        check_served(args, self.model)
        check_backend(self.accelerator, self.model)
        if isinstance(teacher_model, str):
            check_tokenizers(self._tokenizer, teacher_model, args.teacher_model_revision, args.trust_remote_code)
        self.served_teacher: ServedTeacher | None = None
        if args.teacher_model_server_url is None:
            self.teacher_model: Any = self.backend.place_frozen(self.teacher_model, args.teacher_offload)
            self.teacher_model.eval()
        else:
            config: Any = self.model.config
            self.served_teacher = ServedTeacher(
                args.teacher_model_server_url,
                connection_timeout=args.teacher_model_server_timeout,
                temperature=args.temperature,
                top_k=max(1, self.teacher_top_k),
                vocab_size=config.get_text_config().vocab_size,
            )
        self._measured: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    # What subclasses change

    @property
    def teacher_top_k(self) -> int:
        """How many of the teacher's likeliest tokens the loss reads."""
        return 0

    def token_losses(
        self, student: StudentScores, teacher: TeacherScores
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Loss of each token, and what is logged of it."""
        term = policy_term(student.log_probs, teacher.log_probs, self.args.advantage_clip)
        everywhere = torch.ones_like(term.clipped)
        return self.args.opd_weight * term.loss, {
            "opd/advantage_mean": (term.advantages, everywhere),
            "opd/advantage_abs": (term.advantages.abs(), everywhere),
            "opd/advantage_clip_fraction": (term.clipped, everywhere),
            "opd/teacher_logprob": (teacher.log_probs, everywhere),
            "opd/reverse_kl": (-term.advantages, everywhere),
        }

    # TRL's methods

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.must_match("temperature", "opd_weight", "advantage_clip", "loss_aggregation")
        saved.add("total_train_tokens", attribute(self, "_total_train_tokens"), LOCAL)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        # Once for the whole generation batch: the scores are buffered and saved with the rollouts.
        served = self.served_teacher
        return {**output, **(self._score_by_teacher(output) if served is None else served.score(output))}

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mask = inputs["completion_mask"].bool()  # (B, T)
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        token_ids = inputs["completion_ids"][mask]  # (N,)
        teacher = scores_in(inputs, mask, self.teacher_top_k)
        hidden = self._get_last_hidden_state(unwrapped_student, *completions_of(inputs))[mask]  # (N, H)
        student = student_scores(hidden, token_ids, teacher.top_ids, head_of(unwrapped_student, self.temperature))
        losses, self._measured = self.token_losses(student, teacher)
        per_token = losses.new_zeros(mask.shape).masked_scatter(mask, losses)
        rows = mask.size(0) * self.args.gradient_accumulation_steps if self.model.training else mask.size(0)
        how: Any = self.args.loss_aggregation
        loss = aggregate(per_token, mask, how, num_items=num_items_in_batch, num_rows=rows)
        return loss, student.entropy.sum(), mask.sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Outside of the wrapped forward, where a collective could hang.
        mode = "train" if self.model.training else "eval"
        measured = self._measured
        sums = [
            torch.stack([torch.where(counts, values.detach(), 0).sum().double(), counts.sum().double()])
            for values, counts in measured.values()
        ]
        totals = self.accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
        for name, (total, count) in zip(measured, totals, strict=True):
            # TRL leaves NaN out of its averages: no token of the batch was of that kind.
            self._metrics[mode][name].append(total / count if count else float("nan"))
        return result

    def _score_by_teacher(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A generation batch's scores by the local teacher, some rows at a time. Collective where the teacher is sharded."""
        wrapped, plain = self.teacher_model, self.accelerator.unwrap_model(self.teacher_model)
        mask = batch["completion_mask"].bool()  # (B, T)

        def score(part: dict[str, torch.Tensor]) -> TeacherScores:
            there = part["completion_mask"].bool()
            hidden = self._get_last_hidden_state(plain, *completions_of(part))[there]
            # Within the pass, which has the head's weights in full.
            return teacher_scores(
                hidden, part["completion_ids"][there], head_of(plain, self.temperature), self.teacher_top_k
            )

        size = self.args.per_device_train_batch_size
        columns = [f"{part}_{what}" for part in ("prompt", "completion") for what in ("ids", "mask")]
        with torch.no_grad(), self.accelerator.autocast(), self.backend.at_hand(wrapped, self.args.teacher_offload):
            parts = [
                self._forward_redirection(wrapped, plain, score, {name: batch[name][i : i + size] for name in columns})
                for i in range(0, len(mask), size)
            ]
        return batch_of(TeacherScores(*map(torch.cat, zip(*parts, strict=True))), mask)
