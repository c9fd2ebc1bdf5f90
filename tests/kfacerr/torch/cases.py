"""Small models, batches and optimizers that the tests of `kfacerr.torch` share."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kfacerr.torch import KFAC, SENG

QUIET_TRAINER = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Of Lightning's Trainer."""

ALGORITHMS = ["K-FAC", "R-KFAC", "SRE-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C", "N-KFAC", "W-KFAC"]
BUSY = {
    "lr": 0.1,
    "rank": 5,
    "T_updt": 2,
    "T_inv": 4,
    "T_brand": 4,
    "T_rsvd": 4,
    "T_corct": 4,
    "momentum": 0.5,
    "phi_lambda": 0.1,
}
"""Every part of every algorithm at work within ten steps, sketches included."""


def convnet(dtype: torch.dtype = torch.float64, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=False),
        nn.ReLU(inplace=True) if inplace else nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 12),
        nn.ReLU(inplace=True) if inplace else nn.Tanh(),
        nn.Linear(12, 5),
    )
    return net.to(dtype)


def mlp(dtype: torch.dtype = torch.float64, width: int = 30) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, width), nn.Tanh(), nn.Linear(width, 6)).to(dtype)


def images(k: int, b: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(k)
    x = torch.randn(b, 1, 6, 6, generator=g, dtype=torch.float64)
    return x.to(dtype), torch.randint(5, (b,), generator=g)


def wide_convnet(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Its convolution has fewer columns, 8 of `wide_images`, than dimensions, 50 and 20."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 20, 5, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(80, 5)).to(dtype)


def wide_images(k: int) -> tuple[Tensor, Tensor]:
    x, y = images(k, b=2)
    return torch.cat([x, x.square()], dim=1), y


def vectors(k: int, b: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(k)
    return torch.randn(b, 40, generator=g, dtype=dtype), torch.randint(6, (b,), generator=g)


class Case(NamedTuple):
    """An optimizer, and a model and batches for it. `make` and `batch` take a dtype, `batch` a size b too."""

    make: Callable[..., nn.Sequential]
    batch: Callable[..., tuple[Tensor, Tensor]]
    optimizer: Callable[..., Any]

    def run(self, steps: int = 6, **options: Any) -> Tensor:
        """The parameters after training."""
        net = self.make()
        train(net, self.optimizer(net, **options), [self.batch(k) for k in range(steps)])
        return parameters(net)


def _kfac(algorithm: str, **given: Any) -> Callable[..., KFAC]:
    return lambda net, **options: KFAC(net, algorithm, **{**BUSY, **given, **options})


def _seng(net: nn.Module, **options: Any) -> SENG:
    """Layer "3" (12 x 28 weights) is sampled, the others are exact."""
    sketched = {"im_size_threshold": 300, "fim_col_sample_size": 4, "svd_rank": 2}
    return SENG(net, **{"update_every": 3, **sketched, **options})


CASES = {
    "KFAC": Case(convnet, images, _kfac("B-R-KFAC", linear_application=False)),
    "Algorithm 8": Case(convnet, images, _kfac("B-KFAC-C")),
    "factored": Case(mlp, vectors, _kfac("B-KFAC", T_updt=3, T_inv=3)),
    "SENG": Case(convnet, images, _seng),
}


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]
) -> list[float]:
    """The losses of the steps."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(net, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The values in the optimizer's state by their path, tensors copied."""
    return leaves(optimizer.state_dict())


def leaves(state: Any, path: str = "") -> dict[str, Any]:
    if isinstance(state, tuple):  # of pairs, the layers
        state = dict(state)
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: leaf for name, value in items for key, leaf in leaves(value, f"{path}/{name}").items()}
    return {path: state.clone() if isinstance(state, Tensor) else state}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(
        torch.equal(a, other[key]) if isinstance(a, Tensor) else a == other[key] for key, a in one.items()
    )


class New(TorchDispatchMode):
    """Counts the operations that allocate at least `size` elements, and remembers the largest."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count, self.largest = size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {v.untyped_storage().data_ptr() for v in _tensors((args, tuple((kwargs or {}).values())))}
        for value in _tensors(out):
            if value.untyped_storage().data_ptr() not in known:
                self.count += value.numel() >= self.size
                self.largest = max(self.largest, value.numel())
        return out


def _tensors(tree):
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _tensors(item)
