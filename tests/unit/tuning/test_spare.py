"""Trials take what serving leaves, and never wait for what cannot come."""

import pytest

from orchestrator.errors import ServiceError
from tuning.spare import spare_resources


def test_two_cores_with_two_light_replicas_leave_room_for_one_trial():
    found = spare_resources({"CPU": 2}, {"CPU": 1.8}, "auto", 6)
    assert (found.num_cpus, found.num_gpus, found.max_concurrent, found.device) == (0.5, 0.0, 1, "cpu")


def test_a_crowded_cluster_gives_a_smaller_reservation():
    found = spare_resources({"CPU": 2}, {"CPU": 0.2}, "auto", 6)
    assert found.num_cpus == 0.2
    assert found.max_concurrent == 1


def test_no_cpu_left_means_no_trial_actors_instead_of_a_deadlock():
    assert spare_resources({"CPU": 2}, {}, "auto", 6).max_concurrent == 0


def test_spare_gpus_set_how_many_run_at_once():
    found = spare_resources({"CPU": 32, "GPU": 8}, {"CPU": 30, "GPU": 3}, "auto", 6)
    assert (found.num_gpus, found.max_concurrent, found.device) == (1.0, 3, "cuda")
    assert spare_resources({"CPU": 32, "GPU": 8}, {"CPU": 30, "GPU": 8}, "auto", 2).max_concurrent == 2


def test_serving_on_every_gpu_leaves_the_cpus():
    assert spare_resources({"CPU": 8, "GPU": 1}, {"CPU": 7}, "auto", 6).device == "cpu"


def test_cuda_without_any_gpu_is_refused():
    with pytest.raises(ServiceError, match="trial_device"):
        spare_resources({"CPU": 8}, {"CPU": 8}, "cuda", 6)
