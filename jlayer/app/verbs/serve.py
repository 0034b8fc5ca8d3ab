"""Serve a model over HTTP: the protocols of its clients under /v1, a page for people at /.

Whoever asks rides in the next forward pass with all others. It listens on this machine alone; for
other machines it needs --host and a key, and a proxy in front of it for TLS.
"""

from __future__ import annotations

import ipaddress
import os
from contextlib import contextmanager

from jlayer.app import options
from jlayer.app.inputs import argument_text, read_text
from jlayer.app.served import (
    adapter_names,
    add_served,
    check_packages,
    names_of,
    run_options,
    template_of,
)
from jlayer.app.streams import tell
from jlayer.errors import UsageError
from jlayer.interrupts import released
from jlayer.run_config import RunConfig

KEY = "JLAYER_API_KEY"
NEEDED = ("starlette", "uvicorn", "msgspec", "h11", "python_multipart")
MOST_QUEUED = 256


def add_arguments(parser):
    parser.add_argument("ref", metavar="MODEL", help=options.REF)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="the address to listen on (default: 127.0.0.1); others need a key",
    )
    parser.add_argument(
        "--port", type=int, default=8080, metavar="N", help="(default: 8080; 0: any that is free)"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"what clients must send (default: ${KEY}, if set)"
    )
    parser.add_argument("--api-key-file", metavar="F", help="a file with the key")
    parser.add_argument(
        "--max-queue",
        type=int,
        default=MOST_QUEUED,
        metavar="N",
        help=f"requests that may wait; more are told when to come back (default: {MOST_QUEUED})",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="H",
        help="answer requests for this host name too; may be repeated",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="O",
        help="let pages of this origin ask, such as https://example.com; may be repeated",
    )
    parser.add_argument(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="A",
        help="believe X-Forwarded-For of this address or network; may be repeated",
    )
    parser.add_argument(
        "--state", metavar="FOLDER", help="keep requests that outlive their connection here"
    )
    add_served(parser)


def run(args) -> dict | None:
    _check(args)
    key, template = api_key(args), template_of(args)
    if not is_loopback(args.host) and key is None:
        raise UsageError(
            f"--host: {args.host} is reached from other machines, and there is no key; give "
            f"--api-key-file F (or set {KEY}), or leave --host out"
        )
    check_packages("serve", NEEDED)
    from jlayer.app.together import followed

    if followed(args, run_options(args)):
        return None
    from jlayer.serving.http.guard import Rules
    from jlayer.serving.http.running import Serving, listen
    from jlayer.serving.http.site import Site

    own = () if args.host in ("0.0.0.0", "::") else (_host_name(args.host),)
    rules = Rules((*own, *args.allow_host), tuple(args.allow_origin), key, proxies_of(args))
    site = Site(rules, None if args.state is None else _journal(args))
    with listen(args.host, args.port) as listening, Serving(site, listening) as serving:
        tell(f"listening at {serving.address}/ while the model is opened")
        with _opened(args) as (model, desk):
            serving.opened(model, desk, names=names_of(args), chat_template=template)
            for line in model.notes:
                tell(line)
            names = ", ".join((names_of(args)[0], *adapter_names(args)))
            tell(
                f"serving {names} at {serving.address}/v1, with a page at "
                f"{serving.address}/; Ctrl-C ends it"
            )
            try:
                with released():
                    serving.wait()
            finally:
                serving.stop()  # first, so that streams end with an error that says why
    return {"address": serving.address}


@contextmanager
def _opened(args):
    """Yields the model and its desk."""
    from jlayer.app.together import opened_for
    from jlayer.serving.desk import Desk
    from jlayer.serving.queue import Limits

    with opened_for(args, run_options(args)) as model:
        desk = Desk(model, limits=Limits(people=args.max_queue))
        desk.start()
        try:
            yield model, desk
        finally:
            desk.stop()


def _journal(args):
    """What an earlier server has accepted. Raises UsageError where that was for another model."""
    from jlayer.serving.http.journal import Journal

    journal = Journal(args.state)
    own = (*names_of(args), *adapter_names(args))
    for request in journal.requests.values():
        if "ended" not in request and request["model"] not in own:
            journal.close()
            raise UsageError(
                f"--state: {args.state} has requests that were accepted for {request['model']}; "
                "serve that model, or give another folder"
            )
    return journal


def _check(args):
    RunConfig.from_options(**run_options(args))
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port: found {args.port}, expected 0 to 65535")
    if args.max_queue < 1:
        raise UsageError(f"--max-queue: found {args.max_queue}, expected 1 or more")
    if args.api_key is not None and args.api_key_file is not None:
        raise UsageError("--api-key: --api-key-file was given too; keep one")
    names_of(args)
    proxies_of(args)


def api_key(args) -> str | None:
    """From the option, a file or the environment, in this order. Raises UsageError: it is empty, or
    no header can carry it."""
    if args.api_key_file is not None:
        where = f"--api-key-file: {args.api_key_file}"
        found = read_text(args.api_key_file, option="--api-key-file").strip()
    elif args.api_key is not None:
        where, found = "--api-key", argument_text(args.api_key, option="--api-key")
    elif os.environ.get(KEY):
        where, found = KEY, os.environ[KEY].strip()
    else:
        return None
    if not found or not found.isascii() or not found.isprintable() or " " in found:
        raise UsageError(f"{where}: no key, expected letters, digits and signs of ASCII, no spaces")
    return found


def proxies_of(args) -> tuple:
    """The networks of the proxies that are trusted. Raises UsageError where one is none, or is
    everybody: then nobody would be left to be the client."""
    found = []
    for word in args.trusted_proxy:
        try:
            network = ipaddress.ip_network(word.strip("[]"))
        except ValueError as error:
            raise UsageError(
                f"--trusted-proxy: found {word!r}, expected an address or a network, such as "
                f"127.0.0.1 or 10.0.0.0/8 ({error})"
            ) from None
        if not network.prefixlen:
            raise UsageError(
                f"--trusted-proxy: found {word!r}, which is every address; name the proxy's own"
            )
        if network.version == 6 and network.network_address.ipv4_mapped is not None:
            raise UsageError(
                f"--trusted-proxy: found {word!r}, which is an IPv4 address as IPv6; write "
                f"{network.network_address.ipv4_mapped}"
            )
        found.append(network)
    return tuple(found)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _host_name(host):
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
