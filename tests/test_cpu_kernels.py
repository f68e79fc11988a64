"""What vLLM's CPU build computes otherwise than as shipped, against what it computes as shipped."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainers.engine_setup import prepare_environment

SLICES = (6, 4)
WIDTH = sum(SLICES) + 2  # an engine's layer may be padded


@pytest.fixture(scope="module")
def kinds() -> SimpleNamespace:
    """The class of this project, and vLLM's; neither is imported before the environment is prepared."""
    prepare_environment(torch.device("cpu"))
    from trainers.weights.cpu_kernels import OneAdapter, PunicaWrapperCPU

    return SimpleNamespace(ours=OneAdapter, shipped=PunicaWrapperCPU)


def added(
    kind: type[Any],
    tokens: list[int],
    adapters: int = 1,
    is_prefill: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What is added for a batch with these tokens' adapters, 0 for none."""
    from vllm.lora.layers import LoRAMapping

    wrapper = kind(max_num_batched_tokens=32, max_batches=8, device="cpu")
    mapping = LoRAMapping(tuple(tokens), tuple(tokens), is_prefill=is_prefill)
    wrapper.update_metadata(mapping, [7, 8][:adapters], adapters, 100)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(tokens), 8, generator=generator)
    a = tuple(torch.randn(adapters, 1, 3, 8, generator=generator) for _ in SLICES)
    b = tuple(torch.randn(adapters, 1, size, 3, generator=generator) for size in SLICES)
    y = torch.ones(len(tokens), WIDTH)
    wrapper.add_lora_linear(y, x, tuple(t.to(dtype) for t in a), tuple(t.to(dtype) for t in b), 0.5, SLICES)
    return y - 1


@pytest.mark.parametrize("is_prefill", [True, False])
@pytest.mark.parametrize(("tokens", "adapters"), [([7] * 5, 1), ([7], 1), ([7, 8, 8], 2)])
def test_the_product_of_an_adapter_is_vllms_own(
    kinds: SimpleNamespace, tokens: list[int], adapters: int, is_prefill: bool
) -> None:
    ours, shipped = (added(kind, tokens, adapters, is_prefill) for kind in (kinds.ours, kinds.shipped))
    assert shipped[:, : sum(SLICES)].abs().min() > 0
    torch.testing.assert_close(ours, shipped, atol=1e-5, rtol=1e-5)
    assert not ours[:, sum(SLICES) :].any()


def test_adapters_of_another_type_are_cast(kinds: SimpleNamespace) -> None:
    """As with `vllm_kwargs={lora_dtype: bfloat16}` on weights in fp32."""
    ours, shipped = (added(kind, [7] * 3, dtype=torch.bfloat16) for kind in (kinds.ours, kinds.shipped))
    assert shipped.any() and torch.equal(ours, shipped)


def test_tokens_without_an_adapter_get_nothing(kinds: SimpleNamespace) -> None:
    assert not added(kinds.ours, [0, 0, 0]).any()


def test_a_lone_adapter_is_not_copied_for_each_token(kinds: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def shipped(*arguments: object, **named: object) -> None:
        raise AssertionError("vLLM's own product")

    monkeypatch.setattr(kinds.shipped, "add_lora_linear", shipped)
    added(kinds.ours, [7] * 3)
    with pytest.raises(AssertionError, match="vLLM's own product"):
        added(kinds.ours, [7, 0, 7])


def test_the_cpu_build_takes_it(kinds: SimpleNamespace) -> None:
    from vllm.platforms.cpu import CpuPlatform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from trainers.weights.cpu_kernels import adapt_vllm

    adapt_vllm()
    assert resolve_obj_by_qualname(CpuPlatform.get_punica_wrapper()) is kinds.ours
