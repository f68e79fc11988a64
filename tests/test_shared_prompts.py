"""Prompts that are read once for all their completions: the same numbers and gradients as when they are not."""

import pytest
import torch
from conftest import REPO
from families import COMMON, FAMILIES
from peft import LoraConfig, get_peft_model
from small_run import make_trainer
from test_activations import measured
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head, split_tensor_dict

from trainers.attention import attention_of
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.plan.activations import activations, kept_bytes
from trainers.plan.model_shapes import model_shape
from trainers.plan.workload import Workload
from trainers.rollout.shared_prompts import (
    can_share,
    lay_out,
    let_share,
    prompts_together,
    rows_of,
    shared_prompt_outputs,
)
from trainers.settings.batch import BatchPlan
from trainers.weights.adapters import add_adapters, base_model

KEEP = 10


def make(family, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON | FAMILIES[family] | changes)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention_of(None, config)
    )
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model.train()


def batch(questions=3, group=3, length=24):
    """Rows of several questions in any order, prompts and completions of several lengths."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 470, (questions, length), generator=generator)
    mask = torch.ones_like(prompts)
    mask[1, :5], mask[2, :11] = 0, 0
    rows = questions * group
    order = torch.randperm(rows, generator=generator)
    completions = torch.randint(3, 470, (rows, KEEP), generator=generator)
    ids = torch.cat((prompts.masked_fill(mask == 0, 0).repeat_interleave(group, 0), completions), 1)[order]
    masks = torch.cat((mask.repeat_interleave(group, 0), torch.ones_like(completions)), 1)[order]
    masks[0, -3:], masks[4, -6:] = 0, 0
    return ids, masks


def outcome(model, ids, mask, share):
    """Log-probabilities, entropies, and the gradients of a loss that weighs each token in its own way."""
    model.zero_grad()
    if share:
        let_share(model)
        assert can_share(model)
        logps, entropy = shared_prompt_outputs(model, lay_out(ids, mask, KEEP), KEEP)
    else:
        logps, entropy = masked_rows(model, ids, mask)
    return learned(model, logps, entropy)


def masked_rows(model, ids, mask):
    """As TRL reads them: padded on the left, with a mask."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-KEEP] = -100
    found = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return found.log_probs[:, -KEEP:], found.entropy[:, -KEEP:]


def learned(model, logps, entropy):
    weights = torch.linspace(-1, 1, logps.numel()).view_as(logps)
    (logps * weights + entropy * weights.flip(0)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), entropy.detach(), gradients


def same(model, ids, mask):
    equal(outcome(model, ids, mask, False), outcome(model, ids, mask, True))


def equal(apart, shared):
    assert torch.allclose(apart[0], shared[0], atol=1e-5) and torch.allclose(apart[1], shared[1], atol=1e-5)
    assert apart[2].keys() == shared[2].keys() and apart[2]
    for name, gradient in apart[2].items():
        assert (gradient - shared[2][name]).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_and_gradients_are_those_of_whole_rows(family, checkpointing):
    model = make(family)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    same(model, *batch())


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_a_window_shorter_than_the_prompt(family):
    same(make(family, sliding_window=8), *batch())


def test_adapters_learn_the_same():
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    same(get_peft_model(make("qwen2"), adapters), *batch())


def test_what_cannot_be_shared_is_not():
    model = make("qwen2")
    assert not can_share(model)
    let_share(model)
    assert can_share(model)
    assert not can_share(torch.nn.DataParallel(model))
    routed = make("qwen2")
    routed.config = AutoConfig.for_model("mixtral", attn_implementation="sdpa")  # TRL's loss of its routers wants rows
    let_share(routed)
    assert not can_share(routed)


