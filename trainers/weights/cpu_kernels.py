"""What vLLM's CPU build computes otherwise than as shipped; on CUDA none of it is needed, or done.

Import it only once the environment is prepared (engine.py), and call `adapt_vllm` before the engine is built.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers import utils
from vllm.platforms.cpu import CpuPlatform


class OneAdapter(PunicaWrapperCPU):
    """vLLM's products with LoRA adapters, but with an adapter that all tokens share as two matrix products.

    As shipped the adapter's matrices are copied out once for every token, since each might have another; that took
    half of the time of generation.
    """

    def update_metadata(self, mapping: Any, *arguments: Any, **named: Any) -> None:
        super().update_metadata(mapping, *arguments, **named)
        self.adapters = set(mapping.index_mapping)  # of the batch's tokens; 0 is none

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **named: Any,
    ) -> None:
        """Add scale * x A^T B^T to each slice of y.

        Args:
            y: (tokens, outputs), changed in place.
            x: (tokens, inputs).
            lora_a_stacked: For each slice A of every adapter, (adapters, 1, rank, inputs).
            lora_b_stacked: For each slice B of every adapter, (adapters, 1, outputs of the slice, rank).
            output_slices: Outputs of each slice, in y's order.
        """
        if len(self.adapters) != 1 or len(lora_a_stacked[0]) != 1 or lora_a_stacked[0].dtype != x.dtype:
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **named)
        elif 0 not in self.adapters:
            x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            slices = y[:, : sum(output_slices)].split(output_slices, dim=1)
            for part, a, b in zip(slices, lora_a_stacked, lora_b_stacked, strict=True):
                part.addmm_(linear(x, a[0, 0]), b[0, 0].T, alpha=scale)


def _dispatch_linear(layer: nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = linear


def adapt_vllm() -> None:
    """Have vLLM's CPU build compute with the live weight of each linear layer, and a lone adapter as a whole.

    As shipped it repacks the weights for oneDNN at load and empties the originals, so nothing could ever update them.
    On CUDA nothing of the kind happens in bf16.
    """
    utils.dispatch_cpu_unquantized_gemm = _dispatch_linear
    CpuPlatform.get_punica_wrapper = classmethod(lambda platform: f"{__name__}.{OneAdapter.__name__}")
