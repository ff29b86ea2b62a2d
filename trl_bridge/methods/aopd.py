"""AOPD: imitation of the teacher's likeliest tokens where the student is too sure, on-policy distillation elsewhere."""

from dataclasses import field
from typing import ClassVar

import torch

from ..objectives.distill import AGGREGATIONS, imitation_gate, imitation_term, policy_term
from ..objectives.lm_head import StudentScores, TeacherScores
from ..training.checkpoint.registry import Registry
from ..training.options import at_least, must, one_of, options
from ..training.paper import arxiv
from .opd import OPDConfig, OPDTrainer


@options
class AOPDConfig(OPDConfig):
    """Configuration of [`AOPDTrainer`]."""

    preset: str = field(default="code", metadata=one_of("code", "paper"))
    """Fills fields left at `None`. 'code' is the released program, which the published numbers come from: sum over the K
    tokens, mean over tokens, no imitation at the threshold itself. 'paper' is the printed formula: divided by K, mean
    over completions, imitation at the threshold."""
    aopd_tau: float = field(
        default=0.0,
        metadata=must("lie between -1 (OPD) and 1 (imitation alone)", lambda value: -1 <= value <= 1),
    )
    """Threshold on `P_T(y) - P_S(y)`: tokens below are imitated, others reinforced. -1 imitates none, which is OPD, and
    1 all, which is distillation on the top K. The released scripts' `aopd_threshold` is its negative."""
    aopd_top_k: int = field(default=32, metadata=at_least(1))
    """`K`: the teacher's likeliest tokens that the imitation is over."""
    aopd_weight: float = field(default=1.0, metadata=at_least(0))
    """Weight of the imitation."""
    aopd_normalize_by_k: bool | None = None
    """Whether the imitation is divided by `K`. `None`: by the preset."""
    aopd_imitate_ties: bool | None = None
    """Whether tokens at the threshold are imitated. `None`: by the preset."""
    aopd_generalized_kl: bool = False
    """Whether `P_S - P_T` on the K tokens is added to the divergence, whose gradient then vanishes where the student has
    the teacher's distribution. In neither source."""
    aopd_allow_temperature: bool = False
    """Whether a `temperature` other than 1 is accepted, at which gate and divergence are then taken."""
    loss_aggregation: str | None = field(default=None, metadata=one_of(*AGGREGATIONS))  # type: ignore[assignment]
    """'token': mean over the tokens of an update; 'sequence': mean over its completions of the mean over their tokens.
    `None`: by the preset."""

    presets: ClassVar[dict[str, dict[str, object]]] = {
        "code": {"aopd_normalize_by_k": False, "aopd_imitate_ties": False, "loss_aggregation": "token"},
        "paper": {"aopd_normalize_by_k": True, "aopd_imitate_ties": True, "loss_aggregation": "sequence"},
    }

    def __post_init__(self) -> None:
        for name, value in self.presets.get(self.preset, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        if self.temperature != 1.0 and not self.aopd_allow_temperature:
            raise ValueError(
                f"`temperature={self.temperature}`: gate and divergence are defined at temperature 1, and would be taken at "
                "this one. Set it to 1, or `aopd_allow_temperature=True` if that is what you want."
            )


class AOPDTrainer(OPDTrainer):
    """
    AOPD: at each token of the student's answer either imitation or on-policy distillation.

    With the probabilities `P_T`, `P_S` of the sampled token `y` and the teacher's K likeliest tokens `S`,

        L_t = aopd_weight F               where P_T(y) - P_S(y) < aopd_tau,     F = sum_S P_T (log P_T - log P_S)
        L_t = -opd_weight A log P_S(y)    elsewhere, as in [`OPDTrainer`]

    Where the teacher finds the token less likely than the student does, a policy gradient only says "not this one";
    there the teacher's own distribution is shown instead. The gate reads detached probabilities at temperature 1.
    `P_T` is not renormalised on `S`, so `F` may be negative, and its gradient does not vanish at a match (see
    [`imitation_term`](objectives.distill.imitation_term)).

    Paper and released program disagree; `preset` chooses:

    | | `"code"` (default) | `"paper"` |
    | --- | --- | --- |
    | threshold itself (`P_T - P_S = aopd_tau`) | distillation | imitation |
    | `F` | sum over `S` | divided by K |
    | average | over tokens | over completions of the mean over their tokens |

    Metrics beside those of [`OPDTrainer`]: `aopd/gate_fraction` (share of tokens imitated), `aopd/imitation_loss` and
    `aopd/policy_loss` (means over the tokens that have that loss, as trained but for its weight), `aopd/topk_mass` (the teacher's mass on
    `S`), `aopd/mean_advantage_gated`.

    Source: "Asymmetric On-Policy Distillation: Bridging Exploitation and Imitation at the Token Level" (arXiv
    2605.06387) and its released program.

    Deviations: the program makes two updates from each batch of rollouts, with a clipped ratio and a gate frozen over
    them; here there is one, so the ratio is 1 and the gate that of the current student. Only the forward divergence is
    offered. The program's `aopd_threshold` is `-aopd_tau`.

    Args and errors: as in [`OPDTrainer`].
    """

    config_class = AOPDConfig
    args: AOPDConfig

    _tag_names = ["trl", "trl-bridge", "aopd"]
    _name = "AOPD"
    _paper = arxiv(
        "2605.06387",
        "Asymmetric On-Policy Distillation: Bridging Exploitation and Imitation at the Token Level",
        "jia2026aopd",
        "Nan Jia and Haojin Yang and Xing Ma and Jiesong Lian and Shuailiang Zhang and Weipeng Zhang and Ke Zeng "
        "and Xunliang Cai and Zequn Sun",
        2026,
    )

    @property
    def teacher_top_k(self) -> int:
        return self.args.aopd_top_k

    def token_losses(
        self, student: StudentScores, teacher: TeacherScores
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        args = self.args
        policy, measured = super().token_losses(student, teacher)
        imitation = imitation_term(
            student.top_log_probs, teacher.top_log_probs, bool(args.aopd_normalize_by_k), args.aopd_generalized_kl
        )
        gate = imitation_gate(student.log_probs, teacher.log_probs, args.aopd_tau, bool(args.aopd_imitate_ties))
        advantages, everywhere = measured["opd/advantage_mean"]
        unweighted = policy_term(student.log_probs, teacher.log_probs, args.advantage_clip).loss
        losses = torch.where(gate, args.aopd_weight * imitation, policy)
        return losses, {
            **measured,
            "aopd/gate_fraction": (gate, everywhere),
            "aopd/imitation_loss": (imitation, gate),
            "aopd/policy_loss": (unweighted, ~gate),
            "aopd/topk_mass": (teacher.top_log_probs.exp().sum(-1), everywhere),
            "aopd/mean_advantage_gated": (advantages, gate),
        }

    def register_state(self, saved: Registry) -> None:
        super().register_state(saved)
        saved.must_match("aopd_tau", "aopd_top_k", "aopd_weight", "aopd_generalized_kl")
        saved.must_match("aopd_normalize_by_k", "aopd_imitate_ties")
