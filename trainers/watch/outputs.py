"""The files of a run: folder, logs, resolved configuration, metrics, progress."""

import fcntl
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import psutil
import yaml
from transformers import ProgressCallback, TrainerCallback

from trainers.config import REPO
from trainers.errors import ConfigError, Fault
from trainers.masking import masked
from trainers.options import BaseOptions
from trainers.plan.hardware import num_processes
from trainers.settings.reporting import reporters, wandb_is_offline
from trainers.watch.phases import PhaseTimer

logger = logging.getLogger(__name__)

LIBRARIES = ("vllm", "transformers", "datasets", "trl", "accelerate", "torch", "httpx", "urllib3", "filelock", "fsspec")


def make_output_dir(output_dir: str | None, run: str, num_processes: int = 1, root: Path = REPO) -> Path:
    """Create the folder of a run: the one asked for, or results/<run>/<time> with a `latest` link beside it.

    Raises:
        ConfigError: If the folder cannot be created or written to.
    """
    if output_dir is not None:
        path = Path(output_dir).expanduser().absolute()
        if not output_dir or path.resolve() == root.resolve():
            cause = "the run's files would lie among the project's own"
            raise ConfigError(Fault("output_dir", output_dir, cause, "output_dir=results/<a name>, or leave it out"))
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            cause = f"cannot be written to: {error.strerror}"
            raise ConfigError(Fault("output_dir", output_dir, cause, "name a folder you may write to")) from error
        return path
    base = root / "results" / run
    stamp, count = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(launch_time())), 1
    path = base / stamp
    while num_processes == 1 and path.exists():  # two runs in one second
        count += 1
        path = base / f"{stamp}-{count}"
    path.mkdir(parents=True, exist_ok=True)
    replace_link(base / "latest", path)
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Write a file that takes its name, and the place of an earlier one, when it is whole."""
    if path.exists():
        logger.warning("%s is written anew", path)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def launch_time() -> float:
    """Now; for one of several processes the start of their common launcher, so that all name the same folder."""
    if num_processes() == 1:
        return time.time()
    return psutil.Process(os.getppid()).create_time()


def replace_link(link: Path, target: Path) -> None:
    """Make `link` lead to `target`, without a moment in which it leads nowhere."""
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        fresh.unlink()
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)


class _Quiet(logging.Filter):
    """Libraries speak on the terminal only when something is wrong, or when everything is asked for."""

    def __init__(self, everything: bool = False) -> None:
        super().__init__()
        self.everything = everything

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "only_file", False):  # shown already, above the progress bar
            return False
        if self.everything:
            return True
        if record.name.startswith(("vllm", "py.warnings")):  # vLLM warns of its own defaults at every start
            return record.levelno >= logging.ERROR
        return record.levelno >= logging.WARNING or not record.name.startswith(LIBRARIES)


class RunLog(logging.FileHandler):
    """The log of a run, which no other run writes to meanwhile: the kernel holds the lock, and gives it up with the
    process.

    Raises:
        ConfigError: If another run is writing to this folder.
    """

    def __init__(self, output_dir: Path) -> None:
        super().__init__(output_dir / "training.log", encoding="utf-8")
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            cause, remedy = "another run is writing there", "another folder, or wait until that run has ended"
            raise ConfigError(Fault("output_dir", str(output_dir), cause, remedy)) from error
        except OSError:  # some network file systems know no locks
            logger.warning("%s cannot be locked: a second run into this folder would not be told", self.baseFilename)


def start_logging(output_dir: Path, debug: bool, rank: int = 0, root: Path = REPO) -> None:
    """Send our lines to the terminal, everything to training.log, and lead logs/training.log there.

    Of several processes the first writes the log; the others only speak up when something is wrong.

    Raises:
        ConfigError: If another run is writing to this folder.
    """
    if rank > 0:
        logging.basicConfig(level=logging.WARNING, force=True)
        return
    base = logging.getLogger()
    for handler in list(base.handlers):
        base.removeHandler(handler)
        if isinstance(handler, RunLog):
            handler.close()
    log_file = RunLog(output_dir)
    log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    terminal.addFilter(_Quiet(everything=debug))
    base.setLevel(logging.DEBUG if debug else logging.INFO)
    for handler in (log_file, terminal):
        base.addHandler(handler)
    for name in ("httpx", "urllib3", "filelock", "fsspec", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is used on purpose, at a pinned version
    replace_link(root / "logs" / "training.log", output_dir / "training.log")


@contextmanager
def ending_in_the_log(output_dir: Path) -> Iterator[None]:
    """What stops a run is told in its log too, and an interrupt in a line, with what is left to go on from."""
    try:
        yield
    except KeyboardInterrupt:
        whole = [file.parent for file in output_dir.glob("checkpoint-*/trainer_state.json")]  # written last
        last = max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
        left = "no checkpoint was written" if last is None else f"go on from it with model_name_or_path={last}"
        logger.error("interrupted: %s", left)
        sys.exit(128 + signal.SIGINT)
    except ConfigError as error:
        logger.error("%s", error, extra={"only_file": True})
        raise
    except Exception:
        logger.exception("stopped", extra={"only_file": True})
        raise


class Interrupt(TrainerCallback):
    """Ends a run at its next step where the KeyboardInterrupt of Ctrl-C was lost: it is raised wherever the run is, and
    Python passes over what finalizers raise."""

    def __init__(self) -> None:
        self._came = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        handler = signal.getsignal(signal.SIGINT)
        is_ours = isinstance(getattr(handler, "__self__", None), Interrupt)  # an earlier trainer's
        if is_ours or handler is signal.default_int_handler:  # not where interrupts are ignored
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._came = True
        signal.default_int_handler(number, frame)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._came:
            raise KeyboardInterrupt


def take_over_library_logs() -> None:
    """Let transformers and TRL, once imported, log through our handlers in place of their own."""
    import datasets
    import transformers

    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    datasets.utils.logging.enable_propagation()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def prepare_wandb(options: BaseOptions) -> None:
    """Let wandb log offline where it has no account to log to, rather than fail after the models are loaded.

    It keeps the command line with the run: not one that may hold a secret.
    """
    if "wandb" not in reporters(options):
        return
    if (written := options.model_dump()) != masked(written):
        del sys.argv[1:]
    if wandb_is_offline():
        os.environ["WANDB_MODE"] = "offline"
        logger.warning("wandb: not logged in, so it logs offline (`wandb login`, or `wandb sync` the run afterwards)")


def use_tensorboard_dir(output_dir: Path) -> None:
    """Put tensorboard's files in the run's folder; an evaluation before training would open them elsewhere."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output_dir / "runs")


