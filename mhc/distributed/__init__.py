"""Distributed training of hyper-connections, with the tools of `torch.distributed`.

DDP: `torch.nn.parallel.DistributedDataParallel(model)`; nothing else is needed.
FSDP2: `fully_shard_streams(model, ...)`, then `torch.distributed.fsdp.fully_shard(model, ...)`.
Tensor and sequence parallelism: `StreamParallel`, a style for `torch.distributed.tensor.parallel.parallelize_module`.
Pipelines: `v_stages` for `torch.distributed.pipelining.ScheduleDualPipeV`; `overlap_pairs` overlaps its pairs of a
forward and a backward, `prioritise_merges` runs the merges after MLPs on a CUDA stream of high priority.

Call `mhc.load_kernels` on every rank after `init_process_group`: all run the kernels that rank 0 chose.
"""

from mhc.distributed.overlap import overlap_pairs
from mhc.distributed.pipeline import v_stages
from mhc.distributed.priority import prioritise_merges
from mhc.distributed.sharding import fully_shard_streams
from mhc.distributed.tensor_parallel import StreamParallel

__all__ = ["StreamParallel", "fully_shard_streams", "overlap_pairs", "prioritise_merges", "v_stages"]
