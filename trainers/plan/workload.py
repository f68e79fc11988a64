"""What a plan of memory is made of: the work, and the bytes of its phases."""

from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from trainers.options import TRAINING, CommonOptions
from trainers.plan.hardware import cpu_converts_bf16
from trainers.plan.model_shapes import AdapterShape, ModelShape
from trainers.settings.batch import batch_plan, keeps_groups_together
from trainers.settings.engine_specs import bridge_name, has_engine
from trainers.settings.evaluation import scores_probes
from trainers.settings.optim_specs import OptimizerBytes, optimizer_bytes
from trainers.settings.reward_specs import reads_teacher
from trainers.weights.adapter_files import is_continued

GIB = 2**30
PHASES = ("load", "generate", "score", "update", "save")
SCORED_AT_ONCE = 256  # rows of stage=score that student and teacher read together
# Padded tokens that go through a frozen model's layer together, which keep a GPU's matrix units busy (on a CPU memory
# is dearer).
MICRO_TOKENS = {"cuda": 4096, "cpu": 512}
# Positions and vocabulary entries of its head that are computed together. On a CPU many rows, and a part of the head
# that its cache holds, run at twice the speed of few rows and the whole head.
SCORE_TILE = {"cuda": (4096, 32768), "cpu": (256, 2048)}
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def resting_bytes(shape: ModelShape, itemsize: int, quantization: str | None = None) -> int:
    """Bytes of a model's weights; embeddings and head stay as they are where it is of 8 or 4 bits (bitsandbytes
    replaces linear layers).

    Args:
        quantization: `8bit` or `4bit` for one that is loaded so; that of its checkpoint counts before it.
    """
    kind = shape.quantized or quantization
    linear = sum(map(prod, shape.linear_shapes)) if kind in ("8bit", "4bit") else 0
    return (shape.num_parameters - linear) * itemsize + linear * (2 if kind == "8bit" else 1) // 2


