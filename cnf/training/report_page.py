"""report.html of a run: one self-contained page with its result, curves, samples, settings and warnings."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnf._utils.version import __version__
from cnf.config.results import read_json, read_metrics
from cnf.runs import write_atomic, write_text

__all__ = ["REPORT", "write_report"]

REPORT = "report.html"
LARGEST = 2**24  # bytes of one picture
ROWS = 12  # validations in the table
WIDE = 1200  # pixels: pictures of this width, and half of it in height, may be wider than the text
CAPTIONS = {
    "samples/samples.png": "Samples next to data",
    "plots/reconstructions.png": "Images, their reconstructions, and samples",
    "plots/flow.gif": "Noise flowing to data",
    "plots/density.png": "Density of the data and of the model",
    "plots/corner.png": "Pairs of columns: data below the diagonal, samples above",
    "plots/calibration.png": "Calibration on test rows: flat and on the diagonal is right",
    "plots/learning_curves.png": "Losses and evaluations over the steps",
    "plots/trajectories.png": "Paths between data and noise",
    "plots/vector_field.png": "The vector field over time",
    "plots/features.png": "The features over time",
    "plots/features_training.png": "The features over training",
    "plots/boundary.png": "The decision boundary",
    "plots/depth.png": "The learned depth",
}
STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
.figure { font-size: 1.9rem; margin: .2rem 0; } .warning { border-left: 4px solid #d55e00; padding-left: .7rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; white-space: pre-wrap; }
p::first-letter { text-transform: uppercase; }
figure { margin: 1rem 0; } figure.wide { --wide: min(94vw, 110rem); width: var(--wide); margin-left: calc(50% - var(--wide) / 2); }
figcaption { font-size: .9rem; }
img { max-width: 100%; box-sizing: border-box; padding: .7rem; border-radius: .4rem; background: white; }
"""


def write_report(
    folder: Path, headline: str, *, meaning: Sequence[str] = (), settings: Sequence[str] = (), details: str = "", warnings: Sequence[str] = ()
) -> Path:
    """Write report.html into a run folder, from its files, and return the path.

    The page holds its pictures and loads nothing from elsewhere.

    Args:
        folder: of the run, with config.json and, where there are any, metrics.jsonl, result.json, samples and plots.
        headline: the figure with its standard error and unit.
        meaning: sentences that interpret the figure.
        settings: what the figure depends on, one phrase each.
        details: further text of fixed width, such as the report on a table's columns.
        warnings: what a reader must know before using the figure.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     "1.50 nats" in write_report(Path(place), "1.50 nats").read_text(encoding="utf-8")
        True
    """
    result, rows = read_json(folder / "result.json"), read_metrics(folder / "metrics.jsonl")
    name = folder.resolve().name
    parts = [f"<h1>{_text(name)}</h1>", f'<p class="figure">{_text(headline)}</p>']
    parts += [f"<p>{_text(line)}</p>" for line in meaning]
    parts += [f'<p class="warning">{_text(line)}</p>' for line in warnings]
    parts += _section("What the figure depends on", _items(settings))
    parts += _section("What each part gained", _gains(result))
    parts += _section("Pictures", "".join(_pictures(folder)))
    parts += _section("Validations", _validations(rows, str(result.get("unit") or "")))
    parts += _section("Details", _pre(details))
    parts += _section("The data", _items(result.get("notices") or ()))
    parts += _section("The command", _pre(str(result.get("command") or "")))
    parts += _section("Cost and versions", _facts(result))
    if config := read_json(folder / "config.json"):
        parts += _section("All settings", f"<details><summary>config.json</summary>{_pre(json.dumps(config, indent=2))}</details>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(name)}</title><style>{STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>"
    write_atomic(folder / REPORT, lambda p: write_text(p, page))
    return folder / REPORT


def _text(value: object) -> str:
    return html.escape(str(value))


def _pre(text: str) -> str:
    return f"<pre>{_text(text)}</pre>" if text else ""


def _section(title: str, content: str) -> list[str]:
    """Return the section, or nothing without content."""
    return [f"<h2>{_text(title)}</h2>", content] if content else []


def _items(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns after the first are numbers."""
    if not rows:
        return ""
    cells = ["".join(f"<th>{_text(cell)}</th>" for cell in head)]
    for first, *others in rows:
        cells.append(f"<td>{_text(first)}</td>" + "".join(f'<td class="number">{_text(cell)}</td>' for cell in others))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _gains(result: Mapping[str, Any]) -> str:
    gains = result.get("gains") or {}
    rows = []
    for part, value in (result.get("parts") or {}).items():
        rows.append((part, f"{value:.4f}", "{:+z.4f} ± {:.4f}".format(*gains[part]) if part in gains else ""))
    return _table(("part", "validation, nats", "gain over the part before"), rows)


def _pictures(folder: Path) -> list[str]:
    """Return the pictures of a run, those of CAPTIONS first."""
    files = [folder / name for name in CAPTIONS]
    files += sorted(p for place in ("samples", "plots") for p in (folder / place).glob("*.*") if p not in files)
    found = []
    for path in files:
        if path.suffix not in (".png", ".gif") or not path.is_file() or path.stat().st_size > LARGEST:
            continue
        content = path.read_bytes()
        data = base64.b64encode(content).decode("ascii")
        kind = ' class="wide"' if path.suffix == ".png" and _wide(content) else ""
        caption = _text(CAPTIONS.get(path.relative_to(folder).as_posix(), path.stem.replace("_", " ")))
        found.append(f'<figure{kind}><img alt="{caption}" src="data:image/{path.suffix[1:]};base64,{data}"><figcaption>{caption}</figcaption></figure>')
    return found


def _wide(png: bytes) -> bool:
    """Return whether a PNG is so wide that its labels are small in a column of text."""
    width, height = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
    return width >= max(WIDE, 2 * height)


def _validations(rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Return a table of the validations, thinned to a few with the last and the best among them."""
    checked = [row for row in rows if isinstance(row.get("validation"), int | float)]
    if not checked:
        return ""
    best = min(checked, key=lambda row: row["validation"])
    stride = -(-len(checked) // ROWS)
    kept = [row for i, row in enumerate(checked) if row is best or row is checked[-1] or i % stride == 0]
    cells = [
        (f"{row['step']:,}{' (best)' if row is best else ''}", f"{row['validation']:.4f}", _number(row.get("validation_nfe")), _number(row.get("seconds")))
        for row in kept
    ]
    return _table(("step", f"validation, {unit}" if unit else "validation", "NFE", "seconds"), cells)


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,.0f}" if value >= 10 or float(value).is_integer() else f"{value:.1f}"


def _facts(result: Mapping[str, Any]) -> str:
    facts = [({"nfe": "NFE"}.get(key, key), _number(result.get(key))) for key in ("parameters", "steps", "best_step", "seed", "nfe", "seconds", "search_seconds", "evaluation_seconds")]
    facts = [(key, value) for key, value in facts if (key, value) != ("seconds", "0")]  # of a search, which has its own
    versions = result.get("versions") or {"cnf": __version__}
    facts += [*((f"version of {name}", str(version)) for name, version in versions.items()), ("device", str(result.get("device") or ""))]
    return _table(("", ""), [(key.replace("_", " "), value) for key, value in facts if value])
