"""What TRL and transformers would refuse of their own options only once a model is loaded; told before."""

from trainers.errors import Fault
from trainers.options import RLOptions, SFTOptions, TrainOptions

CHECKPOINT_ARGUMENTS = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")
# What schedules cannot do without: one of these.
SCHEDULES = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # transformers drops it, and says nothing


def schedule_faults(options: TrainOptions) -> list[Fault]:
    """Schedules of the learning rate that need an argument, and no steps to go with them."""
    if options.max_steps == 0:  # transformers would take one
        remedy = "max_steps=1 or more, or max_steps=-1 for num_train_epochs"
        return [Fault("max_steps", 0, "there is nothing to train", remedy)]
    needed, given = SCHEDULES.get(options.lr_scheduler_type, ()), options.lr_scheduler_kwargs or {}
    if not needed or not isinstance(given, dict) or sum(given.get(name) is not None for name in needed) == 1:
        return []
    value = {"num_decay_steps": "10"}.get(needed[0], "1e-7")
    remedy = f"lr_scheduler_kwargs={{{needed[0]}: {value}}}"
    return [Fault("lr_scheduler_type", options.lr_scheduler_type, f"it needs {' or '.join(needed)}", remedy)]


def warmup_faults(options: TrainOptions) -> list[Fault]:
    """A warm-up of the learning rate under a schedule that has none."""
    schedule, given = options.lr_scheduler_type, options.warmup_steps
    if not given or schedule not in WITHOUT_WARMUP:
        return []
    cause = f"lr_scheduler_type={schedule} has no warm-up, so it would have no effect"
    remedy = "lr_scheduler_type=constant_with_warmup, or warmup_steps=0"
    if schedule != "constant":
        remedy = "warmup_steps=0, or another lr_scheduler_type"
    return [Fault("warmup_steps", given, cause, remedy)]


def interval_faults(options: TrainOptions) -> list[Fault]:
    """Steps between evaluations or checkpoints where these do not come by steps."""
    faults = []
    if options.eval_steps is not None and options.eval_strategy != "steps":
        cause = f"eval_strategy={options.eval_strategy} does not read it"
        faults.append(Fault("eval_steps", options.eval_steps, cause, "eval_strategy=steps, or leave it out"))
    # RL's presets say save_steps, and may be told to save otherwise; those of the warm-up do not.
    is_asked = options.stage == "sft" and "save_steps" in options.model_fields_set
    if is_asked and options.save_strategy != "steps":
        cause = f"save_strategy={options.save_strategy} does not read it"
        faults.append(Fault("save_steps", options.save_steps, cause, "save_strategy=steps, or leave it out"))
    return faults


def accelerator_faults(options: RLOptions) -> list[Fault]:
    """Batches of texts cannot be cut up and sent to other processes."""
    given = options.accelerator_config
    if not isinstance(given, dict) or not given.get("dispatch_batches"):
        return []
    return [Fault("accelerator_config", given, "RL's batches are texts, which cannot be dispatched", "leave it out")]


def checkpointing_faults(options: TrainOptions) -> list[Fault]:
    """Arguments that gradient checkpointing has not, and a selection where there is nothing to select from."""
    key = "gradient_checkpointing_kwargs"
    chosen = value = getattr(options, key)
    if not isinstance(chosen, dict):
        return []
    known = (*CHECKPOINT_ARGUMENTS, *(("selective",) if options.stage == "sft" else ()))
    if unknown := [name for name in chosen if name not in known]:
        return [
            Fault(key, f"{name}={chosen[name]}", "there is no such argument", f"known: {', '.join(known)}")
            for name in unknown
        ]
    if not chosen.get("selective"):
        return []
    if options.gradient_checkpointing is False:
        return [Fault(key, value, "gradient_checkpointing is off", "gradient_checkpointing=true, or leave it out")]
    if chosen.get("use_reentrant"):
        remedy = "gradient_checkpointing_kwargs={selective: true}"
        return [Fault(key, value, "what is selected needs checkpoints that are not reentrant", remedy)]
    return []


def loss_faults(options: RLOptions) -> list[Fault]:
    """Losses of GRPO that do not go with how the sampling is corrected."""
    mode = options.vllm_importance_sampling_mode
    if options.loss_type != "vespo" or mode.startswith("token"):
        return []
    cause, remedy = "vespo corrects the sampling token by token", "token_mask or token_truncate"
    return [Fault("vllm_importance_sampling_mode", mode, cause, f"vllm_importance_sampling_mode={remedy}")]


def packing_faults(options: SFTOptions) -> list[Fault]:
    """How the warm-up's samples may be joined."""
    if options.packing and options.max_length is None:
        return [Fault("max_length", None, "packing fills rows of that length", "max_length=1024, or packing=false")]
    if options.padding_free and not options.packing and options.max_length is not None:
        cause = "samples that are joined without packing are not held to max_length"
        return [Fault("padding_free", True, cause, "packing=true, max_length=null, or padding_free=false")]
    return []
