"""`understudy doctor`."""

from rich.console import Console
from rich.markup import escape

from understudy.commands import Refusal
from understudy.doctor import Level, examine

_MARK = {
    Level.GOOD: "[green]✓[/green]",
    Level.LACK: "[yellow]–[/yellow]",
    Level.BAD: "[red]✗[/red]",
}


def doctor() -> None:
    """Say what this computer offers, what is missing, and what to do about it.

    Changes nothing.  Ends with status 0 if guests can run here.

    Example:  understudy doctor
    """
    console = Console(highlight=False, soft_wrap=True)
    findings = examine()
    for finding in findings:
        console.print(
            f"{_MARK[finding.level]} [bold]{finding.topic}[/bold]: {escape(finding.words)}"
        )
        if finding.advice:
            console.print(f"    → {escape(finding.advice)}")
    bad = [finding.topic for finding in findings if finding.level is Level.BAD]
    if bad:
        raise Refusal(f"guests cannot run here until this is put right: {', '.join(bad)}")
    console.print("\nGuests can run here: understudy run --guest hello")
