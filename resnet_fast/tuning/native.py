"""The check of the native module's machine code: what its CUDA kernels take, and which instructions do the work.

``python -m resnet_fast.tuning.native MODULE`` shows it for a built ``_C``; it fails on a spill, on a kernel that misses
the instructions that it was written for, and on a maximum that drops NaN; with ``--check`` also on rows that differ
from ``csrc/resources.csv``; ``--write`` makes that table anew. No GPU is used or needed: cuobjdump comes with Triton.
"""

from __future__ import annotations

import argparse
import csv
import importlib.machinery
import importlib.util
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_fast._files import write_text

#: The architectures in the table: those that continuous integration builds for.
ARCHITECTURES = ("sm_80", "sm_90a")

_COLUMNS = ("arch", "kernel", "registers", "shared", "instructions")

#: What moves data and multiplies, without the modifiers that do not matter: a kernel's character.
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?"
    r"(HGMMA|HMMA|LDSM|LDGSTS|UTMALDG|UTMASTG|UBLKCP|LDG|STG|LDL|STL|FMNMX3?|HMNMX2|VHMNMX)((?:\.\w+)*)"
)
_SHOWN = ("HGMMA", "HMMA", "LDSM", "LDGSTS", "UTMALDG.IM2COL", "UTMALDG", "UTMASTG", "LDG.128", "STG.128")

#: For kernels whose name begins so: the instructions without which they are not what they were written to be.
_NEEDED = (
    ("sm90::Conv<", ("HGMMA", "UTMALDG.IM2COL", "UTMASTG")),
    ("sm90::Gemm<", ("HGMMA", "UTMALDG", "UTMASTG")),
    ("sm80::conv_bn_act<", ("HMMA", "LDGSTS", "LDSM", "STG.128")),
    ("sm80::conv_bn_act_masked<", ("HMMA", "LDSM")),
    ("stem_tile::stem_kernel<", ("HMMA", "LDGSTS", "LDSM", "STG.128")),
    ("pool_and_multiply<half, true>", ("HMMA", "LDG.128")),
    ("pool_and_multiply<bfloat16, true>", ("HMMA", "LDG.128")),
    ("pool_and_multiply<float, true>", ("LDG.128",)),
)
#: Kernels with these template arguments move packs of 16 bytes; the first two only read them.
_PACKS = re.compile(r"(slice_moments|slice_sums|elementwise|apply|backward)<(?:(?:half|bfloat16), 8|float, 4)\b")


@dataclass
class Compiled:
    """One kernel's machine code for one architecture.

    Attributes:
        registers: of a thread. stack, local: bytes of memory a thread uses besides, which is where spills go.
        shared: bytes of shared memory of a block: static ones, and dynamic ones where the module lists them.
        found: instructions, those of ``_SHOWN`` and maxima with their modifiers.
    """

    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    found: set[str] = field(default_factory=set)


Key = tuple[str, str]
"""Architecture (as "sm_90a") and kernel."""

Launch = tuple[str, str, tuple[int, ...]]
"""Kind of kernel, precision, sizes: what the module says of a kernel and what its symbol says alike."""

Row = tuple[str, str, str]
"""Registers, shared memory, instructions."""


def table_path() -> Path:
    """Return where the committed table lies in a checkout; it is not installed."""
    return Path(__file__).resolve().parents[2] / "csrc" / "resources.csv"


# --- what is in a module


def read_module(path: Path, dynamic: Mapping[Launch, int] | None = None) -> dict[Key, Compiled]:
    """Return every kernel in a library or object file; ``dynamic``: bytes of shared memory that a launch asks for."""
    dynamic = {} if dynamic is None else dynamic
    usage, code = _cuobjdump("-res-usage", path), _cuobjdump("-sass", path)
    names = _demangled(set(re.findall(r"Function\s?:?\s+(\w+)", usage + code)))
    kernels: dict[Key, Compiled] = {}
    arch = kernel = ""
    for line in usage.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r" Function (\w+):", line):
            kernel = names[found[1]]
        elif line.startswith("  REG:"):
            values = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
            launch = launch_of_symbol(kernel)
            shared = values["SHARED"] + (0 if launch is None else dynamic.get(launch, 0))
            kernels[arch, kernel] = Compiled(values["REG"], values["STACK"], values["LOCAL"], shared)
    for line in code.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s+Function : (\w+)", line):
            kernel = names[found[1]]
        elif found := _INSTRUCTION.match(line):
            kernels[arch, kernel].found.add(_character(found[1], found[2].split(".")))
    return kernels


