"""The command `diffattn env`: releases, devices and kernels, for a report."""

import importlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..frame import Device, Dtype, UnusedSeed, app, examples, output_option, quiet

KERNELS, THRESHOLDS = "diffattn.kernels.choose", "DIFFATTN_THRESHOLDS"


@app.command(epilog=examples("diffattn env", "diffattn env --json", "diffattn env --device cuda --dtype bfloat16"))
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seed: UnusedSeed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path | None, output_option("Also write it as JSON.")] = None,
) -> None:
    """Show releases, extras, devices, and the kernels that run here: paste it into a report.

    No names of users and no paths are in it.
    """
    wrong = import_kernels()
    from diffattn.files.writing import write_json
    from diffattn.measure.environment import environment, without_paths
    from diffattn.media.outputs import check_file

    from .. import listing
    from ..arguments import parse_device, parse_dtype

    if output is not None:
        check_file(output, overwrite=True)
    where = parse_device(device)
    number = parse_dtype(dtype, where)
    with quiet():
        kernels = listing.kernels(where, number)
    reasons = {own["name"]: own["why_not"] and without_paths(own["why_not"]) for own in kernels}
    on = f"{where}, {str(number).removeprefix('torch.')}"
    found = {**environment(), "kernels": {"on": on, "why_not": reasons, "error": wrong and without_paths(wrong)}}
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))
    if output is not None:
        write_json(output, found)
        typer.echo(f"wrote {output}", err=as_json)


def import_kernels() -> str | None:
    """Import the kernels; where their variable is broken, without it, and give the error that all else ends with."""
    try:
        importlib.import_module(KERNELS)
    except ValueError as error:
        own = os.environ.pop(THRESHOLDS)
        try:
            importlib.import_module(KERNELS)
        finally:
            os.environ[THRESHOLDS] = own
        return str(error)
    return None


def lines(found: dict[str, Any]) -> list[str]:
    """The same as text."""
    cpu, threads, kernels = found["cpu"], found["threads"], found["kernels"]
    memory = "" if cpu["memory_gib"] is None else f", {cpu['memory_gib']} GiB"
    return [
        f"python: {found['python']}, {found['system']}",
        *(f"{name}: {version or 'not installed'}" for name, version in found["packages"].items()),
        *(extra_line(**extra) for extra in found["extras"]),
        f"cpu: {cpu['name']}, {cpu['vectors']}, {cpu['cores']} cores{memory}",
        *(device_line(device) for device in found["devices"]),
        *([] if found["devices"] else ["devices: none but the CPU"]),
        f"torch threads: {threads['compute']} in a call, {threads['interop']} between calls",
        f"kernels ({kernels['on']}):",
        *(f"  {name}: {'no: ' + reason if reason else 'yes'}" for name, reason in kernels["why_not"].items()),
        *([f"  every other command fails: {kernels['error']}"] if kernels["error"] else []),
        "environment variables:" if found["variables"] else "environment variables: none that count",
        *(f"  {name}={value}" for name, value in found["variables"].items()),
    ]


def extra_line(extra: str, package: str, version: str | None) -> str:
    """A package of an extra."""
    return f"{package} (extra {extra}): " + (version or f'not installed: pip install "diffattn[{extra}]"')


def device_line(device: dict[str, Any]) -> str:
    """An accelerator."""
    memory = "" if device["memory_gib"] is None else f", {device['memory_gib']} GiB"
    capability = f", capability {device['capability']}" if "capability" in device else ""
    return f"{device['device']}: {device['name']}{memory}{capability}"
