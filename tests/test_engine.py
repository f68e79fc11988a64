"""The real vLLM engine on the trainer's weights. Run: ./run_tests.sh tests/test_engine.py

One engine serves all tests of this file: vLLM allows one in a process at a time.
"""

import pytest
import torch
from conftest import ROWS
from families import COMMON
from small_run import small_options
from transformers import AutoConfig, AutoModelForCausalLM

from trainers import rl
from trainers.engine import Engine, next_token_params
from trainers.engine_setup import check_architecture, engine_arguments, kept_process_state
from trainers.errors import ConfigError
from trainers.models import load_model
from trainers.options import options_class
from trainers.rollout.rollouts import request_seed

SAMPLING = {"temperature": 1.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def engine_and_model(model_dir, renderer):
    options = options_class("rl")(max_prompt_length=128, max_completion_length=32, seed=7, max_num_seqs=16)
    model = load_model(str(model_dir), torch.float32, None, "model_name_or_path", False)
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    end_ids = [renderer.tokenizer.eos_token_id, 300]
    engine = Engine(model, str(model_dir), options, torch.device("cpu"), torch.float32, end_ids)
    yield engine, model, original
    engine.close()


@pytest.fixture(scope="module")
def prompts(renderer):
    return [
        renderer.encode_prompt(renderer.teacher_prompt(r["question"], r["solution"])) for r in ROWS for _ in range(4)
    ]


def trainer_logprobs(model, prompt_ids, completion_ids, temperature=1.0):
    """Log-probability of each sampled token by a plain forward pass of the trainer's model."""
    result = []
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0] / temperature
        positions = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        result.append(logits.log_softmax(-1)[list(positions), completion].tolist())
    return result


def largest_difference(a, b):
    return max(abs(x - y) for row_a, row_b in zip(a, b, strict=True) for x, y in zip(row_a, row_b, strict=True))


