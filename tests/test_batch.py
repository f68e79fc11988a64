"""The batch equation. Run: ./run_tests.sh tests/test_batch.py"""

import pytest

from trainers.options import options_class
from trainers.settings.batch import BatchPlan, check_batch, legal_aggregations, micro_batch_choices, nearest_legal


def test_equation_of_the_paper_s_run():
    # 1024 completions = 16 questions x 64; one per device on 8 devices = 128 accumulation steps.
    plan = BatchPlan(1024, 1, 64, 64, devices=8)
    assert plan.accumulation == 128
    assert plan.generation_batch == 512
    assert plan.is_legal
    assert "1024 completions per step = 16 questions x 64 generations" in plan.equation()


@pytest.mark.parametrize(
    ("batch", "per_device", "group", "founding"), [(96, 3, 24, 3), (128, 4, 32, 4), (64, 2, 16, 3)]
)
def test_founding_presets_are_illegal_and_the_nearest_legal_aggregation_is_8(batch, per_device, group, founding):
    assert not BatchPlan(batch, per_device, group, founding).is_legal
    assert legal_aggregations(batch, per_device, group, 1) == [8, 16, 32]
    (fault,) = check_batch(BatchPlan(batch, per_device, group, founding))
    assert f"generation_aggregation_steps={8}" in fault.remedy
    assert f"train_batch_size={batch} " in fault.remedy


@pytest.mark.parametrize("plan", [(10, 4, 8, 1), (7, 3, 2, 2), (1, 1, 8, 1), (100, 7, 6, 5), (33, 32, 16, 3)])
def test_nearest_plan_is_legal_and_keeps_the_group(plan):
    near = nearest_legal(BatchPlan(*plan))
    assert near.is_legal
    assert near.num_generations == plan[2]


def test_legal_plan_has_no_fault():
    assert check_batch(BatchPlan(32, 8, 8, 1)) == []


def test_no_micro_batch_is_chosen_by_which_a_step_would_have_samples_several_times():
    batch = {"stage": "rl", "train_batch_size": 64, "num_generations": 8, "per_device_train_batch_size": "auto"}
    options = options_class("rl")(**batch, generation_aggregation_steps=8, num_iterations=2)
    assert micro_batch_choices(options, 1) == [8]  # a rollout of 8 x 8 is the whole step
    once = options.model_copy(update={"num_iterations": 1})
    assert micro_batch_choices(once, 1) == [8, 4, 2, 1]
