"""Every option of this project, declared once: its type, its default and what it means.

TRL's own options (`learning_rate`, `beta`, `loss_type`, ...) keep TRL's names, types and defaults; they are read from
TRL (see `trl_options`) and not repeated here. `RLOptions` and `SFTOptions` are what a composed configuration is checked
against; importing this module loads neither torch nor vLLM.
"""

from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from trainers.settings.trl_choices import DERIVED, LOSSES, TRL_AUTO, TRL_CHOICES, TRL_LIMITS
from trainers.settings.trl_options import trl_options

STAGES = ("sft", "rl", "score", "rescore", "merge")
TRAINING, SCORING, WITH_MODELS = ("sft", "rl"), ("rl", "score"), ("sft", "rl", "score")

Reduction = Literal["mean", "sum", "min", "max", "median", "first_quartile", "last_quartile"]
# The reference implementation writes "none" for what is null here.
_NoneAsNull = BeforeValidator(lambda value: None if str(value).lower() == "none" else value)
Normalization = Annotated[Literal["exp", "exp_norm"] | None, _NoneAsNull]
Mode = Literal["auto", "resident", "streamed", "cpu"]
Optim = Literal["auto", "adamw_torch", "adamw_8bit", "flash_adamw", "cpu_offload", "adafactor"]


def opt(default: Any, doc: str, **limits: Any) -> Any:
    return Field(default=default, description=doc, **limits)


class BaseOptions(BaseModel):
    """Options of every stage."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    stage: Literal["sft", "rl", "score", "rescore", "merge"] = opt(
        "rl",
        "what to run: `sft` (warm-up), `rl` (GRPO with the student's reward), `score` (rewards of given explanations), "
        "`rescore` (kept scores under another formula) or `merge` (a LoRA adapter into its base)",
    )
    output_dir: str | None = opt(None, "folder of this run's files; default: results/<run>/<time>")
    activate_debugging_logs: bool = opt(False, "log every library at debug level, and each scored explanation")


class ModelOptions(BaseOptions):
    """Options of every stage that loads a model."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = opt(
        "auto",
        "type of the weights and of the arithmetic; auto: bf16 on a GPU; on one without bf16 hardware fp16, or fp32 "
        "where every weight is trained; fp32 without a GPU; in stage=merge the base's own",
    )
    model_name_or_path: str | None = opt(
        None,
        "the teacher (the model to train): a folder, a hub id, or `run:NAME`, the result of cfgs/run_cfg/NAME.yaml; a "
        "folder may hold a LoRA adapter (see adapter_start), and in stage=merge it must",
    )
    trust_remote_code: bool = opt(False, "run Python code that a model repository brings along")


class CommonOptions(ModelOptions):
    """Options of every stage that computes with models."""

    seed: int = opt(42, "seed of the data order, the fresh weights and every sampled token", ge=0)
    device: Literal["auto", "cuda", "cpu"] = opt("auto", "where to compute; `cuda` refuses to start without a GPU")
    ignore_memory_plan: bool = opt(False, "start although the plan of memory says that it does not fit")
    attn_implementation: str | None = opt(
        None, "attention of the teacher and the student; default: transformers' choice (sdpa), eager for Gemma 2"
    )
    chat_template: str | None = opt(None, "Jinja chat template, or a file with one, for a tokenizer that has none")
    chat_template_kwargs: dict[str, Any] | None = opt(None, "extra variables for the chat template")
    eos_token: str | None = opt(None, "the token that ends a turn, where the tokenizer's own eos_token does not")

    dataset_id_or_path: str | None = opt(None, "the data: a .jsonl/.json/.parquet/.csv/.tsv file, a folder or a hub id")
    dataset_split: str = opt("train", "split of a folder or hub data set")
    max_samples: int | None = opt(
        None, "use the first so many rows (to train on: of those that eval_size leaves)", ge=1
    )
    question_column: str = opt("question", "column with the question")
    solution_column: str = opt("solution", "column with the solution")

    tag_format: Literal["stratos", "r1"] = opt("stratos", "tags around explanation, thought and solution")
    teacher_system_prompt: str | None = opt(None, "system prompt of the teacher; default: the tag format's")
    student_system_prompt: str | None = opt(None, "system prompt of the student; default: the tag format's")


