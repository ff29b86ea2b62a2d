"""
Names of TRL, transformers and PEFT that are private or unstable, imported in this one file.

`contract/` checks each of them on import, so that a change upstream is a clear message and no wrong training.
"""

# ruff: noqa: E402  the check comes before the imports that would fail
from .contract import check


check()

import contextlib
import copy
import functools
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft.utils import transformers_weight_conversion
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import deepspeed as transformers_deepspeed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import get_json_schema
from trl import GRPOTrainer, is_conversational
from trl.chat_template_utils import parse_response
from trl.generation import vllm_client, vllm_generation
from trl.models.utils import disable_gradient_checkpointing as disable_gradient_checkpointing
from trl.trainer import utils as trl_utils
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head
from trl.trainer.utils import pad as pad
from trl.trainer.utils import split_pixel_values_by_grid as split_pixel_values_by_grid
from trl.trainer.utils import unsplit_pixel_values_by_grid as unsplit_pixel_values_by_grid


# What TRL's client raises where its server does not answer: of `requests`, without which there is no client.
SERVER_GONE: type[OSError] = getattr(vllm_client, "ConnectionError", ConnectionError)
# What TRL's forward takes of a micro-batch beside tokens: pixels, and what says where they belong.
PICTURE_INPUTS = (
    *(
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
    ),
    *("token_type_ids", "mm_token_type_ids", "image_position_ids"),
)
# Set on a model's instance by TRL (fused head) and accelerate (autocast wrapper); bound to the model they were set on.
_INSTANCE_FORWARDS = ("forward", "_original_forward")


def add_demonstration_head(model: PreTrainedModel, cast_lm_head_to_fp32: bool = False) -> None:
    """
    Give a model that GRPO has patched a second fused LM head, at temperature 1, behind the keyword
    `demonstration_head=True`.

    GRPO's own head divides the logits by the sampling temperature, which would make the SFT loss depend on it. Both
    heads score in tiles and never hold the `(batch, seq_len, vocab)` logits.
    """
    policy_forward = model.forward
    add_fused_lm_head(
        model, temperature=1.0, cast_lm_head_to_fp32=cast_lm_head_to_fp32, outputs=("log_probs", "is_top1")
    )
    demonstration_forward = model.forward

    # `generate` validates its arguments against the signature, so the original one is kept.
    @functools.wraps(type(model).forward)
    def dispatch(self: PreTrainedModel, *args: Any, demonstration_head: bool = False, **kwargs: Any) -> Any:
        if demonstration_head:
            return demonstration_forward(*args, fused_lm_head=True, **kwargs)
        return policy_forward(*args, **kwargs)

    model.forward = types.MethodType(dispatch, model)


def plain_copy(
    model: PreTrainedModel,
    temperature: float,
    cast_lm_head_to_fp32: bool,
    entropy: bool,
    memo: dict[int, Any] | None = None,
) -> PreTrainedModel:
    """
    Deep copy of a model that GRPO has patched, with a fused LM head of its own.

    The patched forward is a closure over the model it was made for, so a plain `copy.deepcopy` would answer with the
    *original's* weights. Here the instance's forwards are set aside while copying, and the head is added afresh.
    """
    modules = [model] if not cast_lm_head_to_fp32 else [model, model.get_output_embeddings()]
    set_aside = [
        (module, name, module.__dict__.pop(name))
        for module in modules
        for name in _INSTANCE_FORWARDS
        if name in module.__dict__
    ]
    try:
        copied = copy.deepcopy(model, memo)
    finally:
        for module, name, value in set_aside:
            setattr(module, name, value)
    outputs = ("log_probs", "entropy") if entropy else ("log_probs",)
    add_fused_lm_head(copied, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32, outputs=outputs)
    return copied


