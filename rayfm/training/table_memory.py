"""Tables that a GPU's memory does not hold: rows in the host's memory, with or without a cache on the device.

TorchRec's kernels ``fused_uvm`` and ``fused_uvm_caching`` (unified virtual memory, fbgemm's table-batched embeddings).
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import CacheParams, ParameterSharding, ShardedModule

from rayfm.training.config import TableMemory

KERNELS = {
    "device": EmbeddingComputeKernel.FUSED.value,
    "uvm": EmbeddingComputeKernel.FUSED_UVM.value,
    "uvm_caching": EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
}
"""Kind of memory -> TorchRec's compute kernel."""


def set_memory(sharding: ParameterSharding, memory: TableMemory) -> None:
    """Say in a table's part of TorchRec's plan where its rows are. A replicated table is left as it is."""
    if sharding.compute_kernel == EmbeddingComputeKernel.DENSE.value:
        return
    sharding.compute_kernel = KERNELS[memory.kind]
    if memory.kind == "uvm_caching":
        sharding.cache_params = CacheParams(load_factor=memory.cache_load_factor)


def forget_caches(module: nn.Module) -> None:
    """Have the look-ups read the host's rows anew: after rows were written there, past a cache on the device.

    What the caches held must be in the host's memory already: taking ``state_dict`` puts it there.
    """
    for part in module.modules():
        if isinstance(part, ShardedModule):
            for lookup in part._lookups:
                (lookup.module if isinstance(lookup, DistributedDataParallel) else lookup).purge()
