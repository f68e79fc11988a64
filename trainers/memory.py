"""The memory a run takes, phase by phase, from its options and the configs of its models alone.

Nothing is loaded for it: neither a weight nor torch. Sizes of weights, gradients, optimizer states, buffers and the KV
cache follow from shapes. What a layer keeps for its backward pass was measured with the allocator of torch
(`benchmarks/memory.py` compares plan and measurement); what the CUDA runtime takes is an estimate with its source.
"""

from collections.abc import Iterable, Iterator
from math import prod

from trainers.options import RLOptions
from trainers.plan.activations import TILE_FORWARD, activations, held_masks, reading_layer
from trainers.plan.hardware import vllm_releases_cache
from trainers.plan.host_memory import disk_space, host_memory
from trainers.plan.model_shapes import ModelShape
from trainers.plan.workload import GIB, MICRO_TOKENS, SCORE_TILE, SCORED_AT_ONCE, Plan, Workload, resting_bytes
from trainers.settings.batch import batch_plan
from trainers.settings.engine_specs import batched_tokens, model_length
from trainers.settings.evaluation import completions_at_once, prompts_at_once

# Of a GPU: CUDA context and libraries (vLLM reports 0.33 GiB outside of torch, vllm#14452, and cuBLAS keeps
# workspaces), and each captured graph (24 to 28 MiB of a large model: vllm#22897, vllm#50780). Not measured here.
CUDA_CONTEXT = int(0.75 * GIB)
CUDA_GRAPH = 26 * 2**20
# Of what comes and goes in sizes of each batch's own: blocks that are free but not given back. Not measured on a GPU.
# Not of what vLLM computes with, which is planned at its largest, nor of its cache, streamed layers and a checkpoint's
# clones, whose blocks are of the same size each time. On a CPU glibc keeps 15 to 50 percent, less predictably than can
# be planned (docs/LOG.md): the plan says what is needed.
FRAGMENTATION = {"cuda": 0.05, "cpu": 0.0}
# Of each sequence vLLM's second model runner keeps, in every phase, a count and two bits for each token of the
# vocabulary (penalties, grammars), and room for biases, forbidden words and wanted tokens (v1/worker/gpu of 0.31).
SEQUENCE_STATE = 4 * (3 * 1024 + 128 + 1024 + 129 + 128)
BUCKETS = "gradient buckets"
LOADING = ("reading the teacher", "merging an adapter")  # of the host
PROBES = 5  # texts for each question that is probed, the teacher's own among them (trainers/scoring/probes.py)
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
    scoring = _scoring(work)
    if work.is_rl:
        plan.phases["generate"] = resting | gradients | _engine(work)
        if work.options.overlap_scoring and work.student is not None:
            plan.phases["generate"] |= _reader(work, work.student, work.student_mode)
    if work.options.stage != "sft":
        plan.phases["score"] = resting | gradients | scoring
    if work.trains:
        plan.phases["update"] = resting | _update(work)
        plan.phases["save"] = resting | _save(work)
    plan.disk = disk_space(work)
    host = host_memory(work, host_free)
    if work.device == "cuda":
        plan.host = host
    else:
        for items in plan.phases.values():
            items |= _without(host, *LOADING)
        load, (reading, merging) = plan.phases["load"], (host.get(name, 0) for name in LOADING)
        load["reading the teacher"] = reading
        load["merging an adapter"] = max(0, merging - sum(load.values()))
    for name in plan.phases:
        plan.phases[name] = {item: size for item, size in plan.phases[name].items() if size}
    return plan


def _is_released(work: Workload) -> bool:
    """Whether the engine gives its KV cache back between rollouts: not on a CPU, nor where it is built anew, nor in a
    vLLM that cannot."""
    return work.device == "cuda" and work.bridge != "restart" and vllm_releases_cache()


def _without(items: dict[str, int], *names: str) -> dict[str, int]:
    return {name: size for name, size in items.items() if name not in names}