@contextlib.contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Other attributes of an object while inside. What is set inside is put back as well."""
    kept = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def isolated_bookkeeping(
    trainer: GRPOTrainer, entropy_control: tuple[float, float] | None = None, micro_batches: int | None = None
) -> Iterator[None]:
    """
    Call TRL's loss or rewards without a trace: metrics, completion logs and the adaptive-entropy controller are
    put back as they were. A loss that is computed later than its micro-batch came names the window's size of then.
    """
    blank: dict[str, Any] = {"_pending_extra_logs": defaultdict(list), "_pending_metrics": defaultdict(list)}
    blank["_metrics"] = {mode: defaultdict(list) for mode in trainer._metrics}
    control = entropy_control or (trainer.entropy_coef, trainer._last_world_entropy)
    blank |= {"entropy_coef": control[0], "_last_world_entropy": control[1], "_entropy_window_stats": None}
    if micro_batches is not None:
        blank["current_gradient_accumulation_steps"] = micro_batches
    with _replaced(trainer, **blank):
        yield


@contextlib.contextmanager
def isolated_generation(trainer: GRPOTrainer) -> Iterator[None]:
    """Let TRL generate and score without a trace in metrics and in the completions' table. Tokens are counted all the same."""
    with _replaced(trainer, _logs=copy.deepcopy(trainer._logs)), isolated_bookkeeping(trainer):
        yield


def forget_synced_weights(trainer: GRPOTrainer) -> None:
    """Let the next generation give vLLM the weights, though no update has been counted since it last had them."""
    trainer._last_loaded_step = -1


@contextlib.contextmanager
def compact_head() -> Iterator[None]:
    """
    While inside, TRL's fused head scores labelled positions only, as it does on CUDA. Elsewhere it scores all of them.
    """
    kept = trl_utils._use_triton  # which decides only that there; the kernel has a name of its own
    trl_utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl_utils._use_triton = kept


def attend_in_segments() -> None:
    """
    Let transformers' "sdpa" attention take `packed_segments`, which a model's forward hands on to it; without them it is
    what it was. Once for a process: generation, evaluation and a checkpointed layer's second forward ask for it by name.
    """
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if hasattr(attention, "without_segments"):
        return

    @functools.wraps(attention)
    def dispatch(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_segments: Any = None,
        **kwargs: Any,
    ) -> Any:
        if packed_segments is None:
            return attention(module, query, key, value, attention_mask, **kwargs)
        return packed_segments.attend(attention, module, query, key, value, **kwargs)

    dispatch.without_segments = attention
    ALL_ATTENTION_FUNCTIONS.register("sdpa", dispatch)


def decode_completions(
    trainer: GRPOTrainer, prompts: list[Any], prompt_ids: list[list[int]], completion_ids: list[list[int]]
) -> list[Any]:
    """
    Completions in the form that reward functions see those of rollouts in (`GRPOTrainer._generate`, without tools).
    """
    tokenizer = trainer._tokenizer
    if not is_conversational({"prompt": prompts[0]}):
        return tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    if any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
        pairs = zip(prompt_ids, completion_ids, strict=True)
        return [[parse_response(tokenizer, ids, prefix=prefix, tools=[])] for prefix, ids in pairs]
    contents = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return [[{"role": "assistant", "content": content}] for content in contents]


def run_tools(
    trainer: GRPOTrainer,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    log_probs: list[list[Any]] | None,
) -> tuple[list[list[int]], list[list[Any]] | None, list[list[int]], list[list[dict[str, Any]]]]:
    """
    What tools answer to first turns that were sampled beside a generation batch, and the turns that follow
    (`GRPOTrainer._generate`, without environments): tokens, log-probabilities, masks of own tokens, and turns.
    """
    pairs, known = zip(prompt_ids, completion_ids, strict=True), cast(list[Any], trainer.tools)
    turns = [[parse_response(trainer._tokenizer, ids, prefix=prefix, tools=known)] for prefix, ids in pairs]
    rows = len(prompt_ids)
    # Of each row, and the same for all.
    tools = {name: getattr(trainer, name)[:1] * rows for name in ("_sync_tool_dicts", "_async_tool_dicts")}
    with _replaced(trainer, **tools):
        masks, turns, completion_ids, log_probs, *_ = trainer._tool_call_loop(
            [[] for _ in prompt_ids], prompt_ids, completion_ids, turns, log_probs, None, {}
        )
    return completion_ids, log_probs, masks, turns


