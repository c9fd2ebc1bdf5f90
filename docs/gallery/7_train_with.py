"""
Train with K-FAC: Lightning, accelerate, transformers' Trainer
==============================================================

``KFAC`` is a ``torch.optim.Optimizer``: it goes where AdamW stood. It catches what it needs in the forward and
backward of the model that it is given, whoever runs the loop. :doc:`What works with what </works-with>`.
"""

import tempfile

import accelerate
import lightning
import matplotlib.pyplot as plt
import torch
import transformers
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfacerr.torch import KFAC

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
data = TensorDataset(images, labels)
EPOCHS, BATCH, PARTS = 5, 16, 2  # two micro-batches of 16 make a step
losses = {"Lightning": [], "accelerate": [], "Trainer": []}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 10))

    def forward(self, images, labels):
        logits = self.net(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def kfac(model):
    """The optimizer, and a scheduler as for any other."""
    optimizer = KFAC(model, "R-KFAC", lr=0.1, T_updt=5, T_inv=25, phi_lambda=0.1)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)


# %%
# Lightning
# ---------
# ``configure_optimizers`` makes it. ``accumulate_grad_batches``, ``gradient_clip_val``, ``fit(ckpt_path=...)`` and
# ``strategy="ddp"`` need no more.


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Classifier()

    def training_step(self, batch):
        loss = self.model(*batch)["loss"]
        losses["Lightning"].append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer, scheduler = kfac(self.model)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


trainer = lightning.Trainer(
    max_epochs=EPOCHS,
    accelerator="cpu",
    accumulate_grad_batches=PARTS,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Module(), DataLoader(data, batch_size=BATCH, shuffle=True))

# %%
# accelerate
# ----------
# The model and its optimizer go through ``prepare`` together. ``save_state`` keeps the K-factors.

accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
model = Classifier()
loader = DataLoader(data, batch_size=BATCH, shuffle=True)
model, optimizer, scheduler, loader = accelerator.prepare(model, *kfac(model), loader)
for _ in range(EPOCHS):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(*batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses["accelerate"].append(loss.item())

# %%
# transformers' Trainer
# ---------------------
# ``optimizers=`` takes the optimizer with its scheduler. The Trainer clips the gradient's norm, if it is not told
# otherwise; K-FAC has a clip of its own.


class Recorded(transformers.Trainer):
    def compute_loss(self, *args, **options):
        loss = super().compute_loss(*args, **options)
        losses["Trainer"].append(loss.item())
        return loss


model = Classifier()
arguments = transformers.TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=BATCH,
    gradient_accumulation_steps=PARTS,
    max_grad_norm=0.0,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
)
rows = [{"images": image, "labels": label} for image, label in zip(images, labels, strict=True)]
Recorded(model, arguments, train_dataset=rows, optimizers=kfac(model)).train()

# %%
# The order of the images is all that differs, and Lightning's and accelerate's is the same. An epoch's mean loss:

figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
for name, values in losses.items():
    epochs = torch.tensor(values).split(len(values) // EPOCHS)[:EPOCHS]
    means = [epoch.mean().item() for epoch in epochs]
    assert means[-1] < 0.1 < means[0]
    style = ":" if name == "accelerate" else "-"
    axes.semilogy(range(1, EPOCHS + 1), means, style, marker="o", label=name)
axes.set(xlabel="epoch", ylabel="training loss", xticks=range(1, EPOCHS + 1))
axes.legend()
figure
