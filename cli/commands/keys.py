"""`mhc-tune keys`: the key that your packs are signed with, and those of others whose packs you trust."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.ui.options import JsonOption
from cli.ui.output import say, show_json
from tiles.pack.signing import forget_key, keys_folder, own_key, trust_key, trusted_keys


def keys(
    trust: Annotated[
        str, typer.Option(metavar="KEY", help='List a key: "ed25519:..." or, with a note, "ed25519:... Alice".')
    ] = "",
    forget: Annotated[str, typer.Option(metavar="KEY", help="Take a key off the list.")] = "",
    json: JsonOption = False,
) -> None:
    """Show your public key and those that you have listed.

    The compiled code of a pack that one of these keys signed is loaded; of any other pack, the schedules are compiled
    anew. Get a key from its owner, who sees it with this command, and not from the pack.
    """
    if trust:
        say(f"listed {trust_key(trust)}: code that it signed now runs with your rights")
    if forget:
        forget_key(forget)
        say(f"took {forget} off the list")
    own, listed = own_key(create=not (trust or forget)), trusted_keys()
    if json:
        show_json({"folder": str(keys_folder()), "own": own, "listed": listed})
        return
    typer.echo(f"{own}  yours" if own else "you have no key yet: mhc-tune keys or export makes one")
    for key, note in listed.items():
        typer.echo(f"{key}  trusted{f': {note}' if note else ''}")
