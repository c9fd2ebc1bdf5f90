"""Several processes take the steps of one: two gloo processes on the CPU, started once for all tests here."""

import contextlib
import importlib
import io
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfacerr.exceptions import InputError
from kfacerr.torch import KFAC, SENG, factored
from kfacerr.torch._kfac_layer import KFACLayer
from kfacerr.torch.distributed import Team, assign
from tests.kfacerr.torch.cases import (
    ALGORITHMS,
    convnet,
    images,
    mlp,
    parameters,
    relative,
    same,
    snapshot,
    vectors,
)

W, STEPS = 2, 6
BUSY = {"lr": 0.1, "rank": 4, "T_updt": 2, "T_inv": 4, "T_brand": 2, "T_rsvd": 4, "T_corct": 4, "momentum": 0.5}
"""Sketches of 4 + 10 columns of the 28 x 28 factor: the draws are seen in the result."""

MAKES = {"convnet": (convnet, images), "mlp": (mlp, vectors), "drop-in": (lambda: factored(mlp()), vectors)}


def run(
    make: str = "convnet", algorithm: str = "B-R-KFAC", *, micro: int = 1, uneven: bool = False, **options: Any
) -> dict[str, Any]:
    """Trains on this process's share of batches of 8; the whole of them where there is but one."""
    net, batch = MAKES[make][0](), MAKES[make][1]
    team = Team()
    model = DistributedDataParallel(net) if team.size > 1 else net
    optimizer = KFAC(model, algorithm, **{**BUSY, **options})
    for k in range(STEPS):
        step(model, optimizer, batch(k, b=8), team, micro=micro, uneven=uneven)
    return result(net, optimizer)


