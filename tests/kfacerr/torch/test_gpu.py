"""float32 on a device against float64 on the host, by relative error; on the CPU the same tests are a rehearsal.

The core's own tests run on CuPy and torch CUDA too, through the fixture `xp`: this file has what they have not.
Sketches are drawn on the device, and differ from the host's; where results are compared they cover the space.
"""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacerr.algorithms import SEVEN, Algorithm
from kfacerr.array import cholesky_inverse, eigh_descending, normal
from kfacerr.brand import symmetric_brand
from kfacerr.factor import KFactor
from kfacerr.inverse import exact_inverse, precondition_linear
from kfacerr.lowrank import LowRank
from kfacerr.process import Settings
from kfacerr.rsvd import nystrom, rsvd, srevd
from kfacerr.stream import Step, Window
from kfacerr.study import ErrorStudy
from kfacerr.torch import KFAC, SENG, ColumnHooks, factored
from studies.training import Training
from tests.conftest import BACKENDS, Backend, backend
from tests.kfacerr.torch.cases import convnet, images, mlp, parameters, relative, vectors
from tests.strategies import psd, stream
from tests.studies.helpers import tiny_dataset, tiny_training

COVERING = 1000
"""Oversampling at which a sketch spans all of the space, and draws nothing."""


@pytest.fixture(params=[name for name in BACKENDS if name != "array_api_strict"])
def fast(request: pytest.FixtureRequest) -> Backend:
    """The backends that compute fast."""
    return backend(request.param)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The optimizers switch TF32 off for their own work; here the network's convolutions must be exact too."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        convolutions = getattr(torch.backends.cudnn, "conv", None)
        if hasattr(convolutions, "fp32_precision"):  # torch 2.9
            monkeypatch.setattr(convolutions, "fp32_precision", "ieee")
        else:
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return str(request.param)


# ---- the core -------------------------------------------------------------------------------------------------


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def evd(K):
    w, V = eigh_descending(K)
    return (V * w[None, :]) @ V.T


@pytest.mark.parametrize(
    ("function", "tolerance"),
    [
        (evd, 1e-5),
        (cholesky_inverse, 1e-4),
        (lambda M: exact_inverse(M, phi=0.1)[0].dense(), 1e-5),
        (lambda M: symmetric_brand(symmetric_brand(None, M[:, :20]), M[:, 20:40]).dense(), 1e-5),
        (lambda M: precondition_linear(M[:, :9], M[:, 9:18], *2 * [exact_inverse(M, phi=0.1)[0]])[0], 1e-4),
    ],
)
def test_core_functions(xp, function: Callable, tolerance: float):
    M = psd(np.random.default_rng(0), "slow decay", 200)
    assert error(xp.numpy(function(xp.array(M, np.float32))), function(M)) <= tolerance


@pytest.mark.parametrize("method", [rsvd, srevd, nystrom])
def test_sketches_of_the_device_are_repeatable_and_as_good_as_the_hosts(xp, method: Callable):
    M = psd(np.random.default_rng(0), "fast decay", 200)
    on_device = xp.array(M, np.float32)

    def sketched(array, seed: int) -> LowRank:
        return method(array, 12, oversampling=6, n_pwr_it=2, rng=np.random.default_rng(seed))

    one, same, other = (xp.numpy(sketched(on_device, seed).dense()) for seed in (0, 0, 1))
    assert error(same, one) <= 1e-6
    assert error(other, one) <= 1e-2
    best = np.linalg.norm(M - sketched(M, 0).dense())
    assert np.linalg.norm(M - one) <= 1.5 * best + 1e-5


def test_normal_draws(xp):
    like = xp.array(np.zeros(1), np.float32)
    draws = [xp.numpy(normal(np.random.default_rng(seed), (400, 50), like)) for seed in (0, 1)]
    for x in draws:
        assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05
    assert abs((draws[0] * draws[1]).mean()) < 0.05


