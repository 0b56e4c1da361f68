"""The commands `moonflower privacy ...`: parse, ask, print. Each imports what it needs when it runs."""

import click


@click.group()
def privacy() -> None:
    """Plan a run's privacy before it, and state what it guaranteed after it.

    Example: moonflower privacy plan --records 2000 --rounds 50 --batch 64 --epsilon 8
    """
