"""
Peak memory of GRPO and BRIDGE, measured, beside what `trl-bridge memory` computes for the same run.

    python benchmarks/memory.py [--hidden_size 512] [--layers 6] [--vocab_size 4096] [--backends one-process ddp fsdp2] [--bf16]

Each run is a process of its own (two gloo ranks under DDP and FSDP2), on CPU, from before the model is made to the end of its second
update, when the optimizers have their states. A `TorchDispatchMode` sees every tensor that an operation returns, DDP's buckets and
what autograd saves included, and adds up the bytes of the storages that are alive; the figure is their peak, on the rank that has
more. Two micro-batches make an update, so that a backward finds the gradient of the one before. In one process `torch.profiler`'s
record of the allocator gives the same peak; with several it misses what gloo's threads free.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the stand-in that lets FSDP run on CPU

VARIANTS = {
    "GRPO": {"method": "grpo"},
    "BRIDGE": {"method": "bridge"},
    "BRIDGE, SGD shadow": {"method": "bridge", "shadow_optim": "sgd"},
    "BRIDGE, selective": {"method": "bridge", "preset": "selective"},
    "GRPO, LoRA": {"method": "grpo", "rank": 16},
    "BRIDGE, lean": {"method": "bridge", "lean": True, "lean_lora_r": 12, "rank": 4},
    "BRIDGE, lean, SGD shadow": {
        "method": "bridge",
        "lean": True,
        "lean_lora_r": 12,
        "rank": 4,
        "shadow_optim": "sgd",
    },
    "BRIDGE, lean, no gain": {
        "method": "bridge",
        "lean": True,
        "lean_lora_r": 12,
        "rank": 4,
        "cooperative_gain": False,
    },
}
# What a variant's peak is divided by.
BASES = ("GRPO", "GRPO, LoRA")


@dataclasses.dataclass
class Sizes:
    hidden_size: int = 512
    layers: int = 6
    heads: int = 8
    vocab_size: int = 4096
    batch_size: int = 8
    prompt_length: int = 12
    completion_length: int = 20
    bf16: bool = False
    gradient_checkpointing: bool = False


def make_config(sizes):
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=3 * sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads // 2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        dtype="float32",
    )


def make_model(sizes):
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(make_config(sizes))


def reward(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


def make_trainer(variant, sizes, backend, folder):
    """The trainer of a variant. Every completion has full length; prompts differ in length, so that batches are padded."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from trl_bridge import BridgeConfig, BridgeTrainer
    from trl_bridge.models import tiny_tokenizer

    changes = dict(VARIANTS[variant])
    bridge, rank = changes.pop("method") == "bridge", changes.pop("rank", None)
    prompts = [f"{a}+{b}=" + "?" * (sizes.prompt_length - 6 - a % 2) for a in range(10, 42) for b in range(10, 20)]
    config = {
        "output_dir": folder, "use_cpu": backend != "fsdp2", "bf16": sizes.bf16, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1000, "gradient_checkpointing": sizes.gradient_checkpointing,
        "per_device_train_batch_size": sizes.batch_size, "num_generations": 4, "gradient_accumulation_steps": 2,
        "max_completion_length": sizes.completion_length, "max_steps": 2, "optim": "adamw_torch_fused",
        "generation_kwargs": {"min_new_tokens": sizes.completion_length}, **changes,
    }  # fmt: skip
    if backend == "fsdp2":
        config.update(fsdp=True, fsdp_config={"version": 2, "cpu_ram_efficient_loading": False})
    options = {}
    if rank:
        options["peft_config"] = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    if bridge:
        answers = ["1" * (sizes.completion_length - 1)] * len(prompts)
        options["sft_dataset"] = Dataset.from_dict({"prompt": prompts, "completion": answers})
    return (BridgeTrainer if bridge else GRPOTrainer)(
        model=make_model(sizes),
        reward_funcs=reward,
        args=(BridgeConfig if bridge else GRPOConfig)(**config),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tiny_tokenizer(),
        **options,
    )


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside have returned and that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._see(getattr(tensor, "_local_tensor", tensor))  # of a DTensor what this rank holds
        return output

    def _see(self, tensor):
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage not in self._sizes:
            self._sizes[storage] = size = [0]
            weakref.finalize(storage, self._change, size, 0)
        self._change(self._sizes[storage], storage.nbytes())

    def _change(self, size, to):
        self.live += to - size[0]
        size[0] = to
        self.peak = max(self.peak, self.live)

    def __enter__(self):
        # FSDP frees and takes back gathered weights by resizing, which is no operation.
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_(storage, size):
            result = resize(storage, size)
            if storage in self._sizes:
                self._change(self._sizes[storage], size)
            return result

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *args):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*args)


