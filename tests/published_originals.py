"""The two published models, written anew from their description, and run folders as their code writes."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout


class AuthorsAttention(nn.Module):
    """Attention as published: separate projections, an explicit mask with the value columns zeroed."""

    mask: Tensor

    def __init__(self, width: int, heads: int, length: int, slots: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        mask = torch.tril(torch.ones(length, length))
        for column in range(slots - 1, length, slots):
            mask[:, column] = 0
        self.register_buffer("mask", mask[None, None])
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        k, q, v = (
            layer(x).view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for layer in (self.key, self.query, self.value)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(d / self.heads)
        scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, -math.inf)
        mixed = (F.softmax(scores, dim=3) @ v).transpose(1, 2).reshape(b, t, d)
        return self.proj(mixed)


class AuthorsBlock(nn.Module):
    def __init__(self, width: int, heads: int, length: int, slots: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = AuthorsAttention(width, heads, length, slots)
        layers = [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class HeadBySlot(nn.Module):
    def __init__(self, slots: int, bins: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(slots, bins, width))


class AuthorsGPT(nn.Module):
    """Written from the description: offset tokens, one shared stop token, one head a slot."""

    def __init__(self, config: ModelConfig, layout: TokenLayout) -> None:
        super().__init__()
        width, self.slots, self.bins = config.embed_dim, layout.slots, layout.num_bins
        length = config.context_transitions * self.slots - 1
        self.tok_emb = nn.Embedding(self.slots * self.bins + 1, width)
        self.pos_emb = nn.Parameter(torch.randn(1, length, width))
        blocks = [AuthorsBlock(width, config.num_heads, length, self.slots) for _ in range(config.num_layers)]
        self.blocks = nn.Sequential(*blocks)
        self.ln_f = nn.LayerNorm(width)
        self.head = HeadBySlot(self.slots, self.bins + 1, width)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = []
        for position in range(tokens.shape[1]):
            slot, token = position % self.slots, tokens[:, position]
            rows.append(torch.where(token == self.bins, self.slots * self.bins, token + slot * self.bins))
        x = self.tok_emb(torch.stack(rows, dim=1)) + self.pos_emb[:, : tokens.shape[1]]
        hidden = self.ln_f(self.blocks(x))
        logits = [hidden[:, t] @ self.head.weight[t % self.slots].T for t in range(tokens.shape[1])]
        return torch.stack(logits, dim=1)


class PortBlock(nn.Module):
    """What goes around the attention is its normalised input, not the block's."""

    attn_mask: Tensor

    def __init__(self, width: int, heads: int, length: int, slots: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, 0.1, batch_first=True)
        layers = [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)]
        self.mlp = nn.Sequential(*layers)
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        for column in range(slots - 1, length, slots):
            mask[:, column] = True
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        length, normed = x.shape[1], self.norm1(x)
        mask = self.attn_mask[:length, :length]
        x = normed + self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class PortGPT(nn.Module):
    """Written from the description: no stop token, a position more, one head a slot or one for all."""

    def __init__(self, config: ModelConfig, layout: TokenLayout, shared_head: bool = False) -> None:
        super().__init__()
        width, self.slots, self.bins = config.embed_dim, layout.slots, layout.num_bins
        length = config.context_transitions * self.slots
        self.tok_emb = nn.Embedding(self.slots * self.bins, width)
        self.pos_emb = nn.Parameter(torch.randn(1, length, width))
        sizes = (width, config.num_heads, length, self.slots)
        self.blocks = nn.ModuleList(PortBlock(*sizes) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.bins) if shared_head else HeadBySlot(self.slots, self.bins, width)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        offsets = torch.tensor([(t % self.slots) * self.bins for t in range(length)])
        x = self.tok_emb(tokens + offsets) + self.pos_emb[:, :length]
        for block in self.blocks:
            x = block(x)
        hidden = self.norm(x)
        if isinstance(self.head, nn.Linear):
            return self.head(hidden)
        logits = [hidden[:, t] @ self.head.weight[t % self.slots].T for t in range(length)]
        return torch.stack(logits, dim=1)


