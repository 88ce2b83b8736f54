"""The errors a user can cause. Each message is one line that names the thing at fault and what to do about it."""


class RayfmError(Exception):
    """Base of every error that is the input's or the machine's fault, not a bug in rayfm.

    The command line prints the message alone; a traceback follows only with ``--debug``.
    """


class ConfigError(RayfmError):
    """The configuration is wrong: an unknown key, a value out of range, a reference to something undefined."""


class DataError(RayfmError):
    """The examples are wrong: a missing column, a type that does not fit, a corrupt file, a period out of order."""


class SnapshotError(RayfmError):
    """A published model version cannot be used: missing manifest, changed bytes, unknown version."""


class LabelError(RayfmError):
    """The label store refuses: a leak, a foreign schema, a version that is not there, too little coverage."""


class CapacityError(RayfmError):
    """The plan does not fit the machine or the cluster."""
