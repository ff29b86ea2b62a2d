import os


# Before torch, transformers or TRL are imported: nothing here may reach for the network or report home.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)
# Assertions in the helpers say as much as those in the tests.
pytest.register_assert_rewrite("tests.helpers")


@pytest.fixture(scope="session")
def tokenizer():
    from trl_bridge.models import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny():
    """A small model that takes conversations, and its tokenizer."""
    from trl_bridge.models import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer(chat_template=True)
    return tiny_model(tokenizer, hidden_size=32, layers=2), tokenizer


@pytest.fixture
def quick_batches(monkeypatch):
    """Without the collection of garbage before each batch, which costs these small batches more than the model."""
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)
