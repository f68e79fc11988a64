"""How the engine gets the trainer's weights.

shared: the trainer's parameters ARE the engine's tensors. vLLM keeps q/k/v (and gate/up) fused in one tensor; each of
the trainer's parameters becomes a view of its rows. An optimizer step in place is then also the engine's update, and
the weights are held once.

copy: the engine holds its own weights, and `load_weights` copies the trainer's into them after each update.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainers.errors import ConfigError, Fault


def engine_tensors(engine_model: nn.Module, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """For each of the trainer's parameter names, yield the part of the engine's weights that holds it.

    What is fused with what is read from vLLM's model class (`packed_modules_mapping`) and the sizes of the parts from
    its fused layers (`output_sizes`), so no table of names for one architecture is needed.

    Raises:
        KeyError: If the engine has no tensor for a name.
    """
    parameters = dict(engine_model.named_parameters(remove_duplicate=False))
    modules = dict(engine_model.named_modules())
    fused_into = {
        part: (fused, index)
        for fused, parts in getattr(engine_model, "packed_modules_mapping", {}).items()
        for index, part in enumerate(parts)
    }
    for name in names:
        if name in parameters:
            yield name, parameters[name].data
            continue
        path, _, kind = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        if leaf not in fused_into:
            raise KeyError(name)
        fused, index = fused_into[leaf]
        module_name = f"{parent}.{fused}"
        sizes = modules[module_name].output_sizes
        start = sum(sizes[:index])
        yield name, parameters[f"{module_name}.{kind}"].data[start : start + sizes[index]]


def share_weights(model: nn.Module, engine_model: nn.Module) -> int:
    """Load the trainer's weights into the engine and make the trainer's parameters views of the engine's tensors.

    The engine loads them its own way; only what then stands in it value by value as in the trainer can be shared.

    Returns:
        Bytes held by the shared weights.

    Raises:
        ConfigError: If a parameter has no such counterpart (some architectures are repacked), or the engine holds
            weights that no parameter of the trainer covers: these would never be trained.
    """
    copy_weights(model, engine_model)
    owners = dict(model.named_parameters())
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
        if not torch.equal(target, parameter):
            raise _unshareable(f"the engine holds {name} in another layout")
        parameter.data = target
        key = target.untyped_storage().data_ptr()
        covered[key] = covered.get(key, 0) + target.nbytes
    for name, tensor in engine_model.named_parameters():
        if covered.get(tensor.untyped_storage().data_ptr(), 0) != tensor.nbytes:
            raise _unshareable(f"the engine's weight {name} is not covered by the trainer's parameters")
    return sum(covered.values())


def _unshareable(cause: str) -> ConfigError:
    return ConfigError(Fault("weight_bridge", "shared", cause, "weight_bridge=copy"))


def copy_weights(model: nn.Module, engine_model: nn.Module) -> None:
    """Load the trainer's weights into the engine's own."""
    engine_model.load_weights((name, parameter.data) for name, parameter in model.named_parameters())


def keep_linear_weights_on_cpu() -> None:
    """Make vLLM's CPU build compute with the live weight of each linear layer.

    As shipped it repacks the weights for oneDNN at load and empties the originals, so nothing could ever update them.
    This replaces that dispatch; call it before the engine is built. On CUDA nothing of the kind happens in bf16.
    """
    from vllm.model_executor.layers import utils

    def dispatch(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch
