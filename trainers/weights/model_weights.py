"""Which tensors of a checkpoint a model's parameters are made of: what transformers would load them from.

Files and models differ in more than a prefix. Those of text and images name the text's parameters otherwise from one
version of transformers to the next, and mixtures of experts hold each expert apart that the model holds as one.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from trainers.weights.weight_files import HostWeights, WeightFiles


class Piece(NamedTuple):
    """A stored tensor, and the part of a parameter that it is: an index of the parameter, `()` for all of it."""

    stored: str
    place: tuple[int | slice, ...]


class ModelWeights:
    """The tensors of a checkpoint by the names of a model's parameters.

    Attributes:
        source: Where they lie.
        missing: The parameters that are not there, or not as they are in the model.
    """

    def __init__(self, model: Any, source: WeightFiles | HostWeights) -> None:
        self.source = source
        parameters, needed = list(model.named_parameters(remove_duplicate=False)), _ids_of_text(model)
        found = _pieces(model, source)
        self._shapes = {name: tuple(p.shape) for name, p in parameters if id(p) in needed}
        self._beside = {name for name, p in parameters if id(p) not in needed}
        self._pieces: dict[str, list[Piece]] = {}
        for name, parameter in parameters:
            # Of a tied weight its first name, by which `blend` knows it: the file may hold it under the others as well.
            same = [other for other, p in parameters if p is parameter and other in found]
            if name in self._shapes and same:
                self._pieces[name] = found[same[0]]
        self.missing = [name for name in self._shapes if name not in self._pieces]

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def stored(self) -> set[str]:
        """The names of the tensors that are needed."""
        return {piece.stored for pieces in self._pieces.values() for piece in pieces}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        """The parameter as it is stored; one of several pieces is put together."""
        pieces = self._pieces[name]
        if not pieces[0].place:
            return self.source.tensor(pieces[0].stored)
        whole = torch.empty(self._shapes[name], dtype=self.source.tensor(pieces[0].stored).dtype)
        for stored, place in pieces:
            whole[place].copy_(self.source.tensor(stored))
        return whole

    def read(self, group: dict[str, str], into: dict[str, Tensor]) -> None:
        """Copy the parameters `group` names into the tensors of the same keys."""
        parts = [(piece, into[key]) for key, name in group.items() for piece in self._pieces[name]]
        names = {str(i): piece.stored for i, (piece, _) in enumerate(parts)}
        self.source.read(names, {str(i): tensor[piece.place] for i, (piece, tensor) in enumerate(parts)})

    def blend(self, name: str, value: Tensor, share: float) -> None:
        """See `Backbone.blend`; what text does not need is not held, and not trained on text either."""
        if name not in self._beside:
            for stored, place in self._pieces[name]:
                self.source.tensor(stored).mul_(1 - share).add_(value[place], alpha=share)


def text_part(model: Any) -> nn.Module:
    """What reads text, up to its last hidden states: of a model of text and images a part of it."""
    return model if model.config.get_text_config() is model.config else model.get_decoder()


def find_layers(model: Any) -> tuple[nn.ModuleList, str]:
    """The layers that text goes through, and their name.

    Raises:
        ValueError: If it has no list of so many.
    """
    inside, count = set(text_part(model).modules()), model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside:
            return module, name
    raise ValueError(f"{type(model).__name__} has no list of {count} layers")


def text_elements(model: Any) -> int:
    """Elements of the parameters that text needs."""
    needed = _ids_of_text(model)
    return sum(p.numel() for p in model.parameters() if id(p) in needed)


def can_be_mapped(model: Any) -> bool:
    """Whether the layers' weights are likely to be found in its checkpoint's files, and are all that the layers hold.

    Args:
        model: Built without memory; its files are not asked.
    """
    layers, _ = find_layers(model)
    is_plain = not any(True for _ in layers.buffers()) and getattr(model.config, "quantization_config", None) is None
    if text_part(model) is not model and len(set(map(type, layers))) > 1:  # some for images (Llama 3.2 Vision)
        return False
    otherwise = [target for c in _transforms(model)[1] if not _stacks(c) for target in c.target_patterns]
    return is_plain and not any(target in f".{name}" for name, _ in layers.named_parameters() for target in otherwise)


def _ids_of_text(model: Any) -> set[int]:
    head = model.get_output_embeddings()
    return {id(p) for module in (text_part(model), head) if module is not None for p in module.parameters()}


def _transforms(model: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """What transformers does to the names, and to the tensors, of this model's checkpoints when it loads one."""
    found = get_model_conversion_mapping(model)
    kinds = (WeightRenaming, WeightConverter)
    return tuple([transform for transform in found if isinstance(transform, kind)] for kind in kinds)


def _stacks(converter: WeightConverter) -> bool:
    """Whether it stacks tensors, of one kind or of several side by side: each can be read to its place."""
    kinds = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
    known = [(MergeModulelist, 0)] + [(Concatenate, 1)] * (len(converter.source_patterns) > 1)
    return kinds == known and len(converter.operations) == len(known) and len(converter.target_patterns) == 1


def _pieces(model: Any, source: WeightFiles | HostWeights) -> dict[str, list[Piece]]:
    """The pieces of each parameter of a model that its checkpoint holds as it is there; as transformers'
    `convert_and_load_state_dict_in_model` finds them."""
    renamings, converters = _transforms(model)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters, prefix = dict(model.named_parameters(remove_duplicate=False)), model.base_model_prefix
    found: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for stored in sorted(source, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, parameters)
        if name not in parameters and stored in parameters:
            name, pattern = rename_source_key(stored, [], [], prefix, parameters)
        if name in parameters:
            found[name][pattern].append(stored)
    pieces = {}
    for name, stored in found.items():
        shape, converter = tuple(parameters[name].shape), by_pattern.get(next(iter(stored)))
        parts = list(_stacked(stored, converter, shape, source)) if converter else [Piece(stored[None][0], ())]
        if [source.shape(part.stored) for part in parts] == [_shape_at(shape, part.place) for part in parts]:
            pieces[name] = parts
    return {name: parts for name, parts in pieces.items() if parts}


def _stacked(
    stored: dict[str | None, list[str]],
    converter: WeightConverter,
    shape: tuple[int, ...],
    source: WeightFiles | HostWeights,
) -> Iterator[Piece]:
    """The places of an expert's tensors in the parameter of all; none if they do not fill it, or do not lie so."""
    patterns = converter.source_patterns
    if not _stacks(converter) or {len(stored[pattern]) for pattern in patterns} != {shape[0]}:
        return
    ends = [0]
    for pattern in patterns:
        ends.append(ends[-1] + source.shape(stored[pattern][0])[0])
    if ends[-1] == shape[1]:
        for pattern, start, end in zip(patterns, ends, ends[1:], strict=False):
            yield from (Piece(name, (expert, slice(start, end))) for expert, name in enumerate(stored[pattern]))


def _shape_at(shape: tuple[int, ...], place: tuple[int | slice, ...]) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta")[place].shape)
