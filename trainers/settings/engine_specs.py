"""What the options of the engine may be together; imports neither torch nor vLLM."""

import ast
import difflib
import os
from functools import cache
from pathlib import Path

from trainers.errors import Fault
from trainers.options import RLOptions
from trainers.settings.reward_specs import reads_teacher_logprobs, uses_student
from trainers.settings.trl_options import class_body, trl_options

# Names of the Atropos trainer for the same things.
ATROPOS = {"shared_vllm": "shared", "lora_only": "lora", "none": "restart"}

# Arguments of vllm.LLM that this project sets itself, and the option to use instead.
SET_HERE = {
    "model": "model_name_or_path",
    "tokenizer": "model_name_or_path",
    "seed": "seed",
    "dtype": "precision",
    "max_model_len": "vllm_max_model_length",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "enforce_eager": "enforce_eager",
    "enable_prefix_caching": "enable_prefix_caching",
    "max_num_seqs": "max_num_seqs",
    "trust_remote_code": "trust_remote_code",
    "load_format": "weight_bridge",
    "enable_lora": "use_peft",
    "max_loras": "use_peft",
    "max_lora_rank": "lora_r",
    "lora_target_modules": "lora_target_modules",
    "kv_cache_memory_bytes": "kv_cache_gib",
    "enable_sleep_mode": None,
    "enable_cumem_allocator": None,
    "logprobs_mode": None,
    "distributed_executor_backend": None,
    "worker_cls": None,
}
SAMPLING_OPTIONS = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
SAMPLING_OPTIONS |= {"max_tokens": "max_completion_length", "max_new_tokens": "max_completion_length"}
SAMPLING_SET_HERE = ("n", "seed", "logprobs", "prompt_logprobs", "logprob_token_ids", "flat_logprobs", "detokenize")
SAMPLING_SET_HERE += ("stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "output_kind")
# Of transformers.GenerationConfig: what TRL and this project set, and what makes other completions than samples.
GENERATE_SET_HERE = ("do_sample", "max_length", "eos_token_id", "pad_token_id", "bos_token_id", "stop_strings")
GENERATE_SET_HERE += ("num_return_sequences", "return_dict_in_generate", "disable_compile", "token_healing")
GENERATE_SET_HERE += ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
GENERATE_SET_HERE += ("num_beams", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids")
GENERATE_SET_HERE += ("penalty_alpha", "dola_layers", "low_memory")
# What only the engine reads, and what stands where nobody has set it.
ENGINE_ONLY = {"weight_bridge": (None,), "vllm_kwargs": ({},), "max_num_seqs": (None,), "kv_cache_gib": (None,)}
ENGINE_ONLY |= {"vllm_max_model_length": (None,), "enforce_eager": (False,), "enable_prefix_caching": (True,)}
ENGINE_ONLY |= {"vllm_gpu_memory_utilization": ("auto", trl_options("grpo")["vllm_gpu_memory_utilization"].default)}
# What changes the distribution that is sampled from, and what leaves it as it is.
RESHAPING = {"top_p": (1.0,), "top_k": (0, -1), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
RESHAPING_KWARGS = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "bad_words": [], "min_tokens": 0}
RESHAPING_KWARGS |= {"allowed_token_ids": None, "structured_outputs": None, "thinking_token_budget": -1}
MAX_BATCHED_TOKENS = 8192
CPU_KV_CACHE = 2**30  # bytes
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "nnodes")
PARALLEL += ("prefill_context_parallel_size", "decode_context_parallel_size")
# What has vLLM keep weights in host memory, keep keys and values outside of its cache, or decode speculatively; its
# other arguments for these do nothing alone.
OFFLOADING = ("cpu_offload_gb", "offload_group_size")
KV_STORES = ("kv_transfer_config", "kv_offloading_size")
SPECULATIVE = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
DRAFTS_FROM_TEXT = ("ngram", "ngram_gpu", "suffix")  # methods without a draft model


def bridge_name(options: RLOptions) -> str:
    """The weight bridge by this project's name for it."""
    if options.weight_bridge is None:
        return "lora" if options.use_peft else "shared"
    return ATROPOS.get(options.weight_bridge, options.weight_bridge)


def has_engine(options: RLOptions) -> bool:
    """Whether vLLM generates in this run."""
    return options.use_vllm and options.replay_rollouts is None


def model_length(options: RLOptions) -> int:
    """Longest prompt and completion together that the engine takes, in tokens."""
    return options.vllm_max_model_length or options.max_prompt_length + options.max_completion_length


def batched_tokens(options: RLOptions, num_seqs: int | None) -> int:
    """Tokens that the engine computes at once on a GPU, which the plan of memory counts on.

    vLLM's warm-up spreads so many over `num_seqs` sequences, and none may come out longer than the engine takes.
    """
    return min(MAX_BATCHED_TOKENS, num_seqs * model_length(options)) if num_seqs else MAX_BATCHED_TOKENS


@cache
def vllm_arguments() -> frozenset[str]:
    """The arguments of vllm.LLM, read from its source."""
    names = {
        n.target.id for n in class_body("vllm", "engine/arg_utils.py", "EngineArgs") if isinstance(n, ast.AnnAssign)
    }
    for node in class_body("vllm", "entrypoints/llm.py", "LLM"):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} - {"self"}
    return frozenset(names)


