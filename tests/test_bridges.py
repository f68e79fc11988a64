"""Weight bridges without an engine. Run: ./run_tests.sh tests/test_bridges.py"""

import pytest
import torch
from torch import nn

from trainers.bridges import engine_tensors, share_weights


class Fused(nn.Module):
    """A stand-in for vLLM's fused linear layer: two parts in one weight."""

    def __init__(self, sizes, width):
        super().__init__()
        self.output_sizes = sizes
        self.weight = nn.Parameter(torch.zeros(sum(sizes), width), requires_grad=False)


class EngineModel(nn.Module):
    packed_modules_mapping = {"ab": ["a", "b"]}

    def __init__(self, rows=8):
        super().__init__()
        self.ab = Fused([2, 3], 4)
        self.embed_tokens = nn.Embedding(rows, 4)


class TrainerModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(4, 3, bias=False)
        self.embed_tokens = nn.Embedding(6, 4)


def prefixed(model):
    """Put a module under a name, as models are."""
    outer = nn.Module()
    outer.model = model
    return outer


def make_pair(rows=8):
    trainer, engine = prefixed(TrainerModel()), prefixed(EngineModel(rows))
    engine.packed_modules_mapping = EngineModel.packed_modules_mapping
    return trainer, engine


def test_parts_of_a_fused_layer_are_row_slices_in_order():
    trainer, engine = make_pair()
    engine.model.ab.weight.data.copy_(torch.arange(20.0).view(5, 4))
    found = dict(engine_tensors(engine, ["model.a.weight", "model.b.weight"]))
    assert found["model.a.weight"].tolist() == engine.model.ab.weight[:2].tolist()
    assert found["model.b.weight"].tolist() == engine.model.ab.weight[2:].tolist()


def test_shared_parameters_see_updates_on_both_sides_and_padding_is_zero():
    trainer, engine = make_pair()
    original = trainer.model.b.weight.detach().clone()
    share_weights(trainer, engine)
    assert torch.equal(engine.model.ab.weight[2:], original)
    with torch.no_grad():
        trainer.model.b.weight.add_(1)
    assert torch.equal(engine.model.ab.weight[2:], original + 1)
    assert engine.model.embed_tokens.weight[6:].abs().sum() == 0


def test_parameter_that_the_engine_lacks_is_named():
    trainer, engine = make_pair()
    trainer.model.c = nn.Linear(4, 1, bias=False)
    with pytest.raises(ValueError, match=r"model\.c\.weight"):
        share_weights(trainer, engine)


def test_engine_weight_that_nobody_trains_is_named():
    trainer, engine = make_pair()
    engine.model.extra = nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match=r"model\.extra\.weight"):
        share_weights(trainer, engine)


def test_other_shape_is_refused():
    trainer, engine = make_pair()
    trainer.model.a = nn.Linear(4, 1, bias=False)
    with pytest.raises(ValueError, match=r"model\.a\.weight is \(1, 4\)"):
        share_weights(trainer, engine)
