"""The Triton kernels compile ahead of time, without a GPU; the report on their machine code.

`make resources` compiles every variant, or a few that cover every pair of choices. Tested here are
the list that it works from, one variant of each kernel, and code that the report must refuse.
"""

from __future__ import annotations

import itertools
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from machine_code import report, sass

from emp_fast.backends._triton_launch import INTERPRETED

if find_spec("triton") is None or INTERPRETED:
    pytest.skip("Triton's compiler is not at hand", allow_module_level=True)

import triton
from machine_code.triton_compile import CAPABILITIES, Compiled, compile_ahead, source_of
from machine_code.triton_variants import Variant, covering, every_variant, kernels
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from emp_fast.backends.triton import TritonBackend


@pytest.fixture(scope="module")
def variants() -> tuple[Variant, ...]:
    return every_variant()


def test_every_kernel_is_among_the_variants(variants: tuple[Variant, ...]) -> None:
    assert {variant.kernel for variant in variants} == set(kernels())


def test_every_option_is_among_the_variants(variants: tuple[Variant, ...]) -> None:
    """Both values of each flag, every pointer that may be absent, every dtype and alignment."""
    in_steps = [v.choices() for v in variants if v.kernel.endswith("score_rows")]
    alone = ("weight_sum_ptr", "grad_ptr", "row_scale_ptr", "indices_ptr", "variance_ptr")
    for names, optional in (
        (("score_tile.score_tile", "score_loop.score_loop"), alone),
        (("score_tile.gradient_tile", "score_loop.gradient_loop"), ("weight_sum_ptr",)),
    ):
        scoring = [v.choices() for v in variants if v.kernel in names]
        for flag in ("SOFT", "SMOOTH", "SOFTCAP"):
            assert {choices[flag] for choices in scoring} == {False, True}, flag
        for pointer in ("weight_ptr", *optional):
            assert {choices[pointer] is None for choices in scoring} == {False, True}, pointer
        pairs = {(choices["logits_ptr"], choices["ALIGN"]) for choices in scoring}
        assert pairs == {("*fp32", align) for align in (1, 2, 4)} | set(
            itertools.product(("*fp16", "*bf16"), (1, 2, 4, 8))
        )
    assert {choices["grad_ptr"] is None for choices in in_steps} == {False, True}
    assert {(choices["ROWS"], choices["warps"]) for choices in in_steps} == {
        *((rows, 1) for rows in (16, 8, 4, 2, 1)),
        *((1, warps) for warps in (2, 4, 8)),
    }
    for name, warps in (("score_loop", {1, 4, 8}), ("gradient_loop", {4, 8})):
        loops = [v.choices() for v in variants if v.kernel == f"score_loop.{name}"]
        assert {choices["warps"] for choices in loops} == warps
        for flag in ("SHIFTED", "SHIFTED_ALIKE"):
            assert {choices[flag] for choices in loops} == {False, True}, flag
    parts = [variant.choices() for variant in variants if variant.kernel.endswith("part_sums")]
    assert {choices["warps"] for choices in parts} == {4, 8}
    assert {choices["SHIFTED"] for choices in parts} == {False, True}


@pytest.mark.parametrize("row_kernels", TritonBackend.row_kernel_names)
def test_every_choice_of_row_kernels_launches_what_is_among_the_variants(
    row_kernels: str, variants: tuple[Variant, ...]
) -> None:
    chosen = every_variant(row_kernels)
    assert set(chosen) <= set(variants)
    in_steps = [v.choices() for v in chosen if v.kernel.endswith("score_rows")]
    taken = {(choices["logits_ptr"], choices["grad_ptr"] is not None) for choices in in_steps}
    scores = {(kind, False) for kind in ("*fp32", "*fp16", "*bf16")}
    halves = {("*fp16", True), ("*bf16", True)}
    wanted = {
        "auto": scores | halves,
        "plain": set(),
        "stepped": scores | halves | {("*fp32", True)},
    }
    assert taken == wanted[row_kernels]


def test_the_few_show_every_pair_of_choices(variants: tuple[Variant, ...]) -> None:
    def pairs(of: list[Variant] | tuple[Variant, ...]) -> set[object]:
        return {
            (variant.kernel, pair)
            for variant in of
            for pair in itertools.combinations(sorted(variant.choices().items(), key=str), 2)
        }

    some = variants[::7] + tuple(v for v in variants if "score_tile." not in v.kernel)
    few = covering(some)
    assert len(few) < 350
    assert pairs(few) == pairs(some)


