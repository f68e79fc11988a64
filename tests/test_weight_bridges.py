"""Every weight bridge on the real engine. Run: ./run_tests.sh tests/test_weight_bridges.py

vLLM allows one engine in a process at a time: each test closes its own.
"""

import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROWS
from safetensors.torch import load_file, save_file
from small_run import CPU, make_engine, make_trainer, small_options
from test_engine import largest_difference, train_some, trainer_logprobs
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, TrainerCallback

from trainers import teacher_grpo
from trainers.bridges import LOAD_FORMAT, CopyBridge, SharedBridge
from trainers.errors import ConfigError
from trainers.models import make_model, make_tokenizer
from trainers.rollout.sampler import RolloutSampler
from trainers.watch.memory_watch import MemoryWatch
from trainers.watch.phases import PhaseTimer
from trainers.weights.adapter_files import open_adapter
from trainers.weights.adapters import ADAPTER, REFERENCE

SAMPLING = {"temperature": 1.0, "max_tokens": 16}
WAYS = {
    "shared": {},
    "copy": {"weight_bridge": "copy"},
    "lora": {"use_peft": True},
    "lora on some layers": {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj", "up_proj"], "lora_r": 5},
    "restart": {"weight_bridge": "restart"},
    "restart with adapters": {"weight_bridge": "restart", "use_peft": True},
    "copy with adapters": {"weight_bridge": "copy", "use_peft": True},
}


@contextmanager
def running(renderer, model_dir, tmp_path, dtype=torch.float32, adapter=None, **chosen):
    engine, model = make_engine(small_options(**chosen), renderer, model_dir, tmp_path, dtype, adapter)
    try:
        yield engine, model
    finally:
        engine.close()


@pytest.fixture(scope="module")
def prompts(renderer):
    return [
        renderer.encode_prompt(renderer.teacher_prompt(r["question"], r["solution"])) for r in ROWS for _ in range(4)
    ]


@pytest.mark.parametrize("way", WAYS)
def test_engine_and_trainer_agree_before_and_after_updates(renderer, model_dir, tmp_path, prompts, way):
    with running(renderer, model_dir, tmp_path, **WAYS[way]) as (engine, model):
        before = engine.generate(prompts, SAMPLING, number=0)
        expected = trainer_logprobs(model, prompts, before.completion_ids)
        assert largest_difference(before.logprobs, expected) < 1e-5
        for round in range(2):  # a second update finds what the first left behind
            train_some(model, prompts)
            engine.sync_weights()
            after = engine.generate(prompts, SAMPLING, number=1 + round)
            expected = trainer_logprobs(model, prompts, after.completion_ids)
            assert largest_difference(after.logprobs, expected) < 1e-5
        assert largest_difference(trainer_logprobs(model, prompts, before.completion_ids), before.logprobs) > 0.01
        assert not list(tmp_path.iterdir())  # the checkpoints of a restart are gone


def test_an_engine_that_is_rebuilt_leaves_no_compiled_model_behind(renderer, model_dir, tmp_path, prompts):
    """Compiled as on a GPU, but for the compiler itself: a hook of torch's keeps each model that is not unhooked."""
    hooks = torch._dynamo.convert_frame._bytecode_hooks
    compiled = {"compilation_config": {"mode": 2, "backend": "eager"}}
    there = len(hooks)
    with running(renderer, model_dir, tmp_path, weight_bridge="restart", vllm_kwargs=compiled) as (engine, _):
        before = len(hooks)
        engine.sync_weights()
        assert len(hooks) == before > there
    assert len(hooks) == there


@pytest.mark.parametrize("bridge", ["lora", "copy", "restart"])
def test_adapter_of_an_earlier_run_is_the_engine_s_too(renderer, model_dir, adapter_dir, tmp_path, prompts, bridge):
    """With a frozen copy of it beside it (beta), which neither engine nor optimizer may take for the adapter."""
    chosen = {"adapter": open_adapter("k", str(adapter_dir)), "use_peft": True, "weight_bridge": bridge, "beta": 0.1}
    with running(renderer, model_dir, tmp_path, **chosen) as (engine, model):
        assert set(model.peft_config) == {ADAPTER, REFERENCE}
        before = engine.generate(prompts, SAMPLING, number=0)
        assert largest_difference(before.logprobs, trainer_logprobs(model, prompts, before.completion_ids)) < 1e-5
        with model.disable_adapter():
            base = trainer_logprobs(model, prompts, before.completion_ids)
        assert largest_difference(before.logprobs, base) > 0.1
        train_some(model, prompts)
        engine.sync_weights()
        after = engine.generate(prompts, SAMPLING, number=1)
        assert largest_difference(after.logprobs, trainer_logprobs(model, prompts, after.completion_ids)) < 1e-5
        assert largest_difference(trainer_logprobs(model, prompts, before.completion_ids), before.logprobs) > 0.01


class Offloading(saved_tensors_hooks):
    """Stands for TRL's, which cannot be made without a GPU: counts training steps and the tensors they save."""

    def __init__(self):
        self.steps = self.saved = 0
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        self.saved += 1
        return tensor

    def __enter__(self):
        self.steps += 1
        return super().__enter__()


def test_kl_of_a_continued_adapter_is_to_what_it_was_at_the_start(
    renderer, model_dir, adapter_dir, tmp_path, monkeypatch
):
    """With gradient checkpointing, through which the gradients must reach the adapter, and activation offloading."""
    gradients, offloading = [], Offloading()
    monkeypatch.setattr(teacher_grpo, "get_act_offloading_ctx_manager", lambda model: offloading)

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            gradients.append({n: p.grad.abs().max().item() for n, p in model.named_parameters() if p.grad is not None})

    chosen = {"use_peft": True, "beta": 0.1, "gradient_checkpointing": True, "learning_rate": 3e-3, "max_steps": 3}
    chosen["activation_offloading"] = True
    adapter = open_adapter("k", str(adapter_dir))
    trainer = make_trainer(renderer, model_dir, tmp_path / "out", [Watch()], adapter=adapter, **chosen)
    try:
        layer = trainer.model.get_base_model().model.layers[0]
        assert trainer.ref_model is None
        trainer.train()
        assert layer.gradient_checkpointing
        assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}
        trainer.save_model(str(tmp_path / "saved"))
    finally:
        trainer.sampler.engine.close()
    kl = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert abs(kl[0]) < 1e-6
    assert kl[1] > 1e-6 and kl[2] > 1e-6
    assert offloading.steps == 3 and offloading.saved > 0
    assert len(gradients) == 3 and all(len(step) == 28 and min(step.values()) > 0 for step in gradients)
    assert all(f".{ADAPTER}." in name for step in gradients for name in step)
    start, end = (load_file(f / "adapter_model.safetensors") for f in (adapter_dir, tmp_path / "saved"))
    assert set(start) == set(end) and all(not torch.equal(start[name], end[name]) for name in start)
    kept = load_file(tmp_path / "saved" / REFERENCE / "adapter_model.safetensors")
    assert all(torch.equal(start[name], kept[name]) for name in start)
    assert open_adapter("k", str(tmp_path / "saved")).base == str(model_dir)


