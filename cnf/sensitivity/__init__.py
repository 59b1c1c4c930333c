"""Forward sensitivities: Jacobians by the cable rule, the Magnus expansion, derivatives by parameters."""

from cnf.sensitivity.cable import jacobian, log_det, marginal_log_det
from cnf.sensitivity.magnus import MagnusSolution, magnus
from cnf.sensitivity.parameters import parameter_jacobian, piecewise_jacobian, response

__all__ = ["MagnusSolution", "jacobian", "log_det", "magnus", "marginal_log_det", "parameter_jacobian", "piecewise_jacobian", "response"]
