"""How the engine gets the trainer's weights.

shared: the trainer's parameters ARE the engine's tensors; there is nothing to do after an update, and the weights are
held once.

copy: the engine holds weights of its own, and `load_weights` copies the trainer's into them after each update.

lora: the frozen base is shared; the adapters, trained in fp32, are written into the engine's adapter buffers.

restart: the weights are saved and a new engine is built from the checkpoint after each update.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trainers.errors import ConfigError, Fault
from trainers.plan.host_memory import SHARD
from trainers.weights.adapters import ADAPTER, base_model
from trainers.weights.shared_weights import base_parameters, fused_parts, held_bytes, share_weights

LOAD_FORMAT = "trainer"


class CopyBridge:
    """The engine's own weights; also what the other bridges have in common.

    Args:
        model: The trainer's model.
    """

    rebuilds = False  # whether an update needs a new engine
    lora_request: Any = None  # goes with every generation request

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.engine_model: nn.Module | None = None  # while there is an engine

    def arguments(self) -> dict[str, Any]:
        """Arguments of vllm.LLM."""
        return {"load_format": LOAD_FORMAT}

    def attach(self, runner: Any) -> None:
        """Connect with a new engine, which has loaded the trainer's weights.

        Args:
            runner: vLLM's model runner.

        Raises:
            ConfigError: If this bridge cannot serve this model.
        """
        self.engine_model = runner.model

    def weights(self, engine_model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What the engine loads: the weights by their Hugging Face names, a tied head by its own too where the engine
        has one: vLLM expects it if the checkpoint holds it."""
        return _known_to(engine_model, self.model, merged_weights(self.model, every_name=True))

    @torch.no_grad()
    def sync(self) -> None:
        """Make the engine see the trainer's current weights."""
        self.engine_model.load_weights(self.weights(self.engine_model))

    def stale(self) -> str | None:
        """A layer of the engine's that is known to have other weights than the trainer's, looked at one each time."""
        return None

    def weight_bytes(self) -> int:
        """Bytes that trainer and engine hold for weights, together."""
        return held_bytes(self.model.parameters(), self.engine_model.parameters())


