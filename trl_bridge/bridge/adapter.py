"""The coordinator as a PEFT adapter directory, to look at."""

from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from .coordinator import Coordinator


def save_adapter(coordinator: Coordinator, output_dir: Path) -> None:
    """
    Write `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        coordinator ([`Coordinator`]):
            The coordinator.
        output_dir (`Path`):
            Folder to write to.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in coordinator.state_dict().items()}
    # The mark by which `trl-bridge merge` knows it: merged into the saved policy, which holds it already, w would count twice.
    save_file(tensors, output_dir / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt", "trl_bridge": "coordinator"})
    config = coordinator.peft_config
    config.inference_mode = True
    config.save_pretrained(str(output_dir))
