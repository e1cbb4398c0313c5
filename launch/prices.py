"""What machines cost an hour, by list prices or by the price of a chip that the user gives."""

import argparse

from bipe_jax import hardware
from bipe_jax.errors import UserError


def add_flag(parser: argparse._ActionsContainer) -> None:
    """Adds --price."""
    parser.add_argument(
        "--price", type=float, help="dollars an hour of a chip or GPU, instead of the listed"
    )


def check(price: float | None) -> None:
    """Raises UserError if --price makes no sense."""
    if price is not None and not price >= 0:
        raise UserError(f"--price={price:g} must be dollars an hour of a chip or GPU, such as 1.2")


def rate(slice_: hardware.Slice, price: float | None) -> float | None:
    """Dollars an hour of the slices; `price`, of a chip, is the listed one if it is None."""
    price = slice_.chip.price if price is None else price
    return None if price is None else price * slice_.chips * slice_.slices


def of_slice(slice_: hardware.Slice, price: float | None, cheaper: bool) -> str:
    """The price of slices in a line.

    Args:
      price: as `rate`. cheaper: whether they are of a tier below the list price.
    """
    return _line(
        slice_.name, slice_.chips * slice_.slices, "chips", rate(slice_, price), price, cheaper
    )


def of_gpus(name: str, count: int, price: float | None, cheaper: bool) -> str:
    """The price of GPUs in a line; none is listed. Arguments as `of_slice`."""
    return _line(name, count, "GPUs", None if price is None else price * count, price, cheaper)


def _line(
    name: str, count: int, unit: str, dollars: float | None, price: float | None, cheaper: bool
) -> str:
    if dollars is None:
        return f"{name}: {count} {unit}, whose price is not known (--price=DOLLARS sets it)"
    source = "--price" if price is not None else hardware.PRICES
    line = f"{name}: {count} {unit} x ${dollars / count:.2f} = ${dollars:,.2f} an hour ({source}"
    return line + ("; spot and flex-start cost less)" if cheaper else ")")
