"""Every run of cfgs/run_cfg is planned, and what is written of presets is so. Run: ./run_tests.sh tests/test_presets.py

Where a figure is wrong, the assertion shows the line as it should be.
"""

import re
from functools import cache

import pytest
from conftest import REPO
from planned import host_and_disk, machine, planned, problem

from trainers.checks import load_options
from trainers.config import CONFIG_DIR, compose_run
from trainers.plan.machine import Machine
from trainers.plan.solve import SPARE, solve
from trainers.plan.workload import GIB, PHASES

RUNS = sorted(path.stem for path in (CONFIG_DIR / "run_cfg").glob("*.yaml"))
CARDS = [run for run in RUNS if run.startswith("teacher_rlt_mono")]
SIZES = [12, 16, 24, 32, 40, 48, 80, 96]  # GB of the cards that are sold
READ_ONLY = {"rescore", "merge"}  # they compute with no model on a device: nothing is planned (tests/test_config.py)
SCORED = ["dataset_id_or_path=some/data", "model_name_or_path=Qwen/Qwen2.5-7B-Instruct"]
SCORED += ["student_model=bespokelabs/Bespoke-Stratos-7B"]


@cache
def preset(run):
    """Its solved plan, and its words for what it trains, as files and tables have them."""
    plan, options = planned(run)
    sizes = [re.search(r"-([\d.]+B)", name)[1] for name in (options.model_name_or_path, options.student_model)]
    return plan, options, *sizes, "LoRA" if options.use_peft else "all weights"


@pytest.mark.parametrize("run", CARDS)
def test_every_preset_fits_its_card_with_8_percent_to_spare(run):
    plan = preset(run)[0]
    assert plan.peak <= 0.92 * plan.available
    assert set(plan.phases) == set(PHASES)


def test_there_is_a_preset_for_each_card():
    sizes = {compose_run(run)["vram_gb"] for run in CARDS}
    assert sizes == {12, 16, 24, 40, 48, 80, 85, 96}


@pytest.mark.parametrize("run", CARDS)
def test_header_of_a_preset_tells_what_is_composed_and_planned(run):
    """What the file says is what the plan says: nobody has to remember to write it anew."""
    plan, asked, size, _, method = preset(run)
    o = plan.options
    trained = f"LoRA of rank {o.lora_r}" if o.use_peft else "all weights"
    reference = "the model before RL is the reference" if o.use_peft else f"reference {o.reference_mode}"
    assert o.beta == 0.04  # there is one
    teacher, student = (name.rpartition("/")[2] for name in (o.model_name_or_path, o.student_model))
    questions = o.train_batch_size // o.num_generations
    phases = ", ".join(f"{phase} {plan.total(phase) / GIB:.1f}" for phase in PHASES)
    title = f"a {size} teacher with LoRA" if o.use_peft else f"a {size} teacher, {method},"
    assert (CONFIG_DIR / "run_cfg" / f"{run}.yaml").read_text().splitlines()[1:6] == [
        f"# RL of {title} on a card of {asked.vram_gb:g} GB:  ./launch_mono.sh {run}.yaml",
        f"# Teacher {teacher}, {trained}; student {student}, {o.student_mode}; {reference}.",
        f"# Prompts of {o.max_prompt_length} tokens, completions of {o.max_completion_length}; {questions} questions x "
        f"{o.num_generations} completions a step, {o.per_device_train_batch_size} at a time; {o.optim}.",
        f"# Planned GiB: {phases}.",
        "# Host memory {} GiB, disk {} GiB.".format(*host_and_disk(plan)),
    ]


