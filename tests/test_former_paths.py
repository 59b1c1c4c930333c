"""Former import paths resolve to the same modules, with a warning at the line that uses them."""

import importlib
import sys

import pytest

import cnf
from cnf._utils.former_paths import FORMER


@pytest.mark.parametrize("former", [*FORMER, "datasets.toy", "checkpoint.weights", "likelihood.ranking", "objectives.supervised"])
def test_a_former_path_is_the_same_module(former):
    """Also for modules of a room; nothing is executed a second time, so classes stay the same objects."""
    sys.modules.pop(f"cnf.{former}", None)
    with pytest.warns(DeprecationWarning) as caught:
        module = importlib.import_module(f"cnf.{former}")
    assert any(f"cnf.{former} is called cnf." in str(w.message) for w in caught)
    assert module.__spec__.name == module.__name__ and module is sys.modules[module.__name__]
    head, _, rest = former.partition(".")
    present = FORMER.get(former) or ".".join((FORMER[head], rest))
    assert module.__name__ == f"cnf.{present}"


def test_the_warning_names_the_users_line():
    sys.modules.pop("cnf.continuous", None)
    with pytest.warns(DeprecationWarning, match="cnf.continuous is called cnf.ode.continuous") as caught:
        from cnf.continuous import CNF
    assert CNF is cnf.CNF and caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="cnf.models.Predictor is called cnf.neural_ode.Predictor") as caught:
        from cnf.models import Predictor
    assert Predictor is cnf.neural_ode.Predictor and caught[0].filename == __file__


def test_what_never_existed_is_refused():
    with pytest.raises(ModuleNotFoundError, match=r"cnf\.datasets\.nothing"):
        importlib.import_module("cnf.datasets.nothing")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = cnf.nothing


def test_exceptions_keep_their_public_name():
    assert cnf.errors.DataError.__module__ == "cnf.errors" and issubclass(cnf.errors.DataError, ValueError)