@pytest.mark.parametrize("way", ["lora", "copy", "copy with adapters"])
def test_each_weight_is_looked_at_in_turn_and_asking_moves_on_to_no_other(renderer, model_dir, tmp_path, prompts, way):
    with running(renderer, model_dir, tmp_path, **WAYS[way]) as (engine, model):
        bridge, named = engine.bridge, []
        layers, written = bridge._layers if way == "lora" else bridge._same, list(engine.engine_model.parameters())
        written += [layer.lora_b_stacked[0] for layer, _ in layers] if way == "lora" else []
        train_some(model, prompts)
        for _ in layers:
            bridge.sync()
            assert bridge.stale() is None
            for tensor in written:
                tensor.data.add_(1)
            named.append(bridge.stale())
            assert bridge.stale() == named[-1]
    assert None not in named and len(set(named)) == len(layers)
    if way != "lora":  # norms and biases of a fresh model are constants
        fresh = AutoModelForCausalLM.from_pretrained(model_dir).named_parameters()
        assert set(named) == {name for name, p in fresh if p.dim() > 1}


@pytest.mark.parametrize("side", ["lora_a_stacked", "lora_b_stacked"])
def test_both_matrices_of_every_adapter_in_a_layer_are_compared(renderer, model_dir, tmp_path, prompts, side):
    with running(renderer, model_dir, tmp_path, **WAYS["lora"]) as (engine, model):
        bridge, looked_at = engine.bridge, 0
        train_some(model, prompts)
        for _ in bridge._layers:
            bridge.sync()
            layer, _ = bridge._layers[bridge._syncs % len(bridge._layers)]
            for buffer in getattr(layer, side):
                kept = buffer.clone()
                buffer[0, 0, -1 if side == "lora_b_stacked" else 0, 0] += 1
                assert bridge.stale() == layer.base_layer.prefix
                buffer.copy_(kept)
                assert bridge.stale() is None
                looked_at += 1
    assert looked_at == 7 * model.config.num_hidden_layers