def _resting(work: Workload) -> Iterator[tuple[str, int]]:
    """What is on the device in every phase."""
    teacher, size = work.teacher, work.itemsize
    weights = teacher.num_parameters * size
    if work.trains:
        yield "weights", weights
    if work.use_peft:
        yield "adapters", work.trained_bytes
        yield "reference's adapters", work.reference_adapter_bytes
    if work.has_engine:
        bridge = work.bridge
        padded = (-teacher.vocab % 64) * teacher.hidden * size
        yield "engine's weights", (weights if bridge in ("copy", "restart") else 0) + padded
        if work.device == "cuda":
            state = teacher.vocab * 34 // 8 + SEQUENCE_STATE
            yield "engine's sampling state", max_num_seqs(work.options) * state
        if bridge == "lora":
            yield "engine's adapters", size * sum(map(prod, work.adapter_shapes(_vllm_rank(work.adapter.rank))))
    yield "optimizer", work.optimizer_bytes.device
    if work.devices > 1:  # torch's DistributedDataParallel sends gradients from buckets of its own
        yield BUCKETS, work.trained_bytes
    if work.device == "cuda":
        yield "CUDA context", CUDA_CONTEXT
    if work.student is not None and work.student_mode == "resident":
        yield "student", resting_bytes(work.student, size, work.options.student_quantization)
    if work.reference_mode == "resident":
        yield "reference" if work.trains else "teacher", resting_bytes(teacher, size)


