"""The check of the native module's machine code: what it reads, what it finds wrong, and its table. No nvcc, no GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resnet_fast.tuning import native

# What cuobjdump prints, cut down; symbols as nvcc makes them.
_ADD = "_ZN11resnet_fast43_GLOBAL__N__a2242df0_10_add_act_cu_0116a78511elementwiseI6__halfLi8ENS0_3AddEEEvPKT_S6_PS4_l"
_CONV = "_ZN11resnet_fast4sm8011conv_bn_actINS0_10VectorTileI6__halfLi64ELi64ELi32ELi4ELi2ELi2EEEEEvNS_9ConvBnActE"
_USAGE = f"""
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function {_ADD}:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:384 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {_CONV}:
  REG:128 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:384 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
_SASS = f"""
Fatbin elf code:
================
arch = sm_80

\t\tFunction : {_ADD}
        /*0040*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;     /* 0x0000 */
                                                                        /* 0x0000 */
        /*0050*/                   FMNMX.NAN R4, R4, RZ, !PT ;          /* 0x0000 */
        /*0060*/                   STG.E.128 [R2.64], R4 ;              /* 0x0000 */
\t\tFunction : {_CONV}
        /*0040*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64] ;  /* 0x0000 */
        /*0050*/                   HMMA.16816.F32 R4, R4, R8, R12 ;     /* 0x0000 */
        /*0060*/             @UP0  UTMALDG.4D.IM2COL [UR8], [UR4] ;     /* 0x0000 */
        /*0070*/                   FMNMX R4, R4, RZ, !PT ;              /* 0x0000 */
"""
_LISTED = {
    "name": "sm80_fp16_64x64x32_4", "algorithm": "implicit_gemm", "precision": "fp16",
    "block_m": 64, "block_n": 64, "block_k": 32, "stages": 4, "shared_bytes": 49152,
}  # fmt: skip
needs_binutils = pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt, of binutils")


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cuobjdump", lambda option, _path: _USAGE if option == "-res-usage" else _SASS)


def compiled(**changes: Any) -> native.Compiled:
    return native.Compiled(**({"registers": 64, "shared": 0} | changes))


# --- what is read


@needs_binutils
def test_registers_memory_and_instructions_of_every_kernel_are_read(listing: None) -> None:
    kernels = native.read_module(Path("_C.so"), {native.launch_of(_LISTED): 49152})
    add, conv = "elementwise<half, 8, Add>", "sm80::conv_bn_act<sm80::VectorTile<half, 64, 64, 32, 4, 2, 2>>"
    assert set(kernels) == {("sm_80", add), ("sm_80", conv)}
    assert kernels["sm_80", add] == compiled(registers=40, found={"LDG.128", "FMNMX.NAN", "STG.128"})
    assert kernels["sm_80", conv] == native.Compiled(
        registers=128, stack=8, local=0, shared=16 + 49152, found={"LDGSTS", "HMMA", "UTMALDG.IM2COL", "FMNMX"}
    )


@pytest.mark.parametrize(
    ("long", "short"),
    [
        ("void resnet_fast::stem_tile::stem_kernel<__half, 12>(resnet_fast::Stem)", "stem_tile::stem_kernel<half, 12>"),
        (
            "void resnet_fast::(anonymous namespace)::apply<__nv_bfloat16, 8, true>(int, float (*)(int))",
            "apply<bfloat16, 8, true>",
        ),
        (
            "void cutlass::device_kernel<resnet_fast::sm90::Conv<(resnet_fast::Precision)1, 128, 64, 64>::Kernel>"
            "(resnet_fast::sm90::Conv<(resnet_fast::Precision)1, 128, 64, 64>::Kernel::Params)",
            "sm90::Conv<bf16, 128, 64, 64>",
        ),
    ],
)
def test_names_say_what_distinguishes_kernels(long: str, short: str) -> None:
    assert native.short_name(long) == short


@pytest.mark.parametrize(
    ("kernel", "launch"),
    [
        ("sm90::Conv<tf32, 128, 64, 32>", ("cutlass_conv", "tf32", (128, 64, 32))),
        ("sm90::Gemm<fp16, 128, 128, 64>", ("cutlass_gemm", "fp16", (128, 128, 64))),
        (
            "sm80::conv_bn_act<sm80::VectorTile<bfloat16, 128, 64, 32, 3, 2, 2>>",
            ("implicit_gemm", "bf16", (128, 64, 32, 3)),
        ),
        (
            "stem_tile::stem_kernel<float, 12, stem_tile::Tile<float, 12, 7>>",
            ("stem", "tf32", (12, 7)),
        ),
        ("elementwise<half, 8, Add>", None),
    ],
)
def test_kernels_are_found_among_those_that_the_module_lists(kernel: str, launch: native.Launch | None) -> None:
    assert native.launch_of_symbol(kernel) == launch


def test_shared_memory_is_what_the_module_tells() -> None:
    module = SimpleNamespace(
        conv_bn_act_kernels=lambda: [_LISTED], stem_shared_bytes=lambda precision, c, rows: 1000 * c + rows
    )
    told = native.dynamic_shared(module)
    assert told["implicit_gemm", "fp16", (64, 64, 32, 4)] == 49152
    assert told["stem", "bf16", (12, 7)] == 3007
    assert told["stem", "tf32", (16, 3)] == 4003


