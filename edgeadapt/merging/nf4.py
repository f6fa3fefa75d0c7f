"""NF4 as bitsandbytes stores and computes it, without bitsandbytes.

A weight is cut into blocks of 64 values; each block is divided by its largest magnitude (absmax), and each quotient
is rounded to the nearest of 16 quantiles of the normal distribution (QLoRA paper, section 3 and appendix E). With
double quantization the absmax values, less their mean, are themselves rounded in blocks of 256 to an 8-bit code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from edgeadapt.errors import BaseModelError

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
# bitsandbytes functional.py, get_4bit_type("nf4")
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_STATE_SUFFIX = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def as_trained_on_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Return float32[...] `weight` after a round trip through NF4 with double quantization, in its own shape."""
    code = torch.tensor(CODE, dtype=torch.float32)
    flat = weight.detach().to(torch.float32).reshape(-1)
    blocks = _blocks(flat, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    indices = nearest(blocks * _reciprocal(absmax)[:, None], code)
    values = code[indices] * double_quantized(absmax)[:, None]
    return values.reshape(-1)[: flat.numel()].reshape(weight.shape)


def double_quantized(absmax: torch.Tensor) -> torch.Tensor:
    """Return float32[blocks] `absmax` after its own 8-bit quantization in blocks of 256 around the mean."""
    code = dynamic_code()
    offset = absmax.mean()
    blocks = _blocks(absmax - offset, NESTED_BLOCK_SIZE)
    nested = blocks.abs().amax(dim=1)
    indices = nearest(blocks * _reciprocal(nested)[:, None], code)
    return (code[indices] * nested[:, None]).reshape(-1)[: absmax.numel()] + offset


def dynamic_code() -> torch.Tensor:
    """Return float32[256]: bitsandbytes' signed dynamic 8-bit code (create_dynamic_map), ascending."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        scaled = (10 ** (exponent - 6) * means).tolist()
        values += scaled + [-value for value in scaled]
    return torch.tensor(sorted(values), dtype=torch.float32)


def nearest(values: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Return the index of the entry of the ascending `code` that is nearest to each value."""
    return torch.bucketize(values, (code[1:] + code[:-1]) / 2)


def dequantize_state(tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors with every NF4 weight as float32 in the layout [out, in].

    Values are rounded to the dtype in which the checkpoint computes (bfloat16 as a rule): that is the weight that an
    adapter on top of it was trained with.

    Raises:
        BaseModelError: if a weight is quantized otherwise, a part is missing, or the parts do not fit.
    """
    states = {key: key.partition(_STATE_SUFFIX) for key in tensors if _STATE_SUFFIX in key}
    packed = {weight: (key, kind) for key, (weight, _, kind) in states.items()}
    if not packed:
        raise BaseModelError(
            f"{where}: config.json says 4-bit bitsandbytes, but the files hold no such tensor",
            hint="the folder was not saved completely; download or save it again",
        )
    parts = {f"{weight}.{part}" for weight in packed for part in _PARTS} | set(states)
    result = {key: value for key, value in tensors.items() if key not in packed and key not in parts}
    for weight, (key, kind) in packed.items():
        if kind != "nf4":
            raise BaseModelError(
                f"{where}: {weight} is quantized as {kind!r}",
                hint="only NF4 is read; give the folder of the unquantized model",
            )
        result[weight] = _dequantize(weight, key, tensors, where)
    return result


def _dequantize(name: str, state_key: str, tensors: Mapping[str, torch.Tensor], where: str) -> torch.Tensor:
    try:
        state: dict[str, Any] = json.loads(bytes(tensors[state_key].to(torch.uint8).tolist()).decode("utf-8"))
        absmax = _absmax(name, state, tensors)
        nibbles = tensors[name].contiguous().view(torch.uint8).reshape(-1)
        indices = torch.stack([nibbles >> 4, nibbles & 15], dim=1).reshape(-1).long()
        shape = [int(size) for size in state["shape"]]
        count = int(torch.tensor(shape).prod())
        block = int(state["blocksize"])
        if -(-count // block) != absmax.numel() or not 0 <= indices.numel() - count <= 1:
            raise ValueError(f"{indices.numel()} values and {absmax.numel()} blocks for shape {shape}")  # noqa: TRY301
        values = tensors[f"{name}.quant_map"].float()[indices[:count]]
        scales = absmax.repeat_interleave(block)[:count]
        return (values * scales).to(_DTYPES[state["dtype"]]).to(torch.float32).reshape(shape)
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError) as error:
        problem = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise BaseModelError(
            f"{where}: the NF4 weight {name} is damaged: {problem}", hint="download or save the folder again"
        ) from error


def _absmax(name: str, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return float32[blocks], itself dequantized if it was quantized."""
    absmax = tensors[f"{name}.absmax"]
    if "nested_offset" not in state:
        return absmax.float().reshape(-1)
    nested = tensors[f"{name}.nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))
    codes = tensors[f"{name}.nested_quant_map"].float()[absmax.reshape(-1).long()]
    return codes * nested[: codes.numel()] + float(state["nested_offset"])


def _reciprocal(absmax: torch.Tensor) -> torch.Tensor:
    """Return 1 / absmax, finite for a block of zeros; multiplied with, as the library's kernels do."""
    return 1.0 / absmax.clamp_min(1e-38)


def _blocks(flat: torch.Tensor, size: int) -> torch.Tensor:
    """Return float32[blocks, size], the last block filled up with zeros."""
    short = -flat.numel() % size
    return torch.nn.functional.pad(flat, (0, short)).reshape(-1, size)
