"""Packed pictures on the real CUDA torch: FlashAttention's kernels, and no wait in a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_fast.benchmarks.launches.trace import split_at_marks
from tests.null_cuda.contract_runtime import of_kind, on_null

PROGRAM = """
from m3i_fast.config.models.vit import vit_s
from m3i_fast.models.transformer.vit import ViT

vit = ViT(vit_s(depth=2, **{options})).cuda().train()
grids = torch.tensor([(3, 5), (4, 4), (14, 7), (1, 1), (10, 12)])
patches = torch.zeros(int(grids.prod(1).sum()), 768, device="cuda")
for step in range(2):
    mark(f"step {{step}}".encode())
    with torch.autocast("cuda", torch.bfloat16):
        encoded = vit.encode_pictures(patches, grids)
    encoded.cells.float().sum().backward()
mark(b"end")
print(json.dumps(list(encoded.cells.shape)))
"""
OPTIONS = {
    "absolute": {"class_token": True},
    "rotary": {"position": "rotary", "num_registers": 4, "activation_checkpointing": "selective"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_of_packed_pictures_waits_for_nothing(tmp_path: Path, name: str) -> None:
    program = PROGRAM.format(options=OPTIONS[name])
    shape, trace = on_null(tmp_path, program, card="a100")
    assert shape == [15 + 16 + 98 + 1 + 120, 384]
    records = {step.name: step.records for step in split_at_marks(trace)}["step 1"]
    kernels = [record["name"] for record in of_kind(records, "launch")]
    # one of each a block, whatever the number of lengths; the result is kept, not computed again
    assert sum("flash_fwd_kernel" in kernel for kernel in kernels) == 2
    assert sum("flash_bwd_dq_dk_dv" in kernel for kernel in kernels) == 2
    assert of_kind(records, "wait") == []
    copies = of_kind(records, "copy")
    assert copies and not [copy for copy in copies if "pageable" in (copy["from"], copy["to"])]
