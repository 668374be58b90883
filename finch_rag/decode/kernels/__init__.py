"""Triton kernels of a decoding step, see `finch_rag.fused_step`."""