def peak_of(variant, sizes, backend):
    """Peak and final live bytes of building and training a variant."""
    with LiveBytes() as memory:
        trainer = train(variant, sizes, backend)
    result = {"peak": memory.peak, "end": memory.live}
    del trainer
    return result


def formula(variant, sizes, backend):
    """The estimate for a variant."""
    from trl_bridge.memory.formulas import Run, estimate
    from trl_bridge.memory.shapes import shape_of

    changes, length = VARIANTS[variant], sizes.prompt_length + sizes.completion_length
    bridge = changes["method"] == "bridge"
    adapter = changes.get("rank", 0) + changes.get("lean_lora_r", 0)
    run = Run(
        backend=backend,
        num_processes=1 if backend == "one-process" else 2,
        bf16=sizes.bf16,
        shadow_state_bytes=0 if "shadow_optim" in changes else 8,
        rows=sizes.batch_size,
        prompt_length=sizes.prompt_length,
        completion_length=sizes.completion_length,
        demonstration_rows=sizes.batch_size // 4 if bridge else 0,
        demonstration_length=length if bridge else 0,
        accumulation=2,
        unsynced=not bridge,
        checkpointing=sizes.gradient_checkpointing,
        coordinator_rank=16 if bridge and not adapter else 0,
        adapter_rank=adapter,
        shadow=bridge and "preset" not in changes and "cooperative_gain" not in changes,
        generation_rows=2 * sizes.batch_size,
        triton=False,
    )
    return estimate(shape_of(make_config(sizes)), run)


def train(variant, sizes, backend):
    """Build and train a variant; whatever it keeps is returned, so that it is alive at the end."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(variant, sizes, backend, folder)
        trainer.train()
    return trainer


def measure(variant, sizes, backend):
    """The figures of one variant, from fresh processes."""
    command = [sys.executable, __file__]
    if backend != "one-process":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
        command += ["--rdzv_endpoint", "localhost:0", __file__]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--only", variant, "--backends", backend, "--out", folder]
        done = subprocess.run(command + ["--sizes", json.dumps(vars(sizes))], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        ranks = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return max(ranks, key=lambda rank: rank["peak"])


def run_alone(variant, sizes, backend, out):
    rank = int(os.environ.get("RANK", "0"))
    if backend == "fsdp2":
        from tests.distributed.run import pretend_accelerator

        pretend_accelerator()
    (Path(out) / f"{rank}.json").write_text(json.dumps(peak_of(variant, sizes, backend)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Sizes):
        if field.type is bool or field.type == "bool":
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--backends", nargs="+", default=["one-process", "ddp", "fsdp2"])
    for name in ("only", "out", "sizes"):
        parser.add_argument(f"--{name}", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        run_alone(options.only, Sizes(**json.loads(options.sizes)), options.backends[0], options.out)
        return
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)})
    print(f"machine: {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"sizes: {vars(sizes)}")
    print("| | backend | measured, MB | / GRPO's | formula, MB | formula / measured |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for backend in options.backends:
        base = 1.0
        for variant in VARIANTS:
            peak = measure(variant, sizes, backend)["peak"]
            base = peak if variant in BASES else base
            said = formula(variant, sizes, backend).total
            print(
                f"| {variant} | {backend} | {peak / 1e6:.1f} | {peak / base:.2f} | {said / 1e6:.1f} | {said / peak:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
