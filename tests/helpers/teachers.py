"""Teachers beside the reward: small ones on disk, and what the float64 reference needs of them."""

import torch

from tests.helpers.streams import weights_of
from tests.helpers.training import clone, small_model
from trl_bridge.models import tiny_tokenizer
from trl_bridge.selftest.reference import objectives


def sharp(seed=5):
    """A model with an opinion: an untrained one is almost uniform, and every gap would be near zero."""
    model = small_model(seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    return model


def stored(folder, model):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def recording(trainer_class):
    """GRPO's micro-batches, and the weights after each update."""

    class Recording(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.windows, self.states, self._open = [], [], []
            self.start = weights_of(self)

        def _compute_loss(self, model, inputs):
            if self.model.training:
                self._open.append(clone(inputs))
            return super()._compute_loss(model, inputs)

        def log(self, logs, start_time=None):
            if "loss" in logs:
                self.windows.append({"rl": self._open, "sft": [], "weights": []})
                self._open = []
                self.states.append(weights_of(self))
            super().log(logs, start_time)

    return type(trainer_class.__name__, (Recording,), {})


def scored(windows, teacher, temperature, part=None):
    """Recorded windows with a teacher's log-probabilities in float64; `teacher` may be one model, or one for each row's id."""
    for update, window in enumerate(windows):
        batches = window if isinstance(window, list) else window["rl"]
        for batch in batches:
            with torch.no_grad():
                log_p, _ = objectives.scores(teacher.double().eval(), {}, batch, temperature)
            batch.update(teacher_log_p=log_p, update=update)
    return windows
