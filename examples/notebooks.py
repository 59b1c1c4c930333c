"""Make the notebooks from the scripts: python examples/notebooks.py, or make notebooks. Needs jupytext (pip install '.[docs]')."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SCRIPTS = ("table_density", "conditional_density", "custom_field", "image_likelihood")
INSTALL = """# installs the package of this repository where it is missing
import importlib.util

if importlib.util.find_spec("cnf") is None:
    %pip install -q "..[all]\""""


def notebook(script: Path) -> str:
    """Return the notebook of a script in jupytext's percent format; its first cell, the docstring, becomes the one that installs."""
    import jupytext

    made = jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent")
    made.cells[0].source = INSTALL
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # so that the same script gives the same file
    made.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return jupytext.writes(made, fmt="ipynb") + "\n"


def main() -> None:
    """Write examples/*.ipynb."""
    for name in SCRIPTS:
        (FOLDER / f"{name}.ipynb").write_text(notebook(FOLDER / f"{name}.py"), encoding="utf-8")
        print(f"examples/{name}.ipynb")


if __name__ == "__main__":
    main()