class TrainOptions(CommonOptions):
    """Options of the stages that train."""

    eval_dataset_id_or_path: str | None = opt(None, "held-out data; default: eval_dataset_split of the training data")
    eval_dataset_split: str | None = opt(None, "split of the held-out data, where that is no file")
    eval_size: int | None = opt(
        None,
        "so many questions of the training data are not trained on but evaluated, unless eval_dataset_id_or_path names "
        "held-out data (with eval_dataset_split it is to be null); with the same number the same ones in every run on "
        "that data, RL or warm-up, whatever max_samples is",
        ge=1,
    )
    max_eval_samples: int | None = opt(None, "evaluate on the first so many rows of the held-out data", ge=1)
    max_prompt_length: int = opt(1024, "tokens of question, solution and template together", ge=1)
    overlong: Literal["filter", "truncate_left", "error"] = opt(
        "filter", "a prompt over max_prompt_length: leave it out, cut its start, or stop"
    )
    train_batch_size: int = opt(32, "completions (SFT: samples) per optimizer step, over all devices", ge=1)
    vram_gb: float | None = opt(
        None,
        "the card that a preset is for, in GB (1e9 bytes): memory is planned for it where no GPU is at hand",
        gt=0,
    )
    optim: Optim = opt(
        "auto",
        "the optimizer: `adamw_torch` (PyTorch's, 8 bytes a weight in fp32), `adamw_8bit` (states in 8 bits, about 2 "
        "bytes a weight; bf16 weights are rounded up or down at random, so that small steps count on average), "
        "`flash_adamw` (GPU only: 8-bit states and 8 further bits for each bf16 weight, about 3 bytes), `cpu_offload` "
        "(fp32 weights and states in host memory, 12 bytes a weight there and none on the GPU; slower), `adafactor` "
        "(hardly any states); auto: adamw_torch for fp32 weights and for adapters; for bf16 weights adamw_8bit, or "
        "cpu_offload where the plan of memory finds no room for it",
    )
    use_peft: bool = opt(False, "train LoRA adapters (peft) and keep the weights as they are; false: every weight")
    adapter_start: Literal["auto", "continue", "merge"] = opt(
        "auto",
        "where model_name_or_path is a LoRA adapter: `continue` (train that adapter on), `merge` (into its base, in "
        "output_dir; then train that model, with use_peft through a fresh adapter); auto: continue with use_peft, else "
        "merge",
    )
    lora_r: int = opt(16, "rank of the adapters", ge=1, le=512)
    lora_alpha: int = opt(32, "the adapters count lora_alpha / lora_r times", ge=1)
    lora_dropout: float = opt(
        0.0, "dropout in front of the adapters; above 0 the trainer differs from the engine by it", ge=0, lt=1
    )
    lora_target_modules: str | list[str] = opt(
        "all-linear", "layers that get an adapter: all-linear, or the last parts of their names, e.g. [q_proj, v_proj]"
    )
    activation_offloading: bool | Literal["auto"] = opt(
        False,
        "rest what the backward pass needs in host memory meanwhile; for a GPU, and slower; auto: where no micro-batch "
        "fits without",
    )


class SFTOptions(TrainOptions):
    """Options of stage=sft: the warm-up that shows a model the format."""

    model_init: dict[str, Any] | None = opt(
        None, "instead of model_name_or_path: keyword arguments of a transformers config for a fresh random model"
    )
    reasoning_trace_column: str = opt("reasoning_trace", "column with an explanation to imitate")
    sft_role: Literal["teacher", "student"] = opt(
        "teacher", "format to learn: question and solution to explanation, or question to thought and solution"
    )


class FormulaOptions(BaseModel):
    """The reward's formula."""

    answer_log_prob_coeff: float | list[float] = opt(
        [1.0, 0.01], "c: weight of each reduction of the solution's log-probs"
    )
    reduction_log_prob_fn: Reduction | list[Reduction] = opt(["mean", "min"], "reductions over the solution's tokens")
    normalize_log_prob_fn: Normalization = opt(None, "transform of the solution's log-probs before reducing")
    clip_log_prob: float | None = opt(None, "clip the solution's log-probs at minus this", gt=0)
    kl_penalty_reward_coeff: float | list[float] = opt([3.0, 0.03], "lambda: weight of each reduction of the KL")
    reduction_kl_fn: Reduction | list[Reduction] = opt(["mean", "max"], "reductions over the explanation's tokens")
    normalize_kl_fn: Normalization = opt(None, "transform of the KL before reducing")
    clip_kl: float | None = opt(None, "clip the KL at this", gt=0)
    use_schulman_kl_estimation: bool = opt(False, "k - 1 + exp(-k) in place of the log-ratio k")
    not_matched_penalty: float = opt(-1.0, "added where the closing explanation tag is missing")
    include_teacher_think_entropy: bool = opt(
        True, "compare with the teacher's log-probs; false: charge the student's surprise alone, -log p_student"
    )


