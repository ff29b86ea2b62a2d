"""Arguments of on-policy distillation."""

from dataclasses import dataclass, field
from typing import ClassVar

from trl import DistillationConfig

from ..distillation.refusals import check_config
from ..objectives.distill import AGGREGATIONS


@dataclass
class OPDConfig(DistillationConfig):
    r"""
    Configuration of [`OPDTrainer`]: everything of [`~trl.DistillationConfig`], and the loss of sampled tokens.

    Parameters:
        teacher_model_server_url (`str`, *optional*):
            Base URL of a vLLM server with the teacher, in place of a local one.
        teacher_model_server_timeout (`float`, *optional*, defaults to `60.0`):
            Seconds to wait for that server at the start.
        opd_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the sampled-token loss.
        advantage_clip (`float`, *optional*):
            `c`: advantages `log P_T - log P_S` are clamped to `[-c, c]`. `None` leaves them.
        loss_aggregation (`str`, *optional*, defaults to `"token"`):
            `"token"`: mean over the tokens of an update. `"sequence"`: mean over its completions of the mean over their
            tokens.
    """

    teacher_model_server_url: str | None = field(
        default=None,
        metadata={"help": "Base URL of a vLLM server with the teacher, in place of a local one."},
    )
    teacher_model_server_timeout: float = field(
        default=60.0, metadata={"help": "Seconds to wait for the teacher's server at the start."}
    )
    opd_weight: float = field(default=1.0, metadata={"help": "Weight of the sampled-token loss."})
    advantage_clip: float | None = field(
        default=None,
        metadata={"help": "Advantages are clamped to plus and minus this. None leaves them."},
    )
    loss_aggregation: str | None = field(
        default="token",
        metadata={
            "help": "'token': mean over the tokens of an update; 'sequence': mean over completions of the mean over "
            "their tokens.",
            "choices": list(AGGREGATIONS),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_config(self)
        if self.loss_aggregation not in AGGREGATIONS:
            raise ValueError(
                f"`loss_aggregation` must be one of {', '.join(map(repr, AGGREGATIONS))}, got {self.loss_aggregation!r}."
            )
        if not self.opd_weight >= 0:
            raise ValueError(f"`opd_weight` must not be negative, got {self.opd_weight}.")
        if self.advantage_clip is not None and not self.advantage_clip > 0:
            raise ValueError(f"`advantage_clip` must be above 0, got {self.advantage_clip}. None switches it off.")
        if self.teacher_model_server_url is not None:
            self._check_server()

    def _check_server(self) -> None:
        if self.teacher_model_name_or_path is not None:
            raise ValueError(
                "`teacher_model_server_url` and `teacher_model_name_or_path` name two teachers. Remove one of them."
            )
        if self.temperature != 1.0:
            raise NotImplementedError(
                f"`temperature={self.temperature}` with `teacher_model_server_url` is not supported: whether a server scores "
                "at that temperature depends on how it was started, and cannot be seen from here. Set it to 1."
            )


@dataclass
class AOPDConfig(OPDConfig):
    r"""
    Configuration of [`AOPDTrainer`].

    Parameters:
        preset (`str`, *optional*, defaults to `"code"`):
            Fills fields left at `None`. `"code"` is the released program, which the published numbers come from: sum
            over the K tokens, mean over tokens, no imitation at the threshold itself. `"paper"` is the printed
            formula: divided by K, mean over completions, imitation at the threshold.
        aopd_tau (`float`, *optional*, defaults to `0.0`):
            Threshold on `P_T(y) - P_S(y)`: tokens below are imitated, others reinforced. -1 imitates none, which is OPD,
            and 1 all, which is distillation on the top K. The released scripts' `aopd_threshold` is its negative.
        aopd_top_k (`int`, *optional*, defaults to `32`):
            `K`: the teacher's likeliest tokens that the imitation is over.
        aopd_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the imitation.
        aopd_normalize_by_k (`bool`, *optional*):
            Whether the imitation is divided by `K`.
        aopd_imitate_ties (`bool`, *optional*):
            Whether tokens at the threshold are imitated.
        aopd_generalized_kl (`bool`, *optional*, defaults to `False`):
            Whether `P_S - P_T` on the K tokens is added to the divergence, whose gradient then vanishes where the
            student has the teacher's distribution. In neither source.
        aopd_allow_temperature (`bool`, *optional*, defaults to `False`):
            Whether a `temperature` other than 1 is accepted, at which gate and divergence are then taken.
        loss_aggregation (`str`, *optional*):
            As in [`OPDConfig`].
    """

    preset: str = field(
        default="code",
        metadata={
            "help": "Fills fields left at None: 'code' (the released program) or 'paper' (the printed formula)."
        },
    )
    aopd_tau: float = field(
        default=0.0,
        metadata={"help": "Tokens with P_T - P_S below it are imitated, others reinforced. -1: none, 1: all."},
    )
    aopd_top_k: int = field(default=32, metadata={"help": "The teacher's likeliest tokens that are imitated."})
    aopd_weight: float = field(default=1.0, metadata={"help": "Weight of the imitation."})
    aopd_normalize_by_k: bool | None = field(
        default=None, metadata={"help": "Whether the imitation is divided by K. None: by the preset."}
    )
    aopd_imitate_ties: bool | None = field(
        default=None, metadata={"help": "Whether tokens at the threshold are imitated. None: by the preset."}
    )
    aopd_generalized_kl: bool = field(
        default=False,
        metadata={"help": "Whether P_S - P_T on the K tokens is added, so that the gradient vanishes at a match."},
    )
    aopd_allow_temperature: bool = field(
        default=False, metadata={"help": "Whether a temperature other than 1 is accepted."}
    )
    loss_aggregation: str | None = field(
        default=None,
        metadata={
            "help": "'token' or 'sequence'. None: by the preset.",
            "choices": list(AGGREGATIONS),
        },
    )

    presets: ClassVar[dict[str, dict[str, object]]] = {
        "code": {"aopd_normalize_by_k": False, "aopd_imitate_ties": False, "loss_aggregation": "token"},
        "paper": {"aopd_normalize_by_k": True, "aopd_imitate_ties": True, "loss_aggregation": "sequence"},
    }

    def __post_init__(self) -> None:
        if self.preset not in self.presets:
            raise ValueError(f"`preset` must be one of {', '.join(map(repr, self.presets))}, got {self.preset!r}.")
        for name, value in self.presets[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        if not -1 <= self.aopd_tau <= 1:
            raise ValueError(f"`aopd_tau` must lie between -1 (OPD) and 1 (imitation alone), got {self.aopd_tau}.")
        if self.aopd_top_k < 1:
            raise ValueError(f"`aopd_top_k` must be at least 1, got {self.aopd_top_k}.")
        if not self.aopd_weight >= 0:
            raise ValueError(f"`aopd_weight` must not be negative, got {self.aopd_weight}.")
        if self.temperature != 1.0 and not self.aopd_allow_temperature:
            raise ValueError(
                f"`temperature={self.temperature}`: gate and divergence are defined at temperature 1, and would be taken at "
                "this one. Set it to 1, or `aopd_allow_temperature=True` if that is what you want."
            )
