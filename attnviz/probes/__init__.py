"""Probes of a network: what changes when something in it, or in the picture, is changed."""

from .occlusion import Fill, gradient_variance, occlude, occlusion_scores, occlusion_table

__all__ = ["Fill", "gradient_variance", "occlude", "occlusion_scores", "occlusion_table"]