def tool_schemas(trainer: GRPOTrainer) -> dict[str | None, list[dict[str, Any]]]:
    """Schemas that prompts are rendered with (`GRPOTrainer._tokenize_prompts`), by environment; of `None` where there is one set."""
    by_environment = {None: trainer.tools} if trainer.environment_factories is None else trainer._env_tools
    return {
        name: [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]
        for name, tools in by_environment.items()
    }


def without_reference_model(args: Any) -> AbstractContextManager[None]:
    """
    Keep TRL's constructor from building a KL reference.

    For a model object it would load one by the config's id: that fails for a model made in memory, and silently takes
    the hub's weights for one that was changed since.
    """
    return _replaced(args, beta=0.0)


def optimizer_for(
    trainer: Trainer, groups: list[dict[str, Any]], learning_rate: float, optim: Any
) -> torch.optim.Optimizer:
    """An optimizer of the kind that `args.optim` names, over our own parameter groups."""
    args = copy.copy(trainer.args)
    args.optim = optim
    args.learning_rate = learning_rate
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, None)
    optimizer = cls(groups, **kwargs)
    for group in optimizer.param_groups:
        group["initial_lr"] = learning_rate
    return optimizer


def decay_groups(
    trainer: Trainer, model: nn.Module, parameters: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """TRL's two weight-decay groups (`Trainer.create_optimizer`) for another model."""
    decaying = set(trainer.get_decay_parameter_names(model))
    return [
        {"params": [p for name, p in parameters.items() if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters.items() if name not in decaying], "weight_decay": 0.0},
    ]


@contextlib.contextmanager
def scored_by(trainer: GRPOTrainer, score: Callable[..., Any]) -> Iterator[None]:
    """
    While inside, TRL's loss asks this function for scores in place of `_get_per_token_logps_and_entropies`; the innermost
    one where several are.
    """
    attributes, name = vars(trainer), "_get_per_token_logps_and_entropies"
    outer = {name: attributes[name]} if name in attributes else {}
    attributes[name] = score  # before the class's own
    try:
        yield
    finally:
        del attributes[name]
        attributes |= outer


def policy_term_only(trainer: GRPOTrainer) -> AbstractContextManager[None]:
    """While inside, TRL's loss is its RL term, without KL, entropy and auxiliary terms."""
    terms = {"beta": 0.0, "_entropy_bonus_enabled": False, "aux_loss_enabled": False}
    return _replaced(trainer, **terms)


@contextlib.contextmanager
def without_gradient_sync(accelerator: Accelerator) -> Iterator[None]:
    """A DeepSpeed backward inside is not the window's last: accelerate lets the engine step in every synced one."""
    state = accelerator.gradient_state
    synced = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        state._set_sync_gradients(synced)


def set_up_again(args: TrainingArguments) -> None:
    """
    Let the next trainer of this process have the FSDP or DeepSpeed configuration of its own arguments: accelerate keeps
    the last trainer's until training arguments look for their device.
    """
    vars(args).pop("_setup_devices", None)
    _ = args.device


def outside_zero3() -> AbstractContextManager[None]:
    """Models built or run inside are no part of ZeRO-3: transformers and TRL would take their weights for its own."""
    return _replaced(transformers_deepspeed, _hf_deepspeed_config_weak_ref=None)


def is_router(module: nn.Module) -> bool:
    """Whether a layer of transformers is an `nn.Linear` with a forward of its own."""
    own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return own and type(module).__module__.startswith("transformers.models.")


def keep_4_bit_weights(model: nn.Module) -> None:
    """
    Let evaluation leave bitsandbytes' 4-bit weights as training reads them.

    With a CPU that multiplies bfloat16 the first forward in evaluation mode rounds and packs them for a kernel without
    gradient, and training goes on with that one: no gradient comes through the base from then on.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"`model` has been evaluated, for which bitsandbytes has rounded and packed {name!r}: it cannot be trained. Load it again."
            )


def outside_language_model(model: Any) -> list[str]:
    """Names of the linear layers of a vision-language model's tower and connector."""
    if not hasattr(model.config, "vision_config"):
        return []
    inside = {*model.get_decoder().modules(), model.get_output_embeddings()}
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module not in inside]


