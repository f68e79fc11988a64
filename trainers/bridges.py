"""How the engine gets the trainer's weights.

shared: the trainer's parameters ARE the engine's tensors; there is nothing to do after an update, and the weights are
held once.

copy: the engine holds weights of its own, and `load_weights` copies the trainer's into them after each update.

lora: the frozen base is shared; the adapters, trained in fp32, are written into the engine's adapter buffers.

restart: the weights are saved and a new engine is built from the checkpoint after each update.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trainers.errors import ConfigError, Fault
from trainers.plan.host_memory import SHARD
from trainers.weights.adapters import ADAPTER, base_model
from trainers.weights.shared_weights import (
    SharedTensors,
    base_parameters,
    engine_tensors,
    fused_parts,
    held_bytes,
    holds,
)

logger = logging.getLogger(__name__)

LOAD_FORMAT = "trainer"


class WeightBridge(ABC):
    """One way for the trainer's weights to reach the engine.

    Args:
        model: The trainer's model.

    Attributes:
        engine_model: vLLM's module, while there is an engine.
        lora_request: What goes with every generation request.
        keeps_engine: Whether the engine lives on through updates, so that its KV cache can be given back for them.
    """

    lora_request: Any = None
    keeps_engine = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.engine_model: nn.Module | None = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of vllm.LLM that this way needs."""
        return {}

    @abstractmethod
    def loading(self, output_dir: Path) -> AbstractContextManager[dict[str, Any]]:
        """A context in which an engine that starts finds the trainer's current weights.

        Args:
            output_dir: Where files may be written; none is left.

        Returns:
            A context that gives the arguments of vllm.LLM that say where the weights are.
        """

    def attach(self, runner: Any, rebuild: Callable[[], None]) -> None:
        """Connect with a new engine, which has loaded the trainer's weights.

        Args:
            runner: vLLM's model runner.
            rebuild: Stops this engine and starts a new one, to which the bridge is attached again.

        Raises:
            ConfigError: If this bridge cannot serve this model.
        """
        self.engine_model = runner.model

    @abstractmethod
    def sync(self) -> None:
        """Make the engine see the trainer's current weights."""

    def stale(self) -> str | None:
        """A layer or weight of the engine's that is known to be another than the trainer's, of those looked at."""
        return None

    def weight_bytes(self) -> int:
        """Bytes that trainer and engine hold for weights, together."""
        return held_bytes(self.model.parameters(), self.engine_model.parameters())


