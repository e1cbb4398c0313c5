"""What a slice costs, asked before it is rented, and the flags of gcloud that say how it is rented."""

import logging
import re
import sys
from argparse import Namespace
from pathlib import Path

from bipe_jax import hardware
from bipe_jax.errors import UserError
from launch import prices

_LOG = logging.getLogger(__name__)

_FLEX_HOURS = 168  # that flex-start gives at most
_DEADLINE = Path(__file__).with_name("deadline.sh")
RESERVATION = r"(projects/[a-z0-9-]+/reservations/)?[a-z]([-a-z0-9]{0,61}[a-z0-9])?"


def check(args: Namespace) -> None:
    """Raises UserError if the flags of renting make no sense."""
    if args.reservation and not re.fullmatch(RESERVATION, args.reservation):
        raise UserError(
            f"--reservation={args.reservation} must be a name, or projects/P/reservations/NAME"
        )
    prices.check(args.price)
    most = _FLEX_HOURS if args.flex_start else 24 * 365
    if args.max_hours is not None and not 0 < args.max_hours <= most:
        raise UserError(f"--max-hours={args.max_hours:g} must be above 0, and at most {most}")
    if args.max_hours is not None and any(word.startswith("--metadata") for word in args.extra):
        raise UserError(
            "--metadata after -- is not possible with --max-hours, which needs the VM's own"
        )


def flags(args: Namespace, name: str, hours: float | None) -> list[str]:
    """Flags of `gcloud compute tpus queued-resources create`.

    Args:
      name: of the queued resource. hours: after which it is deleted, or None.
    """
    tier = ["--spot"] * args.spot + ["--reserved"] * args.reserved
    if args.reservation:
        tier = [f"--reservation={args.reservation}"]
    seconds = None if hours is None else max(round(hours * 3600), 1)
    if args.flex_start:  # the only tier with a time of Google's own
        own = _FLEX_HOURS * 3600 if seconds is None else seconds
        tier = ["--provisioning-model=flex-start", f"--max-run-duration={own}s"]
    if seconds is None:
        return tier
    metadata = f"--metadata=bipe-name={name},bipe-seconds={seconds}"
    return [*tier, metadata, f"--metadata-from-file=startup-script={_DEADLINE}"]


def bill(slice_: hardware.Slice, price: float | None, seconds: float) -> str:
    """What the slices have cost since they were active, at the price of `prices.rate`."""
    dollars = prices.rate(slice_, price)
    cost = "at an unknown price" if dollars is None else f"${dollars * seconds / 3600:,.2f}"
    return f"{slice_.name} for {seconds / 60:.1f} min, {cost}"


def confirm(slice_: hardware.Slice, args: Namespace) -> None:
    """Shows the price, and asks unless --yes or --dry-run is given.

    Raises:
      UserError: the answer is no, or nobody can be asked.
    """
    _LOG.info(_estimate(slice_, args))
    if args.dry_run or args.yes:
        return
    if not sys.stdin.isatty():
        raise UserError("--yes is needed to rent where nobody can be asked; nothing was launched")
    if input("Rent it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("the answer was no; nothing was launched")


def _estimate(slice_: hardware.Slice, args: Namespace) -> str:
    line = prices.of_slice(slice_, args.price, args.spot or args.flex_start)
    dollars = prices.rate(slice_, args.price)
    if dollars is None:
        return line
    if args.max_hours is None:
        return f"{line}; no --max-hours: until it is deleted"
    return f"{line}; at most ${dollars * args.max_hours:,.2f} in {args.max_hours:g} h on the slice"
