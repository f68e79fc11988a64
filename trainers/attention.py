"""Which attention a model is loaded with, and what of torch's it can use where it computes."""

import re
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainers.errors import ConfigError, Fault

REPEATED_KEYS = "sdpa_repeated_keys"


def attention_of(asked: str | None, config: Any) -> str | None:
    """The attention to load a model with; None leaves it to transformers (sdpa where a model has it, else eager).

    Transformers' sdpa leaves out the cap that Gemma 2 puts on its attention scores, and vLLM does not.

    Raises:
        ConfigError: If sdpa is asked for with such a model.
    """
    if not (cap := getattr(config.get_text_config(), "attn_logit_softcapping", None)):
        return asked
    if asked == "sdpa":
        cause = f"it leaves out the cap of {cap:g} that {config.model_type} puts on its attention scores"
        raise ConfigError(Fault("attn_implementation", asked, cause, "attn_implementation=eager or flash_attention_2"))
    return asked or "eager"


def leave_out_cudnn() -> None:
    """As vLLM has it for the whole process: cuDNN's attention makes a plan for each new number of texts and tokens."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def attention_fault(attention: str | None, error: Exception) -> Fault | None:
    """Of an attention that a model has not or that is not installed; None where something else is wrong."""
    cause = str(error).strip().splitlines() or [""]
    if attention is None or not re.search("attention|attn|scaled_dot_product", cause[0], re.IGNORECASE):
        return None
    return Fault("attn_implementation", attention, cause[0], "attn_implementation=null or eager")


def suit_attention(model: PreTrainedModel | PeftModel, device: torch.device) -> None:
    """Have a model repeat keys that several heads share, where it is to compute on a GPU that asks for it.

    Without a mask transformers' sdpa leaves them shared. Of a GPU's kernels only FlashAttention takes them so, in 16
    bits and from Ampere on; for others torch would write down the scores of all heads, `[texts, heads, tokens,
    tokens]`. Repeated, they go to the memory-efficient kernel.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.config._attn_implementation == "sdpa" and not _takes_shared_keys(device, base.dtype):
        base.set_attn_implementation(REPEATED_KEYS)


def _takes_shared_keys(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda":
        return True
    return dtype.itemsize == 2 and torch.cuda.get_device_capability(device) >= (8, 0)


def _repeated_keys(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa_attention_forward` for queries `[texts, heads, tokens, width]`, keys and values
    `[texts, fewer heads, tokens, width]`; returns `[texts, tokens, heads, width]`."""
    groups = getattr(module, "num_key_value_groups", 1)
    alone = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # no groups, as none share any more
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return sdpa_attention_forward(alone, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(REPEATED_KEYS, _repeated_keys)
AttentionMaskInterface.register(REPEATED_KEYS, sdpa_mask)