def train_some(model, prompts, steps=5):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        loss = sum(model(torch.tensor([p]), labels=torch.tensor([p])).loss for p in prompts[::4])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_sharing_keeps_the_weights_and_holds_them_once(engine_and_model):
    engine, model, original = engine_and_model
    storages = {p.untyped_storage().data_ptr() for p in engine.engine_model.parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, original[name]), name
        assert parameter.untyped_storage().data_ptr() in storages, name
    q = dict(model.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    qkv = dict(engine.engine_model.named_parameters())["model.layers.0.self_attn.qkv_proj.weight"]
    assert q.data_ptr() == qkv.data_ptr()
    assert q.shape[0] < qkv.shape[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_and_trainer_agree_before_and_after_training(engine_and_model, prompts, temperature):
    engine, model, _ = engine_and_model
    sampling = {**SAMPLING, "temperature": temperature}
    before = engine.generate(prompts, sampling, number=0)
    expected = trainer_logprobs(model, prompts, before.completion_ids, temperature)
    assert largest_difference(before.logprobs, expected) < 1e-5
    train_some(model, prompts)
    stale = largest_difference(before.logprobs, trainer_logprobs(model, prompts, before.completion_ids, temperature))
    assert stale > 0.01  # the training did change the model
    engine.sync_weights()
    after = engine.generate(prompts, sampling, number=1)
    expected = trainer_logprobs(model, prompts, after.completion_ids, temperature)
    assert largest_difference(after.logprobs, expected) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_padding_is_as_likely_as_the_trainer_says(engine_and_model, prompts, renderer, temperature):
    engine, model, _ = engine_and_model
    padding = renderer.padding_ids
    assert len(padding) == 2
    assert all(prompt[-2:] == padding for prompt in prompts)
    given = engine.given_logprobs(prompts, 2, temperature)
    heads = [prompt[:-2] for prompt in prompts]
    expected = trainer_logprobs(model, heads, [padding] * len(heads), temperature)
    assert largest_difference(given, expected) < 1e-5
    assert engine.given_logprobs(prompts[:2], 0, temperature) == [[], []]


def test_same_seed_samples_the_same_tokens_and_another_seed_does_not(engine_and_model, prompts):
    engine, _, _ = engine_and_model
    first = engine.generate(prompts, SAMPLING, number=3)
    engine.llm.reset_prefix_cache()
    again = engine.generate(prompts, SAMPLING, number=3)
    assert first.completion_ids == again.completion_ids
    # alone in its batch, a completion is the same: its seed depends on nothing else
    assert engine.generate(prompts[:1], SAMPLING, number=3).completion_ids == first.completion_ids[:1]
    assert engine.generate(prompts, SAMPLING, number=4).completion_ids != first.completion_ids
    engine.seed += 1
    other = engine.generate(prompts, SAMPLING, number=3)
    engine.seed -= 1
    assert other.completion_ids != first.completion_ids


def test_cached_blocks_are_those_that_vllm_uses_again(engine_and_model):
    engine, _, _ = engine_and_model
    prompt = tuple(range(5, 5 + 70))  # two blocks of 32 and a rest
    engine.sync_weights()
    assert engine.cached_blocks() == 0
    used_again = []
    step = engine.llm.llm_engine.step

    def watch():
        outputs = step()
        used_again.extend(output.num_cached_tokens for output in outputs if output.finished)
        return outputs

    engine.llm.llm_engine.step = watch
    for _ in range(2):
        engine.next_logprobs([prompt], [[1]], 1.0)
        assert engine.cached_blocks() == 2
    engine.sync_weights()
    assert engine.cached_blocks() == 0
    engine.next_logprobs([prompt], [[1]], 1.0)
    engine.llm.llm_engine.step = step
    assert used_again == [0, 64, 0]


def test_a_sync_walks_through_the_pool_only_where_something_is_cached(engine_and_model, monkeypatch):
    engine, _, _ = engine_and_model
    engine.sync_weights()
    (pool,) = engine._pools()
    walks = []

    class Blocks(list):
        def __iter__(self):
            walks.append(len(self))
            return super().__iter__()

    monkeypatch.setattr(pool, "blocks", Blocks(pool.blocks))
    engine.next_logprobs([(5, 6, 7)], [[1]], 1.0)  # not a whole block
    engine.sync_weights()
    assert walks == []
    engine.next_logprobs([tuple(range(5, 75))], [[1]], 1.0)
    assert engine.cached_blocks() == 2
    engine.sync_weights()
    assert walks == [pool.num_gpu_blocks] and engine.cached_blocks() == 0


def test_a_sync_amid_running_requests_is_refused_though_nothing_is_cached(engine_and_model):
    from vllm import SamplingParams

    engine, _, _ = engine_and_model
    engine.sync_weights()
    running = engine._run([((5, 6, 7), next_token_params([1], 1.0)), ((8, 9), SamplingParams(max_tokens=5))])
    next(running)
    assert engine.cached_blocks() == 0
    with pytest.raises(RuntimeError, match="requests are still running"):
        engine.sync_weights()
    running.close()
    engine.release_cache()  # what is left of them is forgotten by a further step
    engine.sync_weights()


def test_completions_of_one_prompt_differ(engine_and_model, prompts):
    engine, _, _ = engine_and_model
    completions = engine.generate(prompts[:4], SAMPLING, number=0).completion_ids
    assert len({tuple(c) for c in completions}) > 1


def test_how_far_it_is_can_be_read_while_it_writes(engine_and_model, prompts):
    engine, _, _ = engine_and_model
    seen = []
    rollout = engine.generate(prompts, SAMPLING, 0, lambda *_: seen.append(engine.written))
    assert seen[-1][:2] == (len(prompts), len(prompts)) and engine.written is None
    assert seen[-1].tokens == pytest.approx(sum(map(len, rollout.completion_ids)), rel=0.15)


def test_limits_are_kept(engine_and_model, prompts):
    engine, _, _ = engine_and_model
    rollout = engine.generate(prompts, {**SAMPLING, "max_tokens": 5}, number=0)
    assert max(map(len, rollout.completion_ids)) <= 5


@pytest.mark.parametrize("which", [0, 1])
def test_a_completion_ends_right_at_the_first_token_that_ends_one(engine_and_model, prompts, which):
    """The tokenizer's EOS, and one that ends a turn beside it: some one in ten tokens here, which of its own accord the
    model hardly ever writes."""
    engine, _, _ = engine_and_model
    end = engine.end_ids[which]
    sampling = {**SAMPLING, "temperature": 2.0, "logit_bias": {end: 8.0, engine.end_ids[1 - which]: -100.0}}
    endless = engine.generate(prompts, sampling | {"ignore_eos": True, "stop_token_ids": []}, number=0)
    rollout = engine.generate(prompts, sampling, number=0)
    assert set(endless.ended) == {"length"}
    lengths = [ids.index(end) + 1 if end in ids else len(ids) for ids in endless.completion_ids]
    assert rollout.completion_ids == [ids[:n] for ids, n in zip(endless.completion_ids, lengths, strict=True)]
    assert rollout.ended == ["eos" if end in ids else "length" for ids in endless.completion_ids]
    assert any(1 < n < 24 for n in lengths)


def test_options_reach_the_engine(engine_and_model):
    engine, _, _ = engine_and_model
    config = engine.llm.llm_engine.vllm_config
    assert config.model_config.max_model_len == 160
    assert config.model_config.seed == 7
    assert config.model_config.dtype == torch.float32
    assert config.model_config.enforce_eager  # not asked for: on a CPU it saves a compiler's run
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.max_num_seqs == 16


@pytest.mark.parametrize("eager", [True, False])
def test_cuda_graphs_are_an_option_on_a_gpu(eager):
    options = options_class("rl")(max_prompt_length=8, max_completion_length=8, enforce_eager=eager)
    arguments = engine_arguments(options, "model", torch.device("cuda"), torch.bfloat16)
    assert arguments["enforce_eager"] is eager
    assert arguments["dtype"] == "bfloat16"
    assert arguments["max_model_len"] == 16


@pytest.mark.parametrize("half", [{"closing_tag": "</think>"}, {"closing_tag_ids": [5]}])
def test_half_of_a_closing_tag_is_refused_before_anything_starts(model_dir, half):
    options = options_class("rl")(max_prompt_length=8, max_completion_length=8)
    with pytest.raises(ValueError, match="closing_tag and closing_tag_ids go together"):
        Engine(torch.nn.Module(), str(model_dir), options, torch.device("cpu"), torch.float32, [2], **half)


@pytest.mark.parametrize("family", ["smollm3", "helium"])  # vLLM lists the first as its own, and has no class for it
def test_model_without_a_class_of_vllm_s_own_is_refused_before_it_is_loaded(
    tokenizer, rows_file, tmp_path, monkeypatch, family
):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON))
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path)
    chosen = {"model_name_or_path": str(tmp_path), "dataset_id_or_path": str(rows_file), "reward_funcs": ["format"]}
    options = small_options(**chosen, device="cpu", reference_mode="cpu")
    monkeypatch.setattr(rl, "load_teacher", lambda *_: pytest.fail("the weights are loaded"))
    with pytest.raises(ConfigError, match=f"(?i)no class of its own for {family}ForCausalLM.*\n.*use_vllm=false"):
        rl.run_rl(options, tmp_path / "out")


