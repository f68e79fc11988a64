"""The memory a run takes, phase by phase, from its options and the configs of its models alone.

Nothing is loaded for it: neither a weight nor torch. Sizes of weights, gradients, optimizer states, buffers and the KV
cache follow from shapes. What a layer keeps for its backward pass was measured with the allocator of torch
(`benchmarks/memory.py` compares plan and measurement); what the CUDA runtime takes is an estimate with its source.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

from trainers.batch import batch_plan
from trainers.engine_specs import MAX_BATCHED_TOKENS
from trainers.host_memory import disk_space, host_memory
from trainers.model_shapes import ModelShape
from trainers.workload import GIB, Plan, Workload

# Bytes that one token keeps, or needs at the peak of the backward pass, in a layer: so many per element of the layer's
# inner width, of its hidden width, and of the attention mask's row. By the weights' itemsize; `peak` while the layer is
# differentiated, `kept` where nothing is computed again (no gradient checkpointing).
LAYER_PEAK = {4: (24, 41, 5.5), 2: (14.5, 28, 3.3)}
LAYER_KEPT = {4: (16, 44), 2: (8, 26)}
# What other families add to the hidden width's share at the peak: further norms, and casts around them.
FAMILY_PEAK = {"qwen3": {4: 12, 2: 9}, "phi3": {4: 4, 2: 2}, "gemma2": {4: 24, 2: 30}, "gemma3_text": {4: 36, 2: 42}}
# And at what is kept; with adapters the norms are frozen.
FAMILY_KEPT = {"qwen3": {4: 16, 2: 12}, "phi3": {4: 12, 2: 6}, "gemma2": {4: 16, 2: 20}, "gemma3_text": {4: 32, 2: 36}}
FAMILY_LORA_KEPT = {
    "qwen3": {4: 8, 2: 8},
    "phi3": {4: 12, 2: -3},
    "gemma2": {4: 8, 2: 8},
    "gemma3_text": {4: 16, 2: 16},
}
# With adapters, whose inputs are cast to fp32 and back; the last is for each rank.
LORA_PEAK = {4: (24, 32.5, 5.5, 24), 2: (14.1, 38.5, 3.3, 28.5)}
LORA_KEPT = {4: (16, 37, 21), 2: (8, 30.5, 18)}
# Eager attention (transformers' eager_attention_forward): bytes of each score of each head where nothing is kept, at
# the peak of its backward pass, and kept for that; and what else a token takes at that peak for its hidden width, with
# adapters for each rank too. Families' norms count less there than in the whole layer.
EAGER_SCORES = {4: (8, 12, 4), 2: (10, 12, 6)}
EAGER_PEAK = {4: 28.5, 2: 18.3}
EAGER_LORA_PEAK = {4: (25, 12), 2: (20.6, 9)}
EAGER_FAMILY = 12
CAPPED = ("gemma2",)  # its scores go through tanh, and the result is kept too
HEAD_TOKENS, HEAD_WIDTH = 4096, 32768  # a tile of TRL's fused head, in positions and vocabulary entries
# Bytes beside each entry of a tile where there is no kernel for it (on a CPU): of the forward pass (12 of an
# explanation; 13.5 of a solution, which may fill a tile or not), of the backward.
TILE_FORWARD, TILE_BACKWARD = 12.6, 28

# Padded tokens of a micro-batch of scoring, and its head's positions (trainers/frozen.py).
MICRO_TOKENS = {"cuda": 4096, "cpu": 512}
SCORE_HEAD_TOKENS = {"cuda": 4096, "cpu": 128}

# Of a GPU: CUDA context and libraries (vLLM reports 0.33 GiB outside of torch, vllm#14452, and cuBLAS keeps
# workspaces), and each captured graph (26 MiB of a large model, vllm#22897). Not measured here.
CUDA_CONTEXT = int(0.75 * GIB)
CUDA_GRAPH = 26 * 2**20
# Of what comes and goes: blocks that are free but not given back. Not measured on a GPU. On a CPU glibc keeps 15 to 50
# percent of it, less predictably than can be planned (docs/LOG.md): the plan says what is needed.
FRAGMENTATION = {"cuda": 0.05, "cpu": 0.0}
BUCKETS = "gradient buckets"
MAX_SEQS = 256  # completions that it writes at once, unless set


def make_plan(work: Workload, available: int, host_free: int | None = None) -> Plan:
    """Work out every phase.

    Args:
        available: Bytes of the device that are free.
        host_free: Bytes of host memory that are free; None where that is not known.
    """
    plan = Plan(work, available, host_free)
    resting = dict(_resting(work)) | _graphs(work)
    if work.has_engine and not _is_released(work):
        resting |= {"KV cache": work.kv_cache}
    gradients = {"gradients": work.trained_bytes} if _gradients_while_generating(work) else {}
    plan.phases["load"] = _without(resting, "optimizer", BUCKETS) | _engine(work)
    if work.is_rl:
        scoring = _scoring(work)
        plan.phases["generate"] = resting | gradients | _engine(work)
        if work.options.overlap_scoring:
            plan.phases["generate"] |= scoring
        plan.phases["score"] = resting | gradients | scoring
    plan.phases["update"] = resting | _update(work)
    plan.phases["save"] = resting | _save(work)
    plan.disk = disk_space(work)
    host = host_memory(work, host_free)
    if work.device == "cuda":
        plan.host = host
    else:
        for items in plan.phases.values():
            items |= _without(host, "reading the teacher")
        plan.phases["load"] |= {name: host[name] for name in ("reading the teacher",) if name in host}
    for name in plan.phases:
        plan.phases[name] = {item: size for item, size in plan.phases[name].items() if size}
    return plan


def _is_released(work: Workload) -> bool:
    """Whether the engine gives its KV cache back between rollouts: not on a CPU, nor where it is built anew."""
    return work.device == "cuda" and work.bridge != "restart"


def _without(items: dict[str, int], *names: str) -> dict[str, int]:
    return {name: size for name, size in items.items() if name not in names}


def _resting(work: Workload) -> Iterator[tuple[str, int]]:
    """What is on the device in every phase."""
    teacher, size = work.teacher, work.itemsize
    weights = teacher.num_parameters * size
    yield "weights", weights
    if work.use_peft:
        yield "adapters", work.trained_bytes
        yield "reference's adapters", work.reference_adapter_bytes
    if work.has_engine:
        bridge = work.bridge
        padded = (-teacher.vocab % 64) * teacher.hidden * size
        yield "engine's weights", (weights if bridge in ("copy", "restart") else 0) + padded
        if bridge == "lora":
            yield "engine's adapters", size * sum(map(prod, work.adapter_shapes(_vllm_rank(work.adapter.rank))))
    yield "optimizer", work.optimizer_bytes.device
    if work.devices > 1:  # torch's DistributedDataParallel sends gradients from buckets of its own
        yield BUCKETS, work.trained_bytes
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
    prompts = seqs if device == "cpu" or not options.enable_prefix_caching else -(-seqs // options.num_generations)
    tokens = seqs * (options.max_completion_length + 64) + prompts * options.max_prompt_length
    return tokens * teacher.kv_bytes(itemsize)


def kv_least(options: Any, teacher: ModelShape, itemsize: int) -> int:
    """Bytes below which vLLM does not start: one sequence of the greatest length."""
    length = options.vllm_max_model_length or options.max_prompt_length + options.max_completion_length
    return (length + 64) * teacher.kv_bytes(itemsize)


def _engine(work: Workload) -> dict[str, int]:
    """KV cache, what vLLM computes with, and its graphs."""
    o, teacher = work.options, work.teacher
    if not work.has_engine:
        if not work.is_rl or o.replay_rollouts is not None:
            return {}
        return _transformers_generation(work)
    tokens = o.vllm_kwargs.get("max_num_batched_tokens", MAX_BATCHED_TOKENS)
    if work.device == "cpu":  # whole prompts, and no dummy run with as many tokens as there may be
        questions = -(-batch_plan(o).generation_batch // o.num_generations)
        tokens = min(max(tokens, work.length), questions * o.max_prompt_length)
    layer = tokens * (3 * teacher.intermediate + 4 * teacher.hidden) * work.itemsize
    sampling = 4 * max_num_seqs(o) * teacher.vocab * 4
    return {"KV cache": work.kv_cache, "engine's activations": max(layer, sampling)}


def _transformers_generation(work: Workload) -> dict[str, int]:
    """What transformers holds while it writes a whole rollout at once: most at the prompts, or at the end."""
    teacher, prompt = work.teacher, work.options.max_prompt_length
    texts = batch_plan(work.options).generation_batch
    kv = texts * teacher.kv_bytes(work.itemsize)  # of one token of each
    cache = kv * work.length
    cache += cache // (2 * teacher.num_layers)  # a layer's keys are copied where they grow
    reading = kv * prompt + _reading_layer(work, teacher, texts, 3.4 * teacher.hidden, prompt)
    return {"KV cache": cache, "prompts' activations": max(0, reading - cache)}


def _graphs(work: Workload) -> dict[str, int]:
    if work.device == "cpu" or not work.has_engine or work.options.enforce_eager:
        return {}
    largest = min(2 * max_num_seqs(work.options), 512)
    sizes = [n for n in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)) if n <= largest]
    kinds = 2 if work.bridge == "lora" else 1  # with an adapter, and without
    return {"CUDA graphs": kinds * len(sizes) * CUDA_GRAPH}


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
    masks = _masks(work, shape)  # elements for each token
    if mode != "streamed":
        layer = _reading_layer(work, shape, texts, 3.4 * hidden + masks)
        return {"scoring buffers": max(layer, head + texts * length * hidden * size)}
    batch = batch_plan(work.options).generation_batch if work.is_rl else work.options.train_batch_size
    held = min(max(work.options.student_tokens_per_pass, length), batch * length)  # a text is read as a whole
    rotary = 2 * shape.head_dim * size * held // texts  # cosines and sines of each micro-batch
    resting = held * (hidden + masks) * size + rotary
    layer = _reading_layer(work, shape, texts)
    slots = 2 * shape.largest_layer * size
    placed = shape.vocab * hidden * size if work.device == "cuda" else 0  # a CPU maps the head
    # The head comes while the last layer is computed, and is used when the layers are gone.
    moments = (
        {"streaming buffers": slots + placed, "hidden states": resting, "scoring buffers": layer},
        {"streaming buffers": placed, "hidden states": resting, "scoring buffers": head},
    )
    return max(moments, key=lambda items: sum(items.values()))


def _masks(work: Workload, shape: ModelShape) -> int:
    """Elements of the causal mask that a token has where its attention is eager; other kinds need none to read."""
    kinds = 2 if shape.model_type.startswith("gemma") else 1  # a sliding window has its own
    return kinds * work.length if work.is_eager else 0


def _reading_layer(work: Workload, shape: ModelShape, texts: int, beside: float = 0, length: int | None = None) -> int:
    """What a layer needs to read a micro-batch of so many texts.

    Args:
        beside: Elements of each token that are held meanwhile.
        length: Tokens of a text; None for as many as prompt and completion may have.
    """
    length = length or work.length
    size, tokens = work.itemsize, texts * length
    widest = 2 if shape.model_type == "phi3" else 1  # its gate and what it gates come as one
    widths = 2 + widest
    if work.device == "cpu" and size == 2:  # a product of bf16 has as much beside it there
        widths += widest
    feedforward = tokens * (widths * shape.intermediate + 2.3 * shape.hidden + beside) * size
    if not work.is_eager:
        return int(feedforward)
    scores = tokens * shape.num_heads * length
    attention = scores * EAGER_SCORES[size][0] + tokens * (3.4 * shape.hidden + beside) * size
    return int(max(feedforward + scores * size, attention))  # a layer drops its scores when it is done


def _update(work: Workload) -> dict[str, int]:
    """The larger of two moments: the backward pass, and the optimizer's step."""
    gradients, step = work.trained_bytes, work.optimizer_bytes.transient
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
    completions, prompts = _update_tokens(work)
    at_once = max(completions, prompts)
    inner, hidden, mask, *rank = (LORA_PEAK if work.use_peft else LAYER_PEAK)[size]
    ranks = rank[0] * work.adapter.rank if rank else 0
    norms = FAMILY_PEAK.get(teacher.model_type, {}).get(size, 0)
    hidden += norms
    layer = int(at_once * (inner * teacher.intermediate + hidden * teacher.hidden + mask * work.length + ranks))
    held = others = _kept(work)
    if work.is_eager:
        at_peak, kept_scores = _eager_peak(work, norms, at_once)
        layer = max(layer + kept_scores * at_once, at_peak)
    if held and o.gradient_checkpointing is False:  # what the layer itself keeps is in its peak
        others = max(0, others - int(at_once * _kept_by_token(work)))
    scored = completions
    if work.device == "cuda" and work.is_rl:  # there TRL's head reads the completions only
        scored = work.micro_batch * o.max_completion_length
    positions, width = min(scored, HEAD_TOKENS), min(HEAD_WIDTH, teacher.vocab)
    head = positions * HEAD_WIDTH * size + scored * teacher.hidden * (4 + 2 * size)
    if work.device == "cpu":
        head += positions * width * TILE_BACKWARD
    if not work.use_peft:
        head += teacher.vocab * teacher.hidden * (4 + (size if size < 4 else 0))
    return {"activations": held, "head": head}, {"activations": others + layer}