class RewardOptions(FormulaOptions):
    """The formula and the student it is computed with."""

    student_model: str | None = opt(None, "the frozen student: a folder, a hub id or `run:NAME`")
    student_chat_template: str | None = opt(None, "as chat_template, for the student")
    student_chat_template_kwargs: dict[str, Any] | None = opt(None, "as chat_template_kwargs, for the student")
    student_mode: Mode = opt(
        "auto",
        "where the student rests: `resident` (on the device), `streamed` (in host memory or on disk; its layers pass "
        "through the device one by one), `cpu` (it computes there); auto: resident, on a GPU only if the plan of "
        "memory finds room and offload_untrained_models is off, else streamed; with overlap_scoring resident, or cpu "
        "where offload_untrained_models keeps it off a GPU",
    )
    student_quantization: Literal["8bit", "4bit"] | None = opt(
        None, "keep the student in 8 or 4 bits (bitsandbytes); what that changes in the reward is printed at the start"
    )
    reference_mode: Mode = opt(
        "auto", "the same for the teacher as it was: the reference of beta, the teacher of score"
    )
    student_tokens_per_pass: Annotated[int, Field(ge=1)] | Literal["auto"] = opt(
        "auto",
        "tokens, padding included, that student or reference reads in one pass over its weights; auto: what the "
        "plan of memory finds room for, 16384 on a CPU",
    )
    offload_untrained_models: bool = opt(False, "keep the student and the reference off the GPU: see student_mode")
    disable_student_offloading: bool = opt(False, "exempt the student from offload_untrained_models")
    padding_in_kl: bool = opt(
        True,
        "the KL covers all between the explanation's tags, the padding after the opening tag included, as in the "
        "reference implementation; that padding is given to the teacher, so RL leaves it out (trainer_cfg/grpo.yaml)",
    )
    student_temperature: float = opt(0.7, "temperature of the student's log-probs", gt=0)
    unbias_teacher_log_probs: bool = opt(
        True, "the teacher's log-probs are those at its sampling temperature; false: at 1, where that can be had"
    )
    keep_scores: bool = opt(
        False, "keep the raw log-probs of every scored batch in output_dir/scores, for stage=rescore"
    )


class RLOptions(TrainOptions, RewardOptions):
    """Options of stage=rl: GRPO on the student's reward."""

    reward_funcs: list[str | dict[str, Any]] = opt(
        ["teacher_logprob_kl"],
        "the rewards, which reward_weights (default: 1.0 each) adds up: `teacher_logprob_kl` (the formula), "
        "`student_answer` (1 where the student's greedy answer is the solution), `accuracy` (1 where the final answer "
        "in the explanation, as \\boxed{}, equals the solution, by math-verify), `format` (1 for an explanation, its "
        "closing tag and the end of turn), `length` (from 0 down to -1 close to max_completion_length), or a function "
        "of yours, {_target_: module.function, argument: value}",
    )
    length_soft_cache: int | None = opt(
        None,
        "`length` punishes the last so many tokens below max_completion_length; default: a fifth of it",
        ge=1,
    )

    generation_aggregation_steps: int | None = opt(
        None, "micro-batches generated at once; default: a whole optimizer step's", ge=1
    )
    use_vllm_server: bool = opt(False, "not in this project: the engine lives in the trainer's process")
    use_ray: bool = opt(False, "not in this project: one process trains, generates and scores")
    use_vllm: bool = opt(True, "generate with the vLLM engine in this process; false: with transformers, slower")
    weight_bridge: Literal["shared", "copy", "lora", "restart", "none", "shared_vllm", "lora_only"] | None = opt(
        None,
        "how the engine gets new weights: `shared` (one copy, used by trainer and engine), `copy` (the engine's own, "
        "copied after each update), `lora` (one copy of the frozen base, adapters written into the engine's buffers), "
        "`restart` (a new engine from a checkpoint after each update; for debugging); default: shared, lora with "
        "use_peft. Atropos' names for three of them: shared_vllm, lora_only, and none for restart",
    )
    enforce_eager: bool = opt(False, "vLLM without CUDA graphs")
    enable_prefix_caching: bool = opt(True, "vLLM keeps the KV cache of a shared prompt between requests")
    max_num_seqs: int | None = opt(
        None,
        "completions that vLLM writes at once; default: those of a rollout or of an evaluation's batch, at most 256",
        ge=1,
    )
    kv_cache_gib: float | None = opt(
        None,
        "memory of vLLM's KV cache in GiB, in place of vllm_gpu_memory_utilization; with that on auto the plan of "
        "memory sets it, on a GPU",
        gt=0,
    )
    vllm_kwargs: dict[str, Any] = opt({}, "further arguments of vllm.LLM")
    stop_at_closing_tag: bool = opt(
        True, "a completion ends at the closing explanation tag; what the teacher would write after it is not read"
    )
    share_prompts: bool = opt(
        True,
        "in a forward pass, read the prompt that several completions continue once for all of them, and bring those "
        "into one micro-batch: the same numbers (dropout aside); not in untested families, nor with other attention "
        "than sdpa and eager",
    )
    sentinel_tolerance: float | None = opt(
        None,
        "after each update, log-probs of a fixed prompt may differ between trainer and engine by so much, else the run "
        "stops; default: 0.001 in fp32, 0.3 in bf16 and fp16; in these, and on a GPU, four times what it is before the "
        "first update, if that is more, up to 1, and one difference up to ten times that, or 1, warns only; and those "
        "of a whole text of the first rollout on average by so much, by default 0.1 where numbers are rounded",
        gt=0,
    )
    overlap_scoring: bool = opt(
        False,
        "score a question's explanations while the engine still writes those of others; not with "
        "student_mode=streamed (see there)",
    )
    record_rollouts: str | None = opt(None, "folder in which every sampled batch is kept")
    replay_rollouts: str | None = opt(
        None, "folder of record_rollouts: take the completions from there, in order, and start no engine"
    )
    num_probes: int = opt(
        32,
        "held-out questions on which every evaluation also scores what explains nothing (an empty explanation, a "
        "shuffled one, the bare solution, that of another question), with a warning if it beats the teacher; 0: none",
        ge=0,
    )
    report_before_after: bool = opt(True, "score the held-out questions before and after training, write result.json")


