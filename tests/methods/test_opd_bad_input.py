"""What cannot be had is refused before training, by name."""

import pytest
from accelerate.utils import DistributedType

from tests.helpers.distillation import distillation_config, distillation_trainer, small_teacher, tokenizer
from tests.helpers.lightning_opd import make
from tests.helpers.training import small_model
from trl_bridge import AOPDConfig, AOPDTrainer, OPDConfig, OPDTrainer
from trl_bridge.methods.distillation_refusals import REFUSED, check_backend, check_config
from trl_bridge.models import tiny_tokenizer


VALUES = {
    "beta": 0.5,
    "use_liger_kernel": True,
    "torch_compile": True,
    "neftune_noise_alpha": 5.0,
    "fp16": True,
    "parallelism_config": object(),
    "auto_find_batch_size": True,
    "enable_jit_checkpoint": True,
}


def test_a_value_for_every_refusal():
    assert VALUES.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", VALUES)
def test_refused_option_raises(tmp_path, name):
    args = distillation_config(tmp_path, OPDConfig)
    setattr(args, name, VALUES[name])
    with pytest.raises(NotImplementedError, match=f"`{name}` is not supported by OPDConfig"):
        check_config(args)


BEST = {"load_best_model_at_end": True, "save_only_model": True, "save_strategy": "steps", "eval_strategy": "steps",
        "save_steps": 5, "eval_steps": 5}  # fmt: skip
SERVER = {"teacher_model_server_url": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("config_class", "changes", "error", "message"),
    [
        (OPDConfig, {"beta": 0.0}, NotImplementedError, "`beta`"),
        (OPDConfig, {"top_p": 0.9}, ValueError, "`top_p`: top_p=0.9 draws tokens from another distribution"),
        (OPDConfig, {"top_k": 5}, ValueError, "`top_k`"),
        (OPDConfig, {"min_p": 0.1}, ValueError, "`min_p`"),
        (OPDConfig, {"repetition_penalty": 1.1}, ValueError, "`repetition_penalty`"),
        (OPDConfig, {"generation_kwargs": {"top_p": 0.9}}, ValueError, "`generation_kwargs`: top_p"),
        (OPDConfig, {"generation_kwargs": {"do_sample": False}}, ValueError, "`generation_kwargs`: do_sample"),
        (OPDConfig, {"generation_kwargs": {"temperature": 0.5}}, ValueError, "`generation_kwargs`.*temperature"),
        (OPDConfig, {"loss_aggregation": "rows"}, ValueError, "`loss_aggregation`.*'token', 'sequence', got 'rows'"),
        (OPDConfig, {"loss_aggregation": None}, ValueError, "`loss_aggregation`"),
        (OPDConfig, {"opd_weight": -1.0}, ValueError, "`opd_weight`"),
        (OPDConfig, {"advantage_clip": 0.0}, ValueError, "`advantage_clip`.*None switches it off"),
        (
            OPDConfig,
            {**SERVER, "teacher_offload": True},
            ValueError,
            "`teacher_offload` has no effect with `teacher_model_s",
        ),
        (OPDConfig, {**SERVER, "teacher_model_name_or_path": "x"}, ValueError, "two teachers"),
        (OPDConfig, BEST, ValueError, "`load_best_model_at_end` with `save_only_model`"),
        (AOPDConfig, {"preset": "published"}, ValueError, "`preset` must be one of 'code', 'paper'"),
        (AOPDConfig, {"aopd_tau": 1.5}, ValueError, "`aopd_tau`"),
        (AOPDConfig, {"aopd_top_k": 0}, ValueError, "`aopd_top_k`"),
        (AOPDConfig, {"aopd_weight": -0.1}, ValueError, "`aopd_weight`"),
        (AOPDConfig, {"temperature": 0.7}, ValueError, "`temperature=0.7`.*aopd_allow_temperature"),
    ],
)
def test_config(tmp_path, config_class, changes, error, message):
    with pytest.raises(error, match=message):
        distillation_config(tmp_path, config_class, **changes)


