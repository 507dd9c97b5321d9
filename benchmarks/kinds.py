"""Kinds of operation that a step of ours and one of torch have in common: see `operations`."""

from __future__ import annotations

import re

PRODUCTS = "products with weights, logits'"
ATTENTION = "attention: its products and softmax"
COPIES = "copies; reads and writes of layers' stacks"
REST = "elementwise, reductions and the rest"
KINDS = (PRODUCTS, ATTENTION, COPIES, REST)


def of(operation: str, place: str, shape: str) -> str:
    """Of one of our operations, as `costs.Cost` has it."""
    inside = re.search("attention(,|$)", place)
    if operation == "product":
        return ATTENTION if inside and " of " in shape else PRODUCTS
    if operation in ("copy", "read from a stack", "write to a stack"):
        return COPIES
    return ATTENTION if inside and operation in ("elementwise", "reduction") else REST


def of_torch(name: str) -> str:
    """Of one of torch's operations."""
    name = name.removeprefix("aten::")
    if name in ("mm", "addmm"):
        return PRODUCTS
    if name.startswith(("_scaled_dot_product", "_softmax")) or name in ("bmm", "baddbmm"):
        return ATTENTION
    return COPIES if name in ("copy_", "clone", "cat", "fill_", "zero_") else REST
