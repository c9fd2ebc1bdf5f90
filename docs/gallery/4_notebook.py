"""
In a notebook
=============

A report shows itself, a training can be stopped, and what was measured until then is kept.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import kfacerr.torch

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

# %%
# One cell trains. Here it is interrupted, as the stop button does; an exception in the block is not
# swallowed, but it takes nothing away. ``windows`` says where errors are measured, as first iteration and
# length: at every iteration then.

try:
    with kfacerr.torch.watch(model, "2", rank=16, windows=[(100, 60)]) as w:
        for k in range(100_000):
            chosen = torch.randint(len(images), (16,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            if k == 180:
                raise KeyboardInterrupt
except KeyboardInterrupt:
    print(f"stopped after {w.k} steps")

# %%
# The next cell is the question. All that was measured is a table; a report is its own picture.

table = w.report().table
table[table.metric == "step_angle"].groupby("algorithm").value.describe()[["mean", "min", "max"]]

# %%

w.report()
