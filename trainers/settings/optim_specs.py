"""Which optimizer a run uses, what it cannot do, and the memory it takes; imports neither torch nor transformers."""

from functools import cache
from math import ceil, prod
from typing import NamedTuple

from trainers.errors import Fault
from trainers.options import CommonOptions, TrainOptions

BLOCK = 256  # values that share a scale in torchao's 8-bit states
SMALLEST = 4096  # torchao keeps the states of smaller tensors in the weights' own type
PIECE = 2**25  # weights that an optimizer in host memory brings over at once
SLOTS = 2  # pieces under way: one is stepped while the next arrives
TORCH_DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}
ROUNDING = ("adamw_torch", "adafactor")  # they write bf16 weights rounded to the nearest


def _trains_fp32(options: TrainOptions, dtype: str) -> bool:
    return dtype == "torch.float32" or bool(getattr(options, "use_peft", False))  # adapters are fp32


def optimizer_name(options: TrainOptions, dtype: str) -> str:
    """The optimizer that `optim` means for these weights.

    Args:
        dtype: Of the model's weights, as in `torch.float32`.
    """
    if options.optim != "auto":
        return options.optim
    return "adamw_torch" if _trains_fp32(options, dtype) else "adamw_8bit"


def optimizer_faults(options: TrainOptions, device: str, dtype: str) -> list[Fault]:
    """What the chosen optimizer cannot do here; told before a model is loaded.

    Args:
        device: cuda or cpu.
        dtype: Of the model's weights, as in `torch.float32`.
    """
    name, faults = options.optim, []
    if name == "flash_adamw" and device != "cuda":
        cause = "its kernels are Triton's and need an NVIDIA GPU"
        faults.append(Fault("optim", name, cause, "optim=adamw_8bit or cpu_offload"))
    elif name == "flash_adamw" and _trains_fp32(options, dtype):
        cause = "it adds bits to bf16 weights, and what is trained here is fp32"
        faults.append(Fault("optim", name, cause, "optim=adamw_torch or adamw_8bit"))
    if name == "cpu_offload" and getattr(options, "use_peft", False):
        cause = "with use_peft only adapters are trained, and their states are small"
        faults.append(Fault("optim", name, cause, "optim=adamw_torch"))
    return faults


def precision_faults(options: CommonOptions, device: str) -> list[Fault]:
    """What the chosen precision cannot do on this device (cuda or cpu)."""
    faults = []
    if options.precision == "fp16" and device == "cpu":
        cause = "without a GPU there is no fp16 arithmetic to train with"
        faults.append(Fault("precision", "fp16", cause, "precision=fp32 or bf16"))
    if options.precision == "fp16" and options.stage in ("sft", "rl") and not options.use_peft:
        cause = "with use_peft=false the weights that are trained, and so their gradients, would be fp16, too coarse"
        faults.append(Fault("precision", "fp16", cause, "use_peft=true (adapters are fp32), or precision=fp32"))
    return faults


def rounding_warning(name: str, dtype: str, learning_rate: float) -> str | None:
    """What to say of an optimizer that loses small steps, None of one that does not.

    Args:
        dtype: Of the weights that are trained.
    """
    if name not in ROUNDING or dtype != "torch.bfloat16":
        return None
    return (
        f"optim={name} rounds bf16 weights to the nearest: steps (about learning_rate, {learning_rate:g}) far smaller "
        "than a weight / 256 are lost (arXiv 2602.03839), beside a norm's weight of 1 all below 0.002; "
        "optim=adamw_8bit or cpu_offload keeps them, and so does precision=fp32, at twice the memory"
    )


def is_quantized(shape: tuple[int, ...]) -> bool:
    """Whether adamw_8bit keeps the states of such a tensor in 8 bits; the others get fp32 masters."""
    size = prod(shape)
    return len(shape) > 1 and size >= SMALLEST and size % BLOCK == 0


class OptimizerBytes(NamedTuple):
    """Memory of an optimizer, the weights and their gradients not counted.

    Attributes:
        device: States beside the weights.
        host: States in host memory, and what brings gradients and weights over.
        transient: On the device while it steps, at the most, and free again afterwards.
    """

    device: int
    host: int
    transient: int


@cache
def optimizer_bytes(name: str, shapes: tuple[tuple[int, ...], ...], itemsize: int) -> OptimizerBytes:
    """The memory an optimizer takes once it has stepped.

    Args:
        name: As `optimizer_name` returns it.
        shapes: Of every trained parameter.
        itemsize: Bytes of one of its elements.
    """
    sizes = [prod(shape) for shape in shapes]
    largest, weights = max(sizes, default=0), sum(sizes)
    steps = 4 * len(sizes)  # a count each, fp32
    if name == "adamw_torch":
        return OptimizerBytes(2 * itemsize * weights + steps, 0, 0)
    if name == "adamw_8bit":
        blocks = [s for shape, s in zip(shapes, sizes, strict=True) if is_quantized(shape)]
        kept = [s for shape, s in zip(shapes, sizes, strict=True) if not is_quantized(shape)]
        quantized = sum(2 * (s + 4 * (s // BLOCK) + 4 * 256) for s in blocks)  # codes, scales, the codes' values
        # Compiled for a CPU, a step keeps both states of one matrix in fp32 between its loops; a GPU's kernel may not.
        transient = max(8 * max(blocks, default=0), 4 * max(kept, default=0))
        return OptimizerBytes(quantized + 12 * sum(kept) + 4 * len(kept), 4 * len(blocks), transient)
    if name == "cpu_offload":
        piece = min(PIECE, largest)
        return OptimizerBytes(0, 12 * weights + steps + piece * (SLOTS * 2 * itemsize + 4), 0)
    if name == "flash_adamw":  # groups of 32 share a scale in fp16; 24-bit matrices, 32-bit vectors
        states = sum(2 * (prod(s) + 2 * ceil(prod(s) / 32)) + prod(s) * (1 if len(s) > 1 else 2) for s in shapes)
        return OptimizerBytes(states, 0, 0)
    if name == "adafactor":
        states = sum(4 * (prod(s[:-1]) + prod(s[:-2]) * s[-1] if len(s) > 1 else prod(s)) for s in shapes)
        # Gradient squared and the update, and fp32 copies of gradient and weight where those are not fp32.
        return OptimizerBytes(states + steps, 0, (8 if itemsize == 4 else 16) * largest)
    raise ValueError(f"there is no optimizer {name}")
