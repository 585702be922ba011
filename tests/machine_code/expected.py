"""What the machine code of each kernel must look like, for `report`."""

from __future__ import annotations

from typing import NamedTuple


class Expected(NamedTuple):
    """How wide the accesses from certain source lines must be."""

    kernel: str  # pattern of the kernel's name, and of a Triton variant's choices
    source: str  # pattern of the innermost source lines
    bits: int  # at least
    why: str
    least: int = 0  # at least so many such accesses must exist inside `loops` or more loops
    loops: int = 0
    every: bool = True  # False: `least` of them must be this wide, others may be narrower
    architecture: str = ""  # pattern of the architectures that it holds for


_LOAD_VECTOR = r"static_cast<const uint4\*>\(address\)"
_ROW_KERNELS = r"^(rows_in_registers|rows_looped|row_parts|row_gradients)\b"

#: The first entry that matches an access decides. Accesses that none matches may have any width
#: unless they match `BULK`: they move a few bytes per row or sample, or read a cached table.
EXPECTED = (
    # CUDA
    Expected(_ROW_KERNELS, _LOAD_VECTOR, 128, "logits move by 16 bytes", 1, loops=1),
    Expected(
        r"^flat_gradients<\w+, 4, ",
        _LOAD_VECTOR,
        128,
        "four loads of 16 bytes a thread in flight",
        4,
    ),
    Expected(
        r"^flat_gradients\b",
        r"__stcs\(reinterpret_cast<uint4\*>\(out \+ at",
        128,
        "whole vectors of the gradient move by 16 bytes",
        1,
    ),
    Expected(
        "^scale_elements",
        r"__ldcg\(reinterpret_cast<const uint4\*>\(grad",
        128,
        "the gradient moves by 16 bytes",
        4,
        loops=1,
    ),
    Expected("", _LOAD_VECTOR, 128, "logits move by 16 bytes"),
    Expected("", r"logits\[target\.column\]", 16, "one logit a row"),
    Expected(
        r"^rows_ring\b", r"cp_async16\(to \+ u", 128, "logits are copied by 16 bytes", 1, loops=1
    ),
    Expected(
        r"^rows_in_shared\b",
        r"cp_async16\(to \+ 32",
        128,
        "logits are copied by 16 bytes",
        1,
        loops=1,
    ),
    Expected(
        r"^rows_in_shared<.*, true>",  # with the gradient
        r"__stcs\(reinterpret_cast<uint4\*>\(out \+ window",
        128,
        "whole vectors of the gradient move by 16 bytes",
        1,
        loops=1,
    ),
    *(
        Expected(
            rf"^rows_held<.*, {vectors}, {step}>",
            pattern,
            128,
            what,
            least,
            loops=1,
            architecture=architecture,
        )
        for vectors, least in (("4", 4), ("[68]", 6))
        for step, pattern, what, architecture in (
            (r"\w+", r"cp_async16\(line \+ part", "logits are copied by 16 bytes", ""),
            ("true", r"__stcs\(out, value\)", "the gradient moves by 16 bytes", r"^sm_80$"),
        )
    ),
    Expected(
        r"^rows_held<.*, true>",
        r"bulk_store\(out, written",
        128,
        "the gradient moves by whole rows",
        1,
        loops=1,
        architecture=r"^sm_(?!80$)",
    ),
    Expected(
        r"^(rows_in_registers<.*, true, \w+>|rows_looped<.*, true>"
        r"|(rows_cluster|rows_ring|row_gradients)\b)",
        r"__stcs\(reinterpret_cast<uint4\*>\(row \+ column\)",
        128,
        "whole vectors of the gradient move by 16 bytes",
        1,
        loops=1,
    ),
    Expected("", r"window\.holds\(column \+ e\)", 16, "the ends of a gradient's row"),
    Expected(
        "",
        r"__ldg\(soft \+|effective_target\(a, j",
        32,
        "soft targets have an alignment of their own",
    ),
    Expected(
        r"^(count_scores|mark_bracket|mark_selected)\b",
        r"__ldg\(reinterpret_cast<const uint4\*>\(scores",
        128,
        "scores move by 16 bytes",
        1,
        loops=1,
    ),
    Expected(
        r"^select_few\b",
        r"__ldg\(reinterpret_cast<const uint4\*>\(scores",
        128,
        "scores move by 16 bytes, once",
        1,
    ),
    Expected("", r"if \(first \+ [0-3] < n\)", 32, "the last scores, and those of a slice"),
    Expected("", r"^s\.scores\[sample\] = ", 32, "one sample's state"),
    Expected(
        "^count_(grouped|few_groups)",
        r"scores\[i\]",
        32,
        "each score comes with a group of 8 bytes",
    ),
    Expected("^sample_keys", r"__ldg\(scores \+ at\)", 32, "a random sample"),
    Expected("^mark_bracket", r"__ldg\(scores \+ index\)", 32, "a candidate's score again"),
    Expected("^scale_elements", r"for \(int64_t i = at; i < elements", 16, "the last elements"),
    # Triton
    *(
        Expected(
            rf"^(score_tile|score_rows|mean_loss)\..*\(.*ALIGN_BYTES={align},",
            r"^(raw = tl\.load|tl\.store\(tl\.multiple_of\(out|grad = tl\.load)|address, grad"
            r"|tl\.load\(address, mask=tile\.beside_load",
            8 * align,
            "logits and gradient move by the widest access that fits every row",
            1,
        )
        for align in (2, 4, 8, 16)
    ),
    *(
        Expected(
            rf"^(score_loop\.\w+|split_rows\.part_sums)\({logits}(?!.*(SMOOTH=|SOFT=))",
            r"^values = tl\.load\(origin \+ at\)",
            128,
            "logits move by 16 bytes",
            vectors,
            loops=1,
        )
        for logits, vectors in (("logits=fp32", 4), ("logits=(fp16|bf16)", 2))
    ),
    Expected(
        r"^(score_loop\.|split_rows\.part_sums)",
        r"^values = tl\.load\(origin \+ at\)",
        128,
        "logits move by 16 bytes; weights and soft targets have an alignment of their own",
        2,
        loops=1,
        every=False,
    ),
    Expected("", r"^values = tl\.load\(origin \+ at, mask", 16, "the ends of a row"),
    Expected(
        r"^score_loop\.\w+\((?=.*SHIFTED_ALIKE=).*grad=",
        r"^tl\.store\(grad_row \+ out, value\)",
        128,
        "the gradient moves by 16 bytes where its rows lie as those of the logits do",
        2,
        loops=1,
    ),
    Expected("", r"^tl\.store\(grad_row", 16, "rows of the gradient off the 16-byte grid, or ends"),
    Expected("", r"^tl\.store\(state\.scores \+ index, score, mask=won", 32, "one sample's state"),
    Expected("", r"^near = tl\.load|^tl\.store\(out, value\.to", 16, "the target's vector"),
    Expected("", r"^(x_y|raw_y) = tl\.load", 16, "one logit a row"),
    Expected(
        r"^selection\.mark_scores\(.*ALIGN_BYTES=16",
        r"^score = tl\.load\(address\)",
        128,
        "scores move by 16 bytes",
        4,
    ),
    Expected(
        r"^selection\.",
        r"scores_ptr \+|^score = tl\.load\(address|^key = order_key\(tl\.load\(address",
        32,
        "a slice may lie off the 16-byte grid; 32 lanes read 128 bytes in a row all the same",
    ),
)

