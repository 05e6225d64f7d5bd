"""`autobatch gpus` and `autobatch doctor`: what there is here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobatch.cli.output import write_json, write_view
from autobatch.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from autobatch.gpu.catalogue import Card

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    gpus = commands.add_parser(
        "gpus",
        help="cards here, and cards that can be emulated",
        allow_abbrev=False,
        description="List the cards that NVML sees here, and those of the catalogue, which --emulate takes.",
    )
    doctor = commands.add_parser(
        "doctor",
        help="what works here and what does not, with the mend",
        allow_abbrev=False,
        description="Look at everything that a probe needs. Exits 0 where one can run here, real or emulated, else 69.",
    )
    for parser, run in ((gpus, run_gpus), (doctor, run_doctor)):
        parser.add_argument(
            "--format", choices=("table", "json"), default="table", help="how it is printed (default table)"
        )
        parser.set_defaults(run=run)


def run_gpus(parsed: argparse.Namespace) -> int:
    """List the cards."""
    from autobatch.gpu.catalogue import load_catalogue
    from autobatch.gpu.presence import find_presence
    from autobatch.jsonform import to_json_form
    from autobatch.present.inventory import cards_view

    _refuse_command(parsed, "gpus")
    presence = find_presence()
    cards = load_catalogue()
    if parsed.format == "table":
        write_view(cards_view(presence, cards))
        return 0
    write_json(
        {
            "present": to_json_form(presence.cards),
            "problem": presence.problem or None,
            "can_be_emulated": [_card_form(card) for card in cards],
        }
    )
    return 0


def _card_form(card: Card) -> dict[str, object]:
    from autobatch.gpu.catalogue import working_aliases

    return {
        "name": card.name,
        "nvml_name": card.nvml_name,
        "aliases": list(working_aliases(card)),
        "nvml_total_bytes": card.nvml_total_bytes,
        "cuda_total_bytes": card.cuda_total_bytes,
        "compute_capability": "{}.{}".format(*card.compute_capability),
        "sm_count": card.sm_count,
    }


def run_doctor(parsed: argparse.Namespace) -> int:
    """Say what works here and what to do about the rest."""
    from autobatch.doctor import examine, has_way_to_probe
    from autobatch.jsonform import to_json_form
    from autobatch.present.inventory import findings_view

    _refuse_command(parsed, "doctor")
    findings = examine()
    can_probe = has_way_to_probe(findings)
    if parsed.format == "json":
        write_json({"can_probe": can_probe, "findings": to_json_form(findings)})
    else:
        write_view(findings_view(findings, can_probe=can_probe))
    return 0 if can_probe else 69


def _refuse_command(parsed: argparse.Namespace, name: str) -> None:
    if parsed.command is not None:
        raise UsageError(f"autobatch {name} takes no command after --")
