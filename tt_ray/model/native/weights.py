"""A model's weights as the native decoder wants them, and the structures that it reads."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_ray.model.native.build import NativeUnavailableError, load_library
from tt_ray.model.transformer import Block, TrajectoryTransformer

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int64


class Network(ctypes.Structure):
    """Sizes and weights; the same fields as in network.h."""

    _fields_ = [
        *((name, _Int) for name in ("layers", "width", "heads", "head_width", "head_padded", "hidden")),
        *((name, _Int) for name in ("outputs", "slots", "bins", "goal", "layer_stride", "port")),
        ("epsilon", ctypes.c_double),
        *((name, _Pointer) for name in ("token_embedding", "position_embedding", "layer_weights")),
        *((name, _Pointer) for name in ("final_norm", "head_weights", "head_biases", "goal_slots")),
    ]


class Cache(ctypes.Structure):
    """The arrays of a batch of searches; the same fields as in network.h."""

    _fields_ = [
        *((name, _Int) for name in ("episodes", "beams", "copies", "horizon", "observation", "action")),
        *((name, _Int) for name in ("prefix", "prefix_padded", "node", "node_padded")),
        *((name, _Pointer) for name in ("prefix_keys", "prefix_values", "node_keys", "node_values", "tails")),
        *((name, _Pointer) for name in ("pending", "ancestors", "start", "first_node", "first_whole")),
    ]


class Rows(ctypes.Structure):
    """Which rows of each search take part; the same fields as in decoder.cpp."""

    _fields_ = [
        *((name, _Int) for name in ("episodes", "stride", "threads")),
        *((name, _Pointer) for name in ("numbers", "counts", "positions")),
    ]


class Filter(ctypes.Structure):
    """Which tokens may be drawn; the same fields as in sampling.h."""

    _fields_ = [("top_k", _Int), ("cdf", ctypes.c_double)]


class Choice(ctypes.Structure):
    """How a search goes on with its logits; the same fields as in decoder.cpp."""

    _fields_ = [
        *((name, Filter) for name in ("actions", "observations")),
        *((name, _Pointer) for name in ("reward_values", "value_values")),
    ]


def round_up(value: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


@dataclass(frozen=True)
class PackedModel:
    """A model's weights, packed; keeps alive what `network` points to."""

    network: Network
    tensors: tuple[Tensor, ...]
    lanes: int
    """Numbers in one of the machine's vectors."""


def pack_model(model: TrajectoryTransformer) -> PackedModel:
    """Pack the weights of `model` in its own type; `NativeUnavailableError` where that cannot be done."""
    dtype = model.head.dtype
    if model.head.device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        raise NativeUnavailableError(f"it computes in float32 and float64 on a CPU, not in {dtype}")
    lanes = load_library().tt_ray_vector_bytes() // dtype.itemsize
    config, layout = model.config, model.layout
    if config.embed_dim % lanes:
        raise NativeUnavailableError(f"model.embed_dim = {config.embed_dim} is no multiple of {lanes}")
    head_width = config.embed_dim // config.num_heads
    packer = _Packer(lanes, config.num_heads, head_width, round_up(head_width, lanes))
    with torch.no_grad():
        layers = torch.stack([packer.layer(block) for block in model.blocks if isinstance(block, Block)])
        heads = torch.stack([packer.matrix(weight) for weight in model.head])
        rows = () if model.head_bias is None else model.head_bias
        biases = torch.stack([packer.vector(bias) for bias in rows]) if len(rows) else torch.empty(0)
        final = packer.norm(model.final_norm)
        tables = [
            table.detach().clone() for table in (model.token_embedding.weight, model.position_embedding)
        ]
    goal_slots = torch.tensor(layout.goal_slots, dtype=torch.int64)
    tensors = (*tables, layers, final, heads, biases, goal_slots)  # an empty one's pointer is null
    network = Network(
        layers=config.num_layers,
        width=config.embed_dim,
        heads=config.num_heads,
        head_width=head_width,
        head_padded=packer.head_padded,
        hidden=4 * config.embed_dim,
        outputs=layout.num_bins + 1,
        slots=layout.slots,
        bins=layout.num_bins,
        goal=layout.goal_dim,
        layer_stride=layers.shape[1],
        port=model.port,
        epsilon=model.final_norm.eps,
        **dict(
            zip(
                (
                    *("token_embedding", "position_embedding", "layer_weights"),
                    *("final_norm", "head_weights", "head_biases", "goal_slots"),
                ),
                (tensor.data_ptr() for tensor in tensors),
                strict=True,
            )
        ),
    )
    return PackedModel(network, tensors, lanes)


@dataclass(frozen=True)
class _Packer:
    lanes: int
    heads: int
    head_width: int
    head_padded: int

    def layer(self, block: Block) -> Tensor:
        """All of a block's weights in one row, in the order in which block.h takes them."""
        attention, up, down = block.attention, block.mlp[0], block.mlp[2]
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        extra = self.head_padded - self.head_width
        by_head = attention.qkv.weight.unflatten(0, (3, self.heads, self.head_width))
        qkv = F.pad(by_head, (0, 0, 0, extra)).flatten(0, 2)
        qkv_bias = F.pad(attention.qkv.bias.unflatten(0, (3, self.heads, -1)), (0, extra)).flatten()
        mixed = attention.proj.weight.unflatten(1, (self.heads, self.head_width))
        proj = F.pad(mixed, (0, extra)).flatten(1)
        return torch.cat(
            [
                *(self.norm(block.ln1), self.matrix(qkv), self.vector(qkv_bias)),
                *(self.matrix(proj), self.vector(attention.proj.bias), self.norm(block.ln2)),
                *(self.matrix(up.weight), self.vector(up.bias)),
                *(self.matrix(down.weight), self.vector(down.bias)),
            ]
        )

    def matrix(self, weight: Tensor) -> Tensor:
        """[outputs, inputs] in panels of two vectors: [outputs / panel, inputs, panel], flat."""
        panel = 2 * self.lanes
        padded = F.pad(weight, (0, 0, 0, -len(weight) % panel))
        return padded.unflatten(0, (-1, panel)).transpose(1, 2).flatten()

    def vector(self, bias: Tensor) -> Tensor:
        """[outputs], padded like a matrix's."""
        return F.pad(bias, (0, -len(bias) % (2 * self.lanes)))

    def norm(self, norm: nn.LayerNorm) -> Tensor:
        """Scale, then shift."""
        return torch.cat([self.vector(norm.weight), self.vector(norm.bias)])
