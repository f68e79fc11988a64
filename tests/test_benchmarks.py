"""The benchmarks that need no GPU, run in small, and how they judge. Run: ./run_tests.sh tests/test_benchmarks.py"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPO
from small_run import make_trainer

from benchmarks import bridges, memory, score
from benchmarks.bridge_ways import freed_by_release

BRIDGES = ["--model", "tiny", "--ways", "shared", "--steps", "2", "--questions", "2", "--generations", "2"]
BRIDGES += ["--completion", "8"]


def told_by(script, *arguments):
    """What a benchmark prints, and the JSON of its last line."""
    if torch.cuda.is_available():
        pytest.skip("vLLM for CUDA does not run on a CPU")
    command = [sys.executable, f"benchmarks/{script}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_score():
    sizes = ["--model", "tiny", "--completions", "8", "--mean-tokens", "32", "--repeats", "1"]
    said, found = told_by("score", "--device", "cpu", *sizes, "--tokens-per-pass", "160")
    streamed = next(line.split() for line in said.splitlines() if line.startswith("(c) streamed"))
    a_pass = found["median"]["c"] / found["passes"]
    assert found["passes"] == 2 and float(streamed[3]) == pytest.approx(a_pass, abs=0.006)
    assert max(found["largest_difference"].values()) < 1e-4
    assert min(found["median"].values()) > 0 and found["bytes_moved"]["c"] > 0
    assert found["bytes_moved"]["a"] > 3 * found["bytes_moved"]["c"]  # once for each completion


def test_score_leaves_out_the_attention_of_cudnn_as_a_run_does(monkeypatch):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    sizes = ["--model", "tiny", "--completions", "2", "--mean-tokens", "8", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["score.py", "--device", "cpu", *sizes])
    try:
        score.main()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.slow
def test_bridges():
    said, found = told_by("bridges", *BRIDGES)
    way = found["ways"]["shared"]
    assert way["generate"] > 0 and way["rest"] > 0 and way["weight_mib"] > 0
    assert 0 < way["sentinel_share"] < 1 and "sentinel %" in said
    assert "free_before_release_gib" not in way  # a CPU's engine cannot
    steps = [line.partition(":")[0] for line in said.splitlines() if line.startswith("shared, step")]
    assert steps == ["shared, step 0", "shared, step 1", "shared, step 2"]


@pytest.mark.slow
def test_memory():
    _, found = told_by("memory", "--cases", "50m-lora")
    assert all(row["measured"] > 0 for row in found["50m-lora"].values())


@pytest.mark.parametrize(
    ("item", "share", "within"),
    [
        ("weights", 1.049, True),
        ("weights", 0.951, True),
        ("gradients", 1.051, False),
        ("scoring", 0.949, False),
        ("peak", 1.099, True),
        ("peak", 1.101, False),
        ("peak", 0.899, False),
    ],
)
def test_memory_fails_where_the_plan_is_beyond_what_it_promises(monkeypatch, item, share, within):
    found = {name: {"planned": 1e9, "measured": 1e9} for name in ("weights", "gradients", "scoring", "peak")}
    found[item]["planned"] *= share
    monkeypatch.setattr(memory, "measured", lambda case: found)
    monkeypatch.setattr(sys, "argv", ["memory.py", "--cases", "50m-full"])
    if within:
        memory.main()
        return
    with pytest.raises(SystemExit, match=f"50m-full: {item} is off by") as ended:
        memory.main()
    assert ended.value.code not in (None, 0)  # a text: exit status 1


def test_memory_fails_where_something_planned_is_not_there(monkeypatch):
    monkeypatch.setattr(memory, "measured", lambda case: {"scoring": {"planned": 1e9, "measured": 0}})
    monkeypatch.setattr(sys, "argv", ["memory.py", "--cases", "50m-full"])
    with pytest.raises(SystemExit, match="scoring is off"):
        memory.main()


def test_a_case_of_memory_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(memory, "run", lambda *_, **__: "ValueError: too small")
    monkeypatch.setattr(memory, "write_model", lambda *_: None)
    monkeypatch.setattr(memory, "write_rows", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="50m-full failed: ValueError: too small"):
        memory.measured("50m-full")


def test_free_memory_is_measured_about_a_release(monkeypatch, renderer, model_dir, tmp_path):
    trainer = make_trainer(renderer, model_dir, tmp_path)
    engine = trainer.sampler.engine
    try:
        assert freed_by_release(trainer) == {}  # a CPU's cannot
        free = [50]
        llm = engine.llm
        with monkeypatch.context() as patch:
            patch.setattr(engine, "can_release", True)
            patch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 80))
            patch.setattr(llm, "release_kv_cache_memory", lambda: free.append(free.pop() + 20), raising=False)
            patch.setattr(llm, "wake_up", lambda tags: free.append(free.pop() - 20))
            found = freed_by_release(trainer)
            assert freed_by_release(trainer) == found == {"free_before_release": 50, "free_after_release": 70}
            engine.restore_cache()
        llm.wake_up(tags=["scheduling"])
    finally:
        engine.close()


@pytest.mark.parametrize(("gpu", "expected"), [(True, ("7b", 256, 8)), (False, ("0.16b", 96, 64))])
def test_a_gpu_scores_with_a_7b(monkeypatch, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(sys, "argv", ["score.py"])
    asked = score.parse()
    assert (asked.model, asked.mean_tokens, asked.slow_completions) == expected
    texts = score.make_texts(asked.completions, 1000, asked.mean_tokens)
    assert score.count_passes(texts, asked.tokens_per_pass, torch.device(asked.device)) == 1  # weights are moved once
    assert sum(len(text.ids) for text in texts) > (16384 if gpu else 4096)


def test_bridges_tells_the_share_of_the_sentinel_and_what_a_release_frees(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bridges.py", "--ways", "shared"])
    times = {"sync": 0.001, "generate": 1.0, "rest": 1.0}
    steps = [times | {"sentinel": 0.01, "step": 2.0}, times | {"sentinel": 0.04, "step": 2.0}]
    free = {"free_before_release": 10 * 2**30, "free_after_release": 30 * 2**30}
    bridges.report({"shared": {"steps": steps, "weight_bytes": 2**20, "peak_bytes": None} | free}, bridges.parse())
    head, row, release, last = capsys.readouterr().out.splitlines()
    cells = dict(zip([head[at : at + 12].strip() for at in range(14, len(head), 12)], row.split()[1:], strict=True))
    assert cells["sentinel ms"] == "25.00" and cells["sentinel %"] == "1.25"
    assert release == "shared: 10.00 GiB free with the KV cache, 30.00 after its release"
    assert json.loads(last)["ways"]["shared"]["sentinel_share"] == pytest.approx(0.0125)