def _vllm_rank(rank: int) -> int:
    return next((r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def _gradients_while_generating(work: Workload) -> bool:
    """An optimizer step of several rollouts: the second one finds the gradients of the first."""
    if not work.is_rl:
        return False
    plan = batch_plan(work.options)
    return plan.accumulation > plan.aggregation


def max_num_seqs(options: RLOptions) -> int:
    """Completions that vLLM writes at once."""
    return options.max_num_seqs or min(MAX_SEQS, completions_at_once(options))


def kv_needed(options: RLOptions, teacher: ModelShape, itemsize: int, device: str) -> int:
    """Bytes of keys and values where all completions that are written at once are as long as they may be.

    Of a rollout; an evaluation has more prompts for as many completions, and some may have to wait (vLLM preempts
    them). The prompt of a group is held once; not counted on where memory is no matter (a CPU).
    """
    seqs = max_num_seqs(options)
    prompts = seqs if device == "cpu" or not options.enable_prefix_caching else -(-seqs // options.num_generations)
    tokens = seqs * (options.max_completion_length + 64) + prompts * options.max_prompt_length
    return tokens * teacher.kv_bytes(itemsize)


def cache_share(work: Workload) -> float | None:
    """Of the completions that are written at once, how many the KV cache holds at their full length; None without."""
    if not work.has_engine:
        return None
    return min(1, work.kv_cache / kv_needed(work.options, work.teacher, work.itemsize, work.device))


def kv_least(options: RLOptions, teacher: ModelShape, itemsize: int) -> int:
    """Bytes below which vLLM does not start: one sequence of the greatest length."""
    return (model_length(options) + 64) * teacher.kv_bytes(itemsize)


def _engine(work: Workload) -> dict[str, int]:
    """KV cache, what vLLM computes with, and its graphs."""
    o, teacher = work.options, work.teacher
    if not work.has_engine:
        if not work.is_rl or o.replay_rollouts is not None:
            return {}
        return _transformers_generation(work)
    tokens = o.vllm_kwargs.get("max_num_batched_tokens", batched_tokens(o, max_num_seqs(o)))
    if work.device == "cpu":  # whole prompts, and no dummy run with as many tokens as there may be
        tokens = min(max(tokens, work.length), prompts_at_once(o) * o.max_prompt_length)
    layer = tokens * (3 * teacher.intermediate + 5 * teacher.hidden) * work.itemsize
    sampling = 4 * max_num_seqs(o) * teacher.vocab * 4
    return {"KV cache": work.kv_cache, "engine's activations": max(layer, sampling)}


def _transformers_generation(work: Workload) -> dict[str, int]:
    """What transformers holds while it writes a whole rollout at once: most at the prompts, or at the end."""
    teacher, prompt = work.teacher, work.options.max_prompt_length
    texts = completions_at_once(work.options)
    kv = texts * teacher.kv_bytes(work.itemsize)  # of one token of each
    cache = kv * work.length
    cache += cache // (2 * teacher.num_layers)  # a layer's keys are copied where they grow
    reading = kv * prompt + reading_layer(work, teacher, texts, 3.4 * teacher.hidden, prompt)
    return _fragmented(work, {"KV cache": cache, "prompts' activations": max(0, reading - cache)})


def _graphs(work: Workload) -> dict[str, int]:
    if work.device == "cpu" or not work.has_engine or work.options.enforce_eager:
        return {}
    seqs = max_num_seqs(work.options)
    sizes = [n for n in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)) if n <= min(2 * seqs, 512)]
    # Of each size one in pieces, for batches with prompts in them, and a full one where each sequence writes a token.
    graphs = len(sizes) + sum(n <= seqs for n in sizes)
    kinds = 2 if work.bridge == "lora" else 1  # with an adapter, and without
    return {"CUDA graphs": kinds * graphs * CUDA_GRAPH}


def _scoring(work: Workload) -> dict[str, int]:
    """The largest of what student and reference need, one after the other, and the teacher who reads probes."""
    readers = [(work.student, work.student_mode), (work.teacher, work.reference_mode)]
    readers.append((work.teacher, "resident" if work.num_probes else None))
    return _largest(_reader(work, shape, mode) for shape, mode in readers if shape is not None and mode is not None)


def _reader(work: Workload, shape: ModelShape, mode: str) -> dict[str, int]:
    """What a frozen model needs on the device to read a batch."""
    if mode == "cpu" and work.device == "cuda":
        return {}
    size, hidden, length = work.itemsize, shape.hidden, work.length
    texts = max(1, MICRO_TOKENS[work.device] // length)  # of a micro-batch
    positions, width = SCORE_TILE[work.device]
    entries = min(width, shape.vocab)
    cast = entries * hidden * (4 if size < 4 else 0)
    tile = int(positions * entries * TILE_FORWARD) if work.device == "cpu" else 0
    head = positions * width * 4 + max(cast, tile)
    masks = held_masks(work, shape, texts)  # bytes for each token
    if mode != "streamed":
        layer = reading_layer(work, shape, texts, 3.4 * hidden + masks / size)
        # The hidden states of this micro-batch and of the one before; those of a tile once more, and in fp32.
        states = 2 * texts * length * hidden * size + positions * hidden * (size + 4 if size < 4 else size)
        return _fragmented(work, {"scoring buffers": max(layer, head + states)})
    batch = SCORED_AT_ONCE
    if work.is_rl:
        batch = max(completions_at_once(work.options), PROBES * work.num_probes)
    held = min(max(work.options.student_tokens_per_pass, length), batch * length)  # a text is read as a whole
    rotary = 2 * shape.head_dim * size * held // texts  # cosines and sines of each micro-batch
    resting = int(held * (hidden * size + masks)) + rotary
    layer = reading_layer(work, shape, texts)
    slots = 2 * shape.largest_layer * size
    placed = shape.vocab * hidden * size if work.device == "cuda" else 0  # a CPU maps the head
    # The head comes while the last layer is computed, and is used when the layers are gone.
    moments = (
        {"streaming buffers": slots + placed, "hidden states": resting, "scoring buffers": layer},
        {"streaming buffers": placed, "hidden states": resting, "scoring buffers": head},
    )
    return _largest(_fragmented(work, items, "streaming buffers") for items in moments)


def _fragmented(work: Workload, items: dict[str, int], *steady: str) -> dict[str, int]:
    """With the share of fragmentation, of all but what is named."""
    moving = sum(_without(items, *steady).values())
    return items | {"fragmentation": int(FRAGMENTATION[work.device] * moving)}


def _largest(moments: Iterable[dict[str, int]]) -> dict[str, int]:
    return max(moments, key=lambda items: sum(items.values()), default={})


def _update(work: Workload) -> dict[str, int]:
    """The largest of the moments of the backward pass, and the optimizer's step."""
    gradients, step = work.trained_bytes, work.optimizer_bytes.transient
    backward, in_course = activations(work)
    # Without accumulation the gradients of the layers come as the activations go.
    early = gradients if work.accumulates else _head_gradient(work)
    # At the very end comes the embedding's gradient, to be added to a tied head's, which has waited for it, and both to
    # what was accumulated.
    tied, head = work.teacher.ties_head, _head_gradient(work)
    waiting, last = head if tied and work.accumulates else 0, head if tied or work.accumulates else 0
    moments = [
        {"gradients": early} | backward,
        {"gradients": gradients, "tied head's gradient": waiting} | in_course,
        {"gradients": gradients, "tied head's gradient": waiting, "embedding's gradient": last},
        {"gradients": gradients, "optimizer's step": step},
    ]
    return _largest(_fragmented(work, items, "gradients") for items in moments)


def _head_gradient(work: Workload) -> int:
    return 0 if work.use_peft else work.teacher.vocab * work.teacher.hidden * work.itemsize


def _save(work: Workload) -> dict[str, int]:
    """Tensors that share storage with the engine's are cloned to be saved; a CPU's adapters alone are small."""
    if work.bridge != "shared":
        return {}
    return {"clones": work.teacher.num_parameters * work.itemsize}
