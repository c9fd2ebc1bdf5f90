"""Schedules over epochs: the paper's (§6, "Hyper-parameters"), and the one SGD uses here.

`epoch` is n_ce(k), "the number of the current epoch at iteration k", counted from 0 (design §4):
`k // steps_per_epoch`.
"""

import math


def paper_learning_rate(epoch: int) -> float:
    """alpha_k of §6, for every algorithm except SENG: 0.3 at first, 0.001 from epoch 40."""
    drops = ((2, 0.1), (3, 0.1), (13, 0.07), (18, 0.02), (27, 0.007), (40, 0.002))
    # Rounded to the schedule's own three digits, so that 0.3 - 0.1 - 0.1 is 0.1 and not 0.09999999999999998.
    return round(0.3 - sum(drop for start, drop in drops if epoch >= start), 3)


def paper_phi(epoch: int) -> float:
    """phi_{lambda,k} of §6, the damping as a share of lambda_max: 0.1, 0.05 from epoch 25, 0.01 from 35."""
    return round(0.1 - 0.05 * (epoch >= 25) - 0.04 * (epoch >= 35), 2)


def paper_rank(epoch: int) -> int:
    """r(k) of §6, the target rank of R-KFAC and the truncation rank of the B-variants."""
    return 220 + 10 * (epoch >= 15)


def paper_oversampling(epoch: int) -> int:
    """r_o(k) of §6, the oversampling of the RSVD."""
    return 10 + (epoch >= 22) + (epoch >= 30)


def cosine_learning_rate(epoch: int, epochs: int, peak: float) -> float:
    """Half a cosine from `peak` at epoch 0 towards 0 at `epochs`. Not the paper's: SGD's schedule here."""
    return peak * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))
