"""Optimizers that fit and still learn. Run: ./run_tests.sh tests/test_optimizers.py"""

import copy
import io
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_scheduler

from trainers import master_adamw, optimizers
from trainers.optimizers import MasterAdamW, make_optimizer
from trainers.settings.optim_specs import optimizer_bytes, optimizer_faults, optimizer_name
from trainers.watch.visible_fraction import VisibleFraction

ON_CPU = ("adamw_torch", "adamw_8bit", "cpu_offload", "adafactor")


def arguments(**chosen):
    adam = {"learning_rate": 1e-6, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0}
    adam["max_grad_norm"] = 1.0
    return SimpleNamespace(**adam | chosen)


class Model(nn.Module):
    """Two matrices that are rows of one tensor, as the engine's fused ones, a small matrix and a norm."""

    def __init__(self, dtype=torch.bfloat16, rows=256, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.fused = (torch.randn(2 * rows, 256, generator=generator) * 0.02).to(dtype)
        self.up, self.down = (nn.Parameter(half) for half in self.fused.split(rows))
        self.gate = nn.Parameter((torch.randn(8, 100, generator=generator) * 0.02).to(dtype))
        self.norm = nn.RMSNorm(256, dtype=dtype)


def give_gradients(model, seed=None):
    """All 0.1 without a seed, else random."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for p in model.parameters():
        value = torch.full(p.shape, 0.1) if seed is None else torch.randn(p.shape, generator=generator) * 0.1
        p.grad = value.to(p.dtype)


def moved(after, before):
    """The share of the intended displacement, 125 steps of 1e-6 downwards, that the mean weight went."""
    return (after.double() - before.double()).mean().item() / -125e-6


def run_displacement(name):
    model = Model(rows=256)
    before = copy.deepcopy(model)
    optimizer = make_optimizer(model, name, arguments())
    torch.manual_seed(0)
    for _ in range(125):
        give_gradients(model)
        optimizer.step()
    return model, before, optimizer


def test_plain_bf16_adamw_loses_nine_tenths_of_small_steps():
    model, before, _ = run_displacement("adamw_torch")
    assert moved(model.fused, before.fused) < 0.1
    assert torch.equal(model.norm.weight, torch.ones(256).bfloat16())


def test_adamw_8bit_keeps_small_steps_on_average():
    model, before, optimizer = run_displacement("adamw_8bit")
    assert moved(model.fused, before.fused) == pytest.approx(1, abs=0.05)
    masters = optimizer.state[model.norm.weight]["master"]
    assert masters.numpy() == pytest.approx(1 - 125e-6, abs=2e-6)  # fp32 below 1: 17 steps of 2^-24 for 16.8


def test_cpu_offload_keeps_small_steps_in_its_masters():
    model, before, optimizer = run_displacement("cpu_offload")
    masters = torch.cat([optimizer.state[p]["master"] for p in (model.up, model.down)])
    assert moved(masters, before.fused) == pytest.approx(1, abs=0.01)
    # What the engine sees: each weight on its nearest bf16 value, some too near and some too far (measured: 1.09).
    assert moved(model.fused, before.fused) == pytest.approx(1, abs=0.15)
    assert optimizer.state[model.norm.weight]["master"].numpy() == pytest.approx(1 - 125e-6, abs=2e-6)


@pytest.mark.parametrize("name", ON_CPU)
def test_weights_are_written_in_place(name):
    model = Model(torch.float32)
    before, places = model.fused.clone(), [p.data_ptr() for p in model.parameters()]
    optimizer = make_optimizer(model, name, arguments(learning_rate=1e-2))
    give_gradients(model)
    optimizer.step()
    assert [p.data_ptr() for p in model.parameters()] == places
    assert (model.fused < before - 1e-3).all()


def reference_step(weights, gradients, max_norm, args):
    """torch's AdamW on fp32 weights and the clipped sum of the gradients."""
    parameters = [nn.Parameter(w.detach().float().clone()) for w in weights]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.float().clone()
    nn.utils.clip_grad_norm_(parameters, max_norm)
    adam = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    torch.optim.AdamW(parameters, weight_decay=0.0, **adam).step()
    return parameters


@pytest.mark.parametrize(("name", "tolerance"), [("cpu_offload", 0.0), ("adamw_8bit", 1e-6)])
def test_gradients_are_accumulated_and_clipped_before_the_step(name, tolerance):
    """Two micro-batches, clipped to a norm at which Adam's eps shows the scale: a step then depends on the clipping.
    At the first step the 8-bit states start from zero and the step is computed before they are rounded."""
    model, args = Model(torch.float32), arguments(learning_rate=1e-3, adam_epsilon=1e-4)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(make_optimizer(model, name, args))
    weights = [p.detach().clone() for p in model.parameters()]
    gradients = [torch.zeros_like(p) for p in model.parameters()]
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        factors = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        gradients = [g + f for g, f in zip(gradients, factors, strict=True)]
        accelerator.backward(sum((p * f).sum() for p, f in zip(model.parameters(), factors, strict=True)))
    accelerator.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    expected = reference_step(weights, gradients, 0.01, args)
    unclipped = reference_step(weights, gradients, 1e9, args)
    for p, e, u in zip(model.parameters(), expected, unclipped, strict=True):
        assert (p - e).abs().max() <= tolerance + 1e-7  # fp32 of a weight of 1
        assert (u - e).abs().mean() > 1e-4


def test_8bit_states_stay_close_to_fp32_ones():
    """Five steps of random gradients. Measured, in units of the learning rate: 0.019 on average, 0.23 at the most."""
    model = Model(torch.float32)
    reference = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    ours = make_optimizer(model, "adamw_8bit", arguments(learning_rate=1e-3))
    theirs = torch.optim.AdamW(reference, lr=1e-3, weight_decay=0.0)
    for seed in range(5):
        give_gradients(model, seed)
        for p, q in zip(model.parameters(), reference, strict=True):
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    off = (model.up - reference[0]).abs() / 1e-3
    assert 1e-4 < off.mean() < 0.04 and off.max() < 0.4
    assert (model.norm.weight - reference[3]).abs().max() <= 1e-7


@pytest.mark.parametrize("name", ON_CPU)
def test_scheduler_sets_the_learning_rate_of_every_group(name):
    model = Model(torch.float32)
    optimizer = make_optimizer(model, name, arguments(learning_rate=1e-3, weight_decay=0.1))
    assert [float(g["weight_decay"]) for g in optimizer.param_groups].count(0.1) == (2 if name == "adamw_8bit" else 1)
    assert len(optimizer.param_groups) == (3 if name == "adamw_8bit" else 2)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
    before = model.norm.weight.clone(), model.up.clone()
    for left in (0.75, 0.5, 0.25, 0.0):
        give_gradients(model)
        optimizer.step()
        scheduler.step()
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        assert rates == pytest.approx([1e-3 * left] * len(rates), rel=1e-6)
    after = model.norm.weight.clone(), model.up.clone()
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    give_gradients(model)
    optimizer.step()  # at a rate of 0
    assert torch.equal(model.up, after[1]) and torch.equal(model.norm.weight, after[0])


def steps(model, optimizer, seeds):
    for seed in seeds:
        torch.manual_seed(seed)  # of the stochastic rounding
        give_gradients(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ON_CPU)
def test_saved_and_loaded_optimizer_goes_on_as_if_nothing_had_happened(name):
    args = arguments(learning_rate=1e-4, weight_decay=0.01)
    whole, first = Model(), Model()
    steps(whole, make_optimizer(whole, name, args), range(6))
    optimizer = make_optimizer(first, name, args)
    steps(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = copy.deepcopy(first)
    resumed = Accelerator(cpu=True).prepare(make_optimizer(second, name, args))
    resumed.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    steps(second, resumed, range(3, 6))
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(first.up, second.up)


def test_state_of_another_optimizer_is_refused():
    model = Model()
    saved = make_optimizer(model, "adamw_torch", arguments()).state_dict()
    with pytest.raises(ValueError, match="2 groups of parameters, this optimizer 3"):
        make_optimizer(model, "adamw_8bit", arguments()).load_state_dict(saved)


def test_pieces_on_the_host_make_the_same_step_as_whole_parameters(monkeypatch):
    whole, cut = Model(), Model()
    steps(whole, make_optimizer(whole, "cpu_offload", arguments(learning_rate=1e-3)), range(3))
    monkeypatch.setattr(master_adamw, "PIECE", 1000)  # 65536 weights of a matrix in 66 pieces
    optimizer = make_optimizer(cut, "cpu_offload", arguments(learning_rate=1e-3))
    steps(cut, optimizer, range(3))
    for p, q in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizer._staging.bytes() == 1000 * (4 * 2 + 4)


def test_masters_start_from_the_weights_at_the_first_step():
    """A checkpoint may be loaded into the model after the optimizer was made."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = MasterAdamW([weight], lr=0.5, betas=(0.9, 0.999), eps=0.0)
    weight.data.fill_(3.0)
    weight.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    assert weight.tolist() == [2.5, 3.5]  # Adam's first step is the learning rate


def held_bytes(value):
    if hasattr(value, "__tensor_flatten__"):
        return sum(held_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes if isinstance(value, torch.Tensor) else 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ON_CPU)
def test_bytes_are_those_of_the_real_states(name, dtype):
    model = Model(dtype)
    optimizer = make_optimizer(model, name, arguments())
    steps(model, optimizer, [0])
    real = sum(held_bytes(value) for state in optimizer.state.values() for value in state.values())
    if name == "cpu_offload":
        real += optimizer._staging.bytes()
    planned = optimizer_bytes(name, tuple(tuple(p.shape) for p in model.parameters()), dtype.itemsize)
    assert planned.device + planned.host == pytest.approx(real, rel=0.01)
    assert (planned.device == 0) == (name == "cpu_offload")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "adafactor"])
def test_transient_bytes_are_the_peak_of_a_step(name, dtype):
    model = nn.Module()
    model.up = nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    optimizer = make_optimizer(model, name, arguments())
    give_gradients(model, 0)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    planned = optimizer_bytes(name, ((256, 256),), dtype.itemsize).transient
    assert max(held) == pytest.approx(planned, rel=0.05, abs=100)


def test_bytes_by_hand():
    """A matrix of 4096 x 256 = 2^20 weights and a norm of 256, in bf16."""
    shapes = ((4096, 256), (256,))
    codes_and_scales = 2 * 2**20 * (1 + 4 / 256)
    assert optimizer_bytes("adamw_8bit", shapes, 2).device == codes_and_scales + 2 * 1024 + 12 * 256 + 4
    assert optimizer_bytes("adamw_torch", shapes, 2).device == 4 * (2**20 + 256) + 8
    assert optimizer_bytes("adafactor", shapes, 2) == (4 * (4096 + 256) + 4 * 256 + 8, 0, 16 * 2**20)
    host = 12 * (2**20 + 256) + 8 + 2**20 * (4 * 2 + 4)
    assert optimizer_bytes("cpu_offload", shapes, 2) == (0, host, 0)
    flash = 2 * (2**20 + 2 * 2**15) + 2**20 + 2 * (256 + 2 * 8) + 2 * 256
    assert optimizer_bytes("flash_adamw", shapes, 2).device == flash


def fraction_of(update, dtype=torch.bfloat16, weights=1000, engine=None):
    parameter = nn.Parameter(torch.full((weights,), 0.02, dtype=dtype))
    found = []
    watch = VisibleFraction([parameter], engine or dtype, found.append)
    watch.on_pre_optimizer_step(None, None, None)
    parameter.data += update.to(dtype)
    watch.on_optimizer_step(None, None, None)
    return found[0]


def test_an_update_below_the_rounding_of_a_weight_is_invisible():
    """bf16 has 8 bits of mantissa: beside 0.02 (2^-6 * 1.28) its values are 2^-13 = 1.2e-4 apart."""
    assert fraction_of(torch.full((1000,), 1e-6)) == 0.0
    assert fraction_of(torch.full((1000,), 1e-3)) == 1.0
    assert fraction_of(torch.tensor([1e-3] * 250 + [1e-6] * 750)) == 0.25
    assert fraction_of(torch.full((1000,), 1e-6), torch.float32) == 1.0
    assert fraction_of(torch.full((1000,), 1e-6), torch.float32, engine=torch.bfloat16) == 0.0


def test_many_weights_are_sampled():
    """A quarter of 2^22 weights changes; 2^20 are looked at, so the error is about sqrt(0.19 / 2^20) = 0.0004."""
    update = torch.zeros(2**22)
    update[torch.randperm(2**22, generator=torch.Generator().manual_seed(1))[: 2**20]] = 1e-3
    state = torch.get_rng_state()
    assert fraction_of(update, weights=2**22) == pytest.approx(0.25, abs=0.002)
    assert torch.equal(torch.get_rng_state(), state)
    watch = VisibleFraction([torch.zeros(2**22), torch.zeros(3 * 2**22)], torch.bfloat16, print)
    watch.on_pre_optimizer_step(None, None, None)
    assert [len(places) for places in watch._places] == [2**18, 3 * 2**18] and len(watch._before) == 2**20


def options(**chosen):
    return SimpleNamespace(**{"optim": "auto", "use_peft": False} | chosen)


def test_auto_is_the_exact_one_where_weights_are_fp32():
    assert optimizer_name(options(), "torch.float32") == "adamw_torch"
    assert optimizer_name(options(), "torch.bfloat16") == "adamw_8bit"
    assert optimizer_name(options(use_peft=True), "torch.bfloat16") == "adamw_torch"
    assert optimizer_name(SimpleNamespace(optim="auto"), "torch.bfloat16") == "adamw_8bit"  # SFT has no peft
    assert optimizer_name(options(optim="adafactor"), "torch.bfloat16") == "adafactor"


@pytest.mark.parametrize(
    ("chosen", "device", "dtype", "remedy"),
    [
        ({"optim": "flash_adamw"}, "cpu", "torch.bfloat16", "adamw_8bit or cpu_offload"),
        ({"optim": "flash_adamw"}, "cuda", "torch.float32", "adamw_torch"),
        ({"optim": "flash_adamw", "use_peft": True}, "cuda", "torch.bfloat16", "adamw_torch"),
        ({"optim": "cpu_offload", "use_peft": True}, "cuda", "torch.bfloat16", "adamw_torch"),
    ],
)
def test_optimizers_that_cannot_work_are_refused(chosen, device, dtype, remedy):
    (fault,) = optimizer_faults(options(**chosen), device, dtype)
    assert (fault.key, fault.value) == ("optim", chosen["optim"]) and remedy in fault.remedy


def test_optimizers_that_work_are_not_refused():
    assert optimizer_faults(options(optim="flash_adamw"), "cuda", "torch.bfloat16") == []
    for name in ("auto", *ON_CPU):
        assert optimizer_faults(options(optim=name), "cpu", "torch.bfloat16") == []


@pytest.mark.parametrize(
    ("name", "dtype", "warns"),
    [
        ("adamw_torch", torch.bfloat16, True),
        ("adafactor", torch.bfloat16, True),
        ("adamw_8bit", torch.bfloat16, False),
        ("cpu_offload", torch.bfloat16, False),
        ("adamw_torch", torch.float32, False),
        ("adafactor", torch.float32, False),
    ],
)
def test_an_optimizer_that_loses_small_steps_says_so(caplog, name, dtype, warns):
    make_optimizer(Model(dtype), name, arguments())
    assert ("are lost" in caplog.text) == warns


def test_scaled_gradients_take_adam_s_steps_and_come_back_as_they_were():
    """Of 1e-7: fp16, in which FlashAdamW has the scales of its states, ends at 6e-8."""
    plain, scaled = Model(torch.float32), Model(torch.float32)
    adam = {"lr": 1e-3, "weight_decay": 0.1}
    first = torch.optim.AdamW(plain.parameters(), eps=1e-8, **adam)
    second = optimizers.with_scaled_gradients(torch.optim.AdamW)(
        scaled.parameters(), eps=1e-8 * optimizers.GRADIENT_SCALE, scale=optimizers.GRADIENT_SCALE, **adam
    )
    for seed in range(3):
        for model, optimizer in ((plain, first), (scaled, second)):
            give_gradients(model, seed)
            for p in model.parameters():
                p.grad.mul_(1e-7)
            given = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), given, strict=True))
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=0)
    moments = [state["exp_avg_sq"].sqrt().max() for state in second.state.values()]
    assert all(moment > 6e-8 for moment in moments) and first.state[plain.up]["exp_avg_sq"].sqrt().max() < 6e-8


@pytest.mark.parametrize(("max_grad_norm", "scale"), [(1.0, optimizers.GRADIENT_SCALE), (0.0, 1)])
def test_flash_adamw_is_given_bits_by_shape_and_an_eps_for_its_gradients(max_grad_norm, scale, monkeypatch):
    """Its package and its kernels are for a GPU: what it is made with is looked at."""
    made = {}

    class FlashAdamW(torch.optim.SGD):
        def __init__(self, groups, **given):
            made.update(given)
            super().__init__(groups, lr=given["lr"])

    monkeypatch.setitem(sys.modules, "flashoptim", SimpleNamespace(FlashAdamW=FlashAdamW))
    model = Model()
    chosen = arguments(weight_decay=0.1, adam_epsilon=1e-8, max_grad_norm=max_grad_norm)
    groups = make_optimizer(model, "flash_adamw", chosen).param_groups
    assert made["master_weight_bits"] == 24 and made["eps"] == 1e-8 * scale
    assert [len(group["params"]) for group in groups] == [3, 1]
    matrices, vectors = groups
    assert {id(p) for p in matrices["params"]} == {id(p) for p in (model.up, model.down, model.gate)}
    assert matrices["weight_decay"] == 0.1 and "master_bytewidth" not in matrices
    assert vectors["params"][0] is model.norm.weight
    assert vectors["weight_decay"] == 0 and vectors["master_bytewidth"] == 4
    assert [group["gradient_scale"] for group in groups] == [scale] * 2
