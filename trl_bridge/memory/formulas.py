"""
Memory of one training process, computed from the shapes of a model and the options of a run, before anything is launched.

Pure arithmetic: no torch. `benchmarks/memory.py` compares it with measured peaks; `docs/scaling.md` says where.
"""

from dataclasses import dataclass, field


BACKENDS = ("one-process", "ddp", "fsdp2", "zero1", "zero2", "zero3")
# Of these `benchmarks/memory.py` measures the peak; of the rest nothing has been measured.
_MEASURED = ("one-process", "ddp", "fsdp2")
# TRL's fused head scores so many tokens against so many entries of the vocabulary at a time.
_TOKEN_TILE, _VOCABULARY_TILE = 4096, 32768
# Where there is no Triton (CPU) the tile is worked on in float32 copies: this many are alive at once.
_TILE_COPIES_WITHOUT_TRITON = 7.25
# DeepSpeed's default `reduce_bucket_size` and `stage3_max_live_parameters`, elements.
_ZERO_BUCKET, _ZERO3_LIVE = 5 * 10**8, 10**9
_OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_torch_8bit": 2,
    "adamw_torch_4bit": 1,
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "sgd": 0,
}


def optimizer_bytes(name: str) -> int:
    """State of an optimizer for each trained element."""
    if name not in _OPTIMIZER_BYTES:
        raise ValueError(f"`optim={name}`: its memory is not known, only that of {', '.join(_OPTIMIZER_BYTES)}")
    return _OPTIMIZER_BYTES[name]


@dataclass(frozen=True)
class ModelShape:
    """What the formulas need of a decoder."""

    parameters: int
    root_parameters: int
    layer_parameters: int
    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    attention_size: int
    adapter_width: int


@dataclass(frozen=True)
class Run:
    """Options that memory depends on. Sizes are of one process."""

    backend: str = "one-process"
    num_processes: int = 1
    bf16: bool = True
    state_bytes: int = 8
    shadow_state_bytes: int = 8
    rows: int = 8
    prompt_length: int = 512
    completion_length: int = 256
    demonstration_rows: int = 0
    demonstration_length: int = 0
    accumulation: int = 1
    unsynced: bool = False
    checkpointing: bool = True
    reference: bool = False
    teacher_bytes: float = 0
    teacher_offload: bool = False
    averaged: bool = False
    whole_logits: bool = False
    coordinator_rank: int = 0
    shadow: bool = False
    shadow_offload: bool = False
    shadow_bf16: bool = False
    shadow_overlap: bool = False
    adapter_rank: int = 0
    base_bytes: float = 4
    generation_rows: int = 0
    vllm_bytes: int = 0
    vllm_sleeps: bool = False
    triton: bool = True

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed holds the student."""
        return self.backend.startswith("zero")

    @property
    def weight_shards(self) -> int:
        """Ranks that the student's weights are spread over."""
        return self.num_processes if self.backend in ("fsdp2", "zero3") else 1

    @property
    def shadow_shards(self) -> int:
        """Ranks that the shadow is spread over. The lean mode's is an adapter, which each rank has in full."""
        return 1 if self.adapter_rank else self.num_processes

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element in the passes."""
        return 2 if self.bf16 else 4

    @property
    def autocast(self) -> bool:
        """Whether the passes cast float32 weights as they go."""
        return self.bf16 and self.backend in ("one-process", "ddp")

    @property
    def casts(self) -> bool:
        """Whether autocast keeps a 16-bit copy of all weights during a pass; a base in 16 bits or fewer needs none."""
        return self.autocast and not (self.adapter_rank and self.base_bytes < 4)

    @property
    def measured(self) -> bool:
        """Whether `benchmarks/memory.py` measures a peak of this kind."""
        offloaded = self.shadow_offload or self.shadow_bf16 or self.adapter_rank or self.vllm_bytes
        others = self.reference or self.teacher_bytes or self.averaged or self.whole_logits
        plain = not self.bf16 and not self.checkpointing and not offloaded and not others
        return self.backend in _MEASURED and plain


@dataclass
class Estimate:
    """Bytes by part at the moment of the peak."""

    parts: dict[str, int] = field(default_factory=dict)
    measured: bool = False

    @property
    def total(self) -> int:
        """Sum of the parts, bytes."""
        return sum(self.parts.values())


def estimate(shape: ModelShape, run: Run) -> Estimate:
    """Peak of one process. What is alive in each of an update's phases is added up, and the largest is the answer."""
    if run.backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {run.backend!r}")
    if (run.num_processes < 1) or (run.backend == "one-process") != (run.num_processes == 1):
        raise ValueError(
            f"`num_processes={run.num_processes}` with `backend={run.backend}`: one-process has one, the others have more"
        )
    held = _held(shape, run)
    phases = [{**held, **phase} for phase in _phases(shape, run)]
    parts = {name: round(size) for name, size in max(phases, key=lambda p: sum(p.values())).items() if round(size)}
    return Estimate(parts, run.measured)


