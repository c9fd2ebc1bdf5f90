"""Inside a trainer of another library `watch` measures what the hand-written loop does (the extra `examples`)."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from kfacerr.torch.watch import watch
from tests.kfacerr.torch.cases import QUIET_TRAINER
from tests.kfacerr.torch.test_watch import QUICK, assert_close, batches, hooked, make, values

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own


@pytest.mark.parametrize("parts", [1, 2])
def test_lightning(parts):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make()

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    pieces = [piece for x, y in batches() for piece in zip(x.chunk(parts), y.chunk(parts), strict=True)]
    trainer = lightning.Trainer(max_epochs=1, accumulate_grad_batches=parts, **QUIET_TRAINER)
    module = Module()
    with watch(module, "net.2", **QUICK) as w:
        trainer.fit(module, DataLoader(pieces, batch_size=None))
    assert w.k == 12
    assert_close(values(w.report(), "net.2"), hooked(make()), rel=1e-3)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = make()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    with watch(model, "2", **QUICK) as w:
        for x, y in batches():
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(prepared(x), y))
            optimizer.step()
    assert w.k == 12
    assert_close(values(w.report()), hooked(make()))


def test_the_trainer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return None

    model = Model()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    data = [{"x": x, "labels": y} for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)
    with watch(model, "net.2", **QUICK) as w:
        InOrder(model, arguments, train_dataset=data, optimizers=(sgd, schedule)).train()
    assert w.k == 12
    assert_close(values(w.report(), "net.2"), hooked(make()))