def step(
    model: nn.Module,
    optimizer: KFAC,
    batch: tuple[Tensor, Tensor],
    team: Team,
    micro: int = 1,
    uneven: bool = False,
) -> None:
    n = len(batch[0])
    cuts = [0, n // 4, n] if uneven else [n * rank // team.size for rank in range(team.size + 1)]
    mine = torch.arange(cuts[team.rank], cuts[team.rank + 1])
    optimizer.zero_grad()
    for i, part in enumerate(mine.chunk(micro)):
        last = i == micro - 1
        with contextlib.nullcontext() if last or team.size == 1 else model.no_sync():
            out = model(batch[0][part])
            if optimizer.fisher == "sampled":
                optimizer.sample_fisher(out, lambda out, generator: F.cross_entropy(out, 0 * batch[1][: len(out)]))
            (F.cross_entropy(out, batch[1][part]) * len(part) / len(mine)).backward()
    optimizer.step()


def result(net: nn.Module, optimizer: KFAC) -> dict[str, Any]:
    return {"parameters": parameters(net), "state": snapshot(optimizer), "k": optimizer.k}


# ---- what each process does ---------------------------------------------------------------------------------


def not_finite() -> dict[str, Any]:
    """NaN in the input of one process in step 2, 3 and, in the columns alone, 4."""
    net, team = convnet(), Team()
    model = DistributedDataParallel(net) if team.size > 1 else net
    optimizer = KFAC(model, "B-R-KFAC", **BUSY)
    ks = []
    for k in range(STEPS):
        if k in (2, 3):
            x, y = images(90, b=8)
            x[7] = torch.nan
            step(model, optimizer, (x, y), team)
            ks.append(optimizer.k)
        if k == 4 and team.size > 1:
            # G G^T would overflow on this process, and the gradient does not tell.
            optimizer.zero_grad()
            F.cross_entropy(model(images(91, b=4)[0]), images(91, b=4)[1]).backward()
            layer = optimizer.layers["3"]
            if team.rank == 1:
                layer.collect = partial(overflowing, layer)  # type: ignore[method-assign]
            optimizer.step()
            layer.__dict__.pop("collect", None)
            ks.append(optimizer.k)
        step(model, optimizer, images(k, b=8), team)
    return {**result(net, optimizer), "ks": ks}


def overflowing(layer: KFACLayer, captures: Any) -> None:
    KFACLayer.collect(layer, captures)
    layer.parts[0].columns.G.fill_(1e200)


def uneven_factors() -> dict[str, Any]:
    """The dense factors after one step on batches of 2 and 6."""
    model = DistributedDataParallel(mlp())
    optimizer = KFAC(model, "K-FAC", **BUSY)
    step(model, optimizer, vectors(0, b=8), Team(), uneven=True)
    return {side: factor.average.M for side, factor in optimizer.layers["0"].factors.items()}


def shared_work() -> dict[str, Any]:
    """Which factors this process decomposed, by step."""
    done: list[tuple[str, str]] = []
    push = KFACLayer.push

    def recorded(self: KFACLayer, side: str, k: int, X: Tensor, **options: Any) -> None:
        if self.factors[side].due(k):
            done.append((self.name, side))
        push(self, side, k, X, **options)

    KFACLayer.push = recorded  # type: ignore[method-assign]
    try:
        run("convnet", "R-KFAC", T_updt=1, T_inv=STEPS)
    finally:
        KFACLayer.push = push  # type: ignore[method-assign]
    return {"done": done}


def gathered() -> dict[str, Any]:
    """How many factors' columns were gathered, and a run of N-KFAC that changes its rank and continues."""
    gather, seen = Team.gather, []
    Team.gather = lambda self, X, widths: seen.append(tuple(X.shape)) or gather(self, X, widths)  # type: ignore
    try:
        options = {"T_updt": 1, "rank": lambda epoch: 4 if epoch < 1 else 5, "steps_per_epoch": 3}
        out = run("mlp", "N-KFAC", linear_application=False, **options)  # Algorithm 8 gathers the gradient's
    finally:
        Team.gather = gather  # type: ignore[method-assign]
    return {**out, "gathered": seen}


def resumed(file: io.BytesIO) -> dict[str, Any]:
    """Goes on from another number of processes' checkpoint."""
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    net, team = convnet(), Team()
    net.load_state_dict(saved["net"])
    model = DistributedDataParallel(net) if team.size > 1 else net
    optimizer = KFAC(model, "B-R-KFAC", **BUSY)
    optimizer.load_state_dict(saved["optimizer"])
    for k in range(3, STEPS):
        step(model, optimizer, images(k, b=8), team)
    return result(net, optimizer)


def distributed_checkpoint(folder: str) -> dict[str, Any]:
    """Stops after three steps, writes with torch.distributed.checkpoint, and goes on with all made anew."""
    net, optimizer = convnet(), None
    for steps in (range(3), range(3, STEPS)):
        net = convnet()
        model = DistributedDataParallel(net)
        optimizer = KFAC(model, "B-R-KFAC", **BUSY)
        if steps.start:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for k in steps:
            step(model, optimizer, images(k, b=8), Team())
        if not steps.start:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(state, checkpoint_id=folder)
    return result(net, optimizer)


def checkpoint() -> io.BytesIO:
    net, team = convnet(), Team()
    model = DistributedDataParallel(net) if team.size > 1 else net
    optimizer = KFAC(model, "B-R-KFAC", **BUSY)
    for k in range(3):
        step(model, optimizer, images(k, b=8), team)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file


def without_ddp() -> dict[str, Any]:
    """Gradients that nobody averages: refused; and processes that train on their own."""
    team = Team()
    x, y = vectors(team.rank)
    out: dict[str, Any] = {}
    net = mlp()
    optimizer = KFAC(net, "B-KFAC", **BUSY)
    F.cross_entropy(net(x), y).backward()
    try:
        optimizer.step()
    except InputError as error:
        out["error"] = str(error)
    net = mlp()
    optimizer = KFAC(net, "B-KFAC", **BUSY, data_parallel=False, linear_application=False)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    return {**out, "alone": parameters(net)}


def refused() -> dict[str, Any]:
    """What cannot be trained by several processes: SENG, also where DDP comes after it, and sharded parameters."""
    errors = {}
    for name, make in (("KFAC", KFAC), ("SENG", SENG)):
        net = mlp()
        optimizer = make(net)
        if name == "SENG":
            model = DistributedDataParallel(net)
            F.cross_entropy(model(vectors(0)[0]), vectors(0)[1]).backward()
            errors["SENG before DDP"] = _error(optimizer.step)
        for way, shard in SHARDED.items():
            net = mlp()
            optimizer = make(net)
            model = shard(net)
            errors[f"{name} before {way}"] = _error(optimizer.step)
            errors[f"{name} after {way}"] = _error(lambda model=model, make=make: make(model))
    return {"errors": errors}


SHARDED: dict[str, Any] = {
    "fully_shard": fully_shard,
    "fully_shard of a layer": lambda net: fully_shard(net[2]) and net,
    "FSDP, flat": partial(FullyShardedDataParallel, device_id=torch.device("cpu")),
    "FSDP": partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True),
}


