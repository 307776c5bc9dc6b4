"""In what a run multiplies matrices."""

from __future__ import annotations

import torch

COMPUTE_DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
BFLOAT16_CPUS = ("avx512_bf16", "amx_bf16", "bf16")  # names in torch.cpu.get_capabilities()


def fast_precision(accelerator: str) -> str:
    """Return the precision that a device multiplies matrices fast in: ``bf16-mixed`` or ``32-true``.

    Processors without bfloat16 instructions are three to four times slower in bfloat16 than in float32.

    Args:
        accelerator: as Lightning names it; a GPU that is not here is taken to have bfloat16.
    """
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        fast = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = any(capabilities.get(name) for name in BFLOAT16_CPUS)
    return "bf16-mixed" if fast else "32-true"
