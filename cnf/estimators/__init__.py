"""scikit-learn estimators of densities and of conditional densities, and the search behind them."""

try:
    import sklearn  # noqa: F401
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "cnf.estimators needs scikit-learn, which is not installed: pip install 'cnf[data]'", name="sklearn"
    ) from missing

from cnf.estimators.conditional import ConditionalDensityEstimator
from cnf.estimators.density import DensityEstimator
from cnf.estimators.search import DensityFit, fit_density

__all__ = ["ConditionalDensityEstimator", "DensityEstimator", "DensityFit", "fit_density"]
