"""What vLLM is started with, and what it may do to the process."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from trainers.errors import ConfigError, Fault
from trainers.options import RLOptions
from trainers.settings.engine_specs import CPU_KV_CACHE, batched_tokens, bridge_name, model_length


def prepare_environment(device: torch.device) -> None:
    """Set what vLLM reads from the environment, once it builds an engine. What the user has set stays."""
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process
        "VLLM_CONFIGURE_LOGGING": "0",  # its messages go where ours go
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # nobody else is to reach it, and a machine without a network has no other
        "TRITON_PRINT_AUTOTUNING": "0",  # vLLM would have it printed, of the trainer's kernels too
    }
    # Otherwise vLLM takes all threads but one from torch, whose optimizer or student may compute on the CPU here.
    if device.type == "cpu":
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    else:
        defaults["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def engine_arguments(options: RLOptions, model_path: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of vllm.LLM for these options, those of the bridge and `vllm_kwargs` aside."""
    arguments = {
        "model": model_path,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": options.seed,
        "max_model_len": model_length(options),
        "enforce_eager": options.enforce_eager or is_slow_to_compile(options, device),
        "enable_prefix_caching": options.enable_prefix_caching,
        "logprobs_mode": "processed_logprobs",
        "trust_remote_code": options.trust_remote_code,
        "disable_log_stats": True,
    }
    if options.max_num_seqs is not None:
        arguments["max_num_seqs"] = options.max_num_seqs
    if options.vllm_gpu_memory_utilization != "auto":
        arguments["gpu_memory_utilization"] = options.vllm_gpu_memory_utilization
    if options.kv_cache_gib is not None or device.type == "cpu":
        arguments["kv_cache_memory_bytes"] = int((options.kv_cache_gib or CPU_KV_CACHE / 2**30) * 2**30)
        # Without effect beside it, but vLLM refuses to start where so much of the card is not free.
        arguments.setdefault("gpu_memory_utilization", 0.01)
    if device.type == "cuda":
        arguments["max_num_batched_tokens"] = batched_tokens(options, options.max_num_seqs)
    else:
        # A prompt cut in two makes vLLM rewind the request's generator, which torch cannot do on a CPU.
        arguments["enable_chunked_prefill"] = False
        arguments["block_size"] = 32  # of its own accord 128 tokens, and a prompt is cached by whole blocks
        arguments["max_num_batched_tokens"] = max(8192, arguments["max_model_len"])
    return arguments


def is_slow_to_compile(options: RLOptions, device: torch.device) -> bool:
    """Whether vLLM would call a C++ compiler at every start, which a run on a CPU never earns back. Whoever says how
    to compile (compilation_config) is taken at his word."""
    return device.type == "cpu" and "compilation_config" not in options.vllm_kwargs


def check_architecture(options: RLOptions, model_path: str, device: torch.device, dtype: torch.dtype) -> None:
    """See that vLLM takes a model, and has a class of its own for it, before any weights are loaded.

    Its Transformers backend decorates transformers' own classes, for the whole process: the trainer's forward pass then
    asks the trainer's model for what only vLLM's has.

    Raises:
        ConfigError: If it would fall back on that backend, or refuses the model (Gemma in fp16), or takes no adapters
            for it where the bridge brings some (GPT-2).
    """
    prepare_environment(device)
    arguments = engine_arguments(options, model_path, device, dtype)
    try:
        config = _model_config(arguments | options.vllm_kwargs)
    except ValueError as error:
        if options.vllm_kwargs and _is_taken(arguments):
            raise refused_arguments(options.vllm_kwargs, error) from error
        cause = f"vLLM refuses it: {words_of(error)}"
        remedy = "correct what it names, another model, or use_vllm=false"
        raise ConfigError(Fault("model_name_or_path", options.model_name_or_path, cause, remedy)) from error
    if config.using_transformers_backend():
        cause = f"vLLM has no class of its own for {', '.join(config.architectures)}, and its Transformers backend "
        cause += "alters the classes that the trainer computes with"
        remedy = "use_vllm=false, or a model of another architecture"
        raise ConfigError(Fault("model_name_or_path", options.model_name_or_path, cause, remedy))
    if bridge_name(options) == "lora":
        _check_adapters(config)


def _check_adapters(config: Any) -> None:
    """See that vLLM's class for a model takes adapters, which vLLM itself does once the weights are in it."""
    from vllm.model_executor.models import supports_lora

    with kept_process_state():
        model_class, _ = config.registry.resolve_model_cls(config.architectures, config)
    if not supports_lora(model_class):
        cause = f"vLLM takes no adapters for {model_class.__name__}, and weight_bridge=lora brings it some"
        remedy = "weight_bridge=copy or restart, which bring them merged, or use_vllm=false"
        raise ConfigError(Fault("use_peft", True, cause, remedy))


def _model_config(arguments: dict[str, Any]) -> Any:
    """vLLM's config of the model for these arguments."""
    from vllm.engine.arg_utils import EngineArgs

    known = {name: value for name, value in arguments.items() if name in EngineArgs.__dataclass_fields__}
    with kept_process_state():
        return EngineArgs(**known).create_model_config()


def _is_taken(arguments: dict[str, Any]) -> bool:
    try:
        _model_config(arguments)
    except ValueError:
        return False
    return True


def refused_arguments(asked: dict[str, Any], error: Exception) -> ConfigError:
    """What to say where vLLM does not take `vllm_kwargs`."""
    cause = f"vLLM does not start with it: {words_of(error)}"
    return ConfigError(Fault("vllm_kwargs", asked, cause, "correct what it names, or leave it out"))


def words_of(error: Exception) -> str:
    """What vLLM says is wrong, and with which argument, without what pydantic adds to it."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split()) or type(error).__name__
    faults = ((".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors())
    return "; ".join(f"{name}: {said}" if name else said.removeprefix("Value error, ") for name, said in faults)


@contextmanager
def kept_process_state() -> Iterator[None]:
    """Put back what vLLM sets for the whole process: the random generators, and TF32 where it was asked for."""
    python, numpy, matmul = random.getstate(), np.random.get_state(), torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)
    if precision == "tf32":  # otherwise it stays as vLLM leaves it: full fp32
        matmul.fp32_precision = precision
