"""Losses and selection operators of the LEAD engine: Triton kernels on a GPU, plain PyTorch on a CPU.

Needs torch and, on a GPU, triton.

Legend of the shapes: T rows (tokens or response positions), H hidden size, V vocabulary, B sample slots of a
micro-batch, q sketch width, N samples in the pool, K bandit arms, R response rows of a packed micro-batch.

Every operator with kernels is a `torch.library` operator with a fake kernel: it runs under FakeTensorMode and in a
graph of `torch.compile`. On a GPU none reads the device from the host, except where a docstring says so.
"""

from lead_kernels.exp3 import draw_arm, exp3_probabilities, exp3_update
from lead_kernels.gather_batch import PackedBatch, gather_batch
from lead_kernels.grad_inner_product import grad_inner_product
from lead_kernels.gradient_signature import gradient_signature
from lead_kernels.groups_present import groups_present
from lead_kernels.head_module import LinearCrossEntropy
from lead_kernels.head_types import Lora
from lead_kernels.idu_update import idu_update
from lead_kernels.linear_cross_entropy import HeadLoss, linear_cross_entropy
from lead_kernels.pack_plan import PackedPlan, pack_plan, packing_waste
from lead_kernels.segment_reduce import segment_reduce
from lead_kernels.select_topk import select_topk

__all__ = [
    "HeadLoss",
    "LinearCrossEntropy",
    "Lora",
    "PackedBatch",
    "PackedPlan",
    "draw_arm",
    "exp3_probabilities",
    "exp3_update",
    "gather_batch",
    "grad_inner_product",
    "gradient_signature",
    "groups_present",
    "idu_update",
    "linear_cross_entropy",
    "pack_plan",
    "packing_waste",
    "segment_reduce",
    "select_topk",
]