def randomized(model: Any, scale: float = 0.5, seed: int = 0) -> Any:
    """The model in evaluation mode, every parameter random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


@contextmanager
def modules_of(**classes: type) -> Iterator[None]:
    """Make `classes`, by `package__module__Name`, importable for a block, so that pickles name them so."""
    names = set()
    for dotted, kind in classes.items():
        *parents, name = dotted.split("__")
        for depth in range(1, len(parents) + 1):
            module = ".".join(parents[:depth])
            if module not in sys.modules:
                sys.modules[module] = ModuleType(module)
                names.add(module)
        kind.__module__, kind.__qualname__ = ".".join(parents), name
        setattr(sys.modules[kind.__module__], name, kind)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def write_pickled_config(file: Path, class_name: str, protocol: int = 3, **settings: Any) -> None:
    """A pickled Config as the released code writes it: a class and the arguments for it."""
    config, made = type("Config", (), {}), type(class_name, (), {})
    place = "datasets__sequence" if "Dataset" in class_name else "models__transformers"
    with modules_of(
        **{"trajectory__utils__config__Config": config, f"trajectory__{place}__{class_name}": made}
    ):
        instance = config()
        vars(instance).update(_class=made, _dict=settings)
        file.write_bytes(pickle.dumps(instance, protocol=protocol))


def authors_settings(config: ModelConfig, layout: TokenLayout) -> dict[str, Any]:
    return {
        "vocab_size": layout.num_bins,
        "block_size": config.context_transitions * layout.slots - 1,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.embed_dim,
        "observation_dim": layout.observation_dim,
        "action_dim": layout.action_dim,
        "transition_dim": layout.slots,
        "action_weight": 5,
        "reward_weight": 1,
        "value_weight": 1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
    }


def write_authors_run(
    folder: Path,
    model: nn.Module,
    config: ModelConfig,
    layout: TokenLayout,
    *,
    epoch: int = 40,
    legacy: bool = False,
    **data: Any,
) -> Path:
    """A run's folder of the released code; `data` replaces settings of its data."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / f"state_{epoch}.pt", _use_new_zipfile_serialization=not legacy)
    write_pickled_config(folder / "model_config.pkl", "GPT", **authors_settings(config, layout))
    settings = {
        "env": "hopper-medium-v2",
        "N": layout.num_bins,
        "penalty": -100,
        "sequence_length": config.context_transitions,
        "step": 1,
        "discount": 0.99,
        "discretizer": "QuantileDiscretizer",
        **data,
    }
    write_pickled_config(folder / "data_config.pkl", "DiscretizedDataset", **settings)
    return folder


def port_edges(columns: NDArray[Any], strategy: str, num_bins: int) -> NDArray[np.float64]:
    """[D, V + 1], in the memory order that the port leaves them in."""
    if strategy == "uniform":
        return np.linspace(columns.min(axis=0), columns.max(axis=0), num_bins + 1).T
    return np.percentile(columns, np.linspace(0, 100, num_bins + 1), axis=0).T


def write_port_run(
    folder: Path,
    model: nn.Module,
    config: ModelConfig,
    layout: TokenLayout,
    edges: NDArray[np.float64],
    *,
    strategy: str = "uniform",
    **data: Any,
) -> Path:
    """A run's folder of the faster port; `data` replaces settings of its data."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "model_last.pt")
    kind = type("KBinsDiscretizer", (), {})
    with modules_of(trajectory__utils__discretization__KBinsDiscretizer=kind):
        bins = kind()
        centers = (edges[:, 1:] + edges[:, :-1]) * 0.5
        vars(bins).update(
            strategy=strategy,
            n_bins=layout.num_bins,
            feature_dim=layout.slots,
            bin_edges=edges,
            bin_centers=centers,
            bin_centers_torch=torch.from_numpy(centers),
        )
        torch.save(bins, folder / "discretizer.pt")
    sections = {
        "wandb": {"name": "hopper_medium", "mode": "disabled", "entity": None},
        "dataset": {
            "env_name": "hopper-medium-v2",
            "seq_len": config.context_transitions,
            "num_bins": layout.num_bins,
            "discount": 0.99,
            "strategy": strategy,
            **data,
        },
        "model": {
            "vocab_size": layout.num_bins,
            "transition_dim": layout.slots,
            "observation_dim": layout.observation_dim,
            "action_dim": layout.action_dim,
            "seq_len": config.context_transitions * layout.slots,
            "embedding_dim": config.embed_dim,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "use_sep_heads": not isinstance(getattr(model, "head", None), nn.Linear),
        },
        "trainer": {"lr": 6e-4, "eval_beam_width": 16, "eval_beam_steps": 3, "eval_k_act": None},
        "run_seed": 42,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
    return folder
