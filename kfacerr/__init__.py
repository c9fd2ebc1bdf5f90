"""kfacerr: how wrong is a cheap K-FAC inverse, and what does that error cost?

The names below are the way in; each module's docstring says which equation or algorithm of Puiu's "Brand New
K-FACs" it holds. PyTorch is only imported by `kfacerr.torch`; what reads files or verifies is loaded when it is
asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .algorithms import SEVEN, Algorithm
from .brand import symmetric_brand
from .certificate import Certificate
from .correction import correct
from .ea import EAFactor
from .exceptions import InputError
from .factor import KFactor
from .inverse import DampedInverse, damped_inverse, exact_inverse, precondition, precondition_linear
from .lowrank import LowRank
from .metrics import METRICS, angle_error, inverse_error, norm_error
from .process import Cost, Estimate, Process, Settings
from .rsvd import nystrom, rsvd, srevd
from .stream import Columns, Step, Window
from .study import ErrorStudy, Row, table

if TYPE_CHECKING:
    from .advice import advise_recording
    from .inspection import inspect
    from .recorder import RecordingWriter
    from .recording import Recording
    from .report import report_recording
    from .verify import verify_layer

__version__ = "0.1.0"

__all__ = [
    "METRICS",
    "SEVEN",
    "Algorithm",
    "Certificate",
    "Columns",
    "Cost",
    "DampedInverse",
    "EAFactor",
    "ErrorStudy",
    "Estimate",
    "InputError",
    "KFactor",
    "LowRank",
    "Process",
    "Recording",
    "RecordingWriter",
    "Row",
    "Settings",
    "Step",
    "Window",
    "__version__",
    "advise_recording",
    "angle_error",
    "correct",
    "damped_inverse",
    "exact_inverse",
    "inspect",
    "inverse_error",
    "norm_error",
    "nystrom",
    "precondition",
    "precondition_linear",
    "report_recording",
    "rsvd",
    "srevd",
    "symmetric_brand",
    "table",
    "verify_layer",
]

_LATER = {
    "advise_recording": "advice",
    "inspect": "inspection",
    "Recording": "recording",
    "RecordingWriter": "recorder",
    "report_recording": "report",
    "verify_layer": "verify",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