def _error(call: Any) -> str:
    try:
        call()
    except InputError as error:
        return str(error)
    return "none"


def failing() -> dict[str, Any]:
    """One factor of one process cannot be decomposed."""
    decompositions: Any = importlib.import_module("kfacerr.rsvd")
    original = decompositions.eigh_descending

    def eigh(K: Tensor, what: str = "matrix") -> Any:
        if len(K) == 28:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return original(K, what)

    decompositions.eigh_descending = eigh
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = run("convnet", "R-KFAC", rank=40)  # so many that the RSVD is the EVD
    finally:
        decompositions.eigh_descending = original
    return {**out, "warnings": [str(w.message) for w in caught if w.category is RuntimeWarning]}


SCENARIOS = {
    **{algorithm: lambda algorithm=algorithm: run("convnet", algorithm) for algorithm in ALGORITHMS},
    "accumulate": lambda: run("mlp", "B-KFAC", accumulate=True, T_updt=1, T_brand=3),
    "micro-batches": lambda: run("convnet", micro=2),
    "Algorithm 8": lambda: run("convnet", "B-KFAC"),
    "sampled": lambda: run("convnet", fisher="sampled"),
    "drop-in": lambda: run("drop-in", "B-KFAC"),
    "kl": lambda: run("mlp", "B-KFAC", clip_by="kl"),
    "not finite": not_finite,
    "failing": failing,
    "a sketch that grows": gathered,
}
ONLY_TOGETHER = {
    "uneven": lambda: run("mlp", "B-KFAC", uneven=True),
    "uneven, Algorithm 8": lambda: run("mlp", "B-KFAC", uneven=True),
    "uneven, K-FAC": lambda: run("mlp", "K-FAC", uneven=True),
    "uneven, N-KFAC": lambda: run("mlp", "N-KFAC", uneven=True),
    "uneven, one step": uneven_factors,
    "shared work": shared_work,
    "without DDP": without_ddp,
    "refused": refused,
}


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def work(rank: int, folder: str) -> None:
    """All scenarios in one process of W."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=W)
    results: dict[str, Any] = {}
    for name, scenario in {**SCENARIOS, **ONLY_TOGETHER}.items():
        messages = Messages()
        logging.getLogger("kfacerr").addHandler(messages)
        results[name] = {**scenario(), "log": messages.texts}
        logging.getLogger("kfacerr").removeHandler(messages)
    results["distributed checkpoint"] = distributed_checkpoint(f"{folder}/distributed")
    results["resumed"] = resumed(io.BytesIO(Path(folder, "alone.pt").read_bytes()))
    saved = checkpoint()
    if rank == 0:
        Path(folder, "together.pt").write_bytes(saved.getvalue())
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict[str, Any]]:
    """The results of each process."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "alone.pt").write_bytes(checkpoint().getvalue())
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=W)
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(W)]
    results[0]["checkpoint"] = io.BytesIO((folder / "together.pt").read_bytes())
    return results


# ---- the claims ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_take_the_steps_of_one_with_both_their_batches(name, together):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of "failing"
        alone = SCENARIOS[name]()
    assert relative(together[0][name]["parameters"], alone["parameters"]) <= 1e-9
    assert together[0][name]["k"] == alone["k"]
    of_mlp = name in ("drop-in", "kl", "accumulate", "a sketch that grows")
    start = parameters(MAKES["mlp" if of_mlp else "convnet"][0]())
    assert relative(alone["parameters"], start) > 0.01


@pytest.mark.parametrize("name", [*SCENARIOS, "uneven", "uneven, K-FAC", "uneven, N-KFAC", "resumed"])
def test_all_processes_hold_the_same_state_bit_for_bit(name, together):
    first, second = (results[name] for results in together)
    assert torch.equal(first["parameters"], second["parameters"])
    assert same(first["state"], second["state"])


def test_of_a_sketch_the_processes_send_sums_and_no_columns(together):
    """X X^T Omega adds up over columns: (d, s) numbers, however many columns there are."""
    for results in together:
        assert results["a sketch that grows"]["gathered"] == []
        state = results["a sketch that grows"]["state"]
        (Y,) = (
            part for path, part in state.items() if path.endswith("layers/0/factors/A/processes/N-KFAC/sketch/Y")
        )
        assert Y.shape == (41, 10)


