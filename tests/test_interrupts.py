"""A run that is told to end. Run: ./run_tests.sh tests/test_interrupts.py"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress

import pytest
from conftest import REPO
from safetensors.torch import load_file

from trainers.watch.outputs import Interrupt

# train.py in a process whose KeyboardInterrupt never comes.
LOST = """
import signal, train
signal.default_int_handler = lambda *_: None
signal.signal(signal.SIGINT, signal.default_int_handler)
train.main()
"""


@pytest.mark.parametrize("start", [[str(REPO / "train.py")], ["-c", LOST]], ids=["raised", "lost"])
def test_ctrl_c_ends_a_run_with_a_line(start, model_dir, rows_file, tmp_path):
    out = tmp_path / "out"
    words = [f"model_name_or_path={model_dir}", f"student_model={model_dir}", f"dataset_id_or_path={rows_file}"]
    words += ["train_batch_size=8", "per_device_train_batch_size=8", "num_generations=4", "max_completion_length=16"]
    words += ["max_steps=1000", "logging_steps=1", "save_steps=1", "report_before_after=false", "num_probes=0"]
    command = [sys.executable, *start, *words, f"output_dir={out}"]
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPO,
        # A suite that a shell has put into the background ignores interrupts, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 240
        while not list(out.glob("checkpoint-*/trainer_state.json")):
            assert run.poll() is None and time.monotonic() < deadline, "it ended, or never began to train"
            time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        shown, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130 and "Traceback" not in shown, shown[-2000:]
    (kept,) = re.findall(r"interrupted: go on from it with model_name_or_path=(\S+)", shown)
    assert load_file(f"{kept}/model.safetensors")
    assert "interrupted" in (out / "training.log").read_text()


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_an_interrupt_that_was_lost_ends_the_run_at_its_next_step(handler):
    """As one that a finalizer has met."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        Interrupt().on_train_begin(None, None, None)  # of a warm-up in the same process
        interrupt = Interrupt()
        interrupt.on_train_begin(None, None, None)
        interrupt.on_step_end(None, None, None)
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        is_ignored = handler is signal.SIG_IGN
        with nullcontext() if is_ignored else pytest.raises(KeyboardInterrupt):
            interrupt.on_step_end(None, None, None)
    finally:
        signal.signal(signal.SIGINT, before)
