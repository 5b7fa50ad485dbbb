"""emulated.py copies the kernels' structs by hand; a compiler compares each with the original."""

import ctypes
import os
import subprocess
from pathlib import Path

import emulated
import pytest

from megatron_pd.ops import FUSED_LOSSES, FUSED_TAILS

CSRC = Path(__file__).parents[2] / "csrc"
HEADERS = ("sparse_log_softmax/cuda/launch.h", "row_divergence/row.h")
TEMPLATES = {"Divergence": "Divergence<float>", "RowProblem": "RowProblem<float>"}
COPIES = [
    value
    for value in vars(emulated).values()
    if isinstance(value, type) and value.__module__ == "emulated" and hasattr(value, "_fields_")
]


def kind_of(field: type) -> str:
    """What C++ must say of a member's type beside its size."""
    if issubclass(field, ctypes.Structure):
        return f"std::is_same_v<Member, {field.__name__}>"
    if field is ctypes.c_void_p:
        return "std::is_pointer_v<Member>"
    if field is ctypes.c_float:
        return "std::is_floating_point_v<Member>"
    if field is ctypes.c_bool:
        return "std::is_same_v<Member, bool>"
    return "std::is_enum_v<Member> || (std::is_integral_v<Member> && std::is_signed_v<Member>)"


def assertions(copy: type[ctypes.Structure]) -> str:
    """C++ that compiles where the struct of that name has these members, there, and no others."""
    struct = TEMPLATES.get(copy.__name__, copy.__name__)
    lines = [f'static_assert(sizeof({struct}) == {ctypes.sizeof(copy)}, "size of {struct}");']
    for name, field in copy._fields_:
        place = getattr(copy, name)
        lines.append(
            f"namespace {copy.__name__}_{name} {{ using Member = decltype({struct}::{name});\n"
            f"static_assert(offsetof({struct}, {name}) == {place.offset} &&"
            f' sizeof(Member) == {place.size} && ({kind_of(field)}), "{struct}::{name}"); }}'
        )
    members = ", ".join(name for name, _ in copy._fields_)
    lines.append(f"void members_of({struct}& whole) {{ auto& [{members}] = whole; }}")
    return "\n".join(lines)


def enumerator(name: str) -> str:
    return "k" + "".join(word.capitalize() for word in name.split("-"))


def compile_assertions(assertions: str) -> subprocess.CompletedProcess:
    includes = [f'#include "{header}"' for header in HEADERS]
    system = ["#include <cstddef>", "#include <type_traits>"]
    source = "\n".join([*system, *includes, "using namespace megatron_pd;", assertions])
    return subprocess.run(
        [os.environ.get("CXX", "g++"), "-std=c++20", f"-I{CSRC}", "-xc++", "-fsyntax-only", "-"],
        input=source,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("copy", COPIES)
def test_is_the_kernels_struct(copy: type[ctypes.Structure]) -> None:
    done = compile_assertions(assertions(copy))
    assert done.returncode == 0, done.stderr


IDS = emulated.Ids._fields_


@pytest.mark.parametrize(
    "fields",
    [
        IDS[:-1],
        [*IDS, ("more", ctypes.c_int64)],
        [IDS[1], IDS[0], IDS[2]],
        [IDS[0], ("is_64_bit", ctypes.c_int64), IDS[2]],
        [IDS[0], IDS[1], ("count", ctypes.c_void_p)],
        # In the padding, so that nothing else moves.
        [IDS[0], IDS[1], ("hidden", ctypes.c_bool), IDS[2]],
        [("data", ctypes.c_int64), ("is_64_bit", ctypes.c_bool), IDS[2]],
    ],
)
def test_a_wrong_copy_is_seen(fields: list) -> None:
    wrong = type("Ids", (ctypes.Structure,), {"_fields_": fields})
    assert "error:" in compile_assertions(assertions(wrong)).stderr


@pytest.mark.parametrize(
    ("enum", "names", "all_names"),
    [
        ("Tail", emulated.Divergence.TAILS, FUSED_TAILS),
        ("Loss", emulated.Divergence.LOSSES, FUSED_LOSSES),
        ("Weight", emulated.Divergence.WEIGHTS, emulated.Divergence.WEIGHTS),
    ],
)
def test_names_count_as_the_kernels_do(enum: str, names: tuple, all_names: tuple) -> None:
    assert sorted(names) == sorted(all_names)
    done = compile_assertions(
        "\n".join(
            f"static_assert(static_cast<int>({enum}::{enumerator(name)}) == {index});"
            for index, name in enumerate(names)
        )
    )
    assert done.returncode == 0, done.stderr


def test_every_copy_is_compared() -> None:
    assert {copy.__name__ for copy in COPIES} >= {"ForwardArguments", "BackwardArguments"}
