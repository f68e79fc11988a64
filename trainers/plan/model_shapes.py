"""What a model is made of, from its config alone: the names and shapes of its parameters.

For the common families the shapes are worked out here, without torch (a test compares them with the models of
transformers); for any other family transformers builds the model without memory, which takes some seconds.
"""

import json
import re
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from trainers.errors import ConfigError, Fault
from trainers.plan.known_models import KNOWN_MODELS
from trainers.weights.hub import asked_config, cached_file

Shape = tuple[int, ...]

SIZES = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
# What a config that leaves a key out means, as transformers has it; where num_key_value_heads is null, or is in neither
# of the two, there are as many as heads.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 2**17},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "phi3": {"max_position_embeddings": 4096},
    "gemma2": {
        "attn_logit_softcapping": 50.0,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 2**17,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
}
LONGROPE = ("longrope", "su")  # one kind, by its name and by that of its first checkpoints
# Families whose layers have biases where the config says so; the others ignore it.
ATTENTION_BIAS = ("llama", "qwen3", "gemma2", "gemma3_text")
MLP_BIAS = ("llama",)


def can_share_prompts(config: dict[str, Any]) -> bool:
    """Whether a prompt can be read once for the completions that continue it (trainers/rollout/shared_prompts.py).

    It is tested with the families above; and rotary embeddings that depend on how long the longest row is (of the kinds
    `longrope` and `dynamic`, for long contexts) might not be the same, as the last token of a row is not read.
    """
    if config.get("model_type") not in FAMILY_DEFAULTS:
        return False
    return not any(kind in (*LONGROPE, "dynamic") for kind in _rope_kinds(config))


