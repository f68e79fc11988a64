"""Weight bridges without an engine. Run: ./run_tests.sh tests/test_bridges.py"""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainers.bridges import WeightBridge, make_bridge
from trainers.errors import ConfigError
from trainers.weights.shared_weights import engine_tensors, share_weights


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


class Outer(nn.Module):
    """A module under a name, as models are."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return None


class OuterEngine(Outer):
    packed_modules_mapping = EngineModel.packed_modules_mapping
    repack = staticmethod(lambda tensor: tensor)

    def load_weights(self, weights):
        """As vLLM's: each tensor to its rows; what it has no place for is passed over here."""
        for name, tensor in weights:
            with suppress(KeyError):
                ((_, target),) = engine_tensors(self, [name])
                if target.shape[1:] == tensor.shape[1:] and target.shape[0] >= tensor.shape[0]:
                    target[: tensor.shape[0]] = self.repack(tensor)


def make_pair(rows=8):
    return Outer(TrainerModel()), OuterEngine(EngineModel(rows))


def share(trainer, engine):
    engine.load_weights(trainer.named_parameters())
    share_weights(trainer, engine)


def test_parts_of_a_fused_layer_are_row_slices_in_order():
    trainer, engine = make_pair()
    engine.model.ab.weight.data.copy_(torch.arange(20.0).view(5, 4))
    found = dict(engine_tensors(engine, ["model.a.weight", "model.b.weight"]))
    assert found["model.a.weight"].tolist() == engine.model.ab.weight[:2].tolist()
    assert found["model.b.weight"].tolist() == engine.model.ab.weight[2:].tolist()


def test_parts_whose_sizes_are_not_known_are_left_out_or_named():
    trainer, engine = make_pair()
    for sizes in ([2], None):
        engine.model.ab.output_sizes = sizes
        if sizes is None:
            del engine.model.ab.output_sizes
        names = ["model.b.weight", "model.embed_tokens.weight"]
        assert [name for name, _ in engine_tensors(engine, names, strict=False)] == names[1:]
        with pytest.raises(KeyError, match=r"model\.b\.weight"):
            dict(engine_tensors(engine, names))


def test_shared_parameters_see_updates_on_both_sides_and_padding_is_zero():
    trainer, engine = make_pair()
    original = trainer.model.b.weight.detach().clone()
    share(trainer, engine)
    assert torch.equal(engine.model.ab.weight[2:], original)
    with torch.no_grad():
        trainer.model.b.weight.add_(1)
    assert torch.equal(engine.model.ab.weight[2:], original + 1)
    assert engine.model.embed_tokens.weight[6:].abs().sum() == 0


def test_parameter_that_the_engine_lacks_is_named():
    trainer, engine = make_pair()
    trainer.model.c = nn.Linear(4, 1, bias=False)
    with pytest.raises(ConfigError, match=r"model\.c\.weight"):
        share(trainer, engine)


def test_engine_weight_that_nobody_trains_is_named():
    trainer, engine = make_pair()
    engine.model.extra = nn.Linear(4, 4, bias=False)
    with pytest.raises(ConfigError, match=r"model\.extra\.weight"):
        share(trainer, engine)


def test_no_bridge_is_a_kind_of_another():
    bridges = [make_bridge(name, nn.Module()) for name in ("shared", "copy", "lora", "restart")]
    assert all(type(bridge).__bases__ == (WeightBridge,) for bridge in bridges)
    with pytest.raises(TypeError, match="abstract"):
        WeightBridge(nn.Module())


def test_other_shape_is_refused():
    trainer, engine = make_pair()
    trainer.model.a = nn.Linear(4, 1, bias=False)
    with pytest.raises(ConfigError, match=r"model\.a\.weight is \(1, 4\)"):
        share(trainer, engine)


def test_a_second_name_of_a_tied_weight_goes_to_an_engine_with_a_tensor_of_its_own():
    from trainers.bridges import _known_to

    class Tied(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            if tied:
                self.head.weight = self.embed.weight

    trainer = Tied(True)
    named = [("embed.weight", trainer.embed.weight), ("head.weight", trainer.head.weight)]
    names = {tied: [name for name, _ in _known_to(Tied(tied), trainer, iter(named))] for tied in (True, False)}
    assert names == {True: ["embed.weight"], False: ["embed.weight", "head.weight"]}


def test_weights_that_the_engine_repacks_are_refused_with_the_copying_bridge_as_remedy():
    """GPT-NeoX and Bloom have the same names and shapes on both sides, and another order of rows."""
    trainer, engine = make_pair()
    engine.repack = lambda tensor: tensor.flip(0)
    with pytest.raises(ConfigError, match=r"another layout[\s\S]*weight_bridge=copy"):
        share(trainer, engine)


def copied(trainer, engine):
    """The bridge of an engine that has loaded the trainer's weights, and what it names after so many syncs."""
    bridge = make_bridge("copy", trainer)
    engine.load_weights(bridge.weights(engine))
    bridge.attach(SimpleNamespace(model=engine), lambda: None)

    def named(count):
        return {bridge.sync() or bridge.stale() for _ in range(count)}

    return named


def test_a_copy_that_is_not_delivered_is_seen_value_by_value_in_the_engine_s_type():
    trainer, engine = make_pair()
    trainer.model.c = nn.Linear(4, 1)  # for which the engine has no tensor
    named = copied(trainer, engine.bfloat16())
    engine.model.embed_tokens.weight.data[6:] = 7  # rows that are no token's
    assert named(3) == {None}
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.view(-1)[-1] += 1
    assert named(3) == {None}
    engine.load_weights = lambda weights: None
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.view(-1)[-1] *= 1.01
    assert named(3) == {"model.a.weight", "model.b.weight", "model.embed_tokens.weight"}


def test_a_copy_in_another_layout_is_not_taken_for_one_that_was_not_delivered():
    trainer, engine = make_pair()
    nn.init.ones_(trainer.model.a.weight)  # as before an update of it looks the same in any order
    engine.repack = lambda tensor: tensor.flip(0)
    named = copied(trainer, engine)
    with torch.no_grad():
        trainer.model.a.weight[0] += 1
    assert named(4) == {None}


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_tied_head_is_looked_at_where_the_engine_has_one_of_its_own(is_tied):
    trainer, engine = make_pair(rows=6)
    for model in (trainer, engine):
        model.lm_head = nn.Linear(4, 6, bias=False)
    trainer.lm_head.weight = trainer.model.embed_tokens.weight
    if is_tied:
        engine.lm_head.weight = engine.model.embed_tokens.weight
    named = copied(trainer, engine)
    assert named(4) == {None}
    engine.load_weights = lambda weights: None
    with torch.no_grad():
        trainer.lm_head.weight.add_(1)
    assert named(4) == {None, "model.embed_tokens.weight"} | (set() if is_tied else {"lm_head.weight"})
