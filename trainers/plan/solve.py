"""From options with `auto` in them to a plan of memory for this machine.

Only what belongs to the machine is solved: micro-batch, KV cache, where student and reference rest, tokens per pass and
the optimizer. The effective batch and the group size are part of the method and are never changed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from trainers.errors import ConfigError, Fault
from trainers.memory import kv_least, kv_needed, make_plan, max_num_seqs
from trainers.options import TRAINING, CommonOptions, ScoringOptions, TrainOptions
from trainers.plan.machine import Machine
from trainers.plan.model_shapes import ModelShape
from trainers.plan.workload import GIB, Plan, Workload
from trainers.settings.batch import micro_batch_choices
from trainers.settings.engine_specs import CPU_KV_CACHE
from trainers.settings.optim_specs import TORCH_DTYPES, optimizer_name
from trainers.settings.reward_specs import reads_teacher, uses_student

SPARE = 0.08  # of the memory: what the solver keeps free
MOST_TOKENS = 65536  # of a micro-batch: more make a GPU no faster
TOKENS_PER_PASS = (262144, 196608, 131072, 65536, 32768, 16384)
CPU_TOKENS_PER_PASS = 16384
BESIDE_SCORING = ("load", "update", "save")  # phases that tokens per pass are nothing to
DECIDED = (  # what a plan shows of its decisions
    "precision",
    "optim",
    "per_device_train_batch_size",
    "activation_offloading",
    "student_mode",
    "reference_mode",
    "student_tokens_per_pass",
    "max_num_seqs",
    "kv_cache_gib",
)


@dataclass(frozen=True)
class Problem:
    """What is to be planned.

    Args:
        options: Checked, with `auto` in them.
        student: None where none is asked.
        devices: Processes that train together, each on a device of its own.
        longest: Tokens of the longest text of stage=score.
    """

    options: CommonOptions
    teacher: ModelShape
    student: ModelShape | None
    machine: Machine
    devices: int = 1
    longest: int | None = None

    def changed(self, settings: dict[str, Any]) -> "Problem":
        return replace(self, options=self.options.model_copy(update=settings))


def written(value: Any) -> str:
    """A value of an option as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def device_of(options: CommonOptions, machine: Machine) -> str:
    """cuda or cpu."""
    if options.device == "auto":
        return "cuda" if machine.card is not None else "cpu"
    return options.device


def precision_of(options: CommonOptions, machine: Machine) -> str:
    """fp32, bf16 or fp16."""
    if options.precision != "auto":
        return options.precision
    if device_of(options, machine) == "cpu":
        return "fp32"
    if machine.card is None or machine.card.compute >= 8:
        return "bf16"
    trains_all = options.stage in TRAINING and not options.use_peft
    return "fp32" if trains_all else "fp16"  # as models.resolve_dtype


def available_memory(options: CommonOptions, machine: Machine) -> int:
    """Bytes that are free where the run computes.

    Raises:
        ConfigError: If it needs a card, and neither is one here nor is it said which is meant.
    """
    if device_of(options, machine) == "cpu":
        return machine.host_free
    if machine.card is None:
        cause = "this machine shows no NVIDIA GPU to plan for"
        raise ConfigError(Fault("vram_gb", None, cause, "vram_gb=<GB of the card>, e.g. vram_gb=24"))
    return machine.card.free


def solve(problem: Problem) -> Plan:
    """Decide every `auto`, preferring what is faster, and plan the result.

    Where nothing fits both device and host, what fits the device and takes the least of the host is returned, or else
    the most frugal choice: its plan does not fit either.
    """
    machine = problem.machine
    available = available_memory(problem.options, machine)
    budget = int(available * (1 - SPARE))
    total = machine.card.total if machine.card is not None else available
    host_free = machine.host_free if machine.is_here else None
    last, short_of_host = None, []
    candidates = list(_candidates(problem))
    for enough in (0.25, 0.0):  # a KV cache too small for a quarter of the completions is the last resort
        hopeless = None
        for work in candidates:
            micro_batch = getattr(work.options, "per_device_train_batch_size", None)
            offloads = getattr(work.options, "activation_offloading", False)
            but_tokens = (work.optimizer, offloads, work.student_mode, work.reference_mode, micro_batch)
            if but_tokens == hopeless and work is not candidates[-1]:
                continue  # fewer tokens per pass are no help
            last = _with_cache(work, budget, available, host_free, total, enough)
            if last.peak <= budget:
                if last.fits_host:
                    return last
                short_of_host.append(last)
            elif max(last.total(phase) for phase in last.phases if phase in BESIDE_SCORING) > budget:
                hopeless = but_tokens
    assert last is not None, "there is always a candidate"
    return min(short_of_host, key=lambda plan: round(plan.host_need / GIB, 1), default=last)


