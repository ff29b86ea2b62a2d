"""vLLM while training: the type of its weights, and its CPU build, which TRL has no way to hand new weights to."""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.import_utils import is_vllm_available

from .._upstream import unpacked_weights, vllm_parts


@contextlib.contextmanager
def fitted_vllm(args: Any) -> Iterator[None]:
    """
    While TRL's constructor runs inside, the engine or the client that it builds fits `vllm_dtype` and, on a CPU, can be given
    the policy. Where there is a GPU and no `vllm_dtype`, nothing is changed.
    """
    if not args.use_vllm:
        yield
        return
    with contextlib.ExitStack() as inside:
        if args.vllm_mode == "server":
            if args.vllm_dtype is not None:
                raise ValueError(
                    f"`vllm_dtype={args.vllm_dtype!r}` is that of `vllm_mode='colocate'`. A server is started with its own "
                    f"(`vllm serve --dtype {args.vllm_dtype}`): remove it."
                )
            if _serves_by_file(args):
                inside.enter_context(vllm_parts(VLLMClient=FileClient))
        else:
            if args.vllm_dtype is not None:
                engine = functools.partial(vllm_generation.LLM, dtype=args.vllm_dtype)
                inside.enter_context(vllm_parts(LLM=engine))
            if is_vllm_available() and _is_cpu_build():
                inside.enter_context(unpacked_weights())
        yield


def check_served(args: Any, model: Any) -> None:
    """Refuse a model of which a server would read the new weights in part."""
    if not _serves_by_file(args):
        return
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embeddings.weight:
        raise NotImplementedError(
            "`vllm_mode='server'` on a CPU is not supported for a model with tied embeddings (`tie_word_embeddings`): vLLM would "
            "go on with the old LM head, without an error. Use `vllm_mode='colocate'`."
        )


def _serves_by_file(args: Any) -> bool:
    return args.use_vllm and args.vllm_mode == "server" and args.device.type == "cpu" and is_vllm_available()


def _is_cpu_build() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


class FileClient(VLLMClient):
    """TRL's client, whose weights reach a server on the same machine through a file in place of NCCL."""

    def init_communicator(self, device: Any = 0) -> None:
        """Make the folder of that file."""
        self._folder = tempfile.TemporaryDirectory(prefix="trl-bridge-weights-")

    def update_named_params(self, metadata: Any, named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Write the weights and let the server read them."""
        from requests.exceptions import RetryError

        # Copies: an adapter is merged only while the weights are walked through.
        weights = {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in named_params}
        save_file(weights, Path(self._folder.name) / "model.safetensors", metadata={"format": "pt"})
        call = {"method": "reload_weights", "kwargs": {"weights_path": self._folder.name}}
        try:
            self._post(f"{self.base_url}/collective_rpc", json=call)
        except RetryError as error:
            raise RuntimeError(
                f"The vLLM server at {self.base_url} could not read the weights in {self._folder.name}. On a CPU they go "
                "through that folder, so the server has to run on this machine; its own log says more."
            ) from error