# --- what is wrong


@pytest.mark.parametrize(
    ("kernel", "found", "missing"),
    [
        ("sm80::conv_bn_act<sm80::VectorTile<half, 1>>", {"HMMA", "LDSM", "STG.128"}, "no LDGSTS"),
        ("sm90::Conv<fp16, 1>", {"HGMMA", "UTMALDG", "UTMASTG"}, "no UTMALDG.IM2COL"),
        ("sm90::Gemm<fp16, 1>", {"UTMALDG", "UTMASTG", "HMMA"}, "no HGMMA"),
        ("slice_moments<half, 8>", {"LDG"}, "no LDG.128"),
        ("apply<bfloat16, 8, true>", {"LDG.128", "STG"}, "no STG.128"),
        ("elementwise<float, 4, Add>", {"STG.128", "LDG"}, "no LDG.128"),
        ("pool_and_multiply<half, true>", {"LDG.128"}, "no HMMA"),
    ],
)
def test_a_kernel_without_its_instructions_is_wrong(kernel: str, found: set[str], missing: str) -> None:
    wrong = native.faults("sm_90a", kernel, compiled(found=found))
    assert len(wrong) == 1
    assert wrong[0].startswith(f"sm_90a {kernel} has ")
    assert missing in wrong[0]


@pytest.mark.parametrize("changes", [{"stack": 8}, {"local": 16}, {"found": {"STL"}}, {"found": {"LDL"}}])
def test_spills_are_wrong(changes: dict[str, Any]) -> None:
    assert "spills" in native.faults("sm_80", "merge_sums", compiled(**changes))[0]


@pytest.mark.parametrize("instruction", ["FMNMX", "HMNMX2", "FMNMX3"])
def test_a_maximum_that_drops_nan_is_wrong(instruction: str) -> None:
    assert f"drops NaN: {instruction}" in native.faults("sm_80", "any", compiled(found={instruction}))[0]
    assert not native.faults("sm_80", "any", compiled(found={f"{instruction}.NAN"}))


def test_one_element_at_a_time_needs_no_wide_access() -> None:
    assert not native.faults("sm_80", "elementwise<half, 1, Add>", compiled(found={"LDG", "STG"}))


# --- the table


ROWS = {
    ("sm_80", "apply<half, 8, true>"): ("40", "0", "LDG.128 STG.128"),
    ("sm_90a", "sm90::Conv<fp16, 128, 64, 64>"): ("101", "98816", "HGMMA UTMALDG.IM2COL UTMASTG"),
}


def test_table_holds_what_was_written_and_nothing_else_remains(tmp_path: Path) -> None:
    path = tmp_path / "resources.csv"
    native.write_table(path, "13.0", ROWS)
    assert native.read_table(path) == ("13.0", ROWS)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "arch,kernel\n", "# nvcc 13.0; x\narch,kernel,registers\n"])
def test_another_file_is_refused_as_a_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "resources.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"resources\.csv is no table of resources"):
        native.read_table(path)


def test_differences_name_the_kernel_and_what_changed() -> None:
    apply, conv = ROWS
    changed = {apply: ("48", "0", "LDG.128 STG.128"), conv: ROWS[conv]}
    assert native.differences(ROWS, changed, ()) == ["sm_80 apply<half, 8, true>: registers 40 -> 48"]
    assert native.differences({}, ROWS, ())[0] == "sm_80 apply<half, 8, true>: not in the table"
    assert native.differences(ROWS, {conv: ROWS[conv], ("sm_80", "x"): ("1", "0", "")}, ()) == [
        "sm_80 apply<half, 8, true>: in the table only", "sm_80 x: not in the table",
    ]  # fmt: skip


def test_only_kernels_that_the_module_does_not_have_may_be_missing() -> None:
    apply, conv = ROWS
    other = ("sm_90a", "apply<half, 8, true>")
    committed, now = {**ROWS, other: ROWS[apply]}, {apply: ROWS[apply], other: ROWS[apply]}
    assert not native.differences(committed, now, ())
    told = {("cutlass_conv", "fp16", (128, 64, 64)): 0}
    assert native.differences(committed, now, told) == [f"{conv[0]} {conv[1]}: in the table only"]
    assert not native.differences(ROWS, {apply: ROWS[apply]}, told)  # built for sm_80 only


def test_committed_table_is_whole_and_has_no_faults() -> None:
    made_with, committed = native.read_table(native.table_path())
    assert made_with.split(".")[0].isdecimal()
    assert {arch for arch, _ in committed} == set(native.ARCHITECTURES)
    for arch in native.ARCHITECTURES:
        kernels = [kernel for each, kernel in committed if each == arch]
        for begin, _ in native._NEEDED:
            hopper = begin.startswith("sm90::")
            assert any(kernel.startswith(begin) for kernel in kernels) == (arch == "sm_90a" or not hopper), begin
    for (arch, kernel), (registers, shared, instructions) in committed.items():
        assert 0 < int(registers) <= 255
        assert 0 <= int(shared) <= (227 if arch == "sm_90a" else 163) * 1024
        assert not native.faults(arch, kernel, compiled(found=set(instructions.split())))


@pytest.mark.parametrize("argument", ["nowhere", "."])
def test_no_module_is_said(argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        native.main([str(tmp_path / argument)])
    assert "holds, no _C" in capsys.readouterr().err
