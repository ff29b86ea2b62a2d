"""The template itself."""

import pytest
import torch

from tests.harness import digits_reward, small_trainer


def test_a_window_cut_off_by_an_exception_leaves_nothing_behind(tmp_path):
    calls = []

    def failing(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 2:
            raise RuntimeError("the verifier is down")
        return digits_reward(completions)

    # Two generations in a window: the second one fails between the window's two micro-batches.
    trainer = small_trainer(tmp_path, reward_funcs=failing, steps_per_generation=1, gradient_accumulation_steps=2)
    with pytest.raises(RuntimeError, match="verifier is down"):
        trainer.train()
    assert trainer._window is not None and trainer._window.micro_batch == 1
    trainer.train()
    assert trainer.state.global_step == 3 and trainer._window is None
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
