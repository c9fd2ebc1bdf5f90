"""K-FAC and SENG inside the trainers of other libraries take the steps of a plain loop (the extra `examples`)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kfacerr.exceptions import InputError
from tests.kfacerr.torch.cases import CASES, QUIET_TRAINER, Case, loss_of, parameters, relative

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own
PARTS, CLIP = 2, 0.1
Batch = tuple[Tensor, Tensor]


@pytest.fixture(params=["KFAC", "factored", "SENG"])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def batches(case: Case, dtype: torch.dtype = torch.float64) -> list[Batch]:
    return [case.batch(k, b=8, dtype=dtype) for k in range(6)]


def parts(whole: Iterable[Batch]) -> list[Batch]:
    return [part for x, y in whole for part in zip(x.chunk(PARTS), y.chunk(PARTS), strict=True)]


def plain(case: Case, epochs: int = 1, *, clip: float | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """The parameters after a loop written by hand, on micro-batches."""
    net = case.make(dtype)
    optimizer = case.optimizer(net)
    scheduler = falling(optimizer)
    for x, y in epochs * batches(case, dtype):
        optimizer.zero_grad()
        for part in parts([(x, y)]):
            (loss_of(net, part) / PARTS).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        scheduler.step()
    return parameters(net)


def falling(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


# ---- Lightning ----------------------------------------------------------------------------------------------


def lightning_module(case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = case.make(dtype)

        def training_step(self, batch):
            x, y = (t.chunk(self.trainer.world_size)[self.trainer.global_rank] for t in batch)
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            optimizer = case.optimizer(self.net, **options)
            return [optimizer], [{"scheduler": falling(optimizer), "interval": "step"}]

    return Module()


def lightning_trainer(max_epochs: int = 1, **options: Any) -> Any:
    return pytest.importorskip("lightning").Trainer(
        max_epochs=max_epochs, use_distributed_sampler=False, **QUIET_TRAINER, **options
    )


def fit(
    module: Any, data: list[Batch], *, max_epochs: int = 1, checkpoint: Path | None = None, **options: Any
) -> Any:
    trainer = lightning_trainer(max_epochs, **options)
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("clip", [None, CLIP])
def test_lightning_accumulates_and_clips(case, clip):
    module = lightning_module(case)
    fit(module, parts(batches(case)), accumulate_grad_batches=PARTS, gradient_clip_val=clip)
    assert torch.equal(parameters(module), plain(case, clip=clip))


def test_lightning_resumes_bit_for_bit(case, tmp_path):
    data, path = parts(batches(case)), tmp_path / "first.ckpt"
    fit(lightning_module(case), data, accumulate_grad_batches=PARTS).save_checkpoint(path)
    module = lightning_module(case)
    fit(module, data, max_epochs=2, checkpoint=path, accumulate_grad_batches=PARTS)
    assert torch.equal(parameters(module), plain(case, epochs=2))


@pytest.mark.parametrize("clip", [None, CLIP])
def test_lightning_in_16_bit_mixed_precision(case, clip):
    """Clipping comes after scaler.unscale_(), and needs the scale declared; Lightning says so if it is not."""
    amp = pytest.importorskip("lightning.pytorch.plugins").MixedPrecision
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module = lightning_module(case, torch.float32, **({} if clip is None else {"loss_scale": scaler.get_scale}))
    options = {"accumulate_grad_batches": PARTS, "gradient_clip_val": clip}
    data = parts(batches(case, torch.float32))
    fit(module, data, plugins=[amp("16-mixed", "cpu", scaler)], **options)
    moved = plain(case, clip=clip, dtype=torch.float32) - parameters(case.make(torch.float32))
    assert relative(parameters(module) - parameters(case.make(torch.float32)), moved) <= 0.02
    if clip is not None:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(lightning_module(case, torch.float32), data, plugins=[amp("16-mixed", "cpu", scaler)], **options)


def test_lightning_in_bfloat16_mixed_precision(case):
    module = lightning_module(case, torch.float32)
    fit(module, parts(batches(case, torch.float32)), accumulate_grad_batches=PARTS, precision="bf16-mixed")
    start = parameters(case.make(torch.float32))
    assert relative(parameters(module) - start, plain(case, dtype=torch.float32) - start) <= 0.1


@pytest.mark.parametrize("name", ["KFAC", "factored"])
def test_lightning_trains_with_two_processes(name):
    case = CASES[name]
    module = lightning_module(case)
    fit(module, batches(case), strategy="ddp_fork", devices=2)
    assert relative(parameters(module), plain(case)) <= 1e-9


# ---- accelerate ---------------------------------------------------------------------------------------------


def accelerated(case: Case, dtype: torch.dtype = torch.float64, scaler: Any = None, **options: Any) -> Any:
    """An Accelerator, and what it makes of a model, an optimizer and a scheduler."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=PARTS, step_scheduler_with_optimizer=False
    )
    net = case.make(dtype)
    optimizer = case.optimizer(net, **options)
    if scaler is not None:  # as fp16 does, which it refuses on a CPU
        accelerator.scaler = scaler
        accelerator.unscale_gradients = lambda: scaler.unscale_(optimizer)
    return accelerator, *accelerator.prepare(net, optimizer, falling(optimizer))