class SharedBridge(CopyBridge):
    """The trainer's parameters are views of the engine's tensors."""

    def weights(self, engine_model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        named = ((name, p.data) for name, p in base_parameters(self.model, every_name=True).items())
        return _known_to(engine_model, self.model, named)

    def attach(self, runner: Any) -> None:
        super().attach(runner)
        share_weights(self.model, self.engine_model)
        self._shared = [*_places(base_model(self.model)), *_places(self.engine_model, "the engine's ")]

    def sync(self) -> None:
        """See that nothing has parted the trainer's parameters from the engine's weights.

        Raises:
            RuntimeError: If something has, with the name of what was moved.
        """
        for name, holder, leaf, place in self._shared:
            if (parameter := holder.get(leaf)) is None or parameter.data_ptr() != place:
                raise RuntimeError(
                    f"{name} was moved away from the memory that trainer and engine share, so the engine sees no more "
                    "updates of it. Whatever replaced its data (an optimizer, a callback, model.to) must write in "
                    "place (copy_, add_); weight_bridge=copy works without that"
                )


class LoraBridge(SharedBridge):
    """The frozen base is shared, the adapters are written into the engine's buffers.

    vLLM has no call that takes an adapter from memory. One of zeros is registered under the id that the requests name,
    as vLLM does to warm up, and the layers' own `set_lora` writes the values, in place: captured CUDA graphs stay
    valid.
    """

    def arguments(self) -> dict[str, Any]:
        config = self.model.peft_config[ADAPTER]
        leaves = sorted({name.rpartition(".")[2] for name in self._adapters()})
        rank = next(r for r in lora_ranks() if r >= config.r)
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank, "lora_target_modules": leaves}
        return super().arguments() | lora

    def attach(self, runner: Any) -> None:
        from vllm.lora.request import LoRARequest

        super().attach(runner)
        self._layers, self._checked = adapted_layers(self.engine_model, self._adapters()), 0
        self.lora_request = LoRARequest("teacher", 1, "in-memory")
        runner.lora_manager.add_dummy_lora(self.lora_request, self.model.peft_config[ADAPTER].r)
        runner.lora_manager.add_adapter(self.lora_request)  # known by now, so nothing is read: it gets its buffers
        self.sync()

    def _adapters(self) -> dict[str, LoraLayer]:
        modules = base_model(self.model).named_modules()
        return {name: module for name, module in modules if isinstance(module, LoraLayer)}

    @torch.no_grad()
    def sync(self) -> None:
        """Write the adapters, the scaling folded into B as vLLM does."""
        super().sync()
        for layer, parts in self._layers:
            a = [p and p.lora_A[ADAPTER].weight for p in parts]
            b = [p and p.lora_B[ADAPTER].weight * p.scaling[ADAPTER] for p in parts]
            layer.set_lora(0, a if len(a) > 1 else a[0], b if len(b) > 1 else b[0])

    @torch.no_grad()
    def stale(self) -> str | None:
        """In half precision an adapter's steps are less than the rounding that probabilities may differ by."""
        layer, parts = self._layers[self._checked % len(self._layers)]
        self._checked += 1
        buffers = [buffer[0, 0] for buffer in layer.lora_b_stacked]
        ours = [p and p.lora_B[ADAPTER].weight * p.scaling[ADAPTER] for p in parts]
        if len(ours) < len(buffers):  # one layer of the trainer's, several of the engine's (Phi-3)
            ours = ours[0].split([len(buffer) for buffer in buffers])
        for own, buffer in zip(ours, buffers, strict=True):
            if own is not None and not torch.equal(buffer[:, : own.shape[1]], own.to(buffer.dtype)):
                return layer.base_layer.prefix
        return None

    def weight_bytes(self) -> int:
        buffers = [t for layer, _ in self._layers for t in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
        return held_bytes(self.model.parameters(), self.engine_model.parameters(), buffers)


class RestartBridge(CopyBridge):
    """A new engine from a checkpoint; slow, and independent of everything the other bridges rely on."""

    rebuilds = True

    def arguments(self) -> dict[str, Any]:
        return {}

    def sync(self) -> None:
        raise AssertionError("the engine is rebuilt instead")

    def save(self, folder: str) -> None:
        """Write the weights, adapters merged, as a checkpoint without a tokenizer."""
        with torch.no_grad():
            weights = dict(merged_weights(self.model))
            base_model(self.model).save_pretrained(folder, state_dict=weights, max_shard_size=SHARD)


def make_bridge(name: str, model: nn.Module) -> CopyBridge:
    """The bridge that `weight_bridge` names."""
    return {"shared": SharedBridge, "copy": CopyBridge, "lora": LoraBridge, "restart": RestartBridge}[name](model)


def lora_ranks() -> tuple[int, ...]:
    """The ranks for which vLLM has adapter buffers."""
    from vllm.config.lora import MaxLoRARanks

    return MaxLoRARanks.__args__


def _known_to(
    engine_model: nn.Module, model: nn.Module, named: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Without further names of tied weights for which the engine has no tensor of its own (Gemma 2 has no head there,
    Bloom's is tied as well)."""
    first = base_parameters(model)
    own = {name for name, _ in engine_model.named_parameters()}
    return ((name, weight) for name, weight in named if name in first or name in own)


def merged_weights(model: nn.Module, every_name: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model by the names they have without adapters, each adapter added to its layer's.

    One layer's sum at a time: a caller that copies as it goes holds no second set of weights.
    """
    modules = dict(base_model(model).named_modules())
    for name, parameter in base_parameters(model, every_name).items():
        path, _, kind = name.rpartition(".")
        layer, weight = modules.get(path), parameter.data
        if kind == "weight" and isinstance(layer, LoraLayer):
            weight = weight + layer.get_delta_weight(ADAPTER).to(weight.dtype)
        yield name, weight


def adapted_layers(
    engine_model: nn.Module, adapters: dict[str, LoraLayer]
) -> list[tuple[nn.Module, list[LoraLayer | None]]]:
    """The engine's layers that take an adapter, each with the trainer's adapters of its parts, in their order.

    Raises:
        ConfigError: If the engine has no adapter buffer for one of them.
    """
    modules = dict(engine_model.named_modules())
    fused_into = fused_parts(engine_model)
    found: dict[str, list[LoraLayer | None]] = {}
    for name, adapter in adapters.items():
        parent, _, leaf = name.rpartition(".")
        fused, index, count = fused_into.get(leaf, (leaf, 0, 1))
        found.setdefault(f"{parent}.{fused}" if parent else fused, [None] * count)[index] = adapter
    layers = []
    for name, parts in found.items():
        layer = modules.get(name)
        if not hasattr(layer, "lora_a_stacked"):
            cause, remedy = "vLLM has no adapter buffer for it", "leave it out of lora_target_modules"
            raise ConfigError(Fault("lora_target_modules", name, cause, remedy))
        layers.append((layer, parts))
    return layers


def _places(model: nn.Module, whose: str = "") -> Iterator[tuple[str, dict[str, Any], str, int]]:
    """Each parameter that is no adapter's: its name, what holds it under which name there, and its place in memory."""
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and ".lora_" not in path:
                name = f"{path}.{leaf}".replace(".base_layer.", ".")
                yield f"{whose}{name}", module._parameters, leaf, parameter.data_ptr()


def register_loader(weights: Callable[[nn.Module], Iterator[tuple[str, Tensor]]]) -> None:
    """Let vLLM's `load_format="trainer"` read the trainer's weights, in memory.

    vLLM loads before it wraps layers for LoRA and before it processes weights, so this is where they come in.
    """
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class TrainerLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """There is nothing to fetch."""

        @torch.no_grad()
        def load_weights(self, engine_model: nn.Module, model_config: Any) -> None:
            engine_model.load_weights(weights(engine_model))

    _LOAD_FORMAT_TO_MODEL_LOADER.pop(LOAD_FORMAT, None)  # an earlier engine's in this process
    register_model_loader(LOAD_FORMAT)(TrainerLoader)
