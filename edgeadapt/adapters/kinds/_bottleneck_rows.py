"""Where AdapterHub puts bottlenecks: in the families of models that it knows, and by a plugin interface in others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeadapt.adapters.adapter import Adapter, Reads, TargetModule
from edgeadapt.adapters.fingerprint import base_label
from edgeadapt.adapters.kinds._bottleneck_tensors import Place
from edgeadapt.errors import AdapterError

_RIGHT_BASE = "give the base that the adapter was trained on, loaded for the same task"


@dataclass(frozen=True)
class Row:
    """Where the library puts bottlenecks in one family of models.

    location: in a layer, as keys have it; flag: the setting that puts an adapter there
    product: the module whose output the bottleneck changes; norm: what normalizes its sum with the residual, or None
        where that is the next layer's affair
    residual: whether the library has the residual there, None where it is not known to be the one that is added next
    strange: a norm that a plugin interface names behind the product, or None
    """

    location: str
    flag: str
    product: str
    norm: str | None
    residual: bool | None = True
    strange: str | None = None

    def check_reads(self, reads: Reads) -> Reads:
        """Return what a bottleneck reads here that would read `reads` in a family with a residual.

        Raises:
            AdapterError: that is not known.
        """
        if reads == "output":
            return reads
        if self.strange is not None and reads == "sum":
            reason = f"through {self.strange!r}, of which the library takes the last layer's in all layers"
        elif self.residual is None:
            reason = "which is another in this model than the plugin interface is known to mean"
        elif self.residual:
            return reads
        elif reads == "sum":
            return "output"
        else:
            reason = "which the plugin interface does not name"
        raise AdapterError(
            f"a bottleneck at {self.product!r} reads the residual, {reason}",
            hint="train it with original_ln_before=False (double_seq_bn), which reads the module's output alone",
        )


_ROWS = (
    Row("attention.output", "mh_adapter", "attention.output.dense", "attention.output.LayerNorm"),  # BERT, RoBERTa
    Row("output", "output_adapter", "output.dense", "output.LayerNorm"),
    Row("attention_adapters", "mh_adapter", "attention.out_lin", "sa_layer_norm"),  # DistilBERT
    Row("output_adapters", "output_adapter", "ffn.lin2", "output_layer_norm"),
    Row("attention_adapters", "mh_adapter", "attn.c_proj", None),  # GPT-2
    Row("output_adapters", "output_adapter", "mlp.c_proj", None),
    Row("attention_adapters", "mh_adapter", "self_attn.o_proj", None),  # Llama, Mistral
    Row("output_adapters", "output_adapter", "mlp.down_proj", None),
    Row("attention_adapters", "mh_adapter", "self_attn.out_proj", None),  # CLIP and Whisper, in both of their stacks
    Row("output_adapters", "output_adapter", "mlp.fc2", None),
    Row("output_adapters", "output_adapter", "fc2", None),
    Row("attention_adapters", "mh_adapter", "attention.output.dense", None),  # ViT
    Row("output.output_adapters", "output_adapter", "output.dense", None),
)
_RESIDUAL_AT = {"mh_adapter": "input_layernorm", "output_adapter": "post_attention_layernorm"}
"""The modules whose inputs are the residuals, in decoders built like Llama."""


def row_of(adapter: Adapter, place: Place, modules: Mapping[str, TargetModule], base_name: str | None) -> Row:
    """Return the row of a place in a base.

    Raises:
        AdapterError: the base's layer of that number has no such modules.
    """
    interface = adapter.config.get("interface")
    for row in _ROWS if interface is None else _interface_rows(interface):
        wanted = [part for part in (row.product, row.norm) if part is not None]
        if row.location == place.location and all(
            any(path.endswith(f".{place.index}.{part}") for path in modules) for part in wanted
        ):
            return row
    raise AdapterError(
        f"the adapter has a bottleneck at {place.layer}.{place.location}; no such place is known in "
        f"{base_label(base_name)}",
        hint="known are BERT and RoBERTa, DistilBERT, GPT-2, Llama and Mistral, ViT, CLIP, Whisper, and what a plugin "
        "interface names; " + _RIGHT_BASE,
    )


def _interface_rows(interface: Mapping[str, Any]) -> tuple[Row, ...]:
    """Return the places of a plugin interface, whose hooks leave residuals and norms to the model."""
    attention = f"{interface.get('layer_self_attn')}.{interface.get('attn_o_proj')}"
    hooks = {"mh_adapter": interface.get("layer_pre_self_attn"), "output_adapter": interface.get("layer_pre_ffn")}
    like_llama = all(hooks[flag] in (None, name) for flag, name in _RESIDUAL_AT.items())
    parallel = hooks["output_adapter"] is None  # attention and feed-forward side by side, one sum for both

    def residual(flag: str) -> bool | None:
        if not like_llama:
            return None
        return None if parallel and flag == "mh_adapter" else hooks[flag] is not None

    return (
        Row(
            *("attention_adapters", "mh_adapter", attention, None),
            *(residual("mh_adapter"), interface.get("layer_ln_1")),
        ),
        Row(
            *("output_adapters", "output_adapter", str(interface.get("layer_output_proj")), None),
            *(residual("output_adapter"), interface.get("layer_ln_2")),
        ),
    )
