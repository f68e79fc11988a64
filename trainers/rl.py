"""The RL stage: wires data, models, engine, student and trainer, and reports what training changed."""

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig

from data.render import Renderer
from trainers.config import named_run
from trainers.engine import Engine
from trainers.engine_setup import check_architecture
from trainers.errors import ConfigError, Fault
from trainers.merge import whole_model
from trainers.models import resolve_place
from trainers.options import RLOptions, trl_arguments
from trainers.plan.workload import Plan
from trainers.rollout.sampler import RolloutSampler
from trainers.rollout.sentinel import Sentinel
from trainers.scoring.explanation_scorer import ExplanationScorer
from trainers.scoring.frozen import FrozenModel
from trainers.scoring.loading import check_models, load_frozen, make_renderer, make_scorer
from trainers.scoring.probes import Probes
from trainers.scoring.quantized import samples_of
from trainers.scoring.reward_funcs import StudentReward, make_reward_funcs, own_functions
from trainers.settings.batch import batch_plan
from trainers.settings.engine_specs import has_engine
from trainers.settings.evaluation import scores_probes
from trainers.settings.reward_specs import reward_names, uses_student
from trainers.settings.trl_config import precision_arguments, tell_length
from trainers.teacher_grpo import TeacherGRPOTrainer
from trainers.texts import check_enough, load_train_and_eval_rows, rl_rows, show_sample, tell_whole_questions
from trainers.warmup_runs import ensure_model
from trainers.watch.health import HealthWatch
from trainers.watch.heartbeat import heartbeat
from trainers.watch.memory_watch import MemoryWatch
from trainers.watch.out_of_memory import out_of_memory_told
from trainers.watch.outputs import Interrupt, MetricsWriter, Progress, use_tensorboard_dir
from trainers.watch.phases import PhaseTimer
from trainers.watch.result import write_result
from trainers.watch.totals import Totals
from trainers.weights.adapter_files import base_of
from trainers.weights.model_card import write_model_card
from trainers.weights.starts import load_teacher, resolve_start

logger = logging.getLogger(__name__)


def run_rl(options: RLOptions, output_dir: Path, plan: Plan | None = None) -> None:
    """Train the teacher, and save it with its tokenizer and template to `output_dir`.

    Args:
        options: With every `auto` decided.
        plan: Of its memory: what the run takes is told beside it.
    """
    logger.info("batch: %s", batch_plan(options).equation())
    tell_length(options)
    device, dtype = resolve_place(options)
    arguments = grpo_config(options, output_dir, dtype)
    own = own_functions(options)
    rows, eval_rows = load_train_and_eval_rows(options)
    check_models(options)
    refuse_architecture(options, options.model_name_or_path, device, dtype)
    start = resolve_start(options, ensure_model(options.model_name_or_path, options), output_dir, dtype)
    teacher = make_renderer(options, start.tokenizer, "model_name_or_path")
    student = resolve_student(options, output_dir, dtype) if uses_student(options) else None
    train_set = rl_rows(rows, teacher, options, "training questions")
    check_enough(train_set, options)
    if student is not None:
        tell_whole_questions(train_set, student[1], options)
    eval_set = None if eval_rows is None else rl_rows(eval_rows, teacher, options, "held-out questions")
    show_sample("first teacher prompt", teacher.teacher(train_set[0]["question"], train_set[0]["solution"])[:2])

    use_tensorboard_dir(output_dir)
    if named_run(options.model_name_or_path):
        refuse_architecture(options, start.path, device, dtype)
    timer = PhaseTimer(MemoryWatch(device))  # before anything is on the device
    with heartbeat(timer, output_dir), out_of_memory_told(timer, device, plan, output_dir):
        model = load_teacher(options, start.path, dtype, start.adapter)
        # First on the device: the weights go straight to where the engine keeps them.
        sampler = make_sampler(options, model, teacher, start.path, train_set[0]["prompt"], dtype, output_dir, timer)
        with sampler.stopped_at_the_end():
            if student is None:
                student_reward = None
                logger.info("no reward function asks the student: none is loaded")
            else:
                scorer = make_scorer(options, output_dir, *student, teacher, device, dtype, samples_of(rows))
                student_reward = make_student_reward(options, scorer, device)
                sampler.ahead = student_reward.ahead
            watches = [Progress(), HealthWatch(options), Totals(sampler, output_dir, plan)]
            trainer = TeacherGRPOTrainer(
                options=options,
                sampler=sampler,
                timer=timer,
                model=model,
                reward_funcs=make_reward_funcs(options, teacher, student_reward, own),
                args=arguments,
                reference=load_reference(options, arguments, start.path, device, dtype),
                probes=make_probes(options, student_reward),
                student_reward=student_reward,
                train_dataset=train_set,
                eval_dataset=eval_set,
                processing_class=teacher.tokenizer,
                callbacks=[MetricsWriter(output_dir, timer), Interrupt(), *watches],
            )
            timer.memory.note("load")
            train_and_report(trainer, options, output_dir)


def resolve_student(options: RLOptions, output_dir: Path, dtype: torch.dtype) -> tuple[str, Renderer]:
    """The folder or hub id of the student, trained and merged where that is to be done, and its texts."""
    path = ensure_model(options.student_model, options)
    path = whole_model(options, "student_model", path, output_dir, dtype)
    return path, make_renderer(options, path, "student_model")


