"""Streamed weights against the plain model. Run: ./run_tests.sh tests/test_streaming.py"""

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO
from families import COMMON, FAMILIES, LAID_OUT_OTHERWISE
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer import utils

from data.render import Encoded
from trainers.attention import attention_of
from trainers.errors import ConfigError
from trainers.models import load_model
from trainers.plan.activations import HEAD_WIDTH
from trainers.scoring import frozen
from trainers.scoring.frozen import FrozenModel, ResidentBackbone, passes
from trainers.scoring.streaming import StreamedBackbone
from trainers.teacher_grpo import completion_logps
from trainers.weights import weight_files
from trainers.weights.weight_files import HostWeights, WeightFiles

CPU = torch.device("cpu")
# Beyond the seven that are trained: learned positions, parallel blocks, scaled logits, biases everywhere.
MORE = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "starcoder2": {},
    "olmo2": {},
}


def save(family, folder, dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    values = COMMON | (LAID_OUT_OTHERWISE | FAMILIES | MORE)[family] | changes
    if family == "gpt2":
        values = {k: v for k, v in values.items() if not k.startswith(("hidden", "num", "inter", "max"))}
    config = AutoConfig.for_model(family, **values, initializer_range=0.2)
    attention = attention_of(None, config)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    model.save_pretrained(folder)
    return model


def stream(folder, in_memory=False, dtype=torch.float32, attention=None):
    files = WeightFiles(str(folder), "student_model")
    source = HostWeights(files, dtype, pin=False) if in_memory else files
    config = AutoConfig.from_pretrained(folder)
    return StreamedBackbone(source, config, CPU, dtype, attention_of(attention, config), "student_model")


def test_an_attention_that_leaves_out_a_cap_of_the_scores_is_refused(tmp_path):
    """transformers' sdpa computes Gemma 2 without it: other log-probabilities than vLLM's, and than it was trained."""
    texts, _ = make_texts()
    save("gemma2", tmp_path)
    with pytest.raises(ConfigError, match="leaves out the cap of 1 "):
        load_model(str(tmp_path), torch.float32, "sdpa", "student_model", False)
    capped = load_model(str(tmp_path), torch.float32, None, "student_model", False)
    without = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa")
    pairs = zip(plain(capped, texts, 1.0), plain(without, texts, 1.0), strict=True)
    assert max((a - b).abs().max() for a, b in pairs) > 0.01
    other = AutoConfig.for_model("qwen2", **COMMON)
    assert (attention_of(None, other), attention_of("sdpa", other)) == (None, "sdpa")


def make_texts(count=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 60, (count,), generator=generator).tolist()
    texts = [Encoded(torch.randint(3, 470, (n,), generator=generator).tolist(), {}, []) for n in lengths]
    return texts, [[(1, 2), (n // 2, n)] for n in lengths]


def plain(model, texts, temperature):
    """One text at a time through the model's own forward, softmax over its logits."""
    with torch.no_grad():
        logits = [model(torch.tensor([text.ids])).logits[0].float() for text in texts]
    logprobs = [(x / temperature).log_softmax(-1)[:-1] for x in logits]
    return [lp.gather(1, torch.tensor(t.ids[1:])[:, None])[:, 0] for lp, t in zip(logprobs, texts, strict=True)]


def with_greedy_ends(model, texts, parts):
    """Every other text's last span is what the model itself would write; and which of all its tokens are that."""
    texts, likeliest = list(texts), []
    with torch.no_grad():
        for i, spans in enumerate(parts):
            start, end = spans[-1]
            ids = torch.tensor([texts[i].ids])
            for place in range(start, end) if i % 2 == 0 else ():
                ids[0, place] = model(ids[:, :place]).logits[0, -1].argmax()
            texts[i] = Encoded(ids[0].tolist(), {}, [])
            likeliest.append(torch.zeros(len(ids[0]), dtype=torch.bool))
            likeliest[i][start:end] = model(ids).logits[0, start - 1 : end - 1].argmax(-1) == ids[0, start:end]
    return texts, likeliest


@pytest.mark.parametrize("tokens_per_pass", [60, 10_000])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_streamed_scores_equal_the_plain_forward(family, tokens_per_pass, tmp_path):
    model = save(family, tmp_path)
    texts, parts = make_texts()
    texts, likeliest = with_greedy_ends(model, texts, parts)
    assert sum(each.sum() for each in likeliest) > 50 and not likeliest[1].all()
    first, rest = [spans[:1] for spans in parts], [spans[1:] for spans in parts]
    scores = FrozenModel(stream(tmp_path), 0.7, tokens_per_pass).score(texts, first, rest)
    for (logprobs, _), expected, spans in zip(scores, plain(model, texts, 0.7), parts, strict=True):
        for start, end in spans:
            assert torch.allclose(logprobs[start:end], expected[start - 1 : end - 1], rtol=0, atol=1e-5)
    resident = FrozenModel(ResidentBackbone(model, CPU), 0.7, tokens_per_pass).score(texts, first, rest)
    for (_, streamed), (_, whole), greedy in zip(scores, resident, likeliest, strict=True):
        assert torch.equal(streamed, greedy) and torch.equal(whole, greedy)


def test_only_what_is_asked_for_is_projected_and_never_all_at_once(tmp_path, monkeypatch):
    save("qwen2", tmp_path)
    texts, parts = make_texts()
    model = FrozenModel(stream(tmp_path), 1.0, 10_000)
    monkeypatch.setitem(frozen.SCORE_TILE, "cpu", (7, 100))
    tiles, mm = [], torch.mm  # which the layers do not call
    monkeypatch.setattr(torch, "mm", lambda *given, out: tiles.append(out.shape) or mm(*given, out=out))
    model.score(texts, [spans[:1] for spans in parts], [spans[1:] for spans in parts])
    asked = sum(end - start for spans in parts for start, end in spans)
    assert sum(rows * columns for rows, columns in tiles) == asked * model.backbone.config.vocab_size
    assert max(rows for rows, _ in tiles) == 7 and max(columns for _, columns in tiles) == 100
    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == HEAD_WIDTH, "the trainer's own tiles are others"


def test_sliding_windows_and_long_texts(tmp_path):
    model = save("gemma2", tmp_path, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    texts, parts = make_texts()
    scores = FrozenModel(stream(tmp_path), 1.0, 10_000).score(texts, parts)
    for (logprobs, _), expected, spans in zip(scores, plain(model, texts, 1.0), parts, strict=True):
        start, end = spans[1]
        assert torch.allclose(logprobs[start:end], expected[start - 1 : end - 1], rtol=0, atol=1e-5)


def test_weights_are_read_once_for_a_pass(tmp_path):
    model = save("qwen2", tmp_path)
    size = (
        sum(p.nbytes for p in model.parameters())
        - model.model.embed_tokens.weight.nbytes
        - model.model.norm.weight.nbytes
    )
    backbone = stream(tmp_path)
    texts, parts = make_texts(64)
    assert sum(len(t.ids) for t in texts) > 1000
    FrozenModel(backbone, 1.0, 10_000).score(texts, parts)
    assert backbone.source.bytes_read == size
    backbone.source.bytes_read = 0
    FrozenModel(backbone, 1.0, 500).score(texts, parts)
    count = len(passes([len(t.ids) for t in texts], 500, 1024))
    assert count > 1
    assert backbone.source.bytes_read == count * size


def test_no_weight_is_left_behind(tmp_path):
    save("qwen2", tmp_path)
    backbone = stream(tmp_path)
    texts, parts = make_texts()
    FrozenModel(backbone, 1.0, 10_000).score(texts, parts)
    held = [name for name, p in backbone.model.named_parameters() if p.device.type != "meta"]
    assert held == ["model.norm.weight"]


def test_files_in_shards_and_in_bf16(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **COMMON | {"tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    texts, parts = make_texts()
    scores = FrozenModel(stream(tmp_path), 1.0, 10_000).score(texts, parts)
    for (logprobs, _), expected, (_, (start, end)) in zip(scores, plain(model, texts, 1.0), parts, strict=True):
        assert torch.allclose(logprobs[start:end], expected[start - 1 : end - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("in_memory", [True, False])
def test_blend_moves_the_weights_the_next_pass_reads(in_memory, tmp_path):
    save("qwen3", tmp_path / "old")
    other = save("qwen3", tmp_path / "new", seed=7)
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "old").eval()
    backbone = stream(tmp_path / "old", in_memory=True) if in_memory else ResidentBackbone(old, CPU)
    backbone.blend(dict(other.named_parameters()), 0.25)
    mixed = AutoModelForCausalLM.from_pretrained(tmp_path / "old").eval()
    with torch.no_grad():
        for p, q in zip(mixed.parameters(), other.parameters(), strict=True):
            p.copy_(0.75 * p + 0.25 * q)
    texts, parts = make_texts()
    scores = FrozenModel(backbone, 1.0, 10_000).score(texts, parts)
    for (logprobs, _), expected, (_, (start, end)) in zip(scores, plain(mixed, texts, 1.0), parts, strict=True):
        assert torch.allclose(logprobs[start:end], expected[start - 1 : end - 1], rtol=0, atol=1e-5)


def test_blend_moves_a_tied_head_that_the_files_hold_as_well(tmp_path):
    from safetensors.torch import load_file, save_file

    save("qwen2", tmp_path / "old", tie_word_embeddings=True)
    new = save("qwen2", tmp_path / "new", seed=7, tie_word_embeddings=True)
    file = tmp_path / "old/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    backbone = stream(tmp_path / "old", in_memory=True)
    backbone.blend(dict(new.named_parameters()), 1.0)
    texts, parts = make_texts()
    scores = FrozenModel(backbone, 1.0, 10_000).score(texts, parts)
    for (logprobs, _), expected, (_, (start, end)) in zip(scores, plain(new, texts, 1.0), parts, strict=True):
        assert torch.allclose(logprobs[start:end], expected[start - 1 : end - 1], rtol=0, atol=1e-5)


def test_completions_of_a_padded_batch(tmp_path):
    """As TRL pads: prompts on the left, completions on the right, a completion that is masked altogether."""
    model = save("qwen2", tmp_path)
    ids = torch.tensor([[0, 0, 11, 12, 21, 22, 23], [13, 14, 15, 16, 24, 0, 0], [0, 17, 18, 19, 25, 26, 27]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0]])
    logps = completion_logps(FrozenModel(stream(tmp_path), 0.9, 1000), ids, mask, 3)
    texts = [Encoded(t, {}, []) for t in ([11, 12, 21, 22, 23], [13, 14, 15, 16, 24])]
    first, second = plain(model, texts, 0.9)
    assert torch.allclose(logps[0], first[-3:], rtol=0, atol=1e-5)
    assert torch.allclose(logps[1], torch.tensor([second[-1], 0, 0]), rtol=0, atol=1e-5)
    assert logps[2].tolist() == [0, 0, 0]


LARGER_THAN_MEMORY = """
import resource, sys
sys.path[:0] = [{repo!r}, {repo!r} + "/tests"]
import torch
from test_streaming import FrozenModel, make_texts, stream
from transformers import AutoModelForCausalLM
way, folder, small, headroom = *sys.argv[1:4], int(sys.argv[4])
texts, parts = make_texts(4)
FrozenModel(stream(small), 1.0, 1000).score(texts, parts)  # what threads and libraries take once
held = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + headroom, held + headroom))
if way == "whole":
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
else:
    for (logprobs, _), (_, (start, end)) in zip(FrozenModel(stream(folder), 1.0, 1000).score(texts, parts), parts):
        print(*logprobs[start:end].tolist())
"""


def test_a_model_larger_than_the_memory_that_is_left(tmp_path):
    """In a process that may take half of the model's size beyond what it has; the limit is the kernel's."""
    model = save("qwen2", tmp_path / "large", hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
    save("qwen2", tmp_path / "small")
    size = sum(p.nbytes for p in model.parameters())
    assert size > 200 * 2**20
    script = LARGER_THAN_MEMORY.format(repo=str(REPO))
    runs = {}
    for way in ("whole", "streamed"):
        words = [sys.executable, "-c", script, way, str(tmp_path / "large"), str(tmp_path / "small"), str(size // 2)]
        # The limit counts address space: what malloc frees must go back, and not stay as a hole in its heap.
        env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
        runs[way] = subprocess.run(words, capture_output=True, text=True, timeout=300, env=env)
    assert runs["whole"].returncode != 0
    assert "memory" in runs["whole"].stderr.lower()
    assert runs["streamed"].returncode == 0, runs["streamed"].stderr[-2000:]
    texts, parts = make_texts(4)
    lines = runs["streamed"].stdout.splitlines()
    for line, expected, (_, (start, end)) in zip(lines, plain(model, texts, 1.0), parts, strict=True):
        found = torch.tensor([float(word) for word in line.split()])
        assert torch.allclose(found, expected[start - 1 : end - 1], atol=1e-4)


def test_a_quantized_checkpoint_and_a_torn_file_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save("qwen2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"do not hold model\.norm\.weight as it is"):
        stream(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    backbone = stream(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate((tmp_path / "model.safetensors").stat().st_size // 2)
    with pytest.raises(OSError, match="ends within a tensor"):
        for stored in backbone.source:
            backbone.source.read({"x": stored}, {"x": torch.empty(backbone.source.shape(stored))})


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_streamed_bf16_equals_resident_bf16(family, tmp_path):
    model = save(family, tmp_path, dtype=torch.bfloat16)
    texts, parts = make_texts()
    resident = FrozenModel(ResidentBackbone(model, CPU), 0.7, 10_000).score(texts, parts)
    streamed = FrozenModel(stream(tmp_path, dtype=torch.bfloat16), 0.7, 10_000).score(texts, parts)
    for (a, _), (b, _) in zip(streamed, resident, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("in_memory", [True, False])
def test_streamed_on_a_gpu_equals_the_plain_forward(in_memory, tmp_path):
    """From pinned memory and from disk, several passes one after the other."""
    model = save("qwen2", tmp_path, num_hidden_layers=6)
    device = torch.device("cuda")
    files = WeightFiles(str(tmp_path), "student_model")
    source = HostWeights(files, torch.float32, pin=True) if in_memory else files
    config = AutoConfig.from_pretrained(tmp_path)
    backbone = StreamedBackbone(source, config, device, torch.float32, "sdpa", "student_model")
    texts, parts = make_texts(64)
    for _ in range(3):
        scores = FrozenModel(backbone, 0.7, 500).score(texts, parts)
        for (logprobs, _), expected, (_, (start, end)) in zip(scores, plain(model, texts, 0.7), parts, strict=True):
            assert torch.allclose(logprobs[start:end], expected[start - 1 : end - 1], atol=1e-4)


@pytest.mark.gpu
def test_the_head_on_tensor_cores_is_exact(tmp_path, monkeypatch):
    """With states and weights in bf16, TF32 gives what fp32 gives."""
    model = save("qwen2", tmp_path, dtype=torch.bfloat16).to("cuda")
    texts, parts = make_texts(64)
    student = FrozenModel(ResidentBackbone(model, torch.device("cuda")), 0.7, 10_000)
    fast = student.score(texts, parts)
    monkeypatch.setattr("trainers.scoring.frozen._exact_on_tensor_cores", lambda states: nullcontext())
    for (a, _), (b, _) in zip(fast, student.score(texts, parts), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_a_model_whose_layers_cannot_be_taken_out_is_refused(tmp_path):
    """Bloom takes the first of what a layer returns."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", vocab_size=480, hidden_size=64, n_layer=2, n_head=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"sdpa[\s\S]*attn_implementation=null or eager"):
        stream(tmp_path, attention="sdpa")
    with pytest.raises(ConfigError, match=r"cannot be streamed[\s\S]*student_mode=resident"):
        stream(tmp_path, attention="eager")


def test_missing_tensors_are_named_with_a_remedy(tmp_path):
    from safetensors.torch import load_file, save_file

    save("qwen2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj\.weight[\s\S]*student_mode=resident"):
        stream(tmp_path)


@pytest.mark.parametrize("kept", [4, 100, 20000])
def test_a_file_that_was_cut_off_is_told_before_it_is_read(kept, tmp_path):
    save("qwen2", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"student_model=.*cannot be read[\s\S]*copy or download"):
        WeightFiles(str(tmp_path), "student_model")
    with pytest.raises(ConfigError, match=r"student_model=.*cannot be read[\s\S]*copy or download"):
        load_model(str(tmp_path), torch.float32, None, "student_model", False)


def test_no_safetensors_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no safetensors files"):
        WeightFiles(str(tmp_path), "student_model")


def test_passes_hold_every_text_once_and_keep_the_limits():
    lengths = [5, 1000, 7, 0, 300, 300, 300, 6, 9000]
    result = passes(lengths, 1200, 1024)
    flat = [i for batches in result for batch in batches for i in batch]
    assert sorted(flat) == [0, 1, 2, 4, 5, 6, 7, 8]
    sizes = [sum(len(batch) * lengths[batch[0]] for batch in batches) for batches in result]
    assert sizes[0] == 9000  # alone: longer than a pass
    assert all(size <= 1200 for size in sizes[1:])
    assert sizes == [9000, 1000, 3 * 300 + 3 * 7]


def test_memory_that_cannot_be_pinned_is_used_as_it_is(model_dir, monkeypatch, caplog):
    """CUDA's runtime, which refuses and keeps the error until it is asked for, is made up: there is none here."""
    asked = []
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2, cudaHostUnregister=lambda _: asked.append("unpinned"))
    library = SimpleNamespace(cudaGetLastError=lambda: asked.append("forgotten"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "CudaError", lambda code: f"out of memory ({code})")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(weight_files.ctypes, "CDLL", lambda name: library if name == "libcudart.so.13" else None)
    weights = HostWeights(WeightFiles(str(model_dir), "student_model"), torch.float32, pin=True)
    assert asked == ["forgotten"] and "cannot be pinned (out of memory (2))" in caplog.text
    name = "model.norm.weight"
    assert torch.equal(weights.tensor(name), WeightFiles(str(model_dir), "student_model").tensor(name).float())
    del weights
    assert asked == ["forgotten"]
