"""Sending work to a cluster: what is packaged, what cannot travel, the job server, following a job to its end."""

from rayfm.submission.follow import follow
from rayfm.submission.package import Package, collect
from rayfm.submission.paths import check_paths
from rayfm.submission.server import Server, connect
from rayfm.submission.submit import Submission, submit

__all__ = ["Package", "Server", "Submission", "check_paths", "collect", "connect", "follow", "submit"]
