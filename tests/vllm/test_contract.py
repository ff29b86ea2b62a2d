"""What we rely on in vLLM itself."""

import inspect

from tests.helpers.real_vllm import NEEDS_VLLM


pytestmark = NEEDS_VLLM


def test_linear_layers_are_packed_by_one_function():
    from vllm.model_executor.layers import linear, utils

    assert list(inspect.signature(utils.dispatch_cpu_unquantized_gemm).parameters) == ["layer", "remove_weight"]
    # Imported where it is called, so that the module's own name decides.
    process = inspect.getsource(linear.UnquantizedLinearMethod.process_weights_after_loading)
    assert "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm" in process
    assert "return layer.cpu_linear(x, weight, bias)" in inspect.getsource(utils.cpu_unquantized_gemm)


def test_weights_are_read_anew_from_a_folder():
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "weights_path" in inspect.signature(GPUModelRunner.reload_weights).parameters
