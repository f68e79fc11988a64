"""3. The update: a step of the teacher with all weights, by optimizer, and without gradient checkpointing.

    python benchmarks/gpu/update.py --models FOLDER      models are made once, for the other scripts too

Real runs on rollouts that were recorded with a small model (`replay_rollouts`): no engine, no student, and vLLM need
not be installed. About a minute each on an H100, in the order of `--optimizers`, the first without gradient
checkpointing too; `cpu_offload`, which allocates 12 bytes of host memory for each parameter, takes longest. Tokens per
second are those of prompts and completions; the share of the card is 6 operations for each of them and each
parameter that it meets in a product (the embedding is looked up, the head reads completions only), against the matrix
product of ceilings.py, attention and what checkpointing computes again left out.
"""

import importlib.util
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.report import Report, leave_without, parser, start
from trainers.plan.hardware import prepare_gpu

if __name__ == "__main__":
    prepare_gpu()

leave_without("update", "trl", "hydra", "omegaconf", "pydantic", "rich", "peft", "datasets", "pandas", "torchao")

import torch

from benchmarks.gpu.ceilings import matrix_product
from benchmarks.preset_run import run_preset
from benchmarks.small_data import made_model
from trainers.plan.model_shapes import model_shape, read_config

PRESET = "teacher_rlt_mono_80gb"
OPTIMIZERS = ("adamw_8bit", "adamw_torch", "adafactor", "flash_adamw", "cpu_offload")
REWARD = "reward_funcs=[{_target_:benchmarks.bridge_ways.by_parity}]"


def work(arguments: Namespace) -> list[str]:
    """What the recording and every measured run have in common."""
    own = {
        "device": arguments.device,
        "use_vllm": False,  # nor is its source read, so that it may be missing
        "max_steps": arguments.steps,
        "train_batch_size": arguments.completions,
        "num_generations": arguments.completions,
        "per_device_train_batch_size": arguments.micro_batch,
        "max_prompt_length": arguments.prompt,
        "max_completion_length": arguments.completion,
        "student_model": "null",
        "beta": 0,
        "sync_ref_model": False,
        "num_probes": 0,
        "padding_in_kl": False,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-6,
        "share_prompts": False,  # or tokens would be counted that are not read
        "vllm_importance_sampling_correction": False,  # the recorded log-probabilities are a small model's
    }
    return [REWARD, *(f"{key}={value}" for key, value in own.items())]


def replayed(settings: list[str], kept: Path, optimizer: str, checkpointing: bool) -> list[str]:
    """What a measured run is told."""
    return [*settings, f"replay_rollouts={kept}", f"optim={optimizer}", f"gradient_checkpointing={checkpointing}"]


def main() -> None:
    made = parser(__doc__, "7b")
    made.add_argument("--optimizers", nargs="+", default=OPTIMIZERS)
    made.add_argument("--completions", type=int, default=16)
    made.add_argument("--micro-batch", type=int, default=4)
    made.add_argument("--prompt", type=int, default=256)
    made.add_argument("--completion", type=int, default=768)
    made.add_argument("--steps", type=int, default=2)
    arguments = made.parse_args()
    report = start("update", "3. The update", arguments)
    with tempfile.TemporaryDirectory() as temporary:
        measure(report, arguments, Path(temporary))
    report.close()


def measure(report: Report, arguments: Namespace, folder: Path) -> None:
    models = arguments.models or folder
    device, small = torch.device(arguments.device), arguments.device == "cpu"
    product = matrix_product(device, **({"width": 512, "least": 0.1} if small else {}))
    if not small:
        torch.cuda.empty_cache()
    kept, settings = folder / "rollouts", work(arguments)
    overrides = [*settings, f"record_rollouts={kept}", "optim=adamw_torch"]
    recorded = run_preset(PRESET, overrides, models, "tiny", arguments.out / "update-recording.log")
    if recorded.error is not None:
        report.note(f"the rollouts could not be recorded: {recorded.error}")
        sys.exit(1)
    config = read_config(str(made_model(models, arguments.model)), "model_name_or_path")
    shape = model_shape(config, arguments.model, False)
    head = shape.vocab * shape.hidden
    multiplied = shape.num_parameters - head * (1 if config.get("tie_word_embeddings") else 2)
    multiplied += head * arguments.completion / (arguments.prompt + arguments.completion)
    first, *others = arguments.optimizers
    ways = [(first, True), (first, False), *((name, True) for name in others)]
    for optimizer, checkpointing in ways:
        cells = {"optimizer": optimizer, "checkpointing": checkpointing}
        if optimizer == "flash_adamw" and importlib.util.find_spec("flashoptim") is None:
            report.row(**cells, error="flashoptim missing here")
            continue
        log = arguments.out / f"update-{optimizer}-{'with' if checkpointing else 'without'}-checkpointing.log"
        overrides = replayed(settings, kept, optimizer, checkpointing)
        run = run_preset(PRESET, overrides, models, arguments.model, log)
        if "update" in run.seconds:
            rate = run.tokens / run.seconds["update"]
            cells |= {"update_s": run.seconds["update"], "tokens_per_s": rate, "share": 6 * multiplied * rate / product}
            cells |= {"steps": run.steps, "visible_fraction": run.metrics.get("update/visible_fraction")}
        cells |= run.phase("update")
        report.row(**cells, **({} if run.error is None else {"error": run.error}))
    sizes = f"{shape.num_parameters / 1e9:.2f}B parameters, {multiplied / 1e9:.2f}B in a token's products"
    report.note(f"{sizes}; a bf16 matrix product reaches {product / 1e12:.4g} TFLOP/s")


if __name__ == "__main__":
    main()