def _character(name: str, modifiers: Sequence[str]) -> str:
    """The instruction with what matters of it: how wide an access is, how a copy finds its pixels, if NaN is kept."""
    if name in ("LDG", "STG"):
        return f"{name}.128" if "128" in modifiers else name
    if name == "UTMALDG" and "IM2COL" in modifiers:
        return "UTMALDG.IM2COL"
    if "MNMX" in name:
        return f"{name}.NAN" if "NAN" in modifiers else name
    return name


def _cuobjdump(option: str, path: Path) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _demangled(symbols: Iterable[str]) -> dict[str, str]:
    """Every symbol's kernel in words: without namespaces that all share, parameters and the launcher of CUTLASS."""
    ordered = sorted(symbols)
    tool = shutil.which("c++filt")
    if tool is None:
        raise FileNotFoundError("c++filt was not found; it comes with binutils")
    text = subprocess.run([tool, *ordered], capture_output=True, text=True, check=True).stdout if ordered else ""
    return {symbol: short_name(name) for symbol, name in zip(ordered, text.splitlines(), strict=True)}


def short_name(name: str) -> str:
    """``void resnet_fast::stem_tile::stem_kernel<__half, 12>(Stem)`` as ``stem_tile::stem_kernel<half, 12>``."""
    precisions = ("fp16", "bf16", "tf32", "fp32")
    name = re.sub(r"\(resnet_fast::Precision\)(\d)", lambda number: precisions[int(number[1])], name)
    for words in ("void ", "resnet_fast::", "(anonymous namespace)::", "__nv_"):
        name = name.replace(words, "")
    name = name.replace("__half", "half").replace("> >", ">>")
    cutlass = re.match(r"cutlass::device_kernel<(.+?)::Kernel>", name)
    return cutlass[1] if cutlass else name.partition("(")[0].strip()


#: With which fields of a listed convolution the template arguments begin, after the type.
_TEMPLATE_ARGUMENTS = {
    "implicit_gemm": ("block_m", "block_n", "block_k", "stages"),
    "masked": ("block_n",),
    "cutlass_conv": ("block_m", "block_n", "block_k"),
    "cutlass_gemm": ("block_m", "block_n", "block_k"),
}
_SYMBOL = re.compile(
    r"(?:sm90::(Conv|Gemm)|sm80::conv_bn_act<sm80::VectorTile|sm80::conv_bn_act_(masked)<sm80::\w+"
    r"|stem_tile::(stem)_kernel<.*stem_tile::Tile)<([^<>]+)>"
)


def launch_of(listed: Mapping[str, Any]) -> Launch:
    """Return the launch of an entry of ``_C.conv_bn_act_kernels()``."""
    kind = "masked" if "masked" in str(listed["name"]) else str(listed["algorithm"])
    return kind, str(listed["precision"]), tuple(int(listed[name]) for name in _TEMPLATE_ARGUMENTS[kind])


def launch_of_symbol(kernel: str) -> Launch | None:
    """Return the launch of a kernel of that short name, None if the module does not tell what it asks for."""
    found = _SYMBOL.match(kernel)
    if found is None:
        return None
    cutlass, masked, stem, arguments = found.groups()
    element, *numbers = arguments.split(", ")
    precision = {"half": "fp16", "bfloat16": "bf16", "float": "tf32"}.get(element, element)
    kind = f"cutlass_{cutlass.lower()}" if cutlass else masked or stem or "implicit_gemm"
    fields = len(_TEMPLATE_ARGUMENTS.get(kind, numbers))
    return kind, precision, tuple(int(number) for number in numbers[:fields])


def dynamic_shared(module: Any) -> dict[Launch, int]:
    """Return what the kernels of a loaded ``_C`` ask for, in bytes a block."""
    bytes_of = {launch_of(each): int(each["shared_bytes"]) for each in module.conv_bn_act_kernels()}
    for precision in ("fp16", "bf16", "tf32"):
        for square, channels in ((12, 3), (16, 4)):
            for rows in (7, 3):
                bytes_of["stem", precision, (square, rows)] = module.stem_shared_bytes(precision, channels, rows)
    return bytes_of


# --- what is wrong


def faults(arch: str, kernel: str, compiled: Compiled) -> list[str]:
    """Return what is wrong with a kernel's machine code, in words; empty if nothing is."""
    wrong = []
    if compiled.stack or compiled.local or compiled.found & {"LDL", "STL"}:
        wrong.append(f"spills: {compiled.stack} bytes of stack, {compiled.local} of local memory a thread")
    needed = next((needed for begin, needed in _NEEDED if kernel.startswith(begin)), ())
    if packs := _PACKS.match(kernel):
        needed = ("LDG.128",) if packs[1].startswith("slice") else ("LDG.128", "STG.128")
    missing = [each for each in needed if each not in compiled.found]
    if missing:
        wrong.append(f"has no {' and no '.join(missing)}")
    dropping = sorted(each for each in compiled.found if "MNMX" in each and not each.endswith(".NAN"))
    if dropping:
        wrong.append(f"takes a maximum or minimum that drops NaN: {', '.join(dropping)}")
    return [f"{arch} {kernel} {each}" for each in wrong]