def _candidates(problem: Problem) -> Iterator[Workload]:
    options, teacher, devices = problem.options, problem.teacher, problem.devices
    device, precision = device_of(options, problem.machine), precision_of(options, problem.machine)
    student = problem.student if uses_student(options) else None
    trains = options.stage in TRAINING
    choices = product(
        _optimizers(options, precision, device) if trains else [None],
        _offloadings(options, device) if trains else [None],
        _student_modes(options, student, device) if student is not None else [None],
        _reference_modes(options, teacher, device),
        _micro_batches(options, devices) if trains else [None],
        _tokens_per_pass(options, device),
    )
    for optimizer, offloads, student_mode, reference_mode, micro_batch, tokens in choices:
        update = {"per_device_train_batch_size": micro_batch, "optim": optimizer} if trains else {}
        update |= {"activation_offloading": offloads} if trains else {}
        if options.stage != "sft":
            update |= {"student_tokens_per_pass": tokens}
            update |= {"student_mode": student_mode} if student_mode else {}
            update |= {"reference_mode": reference_mode} if reference_mode else {}
        yield Workload(
            options=options.model_copy(update=update),
            teacher=teacher,
            student=student,
            device=device,
            precision=precision,
            kv_cache=0,
            devices=devices,
            longest=problem.longest,
        )


def _optimizers(options: TrainOptions, precision: str, device: str) -> list[str]:
    name = optimizer_name(options, TORCH_DTYPES[precision])
    return [name, "cpu_offload"] if options.optim == "auto" and name == "adamw_8bit" and device == "cuda" else [name]


def _offloadings(options: TrainOptions, device: str) -> list[bool]:
    if options.activation_offloading != "auto":
        return [options.activation_offloading]
    return [False, True] if device == "cuda" else [False]  # what a CPU keeps is in host memory already


def _student_modes(options: ScoringOptions, student: ModelShape, device: str) -> list[str]:
    if options.student_quantization and options.student_mode == "auto":
        return ["resident"]
    offload = _keeps_off(options, "student_mode")
    if getattr(options, "overlap_scoring", False) and options.student_mode == "auto" and student.can_stream:
        return ["cpu"] if offload and device == "cuda" else ["resident"]  # a streamed one reads a whole batch at once
    return _modes(options.student_mode, student, device, offload)


def _reference_modes(options: ScoringOptions, teacher: ModelShape, device: str) -> list[str | None]:
    if not reads_teacher(options):
        return [None]
    return [*_modes(options.reference_mode, teacher, device, options.offload_untrained_models)]


def _modes(mode: str, shape: ModelShape, device: str, offload: bool) -> list[str]:
    """Where a frozen model may rest, the best first."""
    if mode != "auto":
        return [mode]
    if not shape.can_stream:
        return ["resident"] if device == "cpu" else ["resident", "cpu"]  # read on the host it takes far longer
    # On a CPU "streamed" is read from disk: it takes the least memory.
    return ["streamed"] if offload and device == "cuda" else ["resident", "streamed"]


def unasked_modes(problem: Problem, plan: Plan) -> list[Fault]:
    """What is told of models that were put where they are read slowly, unasked, or stay on the card unlike asked."""
    work, asked = plan.work, problem.options
    found = []
    for key, shape in (("student_mode", work.student), ("reference_mode", work.teacher)):
        if work.device != "cuda" or shape is None or getattr(asked, key, None) != "auto":
            continue
        name = key.removesuffix("_mode")
        quantized = shape.quantized or (asked.student_quantization if name == "student" else None)
        can_stream = shape.can_stream and quantized is None
        if getattr(work, key) == "cpu":
            why = "it cannot be streamed, and the card has no room for it"
            remedy = "a smaller model there, or one that can be streamed"
            if can_stream:
                why = "offload_untrained_models keeps it off the card, and overlap_scoring takes no streamed one"
                remedy = "overlap_scoring=false, or disable_student_offloading=true"
            found.append(Fault(key, "cpu", f"{why}: it is read on the host's processor, slowly", remedy))
        elif getattr(work, key) == "resident" and not can_stream and _keeps_off(asked, key):
            whose = f"a {name} in {quantized}" if quantized else shape.model_type
            why = f"{whose} cannot be streamed: it stays on the card, whatever offload_untrained_models says"
            found.append(Fault(key, "resident", why, f"{key}=cpu to keep it off, where it is read slowly"))
    return found