def save_config(output_dir: Path, composed: dict[str, Any], resolved: dict[str, Any]) -> None:
    """Write config.yaml: every option with the value it has in this run, what was set apart from the defaults, and no
    secrets."""
    defaults = {k: v for k, v in resolved.items() if k not in composed}
    text = "# Set by the run configuration and the command line\n"
    text += yaml.safe_dump(masked({k: resolved[k] for k in composed if k in resolved}), sort_keys=False)
    text += "\n# Defaults\n" + yaml.safe_dump(masked(defaults), sort_keys=True)
    (output_dir / "config.yaml").write_text(text, encoding="utf-8")


class MetricsWriter(TrainerCallback):
    """Appends every logged step to metrics.jsonl, and times each optimizer step."""

    def __init__(self, output_dir: Path, timer: PhaseTimer) -> None:
        self.path, self.timer, self._start = output_dir / "metrics.jsonl", timer, 0.0
        self._has_written = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()
        self.timer.begin("step", "update")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.timer.add("step", time.perf_counter() - self._start)
        if self.timer.memory is not None:
            self.timer.memory.step()
        self.timer.begin("between steps")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            if not self._has_written and self.path.exists():  # an earlier run's: they are kept, beside ours
                self.path.rename(self.path.with_name(f"metrics-{int(self.path.stat().st_mtime)}.jsonl"))
            self._has_written = True
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


# What a progress line shows, where it is there: (metric, short name).
SHOWN = (
    ("loss", "loss"),
    ("mean_token_accuracy", "token accuracy"),
    ("reward", "reward"),
    ("solution_log_prob_reward", "r_SS"),
    ("kl_reward", "-r_KL"),
    ("student_accuracy", "student accuracy"),
    ("completions/mean_length", "length"),
    ("seconds/generate", "generate s"),
    ("seconds/score", "score s"),
    ("seconds/update", "update s"),
)


def progress_line(state: Any, logs: dict[str, Any], seconds_per_step: float) -> str:
    """One line for a terminal or a log: step, headline metrics, time left."""
    shown = _headline(logs)
    left = int(seconds_per_step * (state.max_steps - state.global_step))
    return f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}  eta {left // 60}:{left % 60:02d}"


def _headline(logs: dict[str, Any]) -> list[str]:
    hidden = {"loss"} if "reward" in logs else set()  # GRPO's loss is about 0 by construction and tells nothing
    numbers = ((key, name) for key, name in SHOWN if isinstance(logs.get(key), int | float) and key not in hidden)
    return [f"{name} {logs[key]:.3g}" for key, name in numbers]


class Progress(ProgressCallback):
    """A bar with the time left on a terminal; lines without one. Both show the headline metrics of each log."""

    def __init__(self, is_terminal: bool | None = None) -> None:
        super().__init__()
        self.is_terminal = sys.stdout.isatty() if is_terminal is None else is_terminal
        self._begin = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = (time.perf_counter(), state.global_step)
        if self.is_terminal:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_terminal:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_terminal:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        held_out = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
        if {"reward", "loss"} & set(logs):
            began, first = self._begin
            done = state.global_step - first
            line = progress_line(state, logs, (time.perf_counter() - began) / done if done else 0.0)
        elif shown := _headline(held_out):
            line = f"held out, after step {state.global_step}:  {'  '.join(shown)}"
        else:
            return
        if self.training_bar is not None:
            self.training_bar.write(line)
            logger.info(line, extra={"only_file": True})
        else:
            logger.info(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_terminal:
            super().on_train_end(args, state, control, **kwargs)
