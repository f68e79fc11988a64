"""What becomes of TRL's options here: tighter limits, choices, those set for the user, and names from elsewhere."""

from typing import Any, Literal

from trainers.settings.trl_options import enum_values

# Limits that TRL checks late or not at all.
TRL_LIMITS: dict[str, dict[str, Any]] = {
    "learning_rate": {"gt": 0},
    "num_generations": {"ge": 2},
    "num_generations_eval": {"ge": 1},
    "max_completion_length": {"ge": 1},
    "temperature": {"gt": 0},
    "beta": {"ge": 0},
    "per_device_train_batch_size": {"ge": 1},
    "per_device_eval_batch_size": {"ge": 1},
    "vllm_gpu_memory_utilization": {"gt": 0, "le": 1},
    "num_iterations": {"ge": 1},
    "warmup_steps": {"ge": 0},
    "neftune_noise_alpha": {"gt": 0},
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "adam_epsilon": {"ge": 0},
    "weight_decay": {"ge": 0},
    "max_grad_norm": {"ge": 0},
    "epsilon": {"ge": 0},
    "top_entropy_quantile": {"gt": 0, "le": 1},
    "num_train_epochs": {"gt": 0},
}
# Options of TRL that the plan of memory may decide.
TRL_AUTO = ("per_device_train_batch_size", "vllm_gpu_memory_utilization")
STRATEGY = Literal["no", "steps", "epoch"]
NOT_HERE = "it has no effect with this project's engine and rendering"
TRL_CHOICES: dict[str, Any] = {
    "eval_strategy": STRATEGY,
    "logging_strategy": STRATEGY,
    "save_strategy": STRATEGY | Literal["best"],
    "lr_scheduler_type": Literal[enum_values("trainer_utils.py", "SchedulerType")],
    "scale_rewards": bool | Literal["group", "batch", "none"],
    "importance_sampling_level": Literal["token", "sequence"],
    "multi_objective_aggregation": Literal["sum_then_normalize", "normalize_then_sum"],
    "vllm_importance_sampling_mode": Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
    "log_level": Literal["detail", "debug", "info", "warning", "error", "critical", "passive"],
    "packing_strategy": Literal["bfd", "bfd_split", "wrapped"],
    "truncation_mode": Literal["keep_start", "keep_end"],
}
LOSSES = {
    "grpo": Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"],
    "sft": Literal["nll", "dft"],
}

# Options of TRL that this project sets itself, and the one to use instead.
DERIVED = {
    "gradient_accumulation_steps": "it follows from train_batch_size / per_device_train_batch_size",
    "steps_per_generation": "use generation_aggregation_steps",
    "generation_batch_size": "use generation_aggregation_steps",
    "bf16": "use precision=bf16",
    "fp16": "use precision=fp16",
    "use_cpu": "use device=cpu",
    "vllm_mode": "the engine is always in this process",
    "vllm_server_base_url": "there is no vLLM server",
    "vllm_server_host": "there is no vLLM server",
    "vllm_server_port": "there is no vLLM server",
    "vllm_server_timeout": "there is no vLLM server",
    "vllm_group_port": "there is no vLLM server",
    "vllm_tensor_parallel_size": "the engine runs on one GPU",
    "vllm_enable_sleep_mode": "the weights are shared with the trainer and cannot sleep",
    "vllm_model_impl": "the engine computes with vLLM's own classes",
    "model_init_kwargs": "use precision, attn_implementation and trust_remote_code",
    "auto_find_batch_size": "a smaller batch would tear prompt groups apart",
    "remove_unused_columns": "the reward needs every column",
    "deepspeed": "this project trains on one GPU without DeepSpeed",
    "fsdp": "this project trains on one GPU without FSDP",
    "resume_from_checkpoint": "resuming is not built yet",
    "do_train": "use stage",
    "do_eval": "use eval_strategy",
    "do_predict": "there is no prediction stage",
    "data_seed": "use seed",
    "bf16_full_eval": "evaluation uses the weights as they are",
    "fp16_full_eval": "evaluation uses the weights as they are",
    "vllm_structured_outputs_regex": NOT_HERE,
    "use_transformers_continuous_batching": NOT_HERE,
    "use_transformers_paged": NOT_HERE,
    "transformers_continuous_batching_config": NOT_HERE,
    "cache_implementation": NOT_HERE,
    "max_tool_calling_iterations": "a teacher calls no tools",
    "label_smoothing_factor": NOT_HERE,
    "train_sampling_strategy": NOT_HERE,
    "completion_only_loss": "the loss covers what the model writes, nothing before",
    "assistant_only_loss": "the loss covers what the model writes, nothing before",
    "dataset_text_field": "use question_column, solution_column and reasoning_trace_column",
    "chat_template_path": "use chat_template",
    "pad_token": "a token that is not the end of turn is chosen by itself",
    "use_liger_kernel": "TRL drops it in its next major version, and its kernels have not been tried on shared weights",
    "liger_kernel_config": "it is for use_liger_kernel, which is not taken",
    "include_for_metrics": "no further metrics are computed",
    "batch_eval_metrics": "no further metrics are computed",
    "optim_args": "optim has no further arguments here",
    "optim_target_modules": "it is for optimizers that this project has not",
    "disable_tqdm": "a bar on a terminal, plain lines elsewhere, is chosen by itself",
}

# Names that users know from elsewhere.
RENAMED = {
    "warmup_ratio": "warmup_steps=<ratio>: below 1 it is a share of all steps; RL's presets have "
    "lr_scheduler_type=constant, which takes none: there with lr_scheduler_type=constant_with_warmup",
    "max_seq_length": "max_length",
    "max_steps_per_generation": "generation_aggregation_steps",
    "unbias_student_log_probs_temp": "student_temperature, which is set beside it",
    "system_prompt": "teacher_system_prompt or student_system_prompt",
    "torch_dtype": "precision",
    "dtype": "precision",
    "load_in_4bit": "precision=bf16: the base is shared with vLLM, which has no bitsandbytes weights",
    "load_in_8bit": "precision=bf16: the base is shared with vLLM, which has no bitsandbytes weights",
    "lora_rank": "lora_r",
    "lora": "use_peft",
    "use_lora": "use_peft",
    "no_lora": "use_peft=false",
    "finetuning_type": "use_peft: true for LoRA, false for every weight",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "create_new_adapter": "adapter_start=merge, with use_peft=true",
    "adapter_name_or_path": "model_name_or_path: an adapter's folder is recognised there",
    "peft_model_id": "model_name_or_path: an adapter's folder is recognised there",
    "max_lora_rank": "lora_r",
    "weight_bridge_mode": "weight_bridge",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "max_model_len": "vllm_max_model_length",
}