@contextlib.contextmanager
def linear_layers_only() -> Iterator[None]:
    """
    While inside, PEFT's "all-linear" leaves fused experts and their routers out, layers that are called as those, and what a
    vision-language model has beside its language model.
    """
    convert = transformers_weight_conversion.convert_peft_config_for_transformers

    # PEFT reads the names that a Mixture-of-Experts model had in transformers 4, and targets the parameters that those
    # layers have become. A layer that still has such a name is read so too, here and when the adapter is loaded.
    def linear_only(peft_config: Any, model: nn.Module, conversions: Any) -> None:
        asked, parameters = peft_config.target_modules, peft_config.target_parameters
        patterns = copy.deepcopy((peft_config.rank_pattern, peft_config.alpha_pattern))
        convert(peft_config, model=model, conversions=conversions)
        if str(asked).lower() == "all-linear":
            if peft_config.target_parameters:
                peft_config.target_parameters = parameters
                peft_config.rank_pattern, peft_config.alpha_pattern = patterns
            # Some routers are linear layers that return more than a product, which an adapter cannot be added to.
            left_out = [name for name, module in model.named_modules() if is_router(module)]
            left_out += outside_language_model(model)
            if left_out and not peft_config.exclude_modules:
                peft_config.exclude_modules = left_out

    with _replaced(transformers_weight_conversion, convert_peft_config_for_transformers=linear_only):
        yield


def vllm_parts(**parts: Any) -> AbstractContextManager[None]:
    """While inside, TRL's generation builds these in the place of vLLM's `LLM` and of its own `VLLMClient`."""
    return _replaced(vllm_generation, **parts)


def unpacked_weights() -> AbstractContextManager[None]:
    """
    Engines of vLLM's CPU build that are made inside keep the weights of their linear layers as they were loaded.

    Elsewhere it packs them for other kernels and drops them, and nothing can be loaded into what they have become.
    """
    from vllm.model_executor.layers import utils as vllm_layers

    pack = vllm_layers.dispatch_cpu_unquantized_gemm

    def keep(layer: Any, remove_weight: bool) -> None:
        if layer.weight.dim() == 2:
            layer.cpu_linear = nn.functional.linear
        else:  # a convolution's or fused experts', which have kernels of their own
            pack(layer, remove_weight)

    return _replaced(vllm_layers, dispatch_cpu_unquantized_gemm=keep)


class DeferredGeneration:
    """
    In the place of a trainer's client of a vLLM server, so that the same generation can be asked for and fetched apart.

    TRL's generation blocks its main process between two collectives (`VLLMGeneration.generate`), where no other work
    fits in. So it is called twice with the same prompts: the first call sends the request off and returns at once with
    completions of one token, which the caller drops; the second returns the server's answer.
    """

    def __init__(self, client: Any):
        self._client = client
        self._thread = ThreadPoolExecutor(1)
        self._answer: Future[dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)  # the first call sends the weights before it asks

    def generate(self, prompts: list[list[int]], n: int, **options: Any) -> dict[str, Any]:
        """As the client's own; the first time a stand-in."""
        if self._answer is not None:
            return self._answer.result()
        self._answer = self._thread.submit(self._client.generate, prompts=prompts, n=n, **options)
        rows = n * len(prompts)
        return {"prompt_ids": prompts, "completion_ids": [[0]] * rows, "logprobs": [[[0.0]]] * rows}

    def close(self) -> None:
        """Wait for an answer that nobody fetched, after an error between the two calls."""
        self._thread.shutdown()


@contextlib.contextmanager
def deferred_generation(trainer: GRPOTrainer) -> Iterator[None]:
    """
    While inside, the first `_generate_single_turn` of a trainer in vLLM's server mode only sends the request, and the
    second fetches the answer (see [`DeferredGeneration`]).
    """
    generation: Any = trainer.vllm_generation
    if not trainer.accelerator.is_main_process:
        yield
        return
    client = generation.vllm_client
    deferred = generation.vllm_client = DeferredGeneration(client)
    try:
        yield
    finally:
        generation.vllm_client = client
        deferred.close()


def teacher_client(url: str, timeout: float) -> Any:
    """TRL's client of a vLLM server."""
    check("trl.generation.vllm_client")
    from trl.generation.vllm_client import VLLMClient

    return VLLMClient(base_url=url, connection_timeout=timeout)
