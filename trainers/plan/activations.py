"""What a model's layers take while they compute: in the update, and where a model only reads.

Measured with the allocator of torch (tests/test_activations.py), as lines in the widths of a layer.
"""

from trainers.plan.model_shapes import ModelShape
from trainers.plan.workload import Workload

# Bytes that one token keeps, or needs at the peak of the backward pass, in a layer: so many per element of the layer's
# inner width, of its hidden width, of its queries, and of the attention mask's row, where there is one, and keys and
# values are repeated for each head. By the weights' itemsize; `peak`
# while the layer is differentiated, `kept` where nothing is computed again (no gradient checkpointing).
LAYER_PEAK = {4: (24, 27.7, 16.2, 5.5), 2: (12, 20.7, 8.2, 3.3)}
LAYER_KEPT = {4: (16, 24, 20), 2: (8, 16, 10)}
# What the backward pass of a product of bf16 has beside it, for the inner width, on a CPU that has no such product.
WITHOUT_BF16 = 2.2
# With adapters, whose inputs are cast to fp32 and back; the last is for each rank.
LORA_PEAK = {4: (24, 19.7, 16.2, 5.5, 24), 2: (14, 29.7, 10.2, 3.3, 28.5)}
LORA_KEPT = {4: (16, 17, 20, 21), 2: (8, 19.5, 11, 18)}
# What other families add at the peak, for the hidden width and for queries and keys: further norms, and casts around
# them. With adapters the norms are frozen.
FAMILY_PEAK = {
    "qwen3": {4: (0, 8), 2: (0, 6)},
    "phi3": {4: (0, 6), 2: (0, 3)},
    "gemma2": {4: (16, 0), 2: (24, 0)},
    "gemma3_text": {4: (16, 8), 2: (24, 7)},
}
FAMILY_LORA_PEAK = {
    "qwen3": {4: (0, 4), 2: (0, 4)},
    "phi3": {4: (0, 6), 2: (0, 3)},
    "gemma2": {4: (12, 0), 2: (12, 0)},
    "gemma3_text": {4: (12, 4), 2: (12, 4)},
}
# And to what is kept.
FAMILY_KEPT = {
    "qwen3": {4: (0, 8), 2: (0, 6)},
    "phi3": {4: (0, 6), 2: (0, 3)},
    "gemma2": {4: (16, 0), 2: (20, 0)},
    "gemma3_text": {4: (16, 8), 2: (20, 8)},
}
FAMILY_LORA_KEPT = {
    "qwen3": {4: (0, 4), 2: (0, 4)},
    "phi3": {4: (0, 6), 2: (0, -1.5)},
    "gemma2": {4: (8, 0), 2: (8, 0)},
    "gemma3_text": {4: (8, 4), 2: (8, 4)},
}
# Eager attention (transformers' eager_attention_forward): bytes of each score of each head where nothing is kept, at
# the peak of its backward pass, and kept for that; and what else a token takes at that peak for its hidden width, with
# adapters for each rank too. Families' norms count less there than in the whole layer.
EAGER_SCORES = {4: (8, 12, 4), 2: (10, 12, 6)}
EAGER_PEAK = {4: 28.5, 2: 18.3}
EAGER_LORA_PEAK = {4: (25, 12), 2: (20.6, 9)}
EAGER_FAMILY = 12
# What activation_offloading leaves on the device (TRL's OffloadActivations): the last five tensors that were saved, and
# each that is saved again while it is one of these. Of layers' inputs (gradient checkpointing) five are there at the
# end with adapters; a last norm that is trained saves more beside them, and two are.
STASHED_INPUTS = {True: 5, False: 2}
HEAD_TOKENS, HEAD_WIDTH = 4096, 32768  # a tile of TRL's fused head, in positions and vocabulary entries
# Bytes beside each entry of a tile where there is no kernel for it (on a CPU): of the forward pass (12 of an
# explanation; 13.5 of a solution, which may fill a tile or not), of the backward.
TILE_FORWARD, TILE_BACKWARD = 12.6, 28


