"""`autobatch serve` and `autobatch token`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from autobatch import UnavailableError, UsageError
from autobatch_server.settings import ENVIRONMENT_PREFIX, Settings, default_config_path, load_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from autobatch_server.tokens import TokenRecord, TokenStore

__all__ = ["main"]

_SCOPES = ("plan:read", "probe:write", "admin")
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str]) -> int:
    """Run `serve …` or `token …`.

    Args:
        arguments: what stands after `autobatch`.

    Returns:
        The exit status.

    Raises:
        UsageError: what was asked for has no meaning.
        UnavailableError: a package, the address or the database is not there.
    """
    parser = _build_parser()
    parsed = parser.parse_args(list(arguments))
    try:
        return int(parsed.run(parsed))
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"the service needs {error.name}, which is not installed: pip install '.[server]' in autobatch's own folder"
        ) from None


def _build_parser() -> _Parser:
    parser = _Parser(prog="autobatch", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    serve = commands.add_parser(
        "serve",
        help="the REST service",
        description="Serve the REST interface and run probes. " + _described_sources(),
        epilog=_described_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_common(serve)
    serve.add_argument("--host", default=argparse.SUPPRESS, help="address to listen on (default 127.0.0.1)")
    serve.add_argument(
        "--port", default=argparse.SUPPRESS, type=int, help="port to listen on (default 8000; 0: a free one)"
    )
    serve.add_argument("--log-level", default=argparse.SUPPRESS, choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    serve.add_argument(
        "--no-probes",
        dest="run_probes",
        action="store_false",
        default=argparse.SUPPRESS,
        help="answer, but run no probes here",
    )
    serve.add_argument(
        "--no-http",
        dest="serve_http",
        action="store_false",
        default=argparse.SUPPRESS,
        help="run probes, but answer nothing",
    )
    serve.add_argument(
        "--check",
        action="store_true",
        help="start nothing: end with 0 where the service with these settings is up on this machine, for health checks",
    )
    serve.set_defaults(run=_serve)
    token = commands.add_parser("token", help="tokens of the REST service", allow_abbrev=False)
    actions = token.add_subparsers(required=True, metavar="create|list|revoke")
    create = actions.add_parser("create", help="make a token and print it once", allow_abbrev=False)
    create.add_argument("name", help="what it is for, such as the scheduler's name")
    create.add_argument(
        "--scope",
        action="append",
        choices=_SCOPES,
        help="what it allows (default plan:read); each holds those before it",
    )
    create.add_argument(
        "--expires",
        metavar="30d",
        help="for how long it holds: minutes m, hours h, days d, weeks w (default: for ever)",
    )
    create.set_defaults(run=_create)
    listing = actions.add_parser("list", help="list the tokens, without their secrets", allow_abbrev=False)
    listing.set_defaults(run=_list)
    revoke = actions.add_parser("revoke", help="end a token at once", allow_abbrev=False)
    revoke.add_argument("id", help="the token's id, from `autobatch token list`")
    revoke.set_defaults(run=_revoke)
    for action in (create, listing, revoke):
        _add_common(action)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"the operator's TOML file (default {default_config_path()})"
    )
    parser.add_argument("--database-url", default=argparse.SUPPRESS, metavar="URL", help="where everything is kept")


def _described_sources() -> str:
    return f"Settings come from flags, then from variables ({ENVIRONMENT_PREFIX}…), then from the file that --config names."


def _described_settings() -> str:
    """Every setting in a line of its own."""
    lines = ["settings (a key of the file; in capitals after AUTOBATCH_SERVER_ a variable):"]
    for name, field in Settings.model_fields.items():
        if field.default_factory is not None and name != "workloads":
            default = " (default: in the user's data folder)"
        elif field.default in {"", ()} or field.default_factory is not None:
            default = ""
        else:
            shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
            default = f" (default {shown})"
        lines.append(f"  {name:22} {field.description}{default}")
    return "\n".join(lines)


def _settings(parsed: argparse.Namespace) -> Settings:
    flags = {name: value for name, value in vars(parsed).items() if name in Settings.model_fields}
    return load_settings(parsed.config, flags)


def _serve(parsed: argparse.Namespace) -> int:
    settings = _settings(parsed)
    if parsed.check:
        from autobatch_server.checking import check

        sys.stdout.write(check(settings) + "\n")
        return 0
    from autobatch_server.serving import serve

    return serve(settings)


@contextlib.contextmanager
def _tokens(parsed: argparse.Namespace) -> Iterator[TokenStore]:
    from autobatch.store import StoreUnavailableError
    from autobatch_server.database import open_database
    from autobatch_server.tokens import TokenStore

    try:
        with open_database(_settings(parsed).database_url) as database:
            yield TokenStore(database)
    except StoreUnavailableError:
        raise UnavailableError(
            "the database cannot be used now: it is away, locked or full; nothing was changed"
        ) from None


def _create(parsed: argparse.Namespace) -> int:
    name = parsed.name.strip()
    if not name or len(name) > 128 or not name.isprintable():
        raise UsageError(f"token name {parsed.name!r} is empty, over 128 characters or not printable")
    seconds = _read_duration(parsed.expires)
    with _tokens(parsed) as tokens:
        record, text = tokens.create(name, parsed.scope or ["plan:read"], seconds=seconds)
    sys.stderr.write(
        f"autobatch: token {record.id} ({', '.join(record.scopes)}); it is shown this once and kept nowhere\n"
    )
    sys.stdout.write(text + "\n")
    return 0


def _read_duration(text: str | None) -> float | None:
    if text is None:
        return None
    number, unit = text[:-1], text[-1:]
    if (
        not (number.isascii() and number.isdecimal() and len(number) < 10)
        or unit not in _SECONDS
        or not 0 < int(number) * _SECONDS[unit] <= 10 * 365 * 86400
    ):
        raise UsageError(
            f"--expires {text!r} is no time from 1 minute to 10 years: write a number and m, h, d or w, as in 30d"
        )
    return float(int(number) * _SECONDS[unit])


def _list(parsed: argparse.Namespace) -> int:
    with _tokens(parsed) as tokens:
        records = tokens.list_all()
    for record in records:
        sys.stdout.write(_line(record) + "\n")
    if not records:
        sys.stderr.write("autobatch: there are no tokens; on a loopback address everything is open\n")
    return 0


def _line(record: TokenRecord) -> str:
    from autobatch.store import iso_time

    state = f"revoked {iso_time(record.revoked_at)}" if record.revoked_at else "holds"
    if not record.revoked_at and record.expires_at:
        state = f"{'expired' if record.expires_at <= time.time() else 'expires'} {iso_time(record.expires_at)}"
    return f"{record.id}  {','.join(record.scopes):24}  {state:34}  {record.name}"


def _revoke(parsed: argparse.Namespace) -> int:
    with _tokens(parsed) as tokens:
        record = tokens.revoke(parsed.id)
    if record is None:
        raise UsageError(f"there is no token {parsed.id!r}: `autobatch token list` lists them")
    sys.stderr.write(f"autobatch: token {record.id} ({record.name}) holds no more\n")
    return 0
