"""The memory a run takes, phase by phase, from its options and the configs of its models alone.

Nothing is loaded for it: neither a weight nor torch. Sizes of weights, gradients, optimizer states, buffers and the KV
cache follow from shapes. What a layer keeps for its backward pass was measured with the allocator of torch
(`benchmarks/memory.py` compares plan and measurement); what the CUDA runtime takes is an estimate with its source.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from trainers.batch import batch_plan
from trainers.engine_specs import MAX_BATCHED_TOKENS, bridge_name
from trainers.model_shapes import ModelShape
from trainers.optim_specs import optimizer_bytes
from trainers.reward_specs import asks_student

GIB = 2**30
PHASES = ("load", "generate", "score", "update", "save")
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}

# Bytes that one token keeps, or needs at the peak of the backward pass, in a layer: so many per element of the layer's
# inner width, of its hidden width, and of the attention mask's row. By the weights' itemsize; `peak` while the layer is
# differentiated, `kept` where nothing is computed again (no gradient checkpointing).
LAYER_PEAK = {4: (24, 41, 5.5), 2: (14.5, 28, 3.3)}
LAYER_KEPT = {4: (16, 44, 0), 2: (8, 26, 0)}
# What adapters add to these: the inputs of frozen layers are cast for them.
HEAD_TOKENS, HEAD_WIDTH = 4096, 32768  # a tile of TRL's fused head, in positions and vocabulary entries
# Bytes beside each entry of a tile where there is no kernel for it (on a CPU): of the forward pass, of the backward.
TILE_FORWARD, TILE_BACKWARD = 13.5, 28

# Padded tokens of a micro-batch of scoring, and its head's positions (trainers/frozen.py).
MICRO_TOKENS = {"cuda": 4096, "cpu": 512}
SCORE_HEAD_TOKENS = {"cuda": 4096, "cpu": 64}

# Of a GPU: CUDA context and libraries (vLLM reports 0.33 GiB outside of torch, vllm#14452, and cuBLAS keeps
# workspaces), and each captured graph (26 MiB of a large model, vllm#22897). Not measured here.
CUDA_CONTEXT = int(0.75 * GIB)
CUDA_GRAPH = 26 * 2**20
# Of what comes and goes: blocks that are free but not given back. Not measured on a GPU. On a CPU glibc keeps 15 to 50
# percent of it, less predictably than can be planned (docs/LOG.md): the plan says what is needed.
FRAGMENTATION = {"cuda": 0.05, "cpu": 0.0}
# The interpreter with torch and vLLM: measured on a CPU, where vLLM's engine is in it; with CUDA an estimate.
PROCESS = {"cuda": 4 * GIB, "cpu": int(0.75 * GIB)}
MAX_SEQS = 256  # completions that it writes at once, unless set


@dataclass(frozen=True)
class Workload:
    """What is planned: the options, with every `auto` in them decided, and the models' sizes.

    Args:
        device: cuda or cpu.
        precision: fp32, bf16 or fp16.
        optimizer: By name.
        student_mode: resident, streamed or cpu; None where no student is asked.
        reference_mode: The same for the reference of beta; None without one.
        kv_cache: Bytes.
    """

    options: Any
    teacher: ModelShape
    student: ModelShape | None
    device: str
    precision: str
    optimizer: str
    student_mode: str | None
    reference_mode: str | None
    kv_cache: int

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.precision]

    @property
    def is_rl(self) -> bool:
        return self.options.stage == "rl"

    @property
    def use_peft(self) -> bool:
        return bool(getattr(self.options, "use_peft", False))

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        o = self.options
        return o.max_prompt_length + o.max_completion_length if self.is_rl else o.max_length

    @property
    def micro_batch(self) -> int:
        return self.options.per_device_train_batch_size

    @property
    def accumulates(self) -> bool:
        return self.options.train_batch_size > self.micro_batch

    def adapter_shapes(self, rank: int | None = None) -> list[tuple[int, ...]]:
        rank = rank or self.options.lora_r
        linears = self.teacher.linears(self.options.lora_target_modules)
        return [shape for out, inner in linears for shape in ((rank, inner), (out, rank))]

    def trained_shapes(self) -> list[tuple[int, ...]]:
        return self.adapter_shapes() if self.use_peft else list(self.teacher.parameters.values())


@dataclass
class Plan:
    """Bytes per phase and item.

    Attributes:
        phases: Of the device; what a phase holds adds up to its peak.
        host: Of host memory, at its peak; on a CPU the device is the host, and this is empty.
        disk: What a run leaves at most at one time.
        available: Bytes of the device that are free for it.
    """

    work: Workload
    available: int
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.peak_phase)

    @property
    def fits(self) -> bool:
        return self.peak <= self.available

    @property
    def spare(self) -> float:
        """Share of the available memory that stays free at the peak; negative where it does not fit."""
        return 1 - self.peak / self.available


def make_plan(work: Workload, available: int) -> Plan:
    """Work out every phase.

    Args:
        available: Bytes of the device that are free.
    """
    plan = Plan(work, available)
    resting = dict(_resting(work))
    live_gradients = {"gradients": _gradients(work)} if _gradients_while_generating(work) else {}
    plan.phases["load"] = _without(resting, "optimizer") | _engine(work)
    if work.is_rl:
        plan.phases["generate"] = resting | live_gradients | _engine(work)
        plan.phases["score"] = resting | live_gradients | _scoring(work) | _graphs(work)
    plan.phases["update"] = resting | _update(work) | _graphs(work)
    plan.phases["save"] = resting | _save(work) | _graphs(work)
    plan.disk = _disk(work)
    host = _host(work)
    if work.device == "cuda":
        plan.host = host
    else:
        for items in plan.phases.values():
            items |= {name: size for name, size in host.items() if name != "reading the teacher"}
        plan.phases["load"] |= {name: host[name] for name in ("reading the teacher",) if name in host}
    for name in plan.phases:
        plan.phases[name] = {item: size for item, size in plan.phases[name].items() if size}
    return plan


def _without(items: dict[str, int], *names: str) -> dict[str, int]:
    return {name: size for name, size in items.items() if name not in names}


def _resting(work: Workload) -> Iterator[tuple[str, int]]:
    """What is on the device in every phase."""
    teacher, size = work.teacher, work.itemsize
    weights = teacher.num_parameters * size
    yield "weights", weights
    if work.use_peft:
        yield "adapters", 4 * sum(map(prod, work.adapter_shapes()))
    if work.is_rl and work.options.use_vllm:
        bridge = bridge_name(work.options)
        padded = (-teacher.vocab % 64) * teacher.hidden * size
        yield "engine's weights", (weights if bridge in ("copy", "restart") else 0) + padded
        if bridge == "lora":
            yield "engine's adapters", size * sum(map(prod, work.adapter_shapes(_vllm_rank(work.options.lora_r))))
    trained = 4 if work.use_peft else size
    yield "optimizer", optimizer_bytes(work.optimizer, work.trained_shapes(), trained).device
    if work.device == "cuda":
        yield "CUDA context", CUDA_CONTEXT
    if work.student is not None and work.student_mode == "resident":
        yield "student", _quantized(work, work.student.num_parameters * size)
    if work.reference_mode == "resident":
        yield "reference", weights


def _quantized(work: Workload, size: int) -> int:
    """A student of 8 or 4 bits; embeddings and head stay as they are (bitsandbytes replaces linear layers)."""
    kind = work.options.student_quantization
    if kind is None:
        return size
    linear = sum(map(prod, work.student.linear_shapes)) * work.itemsize
    return size - linear + linear // work.itemsize * (2 if kind == "8bit" else 1) // 2


def _vllm_rank(rank: int) -> int:
    return next((r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def _gradients(work: Workload) -> int:
    return (4 if work.use_peft else work.itemsize) * sum(map(prod, work.trained_shapes()))


def _gradients_while_generating(work: Workload) -> bool:
    """An optimizer step of several rollouts: the second one finds the gradients of the first."""
    if not work.is_rl:
        return False
    plan = batch_plan(work.options)
    return plan.accumulation > plan.aggregation


def max_num_seqs(options: Any) -> int:
    """Completions that vLLM writes at once."""
    at_once = max(batch_plan(options).generation_batch, options.per_device_eval_batch_size)
    return options.max_num_seqs or min(MAX_SEQS, at_once)


def kv_needed(options: Any, teacher: ModelShape, itemsize: int, device: str) -> int:
    """Bytes of keys and values where all completions that are written at once are as long as they may be.

    The prompt of a group is held once; not counted on where memory is no matter (a CPU).
    """
    seqs = max_num_seqs(options)
    prompts = seqs if device == "cpu" else -(-seqs // options.num_generations)
    tokens = seqs * (options.max_completion_length + 64) + prompts * options.max_prompt_length
    return tokens * teacher.kv_bytes(itemsize)


def kv_least(options: Any, teacher: ModelShape, itemsize: int) -> int:
    """Bytes below which vLLM does not start: one sequence of the greatest length."""
    length = options.vllm_max_model_length or options.max_prompt_length + options.max_completion_length
    return (length + 64) * teacher.kv_bytes(itemsize)


def _engine(work: Workload) -> dict[str, int]:
    """KV cache, what vLLM computes with, and its graphs."""
    if not work.is_rl or not work.options.use_vllm or work.options.replay_rollouts is not None:
        return {}
    o, teacher = work.options, work.teacher
    tokens = o.vllm_kwargs.get("max_num_batched_tokens", MAX_BATCHED_TOKENS)
    if work.device == "cpu":  # whole prompts, and no dummy run with as many tokens as there may be
        questions = -(-batch_plan(o).generation_batch // o.num_generations)
        tokens = min(max(tokens, work.length), questions * o.max_prompt_length)
    layer = tokens * (3 * teacher.intermediate + 4 * teacher.hidden) * work.itemsize
    sampling = 4 * max_num_seqs(o) * teacher.vocab * 4
    return {"KV cache": work.kv_cache, "engine's activations": max(layer, sampling)} | _graphs(work)


def _graphs(work: Workload) -> dict[str, int]:
    if work.device == "cpu" or not work.is_rl or not work.options.use_vllm or work.options.enforce_eager:
        return {}
    largest = min(2 * max_num_seqs(work.options), 512)
    sizes = [n for n in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)) if n <= largest]
    return {"CUDA graphs": len(sizes) * CUDA_GRAPH}


def _scoring(work: Workload) -> dict[str, int]:
    """The larger of what student and reference need, one after the other."""
    readers = [(work.student, work.student_mode), (work.teacher, work.reference_mode)]
    needs = [_reader(work, shape, mode) for shape, mode in readers if shape is not None and mode is not None]
    return max(needs, key=lambda items: sum(items.values()), default={})


def _reader(work: Workload, shape: ModelShape, mode: str) -> dict[str, int]:
    """What a frozen model needs on the device to read a batch."""
    if mode == "cpu" and work.device == "cuda":
        return {}
    size, hidden, length = work.itemsize, shape.hidden, work.length
    texts = max(1, MICRO_TOKENS[work.device] // length)  # of a micro-batch
    head_tokens, width = SCORE_HEAD_TOKENS[work.device], min(HEAD_WIDTH, shape.vocab)
    cast = width * hidden * (4 if size < 4 else 0)
    tile = int(head_tokens * width * TILE_FORWARD) if work.device == "cpu" else 0
    head = head_tokens * HEAD_WIDTH * 4 + max(cast, tile)
    inner = texts * length * 3 * shape.intermediate * size
    if mode != "streamed":
        layer = inner + int(texts * length * 5.7 * hidden * size)
        return {"scoring buffers": max(layer, head + texts * length * hidden * size)}
    batch = batch_plan(work.options).generation_batch if work.is_rl else work.options.train_batch_size
    held = min(work.options.student_tokens_per_pass, batch * length)
    rotary = 2 * shape.head_dim * size * held // texts  # cosines and sines of each micro-batch
    resting = held * hidden * size + rotary
    layer = inner + int(texts * length * 2.3 * hidden * size)
    slots = 2 * shape.largest_layer * size
    placed = shape.vocab * hidden * size if work.device == "cuda" else 0  # a CPU maps the head
    # The head comes while the last layer is computed, and is used when the layers are gone.
    moments = (
        {"streaming buffers": slots + placed, "hidden states": resting, "scoring buffers": layer},
        {"streaming buffers": placed, "hidden states": resting, "scoring buffers": head},
    )
    return max(moments, key=lambda items: sum(items.values()))


def _update(work: Workload) -> dict[str, int]:
    """The larger of two moments: the backward pass, and the optimizer's step."""
    gradients = _gradients(work)
    trained = 4 if work.use_peft else work.itemsize
    step = optimizer_bytes(work.optimizer, work.trained_shapes(), trained).transient
    backward, activations = _activations(work)
    # Without accumulation the gradients of the layers come as the activations go.
    early = gradients if work.accumulates else _head_gradient(work)
    moments = [
        {"gradients": early} | backward,
        {"gradients": gradients} | activations,
        {"gradients": gradients, "optimizer's step": step},
    ]
    for items in moments:
        moving = sum(size for name, size in items.items() if name != "gradients")
        items["fragmentation"] = int(FRAGMENTATION[work.device] * moving)
    return max(moments, key=lambda items: sum(items.values()))


