"""The Trajectory Transformer: a GPT with a vocabulary and a head for every slot, and hidden value columns.

A goal's G tokens, if the layout has any, come before the first transition; each shares the embedding of the
observation slot that it is a goal for. Nothing predicts them.

Shape letters: b sequences, T tokens of transitions, D slots, V bins, d embed_dim, L layers.
Janner, Li, Levine 2021, "Offline Reinforcement Learning as One Big Sequence Modeling Problem".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values from one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.residual_dropout = nn.Dropout(config.dropout)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [..., heads, d / heads] of x [..., d]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.unbind(-3)
        return query, key, value

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output [b, T, d], keys and values [b, heads, T, d / heads]; `mask` is True where a key is seen."""
        query, key, value = (part.transpose(1, 2) for part in self.split(x))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.residual_dropout(self.proj(mixed.transpose(1, 2).flatten(2))), key, value


class Block(nn.Module):
    """Pre-LayerNorm Transformer block; a `port`'s adds its attention to the normalised input instead."""

    def __init__(self, config: ModelConfig, port: bool = False) -> None:
        super().__init__()
        width, self.port = config.embed_dim, port
        self.ln1 = nn.LayerNorm(width)
        self.attention = Attention(config)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(config.dropout)
        )

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output [b, T, d] and the attention's keys and values."""
        normed = self.ln1(x)
        mixed, key, value = self.attention(normed, mask)
        x = (normed if self.port else x) + mixed
        return x + self.mlp(self.ln2(x)), key, value


class TrajectoryTransformer(nn.Module):
    """Next-token logits over trajectories of transitions of D tokens.

    After the goal, sequences begin with slot 0; they hold at most G + context_transitions * D - 1 tokens in
    all. The logits at a token of slot s are over the next token, of slot (s + 1) mod D: V bins and, last, the
    stop token.

    `port`: the public faster port's architecture, for its checkpoints; nothing here trains one. Its blocks
    are as `Block` says, and its heads have biases (minus infinity for a stop token that it does not know).
    """

    visible: Tensor
    slots: Tensor

    def __init__(self, config: ModelConfig, layout: TokenLayout, *, port: bool = False) -> None:
        super().__init__()
        self.config, self.layout, self.port = config, layout, port
        self.max_tokens = layout.goal_dim + config.context_transitions * layout.slots - 1
        rows = layout.num_bins * layout.slots + 1 + layout.partial
        self.token_embedding = nn.Embedding(rows, config.embed_dim)
        self.position_embedding = nn.Parameter(torch.zeros(self.max_tokens, config.embed_dim))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, port) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.embed_dim)
        # By the present token's slot.
        self.head = nn.Parameter(torch.empty(layout.slots, layout.num_bins + 1, config.embed_dim))
        self.head_bias = nn.Parameter(torch.zeros(layout.slots, layout.num_bins + 1)) if port else None
        self.apply(_initialize)
        nn.init.normal_(self.head, std=0.02)
        visible = visibility(self.max_tokens, layout.slots, layout.goal_dim)
        self.register_buffer("visible", visible, persistent=False)
        after_goal = torch.arange(self.max_tokens - layout.goal_dim) % layout.slots
        slots = torch.cat([torch.tensor(layout.goal_slots, dtype=torch.int64), after_goal])
        self.register_buffer("slots", slots, persistent=False)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def embed(self, tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Input vectors [..., d] of tokens [...], given each one's slot and its position in the window."""
        bins = self.layout.num_bins
        # All slots share the stop token and, after it, the hidden token.
        shared = tokens + (self.layout.slots - 1) * bins
        rows = torch.where(tokens >= self.layout.stop_token, shared, tokens + slots * bins)
        return self.token_embedding(rows) + self.position_embedding[positions]

    def encode(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        slots: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Final hidden states [b, G + T, d], and each layer's keys and values [b, heads, G + T, d / heads].

        By default tokens [b, G + T] begin with a goal, if there are any, and go on with a slot 0, positions
        count from 0, and the mask is causal, with value columns hidden.
        """
        length = tokens.shape[1]
        index = torch.arange(length, device=tokens.device)
        if positions is None and length > self.max_tokens:
            raise ValueError(f"{length} tokens do not fit the model's context of {self.max_tokens}")
        positions = index if positions is None else positions
        slots = self.slots[:length] if slots is None else slots
        mask = self.visible[:length, :length] if mask is None else mask
        x = self.dropout(self.embed(tokens, slots, positions))
        cache = []
        for block in self.blocks:
            x, key, value = block(x, mask)
            cache.append((key, value))
        return self.final_norm(x), cache

    def head_at(self, slot: int) -> tuple[Tensor, Tensor | None]:
        """Weight [V + 1, d] and bias [V + 1], if there is one, over the token after one of slot `slot`."""
        return self.head[slot], None if self.head_bias is None else self.head_bias[slot]

    def logits_at(self, hidden: Tensor, slot: int) -> Tensor:
        """Logits [..., V + 1] over the token after one of slot `slot`, from hidden states [..., d]."""
        return F.linear(hidden, *self.head_at(slot))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [b, T, V + 1] over the token after each but the goal's, for tokens [b, G + T]."""
        hidden = self.encode(tokens)[0][:, self.layout.goal_dim :]
        slots, length = self.layout.slots, hidden.shape[1]
        padded = F.pad(hidden, (0, 0, 0, -length % slots)).unflatten(1, (-1, slots))
        logits = torch.einsum("bwsd,svd->bwsv", padded, self.head)
        logits = logits if self.head_bias is None else logits + self.head_bias
        return logits.flatten(1, 2)[:, :length]


def visibility(length: int, slots: int, goal_dim: int = 0) -> Tensor:
    """Mask [length, length], True where query t may see key u: u <= t, and u is no value token.

    The first `goal_dim` of the tokens are a goal's, then come transitions of `slots`.

    A value token holds the future's reward, so no query sees it, not even itself; its own residual stream
    still predicts the next token.
    """
    index = torch.arange(length)
    causal = index[:, None] >= index[None, :]
    is_value = (index >= goal_dim) & ((index - goal_dim) % slots == slots - 1)
    return causal & ~is_value[None, :]


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
