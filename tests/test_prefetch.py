"""What makes a streamed pass fast: weights come while others compute, from pinned memory. Run: ./run_tests.sh
tests/test_prefetch.py

That copies and computation wait for each other as they must is seen on a simulated GPU (test_simulated_gpu.py).
"""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from test_streaming import save, stream

from trainers.scoring import loading, streaming
from trainers.scoring.loading import load_frozen
from trainers.weights.weight_files import WeightFiles


class AtOnce:
    """A thread that does at once what it is given, and says so."""

    def __init__(self, told):
        self.told = told

    def __call__(self, **_):
        return self

    def submit(self, function, *arguments):
        self.told.append(("asked for", arguments[-1]))
        done = Future()
        done.set_result(function(*arguments))
        return done

    def shutdown(self, **_):
        pass


def test_the_next_layer_is_asked_for_before_one_computes(tmp_path, monkeypatch):
    layers = 4
    save("qwen2", tmp_path, num_hidden_layers=layers)
    backbone = stream(tmp_path)
    told, call = [], streaming.functional_call

    def functional_call(module, *arguments, **named):
        if module in list(backbone.layers):
            told.append(("computes", list(backbone.layers).index(module)))
        return call(module, *arguments, **named)

    monkeypatch.setattr(streaming, "functional_call", functional_call)
    monkeypatch.setattr(streaming, "ThreadPoolExecutor", AtOnce(told))
    for _ in backbone.run([torch.arange(3, 20)[None], torch.arange(30, 38)[None]]):
        pass
    groups = [*backbone._groups, backbone._head_names]
    found = [(event, what if event == "computes" else groups.index(what)) for event, what in told]
    assert [what for event, what in found if event == "asked for"] == [*range(layers + 1)]  # each once, in turn
    assert [what for event, what in found if event == "computes"] == [i for i in range(layers) for _ in range(2)]
    for i in range(layers):
        assert found.index(("asked for", i + 1)) < found.index(("computes", i)), (
            f"layer {i} computes, and nothing comes"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_a_tensor_is_read_from_where_it_begins(dtype, model_dir):
    """As blocks on the way to a GPU take it: as it is stored, and in another type."""
    files, name = WeightFiles(str(model_dir), "student_model"), "model.layers.1.mlp.up_proj.weight"
    whole, part = files.tensor(name).view(-1), torch.empty(1000, dtype=dtype)
    files._read_part(name, 777, part)
    assert whole.dtype == torch.float32 and torch.equal(part, whole[777:1777].to(dtype))


class Made(Exception):
    """The weights are where they are kept; no more is of interest."""


@pytest.mark.parametrize(
    ("device", "writable", "pinned"), [("cuda", False, True), ("cuda", True, True), ("cpu", True, False)]
)
def test_weights_in_host_memory_are_pinned_for_a_gpu(device, writable, pinned, model_dir, monkeypatch):
    def host_weights(files, dtype, pin):
        assert pin == pinned
        raise Made

    monkeypatch.setattr(loading, "HostWeights", host_weights)
    options = SimpleNamespace(student_mode="streamed", trust_remote_code=False, attn_implementation=None, stage="rl")
    arguments = (options, str(model_dir), "student_model", torch.device(device), torch.float32, 1.0)
    with pytest.raises(Made):
        load_frozen(*arguments, writable=writable)
