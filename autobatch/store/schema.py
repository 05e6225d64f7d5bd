"""Tables and the migrations that make them: brought up to date when a database is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect, select
from sqlalchemy import table as any_table
from sqlalchemy.sql import column

from autobatch.errors import UsageError
from autobatch.store.tables import metadata

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection, MetaData

__all__ = ["STORE_SCHEMA", "Schema", "is_current", "migrations", "upgrade"]


@dataclass(frozen=True, kw_only=True)
class Schema:
    """A set of tables with migrations of its own; one database may hold several sets."""

    metadata: MetaData
    """The tables as the code knows them."""
    versions: str
    """The folder of the migrations, as `package:folder`."""
    version_table: str
    """Where the database keeps which of them it has."""
    head: str
    """The newest migration."""


STORE_SCHEMA = Schema(
    metadata=metadata,
    versions="autobatch.store:migrations/versions",
    version_table="store_version",
    head="0002",
)
"""The tables of measurements."""


def is_current(connection: Connection, schema: Schema) -> bool:
    """Whether a database has the newest tables, told without Alembic, whose import takes longer than most uses."""
    if not inspect(connection).has_table(schema.version_table):
        return False
    versions = any_table(schema.version_table, column("version_num"))
    return list(connection.execute(select(versions.c.version_num)).scalars()) == [schema.head]


def upgrade(connection: Connection, schema: Schema) -> None:
    """Run the migrations that are missing.

    Raises:
        UsageError: the database has a migration that this version does not know.
    """
    from alembic import command
    from alembic.util import CommandError

    try:
        command.upgrade(migrations(connection, schema), "head")
    except CommandError as error:  # its version is none of those that there are here
        raise UsageError(
            f"the database was made by a newer autobatch ({error}): upgrade this one, or take another database"
        ) from None
    connection.commit()


def migrations(connection: Connection, schema: Schema) -> Config:
    """Alembic's configuration for a set of tables, over a connection."""
    from alembic.config import Config

    configuration = Config()
    configuration.set_main_option("script_location", "autobatch.store:migrations")
    configuration.set_main_option("version_locations", schema.versions)
    configuration.set_main_option("path_separator", "newline")  # not the colon of `package:folder`
    attributes: dict[str, Any] = configuration.attributes
    attributes["connection"] = connection
    attributes["schema"] = schema
    return configuration
