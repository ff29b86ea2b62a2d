"""What vLLM is built with beside a trainer, and how its CPU build gets the policy; with stand-ins (`tests/vllm` has vLLM itself)."""

import sys
import types

import pytest
import torch
from requests.exceptions import RetryError
from safetensors.torch import load_file
from trl.generation import vllm_generation

from trl_bridge.generation import vllm_training
from trl_bridge.generation.vllm_training import FileClient, check_served, fitted_vllm
from trl_bridge.models import tiny_model, tiny_tokenizer


class Engine:
    def __init__(self, **options):
        self.options = options


def arguments(**changes):
    options = {"use_vllm": True, "vllm_mode": "colocate", "vllm_dtype": None, "device": torch.device("cpu")}
    return types.SimpleNamespace(**{**options, **changes})


@pytest.fixture
def vllm(monkeypatch):
    """vLLM's platform, as a value to be set, and its layers, whose weights are lost when they are packed."""
    found = types.SimpleNamespace(cpu=False, packed=[])
    found.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: found.packed.append(layer)
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(vllm_training, "is_vllm_available", lambda: True)
    platforms = types.SimpleNamespace(current_platform=types.SimpleNamespace(is_cpu=lambda: found.cpu))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers", types.SimpleNamespace(utils=found))
    return found


def test_where_there_is_a_gpu_nothing_is_changed(vllm):
    engine, client = vllm_generation.LLM, vllm_generation.VLLMClient
    for mode in ("colocate", "server"):
        with fitted_vllm(arguments(vllm_mode=mode, device=torch.device("cuda"))):
            assert (vllm_generation.LLM, vllm_generation.VLLMClient) == (engine, client)
            vllm.dispatch_cpu_unquantized_gemm(torch.nn.Linear(2, 2), remove_weight=True)
    assert len(vllm.packed) == 2


def test_the_engine_gets_the_type_that_is_asked_for(vllm):
    with fitted_vllm(arguments(vllm_dtype="float32")):
        assert vllm_generation.LLM(model="a").options == {"model": "a", "dtype": "float32"}
    assert vllm_generation.LLM is Engine


def test_the_cpu_build_keeps_plain_weights_while_the_engine_is_built(vllm):
    vllm.cpu = True
    linear, convolution = torch.nn.Linear(2, 3), torch.nn.Conv1d(1, 1, 1)
    with fitted_vllm(arguments()):
        for layer in (linear, convolution):
            vllm.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert vllm.packed == [convolution]
    x = torch.ones(1, 2)
    assert torch.equal(linear.cpu_linear(x, linear.weight, linear.bias), linear(x))
    vllm.dispatch_cpu_unquantized_gemm(linear, remove_weight=True)
    assert vllm.packed == [convolution, linear]


def test_on_a_cpu_the_servers_client_is_ours(vllm):
    client = vllm_generation.VLLMClient
    with fitted_vllm(arguments(vllm_mode="server")):
        assert vllm_generation.VLLMClient is FileClient
    assert vllm_generation.VLLMClient is client


def test_a_type_for_a_server_is_refused():
    with (
        pytest.raises(ValueError, match=r"`vllm_dtype='float32'`.*vllm serve --dtype float32"),
        fitted_vllm(arguments(vllm_mode="server", vllm_dtype="float32")),
    ):
        pass


# The client


@pytest.fixture
def client(monkeypatch):
    """A client of a server that loads what it is told to."""
    monkeypatch.setattr(FileClient, "__init__", lambda self: None)
    made = FileClient()
    made.base_url, made.loaded = "http://here:8000", []

    def post(url, json):
        assert url == "http://here:8000/collective_rpc" and json["method"] == "reload_weights"
        made.loaded.append(load_file(f"{json['kwargs']['weights_path']}/model.safetensors"))

    made._post = post
    return made


def test_the_weights_are_those_of_the_walk(client):
    """Views and tensors that change once the walk is over are sent as they were."""
    client.init_communicator(torch.device("cpu"))
    weight = torch.arange(6.0).reshape(2, 3)

    def walk():
        yield "a", weight.T
        yield "b", weight
        weight.zero_()

    client.update_named_params([], walk())
    client.update_named_params([], iter([("b", weight)]))
    first, second = client.loaded
    assert torch.equal(first["a"], torch.arange(6.0).reshape(2, 3).T)
    assert torch.equal(first["b"], torch.arange(6.0).reshape(2, 3))
    assert set(second) == {"b"} and not second["b"].any()


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_are_refused_by_name(vllm, tied):
    model = tiny_model(tiny_tokenizer(), tie_word_embeddings=tied)
    check_served(arguments(), model)
    check_served(arguments(vllm_mode="server", device=torch.device("cuda")), model)
    if not tied:
        check_served(arguments(vllm_mode="server"), model)
        return
    with pytest.raises(NotImplementedError, match=r"`tie_word_embeddings`.*vllm_mode='colocate'"):
        check_served(arguments(vllm_mode="server"), model)


def test_a_server_that_cannot_read_the_folder_is_named(client):
    def post(url, json):
        raise RetryError("too many 500 error responses")

    client.init_communicator(torch.device("cpu"))
    client._post = post
    with pytest.raises(RuntimeError, match="http://here:8000 could not read the weights .* run on this machine"):
        client.update_named_params([], iter([("a", torch.ones(1))]))
