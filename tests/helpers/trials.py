"""A trial before RL, recorded, whose measurements come to given rewards."""

from tests.helpers.streams import weights_of


TRIAL = {"trial_steps": 4, "trial_eval_steps": 2, "trial_prompts": 3}
RISING, FALLING = [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]


def learner_of(trainer):
    """Weights of what learns in a trial: the student, or under DeepSpeed a copy of it."""
    if trainer._fork is None:
        return weights_of(trainer)
    return {name: trainer._fork.held.full(name).clone() for name in trainer._fork.held.parameters}


def paying(trainer_class, rewards):
    """The trainer, whose measurements sample as they do and come to given rewards."""

    class Paying(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.measured, self.drawn, self.after, self.trials = [], [], [], 0

        def _tried(self):
            self.trials += 1
            self.before = weights_of(self)
            return super()._tried()

        def _paid(self, batches):
            self.measured.append(super()._paid(batches))
            return rewards[len(self.measured) - 1]

        def _learner(self, *args):
            learn = super()._learner(*args)

            def recorded(drawn):
                learn(drawn)
                self.drawn.append(drawn)
                self.after.append(learner_of(self))

            return recorded

    return Paying