def row(compiled: Compiled) -> Row:
    """Return the table's row of a kernel."""
    shown = [each for each in _SHOWN if each in compiled.found]
    return str(compiled.registers), str(compiled.shared), " ".join(shown)


def write_table(path: Path, compiler: str, rows: Mapping[Key, Row]) -> None:
    """Replace the table; rows are sorted, so that equal results give equal files."""
    text = io.StringIO()
    text.write(f"# nvcc {compiler}; made by: python -m resnet_fast.tuning.native resnet_fast --write\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows((*key, *rows[key]) for key in sorted(rows))
    write_text(path, text.getvalue())


def read_table(path: Path) -> tuple[str, dict[Key, Row]]:
    """Return the committed table: the compiler's version and its rows.

    Raises:
        ValueError: the file is no such table.
    """
    first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    lines = list(csv.reader(io.StringIO(rest)))
    if not first.startswith("# nvcc ") or not lines or tuple(lines[0]) != _COLUMNS:
        raise ValueError(f"{path} is no table of resources; --write makes one")
    if any(len(line) != len(_COLUMNS) for line in lines):
        raise ValueError(f"{path} has a row that does not have {len(_COLUMNS)} columns")
    return first.split()[2].rstrip(";"), {(line[0], line[1]): (line[2], line[3], line[4]) for line in lines[1:]}


def differences(committed: Mapping[Key, Row], now: Mapping[Key, Row], listed: Container[Launch]) -> list[str]:
    """Return where ``now`` differs from the table, in words.

    Args:
        listed: the convolutions that the module says it has: it may be built without some of those made with CUTLASS.
    """
    archs = {arch for arch, _ in now}
    found = []
    for key in sorted({*committed, *now}):
        before, after = committed.get(key), now.get(key)
        left_out = key[1].startswith("sm90::") and launch_of_symbol(key[1]) not in listed
        if key[0] not in archs or before == after or (after is None and left_out):
            continue
        if before is None or after is None:
            found.append(f"{' '.join(key)}: {'not in the table' if before is None else 'in the table only'}")
        else:
            changed = (f"{name} {b} -> {a}" for name, b, a in zip(_COLUMNS[2:], before, after, strict=True) if b != a)
            found.append(f"{' '.join(key)}: {', '.join(changed)}")
    return found


# --- the command


def _load(path: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("_C", str(path))
    spec = importlib.util.spec_from_file_location("_C", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m resnet_fast.tuning.native", description=__doc__)
    parser.add_argument("module", type=Path, help="a built _C, or the folder that it is in")
    parser.add_argument("--check", action="store_true", help="compare with the committed table too")
    parser.add_argument("--write", action="store_true", help="write the table anew")
    given = parser.parse_args(arguments)
    path = next(given.module.glob("_C.*.so"), None) if given.module.is_dir() else given.module
    if path is None or not path.is_file():
        parser.error(f"{given.module} is, or holds, no _C; `make native` builds one")

    module = _load(path.resolve())
    info = module.build_info()
    if not info["cuda"]:
        parser.error(f"{path} was built without CUDA")
    dynamic = dynamic_shared(module)
    kernels = read_module(path, dynamic)
    rows = {key: row(compiled) for key, compiled in kernels.items() if key[0] in ARCHITECTURES}
    wrong = [line for key, compiled in sorted(kernels.items()) for line in faults(*key, compiled)]
    if not kernels:
        wrong.append(f"{path} holds no kernels")
    if given.write:
        missing = [arch for arch in ARCHITECTURES if arch not in {key[0] for key in kernels}]
        if missing:
            parser.error(f"{path} has no machine code for {' and '.join(missing)}")
        write_table(table_path(), info["cuda"], rows)
        print(f"{len(rows)} rows written to {table_path()}")
    elif given.check:
        made_with, committed = read_table(table_path())
        if made_with == info["cuda"]:
            wrong += differences(committed, rows, dynamic)
        else:
            print(f"rows are not compared: the table was made with nvcc {made_with}, this is {info['cuda']}")
    else:
        for key in sorted(rows):
            print(",".join((*key, *rows[key])))
    for line in wrong:
        print(f"WRONG {line}")
    archs = ", ".join(
        f"{sum(key[0] == arch for key in kernels)} for {arch}" for arch in sorted({k[0] for k in kernels})
    )
    print(f"{len(kernels)} kernels ({archs}): {f'{len(wrong)} faults' if wrong else 'all well'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
