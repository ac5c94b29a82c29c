"""Which modules a program reaches, and sources without prose."""

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.export.closure import Import, closure, imports, strip

PACKAGE = Path(__file__).parents[2] / "src" / "trihybrid"
SOURCES = sorted(
    path for room in ("ops", "mixers", "compress", "train") for path in (PACKAGE / room).rglob("*.py")
)


def test_a_closure_holds_packages_and_what_functions_import() -> None:
    found = closure("def f():\n    from trihybrid.mixers.rwkv7 import Rwkv7\n")
    assert {
        "trihybrid/__init__.py",
        "trihybrid/mixers/__init__.py",
        "trihybrid/mixers/rwkv7/mixer.py",
    } <= found.keys()
    # rwkv7 -> ops.wkv7, a package, -> its modules.
    assert {"trihybrid/ops/wkv7/__init__.py", "trihybrid/ops/wkv7/chunked.py"} <= found.keys()
    assert not any(name.startswith(("trihybrid/surgery", "trihybrid/data")) for name in found)


def test_a_name_imported_from_a_package_is_no_module_and_a_module_is() -> None:
    assert "trihybrid/ops/backend.py" in closure("from trihybrid.ops import backend")
    assert closure("from trihybrid import __version__").keys() == {"trihybrid/__init__.py"}
    assert closure("import json, trihybrids") == {}


def test_relative_imports_are_followed() -> None:
    assert "trihybrid/data/shards.py" in closure("import trihybrid.data")


def test_a_room_that_is_left_out_may_be_imported_in_a_function_and_not_before() -> None:
    left_out = frozenset({"ops.wkv7"})
    assert "trihybrid/ops/__init__.py" in closure("def f():\n    import trihybrid.ops.wkv7.chunked", left_out)
    assert "trihybrid/ops/wkv7/chunked.py" not in closure(
        "def f():\n    import trihybrid.ops.wkv7.chunked", left_out
    )
    with pytest.raises(
        ValueError, match=r"trihybrid.mixers.rwkv7.mixer imports trihybrid.ops.wkv7 when it loads"
    ):
        closure("import trihybrid.mixers.rwkv7", left_out)


def test_imports_for_type_checkers_do_not_count() -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\nelse:\n    import b\n"
    assert set(imports(text, "")) == {Import("typing.TYPE_CHECKING", False), Import("b", False)}


def test_stripping_keeps_the_program_and_drops_its_prose() -> None:
    source = '''"""Module."""
# comment
class A:
    """Only prose."""
def f(x: int = 1) -> str:
    """Doc."""
    return f"{x!r:>{4}}" "kept"  # comment
def g():
    """Doc."""
'''
    text = strip(source)
    assert "Doc" not in text and "comment" not in text and "Module" not in text and "prose" not in text
    space: dict = {}
    exec(text, space)
    assert (
        space["f"]() == "   1kept"
        and space["g"]() is None
        and space["f"].__annotations__ == {"x": int, "return": str}
    )
    assert isinstance(space["A"], type) and strip('"""Only prose."""\n') == ""


def test_sources_survive_stripping() -> None:
    """The syntax tree without its bare strings is the same one."""
    for path in SOURCES:
        source = path.read_text(encoding="ascii")
        assert ast.dump(ast.parse(strip(source))) == ast.dump(_without_prose(ast.parse(source))), path


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.text(max_size=30), st.floats(), st.integers())
def test_constants_survive_stripping(text: str, number: float, whole: int) -> None:
    names: dict = {}
    exec(strip(f"x = ({text!r}, {whole})\ny = float({repr(number)!r})"), names)
    assert names["x"] == (text, whole) and repr(names["y"]) == repr(number)


class _Prose(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def _without_prose(tree: ast.Module) -> ast.Module:
    _Prose().visit(tree)
    for node in ast.walk(tree):
        if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]
    return tree
