"""`mhc-tune keys`: your signing key, and the list of trusted keys."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.ui.options import JsonOption
from cli.ui.output import say, show_json
from tiles.folders import keys_folder
from tiles.pack.signing import forget_key, own_key, trust_key, trusted_keys


def keys(
    trust: Annotated[
        str, typer.Option(metavar="KEY", help='Trust a key: "ed25519:...", or with a note "ed25519:... Alice".')
    ] = "",
    forget: Annotated[str, typer.Option(metavar="KEY", help="No longer trust a key.")] = "",
    json: JsonOption = False,
) -> None:
    """Show your public key and the keys that you trust.

    Compiled code is loaded from packs that one of these keys signed; schedules of other packs are compiled here. Get a
    key from its owner, who sees it with this command, and never from the pack itself.
    """
    if trust:
        say(f"now trusted: {trust_key(trust)}; code that it signed runs with your permissions")
    if forget:
        forget_key(forget)
        say(f"no longer trusted: {forget}")
    own, listed = own_key(create=not (trust or forget)), trusted_keys()
    if json:
        show_json({"folder": str(keys_folder()), "own": own, "listed": listed})
        return
    typer.echo(f"{own}  yours" if own else "you have no key yet: mhc-tune keys or mhc-tune export makes one")
    for key, note in listed.items():
        typer.echo(f"{key}  trusted{f': {note}' if note else ''}")
