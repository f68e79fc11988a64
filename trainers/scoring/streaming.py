"""Models that are larger than the memory they compute in: each layer's weights are brought in once for a whole pass.

The usual order of loops (for each text, for each layer) is turned around: for each layer, for all texts. The weights
stay in host memory or on disk; while one layer computes, the next is on its way. Only the hidden states of the pass
live on the device between two layers. FlexGen (arXiv 2303.06865) schedules generation the same way.
"""

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from trainers.attention import attention_fault, suit_attention
from trainers.errors import ConfigError, Fault
from trainers.weights.model_weights import ModelWeights, find_layers
from trainers.weights.weight_files import HostWeights, WeightFiles

logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]


class StreamedBackbone:
    """A decoder-only model whose layers pass through the device one by one.

    The code that runs is the model's own: its forward is called once with the layers replaced by recorders, which
    tells what each layer is given besides the hidden states, and once with the layers replaced by the result.

    Args:
        source: Its weights, in host memory or on disk.
        config: Its config.
        device: Where to compute.
        dtype: Of the weights and the arithmetic.
        attention: Attention implementation; None for transformers' choice.
        key: The option that named the model, for messages.
        move: Takes the tensors that are needed, which are not always all, to where they lie from then on.

    Raises:
        ConfigError: If the model is not a stack of layers, or its checkpoint does not hold the tensors that its
            parameters are.
    """

    def __init__(
        self,
        source: WeightFiles | HostWeights,
        config: Any,
        device: torch.device,
        dtype: torch.dtype,
        attention: str | None,
        key: str,
        trust: bool = False,
        move: Callable[[WeightFiles], WeightFiles | HostWeights] | None = None,
    ) -> None:
        self.source, self.config, self.device, self.dtype = source, config, device, dtype
        try:
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust
                )
        except (ValueError, ImportError) as error:
            if fault := attention_fault(attention, error):
                raise ConfigError(fault) from error
            raise
        suit_attention(self.model.eval().requires_grad_(False), device)
        self.model.tie_weights()
        self.base = self.model.base_model
        self._weights = _model_weights(self.model, source, key)
        self.layers, self._prefix = _find_layers(self.model, key)
        self._groups = [
            {name: f"{self._prefix}.{i}.{name}" for name, _ in layer.named_parameters()}
            for i, layer in enumerate(self.layers)
        ]
        self._embedding, self._lm_head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self._embedding.padding_idx = None  # it may lie outside the few rows that are looked up
        head = _name_of(self.model, self._lm_head).rpartition(".")[0]
        self._head_names = {leaf: f"{head}.{leaf}" for leaf, _ in self._lm_head.named_parameters()}
        if move is not None:
            self.source = self._weights.source = move(source.only(self._weights.stored()))
        self._place_the_rest()
        self._try(key)

    @property
    def lm_head(self) -> nn.Module:
        return self._lm_head

    @torch.no_grad()
    def blend(self, parameters: dict[str, Tensor], share: float) -> None:
        """See `Backbone.blend`; the weights must be in host memory."""
        assert isinstance(self.source, HostWeights), "weights on disk are never written"
        for name, value in parameters.items():
            self._weights.blend(name, value.cpu(), share)
        self._place_the_rest()

    def _place_the_rest(self) -> None:
        """Put what is neither embedding, layer nor head (the last norm, and buffers) on the device for good."""
        apart = {id(p) for module in (self._embedding, self._lm_head) for p in module.parameters()}
        for name, parameter in list(self.model.named_parameters()):
            is_apart = id(parameter) in apart or name.startswith(self._prefix + ".")
            if name in self._weights and not is_apart:
                module, leaf = self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                value = self._weights.tensor(name).to(self.device, self.dtype, copy=True)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        for module in self.model.modules():
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = None if buffer is None else buffer.to(self.device)

    def run(self, batches: list[Tensor]) -> Iterator[Tensor]:
        """See `Backbone.run`. Each layer's weights are read once for all batches."""
        with _Feeder(self._weights, self.device, self.dtype) as feeder:
            weights = feeder.stream(self._groups)
            hidden, calls = [], []
            for ids in batches:
                states, call = self._record(ids)
                hidden.append(states)
                calls.append(call)
            for i, layer in enumerate(self.layers):
                layer_weights = next(weights)
                if i == max(0, len(self.layers) - 2):
                    head = feeder.begin(self._head_names)  # on its way, behind the last layer, while these compute
                for b, call in enumerate(calls):
                    args, kwargs = call[i]
                    # In place: blocks that live on among short-lived ones would fragment the memory.
                    hidden[b].copy_(functional_call(layer, layer_weights, (hidden[b], *args), kwargs, strict=True))
            del layer_weights
            weights.close()
            feeder.release()
            with self._placed_head(feeder.end(head)):
                for b in range(len(batches)):
                    states, hidden[b] = hidden[b], None
                    yield self._finish(states)

    @contextmanager
    def placed_head(self) -> Iterator[None]:
        """Have the head's weights on the device for a while."""
        with _Feeder(self._weights, self.device, self.dtype) as feeder:
            weights = feeder.end(feeder.begin(self._head_names))
        with self._placed_head(weights):
            yield

    @torch.no_grad()
    def finish(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden states and, while the head is there, the logits that the model's own forward makes of the
        states `[texts, tokens, hidden]` behind its last layer."""
        with _forwards_replaced(self.layers, lambda *_, **__: states):
            logits = self.model(inputs_embeds=states, use_cache=False).logits
        return self._finish(states), logits

    def _try(self, key: str) -> None:
        """See on two tokens that the layers can be taken out of the model's forward.

        Raises:
            ConfigError: If it does anything else with the layers than to call one after the other.
        """
        kind, path = type(self.model).__name__, self.config._name_or_path
        if any(True for layer in self.layers for _ in layer.buffers()):
            cause = f"the layers of {kind} hold more than parameters: it cannot be streamed"
            raise ConfigError(Fault(key, path, cause, _remedy(key)))
        try:
            with torch.no_grad():
                self._finish(self._record(torch.zeros(1, 2, dtype=torch.long))[0])
        except (IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            cause = (
                f"{kind} does more with its layers than to call one after the other ({error}): it cannot be streamed"
            )
            raise ConfigError(Fault(key, path, cause, _remedy(key))) from error

    def _record(self, ids: Tensor) -> tuple[Tensor, list[tuple[tuple, dict]]]:
        """The states that enter the first layer, and what else each layer is called with."""
        calls: list[tuple[tuple, dict]] = []
        entered: list[Tensor] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            entered.append(hidden)
            calls.append((args, kwargs))
            return hidden

        with _forwards_replaced(self.layers, record):
            self.base(inputs_embeds=self._embed(ids), use_cache=False)
        if len(calls) != len(self.layers) or any(states is not entered[0] for states in entered):
            raise RuntimeError("it computes between them")
        return entered[0], calls

    def _embed(self, ids: Tensor) -> Tensor:
        """Look tokens up: only the rows that occur are read, and brought to the device."""
        unique, inverse = ids.unique(return_inverse=True)
        table = self._weights.tensor(_name_of(self.model, self._embedding))
        pinned = self.device.type == "cuda"
        rows = torch.empty(len(unique), table.size(1), dtype=table.dtype, pin_memory=pinned)
        torch.index_select(table, 0, unique, out=rows)
        rows = rows.to(self.device, non_blocking=True).to(self.dtype)
        return functional_call(self._embedding, {"weight": rows}, (inverse.to(self.device),))

    def _finish(self, states: Tensor) -> Tensor:
        """What the model makes of the states behind its last layer."""
        with _forwards_replaced(self.layers, lambda *_, **__: states):
            return self.base(inputs_embeds=states, use_cache=False).last_hidden_state

    @contextmanager
    def _placed_head(self, weights: Weights) -> Iterator[None]:
        empty = dict(self._lm_head._parameters)
        for leaf, value in weights.items():
            self._lm_head._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        try:
            yield
        finally:
            self._lm_head._parameters.update(empty)


class _Feeder:
    """Brings groups of weights to the device, one ahead of its use, in a thread and on a stream of its own."""

    def __init__(self, weights: ModelWeights, device: torch.device, dtype: torch.dtype) -> None:
        self.weights, self.device, self.dtype = weights, device, dtype
        self._slots: list[Weights] = [{}, {}]
        self._free: list[torch.cuda.Event | None] = [None, None]
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None

    def __enter__(self) -> "_Feeder":
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        if self._is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return self

    def __exit__(self, *_: Any) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._is_cuda:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def release(self) -> None:
        """Give the memory of the two groups back."""
        for slot in self._slots:
            slot.clear()

    def stream(self, groups: list[dict[str, str]]) -> Iterator[Weights]:
        """Yield the tensors of each group by their own names; they are overwritten two groups later.

        The first group is on its way as soon as this is called.
        """
        for slot, group in zip(self._slots, groups, strict=False):
            self._fit(slot, group)
        return self._follow(groups, self._thread.submit(self._fill, 0, groups[0]))

    def _follow(self, groups: list[dict[str, str]], ahead: Future) -> Iterator[Weights]:
        for i in range(len(groups)):
            if (event := ahead.result()) is not None:
                torch.cuda.current_stream(self.device).wait_event(event)
            if i + 1 < len(groups):
                # The slot of group i - 1, whose computation has been issued: on a GPU the copy waits for its end.
                if i and self._is_cuda:
                    self._free[(i + 1) % 2] = torch.cuda.current_stream(self.device).record_event()
                self._fit(self._slots[(i + 1) % 2], groups[i + 1])
                ahead = self._thread.submit(self._fill, (i + 1) % 2, groups[i + 1])
            yield self._slots[i % 2]

    def _fit(self, slot: Weights, group: dict[str, str]) -> None:
        """Make the slot hold tensors of this group's shapes; layers are mostly alike, and nothing is allocated."""
        shapes = {name: self.weights.shape(there) for name, there in group.items()}
        if {name: tuple(t.shape) for name, t in slot.items()} != shapes:
            slot.clear()
            # One block for the whole group: a large one goes back to the system when it is freed. Each tensor in it
            # begins at a multiple of 64 elements, as matrix kernels like it.
            sizes = [math.prod(shape) for shape in shapes.values()]
            block = torch.empty(sum(-(-n // 64) * 64 for n in sizes), dtype=self.dtype, device=self.device)
            parts = zip(shapes.items(), sizes, block.split([-(-n // 64) * 64 for n in sizes]), strict=True)
            slot.update({name: part[:n].view(shape) for (name, shape), n, part in parts})
            if self._is_cuda:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def _fill(self, index: int, group: dict[str, str]) -> "torch.cuda.Event | None":
        slot = self._slots[index]
        if not self._is_cuda:
            self.weights.read(group, slot)
            return None
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if self._free[index] is not None:
                self._stream.wait_event(self._free[index])
            self.weights.read(group, slot)
            return self._stream.record_event()

    def begin(self, group: dict[str, str]) -> Future:
        """Start to bring one more group; on a CPU its tensors stay where they are."""
        if not self._is_cuda:
            return self._thread.submit(self._mapped, group)
        shapes = {name: self.weights.shape(there) for name, there in group.items()}
        values = {name: torch.empty(s, dtype=self.dtype, device=self.device) for name, s in shapes.items()}
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return self._thread.submit(self._bring, group, values)

    def end(self, started: Future) -> Weights:
        """The tensors of the group that `begin` has started, there for what the device computes from here on."""
        values, event = started.result()
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        return values

    def _mapped(self, group: dict[str, str]) -> tuple[Weights, None]:
        stored = {name: self.weights.tensor(name_there) for name, name_there in group.items()}
        self.weights.source.bytes_read += sum(tensor.nbytes for tensor in stored.values())
        return {name: tensor.to(self.dtype) for name, tensor in stored.items()}, None

    def _bring(self, group: dict[str, str], values: Weights) -> "tuple[Weights, torch.cuda.Event]":
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            self.weights.read(group, values)
            return values, self._stream.record_event()


@contextmanager
def _forwards_replaced(layers: nn.ModuleList, forward: Any) -> Iterator[None]:
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is module) + ".weight"


def _find_layers(model: Any, key: str) -> tuple[nn.ModuleList, str]:
    try:
        return find_layers(model)
    except ValueError as error:
        fault = Fault(key, model.config._name_or_path, f"{error}: it cannot be streamed", _remedy(key))
        raise ConfigError(fault) from error


def _model_weights(model: Any, source: WeightFiles | HostWeights, key: str) -> ModelWeights:
    weights = ModelWeights(model, source)
    if wrong := weights.missing:
        cause = f"its files do not hold {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''} as it is in the model"
        raise ConfigError(Fault(key, model.config._name_or_path, f"{cause}: it cannot be streamed", _remedy(key)))
    return weights


def _remedy(key: str) -> str:
    mode = "student_mode" if key == "student_model" else "reference_mode"
    return f"{mode}=resident or {mode}=cpu"