def process_faults(options: RLOptions, num_devices: int) -> list[Fault]:
    """What one process with the engine in it is not."""
    faults = []
    for key in ("use_vllm_server", "use_ray"):
        if getattr(options, key):
            cause = "the engine runs inside the trainer's process, there is no server and no Ray"
            faults.append(Fault(key, True, cause, f"{key}=false"))
    if num_devices > 1:
        cause = "RL runs in one process on one GPU"
        faults.append(Fault("num_processes", num_devices, cause, "./launch_mono.sh, or ./launch.sh 1"))
    return faults


def _length_faults(options: RLOptions) -> list[Fault]:
    need = options.max_prompt_length + options.max_completion_length
    given = options.vllm_max_model_length
    if given is None or given >= need:
        return []
    lengths = f"max_prompt_length {options.max_prompt_length} + max_completion_length {options.max_completion_length}"
    remedy = f"vllm_max_model_length={need}, or leave it out"
    return [Fault("vllm_max_model_length", given, f"shorter than {lengths}", remedy)]


def _synced_reference_faults(options: RLOptions) -> list[Fault]:
    if not options.sync_ref_model or options.beta:
        return []
    cause = "there is no reference model while beta is 0"
    return [Fault("sync_ref_model", True, cause, "sync_ref_model=false, or beta=0.04")]


def _engine_only_faults(options: RLOptions) -> list[Fault]:
    if options.use_vllm:
        return []
    cause = "use_vllm=false generates with transformers, without an engine"
    given = {key: getattr(options, key) for key, unset in ENGINE_ONLY.items() if getattr(options, key) not in unset}
    return [Fault(key, value, cause, "leave it out, or use_vllm=true") for key, value in given.items()]


def _reference_faults(options: RLOptions) -> list[Fault]:
    if not options.use_peft or options.reference_mode == "auto":
        return []
    cause = "with use_peft the reference is the teacher itself, its adapters aside: no second model is loaded"
    return [Fault("reference_mode", options.reference_mode, cause, "reference_mode=auto")]


@cache
def sampling_arguments() -> frozenset[str]:
    """The arguments of vllm.SamplingParams, read from its source."""
    body = class_body("vllm", "sampling_params.py", "SamplingParams")
    names = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    return frozenset(name for name in names if not name.startswith("_"))