class ScoreOptions(CommonOptions, RewardOptions):
    """Options of stage=score: the reward of explanations from anywhere."""

    temperature: float = opt(0.7, "temperature of the teacher's log-probs", gt=0)
    explanation_column: str = opt("explanation", "column with the explanation to score")
    closed_column: str = opt("closed", "column that is false where the closing explanation tag is missing, if any")


ScoringOptions = ScoreOptions | RLOptions  # of the stages that score explanations


class MergeOptions(ModelOptions):
    """Options of stage=merge: a LoRA adapter into its base, as an ordinary checkpoint."""

    base_model: str | None = opt(None, "the adapter's base, a folder or a hub id; default: what the adapter names")


class RescoreOptions(BaseOptions, FormulaOptions):
    """Options of stage=rescore: kept scores under another formula; what of it is not set is as they were scored."""

    scores: str | None = opt(None, "folder of kept scores (the scores folder of a run with keep_scores=true)")


def _with_trl(base: type[CommonOptions], kind: str) -> type[CommonOptions]:
    """Add TRL's options of `kind`, all optional: what is not set stays TRL's default."""
    fields: dict[str, Any] = {}
    for name, option in trl_options(kind).items():
        if name in base.model_fields or name in DERIVED:
            continue
        annotation = LOSSES[kind] if name == "loss_type" else TRL_CHOICES.get(name, option.annotation)
        if name in TRL_LIMITS:
            annotation = Annotated[annotation, Field(**TRL_LIMITS[name])]
        if name in TRL_AUTO:
            annotation = annotation | Literal["auto"]
        fields[name] = (annotation | None, Field(default=option.default))
    return create_model(base.__name__, __base__=base, **fields)


@cache
def options_class(stage: str) -> type[BaseOptions]:
    """Return the class that holds every option of `stage`, TRL's included."""
    without_trl = {"score": ScoreOptions, "rescore": RescoreOptions, "merge": MergeOptions}
    if stage in without_trl:
        return without_trl[stage]
    return _with_trl(SFTOptions, "sft") if stage == "sft" else _with_trl(RLOptions, "grpo")


def admits_none(cls: type[BaseModel], name: str) -> bool:
    """Whether null is a value of the option's own type (every TRL option may also be left out)."""
    for kind in ("grpo", "sft"):
        if cls.__name__ == {"grpo": "RLOptions", "sft": "SFTOptions"}[kind] and not _is_own(cls, name):
            return type(None) in get_args(trl_options(kind)[name].annotation)
    return type(None) in get_args(cls.model_fields[name].annotation)


def _is_own(cls: type[BaseModel], name: str) -> bool:
    return any(name in base.model_fields for base in cls.__mro__[1:] if issubclass(base, BaseModel))


def trl_arguments(options: CommonOptions, kind: str) -> dict[str, Any]:
    """Return the TRL options that were set, ready for TRL's configuration class."""
    own = (RLOptions if kind == "grpo" else SFTOptions).model_fields
    names = set(trl_options(kind)) - set(own) - set(DERIVED)
    return {name: getattr(options, name) for name in options.model_fields_set & names}
