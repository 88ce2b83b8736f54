"""The last import of the server that `processes` forks from: what was imported is for no collector to walk through."""

from __future__ import annotations

import gc

from rayfm.quiet import collect_less

collect_less()
gc.freeze()  # or each forked process would copy the pages, object by object
