"""What a search can say before any trial: nothing true can be learned, or an earlier adapter fits. Both runners ask."""

from __future__ import annotations

import time

from orchestrator.keys import ServiceKeys
from orchestrator.messages import SearchStatus
from orchestrator.storage import Storage
from tuning.explain import unexplained
from tuning.recall import recall
from tuning.workbench import Workbench


def settle(storage: Storage, bench: Workbench, keys: ServiceKeys | None) -> SearchStatus | None:
    """The search's outcome, where it needs no trial; None where it does.

    Args:
        storage: holds the registry.
        bench: the episode's data and base.
        keys: must have signed an earlier adapter; None: unsigned ones will do.
    """
    start, buffered = time.monotonic(), len(bench.buffer)
    known = recall(storage, bench, keys.public_key if keys else None) if bench.request.recall else None
    if known is not None:
        return SearchStatus(
            state="finished",
            trials=(known.result,),
            winner=known.digest,
            winner_trial=known.result.trial_id,
            recalled=True,
            search_s=time.monotonic() - start,
            buffered=buffered,
            message=f"seen before: adapter {known.digest[:12]} scores {known.result.score:.3f}",
        )
    reason = unexplained(bench)
    return SearchStatus("finished", message=reason, buffered=buffered) if reason else None
