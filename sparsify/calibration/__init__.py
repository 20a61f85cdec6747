"""Layerwise calibration, which gives one-shot strategies statistics of text."""

from sparsify.calibration.layerwise import Layerwise
from sparsify.calibration.settings import Calibration
from sparsify.calibration.statistics import CrossHessian, Hessian, Moments

__all__ = ["Calibration", "CrossHessian", "Hessian", "Layerwise", "Moments"]
