"""
Around Lightning
================

``watch`` goes around ``Trainer.fit``: the module and the trainer stay as they are.
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kfacerr.torch


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU())
        self.head = nn.Linear(96, 10)

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.head(self.body(images)), labels)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))

lightning.seed_everything(0, verbose=False)
classifier = Classifier()
trainer = lightning.Trainer(
    max_epochs=3,
    accelerator="cpu",
    accumulate_grad_batches=2,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)

# %%
# Two batches make a step here, and the last one of an epoch is short: an iteration of ``watch`` is a step of
# the optimizer, with the columns of all its micro-batches.

with kfacerr.torch.watch(classifier, "body.2", rank=16) as w:
    trainer.fit(classifier, DataLoader(data, batch_size=8, shuffle=True))

print(w.report())

# %%

w.report().plot()