class SharedBridge(WeightBridge):
    """The trainer's parameters are views of the engine's tensors."""

    def weights(self, engine_model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What the engine loads, and what is its own from then on."""
        return _base_weights(engine_model, self.model)

    def loading(self, output_dir: Path) -> AbstractContextManager[dict[str, Any]]:
        return _in_memory(self.weights)

    def attach(self, runner: Any, rebuild: Callable[[], None]) -> None:
        super().attach(runner, rebuild)
        self._shared = SharedTensors(self.model, self.engine_model)

    def sync(self) -> None:
        """See that nothing has parted the trainer's parameters from the engine's weights.

        Raises:
            RuntimeError: If something has, with the name of what was moved.
        """
        self._shared.check()


class CopyBridge(WeightBridge):
    """The engine's own weights, written anew after each update."""

    def weights(self, engine_model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What the engine loads: the weights by their Hugging Face names, a tied head by its own too where the engine
        has one: vLLM expects it if the checkpoint holds it."""
        return _known_to(engine_model, self.model, merged_weights(self.model, every_name=True))

    def loading(self, output_dir: Path) -> AbstractContextManager[dict[str, Any]]:
        return _in_memory(self.weights)

    @torch.no_grad()
    def attach(self, runner: Any, rebuild: Callable[[], None]) -> None:
        super().attach(runner, rebuild)
        names = list(base_parameters(self.model, every_name=True))
        tensors = dict(engine_tensors(self.engine_model, names, strict=False))
        # What the engine, which has just loaded them, holds otherwise (transposed, in another order of rows) is not
        # looked at; nor is a constant, as biases are in a fresh model: it would look the same in any order.
        self._same = [
            name
            for name, weight in self.weights(self.engine_model)
            if name in tensors and weight.min() < weight.max() and holds(tensors[name], weight)
        ]
        self._syncs = 0
        logger.info(
            "weight_bridge=copy: after each update one weight in turn is compared value by value, of %d of %d that the "
            "engine holds as the trainer does",
            len(self._same),
            len(names),
        )

    @torch.no_grad()
    def sync(self) -> None:
        """Copy all weights, adapters merged."""
        self._syncs += 1
        self.engine_model.load_weights(self.weights(self.engine_model))

    @torch.no_grad()
    def stale(self) -> str | None:
        """One weight is looked at, value by value, after each `sync` the next. At a small rate an update moves
        log-probabilities by less than they may differ by, in fp32 too."""
        if not self._same:
            return None
        name = self._same[self._syncs % len(self._same)]
        ((_, tensor),) = engine_tensors(self.engine_model, [name])
        ((_, weight),) = merged_weights(self.model, every_name=True, names=(name,))
        return None if holds(tensor, weight) else name


class LoraBridge(WeightBridge):
    """The frozen base is shared, the adapters are written into the engine's buffers.

    vLLM has no call that takes an adapter from memory. One of zeros is registered under the id that the requests name,
    as vLLM does to warm up, and the layers' own `set_lora` writes the values, in place: captured CUDA graphs stay
    valid.
    """

    def arguments(self) -> dict[str, Any]:
        config = self.model.peft_config[ADAPTER]
        leaves = sorted({name.rpartition(".")[2] for name in self._adapters()})
        rank = next(r for r in lora_ranks() if r >= config.r)
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank, "lora_target_modules": leaves}

    def loading(self, output_dir: Path) -> AbstractContextManager[dict[str, Any]]:
        return _in_memory(lambda engine_model: _base_weights(engine_model, self.model))

    def attach(self, runner: Any, rebuild: Callable[[], None]) -> None:
        from vllm.lora.request import LoRARequest

        super().attach(runner, rebuild)
        self._shared = SharedTensors(self.model, self.engine_model)
        self._layers, self._syncs = adapted_layers(self.engine_model, self._adapters()), 0
        self.lora_request = LoRARequest("teacher", 1, "in-memory")
        runner.lora_manager.add_dummy_lora(self.lora_request, self.model.peft_config[ADAPTER].r)
        runner.lora_manager.add_adapter(self.lora_request)  # known by now, so nothing is read: it gets its buffers
        self.sync()

    def _adapters(self) -> dict[str, LoraLayer]:
        modules = base_model(self.model).named_modules()
        return {name: module for name, module in modules if isinstance(module, LoraLayer)}

    @torch.no_grad()
    def sync(self) -> None:
        """Write the adapters, the scaling folded into B as vLLM does.

        Raises:
            RuntimeError: If the base is no longer shared, with the name of what was moved.
        """
        self._shared.check()
        self._syncs += 1
        for layer, parts in self._layers:
            a = [p and p.lora_A[ADAPTER].weight for p in parts]
            b = [p and p.lora_B[ADAPTER].weight * p.scaling[ADAPTER] for p in parts]
            layer.set_lora(0, a if len(a) > 1 else a[0], b if len(b) > 1 else b[0])

    @torch.no_grad()
    def stale(self) -> str | None:
        """One layer is looked at, after each `sync` the next. In half precision an adapter's steps are less than the
        rounding that probabilities may differ by."""
        layer, parts = self._layers[self._syncs % len(self._layers)]
        theirs = [buffer[0, 0] for buffer in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
        a = [p and p.lora_A[ADAPTER].weight for p in parts]
        b = [p and p.lora_B[ADAPTER].weight * p.scaling[ADAPTER] for p in parts]
        if len(b) < layer.n_slices:  # one layer of the trainer's, several of the engine's (Phi-3)
            a, b = a * layer.n_slices, b[0].split([len(buffer[0, 0]) for buffer in layer.lora_b_stacked])
        for own, buffer in zip((*a, *b), theirs, strict=True):
            if own is not None and not torch.equal(buffer[: len(own), : own.shape[1]], own.to(buffer.dtype)):
                return layer.base_layer.prefix
        return None

    def weight_bytes(self) -> int:
        buffers = [t for layer, _ in self._layers for t in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
        return held_bytes(self.model.parameters(), self.engine_model.parameters(), buffers)


class RestartBridge(WeightBridge):
    """A new engine from a checkpoint; slow, and independent of everything the other bridges rely on."""

    keeps_engine = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._folder: Path | None = None

    @contextmanager
    def loading(self, output_dir: Path) -> Iterator[dict[str, Any]]:
        """The checkpoint is there within the context only."""
        if self._folder is None:  # of one engine after the other: vLLM keeps what it compiles under the model's path
            self._folder = Path(mkdtemp(prefix="engine-weights-", dir=output_dir))
        self._folder.mkdir(exist_ok=True)
        try:
            self.save(str(self._folder))
            yield {"model": str(self._folder)}
        finally:
            rmtree(self._folder)

    def attach(self, runner: Any, rebuild: Callable[[], None]) -> None:
        super().attach(runner, rebuild)
        self._rebuild = rebuild

    def sync(self) -> None:
        """Start a new engine from a new checkpoint."""
        self._rebuild()

    def save(self, folder: str) -> None:
        """Write the weights, adapters merged, as a checkpoint without a tokenizer."""
        with torch.no_grad():
            weights = dict(merged_weights(self.model))
            base_model(self.model).save_pretrained(folder, state_dict=weights, max_shard_size=SHARD)


def make_bridge(name: str, model: nn.Module) -> WeightBridge:
    """The bridge that `weight_bridge` names."""
    return {"shared": SharedBridge, "copy": CopyBridge, "lora": LoraBridge, "restart": RestartBridge}[name](model)


def lora_ranks() -> tuple[int, ...]:
    """The ranks for which vLLM has adapter buffers."""
    from vllm.config.lora import MaxLoRARanks

    return MaxLoRARanks.__args__


def _base_weights(engine_model: nn.Module, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model, its adapters aside, as far as the engine has a place for their names."""
    named = ((name, p.data) for name, p in base_parameters(model, every_name=True).items())
    return _known_to(engine_model, model, named)


def _known_to(
    engine_model: nn.Module, model: nn.Module, named: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Without further names of tied weights for which the engine has no tensor of its own (Gemma 2 has no head there,
    Bloom's is tied as well)."""
    first = base_parameters(model)
    own = {name for name, _ in engine_model.named_parameters()}
    return ((name, weight) for name, weight in named if name in first or name in own)


def merged_weights(
    model: nn.Module, every_name: bool = False, names: Container[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model by the names they have without adapters, each adapter added to its layer's.

    One layer's sum at a time: a caller that copies as it goes holds no second set of weights.

    Args:
        names: Give these alone.
    """
    modules = dict(base_model(model).named_modules())
    for name, parameter in base_parameters(model, every_name).items():
        if names is not None and name not in names:
            continue
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


@contextmanager
def _in_memory(weights: Callable[[nn.Module], Iterator[tuple[str, Tensor]]]) -> Iterator[dict[str, Any]]:
    """Let an engine that starts within the context load what `weights` gives for its module, from memory.

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

    register_model_loader(LOAD_FORMAT)(TrainerLoader)
    try:
        yield {"load_format": LOAD_FORMAT}
    finally:
        del _LOAD_FORMAT_TO_MODEL_LOADER[LOAD_FORMAT]  # it holds the trainer's model