@pytest.mark.parametrize("name", [*SEVEN, "FD"])
def test_processes(fast, name: str):
    columns = stream(np.random.default_rng(0), d=150, n=10, steps=60, kinds=("plain",), decay="slow decay")
    settings = Settings(rank=12, oversampling=COVERING)

    def estimate(dtype: type, lift: Callable):
        factor = KFactor("A", {name: Algorithm.parse(name).process(settings, "A")}, settings.rho)
        for i, X in enumerate(columns):
            factor.push(10 * i, lift(X.astype(dtype)))
        inverse = factor.inverse(name, phi=0.1)
        assert inverse is not None
        return inverse.dense()

    got = estimate(np.float32, lambda X: fast.array(X, X.dtype))
    assert error(fast.numpy(got), estimate(np.float64, lambda X: X)) <= 1e-4


def test_replay(fast):
    A = stream(np.random.default_rng(1), d=60, n=5, steps=60, kinds=("plain",), decay="slow decay")
    G = stream(np.random.default_rng(2), d=40, n=5, steps=60, kinds=("plain",), decay="slow decay")

    def rows(dtype: type, lift: Callable) -> dict[tuple, float]:
        settings = Settings(rank=8, oversampling=COVERING)
        names = [f"{name} continuation={c}" for name in (*SEVEN, "FD") for c in ("min", "trace")]
        study = ErrorStudy(names, settings, [Window(200, 120)])
        steps = [
            Step(10 * i, lift(a.astype(dtype)), lift(g.astype(dtype)))
            for i, (a, g) in enumerate(zip(A, G, strict=True))
        ]
        return {row[:3]: row.value for step in steps for row in study.push(step)}

    got, expected = rows(np.float32, lambda X: fast.array(X, X.dtype)), rows(np.float64, lambda X: X)
    assert got.keys() == expected.keys() and len(got) == 8 * 2 * 4 * 12
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=2e-3, abs=2e-5), key


# ---- torch ----------------------------------------------------------------------------------------------------


def moved(make: Callable, batches: Callable, optimizer: Callable, device: str, dtype: torch.dtype) -> Tensor:
    """How far the weights get in 12 steps."""
    net = make().to(device, dtype)
    before = parameters(net)
    driver = optimizer(net)
    for k in range(12):
        x, y = batches(k)
        driver.zero_grad()
        F.cross_entropy(net(x.to(device, dtype)), y.to(device)).backward()
        driver.step()
    return (parameters(net) - before).double().cpu()


FAMILY = {"T_updt": 2, "T_inv": 4, "T_brand": 2, "T_rsvd": 6, "T_corct": 6, "rank": 8, "oversampling": COVERING}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    **{
        name: (lambda net, name=name: KFAC(net, name, lr=0.05, **FAMILY))
        for name in ("K-FAC", "R-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C")
    },
    "trace, momentum": lambda net: KFAC(net, "B-KFAC", lr=0.05, continuation="trace", momentum=0.9, **FAMILY),
    "Algorithm 8": lambda net: KFAC(net, "B-KFAC", lr=0.05, **FAMILY),
    "KL clip": lambda net: KFAC(net, "B-R-KFAC", lr=0.05, clip=1e-3, clip_by="kl", **FAMILY),
    "SENG": lambda net: SENG(net, lr=0.02, update_every=4),
}


