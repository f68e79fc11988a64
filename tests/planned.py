"""Plans of runs for machines that are made up."""

import math

from conftest import REPO

from trainers.checks import load_options
from trainers.config import compose_run
from trainers.plan.machine import Machine, planned_card
from trainers.plan.remedies import nearest_fit
from trainers.plan.run_models import shapes_of
from trainers.plan.solve import Problem, solve
from trainers.plan.workload import GIB


def machine(gb):
    return Machine(planned_card(gb), 256 * GIB, 256 * GIB, 1000 * GIB)


def problem(options, there, **further):
    return Problem(options, *shapes_of(options), there, **further)


def planned(run, *overrides, gb=None):
    options = load_options(compose_run(run, list(overrides)), repo=REPO, needs_device=False)
    return solve(problem(options, machine(gb or options.vram_gb))), options


def nearest(run, *overrides, gb):
    options = load_options(compose_run(run, list(overrides)), repo=REPO, needs_device=False)
    return nearest_fit(problem(options, machine(gb)))


def host_and_disk(plan):
    """Whole GiB, as presets and README_MONO_GPU.md tell them: a disk is never said to need less than it does."""
    return round(plan.host_need / GIB), math.ceil(sum(plan.disk.values()) / GIB)
