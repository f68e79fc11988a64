"""Train a reasoning teacher on one GPU.

    python train.py [RUN] [key=value ...]     RUN: a name or file of cfgs/run_cfg (default: teacher_rlt_tiny)
    python train.py RUN --cfg job             show the composed configuration
    python train.py RUN --check               check it and stop
    python train.py stage=plan run_cfg=RUN    plan its memory, phase by phase, and stop; vram_gb=N: for such a card
    python train.py stage=merge model_name_or_path=ADAPTER output_dir=FOLDER
    python train.py stage=score dataset_id_or_path=FILE model_name_or_path=TEACHER student_model=STUDENT
    python train.py stage=rescore scores=FOLDER     of a run with keep_scores=true
    python train.py --help                    list every option

./launch_mono.sh does the same after setting up .venv.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from trainers.own_python import use_own_python

    use_own_python()

import yaml

from trainers.checks import load_options
from trainers.config import REPO, chosen_run, compose_run, named_run
from trainers.errors import ConfigError, OutOfMemory
from trainers.masking import masked
from trainers.options import WITH_MODELS, BaseOptions
from trainers.plan.hardware import num_processes, prepare_gpu
from trainers.plan.planning import faults_ahead, planned, run_plan
from trainers.settings.reward_specs import model_keys
from trainers.warmup import warmup_options

PLAN = {"stage=plan", "+stage=plan", "++stage=plan"}
HELP = {"--help", "-h"}
CFG = {"--cfg", "--cfg=job", "-c"}  # with Hydra's word behind it: job


def run(options: BaseOptions, composed: dict[str, Any], run_name: str) -> None:
    """Run the stage that the options ask for."""
    from datasets import disable_caching

    from trainers.watch.outputs import ending_in_the_log, make_output_dir, start_logging

    disable_caching()  # rows would be kept as an earlier state of this code has rendered them
    num_devices = num_processes()
    check_warmups(options)
    rank = int(os.environ.get("RANK", "0"))
    output_dir = make_output_dir(options.output_dir, run_name, num_devices)
    start_logging(output_dir, options.activate_debugging_logs, rank)
    with ending_in_the_log(output_dir):
        run_stage(options, composed, output_dir, num_devices, rank)


def check_warmups(options: BaseOptions) -> None:
    """A fault of one is told now, not after the first warm-up."""
    for key in model_keys(options) if options.stage in WITH_MODELS else ():
        if name := named_run(getattr(options, key)):
            warmup_options(name, options)


def run_stage(options: BaseOptions, composed: dict[str, Any], output_dir: Path, num_devices: int, rank: int) -> None:
    """Plan it, write its config.yaml, and run it."""
    from trainers.watch.outputs import prepare_wandb, save_config, take_over_library_logs

    plan = None
    if options.stage in ("rl", "sft"):
        plan = planned(options, num_devices)
        options = plan.options
    if rank == 0:
        save_config(output_dir, composed, options.model_dump())
    prepare_wandb(options)
    if options.stage == "rescore":
        from trainers.rescore import run_rescore

        run_rescore(options, output_dir)
        return
    take_over_library_logs()
    if options.stage == "merge":
        from trainers.merge import run_merge

        run_merge(options, output_dir)
    elif options.stage == "sft":
        from trainers.sft import run_sft
        from trainers.warmup_runs import ensure_model

        start = ensure_model(options.model_name_or_path, options)
        run_sft(options, output_dir, start, num_devices, plan)
        logging.getLogger(__name__).info("model saved to %s", output_dir)
    elif options.stage == "score":
        from trainers.score import run_score

        run_score(options, output_dir)
    else:
        from trainers.rl import run_rl

        run_rl(options, output_dir, plan)


def check(arguments: list[str]) -> None:
    """Compose and check a run, and start nothing: its options, and the configs of models that are here."""
    options = load_options(compose_run("", arguments), num_processes(), REPO)
    check_warmups(options)
    if faults := faults_ahead(options):
        raise ConfigError(faults)
    print("this configuration is valid")


def plan(arguments: list[str]) -> bool:
    """Plan the memory of a run, and start nothing. Returns whether it fits."""
    options = load_options(compose_run("", arguments), 1, REPO, needs_device=False)
    asked = any(word.lstrip("+").startswith("vram_gb=") for word in arguments)  # a preset's own yields to a real card
    return run_plan(options, options.vram_gb if asked else None)


def show(arguments: list[str]) -> None:
    """Print a run as it is composed, before the options' own defaults, without secrets."""
    composed = compose_run("", arguments)
    print(yaml.safe_dump(masked(composed), sort_keys=False, allow_unicode=True), end="")


def begin(arguments: list[str]) -> int:
    """Do what the words of a command line ask for.

    Returns:
        The exit status.

    Raises:
        ConfigError, OutOfMemory: With all that is to be told.
    """
    asked = set(arguments)
    if asked & {*HELP, *CFG, *PLAN}:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a traceback
    prepare_gpu()
    if asked & HELP:
        from trainers.settings.help import print_help

        print_help(__doc__)
    elif asked & CFG:
        pairs = zip(["", *arguments], arguments, strict=False)
        show([word for before, word in pairs if word not in CFG and not (word == "job" and before in CFG)])
    elif "--check" in asked:
        check([word for word in arguments if word != "--check"])
    elif asked & PLAN:
        return 0 if plan([word for word in arguments if word not in PLAN]) else 1
    else:
        composed = compose_run("", arguments)
        run(load_options(composed, num_processes(), REPO), composed, chosen_run(arguments))
    return 0


def main() -> None:
    """End with a message where there is one, and no traceback above it."""
    try:
        status = begin(sys.argv[1:])
    except (ConfigError, OutOfMemory) as error:
        sys.exit(str(error))
    sys.exit(status)


if __name__ == "__main__":
    main()
