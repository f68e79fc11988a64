"""The batch equation of GRPO: what an optimizer step, a micro-batch and a generation batch hold.

    train_batch_size = per_device_train_batch_size x gradient_accumulation_steps x devices     (completions per step)
    generation batch = per_device_train_batch_size x generation_aggregation_steps x devices    (completions at once)

Each generation batch must hold whole groups of num_generations completions, and each optimizer step whole generation
batches. Other projects check this late and name one divisor; `nearest_legal` offers settings to paste.
"""

from dataclasses import dataclass

from trainers.errors import Fault
from trainers.options import RLOptions


@dataclass(frozen=True)
class BatchPlan:
    """Sizes in completions; `questions` counts distinct questions per optimizer step."""

    train_batch_size: int
    per_device: int
    num_generations: int
    aggregation: int
    devices: int = 1

    @property
    def accumulation(self) -> int:
        return self.train_batch_size // (self.per_device * self.devices)

    @property
    def generation_batch(self) -> int:
        return self.per_device * self.aggregation * self.devices

    @property
    def is_legal(self) -> bool:
        return (
            self.train_batch_size % (self.per_device * self.devices) == 0
            and self.accumulation % self.aggregation == 0
            and self.generation_batch % self.num_generations == 0
        )

    def prompts_at_once(self, together: bool) -> int:
        """Distinct prompts that a micro-batch holds at most.

        Args:
            together: Whether the completions of a prompt stand one after the other (`keeps_groups_together`).
        """
        own, group = self.per_device * self.aggregation, self.num_generations
        if not together or own % group:  # of several devices each may have parts of groups
            return min(self.per_device, -(-self.generation_batch // group))
        starts = range(0, own, self.per_device)
        return max((start + self.per_device - 1) // group - start // group + 1 for start in starts)

    def equation(self) -> str:
        """The plan as one line for the start of a run."""
        return (
            f"{self.train_batch_size} completions per step = {self.train_batch_size // self.num_generations} questions "
            f"x {self.num_generations} generations = {self.per_device} per device x {self.accumulation} accumulation "
            f"steps x {self.devices} device(s); {self.generation_batch} generated at once "
            f"({self.aggregation} micro-batches)"
        )


def batch_plan(options: RLOptions, num_devices: int = 1) -> BatchPlan:
    """The batch equation of an RL run; aggregation defaults to a whole optimizer step.

    Where the plan of memory has yet to decide the micro-batch, it is taken to be 1.
    """
    per_device = 1 if options.per_device_train_batch_size == "auto" else options.per_device_train_batch_size
    whole_step = max(1, options.train_batch_size // (per_device * num_devices))
    aggregation = options.generation_aggregation_steps or whole_step
    return BatchPlan(options.train_batch_size, per_device, options.num_generations, aggregation, num_devices)


def keeps_groups_together(options: RLOptions) -> bool:
    """Whether the completions of a prompt come into one micro-batch, as far as they go, so that it is read once.

    A rollout is always for one optimizer step, in which the order of rows says nothing; unless the loss has a mean, or
    a quantile, of each micro-batch's tokens: what it holds is left to chance then.
    """
    of_entropies = options.top_entropy_quantile < 1 or options.entropy_coef != 0 or options.use_adaptive_entropy
    return options.share_prompts and options.loss_type != "bnpo" and not of_entropies


def legal_aggregations(batch: int, per_device: int, generations: int, devices: int) -> list[int]:
    """Every generation_aggregation_steps that is legal with the other values."""
    largest = batch // (per_device * devices)
    return [a for a in range(1, largest + 1) if BatchPlan(batch, per_device, generations, a, devices).is_legal]


def micro_batch_choices(options: RLOptions, devices: int) -> list[int]:
    """Every micro-batch that is legal with the other options, the largest first."""
    batch = options.train_batch_size // devices
    divisors = [n for n in range(batch, 0, -1) if options.train_batch_size % (n * devices) == 0]
    if options.stage != "rl":
        return divisors
    generations, aggregation = options.num_generations, options.generation_aggregation_steps
    plans = [BatchPlan(options.train_batch_size, n, generations, aggregation or batch // n, devices) for n in divisors]
    legal = [plan for plan in plans if plan.is_legal and not _repeats(options, plan)]
    return [plan.per_device for plan in legal]


def nearest_legal(plan: BatchPlan) -> BatchPlan:
    """Return the legal plan that changes least, in this order: aggregation, micro-batch, batch size.

    The group size is never changed: it is part of the method, not of the machine.
    """

    def closest_aggregation(batch: int, per_device: int) -> BatchPlan | None:
        legal = legal_aggregations(batch, per_device, plan.num_generations, plan.devices)
        if not legal:
            return None
        best = min(legal, key=lambda a: (abs(a - plan.aggregation), a))
        return BatchPlan(batch, per_device, plan.num_generations, best, plan.devices)

    found = closest_aggregation(plan.train_batch_size, plan.per_device)
    if found:
        return found
    smaller_first = sorted(range(1, plan.train_batch_size + 1), key=lambda p: (abs(p - plan.per_device), p))
    for per_device in smaller_first:
        found = closest_aggregation(plan.train_batch_size, per_device)
        if found:
            return found
    # No micro-batch divides this batch into whole groups: take the nearest multiple that one does.
    unit = plan.num_generations * plan.devices
    batch = max(1, round(plan.train_batch_size / unit)) * unit
    return nearest_legal(BatchPlan(batch, plan.per_device, plan.num_generations, plan.aggregation, plan.devices))


def _repeats(options: RLOptions, plan: BatchPlan) -> bool:
    """Whether iterations go over rollouts smaller than an optimizer step, which has each sample several times."""
    return options.num_iterations > 1 and plan.aggregation < plan.accumulation


def iteration_faults(options: RLOptions, num_devices: int) -> list[Fault]:
    """A step that would have samples several times; where the micro-batch is yet to be decided, none is chosen by which
    it would."""
    if not _repeats(options, batch_plan(options, num_devices)):
        return []
    cause = f"with num_iterations={options.num_iterations} a step would take each of its samples so often"
    remedy = "generation_aggregation_steps=null (a whole step), or num_iterations=1"
    return [Fault("generation_aggregation_steps", options.generation_aggregation_steps, cause, remedy)]


def check_batch(plan: BatchPlan) -> list[Fault]:
    """Return a fault with the nearest legal values, or nothing."""
    if plan.is_legal:
        return []
    if plan.train_batch_size % (plan.per_device * plan.devices):
        cause = f"train_batch_size {plan.train_batch_size} is no multiple of {plan.per_device} per device"
    elif plan.accumulation % plan.aggregation:
        cause = f"{plan.accumulation} accumulation steps are no multiple of {plan.aggregation} aggregation steps"
    else:
        cause = (
            f"a generation batch of {plan.per_device} per device x {plan.aggregation} = {plan.generation_batch} "
            f"holds no whole groups of {plan.num_generations}"
        )
    near = nearest_legal(plan)
    others = legal_aggregations(near.train_batch_size, near.per_device, near.num_generations, near.devices)
    remedy = (
        f"train_batch_size={near.train_batch_size} per_device_train_batch_size={near.per_device} "
        f"num_generations={near.num_generations} generation_aggregation_steps={near.aggregation}"
        f"   (legal generation_aggregation_steps: {', '.join(map(str, others))})"
    )
    return [Fault("generation_aggregation_steps", plan.aggregation, cause, remedy)]
