"""The order of the rooms: imports go from higher rooms to lower ones, and never in a circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cotnet_jax"

# From low to high; a room may import itself and what stands before it. docs/architecture.md
# describes them. The package's own __init__ is the public face: what it offers is imported from
# the rooms themselves everywhere below the commands.
ROOMS = (
    "version",
    "interrupt",
    "garbage_collector",
    "files",
    "configs",
    "command_line",
    "ops",
    "data",
    "layers",
    "models",
    "config",
    "distributed",
    "checkpoint",
    "weights",
    "training",
    "reports",
    "predictor",
    "export",
    "tools",
    "commands",
    "predict",
    "__main__",
)
LOWEST_COMMAND = "tools"
FACE = "cotnet_jax"


def find_modules(package: Path) -> dict[str, Path]:
    """{dotted name: file} of all modules; a package has the name of its folder."""
    modules = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def find_imports(name: str, file: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ``modules`` that one of them imports anywhere, in its functions too.

    Not what stands under ``if __name__ == "__main__"``: then it is a command, wherever it lies.
    """
    imported = set()
    statements = ast.parse(file.read_text(encoding="utf-8")).body
    library = [each for each in statements if not is_main_block(each)]
    for node in ast.walk(ast.Module(library, [])):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join(filter(None, [*package, node.module]))
            names = {f"{base}.{alias.name}" for alias in node.names}
            # What is no module is an attribute of the one that it is imported from.
            imported |= {each if each in modules else base for each in names}
    return {each for each in imported if each in modules}


def is_main_block(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def find_upward(imports: dict[str, set[str]]) -> list[str]:
    """A line for each import from a lower room to a higher one."""
    heights = {room: height for height, room in enumerate(ROOMS)}
    heights[FACE] = heights[LOWEST_COMMAND]

    def height(module):
        return heights[FACE if module == FACE else module.split(".")[1]]

    return [
        f"{module} imports {each}"
        for module, imported in sorted(imports.items())
        for each in sorted(imported)
        if module != FACE and height(each) > height(module)
    ]


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first once more at its end; [] where there is none."""
    finished = set()

    def visit(module, path):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for each in sorted(imports[module]):
            cycle = visit(each, [*path, module])
            if cycle:
                return cycle
        finished.add(module)
        return []

    for module in sorted(imports):
        cycle = visit(module, [])
        if cycle:
            return cycle
    return []


@pytest.fixture(scope="module")
def imports():
    modules = find_modules(PACKAGE)
    return {name: find_imports(name, file, modules) for name, file in modules.items()}


def test_every_module_is_in_a_room(imports):
    rooms = {module.split(".")[1] for module in imports if module != FACE}
    assert rooms == set(ROOMS)


def test_nothing_imports_upwards(imports):
    assert not find_upward(imports)


def test_no_circle(imports):
    assert not find_cycle(imports)


def test_imports_of_every_kind_are_found(tmp_path):
    files = {
        "cotnet_jax/__init__.py": "",
        "cotnet_jax/ops/__init__.py": "from . import plain\nfrom ..data.sources import open_source",
        "cotnet_jax/ops/plain.py": "def late():\n    import cotnet_jax.ops\n    import jax",
        "cotnet_jax/data/__init__.py": "",
        "cotnet_jax/data/sources.py": "from cotnet_jax.ops.plain import late\n"
        "if __name__ == '__main__':\n    import cotnet_jax.data",
    }
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    modules = find_modules(tmp_path / "cotnet_jax")
    imports = {name: find_imports(name, file, modules) for name, file in modules.items()}
    assert imports == {
        "cotnet_jax": set(),
        "cotnet_jax.ops": {"cotnet_jax.ops.plain", "cotnet_jax.data.sources"},
        "cotnet_jax.ops.plain": {"cotnet_jax.ops"},
        "cotnet_jax.data": set(),
        "cotnet_jax.data.sources": {"cotnet_jax.ops.plain"},
    }
    assert find_upward(imports) == ["cotnet_jax.ops imports cotnet_jax.data.sources"]
    assert find_cycle(imports)[0] == find_cycle(imports)[-1]
