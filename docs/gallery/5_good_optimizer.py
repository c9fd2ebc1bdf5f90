"""
Five minutes to a good optimizer
================================

Watch a few hundred steps, ask which inverses they would have wanted, and train with those.
"""

import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import kfacerr.torch

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
T_updt = 10


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 10))


def train(model, optimizer, steps):
    """Yields the seconds since the start and the loss on all images, every ten steps."""
    torch.manual_seed(1)
    seconds = 0.0
    for k in range(steps):
        chosen = torch.randint(len(images), (32,))
        started = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        seconds += time.perf_counter() - started
        if k % 10 == 0:
            with torch.no_grad():
                yield seconds, nn.functional.cross_entropy(model(images), labels).item()


# %%
# Watch
# -----
# The optimizer that you have will do: what is learned are the layers' spectra, their speed, and what inverses
# cost here.

recording = Path(tempfile.mkdtemp()) / "digits.h5"
model = new_model()
with kfacerr.torch.watch(model, ["0", "2"], rank=16, algorithms=["B-KFAC"], every=T_updt, record=recording) as w:
    list(train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 250))

# %%
# Ask
# ---
# The advice is the least error of the step within a budget, by default four times what plain SGD spends on
# the layer.

advice = {layer: w.advise(layer) for layer in w.layers}
print("\n\n".join(map(str, advice.values())))

# %%
# Train
# -----
# A policy names the inverse of each layer, and the settings are those that it was measured with.

policy = {layer: found.choice for layer, found in advice.items()}
first, second = new_model(), new_model()
optimizers = {
    "SGD": (first, torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9)),
    "KFAC": (second, kfacerr.torch.KFAC(second, **advice["0"].settings, policy=policy)),
}
curves = {name: list(train(model, optimizer, 250)) for name, (model, optimizer) in optimizers.items()}

# %%
# A step of KFAC is dearer, and goes further: the loss by step, and by time (of a model so small, mostly overhead).

assert curves["KFAC"][-1][1] < curves["SGD"][-1][1]
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for name, curve in curves.items():
    seconds, losses = zip(*curve, strict=True)
    axes[0].semilogy(range(0, 250, 10), losses, label=name)
    axes[1].semilogy(seconds, losses, label=name)
axes[0].set(xlabel="step", ylabel="training loss")
axes[1].set(xlabel="seconds on this machine")
axes[0].legend()
figure
