"""What a run says about itself while it works: logs, progress, metrics, memory, hardware."""

from pipeline.observe.hardware import describe_environment
from pipeline.observe.logs import configure_logging, process_rank
from pipeline.observe.memory import (
    available_memory_bytes,
    free_disk_bytes,
    gpu_peak_bytes,
    peak_rss_bytes,
    total_memory_bytes,
)
from pipeline.observe.metrics import (
    METRICS_FILE,
    MetricRecord,
    MetricSink,
    is_timing,
    open_sinks,
    read_metrics,
)
from pipeline.observe.settings import ObserveSettings
from pipeline.progress import Progress

__all__ = [
    "METRICS_FILE",
    "MetricRecord",
    "MetricSink",
    "ObserveSettings",
    "Progress",
    "available_memory_bytes",
    "configure_logging",
    "describe_environment",
    "free_disk_bytes",
    "gpu_peak_bytes",
    "is_timing",
    "open_sinks",
    "peak_rss_bytes",
    "process_rank",
    "read_metrics",
    "total_memory_bytes",
]