def test_sampling_that_changes_nothing_is_accepted(tmp_path):
    kept = {"top_p": 1.0, "min_p": 0.0, "generation_kwargs": {"top_k": 0, "temperature": 1.0}}
    config = distillation_config(tmp_path, OPDConfig, **kept)
    assert {name: getattr(config, name) for name in kept} == kept


def test_no_teacher(tmp_path):
    with pytest.raises(ValueError, match="AOPDTrainer needs a teacher.*`teacher_model_server_url`"):
        distillation_trainer(tmp_path, AOPDTrainer, teacher_model=None)


def test_two_teachers(tmp_path):
    with pytest.raises(ValueError, match="`teacher_model` and `teacher_model_server_url`"):
        distillation_trainer(tmp_path, OPDTrainer, teacher_model=small_teacher(), **SERVER)


def test_arguments_of_another_trainer(tmp_path):
    with pytest.raises(TypeError, match="`args` of AOPDTrainer must be a `AOPDConfig`, got `OPDConfig`"):
        distillation_trainer(tmp_path, AOPDTrainer, OPDConfig)


def test_teacher_with_another_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="vocab_size"):
        distillation_trainer(tmp_path, OPDTrainer, teacher_model=small_model())


def test_teacher_with_another_tokenizer(tmp_path, caplog):
    folder = tmp_path / "teacher"
    small_teacher().save_pretrained(folder)
    # As many tokens, in another order.
    tiny_tokenizer("+=9876543210").save_pretrained(folder)
    with pytest.raises(ValueError, match=r"another tokenizer than the student: 12 tokens differ, among them '\+'"):
        distillation_trainer(tmp_path, OPDTrainer, teacher_model=str(folder))
    tokenizer().save_pretrained(folder)
    distillation_trainer(tmp_path, OPDTrainer, teacher_model=str(folder))


def test_teacher_without_a_tokenizer_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("trl_bridge.distillation.teacher.logger.warning", said.append)
    small_teacher().save_pretrained(tmp_path / "teacher")
    distillation_trainer(tmp_path, OPDTrainer, teacher_model=str(tmp_path / "teacher"))
    assert "No tokenizer is stored with the teacher" in said[0]


@pytest.mark.parametrize("make_trainer", [lambda folder: distillation_trainer(folder, OPDTrainer), make])
def test_backends(tmp_path, monkeypatch, make_trainer):
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.MULTI_XPU)
    monkeypatch.setattr("accelerate.Accelerator.prepare_model", lambda self, model, **kwargs: model)
    with pytest.raises(NotImplementedError, match="Training with .*MULTI_XPU.* is not supported"):
        make_trainer(tmp_path)


@pytest.mark.parametrize("make_trainer", [lambda folder: distillation_trainer(folder, OPDTrainer), make])
@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_quantised_base_is_not_sharded(tmp_path, monkeypatch, kind, make_trainer):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr("trl_bridge.methods.distillation_refusals.backend_for", lambda accelerator: None)
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", kind)
    check_backend(trainer.accelerator, trainer.model)
    trainer.model.is_quantized = True
    with pytest.raises(NotImplementedError, match=f"quantised base has not been tested with {kind.value}"):
        check_backend(trainer.accelerator, trainer.model)


def test_an_offloaded_teacher_is_not_spread(tmp_path, monkeypatch):
    deepspeed = pytest.importorskip("trl_bridge.training.backends.zero")
    backend = object.__new__(deepspeed.ZeroBackend)
    model = small_model()
    for backend.stage in (1, 2):
        assert backend.place_frozen(model, True) is model
    backend.stage = 3
    assert backend.place_frozen(model, False) is model
    with pytest.raises(NotImplementedError, match="`teacher_offload` is not supported under ZeRO-3.*False"):
        backend.place_frozen(model, True)