def _head_gradient(work: Workload) -> int:
    return 0 if work.use_peft else work.teacher.vocab * work.teacher.hidden * work.itemsize


def _activations(work: Workload) -> tuple[dict[str, int], dict[str, int]]:
    """What the backward pass holds at its begin (all layers, and the head's work) and in its course (all layers'
    inputs, and one layer's work)."""
    teacher, size, o = work.teacher, work.itemsize, work.options
    tokens = work.micro_batch * work.length
    checkpointing = o.gradient_checkpointing is not False
    inner, hidden, mask = LAYER_PEAK[size]
    layer = int(tokens * (inner * teacher.intermediate + hidden * teacher.hidden + mask * work.length))
    kept_inner, kept_hidden, _ = LAYER_KEPT[size]
    kept = tokens * (
        teacher.hidden * size if checkpointing else kept_inner * teacher.intermediate + kept_hidden * teacher.hidden
    )
    kept = 0 if getattr(o, "activation_offloading", False) else int(kept) * teacher.num_layers
    scored = tokens
    if work.device == "cuda" and work.is_rl:  # there TRL's head reads the completions only
        scored = work.micro_batch * o.max_completion_length
    positions, width = min(scored, HEAD_TOKENS), min(HEAD_WIDTH, teacher.vocab)
    head = positions * HEAD_WIDTH * size + scored * teacher.hidden * (4 + 2 * size)
    if work.device == "cpu":
        head += positions * width * TILE_BACKWARD
    if not work.use_peft:
        head += teacher.vocab * teacher.hidden * (4 + (size if size < 4 else 0))
    return {"activations": kept, "head": head}, {"activations": kept + layer}