@cache
def generate_arguments() -> frozenset[str]:
    """The parameters of transformers.GenerationConfig, which takes any name: those that its source asks for."""
    body = class_body("transformers", "generation/configuration_utils.py", "GenerationConfig")
    init = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    pops = (node for node in ast.walk(init) if isinstance(node, ast.Call) and ast.unparse(node.func) == "kwargs.pop")
    names = {node.args[0].value for node in pops} - {"transformers_version"}
    return frozenset(name for name in names if not name.startswith("_"))


def _generation_kwargs_faults(options: RLOptions) -> list[Fault]:
    faults = []
    if options.use_vllm:
        set_here, known, where = SAMPLING_SET_HERE, sampling_arguments, "vllm.SamplingParams"
    else:
        set_here, known, where = GENERATE_SET_HERE, generate_arguments, "transformers.GenerationConfig"
    for name, value in (options.generation_kwargs or {}).items():
        if name in SAMPLING_OPTIONS:
            cause, remedy = "there is an option for it", f"use the option {SAMPLING_OPTIONS[name]}"
        elif name in set_here:
            cause, remedy = "this project sets it itself: one sample for each prompt of a batch", "leave it out"
        elif name not in known():
            near = difflib.get_close_matches(name, known(), n=2)
            cause = f"{where} has no such parameter"
            remedy = f"did you mean {' or '.join(near)}?" if near else f"see the arguments of {where}"
        else:
            continue
        faults.append(Fault("generation_kwargs", f"{name}={value}", cause, remedy))
    return faults


def _sampling_faults(options: RLOptions) -> list[Fault]:
    if not options.use_vllm:
        return []
    faults = _reshaping_faults(options)
    if not 0.01 <= options.temperature <= 2:
        cause, remedy = "vLLM samples at temperatures from 0.01 to 2", "temperature=1, or use_vllm=false"
        faults.append(Fault("temperature", options.temperature, cause, remedy))
    return faults


def reshaping(options: RLOptions) -> tuple[list[str], list[str]]:
    """The options, and the names among `generation_kwargs`, that alter the distribution which vLLM samples from and
    tells log-probabilities of."""
    given = options.generation_kwargs or {}
    named = [name for name, neutral in RESHAPING_KWARGS.items() if given.get(name) not in (None, neutral)]
    return [name for name, neutral in RESHAPING.items() if getattr(options, name) not in neutral], named


def _reshaping_faults(options: RLOptions) -> list[Fault]:
    """What alters that distribution, where the teacher's own log-probabilities are needed."""
    given, needs = options.generation_kwargs or {}, []
    reshaped, named = reshaping(options)
    if reads_teacher_logprobs(options):
        needs.append(("the reward's KL", "kl_penalty_reward_coeff=0 or include_teacher_think_entropy=false"))
    else:
        named = [name for name in named if name != "min_tokens"]  # which only keeps an end from the first of them
    if options.vllm_importance_sampling_correction:  # a sample would count p(what is kept)^length times
        needs.append(("vllm_importance_sampling_correction", "vllm_importance_sampling_correction=false"))
    if not needs:
        return []
    readers, ways = " and ".join(who for who, _ in needs), " with ".join(way for _, way in reversed(needs))
    cause = f"vLLM tells log-probabilities of what it makes of the distribution, and {readers} would take them for the "
    cause += "teacher's"
    remedy = f"leave it out, or use_vllm=false, or {ways}"
    faults = [Fault(name, getattr(options, name), cause, remedy) for name in reshaped]
    remedy = f"leave it out, or {ways}"  # transformers has other names for them, or none
    return faults + [Fault("generation_kwargs", f"{name}={given[name]}", cause, remedy) for name in named]


