"""Density estimators of tables: the search that fits the best density in a given time."""

from cnf.estimators.search import DensityFit, fit_density

__all__ = ["DensityFit", "fit_density"]