def _save(work: Workload) -> dict[str, int]:
    """Tensors that share storage with the engine's are cloned to be saved; a CPU's adapters alone are small."""
    if work.use_peft or not work.is_rl or not work.options.use_vllm or bridge_name(work.options) != "shared":
        return {}
    return {"clones": work.teacher.num_parameters * work.itemsize}


def _host(work: Workload) -> dict[str, int]:
    size = work.itemsize
    host = {"process": PROCESS[work.device]}
    trained = 4 if work.use_peft else size
    host["optimizer on the host"] = optimizer_bytes(work.optimizer, work.trained_shapes(), trained).host
    if work.student is not None:
        away = "streamed" if work.device == "cuda" else None  # on a CPU a streamed student stays on disk
        if work.student_mode in ("cpu", away) and work.device == "cuda":
            host["student"] = work.student.num_parameters * size
    writable = bool(getattr(work.options, "sync_ref_model", False))
    if (
        work.reference_mode == "cpu"
        and work.device == "cuda"
        or (work.reference_mode == "streamed" and (work.device == "cuda" or writable))
    ):
        host["reference"] = work.teacher.num_parameters * size
    if work.device == "cuda":
        reading = work.teacher.num_parameters * size
        later = sum(host.get(name, 0) for name in ("student", "reference", "optimizer on the host"))
        host["reading the teacher"] = max(0, reading - later)  # gone before these come
        if getattr(work.options, "activation_offloading", False):
            tokens = work.micro_batch * work.length
            host["activations"] = tokens * work.teacher.hidden * size * work.teacher.num_layers
    elif work.is_rl and work.options.use_vllm and bridge_name(work.options) in ("shared", "lora"):
        host["reading the teacher"] = work.teacher.num_parameters * size  # beside the engine's, until it is shared
    return {name: bytes_ for name, bytes_ in host.items() if bytes_ >= 2**20}


def _disk(work: Workload) -> dict[str, int]:
    """Checkpoints that are kept, one more while it is written, and the result."""
    o = work.options
    trained = 4 if work.use_peft else work.itemsize
    weights = sum(map(prod, work.trained_shapes())) * trained
    optimizer = optimizer_bytes(work.optimizer, work.trained_shapes(), trained)
    states = 0 if o.save_only_model else optimizer.device + optimizer.host
    number = 0 if o.save_strategy == "no" else (o.save_total_limit or 10) + 1
    return {"checkpoints": number * (weights + states), "result": weights}


def asked_student(options: Any) -> bool:
    """Whether a student is loaded at all."""
    return options.stage == "rl" and asks_student(options)
