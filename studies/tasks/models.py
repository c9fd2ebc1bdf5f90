"""The networks of `studies.tasks.problems`. Fully connected layers are called fc0, fc1, ..."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Transformer", "autoencoder", "convnet", "mlp"]


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Fully connected layers with an activation between any two."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (d_in, d_out) in enumerate(pairwise(widths)):
        if i:
            layers[f"act{i}"] = activation()
        layers[f"fc{i}"] = nn.Linear(d_in, d_out)
    return nn.Sequential(layers)


def autoencoder(*widths: int) -> nn.Sequential:
    """From the first width to the last, the code, and back; tanh everywhere but at the code and the output."""
    decoder = mlp(*widths[::-1], activation=nn.Tanh)
    model, own = mlp(*widths, activation=nn.Tanh), len(widths) - 1
    for i, layer in enumerate(decoder):
        index = own + (i + 1) // 2
        model.add_module(f"fc{index}" if i % 2 == 0 else f"act{index}", layer)
    return model


def convnet(channels: Sequence[int], flat: int, hidden: int, *, strides: Sequence[int]) -> nn.Sequential:
    """Convolutions 3x3 with ReLU, then two fully connected layers to ten classes.

    Args:
        channels: of the images, and of each convolution.
        flat: numbers that the last convolution leaves of an image.
        hidden: outputs of fc0.
        strides: of each convolution.

    Returns:
        The network.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, stride in enumerate(strides):
        layers[f"conv{i}"] = nn.Conv2d(channels[i], channels[i + 1], 3, stride=stride, padding=1)
        layers[f"relu{i}"] = nn.ReLU()
    layers |= {
        "flat": nn.Flatten(),
        "fc0": nn.Linear(flat, hidden),
        "relu": nn.ReLU(),
        "fc1": nn.Linear(hidden, 10),
    }
    return nn.Sequential(layers)


class Attention(nn.Module):
    """Causal self-attention: (b, t, d) -> (b, t, d)."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """Every position from those up to its own."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended: Tensor = self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return attended


class Block(nn.Module):
    """Attention and two fully connected layers, each behind a layer norm and beside the identity."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm0, self.norm1 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d, heads)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) -> (b, t, d)."""
        x = x + self.attention(self.norm0(x))
        added: Tensor = x + self.down(F.gelu(self.up(self.norm1(x))))
        return added


class Transformer(nn.Module):
    """Two blocks of width 64: characters (b, t) int64 -> logits of the next ones (b, t, vocabulary)."""

    def __init__(self, vocabulary: int, context: int, d: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.blocks = nn.Sequential(*(Block(d, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """The logits."""
        places = torch.arange(characters.shape[1], device=characters.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.token(characters) + self.place(places))))
        return logits
