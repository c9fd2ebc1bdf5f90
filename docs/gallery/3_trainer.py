"""
Around transformers' Trainer
============================

``watch`` goes around ``trainer.train()``. accelerate, which the Trainer runs on, needs no more.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import kfacerr.torch

# %%
# A vision transformer small enough for a laptop, on digits of 8 by 8 pixels: 16 patches and a class token.

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
data = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, digits.target, strict=True)]

torch.manual_seed(0)
model = ViTForImageClassification(
    ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=250,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
)
trainer = Trainer(model=model, args=arguments, train_dataset=data)

# %%
# Layers go by pattern: of the second block, both layers of the MLP. A layer that acts on 17 positions brings
# 17 columns a sample.

with kfacerr.torch.watch(model, "vit.layers.1.mlp.fc*", rank=16, algorithms=["R-KFAC T_inv=50", "N-KFAC"]) as w:
    trainer.train()

print(w.report())

# %%

w.report().plot("vit.layers.1.mlp.fc1")
