"""Strict typed configuration: base classes, the registry, the YAML loader."""

from rayfm.config.base import Config
from rayfm.config.errors import CapacityError, ConfigError, DataError, LabelError, RayfmError, SnapshotError
from rayfm.config.loader import apply_override, config_files, read_yaml, set_key, validate, write_yaml
from rayfm.config.registry import Registry, nearest

__all__ = [
    "CapacityError",
    "Config",
    "ConfigError",
    "DataError",
    "LabelError",
    "RayfmError",
    "Registry",
    "SnapshotError",
    "apply_override",
    "config_files",
    "nearest",
    "read_yaml",
    "set_key",
    "validate",
    "write_yaml",
]
