"""What a site allows, in words: its policy as its own people read it, without the coordinator."""

from client.site import Site


def describe(site: Site) -> list[str]:
    """Say each limit of site.toml in a line. It is for the site: some of it never leaves."""
    own, data = site.privacy, site.dataset
    connected = site.coordinator
    lines = [
        f"site {site.name}, dataset {data.id}: about {data.units} {data.unit}s, {data.validation:.0%} of them for validation only",
        f"unit of privacy, for the dataset's life: {_unit(site)}",
        f"labels that a record can have: {', '.join(data.labels)}",
        f"in the dataset's whole life, over all runs: epsilon {own.max_epsilon:g} at delta {own.delta:g} for each {data.unit}",
        f"in one run: epsilon {own.max_run_epsilon:g}, delta at most {own.delta:g}",
        f"noise: at least {own.min_noise_multiplier:g} times the clipping norm in every step and every histogram",
        f"answers in the dataset's life: {'no limit of their own' if own.max_releases is None else f'at most {own.max_releases}'}",
        f"models: {_names(own.models, 'none, so that no run can begin; name those that you have looked at')}",
        f"tasks: {_names(own.tasks, 'none')}",
    ]
    if connected:
        lines.append(f"coordinator: {connected.name} at {connected.address}, and runs of no other")
    lines.append(f"coordinators' names: {_names(own.coordinators, 'none')}")
    if own.allow_non_private:
        lines.append("runs WITHOUT privacy are allowed (allow_non_private): one ends the dataset's promise for ever")
    if own.allow_device_noise:
        lines.append("noise from the accelerator's own generator is allowed (allow_device_noise): quicker, no cipher")
    if data.shares_no_records_with:
        lines.append(f"by the site's word it shares no {data.unit} with: {', '.join(data.shares_no_records_with)}")
    lines.append("limits hold at the site, before any work and again before each answer; a retry gets the same bytes")
    return lines


def _unit(site: Site) -> str:
    if site.dataset.unit_column is None:
        return "the record; name the column that says whose a record is (unit_column) to make it the person"
    return f"the person, with all their records, as column {site.dataset.unit_column!r} names them"


def _names(names: tuple[str, ...], nothing: str) -> str:
    if not names:
        return nothing
    return "any" if names == ("*",) else ", ".join(names)