def _update_tokens(work: Workload) -> tuple[int, int]:
    """Tokens of a micro-batch that the update reads to the end, and those of prompts that it reads apart, once for
    all their completions."""
    o, shared = work.options, work.shared_prompts
    if shared is None:
        return work.micro_batch * work.length, 0
    return work.micro_batch * o.max_completion_length, shared * o.max_prompt_length


def _kept_by_token(work: Workload) -> float:
    """Bytes that a layer keeps of a token for the backward pass, where nothing is computed again."""
    teacher, size = work.teacher, work.itemsize
    inner, hidden, *rank = (LORA_KEPT if work.use_peft else LAYER_KEPT)[size]
    family = FAMILY_LORA_KEPT if work.use_peft else FAMILY_KEPT
    hidden += family.get(teacher.model_type, {}).get(size, 0)
    each = inner * teacher.intermediate + hidden * teacher.hidden + (rank[0] * work.adapter.rank if rank else 0)
    return each + (_eager_peak(work, 0, 0)[1] if work.is_eager else 0)


def _kept(work: Workload) -> int:
    """Bytes that all layers keep for the backward pass."""
    teacher, size, o = work.teacher, work.itemsize, work.options
    completions, prompts = _update_tokens(work)
    if getattr(o, "activation_offloading", False):
        return 0
    if o.gradient_checkpointing is not False:
        return completions * teacher.hidden * size * teacher.num_layers
    each = _kept_by_token(work)
    # Of a prompt that is read apart only keys and values matter: nothing follows its last layer's. Each completion
    # gets them, once for each head.
    handed_out = work.micro_batch * o.max_prompt_length * 2 * teacher.num_heads * teacher.head_dim * size
    kept = int(completions * each) * teacher.num_layers
    return kept + (int(prompts * each) * (teacher.num_layers - 1) + handed_out * teacher.num_layers if prompts else 0)


def _eager_peak(work: Workload, norms: float, tokens: int) -> tuple[int, int]:
    """Bytes that eager attention needs at the peak of its backward pass, and those of each token that it keeps for it.

    Args:
        norms: What the family adds to the hidden width's share at the peak of the whole layer.
        tokens: That a layer reads at once.
    """
    teacher, size = work.teacher, work.itemsize
    scores = teacher.num_heads * work.length  # of each token
    capped = size if teacher.model_type in CAPPED else 0
    _, peak, kept = EAGER_SCORES[size]
    hidden, rank = EAGER_LORA_PEAK[size] if work.use_peft else (EAGER_PEAK[size], 0)
    hidden = (hidden + min(norms, EAGER_FAMILY)) * teacher.hidden
    each = (peak + capped) * scores + hidden + _masks(work, teacher) * size + rank * work.adapter.rank
    return int(tokens * each), (kept + capped) * scores


def _save(work: Workload) -> dict[str, int]:
    """Tensors that share storage with the engine's are cloned to be saved; a CPU's adapters alone are small."""
    if work.bridge != "shared":
        return {}
    return {"clones": work.teacher.num_parameters * work.itemsize}
