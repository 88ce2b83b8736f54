"""What a replica that is a gang needs."""

from __future__ import annotations

from pydantic import Field, model_validator

from rayfm.serving.gang.gpus import check_member_gpus
from rayfm.serving.teacher import TeacherServiceConfig


class GangConfig(TeacherServiceConfig):
    """A teacher service whose replicas are gangs."""

    members: int = Field(ge=2)
    """Processes of a gang, K."""
    cpus_per_member: float = Field(0.25, gt=0)
    gpus_per_member: float = Field(0.0, ge=0)
    row_wise_from: int = Field(1_000_000, ge=1)
    """Rows from which on a table is cut over all members."""

    @model_validator(mode="after")
    def _possible(self) -> GangConfig:
        check_member_gpus(self.gpus_per_member)
        if self.poll_s is not None and self.metadata is None:
            raise ValueError(
                "a gang follows `current` of a metadata store, which has leases, and not the newest version; name the "
                "store (endpoints.metadata), or serve the teacher with serving.members: 1"
            )
        return self
