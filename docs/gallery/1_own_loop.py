"""
Around a loop of your own
=========================

How wrong would cheap inverses of this layer's K-factors be? Three lines around the training answer, whatever its
loop.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import kfacerr.torch

# %%
# Your model, your data, your loop
# --------------------------------
# Any model with an ``nn.Linear`` or an ``nn.Conv2d``, any optimizer. Nothing in the loop speaks of K-factors.

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 10))


def train(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(300):
        chosen = torch.randint(len(images), (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()


# %%
# Watch it
# --------
# The layer's name is that of ``model.named_modules()``; without one the largest layer is watched. ``rank`` is
# how many modes the cheap inverses keep.

with kfacerr.torch.watch(model, "2", rank=16) as w:
    train(model)

report = w.report()
print(report)

# %%
# ``inverse_A`` and ``inverse_G`` are the relative errors of the two inverses, ``step_norm`` and
# ``step_angle`` those of the step that they make. K-FAC ``T_inv=50`` is exact once in 50 iterations and stale
# in between; the others are cheap. ``report.to_html("report.html")`` keeps all this in one file, and
# ``report.table`` is a DataFrame of every value.

report.plot()
