"""kfacerr: how wrong is a cheap K-FAC inverse, and what does that error cost?

The names below are the way in; each module's docstring says which equation or algorithm of Puiu's "Brand New
K-FACs" it holds. PyTorch is only imported by `kfacerr.torch`.
"""

from .algorithms import SEVEN, Settings, make_process
from .certificate import Certificate
from .exceptions import InputError
from .frequent_directions import FrequentDirections
from .lowrank import LowRank
from .metrics import METRICS
from .process import EAFactor, Estimate, Process
from .processes import Brand, BrandCorrected, BrandRsvd, Evd, Rsvd, Sketch
from .stream import Columns, Step, Window
from .study import ErrorStudy, Row, table

__version__ = "0.1.0"

__all__ = [
    "METRICS",
    "SEVEN",
    "Brand",
    "BrandCorrected",
    "BrandRsvd",
    "Certificate",
    "Columns",
    "EAFactor",
    "ErrorStudy",
    "Estimate",
    "Evd",
    "FrequentDirections",
    "InputError",
    "LowRank",
    "Process",
    "Row",
    "Rsvd",
    "Settings",
    "Sketch",
    "Step",
    "Window",
    "__version__",
    "make_process",
    "table",
]
