"""The model: `GaussianSR`, its encoders and heads, and how it lies on disk."""

from gsr.models.gaussian_sr import GaussianSR

__all__ = ["GaussianSR"]