def test_tokens_are_read_once_and_padding_is_not():
    ids, mask = batch()
    layout = lay_out(ids, mask, KEEP)
    prompts = {tuple(row[real].tolist()) for row, real in zip(ids[:, :-KEEP], mask[:, :-KEEP].bool(), strict=True)}
    completions = int(mask[:, -KEEP:].sum())
    assert len(layout.ids) == sum(len(prompt) - 1 for prompt in prompts) + completions
    assert len(layout.own) == len(layout.labels) == completions
    assert layout.is_worthwhile
    assert torch.equal(layout.labels, ids[:, -KEEP:][mask[:, -KEEP:].bool()])

    first = [ids[:, :-KEEP].tolist().index(row) for row in ids[:, :-KEEP].unique(dim=0).tolist()]
    apart = lay_out(ids[first], torch.ones_like(ids[first]), KEEP)
    assert len(apart.ids) == 3 * 33 and not apart.is_worthwhile  # each prompt once, and no padding
    padded = mask.clone()
    padded[:, 0] = torch.arange(len(mask)) % 2  # the same tokens, one of them padding in some rows
    assert lay_out(ids, padded, KEEP).ids.numel() > len(layout.ids)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_without_completions_reads_its_prompts_once_and_learns_nothing(checkpointing):
    """As where mask_truncated_completions leaves none."""
    ids, mask = batch()
    mask[:, -KEEP:] = 0
    layout = lay_out(ids, mask, KEEP)
    assert layout.is_worthwhile and len(layout.ids) == 3 * 23 - 5 - 11
    model = make("qwen2")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logps, entropy, gradients = outcome(model, ids, mask, share=True)
    assert logps.shape == (9, KEEP) and not logps.any() and not entropy.any()
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in gradients.values())


