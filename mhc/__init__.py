"""Manifold-constrained hyper-connections (mHC) for PyTorch, on kernels tuned by mhc-tune.

Modules: `HyperConnection`, several of them in a `HyperConnectionStack` or, with less memory, in `recompute`, between
`expand_streams` and `reduce_streams` or `StreamHead`; `wrap` puts them into an existing transformer.
Models of transformers that have them: `patch` runs them on our kernels, `unpatch` undoes it.
Ops: `mhc.functional`.
Kernels: `load_kernels` loads a cache folder or pack, `kernel_report` says which kernels run and why, `batch_invariant`
makes a token's results independent of its batch, `warm_up` loads a model's kernels before the first request.
"""

from mhc import converters, diagnostics, functional, manifolds
from mhc.dispatch.kernel_report import KernelReport
from mhc.dispatch.kernels import Kernels, active, batch_invariant, kernel_report, load_kernels, using
from mhc.integrations.patch_transformers import patch, unpatch
from mhc.integrations.wrap import wrap
from mhc.modules.hyper_connection import HyperConnection
from mhc.modules.recompute import recompute
from mhc.modules.recompute_segments import segment_length
from mhc.modules.stack import HyperConnectionStack
from mhc.modules.streams import StreamHead, expand_streams, reduce_streams
from mhc.serving.warm_up import warm_up
from tiles.errors import BadInput

__all__ = [
    "BadInput",
    "HyperConnection",
    "HyperConnectionStack",
    "KernelReport",
    "Kernels",
    "StreamHead",
    "active",
    "batch_invariant",
    "converters",
    "diagnostics",
    "expand_streams",
    "functional",
    "kernel_report",
    "load_kernels",
    "manifolds",
    "patch",
    "recompute",
    "reduce_streams",
    "segment_length",
    "unpatch",
    "using",
    "warm_up",
    "wrap",
]
