"""`fourbit doctor`."""

from __future__ import annotations

import dataclasses
import json

import click

from engine.doctor import examine


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def doctor(as_json: bool) -> int:
    """Show what this machine can do and what is wrong with the set-up; exit 1 when something is."""
    findings = examine()
    problems = [finding for finding in findings if finding.remedy]
    if as_json:
        click.echo(json.dumps({"findings": [dataclasses.asdict(f) for f in findings], "n_problems": len(problems)}))
        return bool(problems)
    for finding in findings:
        click.echo(f"{'!' if finding.remedy else ' '} {finding.topic:10} {finding.text}")
        if finding.remedy:
            click.echo(f"{'':13}-> {finding.remedy}")
    click.echo(f"\n{len(problems)} problem{'s' if len(problems) != 1 else ''} found" if problems else "\nall is well")
    return int(bool(problems))
