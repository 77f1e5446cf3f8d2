"""What a search may use of the cluster: the GPUs that serving does not need, or a small part of a CPU. Pure.

What is available is a hint and races with everything else: so trials ask for little, and where serving reserved every
CPU the search runs them one by one in its own actor (`max_concurrent` 0) instead of waiting for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import ServiceError

CPU_PER_TRIAL = 0.5  # a reservation, not a limit: replicas and trials together must fit on two cores
CORES_PER_TRIAL = 2  # one CPU trial at a time for every two cores: the other one serves
MIN_CPU = 0.05  # with less than this available, nothing can be reserved


@dataclass(frozen=True)
class TrialResources:
    """Resources of one trial and how many may run at once.

    Attributes:
        num_cpus: CPUs per trial.
        num_gpus: GPUs per trial.
        max_concurrent: trials at once; 0: none as actors of their own.
        device: cpu or cuda.
    """

    num_cpus: float
    num_gpus: float
    max_concurrent: int
    device: str


def spare_resources(
    total: Mapping[str, float], available: Mapping[str, float], trial_device: str, num_trials: int
) -> TrialResources:
    """Resources for the trials of one search.

    Args:
        total: the cluster's resources by Ray's names (`CPU`, `GPU`).
        available: what nothing has reserved now; a hint that may be stale.
        trial_device: `auto` takes spare GPUs, and CPUs where none is spare; `cpu`; `cuda` waits for a GPU.
        num_trials: to be run; more actors than trials would only start and stop.

    Raises:
        ServiceError: cuda was asked for and the cluster has no GPU.
    """
    spare_gpus, spare_cpus = int(available.get("GPU", 0)), float(available.get("CPU", 0))
    if trial_device == "cuda" and total.get("GPU", 0) < 1:
        raise ServiceError("trial_device=cuda needs a GPU in the cluster; got none: use trial_device=auto or cpu")
    if trial_device == "cuda" or (trial_device == "auto" and spare_gpus >= 1):
        at_once = max(1, min(spare_gpus, num_trials))
        return TrialResources(_share(spare_cpus, at_once), 1.0, at_once, "cuda")
    if spare_cpus < MIN_CPU:
        return TrialResources(0.0, 0.0, 0, "cpu")
    at_once = max(1, min(int(total.get("CPU", 1)) // CORES_PER_TRIAL, int(spare_cpus / CPU_PER_TRIAL), num_trials))
    return TrialResources(_share(spare_cpus, at_once), 0.0, at_once, "cpu")


def _share(spare_cpus: float, at_once: int) -> float:
    """CPUs each trial reserves, rounded down to what Ray counts in."""
    return int(min(CPU_PER_TRIAL, max(0.0, spare_cpus) / at_once) * 1000) / 1000
