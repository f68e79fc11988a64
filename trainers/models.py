"""Loading models and tokenizers, and making tiny ones from nothing."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trainers.attention import attention_fault, attention_of, leave_out_cudnn
from trainers.errors import ConfigError, Fault
from trainers.options import CommonOptions
from trainers.plan.hardware import cpu_torch_fault, num_cuda_devices

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Turns of ChatML, as Qwen models use them.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def resolve_device(device: str) -> torch.device:
    """Return the device that `auto`, `cuda` or `cpu` means here.

    Raises:
        ConfigError: If there is a card that this torch cannot use, and the CPU was not asked for.
    """
    if device == "cpu" or num_cuda_devices() == 0:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.version.cuda is None:
        raise ConfigError(cpu_torch_fault(device))
    cause = f"there is an NVIDIA card, and torch, built for CUDA {torch.version.cuda}, cannot use it"
    remedy = "update the NVIDIA driver (python -c 'import torch; torch.zeros(1).cuda()' says more), or device=cpu"
    raise ConfigError(Fault("device", device, cause, remedy))


def resolve_dtype(precision: str, device: torch.device, every_weight: bool = False) -> torch.dtype:
    """Return the type of the weights; see the option `precision`.

    Args:
        every_weight: Whether all weights are trained. Loss scaling (arXiv 1710.03740), without which small gradients
            vanish in fp16, needs weights in fp32: as adapters are.

    Raises:
        ConfigError: If it is fp16 without a GPU.
    """
    if precision == "auto" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        precision = "fp32" if every_weight else "fp16"
        logger.info("this GPU has no bf16 hardware: precision=%s", precision)
    elif precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(Fault("precision", "fp16", "this run computes on the CPU", "precision=fp32 or bf16"))
    return DTYPES[precision]


def resolve_place(options: CommonOptions) -> tuple[torch.device, torch.dtype]:
    """Where a run computes, and in which type; on a GPU torch is set up for that.

    Raises:
        ConfigError: If that place cannot do what the options ask for.
    """
    device = resolve_device(options.device)
    if device.type == "cpu" and getattr(options, "activation_offloading", False):
        cause = "this run computes on the CPU: they are in host memory already"
        raise ConfigError(Fault("activation_offloading", True, cause, "activation_offloading=false"))
    if device.type == "cuda":
        leave_out_cudnn()
    return device, resolve_dtype(options.precision, device, not getattr(options, "use_peft", True))


def load_tokenizer(path: str, chat_template: str | None, eos_token: str | None, key: str, trust: bool) -> Any:
    """Load a tokenizer with a chat template (if any), an EOS and a pad token that is not the EOS.

    Raises:
        ConfigError: If it cannot be loaded, or `eos_token` is not in its vocabulary.
    """
    try:
        # Where a folder has Mistral's own tekken.json beside it, the tokenizer of mistral-common has no chat template.
        kwargs = {"trust_remote_code": trust, "padding_side": "left", "mistral_format": False}
        tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loadable(key, path, error)) from error
    if chat_template is not None:
        template_file = Path(chat_template).expanduser()
        is_text = "{" in chat_template
        tokenizer.chat_template = chat_template if is_text else template_file.read_text(encoding="utf-8")
    if eos_token is not None:
        if tokenizer.convert_tokens_to_ids(eos_token) in (None, tokenizer.unk_token_id):
            cause = f"{path} has no such token"
            raise ConfigError(Fault("eos_token", eos_token, cause, "name a token of its vocabulary"))
        tokenizer.eos_token = eos_token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, key: str) -> None:
    """See that a model has an embedding for each token.

    Args:
        rows: Of the embedding.

    Raises:
        ConfigError: If it has not.
    """
    added = tokenizer.added_tokens_decoder
    # Special tokens that no text brings (Gemma 3's for images) may lie beyond; what pads a batch may not.
    harmless = {i for i, token in added.items() if token.special} - {tokenizer.pad_token_id}
    last, token = max((i, token) for token, i in tokenizer.get_vocab().items() if i not in harmless)
    if last >= rows:
        cause = f"its tokenizer goes up to {last} ({token!r}), and its embedding has {rows} rows"
        remedy = "save it again with the tokenizer it was trained with, or after model.resize_token_embeddings"
        raise ConfigError(Fault(key, tokenizer.name_or_path, cause, remedy))


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int, key: str) -> None:
    """Give the tokenizer a pad token that differs from its EOS (else the EOS would be masked with the padding).

    A reserved token of the vocabulary is taken if there is one, else a new one if the model's embedding has a free row,
    else the token of the zero byte (`<0x00>`, or U+0100 in byte-level vocabularies), which no text holds.

    Args:
        vocab_size: Rows of the model's embedding.

    Raises:
        ConfigError: If neither is possible.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    reserved = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|fim_pad|>", "<unk>")
    names = (*reserved, *(("<0x00>", "\u0100") if len(tokenizer) >= vocab_size else ()))
    for name in names:
        if name in vocabulary and vocabulary[name] not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            tokenizer.pad_token = name
            break
    else:
        if len(tokenizer) >= vocab_size:
            cause = f"it has no token to pad with but the EOS {tokenizer.eos_token!r}, and its embedding no free row"
            remedy = "add a pad token to the model (tokenizer.add_special_tokens and model.resize_token_embeddings)"
            raise ConfigError(Fault(key, tokenizer.name_or_path, cause, remedy))
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    logger.info("%s: pad token %r (id %d)", key, tokenizer.pad_token, tokenizer.pad_token_id)


