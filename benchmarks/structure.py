"""Measure the structure of the package: size, imports, one optimiser step, walkers of chains, start-up time.

    PYTHONPATH=. python benchmarks/structure.py             # of this tree
    python benchmarks/structure.py --root ../other --quick  # of another tree, without the measurements of time

Everything but the times and the optimiser step is read from the source, without importing it.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STATE = {"Run", "Stepper", "TrainState", "Trainer"}  # classes of a training, which only their own methods may change
CHAINS = ("transforms", "scales")  # attributes through which a Sequential or a Multiscale is opened
OWNERS = ("Sequential", "Multiscale")  # they may open themselves


def modules(root: Path) -> dict[str, Path]:
    """Return the package's files by module name."""
    files = sorted((root / "cnf").rglob("*.py"))
    names = [".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for f in files]
    return dict(zip(names, files, strict=True))


def lines(root: Path) -> dict[str, int]:
    """Return the number of lines of each module."""
    return {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in modules(root).items()}


# -- imports -----------------------------------------------------------------------------------------------------


def _statements(tree: ast.Module, typing: bool) -> Iterator[ast.stmt]:
    """Yield the statements that run on import; with ``typing``, also those under ``if TYPE_CHECKING``."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop(0)
        yield node
        if isinstance(node, ast.If):
            pending += node.orelse + (node.body if typing or "TYPE_CHECKING" not in ast.unparse(node.test) else [])
        elif isinstance(node, ast.Try):
            pending += node.body + node.orelse + node.finalbody


def imports(root: Path, typing: bool = True) -> dict[str, set[str]]:
    """Return the modules that each module imports when it is loaded; names re-exported by a room count as their module."""
    files = modules(root)
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
    exports: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in files}
    for name, tree in trees.items():
        for node in _statements(tree, typing):
            if isinstance(node, ast.ImportFrom) and node.module:
                exports[name] |= {a.asname or a.name: (node.module, a.name) for a in node.names}

    def home(module: str, name: str, depth: int = 0) -> str:
        if f"{module}.{name}" in files:
            return f"{module}.{name}"
        if files[module].name == "__init__.py" and name in exports[module] and depth < 9:
            origin, original = exports[module][name]
            return home(origin, original, depth + 1) if origin in files else module
        return module

    found: dict[str, set[str]] = {name: set() for name in files}
    for name, tree in trees.items():
        for node in _statements(tree, typing):
            if isinstance(node, ast.ImportFrom) and node.module in files:
                found[name] |= {home(node.module, a.name) for a in node.names}
            elif isinstance(node, ast.Import):
                found[name] |= {a.name for a in node.names if a.name in files}
        found[name].discard(name)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other (strongly connected components of two or more)."""

    @cache
    def reached(start: str) -> frozenset[str]:
        seen: set[str] = set()
        pending = list(graph[start])
        while pending:
            if (name := pending.pop()) not in seen:
                seen.add(name)
                pending += graph[name]
        return frozenset(seen)

    groups = {tuple(sorted({o for o in reached(n) if n in reached(o)})) for n in graph if n in reached(n)}
    return [list(g) for g in sorted(groups)]


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the imports between rooms, the folders and single modules right under the package.

    ``__main__`` is left out: like the scripts it only calls the program.
    """
    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    graph = {name: others for name, others in graph.items() if name != "cnf.__main__"}
    found: dict[str, set[str]] = {room(name): set() for name in graph}
    for name, others in graph.items():
        found[room(name)] |= {room(o) for o in others} - {room(name)}
    return found


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """Return the longest chain of imports, the importing module first; circles are entered once."""
    best: dict[str, list[str]] = {}

    def chain(name: str, above: tuple[str, ...]) -> list[str]:
        if name not in best:
            below = [chain(other, (*above, name)) for other in sorted(graph[name]) if other not in (*above, name)]
            best[name] = [name, *max(below, key=len, default=[])]
        return best[name]

    return max((chain(name, ()) for name in sorted(graph)), key=len)


# -- functions ---------------------------------------------------------------------------------------------------


def functions(root: Path) -> Iterator[tuple[str, str, ast.FunctionDef]]:
    """Yield (module, qualified name, definition) of every function and method; nested ones belong to their outer."""
    for module, file in modules(root).items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                yield module, node.name, node
            elif isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef):
                        yield module, f"{node.name}.{inner.name}", inner


def changes_state(root: Path) -> list[str]:
    """List functions that take a training state (see STATE) and assign to it, other than its own methods."""
    found = []
    for module, name, node in functions(root):
        given = {
            a.arg
            for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            if a.annotation is not None and STATE & set(re.findall(r"\w+", ast.unparse(a.annotation)))
        }
        targets: list[ast.expr] = []
        for inner in ast.walk(node):
            if isinstance(inner, ast.Assign):
                targets += inner.targets
            elif isinstance(inner, (ast.AugAssign, ast.AnnAssign)):
                targets.append(inner.target)
            elif isinstance(inner, ast.Delete):
                targets += inner.targets
            elif isinstance(inner, ast.Call) and ast.unparse(inner.func) in ("setattr", "delattr"):
                targets += [ast.Attribute(inner.args[0], "any", ast.Store())]
        if any(_owner(t) in given for whole in targets for t in _parts(whole)):
            found.append(f"{module}.{name}")
    return found


def _parts(target: ast.expr) -> list[ast.expr]:
    return list(target.elts) if isinstance(target, (ast.Tuple, ast.List)) else [target]


def _owner(target: ast.expr) -> str | None:
    """Return ``x`` for ``x.a``, ``x.a.b`` and ``x.a[i]``, else None."""
    if not isinstance(target, (ast.Attribute, ast.Subscript)):
        return None
    while isinstance(target, (ast.Attribute, ast.Subscript)):
        target = target.value
    return target.id if isinstance(target, ast.Name) else None


def walkers(root: Path) -> list[str]:
    """List functions and classes that open a chain of transforms, other than the chains themselves (see OWNERS)."""
    found = {}
    for module, name, node in functions(root):
        top = name.split(".")[0]
        opened = [ast.unparse(n.value) for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr in CHAINS]
        if top not in OWNERS and set(opened) - {"self", "torch", "torchvision", "cnf"}:
            found[f"{module}.{top}"] = None
    return list(found)


def callers(root: Path, name: str) -> list[str]:
    """List functions that call a function or method called ``name``, once for each call."""
    return [
        f"{module}.{outer}"
        for module, outer, node in functions(root)
        for n in ast.walk(node)
        if isinstance(n, ast.Call) and isinstance(n.func, (ast.Attribute, ast.Name))
        if (n.func.attr if isinstance(n.func, ast.Attribute) else n.func.id) == name
    ]


# -- one optimiser step ------------------------------------------------------------------------------------------


class _Done(BaseException):
    pass


def one_step(root: Path, preset: str = "digits", warm: int = 3) -> dict[str, int]:
    """Profile the package's Python functions from the end of one optimiser step to the end of the next.

    Returns:
        ``functions``, ``calls``, ``files``, and ``depth``, the most nested calls of the package above the training loop.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from cnf.cli import train_main

    torch.set_num_threads(1)
    package, seen, calls, steps = str(root / "cnf") + os.sep, set[tuple[str, int, str]](), 0, 0
    depth, deepest, lowest = 0, 0, 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls, depth, deepest, lowest
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(package) or code.co_name.startswith("<"):
            return
        if event == "return":
            depth -= 1
            lowest = min(lowest, depth)
            return
        calls, depth = calls + 1, depth + 1
        deepest = max(deepest, depth)
        seen.add((code.co_filename, code.co_firstlineno, code.co_name))

    def after(*arguments: object) -> None:
        nonlocal steps
        steps += 1
        if steps == warm:
            sys.setprofile(profile)
        elif steps > warm:
            sys.setprofile(None)
            raise _Done

    hook = register_optimizer_step_post_hook(after)
    with tempfile.TemporaryDirectory() as folder:
        try:
            train_main([preset, "--steps", str(warm + 5), "--out", str(Path(folder, "run"))])
        except _Done:
            pass
        finally:
            hook.remove()
    return {"functions": len(seen), "calls": calls, "files": len({s[0] for s in seen}), "depth": deepest - lowest}


# -- time --------------------------------------------------------------------------------------------------------


def cpu_seconds(root: Path, words: list[str], repeats: int = 7) -> float:
    """Return the median CPU time (user and system) of a Python process."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    found = []
    for _ in range(repeats):
        process = subprocess.Popen([sys.executable, *words], env=environment, cwd=root, stdout=subprocess.DEVNULL)
        _, code, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        if code:
            raise SystemExit(f"{' '.join(words)} failed with exit code {process.returncode}")
        found.append(used.ru_utime + used.ru_stime)
    return statistics.median(found)


def report(root: Path, quick: bool) -> None:
    """Print every measure."""
    size, graph = lines(root), imports(root)
    largest = max(size, key=lambda n: size[n])
    print(f"library lines: {sum(size.values())} in {len(size)} files, median {statistics.median(size.values()):g}")
    print(f"largest module: {largest}, {size[largest]} lines; above 300: {sum(n > 300 for n in size.values())}")
    for title, whole in (("modules", graph), ("rooms", rooms(graph))):
        loaded = longest_chain(imports(root, typing=False) if whole is graph else rooms(imports(root, typing=False)))
        print(f"floors of {title}: {len(loaded)} ({' > '.join(c.removeprefix('cnf.') for c in loaded)})")
        print(f"import circles of {title}: {[len(c) for c in circles(whole)]}")
    for title, found in (
        ("functions that change a training state", changes_state(root)),
        ("functions that open a chain", walkers(root)),
        ("calls of base_log_prob", callers(root, "base_log_prob")),
    ):
        print(f"{title}: {len(found)}")
        for name in found:
            print(f"    {name}")
    if quick:
        return
    print("one optimiser step of digits: " + ", ".join(f"{v} {k}" for k, v in one_step(root).items()))
    torch = cpu_seconds(root, ["-c", "import torch"])
    for title, statement in (("import cnf", "import cnf"), ("import cnf, cnf.Flow and cnf.CNF", "import cnf; cnf.Flow, cnf.CNF")):
        seconds = cpu_seconds(root, ["-c", statement])
        print(f"{title}: {seconds:.2f} s of CPU time, {seconds / torch:.2f} times import torch ({torch:.2f} s)")
    program = (root / "cnf" / "__main__.py").exists()
    for title, words in (
        ("--help", ["-m", "cnf", "train", "--help"] if program else ["train_density.py", "--help"]),
        ("list", ["-m", "cnf", "list"] if program else ["train_density.py", "--list"]),
    ):
        print(f"{title}: {cpu_seconds(root, words):.2f} s of CPU time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="tree to measure (default: this one)")
    parser.add_argument("--quick", action="store_true", help="only what is read from the source")
    options = parser.parse_args()
    root = options.root.resolve()
    sys.path.insert(0, str(root))
    report(root, options.quick)


if __name__ == "__main__":
    main()
