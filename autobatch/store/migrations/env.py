"""Run by Alembic: migrates one set of tables over the connection that it is handed."""

from alembic import context

attributes = context.config.attributes
schema = attributes["schema"]
own_tables = {*schema.metadata.tables, schema.version_table}


def is_own(_object: object, name: str | None, kind: str, _reflected: object, _other: object) -> bool:
    """Whether something of the database belongs to this set: another set's tables stand beside it."""
    return kind != "table" or name in own_tables


context.configure(
    connection=attributes["connection"],
    target_metadata=schema.metadata,
    version_table=schema.version_table,
    include_object=is_own,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
