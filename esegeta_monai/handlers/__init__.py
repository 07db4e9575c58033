"""Ignite handlers: explanation inside MONAI's evaluators and trainers."""

from __future__ import annotations

from esegeta_monai.handlers.evaluation import EvaluationHandler
from esegeta_monai.handlers.explanation import ExplanationHandler
from esegeta_monai.handlers.series import ExplanationSeries

__all__ = ["EvaluationHandler", "ExplanationHandler", "ExplanationSeries"]
