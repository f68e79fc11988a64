"""What activations take, as planned and as torch's allocator sees it. Run: ./run_tests.sh tests/test_activations.py"""

import io
from contextlib import nullcontext

import pytest
import torch
from conftest import REPO
from planned import planned as planned_run
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory import allocator_peak
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.memory import make_plan
from trainers.models import DTYPES
from trainers.plan import activations as layers
from trainers.plan.hardware import cpu_converts_bf16
from trainers.plan.model_shapes import FAMILY_DEFAULTS, model_shape
from trainers.plan.workload import GIB, MICRO_TOKENS, Workload
from trainers.scoring.frozen import ResidentBackbone
from trainers.scoring.streaming import StreamedBackbone
from trainers.weights.adapters import add_adapters, base_model
from trainers.weights.weight_files import WeightFiles

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TEXTS, TOKENS = 2, 384
WIDE = {"intermediate_size": 4096, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
SLIDING = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 128}


def config(model_type="qwen2", **sizes):
    return {"model_type": model_type} | SIZES | sizes


def make(given, precision, attention="eager"):
    torch.manual_seed(0)
    full = AutoConfig.for_model(**given, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(full, dtype=DTYPES[precision], attn_implementation=attention)


def work(given, precision, mode="resident", tokens=TOKENS, **overrides):
    """Prompts and completions of half the tokens each."""
    batch = {"per_device_train_batch_size": TEXTS, "train_batch_size": 8, "num_generations": 4}
    lengths = {"max_prompt_length": tokens // 2, "max_completion_length": tokens - tokens // 2}
    chosen = (
        {"attn_implementation": "eager", "gradient_checkpointing": True, "student_tokens_per_pass": 4 * tokens}
        | {"share_prompts": False}
        | {"optim": "adamw_torch", "student_mode": mode, "beta": 0}
        | batch
        | lengths
        | overrides
    )
    words = [f"{key}={str(value).lower()}" for key, value in chosen.items()]
    options = load_options(compose_run("teacher_rlt_tiny", words), repo=REPO)
    shape = model_shape(given)
    return Workload(options, shape, shape, "cpu", precision, 0)


def activations(planned):
    """Bytes in the course of the backward pass; the head, whose tiles are large beside these models, aside."""
    return layers.activations(planned)[1]["activations"]


def measured(step):
    """Bytes at the peak of a step, the second of two: gradients are there."""
    step()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return allocator_peak(profile)


def backward_peak(given, precision, use_peft=False, checkpointing=True, attention="eager", masked=True, dropout=0.0):
    model = make(given, precision, attention).train()
    if use_peft:
        model = add_adapters(model, work(given, precision, use_peft=True, lora_dropout=dropout).options)
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, mask = torch.randint(3, 512, (TEXTS, TOKENS)), torch.ones(TEXTS, TOKENS, dtype=torch.long)
    mask[0, :5] = 0  # as prompts are padded
    cast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()

    def step():
        with cast:  # as in training
            rows = {"input_ids": ids, "attention_mask": mask if masked else None}
            states = base_model(model).base_model(**rows, use_cache=False).last_hidden_state
        states.float().pow(2).mean().backward()

    return measured(step)


DEEP = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 4}
DEEP |= {"num_key_value_heads": 4, "head_dim": 64}


@pytest.mark.parametrize("use_peft", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILY_DEFAULTS)
def test_what_all_layers_keep_is_planned_for_each_family(family, precision, use_peft):
    given = config(family, **DEEP)
    chosen = {"attn_implementation": "sdpa", "gradient_checkpointing": False}
    planned = activations(work(given, precision, use_peft=use_peft, **chosen))
    taken = backward_peak(given, precision, use_peft, checkpointing=False, attention="sdpa", masked=False)
    assert planned == pytest.approx(taken, rel=0.05)


# Widths of models that are used, to scale: heads wider than the hidden states, few key heads, deep inner layers.
WIDTHS = {
    "Qwen3-0.6B": config("qwen3", hidden_size=256, intermediate_size=768, num_attention_heads=8, num_key_value_heads=4),
    "Qwen3-4B": config("qwen3", hidden_size=320, intermediate_size=1216, num_attention_heads=8),
    "Qwen2.5-7B": config(
        "qwen2", hidden_size=448, intermediate_size=2368, num_attention_heads=7, num_key_value_heads=1
    ),
}


def planned_and_taken(name, precision, checkpointing, use_peft, masked):
    given = WIDTHS[name] | {"head_dim": 64}
    chosen = {"attn_implementation": "sdpa", "gradient_checkpointing": checkpointing}
    chosen |= {"torch_compile": masked}  # which keeps the rows as TRL pads them
    planned = activations(work(given, precision, use_peft=use_peft, **chosen))
    return planned, backward_peak(given, precision, use_peft, checkpointing, "sdpa", masked)


@pytest.mark.parametrize("use_peft", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "without"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", WIDTHS)
def test_widths_of_real_models_are_planned(name, precision, checkpointing, use_peft):
    planned, taken = planned_and_taken(name, precision, checkpointing, use_peft, masked=False)
    assert planned == pytest.approx(taken, rel=0.06)


@pytest.mark.parametrize("use_peft", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "without"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_with_a_mask_are_planned(precision, checkpointing, use_peft):
    """As TRL pads them, in a warm-up and for a compiled model: keys and values are repeated for each head."""
    planned, taken = planned_and_taken("Qwen3-4B", precision, checkpointing, use_peft, masked=True)
    assert planned == pytest.approx(taken, rel=0.06)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "without"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_before_adapters_is_planned(precision, checkpointing):
    """On a CPU its masks are fp32, and it is up to half as much again."""
    given = WIDTHS["Qwen2.5-7B"] | {"head_dim": 64}
    chosen = {"attn_implementation": "sdpa", "gradient_checkpointing": checkpointing}
    planned = activations(work(given, precision, use_peft=True, lora_dropout=0.1, **chosen))
    taken = backward_peak(given, precision, True, checkpointing, "sdpa", masked=False, dropout=0.1)
    assert planned == pytest.approx(taken, rel=0.06)


def test_a_window_shorter_than_the_rows_is_planned_with_its_mask():
    def planned(window):
        given = config("mistral", sliding_window=window)
        return activations(work(given, "fp32", attn_implementation="sdpa"))

    assert planned(None) == planned(TOKENS + 1) < planned(TOKENS)
    assert model_shape(config("qwen2", sliding_window=8)).window is None
    assert model_shape(config("gemma3_text")).window == 4096


def test_what_the_processor_has_for_bf16_is_read(monkeypatch):
    def with_flags(flags, limit):
        monkeypatch.setattr("builtins.open", lambda *args, **kwargs: io.StringIO(f"model name : x\nflags : {flags}\n"))
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        cpu_converts_bf16.cache_clear()
        return cpu_converts_bf16()

    try:
        wide = "fpu avx512f avx512bw avx512vl avx512dq"
        assert with_flags(wide, "ALL") and with_flags(f"{wide} amx_bf16", "AVX512_CORE")
        assert not with_flags(f"{wide} amx_bf16", "ALL")
        assert not with_flags(f"{wide} avx512_bf16", "AVX512_CORE_BF16")
        assert not with_flags("fpu avx2", "ALL")
    finally:
        monkeypatch.undo()
        cpu_converts_bf16.cache_clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("given", "overrides"),
    [
        (config(), {}),
        (config(), {"gradient_checkpointing": False}),
        (config(), {"use_peft": True}),
        (config(**WIDE), {}),
        (config("qwen3"), {}),
        (config("gemma2", attn_logit_softcapping=50.0), {}),
        (config("gemma2", attn_logit_softcapping=50.0), {"gradient_checkpointing": False}),
    ],
    ids=["all weights", "without checkpointing", "adapters", "wide", "qwen3", "gemma2", "gemma2 without checkpointing"],
)
def test_backward_pass_takes_what_is_planned(given, overrides, precision):
    planned = activations(work(given, precision, **overrides))
    use_peft, checkpointing = "use_peft" in overrides, "gradient_checkpointing" not in overrides
    assert planned == pytest.approx(backward_peak(given, precision, use_peft, checkpointing), rel=0.05)


def test_scores_are_most_of_it_where_texts_are_long():
    """12 bytes of each of 2 x 8 x 384 x 384 scores, at the peak of the layer's backward pass."""
    eager, plain = (activations(work(config(), "fp32", attn_implementation=kind)) for kind in ("eager", "sdpa"))
    scores = 12 * TEXTS * 8 * TOKENS**2
    assert scores < eager < 1.3 * scores and plain < 0.5 * scores


@pytest.mark.parametrize(
    ("given", "precision", "attention"),
    [
        (config(), "fp32", "eager"),
        (config(), "bf16", "eager"),
        (config(**WIDE), "fp32", "eager"),
        (config("gemma2"), "bf16", "eager"),
        *(
            (config(family, **WIDE), precision, "sdpa")
            for family in ("qwen2", "gemma2", "phi3")
            for precision in ("fp32", "bf16")
        ),
        (config("mistral", **SLIDING), "fp32", "sdpa"),
        (config("gemma3_text", **SLIDING), "bf16", "sdpa"),
    ],
    ids=str,
)
def test_resident_student_takes_what_is_planned(given, precision, attention, monkeypatch):
    monkeypatch.setattr("trainers.memory.SCORE_TILE", {"cpu": (0, 0)})  # the head is another matter
    chosen = work(given, precision, attn_implementation=attention)
    planned = make_plan(chosen, GIB).phases["score"]["scoring buffers"]
    student = make(given, precision, attention).eval().requires_grad_(False)
    backbone = ResidentBackbone(student, torch.device("cpu"))
    ids = torch.randint(3, 512, (1, TOKENS))  # a micro-batch on a CPU: 512 // 384 texts

    @torch.no_grad()
    def step():
        for _ in backbone.run([ids]):
            pass

    assert planned == pytest.approx(measured(step), rel=0.04)


@pytest.mark.parametrize(
    ("given", "precision", "attention", "tokens"),
    [
        (config(), "fp32", "eager", TOKENS),
        (config("gemma2"), "fp32", "eager", TOKENS),
        (config("mistral", **SLIDING), "fp32", "sdpa", 1024),
        (config("gemma3_text", **SLIDING), "bf16", "sdpa", 1024),
        (config("mistral", **SLIDING), "fp32", "sdpa", 192),  # of which two share a mask
    ],
    ids=str,
)
def test_streamed_student_holds_the_masks_of_a_whole_pass(given, precision, attention, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.memory.SCORE_TILE", {"cpu": (0, 0)})  # the head is another matter
    make(given, precision).save_pretrained(tmp_path)
    items = make_plan(work(given, precision, "streamed", tokens, attn_implementation=attention), GIB).phases["score"]
    planned = sum(items[name] for name in ("scoring buffers", "streaming buffers", "hidden states"))
    full = AutoConfig.for_model(**given)
    source = WeightFiles(str(tmp_path), "student_model")
    device, dtype = torch.device("cpu"), DTYPES[precision]
    backbone = StreamedBackbone(source, full, device, dtype, attention, "student_model")
    texts = max(1, MICRO_TOKENS["cpu"] // tokens)
    batches = [torch.randint(3, 512, (texts, tokens)) for _ in range(4 // texts)]

    def step():
        with torch.no_grad():
            for _ in backbone.run(batches):
                pass

    assert planned == pytest.approx(measured(step), rel=0.05)


def test_a_window_is_read_with_masks_only_where_it_is_no_longer_than_the_texts():
    """Of Mistral's first 7B a byte for each of 8192 x 8192 pairs of tokens, held for each of 32 texts of a pass."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}

    def scoring(window, attention):
        given = config("mistral", **sizes, head_dim=128, sliding_window=window)
        overrides = {"attn_implementation": attention, "student_tokens_per_pass": 2**18, "train_batch_size": 64}
        chosen = work(given, "bf16", "streamed", 8192, **overrides)
        return make_plan(chosen, GIB).phases["score"]

    without = scoring(None, "sdpa")
    assert scoring(8193, "sdpa") == scoring(4096, "flash_attention_2") == without
    masked = scoring(8192, "sdpa")
    assert masked["hidden states"] - without["hidden states"] == 32 * 8192**2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("given", "completion"), [(config(**WIDE), 32), (config(**DEEP), 32), (config(**DEEP), 160)], ids=str
)
def test_what_transformers_generates_with_is_planned(given, completion, attention):
    """At the prompts of 192 tokens, or at the end of the completions."""
    chosen = {"max_prompt_length": TOKENS // 2, "max_completion_length": completion, "use_vllm": False}
    chosen |= {"attn_implementation": attention, "report_before_after": False}  # a rollout, and no evaluation's batch
    items = make_plan(work(given, "fp32", **chosen), GIB).phases["generate"]
    model = make(given, "fp32", attention).eval()
    ids = torch.randint(3, 512, (8, TOKENS // 2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    @torch.no_grad()
    def step():
        model.generate(ids, attention_mask=mask, max_new_tokens=completion, min_new_tokens=completion, do_sample=True)

    assert items["KV cache"] + items.get("prompts' activations", 0) == pytest.approx(measured(step), rel=0.05)


def test_a_tied_head_s_gradient_waits_for_the_embedding_s():
    """Beside what was accumulated before; of a model that is not tied it is added at once."""
    tied, untied = (
        planned_run("teacher_rlt_mono_80gb", f"model_name_or_path=Qwen/{name}", "per_device_train_batch_size=2")[0]
        for name in ("Qwen2.5-1.5B-Instruct", "Qwen2.5-7B-Instruct")
    )
    assert tied.work.teacher.ties_head and not untied.work.teacher.ties_head
    assert tied.phases["update"]["tied head's gradient"] == 2 * 151_936 * 1536
    assert not untied.phases["update"].get("tied head's gradient")