def loop(prepared: Any, data: Iterable[Batch], clip: float | None = None) -> Tensor:
    accelerator, model, optimizer, scheduler = prepared
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()
    return parameters(accelerator.unwrap_model(model))


@pytest.mark.parametrize("clip", [None, CLIP])
def test_accelerate_accumulates_and_clips(case, clip):
    assert torch.equal(loop(accelerated(case), parts(batches(case)), clip), plain(case, clip=clip))


def test_accelerate_resumes_bit_for_bit(case, tmp_path):
    data = parts(batches(case))
    first = accelerated(case)
    loop(first, data[:6])
    first[0].save_state(str(tmp_path))
    again = accelerated(case)
    again[0].load_state(str(tmp_path))
    assert torch.equal(loop(again, data[6:]), plain(case))


def test_accelerate_scales_the_loss(case):
    """And clips, with the scale declared."""
    whole = parts(batches(case, torch.float32))
    for clip in (None, CLIP):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        declared = {} if clip is None else {"loss_scale": scaler.get_scale}
        found = loop(accelerated(case, torch.float32, scaler, **declared), whole, clip)
        assert relative(found, plain(case, clip=clip, dtype=torch.float32)) <= 1e-5
    with pytest.raises(InputError, match=r"scaler\.unscale_\(\) came before"):
        loop(accelerated(case, torch.float32, torch.amp.GradScaler("cpu")), whole, CLIP)


def test_accelerate_trains_with_two_processes(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    case = CASES["KFAC"]

    def work() -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # that of the tests before
        prepared = accelerated(case)
        accelerator = prepared[0]
        assert accelerator.num_processes == 2
        share = [tuple(t.chunk(2)[accelerator.process_index] for t in part) for part in parts(batches(case))]
        found = loop(prepared, share)
        torch.save(found, tmp_path / f"{accelerator.process_index}.pt")

    accelerate.debug_launcher(work, num_processes=2)
    for rank in range(2):
        assert relative(torch.load(tmp_path / f"{rank}.pt"), plain(case)) <= 1e-9


# ---- transformers' Trainer ----------------------------------------------------------------------------------


def trainer_of(case: Case, folder: Path, data: Iterable[Batch], **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = case.make()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return None

    model = Model()
    optimizer = case.optimizer(model.net)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8 // PARTS,
        gradient_accumulation_steps=PARTS,
        use_cpu=True,
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        **{"max_grad_norm": 0.0, "save_strategy": "no", "num_train_epochs": 1, **options},
    )
    rows = [{"x": x, "labels": y} for xs, ys in data for x, y in zip(xs, ys, strict=True)]
    return InOrder(model, arguments, train_dataset=rows, optimizers=(optimizer, falling(optimizer)))


@pytest.mark.parametrize("clip", [None, CLIP])
def test_the_trainer_of_transformers_accumulates_and_clips(case, clip, tmp_path):
    trainer = trainer_of(case, tmp_path, batches(case), max_grad_norm=clip or 0.0)
    trainer.train()
    assert relative(parameters(trainer.model), plain(case, clip=clip)) <= 1e-12


def test_the_trainer_of_transformers_resumes_bit_for_bit(case, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(case, tmp_path, batches(case), **saving)
    whole.train()
    again = trainer_of(case, tmp_path, batches(case), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(parameters(again.model), parameters(whole.model))