def test_signatures_are_those_that_a_launch_makes(variants: tuple[Variant, ...]) -> None:
    """Triton's own binder, given arguments of these types, asks for the same binary."""
    of_type = {
        "*fp64": torch.float64,
        "*fp32": torch.float32,
        "*fp16": torch.float16,
        "*bf16": torch.bfloat16,
        "*u1": torch.bool,
        "*i32": torch.int32,
        "*i64": torch.int64,
    }
    backend = make_backend(GPUTarget("cuda", 90, 32))
    for variant in covering(variants[::50]):
        choices, function = variant.choices(), variant.function()
        bind = triton.runtime.jit.create_function_from_signature(
            function.signature, function.params, backend
        )
        arguments = []
        for parameter in function.params:
            if parameter.is_constexpr:
                arguments.append(choices[parameter.name])
            elif parameter.name in choices:
                kind = choices[parameter.name]
                arguments.append(None if kind is None else torch.empty(4, dtype=of_type[kind]))
            else:
                arguments.append(1.0 if parameter.annotation_type == "fp32" else 1)
        _, specialization, _ = bind(*arguments)
        signature, constants = source_of(variant)
        names = [parameter.name for parameter in function.params]
        assert [kind for kind, _ in specialization] == list(signature.values()), str(variant)
        for name, (kind, key) in zip(names, specialization, strict=True):
            if kind == "constexpr":
                assert constants[name] == key, (str(variant), name)
            else:
                assert not key, (str(variant), name)  # no value and no alignment is known


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles(capability: int, variants: tuple[Variant, ...]) -> None:
    """One variant of each, with the most options; the resource report compiles the others."""
    for name in kernels():
        most = max(
            (variant for variant in variants if variant.kernel == name),
            key=lambda variant: len(str(variant)),
        )
        assert compile_ahead(most, capability).startswith(b"\x7fELF"), str(most)


