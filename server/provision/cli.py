"""The command `moonflower provision`: make the kits of a federation, add to them, renew and revoke."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shared.errors import ConfigError

if TYPE_CHECKING:
    from server.provision.federation import Federation


class MakeByDefault(click.Group):
    """A group whose first word may be a federation.toml instead of a command: then the command is `make`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `make` in front of what is no command."""
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = ["make", *args]
        return super().parse_args(ctx, args)


_kits = click.argument("kits", type=click.Path(path_type=Path))
_file = click.argument("file", metavar="FEDERATION.TOML", type=click.Path(path_type=Path))
_site = click.option("--site", metavar="NAME", help="This site.")
_user = click.option("--user", metavar="NAME", help="This user.")


@click.group(cls=MakeByDefault)
def provision() -> None:
    """Make the kits of a federation: certificates, keys, tokens, configuration.

    A kit is a folder and a zip of it, for the coordinator, for each site and for each user. `make` may be left out.

    Example: moonflower provision federation.toml --out kits/
    """


@provision.command()
@_file
@click.option("--out", metavar="DIR", required=True, type=click.Path(path_type=Path), help="A new folder for the kits.")
def make(file: Path, out: Path) -> None:
    """Make all kits of a federation.toml, in a new folder.

    Example: moonflower provision make federation.toml --out kits/
    """
    from server.provision import provisioning

    _tell(provisioning.make(file, out), out)


@provision.command()
@_kits
@_file
def add(kits: Path, file: Path) -> None:
    """Make kits for the sites and users that FEDERATION.TOML names in addition.

    Example: moonflower provision add kits/ federation.toml
    """
    from server.provision import provisioning

    sites, users = provisioning.add(kits, file)
    for name in sites:
        click.echo(f"site {name}: {kits / 'sites' / name}.zip")
    for name in users:
        click.echo(f"user {name}: {kits / 'users' / name}.zip")
    if sites:
        _put(kits, "enrolment.json")
    if users:
        _put(kits, "tokens.json")
    if not sites and not users:
        click.echo(f"{file} names nobody who has no kit yet.")


@provision.command()
@_kits
@click.option("--coordinator", is_flag=True, help="The coordinator: a new key and certificate for it.")
@_site
@_user
@click.option("--days", metavar="N", type=click.IntRange(1, 36500), help="How long certificate or token hold.")
def renew(kits: Path, coordinator: bool, site: str | None, user: str | None, days: int | None) -> None:
    """Give the coordinator a new certificate, a site a new key, or a user a new token.

    A site's old key and a user's old tokens are revoked by that, and stay so.

    Example: moonflower provision renew kits/ --site st-marys
    """
    from server.provision import provisioning

    _one(coordinator=coordinator, site=site, user=user)
    if site is not None:
        if days is not None:
            raise ConfigError("--days: a site's key has no end; leave it out.")
        provisioning.renew_site(kits, site)
        click.echo(f"New key of {site}: hand over {kits / 'sites' / site}.zip; its README says which file to take.")
        _put(kits, "enrolment.json")
    elif user is not None:
        provisioning.renew_user(kits, user, days)
        click.echo(f"New token of {user}: hand over {kits / 'users' / user}.zip.")
        _put(kits, "tokens.json")
    else:
        until = provisioning.renew_coordinator(kits, days)
        click.echo(f"New certificate until {until:%Y-%m-%d}.")
        _put(kits, "server.pem", "server.key")
        click.echo("Then restart the daemon.")


@provision.command()
@_kits
@_site
@_user
def revoke(kits: Path, site: str | None, user: str | None) -> None:
    """Revoke a site's key or a user's token, for good, and delete it in KITS.

    A running coordinator can do the first by itself, at once: moonflower site revoke.

    Example: moonflower provision revoke kits/ --site st-marys
    """
    from server.provision import provisioning

    _one(site=site, user=user)
    if site is not None:
        provisioning.revoke_site(kits, site)
        click.echo(f"The key of {site} is revoked.")
        _put(kits, "enrolment.json")
    elif user is not None:
        provisioning.revoke_user(kits, user)
        click.echo(f"The token of {user} is revoked.")
        _put(kits, "tokens.json")


def _one(**which: object) -> None:
    if sum(bool(value) for value in which.values()) != 1:
        raise ConfigError(f"name exactly one of {', '.join(f'--{name}' for name in which)}.")


def _put(kits: Path, *names: str) -> None:
    files = " and ".join(str(kits / "coordinator" / name) for name in names)
    click.echo(f"It holds once the coordinator has {files}: copy {'it' if len(names) == 1 else 'both'} over the old.")


def _tell(federation: "Federation", out: Path) -> None:
    click.echo(f"Federation {federation.name}. Each kit holds secrets: hand it over by a way that you trust.")
    click.echo(f"  coordinator: {out / 'coordinator'}.zip, for {federation.coordinator.hosts[0]}")
    for site in federation.sites:
        click.echo(f"  site {site.name}: {out / 'sites' / site.name}.zip")
    for user in federation.users:
        click.echo(f"  user {user.name} ({user.role}): {out / 'users' / user.name}.zip")
    click.echo(f"The authority's key, {out / 'authority' / 'ca.key'}, is in no kit: keep {out} off the coordinator.")