def test_a_skipped_step_is_skipped_by_all(together):
    assert [results["not finite"]["ks"] for results in together] == [[2, 3, 4]] * 2
    for results in together:
        assert any("step 2: NaN or Inf" in text for text in results["not finite"]["log"])


def test_algorithm_8_sees_the_averaged_gradient_in_the_columns_of_all_also_of_uneven_batches(together):
    for results in together:
        for name in ("Algorithm 8", "uneven, Algorithm 8", "kl"):
            assert not any("Algorithm 1" in text for text in results[name]["log"])
    a, b = (together[0][name]["parameters"] for name in ("uneven", "uneven, Algorithm 8"))
    assert relative(a, b) <= 1e-11


def test_uneven_batches_count_by_their_samples(together):
    """Omega is a mean over samples, Gamma that of the loss DDP descends: the mean of the processes' means."""
    net = mlp()
    x, y = vectors(0, b=8)
    h = net[0](x)
    out = net[2](net[1](h))
    loss = (F.cross_entropy(out[:2], y[:2]) + F.cross_entropy(out[2:], y[2:])) / 2
    (g,) = torch.autograd.grad(loss, h)
    A = torch.cat([x, torch.ones(8, 1, dtype=x.dtype)], dim=1).T / 8**0.5
    G = g.T * 8**0.5
    for results in together:
        assert relative(results["uneven, one step"]["A"], A @ A.T) <= 1e-12
        assert relative(results["uneven, one step"]["G"], G @ G.T) <= 1e-12


def test_decompositions_are_shared_out(together):
    """Of the largest factors each process has one; none is done twice."""
    done = [set(results["shared work"]["done"]) for results in together]
    assert not done[0] & done[1]
    assert len(done[0] | done[1]) == 6
    sizes = {("0", "A"): 9, ("0", "G"): 3, ("3", "A"): 28, ("3", "G"): 12, ("5", "A"): 13, ("5", "G"): 5}
    assert ("3", "A") in done[0]
    assert sum(sizes[f] ** 3 for f in done[0]) == 28**3  # against all others together


def test_the_dearest_job_goes_to_the_process_with_the_least_to_do():
    assert assign([1.0, 5.0, 3.0, 3.0], 2) == [0, 0, 1, 1]
    assert assign([], 2) == []
    assert assign([2.0, 2.0], 1) == [0, 0]


@pytest.mark.parametrize("way", ["from one to two", "from two to one"])
def test_a_checkpoint_goes_on_at_another_number_of_processes(way, together):
    straight = run()
    other = together[0]["resumed"] if way == "from one to two" else resumed(together[0]["checkpoint"])
    assert relative(other["parameters"], straight["parameters"]) <= 1e-9
    assert set(other["state"]) == set(straight["state"])  # no "module." in the names


def test_a_distributed_checkpoint_resumes_bit_for_bit(together):
    for results in together:
        straight, again = results["B-R-KFAC"], results["distributed checkpoint"]
        assert torch.equal(again["parameters"], straight["parameters"])
        assert same(again["state"], straight["state"])


def test_a_decomposition_that_fails_is_said_once_and_leaves_all_processes_alike(together):
    said = [text for results in together for text in results["failing"]["warnings"]]
    assert len(said) == 3 and all("layer '3', factor A" in text for text in said)  # at steps 0, 2 and 4


def test_gradients_that_nobody_averages_are_refused_and_processes_may_train_on_their_own(together):
    for rank, results in enumerate(together):
        assert "the processes' gradients differ; wrap the model in" in results["without DDP"]["error"]
        net = mlp()
        optimizer = KFAC(net, "B-KFAC", **BUSY, linear_application=False)
        F.cross_entropy(net(vectors(rank)[0]), vectors(rank)[1]).backward()
        optimizer.step()
        assert torch.equal(results["without DDP"]["alone"], parameters(net))


def test_what_several_processes_cannot_train_is_refused_in_one_line(together):
    for results in together:
        errors = results["refused"]["errors"]
        assert len(errors) == 1 + 2 * 2 * len(SHARDED)
        assert "SENG runs in one process" in errors.pop("SENG before DDP")
        for name, text in errors.items():
            assert "sharded (FSDP)" in text and "DistributedDataParallel" in text and "\n" not in text, name