def _keeps_off(options: ScoringOptions, key: str) -> bool:
    """Whether student or reference is to be kept off a card."""
    is_exempt = key == "student_mode" and options.disable_student_offloading
    return options.offload_untrained_models and not is_exempt


def _micro_batches(options: TrainOptions, devices: int) -> list[int]:
    if options.per_device_train_batch_size != "auto":
        return [options.per_device_train_batch_size]
    length = options.max_prompt_length
    length = length + options.max_completion_length if options.stage == "rl" else options.max_length or length
    legal = micro_batch_choices(options, devices)
    assert legal, "an illegal batch is told before"
    return [n for n in legal if n * length <= MOST_TOKENS] or legal[-1:]


def _tokens_per_pass(options: CommonOptions, device: str) -> list[int]:
    given = getattr(options, "student_tokens_per_pass", None)
    if given != "auto":
        return [given]
    return list(TOKENS_PER_PASS) if device == "cuda" else [CPU_TOKENS_PER_PASS]


def _left_of_share(plan: Plan, total: int) -> int:
    """What vLLM takes for its cache: a share of the whole card, less what it finds taken."""
    apart = ("student", "reference", "KV cache")
    taken = sum(size for name, size in plan.phases["load"].items() if name not in apart)
    return int(plan.work.options.vllm_gpu_memory_utilization * total) - taken


def share_faults(plan: Plan, machine: Machine) -> list[Fault]:
    """A share of the card that leaves vLLM no cache: it does not start."""
    work, options = plan.work, plan.options
    if not work.has_engine or work.device == "cpu" or options.kv_cache_gib is not None:
        return []
    share, total = options.vllm_gpu_memory_utilization, machine.card.total
    least, left = kv_least(options, work.teacher, work.itemsize), _left_of_share(plan, total)
    if left >= least:
        return []
    cause = f"of these {share * total / GIB:.1f} GiB {(share * total - left) / GIB:.1f} are taken by weights and what "
    cause += f"vLLM computes with, and one sequence of the greatest length takes {least / GIB:.3g}: it cannot start"
    return [Fault("vllm_gpu_memory_utilization", share, cause, "vllm_gpu_memory_utilization=auto")]


def _with_cache(work: Workload, budget: int, available: int, host_free: int | None, total: int, enough: float) -> Plan:
    """Give the engine what the completions need, or what is left; as much as was asked for, where it was."""
    options = work.options
    if not work.has_engine:
        return make_plan(work, available, host_free)
    need = kv_needed(options, work.teacher, work.itemsize, work.device)
    least = kv_least(options, work.teacher, work.itemsize)
    solves = options.vllm_gpu_memory_utilization == "auto"
    if options.kv_cache_gib is not None:
        size = int(options.kv_cache_gib * GIB)
        if size < least:
            cause = f"one sequence of the greatest length takes {least / GIB:.3g} GiB"
            enough_gib = math.ceil(1000 * least / GIB) / 1000
            raise ConfigError(Fault("kv_cache_gib", options.kv_cache_gib, cause, f"kv_cache_gib={enough_gib:g}"))
    elif solves:
        empty = make_plan(work, available)
        room = budget - max(empty.total("generate"), empty.total("load"))
        size = max(min(need, room), least, int(enough * need))
    elif work.device == "cpu":
        size = CPU_KV_CACHE
    else:
        size = max(_left_of_share(make_plan(work, available), total), least)
    update: dict[str, Any] = {"max_num_seqs": max_num_seqs(options)}
    if solves:
        update["kv_cache_gib"] = size / GIB
    work = replace(work, kv_cache=size, options=options.model_copy(update=update))
    return make_plan(work, available, host_free)
