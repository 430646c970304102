"""Closeness that scales with the precision at hand: errors against a float64 oracle.

A result passes when, row by row (a row is the last dimension), its largest error is at most twice
that of a same-precision reference plus one rounding unit of the result's dtype at the row's size.
"""

import torch

from twilight_tilelang.reference.validate import check_tensor


def row_errors(got: torch.Tensor, oracle: torch.Tensor) -> torch.Tensor:
    """Largest |got - oracle| of every row, [...] float64; NaN where `got` or `oracle` holds NaN.

    Equal infinities differ by 0.
    """
    got, oracle = got.to(torch.float64), oracle.to(torch.float64)
    return torch.where(got == oracle, 0.0, (got - oracle).abs()).amax(dim=-1)


def rounding_unit(oracle: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """eps(dtype) times the largest finite magnitude of every row of `oracle`, [...] float64."""
    magnitude = oracle.to(torch.float64).abs()
    magnitude = torch.where(magnitude.isfinite(), magnitude, 0.0)
    return torch.finfo(dtype).eps * magnitude.amax(dim=-1)


def assert_close(
    got: torch.Tensor,
    same_precision: torch.Tensor,
    oracle: torch.Tensor,
    name: str,
    *,
    unit_dtype: torch.dtype | None = None,
    slack: torch.Tensor | float = 0.0,
) -> None:
    """Assert error(got) <= 2 error(same_precision) + one rounding unit, in every row.

    Args:
        got: the result under test, at least one dimension.
        same_precision: the reference's result at the same precision, same shape.
        oracle: the float64 result, same shape.
        name: of the tensor, for the message.
        unit_dtype: dtype of the rounding unit (None: that of `got`).
        slack: error allowed beside these, for all rows or one for each.

    Raises:
        AssertionError: the worst row, with both errors. NaN never passes.
        ValueError: shapes differ, or the oracle is not float64.
    """
    check_tensor(f"{name} (oracle)", oracle, tuple(got.shape), (torch.float64,))
    check_tensor(f"{name} (same precision)", same_precision, tuple(got.shape), (got.dtype,))
    if got.numel() == 0:
        return
    error = row_errors(got, oracle)
    reference_error = row_errors(same_precision, oracle)
    unit = rounding_unit(oracle, got.dtype if unit_dtype is None else unit_dtype)
    allowed = 2 * reference_error + unit + slack
    failed = ~(error <= allowed) | allowed.isinf()  # a comparison with NaN is False
    if not bool(failed.any()):
        return
    excess = torch.where(failed, (error - allowed).nan_to_num(nan=float("inf")), -float("inf"))
    worst = int(excess.argmax())
    row = tuple(int(index) for index in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{name}: {int(failed.sum())} of {failed.numel()} rows too far from float64; worst row "
        f"{row}: error {float(error.flatten()[worst]):.3e}, same-precision reference "
        f"{float(reference_error.flatten()[worst]):.3e}, rounding unit "
        f"{float(unit.flatten()[worst]):.3e}, allowed {float(allowed.flatten()[worst]):.3e}"
    )
