"""Models of the released research code and of the public faster port, as ours: the same logits.

Both are GPTs over V bins of D slots, N observation and M action dimensions, reward and value. Names and
shapes, d the width, P positions:

- the released code: tok_emb [V * D + 1, d], pos_emb [1, P, d], P = T * D - 1 for windows of T transitions,
  blocks.i.{ln1, ln2, attn.{key, query, value, proj}, mlp.{0, 2}}, blocks.i.attn.mask, ln_f,
  head [D, V + 1, d];
- the port, which has no stop token: tok_emb [V * D, d], pos_emb [1, P, d], P = T * D (the last is never
  used), blocks.i.{norm1, norm2, attention.{in_proj_weight, in_proj_bias, out_proj}, mlp.{0, 2}},
  blocks.i.attn_mask, norm, head [D, V, d], or one head for all slots, [V, d] with a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.model.transformer import TrajectoryTransformer, visibility
from tt_ray.plain import convert

Shapes = dict[str, tuple[int, ...]]
Weights = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Sizes:
    """What a run's settings say of its model."""

    observation_dim: int
    action_dim: int
    num_bins: int
    positions: int
    """P."""
    num_layers: int
    num_heads: int
    embed_dim: int
    dropout: float
    shared_head: bool = False
    """The port's option of one head for all slots."""

    @property
    def layout(self) -> TokenLayout:
        """The slots of a transition."""
        return TokenLayout(self.observation_dim, self.action_dim, self.num_bins)

    @property
    def config(self) -> ModelConfig:
        """The model's size, for windows as long as its positions reach."""
        return ModelConfig(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            embed_dim=self.embed_dim,
            context_transitions=(self.positions + 1) // self.layout.slots,
            dropout=self.dropout,
        )


AUTHORS_NAMES = {
    "num_bins": "vocab_size",
    "positions": "block_size",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "embed_dim": "n_embd",
    "dropout": "resid_pdrop",
}
PORT_NAMES = {
    "num_bins": "vocab_size",
    "positions": "seq_len",
    "embed_dim": "embedding_dim",
    "dropout": "residual_dropout",
}
PORT_DEFAULTS = {"num_layers": 4, "num_heads": 4, "embedding_dim": 32, "residual_dropout": 0.1}
"""What the port's model takes where its config.yaml is silent."""


def read_sizes(settings: Mapping[str, Any], names: Mapping[str, str], source: str) -> Sizes:
    """The sizes in the model's settings, whose own names are `names` where they differ from ours.

    `UserError`: one is missing, of another type, or they do not fit together.
    """
    found: dict[str, Any] = {}
    for name, kind in (*_WHOLE, ("dropout", float)):
        key = names.get(name, name)
        try:
            found[name] = convert(kind, settings[key])
        except KeyError:
            raise UserError(f"{source}: {key} is missing") from None
        except TypeError as error:
            raise UserError(f"{source}: {key}: {error}") from None
    sizes = Sizes(**found)
    wrong = [name for name, _ in _WHOLE if found[name] < 1]
    if wrong:
        raise UserError(f"{source}: {names.get(wrong[0], wrong[0])} must be at least 1")
    if settings.get("transition_dim") != sizes.layout.slots:
        raise UserError(
            f"{source}: transition_dim is {settings.get('transition_dim')}, but it should be "
            f"{sizes.layout.slots}: {sizes.observation_dim} observation and {sizes.action_dim} action "
            "dimensions, reward and value"
        )
    return sizes


def port_sizes(settings: Mapping[str, Any], source: str) -> Sizes:
    """The sizes in the port's settings, which leave some to its code, as `read_sizes`."""
    sizes = read_sizes({**PORT_DEFAULTS, **settings}, PORT_NAMES, source)
    return replace(sizes, shared_head=settings.get("use_sep_heads") is not True)


_WHOLE = tuple(
    (name, int)
    for name in ("observation_dim", "action_dim", "num_bins", "positions")
    + ("num_layers", "num_heads", "embed_dim")
)


def authors_model(weights: Weights, sizes: Sizes, source: str) -> TrajectoryTransformer:
    """The released code's model, in evaluation mode; `UserError` where `weights` are not of `sizes`."""
    d, slots, bins = sizes.embed_dim, sizes.layout.slots, sizes.num_bins
    shapes = {"tok_emb.weight": (bins * slots + 1, d), "head.weight": (slots, bins + 1, d)}
    parts = ("attn.key", "attn.query", "attn.value", "attn.proj")
    state = _checked(
        weights, sizes, {**shapes, **_norm("ln_f", d)}, parts, ("ln1", "ln2"), "attn.mask", source
    )
    renamed = {
        "token_embedding.weight": state["tok_emb.weight"],
        "head": state["head.weight"],
        **_ours(state, "ln_f", "final_norm"),
    }
    for i in range(sizes.num_layers):
        block = f"blocks.{i}"
        for part in ("weight", "bias"):
            joined = [state[f"{block}.attn.{name}.{part}"] for name in ("query", "key", "value")]
            renamed[f"{block}.attention.qkv.{part}"] = torch.cat(joined)
        for theirs, ours in (("attn.proj", "attention.proj"), ("ln1", "ln1"), ("ln2", "ln2")):
            renamed |= _ours(state, f"{block}.{theirs}", f"{block}.{ours}")
    return _model(state, renamed, sizes, port=False)