#: Kernels whose code is a trap on an architecture that lacks their instructions.
TRAPS = {("rows_cluster", "sm_80")}

#: An access to logits, scores or gradients that nothing in `EXPECTED` matches is an error.
BULK = r"\blogits(_ptr)?\b|\bscores(_ptr)? ?[+\[]|\bgrad(_row|_ptr)?\b ?[+\[]"

#: Bytes that a thread of a Triton kernel may keep on its stack, only outside loops. Triton leaves
#: register allocation to ptxas, which keeps a few results of a row there for the epilogue, rather
#: than have fewer warps resident.
TRITON_STACK = 16


class KnownSpill(NamedTuple):
    """Variants of a Triton kernel that keep more there, or use it in a loop, all the same."""

    variant: str  # regular expression
    architecture: str
    stack: int  # bytes at most


KNOWN_SPILLS = (
    # Three registers in the loop, although ptxas takes no more than 72.
    KnownSpill(
        r"^split_rows\.part_sums\(logits=(bf16|fp16)(?!.*(SMOOTH|SOFTCAP)=).*LANES=128,",
        "sm_100a",
        24,
    ),
    # For the gradient and the state with both options at once.
    KnownSpill(
        r"^score_loop\.score_loop\(.*grad=.*indices=.*SMOOTH=True, SOFTCAP=True,", "sm_90", 24
    ),
)