@pytest.mark.parametrize("run", CARDS)
def test_table_of_presets_tells_what_is_composed_and_planned(run):
    plan, asked, teacher, student, method = preset(run)
    o = plan.options
    rows = (REPO / "README_MONO_GPU.md").read_text().splitlines()
    (row,) = (line for line in rows if line.startswith(f"| `{run}`"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        f"`{run}`" if run.endswith("gb") else f"`{run}` ({asked.vram_gb:g} GB)",
        f"{teacher}, {method}",
        student,
        f"{o.max_prompt_length}, {o.max_completion_length}",
        f"{o.train_batch_size // o.num_generations} x {o.num_generations}",
        f"{plan.peak / GIB:.1f} of {plan.available / GIB:.1f} ({plan.peak_phase})",
        "{}, {}".format(*host_and_disk(plan)),
    ]


def smallest_card(model, *overrides):
    """The cell of the table of sizes: the first card with 8 % to spare."""
    pair = (f"model_name_or_path={model}", f"student_model={model}")
    for size in SIZES:
        plan = planned("teacher_rlt_mono", *pair, *overrides, gb=size)[0]
        if plan.peak <= 0.92 * plan.available:
            return f"{size} GB (host {host_and_disk(plan)[0]})"
    return "none"


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "3B", "7B", "14B", "32B"])
def test_table_of_sizes_tells_what_is_planned(size):
    text = (REPO / "README_MONO_GPU.md").read_text()
    (lora,) = set(re.findall(r"with LoRA: `(use_peft=true .*)`", text))
    ways = [lora.split(), [], ["weight_bridge=copy"]]
    cells = [smallest_card(f"Qwen/Qwen2.5-{size}-Instruct", *way) for way in ways]
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {size} "))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [size, *cells]


def test_readme_tells_of_each_card_what_is_composed_and_planned():
    text = (REPO / "README.md").read_text()
    told = []
    for row in re.findall(r"^\| ([\d, ]+ GB) \| (.*) \| (.*) \| (\d+) GiB.*\|$", text, re.M):
        names = [f"teacher_rlt_mono{name}" for name in re.findall(r"`(?:teacher_rlt_mono)?(\w*)`", row[1])]
        presets = [preset(name) for name in names]
        told += names
        assert row[0] == f"{', '.join(f'{asked.vram_gb:g}' for _, asked, *_ in presets)} GB"
        for each, _, teacher, student, method in presets:
            assert teacher == student and row[2].startswith(f"{teacher}, {method}")
            assert ("the optimizer in host memory" in row[2]) == (each.options.optim == "cpu_offload")
        assert int(row[3]) == max(host_and_disk(each)[0] for each, *_ in presets)
        lengths = {each.options.max_prompt_length + each.options.max_completion_length for each, *_ in presets}
        assert ("longer texts" in row[2]) == (min(lengths) > 2048 + 4096)
    assert sorted(told) == CARDS
    plan = preset("teacher_rlt_mono_24gb")[0]
    assert f"planned peak of RL about {plan.peak / GIB:.0f} of {plan.available / GIB:.1f} GiB" in text
    ((words, taken),) = re.findall(r"`teacher_rlt_mono (use_peft=true [^`]*)` takes (\d+) GiB", text)
    assert host_and_disk(planned("teacher_rlt_mono", *words.split())[0])[0] == int(taken)
    weights = [2 * shape.num_parameters for shape in (plan.work.teacher, plan.work.student)]
    downloads = f"downloads {sum(weights) / GIB:.0f} GiB and takes {host_and_disk(plan)[0]} GiB of host memory"
    assert downloads in " ".join(text.split())
    each = f"({weights[0] / GIB:.1f} GiB for each of 7B)"
    assert each in " ".join((REPO / "README_MONO_GPU.md").read_text().split())


def test_what_docs_tell_of_a_run_that_does_not_fit_is_planned():
    text = (REPO / "docs" / "memory.md").read_text()
    needed, left = re.search(r"the update phase needs ([\d.]+) GiB[\s\S]*\(peak ([\d.]+) GiB\); ignore", text).groups()
    asked, solved = (planned("teacher_rlt_mono", f"per_device_train_batch_size={n}")[0] for n in (8, "auto"))
    assert (f"{asked.peak / GIB:.1f}", f"{solved.peak / GIB:.1f}") == (needed, left)


@pytest.mark.parametrize("run", sorted(set(RUNS) - set(CARDS) - READ_ONLY))
def test_every_other_run_that_computes_with_models_is_planned(run):
    options = load_options(compose_run(run, SCORED if run == "score" else []), repo=REPO, needs_device=False)
    card = machine(getattr(options, "vram_gb", None) or 80)
    there = Machine(None, 8 * GIB, 8 * GIB, 100 * GIB) if options.device == "cpu" else card
    plan = solve(problem(options, there, longest=8192 if run == "score" else None))
    assert plan.fits and (options.device == "cpu" or plan.spare >= SPARE)
    phases = {"rl": set(PHASES), "sft": {"load", "update", "save"}, "score": {"load", "score"}}
    assert set(plan.phases) == phases[options.stage]
