"""One copy of the weights: the trainer's parameters become views of the engine's tensors.

vLLM keeps q/k/v (and gate/up) fused in one tensor; each of the trainer's parameters is a view of its rows there. An
optimizer step in place is then also the engine's update.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from trainers.errors import ConfigError, Fault
from trainers.weights.adapters import base_model

ROWS_AT_ONCE = 4096  # a byte for each value is taken while they are compared: half a GiB for a 7B model's embedding


def base_parameters(model: nn.Module, every_name: bool = False) -> dict[str, nn.Parameter]:
    """The parameters of a model without its adapters, by the names they have where there are none.

    Args:
        every_name: Give one that is tied under each of its names, not under the first alone.
    """
    parameters = base_model(model).named_parameters(remove_duplicate=not every_name)
    return {name.replace(".base_layer.", "."): p for name, p in parameters if ".lora_" not in name}


def held_bytes(*tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages under these tensors, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in chain(*tensors)}
    return sum(storages.values())


def fused_parts(engine_model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """For the name of each layer that vLLM fuses: the fused layer's name, the place in it, and of how many."""
    packed = getattr(engine_model, "packed_modules_mapping", {})
    return {part: (fused, i, len(parts)) for fused, parts in packed.items() for i, part in enumerate(parts)}


def engine_tensors(engine_model: nn.Module, names: list[str], strict: bool = True) -> Iterator[tuple[str, Tensor]]:
    """For each of the trainer's parameter names, yield the part of the engine's weights that holds it.

    What is fused with what is read from vLLM's model class (`packed_modules_mapping`) and the sizes of the parts from
    its fused layers (`output_sizes`), so no table of names for one architecture is needed.

    Args:
        strict: False leaves a name out for which the engine has no tensor, or none whose parts are known.

    Raises:
        KeyError: If there is such a name, and it is not to be left out.
    """
    # A layer that vLLM wrapped for LoRA holds the layer proper, and its weights, as `base_layer`.
    parameters = {
        name.replace(".base_layer", ""): p for name, p in engine_model.named_parameters(remove_duplicate=False)
    }
    modules = {name.replace(".base_layer", ""): module for name, module in engine_model.named_modules()}
    fused_into = fused_parts(engine_model)
    for name in names:
        if name in parameters:
            yield name, parameters[name].data
            continue
        path, _, kind = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        fused, index, _ = fused_into.get(leaf, (leaf, 0, 1))
        module_name = f"{parent}.{fused}"
        tensor = parameters.get(f"{module_name}.{kind}")
        sizes = getattr(modules.get(module_name), "output_sizes", ())
        if tensor is None or index >= len(sizes):
            if strict:
                raise KeyError(name)
            continue
        start = sum(sizes[:index])
        yield name, tensor.data[start : start + sizes[index]]


def holds(tensor: Tensor, weight: Tensor) -> bool:
    """Whether a tensor of the engine's has a weight of the trainer's in it value by value, in the engine's type; behind
    it there may be rows that vLLM adds to round the vocabulary up."""
    tensor = tensor[: len(weight)]
    if tensor.shape != weight.shape:
        return False
    pairs = zip(tensor.split(ROWS_AT_ONCE), weight.split(ROWS_AT_ONCE), strict=True)
    return all(torch.equal(own, part.to(own.device, own.dtype)) for own, part in pairs)


def share_weights(model: nn.Module, engine_model: nn.Module) -> None:
    """Make the trainer's parameters views of the tensors of an engine that has loaded their values.

    The engine loaded them its own way; only what stands in it value by value as in the trainer can be shared.

    Args:
        model: The trainer's model; of one with adapters the base is shared.
        engine_model: vLLM's module.

    Raises:
        ConfigError: If a parameter has no such counterpart (some architectures are repacked), or the engine holds
            weights that no parameter of the trainer covers: these would never be trained.
    """
    owners = base_parameters(model)
    try:
        targets = dict(engine_tensors(engine_model, list(owners)))
    except KeyError as error:
        raise _unshareable(f"the engine has no tensor for the parameter {error.args[0]}") from None
    covered: dict[int, int] = {}
    embeddings = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer]
    for name, parameter in owners.items():
        target = targets[name]
        if target.shape != parameter.shape and any(parameter is e for e in embeddings):
            target[parameter.shape[0] :].zero_()  # rows that vLLM adds to round the vocabulary up
            covered[target.untyped_storage().data_ptr()] = target[parameter.shape[0] :].nbytes
            target = target[: parameter.shape[0]]
        if target.shape != parameter.shape or target.dtype != parameter.dtype:
            ours, theirs = f"{tuple(parameter.shape)} {parameter.dtype}", f"{tuple(target.shape)} {target.dtype}"
            raise _unshareable(f"{name} is {ours} in the trainer and {theirs} in the engine")
        if not holds(target, parameter):
            raise _unshareable(f"the engine holds {name} in another layout")
        parameter.data = target
        key = target.untyped_storage().data_ptr()
        covered[key] = covered.get(key, 0) + target.nbytes
    for name, tensor in engine_model.named_parameters():
        if covered.get(tensor.untyped_storage().data_ptr(), 0) != tensor.nbytes:
            raise _unshareable(f"the engine's weight {name} is not covered by the trainer's parameters")


class SharedTensors:
    """Parameters that are views of an engine's tensors, and where in memory both were when they became that.

    Args:
        model: The trainer's model, whose parameters `share_weights` makes views.
        engine_model: vLLM's module.

    Raises:
        ConfigError: As `share_weights`.
    """

    def __init__(self, model: nn.Module, engine_model: nn.Module) -> None:
        share_weights(model, engine_model)
        self._places = [*_places(base_model(model)), *_places(engine_model, "the engine's ")]

    def check(self) -> None:
        """See that all are still there.

        Raises:
            RuntimeError: If one is not, with its name.
        """
        for name, holder, leaf, place in self._places:
            if (parameter := holder.get(leaf)) is None or parameter.data_ptr() != place:
                raise RuntimeError(
                    f"{name} was moved away from the memory that trainer and engine share, so the engine sees no more "
                    "updates of it. Whatever replaced its data (an optimizer, a callback, model.to) must write in "
                    "place (copy_, add_); weight_bridge=copy works without that"
                )


def _places(model: nn.Module, whose: str = "") -> Iterator[tuple[str, dict[str, Any], str, int]]:
    """Each parameter that is no adapter's: its name, what holds it under which name there, and its place in memory."""
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and ".lora_" not in path:
                name = f"{path}.{leaf}".replace(".base_layer.", ".")
                yield f"{whose}{name}", module._parameters, leaf, parameter.data_ptr()


def _unshareable(cause: str) -> ConfigError:
    # Experts that an engine has loaded cannot be written anew (plan/start_faults.py).
    remedy = "weight_bridge=restart" if "experts" in cause else "weight_bridge=copy"
    return ConfigError(Fault("weight_bridge", "shared", cause, remedy))