def refuse_architecture(options: RLOptions, path: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a teacher that the engine has no class for, before anything is trained or loaded; one that a warm-up makes
    is looked at when it is there."""
    if has_engine(options) and not named_run(path):
        check_architecture(options, base_of(path, "model_name_or_path"), device, dtype)


def load_reference(
    options: RLOptions, arguments: GRPOConfig, path: str, device: torch.device, dtype: torch.dtype
) -> FrozenModel | None:
    """The teacher as it was, where `beta` asks for it and it is not the model without its adapters."""
    if not arguments.beta or options.use_peft:
        return None
    key, sync = "model_name_or_path", arguments.sync_ref_model
    return load_frozen(options, path, key, device, dtype, arguments.temperature, writable=sync)


def train_and_report(trainer: TeacherGRPOTrainer, options: RLOptions, output_dir: Path) -> None:
    """Train, save, and tell what changed where that is asked for."""
    trainer.remove_callback(PrinterCallback)
    before = None
    if options.report_before_after:
        logger.info("explaining %d held-out questions before training, and again after it", len(trainer.eval_dataset))
        before = trainer.evaluate()
        check_best_metric(options, before)
    trainer.train()
    trainer.save_model(str(output_dir))
    write_model_card(output_dir, options, trainer.sampler.renderer.end_ids)
    trainer.weights_changed()  # load_best_model_at_end loads others after the last step
    if before is None:
        trainer.sampler.check_last_update()
    else:
        write_result(output_dir, before, trainer.evaluate(), len(trainer.eval_dataset), reward_names(options))


def check_best_metric(options: RLOptions, evaluated: Mapping[str, float]) -> None:
    """See that the metric which is to tell the best checkpoint is one that evaluations have.

    Raises:
        ConfigError: With the names that there are.
    """
    asked, names = options.metric_for_best_model, [name.removeprefix("eval_") for name in evaluated]
    if (options.load_best_model_at_end or options.save_strategy == "best") and asked.removeprefix("eval_") not in names:
        near = difflib.get_close_matches(asked, names, n=2)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"one of: {', '.join(sorted(names))}"
        raise ConfigError(Fault("metric_for_best_model", asked, "evaluations have no such metric", remedy))


def make_student_reward(options: RLOptions, scorer: ExplanationScorer, device: torch.device) -> StudentReward:
    """The student's rewards, of groups as they are finished where that is asked for."""
    return StudentReward(scorer, device if options.overlap_scoring else None)


def make_probes(options: RLOptions, student_reward: StudentReward | None) -> Probes | None:
    """What every evaluation scores beside the teacher's explanations, where that is asked for."""
    if student_reward is None or not scores_probes(options):
        return None
    return Probes(student_reward.scorer, options.num_probes, options.student_tokens_per_pass, options.max_prompt_length)


def make_sampler(
    options: RLOptions,
    model: Any,
    teacher: Renderer,
    path: str,
    prompt: str,
    dtype: torch.dtype,
    output_dir: Path,
    timer: PhaseTimer,
) -> RolloutSampler:
    """What samples, with the engine and its watch where there is one.

    Args:
        path: Of the teacher's weights.
        prompt: Whose beginning engine and trainer are compared on.
        timer: With a watch of the memory of the device that is trained on.
    """
    if not has_engine(options):
        return RolloutSampler(options, teacher, timer)
    engine = start_engine(options, model, teacher, path, timer.memory.device, dtype, output_dir)
    sentinel = Sentinel(engine, model, teacher.encode_prompt(prompt), dtype, options.sentinel_tolerance)
    return RolloutSampler(options, teacher, timer, engine, sentinel)


def start_engine(
    options: RLOptions,
    model: Any,
    teacher: Renderer,
    path: str,
    device: torch.device,
    dtype: torch.dtype,
    output_dir: Path,
) -> Engine:
    """Start vLLM on the teacher's weights."""
    tag = teacher.tags.explanation[1] if options.stop_at_closing_tag else None
    tag_ids = teacher.encode_text(tag) if tag else None
    tokenizer_path = teacher.tokenizer.name_or_path or path
    return Engine(model, path, options, device, dtype, list(teacher.end_ids), tag, tag_ids, output_dir, tokenizer_path)


def grpo_config(options: RLOptions, output_dir: Path, dtype: torch.dtype) -> GRPOConfig:
    """TRL's arguments for these options; its own checks run here, before a model is loaded.

    Raises:
        ConfigError: If TRL refuses a value.
    """
    plan = batch_plan(options)
    if options.sync_ref_model and options.use_peft and options.beta:
        logger.warning("sync_ref_model=true is not read: with adapters the reference is what they start from")
    derived = {
        "output_dir": str(output_dir),
        "seed": options.seed,
        "gradient_accumulation_steps": plan.accumulation,
        "steps_per_generation": plan.aggregation,
        "remove_unused_columns": False,  # the reward reads question and solution
        "use_vllm": False,  # TeacherGRPOTrainer brings its own engine
        # With adapters the reference is the teacher without them (or with those it started from), and stays that.
        "sync_ref_model": options.sync_ref_model and not options.use_peft,
        "disable_tqdm": True,  # our own Progress takes its place
        "trust_remote_code": options.trust_remote_code,
    }
    try:
        return GRPOConfig(**(trl_arguments(options, "grpo") | precision_arguments(options, dtype) | derived))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(Fault("TRL's GRPOConfig", ..., str(error), "correct the option it names")) from error
