"""Manifold-constrained hyper-connections for PyTorch, on kernels that mhc-tune has tuned.

The modules: `HyperConnection`, or several in a `HyperConnectionStack`, between `expand_streams` and `reduce_streams` or
`StreamHead`.
The ops: `mhc.functional`.
The kernels: `load_kernels` takes a cache folder or pack, `kernel_report` tells what runs and why.
"""

from mhc import functional
from mhc.kernels import Kernels, active, kernel_report, load_kernels, using
from mhc.module import HyperConnection
from mhc.report import KernelReport
from mhc.stack import HyperConnectionStack
from mhc.streams import StreamHead, expand_streams, reduce_streams
from tiles.errors import BadInput

__all__ = [
    "BadInput",
    "HyperConnection",
    "HyperConnectionStack",
    "KernelReport",
    "Kernels",
    "StreamHead",
    "active",
    "expand_streams",
    "functional",
    "kernel_report",
    "load_kernels",
    "reduce_streams",
    "using",
]
