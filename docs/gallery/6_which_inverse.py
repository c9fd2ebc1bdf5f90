"""
Which inverse for my layer?
===========================

The frontier of cost and error on a layer of your own, and what lies on it.
"""

import gzip
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import kfacerr.torch

# %%
# Fashion-MNIST from Debian's package ``dataset-fashion-mnist``, or the digits where it is not installed.

FASHION = Path("/usr/share/datasets/fashion-mnist")
if FASHION.exists():
    pixels = gzip.decompress((FASHION / "train-images-idx3-ubyte.gz").read_bytes())
    classes = gzip.decompress((FASHION / "train-labels-idx1-ubyte.gz").read_bytes())
    images = torch.tensor(np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 784) / 255, dtype=torch.float32)
    labels = torch.tensor(np.frombuffer(classes, np.uint8, offset=8).astype(np.int64))
else:
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
print(f"{len(images)} images of {images.shape[1]} pixels")

torch.manual_seed(0)
layers = [nn.Linear(images.shape[1], 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)]
model = nn.Sequential(*layers)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

# %%
# A recording keeps what was seen, so that any number of inverses can be tried on it afterwards.

recording = Path(tempfile.mkdtemp()) / "layer.h5"
with kfacerr.torch.watch(model, "2", rank=16, algorithms=["B-KFAC"], record=recording) as w:
    for _ in range(300):
        chosen = torch.randint(len(images), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()

# %%
# ``w.advise()`` runs candidates over the recording: each algorithm at some ranks and periods, with and
# without the ``trace`` continuation. It measures what each costs per iteration on this machine, and prints
# those that no other beats in cost and in both errors of the step. The same for a recording, by name:
# ``kfacerr advise layer.h5 --layer 2``.

advice = w.advise(budget="3x")
print(advice)

# %%
# On a layer as small as this one a dense factorisation costs next to nothing, and an inverse that is always exact
# may well be the choice; its error is drawn at the level of rounding. At thousands of rows the cheap ones take
# over.
#
# The whole table is ``advice.table``, the optimizer that the last line writes is ``KFAC(...,
# policy=advice.policy)``.

advice.plot()
