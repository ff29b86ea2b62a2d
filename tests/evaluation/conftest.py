import pytest

from trl_bridge.models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def tiny():
    tokenizer = tiny_tokenizer(chat_template=True)
    return tiny_model(tokenizer, hidden_size=32, layers=2), tokenizer


@pytest.fixture(autouse=True)
def quick_batches(monkeypatch):
    """Without the collection of garbage before each batch, which costs these small batches more than the model."""
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)