def test_model_that_vllm_refuses_in_fp16_is_told_before_it_is_loaded(tokenizer, tmp_path):
    AutoConfig.for_model("gemma2", **COMMON).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = small_options(model_name_or_path=str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"1\. model_name.*refuses it: The model type 'gemma2'.* instead\.\n.*correct"
    ):
        check_architecture(options, str(tmp_path), torch.device("cpu"), torch.float16)


def test_adapters_that_vllm_does_not_take_are_told_before_the_weights_are_loaded(model_dir, tokenizer, tmp_path):
    AutoConfig.for_model("gpt2", **COMMON).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    here = (torch.device("cpu"), torch.float32)
    asked = {"model_name_or_path": str(tmp_path), "use_peft": True}
    with pytest.raises(ConfigError, match=r"1\. use_peft=True: .*GPT2LMHeadModel.*\n.*weight_bridge=copy or restart"):
        check_architecture(small_options(**asked), str(tmp_path), *here)
    for bridge in ("copy", "restart"):
        check_architecture(small_options(**asked, weight_bridge=bridge), str(tmp_path), *here)
    check_architecture(small_options(use_peft=True), str(model_dir), *here)


@pytest.mark.parametrize(
    ("asked", "told"),
    [({"max_logprobs": "x"}, "max_logprobs: Input should be"), ({"runner": "foo"}, "runner: Input should be")],
)
def test_arguments_of_vllm_that_the_model_cannot_help_are_told_as_such(model_dir, asked, told):
    options = small_options(model_name_or_path=str(model_dir), vllm_kwargs=asked)
    with pytest.raises(ConfigError, match=rf"1\. vllm_kwargs=.*{told}.*\n.*leave it out"):
        check_architecture(options, str(model_dir), torch.device("cpu"), torch.float32)


def test_what_vllm_sets_for_the_whole_process_is_put_back():
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        for asked, left in (("tf32", "tf32"), (before, "ieee")):
            matmul.fp32_precision = asked
            state = torch.random.get_rng_state()
            with kept_process_state():
                torch.set_float32_matmul_precision("highest")  # as vLLM's worker does
                torch.manual_seed(1)
            assert matmul.fp32_precision == left and torch.equal(torch.random.get_rng_state(), state)
    finally:
        matmul.fp32_precision = before


def test_a_cache_that_finds_no_room_again_is_told_with_what_to_do(engine_and_model, prompts, monkeypatch):
    engine, _, _ = engine_and_model
    engine.release_cache()

    def no_room(tags):
        raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp")

    with monkeypatch.context() as patched:
        patched.setattr(engine.llm, "wake_up", no_room)
        patched.setattr(engine, "kv_cache_bytes", lambda: 5 * 2**30)
        with pytest.raises(RuntimeError, match=r"5.0 GiB, given back .* kv_cache_gib=4.0"):
            engine.generate(prompts, SAMPLING, number=0)
    engine.restore_cache()
    assert engine.generate(prompts, SAMPLING, number=0).completion_ids


def test_request_seed_depends_on_every_part():
    base = request_seed(0, 1, (5, 6))
    assert base not in [request_seed(1, 1, (5, 6)), request_seed(0, 2, (5, 6)), request_seed(0, 1, (5, 7))]
    assert 0 <= base < 2**62
