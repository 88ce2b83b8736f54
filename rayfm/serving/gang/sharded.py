"""A published version sharded over the processes of a group, each of which reads its own slices alone.

Shape letters: B examples of this member, H width of the representation.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv

from rayfm.config import SnapshotError
from rayfm.data.batch import Batch
from rayfm.data.encode import Encoder
from rayfm.export.calibrator import Calibrator
from rayfm.export.served import CALIBRATOR_PREFIX, IDS_PREFIX, probabilities
from rayfm.models.base import MODELS, ModelConfig
from rayfm.models.build import build_model
from rayfm.schema import Schema
from rayfm.snapshots.ids import load_vocabularies
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.manifest import SnapshotManifest
from rayfm.training.config import TrainingConfig
from rayfm.training.sharding import local_shards, place, sharders, sharding_plan


class ShardedVersion:
    """One member's part of a version. All members build it, and predict with it, in the same order.

    Tables of at least ``row_wise_from`` rows are cut by rows over all members, the others lie whole on the member with
    the least so far, as in training. Dense layers are on every member.

    Args:
        store: where the version is.
        model, version: which.
        device: this member's.
        group: the processes that share it, in which no other version exchanges.
        row_wise_from: rows from which on a table is cut.

    Raises:
        SnapshotError: it is not there, its bytes differ from its manifest, or it is not what its config says.
    """

    def __init__(
        self,
        store: SnapshotStore,
        model: str,
        version: str,
        device: torch.device,
        group: dist.ProcessGroup,
        row_wise_from: int = 1_000_000,
    ) -> None:
        self.group = group
        manifest = store.manifest(model, version)
        self.version, self.trained_through, self.tasks = version, manifest.trained_through, manifest.tasks
        self.schema = Schema.model_validate(manifest.example_schema)
        config: ModelConfig = MODELS[manifest.config["type"]].Config.model_validate(manifest.config)
        module = build_model(config, self.schema, manifest.tasks, embedding_device=torch.device("meta"))
        self.representation_dim = module.representation_dim
        world = dist.get_world_size(group)
        placement = place(module, TrainingConfig(row_wise_from=row_wise_from), world)
        self.dmp = DistributedModelParallel(
            module,
            env=ShardingEnv.from_process_group(group),
            device=device,
            plan=sharding_plan(module, placement, world, device),
            sharders=sharders(),
            init_data_parallel=False,
        )
        self.elements = 0
        """Numbers of tables that this member holds."""
        self._read(store, manifest)
        self.calibrator = self._calibrator(store, model, version, set(manifest.tensors))
        self.dmp.eval()
        vocabularies = load_vocabularies(store, model, version)
        self.encoder = Encoder(self.schema, config.features, labels=False, vocabularies=vocabularies)

    @torch.no_grad()
    def _read(self, store: SnapshotStore, manifest: SnapshotManifest) -> None:
        """Fill every shard and dense tensor from the files, reading no more of them than that. Nothing is exchanged."""
        model, version = manifest.model, manifest.version
        beside = (CALIBRATOR_PREFIX, IDS_PREFIX)
        stored = {name: record for name, record in manifest.tensors.items() if not name.startswith(beside)}
        state = self.dmp.state_dict()
        if set(stored) != set(state):
            name = min(set(stored) ^ set(state))
            raise SnapshotError(
                f"snapshot {model}@{version} and the model of its config differ in tensor {name!r}; publish it again"
            )
        for name, value in state.items():
            shape = tuple(value.metadata().size if isinstance(value, ShardedTensor) else value.shape)
            if shape != tuple(stored[name].shape):
                raise SnapshotError(
                    f"snapshot {model}@{version}: tensor {name!r} is {list(stored[name].shape)}, and {list(shape)} in "
                    "the model of its config; publish it again"
                )
            sharded = isinstance(value, ShardedTensor | DTensor)
            for shard, row, column in local_shards(value):
                if not sharded:
                    shard.copy_(store.read_slice(model, version, name))
                    continue
                height, width = shard.shape
                found = store.read_slice(model, version, name, (row, row + height), (column, column + width))
                shard.copy_(found)
                self.elements += shard.numel()

    def _calibrator(self, store: SnapshotStore, model: str, version: str, stored: set[str]) -> nn.Module | None:
        names = sorted(name for name in stored if name.startswith(CALIBRATOR_PREFIX))
        if not names:
            return None
        calibrator = Calibrator(self.schema, self.tasks)
        tensors = {name.removeprefix(CALIBRATOR_PREFIX): store.read_slice(model, version, name) for name in names}
        calibrator.load_state_dict(tensors)
        return calibrator

    @torch.inference_mode()
    def predict(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Task -> predictions ``[B]``, and the representation ``[B, H]``; a collective call, B may be 0."""
        output = self.dmp(batch)
        logits = output.logits if self.calibrator is None else self.calibrator(output.logits)
        return probabilities(self.schema, logits), output.representation
