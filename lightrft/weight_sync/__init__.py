"""From the trainer's tensors to the engine's: buckets, transfer, verification."""

from lightrft.weight_sync.buckets import BUCKET_BYTES, in_buckets
from lightrft.weight_sync.probe import PROBE_BOUNDS, Probe, probe_difference, probe_engine
from lightrft.weight_sync.transfer import transfer_weights

__all__ = [
    "BUCKET_BYTES",
    "PROBE_BOUNDS",
    "Probe",
    "in_buckets",
    "probe_difference",
    "probe_engine",
    "transfer_weights",
]