def activations(work: Workload) -> tuple[dict[str, int], dict[str, int]]:
    """What the backward pass holds at its begin (all layers, and the head's work) and in its course (all layers'
    inputs, and one layer's work)."""
    teacher, size, o = work.teacher, work.itemsize, work.options
    read, _ = _update_tokens(work)
    layer = _layer_peak(work)
    held = others = kept_bytes(work)
    if held and o.gradient_checkpointing is False:  # what the layer itself keeps is in its peak
        own = read * _left_by_token(work) if _offloads(work) else _kept_by_layer(work)
        others = max(0, others - int(own))
    scored = read
    # The completions only: on a GPU TRL's head picks them out.
    if work.is_rl and (work.device == "cuda" or work.shared_prompts is not None):
        scored = work.micro_batch * o.max_completion_length
    positions, width = min(scored, HEAD_TOKENS), min(HEAD_WIDTH, teacher.vocab)
    head = positions * HEAD_WIDTH * size + scored * teacher.hidden * (4 + 2 * size)
    if work.device == "cpu":
        head += positions * width * TILE_BACKWARD
    if not work.use_peft:
        head += teacher.vocab * teacher.hidden * (4 + (size if size < 4 else 0))
    return {"activations": held, "head": head}, {"activations": others + layer}


def _layer_peak(work: Workload) -> int:
    """Bytes of one layer at the peak of its backward pass: in its feed-forward part, while what attention keeps is
    there, or in attention."""
    teacher = work.teacher
    read, in_rows = _update_tokens(work)
    inner, hidden, queries, mask, *rank = (LORA_PEAK if work.use_peft else LAYER_PEAK)[work.itemsize]
    ranks = rank[0] * work.adapter.rank if rank else 0
    inner += WITHOUT_BF16 if work.converts_bf16 and not work.use_peft else 0
    norms = _family(FAMILY_LORA_PEAK if work.use_peft else FAMILY_PEAK, work)
    each = inner * teacher.intermediate + hidden * teacher.hidden + queries * _queries(teacher) + norms
    masks = 0 if work.reads_without_mask else in_rows * mask * work.length
    forward = read * (each - _not_repeated(work) + ranks + _dropout_by_token(work)[1]) + _laid_out(work) + masks
    if work.is_eager(teacher):
        at_peak, kept_scores = _eager_peak(work, norms)
        return max(int(forward) + kept_scores * in_rows, at_peak)
    # In rows: queries, keys, values, what is made of them, and the gradient of each.
    attention = in_rows * 4 * _attended(work) * work.itemsize + read * (hidden * teacher.hidden + norms) + masks
    return int(max(forward, attention))


def _queries(shape: ModelShape) -> int:
    """Width of a token's queries, over all heads."""
    return shape.num_heads * shape.head_dim


def _not_repeated(work: Workload) -> int:
    """Bytes of a token's keys and values that are not held once for each head, where nothing asks for that."""
    teacher = work.teacher
    unused = _queries(teacher) - teacher.num_kv_heads * teacher.head_dim
    return 0 if work.repeats_keys else 2 * work.itemsize * unused


def _family(table: dict[str, dict[int, tuple[float, float]]], work: Workload) -> float:
    """Bytes that a token of the teacher's family takes beyond what Llama's does."""
    teacher = work.teacher
    hidden, heads = table.get(teacher.model_type, {}).get(work.itemsize, (0, 0))
    return hidden * teacher.hidden + heads * (_queries(teacher) + teacher.num_kv_heads * teacher.head_dim)


def _update_tokens(work: Workload) -> tuple[int, int]:
    """Tokens of a micro-batch that the update reads, and those of its rows: they differ where prompts are read once
    for all their completions, and only attention has rows (rollout/shared_prompts.py)."""
    o, shared = work.options, work.shared_prompts
    in_rows = work.micro_batch * work.length
    return in_rows if shared is None else in_rows - (work.micro_batch - shared) * o.max_prompt_length, in_rows


def _laid_out(work: Workload) -> int:
    """Bytes that attention keeps of the tokens that are in its rows alone: queries, keys, values and what it makes."""
    read, in_rows = _update_tokens(work)
    return (in_rows - read) * 2 * _attended(work) * work.itemsize


def _attended(work: Workload) -> int:
    """Elements of a token's queries and keys, as attention has them."""
    teacher = work.teacher
    return _queries(teacher) + (_queries(teacher) if work.repeats_keys else teacher.num_kv_heads * teacher.head_dim)


