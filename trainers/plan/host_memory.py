"""Host memory and disk of a run, as the plan of memory counts them."""

from trainers.plan.activations import offloaded_bytes
from trainers.plan.workload import GIB, Workload, resting_bytes

# The interpreter with torch and vLLM: measured on a CPU, where vLLM's engine is in it; with CUDA an estimate.
PROCESS = {"cuda": 4 * GIB, "cpu": int(0.75 * GIB)}
# Of what is free when it is loaded: a streamed model that takes more is read from disk at every pass.
STREAMED_SHARE = 0.8
# Of each of the two blocks through which it then goes to a GPU (weight_files.py).
STAGED = 64 * 2**20
# Of a file that a trained model is written to: safetensors holds a copy of each on the host (saving.py).
SHARD = 2 * 10**9


def host_memory(work: Workload, free: int | None = None) -> dict[str, int]:
    """Bytes in host memory by item; on a CPU beside what the phases hold.

    Args:
        free: Bytes that are free before the run; None where that is not known.
    """
    size = work.itemsize
    host = {"process": PROCESS[work.device]}
    host["optimizer on the host"] = work.optimizer_bytes.host
    on_gpu = work.device == "cuda"
    left = None if free is None else free - host["process"]  # the optimizer comes after them
    written = work.reference_mode == "streamed" and getattr(work.options, "sync_ref_model", False)
    frozen = (
        ("student", work.student, work.student_mode, False),
        ("reference" if work.trains else "teacher", work.teacher, work.reference_mode, written),
    )
    for name, shape, mode, is_written in frozen:
        if is_written or (on_gpu and mode in ("cpu", "streamed")):  # on a CPU what is streamed stays on disk
            quantization = work.options.student_quantization if name == "student" else None
            held = resting_bytes(shape, size, quantization) - (shape.beside_text * size if mode == "streamed" else 0)
            if mode == "cpu" or is_written or left is None or held < STREAMED_SHARE * left:
                host[name] = held
                left = None if left is None else left - held
            else:
                host["reading from disk"] = host.get("reading from disk", 0) + 2 * STAGED
    if on_gpu and work.trains:
        if getattr(work.options, "activation_offloading", False):
            host["activations"] = offloaded_bytes(work)
        reading = work.teacher.num_parameters * size
        # An engine that shares it takes the teacher before these come; else the trainer does, and only the optimizer
        # comes after that, and what is there in the update.
        is_taken = work.has_engine and work.bridge in ("shared", "lora")
        coming = ("student", "reference", "optimizer on the host", "activations")[0 if is_taken else 2 :]
        host["reading the teacher"] = max(0, reading - sum(host.get(name, 0) for name in coming))
    elif work.bridge in ("shared", "lora"):
        host["reading the teacher"] = work.teacher.num_parameters * size  # beside the engine's, until it is shared
    host = {name: bytes_ * work.devices for name, bytes_ in host.items()}
    if on_gpu and work.trains:  # the first process, in the room where the teacher was read
        host["saving"] = max(0, _saved_at_once(work) - host["reading the teacher"])
    # In fp32, one after the other, and before anything else is loaded (merge.py).
    merging = 4 * max(work.merged.values(), default=0) * work.devices
    host["merging an adapter"] = max(0, merging - sum(host.values())) if on_gpu else merging
    return {name: bytes_ for name, bytes_ in host.items() if bytes_ >= 2**20}


def _saved_at_once(work: Workload) -> int:
    """Bytes of the largest file that a trained model is written to; optimizer states follow one by one, and none is
    larger than what it belongs to."""
    if work.use_peft and work.bridge != "restart":  # which writes the merged model
        return work.trained_bytes
    teacher, size = work.teacher, work.itemsize
    return min(teacher.num_parameters * size, max(SHARD, teacher.largest_parameter * size))


def disk_space(work: Workload) -> dict[str, int]:
    """Checkpoints that are kept, one more while it is written, the result, and what an engine is started from."""
    o = work.options
    merged = {"merged models": sum(work.merged.values()) * work.itemsize}
    if not work.trains:
        return merged
    if work.bridge == "restart":  # at every update, in output_dir (engine.py)
        merged["engine's weights"] = work.teacher.num_parameters * work.itemsize
    weights, optimizer = work.trained_bytes + work.reference_adapter_bytes, work.optimizer_bytes  # peft saves both
    states = 0 if o.save_only_model else optimizer.device + optimizer.host
    # Without a limit all stay; how many there will be is known only where steps are counted.
    saved = o.max_steps // o.save_steps if o.save_strategy == "steps" and o.max_steps > 0 and o.save_steps >= 1 else 1
    saved = -(-o.num_train_epochs // 1) if o.save_strategy == "epoch" else saved
    best = 2 if getattr(o, "load_best_model_at_end", False) else 0  # transformers keeps it and the last one
    kept = max(o.save_total_limit, best) if o.save_total_limit else int(saved)
    number = 0 if o.save_strategy == "no" else kept + 1
    return {"checkpoints": number * (weights + states), "result": weights} | merged