def _held(shape: ModelShape, run: Run) -> dict[str, float]:
    """What is there throughout."""
    total, adapter = shape.parameters, shape.adapter_width * run.adapter_rank
    trained, frozen = (adapter, total * run.base_bytes) if adapter else (total, 0.0)
    # DeepSpeed works on a copy of its float32 master, and always spreads the master and the state.
    working, master = (run.compute_bytes, 4) if run.deepspeed else (4, 0)
    reference = run.reference and not adapter
    # The lean mode's is a slice of the adapter.
    coordinator = 0 if adapter else shape.adapter_width * run.coordinator_rank
    buffers = trained * 4 if run.backend == "ddp" else 0
    if run.deepspeed and not adapter:
        buffers = min(total, _ZERO_BUCKET) * run.compute_bytes
    # `shadow_dtype` has a working copy beside the float32 weights; rows that are spread are cast as they are gathered.
    copies = 6 if run.shadow_bf16 and run.num_processes == 1 and not adapter else 4
    shadow = run.shadow and not run.shadow_offload
    state_shards = run.num_processes if run.deepspeed else run.weight_shards
    return {
        "reference": total * working / run.weight_shards if reference else 0.0,
        "teachers": 0.0 if run.teacher_offload else run.teacher_bytes / run.weight_shards,
        "averaged weights": trained * 4 / run.weight_shards if run.averaged else 0,
        "coordinator": coordinator * (4 + run.state_bytes),
        "weights": (frozen + trained * working) / run.weight_shards,
        "optimizer": trained * (master + run.state_bytes) / state_shards,
        "reduction buffers": buffers,
        "shadow": trained * (copies + run.shadow_state_bytes) / run.shadow_shards if shadow else 0,
    }


def _phases(shape: ModelShape, run: Run) -> list[dict[str, float]]:
    """What comes and goes: generation, the policy's, the shadow's and the demonstrations' pass, the step."""
    trained = shape.adapter_width * run.adapter_rank or shape.parameters
    student, between = _student_gradient(trained, run), run.accumulation > 1
    shadow = trained * 4 / run.shadow_shards if run.shadow and not run.shadow_offload else 0.0
    rollouts = _pass(shape, run, run.rows, run.prompt_length + run.completion_length, run.completion_length)
    if run.whole_logits:
        # Of student and teacher, of the tokens chosen among them, and the student's gradient, in float32.
        rollouts["logits"] = 5.0 * 4 * run.rows * run.completion_length * shape.vocab_size
    # The shadow runs when the student has stepped, and its gradient is gone; under DeepSpeed before that, and with
    # `shadow_overlap` before the student's passes.
    waits = {"shadow's gradients": shadow if run.shadow_overlap else 0.0}
    still = {"gradients": student if run.deepspeed else 0.0}
    # Of an update's first micro-batch there is no gradient yet.
    phases: list[dict[str, float]] = [{**waits, "gradients": student if between else 0.0, **rollouts}]
    if run.shadow:
        # Spread over ranks it comes layer by layer, from the CPU too.
        loaded = run.shadow_offload and run.shadow_shards == 1
        phases.append(
            {
                **({} if run.shadow_overlap else still),
                "shadow's gradients": shadow if between else 0.0,
                "shadow, while it is on the GPU": trained * (2.0 if run.shadow_bf16 else 4.0) if loaded else 0.0,
                **_shadow_pass(shape, run, rollouts),
            }
        )
    if run.demonstration_rows:
        length = run.demonstration_length
        phases.append({**waits, "gradients": student, **_pass(shape, run, run.demonstration_rows, length, length)})
    # The student's step, and that of the coordinator.
    phases += [{**waits, "gradients": student}, {**still, "shadow's gradients": shadow, "step": _step(shape, run)}]
    if run.teacher_bytes:
        phases.append({"teachers, while they score": _scoring(run)})
    if run.vllm_sleeps:
        phases.append({"vLLM": run.vllm_bytes})
    else:
        phases = [{**phase, "vLLM": run.vllm_bytes} for phase in phases]
    # vLLM and transformers' own generation do not meet.
    return [*phases, _generation(shape, run)] if run.generation_rows else phases


def _scoring(run: Run) -> float:
    """What comes of teachers to score rollouts: all of them from the CPU, or what is gathered of their shards."""
    if run.backend == "zero3":
        return min(run.teacher_bytes, 2.0 * _ZERO3_LIVE)
    return run.teacher_bytes if run.teacher_offload or run.weight_shards > 1 else 0.0


