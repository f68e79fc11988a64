"""Generation with transformers, where there is to be no vLLM."""

from itertools import chain
from typing import Any

import torch
from trl.trainer.utils import pad

from data.explanation import read_explanation
from data.render import Renderer
from trainers.models import evaluating
from trainers.rollout.rollouts import Ended, Rollout, request_seed


def generate_with_transformers(
    trainer: Any, renderer: Renderer, prompt_ids: list[list[int]], number: int, given: int
) -> Rollout:
    """Sample one completion for each prompt with TRL's call of `model.generate`.

    The whole batch has one seed: unlike with vLLM, a completion depends on what else is in its batch.

    Args:
        trainer: A `TeacherGRPOTrainer` with `use_vllm=false`.
        renderer: The teacher's template and tokenizer.
        prompt_ids: Token ids, with a prompt repeated for each completion wanted of it.
        number: Of the rollout, for the seed.
        given: How many tokens at the end of each prompt to give the log-probabilities of, too.
    """
    end_ids, tag = set(renderer.end_ids), renderer.tags.explanation[1]
    stop = trainer.options.stop_at_closing_tag
    tag_ids = renderer.encode_text(tag)
    if stop and len(tag_ids) == 1:
        trainer.generation_config.eos_token_id = [*renderer.end_ids, *tag_ids]
    # As an engine samples, which knows no dropout: TRL would sample from one random policy and score by another.
    with evaluating(trainer.model):
        with torch.random.fork_rng():
            torch.manual_seed(request_seed(trainer.options.seed, number, tuple(chain(*prompt_ids))))
            sampled, _ = trainer._generate_single_turn(prompt_ids, None, {}, trainer.num_generations)
        cut = [_cut(renderer, ids, tag if stop else None, end_ids) for ids in sampled]
        completions, ended = [ids for ids, _ in cut], [end for _, end in cut]
        rows = _logprobs(trainer, prompt_ids, completions, given)
    return Rollout(prompt_ids, completions, [row[given:] for row in rows], [row[:given] for row in rows], ended)


def _cut(renderer: Renderer, ids: list[int], tag: str | None, end_ids: set[int]) -> tuple[list[int], Ended]:
    """Leave out what follows the closing tag, and say what ended the completion."""
    if tag is not None and (found := read_explanation(renderer.tokenizer, ids, tag, end_ids)).closed:
        count = len(found.ids)
        while count < len(ids) and tag not in renderer.tokenizer.decode(ids[:count], skip_special_tokens=False):
            count += 1
        return ids[:count], "closing_tag"
    return ids, "eos" if ids[-1] in end_ids else "length"


@torch.no_grad()
def _logprobs(trainer: Any, prompts: list[list[int]], completions: list[list[int]], given: int) -> list[list[float]]:
    """Log-probabilities, at the sampling temperature, of each prompt's last `given` tokens and its completion."""
    device, fill = trainer.accelerator.device, trainer.processing_class.pad_token_id

    def padded(rows: list[list[int]], side: str, value: int | None) -> torch.Tensor:
        tensors = [torch.tensor(row) if value is None else torch.ones(len(row), dtype=torch.long) for row in rows]
        return pad(tensors, padding_value=fill if value is None else 0, padding_side=side).to(device)

    ids = torch.cat([padded(prompts, "left", None), padded(completions, "right", None)], dim=1)
    mask = torch.cat([padded(prompts, "left", 1), padded(completions, "right", 1)], dim=1)
    keep = given + max(map(len, completions))
    batch_size = trainer.args.per_device_train_batch_size
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep, batch_size=batch_size)
    return [row[: given + len(c)].tolist() for row, c in zip(logps.float().cpu(), completions, strict=True)]