def _kept_widths(work: Workload) -> list[tuple[float, int]]:
    """What a layer keeps of a token for the backward pass, where nothing is computed again: bytes for each element of a
    width, and that width."""
    teacher, size = work.teacher, work.itemsize
    inner, hidden, queries, *rank = (LORA_KEPT if work.use_peft else LAYER_KEPT)[size]
    family = (FAMILY_LORA_KEPT if work.use_peft else FAMILY_KEPT).get(teacher.model_type, {}).get(size, (0, 0))
    widths = [(inner, teacher.intermediate), (hidden + family[0], teacher.hidden)]
    widths += [(queries + family[1], _queries(teacher)), (family[1], teacher.num_kv_heads * teacher.head_dim)]
    widths += [(rank[0], work.adapter.rank)] if rank else []
    dropped = _dropout_by_token(work)[0]
    widths += [(dropped, 1)] if dropped else []
    return widths


def _dropout_by_token(work: Workload) -> tuple[float, float]:
    """Bytes of a token that dropout before a layer's adapters adds to what is kept, and to the peak: each adapted
    projection has a mask, of a byte on a GPU and fp32 on a CPU, and an input of its own, which bf16 casts anyway."""
    teacher, o = work.teacher, work.options
    if not work.use_peft or not o.lora_dropout:
        return 0, 0
    targets = work.adapter.targets
    inputs = sum(inner for _, inner in teacher.linears(targets)) / teacher.num_layers
    mask = 1 if work.device == "cuda" else 4
    if work.itemsize == 2:
        return mask * inputs, mask * inputs + 4 * teacher.intermediate
    shared = 2 * teacher.hidden + teacher.intermediate if targets == "all-linear" else 0  # no more kept as they were
    kept = (4 + mask) * inputs - 4 * shared
    return kept, kept


def _kept_by_layer(work: Workload) -> float:
    """Bytes that a layer keeps of a micro-batch, where nothing is computed again."""
    read, in_rows = _update_tokens(work)
    each = sum(each * width for each, width in _kept_widths(work)) - _not_repeated(work)
    if work.is_eager(work.teacher):
        of_keys = _eager_peak(work, 0)[1]
    else:  # each text's mask, as numbers
        of_keys = 0 if work.reads_without_mask else work.itemsize * work.length
    return read * each + _laid_out(work) + in_rows * of_keys


def _offloads(work: Workload) -> bool:
    return bool(getattr(work.options, "activation_offloading", False))


def _left_by_token(work: Workload) -> float:
    """Bytes of a token that a layer leaves on the device where nothing is computed again and activations are offloaded:
    of what is saved twice in a row, by a norm (its input, in fp32), by the projections that read one input, and by
    attention and the projection of its output; adapters of bf16 weights each cast an input of their own."""
    teacher, size = work.teacher, work.itemsize
    keys = teacher.num_kv_heads * teacher.head_dim
    family = teacher.model_type
    left = 4 * teacher.hidden * (4 if family.startswith("gemma") else 2)
    left += 4 * (_queries(teacher) + keys) if family in ("qwen3", "gemma3_text") else 0
    if family != "phi3" and (not work.use_peft or size == 4):  # its projections are one each
        left += size * (_queries(teacher) + 2 * teacher.hidden)
    return left


def _left_bytes(work: Workload) -> int:
    """Bytes that stay on the device when the forward pass is over and activations were offloaded."""
    teacher, size = work.teacher, work.itemsize
    read, _ = _update_tokens(work)
    if work.options.gradient_checkpointing is not False:  # inputs of the last layers, and the last norm's
        inputs = min(STASHED_INPUTS[work.use_peft], teacher.num_layers)
        return read * teacher.hidden * (inputs * size + 4)
    last = (4 + size) * teacher.hidden + (4 * teacher.intermediate if work.use_peft else size * teacher.hidden)
    return int(read * (_left_by_token(work) * teacher.num_layers + last))


def offloaded_bytes(work: Workload) -> int:
    """Pinned memory of the host for what all layers keep: every tensor moves there by itself."""
    teacher, size, o = work.teacher, work.itemsize, work.options
    read, in_rows = _update_tokens(work)
    if o.gradient_checkpointing is not False:
        return _pinned(read * teacher.hidden * size) * teacher.num_layers
    # As if each width's bytes were those of tensors of the weights' type; one of fp32 is as much as two.
    layer = sum(int(each / size * _pinned(read * width * size)) for each, width in _kept_widths(work))
    if work.is_eager(teacher):
        layer += _pinned(in_rows * _eager_peak(work, 0)[1])
    elif not work.reads_without_mask:
        layer += _pinned(in_rows * work.length * size)
    if laid_out := _laid_out(work):
        layer += _pinned(laid_out)
    return layer * teacher.num_layers