LONG = {"factor": 4.0, "original_max_position_embeddings": 28, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "dynamic"}),
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}),
    ],
)
def test_positions_that_depend_on_the_length_are_not_shared(family, rope):
    """Their frequencies are those of the longest row, of which one token fewer would be read."""
    lengths = {"max_position_embeddings": 28, "original_max_position_embeddings": 28}
    model = make(family, rope_parameters=rope | LONG, **lengths)
    let_share(model)
    assert not can_share(model)
    saved = model.config.to_dict()
    old = {k: v for k, v in saved.items() if k != "rope_parameters"} | {"rope_scaling": {"type": rope["rope_type"]}}
    for config in (saved, old):
        assert not model_shape(config | {"model_type": family}).can_share_prompts
    plain = {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": None}}
    assert model_shape(saved | plain).can_share_prompts


@pytest.mark.parametrize(
    ("rows", "group", "at_once"), [(8, 4, 2), (4, 4, 1), (2, 4, 1), (3, 24, 1), (6, 4, 2), (12, 8, 2), (1, 4, 1)]
)
def test_prompts_that_a_micro_batch_holds_at_most(rows, group, at_once):
    plan = BatchPlan(96, rows, group, 24 // rows)
    assert plan.generation_batch == 24 and plan.prompts_at_once(together=True) == at_once
    assert plan.prompts_at_once(together=False) == min(rows, 24 // group)


def test_completions_of_a_prompt_come_into_one_micro_batch():
    ids, mask = batch(questions=3, group=4)
    rows = {"prompt_ids": ids[:, :-KEEP], "prompt_mask": mask[:, :-KEEP], "completion_ids": ids[:, -KEEP:]}
    rows |= {"advantages": torch.arange(12.0), "names": [f"row {i}" for i in range(12)], "none": None}
    rows |= {"num_items_in_batch": torch.tensor(7)}
    micro_batches = split_tensor_dict(rows, 3)
    assert max(len(one["prompt_ids"].unique(dim=0)) for one in micro_batches) > 1
    found = prompts_together(micro_batches)
    assert [len(one["prompt_ids"].unique(dim=0)) for one in found] == [1, 1, 1]
    order = torch.cat([one["advantages"] for one in found]).long()
    assert sorted(order.tolist()) == list(range(12))
    for name in ("prompt_ids", "prompt_mask", "completion_ids"):
        assert torch.equal(torch.cat([one[name] for one in found]), rows[name][order])
    assert [name for one in found for name in one["names"]] == [f"row {i}" for i in order.tolist()]
    assert all(one["none"] is None and one["num_items_in_batch"] == 7 for one in found)


@pytest.mark.parametrize("loss", ["dapo", "bnpo"])
def test_a_run_learns_the_same(renderer, model_dir, tmp_path, loss):
    """Three steps on the engine; the completions of later ones depend on the updates before. A loss that is a mean of
    each micro-batch finds the same rows in it."""

    def train(share):
        trainer = make_trainer(
            renderer,
            model_dir,
            tmp_path / str(share),
            share_prompts=share,
            per_device_train_batch_size=4,
            gradient_checkpointing=True,
            loss_type=loss,
        )
        read, forward = [], trainer.model.forward

        def counted(*args, **kwargs):
            read.append(kwargs["input_ids"].numel())
            return forward(*args, **kwargs)

        trainer.model.forward = counted
        trainer.train()
        trainer.sampler.engine.close()
        logs = [log for log in trainer.state.log_history if "grad_norm" in log]
        return [(log["loss"], log["grad_norm"], log["entropy"]) for log in logs], sum(read)

    (apart, tokens_apart), (shared, tokens_shared) = train(False), train(True)
    assert len(apart) == 3
    assert torch.allclose(torch.tensor(apart), torch.tensor(shared), atol=1e-5)
    assert tokens_shared < 0.9 * tokens_apart


WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}


def wide(family):
    """Qwen3's heads are wider than its hidden states."""
    narrow = {"intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    return WIDE | (narrow if family == "qwen3" else {})


def planned(questions, group, prompt, completion, family="qwen2", **overrides):
    rows = questions * group
    chosen = {"train_batch_size": rows, "per_device_train_batch_size": rows, "num_generations": group}
    chosen |= {"max_prompt_length": prompt, "max_completion_length": completion} | overrides
    words = [f"{key}={str(value).lower()}" for key, value in chosen.items()]
    options = load_options(compose_run("teacher_rlt_tiny", words), repo=REPO)
    shape = model_shape({"model_type": family} | COMMON | FAMILIES[family] | wide(family) | {"num_hidden_layers": 4})
    return Workload(options, shape, None, "cpu", "fp32", 0)


@pytest.mark.parametrize(
    ("questions", "group", "prompt", "completion"), [(2, 4, 96, 96), (1, 4, 160, 48), (2, 2, 48, 96)]
)
def test_what_it_keeps_is_planned(questions, group, prompt, completion):
    """Bytes that the forward pass leaves for the backward pass, as torch's allocator sees them."""
    model = make("qwen2", **WIDE, num_hidden_layers=4)
    let_share(model)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 470, (questions, prompt), generator=generator).repeat_interleave(group, 0)
    completions = torch.randint(3, 470, (questions * group, completion), generator=generator)
    ids = torch.cat((prompts, completions), 1)
    mask = torch.ones_like(ids)
    mask[:group, 0] = 0  # as a batch of prompts of several lengths has it

    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = shared_prompt_outputs(model, lay_out(ids, mask, completion), completion)[0].sum()
    kept = sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    assert loss.requires_grad
    # What the head keeps are hidden states of the completions, once as they are and once for the gradient.
    head = 2 * questions * group * completion * WIDE["hidden_size"] * 4
    assert kept_bytes(planned(questions, group, prompt, completion)) + head == pytest.approx(kept, rel=0.06)


@pytest.mark.parametrize("use_peft", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "without"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize(("questions", "group", "prompt", "completion"), [(2, 4, 96, 96), (1, 8, 512, 32)])
def test_what_layers_take_is_planned(family, checkpointing, use_peft, questions, group, prompt, completion):
    """With plain attention, also where that takes more than a narrow feed-forward part, with eager attention, and with
    the masks of a window; the head aside."""
    chosen = {"gradient_checkpointing": checkpointing, "use_peft": use_peft}
    work = planned(questions, group, prompt, completion, family, **chosen)
    model = make(family, **wide(family), num_hidden_layers=4, max_position_embeddings=1024)
    if use_peft:
        model = add_adapters(model, work.options)
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    let_share(model)
    prompts = torch.randint(3, 470, (questions, prompt)).repeat_interleave(group, 0)
    ids = torch.cat((prompts, torch.randint(3, 470, (questions * group, completion))), 1)
    layout = lay_out(ids, torch.ones_like(ids), completion)

    def step():
        states = base_model(model).base_model(**rows_of(model, layout), use_cache=False).last_hidden_state
        states.pow(2).mean().backward()

    assert activations(work)[1]["activations"] == pytest.approx(measured(step), rel=0.1)


def test_the_plan_knows_when_prompts_are_shared():
    assert planned(2, 4, 96, 96).shared_prompts == 2
    halves = {"per_device_train_batch_size": 4}
    assert planned(2, 4, 96, 96, **halves).shared_prompts == 1
    for by_itself in (  # shuffled: of both questions
        {"loss_type": "bnpo"},
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.01},
        {"use_adaptive_entropy": True},
    ):
        assert planned(2, 4, 96, 96, **halves, **by_itself).shared_prompts == 2
    assert planned(4, 2, 96, 96, per_device_train_batch_size=2, loss_type="bnpo").shared_prompts is None
    assert planned(2, 4, 96, 96, gradient_checkpointing=True).shared_prompts == 2
    assert planned(2, 4, 96, 96, attn_implementation="flash_attention_2").shared_prompts is None
    assert planned(2, 4, 96, 96, share_prompts=False).shared_prompts is None