@pytest.mark.parametrize("network", ["mlp", "convnet"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(device: str, name: str, network: str):
    make, batches = {"mlp": (mlp, vectors), "convnet": (convnet, images)}[network]
    expected = moved(make, batches, OPTIMIZERS[name], "cpu", torch.float64)
    got = moved(make, batches, OPTIMIZERS[name], device, torch.float32)
    assert relative(got, expected) <= 1e-3


def test_factored_layers(device: str):
    expected = moved(mlp, vectors, OPTIMIZERS["B-KFAC"], "cpu", torch.float64)
    got = moved(lambda: factored(mlp()), vectors, OPTIMIZERS["B-KFAC"], device, torch.float32)
    assert relative(got, expected) <= 1e-3


@pytest.mark.parametrize("name", ["B-R-KFAC", "B-KFAC-C", "SENG"])
def test_a_checkpoint_of_the_device_goes_on_there(device: str, name: str, tmp_path):
    def run(steps: range, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for k in steps:
            x, y = vectors(k, dtype=torch.float32)
            optimizer.zero_grad()
            F.cross_entropy(net(x.to(device)), y.to(device)).backward()
            optimizer.step()

    net = mlp(torch.float32).to(device)
    optimizer = OPTIMIZERS[name](net)
    run(range(5), net, optimizer)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    other = copy.deepcopy(mlp(torch.float32)).to(device)
    resumed = OPTIMIZERS[name](other)
    state = torch.load(tmp_path / "x.pt", map_location="cpu", weights_only=True)
    other.load_state_dict(state["net"])
    resumed.load_state_dict(state["optimizer"])
    run(range(5, 12), net, optimizer)
    run(range(5, 12), other, resumed)
    assert relative(parameters(other), parameters(net)) <= 1e-4


# ---- mixed precision ------------------------------------------------------------------------------------------


def test_columns_under_bfloat16_are_float32_and_make_up_the_gradient(device: str):
    net = convnet(torch.float32).to(device)
    x, y = (t.to(device) for t in images(0))
    with ColumnHooks(net, ["0", "3", "5"]) as hooks:
        with torch.autocast(device, torch.bfloat16):
            logits = net(x.float())
        F.cross_entropy(logits.float(), y).backward()
        for name, (A, G) in hooks.pop().items():
            layer = net[int(name)]
            assert A.dtype == G.dtype == torch.float32
            gradient = layer.weight.grad.flatten(1)
            if layer.bias is not None:
                gradient = torch.cat([gradient, layer.bias.grad[:, None]], dim=1)
            assert relative(G @ A.T, gradient) <= 2e-2


@pytest.mark.parametrize("driver", ["SGD", "SENG", "K-FAC T_inv=50", "B-R-KFAC"])
def test_mixed_precision_trains_as_float32_does_with_all_state_in_float32(device: str, driver: str):
    def run(amp: bool) -> tuple[Training, float]:
        training = tiny_training(tiny_dataset(64), driver=driver, rank_scale=1 / 40, device=device, amp=amp)
        losses = [training.step() for _ in range(12)]
        return training, float(torch.stack(losses).mean())

    training, loss = run(amp=True)
    _, expected = run(amp=False)
    assert loss == pytest.approx(expected, rel=0.1)
    assert loss != expected
    assert training.evaluate()[0] > 0
    floats = {t.dtype for t in _tensors(training.state_dict()) if t.is_floating_point()}
    assert floats <= {torch.float32}


def _tensors(state) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def test_a_run_in_mixed_precision_is_not_resumed_in_another():
    training = tiny_training(amp=True)
    training.step()
    other = tiny_training()
    with pytest.raises(ValueError, match="amp = True, not False"):
        other.load_state_dict(training.state_dict())


# ---- CuPy and torch -------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cupy_and_torch_see_each_others_arrays_without_copies():
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available() or not torch.cuda.is_available():
        pytest.skip("CuPy or torch sees no CUDA device")
    M = cupy.asarray(psd(np.random.default_rng(0), "slow decay", 50), dtype=cupy.float32)
    seen = torch.from_dlpack(M)
    assert seen.device.type == "cuda" and seen.data_ptr() == M.data.ptr
    back = cupy.from_dlpack(seen)
    assert back.data.ptr == M.data.ptr
    seen[0, 0] = 7
    torch.cuda.synchronize()
    assert float(back[0, 0]) == float(M[0, 0]) == 7
    strided = torch.from_dlpack(M[:, :10])  # U as `carried` holds it
    assert strided.data_ptr() == M.data.ptr and strided.stride() == (50, 1)
    low = symmetric_brand(None, torch.from_dlpack(M[:, :10]))
    again = LowRank(cupy.from_dlpack(low.basis), cupy.from_dlpack(low.D), cupy.from_dlpack(low.mix))
    assert again.basis.data.ptr == low.basis.data_ptr()
    assert error(again.dense().get(), low.dense().cpu().numpy()) <= 1e-5