@dataclass(frozen=True)
class Workload:
    """What is planned: the options, with every `auto` in them decided, and the models' sizes.

    Args:
        student: None where none is asked.
        device: cuda or cpu.
        precision: fp32, bf16 or fp16.
        kv_cache: Bytes.
        devices: Processes that train together, each on a device of its own.
        longest: Tokens of the longest text of stage=score.
    """

    options: CommonOptions
    teacher: ModelShape
    student: ModelShape | None
    device: str
    precision: str
    kv_cache: int
    devices: int = 1
    longest: int | None = None

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.precision]

    @property
    def is_rl(self) -> bool:
        return self.options.stage == "rl"

    @property
    def trains(self) -> bool:
        return self.options.stage in TRAINING

    @property
    def optimizer(self) -> str | None:
        """By name; None where nothing is trained."""
        return self.options.optim if self.trains else None

    @property
    def student_mode(self) -> str | None:
        """resident, streamed or cpu; None where no student is asked."""
        return self.options.student_mode if self.student is not None else None

    @property
    def reference_mode(self) -> str | None:
        """The same for the reference of beta, or for the teacher of stage=score; None without either."""
        return self.options.reference_mode if reads_teacher(self.options) else None

    @property
    def use_peft(self) -> bool:
        return bool(getattr(self.options, "use_peft", False))

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        o = self.options
        if self.longest is not None:
            return min(self.longest, max(self.teacher.max_positions, self.student.max_positions))
        if self.is_rl:
            return o.max_prompt_length + o.max_completion_length
        return o.max_length or self.teacher.max_positions

    @property
    def num_probes(self) -> int:
        """Questions whose probes are scored (trainers/scoring/probes.py)."""
        return self.options.num_probes if self.is_rl and scores_probes(self.options) else 0

    @property
    def has_engine(self) -> bool:
        return self.is_rl and has_engine(self.options)

    @property
    def bridge(self) -> str | None:
        """The weight bridge, if an engine is there to be bridged to."""
        return bridge_name(self.options) if self.has_engine else None

    def is_eager(self, shape: ModelShape) -> bool:
        """Whether a model's attention writes the scores of each head down, `[texts, heads, tokens, tokens]`."""
        asked = self.options.attn_implementation
        return shape.eager_unless_told if asked is None else asked == "eager"

    @property
    def micro_batch(self) -> int:
        return self.options.per_device_train_batch_size

    @property
    def shared_prompts(self) -> int | None:
        """Prompts that a forward pass of the update reads once for all their completions (rollout/shared_prompts.py);
        None where it reads whole rows."""
        o = self.options
        if not self.is_rl or not o.share_prompts or o.attn_implementation not in (None, "sdpa", "eager"):
            return None
        if not self.teacher.can_share_prompts or getattr(o, "torch_compile", False):
            return None
        prompts = batch_plan(o, self.devices).prompts_at_once(keeps_groups_together(o))
        return prompts if prompts < self.micro_batch else None

    @property
    def converts_bf16(self) -> bool:
        """Whether bf16 is computed with on a processor that converts it first."""
        return self.device == "cpu" and self.itemsize == 2 and cpu_converts_bf16()

    @property
    def reads_without_mask(self) -> bool:
        """Whether the update's rows begin at their first token, so that plain causal attention serves them
        (rollout/whole_rows.py)."""
        whole = self.is_rl and not getattr(self.options, "torch_compile", False)
        teacher, window = self.teacher, self.teacher.window
        # One that is not longer than the rows takes a mask.
        return whole and not self.is_eager(teacher) and (window is None or window > self.length)

    @property
    def repeats_keys(self) -> bool:
        """Whether the teacher's attention gives each head keys of its own: as it does with a mask, and on a GPU whose
        kernel for plain causal attention asks for it (trainers/attention.py), taken to be one without bf16 then."""
        return not self.reads_without_mask or (self.device == "cuda" and self.precision != "bf16")

    @property
    def accumulates(self) -> bool:
        return self.options.train_batch_size > self.micro_batch * self.devices

    @property
    def continues(self) -> bool:
        """Whether the adapter that the teacher comes with is trained on."""
        return self.use_peft and self.teacher.adapter is not None and is_continued(self.options)

    @property
    def merged(self) -> dict[str, int]:
        """Parameters of the models, by name, that are merged from an adapter and its base before they are loaded."""
        teacher = [] if self.continues or self.teacher.adapter is None else [self.teacher]
        student = [self.student] if self.student is not None and self.student.adapter is not None else []
        return {shape.name: shape.num_parameters for shape in teacher + student}

    @property
    def adapter(self) -> AdapterShape:
        """The adapter in training, if one is."""
        o = self.options
        return self.teacher.adapter if self.continues else AdapterShape(o.lora_r, o.lora_target_modules)

    def adapter_shapes(self, rank: int | None = None) -> list[tuple[int, ...]]:
        rank = rank or self.adapter.rank
        linears = self.teacher.linears(self.adapter.targets)
        return [shape for out, inner in linears for shape in ((rank, inner), (out, rank))]

    def trained_shapes(self) -> list[tuple[int, ...]]:
        if not self.trains:
            return []
        return self.adapter_shapes() if self.use_peft else list(self.teacher.parameters.values())

    @property
    def trained_itemsize(self) -> int:
        return 4 if self.use_peft else self.itemsize  # adapters are fp32

    @cached_property
    def trained_bytes(self) -> int:
        return self.trained_itemsize * sum(map(prod, self.trained_shapes()))

    @property
    def reference_adapter_bytes(self) -> int:
        """Of the frozen copy of the adapter that is trained on, as beta's reference (see adapters.py)."""
        return self.trained_bytes if self.continues and getattr(self.options, "beta", 0) else 0

    @cached_property
    def optimizer_bytes(self) -> OptimizerBytes:
        if self.optimizer is None:
            return OptimizerBytes(0, 0, 0)
        return optimizer_bytes(self.optimizer, tuple(self.trained_shapes()), self.trained_itemsize)


@dataclass
class Plan:
    """Bytes per phase and item.

    Attributes:
        phases: Of each device; what a phase holds adds up to its peak.
        host: Of host memory, at its peak, for all processes; on a CPU the device is the host, and this is empty.
        disk: What a run leaves at most at one time.
        available: Bytes of the device that are free for it.
        host_free: Bytes of host memory that are free for it; None where the run is to be on another machine.
    """

    work: Workload
    available: int
    host_free: int | None = None
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def options(self) -> CommonOptions:
        """With every `auto` decided."""
        return self.work.options

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.peak_phase)

    @property
    def fits_device(self) -> bool:
        return self.peak <= self.available

    @property
    def host_need(self) -> int:
        return sum(self.host.values())

    @property
    def fits_host(self) -> bool:
        return self.host_free is None or self.host_need <= self.host_free

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host

    @property
    def spare(self) -> float:
        """Share of the available memory that stays free at the peak; negative where it does not fit."""
        return 1 - self.peak / self.available
