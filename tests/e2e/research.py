"""Adapters that no library trains, as small torch modules after their papers, and their folders in edgeadapt's layout.

Each class is one paper's module; `Beside` and the others put it into a tiny model as the paper says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

SOURCE = "own code (edgeadapt's layout)"


class ConvAdapter(nn.Module):
    """Chen et al., "Conv-Adapter", arXiv 2208.07463: alpha (W_up (1x1) * f(W_down (k x k, depth-wise) * h))."""

    def __init__(self, channels: int, width: int, out: int | None = None, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        out = out or channels
        self.conv1 = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, groups=width)
        self.conv2 = nn.Conv2d(width, out, 1)
        self.se = nn.Parameter(torch.ones(1, out, 1, 1))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.conv2(torch.relu(self.conv1(h))) * self.se


class ClipAdapter(nn.Module):
    """Gao et al., "CLIP-Adapter", arXiv 2110.04544, eq. 3 to 5: A(f) = relu(relu(f W1) W2), a A(f) + (1 - a) f."""

    def __init__(self, features: int, ratio: float, reduction: int = 4) -> None:
        super().__init__()
        self.ratio = ratio
        width = features // reduction
        self.fc = nn.Sequential(
            nn.Linear(features, width, bias=False), nn.ReLU(), nn.Linear(width, features, bias=False), nn.ReLU()
        )

    def forward(self, f: torch.Tensor) -> torch.Tensor:
        return self.ratio * self.fc(f) + (1 - self.ratio) * f


class LinearAdapter(nn.Module):
    """NeMo's LinearAdapter on Conformer blocks (norm first, no biases): LN, Linear, swish, Linear, and the residual."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.down = nn.Linear(features, width, bias=False)
        self.up = nn.Linear(width, features, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.up(nn.functional.silu(self.down(self.norm(h))))


class HoulsbyAdapter(nn.Module):
    """Houlsby et al., arXiv 1902.00751, section 2.1, as VL-Adapter (arXiv 2112.06825) has it: h + U f(D h), biases."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.up(nn.functional.gelu(self.down(h)))


class Behind(nn.Module):
    """A module of the base, and an adapter that takes its output's place."""

    def __init__(self, inner: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.adapter = adapter

    @property
    def weight(self) -> torch.Tensor:  # T5 looks at its layers' weights
        return self.inner.weight

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.adapter(self.inner(*args, **kwargs))


class Parallel(nn.Module):
    """A module of the base, and an adapter of the same input whose output is added."""

    def __init__(self, inner: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.adapter = adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.adapter(x)


def replace(model: nn.Module, path: str, make: Callable[[nn.Module], nn.Module]) -> None:
    """Put what `make` makes of a module in its place."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))


def randomized(module: nn.Module, seed: int, scale: float = 0.3) -> nn.Module:
    """Return a module with random values everywhere, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def save(
    folder: Path,
    kind: str,
    parts: Mapping[str, nn.Module],
    *,
    whole: Mapping[str, nn.Module] | None = None,
    **settings: Any,
) -> Path:
    """Write a folder in edgeadapt's layout: the state of one module at each path, and modules saved whole."""
    folder.mkdir(parents=True)
    tensors = {f"{path}.{key}": value for path, module in parts.items() for key, value in module.state_dict().items()}
    saved = whole or {}
    tensors |= {f"{path}.{key}": value for path, module in saved.items() for key, value in module.state_dict().items()}
    config = {"edgeadapt_type": kind, "modules": list(parts), "modules_to_save": list(saved), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, folder / "adapter.safetensors")
    return folder


class TipAdapter(nn.Module):
    """Zhang et al., "Tip-Adapter", arXiv 2111.03930, eq. 4: a exp(-b (1 - f F^T)) L + f W^T, W a frozen classifier."""

    def __init__(self, classifier: nn.Linear, alpha: float, beta: float) -> None:
        super().__init__()
        self.classifier, self.alpha, self.beta = classifier, alpha, beta
        self.keys = torch.zeros(0, classifier.in_features)
        self.values = torch.zeros(0, classifier.out_features)

    def enroll(self, features: torch.Tensor, classes: list[int]) -> None:
        """Append examples: their features at length 1, and their classes one-hot (the paper's section 3.1)."""
        features = features / features.norm(dim=-1, keepdim=True)
        labels = nn.functional.one_hot(torch.tensor(classes), self.classifier.out_features).float()
        self.keys, self.values = torch.cat([self.keys, features]), torch.cat([self.values, labels])

    def forward(self, f: torch.Tensor) -> torch.Tensor:
        affinity = (f / f.norm(dim=-1, keepdim=True)) @ self.keys.t()
        return self.alpha * torch.exp(-self.beta * (1 - affinity)) @ self.values + self.classifier(f)


class ZeroShotClip(nn.Module):
    """CLIP's image tower with the texts' features as a frozen classifier: logits = 100 f W^T, f at length 1."""

    def __init__(self, tower: Any, texts: torch.Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.classifier = nn.Linear(texts.shape[1], texts.shape[0], bias=False)
        with torch.no_grad():
            self.classifier.weight.copy_(100 * texts / texts.norm(dim=-1, keepdim=True))

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found = self.tower(pixel_values).image_embeds
        return found / found.norm(dim=-1, keepdim=True)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(pixel_values))


class StAdapter(nn.Module):
    """Pan et al., "ST-Adapter", arXiv 2206.13559, as in the authors' code: x + fc2(DWConv3D(fc1 x))."""

    def __init__(self, features: int, width: int, frames: int, kernel: int = 3) -> None:
        super().__init__()
        self.frames = frames
        self.fc1 = nn.Linear(features, width)
        self.conv = nn.Conv3d(width, width, (kernel, 1, 1), padding=(kernel // 2, 0, 0), groups=width)
        self.fc2 = nn.Linear(width, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pictures, tokens, _ = x.shape
        side = round((tokens - 1) ** 0.5)
        narrow = self.fc1(x[:, 1:])
        clips = narrow.view(pictures // self.frames, self.frames, side, side, -1).permute(0, 4, 1, 2, 3)
        mixed = self.conv(clips).permute(0, 2, 3, 4, 1).reshape(pictures, tokens - 1, -1)
        return torch.cat([x[:, :1], x[:, 1:] + self.fc2(mixed)], dim=1)


class StLayer(nn.Module):
    """A layer of CLIP's image tower with ST-Adapters: the authors' `ResidualAttentionBlock.forward`."""

    def __init__(self, layer: Any, before: nn.Module | None, between: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.before, self.between = layer, before or nn.Identity(), between or nn.Identity()

    def forward(self, x: torch.Tensor, *masks: Any, **_options: Any) -> tuple[torch.Tensor]:
        x = self.before(x)
        normed = self.layer.layer_norm1(x)
        x = x + self.layer.self_attn(normed, attention_mask=masks[0], causal_attention_mask=masks[1])[0]
        x = self.between(x)
        return (x + self.layer.mlp(self.layer.layer_norm2(x)),)


class Clips(nn.Module):
    """A classifier of clips over a tower of pictures: the class token's mean over the frames."""

    def __init__(self, tower: Any, frames: int, classes: int) -> None:
        super().__init__()
        self.tower, self.frames = tower, frames
        self.classifier = nn.Linear(tower.config.hidden_size, classes)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        tokens = self.tower(clips.flatten(0, 1)).last_hidden_state
        return self.classifier(tokens[:, 0].view(-1, self.frames, tokens.shape[-1]).mean(dim=1))


class KAdapter(nn.Module):
    """Wang et al., "K-Adapter", arXiv 2002.01808: at each place h + Up(Transformer(Down h)), h with the output before.

    Torch's own transformer layers, after their norms, in place of the authors' copy of BERT's.
    """

    def __init__(self, features: int, width: int, *, places: int, layers: int, heads: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(features, width) for _ in range(places))
        self.up = nn.ModuleList(nn.Linear(width, features) for _ in range(places))
        options = {"activation": "gelu", "batch_first": True, "dropout": 0.0}
        self.encoders = nn.ModuleList(
            nn.ModuleList(nn.TransformerEncoderLayer(width, heads, 2 * width, **options) for _ in range(layers))
            for _ in range(places)
        )

    def forward(self, states: list[torch.Tensor]) -> torch.Tensor:
        last = torch.zeros_like(states[0])
        for state, down, encoder, up in zip(states, self.down, self.encoders, self.up, strict=True):
            x = down(state + last)
            for layer in encoder:
                x = layer(x)
            last = state + last + up(x)
        return last

    def part(self, place: int) -> dict[str, torch.Tensor]:
        """Return one place's tensors under the names of the authors' code."""
        found = {"down_project.weight": self.down[place].weight, "down_project.bias": self.down[place].bias}
        found |= {"up_project.weight": self.up[place].weight, "up_project.bias": self.up[place].bias}
        for index, layer in enumerate(self.encoders[place]):
            state, prefix = dict(layer.state_dict()), f"encoder.layer.{index}"
            for which in ("weight", "bias"):
                thirds = state[f"self_attn.in_proj_{which}"].chunk(3)
                names = zip(("query", "key", "value"), thirds, strict=True)
                found |= {f"{prefix}.attention.self.{name}.{which}": third for name, third in names}
                found |= {
                    f"{prefix}.{theirs}.{which}": state[f"{ours}.{which}"]
                    for ours, theirs in (
                        ("self_attn.out_proj", "attention.output.dense"),
                        ("norm1", "attention.output.LayerNorm"),
                        ("linear1", "intermediate.dense"),
                        ("linear2", "output.dense"),
                        ("norm2", "output.LayerNorm"),
                    )
                }
        return found


class KnowledgeEncoder(nn.Module):
    """A frozen RoBERTa whose last hidden state is joined with K-Adapters' outputs, as in the authors' `ETModel`.

    join: one linear layer for one adapter; one for each and one over all of them; none where they are added
    """

    def __init__(self, inner: nn.Module, adapters: list[KAdapter], states: list[int], join: list[nn.Linear]) -> None:
        super().__init__()
        self.inner, self.states = inner, states
        self.adapters, self.join = nn.ModuleList(adapters), nn.ModuleList(join)

    def forward(self, *args: Any, **options: Any) -> Any:
        result = self.inner(*args, **{**options, "output_hidden_states": True, "return_dict": True})
        outputs = [adapter([result.hidden_states[index] for index in self.states]) for adapter in self.adapters]
        result.last_hidden_state = self._joined(result.last_hidden_state, outputs)
        return result

    def _joined(self, hidden: torch.Tensor, outputs: list[torch.Tensor]) -> torch.Tensor:
        if not self.join:
            return hidden + torch.stack(outputs).sum(dim=0)
        joined = zip(self.join, outputs, strict=False)
        features = [layer(torch.cat([hidden, output], dim=-1)) for layer, output in joined]
        return features[0] if len(features) == 1 else self.join[-1](torch.cat(features, dim=-1))


class TaskFilm(nn.Module):
    """Feature-wise linear modulation by a task's embedding: (1 + gamma) x + beta along the last axis."""

    def __init__(self, size: int, features: int) -> None:
        super().__init__()
        self.gb_weights = nn.Linear(size, 2 * features)

    def forward(self, embedding: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        scale, shift = self.gb_weights(embedding).split(x.shape[-1], dim=-1)
        return x + x * scale + shift


class TaskAttention(nn.Module):
    """Bhattacharjee et al., arXiv 2308.12372, as the authors draw it: softmax(q k^T + A'(w_t)) v in a window of Swin's.

    A' has FiLM of a learned matrix [tokens, tokens / blocks] in blocks on its diagonal, zeros elsewhere ("fill with
    empty cells"); it is drawn here as a mask over copies side by side.
    """

    def __init__(self, inner: Any, size: int) -> None:
        super().__init__()
        self.inner = inner
        tokens = inner.window_size[0] * inner.window_size[1]
        self.blocks = size // tokens
        width = -(-tokens // self.blocks)
        self.taa_attn = TaskFilm(size, width)
        self.random_weight_matrix = nn.Parameter(torch.zeros(tokens, width))
        self.embedding: Any = None

    def matrix(self) -> torch.Tensor:
        rows = self.taa_attn(self.embedding, self.random_weight_matrix)
        tokens, width = rows.shape
        place = torch.arange(tokens) // width
        copies = rows.repeat(1, self.blocks)[:, :tokens]
        return torch.where(place[:, None] == place[None, :], copies, torch.zeros(()))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        inner, (windows, tokens, _) = self.inner, x.shape
        heads = inner.num_attention_heads
        query, key, value = (
            layer(x).view(windows, tokens, heads, -1).transpose(1, 2) for layer in (inner.query, inner.key, inner.value)
        )
        table = inner.relative_position_bias_table[inner.relative_position_index.view(-1)]
        scores = query @ key.transpose(-1, -2) / inner.attention_head_size**0.5
        scores = scores + table.view(tokens, tokens, heads).permute(2, 0, 1) + self.matrix()
        if mask is not None:
            pictures = windows // mask.shape[0]
            scores = (scores.view(pictures, -1, heads, tokens, tokens) + mask[:, None]).view(scores.shape)
        return ((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2),)


class TaskNorm(nn.Module):
    """A task-scaled norm of the same paper: the norm's gain goes through FiLM."""

    def __init__(self, norm: nn.LayerNorm, size: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.ln_weight_modulation = TaskFilm(size, norm.weight.shape[0])
        self.embedding: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt()
        return scaled * self.ln_weight_modulation(self.embedding, self.weight) + self.bias