def _rope_kinds(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rotary embeddings of a model by their kind, as its config names it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = [one for one in (rope, *rope.values()) if isinstance(one, dict)]  # gemma3 has one for each kind of layer
    return {str(one.get("rope_type", one.get("type"))): one for one in found}


def longrope_limit(config: dict[str, Any]) -> int | None:
    """Up to how many tokens a rotary embedding of the kind `longrope` (arXiv 2402.13753) takes its short factors.

    transformers takes the long ones for all rows of a batch if the longest row is longer; vLLM takes them for
    everything once its `max_model_len` is. None for a model without such an embedding.
    """
    found = next((one for kind, one in _rope_kinds(config).items() if kind in LONGROPE), None)
    if found is None:
        return None
    key = "original_max_position_embeddings"
    default = 4096 if config.get("model_type") == "phi3" else config.get("max_position_embeddings")
    return config.get(key) or found.get(key) or default


def sliding_window(config: dict[str, Any]) -> int | None:
    """See `ModelShape.window`."""
    family = config.get("model_type")
    if not config.get("use_sliding_window", family not in ("qwen2", "qwen3")):
        return None
    return config.get("sliding_window", 4096 if family in ("mistral", "gemma2", "gemma3_text") else None)


class AdapterShape(NamedTuple):
    """The rank of a LoRA adapter, and the layers that have one (as the option lora_target_modules names them)."""

    rank: int
    targets: str | list[str]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only model.

    Attributes:
        parameters: Each stored parameter's shape by its name; a tied head is not listed.
        layer_prefix: What the names of the layers' parameters begin with, before the layer's number.
        kv_width: Elements of keys and values of one token in one layer.
        can_stream: Whether its layers can pass the device one by one, as far as is known without its files
            (scoring/streaming.py).
        beside_text: Elements of the parameters that text does not need: they are not streamed.
        adapter: Of an adapter, whose base the other sizes are of.
        can_share_prompts: See the function of that name.
        caps_scores: Whether its attention scores go through tanh, and the result is kept too.
        eager_unless_told: Whether its attention is eager where none is asked for (trainers/attention.py).
        window: Tokens that some of its layers look back at the most; None where all see everything before them.
        quantized: `8bit` or `4bit` where its linear layers are stored, and computed with, in so many; the method of
            another quantized checkpoint; None of any other.
    """

    name: str
    model_type: str
    parameters: dict[str, Shape]
    layer_prefix: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    kv_width: int
    can_stream: bool = True
    beside_text: int = 0
    adapter: AdapterShape | None = None
    can_share_prompts: bool = False
    caps_scores: bool = False
    eager_unless_told: bool = False
    window: int | None = None
    quantized: str | None = None

    @cached_property
    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self.parameters.values())

    @cached_property
    def ties_head(self) -> bool:
        """Whether head and embedding are one weight."""
        return list(self.parameters.values()).count((self.vocab, self.hidden)) < 2

    @cached_property
    def largest_parameter(self) -> int:
        """Elements of it."""
        return max(map(prod, self.parameters.values()))

    @cached_property
    def largest_layer(self) -> int:
        """Elements of the layer with the most, each tensor rounded up to 64 as a streamed layer's are."""
        sizes: dict[str, int] = {}
        for name, shape in self.parameters.items():
            if name.startswith(self.layer_prefix):
                number = name[len(self.layer_prefix) :].split(".", 1)[0]
                sizes[number] = sizes.get(number, 0) + -(-prod(shape) // 64) * 64
        return max(sizes.values())

    @cached_property
    def linear_shapes(self) -> list[Shape]:
        """`(out, in)` of each linear layer that `lora_target_modules=all-linear` adapts."""
        return [s for n, s in self.parameters.items() if n.startswith(self.layer_prefix) and len(s) == 2]

    def linears(self, targets: str | list[str]) -> list[Shape]:
        """`(out, in)` of the linear layers that these target modules name."""
        if targets == "all-linear":
            return self.linear_shapes
        inside = {n.removesuffix(".weight"): s for n, s in self.parameters.items() if len(s) == 2}
        if isinstance(targets, str):  # as peft: a regular expression for the whole name
            return [shape for name, shape in inside.items() if re.fullmatch(targets, name)]
        return [shape for name, shape in inside.items() if any(f".{name}".endswith(f".{t}") for t in targets)]

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values of one token, over all layers."""
        return self.num_layers * self.kv_width * itemsize


def read_config(path: str, key: str) -> dict[str, Any]:
    """The config of a model: a folder's, one that an earlier download left, a well-known model's, or the hub's.

    Raises:
        ConfigError: If it cannot be had.
    """
    here = local_config(path)
    if here is None and path in KNOWN_MODELS:
        return KNOWN_MODELS[path]
    if here is None:
        config, reason = asked_config(path)
        if config is None:
            remedy = "give a local folder, or log in and connect: hf auth login, HF_TOKEN for gated models"
            raise ConfigError(Fault(key, path, f"its config cannot be had: {reason}", remedy))
        return config
    try:
        config = json.loads(here.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, no mapping")
        return config
    except (OSError, ValueError) as error:
        remedy = "name a folder that save_pretrained() wrote, whole; of a download, remove that file"
        raise ConfigError(Fault(key, path, f"{here} cannot be read: {error}", remedy)) from error


def local_config(path: str) -> Path | None:
    """The config.json of a model's folder, or of what an earlier download left of it; None where there is neither."""
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder / "config.json"
    kept = cached_file(path, "config.json")
    return Path(kept) if kept else None


def _float_written_out(value: dict[str, Any]) -> Any:
    """transformers 5 saves an infinite float as `{"__float__": "Infinity"}`."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


@cache
def _shape_of(config_json: str, name: str, trust: bool) -> ModelShape:
    config = json.loads(config_json, object_hook=_float_written_out)
    for size in sorted(SIZES & config.keys()):
        if config[size] is not None and not (isinstance(config[size], int | list) and config[size]):
            value = f"{name or config.get('model_type')}: {size}={config[size]!r}"
            raise ConfigError(Fault("model", value, "a size is a whole number above 0", "correct the model's config"))
    is_known = config.get("model_type") in FAMILY_DEFAULTS and SIZES <= config.keys()
    shape = _known_family(config, name) if is_known else _from_transformers(config, name, trust)
    if (quantization := config.get("quantization_config")) is None:
        return shape
    return replace(shape, can_stream=False, quantized=_stored_as(quantization))


def _stored_as(quantization: dict[str, Any]) -> str:
    """See `ModelShape.quantized`: bits of the methods that keep their layers so on any card. Others may become what
    they were once loaded (mxfp4, fp8)."""
    method, bits = quantization.get("quant_method", "other bits"), quantization.get("bits")
    if method == "bitsandbytes":
        bits = 4 if quantization.get("load_in_4bit") else 8
    return f"{bits}bit" if method in ("bitsandbytes", "gptq", "awq") and bits in (4, 8) else method


def model_shape(config: dict[str, Any], name: str = "", trust: bool = False) -> ModelShape:
    """The sizes of a model.

    Args:
        config: As `config.json` holds it.
        name: For messages.
        trust: Whether code of the model's repository may run, where its family is unknown.

    Raises:
        ConfigError: If it is no decoder-only model that transformers can build.
    """
    return _shape_of(json.dumps(config, sort_keys=True), name, trust)


def _known_family(config: dict[str, Any], name: str) -> ModelShape:
    family = config["model_type"]
    given = FAMILY_DEFAULTS[family] | {k: v for k, v in config.items() if v is not None}
    hidden, inner = given["hidden_size"], given["intermediate_size"]
    heads = given["num_attention_heads"]
    is_null = config.get("num_key_value_heads", ...) is None
    kv_heads = heads if is_null else given.get("num_key_value_heads", heads)
    head_dim = given.get("head_dim") or hidden // heads
    layers, vocab = given["num_hidden_layers"], given["vocab_size"]
    prefix = "model.layers."
    layer = _layer_shapes(family, given, hidden, inner, heads * head_dim, kv_heads * head_dim, head_dim)
    parameters: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        parameters |= {f"{prefix}{i}.{leaf}": shape for leaf, shape in layer.items()}
    parameters["model.norm.weight"] = (hidden,)
    if not given.get("tie_word_embeddings", False):
        parameters["lm_head.weight"] = (vocab, hidden)
    positions = given["max_position_embeddings"]
    sizes = (hidden, inner, layers, heads, kv_heads, head_dim, vocab, positions, 2 * kv_heads * head_dim)
    capped = bool(config.get("attn_logit_softcapping", FAMILY_DEFAULTS[family].get("attn_logit_softcapping")))
    further = {"can_share_prompts": can_share_prompts(config), "caps_scores": capped, "eager_unless_told": capped}
    further["window"] = sliding_window(config)
    return ModelShape(name, family, parameters, prefix, *sizes, **further)


def _layer_shapes(
    family: str, given: dict[str, Any], hidden: int, inner: int, q: int, kv: int, head_dim: int
) -> dict[str, Shape]:
    """The parameters of one layer; `q` and `kv` are the widths of the queries and of the keys."""
    if family == "phi3":
        shapes: dict[str, Shape] = {
            "self_attn.o_proj.weight": (hidden, q),
            "self_attn.qkv_proj.weight": (q + 2 * kv, hidden),
            "mlp.gate_up_proj.weight": (2 * inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
    else:
        shapes = {f"self_attn.{n}_proj.weight": (w, hidden) for n, w in (("q", q), ("k", kv), ("v", kv))}
        shapes["self_attn.o_proj.weight"] = (hidden, q)
        shapes |= {f"mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes["mlp.down_proj.weight"] = (hidden, inner)
        has_bias = family in ATTENTION_BIAS and given.get("attention_bias")
        if family == "qwen2" or has_bias:
            shapes |= {f"self_attn.{n}_proj.bias": (w,) for n, w in (("q", q), ("k", kv), ("v", kv))}
        if has_bias:
            shapes["self_attn.o_proj.bias"] = (hidden,)
        if family in MLP_BIAS and given.get("mlp_bias"):
            shapes |= {f"mlp.{n}_proj.bias": (inner,) for n in ("gate", "up")} | {"mlp.down_proj.bias": (hidden,)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family.startswith("gemma"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes |= {f"{norm}.weight": (hidden,) for norm in norms}
    if family in ("qwen3", "gemma3_text"):
        shapes |= {f"self_attn.{n}_norm.weight": (head_dim,) for n in ("q", "k")}
    return shapes


def _from_transformers(config: dict[str, Any], name: str, trust: bool) -> ModelShape:
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments = {k: v for k, v in config.items() if k != "model_type"}
    refusals = (ValueError, KeyError, OSError, ImportError, AttributeError, TypeError, StopIteration)
    refusals += (StrictDataclassError,)  # of sizes that contradict each other
    try:
        full = (
            AutoConfig.from_pretrained(name, trust_remote_code=True)
            if trust and "auto_map" in config
            else AutoConfig.for_model(config.get("model_type"), **arguments)
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(full, trust_remote_code=trust)
        return _built_shape(model, full, config["model_type"], name)
    except ConfigError:
        raise
    except refusals as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        cause = f"transformers cannot build it, or its layers are not alike: {reason[0]}"
        fault = Fault("model", name or config.get("model_type"), cause, "name a causal language model")
        raise ConfigError(fault) from error


def _built_shape(model: Any, config: Any, model_type: str, name: str) -> ModelShape:
    """The sizes of a model that transformers has built without memory."""
    from trainers.weights.model_weights import can_be_mapped, find_layers, text_elements

    text, prefix = config.get_text_config(), f"{find_layers(model)[1]}."
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters()}
    if not hasattr(text, "num_attention_heads"):
        remedy = "name a causal language model with attention, e.g. of the Qwen, Llama or Gemma family"
        raise ConfigError(Fault("model", name or model_type, f"{model_type} has layers without attention only", remedy))
    heads, hidden = text.num_attention_heads, text.hidden_size
    kv_heads = _size(text, "num_key_value_heads") or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):  # Falcon
        kv_heads = 1
    head_dim = _size(text, "head_dim") or hidden // heads
    # Multi-head latent attention (DeepSeek) keeps one latent for all heads.
    latent = getattr(text, "kv_lora_rank", None)
    kv_width = latent + text.qk_rope_head_dim if latent else 2 * kv_heads * head_dim
    sizes = (hidden, _inner_width(text), text.num_hidden_layers, heads, kv_heads, head_dim, text.vocab_size)
    shape = ModelShape(name, model_type, parameters, prefix, *sizes, max_positions(config), kv_width)
    capped = bool(getattr(text, "attn_logit_softcapping", None))
    further = {"can_stream": can_be_mapped(model), "beside_text": shape.num_parameters - text_elements(model)}
    further |= {"eager_unless_told": capped or config._attn_implementation == "eager"}
    return replace(shape, caps_scores=capped, window=sliding_window(text.to_dict()), **further)


def max_positions(config: Any) -> int:
    """How many tokens a model can read; a large number where its positions have no end (Bloom, MPT).

    Args:
        config: As transformers has it.
    """
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2**17


def _size(text: Any, name: str) -> int | None:
    """A size of a config, the largest where layers have their own (Gemma 3n and 4)."""
    try:
        found = getattr(text, name, None)
    except RuntimeError:  # transformers has no one answer
        found = [getattr(text.per_layer_config[i], name) for i in range(text.num_hidden_layers)]
    return max(found) if isinstance(found, list) else found


def _inner_width(text: Any) -> int:
    """Of what a token goes through between attention and attention; of a mixture, of all its experts together, and of
    what is laid out for them."""
    dense = _size(text, "intermediate_size") or getattr(text, "n_inner", None) or 4 * text.hidden_size
    if not (chosen := getattr(text, "num_experts_per_tok", None)):
        return dense
    each = getattr(text, "moe_intermediate_size", None) or dense
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    shared += (getattr(text, "n_shared_experts", None) or 0) * each
    return max(dense, chosen * (each + text.hidden_size) + shared)