def _pinned(size: int) -> int:
    """What torch's allocator of pinned memory takes for a tensor: the next power of two."""
    return 1 << (size - 1).bit_length()


def kept_bytes(work: Workload) -> int:
    """Bytes that all layers keep for the backward pass."""
    teacher = work.teacher
    if _offloads(work):
        return _left_bytes(work)
    if work.options.gradient_checkpointing is not False:
        return _update_tokens(work)[0] * teacher.hidden * work.itemsize * teacher.num_layers
    return int(_kept_by_layer(work)) * teacher.num_layers


def _eager_peak(work: Workload, norms: float) -> tuple[int, int]:
    """Bytes that eager attention needs at the peak of its backward pass, and those of each token of its rows that it
    keeps for it.

    Args:
        norms: Bytes that the family adds for a token at the peak of the whole layer.
    """
    teacher, size = work.teacher, work.itemsize
    scores = teacher.num_heads * work.length  # of each token
    capped = size if teacher.caps_scores else 0
    _, peak, kept = EAGER_SCORES[size]
    hidden, rank = EAGER_LORA_PEAK[size] if work.use_peft else (EAGER_PEAK[size], 0)
    hidden = hidden * teacher.hidden + min(norms, EAGER_FAMILY * teacher.hidden)
    read, in_rows = _update_tokens(work)
    each = (peak + capped) * scores + mask_elements(work, teacher) * size
    return int(in_rows * each + read * (hidden + rank * work.adapter.rank)), (kept + capped) * scores


def mask_elements(work: Workload, shape: ModelShape) -> int:
    """Elements of the causal mask that a token has where its attention is eager."""
    kinds = 2 if shape.model_type.startswith("gemma") else 1  # a sliding window has its own
    return kinds * work.length if work.is_eager(shape) else 0


def masks_window(work: Workload, shape: ModelShape, length: int) -> bool:
    """Whether rows of so many tokens that begin at their first one are read with a mask by sdpa: transformers makes one
    as soon as a window is no longer than they are. FlashAttention takes the window as a number."""
    if work.is_eager(shape) or work.options.attn_implementation not in (None, "sdpa"):
        return False
    return shape.window is not None and shape.window <= length


def held_masks(work: Workload, shape: ModelShape, texts: int) -> float:
    """Bytes of masks for each token of a micro-batch of so many texts, held as long as the micro-batch is."""
    if masks_window(work, shape, work.length):
        return work.length / texts  # of bool, one for all the texts
    return mask_elements(work, shape) * work.itemsize


def reading_layer(work: Workload, shape: ModelShape, texts: int, beside: float = 0, length: int | None = None) -> int:
    """What a layer needs to read a micro-batch of so many texts.

    Args:
        beside: Elements of each token that are held meanwhile.
        length: Tokens of a text; None for as many as prompt and completion may have.
    """
    length = length or work.length
    size, tokens = work.itemsize, texts * length
    widest = 2 if shape.model_type == "phi3" else 1  # its gate and what it gates come as one
    widths = 2 + widest
    if work.converts_bf16:  # a product has as much beside it
        widths += widest
    feedforward = tokens * (widths * shape.intermediate + 2.3 * shape.hidden + beside) * size
    if masks_window(work, shape, length):
        # torch makes numbers of the mask, for each text: beside a negated one on a CPU, on a GPU beside a copy whose
        # rows are padded (by its source: not measured). With a mask keys and values are repeated for each head.
        mask = length * (2 * size if work.device == "cuda" else size + 1)
        widths = 4 * _queries(shape) + 2 * shape.num_kv_heads * shape.head_dim
        return int(max(feedforward, tokens * (mask + (widths + beside) * size)))
    if not work.is_eager(shape):
        return int(feedforward)
    scores = tokens * shape.num_heads * length
    attention = scores * EAGER_SCORES[size][0] + tokens * (3.4 * shape.hidden + beside) * size
    return int(max(feedforward + scores * size, attention))  # a layer drops its scores when it is done