def _student_gradient(trained: int, run: Run) -> float:
    """Accumulated gradient; under DeepSpeed with its float32 copy for the step."""
    if run.backend == "fsdp2" and run.unsynced and run.accumulation > 1:
        return trained * run.compute_bytes
    if run.adapter_rank or not run.deepspeed:
        return trained * 4 / run.weight_shards
    spread = 1 if run.backend == "zero1" else run.num_processes
    return trained * run.compute_bytes / spread + (4 * trained / run.num_processes if run.bf16 else 0)


def _step(shape: ModelShape, run: Run) -> float:
    """The change of one weight of the coordinator's largest target, on both copies."""
    return 4.0 * shape.hidden_size * shape.intermediate_size if run.coordinator_rank and not run.adapter_rank else 0.0


def _pass(shape: ModelShape, run: Run, rows: int, length: int, scored: int) -> dict[str, float]:
    """Forward and backward of the student over a micro-batch: what autograd keeps, the head's tiles, gathered weights."""
    tokens, c = rows * length, run.compute_bytes
    layer = tokens * _layer_bytes(shape, run)
    top = tokens * shape.hidden_size * _norm_bytes(run)
    # Without Triton every position is scored, with it those of the completions.
    count = rows * (scored if run.triton else length - 1)
    logits = _logits(shape, run, count)
    if run.checkpointing:
        inputs = shape.layers * tokens * shape.hidden_size * (4 if run.autocast or not run.bf16 else 2)
        # The head is done when the first layer is recomputed.
        activations, logits = (inputs + top, logits) if top + logits > layer else (inputs + layer, 0.0)
    else:
        activations = shape.layers * layer + top
    parts = {"activations": activations, "logits": logits}
    if run.casts:
        parts["weights cast for autocast"] = 2.0 * shape.parameters
    if run.backend == "fsdp2":
        parts["gathered layers"] = _gathered(shape, c)
    if run.backend == "zero3":
        parts["gathered layers"] = float(min(shape.parameters, _ZERO3_LIVE) * c)
    return parts


def _shadow_pass(shape: ModelShape, run: Run, rollouts: dict[str, float]) -> dict[str, float]:
    """As the student's pass, but for how the shadow is spread."""
    parts = {name: size for name, size in rollouts.items() if name != "gathered layers"}
    if run.shadow_bf16:
        parts.pop("weights cast for autocast", None)
    if run.num_processes > 1 and not run.adapter_rank:
        float32 = not run.shadow_bf16 and (run.autocast or not run.bf16)
        parts["gathered layers"] = _gathered(shape, 4 if float32 else 2)
    elif run.adapter_rank and "gathered layers" in rollouts:
        parts["gathered layers"] = rollouts["gathered layers"]
    return parts


def _gathered(shape: ModelShape, held: int) -> float:
    """Full weights that `fully_shard` has while the head is scored: those outside the layers, and the last layer's."""
    return float((shape.root_parameters + shape.layer_parameters) * held)


def _norm_bytes(run: Run) -> int:
    """What a norm and the cast of its output keep for each element: input, normalised input, output."""
    return 12 if not run.bf16 else 10 if run.autocast else 8


def _layer_bytes(shape: ModelShape, run: Run) -> int:
    """
    What autograd keeps of a decoder layer for each token: two norms; queries, keys, values (repeated for grouped heads)
    and the output of attention; gate, its activation, up, and their product.
    """
    attention, mlp = 4 * shape.attention_size, 4 * shape.intermediate_size
    return 2 * shape.hidden_size * _norm_bytes(run) + run.compute_bytes * (attention + mlp)


def _logits(shape: ModelShape, run: Run, count: int) -> float:
    """One tile of logits, and the head's gradient and its input's in float32, as TRL's fused head has them."""
    rows, columns = min(count, _TOKEN_TILE), min(shape.vocab_size, _VOCABULARY_TILE)
    tile = rows * _VOCABULARY_TILE * run.compute_bytes
    copies = 0.0 if run.triton else rows * columns * 4 * _TILE_COPIES_WITHOUT_TRITON
    cast = 2.0 * columns * shape.hidden_size if run.casts else 0.0
    head = 0.0 if run.adapter_rank else 4.0 * shape.vocab_size * shape.hidden_size
    return tile + copies + cast + head + 4.0 * count * shape.hidden_size


def _generation(shape: ModelShape, run: Run) -> dict[str, float]:
    """transformers' own: keys and values of all rollouts, and the full model where ZeRO-3 gathers it."""
    length, c = run.prompt_length + run.completion_length, run.compute_bytes
    keys = 2.0 * shape.layers * shape.attention_size * length * run.generation_rows * c
    parts = {"keys and values": keys, "logits": 4.0 * run.generation_rows * shape.vocab_size}
    if run.backend == "zero3":
        parts["gathered model"] = float(shape.parameters * c)
    if run.casts:
        parts["weights cast for autocast"] = 2.0 * shape.parameters
    return parts
