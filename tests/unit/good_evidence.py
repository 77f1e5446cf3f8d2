"""Evidence that the gate lets pass; tests change one figure at a time."""

from orchestrator.messages import GateEvidence

GOOD = GateEvidence(
    candidate="d1",
    instances=400,
    reference_base=0.90,
    reference_candidate=0.86,
    reference_share=0.25,
    shift_base=12.0,
    shift_candidate=3.0,
    marginal_max=0.18,
    marginal_distance=0.10,
    classes_lost=0,
    estimate_base=0.55,
    estimate_candidate=0.75,
)
