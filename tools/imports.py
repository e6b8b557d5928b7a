"""Draw which file imports which: python -m tools.imports > docs/imports.dot

`dot -Tsvg docs/imports.dot -o docs/imports.svg` makes the picture (Graphviz). tests/test_config.py
checks that the committed drawing is the present one, and that imports only go down.
"""

import ast
import glob
import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDERS = ("runtime", "ingest", "bench", "tools")


def modules():
    """The project's own modules, without the tests -> {dotted name: path}."""
    patterns = ["*.py", *(f"{folder}/*.py" for folder in FOLDERS)]
    paths = [path for pattern in patterns for path in glob.glob(pattern, root_dir=ROOT)]
    found = {}
    for path in sorted(paths):
        name = path.removesuffix(".py").replace(os.sep, ".")
        if not name.endswith("__init__"):
            found[name] = os.path.join(ROOT, path)
    return found


def imports_of(path, names):
    """Those of the modules `names` that the file at `path` imports, sorted."""
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())

    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Either part may be the module: runtime.ranks in both `from runtime import ranks` and
            # `from runtime.ranks import Vote`.
            imported.add(node.module)
            imported.update(f"{node.module}.{alias.name}" for alias in node.names)
    return sorted(imported & set(names))


def import_graph():
    """-> {module: [modules that it imports]}."""
    paths = modules()
    return {name: imports_of(path, paths) for name, path in paths.items()}


def without_shortcuts(graph):
    """The graph without those imports that longer paths through it imply."""
    reached = {}

    def reach(name):
        """All modules that `name` imports, directly or not."""
        if name not in reached:
            reached[name] = set(graph[name])
            for other in graph[name]:
                reached[name] |= reach(other)
        return reached[name]

    reduced = {}
    for name, imported in graph.items():
        reduced[name] = []
        for other in imported:
            others = [between for between in imported if between != other]
            if not any(other in reach(between) for between in others):
                reduced[name].append(other)
    return reduced


def dot(graph):
    """The graph in Graphviz's language: a box per file, a frame per folder, an arrow per import."""
    lines = [
        "digraph imports {",
        '    graph [rankdir=TB, fontname="DejaVu Sans", nodesep=0.2, ranksep=0.5]',
        '    node [shape=box, style=filled, fillcolor="#e8f1fa", fontname="DejaVu Sans"]',
        '    edge [color="#555555"]',
    ]
    for folder in FOLDERS:
        members = [name for name in graph if name.startswith(folder + ".")]
        lines += [
            f"    subgraph cluster_{folder} {{",
            f'        label="{folder}/"; style=rounded; color="#999999"',
            '        node [fillcolor="#f4f4f4"]',
            *(f'        "{name}" [label="{name.split(".")[1]}"]' for name in members),
            "    }",
        ]
    for name, imported in graph.items():
        lines += [f'    "{name}" -> "{other}"' for other in imported]
    return "\n".join([*lines, "}"])


if __name__ == "__main__":
    print(dot(without_shortcuts(import_graph())))