def port_model(weights: Weights, sizes: Sizes, source: str) -> TrajectoryTransformer:
    """The port's model, in evaluation mode; `UserError` where `weights` are not of `sizes`.

    It gets a stop token that its heads never say and that no token is.
    """
    d, slots, bins = sizes.embed_dim, sizes.layout.slots, sizes.num_bins
    head: Shapes = {"head.weight": (slots, bins, d)}
    if sizes.shared_head:
        head = {"head.weight": (bins, d), "head.bias": (bins,)}
    shapes: Shapes = {"tok_emb.weight": (bins * slots, d), **head, **_norm("norm", d)}
    for i in range(min(sizes.num_layers, len(weights))):
        shapes[f"blocks.{i}.attention.in_proj_weight"] = (3 * d, d)
        shapes[f"blocks.{i}.attention.in_proj_bias"] = (3 * d,)
    state = _checked(weights, sizes, shapes, ("attention.out_proj",), ("norm1", "norm2"), "attn_mask", source)
    bias = state.get("head.bias", torch.zeros(bins)).expand(slots, -1)
    renamed = {
        "token_embedding.weight": F.pad(state["tok_emb.weight"], (0, 0, 0, 1)),
        "head": F.pad(state["head.weight"].expand(slots, -1, -1), (0, 0, 0, 1)),
        "head_bias": F.pad(bias, (0, 1), value=float("-inf")),
        **_ours(state, "norm", "final_norm"),
    }
    for i in range(sizes.num_layers):
        block = f"blocks.{i}"
        for part in ("weight", "bias"):
            renamed[f"{block}.attention.qkv.{part}"] = state[f"{block}.attention.in_proj_{part}"]
        for theirs, ours in (("attention.out_proj", "attention.proj"), ("norm1", "ln1"), ("norm2", "ln2")):
            renamed |= _ours(state, f"{block}.{theirs}", f"{block}.{ours}")
    return _model(state, renamed, sizes, port=True)


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _ours(state: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.{part}": state[f"{theirs}.{part}"] for part in ("weight", "bias")}


def _checked(
    weights: Weights,
    sizes: Sizes,
    shapes: Shapes,
    products: tuple[str, ...],
    norms: tuple[str, ...],
    mask: str,
    source: str,
) -> dict[str, Tensor]:
    """`weights` as tensors, once they are all there is, of these shapes, finite, and the masks ours."""
    d = sizes.embed_dim
    if sizes.num_layers > len(weights):
        raise UserError(f"{source}: there are no weights for {sizes.num_layers} layers")
    shapes["pos_emb"] = (1, sizes.positions, d)
    for i in range(sizes.num_layers):
        for name in products:
            shapes |= {f"blocks.{i}.{name}.weight": (d, d), f"blocks.{i}.{name}.bias": (d,)}
        for name in norms:
            shapes |= _norm(f"blocks.{i}.{name}", d)
        for name, out in (("mlp.0", 4 * d), ("mlp.2", d)):
            shapes |= {f"blocks.{i}.{name}.weight": (out, 5 * d - out), f"blocks.{i}.{name}.bias": (out,)}
    masks = {f"blocks.{i}.{mask}" for i in range(sizes.num_layers)}
    for name in sorted(shapes.keys() | weights.keys() - masks):
        if name not in weights or name not in shapes:
            fault = "is missing" if name in shapes else "belongs to no model that can be imported"
            raise UserError(f"{source}: {name} {fault}")
        if weights[name].shape != shapes[name]:
            said = f"is {list(weights[name].shape)}, but the run's settings ask for {list(shapes[name])}"
            raise UserError(f"{source}: {name} {said}")
        if weights[name].dtype != np.float32 or not np.isfinite(weights[name]).all():
            raise UserError(f"{source}: {name} holds what is no finite number")
    for name in sorted(masks & weights.keys()):
        _check_mask(weights[name], sizes, f"{source}: {name}")
    return {name: torch.from_numpy(np.array(weights[name])) for name in shapes}


def _check_mask(mask: NDArray[Any], sizes: Sizes, where: str) -> None:
    """The stored mask must hide what ours does: 0 where nothing is seen, or the flag that nothing is."""
    length = sizes.positions
    seen = mask == 0 if mask.dtype == np.bool_ else mask != 0
    ours = visibility(length, sizes.layout.slots).numpy() if mask.size == length**2 else None
    if ours is None or not np.array_equal(seen.reshape(length, length), ours):
        raise UserError(f"{where}: hides other tokens than the value columns and the future: another model")


def _model(
    state: Mapping[str, Tensor], renamed: dict[str, Tensor], sizes: Sizes, port: bool
) -> TrajectoryTransformer:
    """Our model, with what both have under the same names."""
    model = TrajectoryTransformer(sizes.config, sizes.layout, port=port)
    renamed["position_embedding"] = state["pos_emb"][0, : model.max_tokens]
    for i in range(sizes.num_layers):
        for name in ("mlp.0", "mlp.2"):
            renamed |= _ours(state, f"blocks.{i}.{name}", f"blocks.{i}.{name}")
    model.load_state_dict(renamed)
    return model.eval()