def generation_end_ids(path: str, trust: bool) -> tuple[int, ...]:
    """Tokens that the model's generation_config.json names as ends, e.g. an end of turn beside the EOS."""
    try:
        ends = GenerationConfig.from_pretrained(path, trust_remote_code=trust).eos_token_id
    except OSError:  # many models have none
        return ()
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def load_config(path: str, key: str, trust: bool) -> Any:
    """Load a model's config and see that it is a decoder-only language model.

    Raises:
        ConfigError: If it cannot be loaded or is of another kind.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loadable(key, path, error)) from error
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        cause = f"{config.model_type} is not a decoder-only language model"
        raise ConfigError(
            Fault(key, path, cause, "name a causal language model, e.g. of the Qwen, Llama or Gemma family")
        )
    return config


def _not_loadable(key: str, path: str, error: Exception) -> Fault:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    remedy = "give a local folder (is it one?), or log in and connect: hf auth login, HF_TOKEN for gated models"
    return Fault(key, path, f"neither a model folder here nor to be had from the hub: {reason}", remedy)


def damaged_fault(key: str, path: str, reason: str) -> Fault:
    """What is said of weights that a broken copy or download left incomplete."""
    return Fault(key, path, f"its weights cannot be read: {reason}", "copy or download the safetensors files again")


def load_model(
    path: str, dtype: torch.dtype, attention: str | None, key: str, trust: bool, **kwargs: Any
) -> PreTrainedModel:
    """Load a causal language model in `dtype`, on the CPU unless `kwargs` (of `from_pretrained`) say otherwise.

    Raises:
        ConfigError: If it cannot be loaded, or its files lack weights, which would be random.
    """
    attention = attention_of(attention, load_config(path, key, trust))
    arguments = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": trust} | kwargs
    try:
        model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **arguments)
    except SafetensorError as error:
        raise ConfigError(damaged_fault(key, path, str(error))) from error
    except (OSError, ValueError, ImportError) as error:
        if fault := attention_fault(attention, error):
            raise ConfigError(fault) from error
        if isinstance(error, ImportError):
            cause = f"cannot be loaded: {str(error).strip().splitlines()[0]}"
            raise ConfigError(Fault(key, path, cause, "install the package that it names")) from error
        raise ConfigError(_not_loadable(key, path, error)) from error
    if missing := sorted(found["missing_keys"]):
        cause = f"its files lack {len(missing)} of its weights, the first is {missing[0]}: they would be random"
        raise ConfigError(Fault(key, path, cause, "name a folder with all of them"))
    return model


def make_model(model_init: dict[str, Any], tokenizer: Any, seed: int, dtype: torch.dtype, attention: str | None) -> Any:
    """Make a model with fresh random weights from the keyword arguments of a transformers config.

    Raises:
        ConfigError: If transformers knows no such `model_type`, the sizes do not go together, or the vocabulary is
            smaller than the tokenizer's.
    """
    arguments = {"vocab_size": len(tokenizer), **model_init}
    model_type = arguments.pop("model_type", None)
    try:
        config = AutoConfig.for_model(model_type, **arguments)
    except StrictDataclassError as error:
        cause = " ".join(str(error).split())
        raise ConfigError(Fault("model_init", model_init, cause, "correct the argument it names")) from error
    except (ValueError, ArithmeticError) as error:
        raise ConfigError(
            Fault("model_init", model_init, str(error).splitlines()[0], "set model_type, e.g. qwen2")
        ) from error
    if config.vocab_size < len(tokenizer):
        cause = f"vocab_size {config.vocab_size} is smaller than the tokenizer's {len(tokenizer)} tokens"
        raise ConfigError(Fault("model_init", model_init, cause, f"vocab_size of at least {len(tokenizer)}"))
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    attention = attention_of(attention, config)
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        with torch.no_grad(), evaluating(model):  # sizes that do not go together show in the first pass only
            model(torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        cause = f"transformers cannot compute with such a model: {type(error).__name__}: {str(error).splitlines()[0]}"
        remedy = "hidden_size = num_attention_heads x head_dim, num_attention_heads a multiple of num_key_value_heads"
        raise ConfigError(Fault("model_init", model_init, cause, remedy)) from error
    return model


def make_tokenizer(texts: Iterable[str], tags: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with single-digit tokens, ChatML turns, and one token for each tag."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tags = list(tags)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tags),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Ordinary tokens, not special ones: a decoded completion must show its tags.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout meanwhile, and then as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
