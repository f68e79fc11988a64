"""What a whole training took: seconds by phase, tokens, and the peak of memory beside the planned one."""

import json
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from trainers.plan.workload import GIB, Plan
from trainers.rollout.sampler import RolloutSampler
from trainers.watch.phases import clock

logger = logging.getLogger(__name__)

STEP_PHASES = ("generate", "score", "update")  # of the plan: those that steps go through
SECONDS, MEMORY, PEAK = "seconds/", "memory/", "_peak"


class Totals(TrainerCallback):
    """Adds up what is logged of training steps; at the end tells it in a line and writes totals.json.

    Steps after the last log are in `seconds.wall` alone, and so is what runs between steps: evaluations, checkpoints.
    What an earlier run of the folder took is removed as training begins.

    Args:
        sampler: What the run samples with.
        output_dir: Where totals.json is written.
        plan: The run's plan of memory, if one was made.
    """

    def __init__(self, sampler: RolloutSampler, output_dir: Path, plan: Plan | None) -> None:
        self.sampler, self.path, self.plan = sampler, output_dir / "totals.json", plan
        self._start, self._first, self._last = time.perf_counter(), 0, 0
        self._seconds: Counter[str] = Counter()
        self._sampled: Counter[str] = Counter()
        self._peaks: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start, self._first = time.perf_counter(), state.global_step
        self._last = self._first
        if state.is_world_process_zero:
            self.path.unlink(missing_ok=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "seconds/update" not in logs:  # an evaluation's, or of the end
            return
        steps, self._last = state.global_step - self._last, state.global_step
        self._sampled = self.sampler.sampled.copy()
        for name, value in logs.items():
            if name.startswith(SECONDS):
                self._seconds[name.removeprefix(SECONDS)] += value * steps
            elif name.startswith(MEMORY) and name.endswith(PEAK) and name != "memory/load_peak":
                phase = name.removeprefix(MEMORY).removesuffix(PEAK)
                self._peaks[phase] = max(value, self._peaks.get(phase, 0.0))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        totals = self.totals(state.global_step - self._first)
        self.path.write_text(json.dumps(totals, indent=2) + "\n", encoding="utf-8")
        logger.info("%s", totals_line(totals))

    def totals(self, steps: int) -> dict[str, Any]:
        """What totals.json holds: `steps`, `seconds` by phase and in all (`wall`), and of the steps that were logged
        `completions` and `tokens`, `tokens_per_second` while they were sampled (not where they are replayed),
        `peak_gib` with `peak_phase`, and `planned_peak_gib` of the phases that a step goes through, and of checkpoints
        that were followed by another log. On a GPU the peak is without what others held of it when the run was planned.
        """
        found: dict[str, Any] = {"steps": steps, "seconds": {"wall": time.perf_counter() - self._start}}
        if not self._seconds:  # nothing was logged
            return found
        found["seconds"] |= self._seconds
        found |= self._sampled
        if self._seconds["generate"] and self.sampler.replay is None:
            found["tokens_per_second"] = self._sampled["tokens"] / self._seconds["generate"]
        if self._peaks:
            found["peak_phase"] = max(self._peaks, key=self._peaks.get)
            found["peak_gib"] = self._peaks[found["peak_phase"]] - self._held_by_others() / GIB
        if self.plan is not None:
            phases = STEP_PHASES + (("save",) if "save" in self._peaks else ())
            found["planned_peak_gib"] = max(self.plan.total(phase) for phase in phases) / GIB
        return found

    def _held_by_others(self) -> int:
        """Bytes of the GPU that the plan did not find free; without a GPU the peak is this process's own."""
        device = self.sampler.timer.memory.device
        if self.plan is None or device.type == "cpu":
            return 0
        return torch.cuda.mem_get_info(device)[1] - self.plan.available


def totals_line(totals: dict[str, Any]) -> str:
    """Totals in words, the longest phases first."""
    seconds = dict(totals["seconds"])
    wall = seconds.pop("wall")
    line = f"{totals['steps']} steps in {clock(wall)}"
    if not seconds:
        return line
    shares = sorted(((value / wall, name) for name, value in seconds.items()), reverse=True)
    told = [f"{name} {share:.0%}" for share, name in shares if share >= 0.01]
    told.append(f"the rest {1 - sum(seconds.values()) / wall:.0%}")
    line += f": {', '.join(told)}; {totals['completions']} completions, together {totals['tokens']} tokens"
    if "tokens_per_second" in totals:
        line += f", {totals['tokens_per_second']:.0f} a second while sampled"
    if "peak_gib" in totals:
        line += f"; peak {totals['peak_gib']:.2f} GiB ({totals['peak_phase']})"
        if "planned_peak_gib" in totals:
            line += f", planned {totals['planned_peak_gib']:.2f}"
    return line
