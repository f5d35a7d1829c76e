"""From the trainer's tensors to the engine's: buckets, transfer, verification."""

from lightrft.weight_sync.buckets import BUCKET_BYTES, in_buckets
from lightrft.weight_sync.probe import (
    PROBE_BOUNDS,
    Answered,
    Probe,
    judge_logits,
    judge_probe,
    make_probe,
    probe_difference,
    probe_engine,
    probe_logits,
)
from lightrft.weight_sync.transfer import transfer_weights

__all__ = [
    "BUCKET_BYTES",
    "PROBE_BOUNDS",
    "Answered",
    "Probe",
    "in_buckets",
    "judge_logits",
    "judge_probe",
    "make_probe",
    "probe_difference",
    "probe_engine",
    "probe_logits",
    "transfer_weights",
]