def test_a_translation_serves_every_capability(
    variants: tuple[Variant, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the report compiles: the cubins are those of a translation for each capability."""
    for name in ("score_rows.score_rows", "score_tile.gradient_tile", "split_rows.part_sums"):
        variant = next(v for v in variants if v.kernel == name)
        compiled = Compiled(variant)
        for capability in CAPABILITIES:
            monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "once"))
            once = compiled.cubin(capability)
            monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "anew"))
            assert once == compile_ahead(variant, capability), f"{capability} {variant}"


# ---- the report ---------------------------------------------------------------------------------

PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry rows_looped(.param .u64 logits, .param .u32 count) {
  .local .align 16 .b8 frame[64];
  .reg .b64 %rd<6>; .reg .b32 %r<8>; .reg .f32 %f<4>; .reg .pred %p<2>;
  ld.param.u64 %rd1, [logits];
  ld.param.u32 %r1, [count];
  mov.u32 %r2, 0;
  mov.f32 %f1, 0f00000000;
again:
  ld.global.f32 %f2, [%rd1];
  add.f32 %f1, %f1, %f2;
  add.u64 %rd1, %rd1, 4;
  add.u32 %r2, %r2, 1;
  and.b32 %r3, %r2, 15;
  mul.wide.u32 %rd2, %r3, 4;
  mov.u64 %rd3, frame;
  add.u64 %rd4, %rd3, %rd2;
  st.local.f32 [%rd4], %f1;
  setp.lt.u32 %p1, %r2, %r1;
  @%p1 bra again;
  mul.wide.u32 %rd5, %r1, 4;
  and.b64 %rd5, %rd5, 60;
  add.u64 %rd4, %rd3, %rd5;
  ld.local.f32 %f3, [%rd4];
  st.global.f32 [%rd1], %f3;
  ret;
}
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> sass.Kernel:
    """A kernel that walks a row 4 bytes at a time and keeps an array on its stack."""
    folder = tmp_path_factory.mktemp("ptx")
    source, cubin = folder / "bad.ptx", folder / "bad.cubin"
    source.write_text(PTX)
    command = [sass.find_tool("ptxas"), "-arch=sm_80", str(source), "-o", str(cubin)]
    subprocess.run(command, check=True, timeout=60)
    (kernel,) = sass.kernels_of(cubin)
    return kernel


def test_machine_code_is_read(bad: sass.Kernel) -> None:
    assert (bad.name, bad.architecture) == ("rows_looped", "sm_80")
    assert bad.registers > 0
    assert bad.stack >= 64
    loads = [access for access in bad.accesses if access.reads_global]
    assert loads
    assert {access.bits for access in loads} == {32}
    assert max(access.depth for access in loads) == 1  # the loop, and what unrolling left over
    assert [access.depth for access in bad.accesses if access.writes_global] == [0]
    assert {access.opcode.split(".")[0] for access in bad.accesses if access.is_local} == {
        "LDL",
        "STL",
    }


def test_a_stack_and_local_accesses_and_missing_vectors_are_problems(bad: sass.Kernel) -> None:
    problems = "\n".join(report.check(bad).problems)
    assert "a stack frame of" in problems
    assert "accesses to local memory" in problems
    assert "0 accesses of 128 bits" in problems


def test_a_branch_on_a_uniform_predicate_falls_through_too() -> None:
    """As the newest architectures have it: else the loop around it would end there."""
    steps, labels = sass._steps(
        "\n".join(
            [
                "test:",
                ".L_x_0:",
                "        /*0000*/                   LDG.E.128 R4, desc[UR26][R2.64] ;",
                "        /*0010*/                   BRA.U !UP0, `(.L_x_1) ;",
                "        /*0020*/                   STG.E.128 desc[UR26][R2.64], R4 ;",
                ".L_x_1:",
                "        /*0030*/                   BRA.U UP1, `(.L_x_0) ;",
                "        /*0040*/                   EXIT ;",
            ]
        )
    )
    assert sass._depths(steps, labels) == [1, 1, 1, 1, 0]


def access(opcode: str, source: str, depth: int = 1) -> sass.Access:
    return sass.Access(opcode, depth, source)


WIDE = access("LDG.E.128.CONSTANT", "return __ldg(static_cast<const uint4*>(address));")
STORE = access(
    "STG.E.EF.128", "__stcs(reinterpret_cast<uint4*>(row + column), pack<T>(x)); < store_vector()"
)


def kernel(*accesses: sass.Access) -> sass.Kernel:
    return sass.Kernel("rows_looped<float, 32, false, true>", "sm_90a", 64, 0, 0, accesses)


def test_a_kernel_as_it_should_be_has_no_problem() -> None:
    assert report.check(kernel(WIDE, STORE)).problems == ()


def test_a_kernel_of_scores_alone_stores_no_gradient() -> None:
    alone = kernel(WIDE)._replace(name="rows_looped<float, 32, false, false>")
    assert report.check(alone).problems == ()
    assert len(report.check(kernel(WIDE)).problems) == 1


def test_a_few_bytes_on_the_stack_are_allowed_outside_loops_where_the_caller_says_so() -> None:
    spilled = kernel(WIDE, STORE, access("STL", "", depth=0))._replace(stack=16)
    assert report.check(spilled, stack=16).problems == ()
    assert report.check(spilled, stack=8).problems == ("a stack frame of 16 bytes",)
    assert len(report.check(spilled).problems) == 2
    looped = spilled._replace(accesses=(WIDE, STORE, access("STL", "")))
    assert report.check(looped, stack=16).problems == ("1 accesses to local memory",)


@pytest.mark.parametrize(
    ("accesses", "problem"),
    [
        ((WIDE, STORE, access("STL", "")), "local memory"),
        ((WIDE, STORE, WIDE._replace(opcode="LDG.E.64")), "64 bits by"),
        ((WIDE._replace(depth=0), STORE), "within 1 loops"),
        ((WIDE, STORE._replace(opcode="STG.E")), "32 bits by"),
        ((WIDE, STORE, access("LDG.E", "sum += logits[column];")), "nothing explains"),
    ],
)
def test_each_rule_refuses(accesses: tuple[sass.Access, ...], problem: str) -> None:
    assert any(problem in found for found in report.check(kernel(*accesses)).problems)


def test_the_table_counts_variants_and_problems() -> None:
    findings = [report.check(kernel(WIDE, STORE)), report.check(kernel(WIDE))]
    line = report.table(findings).splitlines()[-1]
    assert line == "| rows_looped | sm_90a | 2 | 64 | 0 | 0 | 0 | 1 |"


def test_sources_are_found_again_by_the_end_of_their_path(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("one\n  two\n")
    assert sass._text("/gone/elsewhere/csrc/a.cu", 2, (tmp_path,)) == "two"
    assert sass._text("/gone/b.cu", 3, (tmp_path,)) == "/gone/b.cu:3"
