"""The network of §6: VGG16_bn "slightly amended" (footnotes 17 and 21), with a width factor."""

from torch import Tensor, nn

_POOL = "pool"
# Configuration D of VGG (Simonyan & Zisserman 2015): output channels of the 13 convolutions, and the 5 pools.
_VGG16 = (
    *(64, 64, _POOL),
    *(128, 128, _POOL),
    *(256, 256, 256, _POOL),
    *(512, 512, 512, _POOL),
    *(512, 512, 512, _POOL),
)
_LAST = max(i for i, item in enumerate(_VGG16) if item != _POOL)
_IMAGE_WIDTH = 32  # the pools halve the height only, so the width of the image survives to the FC layer
_HIDDEN = 2048


class VGG16BN(nn.Module):
    """13 convolutions 3x3 with BatchNorm and ReLU, five pools 2x1, two FC layers.

    At width 1, (b, 3, 32, 32) -> (b, 512, 1, 32) -> fc0: 16384 -> 2048, ReLU, dropout 0.5 -> fc1: 2048 -> 10
    (footnote 21). The FC layers are `model.fc0` ("FC layer 0" of the figures) and `model.fc1`.
    """

    def __init__(self, width: float, classes: int, before: float | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for position, item in enumerate(_VGG16):
            if not isinstance(item, int):
                layers.append(nn.MaxPool2d((2, 1)))
                continue
            out = scaled(item, width if before is None or position == _LAST else before)
            # The bias is redundant before BatchNorm; VGG16_bn has it, so it stays.
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        hidden = scaled(_HIDDEN, width)
        self.features = nn.Sequential(*layers)
        self.fc0 = nn.Linear(channels * _IMAGE_WIDTH, hidden)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.fc1 = nn.Linear(hidden, classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, 32, 32) float -> logits (b, classes)."""
        columns = self.features(images).flatten(1)
        logits: Tensor = self.fc1(self.dropout(self.relu(self.fc0(columns))))
        return logits


def vgg16_bn(width: float = 1.0, classes: int = 10, before: float | None = None) -> VGG16BN:
    """The paper's network, its channel counts and its hidden layer scaled by `width` (1 is the paper's).

    `before` scales the convolutions before the last by itself, so that fc0 has its size while they are cheap.
    """
    return VGG16BN(width, classes, before)


def fc0_sizes(width: float) -> tuple[int, int]:
    """Inputs and outputs of the first FC layer."""
    last = _VGG16[_LAST]
    assert isinstance(last, int)
    return scaled(last, width) * _IMAGE_WIDTH, scaled(_HIDDEN, width)


def scaled(size: int, width: float) -> int:
    """`size * width`, rounded, at least 1."""
    return max(1, round(size * width))


def _initialise(module: nn.Module) -> None:
    """Kaiming normal (fan out, He et al. 2015) for convolutions, as VGG16_bn has it; the paper is silent.

    BatchNorm (1, 0) and Linear (uniform in +-1/sqrt(fan in)) keep PyTorch's defaults.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        assert module.bias is not None
        nn.init.zeros_(module.bias)
