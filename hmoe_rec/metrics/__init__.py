"""Logits and labels -> what a person asks of a run: AUC, GAUC, log loss, normalized entropy, calibration, per task."""

from hmoe_rec.metrics.auc import exact_auc
from hmoe_rec.metrics.format import json_safe, metrics_table
from hmoe_rec.metrics.sliding import SlidingMetrics
from hmoe_rec.metrics.task_metrics import TaskMetrics

__all__ = ["SlidingMetrics", "TaskMetrics", "exact_auc", "json_safe", "metrics_table"]
