"""Plots: samples and data, densities, vector fields, trajectories, learning curves, animations."""

from cnf.plotting.boundary import decision_boundaries, decision_boundary
from cnf.plotting.curves import learning_curves, validation_curves
from cnf.plotting.features import feature_evolution, features_training, learned_depth, paths_1d
from cnf.plotting.line import flow_1d
from cnf.plotting.motion import flow_gif
from cnf.plotting.plane import density_2d, trajectories_2d, vector_field_2d
from cnf.plotting.samples import image_grid, reconstructions, samples_beside_data
from cnf.plotting.tables import calibration_plot, corner_plot

__all__ = [
    "calibration_plot",
    "corner_plot",
    "decision_boundaries",
    "decision_boundary",
    "density_2d",
    "feature_evolution",
    "features_training",
    "flow_1d",
    "flow_gif",
    "image_grid",
    "learned_depth",
    "learning_curves",
    "paths_1d",
    "reconstructions",
    "samples_beside_data",
    "trajectories_2d",
    "validation_curves",
    "vector_field_2d",
]
