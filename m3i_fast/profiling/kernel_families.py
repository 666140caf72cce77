"""Families of kernels and operators by their names, and names that two runs have in common."""

from __future__ import annotations

import re

from m3i_fast.op_registry import OPS, OpSpec

FAMILIES = {
    "gemm": "Matrix products and convolutions",
    "attention": "Attention",
    "norm": "Normalisation",
    **{op.name: op.title for op in OPS},
    "elementwise": "Elementwise and reductions",
    "memcpy": "Copies",
    "comm": "Communication",
    "other": "Other",
}


def _of_op(op: OpSpec) -> str:
    """Return the pattern of an op's operators and kernels, and of its autograd functions."""
    own = rf"m3i\w*[:_]+{op.name}|\b{op.name}_(\w+_)?kernel"
    return f"{own}|{op.kernels}" if op.kernels else own


# The first pattern that matches decides, so their order counts: names of NCCL's kernels contain
# reductions, those of flash attention and cuDNN the products that they consist of.
_PATTERNS = {
    "comm": r"nccl|c10d::|gloo|all_?reduce|all_?gather|reduce_?scatter|nvshmem|_SumOverRanks",
    **{op.name: _of_op(op) for op in OPS},
    "memcpy": r"memcpy|memset|^aten::(copy_|_to_copy|clone|contiguous)$",
    "attention": r"flash_|fmha|attention|sdpa",
    "norm": r"layer_?norm|batch_?norm|group_?norm|rms_?norm|rsqrt|bn_(fw|bw)|\bln_(fwd|bwd)",
    "gemm": r"gemm|cutlass|xmma|nvjet|wgmma|winograd|implicit_convolve|convolve|fprop|dgrad|wgrad"
    r"|^aten::(mm|bmm|addmm|baddbmm|matmul|linear|addmv|mv|dot|einsum|_scaled_mm|convolution"
    r"|_convolution|convolution_backward|mkldnn_\w+|thnn_conv2d|slow_conv\w*|addbmm)$|gemv|mkldnn",
    "elementwise": r"elementwise|reduce_kernel|triton_(poi|red|per)|multi_tensor_apply|softmax"
    r"|_foreach_|_fused_adam|loss|cat_?array|chunk_cat|split_with_sizes_copy|^aten::(add|sub|rsub|mul|div|addcmul|addcdiv"
    r"|lerp|exp|log|sqrt|pow|neg|abs|sigmoid|tanh|gelu|relu|silu|where|clamp|maximum|minimum"
    r"|sum|mean|var|std|max|min|amax|amin|argmax|norm|linalg_vector_norm|logsumexp|fill_|zero_"
    r"|cat|stack|gt|lt|ge|le|eq|ne|isfinite|bitwise_\w+|logical_\w+|masked_fill|cumsum|square"
    r"|gelu_backward|threshold_backward|arange|cos|sin|bernoulli|erf)_?$",
}
_COMPILED = {family: re.compile(pattern, re.IGNORECASE) for family, pattern in _PATTERNS.items()}


def family(name: str) -> str:
    """Return the key of FAMILIES for a profiler's name, template arguments included."""
    for key, pattern in _COMPILED.items():
        if pattern.search(name):
            return key
    return "other"


def normalised(name: str) -> str:
    """Return the name without return type, template arguments, parameters and running numbers.

    A kernel then has the same name for another dtype, shape or build.
    """
    short = re.sub(r"^void\s+", "", name.split(", op_id")[0].strip())
    short = _without_brackets(short.replace("(anonymous namespace)::", ""))
    if short.startswith("triton_"):
        return re.sub(r"_\d+$", "", short)
    return short


def _without_brackets(name: str) -> str:
    """Return what is outside <...> and (...); `operator<` would be cut, but no kernel has it."""
    kept, depth = [], 0
    for letter in name:
        if letter in "<(":
            depth += 1
        elif letter in ">)":
            depth -= 1
        elif depth == 0:
            kept.append(letter)
    return "".join(kept).strip() or name