def device_faults(options: RLOptions, device: str, dtype: str) -> list[Fault]:
    """What is wrong with the options of generation on this device; told before a model is loaded.

    Args:
        device: cuda or cpu.
        dtype: Of the weights, as in `torch.float32`.
    """
    faults = []
    bridge = bridge_name(options)
    if options.use_vllm and bridge == "lora" and device == "cuda" and dtype == "torch.float32":
        cause = "vLLM's adapter kernels compute in bf16 and fp16 only"
        faults.append(Fault("precision", options.precision, cause, "precision=bf16, or weight_bridge=copy"))
    if options.use_vllm and options.cast_lm_head_to_fp32 and bridge in ("shared", "lora") and dtype != "torch.float32":
        cause = f"it moves the head's weight away from the engine's (weight_bridge={bridge})"
        faults.append(Fault("cast_lm_head_to_fp32", True, cause, "cast_lm_head_to_fp32=false, or weight_bridge=copy"))
    if device == "cpu" and "enable_chunked_prefill" in options.vllm_kwargs:
        cause = "on a CPU seeds of requests need whole prompts"
        faults.append(Fault("vllm_kwargs", "enable_chunked_prefill", cause, "leave it out"))
    if device == "cpu" and (speculative := _speculative_method(options)):
        cause = "on a CPU vLLM's speculative decoding samples wrongly: it divides logits by numbers that nobody set"
        faults.append(Fault("vllm_kwargs", speculative[0], cause, "leave it out"))
    invariant = os.environ.get("VLLM_BATCH_INVARIANT", "0")
    if has_engine(options) and device == "cuda" and invariant not in ("", "0"):
        cause = "for the whole process, the trainer too, it replaces products by kernels without a backward pass"
        faults.append(Fault("VLLM_BATCH_INVARIANT", invariant, cause, "unset VLLM_BATCH_INVARIANT"))
    return faults


def short_student(options: RLOptions, limit: int) -> str | None:
    """What a student of so few positions will leave out; None where it reads whatever the teacher may."""
    longest = options.max_prompt_length + options.max_completion_length
    if limit >= longest:
        return None
    lengths = f"max_prompt_length {options.max_prompt_length} + max_completion_length {options.max_completion_length}"
    remedy = f"max_completion_length={limit - options.max_prompt_length}, or "
    remedy = remedy if limit > options.max_prompt_length else "shorter lengths, or "
    return (
        f"the student has {limit} positions, fewer than {lengths}: explanations that are too long for it are left out, "
        f"without a reward or an advantage -> {remedy}a student_model that reads {longest} tokens"
    )


def _bridge_faults(options: RLOptions) -> list[Fault]:
    bridge, given = bridge_name(options), options.weight_bridge
    if bridge == "lora" and not options.use_peft:
        cause = "it brings adapters to the engine, and none are trained"
        return [Fault("weight_bridge", given, cause, "use_peft=true, or weight_bridge=shared")]
    if bridge == "shared" and options.use_peft:
        cause = "it shares weights that are trained, and use_peft trains adapters"
        return [Fault("weight_bridge", given, cause, "weight_bridge=lora, which shares the base, or leave it out")]
    return []


def _kwargs_faults(options: RLOptions) -> list[Fault]:
    faults = []
    for name, value in options.vllm_kwargs.items():
        if name in PARALLEL:
            if value != 1:
                cause = "the engine computes in the trainer's process, on its one GPU"
                faults.append(Fault("vllm_kwargs", f"{name}={value}", cause, f"leave {name} out"))
        elif name in SET_HERE:
            remedy = f"use the option {SET_HERE[name]}" if SET_HERE[name] else "leave it out"
            faults.append(Fault("vllm_kwargs", f"{name}={value}", "this project sets it itself", remedy))
        elif name == "model_impl":
            cause = "vLLM's Transformers backend alters transformers' own classes, and the trainer computes with them"
            faults.append(Fault("vllm_kwargs", f"{name}={value}", cause, "leave it out"))
        elif name == "quantization" and value is not None and bridge_name(options) != "restart":
            cause = "vLLM packs quantized weights its own way, so the trainer's cannot be put in their place"
            faults.append(Fault("vllm_kwargs", f"{name}={value}", cause, "weight_bridge=restart, or no quantization"))
        elif name in OFFLOADING and value and bridge_name(options) != "restart":
            cause = f"it keeps weights in host memory, where weight_bridge={bridge_name(options)} does not update them"
            faults.append(Fault("vllm_kwargs", f"{name}={value}", cause, "leave it out, or weight_bridge=restart"))
        elif name in KV_STORES and value:
            cause = "keys and values kept outside of the engine's cache outlive the weights that they came from"
            faults.append(Fault("vllm_kwargs", f"{name}={value}", cause, "leave it out"))
        elif name not in vllm_arguments():
            near = difflib.get_close_matches(name, vllm_arguments(), n=2)
            remedy = f"did you mean {' or '.join(near)}?" if near else "see the arguments of vllm.LLM"
            faults.append(Fault("vllm_kwargs", f"{name}={value}", "vLLM has no such argument", remedy))
    return faults


