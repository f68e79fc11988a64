"""Optimizers on a real GPU. Run: ./run_tests.sh -m gpu tests/test_optimizers_on_gpu.py"""

import pytest
import torch
from test_optimizers import Model, arguments, give_gradients, moved

from trainers import master_adamw
from trainers.optimizers import make_optimizer
from trainers.settings.optim_specs import optimizer_bytes


@pytest.mark.gpu
def test_flash_adamw_keeps_small_steps_on_a_gpu():
    model = Model(rows=256)
    before = model.fused.clone()
    model.cuda()
    optimizer = make_optimizer(model, "flash_adamw", arguments())
    for _ in range(125):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()
    after = torch.cat([model.up, model.down]).cpu()
    assert moved(after, before) > 0.8  # 24 bits: performance.md's simulation has 86 % visible in bf16
    real = sum(v.nbytes for state in optimizer.state_dict()["state"].values() for v in state.values())
    assert optimizer_bytes("flash_adamw", tuple(tuple(p.shape) for p in model.parameters()), 2).device <= real * 1.01


@pytest.mark.gpu
def test_cpu_offload_of_a_gpu_s_weights_is_that_of_a_cpu_s(monkeypatch):
    monkeypatch.setattr(master_adamw, "PIECE", 1000)
    here, there = Model(), Model().cuda()
    for model in (here, there):
        optimizer = make_optimizer(model, "cpu_offload", arguments(learning_rate=1e-3))
        for seed in range(3):
            give_gradients(here, seed)
            for p, q in zip(model.parameters(), here.parameters(), strict=True):
                p.grad = q.grad.to(p.device)
            optimizer.step()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(p, q.cpu())
