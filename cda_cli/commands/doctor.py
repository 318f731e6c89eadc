"""`cda doctor`."""

from __future__ import annotations

from cda_cli.commands.options import JsonOption


def doctor(as_json: JsonOption = False) -> None:
    """Versions, devices, the backend that would run and why, and the operator checked against its float64 optimum."""
    from cda_cli.console import print_json, show_doctor
    from cda_cli.diagnosis import diagnose
    from cda_cli.errors import CheckFailedError

    diagnosis = diagnose()
    if as_json:
        print_json(diagnosis.as_dict())
    else:
        show_doctor(diagnosis)
    failed = [check for check in diagnosis.checks if not check.passed]
    if failed:
        raise CheckFailedError(
            f"{len(failed)} of {len(diagnosis.checks)} checks of the operator failed; report the output of "
            "`cda doctor --json`"
        )
