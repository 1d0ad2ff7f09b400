"""Conversion of models written without resfast: fused forwards in place, and back."""

from resfast.convert.accelerate import accelerate, restore
from resfast.convert.report import Report, ReportRow

__all__ = ["Report", "ReportRow", "accelerate", "restore"]
