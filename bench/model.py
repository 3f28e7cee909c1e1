"""`ByteTransformer`: a small decoder-only transformer over bytes."""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256
"""Every byte is a token."""


@final
class ByteTransformer(nn.Module):
    """Predict the next byte: pre-norm blocks of causal self-attention and a GELU perceptron.

        h = E[bytes];  h <- h + attention(norm(h));  h <- h + mlp(norm(h));  logits = norm(h) E^T

    Positions enter as rotations of queries and keys; the embedding E is tied to the output.

    Args:
        layers: Blocks, >= 1.
        width: Size of the hidden state, a multiple of 2 heads.
        heads: Attention heads, >= 1.

    Shapes:
        tokens: `[batch, length]` int64. Result: logits `[batch, length, 256]`.

    Cost:
        About 12 layers width^2 parameters; 6 times as many floating-point operations per byte of training.

    Example:
        >>> model = ByteTransformer(layers=1, width=16, heads=2)
        >>> model(torch.zeros(3, 8, dtype=torch.int64)).shape
        torch.Size([3, 8, 256])

    Reference:
        Radford, Wu, Child, Luan, Amodei, Sutskever. Language Models are Unsupervised Multitask Learners. 2019;
        Su, Lu, Pan, Murtadha, Wen, Liu. RoFormer: Enhanced Transformer with Rotary Position Embedding. 2021.
        arXiv:2104.09864, equation 34.

    Differences from the paper:
        Bytes instead of byte pairs, no biases, no dropout; rotations with base 1000, as contexts are short.
    """

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head_width = width // heads
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.1 if parameter is self.bytes.weight else 0.6 * width**-0.5
                # Each block adds to the residual stream twice; this keeps its variance independent of the depth.
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=std * (2 * layers) ** -0.5 if adds else std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the byte that follows each position."""
        h = self.bytes(tokens)
        rotation = _rotation(tokens.shape[1], self.head_width, h.device)
        for block in self.blocks:
            h = block(h, rotation)
        return F.linear(self.norm(h), self.bytes.weight)


@final
class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, h: Tensor, rotation: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width / heads]
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attention.transpose(1, 2).flatten(2))
        mlp: Tensor = self.down(F.gelu(self.up(self.mlp_norm(h))))
        return h + mlp


def _rotation(length: int, size: int, device: torch.device) -> Tensor:
    """Cosines and sines of position times frequency: `[2, length, size / 2]`."""
    frequencies = 1000.0 ** -(torch.arange(size // 2, device=device) / (size // 2))
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair (i, i + size / 2) of the last dimension by its angle."""
    (cosine, sine), (a, b) = rotation.to(x.dtype), x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


def nats_per_byte(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte, in float32 whatever the logits' dtype."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def num_parameters(model: nn.Module) -> int:
    """Entries of all trained tensors."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