def test_weights_are_held_once_where_they_are_shared(renderer, model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    once = sum(p.nbytes for p in model.parameters())
    with running(renderer, model_dir, tmp_path) as (engine, _):
        from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

        assert LOAD_FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER  # it would hold the trainer's model for good
        # vLLM rounds 512 rows of the vocabulary up to none more
        assert engine.bridge.weight_bytes() == once
    with running(renderer, model_dir, tmp_path, weight_bridge="copy") as (engine, _):
        assert engine.bridge.weight_bytes() == 2 * once
    with running(renderer, model_dir, tmp_path, use_peft=True) as (engine, model):
        adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
        assert 0 < adapters < once
        # q, k, v, o, gate, up and down, each with an adapter in the trainer and one in the engine
        assert engine.bridge.weight_bytes() == once + 2 * adapters
        assert all(not p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("released", [False, True])
def test_cache_is_released_and_taken_again_by_itself(renderer, model_dir, tmp_path, prompts, released):
    with running(renderer, model_dir, tmp_path) as (engine, model):
        first = engine.generate(prompts, SAMPLING, number=0)
        for _ in range(3):
            if released:
                engine.release_cache()
                engine.release_cache()  # twice is once
            assert engine.generate(prompts, SAMPLING, number=0) == first
        if released:
            engine.release_cache()
        train_some(model, prompts)
        engine.sync_weights()
        after = engine.generate(prompts, SAMPLING, number=0)
        assert largest_difference(after.logprobs, trainer_logprobs(model, prompts, after.completion_ids)) < 1e-5
        assert 0.9 * 2**30 < engine.kv_cache_bytes() <= 2**30  # what prepare_environment asks for


def test_release_as_on_a_gpu_follows_vllm_s_rules(renderer, model_dir, tmp_path, prompts, monkeypatch, caplog):
    """vLLM's CPU worker cannot discard memory: that call alone is left out, all else is vLLM's own."""
    with running(renderer, model_dir, tmp_path) as (engine, model):
        executor = engine.llm.llm_engine.model_executor
        monkeypatch.setattr(executor, "discard", lambda tags: executor.sleeping_tags.update(tags))
        engine.can_release = True
        first = engine.generate(prompts, SAMPLING, number=0)
        for _ in range(5):
            engine.release_cache()
            assert executor.sleeping_tags == {"kv_cache"}
            engine.sync_weights()
            assert not executor.sleeping_tags
            assert engine.generate(prompts, SAMPLING, number=0) == first
        sampler = RolloutSampler(small_options(), renderer, PhaseTimer(MemoryWatch(CPU)), engine)
        monkeypatch.setattr(sampler, "sample", lambda prompt_ids: first)
        sampler(["What is 2+3?"] * len(prompts), SimpleNamespace(model=model))
        assert executor.sleeping_tags == {"kv_cache"}
        assert "the KV cache freed" in caplog.text  # nothing is: see above


def test_groups_are_handed_on_while_others_are_still_written(renderer, model_dir, tmp_path, prompts):
    seen = []
    with running(renderer, model_dir, tmp_path, max_num_seqs=4) as (engine, _):

        def on_group(places, completions, logprobs):
            seen.append((places, completions, logprobs, engine.llm.llm_engine.has_unfinished_requests()))

        sampled = engine.generate(prompts, SAMPLING, 0, on_group)
    assert sorted(place for places, *_ in seen for place in places) == list(range(16))
    assert [unfinished for *_, unfinished in seen] == [True, True, True, False]
    for places, completions, logprobs, _ in seen:
        assert completions == [sampled.completion_ids[i] for i in places]
        assert logprobs == [sampled.logprobs[i] for i in places]


@pytest.mark.parametrize(("eager", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_options_reach_the_engine(renderer, model_dir, tmp_path, eager, dtype):
    chosen = {
        "vllm_gpu_memory_utilization": 0.23,
        "vllm_max_model_length": 200,
        "enable_prefix_caching": False,
        "enforce_eager": eager,
        "max_num_seqs": 5,
        "seed": 11,
        # Whether there are graphs is read on a CPU too where it is said how to compile, here not at all.
        "vllm_kwargs": {"max_num_batched_tokens": 8321, "max_logprobs": 17, "compilation_config": {"mode": 0}},
    }
    with running(renderer, model_dir, tmp_path, dtype=dtype, **chosen) as (engine, _):
        config = engine.llm.llm_engine.vllm_config
        assert config.cache_config.gpu_memory_utilization == 0.23
        assert config.model_config.enforce_eager is eager
        assert config.model_config.dtype == dtype
        assert {parameter.dtype for parameter in engine.engine_model.parameters()} == {dtype}
        assert config.model_config.max_model_len == 200
        assert config.cache_config.enable_prefix_caching is False
        assert config.scheduler_config.max_num_seqs == 5
        assert config.model_config.seed == 11
        assert config.scheduler_config.max_num_batched_tokens == 8321
        assert config.model_config.max_logprobs == 17


def test_the_cache_is_cut_from_the_share_of_memory(renderer, model_dir, tmp_path):
    """On a GPU the share decides where the plan has set no size. On a CPU a size goes before it, taken away here."""
    import vllm  # noqa: F401 - what its import takes is no part of what is measured
    from vllm.utils.cpu_resource_utils import get_memory_node_info

    total, held = get_memory_node_info().total_memory, psutil.Process().memory_info().rss
    chosen = {"vllm_gpu_memory_utilization": (held + 2**30) / total, "vllm_kwargs": {"kv_cache_memory_bytes": None}}
    with running(renderer, model_dir, tmp_path, **chosen) as (engine, _):
        assert 0.5 * 2**30 < engine.kv_cache_bytes() <= 2**30  # what starting the engine has taken is less


def test_closing_tag_ends_a_completion(renderer, model_dir, tmp_path, prompts):
    """The random model writes any token now and then: one stands for the tag."""
    engine, _ = make_engine(small_options(), renderer, model_dir, tmp_path)
    try:
        plain = engine.generate(prompts, SAMPLING, number=0)
        tag = plain.completion_ids[0][5]
        engine._stop, engine.closing_tag = engine._stop | {"stop_token_ids": [*engine.end_ids, tag]}, tag
        cut = engine.generate(prompts, SAMPLING, number=0)
    finally:
        engine.close()
    stopped = 0
    for before, after, ended in zip(plain.completion_ids, cut.completion_ids, cut.ended, strict=True):
        if tag in before:
            assert after == before[: before.index(tag) + 1]
            assert ended == "closing_tag"
            stopped += 1
        else:
            assert after == before
            assert ended == ("eos" if after[-1] in engine.end_ids else "length")
            assert ended == "eos" or len(after) == 16
    assert stopped


@pytest.mark.parametrize("special", [True, False])
def test_closing_tag_of_several_tokens_ends_a_completion(tags, tmp_path, special):
    """A tokenizer that knows no tags writes them in many tokens; the engine then looks for the text."""
    from data.render import Renderer

    closing = tags.explanation[1]
    tokenizer = make_tokenizer([f"a{closing}b c d {closing}"] * 8, [], 400)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": [closing]})
    renderer = Renderer(tokenizer, tags, None, "model_name_or_path")
    shape = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 512}
    model = make_model(shape, tokenizer, 0, torch.float32, None)
    tag_ids = renderer.encode_text(closing)
    text = renderer.encode_text("b c d ")
    sequence = renderer.encode_text("a") + tag_ids + text
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):  # it learns to go on after the tag
        ids = torch.tensor([sequence])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    engine, _ = make_engine(small_options(max_completion_length=64), renderer, folder, tmp_path)
    try:
        greedy = {"temperature": 0.0, "max_tokens": len(sequence) - 1}
        sampled = engine.generate([renderer.encode_text("a")], greedy, number=0)
    finally:
        engine.close()
    assert sampled.completion_ids[0] == tag_ids
    assert sampled.ended == ["closing_tag"]
    assert (len(tag_ids) == 1) == special


def test_layers_that_no_model_has_are_refused(renderer, model_dir, tmp_path):
    with pytest.raises(ConfigError, match="lora_target_modules=all-linear"):
        make_engine(small_options(use_peft=True, lora_target_modules=["nope"]), renderer, model_dir, tmp_path)


@pytest.mark.parametrize("bridge", ["shared", "copy"])
def test_a_tied_head_that_the_checkpoint_holds_too(renderer, model_dir, tmp_path, prompts, bridge):
    """vLLM unties the head of such a checkpoint until it has read both, and ties them where they are equal."""
    folder = tmp_path / "both"
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | head, folder / "model.safetensors", {"format": "pt"})
    with running(renderer, folder, tmp_path, weight_bridge=bridge) as (engine, model):
        for round in range(2):
            sampled = engine.generate(prompts, SAMPLING, number=round)
            expected = trainer_logprobs(model, prompts, sampled.completion_ids)
            assert largest_difference(sampled.logprobs, expected) < 1e-5
            train_some(model, prompts)
            engine.sync_weights()


@pytest.mark.parametrize("has_head", [True, False])
def test_a_tied_head_goes_by_its_own_name_only_to_an_engine_that_has_one(model_dir, has_head):
    """Gemma 2's class in vLLM has none, and refuses a name that it does not know; that of Bloom is tied, too."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    engine_model = torch.nn.Module()
    engine_model.model = model.model
    if has_head:
        engine_model.lm_head = torch.nn.Linear(4, 4, bias=False)
    for bridge in (CopyBridge(model), SharedBridge(model)):
        names = [name for name, _ in bridge.weights(engine_model)]
        assert "model.embed_tokens.weight" in names and ("lm_head.weight" in names) is has_head
