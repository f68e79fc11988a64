"""Options that take another amount of memory when they are changed, and what each change would lead to."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trainers.checks import option_faults
from trainers.config import REPO
from trainers.errors import ConfigError
from trainers.memory import cache_share
from trainers.options import TRAINING, CommonOptions
from trainers.plan.solve import DECIDED, SPARE, Problem, device_of, precision_of, reads_teacher, solve, written
from trainers.plan.workload import GIB, Plan
from trainers.settings.batch import micro_batch_choices
from trainers.settings.engine_specs import device_faults
from trainers.settings.optim_specs import TORCH_DTYPES, optimizer_faults

Settings = dict[str, Any]


class Times(float):
    """In place of a value: so many times what it is."""


# What takes less of the device, no more of the host, and leaves the method as it is, the least painful first: options
# that were set go back to what they are by default, or to what is slower.
FRUGAL: tuple[Settings, ...] = (
    {"overlap_scoring": False},
    {"enable_prefix_caching": True},
    {"share_prompts": True},
    {"attn_implementation": None},
    {"use_vllm": True, "vllm_gpu_memory_utilization": "auto"},
    {"gradient_checkpointing": True},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"per_device_train_batch_size": "auto", "generation_aggregation_steps": None},
    {"vllm_gpu_memory_utilization": "auto", "kv_cache_gib": None},
    {"kv_cache_gib": None},
    {"weight_bridge": None},
    {"student_tokens_per_pass": "auto"},
    {"num_probes": 0},
    {"report_before_after": False},
    {"enforce_eager": True},
)
# What takes from the one memory for the other, with how painful it is: of each row what is best for the device, and
# what is best for the host.
PLACES: tuple[tuple[tuple[Settings, int], ...], ...] = (
    (({"student_mode": "streamed", "student_quantization": None}, 0), ({"student_mode": "resident"}, 6)),
    (({"reference_mode": "streamed"}, 1), ({"reference_mode": "resident"}, 5)),
    (({"optim": "cpu_offload"}, 3), ({"optim": "adamw_8bit"}, 2)),
    (({"activation_offloading": True}, 7), ({"activation_offloading": False}, 4)),
)
# What takes the place of a student on the card where explanations are scored beside the engine.
ON_HOST: Settings = {"student_mode": "cpu"}
# Adapters take ten times the rate of all weights, as in the presets (cfgs/trainer_cfg/grpo_mono_lora.yaml); one that is
# above what all weights have there was made larger by the user, and stays.
FULL_RATES = {"rl": 1e-6, "sft": 1e-5}
LORA = {"use_peft": True, "learning_rate": Times(10), "optim": "auto", "sync_ref_model": False}
LORA |= {"reference_mode": "auto", "weight_bridge": None}
# What changes the method.
RANK: Settings = {"lora_r": 16}
HALF = Times(0.5)
SHORTER: tuple[Settings, ...] = ({"max_completion_length": HALF}, {"max_prompt_length": HALF}, {"max_length": HALF})
OTHERS: tuple[Settings, ...] = (
    {"max_completion_length": Times(2)},
    {"beta": 0.0, "sync_ref_model": False},
)
# What is told for what it costs, or would save, and is nothing to offer where a run does not fit: it takes more, or is
# another method.
PRICED: tuple[Settings, ...] = (
    {"gradient_checkpointing": False},
    {"weight_bridge": "copy"},
    {"student_quantization": "8bit"},
    {"optim": "flash_adamw"},
)


@dataclass(frozen=True)
class Change:
    """Other settings, the plan with them, what fits with less of a change, but with less to spare, and what fits too
    and keeps scoring beside the engine, where these give it up."""

    settings: Settings
    plan: Plan
    tighter: "Change | None" = None
    overlapped: "Change | None" = None

    def as_remedy(self) -> str:
        """To be pasted, and what it leads to."""
        plan = self.plan
        spare = "" if is_roomy(plan) else f", only {100 * plan.spare:.1f} % to spare"
        others = "".join(f", or {other.as_remedy()}" for other in (self.tighter, self.overlapped) if other is not None)
        return f"{self}   (peak {plan.peak / GIB:.1f} GiB{spare}){others}"

    def __str__(self) -> str:
        return " ".join(f"{key}={written(value)}" for key, value in self.settings.items())


def is_roomy(plan: Plan) -> bool:
    """Whether it keeps free what the solver does."""
    return plan.peak <= int(plan.available * (1 - SPARE))


def changed(options: CommonOptions, knob: Settings, longest: int | None = None) -> Settings:
    """What a knob changes of these options; empty where it changes nothing or does not apply.

    Args:
        longest: Tokens that the model can read, which a length that is not set stands for.
    """
    settings = {}
    for key, value in knob.items():
        if not hasattr(options, key):
            continue
        now = getattr(options, key)
        if key == "learning_rate":
            value = float(f"{now * value:.6g}") if now <= FULL_RATES[options.stage] else now
        elif isinstance(value, Times):
            length = longest if now is None else now
            value = None if length is None else max(16, int(length * value))
        if value != now:
            settings[key] = value
    leads = next(iter(knob))
    return settings if leads in settings else {}


def _outcome(plan: Plan) -> tuple[Any, ...]:
    """What is told of a plan: where the KV cache takes what is left, the peak alone is always the same."""
    return plan.peak, plan.host_need, cache_share(plan.work)


def knobs(problem: Problem) -> list[Change]:
    """Each single change that takes another amount of memory or leaves room for another decision of the solver, with
    the plan it leads to."""
    now = solve(problem)
    places = (settings for row in PLACES for settings, _ in row)
    offered = _changes(problem, (*FRUGAL, *places, ON_HOST, RANK, *SHORTER, LORA, *OTHERS))
    priced = _changes(problem, (*PRICED, *_micro_batches(problem, now)))
    found = [change for change in offered if _outcome(change.plan) != _outcome(now) or _decided(change.plan, now)]
    told = [change.settings for change in found]
    return found + [c for c in priced if _outcome(c.plan) != _outcome(now) and c.settings not in told]


def _changes(problem: Problem, settings: Iterable[Settings]) -> Iterator[Change]:
    for knob in settings:
        asked = changed(problem.options, knob, problem.teacher.max_positions)
        if asked and applies(problem, asked):
            # A KV cache of a size that was asked for may be too small for longer texts.
            with suppress(ConfigError):
                yield Change(asked, solve(problem.changed(asked)))


def _decided(plan: Plan, other: Plan) -> bool:
    """Whether the solver decided otherwise."""
    return any(getattr(plan.options, key, None) != getattr(other.options, key, None) for key in DECIDED)


def _micro_batches(problem: Problem, now: Plan) -> list[Settings]:
    """Those that are legal, next to the one that runs."""
    if problem.options.stage not in TRAINING:
        return []
    legal, runs = micro_batch_choices(problem.options, problem.devices), now.options.per_device_train_batch_size
    larger, smaller = ([n for n in legal if n > runs][-1:], [n for n in legal if n < runs][:1])
    return [{"per_device_train_batch_size": n} for n in (*larger, *smaller)]


def applies(problem: Problem, settings: dict[str, Any]) -> bool:
    """Whether a change makes sense with the rest of the options, and would be taken."""
    options, machine = problem.options, problem.machine
    if not makes_sense(problem, settings):
        return False
    changed = options.model_copy(update=settings)
    faults = option_faults(changed, problem.devices, REPO, needs_device=False)
    device, dtype = device_of(changed, machine), TORCH_DTYPES[precision_of(changed, machine)]
    if options.stage in TRAINING:
        faults += optimizer_faults(changed, device, dtype)
    if options.stage == "rl":
        faults += device_faults(changed, device, dtype)
    return not faults


def makes_sense(problem: Problem, settings: Settings) -> bool:
    """Whether a change can make a difference with the rest of the options."""
    options, machine = problem.options, problem.machine
    device, adapters = device_of(options, machine), getattr(options, "use_peft", False)
    if "precision" in settings and "use_peft" not in settings:
        if device != "cuda" or options.precision != "fp32":
            return False
        has_bf16 = machine.card.compute >= 8
        return has_bf16 if settings["precision"] == "bf16" else adapters and not has_bf16
    if "max_prompt_length" in settings:
        return options.stage != "sft"  # there max_length is what counts
    if "lora_r" in settings:
        return adapters and options.lora_r > settings["lora_r"]
    if "attn_implementation" in settings:
        return options.attn_implementation == "eager"
    if "activation_offloading" in settings:
        return device == "cuda" and options.activation_offloading != "auto"  # both were tried
    if "enforce_eager" in settings:
        return device == "cuda"
    if settings == {"student_quantization": "8bit"}:
        return problem.student is not None and problem.student.quantized is None
    if settings == {"weight_bridge": "copy"}:
        return options.weight_bridge != "restart"  # which is what models have that no other bridge takes
    if settings.get("optim") in ("adamw_8bit", "cpu_offload", "flash_adamw"):
        return not adapters and precision_of(options, machine) == "bf16"
    if {"student_mode", "reference_mode"} & settings.keys() and "use_peft" not in settings:
        return _may_rest(problem, settings, device)
    return True


def _may_rest(problem: Problem, settings: Settings, device: str) -> bool:
    """Whether a frozen model that is there can be streamed, or kept resident."""
    of_student = "student_mode" in settings
    shape = problem.student if of_student else problem.teacher if reads_teacher(problem.options) else None
    if shape is None:
        return False
    if settings == ON_HOST:  # elsewhere a streamed one is faster
        return device == "cuda" and getattr(problem.options, "overlap_scoring", False)
    return shape.can_stream if "streamed" in settings.values() else device == "cuda"