def _speculative_method(options: RLOptions) -> tuple[str, str] | None:
    """The argument that asks for speculative decoding, and by which method; None where none does."""
    given = {name: options.vllm_kwargs[name] for name in SPECULATIVE if options.vllm_kwargs.get(name)}
    if not given:
        return None
    config = given.get("speculative_config")
    config = config if isinstance(config, dict) else {}
    asked = (given.get("spec_method"), config.get("method"), given.get("spec_model"), config.get("model"))
    return next(iter(given)), next((str(name).strip("[]") for name in asked if name), "draft_model")


def _speculative_faults(options: RLOptions) -> list[Fault]:
    speculative, bridge = _speculative_method(options), bridge_name(options)
    if speculative is None or speculative[1] in DRAFTS_FROM_TEXT or bridge == "restart":
        return []
    name, _ = speculative
    cause = f"with weight_bridge={bridge} any model that vLLM starts loads the teacher's weights, a draft model too"
    remedy = "leave it out, or weight_bridge=restart, or on a GPU method: ngram, which has no model"
    return [Fault("vllm_kwargs", f"{name}={options.vllm_kwargs[name]}", cause, remedy)]


def _rollout_faults(options: RLOptions) -> list[Fault]:
    faults = []
    replay = options.replay_rollouts
    if replay is not None and not (Path(replay).expanduser() / "train-00000.parquet").is_file():
        cause = "the folder holds no recorded rollouts"
        faults.append(Fault("replay_rollouts", replay, cause, "a folder written by record_rollouts"))
    if replay is not None and options.record_rollouts is not None:
        faults.append(Fault("record_rollouts", options.record_rollouts, "nothing new is sampled", "leave one out"))
    if options.record_rollouts is not None and list(Path(options.record_rollouts).expanduser().glob("*.parquet")):
        cause = "the folder already holds a recording"
        faults.append(Fault("record_rollouts", options.record_rollouts, cause, "name a new folder"))
    return faults


def _overlap_faults(options: RLOptions) -> list[Fault]:
    if not options.overlap_scoring:
        return []
    faults = []
    if not has_engine(options):
        cause = "without the engine there is no generation to overlap with"
        faults.append(Fault("overlap_scoring", True, cause, "overlap_scoring=false"))
    if not uses_student(options):
        cause = "no reward function asks the student, so there is nothing to score meanwhile"
        remedy = "overlap_scoring=false, or add teacher_logprob_kl to reward_funcs"
        faults.append(Fault("overlap_scoring", True, cause, remedy))
    elif options.student_mode == "streamed":
        cause = "a streamed student reads its weights once for a whole batch, not for each group"
        faults.append(Fault("overlap_scoring", True, cause, "student_mode=cpu or resident, or overlap_scoring=false"))
    return faults


# What is wrong with the options of generation, as far as that shows without loading anything.
ENGINE_FAULTS = (
    _length_faults,
    _synced_reference_faults,
    _bridge_faults,
    _kwargs_faults,
    _speculative_faults,
    _rollout_faults,
    _overlap_faults,
    _engine_only_faults,
    _generation_kwargs_faults,
    _sampling_faults,
    _reference_faults,
)
